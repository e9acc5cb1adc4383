from pathlib import Path

import pytest

from tune_study.data.names import Hub, Names, hub_of, place_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("d", "other/d", "it's [exp] #1", "été"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("other/d")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("written", ["d", "d/", "./d", "d//", "other/../d", "~/d", "{here}/d"])
def test_a_folder_has_one_name_however_it_is_written(here, written):
    written = written.format(here=here)
    assert Names(["folder:d"]).of(f"folder:{written}") == "folder:d"
    earlier = f"folder:{written}"  # of a study that was begun so: its trial ids stay
    assert Names([earlier]).of("folder:d") == earlier


def test_a_new_name_is_the_shortest_writing(here):
    names = Names()
    assert names.of("folder:./d/") == "folder:d"
    assert names.of(f"folder:{here}/d") == "folder:d"  # by now it has a name
    assert Names().of("folder:~/d") == f"folder:{here}/d"
    assert Names().of(f"folder:{here}/x/../d/") == f"folder:{here}/d"
    assert Names().of("folder:link/../d") == "folder:link/../d"  # is other/d, not d


@pytest.mark.parametrize("name", ["it's [exp] #1", "été", "link"])
def test_odd_names_stay(here, name):
    assert Names().of(f"folder:{name}/") == f"folder:{name}"
    assert place_of(f"folder:{name}").is_dir()


def test_other_folders_and_data_sets_keep_their_names(here):
    names = Names(["folder:d"])
    for name in ("folder:other/d", "digits", "cifar10", "folder:", "folder:\0", "folder:nowhere"):
        assert names.of(name) == name


def test_a_study_knows_where_its_folder_lies_when_a_command_is_typed_elsewhere(here, monkeypatch):
    monkeypatch.chdir(here / "other")
    names = Names(["folder:d"], {"folder:d": here / "d"})
    assert names.of("folder:../d") == "folder:d"
    assert place_of("folder:d") == Path("d")


@pytest.mark.parametrize("written", ["./d", "./d/", "other/../d", "~/d", "{here}/d"])
def test_a_folder_in_the_formats_of_the_hub_has_one_name_too(here, written):
    written = written.format(here=here)
    written = written if written.startswith((".", "~", "/")) else f"./{written}"
    assert Names(["hf:./d"]).of(f"hf:{written}") == "hf:./d"
    assert Names(["hf:./d@x"]).of(f"hf:{written}@x") == "hf:./d@x"
    assert Names(["hf:./d@x", "folder:d"]).of(f"hf:{written}").startswith("hf:")
    assert Names(["hf:./d@x"]).of(f"hf:{written}@y").endswith("d@y")
    assert place_of(f"hf:{written}@x").resolve() == here / "d"


def test_names_of_the_hub_stay_and_no_folder_becomes_one(here):
    for name in ("hf:d", "hf:owner/d", "hf:owner/d@x", "hf:", "hf:./nowhere"):
        assert Names(["folder:d"]).of(name) == name
    assert Names().of("hf:././d") == "hf:./d"
    assert place_of("hf:owner/d") is None
    assert hub_of("hf:owner/d@x") == Hub(None, "owner/d", "x")
    (here / "a@b").mkdir()
    assert hub_of("hf:./a@b") == Hub(Path("a@b"), "./a@b", None)
    assert hub_of("hf:./a@b@c") == Hub(Path("a@b"), "./a@b", "c")
