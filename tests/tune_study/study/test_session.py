"""A command's steps with Ray, Tune and the report left out: what it settles, says and returns."""

import io
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tune_study.cluster.stop import Stop
from tune_study.config import parse_trial
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.study import session
from tune_study.study.console import judge
from tune_study.study.options import Options
from tune_study.study.preflight import Checked
from tune_study.trial.context import RunContext, Simulation

VALUES = {"model": "m", "dataset": "digits", "training": {"num_train_epochs": 3}}
TRIALS = [parse_trial({**VALUES, "seed": seed}) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _reset():
    yield
    Stop.reset()


def test_a_simulation_is_what_the_options_plant():
    assert session._simulation(Options()) is None
    assert session._simulation(Options(simulate=True)) == Simulation(effects={}, seed_sd=0.004)
    given = Options(simulate=True, effect=["nf4=-0.5", "int8=0.25"], seed_sd=0.0)
    planted = Simulation(effects={"nf4": -0.5, "int8": 0.25}, seed_sd=0)
    assert session._simulation(given) == planted
    for alone in (Options(effect=["nf4=0.1"]), Options(seed_sd=0.0)):
        with pytest.raises(UserError, match="belong to --simulate"):
            session._simulation(alone)


def context(monkeypatch, simulation=None, **given):
    monkeypatch.setattr(session, "cores", lambda: 7)
    return session._context(Options(device="cpu", **given), "grid", [], simulation)


def test_where_a_study_runs_by_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert context(monkeypatch) == RunContext(
        study_dir=tmp_path / "ray_results" / "grid", num_threads=7, keep_checkpoints="best"
    )
    assert context(monkeypatch, Simulation()).study_dir.name == "grid-simulated"


def test_trials_that_share_a_gpu_do_not_each_take_all_cores(monkeypatch):
    for auto in ({"gpus_per_trial": "auto"}, {"max_concurrent": "auto"}):
        assert context(monkeypatch, **auto).num_threads == 2
        assert context(monkeypatch, **auto, cpus_per_trial=3).num_threads == 3


def test_on_the_cpu_auto_is_one_trial_with_all_cores(monkeypatch, capsys):
    monkeypatch.setattr(session, "trials_of", lambda given: (None, "grid", list(TRIALS)))
    monkeypatch.setattr(session, "cores", lambda: 7)
    command = session._command(Options(device="cpu", max_concurrent="auto"))
    assert (command.given.max_concurrent, command.context.num_threads) == (1, 7)
    said = "--max-concurrent auto: one trial at a time, because cpu is no GPU of CUDA's to share\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(("cpus", "threads"), [(None, 12 // 6), (5, 5)])
def test_a_count_becomes_trials_at_a_time_and_shares(monkeypatch, tmp_path, cpus, threads):
    outlines = {trial.trial_id: trial.seed for trial in TRIALS}
    asked = []

    def choose(planned, context, say):
        asked.append(planned)
        return 3

    monkeypatch.setattr(session.sharing, "choose", choose)
    monkeypatch.setattr(session.gpus, "count", lambda: 2)
    monkeypatch.setattr(session, "cores", lambda: 12)
    given = Options(max_concurrent="auto", cpus_per_trial=cpus)
    where = RunContext(study_dir=tmp_path, device="cuda", num_threads=2)
    command = session.Command(given, Console(), where, None, list(TRIALS), False, "the command")
    command.settle_sharing(Checked(outlines, {}))
    assert asked == [[(trial, trial.seed) for trial in TRIALS]]
    assert (command.given.max_concurrent, command.given.gpus_per_trial) == (6, 0.3333)
    assert command.context.num_threads == threads

    for trial in TRIALS:  # nothing is left to do
        (tmp_path / trial.trial_id).mkdir()
        write_json(tmp_path / trial.trial_id / "results.json", {"status": "completed"})
    command.settle_sharing(Checked({}, {}))
    assert len(asked) == 1


def test_a_share_of_a_gpu_is_refused_where_trials_have_none(monkeypatch):
    monkeypatch.setattr(session, "trials_of", lambda given: (None, "grid", list(TRIALS)))
    with pytest.raises(UserError, match="--gpus-per-trial auto: trials on cpu have no GPU"):
        session._command(Options(device="cpu", gpus_per_trial="auto"))


@pytest.mark.parametrize(
    ("given", "need"),
    [({}, (3, "cpu")), ({"dry_run": True}, None), ({"gpus_per_trial": 0.5}, None)],
    ids=str,
)
def test_auto_asks_what_the_planned_trials_take(monkeypatch, tmp_path, given, need):
    checked = Checked({t.trial_id: "outline" for t in TRIALS}, {"data": {}, "weights": {}})
    monkeypatch.setattr(session.preflight, "check", lambda *asked, **options: checked)
    monkeypatch.setattr(session, "with_compute_dtype", lambda console, trials, context: trials)
    monkeypatch.setattr(session, "need_of", lambda planned, device: (len(planned), device.type))
    monkeypatch.setattr(session, "say_what_is_passed_over", lambda *said: None)
    monkeypatch.setattr(Checked, "told", [])
    options = Options(**{"gpus_per_trial": "auto", **given})
    where = RunContext(study_dir=tmp_path)
    command = session.Command(options, Console(), where, None, list(TRIALS), False, "the command")
    session._look(command)
    assert command.need == need


@pytest.mark.parametrize(
    ("at_a_time", "done"), [("auto", ["looked", "run"]), (2, ["run"])], ids=str
)
def test_a_gpu_is_looked_at_once_before_its_trials_run(monkeypatch, tmp_path, at_a_time, done):
    given = Options(max_concurrent=at_a_time)
    where = RunContext(study_dir=tmp_path, device="cuda")
    command = session.Command(given, Console(), where, None, list(TRIALS), False, "the command")
    calls = []
    monkeypatch.setattr(session, "_command", lambda given: command)
    monkeypatch.setattr(session, "_look", lambda command: Checked({}, {}))
    monkeypatch.setattr(session, "say_long_warm_up", lambda *said: None)
    monkeypatch.setattr(session, "_open", lambda *opened, fp32: None)
    monkeypatch.setattr(
        session.Command, "settle_sharing", lambda command, checked: calls.append("looked")
    )
    monkeypatch.setattr(session, "_run", lambda *given: calls.append("run") or 0)
    assert session.execute(given) == 0
    assert calls == done

    notes = []
    review = SimpleNamespace(notes=[], cells={})
    monkeypatch.setattr(session.manifest, "review", lambda *given: review)
    monkeypatch.setattr(session, "extension_of", lambda *given: None)
    monkeypatch.setattr(session, "print_plan", lambda *given: notes.extend(given[5]))
    session._dry_run(command, Checked({}, {}), {})
    assert notes == ([session.sharing.NOT_YET] if at_a_time == "auto" else [])


def test_where_a_study_runs_as_the_options_say(monkeypatch, tmp_path):
    store = (tmp_path / "store").as_uri()
    found = context(
        monkeypatch,
        name="n",
        output_dir=tmp_path,
        data_dir=Path("d"),
        weights=Path("w"),
        keep_checkpoints="all",
        storage=store,
        address="auto",
        epoch_s=0.5,
        cpus_per_trial=5,
    )
    assert found == RunContext(
        study_dir=tmp_path / "n",
        data_dir=Path("d"),
        weights=Path("w"),
        num_threads=5,
        keep_checkpoints="all",
        storage=f"{store}/n",
        on_cluster=True,
        epoch_s=0.5,
    )
    with pytest.raises(UserError, match="add --storage"):
        context(monkeypatch, address="auto")


@pytest.mark.parametrize(("at_a_time", "threads"), [(1, 7), (2, 3), (7, 1), (9, 1)])
def test_trials_share_the_cores(monkeypatch, at_a_time, threads):
    assert context(monkeypatch, max_concurrent=at_a_time).num_threads == threads


@pytest.fixture
def study(tmp_path, monkeypatch):
    """``study(ends, later, **given)``: (exit code, what was said, what was called).

    ``ends`` are the statuses in the folder, ``later`` those that the run leaves.
    """
    calls = []
    monkeypatch.setattr(session, "collect", lambda folder: calls.append("collect"))
    monkeypatch.setattr("analysis.report.write_report", lambda folder: calls.append("report"))
    monkeypatch.setattr("tune_study.loggers.event_files.show_figures", lambda folder: None)
    monkeypatch.setattr(session, "push_end", lambda store, ids: calls.append(("push", store, ids)))

    def call(ends, later=(), stop=None, now=False, store=None, logged=None, **given):
        def leave(statuses):
            for trial, status in zip(TRIALS, statuses, strict=False):
                (tmp_path / trial.trial_id).mkdir(exist_ok=True)
                write_json(tmp_path / trial.trial_id / "results.json", {"status": status})

        def train(waiting, context, progress, **options):
            calls.append((len(waiting), progress._total, progress._done, options))
            leave(later)
            if stop:
                Stop.request(stop)
            if now:
                raise KeyboardInterrupt

        monkeypatch.setattr(session.schedule, "run", train)
        leave(ends)
        console = Console(file=io.StringIO(), width=500)
        where = RunContext(study_dir=tmp_path)
        command = session.Command(
            Options(**given), console, where, None, list(TRIALS), False, "the command"
        )
        code = session._run(command, store, logged)
        return code, console.file.getvalue(), calls

    return call


GOOD = ("completed", "early_stopped", "completed")


def test_a_study_that_has_ended_trains_nothing(study, tmp_path):
    code, said, calls = study(GOOD)
    assert code == 0
    assert "nothing to do: all 3 trials of this command have ended" in said
    assert calls == ["collect", "report"]
    assert f"results:     {tmp_path}" in said
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in said
    assert "kept in" not in said


def test_what_is_left_is_trained_with_the_commands_options(study):
    given = {"max_concurrent": 2, "gpus_per_trial": 0.5, "address": "auto", "dashboard": True}
    code, said, calls = study(GOOD[:1], GOOD, store="store", **given)
    assert code == 0
    assert "continuing: 1 of 3 trials have ended" in said
    waiting, total, done, options = calls[0]
    assert (waiting, total, done) == (2, 3, 1)
    options.pop("on_dead_ray")
    assert options == {**given, "search": None, "store": "store", "trackers": None}
    assert calls[1:] == [
        "collect",
        "report",
        ("push", "store", [trial.trial_id for trial in TRIALS]),
    ]


def test_a_failed_trial_is_exit_1(study):
    assert study((), (*GOOD[:2], "diverged"))[0] == 1


@pytest.mark.parametrize(
    ("stop", "code", "words", "pushed"),
    [
        ("time", 124, "stopped, because the time of --max-hours is over", True),
        ("interrupt", 130, "interrupted", True),
        ("terminate", 143, "terminated", True),
        ("disk", 1, "stopped, because the disk is full", True),
        ("storage", 1, "stopped, because the store", False),
        ("lease", 1, "stopped, because another run", False),
    ],
)
def test_a_stopped_study_says_why_and_how_to_go_on(study, stop, code, words, pushed):
    found, said, calls = study((), ("completed", "interrupted"), stop=stop, store="store")
    assert found == code
    assert words in said
    assert said.endswith("continue with: the command\n")
    assert (calls[-1][0] == "push") is pushed
    assert "report" in calls


def test_a_study_that_was_stopped_at_its_end_has_ended(study):
    assert study((), GOOD, stop="interrupt")[0] == 0


def test_a_second_ctrl_c_writes_tables_and_no_report(study):
    code, _, calls = study((), ("interrupted",), now=True)
    assert code == 130
    assert calls[1:] == ["collect"]


def test_a_limit_of_time_begins_with_the_run(study, monkeypatch):
    seen = []
    monkeypatch.setattr(Stop, "reset", classmethod(lambda cls, hours=None: seen.append(hours)))
    study((), GOOD, max_hours=2.5)
    assert seen[0] == 2.5


def test_trackers_catch_up_before_and_are_closed_after(study):
    order = []
    logged = SimpleNamespace(
        catch_up=lambda trials: order.append(("catch up", len(trials))),
        close=lambda trials: order.append(("close", len(trials))),
    )
    calls = study((), GOOD, logged=logged)[2]
    assert order == [("catch up", 3), ("close", 3)]
    assert calls[0][3]["trackers"] is logged


@pytest.mark.parametrize(("stop", "code"), [(None, 1), ("terminate", 143)])
def test_a_dead_ray_ends_the_command_with_tables(tmp_path, monkeypatch, stop, code):
    order = []
    monkeypatch.setattr(session, "collect", lambda folder: order.append("collect"))
    monkeypatch.setattr(session.os, "_exit", order.append)
    monkeypatch.setattr(
        session.schedule, "run", lambda *given, on_dead_ray, **options: on_dead_ray("raylet")
    )
    Stop.reset()
    if stop:
        Stop.request(stop)
    console = Console(file=io.StringIO(), width=500)
    where = RunContext(study_dir=tmp_path)
    command = session.Command(Options(), console, where, None, TRIALS, False, "the command")
    progress = session._progress(command, TRIALS, 3, 0)
    assert session._train(command, TRIALS, progress, None, None, None) is False
    assert order == ["collect", code]
    said = "Ray's raylet process died; continue with: the command\n"
    assert console.file.getvalue() == said


def test_what_is_there_already_is_said_when_a_study_grows(tmp_path):
    def opened(trials, **given):
        console = Console(file=io.StringIO(), width=500)
        where = RunContext(study_dir=tmp_path / "s")
        command = session.Command(
            Options(**given), console, where, None, trials, False, "the command"
        )
        checked = Checked({}, {"data": {}, "weights": {}})
        session._open(command, checked, fp32=False)
        return console.file.getvalue()

    assert opened(TRIALS[:2]) == ""
    assert opened(TRIALS[:2]) == ""
    assert opened(TRIALS).startswith("extending s: 3 to run: 2 planned, 1 new")
    assert "2 that this command does not name" in opened(TRIALS[:1])
    found = session.manifest.read_manifest(tmp_path / "s")
    assert (found["grid"], found["command"]) == ("demo", "the command")


def test_resume_wants_a_study(tmp_path):
    command = session.Command(
        Options(resume=True),
        Console(file=io.StringIO()),
        RunContext(study_dir=tmp_path / "s"),
        None,
        TRIALS,
        False,
        "the command",
    )
    with pytest.raises(UserError, match="--resume: there is no study in"):
        session._look(command)


def test_what_is_printed_can_be_pasted_into_a_shell(monkeypatch, tmp_path):
    folder = tmp_path / "it's [bold] :cat: #1"
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("tune_study.loggers.event_files.show_figures", lambda folder: None)
    monkeypatch.setattr("sys.argv", ["run", "--simulate", "--output-dir", str(folder), "--name=n"])
    given = Options(simulate=True, output_dir=folder, name="n", grid="smoke")
    command = session._command(given)
    written = io.StringIO()
    command.console.file = written
    command.console.width = 20
    session._say_where(command, report=True)
    command.say(f"continue with: {command.line}")
    lines = [line.partition(":")[2] for line in written.getvalue().splitlines()]
    study = folder / "n"
    assert [shlex.split(line) for line in lines] == [
        [str(study)],
        [str(study / "report.html")],
        ["tensorboard", "--logdir", str(study / "tensorboard")],
        ["python", "-m", "tune_study.run", *sys.argv[1:]],
    ]
    written.truncate(0)
    judge(command.console, {"t": "error"}, study)
    assert f"(see {shlex.quote(str(study / 't'))})" in written.getvalue().replace("\n", "")


def test_two_writings_of_a_folder_are_one_data_set(monkeypatch, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "g.py").write_text(
        "from ray import tune\n"
        "def g():\n"
        "    names = tune.grid_search(['folder:d/', 'folder:./d', 'digits'])\n"
        "    return {'model': 'm', 'dataset': names}\n"
    )
    monkeypatch.chdir(tmp_path)
    command = session._command(Options(simulate=True, grid="g.py:g"))
    command.settle_names()
    assert [trial.dataset for trial in command.trials] == ["folder:d", "digits"]


def test_the_cards_are_written_when_the_trials_are_known(study, monkeypatch):
    written = []
    monkeypatch.setattr(session, "write_cards", written.append)
    study(["completed"] * 3)
    assert len(written) == 1
