"""Mean teacher: an average of the student labels the unlabelled data.

The student learns from a few labels, and to agree with the teacher on unlabelled points when both see them with noise.
The teacher is the moving average of the student's weights. The optimizer keeps it, and each step gets it after the batch.

Paper: Tarvainen, Valpola 2017, "Mean teachers are better role models". https://arxiv.org/abs/1703.01780
Shows: on two moons with eight labels the teacher is more accurate than the same network trained on the labels alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fts
from fts import steps, transforms as tx

NOISE, WEIGHT = 0.2, 10.0


def two_moons(count):
    angle, y = torch.pi * torch.rand(count), torch.arange(count) % 2
    upper, lower = torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(y[:, None] == 0, upper, lower) + 0.1 * torch.randn(count, 2), y


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    (x, y), (test_x, test_y) = two_moons(1000), two_moons(1000)
    draw = torch.Generator().manual_seed(0)

    def label_loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def mean_teacher_loss(model, batch, teacher):
        unlabelled = batch["unlabelled"]
        with torch.no_grad():
            targets = functional_call(model, teacher, unlabelled + NOISE * torch.randn_like(unlabelled)).softmax(1)
        guesses = model(unlabelled + NOISE * torch.randn_like(unlabelled)).softmax(1)
        disagreement = F.mse_loss(guesses, targets)
        return label_loss(model, batch) + WEIGHT * disagreement, {"disagreement": disagreement}

    optimizer = tx.ema_params(tx.adam(3e-3), decay=0.99)
    label_step = steps.train_step(steps.module_loss(net, label_loss), optimizer)
    mean_teacher_step = steps.train_step(steps.module_loss(net, mean_teacher_loss), optimizer)
    supervised = student = fts.TrainState.create(net, optimizer, seed=0)
    for _ in range(1500):
        batch = {"x": x[:8], "y": y[:8], "unlabelled": x[torch.randint(len(x), (128,), generator=draw)]}
        supervised, _ = label_step(supervised, batch)
        student, _ = mean_teacher_step(student, batch, tx.averaged_params(student.opt_state))

    def accuracy(params):
        return (functional_call(net, params, test_x).argmax(1) == test_y).float().mean().item()

    metrics = {"labels alone": accuracy(supervised.params), "teacher": accuracy(tx.averaged_params(student.opt_state))}
    assert metrics["teacher"] > metrics["labels alone"] + 0.05, f"the unlabelled points do not help: {metrics}"
    return metrics


if __name__ == "__main__":
    print(main())
