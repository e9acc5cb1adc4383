"""The check of an accelerator: what fails is a row, and every row is in both files."""

import json
import signal
import time
from collections import namedtuple
from concurrent.futures import Future

import psutil
import pytest
from torch.autograd import DeviceType

from benchmarks import accelerator, checks, gate, processes, repeats, speed
from benchmarks.accelerator import Part
from benchmarks.processes import ROOT, Row
from tests.tune_study.pretend import pretended
from tests.tune_study.trial.recorded import Recorder
from tune_study.checks.modes import Verdict
from tune_study.model import outliers
from tune_study.trial import train

from . import planted_parts

SMALL = {"models": ["vit_glyphs_patch4_32"], "batch": 4, "device": "cpu", "large_batch": None}


def planted(name, limit_s=60.0):
    return Part(f"tests.planted_parts:{name}", limit_s)


def checked(parts, tmp_path, monkeypatch, *arguments):
    """(exit code, the JSON, the Markdown) of the command with these parts."""
    monkeypatch.setattr(accelerator, "MACHINE", planted("machine"))
    monkeypatch.setattr(accelerator, "PARTS", parts)
    code = accelerator.main(["--device", "cpu", "--output", str(tmp_path), *arguments])
    (written,) = tmp_path.glob("*.json")
    return code, json.loads(written.read_text()), written.with_suffix(".md").read_text()


def rows_of(function, settings):
    found = list(function(settings))
    return {row.name: row for row in found}, found


@pytest.fixture(scope="module")
def every_end(tmp_path_factory):
    """One run with parts that end in every way; the next one begins all the same."""
    names = ("raises", "is_killed", "overruns", "says_nothing", "sound")
    parts = {name: planted(name, 10.0 if name == "overruns" else 60.0) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        return checked(parts, tmp_path_factory.mktemp("out"), patch)


def test_a_part_that_fails_is_a_row_with_its_last_line_and_the_others_go_on(every_end):
    code, found, _ = every_end
    assert code == 1
    assert list(found["parts"]) == ["raises", "is_killed", "overruns", "says_nothing", "sound"]
    ends = {name: part["rows"][-1] for name, part in found["parts"].items()}
    assert ends["raises"]["found"] == "ended with exit code 1; last line: ValueError: planted"
    assert ends["is_killed"]["found"] == "killed by SIGKILL; last line: on the way"
    assert ends["overruns"]["found"].startswith("stopped at its limit of 10 s; last line: ")
    assert ends["says_nothing"]["found"] == "ended without a row"
    assert [ends[name]["ok"] for name in ends] == [False, False, False, False, True]
    for name in ("raises", "is_killed", "overruns"):
        assert found["parts"][name]["rows"][0]["found"] == "sound"
    assert "some words" in found["parts"]["raises"]["tail"]


def test_a_part_that_overran_leaves_no_process(every_end):
    _, found, _ = every_end
    child = int(found["parts"]["overruns"]["rows"][-1]["found"].rpartition(" ")[2])
    for _ in range(100):  # whoever adopts an orphan buries it in its own time
        if not _lives(child):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")


def _lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_both_files_hold_every_row_and_where_it_comes_from(every_end):
    _, found, text = every_end
    for part in found["parts"].values():
        for row in part["rows"]:
            assert f"| {row['name']} |" in text
            assert row["found"].replace("|", "\\|") in text
    assert "| sum | ok | 32 \\| images |" in text
    assert text.count("**WRONG**") == 4
    assert found["parts"]["sound"]["rows"][0]["figures"] == {"value": 3}
    assert found["versions"]["torch"] in text
    assert found["hardware"]["cpu"] in text
    assert found["settings"]["device"] == "cpu"
    assert "Quick" not in text


def test_a_sound_run_ends_well_and_what_is_quick_says_so(tmp_path, monkeypatch):
    parts = {"sound": planted("sound"), "raises": planted("raises")}
    chosen = ("--quick", "--parts", "sound")
    code, found, text = checked(parts, tmp_path, monkeypatch, *chosen)
    assert code == 0
    assert list(found["parts"]) == ["sound"]
    assert found["parts"]["sound"]["tail"] == ""
    assert "**Quick**: deit_tiny_patch16_224 alone, batches of 4, the grid smoke" in text
    assert [path.stem.endswith("accelerator-quick") for path in tmp_path.iterdir()] == [True, True]


def test_what_has_not_begun_when_the_time_is_over_is_red(tmp_path):
    found, kept = {"parts": {}}, []
    parts = {"overruns": planted("overruns"), "sound": planted("sound")}
    accelerator.check(parts, SMALL, 6.0, time.monotonic() + 3, found, lambda: kept.append(1))
    first, second = (found["parts"][name]["rows"] for name in ("overruns", "sound"))
    assert first[-1]["found"].startswith("stopped at its limit of 3 s")
    assert second == [Row("its process", False, "not run: time is over")._asdict()]
    assert len(kept) >= len(first) + len(second)


def test_the_limits_grow_with_the_minutes(monkeypatch):
    seen = []

    def run(function, settings, limit_s, tell):
        seen.append(limit_s)
        return processes.Outcome([], 0.0, "")

    monkeypatch.setattr(accelerator, "run", run)
    parts = {"a": Part("x:y", 60.0), "b": Part("x:y", 600.0)}
    accelerator.check(parts, {}, 12.0, time.monotonic() + 720, {"parts": {}}, lambda: None)
    assert seen[0] == 120.0
    assert 700 < seen[1] <= 720  # no more than is left


def test_the_machine_says_where_the_figures_come_from(monkeypatch):
    (row,) = checks.this_machine({"device": "cpu"})
    assert row.ok is None
    figures = row.figures
    assert figures["device"] == "cpu"
    assert {"at", "commit", "versions", "hardware", "threads"} < figures.keys()
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    (row,) = checks.this_machine({"device": "mps"})
    assert row.ok is False
    assert "this machine has none that torch can use" in row.found


def test_a_machine_that_cannot_be_told_is_red_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerator, "MACHINE", planted("raises"))
    assert accelerator.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "ValueError: planted" in said.out
    assert "Traceback" in said.err
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(["--parts", "doctor,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_the_functions_of_the_parts_exist():
    modules = {"checks": checks, "repeats": repeats, "speed": speed, "gate": gate}
    for part in (*accelerator.PARTS.values(), *accelerator.GATE.values()):
        module, _, name = part.function.partition(":")
        assert callable(getattr(modules[module.removeprefix("benchmarks.")], name))
    assert (ROOT / "benchmarks" / "accelerator.py").is_file()


def test_every_mode_is_built_with_the_bytes_that_its_shapes_tell(monkeypatch):
    rows, found = rows_of(checks.models, SMALL)
    assert [row.ok for row in found] == [True] * 6
    int8 = rows["vit_glyphs_patch4_32, int8"].figures
    assert int8["weights_bytes"] == int8["expected_weights_bytes"] < int8["weights_bytes_fp32"]
    assert int8["quantized_layers"] == 24


def test_a_model_of_other_bytes_is_red_and_so_is_a_mode_that_cannot_be_built(monkeypatch):
    true, build = checks.expected_weights_bytes, checks.build_model
    monkeypatch.setattr(checks, "expected_weights_bytes", lambda *given: true(*given) + 4)

    def fails_in_int8(config, *arguments, **options):
        if config.quantization.mode == "int8":
            raise TypeError("planted\nand more")
        return build(config, *arguments, **options)

    monkeypatch.setattr(checks, "build_model", fails_in_int8)
    rows, found = rows_of(checks.models, SMALL)
    assert [row.ok for row in found] == [False] * 6
    assert rows["vit_glyphs_patch4_32, int8"].found == "TypeError: planted"
    assert "expected" in rows["vit_glyphs_patch4_32, nf4"].found


@pytest.mark.slow
@pytest.mark.ci
def test_a_ledger_is_equal_to_the_byte_and_its_peak_near():
    _, found = rows_of(checks.ledgers, SMALL)
    assert [row.ok for row in found] == [True] * 8
    assert all("5 categories equal to the byte" in row.found for row in found[::2])
    for row in found[1::2]:
        assert abs(row.figures["relative_error"]["peak_train_bytes"]) < 0.05


def test_a_ledger_that_differs_is_red(monkeypatch):
    true = checks.predict

    def wrong(*arguments):
        found = true(*arguments)
        ledger = found.ledger._replace(adapter_bytes=found.ledger.adapter_bytes + 4)
        return found._replace(ledger=ledger, peak_train_bytes=int(found.peak_train_bytes * 1.1))

    monkeypatch.setattr(checks, "predict", wrong)
    monkeypatch.setattr(checks, "MODES", ("nf4",))
    ledger, peak = checks.ledgers(SMALL)
    assert ledger.ok is False
    measured = ledger.figures["measured"]["adapter_bytes"]
    assert ledger.found == f"adapter_bytes {measured:,}, predicted {measured + 4:,}"
    assert peak.ok is False


def test_a_peak_that_a_device_cannot_tell_is_told_with_its_reason():
    figures = {
        "measured": {"activation_bytes": 5, "peak_train_bytes": None, "peak_source": "no counter"},
        "predicted": {"activation_bytes": 5, "peak_train_bytes": 7},
    }
    row = checks._peak(Row("a", True, "", figures))
    assert (row.ok, row.found) == (None, "missing: no counter")
    figures["measured"] |= {"peak_train_bytes": 3, "peak_source": "after forward: lower bound"}
    assert checks._peak(Row("a", True, "", figures)).ok is None


@pytest.mark.slow
@pytest.mark.ci
def test_a_trial_is_the_same_twice_and_killed_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "MODES", ("nf4-dq",))
    rows, found = rows_of(repeats.repeats, {**SMALL, "folder": str(tmp_path)})
    assert [row.ok for row in found] == [True] * 3
    assert "equal to the last bit" in rows["nf4-dq: killed and continued"].found
    one, other = (next((tmp_path / "nf4-dq" / name).iterdir()) for name in ("alone", "killed"))
    count = len(dict(repeats._numbers(json.loads((one / "results.json").read_text())["train"])))
    # One number alone, and one bit of the adapter alone, are seen.
    written = (other / "results.json").read_text()
    results = json.loads(written)
    results["train"]["epochs"][1]["val_loss"] += 1e-9
    (other / "results.json").write_text(json.dumps(results))
    row = repeats.compare("planted", one, other)
    assert row.ok is False
    assert row.found.startswith("0 of ")
    assert row.found.endswith(f"1 of {count} numbers: epochs.1.val_loss")
    (other / "results.json").write_text(written)
    adapter = other / "adapter" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-4] ^= 1
    adapter.write_bytes(content)
    row = repeats.compare("planted", one, other)
    assert row.ok is False
    assert row.found.startswith("1 of ")
    assert row.found.endswith(f"0 of {count} numbers: none")


def test_a_child_that_is_not_killed_is_red(tmp_path, monkeypatch):
    config = repeats._trial("none", "cpu")
    monkeypatch.setattr(repeats, "_die", planted_parts.ends_by_itself)
    ended = Future()
    ended.set_result(repeats._killed(config, tmp_path / "killed", "cpu"))
    row = repeats._continued("a", config, tmp_path, "cpu", ended)
    assert row.found == "exit code 3 instead of the kill: it left nothing"
    ended = Future()
    ended.set_result(-signal.SIGKILL)
    row = repeats._continued("a", config, tmp_path, "cpu", ended)
    assert row.found == "it was killed before its first epoch was reported"
    assert row.ok is False


def test_the_doctors_verdicts_are_rows(monkeypatch):
    verdicts = [Verdict("a", True, "sound"), Verdict("b", False, "odd", "another device")]
    monkeypatch.setattr(checks.doctor, "examine", lambda device: iter(verdicts))
    assert list(checks.doctors(SMALL)) == [
        Row("a", True, "sound"),
        Row("b", False, "odd; remedy: another device"),
    ]


def test_the_demo_is_red_with_its_last_line_and_tells_what_it_found(tmp_path, monkeypatch):
    (tmp_path / "smoke").mkdir()
    settings = {**SMALL, "grid": "smoke", "folder": str(tmp_path)}
    # Another python stands in for the study's: it prints, and ends as it is told.
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho $*\necho error: planted\necho\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(checks.sys, "executable", str(fake))
    (row,) = checks.demo(settings)
    assert row.ok is False
    assert row.figures["exit_code"] == 1
    assert row.found.endswith("; last line: error: planted")
    fake.write_text("#!/bin/sh\n")
    (tmp_path / "smoke" / "trials.csv").write_text(
        "quantization,status,test_accuracy,train_time_s\n"
        "none,completed,0.5,1\nnone,early_stopped,0.75,1\nnone,error,,\nint8,oom,,\n"
    )
    whole, none, int8 = checks.demo(settings)
    assert whole.ok is True
    assert none.found.startswith("test accuracy 0.625 (0.500 to 0.750); ")
    assert "1 early_stopped" in none.found
    assert int8.found == "no accuracy; 1 oom"
    assert none.ok is int8.ok is None


def test_the_speed_of_a_step_is_told_with_its_spread(monkeypatch):
    monkeypatch.setattr(speed, "MODES", ("nf4",))
    (row,) = speed.speeds(SMALL)
    assert row.ok is None
    for name in ("whole_step_ms", "bare_step_ms", "evaluation_ms"):
        assert len(row.figures[name]) == speed.ROUNDS_ON_CPU
        assert min(row.figures[name]) <= row.figures["medians"][name] <= max(row.figures[name])
    work = row.figures["device_work"]
    assert work["operators_ms"] > 0
    assert work["operator_calls"] > 100
    assert row.figures["images_per_s"] == 4e3 / row.figures["medians"]["whole_step_ms"]


Seen = namedtuple("Seen", "key device_type is_user_annotation count us own_us")
Seen.self_device_time_total = property(lambda seen: seen.us)
Seen.self_cpu_time_total = property(lambda seen: seen.own_us)


def test_kernels_are_counted_once_and_copies_apart():
    rows = [
        Seen("gemm", DeviceType.CUDA, False, 3, 4000.0, 0),
        Seen("Optimizer.step#AdamW.step", DeviceType.CUDA, True, 1, 4000.0, 0),
        Seen("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA, False, 2, 500.0, 0),
        Seen("Memset (Device)", DeviceType.CUDA, False, 1, 500.0, 0),
        Seen("cudaLaunchKernel", DeviceType.CPU, False, 2, 0, 10.0),
        Seen("cuLaunchKernelEx", DeviceType.CPU, False, 1, 0, 10.0),
        Seen("aten::mm", DeviceType.CPU, False, 3, 4000.0, 30.0),
    ]
    found = speed.of_kernels(rows)
    assert (found["kernels_ms"], found["kernels"], found["launches"]) == (4.0, 3, 3)
    assert (found["copies_ms"], found["copies"]) == (1.0, 3)
    nothing = speed.of_kernels(rows[4:])
    assert "missing" in nothing["found"]
    assert nothing["kernels_ms"] != nothing["kernels_ms"]  # NaN, never 0
    assert "missing" in speed.device_work(lambda: None, "mps")["found"]


def test_the_gate_is_for_cuda_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "MACHINE", planted("machine"))
    command = ["--gate", "--device", "cpu", "--output", str(tmp_path)]
    assert accelerator.main(command) == 1
    assert "--gate: --device cpu has no CUDA graphs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def recorded(monkeypatch):
    """CUDA graphs by a recorder, on a pretended GPU."""
    monkeypatch.setattr(train, "Cuda", lambda device: Recorder(device))
    with pretended("cuda"):
        yield


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("check", ["_before_capture", "_during_capture"])
def test_the_gate_plants_out_of_memory(check, recorded, tmp_path):
    trial = gate._trial("none", "cuda")
    row = getattr(gate, check)(check, trial, tmp_path, "cuda")
    assert row.ok, row.found


@pytest.mark.slow
@pytest.mark.ci
def test_the_gate_compares_what_steps_leave(recorded, monkeypatch):
    monkeypatch.setattr(gate, "STEPS", 4)
    config = gate._with(gate.config_of("vit_glyphs_patch4_32", "nf4", 4, "cuda"))
    row = gate._equal("x", gate._with(config, gradient_noise_scale=True), "cuda")
    assert row.ok, row.found
    step = train.step_on_device
    stale = [0.0]

    def counted(training, images, labels):  # a number of the host, which a graph keeps
        stale[0] += 1.0
        loss, hits = step(training, images, labels)
        training.parameters["head.bias"].detach().add_(stale[0] * 1e-3)
        return loss, hits

    monkeypatch.setattr(train, "step_on_device", counted)
    row = gate._equal("x", config, "cuda")
    assert row.ok is False
    assert "head.bias" in row.figures["differ_by"]


def test_the_gate_holds_int8_products_against_bitsandbytes_own(recorded, monkeypatch):
    def products():
        return [gate._product("x", columns, "cuda") for columns in gate.OUTLIERS]

    assert [row.ok for row in products()] == [True] * 4
    compute = outliers._compute
    monkeypatch.setattr(outliers, "_compute", lambda *a, room, met: compute(*a, room=3, met=met))
    assert [row.ok for row in products()] == [True] * 3 + [False]
    assert "output differs by" in products()[3].found


def test_every_mode_has_the_gates_rows(recorded, monkeypatch):
    for check in ("_product", "_equal", "_before_capture", "_during_capture"):
        monkeypatch.setattr(gate, check, lambda name, *rest: Row(name, True, ""))
    monkeypatch.setattr(gate, "repeated", lambda *given: iter([]))
    settings = {"device": "cuda", "folder": "x", **{k: SMALL[k] for k in ("models", "batch")}}
    rows = list(gate.gates(settings))
    counts = {mode: sum(row.name.startswith(f"{mode}: ") for row in rows) for mode in gate.MODES}
    assert counts == {"none": 5, "int8": 9, "nf4": 5, "nf4-dq": 5}
