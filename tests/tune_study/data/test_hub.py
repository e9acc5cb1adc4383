"""A folder in the formats of the Hugging Face hub: the same as the folder of its images."""

import shutil
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as Picture
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from PIL import Image

from tests.tune_study.data.pictures import HOW, class_folders, noise
from tune_study.config import DataConfig
from tune_study.data import cache, decoding, hub, sources, tables
from tune_study.data.splits import UNKNOWN, load, outline
from tune_study.errors import UserError

NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No trial's data is kept, the library's own cache is not the user's, and no one answers."""
    sources.read_source.cache_clear()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    monkeypatch.setattr(tables, "_answers", lambda: False)


@pytest.fixture
def settled(monkeypatch):
    """Files may be new: their times count at once."""
    monkeypatch.setattr(cache, "SETTLES_NS", -(10**15))


@pytest.fixture
def images(tmp_path):
    return class_folders(tmp_path / "images", cat=10, dog=10)


def rows(root):
    """(bytes, path, class) of every file, in the order of a folder's images."""
    found = sorted(root.rglob("*.png"))
    return [(path.read_bytes(), path.name, NAMES.index(path.parent.name)) for path in found]


def table(*columns, **more):
    """A split of ``rows``; ``more`` are columns as (values, feature)."""
    pictures = [{"bytes": data, "path": name} for data, name, _ in columns]
    values = {"image": pictures} | {name: held for name, (held, _) in more.items()}
    features = {"image": Picture()} | {name: feature for name, (_, feature) in more.items()}
    if "label" not in more:
        values["label"] = [label for *_, label in columns]
        features["label"] = ClassLabel(names=NAMES)
    return Dataset.from_dict(values, Features(features))


def parquet(folder, **splits):
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def as_folder(kind, images, folder):
    """The images as somebody may have saved them."""
    if kind == "imagefolder":
        return shutil.copytree(images, folder)
    if kind == "parquet":
        return parquet(folder, train=table(*rows(images)))
    saved = folder.with_name("saved") if kind == "arrow" else folder
    table(*rows(images)).save_to_disk(saved)
    if kind == "arrow":
        folder.mkdir()
        shutil.copy(next(saved.glob("*.arrow")), folder / "train.arrow")
    return folder


def loaded(root, place, how=HOW, **settings):
    sources.read_source.cache_clear()
    name = root if isinstance(root, str) else f"hf:{root}"
    return load(name, place, DataConfig(**settings), how)


def expected(root, place):
    return loaded(f"folder:{root}", place)


def same(found, other):
    for ours, theirs in zip(found[:3], other[:3], strict=True):
        assert torch.equal(ours.images[:], theirs.images[:])
        assert torch.equal(ours.labels, theirs.labels)
    assert (found.class_names, found.sha256) == (other.class_names, other.sha256)
    return True


FORMS = ["imagefolder", "parquet", "saved", "arrow"]


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_is_the_same_as_the_folder_of_its_images(kind, images, tmp_path, place, settled):
    root = as_folder(kind, images, tmp_path / "d")
    before = outline(f"hf:{root}", place, DataConfig(), HOW)
    assert not place.cache_dir.exists()  # a dry look writes nothing
    found = loaded(root, place)
    assert same(found, expected(images, place))
    assert len(list(place.cache_dir.rglob("*.pixels"))) == 1  # one file serves both
    assert found.outline == before
    assert found.outline.told == (
        f"hf:{root}: 20 images of 2 classes; 14 to train on, 2 for validation (split off train), "
        "4 for the test (split off train); images in column image, classes in label"
    )
    assert not (tmp_path / "library").exists()  # nor does the library copy anything


@pytest.fixture
def counted(monkeypatch):
    """How often images were decoded and read, and the library asked."""
    seen = {"decoded": 0, "read": 0, "opened": 0}

    def count(name, module, function):
        before = getattr(module, function)

        def counting(*given, **more):
            seen[name] += 1
            return before(*given, **more)

        monkeypatch.setattr(module, function, counting)

    count("decoded", decoding, "square")
    count("read", cache, "_digest")
    count("opened", tables, "_library")
    return seen


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "saved"])
def test_a_second_start_reads_nothing_and_a_change_is_seen(
    kind, images, tmp_path, place, settled, counted
):
    root = as_folder(kind, images, tmp_path / "d")
    first = loaded(root, place)
    assert (counted["decoded"], counted["read"]) == (20, 20)
    counted.update(decoded=0, read=0, opened=0)
    assert same(loaded(root, place), first)
    assert outline(f"hf:{root}", place, DataConfig(), HOW._replace(image_size=4)) == first.outline
    assert (counted["read"], counted["opened"] > 0) == (0, kind != "saved")  # the look decoded
    Image.fromarray(noise(99, 12, 12)).save(images / "cat" / "000.png")
    shutil.rmtree(root)
    shutil.rmtree(root.with_name("saved"), ignore_errors=True)
    as_folder(kind, images, root)
    assert loaded(root, place).sha256 != first.sha256


def test_a_second_start_needs_no_library(images, tmp_path, place, settled, monkeypatch):
    root = as_folder("parquet", images, tmp_path / "d")
    first = loaded(root, place)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert same(loaded(root, place), first)
    sums = [record.read_bytes() for record in place.cache_dir.rglob("*.rows.json")]
    assert len(sums) == 1
    for record in place.cache_dir.rglob("*.rows.json"):
        record.write_bytes(sums[0][:-9])
    with pytest.raises(UserError, match=r"needs the datasets package; pip install 'tune-study\[hf"):
        loaded(root, place)


def test_images_elsewhere_are_read_and_looked_at_again_when_touched(
    images, tmp_path, place, settled
):
    """As tables name them that were written without their images."""
    paths = [str(path) for path in sorted(images.rglob("*.png"))]
    labels = [label for *_, label in rows(images)]
    features = Features({"image": Picture(), "label": ClassLabel(names=NAMES)})
    named = Dataset.from_dict({"image": paths, "label": labels}, features)
    (tmp_path / "d").mkdir()
    pq.write_table(named.data.table, tmp_path / "d" / "all.parquet")
    first = loaded(tmp_path / "d", place)
    assert same(first, expected(images, place))
    Image.fromarray(noise(99, 12, 12)).save(images / "cat" / "000.png")
    second = loaded(tmp_path / "d", place)
    assert second.sha256 != first.sha256
    assert same(second, expected(images, place))


def test_files_are_read_as_those_of_a_folder_are(tmp_path, place):
    root = class_folders(tmp_path / "images", cat=3, dog=3)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(1, 30, 20)).save(root / "cat" / "turned.png", exif=turned)
    alpha = np.dstack([noise(2), np.zeros((40, 30), np.uint8)])
    Image.fromarray(alpha).save(root / "cat" / "clear.png")
    deep = np.arange(900, dtype=np.uint16).reshape(30, 30) * 70
    Image.fromarray(deep).save(root / "dog" / "deep.png")
    Image.fromarray(noise(3)).quantize(16).save(root / "dog" / "palette.png")
    folder = parquet(tmp_path / "d", train=table(*rows(root)), test=table(*rows(root)))
    (tmp_path / "both").mkdir()
    for part in ("train", "test"):
        shutil.copytree(root, tmp_path / "both" / part)
    found = loaded(folder, place, val_size=2)
    assert same(found, loaded(f"folder:{tmp_path / 'both'}", place, val_size=2))
    assert bool((found.test.images[:].view(10, -1) == 255).all(1).any())  # the clear one, on white


def fine(root, names=("a", "b", "c", "d")):
    held = [number % len(names) for number in range(20)]
    return table(*rows(root), fine_label=(held, ClassLabel(names=list(names))))


def test_two_columns_of_classes_must_be_told_apart(images, tmp_path, place):
    root = parquet(tmp_path / "d", train=fine(images))
    with pytest.raises(
        UserError, match=r"fine_label and label all hold labels; name one with --se"
    ):
        loaded(root, place)
    found = loaded(root, place, label_column="fine_label", val_size=4)
    assert found.class_names == ["a", "b", "c", "d"]
    assert "classes in fine_label" in found.outline.told
    other = loaded(root, place, label_column="label", val_size=4)
    assert (other.class_names, other.sha256 != found.sha256) == (NAMES, True)


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (["b", "a"], "string", ["a", "b"]),
        ([10, 9], "int64", ["9", "10"]),
        ([1, -1], "int8", ["-1", "1"]),
        ([True, False], "bool", ["False", "True"]),
    ],
)
def test_values_become_classes_in_their_order(values, kind, names, images, tmp_path, place):
    held = [values[number % 2] for number in range(20)]
    root = parquet(tmp_path / "d", train=table(*rows(images), label=(held, Value(kind))))
    found = loaded(root, place)
    assert found.class_names == names
    every = torch.cat([split.labels for split in found[:3]])
    assert every.bincount().tolist() == [10, 10]
    first = [str(value) for value in held].index(names[0])
    wanted = expected(images, place)
    pixels = torch.cat([split.images[:] for split in wanted[:3]])
    ours = torch.cat([split.images[:] for split in found[:3]])
    one = decoding.square(sorted(images.rglob("*.png"))[first], 8, "bicubic")
    (at,) = (ours == torch.from_numpy(one)).flatten(1).all(1).nonzero().flatten().tolist()
    assert (every[at].item(), len(pixels)) == (0, len(ours))


def test_other_columns_must_be_named_and_must_do(images, tmp_path, place):
    held = [f"{number % 2}" for number in range(20)]
    more = {
        "label": ([0.5] * 20, Value("float32")),
        "kind": (held, Value("string")),
        "again": ([{"bytes": data, "path": None} for data, *_ in rows(images)], Picture()),
    }
    root = parquet(tmp_path / "d", train=table(*rows(images), **more))

    def refused(text, **settings):
        with pytest.raises(UserError, match=text):
            loaded(root, place, **settings)

    refused(r"columns image and again all hold images; name one with --set data\.image_column=imag")
    image = {"image_column": "again"}
    refused(r"none of its columns .* hold labels; .* --set data\.label_column=kind", **image)
    refused(r"data\.label_column = label: .* holds no labels", label_column="label", **image)
    refused(r"data\.label_column = no: .* has no such column; it has image", label_column="no")
    refused(r"data\.image_column = label: .* holds no images but image", image_column="label")
    assert loaded(root, place, label_column="kind", **image).class_names == ["0", "1"]


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_a_table_that_does_not_say_that_it_holds_images(kind, images, tmp_path, place):
    held = [data if kind == "binary" else {"bytes": data} for data, *_ in rows(images)]
    labels = [NAMES[label] for *_, label in rows(images)]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"picture": held, "label": labels}), tmp_path / "d" / "all.parquet")
    if kind == "binary":
        with pytest.raises(
            UserError, match=r"\(picture, label\) is known to hold images; name one"
        ):
            loaded(tmp_path / "d", place)
        assert same(loaded(tmp_path / "d", place, image_column="picture"), expected(images, place))
    else:
        assert same(loaded(tmp_path / "d", place), expected(images, place))


def test_images_without_a_label(images, tmp_path, place):
    held = table(*rows(images))
    none = table(*((data, name, -1) for data, name, _ in rows(images)))
    found = loaded(parquet(tmp_path / "d", train=held, test=none), place)
    assert [len(split.labels) for split in found[:3]] == [14, 2, 4]
    assert "passed over: split test (without labels)" in found.outline.told
    some = table(*((d, n, label if n != "003.png" else -1) for d, n, label in rows(images)))
    with pytest.raises(UserError, match="2 of the 20 images of split train have no label in colum"):
        loaded(parquet(tmp_path / "e", train=some, test=held), place)
    DatasetDict({"train": held, "test": held.remove_columns("label")}).save_to_disk(tmp_path / "f")
    assert "split test (without labels)" in loaded(tmp_path / "f", place).outline.told


def test_classes_of_the_test_must_be_trained_and_classes_without_images_are_told(
    images, tmp_path, place
):
    held = table(*rows(images)).cast_column("label", ClassLabel(names=[*NAMES, "eel"]))
    eel = table(rows(images)[0]).cast_column("label", ClassLabel(names=[*NAMES, "eel"]))
    found = loaded(parquet(tmp_path / "d", train=held, test=held), place)
    assert found.class_names == NAMES
    assert "passed over: 1 classes without images" in found.outline.told
    eel = eel.map(lambda row: {"label": 2}, features=eel.features)
    with pytest.raises(UserError, match="eel in column label of split test is no class of the tr"):
        loaded(parquet(tmp_path / "e", train=held, test=eel), place)
    one = held.select(range(10))
    with pytest.raises(UserError, match="at least two classes, and column label has 1"):
        loaded(parquet(tmp_path / "f", train=one), place)


@pytest.mark.parametrize(
    ("names", "sizes", "told"),
    [
        (("train", "validation", "test"), [20, 20, 20], "20 for validation, 20 for the test;"),
        (("train", "dev"), [16, 20, 4], "20 for validation, 4 for the test (split off train);"),
        (("Train", "VAL", "more"), [16, 20, 4], "passed over: split more"),
        (("test",), [14, 2, 4], "its only split is test"),
        (("all",), [14, 2, 4], "its only split is all"),
    ],
)
def test_splits_are_used_as_such_and_missing_ones_made(names, sizes, told, images, tmp_path, place):
    held = table(*rows(images))
    DatasetDict(dict.fromkeys(names, held)).save_to_disk(tmp_path / "d")
    found = loaded(tmp_path / "d", place)
    assert [len(split.labels) for split in found[:3]] == sizes
    assert told in found.outline.told


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("test", "validation"), "the splits test, validation and no train"),
        (("train", "dev", "validation"), "its splits dev and validation are both val"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(names, said, images, tmp_path, place):
    DatasetDict(dict.fromkeys(names, table(*rows(images)))).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=said):
        loaded(tmp_path / "d", place)


def test_all_broken_images_are_named_together_or_left_out(images, tmp_path, place):
    held = rows(images)
    held[3] = (b"nothing", "003.png", 0)
    held[11] = (held[11][0][:100], None, 1)
    pictures = [{"bytes": data, "path": name} for data, name, _ in held]
    pictures[15] = None
    values = {"image": pictures, "label": [label for *_, label in held]}
    features = Features({"image": Picture(), "label": ClassLabel(names=NAMES)})
    root = parquet(tmp_path / "d", train=Dataset.from_dict(values, features))
    wanted = (
        r"hf:.*: 3 of 20 images cannot be read: train\[3\] \(003\.png: it is no image\), "
        r"train\[11\] \(.*\), train\[15\] \(there is no image\); .*--leave-out-broken"
    )
    for look in (load, outline):
        with pytest.raises(UserError, match=wanted):
            look(f"hf:{root}", place, DataConfig(), HOW)
    found = loaded(root, place._replace(leave_out_broken=True))
    assert sum(len(split.labels) for split in found[:3]) == 17
    assert found.left_out[0] == "train[3] (003.png: it is no image)"


def test_a_folder_whose_name_is_a_pattern_is_read_or_refused(tmp_path, images, place):
    """The library would look for other folders, and not find its own."""
    table(*rows(images)).save_to_disk(tmp_path / "[a] saved")
    assert same(loaded(f"hf:{tmp_path}/[a] saved", place), expected(images, place))
    folder = parquet(tmp_path / "[a] parquet", train=table(*rows(images)))
    (tmp_path / "linked").symlink_to(folder)
    for root in (folder, tmp_path / "linked"):
        with pytest.raises(UserError, match=r"\[ in .*\[a\] parquet for a pattern .*; rename that"):
            loaded(root, place)


def test_a_folder_that_is_no_data_set_is_one_sentence(images, tmp_path, place):
    def refused(root, text):
        with pytest.raises(UserError, match=text):
            loaded(root, place)

    refused(tmp_path / "nowhere", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it has no files of images, parquet or arrow; name another")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a\nb\n")
    refused(tmp_path / "text", "none of its columns is known to hold images")
    root = parquet(tmp_path / "cut", train=table(*rows(images)))
    file = next(root.iterdir())
    file.write_bytes(file.read_bytes()[:-20])
    refused(root, r"its files cannot be read \(.*\); replace them by whole ones")
    card = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two")
    )
    root = tmp_path / "two"
    root.mkdir()
    for name in ("one", "two"):
        parquet(root / name, train=table(*rows(images)))
    (root / "README.md").write_text(f"---\n{card}---\n")
    refused(root, rf"its configurations are one, two; name one of them as hf:{root}@NAME")
    refused(f"hf:{root}@three", "its configurations are one, two")
    assert same(loaded(f"hf:{root}@two", place), expected(images, place))
    table(*rows(images)).save_to_disk(tmp_path / "saved")
    (tmp_path / "zipped").mkdir()
    shutil.make_archive(str(tmp_path / "zipped" / "all"), "zip", images)
    refused(tmp_path / "zipped", r"it holds archives \(.*all\.zip\); unpack them")
    refused(f"hf:{tmp_path / 'saved'}@x", "has no configurations; leave out @x")


ANSWER = SimpleNamespace(headers={}, request=None, status_code=401, text="", url="")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("no"), "the hub has no such data set"),
        (GatedRepoError("no", response=ANSWER), "it is gated; ask for access on its page"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/d' is a gated dataset"),
            "it is gated; ask for access on its page",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
            "its configurations are a, b; name one of them as hf:o/d@NAME",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found d.py"), "none is run"),
        (HfHubHTTPError("no", response=ANSWER), "could not be downloaded"),
        (ConnectionError("no"), "could not be downloaded .* connect to the network"),
        (PermissionError(13, "Permission denied"), "can't be written .*; set HF_HOME"),
        (KeyError("odd"), r"its files cannot be read \(KeyError"),
    ],
)
def test_what_the_hub_says_no_with_is_one_sentence(error, said, place, monkeypatch):
    def fail(*given, **more):
        raise error

    monkeypatch.setattr(tables, "_answers", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=rf"^dataset hf:o/d: .*{said}"):
        loaded("hf:o/d", place)


def test_without_a_network_only_the_cache_is_asked(place, tmp_path, monkeypatch):
    def fail(*given, **more):
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="the hub does not answer, and it is not in the cache"):
        loaded("hf:o/d", place)
    monkeypatch.setattr(tables, "_answers", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, .*; unset it once"):
        loaded("hf:o/d", place)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert outline("hf:o/d", place, DataConfig(), HOW) == UNKNOWN  # a dry look
    assert not place.cache_dir.exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a folder of that name here; write hf:\./here for it"):
        loaded("hf:here", place)
    with pytest.raises(UserError, match="write it as hf:NAME"):
        loaded("hf:a b", place)


def test_a_data_set_of_the_hub_is_asked_for_once(images, tmp_path, place, monkeypatch, counted):
    asked = []
    monkeypatch.setattr(tables, "_answers", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    table(*rows(images)).save_to_disk(tmp_path / "theirs")

    def load_dataset(name, configuration, **more):
        assert "trust_remote_code" not in more
        asked.append((name, configuration))
        return DatasetDict(train=datasets.load_from_disk(tmp_path / "theirs"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = loaded("hf:o/d@x", place)
    assert same(found, expected(images, place))
    seen = dict(counted)
    assert same(loaded("hf:o/d@x", place), found)
    assert outline("hf:o/d@x", place, DataConfig(), HOW) == found.outline
    assert asked == [("o/d", "x")]
    assert (counted["opened"], counted["read"]) == (1, seen["read"])
    assert loaded("hf:o/d@x", place, HOW._replace(image_size=4)).train.images.shape[-1] == 4
    shutil.rmtree(tmp_path / "theirs")
    table(*rows(images)[1:]).save_to_disk(tmp_path / "theirs")
    assert len(loaded("hf:o/d@x", place).outline.told) > 0
    assert len(asked) == 2


def test_the_cache_of_the_library_is_enough(images, tmp_path, place, monkeypatch):
    """As ``load_dataset`` leaves it, read without a network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "library" / "o___d" / "default" / "0.0.0" / "abc"
    builder = datasets.load_dataset_builder(
        str(as_folder("parquet", images, tmp_path / "d")), cache_dir=str(tmp_path / "made")
    )
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, folder)
    assert same(loaded("hf:o/d", place), expected(images, place))


def test_rows_that_changed_meanwhile_are_refused(images, tmp_path, place):
    root = as_folder("parquet", images, tmp_path / "d")
    found = hub.find(f"hf:{root}", sources.ANY, place)
    table(*rows(images)[1:]).to_parquet(next(root.iterdir()))
    with pytest.raises(UserError, match="split train has 19 rows now and had 20"):
        cache.contents(found, place)


def test_few_images_are_in_memory_at_a_time(images, tmp_path, place, monkeypatch):
    monkeypatch.setattr(cache, "AT_ONCE_BYTES", 1)
    monkeypatch.setattr(cache, "cores", lambda: 1)
    taken = []
    root = as_folder("parquet", images, tmp_path / "d")
    found = hub.find(f"hf:{root}", sources.ANY, place)
    files, digest = found.files, cache._digest
    ahead = []

    class Counting:
        def __getattr__(self, name):
            return getattr(found, name)

        def files(self):
            for file in files():
                ahead.append(len(taken))
                yield file

    monkeypatch.setattr(cache, "_digest", lambda file: taken.append(1) or digest(file))
    cache.contents(Counting(), place)
    assert max(read - done for read, done in enumerate(ahead)) <= 4
