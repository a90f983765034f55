"""The package's version, as in pyproject.toml. Below 0.4.1: see ARCHITECTURE.md, Decisions."""

__version__ = "0.1.0"
