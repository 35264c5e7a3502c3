"""Which library chooses the trials."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer.arguments.checks import near_name
from fts.trainer.arguments.choices import HPSearchBackend

INSTALL = {HPSearchBackend.OPTUNA: "pip install optuna", HPSearchBackend.RAY: "pip install 'ray[tune]'"}
"""Backend -> how to get it, the preferred one first."""

_NEEDS = {HPSearchBackend.OPTUNA: ("optuna",), HPSearchBackend.RAY: ("ray", "fsspec", "pandas", "pyarrow", "requests")}

_GONE = {
    "wandb": "W&B's sweeps run on its servers; its own agent starts the trials: `wandb agent` with a script that calls train().",
    "sigopt": "SigOpt has closed its service.",
}


def backend_of(backend: str | HPSearchBackend | None) -> HPSearchBackend:
    """The backend that is asked for, or else the first that is installed.

    Args:
        backend: "optuna", "ray", or None.

    Raises:
        ArgumentError: there is no such backend here.
        MissingDependencyError: it is not installed.

    >>> backend_of("sigopt")
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: backend='sigopt' cannot be used. SigOpt has closed its service. Use backend='optuna' or 'ray'.
    """
    if backend is None:
        found = next((known for known in INSTALL if _is_installed(known)), None)
        if found is None:
            raise MissingDependencyError(
                f"hyperparameter_search needs optuna or Ray Tune, and neither is installed: {' or '.join(INSTALL.values())}."
            )
        return found
    name = str(getattr(backend, "value", backend)).lower()
    wanted = next((known for known in INSTALL if known == name), None)
    if wanted is None:
        why = _GONE.get(name, "There is no such backend.")
        raise ArgumentError(f"backend={name!r} cannot be used. {why} Use backend='optuna' or 'ray'.")
    if not _is_installed(wanted):
        others = [other for other in INSTALL if _is_installed(other)]
        hint = f" Or use backend={str(others[0])!r}, which is installed." if others else ""
        raise MissingDependencyError(f"backend={name!r} needs a package that is not installed: {INSTALL[wanted]}.{hint}")
    return wanted


def _is_installed(backend: HPSearchBackend) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in _NEEDS[backend])


def split_options(options: dict[str, Any], *takers: tuple[str, Iterable[str]]) -> list[dict[str, Any]]:
    """Keyword arguments by who takes them.

    Args:
        options: by name.
        takers: what each is called, and the names that it takes.

    Returns:
        Those of each taker.

    Raises:
        ArgumentError: nobody takes one.

    >>> split_options({"timeout": 1}, ("create_study", ["storage"]), ("optimize", ["timeout"]))
    [{}, {'timeout': 1}]
    """
    lists = [(title, list(names)) for title, names in takers]
    known = [name for _, names in lists for name in names]
    for name in options:
        if name not in known:
            near = near_name(name, known)
            hint = f"Did you mean {near!r}?" if near else f"They take: {', '.join(known)}."
            raise ArgumentError(f"Neither hyperparameter_search nor {' nor '.join(t for t, _ in lists)} takes {name!r}. {hint}")
    return [{name: value for name, value in options.items() if name in names} for _, names in lists]
