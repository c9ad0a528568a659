"""The names that files give the weights, one file a part."""
