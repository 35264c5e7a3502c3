import json
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fts.errors import ArgumentError, CheckpointError
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


def test_figures_that_are_no_numbers_are_printed_too(capsys):
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
def test_a_damaged_file_is_named_and_kept(text, tmp_path):
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


def test_operations_are_those_that_transformers_counts():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.ones(3, 7, dtype=torch.long)}
    wanted = transformers.Trainer.floating_point_ops(SimpleNamespace(model=model), inputs)
    assert reports.floating_point_ops(model, inputs) == wanted > 0
    assert reports.floating_point_ops(model, {"x": torch.ones(2)}) == 0
    assert reports.floating_point_ops(torch.nn.Linear(2, 2), inputs) == 0
    own = SimpleNamespace(floating_point_ops=lambda inputs: 2 * inputs["x"].numel())
    assert reports.floating_point_ops(own, {"x": torch.ones(3)}) == 6


def test_tokens():
    batch = {"input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])}
    mask = batch | {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])}
    count = reports.count_input_tokens
    assert count(batch, "no") == 0
    assert count(mask, "all") == 8
    assert count(mask, "non_padding", pad_token_id=0) == 6
    assert count(batch, "non_padding", pad_token_id=0) == 5
    assert isinstance(count(mask, "non_padding"), torch.Tensor)
    assert count({"pixels": torch.ones(2, 3)}, "all", "pixels") == 6
    with pytest.raises(ArgumentError, match="include_num_input_tokens_seen='some' is unknown"):
        count(batch, "some")


def test_tokens_that_cannot_be_counted_are_warned_of_once(caplog):
    reports._warn_once.cache_clear()
    batch = {"ids": torch.ones(2, 3)}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reports.count_input_tokens(batch, "all") == 0
            assert reports.count_input_tokens(batch, "non_padding", "ids") == 6
    assert [record.getMessage()[:22] for record in caplog.records] == ["Tokens are not counted", "All tokens are counted"]


@pytest.mark.parametrize("mode", ["all", "non_padding"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pad", [None, 0])
def test_tokens_are_those_that_transformers_counts(mode, masked, pad):
    batch = {"input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])}
    if masked:
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    trainer = SimpleNamespace(
        args=SimpleNamespace(include_num_input_tokens_seen=mode, device="cpu"),
        model=SimpleNamespace(main_input_name="input_ids"),
        processing_class=SimpleNamespace(pad_token_id=pad),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        state=transformers.TrainerState(),
    )
    transformers.Trainer._track_num_input_tokens(trainer, batch)
    assert reports.count_input_tokens(batch, mode, "input_ids", pad) == trainer.state.num_input_tokens_seen
