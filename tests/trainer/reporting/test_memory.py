import json
import subprocess
import sys
import threading

import pytest
import torch

from fts.errors import MissingDependencyError
from fts.trainer.reporting import memory
from fts.trainer.reporting.memory import TrainerMemoryTracker

MIB = 1 << 20


class Device:
    """Counts as torch.cuda does; cached memory is not counted."""

    def __init__(self):
        self.used = self.most = 100

    def take(self, count):
        self.used += count
        self.most = max(self.most, self.used)

    def empty_cache(self):
        pass

    def reset_peak_memory_stats(self):
        self.most = self.used

    def memory_allocated(self):
        return self.used

    def max_memory_allocated(self):
        return self.most


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(memory, "_device_module", lambda: None)


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "fts-memory"]


MEASURED = """
import json, time, torch
from fts.trainer.reporting.memory import TrainerMemoryTracker
meter, MIB = TrainerMemoryTracker(True), 1 << 20
with meter.measuring("init") as memory_metrics:
    held = torch.ones(64 * MIB, dtype=torch.uint8)
with meter.measuring("train") as memory_metrics:
    passing = torch.ones(96 * MIB, dtype=torch.uint8)
    time.sleep(0.05)
    del passing
    found = memory_metrics()
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="making a CUDA context takes memory of the process")
def test_the_memory_of_the_process_is_measured():
    # in a process of its own: what other tests have freed may still be resident, and is used again
    found = json.loads(subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True).stdout)
    assert found["init_mem_cpu_alloc_delta"] == pytest.approx(64 * MIB, abs=8 * MIB)
    assert found["train_mem_cpu_alloc_delta"] == pytest.approx(0, abs=8 * MIB)
    assert found["train_mem_cpu_peaked_delta"] == pytest.approx(96 * MIB, abs=16 * MIB)
    assert found["before_init_mem_cpu"] > 0


def test_names_and_their_order_are_those_of_transformers(monkeypatch):
    tracker = pytest.importorskip("transformers").trainer_utils.TrainerMemoryTracker()
    device, meter = Device(), TrainerMemoryTracker(True)
    monkeypatch.setattr(memory, "_device_module", lambda: device)
    tracker.torch = torch  # as where there is a GPU
    tracker.cpu = {stage: {"begin": 1, "alloc": 2, "peaked": 3} for stage in ("init", "train", "test")}
    tracker.gpu = dict(tracker.cpu)
    with meter.measuring("init"):
        pass
    for stage in ("train", "test"):
        wanted = {}
        tracker.update_metrics(stage, wanted)
        with meter.measuring(stage) as memory_metrics:
            found = memory_metrics()
        assert set(found) == set(wanted)
        assert [name for name in found if "gpu" not in name] == [name for name in wanted if "gpu" not in name]


def test_the_memory_of_a_device_is_measured(monkeypatch):
    device, meter = Device(), TrainerMemoryTracker(True)
    monkeypatch.setattr(memory, "_device_module", lambda: device)
    device.take(1000)
    device.take(-1000)  # a peak before all stages
    with meter.measuring("init"):
        device.take(7)
    with meter.measuring("train") as memory_metrics:
        device.take(50)
        device.take(-30)
        found = memory_metrics()
    gpu = {name: value for name, value in found.items() if "gpu" in name}
    assert gpu == {
        "init_mem_gpu_alloc_delta": 7,
        "init_mem_gpu_peaked_delta": 0,
        "train_mem_gpu_alloc_delta": 20,
        "train_mem_gpu_peaked_delta": 30,
        "before_init_mem_gpu": 100,
    }


@pytest.mark.usefixtures("no_device")
def test_an_inner_stage_belongs_to_the_outer_one():
    meter = TrainerMemoryTracker(True)
    with meter.measuring("train") as outer:
        with meter.measuring("eval") as inner:
            assert inner() == {}
        assert meter.stage == "train"
        assert set(outer()) == {"train_mem_cpu_alloc_delta", "train_mem_cpu_peaked_delta"}
        assert outer() == {}
    with meter.measuring("eval") as alone:
        assert "eval_mem_cpu_alloc_delta" in alone()


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("stage", ["init", "train"])
def test_a_failure_ends_the_measurement(stage):
    meter = TrainerMemoryTracker(True)
    with pytest.raises(KeyError), meter.measuring(stage):
        assert len(watchers()) == 1
        raise KeyError
    assert not watchers() and meter.stage is None
    with meter.measuring("eval") as memory_metrics:
        assert set(memory_metrics()) == {"eval_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta"}


def test_nothing_is_measured_unless_requested(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with TrainerMemoryTracker(False).measuring("train") as memory_metrics:
        assert not watchers()
        assert memory_metrics() == {}
    with pytest.raises(MissingDependencyError, match=r"skip_memory_metrics=False needs psutil .*pip install psutil"):
        TrainerMemoryTracker(True)
