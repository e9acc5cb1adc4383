"""TensorBoard's HParams page: the axes of a study as columns, beside what they cost.

tensorboardX's own ``hparams`` lists no values and knows only successes, so the records are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tensorboardX.proto.api_pb2 import (
    DataType,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
    Status,
)
from tensorboardX.proto.plugin_hparams_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from tune_study.folder import names

METRICS = {
    "compare/test_accuracy": "test accuracy",
    "compare/best_val_accuracy": "best val. accuracy",
    "compare/weights_MB": "base weights, MB",
    "compare/peak_train_MB": "training peak, MB",
    "compare/activation_MB": "activations, MB",
    "compare/grad_norm_cv": "gradient norm CV",
    "gradients/stability_score": "stability score",
    "compare/gradient_cosine_start": "gradient fidelity",
    "compare/feature_cosine": "feature fidelity",
    "compare/quantization_error": "quantization error",
    "compare/test_loss": "test loss",
}
"""The metric columns: the scalar's tag, whose newest value is shown, and the heading."""

_COLUMN_NAMES = {
    "quantization.mode": "quantization",
    "lora.r": "lora_r",
    "lora.lora_alpha": "lora_alpha",
}
_ALWAYS = ("quantization.mode", "seed")


class Axis(NamedTuple):
    """One column of hyperparameters."""

    name: str
    """The dotted field of ``TrialConfig``; ``quantization.mode`` stands for the treatment."""
    numeric: bool
    values: list[Any]
    """What the page offers to tick; none for a search, which draws from ranges."""

    @property
    def column(self) -> str:
        return _COLUMN_NAMES.get(self.name, self.name)

    def of(self, cell: Mapping[str, Any]) -> float | str:
        """The value of a trial, given as a flat dictionary."""
        value = cell.get(self.name)
        return float(value) if self.numeric and value is not None else str(value)


def axes_of(plan: Sequence[Mapping[str, Any]], *, listed: bool = True) -> list[Axis]:
    """The fields in which the planned trials differ, and always treatment and seed.

    TensorBoard shows only the first few columns of its table: constants would hide the axes.
    ``listed=False`` names no possible values.
    """
    cells = [_flat(entry) for entry in plan]
    fields = dict.fromkeys(name for cell in cells for name in cell)
    found = []
    for name in fields:
        values = {str(cell.get(name)): cell.get(name) for cell in cells}
        if name not in _ALWAYS and len(values) == 1:
            continue
        # A seed is a name: as a number, the page would print 42 as 42.000.
        numeric = name != "seed" and all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for value in values.values()
        )
        axis = Axis(name, numeric, [])
        possible = sorted({axis.of({name: value}) for value in values.values()}, key=_order)
        found.append(axis._replace(values=possible if listed else []))
    return found


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's settings. What is skipped or overridden is told by the name of its treatment."""
    flat = names.settings(entry)
    flat["quantization.mode"] = names.treatment(entry)
    told = ("quantization.skip_layers", "quantization.overrides")
    return {name: value for name, value in flat.items() if name not in told}


def _order(value: float | str) -> tuple[float, str]:
    """Numbers by size, also those that are names, then words."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, str(value)


def experiment(axes: Sequence[Axis]) -> Summary:
    """The columns of the page. One run of a study holds it: the page takes the first it finds."""
    infos = []
    for axis in axes:
        kind = "DATA_TYPE_FLOAT64" if axis.numeric else "DATA_TYPE_STRING"
        info = HParamInfo(name=axis.column, type=DataType.Value(kind))
        info.domain_discrete.extend(axis.values)
        infos.append(info)
    metrics = [
        MetricInfo(name=MetricName(tag=tag), display_name=heading)
        for tag, heading in METRICS.items()
    ]
    found = Experiment(hparam_infos=infos, metric_infos=metrics)
    return _summary("experiment", HParamsPluginData(experiment=found))


def session_start(trial_id: str, trial: Mapping[str, Any], axes: Sequence[Axis]) -> Summary:
    """One row of the table; ``trial`` is a ``TrialConfig`` as a dictionary."""
    cell = _flat(trial)
    info = SessionStartInfo(group_name=trial_id, start_time_secs=time.time())
    for axis in axes:
        value = axis.of(cell)
        if isinstance(value, str):
            info.hparams[axis.column].string_value = value
        else:
            info.hparams[axis.column].number_value = value
    return _summary("session_start_info", HParamsPluginData(session_start_info=info))


def session_end(*, failed: bool) -> Summary:
    """The row's trial has ended. Without it the page counts the trial as running."""
    status = Status.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    return _summary("session_end_info", HParamsPluginData(session_end_info=info))


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=f"_hparams_/{tag}", metadata=metadata)])
