import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from tune_study.config import DataConfig
from tune_study.data.batches import (
    Preprocessing,
    augment,
    augmentation,
    draw_augmentation,
    draw_plan,
    eval_batches,
    preprocess,
    train_batches,
)
from tune_study.data.sources import Split


def augmented(images, how, generator):
    """By what the generator draws next."""
    draws = draw_augmentation(len(images), how, images.shape[-2], generator)
    return augment(images, how, draws)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 56, 224])
def test_preprocess_is_what_pillow_makes_of_each_image(size: int, interpolation: str):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.3, 0.4])
    filter = Image.Resampling[interpolation.upper()]
    expected = [
        (np.asarray(Image.fromarray(image).resize((size, size), filter)) / 255 - mean) / std
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    how = Preprocessing(size, interpolation, tuple(mean.tolist()), tuple(std.tolist()))
    cropped = images.contiguous(memory_format=torch.channels_last)  # as augment leaves them
    for given in (images, cropped):
        pixels = preprocess(given, how).permute(0, 2, 3, 1).numpy()
        levels = (pixels - np.stack(expected)) * std * 255
        assert np.abs(levels).max() < 2.01  # whole levels, and the rounding of floats
        assert np.abs(levels).mean() < 0.3
    assert images.dtype == torch.uint8


def test_crop_equals_the_slow_obvious_version():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    cropped = augmented(images, "crop", torch.Generator().manual_seed(3))
    offsets = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(3))
    padded = pad(images, (4, 4, 4, 4))
    for i, (top, left) in enumerate(offsets.T.tolist()):
        assert torch.equal(cropped[i], padded[i, :, top : top + 32, left : left + 32])


def test_flip_mirrors_about_half_of_the_images():
    images = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    changed = augmented(images, "flip-crop", torch.Generator().manual_seed(0))
    slope = (changed[:, 0, 16, 20].int() - changed[:, 0, 16, 12].int()).sign()
    assert set(slope.tolist()) == {-1, 1}
    assert abs(float(slope.float().mean())) < 0.1


def test_digits_are_never_mirrored():
    assert augmentation("digits", DataConfig()) == "crop"
    assert augmentation("cifar10", DataConfig()) == "flip-crop"
    assert augmentation("cifar10", DataConfig(augment="none")) == "none"


def test_train_batches_show_every_image_once_in_an_order_of_the_generator():
    split = Split(torch.arange(50).view(50, 1, 1, 1).expand(50, 3, 4, 4).byte(), torch.arange(50))
    batches = list(train_batches(split, 16, "none", torch.Generator().manual_seed(1)))
    labels = torch.cat([b for _, b in batches])
    assert [len(b) for _, b in batches] == [16, 16, 16, 2]
    assert labels.sort().values.tolist() == list(range(50))
    assert labels.tolist() != list(range(50))
    for images, targets in batches:
        assert torch.equal(images[:, 0, 0, 0].long(), targets)


@pytest.mark.parametrize(
    ("dataset", "asked", "taken"),
    [
        ("digits", "flip-crop", "flip-crop"),
        ("digits", "none", "none"),
        ("digits", "auto", "crop"),
        ("folder:x", "auto", "crop"),
        ("cifar10", "crop", "crop"),
    ],
)
def test_augmentation_is_what_was_asked_for_else_what_fits(dataset, asked, taken):
    assert augmentation(dataset, DataConfig(augment=asked)) == taken


@pytest.mark.parametrize(("side", "border"), [(4, 1), (8, 1), (15, 1), (16, 2), (40, 5)])
def test_a_crop_moves_by_an_eighth_at_most_and_reaches_it(side, border):
    images = torch.zeros(500, 3, side, side, dtype=torch.uint8)
    images[:, :, side // 2, side // 2] = 1
    cropped = augmented(images, "crop", torch.Generator().manual_seed(0))
    _, rows, columns = cropped[:, 0].nonzero().T
    for moved in (rows - side // 2, columns - side // 2):
        assert (int(moved.min()), int(moved.max())) == (-border, border)
    assert augmented(images, "none", torch.Generator()) is images


def test_a_mirrored_image_is_the_mirror_of_its_crop():
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    plain = augmented(images, "crop", torch.Generator().manual_seed(5))
    mirrored = augmented(images, "flip-crop", torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    torch.randint(0, 3, (2, 40), generator=generator)
    turned = torch.rand(40, generator=generator) < 0.5
    assert torch.equal(mirrored[~turned], plain[~turned])
    assert torch.equal(mirrored[turned], plain[turned].flip(-1))


def test_evaluation_keeps_the_order_and_the_last_images():
    split = Split(torch.arange(7).view(7, 1, 1, 1).byte(), torch.arange(7))
    batches = list(eval_batches(split, 3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(torch.equal(images[:, 0, 0, 0].long(), labels) for images, labels in batches)


def test_training_batches_are_augmented_in_the_order_of_the_generator():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(9, generator=generator)
    expected = augmented(images[order[:9]], "crop", generator)
    split = Split(images, torch.arange(9))
    ((batch, labels),) = train_batches(split, 9, "crop", torch.Generator().manual_seed(2))
    assert torch.equal(batch, expected)
    assert torch.equal(labels, order)


@pytest.mark.parametrize("how", ["none", "crop", "flip-crop"])
def test_a_plan_is_what_each_batch_would_draw_in_its_turn(how):
    given, turn = (torch.Generator().manual_seed(4) for _ in range(2))
    plan = draw_plan(50, 16, how, 32, given)
    assert torch.equal(plan[0], torch.randperm(50, generator=turn))
    for part in plan.split(16, dim=1):
        top_left, mirrored = torch.zeros(2, part.shape[1]), torch.zeros(part.shape[1])
        if how != "none":
            top_left = torch.randint(0, 9, (2, part.shape[1]), generator=turn)
        if how == "flip-crop":
            mirrored = torch.rand(part.shape[1], generator=turn) < 0.5
        assert part[1:3].tolist() == top_left.tolist()
        assert part[3].bool().tolist() == mirrored.bool().tolist()
    assert torch.equal(given.get_state(), turn.get_state())
