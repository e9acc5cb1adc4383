"""Labels that code gives become places among the names of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tune_study.errors import UserError

Label = int | str
Refused = Callable[[str], UserError]
"""Why a data set can't be had, as an error that names it."""


def numbered(
    labels: Mapping[str, Sequence[Label]],
    classes: Sequence[str] | None,
    source: str,
    refused: Refused,
) -> tuple[dict[str, list[int]], list[str], list[str]]:
    """({part: places among the names}, names, what is passed over in words).

    Classes are those of the training images: by their own names, in that order, else by the labels,
    sorted. A part without images is left out, to be split off. ``source`` is what gave the labels.
    Raises what ``refused`` makes of a sentence.
    """
    labels = {part: some for part, some in labels.items() if some}
    if "train" not in labels:
        raise refused(f"{source} gives no images to train on")
    if classes is not None:
        labels = {
            part: _places(some, classes, part, source, refused) for part, some in labels.items()
        }
    trained = set(labels["train"])
    if len({type(label) for label in trained}) > 1:
        raise refused(f"{source} gives numbers and text as labels; give one of the two")
    if len(trained) < 2:
        raise refused(f"it needs images of two classes to train on, and {source} gives 1")
    numbers = {label: number for number, label in enumerate(sorted(trained))}
    places = {}
    for part, some in labels.items():
        places[part] = [numbers.get(label, -1) for label in some]
        if -1 in places[part]:
            at = places[part].index(-1)
            raise refused(
                f"{part}[{at}] of {source} has label {some[at]!r:.100}, and no training image has; "
                "add one, or leave it out"
            )
    if classes is None:
        return places, [str(label) for label in numbers], []
    names = [classes[label] for label in numbers if isinstance(label, int)]
    without = len(classes) - len(names)
    return places, names, [f"{without} classes without images"] if without else []


def _places(
    labels: Sequence[Label], classes: Sequence[str], part: str, source: str, refused: Refused
) -> list[Label]:
    """The labels as places in ``classes``."""
    by_name = {name: place for place, name in enumerate(classes)}
    places: list[Label] = []
    for at, label in enumerate(labels):
        place = by_name.get(label, -1) if isinstance(label, str) else label
        if not 0 <= place < len(classes):
            raise refused(
                f"{part}[{at}] of {source} has label {label!r:.100}, and its classes are "
                f"{len(classes)}, numbered from 0; correct the label, or its classes"
            )
        places.append(place)
    return places
