"""What a function of the user's makes of a batch."""

import hashlib

import pytest
import torch

from search_spaces.own_code import Code
from tune_study.data.transform import transform_of, try_out
from tune_study.errors import UserError


def code(body):
    text = f"import torch\n\ndef mine(images, generator):\n    {body}\n"
    return Code("/me/mine.py", "grid", text, hashlib.sha256(text.encode()).hexdigest())


IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
NOISE = "return images + 50 * torch.randn(images.shape, generator=generator)"


@pytest.fixture
def config(tiny):
    return tiny("none", data={"augment": "code:mine"})


def made(config, body, epoch=1, step=0):
    return transform_of(config, code(body))(IMAGES, epoch, step)


def test_it_draws_by_seed_epoch_and_step_alone(config):
    first = made(config, NOISE)
    torch.manual_seed(5)
    assert torch.equal(made(config, NOISE), first)
    others = [made(config, NOISE, 2, 0), made(config, NOISE, 1, 1)]
    others.append(made(config.model_copy(update={"seed": 7}), NOISE))
    quantized = config.model_copy(update={"quantization": {"mode": "nf4"}})
    assert torch.equal(made(quantized, NOISE), first)  # modes see the same images
    assert not any(torch.equal(other, first) for other in others)


def test_floats_become_whole_grey_levels_in_the_range(config):
    found = made(config, "return images.float() * 4 - 20.4")
    assert found.dtype == torch.uint8
    assert torch.equal(found, (IMAGES.float() * 4 - 20.4).round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(made(config, "return images.flip(-1)"), IMAGES.flip(-1))
    assert made(config, "return images.double()").dtype == torch.uint8


def test_an_augmentation_of_ours_needs_no_function(tiny):
    assert transform_of(tiny("none"), None) is None
    try_out(tiny("none"), None, IMAGES)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "return images[:1]",
            r"it made uint8 \[1, 3, 4, 4\] on cpu of uint8 \[2, 3, 4, 4\]",
        ),
        ("return images.int()", r"it made int32 \[2, 3, 4, 4\] on cpu of .* of uint8 or of floats"),
        ("return images.to('meta')", r"it made uint8 \[2, 3, 4, 4\] on meta of uint8"),
        ("return None", "it made NoneType of uint8"),
        ("return images / 255", r"it made values from 0 to 0\.373; return them in 0\.\.255, which"),
        ("return (images / 255 - 0.5) / 0.2", r"it made values from -2\.5 to -0\.637; return"),
        ("return images * float('nan')", "it made values from nan to nan"),
        ("raise KeyError('a')", r"it fails on uint8 \[2, 3, 4, 4\] \(KeyError: 'a'\); correct it"),
    ],
)
def test_what_makes_no_such_images_is_one_sentence(config, body, words):
    with pytest.raises(UserError, match=rf"^data\.augment = code:mine: {words}"):
        try_out(config, code(body), IMAGES)


def test_what_is_tried_out_is_a_copy(config):
    before = IMAGES.clone()
    try_out(config, code("return images.zero_()"), IMAGES)
    assert torch.equal(IMAGES, before)


def test_a_name_that_is_no_function_and_a_grid_without_a_file(tiny, config):
    other = tiny("none", data={"augment": "code:other"})
    with pytest.raises(UserError, match=r"data\.augment = code:other: mine\.py has no function"):
        transform_of(other, code("return images"))
    with pytest.raises(UserError, match=r"data\.augment = code:mine: .* there is none; name one"):
        transform_of(config, None)
