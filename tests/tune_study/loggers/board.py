"""A folder of event files as TensorBoard's own code reads it."""

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import ListHyperparametersResult
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin


def _context(logdir: Path) -> base_plugin.TBContext:
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    return base_plugin.TBContext(data_provider=provider, logdir=str(logdir))


def hparams(logdir: Path) -> tuple[Any, dict[str, Any]]:
    """(the experiment, the rows of the table by trial id)."""
    context, request = Context(_context(logdir)), RequestContext()
    content = context.hparams_metadata(request, "")
    nothing = ListHyperparametersResult(hyperparameters=[], session_groups=[])
    experiment = context.experiment_from_metadata(request, "", True, content, nothing)
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=1000,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=[
            api_pb2.STATUS_UNKNOWN,
            api_pb2.STATUS_SUCCESS,
            api_pb2.STATUS_FAILURE,
            api_pb2.STATUS_RUNNING,
        ],
    )
    found = list_session_groups.Handler(request, context, "", wanted).run()
    return experiment, {group.name: group for group in found.session_groups}


def charts(logdir: Path, runs: list[str]) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """{category: {chart: {run: its points as (step, value)}}}, as Custom Scalars draws them."""
    context, request = _context(logdir), RequestContext()
    scalars = ScalarsPlugin(context)
    context.plugin_name_to_instance = {"scalars": scalars}
    plugin = CustomScalarsPlugin(context)
    layout = plugin.layout_impl(request, "")
    layout = json.loads(layout) if isinstance(layout, str) else layout
    found: dict[str, Any] = {}
    for category in layout["category"]:
        for chart in category["chart"]:
            (tag,) = chart["multiline"]["tag"]
            drawn = found.setdefault(category["title"], {}).setdefault(chart["title"], {})
            for run in runs:
                for points in plugin.scalars_impl(request, run, tag, "")["tag_to_events"].values():
                    drawn[run] = [(step, value) for _, step, value in points]
    return found


def images(folder: Path) -> dict[str, list[Any]]:
    """{tag: its images} of one run."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}
