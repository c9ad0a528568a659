"""Sampling of a rectified flow: arrays only, no files, no options."""
