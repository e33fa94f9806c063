"""Passes: each one changes a model and knows no other."""
