"""Answering requests: loaded variants, the run gate, and the rule by which a trial falls back."""
