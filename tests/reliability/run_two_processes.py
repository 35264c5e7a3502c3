"""A run of two processes, one of which is killed, for test_process_failures: `torchrun --max-restarts 3 run_two_processes.py RESULTS OUT`.

The first life ends in a step, the second while parts of a checkpoint are written, the third while it is sealed, and the fourth
as the run is planned.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from torch.distributed.checkpoint import hf_storage

from fts.storage import atomic
from fts.trainer import TrainerCallback
from tests.distributed.run_resume import (figures_of, trainer_of)

LIFE = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
RANK = int(os.environ.get("RANK", "0"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class InStep(TrainerCallback):
    """Ends the second process while the first computes its gradients of the sixth update."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and RANK == 1:
            die()


def in_save():
    """End the second process while it writes its parts of the second checkpoint."""
    write = hf_storage.HuggingFaceStorageWriter.write_data

    def cut_off(self, plan, planner):
        if "checkpoint-8" in str(self.path) and RANK == 1:
            die()
        return write(self, plan, planner)

    hf_storage.HuggingFaceStorageWriter.write_data = cut_off


def in_sealing():
    """End the first process when the parts of the second checkpoint are there, and it is not in its place."""

    def cut_off(directory, written=None):
        if "checkpoint-8" in directory.name:
            die()
        return seal(directory, written)

    seal, atomic.write_manifest = atomic.write_manifest, cut_off


def main():
    results, out, dies = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "dies"
    trainer = trainer_of(out, "fsdp-sharded")
    if dies and LIFE == 0:
        trainer.add_callback(InStep())
    if dies and LIFE == 1:
        in_save()
    if dies and LIFE == 2:
        in_sealing()
    start = time.time()
    try:
        trainer.train()
    except BaseException as error:
        told = {"type": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
        (results / f"life-{LIFE}-{RANK}").write_text(json.dumps(told | {"seconds": time.time() - start}))
        raise
    (results / f"{RANK}.json").write_text(json.dumps(figures_of(trainer)))


if __name__ == "__main__":
    main()
