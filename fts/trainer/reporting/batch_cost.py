"""The cost of a batch: input tokens and floating point operations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from fts.errors import ArgumentError

logger = logging.getLogger(__name__)


def floating_point_ops(model: Any, inputs: Mapping[str, Any]) -> int:
    """Floating point operations of a forward and backward pass.

    Args:
        model: its own `floating_point_ops(inputs)` is called if it has one; else its `num_parameters` and `main_input_name` (by
            default "input_ids") give 6 operations for each token and parameter outside the embeddings.
        inputs: the batch.

    Returns:
        The number; 0 where the model has neither.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1: 2N forward, 4N backward.

    >>> floating_point_ops(object(), {})
    0
    """
    if callable(own := getattr(model, "floating_point_ops", None)):
        return int(own(inputs))
    main = inputs.get(getattr(model, "main_input_name", "input_ids"))
    if isinstance(main, Tensor) and callable(count := getattr(model, "num_parameters", None)):
        return 6 * main.numel() * int(count(exclude_embeddings=True))
    return 0


def count_input_tokens(
    batch: Mapping[str, Any], mode: str, main_input_name: str = "input_ids", pad_token_id: int | None = None
) -> int | Tensor:
    """How many tokens of a batch are counted as seen.

    Args:
        batch: tensors by name.
        mode: "no" counts none, "all" every element of the main input, "non_padding" those that `attention_mask` keeps or, without
            one, those that differ from `pad_token_id`; without either it counts all, with a warning.
        main_input_name: the batch's key of the tokens; if it is missing nothing is counted, with a warning.
        pad_token_id: the padding token.

    Returns:
        The number; a 0-d int64 tensor on the batch's device where it has to be computed, to avoid a synchronization.

    Raises:
        ArgumentError: the mode is unknown.

    >>> import torch
    >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> count_input_tokens(batch, "all"), count_input_tokens(batch, "non_padding")
    (3, tensor(2))
    """
    if mode not in ("no", "all", "non_padding"):
        raise ArgumentError(f"include_num_input_tokens_seen={mode!r} is unknown. Use 'no', 'all' or 'non_padding'.")
    if mode == "no":
        return 0
    main = batch.get(main_input_name)
    if not isinstance(main, Tensor):
        _warn_once(
            f"Tokens are not counted: the batch has no tensor {main_input_name!r} (it has {', '.join(map(str, batch))}). Give "
            "the model a main_input_name that names the tokens, or use include_num_input_tokens_seen='no'."
        )
        return 0
    if mode == "all":
        return main.numel()
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return mask.sum()
    if pad_token_id is not None:
        return (main != pad_token_id).sum()
    _warn_once(
        "All tokens are counted as seen: there is no attention_mask and no pad token of the processing class to find padding."
    )
    return main.numel()


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
