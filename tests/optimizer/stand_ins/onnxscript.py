"""What the exporter of the stand-in's `torch` is asked to have beside it."""
