"""Distillation: a small network learns from the outputs of a large one.

The frozen teacher's softened probabilities teach the student on every image (kd); one image in twenty has a label, too
(ce). The metrics that a loss function returns are logged. Each is a mean over its own examples: the
cross-entropy is a pair with its number of labels, which differs from batch to batch.

Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". https://arxiv.org/abs/1503.02531
Shows: the student is more accurate than the same network trained on the labels alone, and all three losses fall by far.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx

TEMPERATURE = 3.0


def train(net, loss, data, total_steps):
    optimizer = tx.adam(3e-3)
    state = fts.TrainState.create(net, optimizer, seed=0)
    step = steps.train_step(steps.module_loss(net, loss), optimizer)
    data = loops.source(data, batch_size=64, shuffle=True)
    events = list(loops.fit(step, state, data, total_steps=total_steps, due=loops.cadence(log="epoch")))
    events[-1].state.apply_to(net)
    return [event.metrics for event in events if isinstance(event, loops.Logged)]


def main() -> dict[str, float]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    baseline = copy.deepcopy(student)
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    x, y, test_x, test_y = images[:1200].float() / 16, digits[:1200], images[1200:].float() / 16, digits[1200:]
    labelled = torch.arange(1200) % 20 == 0

    def label_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def distillation_loss(model, batch):
        x, y, labelled = batch
        with torch.no_grad():
            wanted = teacher(x)
        logits = model(x)
        soft, wanted_soft = ((scores / TEMPERATURE).log_softmax(1) for scores in (logits, wanted))
        kd = TEMPERATURE**2 * F.kl_div(soft, wanted_soft, log_target=True, reduction="batchmean")
        count = labelled.sum()
        ce = F.cross_entropy(logits[labelled], y[labelled], reduction="sum") / count.clamp(min=1)
        agreement = (logits.argmax(1) == wanted.argmax(1)).float().mean()
        return 0.9 * kd + 0.1 * ce, {"kd": kd, "ce": (ce, count), "agreement": agreement}

    train(teacher, label_loss, TensorDataset(x, y), total_steps=300)
    train(baseline, label_loss, TensorDataset(x[labelled], y[labelled]), total_steps=600)
    logs = train(student, distillation_loss, TensorDataset(x, y, labelled), total_steps=600)

    nets = {"teacher": teacher, "student": student, "labels alone": baseline}
    results = {name: (net(test_x).argmax(1) == test_y).float().mean().item() for name, net in nets.items()}
    assert results["student"] > results["labels alone"] + 0.04, f"the teacher does not help the student: {results}"
    assert all(logs[-1][name] < 0.1 * logs[0][name] for name in ("loss", "kd", "ce")), f"{logs[0]} became {logs[-1]}"
    return results | {f"last {name}": value for name, value in logs[-1].items()}


if __name__ == "__main__":
    print(main())
