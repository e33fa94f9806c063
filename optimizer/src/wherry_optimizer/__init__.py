"""Quantizes, prunes, evaluates and packs models into signed bundles."""

from wherry_shared import engine_telemetry

engine_telemetry.turn_off()

__version__ = "0.1.0"
