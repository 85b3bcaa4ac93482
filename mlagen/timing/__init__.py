"""Timing on a GPU: what is timed, against what, and how; it knows no peer and prints nothing."""
