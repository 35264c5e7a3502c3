"""Steps of several processes against those of one, for test_steps: `torchrun run_steps.py FOLDER [CASE ...]`."""

import copy
import functools
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import fts
from fts import distributed, steps, transforms as tx
from fts.dtensors import full_tensor
from fts.steps import MicroBatches, PaddingBatch

STEPS = {"ddp": 50, "fsdp": 50}  # the ways of the Trainer; the others take 10
OPTIMIZERS = {
    "adamw": lambda: tx.adamw(3e-3, weight_decay=0.1),
    "sgd": lambda: tx.sgd(0.05, momentum=0.9, nesterov=True),
    "adafactor": lambda: tx.from_torch(torch.optim.Adafactor, lr=1e-2),
}
WAYS = ("ddp", "fsdp", "func", "compiled", "plain", "ddp-each", "fsdp-each", "ddp-unused", "ddp-static")
OPTIONS = {
    "ddp-unused": distributed.DDP(find_unused_parameters=True, gradient_as_bucket_view=False),
    "ddp-static": distributed.DDP(static_graph=True, bucket_cap_mb=1),
}


class Net(nn.Module):
    """A small language model: tied weights, dropout, a normalisation, and a matrix of 3 rows that 2 processes cannot divide."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Linear(8, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x + self.mix(x))
        return self.head(x * self.scale(x).tanh().sum(-1, keepdim=True))


def net_of(dtype, *, draws):
    torch.manual_seed(0)
    net = Net().to(dtype)
    net.mix[2].p = 0.1 * draws
    return net


def transform_of(optimizer):
    return tx.chain(tx.clip_by_global_norm(0.5), OPTIMIZERS[optimizer]())


def loss(model, batch):
    logits = model(batch["tokens"])
    labels = batch["labels"]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    count = (labels != -100).sum()
    hits = (logits.argmax(-1) == labels).double().mean()
    return total / count, count, {"hits": (hits, labels.numel())}


def data(micro, count, *, one_shape):
    """Global micro-batches of unequal lengths and counts of labels; each fifth step has one less."""
    generator = torch.Generator().manual_seed(5)
    for step in range(count):
        parts = []
        for index in range(micro):
            batch_size, length = (3, 5) if one_shape else (2 + (step + index) % 2, 3 + (3 * step + index) % 5)
            tokens = torch.randint(0, 11, (batch_size, length), generator=generator)
            labels = tokens.roll(-1, 1)
            labels[:, -1] = -100
            labels[0, : 1 + index % 3] = -100
            parts.append({"tokens": tokens, "labels": labels})
        yield parts[: micro - 1] if step % 5 == 4 else parts


def local_micro_batches(parts, micro, group):
    """The micro-batches of this rank; missing ones are padding."""
    found = []
    for index in range(micro // group.size):
        number = index * group.size + group.rank
        found.append(parts[number] if number < len(parts) else PaddingBatch(parts[0]))
    return MicroBatches(found)


def trained(step, state, batches):
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append([float(metrics[name]) for name in ("loss", "hits", "grad_norm")])
    return state, losses


@functools.cache  # for all ways
def reference_run(optimizer, dtype, micro, count, compiled):
    """The run of a single process with all micro-batches."""
    net, transform = net_of(dtype, draws=not compiled), transform_of(optimizer)
    step = steps.train_step(steps.module_loss(net, loss), transform)
    batches = map(MicroBatches, data(micro, count, one_shape=compiled))
    return trained(step, fts.TrainState.create(net, transform, seed=7), batches)


def case(way, optimizer, dtype, accumulate, group):
    """The largest differences to one process: of losses and metrics, and of parameters."""
    compiled, micro, count = way == "compiled", accumulate * group.size, STEPS.get(way, 10)
    expected, losses = reference_run(optimizer, dtype, micro, count, compiled)
    # a graph is seeded once, not for each micro-batch
    net, transform = net_of(dtype, draws=not compiled), transform_of(optimizer)
    if way.startswith("fsdp"):
        fully_shard(net.mix)
        fully_shard(net)
    state = fts.TrainState.create(net, transform, seed=7)
    engine = "func" if way in ("func", "compiled") else "module"
    step = steps.train_step(steps.module_loss(net, loss), transform, engine=engine)
    if compiled:
        step = steps.compile(step, backend="aot_eager")
    if way == "plain":
        gradients = steps.value_and_grad(
            lambda params, batch: loss(lambda t: torch.func.functional_call(net, params, (t,)), batch)
        )
        step = steps.gradient_step(gradients, transform)
    step = distributed.distribute(steps.with_donation(step), group, OPTIONS.get(way), sync_each_batch=way.endswith("each"))
    found, own = trained(
        step, state, [local_micro_batches(part, micro, group) for part in data(micro, count, one_shape=compiled)]
    )
    difference = max(abs(a - b) for one, two in zip(losses, own, strict=True) for a, b in zip(one, two, strict=True))
    pairs = [(full_tensor(found.params[name]), tensor) for name, tensor in expected.params.items()]
    return {"metrics": difference, "params": max((a - b).abs().max().item() for a, b in pairs)}


def without_labels(way, group):
    """The last rank has no label, so that its mean is 0/0: its weight is 0, and the gradients of the others stay."""
    parts = [
        {"x": torch.ones(2, 3) * (i + 1), "labels": torch.full((2,), -100 if i == group.size - 1 else i % 2)}
        for i in range(group.size)
    ]
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(net[0].weight, 0.1)
    nn.init.constant_(net[2].weight, 0.2)
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)

    def mean(model, batch):
        counted = batch["labels"] != -100
        logits = model(batch["x"].double())
        return logits[counted].square().sum() / counted.sum(), counted.sum()

    alone = copy.deepcopy(net)
    if way == "fsdp":
        fully_shard(net)
    state = fts.TrainState.create(net, tx.sgd(0.1), seed=0)
    step = steps.train_step(steps.module_loss(net, mean), tx.sgd(0.1), engine="func" if way == "func" else "module")
    after, metrics = distributed.distribute(step, group)(state, parts[group.rank])
    expected, reported = steps.train_step(steps.module_loss(alone, mean), tx.sgd(0.1))(
        fts.TrainState.create(alone, tx.sgd(0.1), seed=0), MicroBatches(parts)
    )
    difference = max((full_tensor(after.params[name]) - tensor).abs().max().item() for name, tensor in expected.params.items())
    return {"metrics": abs(float(metrics["loss"] - reported["loss"])), "params": difference}


def after_an_error(way, group):
    """After a backward pass that raised on all ranks, the same batch gives the same results."""
    broken, found = [], []
    for breaks in (False, True):
        net, transform = net_of(torch.float64, draws=False), transform_of("sgd")

        def failing(model, batch):
            mean, count, metrics = loss(model, batch)
            if broken:
                broken.pop()
                mean.register_hook(lambda grad: 1 / 0)
            return mean, count, metrics

        step = steps.train_step(steps.module_loss(net, failing), transform)
        step = distributed.distribute(step, group, OPTIONS.get(way))
        state = fts.TrainState.create(net, transform, seed=7)
        for number, parts in enumerate(data(2 * group.size, 4, one_shape=True)):
            if breaks and number in (0, 2):
                broken.append(True)
                try:
                    step(state, local_micro_batches(parts, 2 * group.size, group))
                except ZeroDivisionError:
                    assert not broken
            state, metrics = step(state, local_micro_batches(parts, 2 * group.size, group))
        found.append((float(metrics["loss"]), state.params))
    (one, params), (other, others) = found
    return {"metrics": abs(one - other), "params": max((params[name] - others[name]).abs().max().item() for name in params)}


def main(folder, *chosen):
    group = distributed.init_process_group(device="cpu")
    found = {}
    for way, optimizer in itertools.product(WAYS, OPTIMIZERS):
        if chosen and way not in chosen:
            continue
        for dtype, accumulate in ((torch.float64, 2), (torch.float32, 1)):
            if way not in ("ddp", "fsdp") and (optimizer != "adamw" or dtype != torch.float64):
                continue
            found[f"{way} {optimizer} {str(dtype)[6:]} x{accumulate}"] = case(way, optimizer, dtype, accumulate, group)
    for way in ("ddp", "fsdp", "func"):
        found[f"{way} without labels"] = without_labels(way, group)
    for way in ("ddp", "ddp-static"):
        found[f"{way} after an error"] = after_an_error(way, group)
    Path(folder, f"{group.rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
