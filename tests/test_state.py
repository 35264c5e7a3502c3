"""TrainState: its fields, its files, and its training against torch.optim and `loss.backward()`."""

import copy
import json
import math

import optree
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, CheckpointError, DonatedStateError, UnknownParameterError
from fts.state import OPTIMIZER_NAME, STATE_NAME, TRAINABLE_NAME, WEIGHTS_NAME, mark_donated

ENGINES = ["module", "func"]


class Net(nn.Module):
    """A tied weight, a frozen parameter, BatchNorm, a non-persistent buffer, and a 0-d parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.position = nn.Parameter(torch.randn(4), requires_grad=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, ids):
        return self.out(self.norm(self.embedding(ids) * self.scale + self.position)) * self.temperature


def net_of() -> Net:
    torch.manual_seed(0)
    return Net()


def loss_fn(model, ids):
    return F.cross_entropy(model(ids), ids.flip(0))


def optimizer() -> fts.Transform:
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(1e-2, total_steps=10)))


def trained(net=None, count: int = 2) -> fts.TrainState:
    net = net or net_of()
    state = fts.TrainState.create(net, optimizer(), seed=5)
    step = steps.train_step(steps.module_loss(net, loss_fn), optimizer())
    for _ in range(count):
        state, _ = step(state, torch.arange(6))
    return state


def assert_same(one: fts.TrainState, two: fts.TrainState) -> None:
    assert optree.tree_structure(one) == optree.tree_structure(two)
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(one), optree.tree_leaves(two), strict=True))


# Creation


def test_the_fields_of_a_state():
    state = fts.TrainState.create(net_of(), optimizer(), seed=5)
    assert set(state.params) == {"embedding.weight", "temperature", "norm.weight", "norm.bias"}
    assert list(state.frozen) == ["position"]
    assert set(state.buffers) == {"scale", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert state.metadata.ties == (("out.weight", "embedding.weight"),)
    assert state.metadata.non_persistent == {"scale"}
    assert state.step.dtype == torch.int64 and state.step.ndim == 0 and int(state.step) == 0 and state.seed == 5
    assert not any(tensor.requires_grad for tensor in optree.tree_leaves(state))


def test_creation_copies_what_training_changes():
    net = net_of()
    state = fts.TrainState.create(net, optimizer())
    theirs = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    assert not theirs & {t.untyped_storage().data_ptr() for t in (state.params | state.buffers).values()}
    assert state.frozen["position"].data_ptr() == net.position.data_ptr()
    taken = fts.TrainState.create(net, optimizer(), copy=False)
    assert taken.params["embedding.weight"].data_ptr() == net.embedding.weight.data_ptr()


def test_a_transform_that_keeps_the_parameters_gets_copies():
    keeps = fts.Transform(dict, lambda grads, state, params: (grads, state, {}))
    state = fts.TrainState.create({"w": torch.ones(2)}, keeps)
    assert state.opt_state["w"].data_ptr() != state.params["w"].data_ptr()


def test_parameters_may_be_any_mapping_of_floating_tensors():
    state = fts.TrainState.create({"w": torch.ones(2), "b": torch.zeros((), dtype=torch.bfloat16)}, tx.sgd(0.1))
    assert state.metadata.ties == () and state.frozen == {} and state.buffers == {}


def test_creation_explains_what_it_cannot_take():
    with pytest.raises(ArgumentError, match="not list"):
        fts.TrainState.create([torch.ones(2)], tx.sgd(0.1))
    with pytest.raises(ArgumentError, match="nothing to train"):
        fts.TrainState.create({}, tx.sgd(0.1))
    with pytest.raises(ArgumentError, match="nothing to train"):
        fts.TrainState.create(nn.Linear(2, 2).requires_grad_(False), tx.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"'w'.*torch\.int64"):
        fts.TrainState.create({"w": torch.arange(2)}, tx.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"'w'.*not float"):
        fts.TrainState.create({"w": 1.0}, tx.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"lazy"):
        fts.TrainState.create(nn.LazyLinear(2), tx.sgd(0.1))
    with pytest.raises(UnknownParameterError, match="head"):
        fts.TrainState.create(nn.Linear(2, 2), tx.masked(tx.sgd(0.1), mask=["head"]))


# Values


def test_replace_shares_the_rest_and_leaves_the_old_one():
    state = trained()
    new = state.replace(seed=9)
    assert (state.seed, new.seed) == (5, 9) and new.params is state.params
    with pytest.raises(TypeError):
        state.replace(velocity=1)


def test_a_state_cannot_be_assigned_to():
    with pytest.raises(AttributeError):
        trained().seed = 3


def test_apply_to_writes_parameters_buffers_and_ties_in_place():
    net = net_of()
    state = trained(net)
    weight = net.embedding.weight
    assert state.apply_to(net) is net
    assert net.embedding.weight is weight and net.out.weight is weight
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        assert torch.equal(tensor, (state.params | state.frozen | state.buffers)[name])
    assert weight.requires_grad and not net.position.requires_grad


def test_apply_to_another_module_writes_nothing():
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UnknownParameterError, match=r"embedding\.weight"):
        trained().apply_to(other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("width", [2, 5])
def test_apply_to_a_module_of_other_shapes_writes_nothing(width):
    """Also if a tensor could be broadcast, or others would fit."""
    state = fts.TrainState.create(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), tx.sgd(0.1))
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, width))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises((UnknownParameterError, ArgumentError), match=r"1\.weight"):
        state.apply_to(other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_optree_and_torch_know_a_state_as_a_tree():
    state = trained()
    for tree_map, leaves in ((optree.tree_map, optree.tree_leaves), (torch_pytree.tree_map, torch_pytree.tree_leaves)):
        doubled = tree_map(lambda tensor: tensor * 2, state)
        assert isinstance(doubled, fts.TrainState) and doubled.seed == 5 and doubled.metadata == state.metadata
        assert torch.equal(doubled.params["embedding.weight"], 2 * state.params["embedding.weight"])
        assert int(doubled.step) == 4
        assert len(leaves(state)) == len(optree.tree_leaves(state))


def test_a_population_of_states_is_vmapped():
    transform = tx.adam(0.1)
    states = [fts.TrainState.create({"w": torch.tensor([start, 1.0])}, transform) for start in (1.0, 2.0, 3.0)]
    population = torch_pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    step = steps.train_step(lambda params, batch: (params["w"] * batch).square().sum(), transform, engine="func")
    batch = torch.tensor([1.0, 2.0])
    many, metrics = torch.vmap(step, in_dims=(0, None))(population, batch)
    for index, state in enumerate(states):
        alone, said = step(state, batch)
        torch.testing.assert_close(many.params["w"][index], alone.params["w"])
        torch.testing.assert_close(metrics["loss"][index], said["loss"])


def test_a_deepcopy_is_independent():
    state = trained()
    twin = copy.deepcopy(state)
    assert_same(twin, state)
    twin.params["embedding.weight"].zero_()
    assert state.params["embedding.weight"].abs().sum() > 0
    assert copy.copy(state).params is state.params


def test_a_state_can_be_sent_to_another_process():
    """Worker processes and torch.save pickle a state; fts itself does not."""
    import pickle

    state = trained()
    assert_same(pickle.loads(pickle.dumps(state)), state)  # noqa: S301


def test_the_repr_is_one_line_without_tensors():
    text = repr(trained())
    assert text == "TrainState(step=2, seed=5, params=4 tensors with 37 numbers, frozen=1, buffers=4)"


# Donation


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.params, lambda s: s.frozen, lambda s: s.buffers, lambda s: s.opt_state, lambda s: s.step, lambda s: s.seed,
        lambda s: s.replace(seed=1), lambda s: s.apply_to(net_of()), lambda s: s.save("never"), optree.tree_leaves,
        torch_pytree.tree_leaves, lambda s: fts.TrainState.load("never", like=s),
        lambda s: steps.train_step(steps.module_loss(net_of(), loss_fn), optimizer())(s, torch.arange(6)),
    ],
)  # fmt: skip
def test_any_use_of_a_donated_state_names_the_step(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = trained()
    state.save("never")
    mark_donated(state, "my_step")
    with pytest.raises(DonatedStateError, match="my_step"):
        use(state)


def test_a_donated_state_can_be_printed_compared_and_copied_without_harm():
    state = trained()
    mark_donated(state, "my_step")
    assert repr(state) == "TrainState(donated to my_step)"
    assert state == state and state != trained()
    assert not hasattr(state, "__len__")
    for twin in (copy.copy(state), copy.deepcopy(state)):
        with pytest.raises(DonatedStateError, match="my_step"):
            _ = twin.params


def test_an_unknown_attribute_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="'velocity'"):
        _ = trained().velocity


# Files


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = trained()
    fresh = fts.TrainState.create(net_of(), optimizer(), seed=0)
    loaded = fts.TrainState.load(state.save(tmp_path / "a" / "b"), like=fresh)
    assert_same(loaded, state)
    assert loaded.seed == 5 and loaded.metadata == state.metadata
    assert list(loaded.params) == list(state.params)
    assert int(fresh.step) == 0


@pytest.mark.parametrize("shard_size", [1, 40, 100])
def test_a_state_in_shards_comes_back_bit_for_bit(tmp_path, shard_size):
    state = trained()
    state.save(tmp_path)
    state.save(tmp_path, shard_size=shard_size)
    assert {"model.safetensors.index.json", "optimizer.safetensors.index.json"} < {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / WEIGHTS_NAME).exists() and not (tmp_path / OPTIMIZER_NAME).exists()
    fresh = fts.TrainState.create(net_of(), optimizer(), seed=0)
    assert_same(fts.TrainState.load(tmp_path, like=fresh), state)
    (tmp_path / "model-00002-of-00001.safetensors").write_bytes(b"never read")
    next(tmp_path.glob("model-00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors is missing"):
        fts.TrainState.load(tmp_path, like=fresh)


def test_frozen_parameters_can_be_left_out_and_are_those_of_like(tmp_path):
    from safetensors.torch import load_file

    state = trained()
    state.save(tmp_path)
    state.save(tmp_path / "trained", frozen=False)
    assert not (tmp_path / "trained" / WEIGHTS_NAME).exists()  # which would be taken for a complete model
    assert load_file(tmp_path / "trained" / TRAINABLE_NAME).keys() == load_file(tmp_path / WEIGHTS_NAME).keys() - {"position"}
    fresh = fts.TrainState.create(net_of(), optimizer(), seed=0)
    assert_same(fts.TrainState.load(tmp_path / "trained", like=fresh), state)
    other = fresh.replace(frozen={"position": torch.zeros(4)})
    assert torch.equal(fts.TrainState.load(tmp_path / "trained", like=other).frozen["position"], torch.zeros(4))
    assert torch.equal(fts.TrainState.load(tmp_path, like=other).frozen["position"], state.frozen["position"])
    state.save(tmp_path / "trained")
    assert not (tmp_path / "trained" / TRAINABLE_NAME).exists()
    document = json.loads((tmp_path / STATE_NAME).read_text())
    (tmp_path / STATE_NAME).write_text(json.dumps(document | {"frozen": False}))
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is missing"):
        fts.TrainState.load(tmp_path, like=fresh)


def test_training_resumes_with_the_same_bits(tmp_path):
    net = net_of()
    step = steps.train_step(steps.module_loss(net, loss_fn), optimizer(), donate=True)
    state = fts.TrainState.load(trained(net, 2).save(tmp_path), like=fts.TrainState.create(net, optimizer()))
    for _ in range(3):
        state, _ = step(state, torch.arange(6))
    assert_same(state, trained(net, 5))


def test_the_weights_file_is_what_the_model_itself_would_save(tmp_path):
    from safetensors.torch import load_file

    net = net_of()
    weights = load_file(trained(net).save(tmp_path) / WEIGHTS_NAME)
    assert set(weights) == set(net.state_dict()) - {"out.weight"}
    assert "scale" not in weights
    document = json.loads((tmp_path / STATE_NAME).read_text())
    assert document["step"] == 2 and document["seed"] == 5 and document["ties"] == [["out.weight", "embedding.weight"]]


def test_views_shared_storage_and_strides_are_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    params = {"view": base[1:], "transposed": base.t(), "full": base}
    state = fts.TrainState.create(params, tx.trace(0.9), copy=False)
    loaded = fts.TrainState.load(state.save(tmp_path), like=fts.TrainState.create(params, tx.trace(0.9)))
    assert all(torch.equal(loaded.params[name], params[name]) for name in params)


@pytest.mark.parametrize(
    "transform", [tx.identity(), tx.adam(0.1), fts.Transform(lambda p: torch.zeros(()), lambda g, s, p: (g, s + 1, {}))]
)
def test_any_structure_of_state_is_saved(transform, tmp_path):
    state = fts.TrainState.create({"w": torch.ones(2)}, transform)
    assert_same(fts.TrainState.load(state.save(tmp_path), like=state), state)


def test_a_state_of_python_numbers_is_refused(tmp_path):
    counting = fts.Transform(lambda params: (0,), lambda grads, state, params: (grads, state, {}))
    with pytest.raises((CheckpointError, AttributeError), match="int"):
        fts.TrainState.create({"w": torch.ones(2)}, counting).save(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME])
def test_a_missing_or_corrupt_file_is_named(name, tmp_path):
    state = trained()
    state.save(tmp_path)
    valid = (tmp_path / name).read_bytes()
    for corrupt in (b"", valid[: len(valid) // 2], b"\xff" * 64, b'{"format": 99}', b"[]"):
        (tmp_path / name).write_bytes(corrupt)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            fts.TrainState.load(tmp_path, like=state)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        fts.TrainState.load(tmp_path, like=state)


def test_counters_in_the_document_are_checked(tmp_path):
    state = trained()
    state.save(tmp_path)
    document = json.loads((tmp_path / STATE_NAME).read_text())
    for key, value in (
        *(("step", "2"), ("step", -1), ("step", True), ("step", 2**63), ("step", 10**4000), ("step", float("nan"))),
        *(("seed", None), ("seed", 1.5), ("seed", False), ("frozen", 1), ("frozen", None)),
    ):
        (tmp_path / STATE_NAME).write_text(json.dumps(document | {key: value}))
        with pytest.raises(CheckpointError, match=key):
            fts.TrainState.load(tmp_path, like=state)


def test_a_state_of_another_model_or_transform_is_refused(tmp_path):
    trained().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"embedding\.weight"):
        fts.TrainState.load(tmp_path, like=fts.TrainState.create(nn.Linear(2, 2), optimizer()))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*another model or transform"):
        fts.TrainState.load(tmp_path, like=fts.TrainState.create(net_of(), tx.sgd(0.1, momentum=0.9)))
    wide = net_of()
    wide.embedding = nn.Embedding(9, 4)
    wide.out.weight = wide.embedding.weight
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' is torch\.float32\[7, 4\] in the file.*\[9, 4\]"):
        fts.TrainState.load(tmp_path, like=fts.TrainState.create(wide, optimizer()))
    with pytest.raises(CheckpointError, match=r"float32.*float64"):
        fts.TrainState.load(tmp_path, like=fts.TrainState.create(net_of().double(), optimizer()))


# Real models


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=31, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0, init_lora_weights=False))


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 31, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [gpt2, t5, lora])
def test_gradients_of_real_models_are_those_of_backward(make, engine):
    model = make()
    state = fts.TrainState.create(model, tx.identity())
    # not the module's own values, so that a tensor that was not swapped is noticed
    state = state.replace(params={name: tensor * 1.1 for name, tensor in state.params.items()})
    before = copy.deepcopy(model.state_dict())
    value, grads = steps.value_and_grad(steps.module_loss(model), engine=engine)(state, tokens())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    reference = state.apply_to(make())
    reference.train()
    loss = reference(**tokens()).loss
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    torch.testing.assert_close(value.loss, loss.detach())
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(
            grads[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [gpt2, t5, lora])
def test_real_models_train_save_load_and_take_their_weights_back(make, engine, tmp_path):
    model, transform = make(), tx.adamw(1e-2)
    step = steps.train_step(steps.module_loss(model), transform, engine=engine, accumulate=2, donate=True)
    state = fts.TrainState.create(model, transform)
    losses = []
    for _ in range(8):
        state, metrics = step(state, tokens())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    loaded = fts.TrainState.load(state.save(tmp_path), like=fts.TrainState.create(make(), transform))
    assert_same(loaded, state)
    fresh = loaded.apply_to(make()).eval()
    model.eval()
    with torch.no_grad(), steps.eval_module(model, state):
        expected = model(**tokens()).logits
    torch.testing.assert_close(fresh(**tokens()).logits, expected)


def test_lora_trains_its_adapters_alone():
    state = fts.TrainState.create(lora(), tx.adamw(1e-2))
    assert all("lora_" in name for name in state.params) and len(state.params) == 4
    assert sum(t.numel() for t in state.frozen.values()) > 10 * sum(t.numel() for t in state.params.values())


# Trajectories against torch.optim


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 3)

    def forward(self, x):
        return self.second(self.norm(torch.tanh(self.first(x))))


def is_matrix(name, tensor):
    return tensor.ndim > 1


RATE, STEPS = 0.02, 100


def factor(step: int) -> float:
    return step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))


TRAJECTORIES = {
    "sgd": (tx.sgd, lambda g: torch.optim.SGD(g, lr=RATE)),
    "momentum": (
        lambda lr: tx.sgd(lr, momentum=0.9, weight_decay=0.1),
        lambda g: torch.optim.SGD(g, lr=RATE, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        lambda lr: tx.sgd(lr, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda g: torch.optim.SGD(g, lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "dampening": (
        lambda lr: tx.sgd(lr, momentum=0.9, dampening=0.5),
        lambda g: torch.optim.SGD(g, lr=RATE, momentum=0.9, dampening=0.5),
    ),
    "adam": (tx.adam, lambda g: torch.optim.Adam(g, lr=RATE)),
    "adam with decay": (lambda lr: tx.adam(lr, weight_decay=0.1), lambda g: torch.optim.Adam(g, lr=RATE, weight_decay=0.1)),
    "adamw": (lambda lr: tx.adamw(lr, weight_decay=0.1), lambda g: torch.optim.AdamW(g, lr=RATE, weight_decay=0.1)),
    "adamw with a mask": (lambda lr: tx.adamw(lr, weight_decay=0.1, mask=is_matrix), "masked"),
}


def by_torch(make_optimizer, scheduled: bool, clipped: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Mlp().to(dtype)
    if make_optimizer == "masked":
        matrices = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE)
    else:
        optimizer = make_optimizer(net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor if scheduled else lambda step: 1.0)
    for step in range(STEPS):
        x, y = data(step, dtype)
        F.cross_entropy(net(x), y).backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


def data(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype), torch.randint(0, 3, (6,), generator=generator)


def by_fts(make_transform, scheduled: bool, clipped: bool, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Mlp().to(dtype)
    rate = tx.cosine_schedule(RATE, warmup_steps=10, total_steps=100) if scheduled else RATE
    transform = make_transform(rate)
    if clipped:
        transform = tx.chain(tx.clip_by_global_norm(0.3), transform)
    step = steps.train_step(
        steps.module_loss(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])), transform, **options
    )
    state = fts.TrainState.create(net, transform)
    for index in range(STEPS):
        state, _ = step(state, data(index, dtype))
    return state.params


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize(("engine", "donate"), [("module", False), ("module", True), ("func", True)])
def test_a_hundred_steps_equal_torch_optim(name, engine, donate):
    make_transform, make_optimizer = TRAJECTORIES[name]
    expected = by_torch(make_optimizer, True, True, torch.float64)
    found = by_fts(make_transform, True, True, torch.float64, engine=engine, donate=donate)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-13, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize(("scheduled", "clipped"), [(False, False), (True, False), (False, True)])
def test_a_hundred_steps_equal_torch_optim_with_each_part_alone(name, scheduled, clipped):
    make_transform, make_optimizer = TRAJECTORIES[name]
    expected = by_torch(make_optimizer, scheduled, clipped, torch.float64)
    found = by_fts(make_transform, scheduled, clipped, torch.float64, engine="func")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_hundred_steps_of_float32_equal_torch_optim_to_rounding(name):
    make_transform, make_optimizer = TRAJECTORIES[name]
    expected = by_torch(make_optimizer, True, True, torch.float32)
    found = by_fts(make_transform, True, True, torch.float32, donate=True)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_pure_update_of_a_hundred_steps_equals_torch_optim(name):
    """Without `apply`, as inside graphs and under vmap."""
    make_transform, make_optimizer = TRAJECTORIES[name]
    expected = by_torch(make_optimizer, True, True, torch.float64)

    def pure(rate):
        return make_transform(rate)._replace(apply=None, update_=None)

    torch.manual_seed(0)
    net = Mlp().double()
    clip = tx.clip_by_global_norm(0.3)._replace(apply=None, update_=None)
    transform = tx.chain(clip, pure(tx.cosine_schedule(RATE, warmup_steps=10, total_steps=100)))
    assert transform.apply is None
    step = steps.train_step(steps.module_loss(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])), transform)
    state = fts.TrainState.create(net, transform)
    for index in range(STEPS):
        state, _ = step(state, data(index, torch.float64))
    for key in expected:
        torch.testing.assert_close(state.params[key], expected[key], rtol=1e-10, atol=1e-13)


# The files in transformers


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )


@pytest.mark.parametrize("shard_size", [10**9, 2000])
@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_from_pretrained_loads_a_tied_model_without_warnings(make, shard_size, tmp_path):
    state = fts.TrainState.create(make(), tx.sgd(0.1))
    assert state.metadata.ties
    state = state.replace(params={name: tensor + 1.0 for name, tensor in state.params.items()})
    state.save(tmp_path, shard_size=shard_size)
    model = make()
    model.config.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).exists() == (shard_size == 10**9)
    loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    for name, tensor in state.apply_to(model).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_only_the_adapters_of_a_large_model_need_be_saved(tmp_path):
    model = lora()
    state = fts.TrainState.create(model, tx.adamw(0.1))
    state.save(tmp_path / "all")
    state.save(tmp_path / "adapters", frozen=False)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("all", "adapters")]
    assert sizes[0] > 2 * sizes[1]
    assert_same(fts.TrainState.load(tmp_path / "adapters", like=fts.TrainState.create(lora(), tx.adamw(0.1))), state)
