"""Seq2SeqTrainingArguments: also how text is generated in evaluation."""

# ruff: noqa: RUF009 - arg() makes a dataclass field

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fts.trainer.arguments.fields import arg
from fts.trainer.arguments.training_arguments import TrainingArguments


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """`TrainingArguments` with settings of generation.

    >>> Seq2SeqTrainingArguments(predict_with_generate=True, generation_max_length=20).generation_num_beams is None
    True
    """

    sortish_sampler: bool = arg(False, "Gone; use group_by_length.")
    predict_with_generate: bool = arg(False, "Evaluate and predict what the model generates, not its logits.")
    generation_max_length: int | None = arg(None, "The maximum number of tokens to generate; the model's own limit if not given.")
    generation_num_beams: int | None = arg(None, "How many beams to search; the model's own number if not given.")
    generation_config: str | Path | Any | None = arg(None, "A GenerationConfig, or where to load one from.")
