"""The list of docs/reliability.md, one fault after another on one study, as a Markdown table.

    python -m tests.e2e.faults --grid demo

The same study is started, hurt, and continued by the same command until nothing is left to hurt.
Its tables and adapters must then equal those of an undisturbed one to the last bit. What a fault
made the command print is the table's last column; epochs' lines and paths are cut.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.e2e import harness

PATIENCE_S = 3600
ORDINARY = re.compile(r"\]?: (started|epoch \d|completed, )|^(results|report|TensorBoard): ")


class Study:
    """One study folder below ``root``, and what has been done to it."""

    def __init__(self, root: Path, grid: str, arguments: list[str]) -> None:
        self.root, self.grid, self.arguments = root, grid, arguments
        self.place = root / "here"

    @property
    def folder(self) -> Path:
        return self.place / self.grid

    def start(self, *arguments: object) -> subprocess.Popen:
        return harness.start(self.place, *self.arguments, *arguments, grid=self.grid)

    def wait(self, process: subprocess.Popen, text: str) -> None:
        """Until the command has printed ``text`` since it began."""
        harness.wait_for(process, self.place, text, timeout_s=PATIENCE_S)

    def row(self, fault: str, process: subprocess.Popen) -> None:
        """Waits for the command's end and prints the fault's row."""
        code, output = harness.finish(process, self.place, PATIENCE_S)
        lines = [line for line in output.splitlines() if not ORDINARY.search(line)]
        said = "; ".join(f"`{line}`" for line in lines).replace("|", "\\|")
        said = said.replace(str(self.folder), "…").replace(str(self.place), "…")
        print(f"| {fault} | {code} | {said.replace(str(self.root), '…')} |", flush=True)

    def hurt(self, fault: str, when: str, how: Callable[[subprocess.Popen], object]) -> None:
        process = self.start()
        self.wait(process, when)
        how(process)
        self.row(fault, process)

    def trials(self) -> list[str]:
        plan = json.loads((self.folder / "study.json").read_text())["plan"]
        return [cell["trial_id"] for cell in plan]

    def status(self, trial_id: str) -> str:
        path = self.folder / trial_id / "results.json"
        return json.loads(path.read_text())["status"] if path.exists() else "pending"

    def running(self) -> Path:
        """The folder of the trial that is to be continued."""
        return next(
            self.folder / trial for trial in self.trials() if self.status(trial) == "interrupted"
        )


def twice(process: subprocess.Popen) -> None:
    """Ctrl-C, and again."""
    harness.interrupt(process)
    time.sleep(1)
    harness.interrupt(process)


def all_faults(study: Study, rng: random.Random) -> None:
    worker = study.start()
    study.wait(worker, "epoch 1/")
    harness.kill(worker, "worker")
    study.wait(worker, "its worker process died")
    command = [sys.executable, "-m", "tune_study.run", "--grid", study.grid, *study.arguments]
    second = subprocess.run([*command, "--output-dir", study.place], capture_output=True, text=True)
    said = second.stderr.strip().replace(str(study.root), "…")
    print(f"| a second run meanwhile | {second.returncode} | `{said}` |", flush=True)
    harness.interrupt(worker)
    study.row("`kill -9` of the worker; then Ctrl-C to the process group", worker)
    study.hurt("SIGTERM to the command", "epoch ", subprocess.Popen.terminate)
    study.hurt("Ctrl-C twice", "epoch ", twice)
    study.hurt(
        "`kill -9` of the command", "epoch ", lambda process: harness.kill(process, "driver")
    )
    study.hurt("`kill -9` of the raylet", "epoch ", lambda process: harness.kill(process, "raylet"))
    study.hurt(
        "`kill -9` of everything at a trial's start, before Tune has saved its state",
        "started",
        lambda process: harness.kill(process, "everything"),
    )
    study.hurt(
        "`kill -9` of everything, and the three files written last lose their end",
        "epoch ",
        lambda process: (
            harness.kill(process, "everything"),
            harness.cut_power(study.folder, rng),
        ),
    )
    _corrupt_checkpoint(study)
    _refused(study)
    process = study.start("--max-hours", "0.0001")
    study.row("`--max-hours 0.0001`", process)
    _exception(study)


def _corrupt_checkpoint(study: Study) -> None:
    study.hurt(
        "`kill -9` of everything after the second epoch of a trial",
        "epoch 2/",
        lambda process: harness.kill(process, "everything"),
    )
    broken = study.running()
    newest = max(broken.glob("checkpoints/epoch-*"))
    (newest / "training.pt").write_bytes((newest / "training.pt").read_bytes()[:1000])
    moved = study.root / "moved"
    moved.mkdir()
    shutil.move(study.folder, moved / study.grid)
    study.place = moved
    study.hurt(
        "its newest checkpoint cut to 1,000 bytes, the study folder moved, then Ctrl-C",
        "epoch 2/",
        harness.interrupt,
    )
    warnings = json.loads((study.folder / broken.name / "results.json").read_text())["warnings"]
    print(f"| … what `results.json` of that trial says | – | `{'; '.join(warnings)}` |", flush=True)


def _refused(study: Study) -> None:
    """Another plan, other weights, other versions."""
    study.row("another learning rate", study.start("--set", "training.learning_rate=0.1"))
    from tune_study.model import backbone

    shipped = next(Path(backbone.__file__).parent.glob("*.safetensors"))
    weights = load_file(shipped)
    name = next(key for key, tensor in weights.items() if tensor.is_floating_point())
    save_file({**weights, name: weights[name] + 1}, study.root / "other.safetensors")
    study.row("other weights", study.start("--weights", study.root / "other.safetensors"))
    path = study.folder / "study.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"][-1]["versions"]["torch"] = "2.6.0"
    path.write_text(json.dumps(manifest))
    study.hurt(
        "`study.json` says that the last start had torch 2.6.0, then Ctrl-C",
        "epoch ",
        harness.interrupt,
    )


def _exception(study: Study) -> None:
    """A file where the last trial wants its adapter's folder."""
    trial = study.trials()[-1]
    (study.folder / trial).mkdir(exist_ok=True)
    (study.folder / trial / "adapter").write_text("in the way")
    study.row("an exception in the last trial (a file in its way)", study.start())
    error = json.loads((study.folder / trial / "error.json").read_text())
    print(
        f"| … `error.json` of that trial | – | type `{error['type']}`, {len(error['traceback'])} "
        f"characters of traceback, last epoch {error['last_epoch']}, {len(error['log_tail'])} "
        "lines of log |",
        flush=True,
    )
    study.row("the same command with `--retry-failed`", study.start("--retry-failed"))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="demo")
    parser.add_argument("--max-experiments", default="4", help="only the first N trials")
    options = parser.parse_args(arguments)
    some = ["--max-experiments", options.max_experiments]
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(Path(temporary), options.grid, some)
        print("| fault | exit code | what the command printed |\n|---|---|---|", flush=True)
        all_faults(study, random.Random(0))
        expected = Path(temporary) / "undisturbed"
        code, output = harness.finish(
            harness.start(expected, *some, grid=options.grid), expected, PATIENCE_S
        )
        if code:
            raise SystemExit(output)
        harness.compare(study.folder, expected / options.grid)
        harness.no_epoch_twice(study.folder)
    print("\nTables and adapters equal those of the undisturbed study.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
