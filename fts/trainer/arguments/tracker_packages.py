"""The trackers that `report_to` knows, and the package that each needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import attrs


@attrs.frozen
class TrackerPackage:
    """A package that a tracker needs.

    Attributes:
        modules: any one of them will do.
        install: what pip installs.
    """

    modules: tuple[str, ...]
    install: str

    def is_there(self) -> bool:
        """Whether it is installed; it is not imported.

        >>> TrackerPackage(("math",), "python").is_there(), TrackerPackage(("no_such.part",), "none").is_there()
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
"""The variable of the environment by which a TrainJob of Kubeflow tells where it is; `kubeflow` needs it, and no package."""

TRACKERS = ("all", *sorted((*PACKAGES, "kubeflow")))
"""What `report_to` may name, beside "none"."""


def resolve_report_to(report_to: Iterable[str]) -> list[str]:
    """The trackers that `report_to` means: "all" stands for those that are installed.

    Args:
        report_to: names.

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
    """The trackers that can be used here."""
    return [*(name for name, package in PACKAGES.items() if package.is_there()), *(["kubeflow"] if in_kubeflow() else [])]


def in_kubeflow() -> bool:
    """Whether the program runs in a TrainJob of Kubeflow."""
    return bool(os.environ.get(KUBEFLOW_VARIABLE))


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
