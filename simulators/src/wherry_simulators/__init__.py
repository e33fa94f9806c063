"""Worlds, swarms and the demo: the real machine under virtual trouble."""

__version__ = "0.1.0"
