"""Generative adversarial network: two states, two optimizers, one step that moves both.

A generator turns noise into points; a discriminator learns to distinguish them from real ones, and the generator learns to
fool it (the non-saturating loss). Each network is trained while the other one is held fixed.

Paper: Goodfellow et al. 2014, "Generative Adversarial Networks". https://arxiv.org/abs/1406.2661
Shows: mean and covariance of generated points come much closer to those of a correlated 2-D Gaussian.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fts
from fts import steps, transforms as tx


def main() -> dict[str, float]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    shape, center = torch.tensor([[1.0, 0.0], [0.8, 0.5]]), torch.tensor([2.0, -1.0])

    def discriminator_loss(model, real, fake):
        return F.softplus(-model(real)).mean() + F.softplus(model(fake)).mean()

    def generator_loss(model, noise, critic):
        return F.softplus(-functional_call(discriminator, critic, model(noise))).mean()

    optimizer = tx.adam(1e-3, b1=0.5)
    g = fts.TrainState.create(generator, optimizer, seed=0)
    d = fts.TrainState.create(discriminator, optimizer, seed=1)
    g_step = steps.train_step(steps.module_loss(generator, generator_loss), optimizer)
    d_step = steps.train_step(steps.module_loss(discriminator, discriminator_loss), optimizer)

    def distance(params):
        """How far mean and covariance of the generated points are from the real ones."""
        with torch.no_grad():
            points = functional_call(generator, params, torch.randn(4096, 4, generator=torch.Generator().manual_seed(1)))
        return ((points.mean(0) - center).norm() + (points.T.cov() - shape @ shape.T).norm()).item()

    start = distance(g.params)
    for _ in range(1500):
        real = torch.randn(128, 2, generator=draw) @ shape.T + center
        noise = torch.randn(128, 4, generator=draw)
        with torch.no_grad():
            fake = functional_call(generator, g.params, noise)
        d, _ = d_step(d, real, fake)
        g, _ = g_step(g, noise, d.params)
    end = distance(g.params)

    assert end < 0.2 * start, f"the generated distribution is still {end:.2f} from the real one, at the start {start:.2f}"
    return {"distance at the start": start, "distance at the end": end}


if __name__ == "__main__":
    print(main())
