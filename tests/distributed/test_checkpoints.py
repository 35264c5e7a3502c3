"""Checkpoints that several processes write and read, and runs that resume in other processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fts import loops
from fts.cli import main as command
from fts.errors import ArgumentError
from fts.loops.checkpoint_list import list_checkpoints
from fts.storage import has_sharded_tensors
from tests.distributed import run_resume
from tests.torchrun import results

HERE = Path(__file__).parent
FULL_MIB = 128
"""MiB of the tensors whose saving is measured."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `run_checkpoints.py` measured in each process, and the directory with its checkpoints."""
    folder, root = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("checkpoints")
    return [found["peaks"] for found in results(HERE / "run_checkpoints.py", folder, root)], root


def test_each_kind_loads_into_each_and_an_error_on_one_rank_reaches_all(saved):
    peaks, root = saved
    assert len(peaks) == 2
    assert {"full", "sharded"} <= {path.name for path in root.iterdir()}  # `run_checkpoints.py` asserts the rest


def test_only_the_rank_that_writes_ever_has_all_full_tensors(saved):
    (first, second), _ = saved
    assert first["save full"] > FULL_MIB  # otherwise nothing is measured
    assert second["save full"] < FULL_MIB / 8
    assert max(first["save sharded"], second["save sharded"]) < FULL_MIB / 2  # in files of 16 MiB
    assert max(first["load sharded"], second["load sharded"]) < 0.6 * FULL_MIB


def test_a_sharded_checkpoint_is_consolidated_on_request(saved, tmp_path, capsys):
    _, root = saved
    assert command(["consolidate", str(root / "sharded"), str(tmp_path / "model")]) == 0
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "model", root / "full"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert command(["consolidate", str(root / "sharded"), str(tmp_path / "model")]) == 2
    assert command(["consolidate", str(root / "full"), str(tmp_path / "other")]) == 2
    assert "not empty" in capsys.readouterr().err


def job_of(out, *, strategy, name, **more):
    """A job for `run_resume.py`."""
    return {"name": name, "out": str(out), "strategy": strategy, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two processes, from the start and from each other's checkpoints, and the directory of these."""
    root = tmp_path_factory.mktemp("runs")
    ddp, fsdp, full = root / "ddp", root / "fsdp", root / "full"
    jobs = [
        job_of(ddp, strategy="ddp", name="ddp"),
        job_of(fsdp, strategy="fsdp-sharded", name="fsdp", model=str(root / "model")),
        job_of(full, strategy="fsdp", name="full", args={"save_only_model": True}),
        job_of(root / "1", strategy="ddp", name="ddp again", resume=str(ddp / "checkpoint-4")),
        job_of(root / "2", strategy="fsdp-sharded", name="fsdp again", resume=str(fsdp / "checkpoint-4")),
        job_of(root / "3", strategy="fsdp", name="ddp to fsdp", resume=str(ddp / "checkpoint-4")),
        job_of(root / "4", strategy="ddp", name="fsdp to ddp", resume=str(fsdp / "checkpoint-4")),
        job_of(root / "5", strategy="fsdp", name="and back", resume=str(root / "4" / "checkpoint-8")),
        *(
            job_of(root / f"best-{strategy}", strategy=strategy, name=f"best {strategy}", args=BEST)
            for strategy in ("ddp", "fsdp", "fsdp-sharded")
        ),
        job_of(root / "disk", strategy="ddp", name="disk", **{"full disk": True}),
        job_of(root / "disk-fsdp", strategy="fsdp", name="disk fsdp", **{"full disk": True}),
        job_of(root / "callback", strategy="ddp", name="callback", callback=[0, 1]),
        job_of(root / "callback-fsdp", strategy="fsdp", name="callback fsdp", callback=[0, 1]),
    ]
    found = results(HERE / "run_resume.py", tmp_path_factory.mktemp("results"), json.dumps(jobs))
    failing = {"disk", "disk fsdp", "callback", "callback fsdp"}
    assert {name: run for name, run in found[0].items() if name not in failing} == {
        name: run for name, run in found[1].items() if name not in failing
    }
    return found[0] | {f"other {name}": found[1][name] for name in failing}, root


BEST = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


def assert_close(found, wanted):
    """Equal up to rounding in float64: the order of sums differs."""
    steps = found["losses"].keys() & wanted["losses"].keys()
    assert steps
    for step in steps:
        assert found["losses"][step] == pytest.approx(wanted["losses"][step], rel=1e-9, abs=1e-12)
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weight), rtol=1e-9, atol=1e-9)


def test_the_same_number_of_processes_resumes_bit_for_bit(runs):
    found, _ = runs
    assert found["ddp again"]["weights"] == found["ddp"]["weights"]
    assert found["fsdp again"]["weights"] == found["fsdp"]["weights"]


def test_a_run_resumes_under_another_strategy(runs):
    found, _ = runs
    for name in ("fsdp", "full", "ddp to fsdp", "fsdp to ddp", "and back"):
        assert_close(found[name], found["ddp"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_processes_resumes_in_one(runs, tmp_path, kind):
    found, root = runs
    job = job_of(tmp_path, strategy="ddp", name="one", resume=str(root / kind / "checkpoint-4"))
    assert_close(json.loads(json.dumps(run_resume.run(job))), found["ddp"])


def test_what_two_processes_wrote(runs):
    found, root = runs
    for kind in ("ddp", "fsdp"):
        assert [(one.step, one.status) for one in list_checkpoints(root / kind)] == [
            (4, "complete"),
            (8, "complete"),
            (12, "complete"),
        ]
        assert command(["checkpoints", str(root / kind)]) == 0
    assert has_sharded_tensors(root / "fsdp" / "checkpoint-4", "model.safetensors")
    assert {one.status for one in list_checkpoints(root / "full")} == {"model only"}
    for path in (root / "model", root / "full" / "checkpoint-12"):
        weights = load_file(path / "model.safetensors")
        assert weights.keys() == found["fsdp"]["weights"].keys()
        name = "fsdp" if path.name == "model" else "full"
        assert all(tensor.tolist() == found[name]["weights"][key] for key, tensor in weights.items())


def test_the_best_weights_are_loaded_into_shards(runs):
    found, _ = runs
    for strategy in ("fsdp", "fsdp-sharded"):
        assert_close(found[f"best {strategy}"], found["best ddp"])


def test_a_disk_that_is_full_for_the_main_process_ends_all_ranks_soon(runs):
    found, _ = runs
    for name in ("disk", "disk fsdp"):
        for run in (found[name], found[f"other {name}"]):
            assert run["error"][0] == "CheckpointError" and "No space left" in run["error"][1], run
            assert run["step"] < 8  # not at the next save, but at the next steps


def test_after_an_error_the_main_process_saves_its_full_tensors(runs):
    found, root = runs
    assert any("checkpoint-6" in note and "resumes" in note for note in found["callback"]["error"]), found["callback"]
    assert [(one.step, one.status) for one in list_checkpoints(root / "callback")] == [(4, "complete"), (6, "complete")]
    assert any("the other shards" in note for note in found["callback fsdp"]["error"]), found["callback fsdp"]
    assert [one.step for one in list_checkpoints(root / "callback-fsdp")] == [4]


@pytest.mark.fuzz
def test_a_run_of_two_processes_resumes_in_four(runs, tmp_path):
    found, root = runs
    jobs = [
        job_of(tmp_path / f"{kind}-{strategy}", strategy=strategy, name=f"{kind} {strategy}", resume=resume)
        for kind in ("ddp", "fsdp")
        for strategy in ("ddp", "fsdp-sharded")
        for resume in [str(root / kind / "checkpoint-4")]
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    for name, run in results(HERE / "run_resume.py", folder, json.dumps(jobs), processes=4)[0].items():
        assert name and assert_close(run, found["ddp"]) is None


def test_shards_on_disks_that_are_not_shared_are_refused():
    with pytest.raises(ArgumentError, match="share"):
        loops.AsyncCheckpointer(each_node=True, state_dict="sharded")
