"""What arguments do in two processes, for test_two_processes: `torchrun run_two_processes.py FOLDER`."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch import nn

from fts import Trainer, TrainerCallback, TrainingArguments
from fts.distributed import destroy_process_group

NAN_AT = 4  # in the first row of the third update, which the second process does not have
LENGTHS = (6, 2)


class Tokens(nn.Module):
    """A sum over labels that count, divided by `num_items_in_batch`; `plus` is in no gradient."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 1)

    def forward(self, input_ids, labels, plus=None, num_items_in_batch=None):
        kept = labels != -100
        loss = self.words(input_ids).squeeze(-1).square()[kept].sum() / num_items_in_batch
        return {"loss": loss if plus is None else loss + plus.sum()}


def make_examples(count, bad=()):
    ids = torch.arange(count * 6).reshape(count, 6) % 11
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[LENGTHS[number % 2] :] = -100
    plus = [float("nan") if number in bad else 0.0 for number in range(count)]
    return [{"input_ids": ids[i], "labels": labels[i], "plus": plus[i]} for i in range(count)]


def trained(folder, data, **options):
    defaults = {"per_device_train_batch_size": 1, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    more = {"train_sampling_strategy": "sequential", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3}
    trainer = Trainer(Tokens(), TrainingArguments(str(folder), **(defaults | more | options)), train_dataset=data)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.levels = set()

    def emit(self, record):
        self.levels.add(record.levelname)


def heard(folder, **options):
    """Whether this process logged such a message while it trained."""
    handler = Heard()
    logging.getLogger("fts").addHandler(handler)
    trained(folder, make_examples(2), **options)
    logging.getLogger("fts").removeHandler(handler)
    return "INFO" in handler.levels


class Asks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == 2
        control.should_evaluate |= state.global_step == 3
        control.should_epoch_stop |= state.global_step == 4
        control.should_training_stop |= state.global_step == 6


def asked_by_one(folder, rank):
    """What a callback of the second process alone asks for: the step of the end, of checkpoints and of evaluations, the epoch."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=1, max_steps=20
    )
    trainer = Trainer(Tokens(), arguments, train_dataset=make_examples(16), eval_dataset=make_examples(2))
    if rank == "1":
        trainer.add_callback(Asks())
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return [trainer.state.global_step, sorted(path.name for path in folder.iterdir()), evaluated, trainer.state.epoch]


def main(folder):
    folder = Path(folder)
    rank = os.environ["RANK"]
    found = {}
    for averages in (True, False):
        trainer = trained(folder / "tokens", make_examples(2), average_tokens_across_devices=averages)
        found[f"average {averages}"] = [losses(trainer), trainer.state.log_history[0]["grad_norm"]]
    for filters in (True, False):
        options = {"nonfinite": "ignore", "max_steps": 4, "logging_steps": 4, "logging_nan_inf_filter": filters}
        found[f"filter {filters}"] = losses(trained(folder / "nan", make_examples(8, bad=[NAN_AT]), **options))
    counted = trained(folder / "counted", make_examples(4), max_steps=2, include_num_input_tokens_seen="all")
    found["tokens"] = counted.state.num_input_tokens_seen
    found["replica"] = heard(folder / "log", log_level="info", log_level_replica="error")
    os.environ["LOCAL_RANK"] = "0"  # as on two machines
    found["each node"] = heard(folder / "log", log_level="info", log_on_each_node=True, log_level_replica="error")
    found["one node"] = heard(folder / "log", log_level="info", log_on_each_node=False, log_level_replica="error")
    for each in (True, False):
        own = folder / f"save {each} {rank}"  # a disk of each machine
        trained(own, make_examples(2), save_strategy="steps", save_steps=1, save_on_each_node=each)
        found[f"save {each}"] = (own / "checkpoint-1" / "model.safetensors").is_file()
    found["asked"] = asked_by_one(folder / "asked", rank)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
