import json
import math
import pickle
import shutil

import pytest
import torch

from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.folder.files import file_sha256
from tune_study.model.build import build_model
from tune_study.trial import checkpoint, train


@pytest.fixture
def saved(tiny, tmp_path):
    config = tiny("none", training={"num_train_epochs": 1})
    data = load("digits", Place(), config.data)
    training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
    list(train.fit(training))
    trial = tmp_path / "study" / config.trial_id
    folder = checkpoint.save(trial, training.state_dict(), {"memory": {"a": 1}})
    return config, training.state_dict(), folder


def test_a_checkpoint_returns_to_the_bit(saved):
    config, state, folder = saved
    assert checkpoint.is_whole(folder, config.trial_id)
    loaded, extra = checkpoint.load(folder)
    assert extra == {"memory": {"a": 1}}
    for part in ("adapter", "best"):
        assert all(torch.equal(loaded[part][n], v) for n, v in state[part].items())
    assert repr(loaded["history"]) == repr(state["history"])
    assert loaded["monitor"] == state["monitor"]
    assert torch.equal(loaded["generators"]["torch"], state["generators"]["torch"])


@pytest.mark.parametrize("name", ["adapter.safetensors", "best.safetensors", "training.pt"])
def test_a_truncated_or_changed_file_is_noticed(saved, name):
    config, _, folder = saved
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        assert not checkpoint.is_whole(folder, config.trial_id)
    path.unlink()
    assert not checkpoint.is_whole(folder, config.trial_id)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', "null"])
def test_a_state_file_that_is_not_ours_is_no_checkpoint(saved, text):
    config, _, folder = saved
    (folder / "state.json").write_text(text)
    assert not checkpoint.is_whole(folder, config.trial_id)


def test_the_newest_whole_checkpoint_is_found_and_two_are_kept(saved):
    _, state, folder = saved
    trial = folder.parents[1]
    newer = checkpoint.save(trial, dict(state, history=state["history"] * 3), {})
    assert checkpoint.newest(trial) == (newer, [])
    (newer / "best.safetensors").write_bytes(b"")
    assert checkpoint.newest(trial) == (folder, [newer])
    newest = checkpoint.save(trial, dict(state, history=state["history"] * 12), {})
    checkpoint.prune(trial)
    assert checkpoint.candidates(trial) == [newest, newer]
    checkpoint.prune(trial, keep=0)
    assert checkpoint.newest(trial) == (None, [])
    assert not folder.parent.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(saved, monkeypatch):
    config, state, folder = saved
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoint.save(folder.parents[1], state, {})
    assert checkpoint.is_whole(folder, config.trial_id)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_loading_a_checkpoint_runs_no_code(saved):
    config, _, folder = saved

    class Evil:
        def __reduce__(self):
            return (folder.joinpath("ran").write_text, ("x",))

    (folder / "training.pt").write_bytes(pickle.dumps(Evil()))
    plain = json.loads((folder / "state.json").read_text())
    plain["sha256"]["training.pt"] = file_sha256(folder / "training.pt")
    (folder / "state.json").write_text(json.dumps(plain))
    assert checkpoint.is_whole(folder, config.trial_id)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(folder)
    assert not (folder / "ran").exists()


def test_another_trials_checkpoint_is_none_of_ours(saved):
    *_, folder = saved
    other = folder.parent.parent.with_name("another-trial")
    shutil.copytree(folder.parent.parent, other)
    assert checkpoint.newest(folder.parent.parent) == (folder, [])
    assert checkpoint.newest(other) == (None, [other / "checkpoints" / folder.name])


def small(**changed):
    """A state of a few numbers, as ``Training.state_dict`` nests it."""
    tensors = {name: {"w": torch.tensor([float(n)])} for n, name in enumerate(checkpoint.TENSORS)}
    binary = {name: {"n": n} for n, name in enumerate(checkpoint.BINARY)}
    plain = {"history": [{"epoch": 1}], "layer_gradients": [[math.nan]], "best_epoch": 1}
    return {**tensors, **binary, **plain, **changed}


@pytest.mark.parametrize("name", [*checkpoint.TENSORS, *checkpoint.BINARY, *checkpoint.PLAIN])
def test_every_part_of_a_state_returns_as_itself(tmp_path, name):
    folder = checkpoint.save(tmp_path / "trial", small(), {"e": 5})
    assert folder == tmp_path / "trial" / "checkpoints" / "epoch-00001"
    state, extra = checkpoint.load(folder)
    assert state.keys() == small().keys()
    assert repr(state[name]) == repr(small()[name])
    assert extra == {"e": 5}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"trial_id": "another"},
        {"extra": []},
        {"state": []},
        {"state": {"history": [], "layer_gradients": []}},
        {"state": {"history": [], "layer_gradients": [], "best_epoch": 0, "more": 1}},
        {"sha256": []},
        {"sha256": {}},
    ],
)
def test_each_part_of_the_state_file_is_asked_for(tmp_path, change):
    folder = checkpoint.save(tmp_path / "trial", small(), {})
    assert checkpoint.is_whole(folder, "trial")
    plain = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**plain, **change}))
    assert not checkpoint.is_whole(folder, "trial")


def test_two_are_kept_and_one_where_one_is_asked_for(tmp_path):
    folders = [
        checkpoint.save(tmp_path, small(history=[{}] * count), {}) for count in (1, 2, 9, 10)
    ]
    assert checkpoint.candidates(tmp_path) == folders[::-1]
    checkpoint.prune(tmp_path, keep=3)
    assert checkpoint.candidates(tmp_path) == folders[:0:-1]
    checkpoint.prune(tmp_path)
    assert checkpoint.candidates(tmp_path) == [folders[3], folders[2]]
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.candidates(tmp_path) == [folders[3]]
    for path in folders[3].iterdir():
        path.write_bytes(b"")
    assert checkpoint.newest(tmp_path) == (None, [folders[3]])
