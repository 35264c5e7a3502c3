"""Arguments that change how a run is done and not what comes of it, and those that stop it."""

import json

import pytest
import torch

from tests.trainer.parity.compare import OURS, SIDES, assert_same_training, both, entries, made, make
from tests.trainer.parity.models import Plain, bert, llama, sentences, texts


def classes(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1)}


def tokens(model):
    return {"train_dataset": texts()}


@pytest.fixture
def determinism():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def test_full_determinism(determinism, tmp_path, capsys):
    theirs, ours = both(tmp_path, bert(), classes, full_determinism=True, max_steps=3)
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_training(theirs, ours)


def test_settings_of_several_processes_change_nothing_in_one(tmp_path, capsys):
    options = {"save_on_each_node": True, "eval_use_gather_object": True, "log_on_each_node": False, "ddp_timeout": 60}
    theirs, ours = both(tmp_path, bert(), classes, **options, eval_strategy="steps", eval_steps=2, max_steps=4)
    assert_same_training(theirs, ours)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=2e-5)


def test_the_cache_is_emptied(tmp_path, monkeypatch, capsys):
    emptied = []
    monkeypatch.setattr("fts.trainer.run.dispatcher.empty_cache", lambda *args: emptied.append(1))
    theirs, ours = both(tmp_path, Plain(), classes, torch_empty_cache_steps=3, max_steps=7)
    assert_same_training(theirs, ours)
    assert len(emptied) in (2, 3)  # transformers counts from update 0, before the update


def test_nothing_is_pickled(tmp_path, capsys):
    trainer = make(OURS, tmp_path, bert(), classes, save_strategy="steps", save_steps=2, max_steps=2, save_safetensors=True)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "fts").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".jinja", ".md", ".model"}
    with pytest.raises(ValueError, match="save_safetensors"):
        make(OURS, tmp_path, bert(), classes, save_safetensors=False)


def test_only_the_model_is_saved(tmp_path, capsys):
    options = {"save_only_model": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    both(tmp_path, bert(), classes, **options)
    files = [{path.name for path in (tmp_path / side.name / "checkpoint-2").iterdir()} for side in SIDES]
    assert files[0] - {"training_args.bin"} <= files[1]
    assert not any("opt" in name for name in files[1])
    again = make(OURS, tmp_path, bert(), classes, **options)
    with pytest.raises(ValueError, match="save_only_model=True"):  # transformers would continue with a new optimizer
        again.train(resume_from_checkpoint=str(tmp_path / "fts" / "checkpoint-2"))


def test_fp16(tmp_path, capsys):
    """transformers' Trainer scales no losses on a CPU; where nothing overflows, a scale changes nothing but small gradients."""
    theirs, ours = both(tmp_path, llama(), tokens, fp16=True, max_steps=4)
    found, expected = entries(ours), entries(theirs)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=2e-3)
    assert [e["grad_norm"] for e in found] == pytest.approx([e["grad_norm"] for e in expected], rel=2e-2)
    assert [e["learning_rate"] for e in found] == pytest.approx([e["learning_rate"] for e in expected])
    full = make(OURS, tmp_path, llama(), tokens, max_steps=4)
    full.train()
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in entries(full)], rel=2e-3)
    assert [e["loss"] for e in found] != [e["loss"] for e in entries(full)]
    assert all(parameter.dtype is torch.float32 for parameter in ours.model.parameters())
    assert [e["loss_scale"] for e in found] == [2.0**16] * 4


def test_data_is_not_skipped(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    both(tmp_path, bert(), classes, **options)
    theirs, ours = made(tmp_path, bert(), classes, **options, ignore_data_skip=True)
    for side, trainer in zip(SIDES, (theirs, ours), strict=True):
        trainer.train(resume_from_checkpoint=str(tmp_path / side.name / "checkpoint-3"))
    found = [[entry["loss"] for entry in entries(trainer)] for trainer in (theirs, ours)]
    assert found[1] == pytest.approx(found[0], rel=2e-5)


class Bursting(Plain):
    """Its hidden values overflow at the third call."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.step = torch.nn.Identity()

    def forward(self, input_ids, labels=None):
        self.calls += 1
        hidden = self.norm(self.embed(input_ids).mean(1)) * (float("inf") if self.calls == 3 else 1.0)
        logits = self.head(self.step(hidden))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_underflow_and_overflow(tmp_path, capsys):
    for side in SIDES:
        trainer = make(side, tmp_path, Bursting(), classes, debug="underflow_overflow")
        with pytest.raises(ValueError, match=r"inf/nan|inf or nan|overflow"):
            trainer.train()


def test_memory_is_measured(tmp_path, capsys):
    theirs, ours = both(tmp_path, Plain(), classes, skip_memory_metrics=False, max_steps=2)
    expected, found = ({k for k in t.state.log_history[-1] if "mem" in k} for t in (theirs, ours))
    assert found == expected
    assert any(name.startswith("train_mem_cpu") for name in found)


class Large(Plain):
    """It has no room for more than one row."""

    def forward(self, input_ids, labels=None):
        if self.training and len(input_ids) > 1:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(input_ids, labels)


def test_a_batch_size_that_fits_is_found(tmp_path, capsys):
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 0.5}
    theirs, ours = both(tmp_path, Large(), classes, **options)
    assert ours.state.train_batch_size == theirs.state.train_batch_size == 1
    assert_same_training(theirs, ours)
    assert ours.state.global_step == theirs.state.global_step == 15


def test_compiled(tmp_path, capsys):
    plain = made(tmp_path, Plain(), classes, max_steps=4)[0]
    plain.train()
    ours = make(OURS, tmp_path, Plain(), classes, max_steps=4, torch_compile_backend="eager", torch_compile_mode="default")
    assert ours.args.torch_compile
    ours.train()
    assert_same_training(plain, ours)


def test_the_state_is_saved_as_json(tmp_path, capsys):
    trainer = make(OURS, tmp_path, Plain(), classes, max_steps=2)
    trainer.train()
    trainer.save_state()
    assert json.loads((tmp_path / "fts" / "trainer_state.json").read_text())["global_step"] == 2
