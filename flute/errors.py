"""The failures a caller may want to tell apart.

Every message says what, expected, got, what to do.
"""


class FluteError(Exception):
    """Base of all errors raised here on purpose; the command line prints them in one line."""


class FormatError(FluteError, ValueError):
    """A tensor, spec or config breaks an invariant of the format."""


class UnsupportedProblemError(FluteError, ValueError):
    """A well-formed request that nothing here can serve; the message names the broken rule."""


class CheckpointError(FluteError, RuntimeError):
    """A checkpoint on disk is missing, truncated, occupied or cannot be written."""


class ChecksumError(CheckpointError):
    """A tensor on disk differs from the checksum recorded when it was written."""
