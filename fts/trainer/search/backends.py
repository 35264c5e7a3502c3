"""The libraries that choose the trials: optuna and Ray Tune."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer.arguments import HPSearchBackend, closest_name

INSTALL = {HPSearchBackend.OPTUNA: "pip install optuna", HPSearchBackend.RAY: "pip install 'ray[tune]'"}
"""Backend -> how to install it, the preferred one first."""

_PACKAGES = {
    HPSearchBackend.OPTUNA: ("optuna",),
    HPSearchBackend.RAY: ("ray", "fsspec", "pandas", "pyarrow", "requests"),
}

_UNAVAILABLE = {
    "wandb": "W&B's sweeps run on its servers; its own agent starts the trials: `wandb agent` with a script that calls train().",
    "sigopt": "SigOpt has closed its service.",
}


def resolve_backend(backend: str | HPSearchBackend | None) -> HPSearchBackend:
    """The requested backend, or else the first that is installed.

    Args:
        backend: "optuna", "ray", or None.

    Raises:
        ArgumentError: there is no such backend.
        MissingDependencyError: it is not installed.

    >>> resolve_backend("sigopt")
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: backend='sigopt' cannot be used. SigOpt has closed its service. Use backend='optuna' or 'ray'.
    """
    if backend is None:
        installed = next((known for known in INSTALL if _is_installed(known)), None)
        if installed is None:
            raise MissingDependencyError(
                f"hyperparameter_search needs optuna or Ray Tune, and neither is installed: {' or '.join(INSTALL.values())}."
            )
        return installed
    name = str(getattr(backend, "value", backend)).lower()
    requested = next((known for known in INSTALL if known == name), None)
    if requested is None:
        reason = _UNAVAILABLE.get(name, "There is no such backend.")
        raise ArgumentError(f"backend={name!r} cannot be used. {reason} Use backend='optuna' or 'ray'.")
    if not _is_installed(requested):
        others = [other for other in INSTALL if _is_installed(other)]
        hint = f" Or use backend={str(others[0])!r}, which is installed." if others else ""
        raise MissingDependencyError(f"backend={name!r} needs a package that is not installed: {INSTALL[requested]}.{hint}")
    return requested


def _is_installed(backend: HPSearchBackend) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES[backend])


def split_options(options: dict[str, Any], *functions: tuple[str, Iterable[str]]) -> list[dict[str, Any]]:
    """Keyword arguments by the function that takes them.

    Args:
        options: by name.
        functions: the name of each, and the names of its parameters.

    Returns:
        The arguments of each function.

    Raises:
        ArgumentError: no function takes one of them.

    >>> split_options({"timeout": 1}, ("create_study", ["storage"]), ("optimize", ["timeout"]))
    [{}, {'timeout': 1}]
    """
    parameters = [(function, list(names)) for function, names in functions]
    known = [name for _, names in parameters for name in names]
    for name in options:
        if name not in known:
            near = closest_name(name, known)
            names = [function for function, _ in parameters]
            hint = f"Did you mean {near!r}?" if near else f"They take: {', '.join(known)}."
            raise ArgumentError(f"Neither hyperparameter_search nor {' nor '.join(names)} takes {name!r}. {hint}")
    return [{name: value for name, value in options.items() if name in names} for _, names in parameters]
