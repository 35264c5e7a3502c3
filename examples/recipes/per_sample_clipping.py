"""Per-sample clipping: bound what any single sample can do to the weights.

`vmap` gives the gradient of each sample of a batch at once. Each is scaled down to a norm of at most 1, then they are
averaged. With noise added to the mean this is DP-SGD; the noise is a transform in the optimizer's chain.

Paper: Abadi et al. 2016, "Deep Learning with Differential Privacy". https://arxiv.org/abs/1607.00133
Shows: replacing one sample by a gross outlier moves the weights after a step by at most 2 * rate * limit / batch
size, while it moves those after a plain step far more; and the clipped run still fits the data.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import fts
from fts import steps, transforms as tx

RATE, LIMIT, SAMPLES = 0.5, 1.0, 64


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    loss = steps.module_loss(net, lambda model, batch: F.mse_loss(model(batch[0])[..., 0], batch[1]))
    optimizer = tx.sgd(RATE)
    value_and_grad = steps.value_and_grad(loss, engine="func")
    clip = tx.clip_by_global_norm(LIMIT)

    def clipped_step(state, batch):
        def of_sample(sample):
            value, grads = value_and_grad(state, sample)
            grads, _, info = clip.update(grads, (), None)
            return grads, {"loss": value.loss, **info}

        grads, metrics = vmap(of_sample)(batch)
        mean = {name: grad.mean(0) for name, grad in grads.items()}
        state, info = steps.apply_gradients(state, mean, optimizer)
        return state, {"loss": metrics["loss"].mean(), "clipped": (metrics["grad_norm"] > LIMIT).float().mean(), **info}

    x = torch.randn(SAMPLES, 3)
    batch = (x, x.sum(1).sin())
    spoiled = (x, batch[1].index_fill(0, torch.tensor([0]), 1000.0))
    state = fts.TrainState.create(net, optimizer, seed=0)

    def influence(step):
        """How far the outlier moves the weights after one step."""
        with_it, without = step(state, spoiled)[0].params, step(state, batch)[0].params
        return fts.global_norm({name: with_it[name] - without[name] for name in without}).item()

    figures = {"clipped influence": influence(clipped_step), "plain influence": influence(steps.train_step(loss, optimizer))}
    for _ in range(300):
        state, metrics = clipped_step(state, spoiled)
    figures["loss"] = steps.eval_step(loss)(state, (x[1:], batch[1][1:]))["loss"][0].item()
    print(metrics)
    return figures


if __name__ == "__main__":
    print(main())
