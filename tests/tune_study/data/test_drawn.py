"""A data set that a function of the user's draws: the same as the folder of its images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from search_spaces import own_code
from tests.tune_study.data.pictures import HOW, noise
from tune_study.config import DataConfig
from tune_study.data import cache, drawn, sources
from tune_study.data.splits import UNKNOWN, load, outline
from tune_study.errors import UserError

HEAD = """
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path({here!r})


def called(part):
    with open(HERE / "calls.txt", "a") as file:
        file.write(part + "\\n")


def square(number, side=12):
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


class Map:
    '''Map-style, as torchvision's: no __iter__, and no end for Python's own way round that.'''

    def __init__(self, pairs, classes=None):
        self.pairs = pairs
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, at):
        return self.pairs[at % len(self.pairs)]
"""
TWENTY = """
def leaves(split):
    called(split)
    if split == "train":
        pairs = [(Image.fromarray(square(1000 * label + at)), label)
                 for label in (0, 1) for at in range(10)]
        return Map(pairs, ["cat", "dog"])
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    sources.read_source.cache_clear()


@pytest.fixture
def written(tmp_path, place):
    """``written(text)``: a place whose code has that text."""

    def write(text):
        path = tmp_path / "my_images.py"
        path.write_text(HEAD.format(here=str(tmp_path)) + text)
        return place._replace(code=own_code.read(str(path), "grid"))

    return write


def loaded(place, name="leaves", **sizes):
    sources.read_source.cache_clear()
    return load(f"code:{name}", place, DataConfig(**sizes), HOW)


def calls(tmp_path):
    return (tmp_path / "calls.txt").read_text().split()


def test_it_is_the_same_as_the_folder_of_its_images(written, tmp_path, place):
    found = loaded(written(TWENTY))
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for at in range(10):
            (root / name / f"{at}.ppm").write_bytes(
                b"P6\n12 12\n255\n" + noise(1000 * label + at, 12, 12).tobytes()
            )
    folder = load(f"folder:{root}", place, DataConfig(), HOW)
    for ours, theirs in zip(found[:3], folder[:3], strict=True):
        assert torch.equal(ours.images[:], theirs.images[:])
        assert torch.equal(ours.labels, theirs.labels)
    assert (found.class_names, found.sha256) == (folder.class_names, folder.sha256)
    assert len(list(place.cache_dir.rglob("*.pixels"))) == 1  # one file serves both
    assert found.told == (
        "code:leaves: 20 images of 2 classes; 14 to train on, 2 for validation (split off train), "
        "4 for the test (split off train); drawn by leaves in my_images.py"
    )


def test_it_is_called_once_however_many_starts_and_sides(written, tmp_path, monkeypatch):
    where = written(TWENTY)
    first = loaded(where)
    larger = load("code:leaves", where, DataConfig(), HOW._replace(image_size=12))
    assert larger.train.images.shape[-1] == 12
    monkeypatch.setattr(own_code, "module_of", None)  # as in a worker, which does not run the file
    again = loaded(where)
    assert torch.equal(again.train.images[:], first.train.images[:])
    assert (again.sha256, again.outline) == (first.sha256, first.outline)
    assert outline("code:leaves", where, DataConfig(), HOW) == first.outline
    assert calls(tmp_path) == ["train", "val", "test"]


def test_another_text_is_called_again_and_keeps_the_checksum_of_its_images(written, tmp_path):
    first = loaded(written(TWENTY))
    assert loaded(written(TWENTY + "# mine\n")).sha256 == first.sha256
    assert calls(tmp_path) == ["train", "val", "test"] * 2
    changed = (
        TWENTY.replace("1000 * label", "1001 * label"),
        TWENTY.replace("at)), label)", "at)), 1 - label)"),
        TWENTY.replace('"dog"', '"cow"'),
    )
    assert len({first.sha256, *(loaded(written(text)).sha256 for text in changed)}) == 4


def test_what_is_there_counts_only_where_it_is_whole(written, tmp_path, place):
    where = written(TWENTY)
    first = loaded(where)
    (path,) = place.cache_dir.rglob("*.drawn")
    record = path.with_suffix(".drawn.json")
    before = record.read_text()
    for spoil in (
        lambda: path.write_bytes(path.read_bytes()[:-1]),
        record.unlink,
        lambda: record.write_text(before.replace('"dog"', '"cow"')),
        lambda: record.write_text("["),
    ):
        spoil()
        (tmp_path / "calls.txt").unlink()
        again = loaded(where)
        assert (again.sha256, again.class_names) == (first.sha256, ["cat", "dog"])
        assert calls(tmp_path) == ["train", "val", "test"]


def test_a_dry_look_calls_nothing_and_writes_nothing(written, tmp_path, place):
    where = written(TWENTY)
    assert outline("code:leaves", where, DataConfig(), HOW) is UNKNOWN
    assert not place.cache_dir.exists()
    assert not (tmp_path / "calls.txt").exists()
    with pytest.raises(UserError, match="has no function other"):
        outline("code:other", where, DataConfig(), HOW)


def test_images_come_in_every_form(written):
    """Grey and colour, arrays and bytes of files; what a viewer shows of them, on white."""
    found = loaded(
        written("""
import io

def leaves(split):
    if split != "train":
        return iter([])  # no images: the part is split off
    file = io.BytesIO()
    Image.fromarray(square(3)).save(file, "PNG")
    grey = np.full((12, 12), 7, np.uint8)
    clear = Image.new("RGBA", (12, 12), (9, 9, 9, 0))
    deep = Image.fromarray(np.full((12, 12), 40_000, np.uint16))
    other = Image.fromarray(square(4))
    return [
        (image, np.int64(at % 2))
        for at, image in enumerate([file.getvalue(), square(3), square(3)[..., 0], grey, clear,
                                    deep, other, Image.fromarray(square(3))] * 3)
    ]
"""),
        val_size=2,
    )
    images = torch.cat([part.images[:] for part in found[:3]])
    assert len(images) == 24
    assert {int(image[0, 0, 0]) for image in images if len(image.unique()) == 1} == {7, 255, 156}
    (file, array) = (Image.fromarray(noise(3, 12, 12)).resize((8, 8), 3), noise(3, 12, 12)[..., 0])
    colour = torch.as_tensor(np.asarray(file)).permute(2, 0, 1)
    assert sum(torch.equal(image, colour) for image in images) == 9  # PNG, array and image
    grey = torch.as_tensor(np.asarray(Image.fromarray(array).resize((8, 8), 3)))
    assert sum(torch.equal(image, grey.expand(3, 8, 8)) for image in images) == 3
    assert found.class_names == ["0", "1"]


def test_an_image_that_is_turned_is_kept_upright(written):
    image = Image.fromarray(noise(1, 20, 10))
    image.getexif()[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    kept = drawn._as_file(Image.open(file))
    assert Image.open(io.BytesIO(kept)).size == (20, 10)


def test_parts_and_classes_are_those_that_the_function_names(written):
    found = loaded(
        written("""
def leaves(split):
    names = {"train": ["b", "a", "b", "a"], "val": ["a", "b"], "test": ["b", "b", "a"]}[split]
    return ((square(at + len(names)), name) for at, name in enumerate(names))
""")
    )
    assert found.class_names == ["a", "b"]
    assert [part.labels.tolist() for part in found[:3]] == [[1, 0, 1, 0], [0, 1], [1, 1, 0]]
    assert "3 for the test;" in found.told

    found = loaded(
        written("""
def leaves(split):
    labels = {"train": [2, 0, 2, 0], "val": [0, 2], "test": [2]}[split]
    return Map([(square(at), label) for at, label in enumerate(labels)], ["x", "none", "y"])
""")
    )
    assert found.class_names == ["x", "y"]
    assert found.train.labels.tolist() == [1, 0, 1, 0]
    assert "drawn by leaves in my_images.py; passed over: 1 classes without images" in found.told


def test_a_broken_file_is_named_and_may_be_left_out(written):
    where = written("""
def leaves(split):
    if split == "train":
        return [(b"nothing" if at == 3 else square(at), at % 2) for at in range(20)]
""")
    with pytest.raises(UserError, match=r"1 of 20 images cannot be read: train\[3\] \(it is no"):
        loaded(where)
    assert len(loaded(where._replace(leave_out_broken=True)).left_out) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            'raise ValueError("no such split")',
            r"leaves\('train'\) of my_images\.py fails \(ValueError: no such split\); correct it",
        ),
        ("exit(3)", r"leaves\('train'\) of my_images\.py fails \(SystemExit: 3\)"),
        (
            "return ((square(1), 1 // at) for at in (1, 0))",
            r"leaves\('train'\) of my_images\.py fails \(ZeroDivisionError",
        ),
        ("return ((open('/nowhere'), 1) for at in (1, 0))", r"fails \(FileNotFoundError: "),
        ("return None", r"leaves in my_images\.py gives no images to train on"),
        ("return []", r"leaves in my_images\.py gives no images to train on"),
        (
            "return type('Odd', (), {'__len__': lambda s: 1 // 0, '__getitem__': None})()",
            r"fails \(ZeroDivisionError",
        ),
        ("return 7", r"returns int; return a data set or another iterable of \(image, label\)"),
        ("return ['cat']", r"train\[0\] of leaves in my_images\.py is str; give \(image, label\)"),
        (
            "return [(square(1), 0), (square(1) / 255, 0)]",
            r"the image train\[1\] of leaves in my_images\.py is float64 \[12, 12, 3\] \(ndarray\)"
            r"; give a PIL image, an array of uint8 \[H, W\] or \[H, W, 3\]",
        ),
        ("return [(square(1)[..., :2], 0)]", r"is uint8 \[12, 12, 2\] \(ndarray\); give a PIL"),
        ("return [(square(1)[:0], 0)]", r"is uint8 \[0, 12, 3\] \(ndarray\); give a PIL"),
        ("return [({}, 0)]", r"is dict; give a PIL"),
        (
            "return [(square(1), 0.5)]",
            r"the label of train\[0\] of leaves in my.* is float; give",
        ),
        (
            "return Map([(square(1), 0), (square(2), 2)], ['a', 'b'])",
            r"train\[1\] of leaves in my_images\.py has label 2, and its classes are 2, numbered",
        ),
        ("return Map([(square(1), 0), (square(2), -1)], ['a', 'b'])", r"has label -1, and its"),
        ("return Map([(square(1), 'a'), (square(2), 'c')], ['a', 'b'])", r"has label 'c', and its"),
        ("return [(square(1), 0), (square(2), 'a')]", "gives numbers and text as labels"),
        ("return [(square(1), 0)]", "it needs images of two classes to train on, and leaves in my"),
        (
            "return [(square(at), at if split == 'train' else 5) for at in (0, 1)]",
            r"val\[0\] of leaves in my_images\.py has label 5, and no training image has",
        ),
    ],
)
def test_what_is_no_data_set_is_one_sentence(written, place, body, words):
    with pytest.raises(UserError, match=f"^dataset code:leaves: .*{words}") as refused:
        loaded(written(f"def leaves(split):\n    {body}\n"))
    assert "\n" not in str(refused.value)
    assert not list(place.cache_dir.rglob("*drawn*"))


def test_a_name_that_is_no_function_and_a_grid_without_a_file(written, place):
    words = r"dataset code:leaves: my_images\.py has no function leaves; define it there, or name"
    for text in ("", "leaves = 7\n"):
        with pytest.raises(UserError, match=words):
            loaded(written(text))
    with pytest.raises(UserError, match=r"dataset code:leaves: .* there is none; name one with --"):
        loaded(place)


def test_an_image_is_kept_before_the_next_is_made(written, tmp_path, monkeypatch):
    where = written("""
def leaves(split):
    if split == "train":
        for at in range(20):
            called("made")
            yield square(at), at % 2
""")
    keep = drawn._as_file

    def kept(image):
        with (tmp_path / "calls.txt").open("a") as file:
            file.write("kept\n")
        return keep(image)

    monkeypatch.setattr(drawn, "_as_file", kept)
    loaded(where)
    assert calls(tmp_path) == ["made", "kept"] * 20


def test_a_cache_that_cannot_be_written_is_told_as_that(written, tmp_path):
    where = written(TWENTY)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"--cache-dir: .* cannot be written"):
        loaded(where._replace(cache_dir=blocked))


def test_only_one_process_calls_it(written, tmp_path, monkeypatch):
    """Another that waited for the lock finds what the first has drawn."""
    where, alone = written(TWENTY), cache.alone

    def late(path):
        monkeypatch.setattr(cache, "alone", alone)
        loaded(where)
        return alone(path)

    monkeypatch.setattr(cache, "alone", late)
    loaded(where)
    assert calls(tmp_path) == ["train", "val", "test"]
