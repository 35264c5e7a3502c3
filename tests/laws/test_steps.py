"""Every kind of step has the properties (laws). A new one is checked by being in this list."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import fts.testing
from fts import steps, transforms as tx
from fts.testing.compiled_step_laws import available_backend, compiled_equals_eager, compiled_replays

MIXES_EXAMPLES = ["accumulated_equals_big_batch"]  # BatchNorm: the statistics are those of a micro-batch
DRAWS = ["accumulated_equals_big_batch", "compiled_equals_eager"]  # dropout: each micro-batch and each graph has masks of its own
GRAPHS = ["compiled_equals_eager", "compiled_replays"]  # torch.compile takes no recurrent layers

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler (g++ or clang++) to compile steps with"
)


def optimizer() -> fts.Transform:
    rate = tx.cosine_schedule(1e-2, warmup_steps=2, total_steps=20)
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(rate, weight_decay=0.1, mask=lambda name, tensor: tensor.ndim > 1))


class Perceptron(nn.Module):
    def __init__(self, normalized: bool, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8) if normalized else nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.body(x)


class Tied(nn.Module):
    """An embedding that is also the output layer, frozen positions, and a buffer that checkpoints omit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids):
        return self.out(self.embedding(ids) * self.scale + self.position)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 7)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.out(x)


def classify(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).double().mean()}


def next_token(model, batch):
    """A mean over the tokens that are not padding, whose number is the weight."""
    logits = model(batch["ids"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    real = (batch["labels"].flatten() != 0).to(losses.dtype)
    return (losses * real).sum() / real.sum(), real.sum()


def squares(params, batch):
    output = batch["x"] @ params["w"] * params.get("scale", 1.0) + params["b"]
    return (output - batch["y"][:, None]).square().mean()


def recur(model, batch):
    return model(batch["x"][:, None])[0].square().mean()


def examples_of(seed: int, count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 7, (count, 4), generator=generator)
    padded = ids * (torch.arange(4) < torch.randint(1, 5, (count, 1), generator=generator))
    return {
        "x": torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype),
        "y": torch.randint(0, 3, (count,), generator=generator),
        "ids": ids,
        "labels": padded,
    }


def batches(dtype: torch.dtype = torch.float64, *, least: int = 2) -> st.SearchStrategy:
    one = st.builds(examples_of, st.integers(0, 1000), st.integers(least, 7), st.just(dtype))
    return st.lists(one, min_size=1, max_size=3)


def seeded(make, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def of_module(module: nn.Module, fn, transform: fts.Transform | None = None, **options):
    transform = transform or optimizer()
    step = steps.train_step(steps.module_loss(module, fn), transform, **options)
    return step, fts.TrainState.create(module, transform, seed=1)


def of_function(extra=None, **options):
    params = {"w": torch.ones(5, 3, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64), **(extra or {})}
    transform = tx.sgd(0.1, momentum=0.9)
    return steps.train_step(squares, transform, **options), fts.TrainState.create(params, transform, seed=1)


def composed():
    """Sharpness-aware minimization: a user's own composition of two gradients."""
    module = seeded(lambda: Perceptron(False, 0.0))
    loss, transform = steps.module_loss(module, classify), tx.adamw(1e-2)
    grad_fn = steps.value_and_grad(loss, engine="func")

    def sharpness_aware(state, batch):
        _, grads = grad_fn(state, batch)
        norm = fts.global_norm(grads)
        uphill = {name: p + 0.05 * grads[name] / norm for name, p in state.params.items()}
        value, grads = grad_fn(state.replace(params=uphill), batch)
        state, info = steps.apply_gradients(state, grads, transform, buffers=value.buffers)
        return state, {"loss": value.loss, **info}

    return sharpness_aware, fts.TrainState.create(module, transform, seed=1)


plain = lambda: Perceptron(False, 0.0)  # noqa: E731
# BatchNorm takes running means of float64 batches, for which at least two examples are needed in each micro-batch
REGISTRY = {
    "mlp": (lambda: of_module(seeded(plain), classify, engine="func"), batches(), []),
    "mlp, accumulate": (lambda: of_module(seeded(plain), classify, accumulate=2), batches(), []),
    "mlp, float32": (lambda: of_module(seeded(plain, torch.float32), classify, tx.sgd(0.1)), batches(torch.float32), []),
    "mlp, bf16": (
        lambda: of_module(seeded(plain, torch.float32), classify, tx.sgd(0.1), precision="bf16"),
        batches(torch.float32),
        ["accumulated_equals_big_batch", "engines_agree", "compiled_equals_eager"],
    ),
    "batchnorm": (lambda: of_module(seeded(lambda: Perceptron(True, 0.0)), classify), batches(), MIXES_EXAMPLES),
    "batchnorm, accumulate": (
        lambda: of_module(seeded(lambda: Perceptron(True, 0.0)), classify, accumulate=2),
        batches(least=4).map(lambda many: [each for each in many if len(each["y"]) != 5] or [examples_of(0, 6, torch.float64)]),
        MIXES_EXAMPLES,
    ),
    "batchnorm and dropout": (lambda: of_module(seeded(lambda: Perceptron(True, 0.3)), classify), batches(), DRAWS),
    "dropout, accumulate, func": (
        lambda: of_module(seeded(lambda: Perceptron(False, 0.3)), classify, accumulate=2, engine="func"), batches(), DRAWS,
    ),
    "tied": (lambda: of_module(seeded(Tied), next_token), batches(), []),
    "transformer": (lambda: of_module(seeded(Transformer), next_token, accumulate=3), batches(), []),
    "recurrent": (lambda: of_module(seeded(lambda: nn.GRU(5, 3, batch_first=True)), recur), batches(), GRAPHS),
    "function": (of_function, batches(), []),
    "a number": (lambda: of_function(extra={"scale": torch.tensor(1.0, dtype=torch.float64)}), batches(), []),
    "function, accumulate": (lambda: of_function(accumulate=3), batches(), []),
    "wrapped": (
        lambda: of_module(
            seeded(plain), classify, tx.ema_params(tx.multi_steps(tx.skip_nonfinite(optimizer()), every=2), 0.9)
        ),
        batches(), [],
    ),
    "no fast path": (lambda: of_module(seeded(plain), classify, no_fast_path()), batches(), []),
    "keeps parameters": (lambda: of_module(seeded(plain), classify, last_parameters()), batches(), []),
    "composed": (composed, batches(), []),
}  # fmt: skip


def no_fast_path() -> fts.Transform:
    return tx.chain(tx.centralize(), tx.clip_by_block_rms(1.0))


def last_parameters() -> fts.Transform:
    """Momentum from the difference to the parameters before: a state that holds the very tensors of the old one."""

    def update(grads, state, params):
        updates = {name: 0.5 * (params[name] - state["last"][name]) - 0.1 * g for name, g in grads.items()}
        # the tensors themselves, views of them, and a history that moves on by one place
        views = {name: p.detach() for name, p in params.items()}
        return updates, {"last": dict(params), "views": views, "older": state["last"]}, {}

    def init(params):
        return {key: {name: p.clone() for name, p in params.items()} for key in ("last", "views", "older")}

    return fts.Transform(init, update, label="last_parameters")


@pytest.mark.parametrize("name", REGISTRY)
def test_laws(name: str) -> None:
    make, given, skip = REGISTRY[name]
    step, state = make()
    if "compiled_equals_eager" not in skip:
        skip = [*skip, "compiled_replays"]  # a graph that equals an eager step that replays, replays; graphs cost seconds
    fts.testing.check_step(step, state, given, skip=skip)


@needs_compiler
@pytest.mark.parametrize("name", ["tied"])
def test_kernels_equal_eager(name: str) -> None:
    assert available_backend() == "inductor"
    step, state = REGISTRY[name][0]()
    two = [examples_of(seed, 6, torch.float64) for seed in range(2)]
    compiled_equals_eager(step, state, two, backend="inductor")


@needs_compiler
def test_kernels_replay_dropout_and_are_compiled_once() -> None:
    step, state = REGISTRY["batchnorm and dropout"][0]()
    two = [examples_of(seed, 6, torch.float64) for seed in range(2)]
    compiled_replays(step, state, two, backend="inductor")
