"""Bridges to other projects: thin, each in its own file, importing only this package's public names."""
