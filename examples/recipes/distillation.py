"""Distillation: a small network learns from the outputs of a large one.

The frozen teacher's softened probabilities teach the student on all images (kd); some images have a label, too (ce).
A loss function returns what it wants logged beside the loss. Each figure is a mean over its own items: the
cross-entropy comes as a pair with its number of labels, which differs from batch to batch.

Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". https://arxiv.org/abs/1503.02531
Shows: the student is more accurate than the same network trained on the labels alone, and three losses are logged.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx

TEMPERATURE, TRAIN = 3.0, 1200


def main() -> dict[str, float]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    labelled = torch.rand(len(digits)) < 0.05
    data = TensorDataset(images.float() / 16, digits, labelled)
    train, test = torch.utils.data.Subset(data, range(TRAIN)), torch.utils.data.Subset(data, range(TRAIN, len(data)))

    def labels_loss(model, batch):
        x, y, _ = batch
        return F.cross_entropy(model(x), y)

    def distillation_loss(model, batch):
        x, y, labelled = batch
        with torch.no_grad():
            wanted = teacher(x)
        logits = model(x)
        soft, softer = (logits / TEMPERATURE).log_softmax(1), (wanted / TEMPERATURE).log_softmax(1)
        kd = TEMPERATURE**2 * F.kl_div(soft, softer, log_target=True, reduction="batchmean")
        ce = F.cross_entropy(logits[labelled], y[labelled], reduction="sum") / labelled.sum().clamp(min=1)
        agreement = (logits.argmax(1) == wanted.argmax(1)).float().mean()
        return 0.9 * kd + 0.1 * ce, {"kd": kd, "ce": (ce, labelled.sum()), "agreement": agreement}

    optimizer = tx.adam(5e-3)

    def train_on(data, net, loss, total):
        step = steps.train_step(steps.module_loss(net, loss), optimizer)
        source = loops.source(data, batch_size=64, shuffle=True)
        events = list(loops.fit(step, fts.TrainState.create(net, optimizer, seed=0), source, total_steps=total, due=loops.cadence(log=100)))
        return events[-1].state, [event.metrics for event in events if isinstance(event, loops.Logged)]

    accuracy = lambda net, state: 0


if __name__ == "__main__":
    print(main())
