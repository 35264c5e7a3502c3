"""Runs of the Trainer that resume in other processes, for test_checkpoints: `torchrun run_resume.py RESULTS JOBS`.

JOBS is a JSON list of `{"name", "out", "strategy", "resume", ...}`: each is a run, one after the other in the same processes.
With "full disk" the main process has no disk space for a checkpoint; on the ranks in "callback" a callback raises after six
updates.
"""

import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from fts.dtensors import full_tensor
from fts.errors import FtsError
from fts.trainer import Trainer, TrainerCallback, TrainingArguments
from tests.trainer.helpers import make_examples

EXAMPLES, STEPS = 8, 12
"""Examples of an update, in micro-batches of 2; updates of a run."""

STRATEGIES = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
    "fsdp-sharded": {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
}


class Net(nn.Module):
    """A small network with dropout, in float64."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 9)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(9, 1)
        self.double()

    def forward(self, x, labels=None):
        logits = self.head(self.dropout(self.hidden(x.double()).relu())).squeeze(-1)
        loss = None if labels is None else (logits - labels).square().mean()
        return {"loss": loss, "logits": logits}


def trainer_of(out, strategy, **more):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": EXAMPLES // 2 // processes,
        "max_steps": STEPS,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        **STRATEGIES[strategy],
    }
    torch.manual_seed(5)
    return Trainer(
        model=Net(),
        args=TrainingArguments(**(options | more)),
        train_dataset=make_examples(40),
        eval_dataset=make_examples(12, seed=1),
    )


def metrics_of(trainer):
    """Losses by step, and the weights at the end, as exact text."""
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    weights = {name: full_tensor(tensor.detach()).tolist() for name, tensor in trainer.model.named_parameters()}
    return {"losses": losses, "weights": weights}


class Raising(TrainerCallback):
    """Raises after six updates."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ValueError("enough")


def is_full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def run(job):
    rank = int(os.environ.get("RANK", "0"))
    trainer = trainer_of(job["out"], job["strategy"], **job.get("args", {}))
    if rank in job.get("callback", ()):
        trainer.add_callback(Raising())
    with patch("fts.loops.async_checkpointer.write_direct", is_full) if rank == 0 and job.get("full disk") else nullcontext():
        try:
            trainer.train(resume_from_checkpoint=job.get("resume"))
        except FtsError as error:
            return {
                "error": [type(error).__name__, str(error), *getattr(error, "__notes__", [])],
                "step": trainer.state.global_step,
            }
    if "model" in job:
        trainer.save_model(job["model"])
    return metrics_of(trainer)


def main():
    results, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {job["name"]: run(job) for job in jobs}
    (results / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
