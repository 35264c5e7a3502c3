"""`import fts` is fast; the other packages and names load on first use."""

import json
import subprocess
import sys

import pytest

import fts
from fts.messages import DISTRIBUTION

HEAVY = (
    "accelerate",
    "datasets",
    "hypothesis",
    "matplotlib",
    "pandas",
    "peft",
    "sklearn",
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
)


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh process that ran `code`."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return modules_after("import fts")


@pytest.mark.parametrize("name", HEAVY)
def test_import_fts_does_not_load(loaded: set[str], name: str) -> None:
    assert name not in loaded


@pytest.mark.parametrize("package", fts._LAZY_PACKAGES)
def test_import_fts_does_not_load_lazy_packages(loaded: set[str], package: str) -> None:
    assert f"fts.{package}" not in loaded


def test_loops_need_no_hugging_face_training_stack() -> None:
    loaded = modules_after("from fts import loops, steps, transforms as tx")
    assert "fts.loops" in loaded
    assert not {"transformers", "datasets", "accelerate", "fts.trainer", "hypothesis"} & loaded


def test_a_lazy_package_is_an_attribute_after_a_plain_import() -> None:
    code = "import fts\nimport types\nassert isinstance(fts.loops, types.ModuleType)\nassert fts.loops is fts.loops"
    assert "fts.loops" in modules_after(code)


def test_lazy_names_are_exactly_the_facade() -> None:
    assert set(fts._LAZY_NAMES) == set(fts.trainer.__all__)


@pytest.mark.parametrize("name", sorted(fts._LAZY_NAMES))
def test_lazy_name_is_the_object_of_its_package(name: str) -> None:
    assert getattr(fts, name) is getattr(fts.trainer, name)


def test_every_public_name_resolves_and_is_listed() -> None:
    names = {*fts.__all__, *fts._LAZY_NAMES, *fts._LAZY_PACKAGES}
    assert names <= set(dir(fts))
    for name in names:
        assert getattr(fts, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fts' has no attribute 'no_such_name'"):
        fts.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from fts import no_such_name")


def test_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert fts.__version__ == version(DISTRIBUTION)
