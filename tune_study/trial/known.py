"""What is known of a simulated trial before it is drawn: counted by the command, which has loaded
torch, for workers that have not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tune_study.config import TrialConfig
from tune_study.machine.provenance import hardware
from tune_study.model.footprint import bytes_at, expected_weights_bytes
from tune_study.model.layers import skeleton_of
from tune_study.trial.simulate import CLASSES


def known_of(config: TrialConfig) -> dict[str, Any]:
    """``weights``: the columns of the base model's bytes, exact; ``hardware``: this machine's.

    As JSON takes it.
    """
    of_all_seeds = config.model_copy(update={"seed": 0})
    return {"weights": _weights(of_all_seeds.model_dump_json()), "hardware": hardware()}


@lru_cache(maxsize=4096)
def _weights(text: str) -> dict[str, int]:
    config = TrialConfig.model_validate_json(text)
    skeleton = skeleton_of(config.model, CLASSES.get(config.dataset, 10), config.data.image_size)
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    return {
        "weights_bytes": expected_weights_bytes(skeleton, config),
        "weights_bytes_fp32": bytes_at(tensors, 4),
        "weights_bytes_16bit": bytes_at(tensors, 2),
    }
