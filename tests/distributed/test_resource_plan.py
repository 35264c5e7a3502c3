"""The resource plan against bytes of real models in real processes, against the papers, and against the page."""

import json
import re
from pathlib import Path

import attrs
import pytest
from torch import nn

from fts.cli import main
from fts.distributed.model_shapes import local_shapes, numel, shapes_from_counts, shapes_from_module
from fts.distributed.resource_plan import (
    PRECISIONS,
    STRATEGIES,
    TrainingSetup,
    estimate_activations,
    estimate_memory,
    estimate_traffic,
    plan_resources,
)
from fts.errors import ArgumentError
from tests import torchrun

ROOT = Path(__file__).parents[2]

SETUPS = {
    "ddp": TrainingSetup("ddp", accumulate=2, world=2),
    "ddp, buckets apart": TrainingSetup("ddp", bucket_view=False, world=2),
    "fsdp": TrainingSetup("fsdp", accumulate=2, no_sync=False, world=2),
    "fsdp, not resharded": TrainingSetup("fsdp", accumulate=2, no_sync=False, reshard=False, world=2),
    "fsdp, no sync": TrainingSetup("fsdp", accumulate=2, world=2),
    "fsdp, bf16": TrainingSetup("fsdp", precision="bf16", world=2, reduce=2),
    "fsdp, bf16-pure": TrainingSetup("fsdp", precision="bf16-pure", world=2),
    "tp": TrainingSetup("tp", accumulate=2, world=2, tensor=2, batch=2, sequence=12),
    "hsdp": TrainingSetup("hsdp", accumulate=2, no_sync=False, world=4, shard=2),
}


def measured(processes, file):
    return torchrun.result(Path(__file__).with_name("run_resource_plan.py"), file, processes=processes)


def models():
    from tests.distributed.run_resource_plan import bert, llama

    return (
        shapes_from_module(bert(), ["BertLayer"]),
        shapes_from_module(llama(), ["LlamaDecoderLayer"], layers=3, hidden=64, heads=4, vocabulary=500),
    )


def compare(every_rank, setups):
    bert, llama = models()
    for name, setup in setups.items():
        found = plan_resources(llama if name == "tp" else bert, setup)
        most = {key: max(one[name][key] for one in every_rank) for key in ("parameters", "gradients", "moments", "buckets")}
        assert found.memory.parameters == pytest.approx(most["parameters"], rel=0.01), name
        assert found.memory.gradients == pytest.approx(most["gradients"], rel=0.01), name
        assert found.memory.moments == pytest.approx(most["moments"], rel=0.01), name
        if setup.strategy == "ddp":
            assert found.memory.buckets == most["buckets"], name
        exchanged = {}
        for one in found.traffic:
            exchanged[one.kind] = exchanged.get(one.kind, 0) + one.times * one.nbytes
        assert all(one[name]["exchanged"] == exchanged for one in every_rank), (name, exchanged, every_rank[0][name]["exchanged"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    pytest.importorskip("transformers")
    return measured(2, tmp_path_factory.mktemp("measured") / "two.json")


def test_bytes_of_two_processes(two):
    compare(two, {name: setup for name, setup in SETUPS.items() if name != "hsdp"})


def test_the_largest_unit_is_gathered(two):
    bert, _ = models()
    largest = max(4 * 2 * numel(local_shapes(unit.shapes, 2)) for unit in bert.units)
    assert two[0]["fsdp"]["largest gathered"] == largest


def test_what_fsdp_gathers_at_a_time():
    model = shapes_from_counts(1_020, layers=3, hidden=10, vocabulary=6)
    assert [unit.numel for unit in model.units] == [120, 300, 300, 300]
    setup = TrainingSetup("fsdp", world=2, accumulate=2, precision="bf16", reduce=4, no_sync=False)
    assert estimate_memory(model, setup).gathered == 2 * (120 + 2 * 300) + (2 + 4) * 300
    assert estimate_memory(model, attrs.evolve(setup, no_sync=True)).gathered == 2 * (120 + 2 * 300) + (2 + 4) * 300 + 4 * 1020
    assert estimate_memory(model, attrs.evolve(setup, reshard=False)).gathered == 2 * 1020 + (2 + 4) * 300


@pytest.mark.fuzz
def test_bytes_of_four_processes(tmp_path):
    setups = {name: attrs.evolve(setup, world=4, tensor=4 if name == "tp" else 1, shard=2) for name, setup in SETUPS.items()}
    compare(measured(4, tmp_path / "four.json"), setups)


@pytest.mark.parametrize(
    ("strategy", "world", "gigabytes"),
    [("single", 1, 120), ("deepspeed-1", 64, 31.4), ("deepspeed-2", 64, 16.6), ("deepspeed-3", 64, 1.9)],
)
def test_figure_1_of_the_zero_paper(strategy, world, gigabytes):
    precision = "bf16-master"
    found = estimate_memory(shapes_from_counts(7_500_000_000), TrainingSetup(strategy, world=world, precision=precision))
    model_states = found.parameters + found.gradients + found.moments + found.master
    assert model_states / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_volumes_of_the_zero_paper():
    size = shapes_from_counts(7_500_000_000)
    sent = {
        name: plan_resources(size, TrainingSetup(name, world=1024, precision="bf16-master")).sent
        for name in STRATEGIES
        if name not in ("single", "tp")
    }
    twice = 2 * 2 * 7_500_000_000
    assert sent["ddp"] == pytest.approx(twice, rel=2e-3)
    assert sent["deepspeed-1"] == sent["deepspeed-2"] == pytest.approx(twice, rel=2e-3)
    assert sent["deepspeed-3"] == pytest.approx(1.5 * twice, rel=2e-3)
    assert sent["fsdp"] == pytest.approx(1.5 * twice, rel=2e-3)


def test_activations_of_the_paper():
    # Korthikanti et al. 2022, table 2 and section 4: with t = 8, the 22 B model keeps s b h (10 + 24 / t + 5 a s / (h t)) a layer
    model = shapes_from_counts(22_000_000_000, layers=48, hidden=6144, heads=64)
    setup = TrainingSetup("tp", world=8, tensor=8, precision="bf16-pure", batch=4, sequence=2048, attention="eager")
    s, b, h, a, t = 2048, 4, 6144, 64, 8
    assert estimate_activations(model, setup) == pytest.approx(48 * s * b * h * (10 + 24 / t + 5 * a * s / (h * t)), rel=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "deepspeed-1", "deepspeed-2", "deepspeed-3"])
def test_sharding_never_takes_more_state_than_ddp(strategy, precision):
    model = shapes_from_counts(10_000_000, layers=4, hidden=256, vocabulary=1000)

    def states(name):
        found = estimate_memory(model, TrainingSetup(name, world=16, precision=precision))
        return found.gradients + found.moments + found.parameters + found.master

    assert states(strategy) <= states("ddp")


def test_adafactor_keeps_rows_and_columns():
    model = shapes_from_module(nn.Linear(30, 20, bias=False), [])
    assert estimate_memory(model, TrainingSetup(optimizer="adafactor")).moments == 4 * (30 + 20)
    assert estimate_memory(model, TrainingSetup("fsdp", optimizer="adafactor", world=2)).moments == 4 * (30 + 10)


def test_frozen_parameters_have_no_gradients():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))
    net[0].requires_grad_(False)
    found = plan_resources(shapes_from_module(net, ["Linear"]), TrainingSetup("fsdp", world=2))
    assert (found.memory.gradients, found.memory.parameters) == (4 * (10 + 1), 4 * (5 * 10 + 5 + 10 + 1))
    assert [one.nbytes for one in found.traffic] == [4 * (100 + 10 + 20 + 2), 4 * (20 + 2)]  # one row is filled up to two


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "fdsp"}, "strategy='fdsp' is unknown. Choose one of single, ddp"),
        ({"strategy": "ddp", "world": 0}, "world=0: give a number of at least 1"),
        ({"world": 4}, "'single' is one process"),
        ({"strategy": "hsdp", "world": 12}, "12 processes cannot be divided into groups of 8"),
    ],
)
def test_invalid_setups(wrong, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        TrainingSetup(**wrong)


def test_embeddings_larger_than_the_model():
    with pytest.raises(ArgumentError, match="1000 parameters are fewer than the 2000000"):
        shapes_from_counts(1000, layers=1, hidden=100, vocabulary=10_000)


def test_the_command_prints_json(capsys):
    command = (
        "plan --params 7e9 --world 64 --strategy hsdp --shard 8 --precision bf16 --layers 32 --hidden 4096 --sequence 2048 --json"
    )
    assert main(command.split()) == 0
    found = json.loads(capsys.readouterr().out)["hsdp"]
    of_all = plan_resources(
        shapes_from_counts(7_000_000_000, layers=32, hidden=4096),
        TrainingSetup("hsdp", world=64, precision="bf16", sequence=2048),
    )
    assert found["memory"]["total"] == of_all.memory.total
    assert found["sent"] == of_all.sent == sum(one["sent"] for one in found["traffic"])
    assert [one["processes"] for one in found["traffic"]] == [8, 8, 8]


def test_the_command_compares_and_names_what_is_not_counted(capsys):
    assert main(["plan", "--params", "7e9", "--world", "12"]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines()[2:-2]]
    assert names == [name for name in STRATEGIES if name not in ("hsdp", "tp")]  # 12 processes have no groups of 8
    assert "Activations are not counted" in printed and "tp cannot shard: give --layers" in printed
    assert main(["plan", "--params", "7B", "--world", "12"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["plan", "--params", "7B", "--world", "8", "--strategy", "tp"]) == 2
    assert "give --layers and --hidden" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["7T", "1.5", "-1", "many", "", "inf", "nan"])
def test_the_command_says_how_numbers_are_written(capsys, text):
    assert main(["plan", f"--params={text}"]) == 2
    assert f"{text!r} is no whole number; write one as 7000000000, 7e9 or 7B" in capsys.readouterr().err


def test_the_command_reads_a_model(capsys, tmp_path):
    pytest.importorskip("transformers")
    from tests.distributed.run_resource_plan import bert

    model = bert()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--world", "2", "--strategy", "fsdp", "--precision", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["fsdp"]
    assert found["memory"]["parameters"] == estimate_memory(models()[0], SETUPS["fsdp"]).parameters


def test_the_command_refuses_a_directory_without_a_model(capsys, tmp_path):
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "There is no file config.json" in capsys.readouterr().err


def test_tensor_parallel_sums_activations():
    model = shapes_from_counts(1_000_000, layers=2, hidden=64)
    (only,) = estimate_traffic(model, TrainingSetup("tp", world=4, tensor=4, batch=3, sequence=10, accumulate=2))
    assert (only.what, only.times, only.nbytes) == ("activations", 2 * 2 * 7, 4 * 3 * 10 * 64)


SIZES = {
    "7e9": shapes_from_counts(7_000_000_000, layers=32, hidden=4096, vocabulary=32_000),
    "70e9": shapes_from_counts(70_000_000_000, layers=80, hidden=8192, vocabulary=32_000),
}


def test_the_page(capsys):
    """The tables and the output of the command equal the plan."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| (\w+) parameters \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert [name for name, _ in tables] == list(SIZES)
    for name, table in tables:
        found = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        assert {row[0] for row in found} == set(STRATEGIES) - {"single"}
        for strategy, *cells in found:
            setup = TrainingSetup(
                strategy,
                tensor=8 if strategy == "tp" else 1,
                precision="bf16",
                sequence=2048,
                checkpointing=True,
                world=8,
            )
            plans = [plan_resources(SIZES[name], attrs.evolve(setup, world=world)) for world in (8, 64, 512)]
            assert cells == [f"{count / 1e9:.1f}" for one in plans for count in (one.memory.total, one.sent)], (name, strategy)

    shown = re.search(r"^\$ fts (plan .*)\n((?:.*\n)*?)```", page, re.MULTILINE)
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]


def test_the_table_of_bytes_on_the_page():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, precision in PRECISIONS.items():
        (row,) = [line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1]]
        p, c, g, m, master, each = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert tuple(map(int, (p, c, g, m, master))) == attrs.astuple(precision)
        assert int(each.split()[0]) == precision.parameters + precision.gradients + 2 * precision.moments + precision.master
