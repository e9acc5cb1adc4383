import hashlib
from pathlib import Path

import pytest
import timm

from tune_study.errors import UserError
from tune_study.study import preflight
from tune_study.trial.context import RunContext


def context(tmp_path, **fields):
    return RunContext(study_dir=tmp_path / "study", **fields)


def test_preflight_finds_the_inputs_and_their_checksums(tiny, tmp_path):
    trials = [tiny("none"), tiny("nf4")]
    checked = preflight.check(trials, context(tmp_path))
    shipped = Path(timm.get_pretrained_cfg("vit_glyphs_patch4_32").file)
    entry = checked.checksums["weights"]["vit_glyphs_patch4_32"]
    assert entry["sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert len(checked.checksums["data"]["digits"]["sha256"]) == 64
    assert checked.data[trials[0].trial_id] is checked.data[trials[1].trial_id]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "vit_nothing"}, "timm has no such model"),
        ({"dataset": "cifar10"}, "--data-dir"),
        ({"data": {"train_size": 10**6}}, "data.train_size"),
        ({"data": {"image_size": 33}}, "multiple"),
        ({"quantization": {"mode": "nf4", "skip_layers": ["x"]}}, "matches no layer"),
    ],
)
def test_preflight_refuses_before_anything_is_written(tiny, tmp_path, fields, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        preflight.check([tiny("nf4", **fields)], context(tmp_path, data_dir=tmp_path / "empty"))
    assert not (tmp_path / "study").exists()
