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


def reason_of(error: BaseException, lines: int = 1) -> str:
    """Return what another library's error says, for a message of ours to go on after it.

    Args:
        error: any exception.
        lines: how many lines of its text to take, blank ones not counted.

    Returns:
        One line without a full stop; the error's name if it says nothing.
    """
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]).rstrip(".:") or type(error).__name__
