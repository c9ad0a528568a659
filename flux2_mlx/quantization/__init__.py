"""Quantization: packed weights, the layers that hold them, and which layers get how many bits."""
