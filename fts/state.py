"""The immutable state of a training run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import optree
import torch
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor, nn

from fts import storage
from fts.dtensors import copy_into, local_storage_ptr
from fts.errors import ArgumentError, CheckpointError, DonatedStateError, UnknownParameterError
from fts.messages import abbreviate
from fts.typing import OptState, Params, Transform

FORMAT_VERSION = 1
"""Version of the files that `TrainState.save` writes."""

WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME = "model.safetensors", "optimizer.safetensors", "state.json"

MAX_SHARD_FILE_SIZE = 4 * 10**9
"""Bytes of tensors in each set of sharded files. Each rank copies its shards of one set in order to write them."""

TRAINABLE_NAME = "trained.safetensors"
"""Replaces `WEIGHTS_NAME` if the frozen parameters are omitted: the file is no complete model."""


@attrs.frozen
class ModuleMetadata:
    """Tied names and non-persistent buffers of the module that a state was created from.

    Attributes:
        ties: (alias, name) pairs: `alias` is a second name of the tensor that the state has under `name`.
        non_persistent: names of the buffers that a checkpoint omits (`persistent=False`).
    """

    ties: tuple[tuple[str, str], ...] = ()
    non_persistent: frozenset[str] = frozenset()


@attrs.frozen(slots=False, eq=False, repr=False)
class TrainState:
    """Everything that training changes, as an immutable value.

    A step takes a state and returns a new one; the old one stays valid, unless it was donated (see `donate` in
    `fts.steps.train_step`): then any use of it raises `DonatedStateError`.

    Attributes:
        params: the tensors that are trained, by name.
        frozen: parameters with `requires_grad=False`; shared with the module, since no step writes them.
        buffers: the module's buffers, such as BatchNorm's running statistics.
        opt_state: the transform's state.
        step: 0-d int64 tensor on the CPU: the number of steps, including those whose update was skipped.
        seed: the integer that all random numbers of the run derive from.
        metadata: names of tied tensors, and of the buffers that a checkpoint omits.

    >>> from fts import transforms as tx
    >>> state = TrainState.create({"w": torch.zeros(2)}, tx.sgd(0.1), seed=0)
    >>> int(state.step), list(state.params)
    (0, ['w'])
    """

    params: Params
    frozen: Params
    buffers: Params
    opt_state: OptState
    step: Tensor
    seed: int = 0
    metadata: ModuleMetadata = ModuleMetadata()

    @classmethod
    def create(
        cls, model_or_params: nn.Module | Mapping[str, Tensor], transform: Transform, *, seed: int = 0, copy: bool = True
    ) -> TrainState:
        """Create the initial state of a run.

        Args:
            model_or_params: a module, or a dictionary of floating-point tensors by name.
            transform: initialises `opt_state`.
            seed: any integer; the same seed replays the same run.
            copy: copy trainable tensors and buffers, so that training never writes the caller's. With False the
                state shares them, which saves their size in memory.

        Returns:
            A state at step 0. It is detached from its source: to differentiate with respect to parameters, set them by
            `replace(params=...)`. States to be stacked (for vmap) need the same seed.

        Raises:
            ArgumentError: there is nothing to train, or a parameter is not a floating-point tensor.
        """
        if isinstance(model_or_params, nn.Module):
            params, frozen, buffers, metadata = _tensors_of(model_or_params)
        elif isinstance(model_or_params, Mapping):
            params, frozen, buffers, metadata = dict(model_or_params), {}, {}, ModuleMetadata()
        else:
            raise ArgumentError(
                f"TrainState.create takes a torch.nn.Module or a dictionary of tensors, not {type(model_or_params).__name__}."
            )
        _check_params(params)
        copy_or_detach = _copy if copy else Tensor.detach
        params = {name: copy_or_detach(tensor) for name, tensor in params.items()}
        buffers = {name: copy_or_detach(tensor) for name, tensor in buffers.items()}
        frozen = {name: tensor.detach() for name, tensor in frozen.items()}
        step = torch.zeros((), dtype=torch.int64)
        # parameters in the optimizer state must not change with the trained ones
        trained = {local_storage_ptr(tensor) for tensor in params.values()}
        opt_state = optree.tree_map(
            lambda tensor: tensor.clone() if local_storage_ptr(tensor) in trained else tensor, transform.init(params)
        )
        return cls(params, frozen, buffers, opt_state, step, int(seed), metadata)

    def replace(self, **changes: Any) -> TrainState:
        """A new state with some attributes replaced; it shares the others, so a step that consumes one consumes both.

        >>> from fts import transforms as tx
        >>> state = TrainState.create({"w": torch.zeros(2)}, tx.sgd(0.1))
        >>> state.replace(seed=7).seed
        7
        """
        if unknown := changes.keys() - _FIELDS:
            raise TypeError(f"TrainState has no attribute {', '.join(sorted(unknown))}; it has {', '.join(sorted(_FIELDS))}.")
        if "params" not in self.__dict__:
            self.params  # noqa: B018  # raises DonatedStateError
        # like attrs.evolve, in a third of the time: every step does this
        new = object.__new__(TrainState)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def apply_to(self, module: nn.Module) -> nn.Module:
        """Copy parameters and buffers into a module, in place.

        Args:
            module: with the parameter and buffer names of the one that the state was created from.

        Returns:
            The module.

        Raises:
            UnknownParameterError: the names differ; nothing was written.
            ArgumentError: a shape differs; nothing was written.
        """
        targets = dict(module.named_parameters()) | dict(module.named_buffers())
        sources = self.params | self.frozen | self.buffers
        _check_names("apply_to: the module", have=targets, want=sources)
        for name, source in sources.items():
            if targets[name].shape != source.shape:
                raise ArgumentError(
                    f"apply_to: {name!r} is {list(targets[name].shape)} in the module and {list(source.shape)} in the state; "
                    "nothing was written. Use the module (or a copy of the module) that the state was created from."
                )
        with torch.no_grad():
            for name, source in sources.items():
                copy_into(targets[name], source)
        return module

    def save(self, directory: str | Path, *, frozen: bool = True, shard_size: int = storage.MAX_SHARD_SIZE) -> Path:
        """Write the state to `model.safetensors`, `optimizer.safetensors` and `state.json`.

        Args:
            directory: created if missing. The files are written in place; `fts.loops.save_checkpoint` is atomic.
            frozen: also write the frozen parameters. Without them the weights are in `trained.safetensors`, which is no
                complete model, and loading takes the frozen ones from `like`.
            shard_size: maximum bytes of tensors in a file; beyond it there are several files and an index, as transformers
                writes and reads them.

        Returns:
            The directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_contents(directory, self.checkpoint_contents(frozen=frozen, shard_size=shard_size))
        return directory

    def save_sharded(
        self, directory: str | Path, *, frozen: bool = True, shard_size: int = storage.MAX_SHARD_SIZE, process_group: Any = None
    ) -> dict[str, storage.FileChecksum]:
        """Write a sharded state: each rank writes its local shards. All ranks must call it.

        Args:
            directory: exists, in a file system that all ranks share.
            frozen: see `save`.
            shard_size: see `save`; the sum over all ranks.
            process_group: torch's process group; by default the one of all ranks, or this process alone if there is none.

        Returns:
            The tensor files that this rank wrote, relative to the directory, with their checksums.

        Raises:
            CheckpointError: a rank could not write.
        """
        directory = Path(directory)
        if storage.get_rank(process_group) == 0:
            storage.write_text_files(
                directory, self._text_files(frozen=frozen, names=(STATE_NAME, TRAINABLE_NAME, WEIGHTS_NAME, OPTIMIZER_NAME))
            )
        weights, moments = self._saved_tensors(frozen=frozen), _flatten_by_path(self.opt_state)
        options: dict[str, Any] = {"file_size": min(shard_size, MAX_SHARD_FILE_SIZE), "process_group": process_group}
        return {
            **storage.save_sharded(directory, WEIGHTS_NAME if frozen else TRAINABLE_NAME, weights, **options),
            **storage.save_sharded(directory, OPTIMIZER_NAME, moments, **options),
        }

    def checkpoint_contents(self, *, frozen: bool = True, shard_size: int = storage.MAX_SHARD_SIZE) -> storage.DirectoryContents:
        """What `save` writes, as files with their tensors, which are those of the state, not copies.

        Args:
            frozen: see `save`.
            shard_size: see `save`.

        Raises:
            CheckpointError: the transform's state has leaves that are no tensors.
        """
        weights = storage.split_into_shards(
            WEIGHTS_NAME if frozen else TRAINABLE_NAME, self._saved_tensors(frozen=frozen), shard_size
        )
        optimizer = storage.split_into_shards(OPTIMIZER_NAME, _flatten_by_path(self.opt_state), shard_size)
        return weights + optimizer + self._text_files(frozen=frozen, names=(STATE_NAME, TRAINABLE_NAME))

    def _text_files(self, *, frozen: bool, names: tuple[str, ...]) -> storage.DirectoryContents:
        document = {
            "format": FORMAT_VERSION,
            "step": int(self.step),
            "seed": self.seed,
            "frozen": frozen,
            "ties": [list(pair) for pair in self.metadata.ties],
        }
        return storage.DirectoryContents(texts={STATE_NAME: json.dumps(document, indent=2) + "\n"}, base_names=names)

    @classmethod
    def load(cls, directory: str | Path, *, like: TrainState) -> TrainState:
        """Read what `save` or `save_sharded` wrote, on any number of ranks; each reads its local shards.

        Args:
            directory: that it was written to.
            like: a state of the same model and transform, for instance a newly created one. It gives the structure, the
                devices, the sharding, and the buffers and frozen parameters that a checkpoint omits.

        Returns:
            A new state; `like` is not changed.

        Raises:
            CheckpointError: a file is missing or corrupt, or names, shapes or dtypes differ from those of `like`.
        """
        directory = Path(directory)
        document = _read_document(directory)
        frozen = document["frozen"]
        saved = _read_tensors(directory, WEIGHTS_NAME if frozen else TRAINABLE_NAME, like._saved_tensors(frozen=frozen))
        optimizer = _read_tensors(directory, OPTIMIZER_NAME, _flatten_by_path(like.opt_state))
        return like.replace(
            params={name: saved[name] for name in like.params},
            frozen={name: saved.get(name, tensor) for name, tensor in like.frozen.items()},
            buffers={name: saved.get(name, tensor) for name, tensor in like.buffers.items()},
            opt_state=optree.tree_unflatten(optree.tree_structure(like.opt_state), list(optimizer.values())),
            step=torch.tensor(document["step"], dtype=torch.int64),
            seed=document["seed"],
        )

    def _saved_tensors(self, *, frozen: bool) -> dict[str, Tensor]:
        persistent = {name: tensor for name, tensor in self.buffers.items() if name not in self.metadata.non_persistent}
        return self.params | (self.frozen if frozen else {}) | persistent

    def __repr__(self) -> str:
        if "params" not in self.__dict__:
            return f"TrainState(donated to {self.__dict__.get('donated_to', 'a step')})"
        count = sum(tensor.numel() for tensor in self.params.values())
        # a stack of states has a stack of steps
        step = int(self.step) if self.step.ndim == 0 else list(self.step.shape)
        return (
            f"TrainState(step={step}, seed={self.seed}, params={len(self.params)} tensors with {count:,} numbers, "
            f"frozen={len(self.frozen)}, buffers={len(self.buffers)})"
        )

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes, so it costs nothing before the state is donated.
        donated_to = self.__dict__.get("donated_to")
        if donated_to is None or name.startswith("__"):
            raise AttributeError(f"TrainState has no attribute {name!r}")
        raise DonatedStateError(
            f"This state's {name!r} is gone: the state was donated to {donated_to}, which reused its storage for the state "
            "it returned. Use that newer state, or build the step (or call the loop) with donate=False to keep old states."
        )


_FIELDS = frozenset(field.name for field in attrs.fields(TrainState))


def mark_donated(state: TrainState, step_name: str) -> None:
    """Drop the tensors of a state, and make every later use raise a `DonatedStateError` that names the step."""
    attributes = state.__dict__
    attributes.clear()
    attributes["donated_to"] = step_name


def is_donated(state: Any) -> bool:
    """Whether the state was donated to a step."""
    return "donated_to" in state.__dict__


def _tensors_of(module: nn.Module) -> tuple[Params, Params, Params, ModuleMetadata]:
    params: Params = {}
    frozen: Params = {}
    for name, tensor in module.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise ArgumentError(f"Parameter {name!r} is lazy and has no shape yet. Run one batch through the module first.")
        (params if tensor.requires_grad else frozen)[name] = tensor
    buffers = dict(module.named_buffers())
    canonical = {id(tensor): name for name, tensor in (params | frozen | buffers).items()}
    all_names = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    ties = tuple((name, canonical[id(tensor)]) for name, tensor in all_names if canonical[id(tensor)] != name)
    non_persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return params, frozen, buffers, ModuleMetadata(ties, frozenset(non_persistent & buffers.keys()))


def _check_params(params: Params) -> None:
    if not params:
        raise ArgumentError(
            "There is nothing to train: no parameter has requires_grad=True. Unfreeze some, or pass a non-empty dictionary."
        )
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = f"a {tensor.dtype} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"Parameter {name!r} must be a floating-point tensor, not {found}.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _check_names(subject: str, *, have: Iterable[str], want: Iterable[str]) -> None:
    have, want = set(have), set(want)
    if have != want:
        missing, extra = sorted(want - have), sorted(have - want)
        raise UnknownParameterError(
            f"{subject} does not fit the state: missing {abbreviate(missing)}, unexpected {abbreviate(extra)}. "
            "Use the module (or a copy of the module) that the state was created from."
        )


def _flatten_by_path(tree: Any) -> dict[str, Tensor]:
    """Leaves by a readable path such as `1.mu.layer.weight`, in the order of optree."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    flat = {".".join(str(part) for part in path) or "value": leaf for path, leaf in zip(paths, leaves, strict=True)}
    if len(flat) != len(leaves):
        raise CheckpointError("Two tensors of the optimizer state have the same path. Rename a key that contains a dot.")
    for path, leaf in flat.items():
        if not isinstance(leaf, Tensor):
            raise CheckpointError(
                f"The optimizer state holds a {type(leaf).__name__} at {path!r}. A transform's state must be made of tensors "
                "only, so that it can be saved, compiled and donated; use a 0-d tensor."
            )
    return flat


def _read_document(directory: Path) -> dict[str, Any]:
    document, path = storage.read_json(directory, STATE_NAME, version=FORMAT_VERSION), directory / STATE_NAME
    storage.get_int(path, document, "step")
    seed, frozen = document.get("seed"), document.setdefault("frozen", True)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise CheckpointError(f"{path} has seed = {seed!r}; an integer is needed.")
    if not isinstance(frozen, bool):
        raise CheckpointError(f"{path} has frozen = {frozen!r}; true or false is needed.")
    return document


def _read_tensors(directory: Path, file: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found, path = storage.read_tensor_specs(directory, file), directory / file
    missing, extra = sorted(like.keys() - found.keys()), sorted(found.keys() - like.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit the state it is loaded into: missing {abbreviate(missing)}, unexpected {abbreviate(extra)}. "
            "It was saved from another model or transform."
        )
    for name, target in like.items():
        source = found[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise CheckpointError(
                f"{path}: {name!r} is {source.dtype}{list(source.shape)} in the file, but {target.dtype}{list(target.shape)} "
                "in the state."
            )
    # tensors that are mapped from a file must not be written in place
    targets = {name: torch.empty_like(target) for name, target in like.items()}
    storage.read_into(directory, file, targets)
    return targets


def _flatten(state: TrainState) -> tuple[tuple[Any, ...], tuple[int, ModuleMetadata]]:
    return (state.params, state.frozen, state.buffers, state.opt_state, state.step), (state.seed, state.metadata)


def _unflatten(metadata: tuple[int, ModuleMetadata], children: Iterable[Any]) -> TrainState:
    params, frozen, buffers, opt_state, step = children
    return TrainState(params, frozen, buffers, opt_state, step, *metadata)


optree.register_pytree_node(cast(Any, TrainState), cast(Any, _flatten), cast(Any, _unflatten), namespace=GLOBAL_NAMESPACE)
torch_pytree.register_pytree_node(
    TrainState,
    lambda state: (list(_flatten(state)[0]), _flatten(state)[1]),
    lambda children, metadata: _unflatten(metadata, children),
    serialized_type_name="fts.TrainState",
)
