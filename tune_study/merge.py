"""``python -m tune_study.merge A B --output C``: the trials of several studies in one folder.

Studies are merged within one protocol, on the same data and weights. The sources stay as they are,
and C is written whole or not at all; it can be continued and extended like any study.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from analysis.load import rebuild, write_tables
from tune_study.config import TrialConfig
from tune_study.errors import UserError, printed
from tune_study.folder.files import mapping, now, write_folder_whole, write_json
from tune_study.folder.results import read_results
from tune_study.folder.schema import FINISHED_STATUSES, PLANNED_ENDS
from tune_study.study import protocol
from tune_study.study.manifest import (
    FORMAT,
    changed_code,
    changed_inputs,
    joined,
    listed_changes,
    planned,
    read_manifest,
)

LEARNED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
"""What an epoch of a trial repeats to the last bit; times and memory do not."""
RUN_FILES = (".lock", ".run.json", "*.tmp")


class Source(NamedTuple):
    """One of the studies, read and not changed."""

    name: str
    """Of the folder; a number behind it tells two of one name apart."""
    folder: Path
    manifest: dict[str, Any]
    trials: list[TrialConfig]

    def results(self, trial_id: str) -> Mapping[str, Any]:
        """The trial's results.json; empty when there is none."""
        return read_results(self.folder, trial_id)


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Raises ``UserError`` for a folder that is no grid's study, or that is named twice."""
    sources: list[Source] = []
    for folder in folders:
        if any(folder.resolve() == other.folder.resolve() for other in sources):
            raise UserError(f"{folder} is named twice; name each study once")
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            words = str(error).removesuffix("; choose another --name")
            raise UserError(f"{folder}: {words.partition(': ')[2]}; leave it out") from None
        if manifest is None:
            raise UserError(f"{folder}: there is no whole study.json in it; name a study's folder")
        if manifest.get("search"):
            raise UserError(
                f"{folder}: it is a search, whose suggestions build on each other; a search is "
                "extended with a larger --num-samples"
            )
        count = 1 + sum(other.folder.name == folder.name for other in sources)
        name = folder.name if count == 1 else f"{folder.name} ({count})"
        sources.append(Source(name, folder, manifest, planned(name, manifest["plan"])))
    return sources


def refuse_unlike(sources: Sequence[Source]) -> None:
    """Raises ``UserError`` unless protocols, data, weights and simulations agree with the first."""
    first = sources[0]
    for other in sources[1:]:
        kinds = [_kind(source) for source in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{first.folder} is {kinds[0]} and {other.folder} is {kinds[1]}: they cannot "
                "be merged"
            )
        if changes := _apart(first.trials, other.trials):
            raise UserError(
                f"{first.folder} and {other.folder} have different protocols "
                f"({listed_changes(changes)}): their trials cannot be compared; merge studies that "
                "differ in model, data set, rank, alpha, quantization and seed alone, or in what "
                "one of them varies"
            )
    for i, one in enumerate(sources):
        for other in sources[:i]:
            both = other.manifest["provenance"], one.manifest["provenance"]
            if changed := changed_inputs(*both) or changed_code(*both):
                raise UserError(
                    f"{other.folder} and {one.folder}: they differ in {changed[0]}, so their "
                    "trials cannot be compared; leave one study out"
                )


def _apart(one: Sequence[TrialConfig], other: Sequence[TrialConfig]) -> list[str]:
    """How two plans differ that are not of one protocol; an axis of either is one of both."""
    changes = protocol.difference(one, other)
    return changes if changes and protocol.difference(other, one) else []


def _kind(source: Source) -> str:
    simulation = source.manifest.get("simulation")
    return f"simulated with {simulation}" if simulation else "real"


def choose(sources: Sequence[Source]) -> tuple[dict[str, Source], list[str]]:
    """({trial id: the study that it is taken from}, sentences about trials that two studies have).

    A trial that ended well goes before one that failed, and that before one that is unfinished;
    among equals the first study counts. Raises ``UserError`` for a trial that ended differently
    under the same conditions on a CPU: it should have been the same to the last bit.
    """
    chosen: dict[str, Source] = {}
    notes = []
    for source in sources:
        for trial in source.trials:
            trial_id = trial.trial_id
            if trial_id not in chosen:
                chosen[trial_id] = source
                continue
            kept = chosen[trial_id]
            ours, theirs = kept.results(trial_id), source.results(trial_id)
            both = f"{trial_id} ended differently in {kept.folder} and in {source.folder}"
            if _rank(theirs) < _rank(ours):
                chosen[trial_id] = source
            elif _rank(theirs) == _rank(ours) == 0 and _learned(theirs) != _learned(ours):
                if _conditions(ours) == _conditions(theirs) and _repeats(ours):
                    raise UserError(
                        f"{both}, under the same versions and hardware: one of them is not what "
                        "it says; leave one study out"
                    )
                notes.append(
                    f"{both}, on other hardware or versions: that of {kept.folder} is kept"
                )
    return chosen, notes


def _rank(results: Mapping[str, Any]) -> int:
    status = results.get("status")
    if status in PLANNED_ENDS:
        return 0
    return 1 if status in FINISHED_STATUSES else 2 if status == "interrupted" else 3


def _learned(results: Mapping[str, Any]) -> tuple[Any, ...]:
    train = mapping(results, "train")
    epochs = [[mapping(row).get(name) for name in LEARNED] for row in train.get("epochs") or ()]
    return results.get("status"), dict(mapping(train, "test_metrics")), epochs


def _conditions(results: Mapping[str, Any]) -> tuple[Any, ...]:
    meta, where = mapping(results, "meta"), mapping(results, "run")
    return (
        *(meta.get(name) for name in ("versions", "hardware", "commit")),
        *(where.get(name) for name in ("device", "num_threads")),
    )


def _repeats(results: Mapping[str, Any]) -> bool:
    """A GPU's sums may differ from run to run; a CPU's, and a simulation's, do not."""
    return mapping(results, "run").get("device") in ("cpu", None)


def merged_manifest(
    sources: Sequence[Source], chosen: Mapping[str, Source], name: str, command: str
) -> dict[str, Any]:
    """study.json of the merged study. It says where each trial comes from, and all sessions."""
    first = sources[0].manifest
    cells = {cell["trial_id"]: cell for s in reversed(sources) for cell in s.manifest["plan"]}
    inputs: dict[str, Any] = {}
    for source in reversed(sources):
        inputs = joined(inputs, source.manifest["provenance"])
    return {
        **first,
        "format": FORMAT,
        "study": name,
        "created": now(),
        "written": now(),
        "command": command,
        "grid": ", ".join(dict.fromkeys(str(s.manifest.get("grid")) for s in sources)),
        "plan": [cells[trial_id] for trial_id in chosen],
        "provenance": {**first["provenance"], **inputs},
        "sessions": [
            {"study": source.name, **session}
            for source in sources
            for session in source.manifest.get("sessions", [])
        ],
        "merged": {
            "studies": [source.name for source in sources],
            "trials": {trial_id: source.name for trial_id, source in chosen.items()},
        },
    }


def write(
    sources: Sequence[Source], chosen: Mapping[str, Source], output: Path, command: str
) -> None:
    """The merged study in ``output``, whole or not at all, tables included.

    Tune's own ``run-*`` folders are left behind: nothing is read from them.
    """

    def fill(folder: Path) -> None:
        write_json(folder / "study.json", merged_manifest(sources, chosen, output.name, command))
        for trial_id, source in chosen.items():
            for inner in (Path(trial_id), Path("tensorboard") / trial_id):
                if (source.folder / inner).is_dir():
                    _copy(source.folder / inner, folder / inner)
        write_tables(rebuild(folder), folder)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_folder_whole(output, fill)
    except (OSError, shutil.Error) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"--output {output}: the studies could not be copied ({detail}); nothing is left there"
        ) from error


def _copy(source: Path, target: Path) -> None:
    """Without links, which may lead anywhere, and without what belongs to a run that goes on."""

    def leave_out(folder: str, names: list[str]) -> set[str]:
        links = {name for name in names if (Path(folder) / name).is_symlink()}
        return links | shutil.ignore_patterns(*RUN_FILES)(folder, names)

    shutil.copytree(source, target, ignore=leave_out)


def merge(folders: Sequence[Path], output: Path, command: str) -> tuple[Path, list[str]]:
    """(the merged study's folder, sentences for the user). Raises ``UserError``."""
    if len(folders) < 2:
        raise UserError("name at least two studies to merge")
    if output.exists():
        raise UserError(f"--output {output}: it is there already; name a folder that is not")
    sources = read_sources(folders)
    with ExitStack() as held:
        for source in sources:
            _hold(source, held)
        refuse_unlike(sources)
        chosen, notes = choose(sources)
        write(sources, chosen, output, command)
    counts = [f"{[*chosen.values()].count(source)} of {source.name}" for source in sources]
    return output, [*notes, f"{len(chosen)} trials: {', '.join(counts)}"]


def _hold(source: Source, held: ExitStack) -> None:
    """No run may go on in a source meanwhile. A folder without a lock was never run here."""
    lock = source.folder / ".lock"
    if lock.is_file():
        try:
            held.enter_context(FileLock(lock, timeout=0))
        except Timeout:
            raise UserError(
                f"{source.folder}: a run of this study goes on; wait for it, or stop it"
            ) from None
        except OSError:
            return  # a folder that cannot be written to: no run can go on in it


def main() -> None:
    """Entry point: the user's mistakes are one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tune_study.merge", description=__doc__)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "tune_study.merge", *sys.argv[1:]])
    try:
        # The shell leaves --output=~/folder as it is.
        folder, notes = merge(options.studies, Path(os.path.expanduser(options.output)), command)
    except UserError as error:
        print(printed(error), file=sys.stderr)
        sys.exit(2)
    from analysis.report import write_report

    for note in notes:
        print(note)
    report = write_report(folder)
    print(f"results: {shlex.quote(str(folder))}\nreport:  {shlex.quote(str(report))}")


if __name__ == "__main__":
    main()
