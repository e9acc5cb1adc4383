"""What trials compute in, where they do not say it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tune_study.config import TrialConfig
from tune_study.machine.device import without_bf16


def settle_compute_dtype(
    trials: Sequence[TrialConfig],
    device: str,
    planned: Collection[str] = (),
    compute_dtype: str | None = None,
) -> tuple[list[TrialConfig], str | None]:
    """(trials, ``without_bf16`` of ``device``, where that mattered).

    A trial that does not name its ``compute_dtype`` computes in bf16, but on a device without fast
    bf16 in fp32. In a study that is continued or extended, a trial whose id is among ``planned``
    keeps what it was planned with, and a new one takes ``compute_dtype``, that of all planned
    trials, whatever the device is.
    """
    settled, asked = [], False
    for trial in trials:
        if "compute_dtype" not in trial.training.model_fields_set and (
            trial.trial_id not in planned
        ):
            asked = True
            training = trial.training.model_copy(update={"compute_dtype": "fp32"})
            fp32 = trial.model_copy(update={"training": training})
            wanted = compute_dtype or (
                "fp32" if without_bf16(device) else trial.training.compute_dtype
            )
            if fp32.trial_id in planned or wanted == "fp32":
                trial = fp32
        settled.append(trial)
    return settled, without_bf16(device) if asked else None
