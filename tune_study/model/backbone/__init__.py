"""The demo's backbone: a small ViT for 32-pixel images, shipped with its weights.

Importing this package registers `vit_glyphs_patch4_32` with timm and does nothing else:

    import tune_study.model.backbone
    model = timm.create_model("vit_glyphs_patch4_32", pretrained=True, num_classes=10)

The weights lie beside this file, so nothing is downloaded. README.md says how good they are, and
`examples/backbone`, which made them, can make them again.
"""

from functools import partial
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

MODEL_NAME = "vit_glyphs_patch4_32"
NUM_GLYPHS = 384
WEIGHTS_FILE = Path(__file__).with_name(f"{MODEL_NAME}.safetensors")
RECORD_FILE = Path(__file__).with_name("record.json")

__all__ = ["MODEL_NAME", "NUM_GLYPHS", "RECORD_FILE", "WEIGHTS_FILE", "vit_glyphs_patch4_32"]

# register_model looks for this name in the module that defines the entry point. A `file` comes
# before any hub id or URL when timm looks for weights, and here there is neither.
default_cfgs = generate_default_cfgs(
    {
        MODEL_NAME: {
            "file": str(WEIGHTS_FILE),
            "url": "",
            "hf_hub_id": None,
            "num_classes": NUM_GLYPHS,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


def vit_glyphs_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the 6-block, 128-wide ViT; images `[B, 3, 32, 32]` -> logits `[B, num_classes]`.

    Every `nn.Linear` of a block has dimensions that are multiples of 64, the block size of nf4.
    """
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer,
        MODEL_NAME,
        pretrained,
        # Resamples the position embedding when img_size is not 32.
        pretrained_filter_fn=partial(checkpoint_filter_fn, interpolation="bicubic"),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(sizes | kwargs),
    )


# timm warns when a name is registered again, which a reload of this module would do.
if not is_model(MODEL_NAME):
    register_model(vit_glyphs_patch4_32)
