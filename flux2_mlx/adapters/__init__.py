"""LoRA and its kin."""
