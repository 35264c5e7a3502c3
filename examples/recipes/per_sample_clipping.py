"""Per-sample clipping: bound what any single sample can do to the weights.

`vmap` gives the gradient of every sample of a batch at once. Each is scaled down to a norm of at most MAX_NORM before they are
averaged, and noise is added to the average, which makes it DP-SGD.

Paper: Abadi et al. 2016, "Deep Learning with Differential Privacy". https://arxiv.org/abs/1607.00133
Shows: putting a gross outlier in the place of one sample moves the weights after a step by at most
2 * RATE * MAX_NORM / SAMPLES, but those after a plain step far more; and the other samples are learned despite the outlier.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import fts
from fts import steps, transforms as tx

RATE, MAX_NORM, NOISE, SAMPLES = 0.5, 1.0, 0.5, 64


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    loss = steps.module_loss(net, lambda model, batch: F.mse_loss(model(batch[0])[..., 0], batch[1]))
    # the deviation of the noise is a share of what one sample can contribute to the mean; add_noise takes the variance
    optimizer = tx.chain(tx.add_noise((NOISE * MAX_NORM / SAMPLES) ** 2, gamma=0.0, seed=0), tx.sgd(RATE))
    value_and_grad = steps.value_and_grad(loss)
    clip = tx.clip_by_global_norm(MAX_NORM)

    def private_step(state, batch):
        def of_sample(sample):
            value, grads = value_and_grad(state, sample)
            grads, _, info = clip.update(grads, (), None)
            return grads, {"loss": value.loss, "clipped": (info["grad_norm"] > MAX_NORM).float()}

        grads, metrics = vmap(of_sample)(batch)
        grads = {name: grad.mean(0) for name, grad in grads.items()}
        state, info = steps.apply_gradients(state, grads, optimizer)
        return state, {**{name: value.mean() for name, value in metrics.items()}, **info}

    x = torch.randn(SAMPLES, 3)
    y = x.sum(1).sin()
    spoiled_x, spoiled_y = x.clone(), y.clone()
    spoiled_x[0], spoiled_y[0] = -10 * x[0], 1000.0
    state = fts.TrainState.create(net, optimizer, seed=0)

    def influence(step):
        with_outlier, without = step(state, (spoiled_x, spoiled_y))[0].params, step(state, (x, y))[0].params
        return fts.global_norm({name: with_outlier[name] - without[name] for name in without}).item()

    results = {"influence": influence(private_step), "influence in a plain step": influence(steps.train_step(loss, optimizer))}
    for _ in range(500):
        state, metrics = private_step(state, (spoiled_x, spoiled_y))
    results["loss on the others"] = steps.eval_step(loss)(state, (x[1:], y[1:]))["loss"][0].item()
    results["share clipped"] = metrics["clipped"].item()

    bound = 2 * RATE * MAX_NORM / SAMPLES
    assert results["influence"] <= bound < results["influence in a plain step"] / 100, f"the bound is {bound}: {results}"
    assert results["loss on the others"] < 0.2 * y.var(), f"the other samples are not learned: {results}"
    return results


if __name__ == "__main__":
    print(main())
