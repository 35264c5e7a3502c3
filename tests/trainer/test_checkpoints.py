import json
import logging

import pytest
import torch

from fts.errors import ArgumentError, CheckpointError
from fts.trainer import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from fts.trainer.model.weights import load_weights
from tests.trainer.helpers import make_trainer

TIMES = ("runtime", "per_second")


def history(trainer):
    return [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in trainer.state.log_history]


SETTINGS = {
    "num_train_epochs": 3,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "lr_scheduler_type": "cosine",
    "metric_for_best_model": "loss",
}


class Interrupt(TrainerCallback):
    """Stands for Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"logging_strategy": "epoch", "save_steps": 6, "eval_steps": 6}]
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, changes):
    full = make_trainer(tmp_path / "full", callbacks=[EarlyStoppingCallback(9)], **(SETTINGS | changes))
    expected = full.train()
    broken = make_trainer(tmp_path / "broken", callbacks=[EarlyStoppingCallback(9), Interrupt(8)], **(SETTINGS | changes))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", callbacks=[EarlyStoppingCallback(9)], **(SETTINGS | changes))
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == expected.global_step
    assert output.training_loss == expected.training_loss
    assert history(resumed) == history(full)
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    stopper = [trainer.callback_handler.callbacks[1] for trainer in (full, resumed)]
    assert stopper[0].state() == stopper[1].state()


def test_resuming_a_finished_run_does_nothing(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.train()
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    again = make_trainer(tmp_path, **SETTINGS)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18")).global_step == 18
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_more_epochs_can_follow(tmp_path):
    make_trainer(tmp_path, **SETTINGS).train()
    assert make_trainer(tmp_path, **(SETTINGS | {"num_train_epochs": 4})).train(resume_from_checkpoint=True).global_step == 24


def test_changed_arguments_are_reported(tmp_path, caplog):
    make_trainer(tmp_path, **SETTINGS).train()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, **(SETTINGS | {"save_steps": 10})).train(resume_from_checkpoint=True)
    assert "save_steps: 10 (from args) != 5 (from trainer_state.json)" in caplog.text


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    make_trainer(tmp_path, **SETTINGS).train()
    with (tmp_path / "checkpoint-18" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    resumed = make_trainer(tmp_path, **SETTINGS)
    steps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed.add_callback(Watch)
    resumed.train(resume_from_checkpoint=True)
    assert steps[0] == 15
    with pytest.raises(CheckpointError, match="corrupt"):
        make_trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=tmp_path / "checkpoint-10" / ".." / _damage(tmp_path))


def _damage(root):
    with (root / "checkpoint-10" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    return "checkpoint-10"


def test_a_deeply_nested_state_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read"):
        TrainerState.load_from_json(tmp_path / "trainer_state.json")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_damaged_weights_are_a_checkpoint_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


def test_nothing_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ArgumentError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nowhere: the directory does not exist"):
        trainer.train(resume_from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="it has no model"):
        trainer.train(resume_from_checkpoint=tmp_path)


def test_files_of_a_plain_module(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps")
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "training_args.json", "manifest.json"}
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["train_batch_size"]) == (2, 2, 4)
    assert json.loads((tmp_path / "checkpoint-2" / "training_args.json").read_text())["max_steps"] == 2
    trainer.save_model(tmp_path / "model")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_checkpoint_loads_with_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.trainer.parity.models import bert, sentences

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    args = TrainingArguments(tmp_path, max_steps=2, save_steps=2, use_cpu=True, disable_tqdm=True)
    trainer = Trainer(bert(), args, train_dataset=sentences(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    for directory in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
        assert type(loaded) is type(trainer.model)
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert transformers.AutoTokenizer.from_pretrained(directory)("a b").input_ids == tokenizer("a b").input_ids


def test_lora_checkpoints_resume(tmp_path):
    peft = pytest.importorskip("peft")
    from tests.trainer.parity.models import bert, sentences

    def adapted():
        torch.manual_seed(1)
        return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))

    def trainer(steps):
        args = TrainingArguments(tmp_path, max_steps=4, save_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=0.01)
        return Trainer(adapted(), args, train_dataset=sentences(), callbacks=[Interrupt(steps)])

    full = trainer(-1)
    base = full.model.base_model.model.bert.encoder.layer[0].attention.self.key.weight.detach().clone()
    full.train()
    assert torch.equal(base, full.model.base_model.model.bert.encoder.layer[0].attention.self.key.weight)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    again = trainer(-1)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_rotation_keeps_the_newest(tmp_path):
    make_trainer(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
