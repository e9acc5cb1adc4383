"""Images as people's files are, made for the tests: class folders, odd files. No test module."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tune_study.data.place import Preprocessing

HOW = Preprocessing(8, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def noise(seed=0, height=40, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=40, width=30):
    """Without edges, for formats that lose some of them."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 7, rows + columns], -1).clip(0, 255).astype(np.uint8)


def class_folders(root: Path, side=12, **counts):
    """``name=count``: folders of small images; no two images are the same."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(noise(1000 * number + index, side, side))
            image.save(root / name / f"{index:03}.png")
    return root


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    check = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + check


def with_chunks(path: Path, *chunks: bytes):
    """A PNG with more chunks behind its head."""
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
