"""How NVIDIA GPUs multiply float32 matrices: a setting of torch for the whole process, as in Hugging Face's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


def has_tf32() -> bool:
    """Whether there is a GPU that computes in TF32."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def apply_tf32(args: TrainingArguments) -> None:
    """Turn TF32 on or off as the arguments say; unless they do, it is turned on where a step is compiled."""
    wanted = args.tf32
    if wanted is None and args.torch_compile and not args.fp16:
        wanted = True
    if wanted is not None and has_tf32():
        backends: Any = torch.backends  # its stubs lack the name
        backends.fp32_precision = "tf32" if wanted else "ieee"
