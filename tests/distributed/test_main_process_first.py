"""The main process runs first, and the other ranks get its error."""

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch

from fts.distributed.main_process_first import main_process_first
from fts.errors import DistributedError
from fts.trainer.arguments import TrainingArguments


def work(rank, folder, case):
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    # the time limit is shorter than the work
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
    args = TrainingArguments(use_cpu=True)
    path = os.path.join(folder, "done")
    with main_process_first(rank == 1, "going the other way round"):
        pass
    if case == "fails" and rank == 1:
        with (
            pytest.raises(DistributedError, match=r"'tokenizing' first failed.*OSError: disk full"),
            args.main_process_first(desc="tokenizing"),
        ):
            raise AssertionError("must not run")
    elif case == "fails":
        with pytest.raises(OSError, match="disk full"), args.main_process_first(desc="tokenizing"):
            raise OSError("disk full")
    else:
        with args.main_process_first(local=case == "local", desc="tokenizing"):
            if rank == 0:
                time.sleep(2.5)
                with open(path, "w") as file:
                    file.write("x")
            assert os.path.exists(path)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", ["local", "global", "fails"])
def test_the_main_process_goes_first_for_as_long_as_it_takes_also_where_it_fails(tmp_path, case):
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(rank, str(tmp_path), case)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_single_process_does_not_wait():
    with main_process_first(False, "work"):
        pass
