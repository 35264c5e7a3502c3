import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from fts.errors import ArgumentError
from fts.trainer.distributed.accelerator import make_accelerator


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})


def make(**arguments):
    return make_accelerator(SimpleNamespace(**({"use_cpu": True} | arguments)))


def test_defaults_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Trainer(torch.nn.Linear(1, 1), transformers.TrainingArguments(str(tmp_path), use_cpu=True)).accelerator
    ours = make(accelerator_config=transformers.trainer_pt_utils.AcceleratorConfig())
    assert isinstance(ours, Accelerator)
    for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking", "mixed_precision"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.device == theirs.device == torch.device("cpu")
    assert ours.gradient_state.num_steps == ours.gradient_accumulation_steps == 1
    assert ours.dataloader_config == theirs.dataloader_config


@pytest.mark.parametrize("as_dict", [True, False])
def test_settings_reach_it(as_dict):
    config = {
        "split_batches": True,
        "dispatch_batches": True,
        "even_batches": False,
        "use_seedable_sampler": False,
        "non_blocking": True,
        "gradient_accumulation_kwargs": {"sync_each_batch": True},
    }
    given = config if as_dict else SimpleNamespace(**config, use_configured_state=False)
    accelerator = make(accelerator_config=given, data_seed=7)
    assert (accelerator.split_batches, accelerator.dispatch_batches) == (True, True)
    assert (accelerator.even_batches, accelerator.use_seedable_sampler) == (False, False)
    assert accelerator.non_blocking and accelerator.dataloader_config.data_seed == 7
    assert accelerator.gradient_state.plugin_kwargs == {"num_steps": 1, "sync_each_batch": True}
    assert config["gradient_accumulation_kwargs"] == {"sync_each_batch": True}


def test_several_with_their_own_precision_live_side_by_side():
    wanted = ["no", "bf16", "fp16", "no"]
    made = [make(**{precision: True}) for precision in wanted]
    assert [accelerator.mixed_precision for accelerator in made] == wanted
    assert [accelerator.state.mixed_precision for accelerator in made] == wanted
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    outputs = []
    for accelerator in made[:2]:
        with accelerator.autocast():
            outputs.append(model(x).dtype)
    assert outputs == [torch.float32, torch.bfloat16]
    loader = made[0].prepare(torch.utils.data.DataLoader(range(5), batch_size=2))
    assert [made[0].gather_for_metrics(batch).tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


def test_the_device_may_change_within_a_process():
    PartialState(cpu=False)
    PartialState._shared_state["device"] = torch.device("meta")  # as if there were an accelerator
    assert make().device == torch.device("cpu")


def test_a_state_that_is_there_is_used_if_asked():
    with pytest.raises(ArgumentError, match="needs an existing state"):
        make(accelerator_config={"use_configured_state": True})
    own = Accelerator(cpu=True, mixed_precision="bf16")
    assert make(accelerator_config={"use_configured_state": True}, bf16=True).state._shared_state is own.state._shared_state
    with pytest.raises(ArgumentError, match="whose precision is 'bf16', but the arguments ask for 'no'"):
        make(accelerator_config={"use_configured_state": True})


def test_accumulation_has_one_place():
    given = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    with pytest.raises(ValueError, match="The `AcceleratorConfig`'s `num_steps` is set but"):
        make(accelerator_config=given, gradient_accumulation_steps=2)
    assert make(accelerator_config=given, gradient_accumulation_steps=4).gradient_state.num_steps == 1


def test_non_blocking_without_pinned_memory_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        make(accelerator_config={"non_blocking": True}, dataloader_pin_memory=True)
        assert not caplog.text
        make(accelerator_config={"non_blocking": True}, dataloader_pin_memory=False)
    assert "non_blocking=True without dataloader_pin_memory=True" in caplog.text
