"""Mean teacher: an average of the student labels the data that nobody labelled.

The student learns from a few labels, and to agree with the teacher on noisy copies of unlabelled points. The teacher
is the exponential moving average of the student's weights, which the optimizer state keeps.

Paper: Tarvainen, Valpola 2017, "Mean teachers are better role models". https://arxiv.org/abs/1703.01780
Shows: on two moons with eight labels the teacher beats the same network trained on the eight labels alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fts
from fts import steps, transforms as tx


def two_moons(count, generator):
    angle = torch.pi * torch.rand(count, generator=generator)
    y = torch.arange(count) % 2
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(y[:, None] == 0, upper, lower) + 0.1 * torch.randn(count, 2, generator=generator), y


def main() -> dict[str, float]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    x, y = two_moons(1000, draw)
    labelled, test = (x[:8], y[:8]), two_moons(1000, draw)

    def supervised_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def mean_teacher_loss(model, batch, teacher):
        unlabelled = batch[2]
        # torch's generators are seeded by the step, so the noise is replayed when a step is
        with torch.no_grad():
            targets = functional_call(model, teacher, unlabelled + NOISE * torch.randn_like(unlabelled)).softmax(-1)
        guesses = model(unlabelled + NOISE * torch.randn_like(unlabelled)).softmax(-1)
        disagreement = F.mse_loss(guesses, targets)
        return supervised_loss(model, batch) + WEIGHT * disagreement, {"disagreement": disagreement}

    optimizer = tx.ema_params(tx.adam(3e-3), decay=0.99)
    supervised_step = steps.train_step(steps.module_loss(net, supervised_loss), optimizer)
    step = steps.train_step(steps.module_loss(net, mean_teacher_loss), optimizer)
    baseline = state = fts.TrainState.create(net, optimizer, seed=0)
    for _ in range(1500):
        baseline, _ = supervised_step(baseline, labelled)
        unlabelled = x[torch.randint(len(x), (128,), generator=draw)]
        state, metrics = step(state, (*labelled, unlabelled), tx.averaged_params(state.opt_state))

    def accuracy(state):
        return (functional_call(net, tx.averaged_params(state.opt_state), test[0]).argmax(1) == test[1]).float().mean().item()

    return {"supervised": accuracy(baseline), "mean teacher": accuracy(state)}


