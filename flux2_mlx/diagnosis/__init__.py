"""Checks of a machine: what it is, whether it computes what a CPU computes in float32, and how fast."""
