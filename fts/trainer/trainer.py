"""Trainer: a training run from a model, data and arguments."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn
from torch.utils.data import DataLoader

from fts.errors import ArgumentError
from fts.loops import Source
from fts.randomness import seed_generators
from fts.trainer import saving
from fts.trainer.arguments import TrainingArguments
from fts.trainer.best import check_metric
from fts.trainer.callbacks import CallbackHandler, DefaultFlowCallback, PrinterCallback
from fts.trainer.choices import IntervalStrategy
from fts.trainer.collate import collator_for
from fts.trainer.columns import accepted_columns, label_names_of, without_unused
from fts.trainer.evaluation import (
    EvalLoopOutput,
    PredictionOutput,
    Reading,
    TrainOutput,
    batches_of,
    evaluation_loop,
    speed_metrics,
)
from fts.trainer.following import follow
from fts.trainer.loading import Loading, check_first_row, make_loader, make_source
from fts.trainer.losses import Loss
from fts.trainer.progress import ProgressCallback
from fts.trainer.state import STATE_FILE, TrainerControl, TrainerState
from fts.trainer.training import prepare

logger = logging.getLogger(__name__)


class Trainer:
    """Trains, evaluates and predicts with a model, as Hugging Face's Trainer does.

    Args:
        model: any module called as `model(**batch)` that returns its loss with its outputs: an object or dictionary with `loss`,
            or a tuple that begins with it. It is trained in place.
        args: the settings; the defaults if not given.
        data_collator: makes a batch, a dictionary of tensors, of a list of examples. By default examples are padded by
            `processing_class` if it can pad, else stacked.
        train_dataset: examples that are dictionaries, indexable or iterable.
        eval_dataset: the same, or a dictionary of several by name.
        processing_class: a tokenizer or processor: pads, and is saved with the model.
        model_init: makes the model, instead of `model`; each `train` starts with a new one.
        compute_loss_func: `fn(outputs, labels, num_items_in_batch=...) -> loss`, for models that do not compute their own.
        compute_metrics: `fn(EvalPrediction) -> {name: number}`.
        callbacks: instances or classes; see `TrainerCallback`.
        optimizers: not there yet; use `optim` and `lr_scheduler_type` of the arguments.
        preprocess_logits_for_metrics: `fn(logits, labels) -> logits`, run before predictions are kept.

    Raises:
        ArgumentError: arguments are missing or contradict each other.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = nn.Parameter(torch.zeros(1))
    ...     def forward(self, x, labels):
    ...         return {"loss": (self.w * x - labels).square().mean(), "logits": self.w * x}
    >>> data = [{"x": float(i), "labels": 2.0 * i} for i in range(8)]
    >>> args = TrainingArguments(learning_rate=0.5, save_strategy="no", disable_tqdm=True)
    >>> trainer = Trainer(Net(), args, train_dataset=data)
    >>> trainer.callback_handler.pop_callback(PrinterCallback) is not None
    True
    >>> trainer.train().global_step
    3
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.args = args if args is not None else TrainingArguments()
        _check_arguments(self.args, model, model_init, eval_dataset, optimizers)
        self.is_in_train = False
        self.model_init = model_init
        self.model = self._placed(model if model is not None else self._new_model())
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.processing_class = processing_class
        self.data_collator = data_collator if data_collator is not None else collator_for(processing_class)
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        names = self.args.label_names
        self.label_names: list[str] = label_names_of(self.model) if names is None else list(names)
        if not self.label_names and compute_loss_func is not None:
            self.label_names = ["labels"]
        self.loss = Loss(tuple(self.label_names), compute_loss_func)
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.state = TrainerState()
        self.control = TrainerControl()
        shown = PrinterCallback() if self.args.disable_tqdm else ProgressCallback()
        self.callback_handler = CallbackHandler([DefaultFlowCallback(), *(callbacks or ()), shown])
        self._set_context()
        self.tell("on_init_end")

    # Training, evaluation, prediction

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train as the arguments say.

        Args:
            resume_from_checkpoint: the path of a checkpoint, or True for the newest whole one in `output_dir`. The run then goes
                on as if it had not been interrupted, bit for bit. Arguments that differ from the checkpoint's are warned of:
                they win, but for the seeds, which stay those that the run began with. With another batch size or number of
                micro-batches it goes on at the same row.

        Returns:
            The number of updates, the mean loss and the figures of the run.

        Raises:
            ArgumentError: there is no training set, or no such checkpoint; no evaluation can have `metric_for_best_model`; or
                the checkpoint is at a row where no update of the new sizes begins.
            CheckpointError: the checkpoint is damaged, or of another model or optimizer.
            DataError: the training set cannot be used.
        """
        if self.train_dataset is None:
            raise ArgumentError("Trainer.train needs a training set: Trainer(..., train_dataset=...).")
        if getattr(self.evaluate, "__func__", None) is Trainer.evaluate:  # another one may have any metric
            check_metric(self.args, self.eval_dataset, computes=self.compute_metrics is not None)
        checkpoint = saving.find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if self.model_init is not None:
            self.model = self._placed(self._new_model())
        run = prepare(self, checkpoint)
        self.state, self.control = run.told, TrainerControl()
        self._set_context(train_dataloader=self.get_train_dataloader())
        self.is_in_train = True
        try:
            return follow(self, run)
        finally:
            self.is_in_train = False

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on the evaluation set, or on another one: on every row, also with `dataloader_drop_last`.

        Args:
            eval_dataset: instead of that of the Trainer; a dictionary of several is evaluated one by one.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: is put before the figures' names.

        Returns:
            The figures by name. Data without labels gives no loss, and a warning.

        Raises:
            ArgumentError: there is no evaluation set, or compute_metrics returned something else than numbers by name.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ArgumentError("Trainer.evaluate needs data: Trainer(..., eval_dataset=...), or evaluate(dataset).")
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        keep = self.compute_metrics is not None
        output = self._evaluate_on(dataset, "evaluation", ignore_keys, metric_key_prefix, keep=keep)
        if f"{metric_key_prefix}_loss" not in output.metrics:
            called = ", ".join(self.label_names) or "not named by the model's forward"
            logger.warning(
                "The evaluation set has no labels: there is no %s_loss, and compute_metrics is not called. The labels of %s are "
                "%s; add that column, or name yours by label_names=[...].",
                *(metric_key_prefix, type(self.model).__name__, called),
            )
        self.log(dict(output.metrics))
        self.tell("on_evaluate", metrics=output.metrics)
        return output.metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict every row of a data set, in its order, also with `dataloader_drop_last`.

        Args:
            test_dataset: labels are optional.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: is put before the figures' names.

        Returns:
            Predictions (an array with a row per example, or a tuple of arrays; rows of different sizes are padded with -100),
            labels or None, and figures.
        """
        output = self._evaluate_on(test_dataset, "prediction", ignore_keys, metric_key_prefix, keep=True)
        self.tell("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    # Files

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model, its processing class and the arguments; by default to `output_dir` of the arguments."""
        directory = str(self.args.output_dir) if output_dir is None else output_dir
        saving.save_model(self.model, directory, self.processing_class, self.args)

    def save_state(self) -> None:
        """Write `trainer_state.json` to `output_dir`."""
        directory = Path(str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(directory / STATE_FILE)

    # Callbacks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures to the history, and tell the callbacks; `start_time` is there for overriding methods that expect it."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.tell("on_log", logs=logs)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, given as an instance or a class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, given as an instance or a class, and return it; None if it is not there."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given as an instance or a class."""
        self.callback_handler.remove_callback(callback)

    def tell(self, event: str, **kwargs: Any) -> None:
        """Tell the callbacks of an event; they may ask for something through `control`."""
        self.control = self.callback_handler.call(event, self.args, self.state, self.control, **kwargs)

    # Data

    def train_source(self, seed: int | None = None) -> Source:
        """The batches of training, checked on their first row; a seed of their order replaces that of the arguments."""
        how, dataset = self._loading(self.train_dataset, "training", shuffle=True)
        how = how if seed is None else attrs.evolve(how, seed=seed)
        source = make_source(dataset, how, self.args.device, "training")
        check_first_row(dataset, how.collator, self.model, self.loss, "training")
        return source

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training set as a torch DataLoader."""
        how, dataset = self._loading(self.train_dataset, "training", shuffle=True)
        return make_loader(dataset, how)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation set as a torch DataLoader."""
        how, dataset = self._loading(self.eval_dataset if eval_dataset is None else eval_dataset, "evaluation", shuffle=False)
        return make_loader(dataset, how)

    def _loading(self, dataset: Any, what: str, *, shuffle: bool) -> tuple[Loading, Any]:
        args = self.args
        accepted = accepted_columns(self.model, self.label_names) if args.remove_unused_columns else None
        dataset, collator = without_unused(dataset, self.data_collator, accepted, what)
        how = Loading(
            collator=collator,
            batch_size=args.train_batch_size if shuffle else args.eval_batch_size,
            shuffle=shuffle,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last and shuffle,
            workers=args.dataloader_num_workers,
        )
        return attrs.evolve(how, micro_batches=args.gradient_accumulation_steps) if shuffle else how, dataset

    # Model

    def _evaluate_on(self, dataset: Any, what: str, ignore_keys: list[str] | None, prefix: str, *, keep: bool) -> EvalLoopOutput:
        how, dataset = self._loading(dataset, what, shuffle=False)
        source = make_source(dataset, how, self.args.device, what)
        self._set_context(eval_dataloader=make_loader(dataset, how))
        config = getattr(self.model, "config", None)
        ignored = getattr(config, "keys_to_ignore_at_inference", ()) if ignore_keys is None else ignore_keys
        reading = Reading(
            loss=self.loss,
            label_names=self.label_names,
            ignore_keys=ignored,
            precision="bf16" if self.args.bf16 else None,
            keep=keep,
            preprocess_logits=self.preprocess_logits_for_metrics,
        )
        start = time.perf_counter()
        output = evaluation_loop(
            self.model,
            source,
            reading,
            prefix=prefix,
            compute_metrics=self.compute_metrics,
            on_batch=lambda: self.tell("on_prediction_step"),
        )
        speed = speed_metrics(prefix, start, output.num_samples, batches_of(output.num_samples, how.batch_size))
        return output._replace(metrics=output.metrics | speed)

    def _new_model(self) -> nn.Module:
        assert self.model_init is not None
        seed_generators(self.args.seed, self.args.device)
        return self.model_init()

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.args.device)

    def _set_context(self, **changes: Any) -> None:
        context = {"train_dataloader": None, "eval_dataloader": None} | self.callback_handler.context
        own = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        self.callback_handler.context = context | own | {"lr_scheduler": self.lr_scheduler} | changes


def _check_arguments(args: Any, model: Any, model_init: Any, eval_dataset: Any, optimizers: tuple[Any, Any]) -> None:
    if not isinstance(args, TrainingArguments):
        found = f"{type(args).__module__}.{type(args).__name__}"
        raise ArgumentError(f"Trainer(args=...) must be fts.TrainingArguments, not {found}.")
    if (model is None) == (model_init is None):
        found = "neither" if model is None else "both"
        raise ArgumentError(f"Trainer needs either model or model_init; {found} was given.")
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentError(f"Trainer(model=...) must be a torch.nn.Module, not {type(model).__name__}.")
    if args.eval_strategy != IntervalStrategy.NO and eval_dataset is None:
        raise ArgumentError(f"eval_strategy='{args.eval_strategy}' needs data to evaluate: Trainer(..., eval_dataset=...).")
    if any(part is not None for part in optimizers):
        raise ArgumentError(
            "Trainer(optimizers=...) is not there yet in this version of fts. Choose by optim and lr_scheduler_type in the "
            "arguments, or use the functional core: fts.loops.fit with your own transform."
        )
