"""How a tensor's numbers are stored, one file a format."""
