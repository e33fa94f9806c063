"""The worker: a process that serves what the supervisor says, and swaps by reference while it serves."""
