"""Fakes of the packages of trackers that need a service."""

import sys
import types

import accelerate.tracking  # noqa: F401 - looks for packages when it is imported: before the fakes exist


def fake_module(monkeypatch, name, **contents):
    """A module of that name, with its packages."""
    parent = ""
    for part in name.split("."):
        path = f"{parent}{part}"
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        parent = f"{path}."
    vars(sys.modules[name]).update(contents)
