"""What a model card reads of a run: settings, model, data and logs."""

from __future__ import annotations

from typing import Any, Protocol

import attrs
from torch import nn

from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import TrainerState


class SummarizedTrainer(Protocol):
    """What a summary reads of a trainer."""

    args: TrainingArguments
    model: nn.Module
    state: TrainerState
    train_dataset: Any
    eval_dataset: Any
    step: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    _given_optimizers: tuple[Any, Any]
    _train_batch_size: int

    def get_total_train_batch_size(self, args: TrainingArguments) -> int: ...


@attrs.frozen
class TrainingSummary:
    """A run, as its model card describes it.

    Attributes:
        args: of the run.
        model: as it is now.
        state: has the logs.
        dataset: that was evaluated, or else trained on.
        train_batch_size: examples of a micro-batch, on all devices of a process.
        total_train_batch_size: examples of an update.
        optimizer: its description.
    """

    args: TrainingArguments
    model: nn.Module
    state: TrainerState
    dataset: Any
    train_batch_size: int
    total_train_batch_size: int
    optimizer: str

    @classmethod
    def from_trainer(cls, trainer: SummarizedTrainer) -> TrainingSummary:
        """The summary of a trainer's run."""
        return cls(
            args=trainer.args,
            model=trainer.model,
            state=trainer.state,
            dataset=trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset,
            train_batch_size=trainer._train_batch_size,
            total_train_batch_size=trainer.get_total_train_batch_size(trainer.args),
            optimizer=_describe_optimizer(trainer),
        )


def hyperparameters(summary: TrainingSummary) -> dict[str, Any]:
    """The settings that are needed to train the model again."""
    args: Any = summary.args
    size, total = summary.train_batch_size, summary.total_train_batch_size
    values = {
        "learning_rate": args.learning_rate,
        "train_batch_size": size,
        "eval_batch_size": args.eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps if args.gradient_accumulation_steps > 1 else None,
        "total_train_batch_size": total if total != size else None,
        "num_devices": args.world_size if args.world_size > 1 else None,
        "seed": args.seed,
        "optimizer": summary.optimizer,
        "weight_decay": args.weight_decay or None,
        "max_grad_norm": args.max_grad_norm,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps or None,
        "training_steps" if args.max_steps > 0 else "num_epochs": args.max_steps if args.max_steps > 0 else args.num_train_epochs,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "label_smoothing_factor": args.label_smoothing_factor or None,
        "neftune_noise_alpha": args.neftune_noise_alpha,
    }
    return {name: getattr(value, "value", value) for name, value in values.items() if value is not None}


def _describe_optimizer(trainer: SummarizedTrainer) -> str:
    args: Any = trainer.args
    given = trainer._given_optimizers[0] or (trainer.optimizer_cls_and_kwargs or (None,))[0]
    if trainer.step is not None:
        return "given as Trainer(step=...)"
    if given is not None:
        return str((given if isinstance(given, type) else type(given)).__name__)
    options = [f"betas {args.adam_beta1}, {args.adam_beta2}", f"epsilon {args.adam_epsilon}"] if "adam" in str(args.optim) else []
    options += [args.optim_args] if args.optim_args else []
    return f"{args.optim} ({'; '.join(options)})" if options else str(args.optim)
