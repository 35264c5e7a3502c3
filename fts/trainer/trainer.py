"""Trainer: a training run from a model, data and arguments."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fts import steps
from fts.distributed.error_propagation import fail_together
from fts.distributed.object_collectives import AllGatherObject
from fts.distributed.rank_monitor import RankMonitor
from fts.errors import ArgumentError
from fts.loops import StopRequest
from fts.loops.device_placement import send_to_device
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.steps.precision import autocast, autocast_dtype
from fts.trainer import hub, reporting
from fts.trainer.arguments import (
    HPSearchBackend,
    TrainingArguments,
    default_group,
    enable_full_determinism,
    eval_dtype,
    resolve_mesh,
    set_seed,
)
from fts.trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    close_bars,
)
from fts.trainer.cards import CardFields, TrainingSummary, write_card
from fts.trainer.checkpoints import check_output_dir, find_checkpoint, save_model
from fts.trainer.data import (
    can_return_loss,
    check_dataloader,
    data_seed,
    eval_batches,
    find_labels,
    get_data_collator,
    unshard_dataloader,
)
from fts.trainer.distributed import check_deepspeed_resume, parallelize_model, setup_parallelism
from fts.trainer.evaluation import (
    BestRun,
    EvalLoopOutput,
    EvaluationConfig,
    EvaluationInterrupted,
    PredictionConfig,
    PredictionOutput,
    TrainOutput,
    check_batch_metrics,
    check_metric_for_best_model,
    dataset_length,
    evaluation_config,
    predict_batch,
    run_evaluation,
    warn_missing_labels,
)
from fts.trainer.model import (
    accepts_loss_kwargs,
    compute_loss,
    count_labels,
    counts_shifted_labels,
    evaluation_mode,
    loss_weight_fn,
    prepare_model,
    resolve_label_smoothing,
)
from fts.trainer.reporting import TrainerMemoryTracker, apply_log_level
from fts.trainer.run import (
    Run,
    RunContext,
    RunMixin,
    autocast_precision,
    check_parts,
    count_update_totals,
    find_executable_batch_size,
    initial_values,
    make_restore,
    overridden,
    prepare_run,
    run_training,
    saved_batch_size,
    with_num_items,
)
from fts.trainer.search import SearchConfig, hyperparameter_search, record_trial
from fts.trainer.trackers import close_trackers, set_plan, tracker_callbacks

logger = logging.getLogger(__name__)


class Trainer(RunMixin):
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
            self.model = prepare_model(model if model is not None else self.call_model_init(), self.args)
        self.group = setup_parallelism(self.args, self.model)
        self._rank_monitor = RankMonitor.create(self.world)
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
        self.state = self._on_this_rank(TrainerState())
        self.control = TrainerControl()
        self._accelerator: Any = None
        self.request: StopRequest | None = None
        self.start_time = time.monotonic()
        self.hp_name: Callable[[Any], str] | None = None  # this and the next are set in the trials of a search
        self.report_to_hp_search: Callable[[Mapping[str, float], int], bool] | None = None
        display = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        all_callbacks = [DefaultFlowCallback, *tracker_callbacks(self.args.report_to or ()), *(callbacks or ()), display]
        self.callback_handler = CallbackHandler(all_callbacks, self.model, processing_class, self.optimizer, self.lr_scheduler)
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
            resume_from_checkpoint: the path of a checkpoint, or True for the newest complete one in `output_dir`. The run
                continues as if it had not been interrupted, bit for bit. Arguments that differ from the checkpoint's win, with a
                warning; except for the seeds, which stay those that the run began with. With another batch size or number of
                micro-batches it continues at the same example.
            trial: of a hyper-parameter search, or a dictionary of values for `model_init`.
            ignore_keys_for_eval: the model's outputs that evaluations do not keep.

        Returns:
            The number of updates, the mean loss and the metrics of the run.

        Raises:
            ArgumentError: there is no training set, or no such checkpoint; no evaluation can have `metric_for_best_model`;
                `output_dir` cannot be written to; or no update of the new sizes begins at the checkpoint's example.
            CheckpointError: the checkpoint is corrupt, or of another model or optimizer.
            DataError: the training set cannot be used.
            CallbackError: a callback raised; a checkpoint of the last update was written.
        """
        self.start_time = time.monotonic()
        checkpoint = self._check_train(resume_from_checkpoint)
        self._prepare_model(trial)

        def run(batch_size: int) -> TrainOutput:
            self._train_batch_size = batch_size
            with self._rank_monitor.translate_errors():
                context = self._run_context()
                return self._train(context, prepare_run(context, checkpoint, batch_size), ignore_keys_for_eval, trial)

        with self.memory.measuring("train") as self.memory_metrics:
            if not self.args.auto_find_batch_size:
                return run(self.args.train_batch_size)
            gpus = max(1, self.args.n_gpu)
            first = (saved_batch_size(checkpoint) or self.args.train_batch_size) // gpus
            restore = make_restore(self.model, self.callback_handler.callbacks, self._given_optimizers)
            return find_executable_batch_size(lambda size: run(size * gpus), first, restore)

    def _check_train(self, resume_from_checkpoint: bool | str | Path | None) -> Path | None:
        """Check what can be checked before the model is prepared; the checkpoint to resume from."""
        if self.train_dataset is None and not overridden(self, "get_train_dataloader"):
            raise ArgumentError("Trainer.train needs a training set: Trainer(..., train_dataset=...).")
        if not overridden(self, "evaluate"):  # another one may have any metric
            check_metric_for_best_model(self.args, self.eval_dataset, computes=self.compute_metrics is not None)
        self._check_evaluation_data()
        check_deepspeed_resume(self.args, resumes=bool(resume_from_checkpoint))
        self._check_deepspeed()
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir), group=self.world)
        check_deepspeed_resume(self.args, resumes=checkpoint is not None)  # also where torchrun restarted the processes
        with fail_together(self.world):
            check_output_dir(self.args)
        return checkpoint

    def _train(self, context: RunContext, run: Run, ignore_keys: list[str] | None, trial: Any) -> TrainOutput:
        self.state, self.control = self._on_this_rank(run.trainer_state), TrainerControl()
        record_trial(run.trainer_state, trial, self.hp_name)
        self._tokens_before = run.trainer_state.num_input_tokens_seen
        self._set_context()
        set_plan(self.callback_handler.callbacks, run.plan)
        self.is_in_train = True
        try:
            return run_training(context, run, ignore_keys)
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
        found, outputs = compute_loss(model, inputs, self.loss_config, num_items_in_batch)
        return (found.loss, outputs) if return_outputs else found.loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a micro-batch; its part of the step's loss, a 0-d tensor.

        It is called only where a subclass overrides it: otherwise forward, backward and update are one functional step.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.loss_config.is_scaled(num_items_in_batch):
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
        """Operations of a forward and backward pass on a batch; 0 where the model does not say."""
        return reporting.floating_point_ops(self.model, inputs)

    # Evaluation and prediction

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on the evaluation set, or on another one: on every example, also with `dataloader_drop_last`.

        Args:
            eval_dataset: instead of that of the Trainer, or the name of one of its; a dictionary of several is evaluated one by
                one.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: the prefix of the metrics' names.

        Returns:
            The metrics by name. Data without labels gives no loss, and a warning.

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
        """Predict every example of a data set, in its order, also with `dataloader_drop_last`.

        Args:
            test_dataset: labels are optional.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: the prefix of the metrics' names.

        Returns:
            Predictions (an array with a row per example, or a tuple of arrays; rows of different sizes are padded with -100),
            labels or None, and metrics.
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
        """Run `prediction_step` on every batch: outputs and labels by example, metrics, and the number of examples.

        The ranks share the batches; each returns the same as a single process would.
        """
        args = self.args
        loss_only = args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self._set_context(eval_dataloader=dataloader)
        logger.info("***** Running %s *****", description)
        own = EvaluationConfig(
            prefix=metric_key_prefix,
            keep=description == "Prediction",
            loss_weight=loss_weight_fn(self.model, self.loss_config),
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
        parallelize_model(self.model, self.args, self.world)
        with self.memory.measuring(stage) as memory_metrics, self._closing_bars(), self._rank_monitor.translate_errors():
            start = time.perf_counter()
            described, only = ("Prediction", None) if stage == "test" else ("Evaluation", self.compute_metrics is None or None)
            output = self.evaluation_loop(
                loader, description=described, prediction_loss_only=only, ignore_keys=ignore_keys, metric_key_prefix=prefix
            )
            count = -(-output.num_samples // self.args.eval_batch_size)
            speed = reporting.speed_metrics(prefix, start, output.num_samples, count)
            output.metrics.update(speed | memory_metrics())
        # decisions that follow from them, such as when to stop, must be the same on all ranks
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
        count = count_labels([inputs], counts_shifted_labels(model)) if self.loss_config.needs_num_items else None
        return with_num_items(self.compute_loss)(model, inputs, count, return_outputs=True)

    # Data

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one update, and how many labels count in them.

        It is called only where a subclass overrides it.
        """
        samples = list(itertools.islice(epoch_iterator, num_batches))
        ((count, _),) = (
            count_update_totals(self.loss_config, self.model)(steps.MicroBatches(samples)) if samples else ((None, 0),)
        )
        return samples, count

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any, total_train_batch_size: int | None = None
    ) -> tuple[int, int, int, float, bool, int | None, int]:
        """The sizes of a run over a loader.

        Returns:
            Epochs, updates in an epoch, examples, examples over the run, whether epochs decide when to stop, batches of each rank
            in an epoch (None if unknown), and updates in all.
        """
        size = self.get_total_train_batch_size(args) if total_train_batch_size is None else total_train_batch_size
        return initial_values(args, unshard_dataloader(dataloader), size, self.num_examples)

    def _check_evaluation_data(self) -> None:
        """Check the first examples of every evaluation set that training evaluates on."""
        dataset = self.eval_dataset
        if str(self.args.eval_strategy) == "no" or dataset is None or overridden(self, "evaluate", "evaluation_loop"):
            return
        rule = None if overridden(self, "prediction_step", "compute_loss") else self.loss_config
        for name in dataset if isinstance(dataset, dict) else (None,):
            check_dataloader(self.get_eval_dataloader(name), self.model, rule, "evaluation", labelled=False)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return send_to_device(inputs, self.args.device)

    # Files and reports

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the model, its processing class and the arguments; by default to `output_dir` of the arguments.

        With `push_to_hub` they are uploaded, too. All ranks must call it; the main process writes, or with `save_on_each_node`
        one process of each machine.
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
        """Add metrics to the history, and call the callbacks.

        Args:
            logs: metrics by name; the epoch is added.
            start_time: `time.perf_counter()` when the run began, for tokens a second where tokens are counted.
        """
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                seen = self.state.num_input_tokens_seen - self._tokens_before
                logs.update(reporting.speed_metrics("train", start_time, num_tokens=seen))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._call_event("on_log", logs=logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print the metrics of a split as a table."""
        if self.is_world_process_zero():
            reporting.log_metrics(split, metrics)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write the metrics of a split to `<split>_results.json`, and to `all_results.json` if `combined`."""
        if self.is_world_process_zero():
            reporting.save_metrics(str(self.args.output_dir), split, metrics, combined)

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics in a readable format."""
        return reporting.metrics_format(metrics)

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

    # Processes

    def is_local_process_zero(self) -> bool:
        """Whether this is the main process of its machine."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""
        return self.args.process_index == 0

    def get_tp_size(self) -> int:
        """The size of tensor parallelism: over how many ranks each matrix is sharded."""
        return resolve_mesh(self.args).tensor

    def get_cp_size(self) -> int:
        """The size of context parallelism."""
        return resolve_mesh(self.args).context

    def get_sp_size(self) -> int:
        """The size of sequence parallelism."""
        return resolve_mesh(self.args).sequence

    # Search and cards

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
        """Train with several hyper-parameters, and return the best.

        Each trial starts from the trainer as it is now, with a new model, its own copies of the arguments and callbacks, and a
        folder `run-<id>` below `output_dir`. The trainer itself is not changed.

        Args:
            hp_space: with optuna `fn(trial) -> {argument: value}`, with Ray a function that gives Tune's distributions by name.
                By default the learning rate, epochs, seed and batch size.
            compute_objective: `fn(metrics) -> number`, or several; by default the loss, or the sum of all other metrics.
            n_trials: how many. A search whose process died continues to that number, from its storage.
            direction: "minimize" or "maximize"; a list of them for several objectives (optuna).
            backend: "optuna" or "ray"; by default the first that is installed.
            hp_name: `fn(trial) -> name` of the trial and its folder.
            kwargs: with optuna those of `create_study` and `Study.optimize` (`storage`, `study_name`, `load_if_exists`,
                `sampler`, `pruner`, `timeout` …), with Ray those of `tune.run` (`resources_per_trial`, `scheduler` …).

        Returns:
            The best run; for several directions all runs that no other one beats in each.

        Raises:
            ArgumentError: there is no `model_init` or nothing to evaluate, or a name or value is wrong.
            MissingDependencyError: the backend is not installed.
        """
        config = SearchConfig(hp_space, compute_objective, n_trials, direction, hp_name)
        return hyperparameter_search(self, config, backend, kwargs)

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
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            write_card(TrainingSummary.from_trainer(self), CardFields(*given))

    # Model

    def _on_this_rank(self, state: TrainerState) -> TrainerState:
        state.is_local_process_zero, state.is_world_process_zero = self.is_local_process_zero(), self.is_world_process_zero()
        return state

    def _evaluated_batch(self) -> None:
        self._call_event("on_prediction_step")
        if self.request is not None and self.request.poll():
            raise EvaluationInterrupted
