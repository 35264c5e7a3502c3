"""Arguments that mean something in several processes alone, in two that torchrun starts."""

import math

import pytest
import torch

from fts.trainer import TrainingArguments
from fts.trainer.arguments.processes import default_group
from tests import torchrun
from tests.trainer.run_two_processes import LENGTHS, Tokens, losses, make_examples, trained

SCRIPT = torchrun.ROOT / "tests" / "trainer" / "run_two_processes.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return torchrun.results(SCRIPT, tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("averages", [True, False])
def test_losses_are_divided_by_the_labels_of_all_or_of_each(found, averages):
    model = Tokens()
    data = make_examples(2)
    sums = [model.words(row["labels"][:count]).square().sum() for row, count in zip(data, LENGTHS, strict=True)]
    each = sum(part / count for part, count in zip(sums, LENGTHS, strict=True)) / 2
    expected = sum(sums) / sum(LENGTHS) if averages else each
    expected.backward()
    assert not math.isclose(float(each.detach()), float((sum(sums) / sum(LENGTHS)).detach()), rel_tol=1e-2)
    for process in found:
        (loss,), norm = process[f"average {averages}"]
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert norm == pytest.approx(float(torch.linalg.vector_norm(model.words.weight.grad)), rel=1e-5)


def test_a_loss_that_is_nan_in_one_process_is_left_out_in_all(found, tmp_path):
    for process in found:
        assert all(map(math.isnan, process["filter False"])) and len(process["filter False"]) == 1
    assert found[0]["filter True"] == found[1]["filter True"]
    kept = losses(trained(tmp_path, make_examples(8), max_steps=4, per_device_train_batch_size=2))
    assert found[0]["filter True"] == [pytest.approx((sum(kept) - kept[2]) / 3, rel=1e-5)]


def test_tokens_of_all_processes_are_counted(found, tmp_path):
    alone = trained(tmp_path, make_examples(4), max_steps=2, per_device_train_batch_size=2, include_num_input_tokens_seen="all")
    assert [process["tokens"] for process in found] == [alone.state.num_input_tokens_seen] * 2 == [24, 24]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("replica", [True, False]),
        ("each node", [True, True]),
        ("one node", [True, False]),
        ("save True", [True, True]),
        ("save False", [True, False]),
    ],
)
def test_which_process_logs_and_which_saves(found, case, expected):
    assert [process[case] for process in found] == expected


def test_what_a_callback_asks_for_in_one_process_all_do(found):
    steps, checkpoints, evaluated, epoch = found[0]["asked"]
    assert (steps, checkpoints, evaluated, epoch) == (6, ["checkpoint-2"], [3], 1.25)
    assert found[1]["asked"] == found[0]["asked"]


def test_the_processes_are_joined_by_what_the_arguments_name(monkeypatch):
    asked = []
    note = lambda backend, timeout, device: asked.append((backend, timeout.seconds))  # noqa: E731
    monkeypatch.setattr("fts.distributed.process_group.init_process_group", note)
    default_group(TrainingArguments(use_cpu=True, ddp_backend="gloo", ddp_timeout=7))
    default_group(TrainingArguments(use_cpu=True))
    with TrainingArguments(use_cpu=True, ddp_backend="gloo").main_process_first():
        pass
    assert asked == [("gloo", 7), (None, 1800), ("gloo", 1800)]
