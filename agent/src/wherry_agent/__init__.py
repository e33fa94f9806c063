"""Verifies, swaps and serves models on the device, and goes back by itself."""

__version__ = "0.1.0"
