"""The three networks of FLUX.2 [klein]: parameters and arithmetic only."""
