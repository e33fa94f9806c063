"""The program that makes a machine a device; it runs there, alone."""
