"""Files as people have them, against Pillow and torchvision."""

import os
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from tests.tune_study.data.pictures import chunk, noise, smooth, with_chunks
from tune_study.data import decoding
from tune_study.data.decoding import Unreadable, square


def torchvisions(image, side, interpolation="bicubic"):
    """What torchvision and timm make of a Pillow image, as [3, side, side]."""
    how = Compose([Resize(side, InterpolationMode(interpolation)), CenterCrop(side)])
    return np.asarray(how(image.convert("RGB"))).transpose(2, 0, 1)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 40), (41, 30), (30, 41), (7, 100), (100, 7), (9, 8)])
@pytest.mark.parametrize("side", [8, 17, 64])
def test_a_square_is_torchvisions(tmp_path, size, side, interpolation):
    image = Image.fromarray(noise(1, *size))
    found = square(saved(tmp_path, image), side, interpolation)
    assert found.dtype == np.uint8
    assert found.shape == (3, side, side)
    assert found.flags.c_contiguous
    assert np.array_equal(found, torchvisions(image, side, interpolation))


@pytest.mark.parametrize("size", [(7, 200), (200, 7)])
def test_of_a_panorama_the_ends_are_not_resized(tmp_path, size, monkeypatch):
    image, sizes = Image.fromarray(noise(1, *size)), []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *given: sizes.append(given[1]) or resize(*given)
    )
    gap = np.abs(square(saved(tmp_path, image), 8, "bicubic").astype(int) - torchvisions(image, 8))
    assert sizes[0] == (8, 8)
    assert gap.max() <= 8  # of noise, whose overshooting is cut off in another order
    assert gap.mean() < 1


@pytest.mark.parametrize("name", ["png", "jpg", "jpeg", "jfif", "jpe", "bmp", "dib", "gif", "webp",
    "tif", "tiff", "ppm", "pnm", "tga", "pcx", "sgi", "rgb", "jp2", "j2k", "avif", "ico", "icns",
    "dds", "im", "msp", "xbm", "pgm", "pbm", "qoi", "pfm", "apng"])  # fmt: skip
def test_what_pillow_reads_is_read(tmp_path, name):
    mode = {"msp": "1", "xbm": "1", "pbm": "1", "pgm": "L", "pfm": "F"}.get(name, "RGB")
    image = Image.fromarray(smooth(32, 32)).convert(mode)
    image = image.point(lambda value: value / 255) if mode == "F" else image
    path = saved(tmp_path, image, f"x.{name}")
    assert path.suffix in decoding.suffixes()
    expected = Image.open(path)
    if mode == "F":
        expected = Image.fromarray(
            np.rint(np.asarray(expected).astype(float) * 255).astype("uint8")
        )
    assert np.array_equal(square(path, 8, "bicubic"), torchvisions(expected, 8))


def test_suffixes_are_pillows_but_of_what_it_only_names():
    Image.init()
    every = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert {".jfif", ".tiff", ".webp"} <= decoding.suffixes() < every
    missing = {Image.registered_extensions()[s] for s in every - decoding.suffixes()}
    assert missing == decoding.NOT_PIXELS & {Image.registered_extensions()[s] for s in every}
    assert "EPS" in missing


def test_a_program_in_the_guise_of_an_image_is_not_run(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(Unreadable, match="it is no image"):
        square(tmp_path / "x.png", 8, "bicubic")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff"])
def test_an_image_is_turned_as_exif_says(tmp_path, name, orientation):
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes what a camera did
    upright = Image.fromarray(smooth(40, 40))
    lying = upright if orientation == 1 else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"x.jpg": {"quality": 95}, "x.webp": {"lossless": True}}.get(name, {})
    path = saved(tmp_path, lying, name, exif=exif, **options)
    found = square(path, 16, "bicubic").astype(int)
    assert np.abs(found - torchvisions(upright, 16)).mean() < 3
    assert np.array_equal(found, torchvisions(ImageOps.exif_transpose(Image.open(path)), 16))


def test_exif_that_makes_no_sense_is_passed_over(tmp_path):
    path = saved(tmp_path, Image.fromarray(noise()), "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff")
    assert np.array_equal(square(path, 8, "bicubic"), torchvisions(Image.open(path), 8))


def palette_with(transparency):
    image = Image.fromarray(np.repeat([[0, 1]], 8, 0).repeat(4, 1).astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = transparency
    return image


def left_clear(mode):
    """Black, whose left half is clear."""
    alpha = Image.fromarray(np.repeat([[0, 255]], 8, 0).repeat(4, 1).astype(np.uint8))
    return Image.merge(mode, [Image.new("L", (8, 8))] * (len(mode) - 1) + [alpha])


@pytest.mark.parametrize(
    ("image", "name", "right"),
    [
        (left_clear("RGBA"), "x.png", (0, 0, 0)),
        (left_clear("LA"), "x.png", (0, 0, 0)),
        (left_clear("RGBA"), "x.webp", (0, 0, 0)),
        (left_clear("RGBA"), "x.tiff", (0, 0, 0)),
        (left_clear("RGBA"), "x.tga", (0, 0, 0)),
        (palette_with(0), "x.png", (10, 20, 30)),
        (palette_with(b"\0\xff"), "x.png", (10, 20, 30)),
        (palette_with(0), "x.gif", (10, 20, 30)),
    ],
)
def test_transparency_is_on_white(tmp_path, image, name, right):
    options = {"transparency": image.info["transparency"]} if image.mode == "P" else {}
    options |= {"lossless": True} if name == "x.webp" else {}
    found = square(saved(tmp_path, image, name, **options), 8, "bicubic")
    assert found[:, 4, 0].tolist() == [255, 255, 255]
    assert found[:, 4, 7].tolist() == list(right)


@pytest.mark.parametrize(("mode", "key"), [("RGB", (7, 8, 9)), ("L", 7), ("1", 0), ("I;16", 700)])
def test_one_colour_that_stands_for_none_is_white(tmp_path, mode, key):
    pixels = np.zeros((8, 8, 3), np.uint8) + np.uint8(100)
    if mode == "I;16":
        pixels = np.full((8, 8), 25700, np.uint16)
    elif mode != "RGB":
        pixels = np.full((8, 8), 255 if mode == "1" else 100, np.uint8)
    pixels[:, :4] = key
    image = Image.fromarray(pixels)
    image = image.convert("1") if mode == "1" else image
    found = square(saved(tmp_path, image, transparency=key), 8, "bicubic")
    assert found[:, 4, 0].tolist() == [255, 255, 255]
    assert found[0, 4, 7] == (255 if mode == "1" else 100)


def test_half_clear_is_half_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert set(square(path, 8, "bicubic").flatten()) == {127}


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((RAMP * 65535).round().astype(np.uint16), "x.png"),
        ((RAMP * 65535).round().astype(np.uint16), "x.tif"),
        ((RAMP * 65535).round().astype(">u2"), "x.tif"),
        ((RAMP * 65535).round().astype(np.int32), "x.pgm"),
        ((RAMP * 65535).round().astype(np.int32), "x.tif"),
        ((RAMP * 255).round().astype(np.int32), "x.tif"),
        ((RAMP * 2e9).round().astype(np.int32), "x.tif"),
        (RAMP.astype(np.float32), "x.tif"),
        ((RAMP * 255).astype(np.float32), "x.tif"),
        ((RAMP * 65535).astype(np.float32), "x.tif"),
        ((RAMP * 7e6 - 3e6).astype(np.float32), "x.tif"),
    ],
)
def test_more_than_8_bits_are_scaled(tmp_path, values, name):
    path = saved(tmp_path, Image.fromarray(values), name)
    found = square(path, 8, "bicubic")
    assert np.abs(found - RAMP * 255).max() <= 1
    assert np.array_equal(found[0], found[2])


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    for name in ("x.png", "x.tif"):
        path = saved(tmp_path, Image.fromarray(np.full((8, 8), 514, np.uint16)), name)
        assert set(square(path, 8, "bicubic").flatten()) == {2}
    path = saved(tmp_path, Image.fromarray(np.full((8, 8), 200, np.int32)), "x.pgm")
    assert set(square(path, 8, "bicubic").flatten()) == {1}


def test_floats_that_are_no_numbers_are_black_or_white(tmp_path):
    values = np.float32([[np.nan, np.inf], [-np.inf, 0.5]]).repeat(4, 0).repeat(4, 1)
    found = square(saved(tmp_path, Image.fromarray(values), "x.tif"), 8, "bilinear")[0]
    assert [found[0, 0], found[0, 7], found[7, 0], found[7, 7]] == [0, 255, 0, 128]
    nothing = np.full((8, 8), np.nan, np.float32)
    path = saved(tmp_path, Image.fromarray(nothing), "y.tif")
    assert set(square(path, 8, "bilinear").flatten()) == {0}


@pytest.mark.parametrize(
    ("mode", "name"),
    [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("YCbCr", "x.jpg"), ("LAB", "x.tif"), ("1", "x.png"),
     ("L", "x.png"), ("P", "x.png"), ("P", "x.bmp")],
)  # fmt: skip
def test_other_colours_are_as_pillow_converts_them(tmp_path, mode, name):
    image = Image.fromarray(smooth(32, 32))
    if mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(smooth(32, 32)[..., n]) for n in range(3)])
    path = saved(tmp_path, image.convert(mode), name)
    assert Image.open(path).mode == ("RGB" if mode == "YCbCr" else mode)
    found = square(path, 16, "bicubic")
    assert np.array_equal(found, torchvisions(Image.open(path), 16))
    assert found.std() > 20


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, name):
    first, *more = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    path = tmp_path / name
    options = {"lossless": True} if name == "x.webp" else {}
    first.save(path, save_all=True, append_images=more, **options)
    assert Image.open(path).n_frames == 3
    assert square(path, 8, "bicubic")[:, 0, 0].tolist() == [255, 0, 0]


def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    image = Image.fromarray(noise())
    saved(tmp_path, image, "x.png").rename(tmp_path / "x.jpg")
    assert np.array_equal(square(tmp_path / "x.jpg", 8, "bicubic"), torchvisions(image, 8))


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("L", (60, 50)))
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(decoding, "MOST_PIXELS", 3000)
    square(path, 8, "bicubic")
    monkeypatch.setattr(decoding, "MOST_PIXELS", 2999)
    for within in (decoding.bounded(), warnings.catch_warnings()):
        with within, pytest.raises(Unreadable, match=r"more .*than are read"):
            decoding.shorter_side(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_within_the_bounds_pillow_neither_warns_nor_refuses(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("L", (60, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable):
        square(path, 8, "bicubic")
    with decoding.bounded():
        assert square(path, 8, "bicubic").shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_that_would_fill_the_memory_is_passed_over(tmp_path, kind):
    image = Image.fromarray(noise())
    path = saved(tmp_path, image)
    bomb = zlib.compress(bytes(2**26))
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    with_chunks(path, chunk(kind, head + bomb))
    with pytest.raises(ValueError, match="too large"):
        Image.open(path)
    assert np.array_equal(square(path, 8, "bicubic"), torchvisions(image, 8))
    assert decoding.shorter_side(path) == 30


@pytest.mark.parametrize("cut", [0, 10, 60, 400])
def test_half_a_file_is_unreadable(tmp_path, cut):
    path = saved(tmp_path, Image.fromarray(noise()), "x.jpg")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Unreadable):
        square(path, 8, "bicubic")


def test_what_is_no_file_is_unreadable(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    for name, words in (("pipe.png", "not a file"), ("link.png", "no such file"), ("none", "no")):
        with pytest.raises(Unreadable, match=words):
            square(tmp_path / name, 8, "bicubic")


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(noise()))
    expected = square(path, 8, "bicubic")
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1)
    held = []
    plain = decoding._plain
    monkeypatch.setattr(
        decoding,
        "_plain",
        lambda *given: held.append(decoding._one_large.locked()) or plain(*given),
    )
    assert np.array_equal(square(path, 8, "bicubic"), expected)
    assert held == [True]
    assert not decoding._one_large.locked()
