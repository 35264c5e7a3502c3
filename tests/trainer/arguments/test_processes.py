"""The rank and the device of this process, and the main process first."""

import logging
from datetime import timedelta

import pytest
import torch

from fts.trainer.arguments import TrainingArguments


def test_one_process():
    args = TrainingArguments(use_cpu=True, ddp_timeout=60)
    assert (args.world_size, args.process_index, args.local_process_index, args.n_gpu) == (1, 0, 0, 0)
    assert (args.device, args.parallel_mode, args.should_log, args.should_save) == (
        torch.device("cpu"),
        "not_parallel",
        True,
        True,
    )
    assert args.ddp_timeout_delta == timedelta(seconds=60)
    with args.main_process_first(desc="work"):
        pass


@pytest.mark.parametrize(
    ("settings", "log", "save"),
    [({}, True, False), ({"log_on_each_node": False}, False, False), ({"save_on_each_node": True}, True, True)],
)
def test_the_main_process_of_the_second_machine(settings, log, save, monkeypatch):
    args = TrainingArguments(**settings)
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (args.world_size, args.process_index, args.local_process_index) == (4, 2, 0)
    assert (args.should_log, args.should_save, args.parallel_mode) == (log, save, "distributed")


def test_a_rank_without_a_launcher_means_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert TrainingArguments().world_size == 1


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    args = TrainingArguments()
    assert (args.device, args.n_gpu, args.train_batch_size) == (torch.device("cuda:1"), 1, 8)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert args.device == torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert args.device == torch.device("mps")


def test_precision_may_come_from_the_launcher(monkeypatch):
    assert TrainingArguments().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingArguments().mixed_precision == "bf16"
    assert TrainingArguments(fp16=True).mixed_precision == "fp16"


def test_log_levels(monkeypatch):
    monkeypatch.setattr(logging.getLogger("fts"), "level", logging.ERROR)
    assert TrainingArguments().get_process_log_level() == logging.ERROR
    args = TrainingArguments(log_level="info", log_level_replica="critical")
    assert args.get_process_log_level() == logging.INFO
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert args.get_process_log_level() == logging.CRITICAL
    assert TrainingArguments().disable_tqdm is True
