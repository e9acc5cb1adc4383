"""The quantized LoRA Vision Transformer."""
