"""The command line, in this process: mistakes are one sentence, exit code 2, and no folder."""

import json
import shutil

import pytest
import torch

from tests.tune_study.data.pictures import class_folders
from tune_study import run
from tune_study.study import plan, schedule
from tune_study.study.compute_dtype import settle_compute_dtype

GRID = """
from ray import tune
def one():
    return {"model": "MODEL", "dataset": "DATASET", "quantization": "nf4"}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(*arguments)`` -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["tune-study", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run.main()
        code = exit_.value.code
        output = capsys.readouterr()
        return (0 if code is None else code), output.out, output.err

    return call


def refused(command, tmp_path, arguments, words):
    """It is one sentence with these words and exit code 2, and leaves nothing."""
    code, _, error = command(*arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def grid_file(tmp_path, model="vit_glyphs_patch4_32", dataset="digits"):
    path = tmp_path / "grid.py"
    path.write_text(GRID.replace("MODEL", model).replace("DATASET", dataset))
    return f"{path}:one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "huge"], ["--grid huge", "full"]),
        (["--grid", "demo", "--set", "quantization.mode=nf5"], ["quantization.mode", "nf4-dq"]),
        (["--grid", "demo", "--set", "lora.r=0"], ["lora.r = 0"]),
        (["--grid", "demo", "--set", "training.epochs=1"], ["training.epochs", "did you mean"]),
        (["--grid", "demo", "--set", "dataset=mnist"], ["mnist", "cifar10"]),
        (["--grid", "demo", "--set", "model=vit_none"], ["vit_none", "timm"]),
        (["--grid", "demo", "--device", "tpu"], ["--device tpu"]),
        (["--grid", "demo", "--train-size", "9999"], ["train_size", "9999"]),
        (["--grid", "demo", "--name", "../x"], ["--name ../x"]),
        (["--grid", "demo", "--resume"], ["--resume"]),
        (["--grid", "full", "--data-dir", "nowhere"], ["--data-dir", "nowhere"]),
        (["--grid", "demo", "--weights", "nowhere"], ["--weights", "nowhere"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(command, tmp_path, arguments, words):
    refused(command, tmp_path, arguments, words)


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        ([], [1]),
        (["--max-concurrent", "3"], [3]),
        (["--simulate"], [1]),
        (["--max-concurrent", "auto"], []),
        (["--gpus-per-trial", "auto"], []),
        (["--dry-run"], []),
        (["--address", "auto"], []),
    ],
    ids=str,
)
def test_ray_starts_early_where_it_is_known_how_many_trials_run(
    command, monkeypatch, arguments, slots
):
    started = []
    monkeypatch.setattr(
        run.local,
        "start_during_imports",
        lambda slots, dashboard, simulated: started.append((slots, simulated)),
    )
    monkeypatch.setattr("tune_study.study.session.execute", lambda options: 0)
    assert command("--grid", "demo", *arguments) == (0, "", "")
    assert started == [(count, "--simulate" in arguments) for count in slots]


def test_an_option_that_does_not_exist_is_exit_2(command, tmp_path):
    code, _, error = command("--gird", "full")
    assert code == 2
    assert "--gird" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_folder_and_missing_network(command, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    grid = grid_file(tmp_path, dataset="cifar10")
    code, _, error = command("--grid", grid, "--data-dir", "empty")
    assert code == 2
    assert "cifar10/train-*.parquet" in error

    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    code, _, error = command("--grid", grid, "--cache-dir", "cache")
    assert code == 2
    assert "--data-dir" in error
    code, _, error = command("--grid", grid_file(tmp_path, model="deit_tiny_patch16_224"))
    assert code == 2
    assert "pretrained=false" in error
    assert not (tmp_path / "ray_results").exists()


def test_weights_that_do_not_fit_are_refused_before_a_study_begins(command, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    code, _, error = command("--grid", "demo", "--weights", "w.safetensors")
    assert code == 2
    assert "--weights" in error
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "other.pth")
    code, _, error = command("--grid", "demo", "--weights", "other.pth")
    assert code == 2
    assert "cls_token" in error
    assert not (tmp_path / "ray_results").exists()


def test_a_full_disk_is_one_sentence_before_anything_is_written(command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    code, _, error = command("--grid", "smoke", "--simulate")
    assert code == 1
    assert error.startswith("error: the disk of")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_every_trial_and_writes_nothing(command, tmp_path):
    code, output, _ = command("--grid", "demo", "--dry-run")
    assert code == 0
    trials = settle_compute_dtype(plan.plan(plan.load_grid("demo")[1]), "cpu")[0]
    for trial in trials:
        assert trial.trial_id in output
    assert "24 distinct ids: 3 configurations, 4 treatments, 2 seeds." in output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_neither_data_nor_a_network(command, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run asks no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ["--grid", "full", "--max-experiments", "5", "--dry-run"]
    code, output, error = command(*options, "--cache-dir", "nowhere")
    assert code == 0, error
    for trial in plan.plan(plan.load_grid("full")[1])[:5]:
        assert trial.trial_id[:-9] in output  # whatever this machine computes in
    assert (
        "did not look at the images of cifar10 and cifar100; the weights of deit_tiny_patch16_224\n"
    ) in output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_images_is_told_at_the_start_and_in_study_json(command, tmp_path, monkeypatch):
    class_folders(tmp_path / "d", a=20, b=20)
    (tmp_path / "d" / "a" / "._x.png").write_text("x")
    grid = grid_file(tmp_path, dataset="folder:d")
    monkeypatch.setattr(schedule, "run", lambda *given, **more: None)
    options = ["--grid", grid, "--cache-dir", tmp_path / "cache", "--train-size", "8"]
    told = (
        "folder:d: 40 images of 2 classes; 8 to train on, 3 for validation (split off train), "
        "8 for the test (split off train); passed over: 1 hidden or of the system"
    )
    assert command(*options, "--dry-run")[1].splitlines()[0] == told
    assert not (tmp_path / "cache").exists()
    assert command(*options)[1].splitlines()[0] == told
    (manifest,) = tmp_path.glob("ray_results/*/study.json")
    kept = json.loads(manifest.read_text())["provenance"]["data"]["folder:d"]
    assert kept["images"] == told
    assert kept["left_out"] == []


def test_validate_only_builds_every_model(command, tmp_path, monkeypatch):
    code, output, _ = command("--grid", "demo", "--validate-only")
    assert code == 0
    assert "24/24 valid" in output
    monkeypatch.setattr("tune_study.model.build.quantize_model", lambda *_: [])
    code, _, error = command("--grid", "demo", "--validate-only")
    assert code == 2
    assert "quantized no layer" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ci
def test_the_full_grid_on_real_images(command, tmp_path, cifar_dir):
    options = ["--grid", "full", "--data-dir", cifar_dir, "--set", "pretrained=false"]
    code, output, _ = command(*options, "--dry-run")
    assert code == 0
    assert "144 distinct ids" in output
    assert "RANDOM" in output
    assert len({line.split()[0] for line in output.splitlines() if "deit_" in line}) >= 1


def test_a_warm_up_that_never_ends_is_said(command):
    options = ["--grid", "smoke", "--dry-run"]
    assert "warm-up" not in command(*options)[1]
    _, output, _ = command(*options, "--set", "training.warmup_steps=50")
    assert "the warm-up of 50 steps never ends in the 4 steps" in output


@pytest.mark.slow
def test_the_full_grid_is_valid(command, cifar_dir):
    options = ["--grid", "full", "--data-dir", cifar_dir, "--set", "pretrained=false"]
    code, output, _ = command(*options, "--validate-only")
    assert code == 0
    assert "144/144 valid" in output


def test_a_study_without_trials_to_run_says_so(command, tmp_path, monkeypatch, tiny):
    from tune_study.folder.files import write_json

    grid = grid_file(tmp_path)
    trials = settle_compute_dtype(plan.plan(plan.load_grid(grid)[1]), "cpu")[0]
    folder = tmp_path / "ray_results" / "one"

    def finish(waiting, context, progress, **options):
        for trial in waiting:
            (folder / trial.trial_id).mkdir(parents=True)
            write_json(folder / trial.trial_id / "config.json", trial.model_dump(mode="json"))
            write_json(
                folder / trial.trial_id / "results.json",
                {
                    "trial_id": trial.trial_id,
                    "status": status,
                    "simulated": False,
                    "error": "planted",
                    "run": {"config": trial.model_dump(mode="json"), "device": "cpu"},
                    "train": {
                        "training_results": {},
                        "test_metrics": {"test_accuracy": 0.5},
                        "model_metrics": {},
                        "resource_metrics": {},
                        "epochs": [],
                    },
                    "meta": {},
                },
            )

    monkeypatch.setattr(schedule, "run", finish)
    status = "error"
    code, output, _ = command("--grid", grid)
    assert code == 1
    assert trials[0].trial_id in output
    assert "--retry-failed" in output
    status = "completed"
    code, output, _ = command("--grid", grid, "--retry-failed")
    assert code == 0
    code, output, _ = command("--grid", grid)
    assert code == 0
    assert "nothing to do" in output
    assert "tensorboard --logdir" in output
    assert (folder / "trials.csv").is_file()
    assert (folder / "trials.parquet").is_file()
