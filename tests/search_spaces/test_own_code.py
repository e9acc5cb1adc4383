from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from search_spaces import own_code
from search_spaces.lookup import code_of
from search_spaces.own_code import Code
from tune_study.errors import UserError

MODEL = """
from dataclasses import dataclass

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


@dataclass
class Sizes:
    embed_dim: "int" = 64


@register_model
def {name}(**kwargs):
    return VisionTransformer(embed_dim=Sizes().embed_dim, depth=1, num_heads=1)


def grid():
    return {{"seed": 1}}
"""


def written(folder: Path, name: str) -> Path:
    path = folder / "random.py"  # also the name of a module of Python's, which stays what it is
    path.write_text(MODEL.format(name=name))
    return path


def test_a_file_is_run_once_and_tells_what_it_registers(tmp_path: Path) -> None:
    import random

    path = written(tmp_path, "own_code_one")
    code = code_of("--grid", f"{path}:grid")
    assert code is not None
    assert code == code_of("--grid", f"{path}:grid")
    assert (code.file, code.function, code.models) == ("random.py", "grid", ("own_code_one",))
    assert code.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert timm.create_model("own_code_one").embed_dim == 64
    assert own_code.module_of(code).grid() == {"seed": 1}
    assert sys.modules["random"] is random
    path.write_text("def grid():\n    return {}\n")
    assert code_of("--grid", f"{path}:grid").models == ()  # type: ignore[union-attr]
    assert code_of("--grid", "demo") is code_of("--grid", None) is None


def test_another_process_learns_the_models_from_the_text(tmp_path: Path) -> None:
    path = written(tmp_path, "own_code_two")
    code = own_code.read(str(path), "grid")
    path.unlink()
    program = (
        "import timm\nfrom search_spaces.own_code import Code, run_where_trials_run as run\n"
        f"run({code!r})\nprint(timm.create_model('own_code_two').embed_dim)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "64\n", done.stderr


def test_the_name_of_a_model_of_timms_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "vit_tiny_patch16_224")
    before = timm.model_entrypoint("vit_tiny_patch16_224")
    with (
        pytest.warns(UserWarning, match="Overwriting"),
        pytest.raises(
            UserError,
            match=r"--grid .*random\.py:grid: it registers vit_tiny_patch16_224, and timm",
        ),
    ):
        code_of("--grid", f"{path}:grid")
    assert timm.model_entrypoint("vit_tiny_patch16_224") is not before  # the command ends here
    with pytest.warns(UserWarning, match="Overwriting"):
        timm.models.register_model(before)


def test_what_fails_where_trials_run_is_one_sentence() -> None:
    text = "import not_on_this_node\n"
    code = Code("/home/me/my_model.py", "grid", text, "sha", ("leaf_vit",))
    with pytest.raises(UserError) as refused:
        own_code.run_where_trials_run(code)
    assert str(refused.value) == (
        "my_model.py runs for the command and not where trials run (ModuleNotFoundError: No module "
        "named 'not_on_this_node'); what it imports and opens must be there, too"
    )
    with pytest.raises(UserError, match="runs for the command and not where trials run"):
        own_code.run_where_trials_run(code._replace(models=(), transforms=("noise",)))
    own_code.run_where_trials_run(code._replace(models=()))  # it is the command's alone
    own_code.run_where_trials_run(None)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("DEPTH = 2", "DEPTH = 3", True),
        ("DEPTH = 2", "# as in the paper\nDEPTH=2\n", False),
        ("DEPTH = 2", "DEPTH = 2\ndef grid():\n    return {'seed': 1}", False),
        ("DEPTH = 2", "DEPTH = 2\ndef other():\n    return {'seed': 1}", True),
        ("DEPTH = 2", "DEPTH = ", True),
    ],
)
def test_code_that_acts_is_told_from_what_does_not(before: str, after: str, changed: bool) -> None:
    records = [
        Code("m.py", "grid", text, hashlib.sha256(text.encode()).hexdigest()).record()
        for text in (before, after)
    ]
    assert own_code.differ(*records) is changed
    assert not own_code.differ(records[0], {**records[0], "function": "other"})
