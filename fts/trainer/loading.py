"""From datasets to batches for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fts import loops
from fts.errors import DataError
from fts.loops import Source
from fts.trainer.collate import Collator
from fts.trainer.columns import unexpected_keys
from fts.trainer.losses import Loss


@attrs.frozen
class Loading:
    """How a dataset becomes batches.

    Attributes:
        collator: makes a batch of examples.
        batch_size: rows in a batch.
        shuffle: visit the rows in random order, where they can be indexed.
        seed: the seed of the order.
        drop_last: leave out a last batch that is not full.
        workers: how many processes fetch ahead.
        micro_batches: how many batches make one step.
    """

    collator: Collator
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    drop_last: bool = False
    workers: int = 0
    micro_batches: int = 1


def make_source(dataset: Any, how: Loading, device: torch.device, what: str) -> Source:
    """The numbered epochs of numbered batches of a dataset, on a device.

    Raises:
        DataError: the dataset is empty.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"The {what} set ({type(dataset).__name__}) is empty. Give it at least one row.")
    source = loops.source(
        dataset,
        batch_size=how.batch_size,
        shuffle=how.shuffle and is_indexable(dataset),
        seed=how.seed,
        collate=how.collator,
        drop_last=how.drop_last,
        workers=how.workers,
        micro_batches=how.micro_batches,
    )
    if source.batches_per_epoch == 0:
        raise DataError(
            f"The {what} set has {source.num_items} rows, fewer than a batch of {how.batch_size}, and dataloader_drop_last=True "
            "leaves them out. Use a smaller batch, or keep the last one."
        )
    return loops.on_device(source, device)


def make_loader(dataset: Any, how: Loading) -> DataLoader[Any]:
    """The same batches as a torch DataLoader, for callbacks and users; its shuffling is torch's own."""
    return DataLoader(
        dataset,
        batch_size=how.batch_size,
        shuffle=how.shuffle and is_indexable(dataset),
        collate_fn=how.collator,
        drop_last=how.drop_last,
        num_workers=how.workers,
        generator=torch.Generator().manual_seed(how.seed),
    )


def is_indexable(dataset: Any) -> bool:
    """Whether rows can be read in any order."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def check_first_row(dataset: Any, collator: Collator, model: nn.Module, loss: Loss, what: str) -> None:
    """Collate one row, and raise where the model could not use the batch, before long work begins.

    Args:
        dataset: is left alone if its rows cannot be read in any order.
        collator: makes a batch.
        model: is called with the batch.
        loss: how the loss of the batch is computed.
        what: "training" or "evaluation", for messages.

    Raises:
        DataError: the batch is no dictionary, has keys that forward does not take, or none of the labels.
    """
    if not is_indexable(dataset):
        return
    several = getattr(dataset, "__getitems__", None)
    batch = collator(several([0]) if callable(several) else [dataset[0]])
    if not isinstance(batch, Mapping):
        raise DataError(
            f"The data_collator made a {type(batch).__name__} of the {what} set; the Trainer calls model(**batch), so it must "
            "make a dictionary."
        )
    unknown = [key for key in unexpected_keys(model, batch) if loss.fn is None or key not in loss.label_names]
    if unknown:
        raise DataError(
            f"{type(model).__name__}.forward does not take {', '.join(unknown)}, which a batch of the {what} set has. Remove "
            "these columns, rename them, or leave it to remove_unused_columns=True."
        )
    if loss.fn is None and loss.label_names and not any(batch.get(name) is not None for name in loss.label_names):
        raise DataError(
            f"The {what} set has no labels: a batch has {', '.join(map(str, batch))}, the model's labels are called "
            f"{', '.join(loss.label_names)}. Add that column, name yours by label_names=[...], or pass compute_loss_func=."
        )
