"""Sharpness-aware minimization: two gradients in one step.

The step climbs from the weights to the worst point nearby (rho along the gradient), takes the gradient there, and
applies it at the original weights. So it looks for weights whose whole neighbourhood has a low loss.

Paper: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization".
https://arxiv.org/abs/2010.01412
Shows: trained equally long on data with noisy labels, SAM ends in a flatter minimum than SGD (its loss rises less
under random changes of the weights) and is at least as accurate on clean test data.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fts
from fts import steps, transforms as tx


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = tx.sgd(0.1, momentum=0.9)
    loss = steps.module_loss(net, lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1]))
    value_and_grad = steps.value_and_grad(loss)

    def sam_step(state, batch, rho=0.2):
        value, grads = value_and_grad(state, batch)
        climb = rho / fts.global_norm(grads)
        nearby = {name: param + climb * grads[name] for name, param in state.params.items()}
        _, grads = value_and_grad(state.replace(params=nearby), batch)
        state, info = steps.apply_gradients(state, grads, optimizer, buffers=value.buffers)
        return state, {"loss": value.loss, **info}

    x = torch.randn(2200, 10)
    clean = (x[:, 0] * x[:, 1] + x[:, 2] > 0).float()
    noisy = torch.where(torch.rand(2200) < 0.1, 1 - clean, clean)
    train, test = (x[:200], noisy[:200]), (x[200:], clean[200:])

    evaluate = steps.eval_step(loss)
    figures = {}
    for name, step in {"sgd": steps.train_step(loss, optimizer), "sam": sam_step}.items():
        state = fts.TrainState.create(net, optimizer, seed=0)
        for _ in range(1000):
            state, _ = step(state, train)
        print(name, evaluate(state, train)["loss"], evaluate(state, test)["loss"])


if __name__ == "__main__":
    print(main())
