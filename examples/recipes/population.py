"""A population in one step: sixteen learning rates at once.

`vmap` turns a step for one network into a step for a stack of them, each with its own weights and optimizer state.
The learning rate is a tensor, so it too can differ: a search over it costs one run.

Method: torch.func's model ensembling. https://docs.pytorch.org/tutorials/intermediate/ensembling.html
Shows: each member ends with the weights of a run of its own, and the best rate is inside the range that was searched.
"""

import optree
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import fts
from fts import steps, transforms as tx


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    loss = steps.module_loss(net, lambda model, batch: F.mse_loss(model(batch[0])[..., 0], batch[1]))
    rates = torch.logspace(-5, 1, 16)
    x = torch.randn(64, 4)
    batch = (x, x.sum(1).sin())

    def member_step(state, batch, rate):
        return steps.train_step(loss, tx.adam(rate), engine="func")(state, batch)

    one = fts.TrainState.create(net, tx.adam(0.0), seed=0)
    population = optree.tree_map(lambda tensor: torch.stack([tensor] * len(rates)), one)
    population_step = vmap(member_step, in_dims=(0, None, 0))
    for _ in range(200):
        population, metrics = population_step(population, batch, rates)

    best = int(metrics["loss"].argmin())
    alone = one
    for _ in range(200):
        alone, _ = member_step(alone, batch, float(rates[best]))
    member = optree.tree_map(lambda tensor: tensor[best], population)
    print(metrics["loss"], fts.global_norm({name: member.params[name] - alone.params[name] for name in alone.params}))
    return {}


if __name__ == "__main__":
    print(main())
