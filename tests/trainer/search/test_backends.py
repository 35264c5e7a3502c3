import importlib.util

import pytest

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer import HPSearchBackend
from fts.trainer.search.backends import resolve_backend
from tests.trainer.search.search_jobs import make


@pytest.fixture
def installed(monkeypatch):
    """Say which packages are installed."""
    found = importlib.util.find_spec

    def only(*names):
        wanted = {"optuna", "ray", "pandas"} - {*names}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in wanted else found(name, *rest))

    return only


def test_optuna_is_preferred(installed):
    installed("optuna", "ray", "pandas")
    assert resolve_backend(None) is HPSearchBackend.OPTUNA
    assert resolve_backend("ray") is resolve_backend(HPSearchBackend.RAY) is HPSearchBackend.RAY
    installed("ray", "pandas")
    assert resolve_backend(None) is HPSearchBackend.RAY


def test_members_of_transformers_enum_are_accepted(installed):
    theirs = pytest.importorskip("transformers.trainer_utils").HPSearchBackend
    installed("optuna", "ray", "pandas")
    assert resolve_backend(theirs.RAY) is HPSearchBackend.RAY


def test_what_is_missing_is_named(installed):
    installed("optuna", "ray")  # without what Tune needs
    with pytest.raises(MissingDependencyError, match=r"pip install 'ray\[tune\]'.* backend='optuna', which is installed"):
        resolve_backend("ray")
    installed()
    with pytest.raises(MissingDependencyError, match=r"neither is installed: pip install optuna or pip install 'ray\[tune\]'"):
        resolve_backend(None)
    with pytest.raises(MissingDependencyError, match="pip install optuna"):
        resolve_backend("optuna")


@pytest.mark.parametrize(("name", "text"), [("wandb", "sweeps"), ("sigopt", "closed"), ("hyperopt", "no such backend")])
def test_other_backends(tmp_path, name, text):
    with pytest.raises(ArgumentError, match=f"backend='{name}' cannot be used.*{text}.*'optuna' or 'ray'"):
        make(tmp_path).hyperparameter_search(backend=name)
