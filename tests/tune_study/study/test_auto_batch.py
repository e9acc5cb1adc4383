"""``--batch auto``: the fastest micro-batch that fits in every mode, chosen once, and no trace."""

import json
from types import SimpleNamespace

import pytest
import torch

from search_spaces.own_code import Code
from tests.tune_study import test_run
from tests.tune_study.trial.test_execution import killed, run, without_times
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.memory.predict import predict
from tune_study.study import auto_batch, manifest, preflight, schedule
from tune_study.trial import train
from tune_study.trial.context import RunContext
from tune_study.trial.micro_batch import note_out_of_memory, within_memory

command = test_run.command
SPEEDS = {1: 3.0, 2: 9.0, 3: 8.0, 6: 20.0}


@pytest.fixture
def planted(monkeypatch):
    """Steps are taken, and their speeds are ``SPEEDS``."""
    measured = auto_batch._images_per_s

    def speed(training):
        assert measured(training) > 0
        return SPEEDS[training.config.training.per_device_train_batch_size]

    monkeypatch.setattr(auto_batch, "_images_per_s", speed)


def six(tiny, mode, micro=6, **fields):
    """A trial that steps on 6 images."""
    training = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 6 // micro}
    data = {"train_size": 18, "val_size": 10, "test_size": 10}
    return tiny(mode, training=training, data=data, **fields)


def taken(trial, folder):
    settings = within_memory(trial, folder / trial.trial_id).training
    return settings.per_device_train_batch_size, settings.gradient_accumulation_steps


@pytest.mark.slow
@pytest.mark.ci
def test_the_fastest_that_fits_in_every_mode_then_training_as_if_it_had_been_given(
    tiny, tmp_path, monkeypatch, planted
):
    trials = [six(tiny, "none"), six(tiny, "nf4")]
    forward = train._forward

    def refuse(training, images, labels):
        if training.config.quantization.mode == "nf4" and len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(training, images, labels)

    monkeypatch.setattr(train, "_forward", refuse)
    where, said = RunContext(study_dir=tmp_path), []
    auto_batch.choose(trials, where, {}, said.append, auto=True)
    monkeypatch.setattr(train, "_forward", forward)
    choice = json.loads((tmp_path / trials[0].trial_id / "batch.json").read_text())
    assert (choice["micro_batch"], choice["gradient_accumulation_steps"]) == (2, 3)
    assert choice["largest_micro_batch"] == 3
    assert choice["images_per_s"] == {"3": 8.0, "2": 9.0, "1": 3.0}
    attempts = [
        (a["trial_id"] == trials[1].trial_id, a["micro_batch"], a["images_per_s"])
        for a in choice["attempts"]
    ]
    assert attempts == [
        (False, 6, 20.0),
        (False, 3, 8.0),
        (False, 2, 9.0),
        (False, 1, 3.0),
        (True, 6, None),
        (True, 3, 8.0),
        (True, 2, 9.0),
        (True, 1, 3.0),
    ]
    assert "2 images, 3 times a step: the fastest, 9.0 images/s" in said[1]
    assert "3 are the most that fit (8.0 images/s)" in said[1]

    killed(trials[1], tmp_path, 1)
    monkeypatch.setattr(auto_batch, "measure", None)  # it is not measured again
    again = auto_batch.known(trials, tmp_path, auto=True)
    auto_batch.choose(trials, where, again, said.append, auto=True)
    results, _ = run(trials[1], tmp_path)
    given, _ = run(six(tiny, "nf4", micro=2), tmp_path / "given")
    assert results["train"]["resource_metrics"]["batch_size"] == 2
    assert without_times(results) == without_times(given)


def test_out_of_memory_later_goes_on_from_the_choice(tiny, tmp_path):
    trial = six(tiny, "none")
    (tmp_path / trial.trial_id).mkdir()
    write_json(tmp_path / trial.trial_id / "batch.json", {"micro_batch": 2})
    assert taken(trial, tmp_path) == (2, 3)
    note_out_of_memory(tmp_path / trial.trial_id, 2, "planted")
    assert taken(trial, tmp_path) == (1, 6)


@pytest.mark.parametrize("choice", [{"micro_batch": 4}, {"micro_batch": True}, {}, [2]])
def test_a_choice_that_cannot_be_is_none(tiny, tmp_path, choice):
    trial = six(tiny, "none")
    (tmp_path / trial.trial_id).mkdir()
    write_json(tmp_path / trial.trial_id / "batch.json", choice)
    assert taken(trial, tmp_path) == (6, 1)


def test_trials_with_a_transform_of_the_users_file_are_timed(tiny, tmp_path, planted):
    trial = six(tiny, "none")
    data = trial.data.model_copy(update={"augment": "code:mine"})
    text = "def mine(images, generator):\n    return images\n"
    where = RunContext(study_dir=tmp_path, code=Code("/me/mine.py", "grid", text, "0"))
    trial = trial.model_copy(update={"data": data})
    assert auto_batch.measure([trial], where, lambda line: None)["micro_batch"] == 6


def test_what_is_predicted_not_to_fit_the_host_is_not_tried(tiny, tmp_path, monkeypatch, planted):
    trial = six(tiny, "none")
    peak = predict(six(tiny, "none", micro=3), 10, torch.device("cpu")).peak_train_bytes
    monkeypatch.setattr(auto_batch, "free_bytes", lambda device: peak / auto_batch.CPU_SHARE)
    sizes = []
    step = train.train_step

    def seen(training, *arguments):
        sizes.append(training.config.training.per_device_train_batch_size)
        return step(training, *arguments)

    monkeypatch.setattr(train, "train_step", seen)
    choice = auto_batch.measure([trial], RunContext(study_dir=tmp_path), lambda line: None)
    assert choice["largest_micro_batch"] == 3
    assert set(sizes) == {3, 2, 1}
    monkeypatch.setattr(auto_batch, "free_bytes", lambda device: 1)
    with pytest.raises(UserError, match="not even micro-batches of one image fit"):
        auto_batch.measure([trial], RunContext(study_dir=tmp_path), lambda line: None)


def test_one_image_is_enough_before_the_choice_and_afterwards_the_choice(
    tiny, tmp_path, monkeypatch
):
    trial, where = six(tiny, "none"), RunContext(study_dir=tmp_path)
    peak = predict(six(tiny, "none", micro=3), 10, torch.device("cpu")).peak_train_bytes
    monkeypatch.setattr("tune_study.memory.estimate.free_bytes", lambda device: peak)
    with pytest.raises(UserError, match="a training step needs"):
        preflight.check([trial], where)
    preflight.check([trial], where, auto_batch=True)
    (tmp_path / trial.trial_id).mkdir()
    write_json(tmp_path / trial.trial_id / "batch.json", {"micro_batch": 3})
    preflight.check([trial], where)


def test_one_micro_batch_for_what_is_compared(tiny):
    first = six(tiny, "none")
    for same in (
        six(tiny, "int8"),
        six(tiny, "none", seed=7),
        six(tiny, "nf4", micro=2),
        six(tiny, "none", lora={"r": 16}),
    ):
        assert auto_batch.comparable(same) == auto_batch.comparable(first)
    other = tiny("none", training={"gradient_checkpointing": True})
    assert auto_batch.comparable(other) != auto_batch.comparable(tiny("none"))


def test_a_study_keeps_to_what_it_began_with(tiny, tmp_path):
    old, new = six(tiny, "none"), six(tiny, "nf4")
    where = RunContext(study_dir=tmp_path / "study")
    inputs = {"data": {}, "weights": {}}
    manifest.open_study([old], where, inputs, grid="g", command="c")
    folder = where.study_dir
    assert auto_batch.known([old, new], folder, auto=True) == {}
    (folder / old.trial_id).mkdir()
    write_json(folder / old.trial_id / "results.json", {})
    with pytest.raises(UserError, match="begun with micro-batches as planned"):
        auto_batch.known([new], folder, auto=True)
    assert auto_batch.known([new], folder, auto=False) == {}
    write_json(folder / old.trial_id / "batch.json", {"micro_batch": 2})
    assert auto_batch.known([old, new], folder, auto=True)[new.trial_id] == {"micro_batch": 2}
    assert list(auto_batch.known([old], folder, auto=False)) == [old.trial_id]
    with pytest.raises(UserError, match="add --batch auto"):
        auto_batch.known([old, new], folder, auto=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "16"], ["--batch 16", "per_device_train_batch_size=N"]),
        (["--batch", "auto", "--simulate"], ["--batch auto", "simulated"]),
        (["--batch", "auto", "--search", "optuna"], ["--batch auto", "--search optuna"]),
        (["--batch", "auto", "--max-concurrent", 2], ["--max-concurrent 2", "--batch auto"]),
        (
            ["--batch", "auto", "--address", "auto", "--storage", "file:///tmp/none"],
            ["--batch auto", "--address"],
        ),
    ],
)
def test_what_it_does_not_go_with_is_one_sentence(command, tmp_path, arguments, words):
    test_run.refused(command, tmp_path, [*arguments, "--device", "cpu"], words)


def test_the_command_chooses_once_and_a_failed_trial_keeps_the_choice(
    command,
    tmp_path,
    monkeypatch,
):
    grid, measured, micro = test_run.grid_file(tmp_path), [], []

    def measure(trials, context, say):
        measured.append(len(trials))
        return {"micro_batch": 8}

    def fail(waiting, context, progress, **options):
        for trial in waiting:
            micro.append(taken(trial, context.study_dir))
            values = {"trial_id": trial.trial_id, "status": "error", "simulated": False}
            write_json(context.study_dir / trial.trial_id / "results.json", values)

    monkeypatch.setattr(auto_batch, "measure", measure)
    monkeypatch.setattr(schedule, "run", fail)
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")
    _, output, _ = command("--grid", grid, "--batch", "auto", "--dry-run")
    assert "note: --batch auto chooses the micro-batch when the study begins" in output
    assert measured == []
    command("--grid", grid, "--batch", "auto")
    command("--grid", grid, "--batch", "auto", "--retry-failed")
    assert (measured, micro) == ([1], [(8, 4), (8, 4)])
    output = command("--grid", grid, "--dry-run", "--batch", "auto")[1]
    assert "when the study begins" not in output


@pytest.mark.parametrize(("steady", "chosen"), [(2.5, 2), (3.5, 1)])
def test_speeds_of_modes_are_averaged_as_times_are(tiny, tmp_path, monkeypatch, steady, chosen):
    """Two images: 2 and 6 images/s, of which a study that trains both makes 3, not 4."""
    trials = [two(tiny, "none"), two(tiny, "nf4")]

    def speed(training):
        settings = training.config
        if settings.training.per_device_train_batch_size == 1:
            return steady
        return 2.0 if settings.quantization.mode == "none" else 6.0

    monkeypatch.setattr(auto_batch, "_images_per_s", speed)
    auto_batch.choose(trials, RunContext(study_dir=tmp_path), {}, lambda line: None, auto=True)
    choice = json.loads((tmp_path / trials[0].trial_id / "batch.json").read_text())
    assert choice["images_per_s"] == {"2": 3.0, "1": steady}
    assert choice["micro_batch"] == chosen


def two(tiny, mode):
    """A trial that steps on 2 images."""
    data = {"train_size": 12, "val_size": 10, "test_size": 10}
    return tiny(mode, training={"per_device_train_batch_size": 2}, data=data)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "deit_tiny_patch16_224"},
        {"data": {"image_size": 64}},
        {"training": {"per_device_train_batch_size": 12}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"training": {"compute_dtype": "bf16"}},
        {"training": {"gradient_checkpointing": True}},
    ],
)
def test_what_decides_the_speed_of_a_step_is_not_compared(tiny, fields):
    first = tiny("none", training={"compute_dtype": "fp32"})
    training = {"compute_dtype": "fp32", **fields.get("training", {})}
    other = tiny("none", **{**fields, "training": training})
    assert auto_batch.comparable(other) != auto_batch.comparable(first)


@pytest.mark.parametrize(
    ("device", "at_a_time", "gpus", "goes"),
    [
        ("cpu", None, None, True),
        ("cpu", 1, None, True),
        ("cpu", 2, None, False),
        ("cuda", 2, None, True),
        ("cuda", 2, 1.0, True),
        ("cuda", 2, 0.5, False),
        ("cuda", 1, 0.5, True),
        ("mps", 2, None, False),
    ],
)
def test_trials_at_a_time_need_a_gpu_each(tmp_path, device, at_a_time, gpus, goes):
    where = RunContext(study_dir=tmp_path, device=device)
    others = {"search": None, "max_concurrent": at_a_time, "gpus_per_trial": gpus}
    assert auto_batch.wanted(None, where, **others) is False
    if goes:
        assert auto_batch.wanted("auto", where, **others) is True
    else:
        with pytest.raises(UserError, match="--max-concurrent 2: --batch auto times a trial"):
            auto_batch.wanted("auto", where, **others)


def test_speed_is_of_the_fastest_of_two_steps_after_one_that_warms_up(monkeypatch):
    """Steps of 9, 4 and 2 s on six images, of which the data set has four."""
    clock = iter([0.0, 9.0, 10.0, 14.0, 20.0, 22.0])
    seen = []

    def step(training, images, labels):
        seen.append((images.tolist(), labels.tolist()))
        return (torch.tensor(1.0),)

    monkeypatch.setattr(auto_batch.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train, "train_step", step)
    training = SimpleNamespace(
        model=torch.nn.Linear(1, 1).eval(),
        config=SimpleNamespace(images_per_step=6),
        data=SimpleNamespace(train=(torch.arange(4) * 10, torch.arange(4))),
        device=torch.device("cpu"),
    )
    assert auto_batch._images_per_s(training) == 3.0
    assert seen == [([0, 10, 20, 30, 0, 10], [0, 1, 2, 3, 0, 1])] * 3
    assert training.model.training


def test_adapters_that_make_other_steps_are_timed_beside_the_plain_ones(
    tiny, tmp_path, monkeypatch
):
    timed = []
    monkeypatch.setattr(
        auto_batch, "_timed", lambda trials, *_: (timed.extend(trials), ({2: [2.0]}, []))[1]
    )
    specs = [{"use_dora": True}, {"init_lora_weights": "pissa", "use_rslora": True}, {}]
    trials = [six(tiny, "none", lora={"r": 4, **spec}) for spec in specs]
    auto_batch.measure(trials, RunContext(study_dir=tmp_path), lambda line: None)
    assert sorted(trial.lora.use_dora for trial in timed) == [False, True]


def test_every_mode_is_timed_once_at_its_largest_rank(tiny, tmp_path, monkeypatch):
    timed, settled = [], []

    def measured(trials, context, candidates):
        assert settled == [(torch.device("cpu"), False)]  # before the first step
        timed.extend((t.quantization.mode, t.lora.r) for t in trials)
        assert candidates == [1, 2, 3, 6]
        return {2: [2.0, 6.0, 6.0], 3: [2.5] * 3}, []

    monkeypatch.setattr(auto_batch, "_timed", measured)
    monkeypatch.setattr(
        auto_batch, "settle", lambda device, *, strict: settled.append((device, strict))
    )
    trials = [six(tiny, m, lora={"r": r}) for m in ("none", "nf4") for r in (16, 4)]
    where = RunContext(study_dir=tmp_path, num_threads=1)
    choice = auto_batch.measure(trials, where, lambda line: None)
    assert sorted(timed) == [("nf4", 16), ("none", 16)]
    assert choice["images_per_s"] == {2: pytest.approx(3.6), 3: 2.5}  # the median would be 6
    assert (choice["micro_batch"], choice["largest_micro_batch"]) == (2, 3)
    assert choice["gradient_accumulation_steps"] == 3
    assert (choice["device"], choice["num_threads"]) == ("cpu", 1)
    assert auto_batch.CPU_SHARE == 0.8


def test_eager_steps_are_not_timed_for_trials_that_take_a_graph(tiny, tmp_path):
    trials = [tiny("nf4"), tiny("none", training={"step": "graph"})]
    with pytest.raises(UserError, match=r"--batch auto: .*training\.step=graph"):
        auto_batch.measure(trials, RunContext(study_dir=tmp_path), lambda line: None)
