"""Bridges to other projects, each in its own file; they import only public names."""
