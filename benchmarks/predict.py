"""Memory and time of `predict`, against a loop that allocates its result once; each run in a process of its own.

    python benchmarks/predict.py [--examples 2000] [--width 30000] [--repeats 5] [--threads 2] [--only hand "fts Trainer"]

The result is `examples` x `width` float32 logits (229 MiB). Memory is the peak resident set of the run minus that before it, when
the model, the data and the libraries are loaded and a few examples are predicted, as a multiple of the result's size. Time is a
ratio to the hand-written loop of the same round; all read the examples through a DataLoader. Targets: at most 1.2 and 1.3.
"transformers" is its Trainer, if installed. The last lines are the memory of `batch_eval_metrics`, which must not grow with
the number of examples.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

FEATURES, BATCH, FEW = 16, 8, 24
MIB = 2**20


class Wide(nn.Module):
    """A layer with many outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, width)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


Examples = list[dict[str, Any]]


def hand_written(model: nn.Module, examples: Examples) -> np.ndarray:
    model.eval()
    result, start = np.empty((len(examples), model.layer.out_features), np.float32), 0
    with torch.no_grad():
        for batch in DataLoader(examples, BATCH):
            logits = model(**batch)["logits"]
            result[start : start + len(logits)] = logits.numpy()
            start += len(logits)
    return result


def fts_functions(model: nn.Module, examples: Examples) -> np.ndarray:
    from fts.trainer.evaluation import EvaluationConfig, PredictionConfig, predict_batch, run_evaluation
    from fts.trainer.model import evaluation_mode

    def predict(inputs: Any) -> Any:
        return predict_batch(model, inputs, PredictionConfig(lambda model, inputs: (None, None), ["labels"]))

    with evaluation_mode(model):
        output = run_evaluation(predict, DataLoader(examples, BATCH), config=EvaluationConfig())
    return output.predictions


def fts_trainer(model: nn.Module, examples: Examples) -> np.ndarray:
    import fts

    return _predict(fts, model, examples)


def transformers_trainer(model: nn.Module, examples: Examples) -> np.ndarray:
    import transformers

    return _predict(transformers, model, examples)


def _predict(library: Any, model: nn.Module, examples: Examples) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = library.TrainingArguments(
            folder, per_device_eval_batch_size=BATCH, use_cpu=True, disable_tqdm=True, report_to="none"
        )
        return library.Trainer(model, args).predict(examples).predictions


def by_batch(model: nn.Module, examples: Examples) -> float:
    """Metrics batch by batch: only the sum for the accuracy is kept."""
    import fts

    right = [0]

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        right[0] += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        return {"accuracy": right[0] / len(examples)} if compute_result else {}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = fts.TrainingArguments(
            folder, per_device_eval_batch_size=BATCH, use_cpu=True, disable_tqdm=True, report_to="none", batch_eval_metrics=True
        )
        trainer = fts.Trainer(model, args, compute_metrics=compute_metrics)
        return trainer.evaluate([example | {"labels": 0} for example in examples])["eval_accuracy"]


CANDIDATES: dict[str, Callable[[nn.Module, Examples], np.ndarray]] = {
    "hand": hand_written,
    "fts functions": fts_functions,
    "fts Trainer": fts_trainer,
    "transformers": transformers_trainer,
}


def peak() -> int:
    """The highest resident set in bytes, since `reset_peak` if the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def measure(run: Callable[..., Any], num_examples: int, width: int) -> dict[str, float]:
    """In this process: seconds and bytes of one run, after one on a few examples."""
    torch.manual_seed(0)
    model, data = Wide(width), [{"x": row} for row in torch.randn(num_examples, FEATURES)]
    run(model, data[:FEW])
    gc.collect()
    reset_peak()
    before, started = peak(), time.perf_counter()
    result = run(model, data)
    seconds, used = time.perf_counter() - started, peak() - before
    if isinstance(result, np.ndarray):
        with torch.no_grad():
            np.testing.assert_allclose(result[-1], model(data[-1]["x"])["logits"].numpy(), rtol=1e-4, atol=1e-5)
        assert result.shape == (num_examples, width)
    return {"seconds": seconds, "bytes": used}


def in_own_process(name: str, num_examples: int, width: int, threads: int) -> dict[str, float]:
    sizes = ["--examples", str(num_examples), "--width", str(width), "--threads", str(threads)]
    command = [sys.executable, __file__, "--one", name, *sizes]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", dest="num_examples", type=int, default=2000)
    parser.add_argument("--width", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        run = by_batch if options.one == "by batch" else CANDIDATES[options.one]
        print(json.dumps(measure(run, options.num_examples, options.width)))
        return
    names = list(dict.fromkeys(["hand", *options.only]))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for index in range(options.repeats):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(in_own_process(name, options.num_examples, options.width, options.threads))
    size = options.num_examples * options.width * 4
    print(f"{options.num_examples} examples x {options.width} float32 logits ({size / MIB:.0f} MiB), {options.repeats} rounds")
    print(f"{'':<16}{'seconds':>10}{'ratio':>8}{'min':>8}{'max':>8}{'memory':>10}")
    for name in names:
        ratios = [own["seconds"] / base["seconds"] for own, base in zip(found[name], found["hand"], strict=True)]
        seconds = statistics.median(run["seconds"] for run in found[name])
        memory = statistics.median(run["bytes"] for run in found[name]) / size
        columns = f"{statistics.median(ratios):>8.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}"
        print(f"{name:<16}{seconds:>10.3f}{columns}{memory:>10.2f}")
    for num_examples in (500, 4000):
        # the minimum: pages that the system had reclaimed before are counted again when the run uses them
        used = min(in_own_process("by batch", num_examples, options.width, options.threads)["bytes"] for _ in range(3))
        print(f"batch_eval_metrics, {num_examples} examples: {used / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
