"""The DataLoaders of training, evaluation and prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from fts.errors import ArgumentError, DataError
from fts.loops.device_placement import send_to_device
from fts.loops.worker_signals import iterate_ignoring_signals
from fts.trainer.arguments import TrainingArguments
from fts.trainer.data.collator import Collator
from fts.trainer.data.columns import remove_unused_columns
from fts.trainer.data.sampler import eval_sampler, is_map_style

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

SamplerFactory: TypeAlias = Callable[[Any], Any]
"""From a data set to its sampler; None for the order of the data."""


@attrs.frozen
class DataLoaderSettings:
    """How a data set becomes batches.

    Attributes:
        collator: makes a batch of examples.
        batch_size: examples in a batch.
        drop_last: leave out a last batch that is not full.
        options: further arguments of `torch.utils.data.DataLoader`, about workers and memory.
        device: where the loader puts its batches.
    """

    collator: Collator
    batch_size: int
    drop_last: bool = False
    options: Mapping[str, Any] = attrs.Factory(dict)
    device: torch.device = CPU


class DeviceDataLoader(DataLoader[Any]):
    """A DataLoader that puts its batches on a device.

    Args:
        dataset: as in DataLoader.
        device: where the batches go.
        **options: as in DataLoader.
    """

    only_moves_batches = True

    def __init__(self, dataset: Dataset[Any], *, device: torch.device, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.device = device

    def __iter__(self) -> Any:
        return (send_to_device(batch, self.device) for batch in iterate_ignoring_signals(self))


class IterableWrapper(IterableDataset[Any]):
    """Anything that can be iterated, as a data set that torch's DataLoader takes.

    Args:
        data: an iterable; its `set_epoch`, its length and its state, if it has them, are passed on.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # a TypeError says that there is none, as torch expects

    @property
    def state_dict(self) -> Any:
        """The data's own; None if it has none."""
        return getattr(self.data, "state_dict", None)

    @property
    def load_state_dict(self) -> Any:
        """The data's own; None if it has none."""
        return getattr(self.data, "load_state_dict", None)

    def set_epoch(self, epoch: int) -> None:
        """Call the data's `set_epoch`, if it has one."""
        set_epoch = getattr(self.data, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def train_dataloader(
    dataset: Any, args: TrainingArguments, collator: Collator, accepted: Sequence[str] | None, sampling: SamplerFactory
) -> DataLoader[Any]:
    """The training set as a DataLoader, in the order of a run.

    Args:
        dataset: the training set.
        args: the training arguments.
        collator: makes a batch of examples.
        accepted: the columns to keep; None keeps all.
        sampling: returns the sampler of the data set with all its columns; see `fts.trainer.data.sampler.train_sampler`.

    Raises:
        ArgumentError: there is no training set.
        DataError: the data is empty, has nothing for the model, or is of a kind that cannot be read.
    """
    if dataset is None:
        raise ArgumentError("Trainer.train needs a training set: Trainer(..., train_dataset=...).")
    settings = dataloader_settings(args, collator, args.train_batch_size, drop_last=args.dataloader_drop_last)
    return _dataloader(dataset, settings, accepted, sampling, "training")


def eval_dataloader(
    dataset: Any,
    args: TrainingArguments,
    collator: Collator,
    accepted: Sequence[str] | None,
    sampling: SamplerFactory = eval_sampler,
    what: str = "evaluation",
) -> DataLoader[Any]:
    """A data set for evaluation or prediction as a DataLoader: every example, also with `dataloader_drop_last`.

    Its workers are not persistent (`dataloader_persistent_workers`): their random numbers would depend on earlier evaluations.

    Args:
        dataset: the data.
        args: the training arguments.
        collator: makes a batch of examples.
        accepted: the columns to keep; None keeps all.
        sampling: returns the sampler of the data set.
        what: "evaluation" or "prediction", for messages.

    Raises:
        DataError: the data is empty, has nothing for the model, or is of a kind that cannot be read.
    """
    settings = dataloader_settings(args, collator, args.eval_batch_size)
    settings = attrs.evolve(settings, options={**settings.options, "persistent_workers": False})
    return _dataloader(dataset, settings, accepted, sampling, what)


def select_eval_dataset(eval_dataset: Any, own: Any) -> Any:
    """The evaluation set to use: one of the Trainer's by name, another one, or the Trainer's only one.

    >>> select_eval_dataset("long", {"short": [1], "long": [2]}), select_eval_dataset(None, [3])
    ([2], [3])
    """
    if isinstance(eval_dataset, str):
        if not isinstance(own, Mapping) or eval_dataset not in own:
            names = ", ".join(map(repr, own)) if isinstance(own, Mapping) else f"no names, it is a {type(own).__name__}"
            raise ArgumentError(f"There is no evaluation set {eval_dataset!r}; Trainer(eval_dataset=...) has {names}.")
        return own[eval_dataset]
    found = own if eval_dataset is None else eval_dataset
    if found is None:
        raise ArgumentError("Evaluation needs data: Trainer(..., eval_dataset=...), or evaluate(dataset).")
    if isinstance(found, dict):
        raise ArgumentError(
            f"There are several evaluation sets ({', '.join(map(repr, found))}), and a loader has one. Name it: "
            f"get_eval_dataloader({next(iter(found), 'name')!r})."
        )
    return found


def dataloader_settings(
    args: TrainingArguments, collator: Collator, batch_size: int, *, drop_last: bool = False
) -> DataLoaderSettings:
    """What the training arguments say about loading."""
    options: dict[str, Any] = {"num_workers": args.dataloader_num_workers, "in_order": args.dataloader_in_order}
    if args.dataloader_num_workers:
        options["persistent_workers"] = args.dataloader_persistent_workers
        options["prefetch_factor"] = args.dataloader_prefetch_factor
        options["multiprocessing_context"] = args.dataloader_multiprocessing_context
    # pinned memory is for copies to a GPU
    options["pin_memory"] = args.dataloader_pin_memory and args.device.type == "cuda"
    return DataLoaderSettings(collator, batch_size, drop_last, options, args.device)


def _dataloader(
    dataset: Any, settings: DataLoaderSettings, accepted: Sequence[str] | None, sampling: SamplerFactory, what: str
) -> DataLoader[Any]:
    check_dataset(dataset, what)
    sampler = sampling(dataset)
    if sampler is not None and not is_map_style(dataset):
        raise DataError(
            f"A sampler was given for a {type(dataset).__name__}, which can only be iterated. Return None instead of a sampler, "
            "or give data with __getitem__ and __len__."
        )
    kept, collator = remove_unused_columns(dataset, settings.collator, accepted, what)
    return make_dataloader(kept, attrs.evolve(settings, collator=collator), sampler)


def make_dataloader(
    dataset: Any, settings: DataLoaderSettings, sampler: Sampler[Any] | Iterable[Any] | None = None
) -> DataLoader[Any]:
    """A torch DataLoader of a data set.

    Args:
        dataset: indexable or iterable.
        settings: batch size, collator, workers, device.
        sampler: the order of indexable data; None for its own.
    """
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "collate_fn": settings.collator,
        "drop_last": settings.drop_last,
    }
    options |= settings.options
    if is_map_style(dataset):
        options["sampler"] = sampler
    elif not isinstance(dataset, IterableDataset):
        dataset = IterableWrapper(dataset)
        if options.get("num_workers", 0) > 1:
            raise ArgumentError(
                f"{options['num_workers']} workers would each iterate all of a {type(dataset.data).__name__}. Use "
                "dataloader_num_workers=1, or a torch IterableDataset that divides its examples by "
                "torch.utils.data.get_worker_info()."
            )
    if settings.device.type == "cpu":
        return DataLoader(dataset, **options)
    return DeviceDataLoader(dataset, device=settings.device, **options)


def check_dataset(dataset: Any, what: str) -> None:
    """Raise DataError for data that is empty, or of a kind that cannot be read."""
    name = type(dataset).__name__
    if isinstance(dataset, (Mapping, str, bytes)) or not (is_map_style(dataset) or isinstance(dataset, Iterable)):
        length = " A dataset with __getitem__ needs __len__, too." if hasattr(dataset, "__getitem__") else ""
        part = " Give one of the dictionary's values." if isinstance(dataset, Mapping) else ""
        raise DataError(f"The {what} set is a {name}; it must be a list of examples, or a dataset.{length}{part}")
    check_not_empty(dataset, what)


def check_not_empty(dataset: Any, what: str) -> None:
    """Raise DataError for data of length 0."""
    if hasattr(dataset, "__len__") and _length_or_none(dataset) == 0:
        raise DataError(f"The {what} set ({type(dataset).__name__}) is empty. Give it at least one example.")


def num_examples(loader: Any, batch_size: int) -> int:
    """How many examples a loader has; without a data set of known length, its batches times `batch_size`.

    Raises:
        DataError: neither has a length.

    >>> num_examples(DataLoader(range(5), batch_size=2), 2), num_examples([[1, 2], [3]], 2)
    (5, 4)
    """
    examples, batches = _length_or_none(getattr(loader, "dataset", None)), _length_or_none(loader)
    if examples is not None:
        return examples
    if batches is None:
        raise DataError(
            f"The number of examples of a {type(loader).__name__} is unknown: neither it nor its dataset has a length."
        )
    return batches * batch_size


def num_tokens(loader: Iterable[Any], max_steps: int | None = None) -> int:
    """How many input tokens a loader's batches have, padding included.

    Args:
        loader: its batches are dictionaries with `input_ids`.
        max_steps: if given, the tokens of the first batch times this number.

    Returns:
        The count; 0, and a warning, if a batch has no `input_ids`.

    >>> num_tokens([{"input_ids": torch.zeros(2, 3)}, {"input_ids": torch.zeros(1, 3)}])
    9
    """
    total = 0
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            logger.warning("Tokens cannot be counted: a batch has no 'input_ids'.")
            return total
        tokens = batch["input_ids"].numel()
        if max_steps is not None:
            return int(tokens * max_steps)
        total += tokens
    return total


def _length_or_none(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # no __len__, or one that says so
        return None
