"""Which process and device this is, and who goes first."""

import logging
import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch

from fts.trainer.arguments import TrainingArguments, processes


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
def test_the_first_process_of_the_second_machine(settings, log, save, monkeypatch):
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


def work(rank, folder, fails):
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    path = os.path.join(folder, "done")
    try:
        with processes.first(processes.process_index() == 0, "writing"):
            if rank == 0:
                time.sleep(0.5)
                with open(path, "w") as file:
                    file.write("x")
                assert not fails
            else:
                assert os.path.exists(path)
    except AssertionError:
        if not (fails and rank == 0):
            raise
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_the_main_process_goes_first_also_where_it_fails(tmp_path, fails):
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(rank, str(tmp_path), fails)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
