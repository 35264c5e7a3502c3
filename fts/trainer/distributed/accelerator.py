"""The accelerate Accelerator of `trainer.accelerator`."""

from __future__ import annotations

import logging
from typing import Any

from fts.errors import ArgumentError
from fts.steps import LossScaler
from fts.trainer.arguments import check_num_steps

logger = logging.getLogger(__name__)

DATALOADER_FIELDS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")
"""Fields of an `AcceleratorConfig` that are about data, with the same names in accelerate."""


def make_accelerator(args: Any) -> Any:
    """An `accelerate.Accelerator` whose settings are those of the arguments.

    Several may exist in one process, each with its own device and precision: accelerate keeps one state for all, so this one gets
    a new one, and older accelerators keep theirs. With `use_configured_state` in the `AcceleratorConfig` the existing state
    is used instead.

    Args:
        args: have `accelerator_config` (a dictionary or an `AcceleratorConfig`; None for the defaults), `use_cpu`, `bf16`,
            `fp16`, `data_seed`, `gradient_accumulation_steps` and `dataloader_pin_memory`; those missing are taken as unset.

    Returns:
        The accelerator. Its gradient accumulation counts 1 step, because fts splits batches itself.

    Raises:
        ArgumentError: the settings contradict each other, or there is no state to use.

    >>> from types import SimpleNamespace
    >>> make_accelerator(SimpleNamespace(use_cpu=True, bf16=True)).mixed_precision
    'bf16'
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    config = _fields(getattr(args, "accelerator_config", None))
    loading = {name: config[name] for name in DATALOADER_FIELDS if name in config}
    if loading.get("non_blocking") and not getattr(args, "dataloader_pin_memory", True):
        logger.warning("non_blocking=True without dataloader_pin_memory=True copies no faster: set both.")
    data = DataLoaderConfiguration(**loading, data_seed=getattr(args, "data_seed", None))
    accumulation = GradientAccumulationPlugin(**_accumulation(args, config))
    cpu = bool(getattr(args, "use_cpu", False))
    _provide_state(bool(config.get("use_configured_state")), cpu, mixed_precision(args))
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision(args),
        dataloader_config=data,
        gradient_accumulation_plugin=accumulation,
    )


def scaler_of(accelerator: Any) -> LossScaler:
    """The scaler by which `accelerator.backward(loss)` multiplies losses: the loss scale of the training state.

    It replaces accelerate's own scaler, which nothing would update.
    """
    if not isinstance(accelerator.scaler, LossScaler):
        accelerator.scaler = LossScaler()
    return accelerator.scaler


def mixed_precision(args: Any) -> str:
    """The precision of the arguments in accelerate's terms.

    >>> from types import SimpleNamespace
    >>> mixed_precision(SimpleNamespace(fp16=True))
    'fp16'
    """
    given = getattr(args, "mixed_precision", None)  # also of accelerate's environment
    if given is not None:
        return str(given)
    if getattr(args, "bf16", False):
        return "bf16"
    return "fp16" if getattr(args, "fp16", False) else "no"


def _fields(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    return dict(config) if isinstance(config, dict) else dict(vars(config))


def _accumulation(args: Any, config: dict[str, Any]) -> dict[str, Any]:
    given = dict(config.get("gradient_accumulation_kwargs") or {})
    check_num_steps(given, getattr(args, "gradient_accumulation_steps", 1))
    return given | {"num_steps": 1}


def _provide_state(configured: bool, cpu: bool, precision: str) -> None:
    from accelerate.state import AcceleratorState, PartialState

    if configured:
        _check_state(precision)
        return
    # Each state looks its values up in a dictionary that its class holds. A new dictionary leaves those of older accelerators as
    # they are; clearing it, as accelerate's own _reset_state does, would turn them into the new one.
    AcceleratorState._shared_state = {}
    if PartialState._shared_state.get("_cpu", cpu) != cpu:
        PartialState._shared_state = {}


def _check_state(precision: str) -> None:
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state == {}:
        raise ArgumentError(
            "AcceleratorConfig(use_configured_state=True) needs an existing state: make an accelerate.Accelerator or "
            "PartialState first, or leave it out."
        )
    if AcceleratorState._shared_state != {} and AcceleratorState().mixed_precision != precision:
        raise ArgumentError(
            f"AcceleratorConfig(use_configured_state=True) uses the existing state, whose precision is "
            f"{AcceleratorState().mixed_precision!r}, but the arguments ask for {precision!r}. Make them equal."
        )
