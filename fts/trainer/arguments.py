"""TrainingArguments: what a run is asked to be."""

# ruff: noqa: RUF009, RUF036 - arg() makes a dataclass field; HfArgumentParser wants None in front of a list

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from fts.errors import ArgumentError
from fts.trainer.checks import check_choice, check_flag, check_interval, check_names, check_real, check_whole
from fts.trainer.choices import IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType


def arg(default: Any, text: str) -> Any:
    """A field with its explanation, which a command-line parser shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArguments:
    """The settings of a training run, with Hugging Face's names and defaults.

    Every argument is explained by the `help` of its field. Values and contradictions are checked when the arguments are made;
    a name that does not exist gets the nearest one that does.

    Raises:
        ArgumentError: an argument is unknown, has a value that cannot work, or contradicts another one.

    >>> args = TrainingArguments("runs/demo", learning_rate=1e-4, eval_strategy="epoch")
    >>> args.eval_strategy == "epoch", args.num_train_epochs
    (True, 3.0)
    """

    output_dir: str | None = arg(None, "Where checkpoints and the model are written; 'trainer_output' if not given.")
    do_train: bool = arg(False, "Read by scripts, not by the Trainer.")
    do_eval: bool = arg(False, "Read by scripts; True if eval_strategy is not 'no'.")
    do_predict: bool = arg(False, "Read by scripts, not by the Trainer.")

    per_device_train_batch_size: int = arg(8, "Rows in a micro-batch on each device.")
    per_device_eval_batch_size: int = arg(8, "Rows in a batch of evaluation on each device.")
    gradient_accumulation_steps: int = arg(1, "How many micro-batches make one update.")
    num_train_epochs: float = arg(3.0, "How many passes over the data; a fraction ends within an epoch.")
    max_steps: int = arg(-1, "Stop after so many updates; if positive it replaces num_train_epochs.")

    optim: OptimizerNames | str = arg("adamw_torch", "adamw_torch, adamw_torch_fused or sgd.")
    learning_rate: float = arg(5e-5, "The highest learning rate.")
    weight_decay: float = arg(0.0, "Weight decay of all parameters but biases and normalisation weights.")
    adam_beta1: float = arg(0.9, "Decay of Adam's running mean of gradients.")
    adam_beta2: float = arg(0.999, "Decay of Adam's running mean of squared gradients.")
    adam_epsilon: float = arg(1e-8, "Adam's epsilon.")
    max_grad_norm: float = arg(1.0, "Scale gradients down to this global norm; 0 does not clip.")
    lr_scheduler_type: SchedulerType | str = arg("linear", "linear, cosine, polynomial, constant or constant_with_warmup.")
    warmup_steps: float = arg(0, "Over how many updates the rate first rises from 0; below 1: a share of all updates.")

    logging_strategy: IntervalStrategy | str = arg("steps", "no, steps or epoch.")
    logging_steps: float = arg(500, "Updates between two logs; below 1: a share of all updates.")
    logging_first_step: bool = arg(False, "Log the first update, too.")
    eval_strategy: IntervalStrategy | str = arg("no", "no, steps or epoch.")
    eval_steps: float | None = arg(None, "Updates between two evaluations; logging_steps if not given.")
    save_strategy: SaveStrategy | str = arg("steps", "no, steps, epoch or best.")
    save_steps: float = arg(500, "Updates between two checkpoints; below 1: a share of all updates.")
    save_total_limit: int | None = arg(None, "How many checkpoints to keep beside the best one; the newest always stays.")
    load_best_model_at_end: bool = arg(False, "End with the weights of the best evaluation.")
    metric_for_best_model: str | None = arg(None, "The evaluation metric that decides which checkpoint is best.")
    greater_is_better: bool | None = arg(None, "Whether a higher metric is better; default: if its name does not end in 'loss'.")

    seed: int = arg(42, "Everything random in the run is a function of this; a resumed run keeps the seed that it began with.")
    data_seed: int | None = arg(None, "The seed of the order of the data; `seed` if not given. A resumed run keeps it, too.")
    bf16: bool = arg(False, "Compute in bfloat16; parameters stay as they are.")
    use_cpu: bool = arg(False, "Use the CPU even where there is an accelerator.")
    torch_compile: bool = arg(False, "Compile the whole step, from loss to update, as one graph.")

    dataloader_drop_last: bool = arg(False, "Leave out a last training batch that is not full; evaluation keeps every row.")
    dataloader_num_workers: int = arg(0, "How many processes fetch data ahead; 0 fetches in this one.")
    remove_unused_columns: bool = arg(True, "Drop columns that the model's forward does not name.")
    label_names: list[str] | None = arg(None, "The batch's keys that are labels; by default those that forward names so.")
    disable_tqdm: bool | None = arg(None, "Print logs instead of showing a progress bar.")
    report_to: None | str | list[str] = arg("none", "Trackers; only 'none' for now.")
    resume_from_checkpoint: str | None = arg(None, "Read by scripts, which hand it to Trainer.train.")

    def __new__(cls, *args: Any, **kwargs: Any) -> TrainingArguments:
        # Before the generated __init__, whose TypeError would not know the nearest name; works in subclasses as it is.
        check_names(cls.__name__, kwargs, [item.name for item in fields(cls) if item.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.output_dir = "trainer_output" if self.output_dir is None else str(self.output_dir)
        _check_values(self)
        _fill_in(self)
        _check_contradictions(self)

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        if self.use_cpu:
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    @property
    def train_batch_size(self) -> int:
        """Rows in a micro-batch in this process."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Rows in a batch of evaluation in this process."""
        return self.per_device_eval_batch_size

    def to_dict(self) -> dict[str, Any]:
        """All arguments as plain values, which JSON can hold."""
        return {name: getattr(value, "value", value) for name, value in asdict(self).items()}


def _check_values(args: TrainingArguments) -> None:
    for item in fields(TrainingArguments):
        if isinstance(item.default, bool):
            check_flag(item.name, getattr(args, item.name))
    check_flag("disable_tqdm", args.disable_tqdm, or_none=True)
    check_flag("greater_is_better", args.greater_is_better, or_none=True)
    args.eval_strategy = check_choice("eval_strategy", args.eval_strategy, IntervalStrategy)
    args.logging_strategy = check_choice("logging_strategy", args.logging_strategy, IntervalStrategy)
    args.save_strategy = check_choice("save_strategy", args.save_strategy, SaveStrategy)
    args.lr_scheduler_type = check_choice("lr_scheduler_type", args.lr_scheduler_type, SchedulerType)
    args.optim = check_choice("optim", args.optim, OptimizerNames)
    _check_is_there(args)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_whole(name, getattr(args, name), 1)
    check_whole("dataloader_num_workers", args.dataloader_num_workers, 0)
    check_whole("seed", args.seed, 0, bits=63)
    if args.data_seed is not None:
        check_whole("data_seed", args.data_seed, 0, bits=63)
    if args.max_steps != -1:
        check_whole("max_steps", args.max_steps, 1, "Use -1 to train for num_train_epochs.")
    if args.save_total_limit is not None:
        check_whole("save_total_limit", args.save_total_limit, 1, "Use None to keep all, or save_strategy='no' to save none.")
    check_real("num_train_epochs", args.num_train_epochs, open_low=True)
    check_real("learning_rate", args.learning_rate)
    check_real("weight_decay", args.weight_decay)
    check_real("adam_beta1", args.adam_beta1, 0, 1)
    check_real("adam_beta2", args.adam_beta2, 0, 1)
    check_real("adam_epsilon", args.adam_epsilon)
    check_real("max_grad_norm", args.max_grad_norm)
    check_interval("warmup_steps", args.warmup_steps, zero=True)
    check_interval("logging_steps", args.logging_steps)
    check_interval("save_steps", args.save_steps)
    if args.eval_steps is not None:
        check_interval("eval_steps", args.eval_steps)
    metric = args.metric_for_best_model
    if metric is not None and not (isinstance(metric, str) and metric):
        raise ArgumentError(f"metric_for_best_model={metric!r} must be the name of a figure of the evaluation, such as 'loss'.")
    if args.label_names is not None and not isinstance(args.label_names, (list, tuple)):
        raise ArgumentError(f"label_names={args.label_names!r} must be a list of names, such as label_names=['labels'].")
    if args.report_to not in (None, "none", [], ["none"]):
        raise ArgumentError(
            f"report_to={args.report_to!r}: trackers are not there yet in this version of fts. Use report_to='none', and a "
            "callback with on_log(args, state, control, logs, **kwargs) to send logs elsewhere."
        )


_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.SGD)
_SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")


def _check_is_there(args: TrainingArguments) -> None:
    if args.optim not in _OPTIMIZERS:
        raise ArgumentError(f"optim='{args.optim}' is not yet in this version of fts. Use one of {', '.join(_OPTIMIZERS)}.")
    if args.lr_scheduler_type not in _SCHEDULES:
        kind = args.lr_scheduler_type
        raise ArgumentError(f"lr_scheduler_type='{kind}' is not yet in this version of fts. Use one of {', '.join(_SCHEDULES)}.")


def _fill_in(args: TrainingArguments) -> None:
    args.do_eval = args.do_eval or args.eval_strategy != IntervalStrategy.NO
    args.disable_tqdm = bool(args.disable_tqdm)
    args.report_to = []
    if args.eval_strategy == IntervalStrategy.STEPS and args.eval_steps is None:
        args.eval_steps = args.logging_steps
    if args.load_best_model_at_end and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.greater_is_better is None and args.metric_for_best_model is not None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")


def _check_contradictions(args: TrainingArguments) -> None:
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        raise ArgumentError("`args.metric_for_best_model` must be provided with save_strategy='best': it says what is best.")
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise ArgumentError("save_strategy='best' needs evaluations, but eval_strategy='no'. Use 'epoch' or 'steps'.")
    if args.load_best_model_at_end and args.save_strategy != SaveStrategy.BEST:
        _check_best_is_saved(args)


def _check_best_is_saved(args: TrainingArguments) -> None:
    if args.eval_strategy == IntervalStrategy.NO or str(args.eval_strategy) != str(args.save_strategy):
        raise ArgumentError(
            f"load_best_model_at_end=True needs a checkpoint for each evaluation, but eval_strategy='{args.eval_strategy}' and "
            f"save_strategy='{args.save_strategy}'. Give both the same value ('steps' or 'epoch'), or use save_strategy='best'."
        )
    if args.eval_strategy != IntervalStrategy.STEPS or args.eval_steps is None:
        return
    ratio = args.save_steps / args.eval_steps
    if (args.save_steps < 1) != (args.eval_steps < 1) or abs(ratio - round(ratio)) > 1e-9 or ratio < 1:
        raise ArgumentError(
            f"load_best_model_at_end=True needs save_steps to be a multiple of eval_steps, so that what is saved was evaluated; "
            f"save_steps={args.save_steps} and eval_steps={args.eval_steps} are not."
        )
