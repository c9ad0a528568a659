"""Training a LoRA."""
