"""Quantizes, prunes, evaluates and packs models into signed bundles."""

__version__ = "0.1.0"
