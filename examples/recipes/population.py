"""A population in one step: sixteen learning rates at once.

`vmap` turns a step for one network into a step for a stack of them, each with its own weights and optimizer state. The
learning rate is a tensor, so it can differ between them: a search takes one run.

Method: model ensembling. https://docs.pytorch.org/tutorials/intermediate/ensembling.html
Shows: the best rate is inside the range that was searched, and that member's weights are those of a run on its own.
"""

import optree
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import fts
from fts import steps, transforms as tx

STEPS = 200


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    loss = steps.module_loss(net, lambda model, batch: F.mse_loss(model(batch[0])[..., 0], batch[1]))
    x = torch.randn(64, 4, dtype=torch.float64)
    batch = (x, x.sum(1).sin())

    def step_at_rate(state, batch, rate):
        return steps.train_step(loss, tx.adam(rate))(state, batch)

    rates = torch.logspace(-5, 1, 16, dtype=torch.float64)
    start = fts.TrainState.create(net, tx.adam(0.0), seed=0)
    population = optree.tree_map(lambda tensor: torch.stack([tensor] * len(rates)), start)
    population_step = vmap(step_at_rate, in_dims=(0, None, 0))
    for _ in range(STEPS):
        population, metrics = population_step(population, batch, rates)
    best = int(metrics["loss"].argmin())

    alone = start
    for _ in range(STEPS):
        alone, _ = step_at_rate(alone, batch, rates[best].item())
    difference = fts.global_norm({name: param - population.params[name][best] for name, param in alone.params.items()}).item()

    assert 0 < best < len(rates) - 1, f"the best rate is at the edge: {metrics['loss']}"
    assert difference < 1e-6, f"the member's weights are {difference:.1e} from those of its own run"
    return {"best rate": rates[best].item(), "its loss": metrics["loss"][best].item(), "difference": difference}


if __name__ == "__main__":
    print(main())
