"""What files call the weights, one file a part."""
