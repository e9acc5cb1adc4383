"""How a trial runs: one quantized-LoRA Vision Transformer, trained, measured and verified."""
