"""Procedural glyphs: classes of random strokes, rendered on the fly as 32-pixel images.

A class is a fixed set of one to three strokes; a sample is that set with its control points
jittered, bent by an affine map, drawn with a random pen and degraded. Nothing is read from disk,
and no shape is designed: the classes are whatever the seed gives.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
MAX_STROKES = 3
POINTS_PER_STROKE = 9
LINE, CORNERS, CURVE, LOOP = range(4)


class Glyphs(NamedTuple):
    """The classes: `control [C, S, 4, 2]` in [-1, 1], `kind [C, S]`, `drawn [C, S]` (bool)."""

    control: Tensor
    kind: Tensor
    drawn: Tensor


def make_glyphs(classes: int, seed: int) -> Glyphs:
    """Draw the classes; the same `classes` and `seed` always give the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (classes, MAX_STROKES)
    kind = torch.multinomial(
        torch.tensor([0.2, 0.3, 0.3, 0.2]), classes * MAX_STROKES, True, generator=generator
    ).view(shape)
    count = 1 + torch.multinomial(
        torch.tensor([0.3, 0.4, 0.3]), classes, True, generator=generator
    ).unsqueeze(1)
    walk = _random_walk(shape, generator)
    ends = walk[..., [0, 2], :]
    weights = torch.linspace(0, 1, 4).view(4, 1)
    line = ends[..., :1, :] * (1 - weights) + ends[..., 1:, :] * weights
    control = torch.where((kind == LINE)[..., None, None], line, walk)
    control = torch.where((kind == LOOP)[..., None, None], _ovals(shape, generator), control)
    return Glyphs(control, kind, torch.arange(MAX_STROKES) < count)


def _random_walk(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Four points a pen could visit, `[*shape, 4, 2]`: steps long enough to be seen."""
    points = [torch.rand(*shape, 2, generator=generator) * 1.6 - 0.8]
    for _ in range(3):
        angle = torch.rand(shape, generator=generator) * 2 * torch.pi
        length = 0.5 + 0.7 * torch.rand(shape, generator=generator)
        step = torch.stack([angle.cos(), angle.sin()], -1) * length.unsqueeze(-1)
        inside = (points[-1] + step).abs() <= 0.85
        # A step that would leave the canvas is reflected, so that shapes do not pile up at its rim.
        points.append(torch.where(inside, points[-1] + step, points[-1] - step).clamp(-0.85, 0.85))
    return torch.stack(points, -2)


def _ovals(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Four points around a centre, `[*shape, 4, 2]`, for closed strokes of uneven radius."""
    centre = torch.rand(*shape, 1, 2, generator=generator) - 0.5
    radius = 0.2 + 0.45 * torch.rand(*shape, 4, generator=generator)
    start = torch.rand(*shape, 1, generator=generator) * torch.pi / 2
    angle = start + torch.arange(4) * torch.pi / 2
    return centre + torch.stack([angle.cos() * radius, angle.sin() * radius], -1)


def _bases() -> Tensor:
    """Matrices `[4 kinds, T, 4]` that turn four control points into the T points of a stroke.

    Lines and corners interpolate linearly, curves are cubic Beziers, loops closed Catmull-Rom
    splines; all are linear in the control points, so one batched product draws every kind.
    """
    t = torch.linspace(0, 1, POINTS_PER_STROKE)
    linear = (1 - (3 * t[:, None] - torch.arange(4)).abs()).clamp(min=0)
    bezier = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    cell = (4 * t).floor().clamp(max=3)
    u = 4 * t - cell
    cubic = [-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2]
    loop = torch.zeros(POINTS_PER_STROKE, 4)
    for offset, weight in zip((-1, 0, 1, 2), cubic, strict=True):
        loop.scatter_add_(1, ((cell + offset) % 4).long()[:, None], 0.5 * weight[:, None])
    return torch.stack([linear, linear, bezier, loop])


def render(
    glyphs: Glyphs, labels: Tensor, generator: torch.Generator, strength: float = 1.0
) -> Tensor:
    """Draw one jittered sample per label.

    Args:
        glyphs: the classes, from `make_glyphs`.
        labels: class indices, `[B]`, int64.
        generator: the only source of randomness.
        strength: scales every distortion, 0 (the bare class, but for the pen) to 1.

    Returns:
        Images `[B, 3, 32, 32]`, float32, normalised with mean and standard deviation 0.5 (so a
        full-contrast image spans -1 to 1); the three channels are equal.
    """
    strokes = _strokes(glyphs, labels, generator, strength)
    images = _degrade(_ink(strokes, glyphs.drawn[labels], generator), generator, strength)
    return ((images - 0.5) / 0.5).expand(-1, 3, -1, -1).contiguous()


def _uniform(size: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=generator)


def _strokes(glyphs: Glyphs, labels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Points `[B, S, T, 2]` of each sample's strokes, after jitter and a random affine map."""
    size = len(labels)
    control = glyphs.control[labels]
    # Whole strokes move a little against each other, and each control point a little more.
    shift = 0.05 * torch.randn(size, MAX_STROKES, 1, 2, generator=generator)
    jitter = 0.07 * torch.randn(control.shape, generator=generator)
    points = _bases()[glyphs.kind[labels]] @ (control + strength * (shift + jitter))
    angle = strength * _uniform(size, -0.3, 0.3, generator)
    shear = strength * _uniform(size, -0.3, 0.3, generator)
    scale = 0.9 + strength * _uniform(size, -0.2, 0.2, generator)
    aspect = (strength * _uniform(size, -0.11, 0.11, generator)).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * aspect, (cos * shear - sin) / aspect, sin * aspect, (sin * shear + cos) / aspect]
    affine = (torch.stack(rows, 1) * scale[:, None]).view(size, 1, 2, 2)
    move = 0.3 * torch.rand(size, 1, 1, 2, generator=generator) - 0.15
    return points @ affine.transpose(-1, -2) + strength * move


def _ink(points: Tensor, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """Coverage `[B, 1, 32, 32]` in 0..1: a soft threshold on the distance to the nearest stroke.

    In a segment's own frame a pixel lies at (along, across), both affine in the pixel's position,
    so one small product gives them for all segments and pixels.
    """
    size = len(points)
    start, end = points[:, :, :-1].flatten(1, 2), points[:, :, 1:].flatten(1, 2)
    length = (end - start).norm(dim=-1, keepdim=True).clamp(min=1e-6)
    way = (end - start) / length
    normal = torch.stack([-way[..., 1], way[..., 0]], -1)
    axis = (torch.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x.flatten(), y.flatten()])
    along = way @ pixels - (way * start).sum(-1, keepdim=True)
    across = normal @ pixels - (normal * start).sum(-1, keepdim=True)
    beyond = along - torch.minimum(along.clamp(min=0), length)
    squared = across.square_().add_(beyond.square_())
    segments = drawn.repeat_interleave(POINTS_PER_STROKE - 1, dim=1)
    squared.masked_fill_(~segments.unsqueeze(-1), 100.0)
    distance = squared.amin(1).sqrt_()
    half_width = _uniform(size, 0.04, 0.17, generator).unsqueeze(1)
    softness = _uniform(size, 0.01, 0.05, generator).unsqueeze(1)
    return torch.sigmoid((half_width - distance) / softness).view(size, 1, IMAGE_SIZE, IMAGE_SIZE)


def _degrade(ink: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """What a cheap scanner does: low resolution, blur, contrast, polarity, noise; `[B, 1, 32, 32]`.

    Samples are drawn independently, so degrading a fixed share of the batch by position degrades
    a random share of the images.
    """
    size = len(ink)
    images = ink.clone()
    for part, side in enumerate((8, 8, 10, 12, 16)):
        share = int(strength * size / 10)
        chosen = slice(part * share, (part + 1) * share)
        if chosen.stop > chosen.start:
            small = F.adaptive_avg_pool2d(ink[chosen], side)
            mode = "bicubic" if part % 2 else "bilinear"
            images[chosen] = F.interpolate(small, IMAGE_SIZE, mode=mode, align_corners=False)
    blurred = slice(size - int(strength * size / 10), size)
    images[blurred] = F.avg_pool2d(images[blurred], 3, 1, 1)
    contrast = (1 - strength * _uniform(size, 0.0, 0.5, generator)).view(-1, 1, 1, 1)
    floor = (1 - contrast) * torch.rand(size, 1, 1, 1, generator=generator)
    images = floor + contrast * images
    inverted = torch.rand(size, 1, 1, 1, generator=generator) < 0.3 * strength
    images = torch.where(inverted, 1 - images, images)
    noise = strength * _uniform(size, 0.0, 0.12, generator).view(-1, 1, 1, 1)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp_(0, 1)
