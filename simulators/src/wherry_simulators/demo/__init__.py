"""The demo: one real model from the optimizer to a fleet and back, with everything that can go wrong on the way."""
