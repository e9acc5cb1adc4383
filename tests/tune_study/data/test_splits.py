import pytest
import torch

from tune_study.config import DataConfig
from tune_study.data import sources
from tune_study.data.splits import load
from tune_study.errors import UserError


@pytest.fixture(autouse=True)
def _no_cache():
    sources.read_source.cache_clear()


def test_digits_are_stretched_to_bytes_and_split_without_overlap():
    digits = load("digits", None, DataConfig())
    sizes = [len(split.labels) for split in digits[:3]]
    assert sum(sizes) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (3, 8, 8)
    assert int(digits.train.images.max()) == 255
    splits = [{bytes(i.numpy().tobytes()) for i in split.images} for split in digits[:3]]
    distinct = len(set.union(*splits))
    assert distinct == sum(len(s) for s in splits)  # no digit image is in two splits


def test_the_split_is_the_same_each_time_and_stratified():
    first = load("digits", None, DataConfig(train_size=100, val_size=50, test_size=30))
    sources.read_source.cache_clear()
    again = load("digits", None, DataConfig(train_size=100, val_size=50, test_size=30))
    for a, b, size in zip(first[:3], again[:3], (100, 50, 30), strict=True):
        assert torch.equal(a.images, b.images)
        counts = torch.bincount(a.labels, minlength=10)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1 + size // 50
    assert first.sha256 == again.sha256


def test_smaller_training_sets_keep_validation_and_test_images():
    large = load("digits", None, DataConfig())
    small = load("digits", None, DataConfig(train_size=50))
    assert torch.equal(large.val.images, small.val.images)
    assert torch.equal(large.test.images, small.test.images)


@pytest.mark.parametrize("sizes", [{"train_size": 9999}, {"val_size": 3}, {"test_size": 5000}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(UserError, match=f"data.{next(iter(sizes))}"):
        load("digits", None, DataConfig(**sizes))


def test_real_cifar(cifar_dir):
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        sizes = DataConfig(train_size=200, val_size=100, test_size=200)
        dataset = load(name, cifar_dir, sizes)
        assert len(dataset.class_names) == classes
        assert dataset.train.images.shape == (200, 3, 32, 32)
