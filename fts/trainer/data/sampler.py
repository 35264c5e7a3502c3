"""Samplers: in which order the examples of a data set are visited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler, SequentialSampler

from fts.errors import DataError, MissingDependencyError
from fts.loops.sampling import EpochSampler, IsolatedGenerators, length_grouped_indices, permutation
from fts.messages import install_hint
from fts.trainer.arguments import TrainingArguments, num_parallel_batches, sampling_strategy

PROGRESS_BAR_FROM = 10_000
"""From how many examples on a progress bar is shown while their lengths are read."""


def is_map_style(dataset: Any) -> bool:
    """Whether a dataset is map-style: it has `__getitem__` and `__len__`, so that examples can be read in any order."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def data_seed(args: TrainingArguments) -> int:
    """The seed of the order of the data."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def train_sampler(dataset: Any, args: TrainingArguments, processing_class: Any = None) -> Sampler[int] | None:
    """The order of training: shuffled, in sequence, or grouped by length.

    Args:
        dataset: the training set, with all its columns.
        args: the training arguments.
        processing_class: names the model's main input, whose length counts.

    Returns:
        A sampler that is a function of seed and epoch; None for data that cannot be indexed.

    Raises:
        DataError: lengths are asked for, and cannot be found.
    """
    strategy = sampling_strategy(args)
    if not is_map_style(dataset):
        if strategy == "group_by_length":
            raise DataError(
                f"group_by_length needs training data with __getitem__ and __len__; a {type(dataset).__name__} can only be "
                "iterated. Turn it off, or sort the data into batches of similar length inside the dataset."
            )
        return None
    if strategy == "sequential":
        return SequentialSampler(dataset)
    if strategy == "random":
        return EpochSampler(partial(permutation, len(dataset)), len(dataset), data_seed(args))
    name = (getattr(processing_class, "model_input_names", None) or ["input_ids"])[0]
    lengths = example_lengths(dataset, args.length_column_name, name, show=not args.disable_tqdm)
    # groups are those of an update over all ranks, so that the order is that of one process with as large an update
    group_size = args.train_batch_size * args.gradient_accumulation_steps * num_parallel_batches(args)
    return EpochSampler(partial(length_grouped_indices, lengths, group_size), len(dataset), data_seed(args))


def eval_sampler(dataset: Any) -> Sampler[int] | None:
    """The order of evaluation: that of the data; None for data that cannot be indexed."""
    return SequentialSampler(dataset) if is_map_style(dataset) else None


def example_lengths(dataset: Any, column: str = "length", input_name: str = "input_ids", *, show: bool = False) -> Tensor:
    """The length of each example of an indexable data set, read once.

    Args:
        dataset: examples are dictionaries.
        column: holds the lengths, if there is such a column.
        input_name: otherwise they are those of this input.
        show: show a progress bar if there are many examples.

    Returns:
        int64, shape (examples,).

    Raises:
        DataError: examples have neither.

    >>> example_lengths([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])
    tensor([2, 3])
    """
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and hasattr(dataset, "with_format") and hasattr(dataset, "select_columns"):
        if column in columns:
            return torch.tensor(dataset.with_format(None)[column][:], dtype=torch.int64)
        if input_name in columns and dataset.format["type"] != "custom":  # a transform may change lengths
            plain = dataset.select_columns([input_name]).with_format(None)
            batches = (batch[input_name] for batch in plain.iter(1000))
            return _length_tensor((len(example) for batch in batches for example in batch), len(dataset), show)
    with IsolatedGenerators(0):  # examples may draw random numbers; this pass must not change the run
        return _length_tensor(
            (_example_length(dataset[index], column, input_name) for index in range(len(dataset))), len(dataset), show
        )


def _example_length(example: Any, column: str, input_name: str) -> int:
    if isinstance(example, Mapping):
        if column in example:
            return int(example[column])
        if input_name in example:
            return len(example[input_name])
    found = ", ".join(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
    raise DataError(
        f"group_by_length needs examples that are dictionaries with {column!r} or {input_name!r}; there is one of {found}. Add a "
        "column with the lengths, and name it by length_column_name."
    )


def _length_tensor(lengths: Iterator[int], total: int, show: bool) -> Tensor:
    return torch.tensor(
        list(_progress_bar(lengths, total) if show and total >= PROGRESS_BAR_FROM else lengths), dtype=torch.int64
    )


def _progress_bar(values: Iterator[int], total: int) -> Iterable[int]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            f"A progress bar needs tqdm: {install_hint('trainer')}. Or leave it out: disable_tqdm=True."
        ) from error
    bar: Iterable[int] = tqdm(values, total=total, desc="lengths", leave=False, dynamic_ncols=True)
    return bar
