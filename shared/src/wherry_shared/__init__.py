"""What server, optimizer and agent agree on: formats, messages, digests, engines."""

__version__ = "0.1.0"
