"""Images in a file are what a tensor of them would be, and take no memory."""

import re
from pathlib import Path

import pytest
import torch

from tune_study.data import mapped
from tune_study.data.batches import eval_batches, train_batches
from tune_study.data.mapped import Mapped
from tune_study.data.sources import Split

SHAPE = (30, 3, 6, 6)


@pytest.fixture
def pair(tmp_path):
    """(the same images mapped, in a tensor)."""
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    images.numpy().tofile(tmp_path / "x.pixels")
    return Mapped(tmp_path / "x.pixels", SHAPE), images


def test_slices_indices_and_splits_are_those_of_a_tensor(pair):
    ours, theirs = pair
    assert ours.shape == theirs.shape
    assert len(ours) == 30
    assert ours.device == theirs.device
    index = torch.tensor([7, 0, 29, 7])
    for which in (slice(None), slice(4), slice(2, 9), index):
        assert torch.equal(ours[which], theirs[which])
    taken, also = ours.take(index), theirs[index]
    assert taken.shape == also.shape
    assert torch.equal(taken[:], also)
    assert torch.equal(taken.take(torch.tensor([2, 1]))[:], also[[2, 1]])
    copy = ours[:3]
    copy.zero_()  # the file is not changed
    assert torch.equal(ours[:], theirs)


@pytest.mark.parametrize("size", [1, 7, 30, 31])
def test_batches_are_those_of_a_tensor(pair, size):
    labels = torch.arange(30)
    ours, theirs = (Split(images, labels) for images in pair)
    for batches in (
        lambda split: eval_batches(split, size),
        lambda split: train_batches(split, size, "flip-crop", torch.Generator().manual_seed(1)),
    ):
        pairs = list(zip(batches(ours), batches(theirs), strict=True))
        assert len(pairs) == -(-30 // size)
        for (mine, my_labels), (other, other_labels) in pairs:
            assert torch.equal(mine, other)
            assert torch.equal(my_labels, other_labels)


def test_the_next_batch_is_read_beside_the_step(pair, monkeypatch):
    order = []
    read = Mapped._read
    monkeypatch.setattr(
        Mapped,
        "_read",
        lambda self, which: order.append(f"read {int(which[0])}") or read(self, which),
    )
    reader = pair[0].batches(torch.arange(30).split(10))
    next(reader)
    reader.close()  # waits for what is under way
    assert order == ["read 0", "read 10"]


def test_a_failure_to_read_is_raised(pair):
    with pytest.raises(IndexError):
        list(pair[0].batches([torch.tensor([30])]))


def resident(path):
    """Bytes of a file that this process holds mapped in memory."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell what is resident of a file (no /proc)")
    text = smaps.read_text()
    found = re.findall(rf"{re.escape(str(path))}\n.*?Rss:\s+(\d+) kB", text, re.DOTALL)
    return sum(map(int, found)) * 1024


def test_pages_that_were_read_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 4 * 2**20)
    shape = (160, 3, 256, 256)  # 31 MB
    torch.zeros(shape, dtype=torch.uint8).numpy().tofile(tmp_path / "x.pixels")
    images = Mapped(tmp_path / "x.pixels", shape)
    most = 0
    for number in range(160):
        images[number : number + 1]
        most = max(most, resident(tmp_path / "x.pixels"))
    assert 0 < most < 10 * 2**20


def test_on_a_cpu_they_stay_in_the_file(pair):
    moved = pair[0].to(torch.device("cpu"))
    assert isinstance(moved, Mapped)
    assert torch.equal(moved[:], pair[1])


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_on_another_device_they_lie_where_there_is_room(pair, monkeypatch, share):
    device = torch.device("meta")  # has no content, and stands for one with memory of its own
    size = pair[1].numel()
    monkeypatch.setattr(mapped, "free_bytes", lambda d: size * share / mapped.SHARE_OF_DEVICE)
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 7 * 108)
    moved = pair[0].to(device)
    assert isinstance(moved, Mapped) == (share < 1)
    assert moved.shape == SHAPE
    assert moved.device.type == "meta"
    assert moved[:4].device.type == "meta"
    split = Split(moved, torch.arange(30, device="meta"))
    for images, labels in eval_batches(split, 8):
        assert images.device.type == labels.device.type == "meta"


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_a_batch_for_cuda_is_read_into_pinned_memory(pair, monkeypatch, device, pinned):
    asked, empty = [], torch.empty

    def pretend(*given, pin_memory, **more):
        asked.append(pin_memory)
        return empty(*given, **more)

    monkeypatch.setattr(torch, "empty", pretend)
    images = Mapped(pair[0].path, SHAPE, device=torch.device(device))
    assert torch.equal(images._read(torch.arange(3)), pair[1][:3])
    assert asked == [pinned]
