"""Sharpness-aware minimization: two gradients in one step.

The step climbs from the weights to the worst point nearby (RHO along the gradient), takes the gradient there, and
applies it at the original weights. So it looks for weights in a neighbourhood of low loss.

Paper: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization".
https://arxiv.org/abs/2010.01412
Shows: trained on labels of which a fifth are wrong, SAM and SGD fit them equally well, but SAM ends in a flatter minimum: random
changes of the weights raise its loss about half as much.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx

RHO = 0.3


def main() -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(300, 20)
    y = torch.where(torch.rand(300) < 0.2, x[:, :5].sum(1) <= 0, x[:, :5].sum(1) > 0).long()
    data = loops.source(TensorDataset(x, y), batch_size=20, shuffle=True)
    net = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 2))
    loss = steps.module_loss(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    optimizer = tx.sgd(tx.cosine_schedule(0.05, total_steps=1000), momentum=0.9)
    value_and_grad = steps.value_and_grad(loss)

    def sam_step(state, batch):
        value, grads = value_and_grad(state, batch)
        climb = RHO / fts.global_norm(grads)
        worst = {name: param + climb * grads[name] for name, param in state.params.items()}
        _, grads = value_and_grad(state.replace(params=worst), batch)
        state, info = steps.apply_gradients(state, grads, optimizer)
        return state, {"loss": value.loss, **info}

    def loss_at(state, noise):
        draw, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(20):
            moved = {name: p + noise * torch.randn(p.shape, generator=draw) for name, p in state.params.items()}
            total += steps.eval_step(loss)(state.replace(params=moved), (x, y))["loss"][0].item()
        return total / 20

    metrics = {}
    for name, step in {"SGD": steps.train_step(loss, optimizer), "SAM": sam_step}.items():
        *_, last = loops.fit(step, fts.TrainState.create(net, optimizer, seed=0), data, total_steps=1000)
        metrics[f"{name}: loss"] = loss_at(last.state, noise=0.0)
        metrics[f"{name}: rise under noise"] = loss_at(last.state, noise=0.1) - metrics[f"{name}: loss"]

    assert max(metrics["SGD: loss"], metrics["SAM: loss"]) < 0.02, f"one of them does not fit the data: {metrics}"
    assert metrics["SAM: rise under noise"] < 0.7 * metrics["SGD: rise under noise"], f"SAM's minimum is not flatter: {metrics}"
    return metrics


if __name__ == "__main__":
    print(main())
