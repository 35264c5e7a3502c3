"""Checkpoints of a sharded state, for test_checkpoints: `torchrun run_checkpoints.py RESULTS ROOT`; it asserts."""

import json
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import attrs
import optree
import pytest
import torch
from torch import nn

import fts
from fts import distributed, loops, steps, transforms as tx
from fts.distributed.device_mesh import Mesh, init_device_mesh
from fts.distributed.fsdp import fully_shard
from fts.dtensors import is_dtensor, to_local
from fts.errors import CheckpointError
from fts.loops import Position
from fts.loops.checkpoint_status import checkpoint_status
from fts.storage import has_sharded_tensors, has_tensors

MIB = 2**20


def net(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def loss(model, batch):
    return (model(batch) ** 2).mean()


def state_of(module, group, *, sharded):
    optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(1e-2))
    if sharded:
        fully_shard(module, init_device_mesh(group, Mesh(shard=group.size))["replicate", "shard"])
    state = fts.TrainState.create(module, optimizer, seed=3, copy=False)
    step = distributed.distribute(steps.train_step(steps.module_loss(module, loss), optimizer), group)
    torch.manual_seed(1 + group.rank)
    for _ in range(2):
        state, _ = step(state, torch.randn(4, 12))
    return state


def leaves(state):
    return optree.tree_leaves((state.params, state.frozen, state.buffers, state.opt_state, state.step))


def assert_same(found, wanted):
    """Equal bits, and the same placements."""
    for index, (ours, theirs) in enumerate(zip(leaves(found), leaves(wanted), strict=True)):
        assert is_dtensor(ours) == is_dtensor(theirs), index
        assert ours.dtype == theirs.dtype and torch.equal(to_local(ours), to_local(theirs)), (index, ours, theirs)


def zeros_like(state):
    return state.replace(**optree.tree_map(torch.zeros_like, {"params": state.params, "opt_state": state.opt_state}))


def fails(block, message):
    with pytest.raises((CheckpointError, ValueError), match=message):
        block()


def written(group, root, state, name, **options):
    with loops.AsyncCheckpointer(group=group, **options) as writer:
        path = writer.save(root / name, state, Position(1, 2), extra={"a": 1})
        list(writer.watch([STOPPED]))  # all ranks wait for it
    assert checkpoint_status(path) == ("complete", None)
    return path


def full_and_sharded(group, root, state, plain):
    """A checkpoint of each kind is loaded into a state of each kind."""
    paths = {
        "full": written(group, root, state, "full"),
        "full-at-once": written(group, root, state, "full-at-once", background=False),
        "sharded": written(group, root, state, "sharded", state_dict="sharded"),
        "replicated": written(group, root, plain, "replicated", state_dict="sharded"),
    }
    for name in ("full", "full-at-once", "sharded"):
        found, position = loops.load_checkpoint(paths[name], like=zeros_like(state), group=group)
        assert position == Position(1, 2) and found.seed == 3
        assert_same(found, state)
        alone, _ = loops.load_checkpoint(paths[name], like=plain)
        again, _ = loops.load_checkpoint(paths["full"], like=plain)
        assert_same(alone, again)
    found, _ = loops.load_checkpoint(paths["replicated"], like=plain)
    assert_same(found, plain)
    assert has_sharded_tensors(paths["sharded"], "optimizer.safetensors") and not has_sharded_tensors(
        paths["replicated"], "model.safetensors"
    )
    assert has_tensors(paths["sharded"], "model.safetensors")
    full = [(paths[name] / "model.safetensors").read_bytes() for name in ("full", "full-at-once")]
    assert full[0] == full[1]


def each_node_has_its_own(group, root, state, plain):
    """Two processes that are each the local main process of a machine."""
    own = attrs.evolve(group, local_rank=0)
    for name, of in (("sharded", state), ("plain", plain)):
        path = written(own, root, of, f"{name}-on-{group.rank}", each_node=True)
        loads = loops.load_checkpoint(path, like=of)[0]
        assert_same(loads, of)
    group.barrier()


def errors_end_all(group, root, state):
    """An error on one rank ends the save on all ranks, and leaves the previous checkpoint and nothing else."""
    before = {path.name for path in root.iterdir()}
    group.barrier()
    for state_dict, background, failing_rank in (
        ("full", True, 0),
        ("full", False, 0),
        ("sharded", True, 1),
        ("sharded", True, 0),
    ):
        writer = loops.AsyncCheckpointer(background, group=group, state_dict=state_dict)
        with_limit(group.rank == failing_rank, partial(fails, partial(save_once, writer, root, state), "could not be written"))
        group.barrier()
        assert {path.name for path in root.iterdir()} == before, state_dict
        group.barrier()

    def refuse(hidden):
        if group.rank == 1:
            raise ValueError("no disk space for a tokenizer")

    writer = loops.AsyncCheckpointer(group=group)
    fails(lambda: writer.save(root / "other", state, write=refuse), "no disk space for a tokenizer")
    group.barrier()
    assert {path.name for path in root.iterdir()} == before
    group.barrier()


def save_once(writer, root, state):
    """Until the end, where errors of the thread are raised."""
    writer.save(root / "failing", state)
    list(writer.watch([STOPPED]))


def with_limit(limited, block):
    """Files may not be larger than a few bytes in this process."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, old[1]))
    try:
        block()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def corruption_is_detected(group, root, state):
    path = written(group, root, state, "corrupt", state_dict="sharded")
    part = next((path / "model.parts").glob("shard-00002-*"))
    group.barrier()
    if group.is_main_process:
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    group.barrier()
    fails(lambda: loops.load_checkpoint(path, like=state, group=group), part.name)
    assert checkpoint_status(path)[0] == "corrupt"


def peak_while(block):
    """The peak memory of a block in MiB, beyond the memory before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    block()
    return (status("VmHWM") - before) / 1024


def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def memory(group, root):
    """32 tensors of 4 MiB: only the rank with the copy has all full tensors at a time."""
    mesh = init_device_mesh(group, Mesh(shard=group.size))["replicate", "shard"]
    module = fully_shard(nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(32)]), mesh)
    state = fts.TrainState.create(module, tx.sgd(0.1), copy=False)
    warm = fts.TrainState.create(fully_shard(nn.Linear(1024, 1024), mesh), tx.sgd(0.1), copy=False)
    found = {}

    def save(state_dict):
        with loops.AsyncCheckpointer(group=group, state_dict=state_dict) as writer:
            writer.save(root / f"large-{state_dict}", state, shard_size=16 * MIB)
            list(writer.watch([STOPPED]))

    for state_dict in ("full", "sharded"):
        written(group, root, warm, f"warm-{state_dict}", state_dict=state_dict)
        loops.load_checkpoint(root / f"warm-{state_dict}", like=warm, group=group)
        found[f"save {state_dict}"] = peak_while(partial(save, state_dict))
        found[f"load {state_dict}"] = peak_while(
            partial(loops.load_checkpoint, root / f"large-{state_dict}", like=state, group=group)
        )
    return found


STOPPED = loops.Stopped(loops.Counters(), None)


def main():
    results, root = map(Path, sys.argv[1:])
    group = distributed.init_process_group(timeout=60)
    state, plain = state_of(net(), group, sharded=True), state_of(net(), group, sharded=False)
    full_and_sharded(group, root, state, plain)
    each_node_has_its_own(group, root, state, plain)
    errors_end_all(group, root, state)
    corruption_is_detected(group, root, state)
    peaks = memory(group, root)
    (results / f"{group.rank}.json").write_text(json.dumps({"peaks": peaks}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
