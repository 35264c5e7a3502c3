"""Methods that set all arguments of one theme at once, those not given to their defaults. Each returns the arguments.

Their parameters are those of transformers' methods.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fts.errors import ArgumentError
from fts.trainer.arguments.enums import HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType

Self = TypeVar("Self")


def set_training(
    self: Self,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    weight_decay: float = 0,
    num_epochs: float = 3,
    max_steps: int = -1,
    gradient_accumulation_steps: int = 1,
    seed: int = 42,
    activation_checkpointing: bool = False,
    gradient_checkpointing: bool | None = None,
) -> Self:
    """Set the arguments of training, and `do_train`.

    Args:
        self: the arguments; changed in place.
        learning_rate: the highest learning rate.
        batch_size: examples in a micro-batch on each device.
        weight_decay: weight decay of all parameters but biases and normalisation weights.
        num_epochs: how many passes over the data.
        max_steps: if positive, it ends training instead.
        gradient_accumulation_steps: micro-batches in an update.
        seed: the seed of everything random.
        activation_checkpointing: recompute activations, to save memory.
        gradient_checkpointing: another name of `activation_checkpointing`.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_training(learning_rate=1e-4, batch_size=32).per_device_train_batch_size
    32
    """
    recompute = activation_checkpointing if gradient_checkpointing is None else gradient_checkpointing
    return _set(
        self,
        do_train=True,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        weight_decay=weight_decay,
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
        activation_checkpointing=recompute,
    )


def set_evaluate(
    self: Self,
    strategy: str | IntervalStrategy = "no",
    steps: int = 500,
    batch_size: int = 8,
    accumulation_steps: int | None = None,
    delay: float | None = None,
    loss_only: bool = False,
) -> Self:
    """Set the arguments of evaluation; `do_eval` follows.

    Args:
        self: the arguments; changed in place.
        strategy: "no", "steps" or "epoch".
        steps: updates between two evaluations.
        batch_size: examples in a batch on each device.
        accumulation_steps: batches after which predictions leave the device.
        delay: updates or epochs before the first evaluation.
        loss_only: keep no predictions.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_evaluate(strategy="steps", steps=100).eval_steps
    100
    """
    _check_interval(strategy, steps)
    return _set(
        self,
        eval_strategy=strategy,
        do_eval=strategy != IntervalStrategy.NO,
        eval_steps=steps,
        per_device_eval_batch_size=batch_size,
        eval_accumulation_steps=accumulation_steps,
        eval_delay=delay,
        prediction_loss_only=loss_only,
    )


def set_testing(self: Self, batch_size: int = 8, loss_only: bool = False) -> Self:
    """Set the arguments of prediction, and `do_predict`.

    Args:
        self: the arguments; changed in place.
        batch_size: examples in a batch on each device.
        loss_only: keep no predictions.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_testing(batch_size=32).per_device_eval_batch_size
    32
    """
    return _set(self, do_predict=True, per_device_eval_batch_size=batch_size, prediction_loss_only=loss_only)


def set_save(
    self: Self,
    strategy: str | SaveStrategy | IntervalStrategy = "steps",
    steps: int = 500,
    total_limit: int | None = None,
    on_each_node: bool = False,
) -> Self:
    """Set when checkpoints are written.

    Args:
        self: the arguments; changed in place.
        strategy: "no", "steps", "epoch" or "best".
        steps: updates between two checkpoints.
        total_limit: how many are kept.
        on_each_node: on each machine, not only in the main process.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_save(strategy="steps", steps=100).save_steps
    100
    """
    _check_interval(strategy, steps)
    return _set(self, save_strategy=strategy, save_steps=steps, save_total_limit=total_limit, save_on_each_node=on_each_node)


def set_logging(
    self: Self,
    strategy: str | IntervalStrategy = "steps",
    steps: int = 500,
    report_to: str | list[str] = "none",
    level: str = "passive",
    first_step: bool = False,
    nan_inf_filter: bool = False,
    on_each_node: bool = False,
    replica_level: str = "passive",
) -> Self:
    """Set when, what and where is logged.

    Args:
        self: the arguments; changed in place.
        strategy: "no", "steps" or "epoch".
        steps: updates between two logs.
        report_to: names of trackers.
        level: the level of fts' loggers.
        first_step: log the first update, too.
        nan_inf_filter: leave losses that are not finite out of the mean.
        on_each_node: on each machine, not only in the main process.
        replica_level: the level in processes that do not log.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_logging(strategy="steps", steps=100).logging_steps
    100
    """
    _check_interval(strategy, steps)
    return _set(
        self,
        logging_strategy=strategy,
        logging_steps=steps,
        report_to=report_to,
        log_level=level,
        logging_first_step=first_step,
        logging_nan_inf_filter=nan_inf_filter,
        log_on_each_node=on_each_node,
        log_level_replica=replica_level,
    )


def set_push_to_hub(
    self: Self,
    model_id: str,
    strategy: str | HubStrategy = "every_save",
    token: str | None = None,
    private_repo: bool | None = None,
    always_push: bool = False,
    revision: str | None = None,
) -> Self:
    """Set what is uploaded to the Hub, and `push_to_hub`.

    Args:
        self: the arguments; changed in place.
        model_id: the repository's name.
        strategy: what is uploaded, and when.
        token: the token to upload with.
        private_repo: whether a new repository is private.
        always_push: upload also while the upload before is running.
        revision: the branch to upload to.
    """
    return _set(
        self,
        push_to_hub=True,
        hub_model_id=model_id,
        hub_strategy=strategy,
        hub_token=token,
        hub_private_repo=private_repo,
        hub_always_push=always_push,
        hub_revision=revision,
    )


def set_optimizer(
    self: Self,
    name: str | OptimizerNames = "adamw_torch",
    learning_rate: float = 5e-5,
    weight_decay: float = 0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    args: str | None = None,
) -> Self:
    """Set the optimizer and its settings.

    Args:
        self: the arguments; changed in place.
        name: the optimizer.
        learning_rate: the highest learning rate.
        weight_decay: weight decay of all parameters but biases and normalisation weights.
        beta1: decay of Adam's running mean of gradients.
        beta2: decay of Adam's running mean of squared gradients.
        epsilon: Adam's epsilon.
        args: more settings: "name=value,name=value".

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_optimizer(name="adamw_torch", beta1=0.8).adam_beta1
    0.8
    """
    return _set(
        self,
        optim=name,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=epsilon,
        optim_args=args,
    )


def set_lr_scheduler(
    self: Self,
    name: str | SchedulerType = "linear",
    num_epochs: float = 3.0,
    max_steps: int = -1,
    warmup_steps: float = 0,
) -> Self:
    """Set how the learning rate moves, and how long.

    Args:
        self: the arguments; changed in place.
        name: the schedule.
        num_epochs: how many passes over the data.
        max_steps: if positive, it ends training instead.
        warmup_steps: updates of warm-up; below 1: a share of all updates.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_lr_scheduler(name="cosine", warmup_steps=0.05).warmup_steps
    0.05
    """
    return _set(self, lr_scheduler_type=name, num_train_epochs=num_epochs, max_steps=max_steps, warmup_steps=warmup_steps)


def set_dataloader(
    self: Self,
    train_batch_size: int = 8,
    eval_batch_size: int = 8,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    multiprocessing_context: str | None = None,
    in_order: bool = True,
    auto_find_batch_size: bool = False,
    ignore_data_skip: bool = False,
    sampler_seed: int | None = None,
) -> Self:
    """Set how data is loaded.

    Args:
        self: the arguments; changed in place.
        train_batch_size: examples in a micro-batch on each device.
        eval_batch_size: examples in a batch of evaluation on each device.
        drop_last: leave out a last batch that is not full.
        num_workers: worker processes that fetch data.
        pin_memory: fetch into memory from which a GPU copies faster.
        persistent_workers: keep the workers between epochs.
        prefetch_factor: batches that each worker fetches ahead.
        multiprocessing_context: how workers are started: "fork", "spawn" or "forkserver".
        in_order: whether batches come in order.
        auto_find_batch_size: if memory runs out, start again with smaller micro-batches.
        ignore_data_skip: a resumed run starts its epoch again.
        sampler_seed: the seed of the order of the data.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> TrainingArguments().set_dataloader(train_batch_size=16, eval_batch_size=64).per_device_train_batch_size
    16
    """
    return _set(
        self,
        per_device_train_batch_size=train_batch_size,
        per_device_eval_batch_size=eval_batch_size,
        dataloader_drop_last=drop_last,
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=pin_memory,
        dataloader_persistent_workers=persistent_workers,
        dataloader_prefetch_factor=prefetch_factor,
        dataloader_multiprocessing_context=multiprocessing_context,
        dataloader_in_order=in_order,
        auto_find_batch_size=auto_find_batch_size,
        ignore_data_skip=ignore_data_skip,
        data_seed=sampler_seed,
    )


def _set(args: Self, **values: Any) -> Self:
    for name, value in values.items():
        setattr(args, name, value)
    return args


def _check_interval(strategy: Any, steps: float) -> None:
    if strategy == IntervalStrategy.STEPS and steps == 0:
        raise ArgumentError(f"steps={steps} with strategy='steps': it must be above 0. Use strategy='no' for never.")
