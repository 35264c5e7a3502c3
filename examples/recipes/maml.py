"""Model-agnostic meta-learning: a gradient through a step of training.

Each task is a sine wave with its own amplitude and phase. The meta-loss of some weights is a task's loss on its query
points after one step of SGD on its support points. It calls that step and is differentiated like any loss, for 25 tasks
at once.

Paper: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation". https://arxiv.org/abs/1703.03400
Shows: one step on ten points of a new task from the meta-learned weights gives less than half the loss that it gives from
weights trained on all tasks jointly; and the meta-gradient agrees with finite differences.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import fts
from fts import steps, transforms as tx


def draw_tasks(count, generator, dtype=torch.float32):
    amplitude, phase, x = torch.rand(3, count, 20, generator=generator, dtype=dtype)
    x = 10 * x - 5
    y = (0.1 + 4.9 * amplitude[:, :1]) * (x - torch.pi * phase[:, :1]).sin()
    return {"support": (x[:, :10], y[:, :10]), "query": (x[:, 10:], y[:, 10:])}


def main() -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def loss(params, batch):
        x, y = batch
        return F.mse_loss(functional_call(net, params, x[..., None])[..., 0], y)

    learning = tx.sgd(0.02)
    learner = fts.TrainState.create(net, learning)
    learn = steps.train_step(loss, learning)

    def meta_loss(params, tasks):
        def after_one_step(support, query):
            adapted, _ = learn(learner.replace(params=params), support)
            return loss(adapted.params, query)

        return vmap(after_one_step)(tasks["support"], tasks["query"]).mean()

    def joint_loss(params, tasks):
        return (loss(params, tasks["support"]) + loss(params, tasks["query"])) / 2

    optimizer = tx.adam(3e-3)
    meta_step, joint_step = steps.train_step(meta_loss, optimizer), steps.train_step(joint_loss, optimizer)
    meta = joint = fts.TrainState.create(net, optimizer, seed=0)
    for _ in range(800):
        tasks = draw_tasks(25, generator)
        meta, _ = meta_step(meta, tasks)
        joint, _ = joint_step(joint, tasks)

    new_tasks = draw_tasks(500, generator)
    metrics = {name: meta_loss(state.params, new_tasks).item() for name, state in (("meta", meta), ("joint", joint))}

    exact = meta.replace(params={name: param.double() for name, param in meta.params.items()})
    tasks = draw_tasks(25, generator, torch.float64)
    _, grads = steps.value_and_grad(meta_loss)(exact, tasks)
    ahead, behind = (meta_loss({name: p + h * grads[name] for name, p in exact.params.items()}, tasks) for h in (1e-7, -1e-7))
    metrics["gradient error"] = abs((ahead - behind) / 2e-7 / fts.global_norm(grads) ** 2 - 1).item()

    assert metrics["meta"] < 0.5 * metrics["joint"], f"one step from the meta-learned weights is no better: {metrics}"
    assert metrics["gradient error"] < 1e-6, f"the meta-gradient is not that of the meta-loss: {metrics}"
    return metrics


if __name__ == "__main__":
    print(main())
