"""Gradual unfreezing: fine-tune from the top layer downwards, the lower the slower.

Every layer has an optimizer of its own. Its learning rate is zero until the layer's turn comes, first the top's, and
2.6 times lower than that of the layer above, so that what pretraining found is kept longest at the bottom.

Paper: Howard, Ruder 2018, "Universal Language Model Fine-tuning for Text Classification". https://arxiv.org/abs/1801.06146
Shows: a network pretrained on the digits 0-4 learns 5-9 from 100 examples; no layer changes before its turn,
each changes in the first step of it, and at the end the rates have the ratio 2.6.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx

FROM_THE_TOP, STAGE, TOTAL = ["top", "middle", "bottom"], 50, 300


def rate(depth):
    falling = tx.linear_schedule(0.02, 0.002, TOTAL)
    return lambda step: (step >= depth * STAGE) * falling(step) / 2.6**depth


def main() -> dict[str, float]:
    torch.manual_seed(0)
    bottom, middle, top = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 5)
    net = nn.Sequential(OrderedDict(bottom=bottom, act1=nn.ReLU(), middle=middle, act2=nn.ReLU(), top=top))
    loss = steps.module_loss(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    x, low = images.float() / 16, digits < 5
    new_x, new_y = x[~low], digits[~low] - 5
    train = torch.arange(len(new_x)) % 9 == 0

    pretraining = tx.adam(3e-3)
    data = loops.source(TensorDataset(x[low], digits[low]), batch_size=64, shuffle=True)
    state = fts.TrainState.create(net, pretraining, seed=0)
    *_, last = loops.fit(steps.train_step(loss, pretraining), state, data, total_steps=200)
    last.state.apply_to(net)
    top.reset_parameters()

    optimizer = tx.partition(
        {layer: tx.adam(rate(depth)) for depth, layer in enumerate(FROM_THE_TOP)},
        lambda name, tensor: name.split(".")[0],  # "top.weight" -> "top"
    )
    state = fts.TrainState.create(net, optimizer, seed=0)
    data = loops.source(TensorDataset(new_x[train], new_y[train]), batch_size=20, shuffle=True)
    first_change = {}
    for event in loops.fit(steps.train_step(loss, optimizer), state, data, total_steps=TOTAL):
        if isinstance(event, loops.StepEnd):
            rates = [event.metrics[f"lr/{layer}"].item() for layer in FROM_THE_TOP]
            for layer in FROM_THE_TOP:
                if not event.state.params[f"{layer}.weight"].equal(net.get_submodule(layer).weight):
                    first_change.setdefault(layer, event.counters.step)
    event.state.apply_to(net)
    accuracy = (net(new_x[~train]).argmax(1) == new_y[~train]).float().mean().item()

    assert first_change == {"top": 1, "middle": STAGE + 1, "bottom": 2 * STAGE + 1}, first_change
    assert torch.tensor(rates).allclose(rates[0] / 2.6 ** torch.arange(3)), f"the rates are {rates}, from the top layer down"
    assert accuracy > 0.85, f"the accuracy on unseen images of the new digits is {accuracy:.3f}"
    return {"accuracy": accuracy, **{f"first change of {layer}": step for layer, step in first_change.items()}}


if __name__ == "__main__":
    print(main())
