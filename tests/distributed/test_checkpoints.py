"""Checkpoints that several processes write and read, and runs that go on in others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fts import loops
from fts.cli import main as command
from fts.errors import ArgumentError
from fts.loops.finding import survey
from fts.storage import is_spread
from tests.distributed import resuming
from tests.torchrun import results

HERE = Path(__file__).parent
WHOLE = 128
"""MiB of the tensors whose saving is measured."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What `keeping.py` measured in each process, and the directory with its checkpoints."""
    folder, root = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("checkpoints")
    return [found["peaks"] for found in results(HERE / "keeping.py", folder, root)], root


def test_each_form_is_read_into_each_and_what_fails_in_one_process_fails_in_all(kept):
    peaks, root = kept
    assert len(peaks) == 2
    assert {"full", "sharded"} <= {path.name for path in root.iterdir()}  # `keeping.py` has held the rest


def test_no_process_but_the_one_that_writes_ever_holds_the_whole(kept):
    (first, second), _ = kept
    assert first["save full"] > WHOLE  # else nothing is measured
    assert second["save full"] < WHOLE / 8
    assert max(first["save sharded"], second["save sharded"]) < WHOLE / 2  # in files of 16 MiB
    assert max(first["load sharded"], second["load sharded"]) < 0.6 * WHOLE


def test_a_sharded_checkpoint_is_a_model_in_one_piece_on_request(kept, tmp_path, capsys):
    _, root = kept
    assert command(["consolidate", str(root / "sharded"), str(tmp_path / "model")]) == 0
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "model", root / "full"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert command(["consolidate", str(root / "sharded"), str(tmp_path / "model")]) == 2
    assert command(["consolidate", str(root / "full"), str(tmp_path / "other")]) == 2
    assert "not empty" in capsys.readouterr().err


def same_batches(out, *, strategy, name, **more):
    return {"name": name, "out": str(out), "strategy": strategy, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two processes, from the beginning and from each other's checkpoints, and where these are."""
    root = tmp_path_factory.mktemp("runs")
    ddp, fsdp, full = root / "ddp", root / "fsdp", root / "full"
    jobs = [
        same_batches(ddp, strategy="ddp", name="ddp"),
        same_batches(fsdp, strategy="fsdp-sharded", name="fsdp", model=str(root / "model")),
        same_batches(full, strategy="fsdp", name="full", args={"save_only_model": True}),
        same_batches(root / "1", strategy="ddp", name="ddp again", resume=str(ddp / "checkpoint-4")),
        same_batches(root / "2", strategy="fsdp-sharded", name="fsdp again", resume=str(fsdp / "checkpoint-4")),
        same_batches(root / "3", strategy="fsdp", name="ddp to fsdp", resume=str(ddp / "checkpoint-4")),
        same_batches(root / "4", strategy="ddp", name="fsdp to ddp", resume=str(fsdp / "checkpoint-4")),
        same_batches(root / "5", strategy="fsdp", name="and back", resume=str(root / "4" / "checkpoint-8")),
    ]
    found = results(HERE / "resuming.py", tmp_path_factory.mktemp("results"), json.dumps(jobs))
    assert found[0] == found[1]
    return found[0], root


def assert_close(found, wanted):
    """To the rounding of float64: the order of sums is another one."""
    steps = found["losses"].keys() & wanted["losses"].keys()
    assert steps
    for step in steps:
        assert found["losses"][step] == pytest.approx(wanted["losses"][step], rel=1e-9, abs=1e-12)
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weight), rtol=1e-9, atol=1e-9)


def test_the_same_number_of_processes_goes_on_bit_for_bit(runs):
    found, _ = runs
    assert found["ddp again"]["weights"] == found["ddp"]["weights"]
    assert found["fsdp again"]["weights"] == found["fsdp"]["weights"]


def test_a_run_goes_on_under_another_strategy(runs):
    found, _ = runs
    for name in ("fsdp", "full", "ddp to fsdp", "fsdp to ddp", "and back"):
        assert_close(found[name], found["ddp"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_in_one(runs, tmp_path, kind):
    found, root = runs
    job = same_batches(tmp_path, strategy="ddp", name="one", resume=str(root / kind / "checkpoint-4"))
    assert_close(json.loads(json.dumps(resuming.run(job))), found["ddp"])


def test_what_two_processes_wrote(runs):
    found, root = runs
    for kind in ("ddp", "fsdp"):
        assert [(one.step, one.condition) for one in survey(root / kind)] == [(4, "whole"), (8, "whole"), (12, "whole")]
        assert command(["checkpoints", str(root / kind)]) == 0
    assert is_spread(root / "fsdp" / "checkpoint-4", "model.safetensors")
    assert {one.condition for one in survey(root / "full")} == {"model only"}
    for path in (root / "model", root / "full" / "checkpoint-12"):
        weights = load_file(path / "model.safetensors")
        assert weights.keys() == found["fsdp"]["weights"].keys()
        name = "fsdp" if path.name == "model" else "full"
        assert all(tensor.tolist() == found[name]["weights"][key] for key, tensor in weights.items())


@pytest.mark.fuzz
def test_a_run_of_two_processes_goes_on_in_four(runs, tmp_path):
    found, root = runs
    jobs = [
        same_batches(tmp_path / f"{kind}-{strategy}", strategy=strategy, name=f"{kind} {strategy}", resume=resume)
        for kind in ("ddp", "fsdp")
        for strategy in ("ddp", "fsdp-sharded")
        for resume in [str(root / kind / "checkpoint-4")]
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    for name, run in results(HERE / "resuming.py", folder, json.dumps(jobs), processes=4)[0].items():
        assert name and assert_close(run, found["ddp"]) is None


def test_parts_on_disks_that_are_not_shared_are_refused():
    with pytest.raises(ArgumentError, match="share"):
        loops.Writer(each_node=True, state_dict="sharded")
