"""``--max-concurrent auto``: planted GPUs, memory, use and cores; real steps on the CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.machine.gpus import Card, Need
from tune_study.machine.nvml import NoReading
from tune_study.machine.process import Died
from tune_study.study import sharing
from tune_study.study.options import Options
from tune_study.study.sharing import Look
from tune_study.trial import train
from tune_study.trial.context import RunContext

GB = 10**9


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``gpu.choose()`` -> (trials on a GPU, what was said); its fields are what is planted."""
    found = SimpleNamespace(
        looks=0, count=1, free=[80 * GB], cores=32, step=3 * GB, images=0, card="L4",
        look=Look(busy=0.2, step_s=0.062, process_bytes=GB),
    )  # fmt: skip
    where = RunContext(study_dir=tmp_path, device="cuda", num_threads=2)
    trial = SimpleNamespace(trial_id="deit-1", model="deit")

    def look(asked, context):
        assert (asked, context) == (trial, where)
        found.looks += 1
        return found.look

    def need(planned, device, process_bytes):
        assert (planned, device.type, process_bytes) == ("planned", "cuda", 0)
        return Need(found.step, found.images)

    monkeypatch.setattr(sharing, "_look_in_a_process", look)
    monkeypatch.setattr(sharing, "need_of", need)
    monkeypatch.setattr(sharing, "largest_of", lambda planned, device: trial)
    monkeypatch.setattr(sharing.gpus, "smallest", lambda device: Card(found.card, 80 * GB))
    monkeypatch.setattr(sharing.gpus, "count", lambda: found.count)
    monkeypatch.setattr(sharing, "cores", lambda: found.cores)
    monkeypatch.setattr(sharing, "free_bytes", lambda device: found.free[device.index])

    def choose():
        said = []
        return sharing.choose("planned", where, said.append), said

    found.choose, found.file = choose, tmp_path / "sharing.json"
    return found


@pytest.mark.parametrize(
    ("planted", "count"),
    [
        ({}, 5),  # its time
        ({"look": Look(0.34, 0.1, GB)}, 2),
        ({"look": Look(0.51, 0.1, GB)}, 1),
        ({"look": Look(1.0, 0.1, GB)}, 1),
        ({"look": Look(0.0, 0.1, GB)}, 8),  # never more
        ({"free": [12 * GB]}, 3),  # its memory
        ({"free": [12 * GB - 1]}, 2),
        ({"free": [12 * GB], "look": Look(0.2, 0.1, 3 * GB)}, 2),
        ({"free": [12 * GB], "images": 2 * GB}, 2),
        ({"free": [12 * GB], "images": 4 * GB}, 3),  # so many images stay in their file
        ({"free": [GB]}, 1),
        ({"cores": 9}, 4),
        ({"cores": 1}, 1),
        ({"cores": 16, "count": 4, "free": [80 * GB] * 4}, 2),  # each GPU's part of the cores
        ({"count": 2, "free": [80 * GB, 8 * GB]}, 2),  # the one with the least memory
    ],
)
def test_memory_time_and_cores_say_how_many_share_a_gpu(gpu, planted, count):
    vars(gpu).update(planted)
    assert gpu.choose()[0] == count


def test_the_choice_is_told_and_stays_with_the_study(gpu):
    count, said = gpu.choose()
    assert said == [
        "--max-concurrent auto: watching the GPU while deit-1 takes steps",
        "--max-concurrent auto: 5 at a time on L4: 20 fit its memory (4.0 GB each, of 80.0 free), "
        "5 its time (one keeps it busy for 20 %, with 62 ms a step), 16 the cores; never more than "
        "8",
    ]
    choice = json.loads(gpu.file.read_text())
    assert choice.pop("time")
    assert choice == {
        "trials_on_device": 5,
        "limits": {"memory": 20, "busy": 5, "cores": 16, "most": 8},
        "trial_id": "deit-1",
        "busy": 0.2,
        "step_s": 0.062,
        "process_bytes": GB,
        "predicted_bytes": 3 * GB,
        "free_bytes": 80 * GB,
        "machine": {
            "gpu": "L4",
            "memory_bytes": 80 * GB,
            "gpus": 1,
            "cores": 32,
            "cores_of_a_trial": 2,
        },
    }
    gpu.look, gpu.free = Look(0.5, 0.1, GB), [5 * GB]  # something else runs there by now
    again = "--max-concurrent auto: 5 at a time on L4, as this study began (sharing.json)"
    assert gpu.choose() == (5, [again])
    gpu.step -= 1
    assert gpu.choose() == (count, [again])
    assert gpu.looks == 1


@pytest.mark.parametrize(
    "other", [{"card": "A10"}, {"cores": 31}, {"count": 2}, {"step": 3 * GB + 1}, {"images": 1}]
)
def test_another_machine_or_a_larger_plan_is_measured_again(gpu, other):
    gpu.free *= 2
    gpu.choose()
    vars(gpu).update(other, look=Look(0.34, 0.1, GB))
    assert gpu.choose()[0] == 2
    assert gpu.looks == 2


@pytest.mark.parametrize("field", ["trials_on_device", "predicted_bytes", "machine"])
@pytest.mark.parametrize("value", [None, 0, 9, True, "5"])
def test_a_choice_that_cannot_be_is_none(gpu, field, value):
    gpu.choose()
    choice = json.loads(gpu.file.read_text())
    write_json(gpu.file, {**choice, field: value})
    assert gpu.choose()[0] == 5
    assert gpu.looks == 2
    write_json(gpu.file, [choice])
    gpu.choose()
    assert gpu.looks == 3


def test_a_model_whose_memory_is_not_known_has_a_gpu_to_itself(gpu):
    gpu.step = None
    count, said = gpu.choose()
    assert (count, gpu.looks, gpu.file.exists()) == (1, 0, False)
    assert said == [
        "--max-concurrent auto: one trial at a time on a GPU, because the memory of deit cannot be "
        "predicted"
    ]


@pytest.mark.parametrize(("device", "at_a_time"), [("cuda", "auto"), ("cpu", 1), ("mps", 1)])
def test_only_on_cuda_trials_share_a_device(monkeypatch, device, at_a_time):
    monkeypatch.setattr(sharing, "choose_device", lambda name: device)
    said = []
    given = sharing.on_cuda_alone(Options(max_concurrent="auto"), said.append)
    assert given == Options(max_concurrent=at_a_time)
    told = (
        f"--max-concurrent auto: one trial at a time, because {device} is no GPU of CUDA's to share"
    )
    assert said == ([] if device == "cuda" else [told])


@pytest.fixture
def where(monkeypatch, tmp_path):
    """A GPU that is a CPU: 100 bytes were free, and then 60, of which torch's allocator has 30."""
    monkeypatch.setattr(sharing, "free_bytes", lambda device: 60)
    monkeypatch.setattr(sharing.torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(sharing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(sharing, "WATCHED_S", 0.0)
    return RunContext(study_dir=tmp_path, num_threads=1)


@pytest.mark.parametrize("noise", [False, True])
def test_a_trial_takes_real_steps_while_the_gpu_is_watched(tiny, monkeypatch, where, noise):
    readings = iter([0.9, 0.7, 0.25])  # whether it can be read; after the warm-up
    monkeypatch.setattr(sharing.nvml, "busy_share", lambda device: lambda: next(readings))
    monkeypatch.setattr(sharing, "EVERY_S", 1e9)
    steps = []
    taken = train.train_step

    def step(training, images, labels):
        steps.append(len(images))
        return taken(training, images, labels)

    monkeypatch.setattr(train, "train_step", step)
    trial = tiny("nf4", training={"gradient_noise_scale": noise})
    found = sharing.look_or_why_not(trial, where, 100)
    assert isinstance(found, Look)
    assert (found.busy, found.process_bytes) == (0.7, 100 - 60 - 30)
    assert found.step_s > 0
    assert steps == [20] * 10  # five epochs of two: five to warm up, five watched
    readings = iter([0.9, 0.7])
    assert sharing.look_or_why_not(trial, where, 80).process_bytes == 0  # another one ended


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "out of memory: CUDA out of memory"),
        (UserError("no such weights"), "no such weights"),
        (NoReading("NVML: Not Supported"), "NVML: Not Supported"),
    ],
    ids=str,
)
def test_what_cannot_be_watched_says_why(tiny, monkeypatch, where, error, why):
    def fails(*given, **options):
        raise error

    monkeypatch.setattr(sharing.nvml, "busy_share", lambda device: lambda: 0.5)
    monkeypatch.setattr(sharing, "build_model", fails)
    assert sharing.look_or_why_not(tiny("none"), where, 0) == why
    monkeypatch.setattr(sharing, "build_model", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no reason
        sharing.look_or_why_not(tiny("none"), where, 0)


def test_the_steps_are_taken_in_a_process_of_their_own(tiny, monkeypatch, where):
    asked = []

    def in_process(function, *given):
        asked.append((function, *given))
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    trial = tiny("none")
    look = Look(0.5, 1.0, 2)
    answers = [look, "NVML: Not Supported", Died("its process ended with exit code -9")]
    monkeypatch.setattr(sharing, "in_process", in_process)
    assert sharing._look_in_a_process(trial, where) == look
    assert asked == [(sharing.look_or_why_not, trial, where, 60)]
    for why in ("NVML: Not Supported", "its process ended with exit code -9"):
        with pytest.raises(
            UserError, match=rf"no step of {trial.trial_id} could be watched \({why}\); name a num"
        ):
            sharing._look_in_a_process(trial, where)


def test_the_use_is_read_at_intervals_and_the_device_is_waited_for(monkeypatch):
    """Steps of a second; looks every two and at the end, which comes after seven seconds."""
    clock = iter(range(100))
    monkeypatch.setattr(sharing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sharing, "EVERY_S", 2)
    waited, reads = [], []

    class Loss:
        def __float__(self):
            waited.append(len(reads))
            return 0.0

    losses = iter([Loss() for _ in range(9)])
    assert sharing._take(losses, 7, lambda: reads.append(1)) == (7, 8)
    assert (len(reads), waited) == (4, [4])  # at 2, 4, 6 and 7
    clock = iter(range(100))
    losses = iter([Loss() for _ in range(9)])
    assert sharing._take(losses, 1, lambda: None)[0] == sharing.LEAST_STEPS == 5
