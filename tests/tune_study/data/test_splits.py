import pytest
import torch
from sklearn.model_selection import train_test_split

from tune_study.config import DataConfig
from tune_study.data import sources, splits
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.errors import UserError


@pytest.fixture(autouse=True)
def _no_cache():
    sources.read_source.cache_clear()


def test_digits_are_stretched_to_bytes_and_split_without_overlap():
    digits = load("digits", Place(), DataConfig())
    sizes = [len(split.labels) for split in digits[:3]]
    assert sum(sizes) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (3, 8, 8)
    assert int(digits.train.images.max()) == 255
    splits = [{bytes(i.numpy().tobytes()) for i in split.images} for split in digits[:3]]
    distinct = len(set.union(*splits))
    assert distinct == sum(len(s) for s in splits)  # no digit image is in two splits


def test_the_split_is_the_same_each_time_and_stratified():
    first = load("digits", Place(), DataConfig(train_size=100, val_size=50, test_size=30))
    sources.read_source.cache_clear()
    again = load("digits", Place(), DataConfig(train_size=100, val_size=50, test_size=30))
    for a, b, size in zip(first[:3], again[:3], (100, 50, 30), strict=True):
        assert torch.equal(a.images, b.images)
        counts = torch.bincount(a.labels, minlength=10)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1 + size // 50
    assert first.sha256 == again.sha256


def test_smaller_training_sets_keep_validation_and_test_images():
    large = load("digits", Place(), DataConfig())
    small = load("digits", Place(), DataConfig(train_size=50))
    assert torch.equal(large.val.images, small.val.images)
    assert torch.equal(large.test.images, small.test.images)


@pytest.mark.parametrize("sizes", [{"train_size": 9999}, {"val_size": 3}, {"test_size": 5000}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(UserError, match=f"data.{next(iter(sizes))}"):
        load("digits", Place(), DataConfig(**sizes))


def test_real_cifar(cifar_dir):
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        sizes = DataConfig(train_size=200, val_size=100, test_size=200)
        dataset = load(name, Place(cifar_dir), sizes)
        assert len(dataset.class_names) == classes
        assert dataset.train.images.shape == (200, 3, 32, 32)


def test_shares_sizes_and_their_boundaries():
    digits = load("digits", Place(), DataConfig())
    # A fifth of 1,797 for the test, then a tenth of the rest for validation.
    assert [len(split.labels) for split in digits[:3]] == [1294, 144, 359]
    whole = load("digits", Place(), DataConfig(train_size=1294, test_size=359))
    assert torch.equal(whole.train.images, digits.train.images)
    assert torch.equal(whole.test.labels, digits.test.labels)
    for size in ({"train_size": 1295}, {"test_size": 360}):
        with pytest.raises(UserError, match=r"has (1294|359) images for it"):
            load("digits", Place(), DataConfig(**size))


def test_a_split_holds_an_image_of_every_class_in_the_order_of_the_source():
    labels = torch.arange(40) % 10
    rest, chosen = splits._split_off(labels, None, 0.1, "planted", "val")  # a tenth is 4
    assert sorted(labels[chosen].tolist()) == list(range(10))
    assert len(rest) == 30
    assert rest.tolist() == sorted(rest.tolist())
    assert chosen.tolist() == sorted(chosen.tolist())
    assert not set(rest) & set(chosen)
    assert len(splits._split_off(labels, None, 0.5, "planted", "val")[1]) == 20


def test_the_digits_and_the_seed_of_their_split_are_these():
    """A study is continued by another version: its images must not be others."""
    digits = load("digits", Place(), DataConfig(val_size=20))
    assert digits.class_names == [str(n) for n in range(10)]
    assert digits.sha256 == "172254ee56bbb5aa4594b7b39ef2320dca2ffe80cb37d0fac4fac5394c3fa3c5"
    labels = torch.arange(40) % 4
    _, chosen = splits._split_off(labels, 8, 0.1, "planted", "val")
    expected = train_test_split(range(40), test_size=8, stratify=labels, random_state=2024)[1]
    assert chosen.tolist() == sorted(expected)
