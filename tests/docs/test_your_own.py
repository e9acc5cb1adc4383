"""The commands of docs/your-own.md, as they stand there, run in a folder with two class folders."""

import hashlib
import itertools
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer.main
from PIL import Image

from tune_study import merge, run
from tune_study.study import schedule
from tune_study.trial import execution, simulate

PAGE = (Path(__file__).parents[2] / "docs" / "your-own.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
OWN_MODEL = [command for command in COMMANDS if "my_model.py:mirrors" in command]
OWN_IMAGES = [c for c in COMMANDS if {"my_images.py:drawn", "my_noise.py:noisy"} & {*c}]
COMMANDS = [command for command in COMMANDS if command not in OWN_MODEL + OWN_IMAGES]


def test_every_option_on_the_page_exists():
    known = {name for p in typer.main.get_command(run.app).params for name in p.opts}
    assert (len(COMMANDS), len(OWN_MODEL), len(OWN_IMAGES)) == (13, 2, 2)
    assert {command[2] for command in COMMANDS} == {"tune_study.run", "tune_study.merge"}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE):
        assert option in known | {"--output"}, option


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the page: ``leaves`` of two classes that overlap, and the page's files."""
    generator = np.random.default_rng(0)
    stripes = np.tile(np.repeat([0, 160], 4), 4)[:, None]
    for part, name, number in itertools.product(("train", "test"), ("oak", "ash"), range(18)):
        folder = tmp_path / "leaves" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        upright = (name == "oak") == (number < 15)  # three of 18 look like the other class
        pixels = (stripes.T if upright else stripes)[..., None] + generator.integers(
            96, size=(32, 32, 3)
        )
        # Of 256 px, so that a trial and the page's program shrink them by the same amount.
        Image.fromarray(pixels.astype(np.uint8).repeat(8, 0).repeat(8, 1)).save(
            folder / f"{number}.png"
        )
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = ("my_grid.py", "my_model.py", "my_images.py", "my_noise.py", "use_adapter.py")
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def without_ray(waiting, context, progress, **options):
    """The trials one by one in this process, in place of ``schedule.run``."""
    for trial in waiting:
        if context.simulation:
            simulate.execute(trial, context.simulation, context.study_dir, lambda row: None)
        else:
            execution.execute(trial, context, lambda row: None)


def outputs(commands, monkeypatch, capsys):
    """What each command printed; all must end well."""
    found = []
    for command in commands:
        monkeypatch.setattr("sys.argv", ["command", *command[3:]])
        main = {"tune_study.run": run.main, "tune_study.merge": merge.main}[command[2]]
        code = None
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        said = capsys.readouterr()
        assert not code, said.err
        found.append(said.out)
    return found


@pytest.mark.slow
@pytest.mark.ci
def test_the_commands_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "run", without_ray)
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")
    found = outputs(COMMANDS, monkeypatch, capsys)
    assert "2 planned trials" in found[0]
    assert "2/2 valid" in found[1]
    assert "all 2 trials ended well" in found[2]
    assert "RANDOM" in found[3]
    assert "eva02_tiny_patch14_224-folder_folder_leaves" in found[4]
    assert "36 planned trials" in found[5]
    assert "12 to run: 12 new; 12 finished stay as they are" in found[7]
    assert "all 24 trials ended well" in found[8]
    assert "24 that this command does not name stay as they are" in found[9]
    assert "24 trials: 12 of one, 12 of two" in found[12]
    results = folder / "ray_results"
    for name, planned in (("leaves", 2), ("growing", 36), ("both", 24)):
        trials = pd.read_parquet(results / name / "trials.parquet")
        assert len(trials) == planned
        assert set(trials["status"]) <= {"completed", "early_stopped"}
    cells = json.loads((results / "leaves" / "study.json").read_text())["plan"]
    assert {cell["dataset"] for cell in cells} == {"folder:leaves"}
    for mode in ("none", "nf4"):
        (trial,) = (results / "leaves").glob(f"*-{mode}-s42-*")
        accuracy = client(trial, monkeypatch, capsys)
        assert accuracy["test"] == accuracy["reported"]
        assert 0.6 < accuracy["reported"] < 1
        card = (trial / "adapter" / "README.md").read_text()
        assert f"{accuracy['reported']:.4f} (seed 42)" in card
        assert f"vit_glyphs_patch4_32, {mode}, on folder:leaves" in card
        assert "my_grid.py:leaves" in card


def client(trial, monkeypatch, capsys):
    """What the page's own program prints of a trial."""
    monkeypatch.setattr("sys.argv", ["use_adapter.py", str(trial), "leaves/test"])
    runpy.run_path("use_adapter.py")
    said = capsys.readouterr().out
    return {
        word: float(value)
        for word, value in re.findall(r"(test|reported) (?:accuracy )?([\d.]+)", said)
    }


def test_a_model_of_ones_own_has_its_row_in_the_report(folder, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "run", without_ray)
    _, output = outputs(OWN_MODEL, monkeypatch, capsys)
    assert "all 2 trials ended well" in output
    its_row_is_there(folder)


def its_row_is_there(folder):
    study = folder / "ray_results" / "mirrors"
    trials = pd.read_csv(study / "trials.csv")
    assert list(trials["model"]) == ["mirror_vit"] * 2
    assert list(trials["quantized_layers"]) == [0, 8]
    assert "mirror_vit" in (study / "report" / "report.html").read_text()
    code = json.loads((study / "study.json").read_text())["provenance"]["code"]["my_model.py"]
    assert code["sha256"] == hashlib.sha256((folder / "my_model.py").read_bytes()).hexdigest()
    assert code["models"] == ["mirror_vit"]


def test_changed_code_of_a_model_is_refused(folder, monkeypatch, capsys):
    """The plan is the same. What the grid's function returns is the plan, and may grow."""
    monkeypatch.setattr(schedule, "run", without_ray)
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")
    simulated = [*OWN_MODEL[1], "--simulate"]
    outputs([simulated], monkeypatch, capsys)
    path = folder / "my_model.py"
    began = path.read_text()
    path.write_text(began.replace("x.flip(-1)", "-x"))
    monkeypatch.setattr("sys.argv", ["command", *simulated[3:]])
    with pytest.raises(SystemExit) as refused:
        run.main()
    assert refused.value.code == 2
    assert re.fullmatch(
        r"error: --name mirrors-simulated: the code of mirror_vit in my_model\.py \(sha256 "
        r"\w{12}, then \w{12}\) is not what the study began with; put it back to continue "
        r"\(study\.json has its text\), or choose another --name\n",
        capsys.readouterr().err,
    )
    path.write_text("# mine\n" + began.replace('["none", "nf4"]', '["none", "nf4", "int8"]'))
    (output,) = outputs([simulated], monkeypatch, capsys)
    assert "continuing: 2 of 3 trials have ended" in output


@pytest.mark.slow
@pytest.mark.ci
def test_images_and_transforms_of_ones_own_are_trained_on(folder, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "run", without_ray)
    (output,) = outputs(OWN_IMAGES[:1], monkeypatch, capsys)
    assert "code:specks: 60 images of 2 classes" in output
    report = (folder / "ray_results" / "drawn" / "report" / "report.md").read_text()
    assert "code:specks: 60 images of 2 classes" in report
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")
    outputs(OWN_IMAGES[1:], monkeypatch, capsys)
    they_were_trained_on(folder)
    code = provenance("noisy")["code"]["my_noise.py"]
    assert code["transforms"] == ["noise"]
    assert provenance("drawn")["code"]["my_images.py"]["transforms"] == []
    trials = pd.read_csv(folder / "ray_results" / "noisy" / "trials.csv")
    assert [text.rpartition(", ")[2] for text in trials["configuration"]] == [
        "augment crop",
        "augment code:noise",
    ]


def provenance(study):
    return json.loads(Path("ray_results", study, "study.json").read_text())["provenance"]


def they_were_trained_on(folder):
    drawn = pd.read_csv(folder / "ray_results" / "drawn" / "trials.csv")
    assert list(drawn["status"]) == ["completed"] * 2
    assert set(drawn["train_images"]) == {43}
    noisy = pd.read_csv(folder / "ray_results" / "noisy" / "trials.csv")
    assert list(noisy["status"]) == ["completed"] * 2
    epochs = pd.read_csv(folder / "ray_results" / "noisy" / "epochs.csv")
    assert epochs["train_loss"].nunique() == 4  # two trials that see other images in each epoch


def test_changed_images_and_transforms_are_refused(folder, monkeypatch, capsys):
    """Another text of the same images, or of the same transform, goes on."""
    monkeypatch.setattr(schedule, "run", without_ray)
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")
    outputs(OWN_IMAGES, monkeypatch, capsys)
    for command, file, change, words in (
        (OWN_IMAGES[0], "my_images.py", ("size=60", "size=61"), "the data of code:specks (sha256"),
        (OWN_IMAGES[1], "my_noise.py", ("20 *", "30 *"), "the code of noise in my_noise.py (sha"),
    ):
        path = folder / file
        began = path.read_text()
        path.write_text(f"# mine\n{began}")
        (output,) = outputs([command], monkeypatch, capsys)
        assert "nothing to do: all 2 trials of this command have ended" in output
        path.write_text(began.replace(*change))
        monkeypatch.setattr("sys.argv", ["command", *command[3:]])
        with pytest.raises(SystemExit) as refused:
            run.main()
        assert refused.value.code == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.ci
def test_images_and_transforms_of_ones_own_reach_rays_workers(folder, monkeypatch, capsys):
    outputs(OWN_IMAGES, monkeypatch, capsys)
    they_were_trained_on(folder)


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_of_ones_own_is_known_to_rays_workers(folder, monkeypatch, capsys):
    (output,) = outputs(OWN_MODEL[1:], monkeypatch, capsys)
    assert "all 2 trials ended well" in output
    its_row_is_there(folder)


@pytest.mark.slow
@pytest.mark.ci
def test_a_relative_folder_is_found_by_rays_workers(folder, monkeypatch, capsys):
    """Tune would change into a folder of its own before each trial."""
    (output,) = outputs(COMMANDS[2:3], monkeypatch, capsys)
    assert "all 2 trials ended well" in output
    trials = pd.read_parquet(folder / "ray_results" / "leaves" / "trials.parquet")
    assert list(trials["quantized_layers"]) == [0, 24]
