"""How much memory the stages of a run take."""

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
"""Seconds between two looks at the memory of the process."""


@attrs.frozen
class MemoryUsage:
    """Bytes in use at the two ends of a stage, and the most in between; `peak` is None where the device does not tell."""

    begin: int
    end: int
    peak: int | None

    def figures(self, stage: str, kind: str) -> dict[str, int]:
        """What was added and stayed, and what was needed beyond that for a time.

        >>> MemoryUsage(10, 30, 45).figures("train", "cpu")
        {'train_mem_cpu_alloc_delta': 20, 'train_mem_cpu_peaked_delta': 15}
        """
        peaked = {} if self.peak is None else {f"{stage}_mem_{kind}_peaked_delta": max(0, self.peak - self.end)}
        return {f"{stage}_mem_{kind}_alloc_delta": self.end - self.begin} | peaked


class TrainerMemoryTracker:
    """Measures the memory of a run's outermost stages, with transformers' names of the figures.

    Memory of the process (`cpu`) is its resident set, looked at each millisecond; that of an accelerator (`gpu`) is what torch
    has allocated there. A stage inside another one (an evaluation while training) counts to the outer one. The figures of "init"
    are reported with those of the stage after it.

    Args:
        active: whether to measure at all (`not args.skip_memory_metrics`); if not, all figures are empty.

    Raises:
        MissingDependencyError: psutil is missing.

    >>> meter = TrainerMemoryTracker(True)
    >>> with meter.measuring("init"):
    ...     pass
    >>> with meter.measuring("eval") as figures:
    ...     metrics = figures()
    >>> [name for name in metrics if "gpu" not in name and not name.startswith("init")]
    ['eval_mem_cpu_alloc_delta', 'eval_mem_cpu_peaked_delta', 'before_init_mem_cpu']
    """

    def __init__(self, active: bool) -> None:
        self.rss = _rss_reader() if active else None
        self.stage: str | None = None
        self.begun: dict[str, int] = {}
        self.sampler: _PeakSampler | None = None
        self.init: dict[str, MemoryUsage] = {}

    @contextmanager
    def measuring(self, stage: str) -> Iterator[Callable[[], dict[str, int]]]:
        """Measure a block.

        Args:
            stage: "init", "train", "eval" or "test".

        Yields:
            A function that ends the measurement and gives the figures, in bytes by name: empty for "init", and inside another
            stage. It is called once, within the block; a block that raises before ends its measurement, too.
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
        self.begun = _reset_device_peak() | {"cpu": self.rss()}
        self.sampler = _PeakSampler(self.rss)

    def _end(self) -> dict[str, MemoryUsage]:
        assert self.rss is not None and self.sampler is not None
        peak = self.sampler.stop()
        gc.collect()
        taken = {"cpu": MemoryUsage(self.begun["cpu"], self.rss(), peak)}
        if "gpu" in self.begun:
            taken["gpu"] = MemoryUsage(self.begun["gpu"], *_device_usage())
        return taken

    def _report(self, stage: str) -> dict[str, int]:
        if self.sampler is None:
            return {}
        before, taken = self.init, self._end()
        self._stop()
        self.init = {}
        figures: dict[str, int] = {}
        for name, part in (("init", before), (stage, taken)):
            for kind, bytes_taken in part.items():
                figures |= bytes_taken.figures(name, kind)
        return figures | {f"before_init_mem_{kind}": bytes_taken.begin for kind, bytes_taken in before.items()}

    def _stop(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()
        self.stage = self.sampler = None


class _PeakSampler:
    """A thread that notes the most bytes until it is stopped."""

    def __init__(self, read: Callable[[], int]) -> None:
        self.read = read
        self.most = read()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="fts-memory", daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.over.set()
        self.thread.join()
        return self.most

    def _watch(self) -> None:
        while not self.over.wait(SAMPLING_SECONDS):
            self.most = max(self.most, self.read())
        self.most = max(self.most, self.read())


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
