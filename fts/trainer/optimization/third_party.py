"""Optimizers of other packages: the class, the options that it takes, and adapters that turn its state into plain tensors.

Each function takes the arguments and `optim_args`, and returns a class with its options other than `lr`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer.arguments import OptimizerNames, TrainingArguments, parse_key_values

ClassAndKwargs = tuple[Any, dict[str, Any]]


@attrs.frozen
class OptimArgs:
    """The options in `optim_args`.

    Attributes:
        optim: the optimizer.
        texts: the values, unparsed, by name.
    """

    optim: str
    texts: dict[str, str]

    @classmethod
    def of(cls, args: TrainingArguments) -> OptimArgs:
        """Those of the arguments."""
        return cls(str(args.optim), parse_key_values("optim_args", args.optim_args) if args.optim_args else {})

    def parse(self, **kinds: Any) -> dict[str, Any]:
        """The options, each converted to the type that `kinds` has for its name.

        Raises:
            ArgumentError: a name is not in `kinds`, or a text cannot be converted.

        >>> OptimArgs("sgd", {"momentum": "0.9", "nesterov": "true"}).parse(momentum=float, nesterov=bool)
        {'momentum': 0.9, 'nesterov': True}
        """
        return {name: self._one(name, text, kinds) for name, text in self.texts.items()}

    def _one(self, name: str, text: str, kinds: dict[str, Any]) -> Any:
        if name not in kinds:
            takes = f"takes {', '.join(kinds)}" if kinds else "takes none"
            raise ArgumentError(f"optim_args has '{name}={text}', but optim='{self.optim}' {takes}.")
        kind = kinds[name]
        try:
            return _PARSERS.get(kind, kind)(text)
        except (ValueError, KeyError) as error:
            raise ArgumentError(f"optim_args has '{name}={text}', which is no {kind.__name__}.") from error


def adam(args: TrainingArguments) -> dict[str, Any]:
    """Adam's options in the arguments."""
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def adafactor(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """With the rate of the schedule, not its own."""
    options.parse()
    cls = _import_class(options, "transformers.optimization", "Adafactor", "pip install 'transformers>=5'")
    return cls, {"scale_parameter": False, "relative_step": False}


def torch_xla(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW for TPUs."""
    options.parse()
    return _import_class(options, "torch_xla.amp.syncfree", "AdamW", "pip install torch_xla, on a machine with a TPU"), adam(args)


def torch_npu(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW for Ascend NPUs."""
    options.parse()
    return _import_class(options, "torch_npu.optim", "NpuFusedAdamW", "pip install torch_npu, on a machine with an NPU"), adam(
        args
    )


def torchdistx(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW with moments of any dtype."""
    dtypes = {"momentum_dtype": torch.float32, "variance_dtype": torch.float32, "compensation_buffer_dtype": torch.bfloat16}
    given = options.parse(use_kahan_summation=bool, **dict.fromkeys(dtypes, torch.dtype))
    cls = _import_class(options, "torchdistx.optimizers", "AnyPrecisionAdamW", "see https://github.com/pytorch/torchdistx")
    return cls, {**adam(args), "use_kahan_summation": False, **dtypes, **given}


def torchao(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW with moments of 4 or 8 bits."""
    given = options.parse(block_size=int, bf16_stochastic_round=bool)
    name = "AdamW4bit" if args.optim == OptimizerNames.ADAMW_TORCH_4BIT else "AdamW8bit"
    cls = _import_class(options, "torchao.optim", name, "pip install 'torchao>=0.11'")
    return cls, {"block_size": 256, "bf16_stochastic_round": False, **given, **adam(args)}


def grokadamw(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW that amplifies slow gradients."""
    numbers = {"alpha_init": 0.98, "lamb": 2.0, "gamma": 0.1, "grokking_signal_decay_rate": 0.1, "gradient_clipping": 1.0}
    given = options.parse(**dict.fromkeys(numbers, float))
    return _import_class(options, "grokadamw", "GrokAdamW", "pip install grokadamw"), {**numbers, **given}


def stable_adamw(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """AdamW with clipped updates."""
    given = options.parse(max_lr=float, kahan_sum=bool, decouple_lr=bool)
    own = {"weight_decay": args.weight_decay, "decouple_lr": False, "max_lr": None, "kahan_sum": None, **given}
    return _import_class(options, "optimi", "StableAdamW", "pip install torch-optimi"), {**adam(args), **own}


def schedule_free(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """Averages instead of a schedule; evaluated at other weights than it trains (`tx.eval_params`)."""
    given = {"weight_lr_power": 2.0, "r": 0.0, **options.parse(weight_lr_power=float, r=float)}
    names = {"schedule_free_radam": "RAdam", "schedule_free_adamw": "AdamW", "schedule_free_sgd": "SGD"}
    kind = names[str(args.optim)]
    cls = _import_class(options, "schedulefree", f"{kind}ScheduleFree", "pip install 'schedulefree>=1.4'")
    warmup = {} if kind == "RAdam" else {"warmup_steps": args.warmup_steps}
    return cls, {**({} if kind == "SGD" else adam(args)), "weight_decay": args.weight_decay, **warmup, **given}


def lomo(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """Updates inside the backward pass."""
    options.parse()
    name = "AdaLomo" if args.optim == OptimizerNames.ADALOMO else "Lomo"
    return _import_class(options, "lomo_optim", name, "pip install lomo-optim"), {}


def galore(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """Gradients projected by their singular vectors; "target" has the options of the projected group."""
    given = options.parse(rank=int, update_proj_gap=int, scale=float, proj_type=str)
    name = str(args.optim)
    kind = {"galore_adamw": "GaLoreAdamW", "galore_adamw_8bit": "GaLoreAdamW8bit", "galore_adafactor": "GaLoreAdafactor"}[name]
    cls = _import_class(options, "galore_torch", kind, "pip install galore-torch")
    if name == "galore_adamw_8bit" and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"optim='{name}' needs a CUDA GPU, and there is none. Use optim='galore_adamw', which keeps 32 bits."
        )
    own = {"scale_parameter": False, "relative_step": False} if kind == "GaLoreAdafactor" else {}
    return cls, {**own, "target": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **given}}


def apollo(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """Rates of channels from random projections; "target" has the options of the projected group."""
    given = options.parse(rank=int, proj=str, scale_type=str, update_proj_gap=int, scale=float, proj_type=str)
    defaults = {"rank": 128, "proj": "random", "scale_type": "channel", "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    cls = _import_class(options, "apollo_torch", "APOLLOAdamW", "pip install apollo-torch")
    return cls, {"target": {**defaults, **given, **adam(args)}}


def bitsandbytes(args: TrainingArguments, options: OptimArgs) -> ClassAndKwargs:
    """Moments of 8 or 32 bits, also in paged memory."""
    name = str(args.optim)
    family = next(kind for kind in ("AdamW", "Lion", "RMSprop", "AdEMAMix") if kind.lower() in name)
    own: dict[str, Any] = {"optim_bits": 8 if "8bit" in name else 32}
    if family != "RMSprop":
        own["is_paged"] = "paged" in name
    own = {**_bitsandbytes_options(family, args, options), **own}
    cls = _import_class(options, "bitsandbytes.optim", family, "pip install bitsandbytes")
    return cls, own


def _bitsandbytes_options(family: str, args: TrainingArguments, options: OptimArgs) -> dict[str, Any]:
    if family == "RMSprop":
        return options.parse(alpha=float, eps=float, weight_decay=float, momentum=float, centered=bool, min_8bit_size=int)
    if family != "AdEMAMix":
        options.parse()
        return adam(args) if family == "AdamW" else {"betas": (args.adam_beta1, args.adam_beta2)}
    given = options.parse(beta1=float, beta2=float, beta3=float, alpha=float, eps=float, t_alpha=int, t_beta3=int)
    betas = {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "beta3": 0.9999}
    found = tuple(given.pop(key, value) for key, value in betas.items())
    return {"betas": found, "alpha": 5.0, "eps": args.adam_epsilon, **given}


def split_unquantized(group: dict[str, Any], names: set[str]) -> list[dict[str, Any]]:
    """A group without some parameters, and one with them, whose moments bitsandbytes keeps in 32 bits.

    >>> split_unquantized({"params": ["a", "b"], "weight_decay": 0.1}, {"b"})
    [{'params': ['a'], 'weight_decay': 0.1}, {'params': ['b'], 'weight_decay': 0.1, 'unquantized': True}]
    """
    inside = [name for name in group["params"] if name in names]
    rest = {**group, "params": [name for name in group["params"] if name not in names]}
    return [rest, {**group, "params": inside, "unquantized": True}] if inside else [rest]


def with_plain_state(cls: Any) -> Any:
    """The class, or a subclass whose `state` has all of its state as plain tensors, so that `tx.from_torch` can use it."""
    package = cls.__module__.partition(".")[0]
    return _ADAPTERS.get(package, lambda cls: cls)(cls)


def _with_unquantized_groups(cls: Any) -> Any:
    class UnquantizedGroups(cls):  # type: ignore[misc]
        """Keeps 32 bits for groups marked `unquantized`; the package itself identifies Parameters by `id`."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": 32} if group.get("unquantized") else config

    return _rename(UnquantizedGroups, cls)


def _with_projector_state(cls: Any) -> Any:
    class ProjectorState(cls):  # type: ignore[misc]
        """Keeps the tensors of each projector in `state`, not the projector itself."""

        def step(self, closure: Any = None) -> Any:
            for group, parameter in _all_parameters(self):
                state = self.state.get(parameter, {})
                if isinstance(state.get("projector"), dict):
                    tensors = state["projector"]
                    state["projector"] = _projector(self, group, state)
                    vars(state["projector"]).update(tensors)
            loss = super().step(closure)
            for _, parameter in _all_parameters(self):
                state = self.state.get(parameter, {})
                if "projector" in state:
                    own = vars(state["projector"])
                    state["projector"] = {key: own[key] for key in ("ortho_matrix", "seed", "svd_count") if key in own}
            return loss

    return _rename(ProjectorState, cls)


def _projector(optimizer: Any, group: dict[str, Any], state: dict[str, Any]) -> Any:
    if hasattr(optimizer, "_initialize_projector"):
        return optimizer._initialize_projector(group, state)
    projector = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
    return projector(group["rank"], **{key: group[key] for key in ("update_proj_gap", "scale", "proj_type")})


def _with_moments_in_state(cls: Any) -> Any:
    class MomentsInState(cls):  # type: ignore[misc]
        """Keeps its moments in `state`, not in its groups."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["state"] = {p: dict(self.state[p]) for p in group["params"] if self.state.get(p)}
            loss = super().step(closure)
            for group in self.param_groups:
                self.state.update(group.pop("state"))
            return loss

    return _rename(MomentsInState, cls)


def _with_unwrapped_tensors(cls: Any) -> Any:
    class UnwrappedTensors(cls):  # type: ignore[misc]
        """Keeps the plain tensors inside its quantized tensors."""

        def step(self, closure: Any = None) -> Any:
            for _, parameter in _all_parameters(self):
                state = self.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, dict):
                        form = self._new_buffer(parameter, signed=key == "exp_avg")
                        state[key] = type(form).__tensor_unflatten__(value, form.__tensor_flatten__()[1], None, None)
            loss = super().step(closure)
            for _, parameter in _all_parameters(self):
                state = self.state.get(parameter, {})
                for key, value in state.items():
                    if is_traceable_wrapper_subclass(value):
                        state[key] = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
            return loss

    return _rename(UnwrappedTensors, cls)


_ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes": _with_unquantized_groups,
    "galore_torch": _with_projector_state,
    "apollo_torch": _with_projector_state,
    "grokadamw": _with_moments_in_state,
    "torchao": _with_unwrapped_tensors,
}


def _all_parameters(optimizer: Any) -> list[tuple[dict[str, Any], Any]]:
    return [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _rename(adapted: Any, cls: Any) -> Any:
    adapted.__name__ = adapted.__qualname__ = cls.__name__
    return adapted


def _import_class(options: OptimArgs, module: str, name: str, install: str) -> Any:
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"optim='{options.optim}' needs {name} of the package {package}, which cannot be imported ({error}). "
            f"Install it: {install}."
        ) from error


def _parse_bool(text: str) -> bool:
    words = {**dict.fromkeys(("true", "1", "yes", "y", "on"), True), **dict.fromkeys(("false", "0", "no", "n", "off"), False)}
    return words[text.lower()]


def _parse_dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(text)
    return found


_PARSERS: dict[Any, Callable[[str], Any]] = {bool: _parse_bool, torch.dtype: _parse_dtype}
