"""The trackers that `report_to` may name, and the package that each needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import attrs


@attrs.frozen
class TrackerPackage:
    """A package that a tracker needs.

    Attributes:
        modules: any one of them suffices.
        install: its name for pip.
    """

    modules: tuple[str, ...]
    install: str

    def is_installed(self) -> bool:
        """Whether it is installed; it is not imported.

        >>> TrackerPackage(("math",), "python").is_installed(), TrackerPackage(("no_such.part",), "none").is_installed()
        (True, False)
        """
        return any(_is_found(module) for module in self.modules)


PACKAGES: dict[str, TrackerPackage] = {
    "aim": TrackerPackage(("aim",), "aim"),
    "azure_ml": TrackerPackage(("azureml.core",), "azureml-core"),
    "clearml": TrackerPackage(("clearml",), "clearml"),
    "codecarbon": TrackerPackage(("codecarbon",), "codecarbon"),
    "comet_ml": TrackerPackage(("comet_ml",), "comet_ml"),
    "dagshub": TrackerPackage(("dagshub",), "dagshub mlflow"),
    "dvclive": TrackerPackage(("dvclive",), "dvclive"),
    "flyte": TrackerPackage(("flytekit",), "flytekit"),
    "mlflow": TrackerPackage(("mlflow",), "mlflow"),
    "neptune": TrackerPackage(("neptune",), "neptune"),
    "swanlab": TrackerPackage(("swanlab",), "swanlab"),
    "tensorboard": TrackerPackage(("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": TrackerPackage(("trackio",), "trackio"),
    "wandb": TrackerPackage(("wandb",), "wandb"),
}
"""Tracker -> its package."""

KUBEFLOW_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
"""The variable of the environment that a TrainJob of Kubeflow sets; `kubeflow` needs it, and no package."""

TRACKERS = ("all", *sorted((*PACKAGES, "kubeflow")))
"""The names that `report_to` takes, besides "none"."""


def resolve_report_to(report_to: Iterable[str]) -> list[str]:
    """The trackers that `report_to` selects: "all" stands for those that are installed.

    Args:
        report_to: names of trackers.

    >>> resolve_report_to(["wandb", "tensorboard", "wandb"])
    ['wandb', 'tensorboard']
    >>> resolve_report_to(["mlflow", "dagshub"])  # DagsHub's runs are MLflow's
    ['dagshub']
    """
    given = list(report_to)
    installed = available_trackers() if "all" in given else []
    names = list(dict.fromkeys(name for name in (*given, *installed) if name != "all"))
    return [name for name in names if name != "mlflow" or "dagshub" not in names]


def available_trackers() -> list[str]:
    """The trackers that can be used on this machine."""
    return [*(name for name, package in PACKAGES.items() if package.is_installed()), *(["kubeflow"] if in_kubeflow() else [])]


def in_kubeflow() -> bool:
    """Whether the program runs in a TrainJob of Kubeflow."""
    return bool(os.environ.get(KUBEFLOW_VARIABLE))


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
