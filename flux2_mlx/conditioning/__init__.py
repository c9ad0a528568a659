"""Prompts and references to what the transformer is given."""
