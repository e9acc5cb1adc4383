"""Published figures beside ours: the claims, QLoRA's ratios, vision."""
