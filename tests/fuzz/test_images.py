"""Whatever lies in a folder of images, it is read, or refused in one sentence of ours."""

import io
import json
import shutil
import struct
import warnings
from functools import cache as cached

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.hostile import damaged, files_like, fuzz, in_place_of, outcome
from tests.tune_study.data.pictures import HOW, class_folders
from tune_study.config import DataConfig
from tune_study.data import cache, decoding, hub, sources
from tune_study.data.decoding import Unreadable
from tune_study.data.folders import LEFTOVERS, PARTS, find
from tune_study.data.place import Place
from tune_study.data.splits import load, outline
from tune_study.errors import UserError

FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MSP",
    "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM")  # fmt: skip
MODES = ("1", "CMYK", "F", "I", "I;16", "I;16B", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA", "RGBX",
    "YCbCr")  # fmt: skip
SIZES = ((1, 1), (1, 300), (7, 5), (16, 16), (33, 2))
TIFF_COMPRESSIONS = (None, "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "group4")


@cached
def made(name, mode, size, orientation, compression):
    """The bytes of a file, or ``None`` where Pillow does not write such a one."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation if name != "TIFF" else min(8, max(1, orientation))
    options = {"exif": exif} if name in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF") else {}
    options |= {"compression": compression} if name == "TIFF" and compression else {}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.new(mode, size)
            image.frombytes(np.resize(values, len(image.tobytes())).tobytes())
            image.save(file, name, **options)
        except (OSError, ValueError, KeyError, RuntimeError, struct.error):
            return None
    return file.getvalue()


images = st.builds(
    made,
    st.sampled_from(FORMATS),
    st.sampled_from(MODES),
    st.sampled_from(SIZES),
    st.sampled_from([0, 1, 6, 8, 9, 70_000, -1]),
    st.sampled_from(TIFF_COMPRESSIONS),
).filter(lambda data: data is not None)
files = images | images.flatmap(damaged) | images.flatmap(damaged).flatmap(damaged) | st.binary()


@fuzz(600)
@given(files)
def test_bytes_are_an_image_or_unreadable(tmp_path, data):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with decoding.bounded():
        found = outcome(lambda: decoding.square(path, 8, "bicubic"), Unreadable)
        outcome(lambda: decoding.shorter_side(path), Unreadable)
    outcome(lambda: decoding.rgb(data), Unreadable)
    if found is not None:
        assert (found.shape, found.dtype) == ((3, 8, 8), np.uint8)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_from_some_format(tmp_path, mode):
    found = 0
    for name in FORMATS:
        if (data := made(name, mode, (7, 5), 1, None)) is not None:
            (tmp_path / "x").write_bytes(data)
            decoding.square(tmp_path / "x", 8, "bilinear")
            found += 1
    # Pillow writes these nowhere, or turns them into others first.
    assert found > 0 or mode in ("PA", "RGBX")


NAMES = st.sampled_from(
    ["a", "b", "été", "été", "a b", "#1", "[x]", "x.png", "train2", "10", "9", "\udcff", "~",
     *LEFTOVERS, *PARTS, "Train", "VAL", ".hidden", "._a"]
)  # fmt: skip
FILES = st.sampled_from(
    [
        "0.png",
        "1.JPG",
        "2.tif",
        "._0.png",
        "Thumbs.db",
        "x.txt",
        "x",
        "\udcff.png",
        "é.webp",
        ".png",
    ]
)


@fuzz(120)
@given(st.data())
def test_a_tree_of_files_is_a_data_set_or_refused(tmp_path, data):
    root = tmp_path / "d"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    whole = made("PNG", "RGB", (7, 5), 1, None)
    for way in data.draw(st.lists(st.lists(NAMES, max_size=3), max_size=8)):
        folder = root.joinpath(*way)
        if any(part.is_file() for part in (folder, *folder.parents)):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in data.draw(st.lists(FILES, max_size=4)):
            if not (folder / name).exists():
                kinds = [lambda p: p.write_bytes(whole), lambda p: p.write_bytes(b"x")]
                data.draw(st.sampled_from([kinds[0], *kinds]))(folder / name)
    sources.read_source.cache_clear()
    place = Place(None, tmp_path / "cache", data.draw(st.booleans()))
    name = f"folder:{root}"
    seen = outcome(lambda: outline(name, place, DataConfig(), HOW), UserError)
    found = outcome(lambda: load(name, place, DataConfig(), HOW), UserError)
    assert (found and found.outline) == seen
    if found is not None:
        used = sum(len(split.labels) for split in found[:3])
        assert used + len(found.outline.left_out) == len(find(root).paths)
        assert len(found.train.images[:2]) == min(2, len(found.train.labels))


@pytest.mark.parametrize("kind", range(5))
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind):
    root = class_folders(tmp_path / "d", a=3, b=3)
    (root / "a" / "000.png").unlink()
    list(in_place_of(root / "a" / "000.png"))[kind]()
    place = Place(cache_dir=tmp_path / "cache")
    sources.read_source.cache_clear()
    if (root / "a" / "000.png").is_dir():
        assert len(find(root).paths) == 5
    else:
        with pytest.raises(UserError, match=r"1 of 6 images cannot be read: a/000\.png"):
            load(f"folder:{root}", place, DataConfig(), HOW)


@cached
def table_of(kind):
    """The bytes of a table of images, as the hub's library writes it."""
    image = made("PNG", "RGB", (7, 5), 1, None)
    values = {
        "image": [{"bytes": image, "path": f"{n}.png"} for n in range(20)],
        "label": [n % 2 for n in range(20)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = datasets.Dataset.from_dict(values, features).data.table
    file = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
@fuzz(100)
@given(st.data())
def test_a_table_is_a_data_set_or_refused(tmp_path, kind, data):
    root = tmp_path / "d"
    if not root.exists() and kind == "saved":
        datasets.Dataset.from_dict({"label": [0, 1]}).save_to_disk(root)
    root.mkdir(exist_ok=True)
    name = "data-00000-of-00001.arrow" if kind == "saved" else f"train.{kind}"
    (root / name).write_bytes(data.draw(damaged(table_of(kind))))
    sources.read_source.cache_clear()
    place = Place(cache_dir=tmp_path / "cache", leave_out_broken=True)
    outcome(lambda: load(f"hf:{root}", place, DataConfig(), HOW), UserError)


@fuzz(60)
@given(st.data())
def test_whatever_is_recorded_of_a_table_it_is_found_right(tmp_path, data):
    root, place = tmp_path / "d", Place(cache_dir=tmp_path / "cache")
    if not root.exists():
        root.mkdir()
        (root / "train.parquet").write_bytes(table_of("parquet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SETTLES_NS", -(10**15))
        right = hub.find(f"hf:{root}", sources.ANY, place)
        (record,) = (tmp_path / "cache" / "images").glob("*.rows.json")
        record.write_bytes(data.draw(files_like(json.loads(record.read_text()))))
        found = hub.find(f"hf:{root}", sources.ANY, place)
    assert found.class_names == right.class_names == ["a", "b"]
    assert found.parts["train"].labels.tolist() == right.parts["train"].labels.tolist()


@fuzz(60)
@given(st.data())
def test_whatever_stands_in_the_cache_the_pixels_are_right(tmp_path, data):
    root, place = tmp_path / "d", Place(cache_dir=tmp_path / "cache")
    if not root.exists():
        class_folders(root, a=2, b=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SETTLES_NS", -(10**15))
        right = cache.pixels(find(root), HOW, Place(cache_dir=tmp_path / "other"))
        cache.pixels(find(root), HOW, place)
        kind = data.draw(st.sampled_from([".files.json", f"{right.path.stem}.json"]))
        (record,) = (tmp_path / "cache" / "images").glob(f"*{kind}")
        record.write_bytes(data.draw(files_like(json.loads(record.read_text()))))
        found = outcome(lambda: cache.pixels(find(root), HOW, place), UserError)
    assert found is not None
    assert found.path.stat().st_size == np.prod(found.shape)
    if ".files." not in record.name or found.contents == right.contents:
        assert found.path.read_bytes() == right.path.read_bytes()
