"""The Trainer on Ray Train: two workers of a local Ray cluster train a model on handwritten digits.

    pip install 'ray[train]'
    python examples/ray_train.py       # half a minute on a free machine; most of it is the start of Ray

Ray starts the workers and initializes their process group; the Trainer then uses that group and shards the data. A callback of a
few lines reports metrics and checkpoints to Ray, which stores the checkpoints where all machines can read them, and gives the
last one to workers that it restarts.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.train
import torch
import torch.nn.functional as F
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from fts import Trainer, TrainerCallback, TrainingArguments

NEEDED_ACCURACY = 0.93


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ReportToRay(TrainerCallback):
    """Reports from every worker, since Ray waits for all of them; the checkpoint comes from the main process."""

    def __init__(self):
        self.latest = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.latest |= logs
        ray.train.report({"step": state.global_step, **self.latest})

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoint = ray.train.Checkpoint.from_directory(folder) if state.is_world_process_zero else None
        ray.train.report({"step": state.global_step, **self.latest}, checkpoint=checkpoint)


def load_examples():
    digits = load_digits()
    x, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [{"x": x[index], "labels": labels[index]} for index in order]
    return examples[400:], examples[:400]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_one_worker(settings):
    """The function of each worker: a script for one process, and a callback."""
    train_examples, test_examples = load_examples()
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=32,  # of each worker
        learning_rate=3e-3,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        save_steps=100,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=Digits(),
        args=args,
        train_dataset=train_examples,
        eval_dataset=test_examples,
        compute_metrics=accuracy,
        callbacks=[ReportToRay()],
    )
    last = ray.train.get_checkpoint()  # of workers that Ray has restarted
    if last is None:
        trainer.train()
    else:
        with last.as_directory() as folder:
            trainer.train(resume_from_checkpoint=folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="updates (default 300)")
    parser.add_argument("--output", type=Path, default=Path("runs/ray_train"), help="where checkpoints go")
    options = parser.parse_args()
    output = options.output.absolute()

    ray.init(num_cpus=options.workers, include_dashboard=False)  # an existing cluster: ray.init("auto")
    result = TorchTrainer(
        train_one_worker,
        train_loop_config={"output": str(output / "trainer"), "steps": options.steps},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=False),
        run_config=ray.train.RunConfig(
            name="digits",
            storage_path=str(output / "ray"),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    ).fit()
    ray.shutdown()

    model = Digits()
    with result.checkpoint.as_directory() as folder:
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    _, test_examples = load_examples()
    with torch.no_grad():
        logits = model(torch.stack([row["x"] for row in test_examples]))["logits"]
    right = float((logits.argmax(-1) == torch.stack([row["labels"] for row in test_examples])).float().mean())
    print(f"reported to Ray at step {result.metrics['step']}: accuracy {result.metrics['eval_accuracy']:.1%}")
    print(f"the checkpoint that Ray kept, {result.checkpoint.path}: accuracy {right:.1%}")
    if right < NEEDED_ACCURACY:
        sys.exit(f"An accuracy of at least {NEEDED_ACCURACY:.0%} was expected.")


if __name__ == "__main__":
    main()
