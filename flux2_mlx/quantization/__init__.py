"""Packed layers: how, which, and with what."""
