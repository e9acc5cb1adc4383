"""What a folder of images costs: ``python -m benchmarks.images``.

Makes folders of two classes, one of JPEGs of 256 px and one of small PNGs, and in each

``first``   looks through a study (``--validate-only``): all files are read and decoded
``second``  does so again
``epoch``   reads every training image once, in batches, as a trial does
``batch``   a batch from the mapped file against one from memory, taking turns: median of the ratios

Seconds, of the clock and of the CPU, and peak RSS are of the whole process and its imports, as
``/usr/bin/time -v`` has them. The RSS counts pages of the mapped file that are resident, which the
system may take away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

LIMIT_BYTES = 1.5e9
LIMIT_S = 20.0
GRID = """
def study():
    return {{
        "model": "vit_tiny_patch16_224", "pretrained": False, "quantization": "nf4",
        "dataset": "folder:{folder}",
    }}
"""
BATCH = 32
DISTINCT = 1000
"""The other files are links to these: to read one costs the same."""
ROUNDS = 5


class Kind(NamedTuple):
    """Of images."""

    name: str
    side: int
    suffix: str
    count: int


KINDS = (Kind("256 px", 256, ".jpg", 20_000), Kind("small", 32, ".png", 200_000))


class Cost(NamedTuple):
    seconds: float
    cpu_s: float
    rss_bytes: float


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the images; 1 is all")
    parser.add_argument("--epoch", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epoch:
        print(json.dumps(epoch(*options.epoch)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="images-") as folder:
        for kind in KINDS:
            smaller = kind._replace(count=int(kind.count * options.share))
            rows.append(measure(smaller, Path(folder) / str(kind.side)))
    print(table(rows))


def measure(kind: Kind, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    make(kind, folder / "images")
    (folder / "grid.py").write_text(GRID.format(folder=folder / "images"))
    cache = folder / "cache"
    study = ["tune_study.run", "--grid", f"{folder / 'grid.py'}:study", "--validate-only"]
    found: dict[str, Any] = {"kind": kind}
    for start in ("first", "second"):
        found[start] = cost([*study, "--cache-dir", str(cache)], folder)[0]
    read = ["benchmarks.images", "--epoch", str(folder / "images"), str(cache)]
    found["epoch"], said = cost(read, Path(__file__).parents[1])
    found["batch"] = json.loads(said)
    found["bytes"] = sum(file.stat().st_size for file in cache.glob("images/*.pixels"))
    return found


def make(kind: Kind, folder: Path) -> None:
    """Images as smooth as photographs."""
    for name in "ab":
        (folder / name).mkdir(parents=True)

    def path(number: int) -> Path:
        return folder / "ab"[number % 2] / f"{number:06}{kind.suffix}"

    def write(number: int) -> None:
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((kind.side, kind.side), Image.Resampling.BICUBIC)
        image.save(path(number))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(min(kind.count, DISTINCT))))
    for number in range(DISTINCT, kind.count):
        os.link(path(number % DISTINCT), path(number))


def cost(command: list[str], folder: Path) -> tuple[Cost, str]:
    """(time and peak memory of ``python -m ...``, the last line that it printed)."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, stdout=output, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        output.seek(0)
        said = output.read()
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {said[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit), said.splitlines()[
        -1
    ]


def epoch(folder: Path, cache: Path) -> dict[str, float]:
    """Seconds of a batch from the file and from memory, and their ratio; medians."""
    import torch

    from tune_study.config import DataConfig
    from tune_study.data.batches import train_batches
    from tune_study.data.place import Place, Preprocessing
    from tune_study.data.sources import Split
    from tune_study.data.splits import load

    how = Preprocessing(224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    train = load(f"folder:{folder}", Place(cache_dir=cache), DataConfig(), how).train
    for _ in train_batches(train, BATCH, "flip-crop", torch.Generator()):
        pass
    part = train.take(np.arange(min(len(train.labels), 20 * BATCH)))
    sides = {"file": part, "memory": Split(part.images[:], part.labels)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, split in sides.items():
            began = time.perf_counter()
            batches = sum(1 for _ in train_batches(split, BATCH, "flip-crop", torch.Generator()))
            times[name].append((time.perf_counter() - began) / batches)
    pairs = zip(times["file"], times["memory"], strict=True)
    return {name: median(some) for name, some in times.items()} | {
        "ratio": median(ours / theirs for ours, theirs in pairs)
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; what is over its limit is bold."""
    lines = [
        "| images | count | cache, GB | first start, s (CPU) | RSS, GB | second start, s (CPU) "
        "| RSS, GB | epoch, s (CPU) | RSS, GB | batch, file / memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["kind"].name, f"{row['kind'].count:,}", f"{row['bytes'] / 1e9:.2f}"]
        for phase in ("first", "second", "epoch"):
            seconds, cpu_s, rss = row[phase]
            slow = phase == "second" and seconds > LIMIT_S
            cells.append(f"{_bold(f'{seconds:.1f}', slow)} ({cpu_s:.1f})")
            cells.append(_bold(f"{rss / 1e9:.2f}", rss > LIMIT_BYTES))
        batch = row["batch"]
        both = f"{1e3 * batch['file']:.1f} / {1e3 * batch['memory']:.1f} ms"
        cells.append(f"{batch['ratio']:.2f} ({both})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bold(text: str, over: bool) -> str:
    return f"**{text}**" if over else text


if __name__ == "__main__":
    main()
