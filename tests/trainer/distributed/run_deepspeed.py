"""Runs under DeepSpeed and under DDP, in each of several processes: `python run_deepspeed.py folder place-of-the-package`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from fts import Trainer, TrainerCallback, TrainingArguments, distributed
from fts.errors import ArgumentError

FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss")
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}}
CASES = {
    "ddp": None,
    **{f"stage {stage}": {"zero_optimization": {"stage": stage}, "train_batch_size": "auto"} for stage in range(4)},
    "own optimizer": {"zero_optimization": {"stage": 2}, "optimizer": ADAMW},
    "bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x, labels):
        logits = self.last(torch.tanh(self.norm(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Notes(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append({name: value for name, value in logs.items() if name in FIGURES})


def run(folder, config, **values):
    torch.manual_seed(3)
    made = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(6, generator=made), "labels": torch.tensor(i % 3)} for i in range(22)]  # the last batches are short
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_grad_norm": 0.3}
    settings |= {"learning_rate": 0.02, "weight_decay": 0.1, "warmup_steps": 2, "logging_steps": 1}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    args = TrainingArguments(str(folder), **settings, disable_tqdm=True, report_to="none", deepspeed=config, **values)
    notes = Notes()
    trainer = Trainer(Net(), args, train_dataset=data, eval_dataset=data[:5], callbacks=[notes])
    described, trained = trainer.describe(), trainer.get_num_trainable_parameters()
    trainer.train()
    trainer.save_model(str(folder / "last"))
    logits = trainer.predict(data[:5]).predictions
    trainer.world.barrier()
    weights = load_file(folder / "last" / "model.safetensors")
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    with torch.no_grad():
        again = Net()
        again.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        batch = {name: torch.stack([row[name] for row in data[:5]]) for name in data[0]}
        expected = again(**batch)["logits"]
    return {
        "seen": list(notes.seen),
        "weights": {name: tensor.float().tolist() for name, tensor in weights.items()},
        "best": {name: tensor.float().tolist() for name, tensor in best.items()},
        "files": sorted(path.name for path in (folder / "checkpoint-3").iterdir()),
        "described": described,
        "sizes": [trained, trainer.get_num_trainable_parameters()],
        "wrapped": type(trainer.model_wrapped).__name__,
        "predicted": (torch.as_tensor(logits) - expected).abs().max().item(),
        "resumed": resumed(trainer),
    }


def resumed(trainer):
    try:
        trainer.args.num_train_epochs = 3
        trainer.train(resume_from_checkpoint=True)
    except ArgumentError as error:
        return str(error)
    return "yes"


def main(folder, place):
    sys.path.append(place)
    found = {name: run(folder / name, config, bf16=name == "bf16") for name, config in CASES.items()}
    group = distributed.init_process_group()
    (folder / f"{group.rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
