"""The crash test's own command, with studies that are not really started."""

import pandas as pd
import pytest

from . import crash, harness


@pytest.mark.parametrize("device", ["cuda", None])
def test_the_studies_run_on_the_device_that_is_asked_for(device, monkeypatch, capsys):
    started = []

    def start(folder, *arguments):
        started.append(arguments)
        (folder / "smoke").mkdir(parents=True)
        trials = pd.DataFrame({"device": [device or "mps"] * 4})
        trials.to_parquet(folder / "smoke" / "trials.parquet")

    monkeypatch.setattr(crash, "ANOTHER_KILL", 0.0)
    monkeypatch.setattr(crash, "_one_kill", lambda *_: "worker at 1.0 s")
    monkeypatch.setattr(harness, "start", start)
    monkeypatch.setattr(harness, "finish", lambda *_: (0, ""))
    monkeypatch.setattr(harness, "compare", lambda *_: None)
    monkeypatch.setattr(harness, "no_epoch_twice", lambda *_: None)
    given = ["--device", device] if device else []
    assert crash.main(["--kills", "2", *given]) == 0
    assert started == [tuple(given)] * 3  # the undisturbed one, and the two that are killed
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f" s on {device or 'mps'}")
    assert said[-1] == f"2 of 2 equal on {device or 'mps'} (seed 0)"
