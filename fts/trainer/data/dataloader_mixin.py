"""The methods of the Trainer that make its DataLoaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fts.trainer.arguments import TrainingArguments, with_settings
from fts.trainer.data.columns import signature_columns
from fts.trainer.data.dataloader import eval_dataloader, num_examples, num_tokens, select_eval_dataset, train_dataloader
from fts.trainer.data.sampler import eval_sampler, train_sampler


class DataLoaderMixin:
    """Makes DataLoaders and samplers, as Hugging Face's Trainer does."""

    args: TrainingArguments
    model: nn.Module
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    data_collator: Callable[[Any], Any]
    label_names: list[str]
    _train_batch_size: int

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training set as a torch DataLoader, which visits the examples of all ranks in the order of the run."""
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

    def num_examples(self, dataloader: Any) -> int:
        """The number of examples of a loader; without a data set of known length, an estimate from its batches."""
        return num_examples(dataloader, self.args.per_device_train_batch_size)

    @staticmethod
    def num_tokens(train_dl: Any, max_steps: int | None = None) -> int:
        """The number of input tokens of a loader."""
        return num_tokens(train_dl, max_steps)

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
