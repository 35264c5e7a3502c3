"""The methods of the Trainer that compose a run: its plan, optimizer, step, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fts.distributed import DeepSpeed, Group
from fts.loops import ReplayedStep, Source, StopRequest, verify_checkpoint
from fts.randomness import seed_generators
from fts.trainer import hub
from fts.trainer.arguments import Plan, TrainingArguments, resolve_strategy, total_train_batch_size, with_settings
from fts.trainer.callbacks import CallbackHandler, TrainerControl, TrainerState
from fts.trainer.data import (
    DataLoaderMixin,
    check_batch,
    check_dataloader,
    check_first_batch,
    data_seed,
    device_ids,
    local_shard,
    make_source,
)
from fts.trainer.distributed import (
    OptimizerMethods,
    check_deepspeed,
    check_unpartitioned,
    distribute_step,
    fill_config,
    make_accelerator,
    parallelize_model,
    placeholder_optimizer,
    scaler_of,
    start_engine,
)
from fts.trainer.hub import HubMixin
from fts.trainer.model import (
    LossConfig,
    call_model_init,
    enable_gradient_checkpointing,
    prepare_model,
)
from fts.trainer.optimization import (
    OPTIMIZER_METHODS,
    OptimizerMixin,
    RunOptimizer,
    make_optimizer,
)
from fts.trainer.run.context import Hooks, RunContext
from fts.trainer.run.description import describe_run
from fts.trainer.run.dry_run import DryRun, dry_run
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import make_plan, resolve_plan
from fts.trainer.run.replay import replay
from fts.trainer.run.resume import saved_batch_size
from fts.trainer.run.step import (
    DataParallelConfig,
    Overrides,
    compose_deepspeed_step,
    compose_step,
)
from fts.typing import Transform


class RunMixin(DataLoaderMixin, OptimizerMixin, HubMixin):
    """Composes the plan, the optimizer and the step of a run, of what is overridden and of fts's own functions."""

    loss_is_scaled_for_ga: bool | None = None
    """Whether an overridden `compute_loss` returns parts of the step's mean already; None: where it gets `num_items_in_batch`."""

    model_wrapped: nn.Module
    model_init: Callable[..., nn.Module] | None
    step: Any
    state: TrainerState
    control: TrainerControl
    request: StopRequest | None
    group: Group
    world: Group
    callback_handler: CallbackHandler
    compute_loss_func: Callable[..., Any] | None
    label_smoothing: float
    model_accepts_loss_kwargs: bool
    deepspeed: Any
    deepspeed_config: dict[str, Any]
    start_time: float
    memory_metrics: Callable[[], Mapping[str, float]]
    report_to_hp_search: Callable[[Mapping[str, float], int], bool] | None
    _given_optimizers: tuple[Any, Any]
    _accelerator: Any
    evaluate: Callable[..., dict[str, float]]
    log: Callable[..., None]
    evaluation_loop: Callable[..., Any]

    def build_step(self, total_steps: int | None = None) -> Any:
        """The step that `train` would run: `(state, batch) -> (state, metrics)`; its `transform` makes the state.

        Args:
            total_steps: of the run, for the schedule; by default as the arguments and the training set say.

        >>> from fts import Trainer, TrainingArguments, TrainState
        >>> trainer = Trainer(nn.Linear(1, 1), TrainingArguments(disable_tqdm=True, use_cpu=True))
        >>> step = trainer.build_step(total_steps=10)
        >>> state = TrainState.create(trainer.model, step.transform)
        """
        plan = self.plan(total_steps)
        return self._make_step(plan, self._make_optimizer(plan))

    def describe(self) -> str:
        """The plan and the step of a run, as a tree of text."""
        plan = self.plan()
        processes = f"{self.world.size}, {resolve_strategy(self.args).name}"
        return describe_run(plan, self._make_step(plan, self._make_optimizer(plan)), processes)

    def dry_run(self) -> DryRun:
        """Try one update, one batch of evaluation and one checkpoint (in a temporary directory) before a long run.

        Nothing is changed: weights, random numbers and files are as before.

        Returns:
            Seconds and bytes of each; prints as a table.
        """
        self._check_deepspeed("dry_run()")
        dataset = self.eval_dataset
        name = next(iter(dataset)) if isinstance(dataset, dict) else None
        loader = None if dataset is None else partial(self.get_eval_dataloader, name)
        return dry_run(self._run_context(), self.plan, loader, self.evaluation_loop)

    def replay(self, checkpoint: str | Path, to_step: int) -> ReplayedStep:
        """Run the updates after a checkpoint once more, bit for bit, and inspect the last of them.

        Args:
            checkpoint: from before the update; the model is given its weights.
            to_step: the number of the update, the first being 1.

        Returns:
            What went in and what came out; see `fts.loops.replay`.
        """
        self._check_deepspeed("replay()")
        path = Path(checkpoint)
        verify_checkpoint(path)
        self._prepare_model()
        size = saved_batch_size(path) if self.args.auto_find_batch_size else None
        self._train_batch_size = size or self.args.train_batch_size
        return replay(self._run_context(), path, to_step, self._train_batch_size)

    def plan(self, total_steps: int | None = None) -> Plan:
        """The arguments, resolved for the training set, or for so many updates."""
        if total_steps is not None:
            return make_plan(with_settings(self.args, max_steps=total_steps), batches=None, num_examples=None)
        return resolve_plan(self._run_context(), self.train_source(data_seed(self.args)), self._train_batch_size)

    @property
    def loss_config(self) -> LossConfig:
        """How the loss of a micro-batch is computed and scaled."""
        return LossConfig(
            tuple(self.label_names),
            self.compute_loss_func,
            self.label_smoothing,
            self.model_accepts_loss_kwargs,
            self.loss_is_scaled_for_ga,
        )

    def _make_optimizer(self, plan: Plan) -> RunOptimizer:
        """What updates the weights: the plan's own transform, `step`, or the user's torch optimizer as a transform."""
        parallelize_model(self.model, self.args, self.world)
        self.optimizer, self.lr_scheduler = self._given_optimizers
        strategy = resolve_strategy(self.args)
        if isinstance(strategy, DeepSpeed):
            made = placeholder_optimizer(strategy, self.args)
        else:
            create = self._create_torch_optimizer if self._has_torch_optimizer() else None
            made = make_optimizer(self.args, self.model, plan, step=self.step, create=create)
        self.optimizer, self.lr_scheduler = made.optimizer, made.scheduler
        return made

    def _has_torch_optimizer(self) -> bool:
        given = self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None
        return given or overridden(self, *OPTIMIZER_METHODS)

    def _create_torch_optimizer(self, total_steps: int) -> tuple[Any, Any]:
        self.create_optimizer_and_scheduler(total_steps)
        return self.optimizer, self.lr_scheduler

    def _make_step(self, plan: Plan, optimizer: RunOptimizer) -> Any:
        """The step of training: `(state, batch) -> (state, metrics)`."""
        args, strategy, average_tokens = self.args, resolve_strategy(self.args), self.args.average_tokens_across_devices
        if isinstance(strategy, DeepSpeed):
            parallel = DataParallelConfig(self.group, average_tokens)
            overrides = self._overrides()
            return compose_deepspeed_step(self.model, self.loss_config, plan, optimizer, overrides, parallel, strategy.stage)
        if self.step is not None and not isinstance(self.step, Transform):
            step = self.step
        else:
            parallel = DataParallelConfig(self.group, average_tokens, device_ids(args))
            step = compose_step(self.model, self.loss_config, plan, optimizer.transform, self._overrides(), parallel)
        return distribute_step(step, args, self.group)

    def _start_engine(self, plan: Plan, optimizer: RunOptimizer) -> RunOptimizer:
        """Start DeepSpeed's engine around the model, where the arguments ask for it."""
        if not isinstance(resolve_strategy(self.args), DeepSpeed):
            return optimizer
        check_unpartitioned(self.model, self.deepspeed)
        self.propagate_args_to_deepspeed()
        methods = OptimizerMethods(self.create_optimizer, self.create_scheduler, self.get_decay_parameter_names)
        made = start_engine(
            self.model,
            self.args,
            plan,
            optimizer,
            config=self.deepspeed_config,
            methods=methods,
            own_optimizer=self.optimizer is not None,
        )
        self.optimizer, self.lr_scheduler = made.optimizer, made.scheduler
        self.deepspeed = self.model_wrapped = made.engine
        return made

    def _check_deepspeed(self, method: str = "") -> None:
        own_training_step = overridden(self, "training_step")
        check_deepspeed(self.args, own_step=self.step is not None, own_training_step=own_training_step, method=method)

    # What a run is given

    def _override(self, *names: str) -> Any:
        """The first of these methods if any of them is overridden."""
        return getattr(self, names[0]) if overridden(self, *names) else None

    def _overrides(self) -> Overrides:
        training_step = self._override("training_step")
        scales = training_step is not None and self.args.mixed_precision == "fp16"
        return Overrides(
            compute_loss=self._override("compute_loss"),
            training_step=training_step,
            context=self._override("compute_loss_context_manager", "autocast_smart_context_manager"),
            prepare_inputs=self._override("_prepare_inputs"),
            scaler=scaler_of(self.accelerator) if scales else None,
        )

    def _hooks(self) -> Hooks:
        saves = overridden(self, "save_model")
        return Hooks(
            call_event=self._call_event,
            train_source=self.train_source,
            make_optimizer=self._make_optimizer,
            start_engine=self._start_engine,
            make_step=self._make_step,
            after_save=partial(hub.push_from_checkpoint, self.hub_session, self),
            push_at_end=partial(hub.push_at_end, self.hub_session, self),
            total_train_batch_size=lambda: self.get_total_train_batch_size(self.args),
            num_trainable_parameters=self.get_num_trainable_parameters,
            get_batch_samples=self._override("get_batch_samples"),
            set_initial_training_values=self._override("set_initial_training_values"),
            num_examples=self._override("num_examples"),
            floating_point_ops=self._override("floating_point_ops"),
            save_model=partial(hub.save_without_push, self.save_model) if saves else None,
            report_evaluation=self.report_to_hp_search,
        )

    def _run_context(self) -> RunContext:
        return RunContext(
            trainer=self,
            hooks=self._hooks(),
            args=self.args,
            model=self.model,
            callback_handler=self.callback_handler,
            processing_class=self.processing_class,
            label_names=self.label_names,
            group=self.group,
            world=self.world,
            start_time=self.start_time,
            memory_metrics=getattr(self, "memory_metrics", dict),
        )

    def _prepare_model(self, trial: Any = None) -> None:
        """Make a new model if there is a `model_init`, and enable gradient checkpointing."""
        if self.model_init is not None:
            self.model = self.model_wrapped = prepare_model(self.call_model_init(trial), self.args)
        if self.args.gradient_checkpointing:
            enable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]  # parsed

    def train_source(self, seed: int) -> Source:
        """The local shard of the training batches, in numbered epochs, checked on their first examples.

        Args:
            seed: of their order, and of everything random in the data.
        """
        loader = self.get_train_dataloader()
        self._set_context(train_dataloader=loader)
        rule = None if overridden(self, "compute_loss", "training_step") else self.loss_config
        check_dataloader(loader, self.model, rule, "training")
        micro = self.args.gradient_accumulation_steps
        share = partial(local_shard, args=self.args)
        source = make_source(loader, seed=seed, device=self.args.device, what="training", micro_batches=micro, shard=share)
        return check_first_batch(source, lambda batch: check_batch(batch, self.model, rule, "training"))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from `model_init`, the same at each call."""
        seed_generators(self.args.seed, self.args.device)
        return call_model_init(self.model_init, trial)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Examples in an update, over all ranks."""
        return total_train_batch_size(args, self._train_batch_size)

    @property
    def accelerator(self) -> Any:
        """An accelerate Accelerator with the settings of the arguments; made at the first access."""
        if self._accelerator is None:
            self._accelerator = make_accelerator(self.args)
        return self._accelerator

    def propagate_args_to_deepspeed(self, auto_find_batch_size: bool = False) -> None:
        """Fill the arguments into DeepSpeed's configuration (`deepspeed_config`): where it says "auto", or has no value.

        Args:
            auto_find_batch_size: let the arguments win where batch sizes differ.

        Raises:
            ArgumentError: the configuration says something else than the arguments, or there is none.
        """
        size = self._train_batch_size
        self.deepspeed_config = fill_config(self.args, self.group.size, size, auto_find_batch_size)

    def _call_event(self, event: str, **kwargs: Any) -> None:
        """Call the callbacks with an event; they may set flags of `control`."""
        self.control = self.callback_handler.call_event(event, self.args, self.state, self.control, **kwargs)

    def _set_context(self, **changes: Any) -> None:
        own = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        self.callback_handler.context = own | {"lr_scheduler": self.lr_scheduler} | changes
