"""The configuration of an evaluation: what it computes and keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from fts import steps
from fts.distributed.object_collectives import single_process_gather
from fts.trainer.arguments import TrainingArguments
from fts.trainer.model import loss_denominator
from fts.typing import Number


@attrs.frozen
class EvaluationConfig:
    """What an evaluation computes and keeps.

    Attributes:
        prefix: of the metrics' names.
        loss_weight: from a batch to the denominator of its mean loss; None: the batch size.
        compute_metrics: `EvalPrediction -> {name: number}`; called where there are predictions and labels.
        batch_eval_metrics: call it for each batch, with `compute_result=True` for the last one, whose metrics are used.
        keep: whether predictions and labels are kept for the result; with `batch_eval_metrics` the metrics do not need them.
        concat_batches: join the batches to arrays with a row per example; otherwise lists with an entry per batch.
        main_input_name: the key of the batch that `EvalPrediction.inputs` is made of; None: no inputs. With
            `batch_eval_metrics` the inputs are the complete batch, as in transformers.
        include_losses: whether there is `EvalPrediction.losses`.
        preprocess_logits: `(logits, labels) -> logits`, run before they are kept.
        skip_nonfinite: leave losses that are NaN or infinite out of the mean, unless all are.
        accumulation_steps: how many batches stay on an accelerator before they are copied to the CPU; None: a bounded amount.
        on_batch: called after each batch.
        all_gather: gathers the outputs of all ranks: `(local outputs or None) -> those of all ranks, in order`.
        total: how many examples there are; None: the length of the dataset, if it has one.
        memory_limit: bytes of arrays in memory, beyond which they are in temporary files; None: half of what is free.
        directory: where these files are; None: the system's directory for temporary files.
    """

    prefix: str = "eval"
    loss_weight: Callable[[Any], Number] | None = None
    compute_metrics: Callable[..., Any] | None = None
    batch_eval_metrics: bool = False
    keep: bool = True
    concat_batches: bool = True
    main_input_name: str | None = None
    include_losses: bool = False
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    skip_nonfinite: bool = False
    accumulation_steps: int | None = None
    on_batch: Callable[[], Any] = lambda: None
    all_gather: Callable[[Any], list[Any]] = single_process_gather
    total: int | None = None
    memory_limit: int | None = None
    directory: str | Path | None = None


def evaluation_config(
    own: EvaluationConfig, args: TrainingArguments, model: nn.Module, label_names: Sequence[str]
) -> EvaluationConfig:
    """What a caller asks for, completed by the training arguments.

    Args:
        own: what the caller asks for: `prefix`, `keep`, `loss_weight` and the callables.
        args: the training arguments.
        model: says which labels its loss counts, and by `main_input_name` which key of a batch is its input.
        label_names: the batch's keys that are labels.
    """
    included = args.include_for_metrics

    def loss_weight(batch: Any) -> Number:
        return loss_denominator(model, batch, label_names) if isinstance(batch, Mapping) else steps.batch_size_of(batch) or 1

    return attrs.evolve(
        own,
        loss_weight=loss_weight if own.loss_weight is None else own.loss_weight,
        batch_eval_metrics=args.batch_eval_metrics,
        keep=own.keep or not args.batch_eval_metrics,
        concat_batches=args.eval_do_concat_batches,
        main_input_name=getattr(model, "main_input_name", "input_ids") if "inputs" in included else None,
        include_losses="loss" in included,
        skip_nonfinite=args.logging_nan_inf_filter,
        accumulation_steps=args.eval_accumulation_steps,
    )


def dataset_length(batches: Any) -> int | None:
    """How many examples a DataLoader's dataset has; None where that is not known, as for a list of batches.

    >>> from torch.utils.data import DataLoader
    >>> dataset_length(DataLoader([1, 2, 3], batch_size=2)), dataset_length([[1, 2]])
    (3, None)
    """
    try:
        return len(batches.dataset)
    except (AttributeError, TypeError, NotImplementedError):  # no dataset, or one without a length
        return None
