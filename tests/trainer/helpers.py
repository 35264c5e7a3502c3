"""Small models and data for the tests of the facade."""

import torch
from torch import nn

from fts.trainer import Trainer, TrainingArguments


class Regression(nn.Module):
    """A small network with dropout and BatchNorm that returns a dictionary."""

    def __init__(self, features: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)

    def forward(self, x, labels=None):
        logits = self.head(self.dropout(self.norm(self.hidden(x).relu()))).squeeze(-1)
        loss = None if labels is None else nn.functional.mse_loss(logits, labels)
        return {"loss": loss, "logits": logits}


class Linear(nn.Module):
    """A model with neither dropout nor BatchNorm."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x, labels=None):
        logits = x @ self.w
        return {"loss": None if labels is None else (logits - labels).square().mean(), "logits": logits}


def make_examples(count: int, features: int = 4, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    return [{"x": row, "labels": row.sum().item()} for row in x]


def arguments(tmp_path, **changes) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=tmp_path, use_cpu=True, **(settings | changes))


def make_trainer(tmp_path, model=None, count: int = 22, **changes) -> Trainer:
    own = {name: changes.pop(name) for name in list(changes) if name not in TrainingArguments.__dataclass_fields__}
    if model is None and "model_init" not in own:
        torch.manual_seed(0)
        model = Regression()
    own.setdefault("train_dataset", make_examples(count))
    own.setdefault("eval_dataset", make_examples(10, seed=1))
    return Trainer(model, arguments(tmp_path, **changes), **own)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
