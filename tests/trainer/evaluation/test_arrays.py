import gc
from pathlib import Path

import numpy as np
import pytest

from fts.errors import DataError
from fts.trainer.evaluation import arrays
from fts.trainer.evaluation.arrays import ArrayAllocator, available_memory


def test_arrays_beyond_the_limit_lie_in_files(tmp_path):
    space = ArrayAllocator(limit=1000, directory=tmp_path)
    small = space.allocate((100,), "float32")
    large = space.allocate((10, 30), "float32")  # 1200 bytes
    assert small.base is None
    assert large.base is not None
    large[:] = 7
    assert type(large) is np.ndarray
    assert large.sum() == 2100
    assert list(tmp_path.iterdir()) == []  # a file without a name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_file_is_gone_with_its_last_view(tmp_path):
    def mapped():
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    view = ArrayAllocator(limit=0, directory=tmp_path).allocate((1000, 1000), "float32")[:10]
    gc.collect()
    assert mapped() == 1
    del view
    gc.collect()
    assert mapped() == 0


def test_the_limit_is_for_all_arrays(tmp_path):
    space = ArrayAllocator(limit=100, directory=tmp_path)
    first = space.allocate((60,), "uint8")
    second = space.allocate((60,), "uint8")
    assert first.base is None
    assert second.base is not None
    assert space.allocate((90,), "uint8", replaces=first).base is not None  # both exist until it is filled
    grown = space.allocate((40,), "uint8", replaces=first)
    assert grown.base is None
    assert space.in_memory == 40


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"Predictions of .* GiB are too large for memory.*TMPDIR"):
        ArrayAllocator(limit=0, directory=tmp_path).allocate((100,), "float32")


def test_the_default_limit_is_half_of_what_is_free():
    space = ArrayAllocator()
    space.allocate((1,), "float32")
    assert space.limit is not None
    assert space.limit == pytest.approx(available_memory() / 2, rel=0.2)


def test_a_container_may_have_less(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert arrays._container_memory_left(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert arrays._container_memory_left(tmp_path) > 2**60
    assert arrays._container_memory_left(tmp_path / "none") > 2**60
