"""One trial, run or continued: from its configuration to its results.json."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from search_spaces.own_code import run_where_trials_run
from tune_study.config import TrialConfig
from tune_study.data.splits import load
from tune_study.errors import first_line
from tune_study.folder.files import mapping, read_json, write_folder_whole, write_json
from tune_study.folder.remote import RemoteError
from tune_study.machine.device import lacks_deterministic_kernel, settle
from tune_study.machine.disk import disk_full, refuse_full_disk
from tune_study.machine.energy import EnergyMeter
from tune_study.machine.environment import spare_imports_from_collection
from tune_study.machine.resources import (
    ResourceMonitor,
    is_out_of_memory,
    release_memory,
    reset_rss_peak,
)
from tune_study.memory.estimate import refuse_what_cannot_fit
from tune_study.memory.predict import predict
from tune_study.model import hub
from tune_study.model.build import BuiltModel, build_model, preprocessing
from tune_study.model.initial import added_by_training
from tune_study.trial import checkpoint, fidelity, train
from tune_study.trial.card import write_card
from tune_study.trial.checkpoint import STATES_PER_CHECKPOINT
from tune_study.trial.context import Report, RunContext
from tune_study.trial.micro_batch import note_out_of_memory, within_memory
from tune_study.trial.record import Record
from tune_study.trial.training import Training

LOCK_WAIT_S = 60
"""How long a trial waits for the worker of a killed run to end."""


def execute(config: TrialConfig, context: RunContext, report: Report) -> dict[str, Any]:
    """Runs or continues one trial and returns its ``results.json``.

    The trial continues from its newest whole checkpoint under ``context.study_dir``, wherever that
    folder has been moved to; the rows before it are reported again first, so that the logs of
    every run are complete. Out of memory, it goes on with a smaller micro-batch. Raises
    ``DiskFull`` and leaves the trial to be continued; any other exception ends it.
    """
    torch.set_num_threads(context.num_threads)
    spare_imports_from_collection()
    reset_rss_peak()
    folder = context.study_dir / config.trial_id
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=LOCK_WAIT_S):
        record = Record(config, folder, context.device, context.num_threads)
        record.settings = settle(torch.device(context.device))
        report = _each_epoch_once(report)
        try:
            while not _attempt(config, context, report, record):
                release_memory()
        finally:
            release_memory()  # the next trial of this worker starts without this one's tensors
    return record.content


def _each_epoch_once(report: Report) -> Report:
    """A second attempt replays epochs that Tune has already seen."""
    seen = 0

    def once(row: dict[str, Any]) -> None:
        nonlocal seen
        if row["epoch"] > seen:
            seen = int(row["epoch"])
            report(row)

    return once


def _attempt(config: TrialConfig, context: RunContext, report: Report, record: Record) -> bool:
    """Whether the trial ended; ``False`` when it can try again, with less memory or strictness."""
    try:
        (record.folder / "error.json").unlink(missing_ok=True)
        write_json(record.folder / "config.json", config.model_dump(mode="json"))
        run_where_trials_run(context.code)
        record.effective = within_memory(config, record.folder)
        _train(context, report, record)
    except RemoteError:
        raise  # nothing is wrong with the trial
    except Exception as error:
        if full := disk_full(error, context.study_dir):
            raise full from error
        if lacks_deterministic_kernel(error) and record.settings.get("deterministic"):
            record.warn(f"a repeat of this trial may differ in the last bits: {first_line(error)}")
            record.settings = settle(torch.device(context.device), strict=False)
            record.training = None
            return False
        micro = record.effective.training.per_device_train_batch_size
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory or micro == 1:
            record.write("oom" if out_of_memory else "error", error)
            raise
        note_out_of_memory(record.folder, micro, f"{type(error).__name__}: {error}")
        smaller = within_memory(config, record.folder).training
        record.warn(
            f"out of memory with micro-batches of {micro} images: goes on from the last epoch with "
            f"{smaller.per_device_train_batch_size}, {smaller.gradient_accumulation_steps} a step"
        )
        record.training = None
        return False
    return True


def _train(context: RunContext, report: Report, record: Record) -> None:
    config, device = record.effective, torch.device(context.device)
    data = load(config.dataset, context.place, config.data, preprocessing(config))
    _refuse_to_start(config, context, len(data.class_names))
    built = build_model(config, len(data.class_names), weights=context.weights, device=device)
    training = train.start(config, built, data, device, context.code)
    record.built(built, training)
    meter = record.meter = EnergyMeter(device, context.trials_on_device)
    training.joules = meter.joules
    _continue(training, built, context, record)
    for row in training.history:
        report(record.report_row(row))
    record.write("interrupted")
    with ResourceMonitor(device, also=meter.joules) as resources:
        for row in train.fit(training):
            row |= resources.read()  # the history holds the same row
            record.warn_of_graph(training)
            _save(training, context, record)
            record.write("interrupted")
            record.log(f"epoch {row['epoch']}: validation accuracy {row['val_accuracy']:.4f}")
            report(record.report_row(row))
    status = train.finished(training)
    assert status is not None
    with record.measuring():
        record.fidelity["end"] = fidelity.at_end(training, context.weights)._asdict()
    if training.best:
        started = time.perf_counter()
        record.test_metrics = train.test(training)
        record.test_time_s = time.perf_counter() - started
        if context.keep_checkpoints != "none":
            record.write("interrupted")  # what the adapter's card says of the test
            write_folder_whole(
                record.folder / "adapter", lambda path: _leave_adapter(built, path, context, record)
            )
    record.write(status)
    record.log(status)
    if status != "diverged" and context.keep_checkpoints != "all":
        checkpoint.prune(record.folder, keep=0)


def _refuse_to_start(config: TrialConfig, context: RunContext, classes: int) -> None:
    """Raises ``UserError`` when memory, ``DiskFull`` when the disk is clearly not enough."""
    device = torch.device(context.device)
    refuse_what_cannot_fit(config, classes, device)
    adapter_bytes = predict(config, classes, device).ledger.adapter_bytes
    refuse_full_disk(context.study_dir, STATES_PER_CHECKPOINT * adapter_bytes)


def _continue(training: Training, built: BuiltModel, context: RunContext, record: Record) -> None:
    """Loads the newest whole checkpoint, or measures what is measured before the first step."""
    config = record.effective
    found, broken = checkpoint.newest(record.folder)
    for path in broken:
        record.warn(f"checkpoint {path.name} is not whole: continues from the one before")
    extra: dict[str, Any] = {}
    record.trials_on_device = context.trials_on_device
    if found is not None:
        state, extra = checkpoint.load(found)
        training.load_state_dict(state)
        record.memory, record.fidelity = extra["memory"], extra.get("fidelity", {})
        before = extra.get("trials_on_device")
        record.trials_on_device = before and max(before, context.trials_on_device)
        record.log(f"continues after epoch {len(training.history)}, from {found.name}")
    else:
        record.log(f"starts on {context.device}")
    if extra.get("micro_batch") != config.training.per_device_train_batch_size:
        with record.measuring():
            record.memory = _memory(config, built, training)
        release_memory()
    if found is None:
        with record.measuring():
            record.fidelity = _fidelity_at_start(training, context.weights)


def _save(training: Training, context: RunContext, record: Record) -> None:
    extra = {
        "memory": record.memory,
        "fidelity": record.fidelity,
        "micro_batch": training.config.training.per_device_train_batch_size,
        "trials_on_device": record.trials_on_device,
    }
    checkpoint.save(record.folder, training.state_dict(), extra)
    if context.keep_checkpoints != "all":
        checkpoint.prune(record.folder)


def _leave_adapter(built: BuiltModel, folder: Path, context: RunContext, record: Record) -> None:
    """The adapter, which names its base, and a card of ours in place of PEFT's template."""
    config = record.config
    own = config.pretrained and context.weights is None
    save_adapter(built, folder, (own and hub.repository(config.model)) or config.model)
    study = read_json(context.study_dir / "study.json")
    write_card(folder, record.content, mapping(study).get("command"))


def save_adapter(built: BuiltModel, folder: Path, base: str) -> None:
    """In PEFT's layout, for the original model, called ``base``.

    Adapters that began with a part of the base, B0 A0, hold that part as well: what training added
    is scaling * (B A - B0 A0), of twice the rank. PEFT converts PiSSA's so
    (``LoraModel.subtract_mutated_init``), but not where ranks differ and scale by their root.
    """
    built.model.peft_config["default"].base_model_name_or_path = base
    with added_by_training(built.model, built.factors) as state:
        built.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)


def _memory(config: TrialConfig, built: BuiltModel, training: Training) -> dict[str, Any]:
    """The ledger, measured and predicted, and what follows from it (``schema.TRIALS`` columns)."""
    measured = train.measure_memory(training)
    expected = predict(config, len(training.data.class_names), training.device)
    peak = measured.peak_train_bytes or math.nan
    saved = built.bytes_fp32 - built.weights_bytes
    return {
        **measured._asdict(),
        "predicted_activation_bytes": expected.ledger.activation_bytes,
        "predicted_peak_train_bytes": expected.peak_train_bytes,
        "quantizable_peak_fraction": built.quantizable_bytes / peak,
        "peak_saving_fp32": saved / (peak + saved),
    }


def _fidelity_at_start(training: Training, weights: Path | None) -> dict[str, Any]:
    gradients, outputs = fidelity.at_start(training, weights)
    return {"start": gradients._asdict(), "outputs": outputs._asdict()}
