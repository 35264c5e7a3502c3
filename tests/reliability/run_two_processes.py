"""A run of two processes, one of which is killed: `torchrun --max-restarts 3 run_two_processes.py RESULTS OUT`.

The first attempt ends in a step, the second while shards of a checkpoint are written, the third while its manifest is
written, and the fourth runs to the end.
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
from tests.distributed.run_resume import metrics_of, trainer_of

ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
RANK = int(os.environ.get("RANK", "0"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class InStep(TrainerCallback):
    """Ends the second process while the first computes its gradients of the sixth update."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and RANK == 1:
            die()


def in_save():
    """End the second process while it writes its shards of the second checkpoint."""
    write = hf_storage.HuggingFaceStorageWriter.write_data

    def killed_before(self, plan, planner):
        if "checkpoint-8" in str(self.path) and RANK == 1:
            die()
        return write(self, plan, planner)

    hf_storage.HuggingFaceStorageWriter.write_data = killed_before


def in_manifest():
    """End the first process when the shards of the second checkpoint are written, before it is renamed."""

    def killed_before(directory, written=None):
        if "checkpoint-8" in directory.name:
            die()
        return write_manifest(directory, written)

    write_manifest, atomic.write_manifest = atomic.write_manifest, killed_before


def main():
    results, out, dies = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "dies"
    trainer = trainer_of(out, "fsdp-sharded")
    if dies and ATTEMPT == 0:
        trainer.add_callback(InStep())
    if dies and ATTEMPT == 1:
        in_save()
    if dies and ATTEMPT == 2:
        in_manifest()
    start = time.time()
    try:
        trainer.train()
    except BaseException as error:
        reported = {"type": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
        (results / f"attempt-{ATTEMPT}-{RANK}").write_text(json.dumps(reported | {"seconds": time.time() - start}))
        raise
    (results / f"{RANK}.json").write_text(json.dumps(metrics_of(trainer)))


if __name__ == "__main__":
    main()
