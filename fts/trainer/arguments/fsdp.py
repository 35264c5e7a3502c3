"""From `fsdp`, `fsdp_config` and the launcher's environment to an `FSDP`: names of both versions, behaviour of FSDP2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch

from fts.distributed.strategies import FSDP
from fts.errors import ArgumentError
from fts.trainer.arguments.checks import check_enum, check_known_names
from fts.trainer.arguments.enums import FSDPOption
from fts.trainer.arguments.fsdp_config import DTYPES, SETTINGS, parse_scalar
from fts.trainer.arguments.parsing import TRUE_VALUES

FALSE_VALUES = ("0", "false", "no", "off", "n", "f")
SHARDING_STRATEGIES = {
    FSDPOption.FULL_SHARD: (True, False),
    FSDPOption.SHARD_GRAD_OP: (False, False),
    FSDPOption.HYBRID_SHARD: (True, True),
    FSDPOption.HYBRID_SHARD_ZERO2: (False, True),
    FSDPOption.NO_SHARD: (False, False),
}
"""Strategy -> whether parameters are freed after the forward pass, and whether each machine has a replica."""


@attrs.frozen
class FSDPRequest:
    """What the arguments ask for, under normalized names; None where nothing was given.

    Attributes:
        sharding: one of `SHARDING_STRATEGIES`.
        reshard_after_forward: whether parameters are freed after the forward pass.
        auto_wrap_policy: one of `AUTO_WRAP_POLICIES`.
        layer_classes: names of the classes of units.
        min_num_params: parameters of a unit.
        options: attributes of `FSDP`, passed on unchanged.
    """

    sharding: FSDPOption | None = None
    reshard_after_forward: bool | None = None
    auto_wrap_policy: str | None = None
    layer_classes: tuple[str, ...] | None = None
    min_num_params: int | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)


def parse_fsdp(name: str, value: Any) -> Any:
    """The value of `fsdp` to store: None, True, or a list of options.

    >>> parse_fsdp("fsdp", "full_shard auto_wrap")
    [<FSDPOption.FULL_SHARD: 'full_shard'>, <FSDPOption.AUTO_WRAP: 'auto_wrap'>]
    >>> parse_fsdp("fsdp", "true"), parse_fsdp("fsdp", "")
    (True, None)
    """
    if value is None or isinstance(value, bool):
        return value or None
    if isinstance(value, str) and value.lower() in (*TRUE_VALUES, *FALSE_VALUES):
        return value.lower() in TRUE_VALUES or None
    options = value.replace(",", " ").split() if isinstance(value, str) else value
    if isinstance(options, FSDPOption):
        options = [options]
    if not isinstance(options, (list, tuple)):
        raise ArgumentError(
            f"{name}={value!r} must be True, a string of options such as 'full_shard auto_wrap', or a list of them."
        )
    return [check_enum(name, item, FSDPOption) for item in options] or None


def make_fsdp(options: Any, settings: Mapping[str, Any] | None, *, precision: str = "no", num_nodes: int = 1) -> FSDP | None:
    """The strategy that `fsdp` and `fsdp_config` ask for.

    Args:
        options: a stored value of `fsdp` that turns it on.
        settings: a stored value of `fsdp_config`.
        precision: of the computation, "no", "bf16" or "fp16". Parameters are all-gathered in it, and gradients reduced in
            float32, unless the settings have other dtypes.
        num_nodes: how many machines there are, for hybrid sharding: a replica on each.

    Returns:
        The strategy; None for "no_shard", which is DDP.

    Raises:
        ArgumentError: settings contradict each other, or FSDP2 does not have one.

    >>> make_fsdp(True, {"transformer_layer_cls_to_wrap": "BertLayer", "state_dict_type": "SHARDED_STATE_DICT"})
    FSDP(units=('BertLayer',), reshard_after_forward=True, ..., state_dict_type='sharded', ...)
    >>> make_fsdp([FSDPOption.FULL_SHARD], {"reshard_after_forward": False})
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: fsdp: 'full_shard' frees parameters after the forward pass, but reshard_after_forward=False. ...
    """
    request = _parse_request(options, settings or {})
    sharding = request.sharding or FSDPOption.FULL_SHARD
    reshard, hybrid = SHARDING_STRATEGIES[sharding]
    given = request.reshard_after_forward
    if request.sharding is not None and given not in (None, reshard) and sharding is not FSDPOption.NO_SHARD:
        verb = "frees" if reshard else "keeps"
        raise ArgumentError(
            f"fsdp: {sharding.value!r} {verb} parameters after the forward pass, but reshard_after_forward={given}. "
            "Leave one of them out."
        )
    if sharding is FSDPOption.NO_SHARD:
        if request.options.get("cpu_offload") or request.options.get("activation_checkpointing"):
            raise ArgumentError(
                "fsdp: 'no_shard' does not shard parameters, as DDP, so nothing is offloaded or wrapped. Use 'full_shard'."
            )
        return None
    mixed_precision: dict[str, Any] = {}
    if precision in ("bf16", "fp16"):  # autocast casts the inputs where needed
        mixed_precision = {"param_dtype": DTYPES[precision], "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    return FSDP(
        units=_units(request),
        reshard_after_forward=reshard if given is None else given,
        replicate=num_nodes if hybrid else 1,
        **(mixed_precision | dict(request.options)),
    )


def fsdp_config_from_environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings of `accelerate launch --use_fsdp` in the environment, in the names of `fsdp_config`; None without it.

    The launcher also sets defaults for options that were not given; those of the other FSDP version are left out.

    >>> fsdp_config_from_environment({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"})
    {'cpu_offload': True}
    """
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() not in TRUE_VALUES:
        return None
    version = environ.get("FSDP_VERSION", "1")
    names = {**ENVIRONMENT_KEYS, **({"FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward"} if version == "2" else {})}
    if version != "2":
        names["FSDP_SHARDING_STRATEGY"] = "sharding_strategy"
    settings = {
        key: parse_scalar(environ[variable]) for variable, key in names.items() if environ.get(variable, "") not in ("", "None")
    }
    if settings.get("auto_wrap_policy", "").upper() != "SIZE_BASED_WRAP":
        settings.pop("min_num_params", None)  # the launcher always sets 100 million
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
"""Environment variable -> name in `fsdp_config`."""


def merge_fsdp_config(launcher_config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a launcher and of the arguments, which take precedence.

    >>> merge_fsdp_config({"min_num_params": 10, "cpu_offload": True}, {"transformer_layer_cls_to_wrap": ["A"]})
    {'cpu_offload': True, 'transformer_layer_cls_to_wrap': ['A']}
    """
    own = dict(settings or {})
    launched = dict(launcher_config or {})
    for group in SYNONYMS:  # an argument replaces all names of the same setting
        if group & own.keys():
            launched = {key: item for key, item in launched.items() if key not in group}
    return launched | own


SYNONYMS = (
    {"auto_wrap_policy", "transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap", "min_num_params"},
    {"sharding_strategy", "reshard_after_forward"},
    {"cpu_offload", "offload_params"},
    {"mixed_precision_policy", "mixed_precision"},
)


def fsdp2_differences(settings: Mapping[str, Any]) -> list[str]:
    """Texts of warnings: settings of FSDP1 that FSDP2 handles differently.

    >>> fsdp2_differences({"use_orig_params": False, "limit_all_gathers": True})
    ['use_orig_params=False: FSDP2 always keeps the original parameters, so that trained and frozen ones may be mixed.']
    """
    found = []
    for key, (equivalent, text) in FSDP2_DIFFERENCES.items():
        if key in settings and parse_scalar(settings[key]) not in equivalent:
            found.append(f"{key}={settings[key]!r}: FSDP2 {text}.")
    return found


FSDP2_DIFFERENCES: dict[str, tuple[tuple[Any, ...], str]] = {
    "version": ((2, None), "replaces version 1: it computes the same, and the names of version 1 are accepted"),
    "use_orig_params": ((True, None), "always keeps the original parameters, so that trained and frozen ones may be mixed"),
    "forward_prefetch": ((False, None), "always prefetches the next unit's parameters while one computes"),
    "backward_prefetch": (
        ("backward_pre", "BACKWARD_PRE", None),
        "always prefetches the next unit's parameters before the gradients of one are computed, which is 'backward_pre'",
    ),
    "limit_all_gathers": ((True, None), "always limits how much is all-gathered at a time"),
    "sync_module_states": ((True, None), "always starts with the weights of rank 0"),
    "cpu_ram_efficient_loading": (
        (False, None),
        "always broadcasts the weights of rank 0, tensor by tensor; so that it alone loads them, build the model of the other "
        "ranks within torch.device('meta'), or use accelerate launch, which configures from_pretrained",
    ),
}
"""Setting -> the values with FSDP2's behaviour, and a description of it."""


def _parse_request(options: Any, settings: Mapping[str, Any]) -> FSDPRequest:
    given = {key: SETTINGS[key](f"fsdp_config: {key}", item) for key, item in settings.items()}
    flags = [] if options is True else list(options)
    reshard = _single_value("reshard_after_forward", [given.get("reshard_after_forward")])
    strategies = [option for option in flags if option in SHARDING_STRATEGIES] + [given.get("sharding_strategy")]
    if isinstance(reshard, FSDPOption):
        strategies.append(reshard)
        reshard = None
    if given.get("cpu_ram_efficient_loading") and given.get("sync_module_states") is False:
        raise ArgumentError(
            "fsdp_config: cpu_ram_efficient_loading=True with sync_module_states=False would leave all ranks but 0 without "
            "weights. Leave sync_module_states out."
        )
    offload = [True if FSDPOption.OFFLOAD in flags else None, given.get("cpu_offload"), given.get("offload_params")]
    fsdp_options = {
        "cpu_offload": _single_value("cpu_offload", offload),
        "activation_checkpointing": given.get("activation_checkpointing"),
        "activation_checkpointing_offload": given.get("activation_checkpointing_offload"),
        "state_dict_type": given.get("state_dict_type"),
        "ignored_modules": given.get("ignored_modules"),
        **(_single_value("mixed_precision_policy", [given.get("mixed_precision_policy"), given.get("mixed_precision")]) or {}),
    }
    classes = [given.get("transformer_layer_cls_to_wrap"), given.get("transformer_cls_names_to_wrap")]
    return FSDPRequest(
        sharding=_single_value("fsdp", strategies),
        reshard_after_forward=reshard,
        auto_wrap_policy=given.get("auto_wrap_policy"),
        layer_classes=_single_value("transformer_layer_cls_to_wrap", classes),
        min_num_params=given.get("min_num_params"),
        options={key: item for key, item in fsdp_options.items() if item is not None},
    )


def _units(request: FSDPRequest) -> tuple[str, ...] | int | Literal["auto"] | None:
    policy, classes, size = request.auto_wrap_policy, request.layer_classes, request.min_num_params
    if classes and size:
        raise ArgumentError(
            f"fsdp_config: transformer_layer_cls_to_wrap={list(classes)} and min_num_params={size} both define the units. Leave "
            "one of them out."
        )
    if policy == "SIZE_BASED_WRAP" and not size:
        raise ArgumentError("fsdp_config: auto_wrap_policy='SIZE_BASED_WRAP' needs min_num_params, the parameters of a unit.")
    unused = {"NO_WRAP": classes or size, "SIZE_BASED_WRAP": classes, "TRANSFORMER_BASED_WRAP": size}
    if policy is not None and unused[policy]:
        raise ArgumentError(
            f"fsdp_config: auto_wrap_policy={policy!r} does not go with {unused[policy]!r} for the units. Leave one out."
        )
    return None if policy == "NO_WRAP" else classes or size or "auto"


def _single_value(name: str, values: list[Any]) -> Any:
    """The one value that was given, maybe repeatedly; None if none was."""
    distinct = list({str(value): value for value in values if value is not None}.values())
    if len(distinct) > 1:
        shown = " and ".join(repr(getattr(value, "value", value)) for value in distinct)
        raise ArgumentError(f"fsdp: {shown} for {name}. Give one of them.")
    return distinct[0] if distinct else None
