"""What counts as a full disk, at its boundaries."""

import errno
from types import SimpleNamespace

import pytest

from tune_study.machine import disk
from tune_study.machine.disk import ROOM_BYTES, DiskFull, disk_full, has_room, refuse_full_disk


@pytest.fixture
def free(monkeypatch):
    """``free(count)``: so many bytes are free from now on."""
    asked = []

    def set_free(count):
        def usage(folder):
            asked.append(folder)
            return SimpleNamespace(free=count)

        monkeypatch.setattr(disk.shutil, "disk_usage", usage)
        return asked

    return set_free


def test_a_trial_needs_room_and_three_checkpoints(free, tmp_path):
    needed = 64 * 2**20 + 3 * 10**8
    free(needed)
    refuse_full_disk(tmp_path, 10**8)
    free(needed - 1)
    with pytest.raises(DiskFull, match="has 367 MB free and the next trial needs 367 MB") as error:
        refuse_full_disk(tmp_path, 10**8)
    assert error.value.exit_code == 1
    free(64 * 2**20)
    refuse_full_disk(tmp_path)  # without checkpoints


def test_room_is_that_of_the_nearest_folder_which_is_there(free, tmp_path):
    asked = free(ROOM_BYTES)
    assert has_room(tmp_path / "not" / "there")
    assert asked == [tmp_path]
    free(ROOM_BYTES - 1)
    assert not has_room(tmp_path)


def caused(inner, *, by_chance=False):
    """An error that ``inner`` led to, said or by chance."""
    outer = ValueError("outer")
    if by_chance:
        outer.__context__ = inner
    else:
        outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("safetensors: No space left on device (os error 28)"),
        caused(OSError(errno.ENOSPC, "full")),
        caused(OSError(errno.EDQUOT, "quota"), by_chance=True),
    ],
)
def test_an_error_of_a_full_disk_is_known_by_itself_or_its_cause(free, tmp_path, error):
    free(10 * ROOM_BYTES)  # something was removed meanwhile
    found = disk_full(error, tmp_path)
    assert "is full (671 MB free)" in str(found)


def test_any_other_error_is_one_of_a_full_disk_where_it_is_full(free, tmp_path):
    for error in (ValueError("x"), OSError(errno.EACCES, "denied")):
        free(ROOM_BYTES)
        assert disk_full(error, tmp_path) is None
        free(ROOM_BYTES - 1)
        assert isinstance(disk_full(error, tmp_path), DiskFull)
    known = DiskFull("known")
    assert disk_full(known, tmp_path) is known
    assert disk_full(caused(known), tmp_path) is known
