"""Runs under DeepSpeed: in real processes where it is installed, and what can be said without it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from fts import TrainingArguments
from fts.distributed import deepspeed
from fts.distributed.strategies import DeepSpeed
from fts.errors import ArgumentError, MissingDependencyError
from fts.steps import module_loss
from fts.trainer import Trainer
from fts.trainer.distributed.deepspeed import hidden_size
from tests import torchrun
from tests.trainer.helpers import make_trainer

SCRIPT = Path(__file__).with_name("run_deepspeed.py")
INSTALLED = importlib.util.find_spec("deepspeed")
STAGE_2 = {"zero_optimization": {"stage": 2}}
REAL = ["stage 0", "stage 1", "stage 2", "stage 3", "own optimizer"]
real = pytest.mark.skipif(INSTALLED is None, reason="needs the package deepspeed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = Path(INSTALLED.origin).parent.parent
    return torchrun.results(SCRIPT, tmp_path_factory.mktemp("deepspeed"), place)[0]


@real
@pytest.mark.parametrize("name", REAL)
def test_a_run_equals_that_of_ddp(found, name):
    case, expected = found[name], found["ddp"]
    assert len(case["seen"]) == len(expected["seen"]) == 13
    for metrics, wanted in zip(case["seen"], expected["seen"], strict=True):
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for tensors in ("weights", "best"):
        for key, values in expected[tensors].items():
            torch.testing.assert_close(torch.tensor(case[tensors][key]), torch.tensor(values), rtol=1e-5, atol=1e-5)


@real
def test_half_precision_stays_near(found):
    for metrics, wanted in zip(found["bf16"]["seen"], found["ddp"]["seen"], strict=True):
        assert metrics.get("loss", 0) == pytest.approx(wanted.get("loss", 0), abs=0.05)
    assert found["bf16"]["seen"] != found["ddp"]["seen"]


@real
@pytest.mark.parametrize("name", REAL)
def test_checkpoints_have_the_weights_and_no_run_resumes(found, name):
    case = found[name]
    assert {"model.safetensors", "trainer_state.json", "training_args.json"} <= set(case["files"])
    assert not [file for file in case["files"] if file.startswith("optimizer") or file.endswith((".pt", ".bin", ".pth"))]
    assert "its checkpoints have the weights alone. What is missing are the optimizer's moments" in case["resumed"]
    assert found["ddp"]["resumed"] == "yes"
    assert case["predicted"] < 1e-5


@real
def test_the_engine_is_shown(found):
    case = found["stage 3"]
    assert case["wrapped"] == "DeepSpeedEngine"
    assert case["sizes"] == found["ddp"]["sizes"]
    assert "AdamW of its configuration" in found["own optimizer"]["described"]


# Without the package


@pytest.fixture
def without_engine(monkeypatch):
    """As under a launcher, where the package seems to be installed: everything but a run."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: object())


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install deepspeed"):
        make_trainer(tmp_path, deepspeed=STAGE_2)


def test_it_describes_that_the_transform_gives_way(tmp_path, without_engine):
    trainer = make_trainer(tmp_path, deepspeed=STAGE_2, max_grad_norm=0.5, optim="sgd")
    last = trainer.describe().splitlines()[-1]
    assert "DeepSpeed's engine, ZeRO stage 2: its own update by the torch optimizer of optim='sgd'" in last
    assert "clipped to 0.5, in the place of fts's transform; loss: module_loss(" in last
    with pytest.raises(ArgumentError, match="has no engine"):
        trainer.build_step(total_steps=3)(None, {})


def test_arguments_are_propagated(tmp_path, without_engine):
    trainer = make_trainer(tmp_path, deepspeed={"train_batch_size": "auto"}, per_device_train_batch_size=4)
    assert trainer.propagate_args_to_deepspeed() is None
    assert trainer.deepspeed_config["train_batch_size"] == 4 * trainer.args.gradient_accumulation_steps
    trainer.args.deepspeed = {"train_batch_size": 99}
    with pytest.raises(ArgumentError, match="contradicts the arguments: train_batch_size=99"):
        trainer.propagate_args_to_deepspeed()
    trainer.propagate_args_to_deepspeed(auto_find_batch_size=True)
    assert trainer.deepspeed_config["train_batch_size"] == 4 * trainer.args.gradient_accumulation_steps


def test_without_a_configuration_nothing_can_be_propagated(tmp_path):
    with pytest.raises(ArgumentError, match="no configuration of DeepSpeed"):
        make_trainer(tmp_path).propagate_args_to_deepspeed()


@pytest.mark.parametrize(
    "values",
    [{"torch_compile": True}, {"nonfinite": "skip"}, {"auto_find_batch_size": True}, {"bf16_full_eval": True}],
    ids=str,
)
def test_what_it_cannot_do_is_said_before_a_run(tmp_path, without_engine, values):
    trainer = make_trainer(tmp_path, deepspeed=STAGE_2, **values)
    with pytest.raises(ArgumentError, match=f"^{next(iter(values))}=.* cannot be used with deepspeed="):
        trainer.train()


def test_methods_that_it_cannot_do(tmp_path, without_engine):
    trainer = make_trainer(tmp_path, deepspeed=STAGE_2)
    for act in (trainer.dry_run, lambda: trainer.replay("checkpoint-1", 2)):
        with pytest.raises(ArgumentError, match="cannot be used with deepspeed="):
            act()


def test_an_own_training_step_is_refused(tmp_path, without_engine):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            raise AssertionError

    args = TrainingArguments(str(tmp_path), deepspeed=STAGE_2, use_cpu=True)
    with pytest.raises(ArgumentError, match="an overridden training_step cannot be used"):
        Own(nn.Linear(1, 1), args, train_dataset=[{"x": 1.0}]).train()


def test_no_run_resumes(tmp_path, without_engine):
    with pytest.raises(ArgumentError, match="checkpoints have the weights alone"):
        make_trainer(tmp_path, deepspeed=STAGE_2).train(resume_from_checkpoint=True)


def test_what_stands_for_the_optimizer_cannot_be_called():
    transform = deepspeed.placeholder_transform("its own")
    assert transform.init({"w": torch.zeros(1)}) == ()
    with pytest.raises(ArgumentError, match="no transform updates the weights, but its own"):
        transform.update({}, (), {})
    step = deepspeed.DeepSpeedStep(module_loss(nn.Linear(1, 1)), transform, None, stage=DeepSpeed(STAGE_2).stage)
    assert step.__name__ == "DeepSpeed's engine, ZeRO stage 2: its own; loss: module_loss(Linear)"


def test_parameters_in_buffers_are_known():
    layer = nn.Linear(2, 2)
    assert not deepspeed.has_flat_buffers(layer)
    layer.weight.data = torch.zeros(8)[:4].reshape(2, 2)
    assert deepspeed.has_flat_buffers(layer)
    assert not deepspeed.is_partitioned(layer)


def test_the_width_of_a_model():
    class Config:
        hidden_size = None
        hidden_sizes = (3, 8)

    layer = nn.Linear(1, 1)
    assert hidden_size(layer) is None
    layer.config = Config()
    assert hidden_size(layer) == 8
    layer.config = type("Outer", (), {"text_config": type("Inner", (), {"hidden_size": 5})()})()
    assert hidden_size(layer) == 5
