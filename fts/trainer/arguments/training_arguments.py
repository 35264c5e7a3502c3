"""TrainingArguments: the settings of a run."""

# ruff: noqa: RUF009, RUF036 - arg() makes a dataclass field; HfArgumentParser wants None in front of a list

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from fts.trainer.arguments import argument_names, assignment, processes, serialization, setters
from fts.trainer.arguments.enums import (
    DebugOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    ParallelMode,
    SaveStrategy,
    SchedulerType,
)
from fts.trainer.arguments.fields import FLAG, arg
from fts.trainer.arguments.log_level import process_log_level
from fts.trainer.arguments.validators import DICT_ARGUMENTS


@dataclass(repr=False)
class TrainingArguments:
    """The settings of a training run, with Hugging Face's names and defaults.

    The `help` of each field describes it. A value is checked at construction and whenever it is assigned later; conflicts between
    arguments at construction and when a run begins. The error for an unknown name suggests the nearest known one. Some defaults
    depend on other arguments (`eval_steps` on `logging_steps` …).

    Raises:
        ArgumentError: an argument is unknown, has an invalid value, contradicts another one, needs hardware that is missing, or
            asks for what this version of fts does not have.
        MissingDependencyError: an argument needs a package that is not installed.

    >>> args = TrainingArguments("runs/demo", learning_rate=1e-4, eval_strategy="epoch")
    >>> args.eval_strategy == "epoch", args.num_train_epochs
    (True, 3.0)
    >>> args.learning_rat = 1.0
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: TrainingArguments has no argument 'learning_rat'. Did you mean 'learning_rate'? ...
    """

    # Where, and how long
    output_dir: str | None = arg(None, "Where checkpoints and the model are written; 'trainer_output' if not given.")
    per_device_train_batch_size: int = arg(8, "Examples in a micro-batch on each device.")
    num_train_epochs: float = arg(3.0, "How many passes over the data; a fraction ends within an epoch.")
    max_steps: int = arg(-1, "Stop after so many updates; if positive it replaces num_train_epochs.")

    # Learning rate
    learning_rate: float = arg(5e-5, "The highest learning rate.")
    lr_scheduler_type: SchedulerType | str = arg("linear", "How the rate moves after its warm-up: linear, cosine, constant …")
    lr_scheduler_kwargs: dict[str, Any] | str | None = arg(None, "More settings of that schedule: a dict, or JSON.")
    warmup_steps: float = arg(0, "Over how many updates the rate first rises from 0; below 1: a share of all updates.")

    # Optimizer
    optim: OptimizerNames | str = arg("adamw_torch", "Which optimizer: adamw_torch, sgd, adafactor …")
    optim_args: str | None = arg(None, "More settings of that optimizer: 'name=value,name=value'.")
    weight_decay: float = arg(0.0, "Weight decay of all parameters but biases and normalisation weights.")
    adam_beta1: float = arg(0.9, "Decay of Adam's running mean of gradients.")
    adam_beta2: float = arg(0.999, "Decay of Adam's running mean of squared gradients.")
    adam_epsilon: float = arg(1e-8, "Adam's epsilon.")
    optim_target_modules: None | str | list[str] = arg(None, "Names of the modules that a galore or apollo optimizer works on.")

    # Gradients and loss
    gradient_accumulation_steps: int = arg(1, "How many micro-batches make one update.")
    average_tokens_across_devices: bool = arg(True, "Average the loss over the tokens of all processes, not of each alone.")
    max_grad_norm: float = arg(1.0, "Scale gradients down to this global norm; 0 does not clip.")
    label_smoothing_factor: float = arg(0.0, "Share of the target that is distributed over all classes.")

    # Precision
    bf16: bool = arg(False, "Compute in bfloat16; parameters stay as they are.")
    fp16: bool = arg(False, "Compute in float16 with loss scaling; parameters stay as they are.")
    bf16_full_eval: bool = arg(False, "Evaluate with the weights in bfloat16.")
    fp16_full_eval: bool = arg(False, "Evaluate with the weights in float16.")
    tf32: bool | None = arg(None, "Multiply matrices in TF32 on NVIDIA GPUs from Ampere on; by default as torch is set.")

    # Memory and speed
    activation_checkpointing: bool | None = arg(None, "Recompute activations in the backward pass, to save memory.", **FLAG)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = arg(None, "How activations are checkpointed: a dict, or JSON.")
    gradient_checkpointing: bool | None = arg(None, "Another name of activation_checkpointing.", **FLAG)
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = arg(None, "Another name of activation_checkpointing_kwargs.")
    torch_compile: bool = arg(False, "Compile the step, from loss to update, as one graph.")
    torch_compile_backend: str | None = arg(None, "What compiles it: inductor unless given. Turns torch_compile on.")
    torch_compile_mode: str | None = arg(None, "default, reduce-overhead or max-autotune. Turns torch_compile on.")
    use_liger_kernel: bool = arg(False, "Use the GPU kernels of the package liger-kernel in the model.")
    liger_kernel_config: dict[str, bool] | None = arg(None, "Which of those kernels; all that fit the model if not given.")
    use_cache: bool = arg(False, "Let the model keep its keys and values while it trains.")
    neftune_noise_alpha: float | None = arg(None, "Add noise of this strength to embeddings in training (NEFTune).")
    torch_empty_cache_steps: int | None = arg(None, "Free the device's unused memory after so many updates.")
    auto_find_batch_size: bool = arg(False, "If memory runs out, start again with smaller micro-batches.")

    # Logging
    logging_strategy: IntervalStrategy | str = arg("steps", "no, steps or epoch.")
    logging_steps: float = arg(500, "Updates between two logs; below 1: a share of all updates.")
    logging_first_step: bool = arg(False, "Log the first update, too.")
    log_on_each_node: bool = arg(True, "Log once on each machine, not only in the main process.")
    logging_nan_inf_filter: bool = arg(True, "Leave NaN and infinite losses out of the logged mean.")
    include_num_input_tokens_seen: Literal["all", "non_padding", "no", True, False] = arg(
        "no", "Count tokens: all, non_padding or no; True is all.", nargs="?", const="all"
    )
    log_level: str = arg("passive", "The level of fts' loggers: debug, info, warning, error, critical; passive changes nothing.")
    log_level_replica: str = arg("warning", "The level in processes that do not log.")
    disable_tqdm: bool | None = arg(None, "Print logs instead of showing a progress bar.")
    report_to: None | str | list[str] = arg("none", "Trackers: names, 'all' that are installed, or 'none'.")
    run_name: str | None = arg(None, "What trackers call the run.")
    project: str = arg("huggingface", "The project that trackers put the run in.")
    trackio_space_id: str | None = arg("trackio", "The Space that trackio logs to; None for a local directory.")
    trackio_bucket_id: str | None = arg(None, "The bucket that trackio logs to.")
    trackio_static_space_id: str | None | Literal[False] = arg(None, "The Space that shows trackio's logs after the run.")

    # Evaluation
    eval_strategy: IntervalStrategy | str = arg("no", "no, steps or epoch.")
    eval_steps: float | None = arg(None, "Updates between two evaluations; logging_steps if not given.")
    eval_delay: float = arg(0, "Updates or epochs, as eval_strategy counts, before the first evaluation.")
    per_device_eval_batch_size: int = arg(8, "Examples in a batch of evaluation on each device.")
    prediction_loss_only: bool = arg(False, "Evaluate the loss alone; keep no predictions.")
    eval_on_start: bool = arg(False, "Evaluate before the first update.")
    eval_do_concat_batches: bool = arg(True, "Concatenate the predictions of all batches; else they stay a list.")
    eval_use_gather_object: bool = arg(False, "All-gather predictions that are no tensors, as Python objects.")
    eval_accumulation_steps: int | None = arg(None, "Batches after which predictions leave the device; at the end if not given.")
    include_for_metrics: list[str] = arg([], "What else compute_metrics gets: inputs, loss.")
    batch_eval_metrics: bool = arg(False, "Call compute_metrics for each batch, so that no predictions are kept.")

    # Checkpoints
    save_only_model: bool = arg(False, "Save the weights alone; such a checkpoint cannot be resumed.")
    save_strategy: SaveStrategy | str = arg("steps", "no, steps, epoch or best.")
    save_steps: float = arg(500, "Updates between two checkpoints; below 1: a share of all updates.")
    save_on_each_node: bool = arg(False, "Save on each machine, not only in the main process.")
    save_total_limit: int | None = arg(None, "How many checkpoints to keep besides the best one; the newest always stays.")
    enable_jit_checkpoint: bool = arg(False, "Save a checkpoint on SIGTERM; fts always does.")

    # Hub
    push_to_hub: bool = arg(False, "Upload the model whenever it is saved.")
    hub_token: str | None = arg(None, "The token to upload with.", repr=False)
    hub_private_repo: bool | None = arg(None, "Whether a new repository is private; by default as the organization is set.")
    hub_model_id: str | None = arg(None, "The repository; the name of output_dir if not given.")
    hub_strategy: HubStrategy | str = arg("every_save", "What is uploaded when: end, every_save, checkpoint or all_checkpoints.")
    hub_always_push: bool = arg(False, "Upload also while the upload before is still running.")
    hub_revision: str | None = arg(None, "The branch to upload to.")

    # The best model
    load_best_model_at_end: bool = arg(False, "End with the weights of the best evaluation.")
    metric_for_best_model: str | None = arg(None, "The evaluation metric that decides which checkpoint is best.")
    greater_is_better: bool | None = arg(None, "Whether a higher metric is better; default: if its name does not end in 'loss'.")

    # Resuming
    ignore_data_skip: bool = arg(False, "A resumed run starts its epoch again instead of skipping what was seen.")
    restore_callback_states_from_checkpoint: bool = arg(False, "Restore the constructor arguments of callbacks, too, on resume.")

    # Randomness
    full_determinism: bool = arg(False, "Use only deterministic kernels; slow.")
    seed: int = arg(42, "The seed of everything random; a resumed run keeps the seed that it began with.")
    data_seed: int | None = arg(None, "The seed of the order of the data; `seed` if not given. A resumed run keeps it, too.")

    # Devices
    use_cpu: bool = arg(False, "Use the CPU even where there is an accelerator.")
    accelerator_config: dict[str, Any] | str | None = arg(None, "How batches are divided over processes: dict, JSON, or a file.")
    parallelism_config: Any = arg(None, "accelerate's ParallelismConfig.")

    # Data
    dataloader_drop_last: bool = arg(False, "Drop a last training batch that is not full; evaluation keeps every example.")
    dataloader_num_workers: int = arg(0, "How many worker processes fetch data ahead; 0 fetches in this process.")
    dataloader_pin_memory: bool = arg(True, "Fetch into memory from which a GPU copies faster; off with use_cpu.")
    dataloader_persistent_workers: bool = arg(False, "Keep the workers between epochs.")
    dataloader_prefetch_factor: int | None = arg(None, "How many batches each worker fetches ahead.")
    dataloader_multiprocessing_context: str | None = arg(None, "How workers are started: fork, spawn or forkserver.")
    dataloader_in_order: bool = arg(True, "Whether batches come in order, or as soon as a worker has one.")
    remove_unused_columns: bool = arg(True, "Drop columns that the model's forward does not name.")
    label_names: list[str] | None = arg(None, "The batch's keys that are labels; by default those that forward names so.")
    train_sampling_strategy: str = arg("random", "The order of the training examples: random, sequential or group_by_length.")
    length_column_name: str = arg("length", "The column with the lengths of examples, if there is one.")

    # Several processes
    ddp_find_unused_parameters: bool | None = arg(None, "Allow parameters that a loss does not use.")
    ddp_bucket_cap_mb: int | None = arg(None, "The size of DDP's all-reduce buckets in MB.")
    ddp_broadcast_buffers: bool | None = arg(None, "Broadcast the buffers of rank 0 at each forward.")
    ddp_static_graph: bool | None = arg(None, "Whether each step uses the same parameters.")
    ddp_backend: str | None = arg(None, "The backend of collectives: nccl, gloo, mpi, xccl, hccl …")
    ddp_timeout: int = arg(1800, "Timeout of collectives in seconds.")
    fsdp: str | None = arg(None, "Shard the parameters over processes (FSDP).", **FLAG)
    fsdp_config: dict[str, Any] | str | None = arg(None, "FSDP's settings: a dict, JSON, or a JSON file.")
    deepspeed: dict[str, Any] | str | None = arg(None, "DeepSpeed's configuration: a dict, JSON, or a JSON file.")

    # Debugging
    debug: str | list[DebugOption] = arg("", "underflow_overflow: stop at the first module whose output is not finite.")
    skip_memory_metrics: bool = arg(True, "Leave memory usage out of the metrics.")

    # Read by scripts
    do_train: bool = arg(False, "Read by scripts, not by the Trainer.")
    do_eval: bool = arg(False, "Read by scripts; True if eval_strategy is not 'no'.")
    do_predict: bool = arg(False, "Read by scripts, not by the Trainer.")
    resume_from_checkpoint: str | None = arg(None, "Read by scripts, which pass it to Trainer.train.")
    local_rank: int = arg(-1, "Set by old launchers; see local_process_index.")

    # Documented, but gone from newer versions of transformers; at the end, so that positions mean the same as there
    save_safetensors: bool = arg(True, "Weights are written as safetensors; fts has no other format.")
    group_by_length: bool = arg(False, "Put examples of similar length into a batch: train_sampling_strategy='group_by_length'.")

    # Of fts alone
    async_save: bool = arg(True, "Write checkpoints asynchronously, from a copy of the state; else training waits.")
    save_every: str | None = arg(None, "Also save when so much time has passed since the last save: '20min', or seconds.")
    max_time: str | None = arg(None, "Save and end the process with status 75 after so much training: '3h50min', or seconds.")
    nonfinite: Literal["raise", "skip", "rollback", "ignore"] = arg(
        "raise", "On a NaN or infinite loss or gradient: raise, skip the update, roll back to a checkpoint, or ignore it."
    )
    nonfinite_limit: int = arg(10, "How many updates in a row may be skipped, or how often a run may roll back.")

    # Attributes that code written for Hugging Face's arguments reads, and may set
    distributed_state: ClassVar[Any] = None
    deepspeed_plugin: ClassVar[Any] = None
    hf_deepspeed_config: ClassVar[Any] = None
    fsdp_plugin_args: ClassVar[Any] = None
    xla_fsdp_config: ClassVar[Any] = None
    _VALID_DICT_FIELDS: ClassVar[list[str]] = list(DICT_ARGUMENTS)  # a subclass may add its own, which may then be JSON, too

    def __new__(cls, *args: Any, **kwargs: Any) -> TrainingArguments:
        # Before the generated __init__, whose TypeError would not suggest the nearest name; works in subclasses unchanged.
        argument_names.check_constructor_names(cls, kwargs)
        return super().__new__(cls)

    if not TYPE_CHECKING:  # so that a type checker, too, rejects unknown names

        def __setattr__(self, name: str, value: Any) -> None:
            assignment.set_argument(self, name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__post_init__" in cls.__dict__:
            cls.__post_init__ = assignment.finalize_after(cls.__post_init__)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        assignment.finalize(self)

    __str__ = __repr__ = serialization.to_string

    # Batches and devices

    @property
    def train_batch_size(self) -> int:
        """Examples in a micro-batch of this process."""
        return self.per_device_train_batch_size * max(1, self.n_gpu)

    @property
    def eval_batch_size(self) -> int:
        """Examples in a batch of evaluation of this process."""
        return self.per_device_eval_batch_size * max(1, self.n_gpu)

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return processes.resolve_device(self.use_cpu)

    @property
    def n_gpu(self) -> int:
        """How many accelerators this process trains on; 0 on the CPU. `_n_gpu` overrides it, as in Hugging Face's."""
        return int(self.__dict__.get("_n_gpu", processes.num_devices(self.device.type)))

    @property
    def parallel_mode(self) -> ParallelMode:
        """How many devices work together, and how."""
        if self.world_size > 1:
            return ParallelMode.DISTRIBUTED
        return ParallelMode.NOT_DISTRIBUTED if self.n_gpu > 1 else ParallelMode.NOT_PARALLEL

    @property
    def mixed_precision(self) -> str:
        """The precision of the computation: "no", "bf16" or "fp16"; by default that of `accelerate launch`."""
        given = "fp16" if self.fp16 else "bf16" if self.bf16 else None
        return given or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the model is moved to the device; None leaves that to the Trainer. A subclass may return True or False."""
        return None

    # Processes

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return processes.world_size()

    @property
    def process_index(self) -> int:
        """The rank of this process."""
        return processes.process_index()

    @property
    def local_process_index(self) -> int:
        """The rank of this process on its machine."""
        return processes.local_process_index()

    @property
    def should_log(self) -> bool:
        """Whether this process logs: the main process of its machine, or of all if log_on_each_node=False."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process saves: the main process, or that of its machine if save_on_each_node=True."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """`ddp_timeout` as a timedelta."""
        return timedelta(seconds=self.ddp_timeout)

    def get_process_log_level(self) -> int:
        """The log level of this process: `log_level`, or `log_level_replica` where it does not log."""
        return process_log_level(self.log_level, self.log_level_replica, self.should_log)

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """A context in which the main process works before the others, which then use its results.

        The others wait as long as it takes; if it fails, they raise DistributedError.

        Args:
            local: the main process of each machine goes first; False: that of all.
            desc: the work, for messages.
        """
        return processes.main_process_first(self, local, desc)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Over how many of so many updates the learning rate rises.

        >>> TrainingArguments(warmup_steps=0.1).get_warmup_steps(55)
        6
        """
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(num_training_steps * self.warmup_steps)

    # Setters of several arguments, and serialization

    set_training = setters.set_training
    set_evaluate = setters.set_evaluate
    set_testing = setters.set_testing
    set_save = setters.set_save
    set_logging = setters.set_logging
    set_push_to_hub = setters.set_push_to_hub
    set_optimizer = setters.set_optimizer
    set_lr_scheduler = setters.set_lr_scheduler
    set_dataloader = setters.set_dataloader

    to_dict = serialization.to_dict
    to_json_string = serialization.to_json_string
    to_sanitized_dict = serialization.to_sanitized_dict
