import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fts.errors import CheckpointError
from fts.trainer.reporting import metrics as reports

transformers = pytest.importorskip("transformers")
theirs = transformers.trainer_pt_utils

METRICS = {
    "epoch": 2.0,
    "train_loss": 0.123456789,
    "train_runtime": 3671.987,
    "train_samples_per_second": 12345.678,
    "train_steps": 7,
    "total_flos": float(5 << 31),
    "init_mem_cpu_alloc_delta": 1301 << 20,
    "train_mem_cpu_alloc_delta": -(3 << 20) - 1,
    "eval_name": "validation",
    "eval_good": True,
    "eval_tiny": 1e-9,
    "eval_nan": float("nan"),
    "eval_np": np.float64(0.33333),
}


def test_formats_are_those_of_transformers():
    ours, wanted = reports.metrics_format(METRICS), theirs.metrics_format(METRICS)
    assert {name: str(value) for name, value in ours.items()} == {name: str(value) for name, value in wanted.items()}
    assert METRICS["train_loss"] == 0.123456789


def test_tables_are_those_of_transformers(capsys):
    reports.log_metrics("train", METRICS)
    ours = capsys.readouterr().out
    theirs.log_metrics(SimpleNamespace(is_world_process_zero=lambda: True), "train", METRICS)
    assert ours == capsys.readouterr().out


def test_metrics_that_are_no_numbers_are_printed_too(capsys):
    reports.log_metrics("eval", {"eval_matrix": [[1, 2], [3, 4]], "eval_mem_note": None})
    assert "  eval_matrix   = [[1, 2], [3, 4]]" in capsys.readouterr().out
    reports.log_metrics("eval", {})
    assert capsys.readouterr().out == "***** eval metrics *****\n"


def test_files_are_those_of_transformers(tmp_path):
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(tmp_path / "theirs")))
    (tmp_path / "theirs").mkdir()
    for split, metrics in (("train", {"loss": 0.5, "epoch": 1.0}), ("eval", {"eval_loss": 0.25, "epoch": 2.0})):
        theirs.save_metrics(trainer, split, metrics)
        reports.save_metrics(tmp_path / "ours", split, metrics)
    theirs.save_metrics(trainer, "test", {"f1": 1}, combined=False)
    reports.save_metrics(tmp_path / "ours", "test", {"f1": 1}, combined=False)
    names = ["all_results.json", "eval_results.json", "test_results.json", "train_results.json"]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_numbers_of_other_libraries_are_written(tmp_path):
    reports.save_metrics(tmp_path, "eval", {"a": np.float32(0.5), "b": torch.tensor(2)})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"a": 0.5, "b": 2}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_corrupt_file_is_named_and_kept(text, tmp_path):
    (tmp_path / "all_results.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"all_results\.json cannot be read: .*Delete it, or use combined=False"):
        reports.save_metrics(tmp_path, "eval", {"eval_loss": 1.0})
    assert (tmp_path / "all_results.json").read_text() == text
    reports.save_metrics(tmp_path, "eval", {"eval_loss": 1.0}, combined=False)


def test_speed(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 12.0)
    monkeypatch.setattr(time, "time", lambda: 12.0)
    wanted = transformers.trainer_utils.speed_metrics("train", 8.0, 10, 3, 1000)
    assert reports.speed_metrics("train", 8.0, 10, 3, 1000) == wanted
    assert wanted["train_tokens_per_second"] == 250
    assert reports.speed_metrics("eval", 8.0, num_tokens=8) == {"eval_runtime": 4.0, "eval_tokens_per_second": 2.0}
