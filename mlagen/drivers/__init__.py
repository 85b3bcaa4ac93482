"""Drivers: load a binary and launch it.  They know source text, binaries and argument blocks, never the IR."""
