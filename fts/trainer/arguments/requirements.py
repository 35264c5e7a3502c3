"""Which hardware or package an argument needs. What is missing is an error when the argument is set, not hours later."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer.arguments.tf32 import has_tf32
from fts.trainer.arguments.trackers import KUBEFLOW, PACKAGES, in_kubeflow

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


@attrs.frozen
class Requirement:
    """What an argument needs.

    Attributes:
        needs: in words.
        met: whether it is there, given the arguments and the value.
        remedy: how to get it, or what to do without.
        error: what is raised.
    """

    needs: str
    met: Callable[[TrainingArguments, Any], bool]
    remedy: str
    error: type[Exception] = ArgumentError


def _package(name: str) -> Callable[[TrainingArguments, Any], bool]:
    return lambda args, value: importlib.util.find_spec(name) is not None


def _tf32(args: TrainingArguments, value: Any) -> bool:
    return has_tf32()


def _bf16(args: TrainingArguments, value: Any) -> bool:
    # On the CPU autocast computes in bfloat16 and in float16, and both have all kernels of a transformer.
    return args.device.type != "cuda" or torch.cuda.is_bf16_supported()


def _on_gpu(args: TrainingArguments, value: Any) -> bool:
    return args.device.type != "cpu"


COMMON_BACKENDS = ("inductor", "eager", "aot_eager", "cudagraphs")


def _compiler(args: TrainingArguments, value: Any) -> bool:
    if value in COMMON_BACKENDS:
        return True  # without loading the compiler, which takes as long as torch
    return value in torch.compiler.list_backends(exclude_tags=())


def _compile_mode(args: TrainingArguments, value: Any) -> bool:
    return value == "default" or value in torch._inductor.list_mode_options()


def _backend(args: TrainingArguments, value: Any) -> bool:
    known = {"nccl": "is_nccl_available", "gloo": "is_gloo_available", "mpi": "is_mpi_available", "xccl": "is_xccl_available"}
    if not torch.distributed.is_available():
        return False
    if value in known:
        return bool(getattr(torch.distributed, known[value])())
    return value in torch.distributed.Backend.backend_list


def _configured(args: TrainingArguments, value: Any) -> bool:
    if not value.use_configured_state:
        return True
    from accelerate.state import PartialState

    return bool(PartialState._shared_state)


def _tracker(name: str) -> Requirement:
    package = PACKAGES[name]
    install = f"pip install {package.install}, or leave '{name}' out."

    def met(args: TrainingArguments, value: Any) -> bool:
        return name not in value or package.is_there()

    return Requirement(f"the package {package.modules[0].partition('.')[0]}", met, install, MissingDependencyError)


def _kubeflow(args: TrainingArguments, value: Any) -> bool:
    return "kubeflow" not in value or in_kubeflow()


_KUBEFLOW = Requirement(f"a TrainJob of Kubeflow around it, which sets {KUBEFLOW}", _kubeflow, "Leave 'kubeflow' out.")

_BF16 = Requirement(
    "a GPU that computes in bfloat16 (Ampere or newer)", _bf16, "Use fp16=True, or use_cpu=True to train on the CPU."
)

REQUIREMENTS: dict[str, tuple[Requirement, ...]] = {
    "tf32": (Requirement("an NVIDIA GPU of the Ampere generation or newer", _tf32, "Leave it out."),),
    "bf16": (_BF16,),
    "bf16_full_eval": (_BF16,),
    "use_liger_kernel": (
        Requirement("the package liger_kernel", _package("liger_kernel"), "pip install liger-kernel", MissingDependencyError),
        Requirement("a GPU, for which its kernels are written", _on_gpu, "Leave it out on the CPU."),
    ),
    "torch_compile_backend": (
        Requirement("a backend that torch has", _compiler, "Use 'inductor', or one of torch.compiler.list_backends()."),
    ),
    "torch_compile_mode": (
        Requirement(
            "a mode that torch.compile has", _compile_mode, "Use 'default', 'reduce-overhead', 'max-autotune' or leave it out."
        ),
    ),
    "ddp_backend": (
        Requirement("a torch that was built with it", _backend, "Use 'gloo' on CPUs and 'nccl' on NVIDIA GPUs, or leave it out."),
    ),
    "report_to": (*map(_tracker, PACKAGES), _KUBEFLOW),
    "debug": (
        Requirement("the package transformers", _package("transformers"), "pip install 'fts[trainer]'", MissingDependencyError),
    ),
    "accelerator_config": (
        Requirement(
            "an accelerate PartialState or Accelerator made before, since use_configured_state=True",
            _configured,
            "Make one first, or leave use_configured_state out.",
        ),
    ),
}
"""Argument -> what it needs when it is on. float16 needs nothing: CPUs and GPUs compute in it."""


def check_requirement(args: TrainingArguments, name: str, value: Any) -> None:
    """Raise if an argument that is on needs what this machine does not have.

    Raises:
        MissingDependencyError: a package is missing.
        ArgumentError: the hardware is.
    """
    if not value:
        return
    for requirement in REQUIREMENTS.get(name, ()):
        if not requirement.met(args, value):
            raise requirement.error(f"{name}={value!r} needs {requirement.needs}, which is not there. {requirement.remedy}")


def check_requirements(args: TrainingArguments, names: Collection[str] = tuple(REQUIREMENTS)) -> None:
    """Raise if an argument needs what this machine does not have."""
    for name in names:
        check_requirement(args, name, getattr(args, name))
