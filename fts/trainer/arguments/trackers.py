"""The trackers that `report_to` knows, and the package that each needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import attrs


@attrs.frozen
class Package:
    """A package that a tracker needs.

    Attributes:
        modules: any one of them will do.
        install: what pip installs.
    """

    modules: tuple[str, ...]
    install: str

    def is_there(self) -> bool:
        """Whether it is installed; it is not imported.

        >>> Package(("math",), "python").is_there(), Package(("no_such.part",), "none").is_there()
        (True, False)
        """
        return any(_found(module) for module in self.modules)


PACKAGES: dict[str, Package] = {
    "aim": Package(("aim",), "aim"),
    "azure_ml": Package(("azureml.core",), "azureml-core"),
    "clearml": Package(("clearml",), "clearml"),
    "codecarbon": Package(("codecarbon",), "codecarbon"),
    "comet_ml": Package(("comet_ml",), "comet_ml"),
    "dagshub": Package(("dagshub",), "dagshub mlflow"),
    "dvclive": Package(("dvclive",), "dvclive"),
    "flyte": Package(("flytekit",), "flytekit"),
    "mlflow": Package(("mlflow",), "mlflow"),
    "neptune": Package(("neptune",), "neptune"),
    "swanlab": Package(("swanlab",), "swanlab"),
    "tensorboard": Package(("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": Package(("trackio",), "trackio"),
    "wandb": Package(("wandb",), "wandb"),
}
"""Tracker -> its package."""

KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"
"""The variable of the environment by which a TrainJob of Kubeflow tells where it is; `kubeflow` needs it, and no package."""

TRACKERS = ("all", *sorted((*PACKAGES, "kubeflow")))
"""What `report_to` may name, beside "none"."""


def chosen(report_to: Iterable[str]) -> list[str]:
    """The trackers that `report_to` means: "all" stands for those that are installed.

    Args:
        report_to: names.

    >>> chosen(["wandb", "tensorboard", "wandb"])
    ['wandb', 'tensorboard']
    >>> chosen(["mlflow", "dagshub"])  # DagsHub's runs are MLflow's
    ['dagshub']
    """
    given = list(report_to)
    installed = available() if "all" in given else []
    names = list(dict.fromkeys(name for name in (*given, *installed) if name != "all"))
    return [name for name in names if name != "mlflow" or "dagshub" not in names]


def available() -> list[str]:
    """The trackers that can be used here."""
    return [*(name for name, package in PACKAGES.items() if package.is_there()), *(["kubeflow"] if in_kubeflow() else [])]


def in_kubeflow() -> bool:
    """Whether the program runs in a TrainJob of Kubeflow."""
    return bool(os.environ.get(KUBEFLOW))


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
