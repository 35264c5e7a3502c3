"""What callbacks see, what is logged, and what is written: the same events, entries and files."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.trainer.parity.compare import SIDES, SPEEDS, assert_same_metrics, assert_same_training, both, entries, made, make
from tests.trainer.parity.models import Plain, accuracy, bert, sentences

EVENTS = (
    *("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_substep_end"),
    *("on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_evaluate", "on_predict", "on_save", "on_log"),
    *("on_prediction_step", "on_push_begin"),
)
FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def recorder(side, record):
    """A callback class of one side that records each event with the counters, flags and keyword arguments that it is given."""

    def method(event):
        def listen(self, args, state, control, **kwargs):
            given = sorted(name for name, value in kwargs.items() if value is not None)
            flags = [name for name in FLAGS if getattr(control, name)]
            record.append((event, state.global_step, round(state.epoch or 0, 6), flags, given))

        return listen

    return type("Recorder", (side.kind("TrainerCallback"),), {event: method(event) for event in EVENTS})


def parts(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1), "compute_metrics": accuracy}


def recorded(folder, model=None, also=None, parts=parts, **options):
    """The events of a training, an evaluation and a prediction on each side."""
    records = []
    for side in SIDES:
        record = []
        added = [recorder(side, record)] if also is None else [recorder(side, record), also(side)]
        trainer = make(side, folder, model or Plain(), lambda m, own=added: parts(m) | {"callbacks": own}, **options)
        trainer.train()
        trainer.evaluate()
        trainer.predict(sentences(6))
        records.append(record)
    return records


RUNS = {
    "plain": {"max_steps": 3},
    "accumulated": {"gradient_accumulation_steps": 3, "max_steps": 4},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "steps": {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "the best": {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    },
    "evaluated first": {"max_steps": 2, "eval_strategy": "epoch", "eval_on_start": True},
    "logged by epochs": {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"},
    "nothing logged": {"max_steps": 2, "logging_strategy": "no"},
}


@pytest.mark.parametrize("name", RUNS)
def test_events(name, tmp_path, capsys):
    theirs, ours = recorded(tmp_path, **RUNS[name])
    assert [entry[0] for entry in ours] == [entry[0] for entry in theirs]
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in theirs]


WITHIN = ("on_prediction_step", "on_log")
"""Within an evaluation, whose flag is cleared when it begins, and not when it ends."""


@pytest.mark.parametrize("name", RUNS)
def test_flags_at_each_event(name, tmp_path, capsys):
    theirs, ours = recorded(tmp_path, **RUNS[name])
    found, expected = ([(entry[0], entry[3]) for entry in entries_ if entry[0] not in WITHIN] for entries_ in (ours, theirs))
    assert found == expected


def test_keyword_arguments_of_events(tmp_path, capsys):
    theirs, ours = recorded(tmp_path, **RUNS["steps"])
    for one, other in zip(theirs, ours, strict=True):
        more = {"metrics"} if other[0] == "on_step_end" else set()  # the step's own metrics, as tensors
        assert set(other[4]) == set(one[4]) | more, other[0]


def asking(flag, at):
    """A callback that sets a flag at the end of an update."""

    def made(side):
        class Asks(side.kind("TrainerCallback")):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == at:
                    setattr(control, flag, True)
                return control

        return Asks()

    return made


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_obeyed(flag, tmp_path, capsys):
    options = {"logging_steps": 100, "max_steps": -1, "num_train_epochs": 2}
    theirs, ours = recorded(tmp_path, also=asking(flag, 3), **options)
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in theirs]


@pytest.mark.parametrize("name", RUNS)
def test_log_history(name, tmp_path, capsys):
    theirs, ours = both(tmp_path, Plain(), parts, **RUNS[name])
    expected, found = theirs.state.log_history, ours.state.log_history
    assert [list(entry) for entry in found] == [list(entry) for entry in expected]
    for one, other in zip(expected, found, strict=True):
        assert_same_metrics(one, other, rel=2e-4)


def test_output_of_train(tmp_path, capsys):
    theirs, ours = made(tmp_path, bert(), parts)
    one, other = theirs.train(), ours.train()
    assert other._fields == one._fields
    assert (other.global_step, other.training_loss) == (one.global_step, pytest.approx(one.training_loss, rel=2e-5))
    # transformers' PrinterCallback takes total_flos out of the dictionary that train returns; ours leaves it
    assert other.metrics["total_flos"] == ours.state.total_flos == theirs.state.total_flos > 0
    assert_same_metrics(one.metrics, {name: value for name, value in other.metrics.items() if name != "total_flos"})


CHECKPOINTED = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 7}


def test_state_in_a_checkpoint(tmp_path, capsys):
    both(tmp_path, bert(), parts, **CHECKPOINTED, metric_for_best_model="accuracy", load_best_model_at_end=False)
    one, other = (json.loads((tmp_path / side.name / "checkpoint-6/trainer_state.json").read_text()) for side in SIDES)
    assert other.keys() == one.keys()
    same = set(one) - {"log_history", "best_model_checkpoint", "stateful_callbacks", "best_metric", "total_flos"}
    assert {name: other[name] for name in same} == {name: one[name] for name in same}
    assert other["best_metric"] == pytest.approx(one["best_metric"])
    assert other["total_flos"] == pytest.approx(one["total_flos"])
    best = [Path(str(state["best_model_checkpoint"])).name for state in (one, other)]
    assert best[0] == best[1]
    for entry, twin in zip(one["log_history"], other["log_history"], strict=True):
        assert_same_metrics(entry, twin, rel=2e-4)
    assert other["stateful_callbacks"].keys() == one["stateful_callbacks"].keys() == {"TrainerControl"}
    assert other["stateful_callbacks"]["TrainerControl"].keys() == one["stateful_callbacks"]["TrainerControl"].keys()


def test_checkpoints_have_the_same_model_files(tmp_path, capsys):
    both(tmp_path, bert(), parts, **CHECKPOINTED, save_total_limit=2)
    names = [sorted(path.name for path in (tmp_path / side.name).glob("checkpoint-*")) for side in SIDES]
    assert names[0] == names[1] == ["checkpoint-6", "checkpoint-7"]
    files = [{path.name for path in (tmp_path / side.name / "checkpoint-7").iterdir()} for side in SIDES]
    theirs_alone = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # pickles
    assert files[0] - theirs_alone <= files[1]


def test_metrics_and_state_files(tmp_path, capsys):
    for side in SIDES:
        trainer = make(side, tmp_path, bert(), parts, max_steps=3)
        trainer.save_metrics("train", trainer.train().metrics)
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.log_metrics("eval", {"eval_loss": 0.5, "eval_runtime": 61.5, "total_flos": 2.0**30})
        trainer.save_state()
        trainer.save_model()
    printed = capsys.readouterr().out
    assert printed.count("***** eval metrics *****") == 2
    for file in ("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json"):
        one, other = (json.loads((tmp_path / side.name / file).read_text()) for side in SIDES)
        # transformers' PrinterCallback takes total_flos out of the dictionary that train returns
        assert other.keys() - {"total_flos"} == one.keys() - {"total_flos"}, file
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fts" / file).is_file()


def test_load_best_model_at_end(tmp_path, capsys):
    options = {**CHECKPOINTED, "max_steps": 9, "learning_rate": 0.3, "load_best_model_at_end": True}
    theirs, ours = both(tmp_path, Plain(), parts, **options)
    assert ours.state.best_global_step == theirs.state.best_global_step
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=1e-4)
    assert Path(ours.state.best_model_checkpoint).name == Path(theirs.state.best_model_checkpoint).name
    assert_same_training(theirs, ours, scale=20)  # the large rate makes the best one not the last, and rounding grow
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping(patience, tmp_path, capsys):
    options = {**CHECKPOINTED, "eval_steps": 1, "save_steps": 1, "max_steps": 20, "learning_rate": 0.3}
    options |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    theirs, ours = recorded(tmp_path, also=lambda side: side.kind("EarlyStoppingCallback")(patience), **options)
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in theirs]
    assert max(entry[1] for entry in ours) < 20


@pytest.mark.parametrize("how", ["all", "non_padding", True])
def test_tokens_are_counted(how, tmp_path, capsys):
    examples = sentences()
    for index, row in enumerate(examples):
        row["attention_mask"] = (row["input_ids"] > index).long()
    options = {"include_num_input_tokens_seen": how, "gradient_accumulation_steps": 2}
    theirs, ours = both(tmp_path, bert(), lambda model: {"train_dataset": examples}, **options)
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen > 0
    assert_same_training(theirs, ours)
    assert [e["num_input_tokens_seen"] for e in entries(ours)] == [e["num_input_tokens_seen"] for e in entries(theirs)]


def test_state_is_a_dataclass_with_the_same_fields(tmp_path):
    one, other = (side.kind("TrainerState") for side in SIDES)
    assert {field.name for field in dataclasses.fields(other)} == {field.name for field in dataclasses.fields(one)}
    assert dataclasses.asdict(other()) == dataclasses.asdict(one())


def test_callbacks_at_hand(tmp_path, capsys):
    for disabled, last in ((True, "PrinterCallback"), (False, "ProgressCallback")):
        lists = [
            [type(cb).__name__ for cb in make(side, tmp_path, Plain(), parts, disable_tqdm=disabled).callback_handler.callbacks]
            for side in SIDES
        ]
        assert lists[0] == lists[1] == ["DefaultFlowCallback", last]


def test_times_are_not_compared():
    assert "train_runtime".endswith(SPEEDS)
