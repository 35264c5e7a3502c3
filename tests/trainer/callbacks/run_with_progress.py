"""A run that shows its progress, and one that resumes from its checkpoint. Called as `run_with_progress.py DIRECTORY`."""

import sys
import time
from pathlib import Path

from fts.trainer import TrainerCallback
from tests.trainer.helpers import make_trainer


class Slow(TrainerCallback):
    """Steps that people can watch."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.03)

    def on_prediction_step(self, args, state, control, **kwargs):
        time.sleep(0.15)


def main(root):
    settings = {"logging_steps": 10, "eval_strategy": "steps", "eval_steps": 15, "save_strategy": "steps", "save_steps": 20}
    settings |= {"disable_tqdm": False, "callbacks": [Slow], "log_level": "error"}
    make_trainer(root, max_steps=40, **settings).train()
    make_trainer(root, max_steps=60, **settings).train(resume_from_checkpoint=str(Path(root) / "checkpoint-40"))


if __name__ == "__main__":
    main(sys.argv[1])
