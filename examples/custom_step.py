"""Only the functional core: a transform, a loss and a loop, on scikit-learn's handwritten digits.

python examples/custom_step.py        # a few seconds
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fts
from fts import loops, steps, transforms as tx

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
shuffled = torch.randperm(len(x))
test, train = shuffled[:400], shuffled[400:]


def scale_by_lion(b1=0.9, b2=0.99):
    """The sign of an interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

    def init(params):
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(grads, momentum, params):
        updates = {name: (b1 * momentum[name] + (1 - b1) * g).sign() for name, g in grads.items()}
        momentum = {name: b2 * momentum[name] + (1 - b2) * g for name, g in grads.items()}
        return updates, momentum, {}

    return fts.Transform(init, update, label="scale_by_lion")


def loss_fn(model, batch):
    logits = model(batch["x"])
    accuracy = (logits.argmax(-1) == batch["y"]).float().mean()
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy}  # metrics that a loss returns are logged


net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
optimizer = tx.chain(
    tx.clip_by_global_norm(1.0),
    scale_by_lion(),
    tx.scale_by_learning_rate(tx.cosine_schedule(2e-3, warmup_steps=20, total_steps=600)),
)
loss = steps.module_loss(net, loss_fn)
step = steps.train_step(loss, optimizer)
print(steps.describe(step), "\n")

state = fts.TrainState.create(net, optimizer, seed=0)
data = loops.source([{"x": x[i], "y": y[i]} for i in train.tolist()], batch_size=64, shuffle=True)
for event in loops.fit(step, state, data, total_steps=600, due=loops.cadence(log=100)):
    if isinstance(event, loops.Logged):
        print(f"step {event.counters.step:4d}   loss {event.metrics['loss']:.3f}   accuracy {event.metrics['accuracy']:.1%}")

means = steps.eval_step(loss)(event.state, {"x": x[test], "y": y[test]})
accuracy = float(means["accuracy"][0])
print(f"\naccuracy on {len(test)} other digits: {accuracy:.1%}")
assert accuracy >= 0.95, f"an accuracy of at least 95% was expected, not {accuracy:.1%}"
