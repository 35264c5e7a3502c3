"""The memory that the stages of a run use."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from fts.errors import MissingDependencyError

SAMPLING_SECONDS = 0.001
"""Seconds between two samples of the memory of the process."""


@attrs.frozen
class MemoryUsage:
    """Bytes in use at the begin and the end of a stage, and the peak; `peak` is None where the device does not report it."""

    begin: int
    end: int
    peak: int | None

    def metrics(self, stage: str, kind: str) -> dict[str, int]:
        """The bytes allocated by the stage, and the peak above them.

        >>> MemoryUsage(10, 30, 45).metrics("train", "cpu")
        {'train_mem_cpu_alloc_delta': 20, 'train_mem_cpu_peaked_delta': 15}
        """
        peak = {} if self.peak is None else {f"{stage}_mem_{kind}_peaked_delta": max(0, self.peak - self.end)}
        return {f"{stage}_mem_{kind}_alloc_delta": self.end - self.begin} | peak


class TrainerMemoryTracker:
    """Measures the memory of a run's outermost stages, with transformers' names of the metrics.

    Memory of the process (`cpu`) is its resident set, sampled each millisecond; that of an accelerator (`gpu`) is what torch has
    allocated there. A stage inside another one (an evaluation during training) belongs to the outer one. The metrics of "init"
    are reported with those of the next stage.

    Args:
        active: whether to measure at all (`not args.skip_memory_metrics`); if not, there are no metrics.

    Raises:
        MissingDependencyError: psutil is missing.

    >>> meter = TrainerMemoryTracker(True)
    >>> with meter.measuring("init"):
    ...     pass
    >>> with meter.measuring("eval") as memory_metrics:
    ...     metrics = memory_metrics()
    >>> [name for name in metrics if "gpu" not in name and not name.startswith("init")]
    ['eval_mem_cpu_alloc_delta', 'eval_mem_cpu_peaked_delta', 'before_init_mem_cpu']
    """

    def __init__(self, active: bool) -> None:
        self.rss = _rss_reader() if active else None
        self.stage: str | None = None
        self.begin_bytes: dict[str, int] = {}
        self.sampler: _PeakSampler | None = None
        self.init: dict[str, MemoryUsage] = {}

    @contextmanager
    def measuring(self, stage: str) -> Iterator[Callable[[], dict[str, int]]]:
        """Measure a block.

        Args:
            stage: "init", "train", "eval" or "test".

        Yields:
            A function that ends the measurement and returns the metrics, in bytes by name: empty for "init", and inside another
            stage. Call it once, within the block; a block that raises before ends its measurement, too.
        """
        if self.rss is None or self.stage is not None:
            yield dict
            return
        self._begin(stage)
        try:
            yield lambda: self._report(stage)
            if stage == "init":
                self.init = self._end()
        finally:
            self._stop()

    def _begin(self, stage: str) -> None:
        assert self.rss is not None
        gc.collect()
        self.stage = stage
        self.begin_bytes = _reset_device_peak() | {"cpu": self.rss()}
        self.sampler = _PeakSampler(self.rss)

    def _end(self) -> dict[str, MemoryUsage]:
        assert self.rss is not None and self.sampler is not None
        peak = self.sampler.stop()
        gc.collect()
        usage = {"cpu": MemoryUsage(self.begin_bytes["cpu"], self.rss(), peak)}
        if "gpu" in self.begin_bytes:
            usage["gpu"] = MemoryUsage(self.begin_bytes["gpu"], *_device_usage())
        return usage

    def _report(self, stage: str) -> dict[str, int]:
        if self.sampler is None:
            return {}
        init, usage = self.init, self._end()
        self._stop()
        self.init = {}
        metrics: dict[str, int] = {}
        for name, usages in (("init", init), (stage, usage)):
            for kind, used in usages.items():
                metrics |= used.metrics(name, kind)
        return metrics | {f"before_init_mem_{kind}": used.begin for kind, used in init.items()}

    def _stop(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()
        self.stage = self.sampler = None


class _PeakSampler:
    """A thread that records the maximum of bytes until it is stopped."""

    def __init__(self, read: Callable[[], int]) -> None:
        self.read = read
        self.peak = read()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, name="fts-memory", daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self.stopped.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak, self.read())
        self.peak = max(self.peak, self.read())


def _rss_reader() -> Callable[[], int]:
    try:
        import psutil
    except ImportError as error:
        raise MissingDependencyError(
            "skip_memory_metrics=False needs psutil to read the memory of the process: pip install psutil."
        ) from error
    process = psutil.Process()
    return lambda: int(process.memory_info().rss)


def _reset_device_peak() -> dict[str, int]:
    device = _device_module()
    if device is None:
        return {}
    if device is torch.mps:
        device.empty_cache()
        return {"gpu": int(device.current_allocated_memory())}
    device.empty_cache()
    device.reset_peak_memory_stats()
    return {"gpu": int(device.memory_allocated())}


def _device_usage() -> tuple[int, int | None]:
    device = _device_module()
    device.empty_cache()
    if device is torch.mps:
        return int(device.current_allocated_memory()), None
    return int(device.memory_allocated()), int(device.max_memory_allocated())


def _device_module() -> Any:
    if torch.cuda.is_available():
        return torch.cuda
    if torch.xpu.is_available():
        return torch.xpu
    return torch.mps if torch.backends.mps.is_available() else None
