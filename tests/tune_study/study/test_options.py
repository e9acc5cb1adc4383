"""A mistake on the command line is refused before torch and Ray are there."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces import grids
from search_spaces.lookup import function_of
from tune_study import run
from tune_study.errors import UserError
from tune_study.study import options
from tune_study.study.options import Options, resolved


def test_what_must_be_there_is_looked_for(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert resolved("--weights", file, "file or folder") == file.resolve()
    assert resolved("--output-dir", tmp_path / "new") == tmp_path.resolve() / "new"
    with pytest.raises(UserError, match=r"^--data-dir .*file: there is no such folder$"):
        resolved("--data-dir", file, "folder")
    with pytest.raises(UserError, match="it is no usable path"):
        resolved("--data-dir", tmp_path / ("x" * 300), "folder")


@pytest.mark.parametrize(
    "mistake",
    [
        ["--grid", "fulll"],
        ["--grid", "none.py:grid"],
        ["--space", "x"],
        ["--data-dir", "/nowhere"],
        ["--weights", "/nowhere"],
        ["--device", "gpu"],
        ["--name", "a/b"],
        ["--set", "epochs=3"],
        ["--keep-checkpoints", "some"],
        ["--epoch-s", "3"],
        ["--simulate", "--validate-only"],
        ["--address", "ray://head:10001"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_refused_before_torch_is_imported(mistake: list[str]) -> None:
    script = (
        "import sys; from tune_study import run\n"
        "try: run.main()\n"
        "finally: assert not {'torch', 'ray.tune'} & sys.modules.keys(), 'imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *mistake], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {mistake[0]}")
    assert done.stderr.count("\n") == 1


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options:
    """What the command line makes of them, before it is looked at."""
    came: list[Options] = []

    def look(given: Options) -> Options:
        came.append(given)
        raise UserError("seen")

    monkeypatch.setattr(run, "checked", look)
    with pytest.raises(UserError, match="seen"):
        run.app(arguments)
    return came[0]


def test_the_command_line_is_the_fields_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch) == Options()
    given = ["--set", "lora.r=8", "--set", "seed=1", "--output-dir", "x", "--resume"]
    given += ["--gpus-per-trial", "0.5", "--objective", "val_accuracy", "--keep-checkpoints", "all"]
    assert typed(monkeypatch, *given) == Options(
        set_=["lora.r=8", "seed=1"],
        output_dir=Path("x"),
        resume=True,
        gpus_per_trial=0.5,
        objective=["val_accuracy"],
        keep_checkpoints="all",
    )


@pytest.mark.parametrize(
    "wrong",
    [["--max-hours", "-1"], ["--cpus-per-trial", "1025"], ["--no-resume"], ["--num-samples"]],
)
def test_what_no_option_takes_is_refused(wrong: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "checked", lambda given: pytest.fail(f"it was taken: {given}"))
    with pytest.raises(SystemExit) as exit_:
        run.app(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_help_fits_a_screen_and_is_grouped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tune_study.run", "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 58
    assert max(map(len, lines)) <= 100
    shown = [line.split()[1] for line in lines if line.startswith("│ --")]
    names = [field.name.strip("_").replace("_", "-") for field in fields(Options)]
    assert sorted(shown) == sorted([*(f"--{name}" for name in names), "--help"])
    titles = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert titles == [
        "Options",
        "The study's folder",
        "The machine",
        "Without training",
        "A search instead of a grid",
    ]
    assert "…" not in done.stdout


def test_exit_codes_are_the_documented_ones() -> None:
    assert (options.EXIT_FAILED, options.EXIT_USER) == (1, 2)
    assert options.EXIT_STOPPED == {
        "storage": 1,
        "lease": 1,
        "disk": 1,
        "time": 124,
        "interrupt": 130,
        "terminate": 143,
    }


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "x" * 201, "é" * 101])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        options.safe_name(name)


def test_a_name_may_have_200_bytes() -> None:
    for name in ("x" * 200, "é" * 100, ".hidden", "a b"):
        assert options.safe_name(name) == name


def test_sizes_come_after_what_set_names_and_only_where_given() -> None:
    given = Options(set_=["seed=3", "data.val_size=7"], test_size=9, train_size=5)
    assert given.assignments == [
        ("seed", 3),
        ("data.val_size", 7),
        ("data.train_size", 5),
        ("data.test_size", 9),
    ]
    assert Options().assignments == []


def test_a_study_works_unless_it_is_only_looked_at() -> None:
    assert Options().works
    assert Options(simulate=True).works
    assert not Options(dry_run=True).works
    assert not Options(validate_only=True).works


@pytest.mark.parametrize(
    "field", ["gpus_per_trial", "max_hours", "seed_sd", "epoch_s"], ids=lambda field: field
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_must_be_finite(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} .*finite"):
        options.checked(replace(Options(simulate=True), **{field: value}))
    options.checked(replace(Options(simulate=True), **{field: 0.5}))


@pytest.mark.parametrize(
    ("text", "share"), [("0.5", 0.5), ("2", 2.0), ("0", 0.0), ("auto", "auto")]
)
def test_a_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch, text: str, share: Any) -> None:
    assert typed(monkeypatch, "--gpus-per-trial", text).gpus_per_trial == share


@pytest.mark.parametrize("text", ["half", "-0.5", "Auto", ""])
def test_what_is_no_share_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(UserError, match=f"--gpus-per-trial {text}: write a share"):
        run.app(["--gpus-per-trial", text])


@pytest.mark.parametrize(("text", "trials"), [("1", 1), ("1024", 1024), ("auto", "auto")])
def test_trials_at_a_time(monkeypatch: pytest.MonkeyPatch, text: str, trials: Any) -> None:
    assert typed(monkeypatch, "--max-concurrent", text).max_concurrent == trials


@pytest.mark.parametrize("text", ["0", "1025", "-1", "2.0", "Auto", "", "²", "9" * 5000])
def test_what_is_no_number_of_trials_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--max-concurrent {text}: write how many trials"):
        run.app(["--max-concurrent", text])


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"simulate": True}, "--simulate trains nothing"),
        ({"search": "optuna"}, "--search does not know its trials"),
        ({"batch": "auto"}, "--batch wants a GPU to itself"),
        ({"address": "auto"}, "--address runs trials elsewhere, and all that fit"),
        ({"gpus_per_trial": 0.5}, "--gpus-per-trial counts"),
        ({"gpus_per_trial": "auto"}, "--gpus-per-trial counts"),
    ],
    ids=str,
)
def test_trials_are_counted_where_they_are_known_and_share_a_gpu_here(
    other: dict[str, Any], why: str
) -> None:
    given = Options(max_concurrent="auto")
    assert options.checked(given) == given
    with pytest.raises(UserError, match=f"--max-concurrent auto: {why}.*or name a number"):
        options.checked(replace(given, **other))
    options.checked(replace(given, max_concurrent=2, **other))


@pytest.mark.parametrize(
    "other", [{"simulate": True}, {"search": "optuna"}, {"batch": "auto"}], ids=str
)
def test_a_share_is_found_for_trials_that_are_known(other: dict[str, Any]) -> None:
    given = Options(gpus_per_trial="auto")
    assert options.checked(given) == given
    (option,) = other
    with pytest.raises(UserError, match=f"--gpus-per-trial auto: --{option} .*name a share"):
        options.checked(replace(given, **other))


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").touch()
    (tmp_path / "d").mkdir()
    found = options.checked(Options(data_dir=Path("d"), weights=Path("w")))
    assert (found.data_dir, found.weights) == (tmp_path / "d", tmp_path / "w")
    assert options.checked(Options()) == Options()


@pytest.mark.parametrize(
    ("address", "host"),
    [("ray://head:10001", "head"), ("ray://head", "head"), ("ray://", "HOST")],
)
def test_a_client_address_is_answered_with_the_job_to_submit(address: str, host: str) -> None:
    words = ["--grid", "demo", "--address", address, "--name", "x", f"--address={address}"]
    with pytest.raises(UserError) as refused:
        options.refuse_client(address, words)
    assert str(refused.value).endswith(
        f"ray job submit --address http://{host}:8265 --working-dir . -- "
        "python -m tune_study.run --address auto --grid demo --name x"
    )
    options.refuse_client("head:10001", words)


def test_the_home_is_meant_where_the_shell_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "g.py").write_text("def g():\n    return {}\n")
    assert resolved("--output-dir", Path("~/r")) == tmp_path.resolve() / "r"
    assert resolved("--data-dir", Path("~"), "folder") == tmp_path.resolve()
    assert function_of("--grid", "~/g.py:g", grids)[1]() == {}
    with pytest.raises(UserError, match="--output-dir ~nobody-here/r: it is no usable path"):
        resolved("--output-dir", Path("~nobody-here/r"))


def test_a_path_that_is_no_text_is_refused(tmp_path):
    odd = Path(os.fsdecode(b"\xff"))
    with pytest.raises(UserError, match=r"it is no usable path \(its name is not UTF-8\)"):
        resolved("--output-dir", odd)
