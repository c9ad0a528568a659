"""Checkpoints: find, read, check, load, write."""
