"""The hardware or package that an argument needs. What is missing is an error when the argument is set, not hours later."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Any, Protocol

import attrs
import torch

from fts.errors import ArgumentError, MissingDependencyError
from fts.messages import install_hint
from fts.trainer.arguments.tf32 import has_tf32
from fts.trainer.arguments.tracker_packages import KUBEFLOW_VARIABLE, PACKAGES, in_kubeflow


class RequirementArguments(Protocol):
    """The argument that requirements depend on."""

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""


@attrs.frozen
class Requirement:
    """What an argument needs.

    Attributes:
        needs: its description.
        is_met: whether it is available, given the arguments and the value.
        remedy: how to get it, or what to do without it.
        error: the class of the error.
    """

    needs: str
    is_met: Callable[[RequirementArguments, Any], bool]
    remedy: str
    error: type[Exception] = ArgumentError


def _package(name: str) -> Callable[[RequirementArguments, Any], bool]:
    return lambda args, value: importlib.util.find_spec(name) is not None


def _tf32(args: RequirementArguments, value: Any) -> bool:
    return has_tf32()


def _bf16(args: RequirementArguments, value: Any) -> bool:
    # On the CPU autocast computes in bfloat16 and in float16, and both have all kernels of a transformer.
    return args.device.type != "cuda" or torch.cuda.is_bf16_supported()


def _accelerator(args: RequirementArguments, value: Any) -> bool:
    return args.device.type != "cpu"


COMMON_COMPILE_BACKENDS = ("inductor", "eager", "aot_eager", "cudagraphs")


def _compile_backend(args: RequirementArguments, value: Any) -> bool:
    if value in COMMON_COMPILE_BACKENDS:
        return True  # without loading the compiler, which takes as long as torch
    return value in torch.compiler.list_backends(exclude_tags=())


def _compile_mode(args: RequirementArguments, value: Any) -> bool:
    return value == "default" or value in torch._inductor.list_mode_options()


def _ddp_backend(args: RequirementArguments, value: Any) -> bool:
    known = {"nccl": "is_nccl_available", "gloo": "is_gloo_available", "mpi": "is_mpi_available", "xccl": "is_xccl_available"}
    if not torch.distributed.is_available():
        return False
    if value in known:
        return bool(getattr(torch.distributed, known[value])())
    return value in torch.distributed.Backend.backend_list


def _accelerate_state(args: RequirementArguments, value: Any) -> bool:
    if not value.use_configured_state:
        return True
    from accelerate.state import PartialState

    return bool(PartialState._shared_state)


def _tracker(name: str) -> Requirement:
    package = PACKAGES[name]
    remedy = f"pip install {package.install}, or leave '{name}' out."

    def is_met(args: RequirementArguments, value: Any) -> bool:
        return name not in value or package.is_installed()

    return Requirement(f"the package {package.modules[0].partition('.')[0]}", is_met, remedy, MissingDependencyError)


def _kubeflow(args: RequirementArguments, value: Any) -> bool:
    return "kubeflow" not in value or in_kubeflow()


_KUBEFLOW = Requirement(f"to run in a TrainJob of Kubeflow, which sets {KUBEFLOW_VARIABLE}", _kubeflow, "Leave 'kubeflow' out.")

_BF16 = Requirement(
    "a GPU that computes in bfloat16 (Ampere or newer)", _bf16, "Use fp16=True, or use_cpu=True to train on the CPU."
)

REQUIREMENTS: dict[str, tuple[Requirement, ...]] = {
    "tf32": (Requirement("an NVIDIA GPU of the Ampere generation or newer", _tf32, "Leave it out."),),
    "bf16": (_BF16,),
    "bf16_full_eval": (_BF16,),
    "use_liger_kernel": (
        Requirement("the package liger_kernel", _package("liger_kernel"), "pip install liger-kernel", MissingDependencyError),
        Requirement("a GPU, for which its kernels are written", _accelerator, "Leave it out on the CPU."),
    ),
    "torch_compile_backend": (
        Requirement("a backend that torch has", _compile_backend, "Use 'inductor', or one of torch.compiler.list_backends()."),
    ),
    "torch_compile_mode": (
        Requirement(
            "a mode that torch.compile has", _compile_mode, "Use 'default', 'reduce-overhead', 'max-autotune' or leave it out."
        ),
    ),
    "ddp_backend": (
        Requirement(
            "a torch that was built with it", _ddp_backend, "Use 'gloo' on CPUs and 'nccl' on NVIDIA GPUs, or leave it out."
        ),
    ),
    "report_to": (*map(_tracker, PACKAGES), _KUBEFLOW),
    "debug": (
        Requirement("the package transformers", _package("transformers"), install_hint("trainer"), MissingDependencyError),
    ),
    "accelerator_config": (
        Requirement(
            "an accelerate PartialState or Accelerator made before, since use_configured_state=True",
            _accelerate_state,
            "Make one first, or leave use_configured_state out.",
        ),
    ),
}
"""Argument -> its requirements when it is on. float16 needs nothing: CPUs and GPUs compute in it."""


def check_requirement(args: RequirementArguments, name: str, value: Any) -> None:
    """Check that the requirements of an argument that is on are met.

    Raises:
        MissingDependencyError: a package is missing.
        ArgumentError: the hardware is missing.
    """
    if not value:
        return
    for requirement in REQUIREMENTS.get(name, ()):
        if not requirement.is_met(args, value):
            raise requirement.error(f"{name}={value!r} needs {requirement.needs}, which is not there. {requirement.remedy}")


def check_requirements(args: RequirementArguments, names: Collection[str] = tuple(REQUIREMENTS)) -> None:
    """Check the requirements of several arguments, by default of all."""
    for name in names:
        check_requirement(args, name, getattr(args, name))
