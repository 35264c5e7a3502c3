"""`fsdp`, `fsdp_config` and what `accelerate launch` says of FSDP, as one `FSDP`: both versions' names, FSDP2's meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch

from fts.distributed.strategies import FSDP
from fts.errors import ArgumentError
from fts.trainer.arguments.checks import (check_enum, check_known_names)
from fts.trainer.arguments.enums import FSDPOption
from fts.trainer.arguments.fsdp_config import (DTYPES, SETTINGS, parse_scalar)
from fts.trainer.arguments.parsing import TRUE_VALUES

FALSE_VALUES = ("0", "false", "no", "off", "n", "f")
SHARDING_STRATEGIES = {
    FSDPOption.FULL_SHARD: (True, False),
    FSDPOption.SHARD_GRAD_OP: (False, False),
    FSDPOption.HYBRID_SHARD: (True, True),
    FSDPOption.HYBRID_SHARD_ZERO2: (False, True),
    FSDPOption.NO_SHARD: (False, False),
}
"""What is sharded: whether parameters are freed after the forward pass, and whether each machine has a replica."""


@attrs.frozen
class FSDPRequest:
    """What was asked for, after names and spellings are settled; None where nothing was said.

    Attributes:
        kind: which of `SHARDING_STRATEGIES`.
        reshard: whether parameters are freed after the forward pass.
        wrap: which of `AUTO_WRAP_POLICIES`.
        classes: names of the classes of units.
        least: parameters of a unit.
        more: attributes of `FSDP` as they are.
    """

    kind: FSDPOption | None = None
    reshard: bool | None = None
    wrap: str | None = None
    classes: tuple[str, ...] | None = None
    least: int | None = None
    more: Mapping[str, Any] = attrs.field(factory=dict)


def parse_fsdp(name: str, value: Any) -> Any:
    """The value of `fsdp` as it is kept: None, True, or a list of options.

    >>> parse_fsdp("fsdp", "full_shard auto_wrap")
    [<FSDPOption.FULL_SHARD: 'full_shard'>, <FSDPOption.AUTO_WRAP: 'auto_wrap'>]
    >>> parse_fsdp("fsdp", "true"), parse_fsdp("fsdp", "")
    (True, None)
    """
    if value is None or isinstance(value, bool):
        return value or None
    if isinstance(value, str) and value.lower() in (*TRUE_VALUES, *FALSE_VALUES):
        return value.lower() in TRUE_VALUES or None
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    if isinstance(items, FSDPOption):
        items = [items]
    if not isinstance(items, (list, tuple)):
        raise ArgumentError(
            f"{name}={value!r} must be True, a text of options such as 'full_shard auto_wrap', or a list of them."
        )
    return [check_enum(name, item, FSDPOption) for item in items] or None


def make_fsdp(options: Any, settings: Mapping[str, Any] | None, *, precision: str = "no", machines: int = 1) -> FSDP | None:
    """The strategy that `fsdp` and `fsdp_config` ask for.

    Args:
        options: a kept value of `fsdp` that turns it on.
        settings: a kept value of `fsdp_config`.
        precision: of the computation, "no", "bf16" or "fp16". Parameters are gathered in it, and gradients summed in float32,
            unless the settings say otherwise.
        machines: how many there are, for hybrid sharding: a replica on each.

    Returns:
        The strategy; None for "no_shard", which is DDP.

    Raises:
        ArgumentError: what is asked for contradicts itself, or FSDP2 does not have it.

    >>> make_fsdp(True, {"transformer_layer_cls_to_wrap": "BertLayer", "state_dict_type": "SHARDED_STATE_DICT"})
    FSDP(units=('BertLayer',), reshard_after_forward=True, ..., state_dict_type='sharded', ...)
    >>> make_fsdp([FSDPOption.FULL_SHARD], {"reshard_after_forward": False})
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: fsdp: 'full_shard' frees parameters after the forward pass, but reshard_after_forward=False. ...
    """
    asked = _parse_request(options, settings or {})
    kind = asked.kind or FSDPOption.FULL_SHARD
    frees, hybrid = SHARDING_STRATEGIES[kind]
    if asked.kind is not None and asked.reshard not in (None, frees) and kind is not FSDPOption.NO_SHARD:
        what = "frees" if frees else "keeps"
        raise ArgumentError(
            f"fsdp: {kind.value!r} {what} parameters after the forward pass, but reshard_after_forward={asked.reshard}. "
            "Leave one of them out."
        )
    if kind is FSDPOption.NO_SHARD:
        if asked.more.get("cpu_offload") or asked.more.get("activation_checkpointing"):
            raise ArgumentError(
                "fsdp: 'no_shard' keeps parameters whole, as DDP, so nothing is offloaded or wrapped. Use 'full_shard'."
            )
        return None
    of_precision: dict[str, Any] = {}
    if precision in ("bf16", "fp16"):  # beside autocast, which casts inputs where it should
        of_precision = {"param_dtype": DTYPES[precision], "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    return FSDP(
        units=_units(asked),
        reshard_after_forward=frees if asked.reshard is None else asked.reshard,
        replicate=machines if hybrid else 1,
        **(of_precision | dict(asked.more)),
    )


def fsdp_config_from_environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What `accelerate launch --use_fsdp` says by the environment, in the names of `fsdp_config`; None if it says nothing.

    The launcher also gives the defaults of what nobody asked for; those of the other version are left out.

    >>> fsdp_config_from_environment({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"})
    {'cpu_offload': True}
    """
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() not in TRUE_VALUES:
        return None
    version = environ.get("FSDP_VERSION", "1")
    names = {**ENVIRONMENT_KEYS, **({"FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward"} if version == "2" else {})}
    if version != "2":
        names["FSDP_SHARDING_STRATEGY"] = "sharding_strategy"
    settings = {key: parse_scalar(environ[variable]) for variable, key in names.items() if environ.get(variable, "") not in ("", "None")}
    if settings.get("auto_wrap_policy", "").upper() != "SIZE_BASED_WRAP":
        settings.pop("min_num_params", None)  # the launcher always says 100 million
    check_known_names("accelerate launch", settings, SETTINGS)
    for key, item in settings.items():
        SETTINGS[key](f"accelerate launch: fsdp_{key}", item)
    return settings


ENVIRONMENT_KEYS = {
    "FSDP_AUTO_WRAP_POLICY": "auto_wrap_policy",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_layer_cls_to_wrap",
    "FSDP_MIN_NUM_PARAMS": "min_num_params",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "cpu_ram_efficient_loading",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activation_checkpointing_offload",
    "FSDP_IGNORED_MODULES": "ignored_modules",
}
"""Variable of the environment -> name in `fsdp_config`."""


def merge_fsdp_config(of_launcher: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a launcher and of the arguments, which win.

    >>> merge_fsdp_config({"min_num_params": 10, "cpu_offload": True}, {"transformer_layer_cls_to_wrap": ["A"]})
    {'cpu_offload': True, 'transformer_layer_cls_to_wrap': ['A']}
    """
    own = dict(settings or {})
    kept = dict(of_launcher or {})
    for family in SYNONYMS:  # what says the same thing in other words goes, too
        if family & own.keys():
            kept = {key: item for key, item in kept.items() if key not in family}
    return kept | own


SYNONYMS = (
    {"auto_wrap_policy", "transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap", "min_num_params"},
    {"sharding_strategy", "reshard_after_forward"},
    {"cpu_offload", "offload_params"},
    {"mixed_precision_policy", "mixed_precision"},
)


def fsdp2_differences(settings: Mapping[str, Any]) -> list[str]:
    """What settings of version 1 ask for that FSDP2 does otherwise, in words; for a warning.

    >>> fsdp2_differences({"use_orig_params": False, "limit_all_gathers": True})
    ['use_orig_params=False: FSDP2 always keeps the original parameters, so that trained and frozen ones may be mixed.']
    """
    found = []
    for key, (as_asked, text) in FSDP2_DIFFERENCES.items():
        if key in settings and parse_scalar(settings[key]) not in as_asked:
            found.append(f"{key}={settings[key]!r}: FSDP2 {text}.")
    return found


FSDP2_DIFFERENCES: dict[str, tuple[tuple[Any, ...], str]] = {
    "version": ((2, None), "takes the place of version 1: it computes the same, and the names of version 1 are understood"),
    "use_orig_params": ((True, None), "always keeps the original parameters, so that trained and frozen ones may be mixed"),
    "forward_prefetch": ((False, None), "always asks for the next unit's parameters while one computes"),
    "backward_prefetch": (
        ("backward_pre", "BACKWARD_PRE", None),
        "always fetches the next unit's parameters before the gradients of one are computed, which is 'backward_pre'",
    ),
    "limit_all_gathers": ((True, None), "always limits how much is gathered at a time"),
    "sync_module_states": ((True, None), "always begins with the weights of the first process"),
    "cpu_ram_efficient_loading": (
        (False, None),
        "always shares out the weights of the first process, tensor by tensor; so that it alone loads them, build the model of "
        "the others within torch.device('meta'), or use accelerate launch, which tells from_pretrained",
    ),
}
"""Setting -> the values that ask for what FSDP2 does, and what that is."""


def _parse_request(options: Any, settings: Mapping[str, Any]) -> FSDPRequest:
    given = {key: SETTINGS[key](f"fsdp_config: {key}", item) for key, item in settings.items()}
    chosen = [] if options is True else list(options)
    reshard = _single_value("reshard_after_forward", [given.get("reshard_after_forward")])
    kinds = [option for option in chosen if option in SHARDING_STRATEGIES] + [given.get("sharding_strategy")]
    if isinstance(reshard, FSDPOption):
        kinds.append(reshard)
        reshard = None
    if given.get("cpu_ram_efficient_loading") and given.get("sync_module_states") is False:
        raise ArgumentError(
            "fsdp_config: cpu_ram_efficient_loading=True with sync_module_states=False would leave all processes but the first "
            "without weights. Leave sync_module_states out."
        )
    offload = [True if FSDPOption.OFFLOAD in chosen else None, given.get("cpu_offload"), given.get("offload_params")]
    more = {
        "cpu_offload": _single_value("cpu_offload", offload),
        "activation_checkpointing": given.get("activation_checkpointing"),
        "activation_checkpointing_offload": given.get("activation_checkpointing_offload"),
        "state_dict": given.get("state_dict_type"),
        "ignored": given.get("ignored_modules"),
        **(_single_value("mixed_precision_policy", [given.get("mixed_precision_policy"), given.get("mixed_precision")]) or {}),
    }
    classes = [given.get("transformer_layer_cls_to_wrap"), given.get("transformer_cls_names_to_wrap")]
    return FSDPRequest(
        kind=_single_value("fsdp", kinds),
        reshard=reshard,
        wrap=given.get("auto_wrap_policy"),
        classes=_single_value("transformer_layer_cls_to_wrap", classes),
        least=given.get("min_num_params"),
        more={key: item for key, item in more.items() if item is not None},
    )


def _units(asked: FSDPRequest) -> tuple[str, ...] | int | Literal["auto"] | None:
    if asked.classes and asked.least:
        raise ArgumentError(
            f"fsdp_config: transformer_layer_cls_to_wrap={list(asked.classes)} and min_num_params={asked.least} both say what is "
            "gathered as one. Leave one of them out."
        )
    if asked.wrap == "SIZE_BASED_WRAP" and not asked.least:
        raise ArgumentError("fsdp_config: auto_wrap_policy='SIZE_BASED_WRAP' needs min_num_params, the parameters of a unit.")
    other = {"NO_WRAP": asked.classes or asked.least, "SIZE_BASED_WRAP": asked.classes, "TRANSFORMER_BASED_WRAP": asked.least}
    if asked.wrap is not None and other[asked.wrap]:
        raise ArgumentError(
            f"fsdp_config: auto_wrap_policy={asked.wrap!r} does not go with {other[asked.wrap]!r} for the units. Leave one out."
        )
    if asked.wrap == "NO_WRAP":
        return None
    return asked.classes or asked.least or "auto"


def _single_value(name: str, values: list[Any]) -> Any:
    """The value that was said, maybe more than once; None if none was."""
    said = list({str(value): value for value in values if value is not None}.values())
    if len(said) > 1:
        shown = " and ".join(repr(getattr(value, "value", value)) for value in said)
        raise ArgumentError(f"fsdp: {shown} for {name}. Give one of them.")
    return said[0] if said else None
