"""Assigns staged rollouts of signed bundles to fleets of devices."""

__version__ = "0.1.0"
