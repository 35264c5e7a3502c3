"""Trainer: a training run from a model, data and arguments."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fts import steps
from fts.distributed import DeepSpeed
from fts.distributed.error_propagation import fail_together
from fts.distributed.object_collectives import AllGatherObject
from fts.distributed.rank_monitor import RankMonitor
from fts.errors import ArgumentError
from fts.loops import (ReplayedStep, Source, StopRequest)
from fts.loops.device_placement import send_to_device
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.randomness import seed_generators
from fts.steps.precision import autocast, autocast_dtype
from fts.trainer import hub
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.enums import HPSearchBackend
from fts.trainer.arguments.plan import Plan, eval_dtype, total_train_batch_size, with_settings
from fts.trainer.arguments.processes import default_group
from fts.trainer.arguments.seed import enable_full_determinism, set_seed
from fts.trainer.arguments.strategy import resolve_mesh
from fts.trainer.callbacks import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback, close_bars
from fts.trainer.callbacks.state import TrainerControl, TrainerState
from fts.trainer.cards import card
from fts.trainer.checkpoints import check_output_dir, save_model
from fts.trainer.checkpoints import (find_checkpoint)
from fts.trainer.data import (train_dataloader, eval_dataloader, select_eval_dataset, num_examples, num_tokens, unshard_dataloader, make_source, eval_batches)
from fts.trainer.data import (get_data_collator)
from fts.trainer.data import (signature_columns, find_labels, can_return_loss)
from fts.trainer.data import (data_seed, eval_sampler, train_sampler)
from fts.trainer.data import (device_ids, local_shard)
from fts.trainer.data import (check_batch, check_dataloader, check_first_batch)
from fts.trainer.distributed.accelerator import make_accelerator
from fts.trainer.distributed.deepspeed import (check_deepspeed, deepspeed_step, inert_optimizer, fill_config)
from fts.trainer.distributed.strategy import (parallelize_model, setup_parallelism, distribute_step, strategy_for)
from fts.trainer.evaluation import (EvaluationConfig, EvaluationInterrupted, PredictionConfig, dataset_length, evaluation_config, run_evaluation, warn_missing_labels)
from fts.trainer.model import evaluation_mode
from fts.trainer.evaluation import (check_metric_for_best_model)
from fts.trainer.evaluation import (check_batch_metrics)
from fts.trainer.evaluation import (BestRun, EvalLoopOutput, PredictionOutput, TrainOutput)
from fts.trainer.evaluation import (predict_batch)
from fts.trainer.model import (LossConfig, compute_loss, resolve_label_smoothing, loss_weight_fn)
from fts.trainer.model import (accepts_loss_kwargs, count_labels, counts_shifted_labels)
from fts.trainer.model import (enable_gradient_checkpointing, call_model_init, prepare_model)
from fts.trainer.optimization import (OPTIMIZER_METHODS, make_optimizer)
from fts.trainer.optimization import (make_torch_scheduler)
from fts.trainer.optimization import (decay_parameter_names, make_parameter_groups, with_parameters)
from fts.trainer.optimization import (optimizer_cls_and_kwargs)
from fts.trainer.optimization import (RunOptimizer)
from fts.trainer.reporting import metrics as metric_files
from fts.trainer.reporting.log_level import apply_log_level
from fts.trainer.reporting.memory import TrainerMemoryTracker
from fts.trainer.run.batch_size import (find_executable_batch_size, make_restore)
from fts.trainer.run.checks import check_parts
from fts.trainer.run.description import describe_run
from fts.trainer.run.dry_run import DryRun, dry_run
from fts.trainer.run.loop import run_training
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import autocast_precision, initial_values, make_plan
from fts.trainer.run.preparation import (Run, plan_of, prepare_run, saved_batch_size)
from fts.trainer.run.replay import replay
from fts.trainer.run.step import (DataParallelConfig, compose_step, count_update_totals, overrides_of, with_num_items)
from fts.trainer.search import SearchConfig, hyperparameter_search, record_trial
from fts.trainer.trackers import (close_trackers, set_plan, tracker_callbacks)
from fts.typing import Transform

logger = logging.getLogger(__name__)


class Trainer:
    """Trains, evaluates and predicts with a model, as Hugging Face's Trainer does.

    Every method may be overridden in a subclass, as there; a run is composed of what is overridden and of fts's own functions for
    everything else.

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
        compute_loss_func: `fn(outputs, labels, num_items_in_batch=...) -> loss`, for models that do not compute their own. It may
            return `(loss, {name: value})`: the values are averaged like the loss, and logged.
        compute_metrics: `fn(EvalPrediction) -> {name: number}`.
        callbacks: instances or classes; see `TrainerCallback`.
        optimizers: a torch optimizer of the model's parameters and its schedule; either may be None.
        optimizer_cls_and_kwargs: a torch optimizer's class and arguments, instead of `optim` and `optim_args`.
        preprocess_logits_for_metrics: `fn(logits, labels) -> logits`, run before predictions are kept.
        step: a step of your own for training: a Transform in the place of the optimizer, or a step that `fts.steps.train_step`
            made of this model.

    Raises:
        ArgumentError: arguments are missing or contradict each other.

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

    loss_is_scaled_for_ga: bool | None = None
    """Whether an overridden `compute_loss` gives parts of the step's mean already; None: where it was given their number."""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        step: Any = None,
    ) -> None:
        self.args = args if args is not None else TrainingArguments("tmp_trainer")
        check_parts(self.args, model, model_init, eval_dataset, optimizers, optimizer_cls_and_kwargs, step)
        apply_log_level(self.args)
        self.group = self.world = default_group(self.args)
        (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
        self.memory = TrainerMemoryTracker(not self.args.skip_memory_metrics)
        with self.memory.measuring("init"):
            self.model_init = model_init
            self.model = self._placed(model if model is not None else self.call_model_init())
        setup_parallelism(self)
        self._peers = RankMonitor.create(self.world)
        self.model_wrapped = self.model
        self.deepspeed: Any = None
        self.deepspeed_config: dict[str, Any] = {}
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.processing_class = processing_class
        self.data_collator = data_collator if data_collator is not None else get_data_collator(processing_class)
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        if self.args.batch_eval_metrics:
            check_batch_metrics(compute_metrics)
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        names = self.args.label_names
        self.label_names: list[str] = find_labels(self.model) if names is None else list(names)
        if not self.label_names and compute_loss_func is not None:
            self.label_names = ["labels"]
        self.can_return_loss = can_return_loss(self.model)
        self.model_accepts_loss_kwargs = accepts_loss_kwargs(self.model)
        self.label_smoothing = resolve_label_smoothing(self.args.label_smoothing_factor, self.model)
        self._given_optimizers = self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.step = step
        self.neftune_noise_alpha = self.args.neftune_noise_alpha
        self._train_batch_size = self.args.train_batch_size
        self._tokens_before = 0
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.is_in_train = False
        self.is_model_parallel = False
        self.place_model_on_device = self.args.place_model_on_device is not False
        self.state = self._placed_state(TrainerState())
        self.control = TrainerControl()
        self._accelerator: Any = None
        self.request: StopRequest | None = None
        self.started = time.monotonic()
        self.hp_name: Callable[[Any], str] | None = None  # this and the next are set in the trials of a search
        self.report_to_hp_search: Callable[[Mapping[str, float], int], bool] | None = None
        shown = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        mine = [DefaultFlowCallback, *tracker_callbacks(self.args.report_to or ()), *(callbacks or ()), shown]
        self.callback_handler = CallbackHandler(mine, self.model, processing_class, self.optimizer, self.lr_scheduler)
        self.hub_session = hub.HubSession()
        if self.args.push_to_hub:
            hub.prepare_push(self)
        self._call_event("on_init_end")

    # Training

    def train(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the arguments say.

        Args:
            resume_from_checkpoint: the path of a checkpoint, or True for the newest whole one in `output_dir`. The run then goes
                on as if it had not been interrupted, bit for bit. Arguments that differ from the checkpoint's are warned of:
                they win, but for the seeds, which stay those that the run began with. With another batch size or number of
                micro-batches it goes on at the same row.
            trial: of a hyper-parameter search, or a dictionary of values for `model_init`.
            ignore_keys_for_eval: the model's outputs that evaluations do not keep.

        Returns:
            The number of updates, the mean loss and the figures of the run.

        Raises:
            ArgumentError: there is no training set, or no such checkpoint; no evaluation can have `metric_for_best_model`;
                `output_dir` cannot be written to; or the checkpoint is at a row where no update of the new sizes begins.
            CheckpointError: the checkpoint is damaged, or of another model or optimizer.
            DataError: the training set cannot be used.
            CallbackError: a callback raised; a checkpoint of the last update was written.
        """
        self.started = time.monotonic()
        if self.train_dataset is None and not overridden(self, "get_train_dataloader"):
            raise ArgumentError("Trainer.train needs a training set: Trainer(..., train_dataset=...).")
        if not overridden(self, "evaluate"):  # another one may have any metric
            check_metric_for_best_model(self.args, self.eval_dataset, computes=self.compute_metrics is not None)
        self._check_evaluation_data()
        check_deepspeed(self, resumes=bool(resume_from_checkpoint))
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir), group=self.world)
        check_deepspeed(self, resumes=checkpoint is not None)  # also where torchrun started the processes again
        with fail_together(self.world):
            check_output_dir(self.args)
        if self.model_init is not None:
            self.model = self.model_wrapped = self._placed(self.call_model_init(trial))
        if self.args.gradient_checkpointing:
            enable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]  # settled

        def run(batch_size: int) -> TrainOutput:
            self._train_batch_size = batch_size
            with self._peers.translate_errors():
                return self._train(prepare_run(self, checkpoint, batch_size), ignore_keys_for_eval, trial)

        with self.memory.measuring("train") as self.memory_figures:
            if not self.args.auto_find_batch_size:
                return run(self.args.train_batch_size)
            gpus = max(1, self.args.n_gpu)
            first = (saved_batch_size(checkpoint) or self.args.train_batch_size) // gpus
            restore = make_restore(self.model, self.callback_handler.callbacks, self._given_optimizers)
            return find_executable_batch_size(lambda rows: run(rows * gpus), first, restore)

    def _train(self, run: Run, ignore_keys: list[str] | None, trial: Any = None) -> TrainOutput:
        self.state, self.control = self._placed_state(run.told), TrainerControl()
        record_trial(run.told, trial, self.hp_name)
        self._tokens_before = run.told.num_input_tokens_seen
        self._set_context()
        set_plan(self.callback_handler.callbacks, run.plan)
        self.is_in_train = True
        try:
            return run_training(self, run, ignore_keys)
        except BaseException:
            self.hub_session.uploads.warn_if_busy()
            close_trackers(self.callback_handler.callbacks)
            raise
        finally:
            self.is_in_train = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The loss of a micro-batch, or (loss, outputs); override it for a loss of your own.

        An override may return `(loss, {name: value})` where outputs are not asked for: the values are averaged, and logged.
        """
        found, outputs = compute_loss(model, inputs, self.loss_rule, num_items_in_batch)
        return (found.loss, outputs) if return_outputs else found.loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a micro-batch; its part of the step's loss, a 0-d tensor.

        It is called only where a subclass overrides it: otherwise forward, backward and update are one functional step.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.loss_rule.is_scaled(num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """The contexts in which a loss is computed."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.autocast_smart_context_manager())
        return stack

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the precision of the arguments, if they ask for one."""
        return autocast(self.args.device, autocast_dtype(autocast_precision(self.args)), cache_enabled=bool(cache_enabled))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Operations of a forward and backward pass on a batch; 0 where the model does not tell."""
        return metric_files.floating_point_ops(self.model, inputs)

    # The optimizer and its schedule

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make `optimizer` and `lr_scheduler`, unless they are there; called only where the user's own are asked for."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make `optimizer`, a torch optimizer of the model's trained parameters, unless it is there."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = make_parameter_groups(self.args, model, self.get_decay_parameter_names(model))
            self.optimizer = cls(**({"params": with_parameters(groups, model)} | kwargs))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make `lr_scheduler`, a torch schedule of the optimizer, unless it is there."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_torch_scheduler(optimizer, self.args, num_training_steps)
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """The torch optimizer that `optim` names, and its arguments."""
        return optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The trained parameters that weight decay applies to: all but biases and normalisation weights."""
        decayed = decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if name in decayed]

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each of the optimizer's groups."""
        return [group["lr"] for group in self._optimizer_groups()]

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """The optimizer's group of a parameter, or the parameters of all groups."""
        groups = self._optimizer_groups()
        if param is None:
            return [group["params"] for group in groups]
        wanted = dict(self.model.named_parameters()).get(param) if isinstance(param, str) else param
        return next((group for group in groups if any(other is wanted for other in group["params"])), None)

    def get_num_trainable_parameters(self) -> int:
        """How many numbers are trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        if self.optimizer is None:
            raise ArgumentError("Trainer.optimizer is None: it is made by train(), or by create_optimizer() before it.")
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    # Evaluation and prediction

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on the evaluation set, or on another one: on every row, also with `dataloader_drop_last`.

        Args:
            eval_dataset: instead of that of the Trainer, or the name of one of its; a dictionary of several is evaluated one by
                one.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: is put before the figures' names.

        Returns:
            The figures by name. Data without labels gives no loss, and a warning.

        Raises:
            ArgumentError: there is no evaluation set, or compute_metrics returned something else than numbers by name.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            own = eval_dataset is None
            named = ((name, name if own else part) for name, part in dataset.items())
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in named]
            return {name: value for part in parts for name, value in part.items()}
        output = self._evaluate_on(self.get_eval_dataloader(eval_dataset), "eval", ignore_keys, metric_key_prefix)
        if f"{metric_key_prefix}_loss" not in output.metrics:
            warn_missing_labels(self.model, self.label_names, metric_key_prefix)
        self.log(output.metrics)
        self._call_event("on_evaluate", metrics=output.metrics)
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
        output = self._evaluate_on(self.get_test_dataloader(test_dataset), "test", ignore_keys, metric_key_prefix)
        self._call_event("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run `prediction_step` on every batch: outputs and labels by row, figures, and the number of rows.

        Several processes share the batches; each returns the same as one process would.
        """
        args = self.args
        loss_only = args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self._set_context(eval_dataloader=dataloader)
        logger.info("***** Running %s *****", description)
        own = EvaluationConfig(
            prefix=metric_key_prefix,
            keep=description == "Prediction",
            loss_weight=loss_weight_fn(self.model, self.loss_rule),
            compute_metrics=self.compute_metrics,
            preprocess_logits=self.preprocess_logits_for_metrics,
            on_batch=self._evaluated_batch,
            all_gather=AllGatherObject(self.group, args.eval_use_gather_object),
            total=dataset_length(dataloader),
        )
        config = evaluation_config(own, args, self.model, self.label_names)

        def predict(inputs: Any) -> tuple[Any, Any, Any]:
            return self.prediction_step(self.model, inputs, loss_only, ignore_keys=ignore_keys)

        with evaluation_mode(self.model, eval_dtype(args)):
            return run_evaluation(predict, eval_batches(dataloader, args, data_seed(args)), config)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Predict one batch: its mean loss, logits and labels, each None where there is none."""
        config = PredictionConfig(
            self._loss_and_outputs, self.label_names, self.can_return_loss, self.compute_loss_context_manager
        )
        inputs = self._prepare_inputs(inputs)
        return predict_batch(model, inputs, config, ignore_keys=ignore_keys, prediction_loss_only=prediction_loss_only)

    def _evaluate_on(self, loader: Any, stage: str, ignore_keys: list[str] | None, prefix: str) -> EvalLoopOutput:
        parallelize_model(self)
        with self.memory.measuring(stage) as figures, self._closing_bars(), self._peers.translate_errors():
            start = time.perf_counter()
            described, only = ("Prediction", None) if stage == "test" else ("Evaluation", self.compute_metrics is None or None)
            output = self.evaluation_loop(
                loader, description=described, prediction_loss_only=only, ignore_keys=ignore_keys, metric_key_prefix=prefix
            )
            count = -(-output.num_samples // self.args.eval_batch_size)
            speed = metric_files.speed_metrics(prefix, start, output.num_samples, count)
            output.metrics.update(speed | figures())
        # what follows from them, such as when to stop, must be the same in each process
        output.metrics.update(self.world.broadcast_object(output.metrics))
        return output

    @contextlib.contextmanager
    def _closing_bars(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            close_bars(self.callback_handler.callbacks)
            raise

    def _loss_and_outputs(self, model: nn.Module, inputs: Any) -> Any:
        count = count_labels([inputs], counts_shifted_labels(model)) if self.loss_rule.counts else None
        return with_num_items(self.compute_loss)(model, inputs, count, return_outputs=True)

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training set as a torch DataLoader, which visits the rows in the order of the run: those of all processes."""
        args = self._train_args
        columns = self._accepted_columns()
        return train_dataloader(self.train_dataset, args, self.data_collator, columns, self._get_train_sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation set, another one, or one of several by its name, as a torch DataLoader."""
        dataset = select_eval_dataset(eval_dataset, self.eval_dataset)
        columns = self._accepted_columns()
        return eval_dataloader(dataset, self.args, self.data_collator, columns, self._get_eval_sampler)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """A data set for prediction as a torch DataLoader."""
        columns = self._accepted_columns()
        sampler = self._get_eval_sampler
        return eval_dataloader(test_dataset, self.args, self.data_collator, columns, sampler, "prediction")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one update, and how many labels count in them.

        It is called only where a subclass overrides it.
        """
        samples = list(itertools.islice(epoch_iterator, num_batches))
        ((count, _),) = count_update_totals(self.loss_rule, self.model)(steps.MicroBatches(samples)) if samples else ((None, 0),)
        return samples, count

    def num_examples(self, dataloader: Any) -> int:
        """How many rows a loader has; without a data set of known length, an estimate from its batches."""
        return num_examples(dataloader, self.args.per_device_train_batch_size)

    @staticmethod
    def num_tokens(train_dl: Any, max_steps: int | None = None) -> int:
        """How many input tokens a loader has."""
        return num_tokens(train_dl, max_steps)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows in an update, over all processes."""
        return total_train_batch_size(args, self._train_batch_size)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any, total_train_batch_size: int | None = None
    ) -> tuple[int, int, int, float, bool, int | None, int]:
        """What a run over a loader comes to.

        Returns:
            Epochs, updates in an epoch, rows, rows over the whole run, whether epochs decide when to stop, batches of each
            process in an epoch (None if unknown), and updates in all.
        """
        rows = self.get_total_train_batch_size(args) if total_train_batch_size is None else total_train_batch_size
        return initial_values(args, unshard_dataloader(dataloader), rows, self.num_examples)

    def train_source(self, seed: int) -> Source:
        """The numbered epochs of numbered batches of training, checked on their first rows: this process's part of them.

        Args:
            seed: of their order, and of everything random in the data.
        """
        loader = self.get_train_dataloader()
        self._set_context(train_dataloader=loader)
        rule = None if overridden(self, "compute_loss", "training_step") else self.loss_rule
        check_dataloader(loader, self.model, rule, "training")
        micro = self.args.gradient_accumulation_steps
        share = partial(local_shard, args=self.args)
        source = make_source(loader, seed=seed, device=self.args.device, what="training", micro_batches=micro, share=share)
        return check_first_batch(source, lambda batch: check_batch(batch, self.model, rule, "training"))

    def _check_evaluation_data(self) -> None:
        """Check the first examples of every evaluation set that training evaluates on."""
        dataset = self.eval_dataset
        if str(self.args.eval_strategy) == "no" or dataset is None or overridden(self, "evaluate", "evaluation_loop"):
            return
        rule = None if overridden(self, "prediction_step", "compute_loss") else self.loss_rule
        for name in dataset if isinstance(dataset, dict) else (None,):
            check_dataloader(self.get_eval_dataloader(name), self.model, rule, "evaluation", labelled=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return train_sampler(dataset, self._train_args, self.processing_class)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return eval_sampler(eval_dataset)

    @property
    def _train_args(self) -> TrainingArguments:
        """The arguments, with the batch size that was found to fit in memory."""
        size = self._train_batch_size // max(1, self.args.n_gpu)
        return with_settings(self.args, per_device_train_batch_size=size)

    def _accepted_columns(self) -> Any:
        return signature_columns(self.model, self.label_names) if self.args.remove_unused_columns else None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return send_to_device(inputs, self.args.device)

    # Files and reports

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the model, its processing class and the arguments; by default to `output_dir` of the arguments.

        With `push_to_hub` they are uploaded, too. Of several processes all call it, and one writes, or with `save_on_each_node`
        one on each machine.
        """
        directory = str(self.args.output_dir) if output_dir is None else output_dir
        save_model(self.model, directory, self.processing_class, self.args, writes=self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            hub.push_saved_model(self.hub_session, self)

    def save_state(self) -> None:
        """Write `trainer_state.json` to `output_dir`."""
        if self.is_world_process_zero():
            directory = Path(str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(directory / TRAINER_STATE_NAME)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures to the history, and tell the callbacks.

        Args:
            logs: figures by name; the epoch is added.
            start_time: `time.perf_counter()` when the run began, for tokens a second where tokens are counted.
        """
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                seen = self.state.num_input_tokens_seen - self._tokens_before
                logs.update(metric_files.speed_metrics("train", start_time, num_tokens=seen))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._call_event("on_log", logs=logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print the figures of a split as a table."""
        if self.is_world_process_zero():
            metric_files.log_metrics(split, metrics)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write the figures of a split to `<split>_results.json`, and to `all_results.json` if `combined`."""
        if self.is_world_process_zero():
            metric_files.save_metrics(str(self.args.output_dir), split, metrics, combined)

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Figures as people read them."""
        return metric_files.metrics_format(metrics)

    # Callbacks

    def add_callback(self, callback: Any) -> None:
        """Add a callback, given as an instance or a class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, given as an instance or a class, and return it; None if it is not there."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given as an instance or a class."""
        self.callback_handler.remove_callback(callback)

    def _call_event(self, event: str, **kwargs: Any) -> None:
        """Tell the callbacks of an event; they may ask for something through `control`."""
        self.control = self.callback_handler.call_event(event, self.args, self.state, self.control, **kwargs)

    # Processes

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """Whether this is the first process of all."""
        return self.args.process_index == 0

    def get_tp_size(self) -> int:
        """Over how many processes each matrix is cut."""
        return resolve_mesh(self.args).tensor

    def get_cp_size(self) -> int:
        """Over how many processes a sequence is cut by context parallelism."""
        return resolve_mesh(self.args).context

    def get_sp_size(self) -> int:
        """Over how many processes a sequence is cut by sequence parallelism."""
        return resolve_mesh(self.args).sequence

    @property
    def accelerator(self) -> Any:
        """An accelerate Accelerator with the settings of the arguments; made when it is first asked for."""
        if self._accelerator is None:
            self._accelerator = make_accelerator(self.args)
        return self._accelerator

    def propagate_args_to_deepspeed(self, auto_find_batch_size: bool = False) -> None:
        """Fill the arguments into DeepSpeed's configuration (`deepspeed_config`): where it says "auto", or nothing.

        Args:
            auto_find_batch_size: let the arguments win where batch sizes differ.

        Raises:
            ArgumentError: the configuration says something else than the arguments, or there is none.
        """
        self.deepspeed_config = fill_config(self, auto_find_batch_size)

    # Search, hub and cards

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | Sequence[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Train with several hyper-parameters, and tell the best.

        Each trial starts from the trainer as it is now, with a new model, its own copies of the arguments and callbacks, and a
        folder `run-<id>` below `output_dir`. The trainer itself is not changed.

        Args:
            hp_space: with optuna `fn(trial) -> {argument: value}`, with Ray a function that gives Tune's distributions by name.
                By default the learning rate, epochs, seed and batch size.
            compute_objective: `fn(metrics) -> number`, or several; by default the loss, or the sum of all other metrics.
            n_trials: how many. A search whose process died goes on to that number, from its storage.
            direction: "minimize" or "maximize"; a list of them for several objectives (optuna).
            backend: "optuna" or "ray"; by default the first that is installed.
            hp_name: `fn(trial) -> name` of the trial and its folder.
            kwargs: with optuna those of `create_study` and `Study.optimize` (`storage`, `study_name`, `load_if_exists`,
                `sampler`, `pruner`, `timeout` …), with Ray those of `tune.run` (`resources_per_trial`, `scheduler` …).

        Returns:
            The best run; for several directions all that no other run beats in every one.

        Raises:
            ArgumentError: there is no `model_init` or nothing to evaluate, or a name or value is wrong.
            MissingDependencyError: the backend is not installed.
        """
        config = SearchConfig(hp_space, compute_objective, n_trials, direction, hp_name)
        return hyperparameter_search(self, config, backend, kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that `hub_model_id` names, unless it is there; see `hub_token` and `hub_private_repo`.

        Raises:
            HubError: it could not be done.
        """
        hub.init_hf_repo(self.hub_session, self, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model with its processing class and its card, and upload `output_dir`, without checkpoints, to the Hub.

        Args:
            commit_message: of the commit.
            blocking: wait until it is uploaded.
            token: to upload with, instead of `hub_token`.
            revision: the branch, instead of `hub_revision`.
            private: whether a new repository is private, instead of `hub_private_repo`.
            **kwargs: for `create_model_card`.

        Returns:
            huggingface_hub's CommitInfo, a text with the address of the commit; its future unless `blocking`.

        Raises:
            HubError: it could not be uploaded; everything is in `output_dir`.
        """
        options = hub.PushOptions(commit_message, blocking, token, revision, private, kwargs)
        return hub.push_to_hub(self.hub_session, self, options)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write a draft of a model card, `README.md`, to `output_dir`.

        Args:
            language: of the model.
            license: by default that of the model on the Hub that training began with.
            tags: for the metadata; those of a card that is there stay.
            model_name: the title; the name of `output_dir` if not given.
            finetuned_from: the model on the Hub that training began with; found in the model's configuration if not given.
            tasks: identifiers of what the model is for, such as "text-classification".
            dataset_tags: identifiers of the data sets on the Hub.
            dataset: the names of the data sets for people.
            dataset_args: their configurations.
        """
        if self.is_world_process_zero():
            said = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            card.write_card(self, *said)

    @property
    def hub_model_id(self) -> str | None:
        """The repository on the Hub, with its owner; None until the Hub has told it."""
        return self.hub_session.repo_id

    # The functional core

    def build_step(self, total_steps: int | None = None) -> Any:
        """The step that `train` would run: `(state, batch) -> (state, metrics)`; its `transform` makes the state.

        Args:
            total_steps: of the run, for the schedule; by default as the arguments and the training set say.

        >>> from fts import TrainState
        >>> trainer = Trainer(nn.Linear(1, 1), TrainingArguments(disable_tqdm=True, use_cpu=True))
        >>> step = trainer.build_step(total_steps=10)
        >>> state = TrainState.create(trainer.model, step.transform)
        """
        plan = self.plan(total_steps)
        return self.step_of(plan, self.optimizing(plan))

    def describe(self) -> str:
        """The plan and the step of a run, as a tree of text."""
        plan = self.plan()
        processes = f"{self.world.size}, {strategy_for(self).name}"
        return describe_run(plan, self.step_of(plan, self.optimizing(plan)), processes)

    def dry_run(self) -> DryRun:
        """Try one update, one batch of evaluation and one checkpoint (in a temporary place) before long work.

        Nothing is changed: weights, random numbers and files are as before.

        Returns:
            Seconds and bytes of each; prints as a table.
        """
        check_deepspeed(self, "dry_run()")
        return dry_run(self)

    def replay(self, checkpoint: str | Path, to_step: int) -> ReplayedStep:
        """Run the updates after a checkpoint once more, bit for bit, and look into the last of them.

        Args:
            checkpoint: from before the update; the model is given its weights.
            to_step: the number of the update, the first being 1.

        Returns:
            What went in and what came out; see `fts.loops.replay`.
        """
        check_deepspeed(self, "replay()")
        return replay(self, checkpoint, to_step)

    def plan(self, total_steps: int | None = None) -> Plan:
        """The arguments, resolved for the training set, or for so many updates."""
        if total_steps is not None:
            return make_plan(with_settings(self.args, max_steps=total_steps), batches=None, items=None)
        return plan_of(self, self.train_source(data_seed(self.args)), self._train_batch_size)

    @property
    def loss_rule(self) -> LossConfig:
        """How the loss of a micro-batch is computed and scaled."""
        return LossConfig(
            tuple(self.label_names),
            self.compute_loss_func,
            self.label_smoothing,
            self.model_accepts_loss_kwargs,
            self.loss_is_scaled_for_ga,
        )

    def optimizing(self, plan: Plan) -> RunOptimizer:
        """What updates the weights: the plan's own transform, `step`, or the user's torch optimizer as a transform."""
        parallelize_model(self)
        self.optimizer, self.lr_scheduler = self._given_optimizers
        strategy = strategy_for(self)
        if isinstance(strategy, DeepSpeed):
            found = inert_optimizer(strategy, self.args)
        else:
            create = self._create_torch_optimizer if self._has_torch_optimizer() else None
            found = make_optimizer(self.args, self.model, plan, step=self.step, create=create)
        self.optimizer, self.lr_scheduler = found.optimizer, found.scheduler
        return found

    def _has_torch_optimizer(self) -> bool:
        given = self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None
        return given or overridden(self, *OPTIMIZER_METHODS)

    def _create_torch_optimizer(self, total_steps: int) -> tuple[Any, Any]:
        self.create_optimizer_and_scheduler(total_steps)
        return self.optimizer, self.lr_scheduler

    def step_of(self, plan: Plan, chosen: RunOptimizer) -> Any:
        """The step of training: `(state, batch) -> (state, metrics)`."""
        strategy = strategy_for(self)
        if isinstance(strategy, DeepSpeed):
            return deepspeed_step(self, plan, strategy, chosen)
        if self.step is not None and not isinstance(self.step, Transform):
            step = self.step
        else:
            across = DataParallelConfig(self.group, self.args.average_tokens_across_devices, device_ids(self.args))
            step = compose_step(self.model, self.loss_rule, plan, chosen.transform, overrides_of(self), across)
        return distribute_step(step, self)

    # Model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from `model_init`, the same at each call."""
        seed_generators(self.args.seed, self.args.device)
        return call_model_init(self.model_init, trial)

    def _placed(self, model: nn.Module) -> nn.Module:
        return prepare_model(model, self.args)

    def _placed_state(self, state: TrainerState) -> TrainerState:
        state.is_local_process_zero, state.is_world_process_zero = self.is_local_process_zero(), self.is_world_process_zero()
        return state

    def _evaluated_batch(self) -> None:
        self._call_event("on_prediction_step")
        if self.request is not None and self.request.poll():
            raise EvaluationInterrupted

    def _set_context(self, **changes: Any) -> None:
        own = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        self.callback_handler.context = own | {"lr_scheduler": self.lr_scheduler} | changes
