"""Low precision on an NVIDIA GPU; skipped without one."""

import copy

import pytest
import torch
from torch import nn

import fts
from fts import steps, transforms as tx
from tests.steps.test_precision import ENGINES, SCALE, Net, batches, loss_fn, optimizer, run

pytestmark = pytest.mark.cuda


def on_gpu(data):
    return [{name: tensor.cuda() for name, tensor in batch.items()} for batch in data]


@pytest.mark.parametrize("engine", ENGINES)
def test_training_equals_that_with_torchs_scaler(engine):
    data, net = on_gpu(batches(12, overflow=(0, 5))), Net().cuda()
    theirs, scaler = copy.deepcopy(net), torch.amp.GradScaler("cuda", **SCALE)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.01)
    scales = []
    for batch in data:
        with torch.autocast("cuda", torch.float16):
            loss = loss_fn(theirs, batch)
        scaler.scale(loss).backward()
        scales.append(scaler.get_scale())
        scaler.unscale_(adamw)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad()
    step = steps.train_step(steps.module_loss(net, loss_fn), optimizer(), precision="fp16", engine=engine)
    state, found = run(step, fts.TrainState.create(net, optimizer()), data)
    assert [row["loss_scale"] for row in found] == scales
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(state.params[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_a_step_waits_for_nothing():
    data, net = on_gpu(batches(4)), Net().cuda()
    step = steps.train_step(steps.module_loss(net, loss_fn), optimizer(), precision="fp16", donate=True)
    state, _ = step(fts.TrainState.create(net, optimizer()), data[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data[1:]:
            state, _ = step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_inductors_graph():
    data, net = on_gpu(batches(6, overflow=(0,))), Net().cuda()
    step = steps.train_step(steps.module_loss(net, loss_fn), optimizer(), precision="fp16")
    _, expected = run(step, fts.TrainState.create(net, optimizer()), data)
    _, found = run(steps.compile(step), fts.TrainState.create(net, optimizer()), data)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-2)
    assert [row["loss_scale"] for row in found] == [row["loss_scale"] for row in expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_activations_in_pinned_memory_give_equal_gradients(engine):
    net, (batch,) = Net().cuda(), on_gpu(batches(1, batch_size=256))
    state, loss = fts.TrainState.create(net, tx.sgd(0.1)), steps.module_loss(net, loss_fn)
    _, grads = steps.value_and_grad(loss, engine=engine)(state, batch)
    _, found = steps.value_and_grad(steps.offload_activations(loss, min_numel=1), engine=engine)(state, batch)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad)


def test_offloading_saves_memory():
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8)]
    net, x = nn.Sequential(*layers).cuda(), torch.randn(8192, 1024, device="cuda")
    state, loss = fts.TrainState.create(net, tx.identity()), steps.module_loss(net, lambda m, x: m(x).square().mean())
    peaks = []
    for each in (loss, steps.offload_activations(loss)):
        torch.cuda.reset_peak_memory_stats()
        steps.value_and_grad(each)(state, x)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("around", [tx.master_weights, tx.stochastic_rounding])
def test_parameters_in_bfloat16(around):
    """Rounding equals that on the CPU, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(64, 33, generator=generator).bfloat16()}
    grads = {"w": torch.randn(64, 33, generator=generator).bfloat16()}
    transform = around(tx.scale(-(2.0**-7)))
    on_cpu, _, _ = transform.update(grads, transform.init(params), params)
    params, grads = ({name: tensor.cuda() for name, tensor in tree.items()} for tree in (params, grads))
    found, _, _ = transform.update(grads, transform.init(params), params)
    assert torch.equal(found["w"].cpu(), on_cpu["w"])


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs float8")
def test_float8(monkeypatch, tmp_path):
    pytest.importorskip("torchao")
    from fts.trainer import Trainer, TrainingArguments

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16))

        def forward(self, x, labels=None):
            logits = self.layers(x)
            return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}

    dataset = [{"x": torch.randn(64), "labels": i % 16} for i in range(64)]
    losses = []
    for precision in ("no", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        args = TrainingArguments(tmp_path, per_device_train_batch_size=32, max_steps=20, learning_rate=1e-3, report_to="none")
        trainer = Trainer(Wide(), args, train_dataset=dataset)
        losses.append(trainer.train().training_loss)
        kinds = [type(module).__name__ for module in trainer.model.layers]
        assert ("Float8Linear" in kinds) == (precision == "fp8")
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
