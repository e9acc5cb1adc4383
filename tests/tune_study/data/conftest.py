import pytest

from tune_study.data.place import Place


@pytest.fixture
def place(tmp_path):
    """No images, and a cache of the test's own."""
    return Place(cache_dir=tmp_path / "cache")
