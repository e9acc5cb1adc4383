"""What the fuzz tests feed the readers: odd values, mutated records, damaged files. No test module.

Draws are the same in every run, so that a failure repeats.
"""

import copy
import itertools
import json
import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st


def fuzz(examples):
    """The same draws in every run, and a folder that a test may share among its examples."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        database=None,
        phases=[Phase.generate],  # to shrink a study folder takes minutes, and its draws are told
        suppress_health_check=quiet,
    )


ODD = ["", ".", "..", "../x", "a/b", "\0", "a\nb", "é漢😀", "\ud800", "nan", "~", "-"]
TEXT = st.sampled_from(ODD) | st.text(max_size=20) | st.integers(256, 1500).map("a".__mul__)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**1030, -(2**70), True])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NOT_JSON = st.sampled_from([b"\xff", {1: 2}, {None: 3}, ("a",), {1}, "a{9999999999}"])
VALUES = JSON | NOT_JSON | st.integers(1000, 2000).map("(".__mul__)
TRIAL = {
    "model": "deit_tiny_patch16_224",
    "dataset": "folder:photos",
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "blocks"},
    "quantization": {"mode": "nf4", "skip_layers": ["blocks.0.*"], "overrides": {"x": "int8"}},
    "seed": 7,
    "pretrained": True,
    "data": {"train_size": 40, "augment": "auto"},
    "training": {"num_train_epochs": 2, "learning_rate": 1e-3, "compute_dtype": "bf16"},
}


def places(value, way=()):
    """The way to every part of a nested value but itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        yield (*way, key)
        if isinstance(part, dict | list):
            yield from places(part, (*way, key))


@st.composite
def mutated(draw, original, values=JSON):
    """``original`` with one to three of its parts, at any depth, replaced, lost or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places(value))
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        parent = value
        for key in way:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "lose", "add"]))
        if what == "lose":
            del parent[last]
        elif what == "add" and isinstance(parent, dict):
            parent[draw(TEXT)] = copy.deepcopy(draw(values))
        else:
            parent[last] = copy.deepcopy(draw(values))
    return value


@st.composite
def damaged(draw, data):
    """The bytes of a file, cut, with a flipped bit, or replaced."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))
    if how == "cut":
        return data[:at]
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    new = draw(st.binary(max_size=9) | st.sampled_from([b"\xff\xfe", b""]))
    new *= draw(st.sampled_from([1, 1, 9000]))
    return new if how == "replace" else data[:at] + new + data[at:]


def files_like(value):
    """What could stand in a JSON file that held ``value``."""
    text = mutated(value).map(json.dumps) | JSON.map(json.dumps)
    return text.map(str.encode) | damaged(json.dumps(value).encode())


def outcome(call, *ours):
    """What ``call`` returns, or ``None`` after an error of ours, in one sentence."""
    try:
        return call()
    except ours as error:
        sentence = str(error)
    assert 0 < len(sentence) < 20_000, len(sentence)
    return None


def unfolding(first, link):
    """YAML that grows ninefold with each of its few names."""
    names = itertools.pairwise("abcdefg")
    links = [f"&{b} {link.format(','.join([f'*{a}'] * 9))}" for a, b in names]
    return f"[&a {first},{','.join(links)}]"


BOMB = unfolding("[x]", "[{}]")
MERGE_BOMB = unfolding("{x: 1}", "{{<<: [{}]}}")
YAML = [
    BOMB, MERGE_BOMB, "&a [*a]", "[" * 1500, "9" * 5000, "0x" + "f" * 5000, "0x_", "0b_",
    "2001-13-45", "2001-01-01", "2001-01-01 00:00:00 +99:99", "0001-01-01 00:00:00 +14:00",
    "!!int ''", "!!bool x", "!!timestamp x", "!!float x", "!!binary x", "!!set {a}", "190:20:30",
    "!!python/name:os.system", "!!python/object/apply:os.mkdir [ran]", "{[1]: 2}", "{<<: 1}", "=",
    "<<", "%", "-", "? a", "{a: 1, a: 2}",
]  # fmt: skip


ARGUMENT = st.sampled_from(
    [
        *[
            "nan",
            "inf",
            "-inf",
            "0",
            "-1",
            "1",
            "1e400",
            "1e-400",
            "1e-200",
            "99999999999",
            "0.5",
            "x",
            "9_9",
        ],
        "",
        "9" * 5000,
    ]
) | NUMBERS.map(str)


def in_place_of(path):
    """What may stand where a file is expected; nothing of it may be opened and waited for."""
    yield lambda: path.mkdir()
    yield lambda: os.mkfifo(path)
    yield lambda: path.symlink_to("nowhere")
    yield lambda: path.symlink_to(path.name)
    yield lambda: path.symlink_to("/dev/zero")
