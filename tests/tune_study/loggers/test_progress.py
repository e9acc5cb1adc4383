"""What the command says of its trials."""

import io
from types import SimpleNamespace

from rich.console import Console

from tune_study.folder.files import write_json
from tune_study.loggers.progress import Progress


def test_a_trial_counts_when_it_has_ended_not_when_its_worker_died(tmp_path):
    output = io.StringIO()
    progress = Progress(Console(file=output), tmp_path, 1, 0, {"one": 2})
    trial = SimpleNamespace(config={"trial_id": "one"})
    progress.on_trial_start(0, [], trial)
    progress.on_trial_error(0, [], trial)  # killed before it wrote its first file
    results = {"status": "interrupted", "warnings": ["a checkpoint is not whole"]}
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one" / "results.json", results)
    progress.on_trial_error(0, [], trial)
    assert output.getvalue() == "one: started\none: a checkpoint is not whole\n"
    write_json(tmp_path / "one" / "results.json", results | {"status": "error", "error": "no luck"})
    progress.on_trial_error(0, [], trial)
    assert output.getvalue().endswith("one: error: no luck [1/1]\n")
