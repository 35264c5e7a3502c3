"""Model-agnostic meta-learning: a gradient through a step of training.

Each task is a sine wave of its own amplitude and phase. The meta-loss of some weights is the loss on a task's query
points after one step of SGD on its ten support points; its gradient goes through that step, for 25 tasks at once.

Paper: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation". https://arxiv.org/abs/1703.03400
Shows: on new tasks, one step from the meta-learned weights gives a far lower loss than one step from weights trained
on all tasks jointly; and the meta-gradient equals finite differences.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import fts
from fts import steps, transforms as tx


def sines(tasks, draw):
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, generator=draw), torch.pi * torch.rand(tasks, 1, generator=draw)
    x = 10 * torch.rand(tasks, 20, generator=draw) - 5
    y = amplitude * (x - phase).sin()
    return {"support": (x[:, :10], y[:, :10]), "query": (x[:, 10:], y[:, 10:])}


def main() -> dict[str, float]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def loss(params, batch):
        return F.mse_loss(functional_call(net, params, batch[0][..., None])[..., 0], batch[1])

    inner, outer = tx.sgd(0.02), tx.adam(2e-3)
    inner_step = steps.train_step(loss, inner, engine="func")
    learner = fts.TrainState.create(net, inner)

    def meta_loss(params, tasks):
        def of_task(support, query):
            adapted, _ = inner_step(learner.replace(params=params), support)
            return loss(adapted.params, query)

        return vmap(of_task)(tasks["support"], tasks["query"]).mean()

    def joint_loss(params, tasks):
        return loss(params, tasks["support"])

    meta_step, joint_step = steps.train_step(meta_loss, outer), steps.train_step(joint_loss, outer)
    meta = joint = fts.TrainState.create(net, outer, seed=0)
    for _ in range(2000):
        tasks = sines(25, draw)
        meta, _ = meta_step(meta, tasks)
        joint, _ = joint_step(joint, tasks)

    new = sines(200, draw)
    with torch.no_grad():
        print(loss(meta.params, new["query"]))
        figures = {"meta": meta_loss(meta.params, new).item(), "joint": meta_loss(joint.params, new).item()}
    return figures


if __name__ == "__main__":
    print(main())
