"""How files store a tensor's numbers, one file a format; decode.FORMATS lists them."""
