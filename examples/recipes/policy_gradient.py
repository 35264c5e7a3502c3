"""REINFORCE: a policy gradient, with an outer loop that plays before each step.

A pole stands on end and falls; in every time step the policy pushes it left or right. Each round plays 64 episodes
with the current weights, then takes one step that makes actions more likely whose episode lasted longer than others.
The batch of a step comes from the state itself, so the loop is a plain one and not `loops.fit`.

Paper: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
Shows: the pole stands several times longer than under the random policy at the start.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fts
from fts import steps, transforms as tx

EPISODES, LONGEST = 64, 100


def play(policy, draw):
    """Episodes as one batch: what was seen and done, whether the pole still stood, and how good an action turned out."""
    angle, speed = 0.05 * torch.randn(2, EPISODES, generator=draw)
    standing, seen, done, alive = torch.ones(EPISODES), [], [], []
    for _ in range(LONGEST):
        observation = torch.stack([angle, speed], 1)
        right = torch.bernoulli(policy(observation)[:, 0].sigmoid(), generator=draw)
        for record, value in ((seen, observation), (done, right), (alive, standing)):
            record.append(value)
        speed = speed + 0.05 * (9.8 * angle.sin() + 8 * right - 4)
        angle = angle + 0.05 * speed
        standing = standing * (angle.abs() < 0.5)
    alive = torch.stack(alive)
    remaining = alive.flip(0).cumsum(0).flip(0)
    # compared with the other episodes at the same time
    advantage = alive * (remaining - remaining.mean(1, keepdim=True)) / LONGEST
    return {"seen": torch.stack(seen), "right": torch.stack(done), "alive": alive, "advantage": advantage}


def reinforce_loss(model, batch):
    log_probability = -F.binary_cross_entropy_with_logits(model(batch["seen"])[..., 0], batch["right"], reduction="none")
    count = batch["alive"].sum()
    return -(batch["advantage"] * log_probability).sum() / count, count


def main() -> dict[str, float]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = tx.adam(1e-2)
    state = fts.TrainState.create(net, optimizer, seed=0)
    step = steps.train_step(steps.module_loss(net, reinforce_loss), optimizer)
    lengths = []
    for _ in range(60):
        with torch.no_grad(), steps.eval_module(net, state) as policy:
            episodes = play(policy, draw)
        state, _ = step(state, episodes)
        lengths.append(episodes["alive"].sum(0).mean().item())
    metrics = {"steps at the start": lengths[0], "steps at the end": lengths[-1]}
    assert lengths[-1] > 3 * lengths[0], f"the policy did not improve: {metrics}"
    return metrics


if __name__ == "__main__":
    print(main())
