"""Data of a run: loaders, samplers, the collator, columns, and checks of the first examples.

It may use `fts.trainer.arguments`, and nothing else of `fts.trainer`.
"""

from fts.trainer.data.batch_samples import SampledBatches, with_batch_samples
from fts.trainer.data.collator import default_data_collator, get_data_collator
from fts.trainer.data.columns import can_return_loss, find_labels, forward_arguments, signature_columns
from fts.trainer.data.dataloader import eval_dataloader, num_examples, num_tokens, select_eval_dataset, train_dataloader
from fts.trainer.data.dataloader_mixin import DataLoaderMixin
from fts.trainer.data.sampler import data_seed, eval_sampler, train_sampler
from fts.trainer.data.shards import data_parallel_group, device_ids, local_shard
from fts.trainer.data.source import eval_batches, make_source, unshard_dataloader
from fts.trainer.data.validation import check_batch, check_dataloader, check_first_batch

__all__ = [
    "DataLoaderMixin",
    "SampledBatches",
    "can_return_loss",
    "check_batch",
    "check_dataloader",
    "check_first_batch",
    "data_parallel_group",
    "data_seed",
    "default_data_collator",
    "device_ids",
    "eval_batches",
    "eval_dataloader",
    "eval_sampler",
    "find_labels",
    "forward_arguments",
    "get_data_collator",
    "local_shard",
    "make_source",
    "num_examples",
    "num_tokens",
    "select_eval_dataset",
    "signature_columns",
    "train_dataloader",
    "train_sampler",
    "unshard_dataloader",
    "with_batch_samples",
]
