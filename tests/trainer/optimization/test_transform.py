import copy
import importlib.util
import warnings

import pytest
import torch
import transformers
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer import TrainingArguments
from fts.trainer.arguments.enums import OptimizerNames
from fts.trainer.optimization.optimizer_classes import optimizer_cls_and_kwargs
from fts.trainer.optimization.parameter_groups import decay_parameter_names, make_parameter_groups
from fts.trainer.optimization.schedules import make_metric_rule, make_schedule
from fts.trainer.optimization.transform import make_transform

STEPS, RATE = 10, 0.01
BITSANDBYTES = [
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
]
# what each name leads to: the package that it needs (None: torch), or why it is refused
OUTCOMES = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"], None),
    "adafactor": "transformers",
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes"),
    **dict.fromkeys(["adamw_torch_4bit", "adamw_torch_8bit"], "torchao"),
    **dict.fromkeys(["galore_adamw", "galore_adafactor"], "galore_torch"),
    "galore_adamw_8bit": "galore_torch on CUDA",
    "apollo_adamw": "apollo_torch",
    "grokadamw": "grokadamw",
    **dict.fromkeys(["schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"], "schedulefree"),
    "stable_adamw": "optimi",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    **dict.fromkeys(["lomo", "adalomo"], "cannot be a transform of gradients.* use optim='adafactor'"),
    **{
        f"{name}_layerwise": f"updates each layer inside the backward pass.* Use optim='{name}'"
        for name in ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")
    },
}
BUILT = [
    name for name, package in OUTCOMES.items() if package is None or importlib.util.find_spec(package.split(".")[0].split()[0])
]
BUILT = [name for name in BUILT if " " not in str(OUTCOMES[name])]
OPTIONS = {
    "sgd": "momentum=0.9,nesterov=true",
    "adagrad": "lr_decay=0.1, eps=1e-6",
    "rmsprop": "alpha=0.9,momentum=0.5,centered=True",
    "ademamix": "beta3=0.99,alpha=3,t_alpha=5,t_beta3=7",
    "galore_adamw": "rank=4,update_proj_gap=3,scale=0.5,proj_type=reverse_std",
    "galore_adafactor": "rank=4",
    "apollo_adamw": "rank=4,update_proj_gap=3,scale_type=tensor",
    "grokadamw": "lamb=1.5,gamma=0.2",
    "schedule_free_adamw": "r=0.5,weight_lr_power=1.0",
    "stable_adamw": "max_lr=0.1",
}


CASES = [(name, None) for name in BUILT] + [(name, options) for name, options in OPTIONS.items() if name in BUILT]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:bitsandbytes", "ignore::UserWarning:torch")


class Tagger(nn.Module):
    """Large enough for 8 bits (4096 numbers), with a norm, an embedding and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def tagger(name=""):
    torch.manual_seed(0)
    model = Tagger()
    if name.startswith("apollo"):
        del model.frozen  # it counts frozen parameters to choose the seed of a projection; only trained ones are known here
    if name.startswith("adamw_torch_"):
        del model.embed, model.head  # some of these compile their arithmetic for each shape
    return model


def arguments(name, options=None, **changes):
    if name.startswith(("galore", "apollo")):
        changes["optim_target_modules"] = ["hidden"]
    return TrainingArguments(optim=name, optim_args=options, learning_rate=RATE, weight_decay=0.1, use_cpu=True, **changes)


def theirs(name, options=None, **changes):
    if name.startswith(("galore", "apollo")):
        changes["optim_target_modules"] = ["hidden"]
    shared = {"learning_rate": RATE, "weight_decay": 0.1, "use_cpu": True, "report_to": "none"}
    return transformers.TrainingArguments("unused", optim=name, optim_args=options, **shared, **changes)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in trained(model).items()} for _ in range(STEPS)]


def by_transform(args, model, steps=STEPS):
    transform = make_transform(args, make_schedule(args, STEPS, 2), model, total_steps=STEPS)
    params, rates = trained(model), []
    state = transform.init(params)
    for grads in gradients(model)[:steps]:
        params, state, info = transform.apply(grads, state, params)
        rates.append(info["lr"].item())
    return transform, params, state, rates


def by_hand(name, options, model):
    """The same updates by the torch optimizer that transformers makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(theirs(name, options), model)
        decayed = transformers.Trainer.get_decay_parameter_names(None, model)
        live = {key: p for key, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for key, p in live.items() if key in decayed], "weight_decay": 0.1},
            {"params": [p for key, p in live.items() if key not in decayed], "weight_decay": 0.0},
        ]
        optimizer = cls(kwargs.pop("params", groups), **kwargs)
    if kwargs.get("optim_bits") == 8:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().register_module_override(model.embed, "weight", {"optim_bits": 32})
    scheduler = transformers.get_scheduler("linear", optimizer, 2, STEPS)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for grads in gradients(model):
        for key, grad in grads.items():
            live[key].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return optimizer


@pytest.fixture(autouse=True)
def _no_overrides_left():
    yield
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        manager.module_weight_config_triple.clear()
        manager.pid2config.clear()
        manager.index2config.clear()


def test_every_name_has_an_outcome():
    assert sorted(OUTCOMES) == sorted(name.value for name in OptimizerNames)


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_name_makes_a_transform_or_says_what_to_do(name):
    package, model = OUTCOMES[name], tagger(name)
    if name in BUILT:
        before = trained(model)
        _, params, _, rates = by_transform(arguments(name), model, steps=2)
        assert rates == pytest.approx([0.0, RATE / 2])
        moves = name != "schedule_free_radam"  # which holds still for its first updates
        assert all(not torch.equal(before[key], value) for key, value in params.items()) == moves
        return
    if package.endswith(" on CUDA"):
        if torch.cuda.is_available():
            pytest.skip("for machines without a GPU")
        expected = (MissingDependencyError, f"optim='{name}' needs .*(pip install|Use optim='galore_adamw')")
    elif " " in package:
        expected = (ArgumentError, f"optim='{name}' .*{package}")
    else:
        expected = (MissingDependencyError, rf"optim='{name}' needs .* of the package {package}.* Install it: .+")
    with pytest.raises(expected[0], match=expected[1]):
        by_transform(arguments(name), model)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_ten_updates_are_those_of_the_torch_optimizer(name, options):
    model = tagger(name)
    transform, params, state, rates = by_transform(arguments(name, options), copy.deepcopy(model))
    optimizer = by_hand(name, options, model)
    assert rates == pytest.approx([RATE * min(step / 2, (STEPS - step) / 8) for step in range(STEPS)])
    for key, value in trained(model).items():
        torch.testing.assert_close(params[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        for key, value in tx.eval_params(transform, state, params).items():
            torch.testing.assert_close(value, dict(model.named_parameters())[key].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [*CASES, ("lomo", None), ("adalomo", None)])
def test_class_and_options_are_those_of_transformers(name, options):
    if name.endswith("lomo"):
        pytest.importorskip("lomo_optim")
    model = tagger()
    cls, kwargs = optimizer_cls_and_kwargs(arguments(name, options, warmup_steps=3), model)
    their_cls, their_kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(theirs(name, options, warmup_steps=3), model)
    assert cls is their_cls
    groups, their_groups = kwargs.pop("params", []), their_kwargs.pop("params", [])
    assert kwargs == their_kwargs
    assert [[id(p) for p in group.pop("params")] for group in groups] == [[id(p) for p in g.pop("params")] for g in their_groups]
    assert groups == their_groups


def small_models():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    yield transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    yield transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20))
    yield transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20)
    )
    yield transformers.ViTForImageClassification(transformers.ViTConfig(**sizes | {"image_size": 8, "patch_size": 4}))
    yield nn.LayerNorm(3)
    yield nn.Sequential(
        nn.ModuleDict({"norm": nn.Linear(2, 2), "normal": nn.Linear(2, 2), "x_norm": nn.Linear(2, 2)}), nn.RMSNorm(2)
    )


@pytest.mark.parametrize("model", list(small_models()), ids=lambda model: type(model).__name__)
def test_weight_decay_applies_as_in_transformers(model):
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad = i % 5 != 4
    live = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = [name for name in live if name in transformers.Trainer.get_decay_parameter_names(None, model)]
    assert decay_parameter_names(model) == set(expected)
    groups = make_parameter_groups(TrainingArguments(weight_decay=0.1), model)
    assert groups == [
        {"params": expected, "weight_decay": 0.1},
        {"params": [name for name in live if name not in expected], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd"])
def test_a_metric_decides_on_the_rate(name):
    changes = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_strategy": "epoch",
    }
    args, model = arguments(name, **changes), tagger()
    transform = make_transform(args, make_schedule(args, STEPS, 0), model, total_steps=STEPS)
    cls, kwargs = optimizer_cls_and_kwargs(args)
    live = {key: p for key, p in model.named_parameters() if p.requires_grad}
    groups = [{**group, "params": [live[key] for key in group["params"]]} for group in make_parameter_groups(args, model)]
    optimizer = cls(groups, **kwargs)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    params = trained(model)
    state = transform.init(params)
    for step, grads in enumerate(gradients(model)):
        for key, grad in grads.items():
            live[key].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        params, state, info = transform.apply(grads, state, params)
        assert info["lr"].item() == optimizer.param_groups[0]["lr"]
        scheduler.step(metric := [1.0, 2.0, 3.0, 0.5][step % 4])
        state = tx.update_on_metric(state, metric, make_metric_rule(args))
    for key, value in params.items():
        torch.testing.assert_close(value, live[key].detach(), rtol=1e-5, atol=1e-6)


def test_without_clipping_the_norm_is_reported():
    args, model = arguments("sgd", max_grad_norm=0.0), tagger()
    transform = make_transform(args, tx.constant_schedule(1.0), model, total_steps=3)
    params = trained(model)
    grads = {key: torch.full_like(value, 7.0) for key, value in params.items()}
    updates, _, info = transform.update(grads, transform.init(params), params)
    assert info["grad_norm"].item() == pytest.approx(7.0 * sum(value.numel() for value in params.values()) ** 0.5)
    torch.testing.assert_close(updates["head.bias"], torch.full((3,), -7.0))


def test_a_warmup_that_is_a_share_of_all_reaches_schedule_free():
    pytest.importorskip("schedulefree")
    args, model = arguments("schedule_free_adamw", warmup_steps=0.5, lr_scheduler_type="constant"), tagger()
    params = trained(model)
    transform = make_transform(args, make_schedule(args, 8, 4), model, total_steps=8)
    args = arguments("schedule_free_adamw", warmup_steps=4, lr_scheduler_type="constant")
    fewer = make_transform(args, make_schedule(args, 8, 4), model, total_steps=8)
    grads = gradients(model)[0]
    one, two = (t.update(grads, t.init(params), params)[0] for t in (transform, fewer))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adamw_torch", "betas=0.5", "optim_args has 'betas=0.5', but optim='adamw_torch' takes none"),
        ("sgd", "momentun=0.9", "has 'momentun=0.9', but optim='sgd' takes momentum, dampening, weight_decay, nesterov"),
        ("sgd", "momentum=much", "'momentum=much', which is no float"),
        ("sgd", "momentum=0.9,nesterov=perhaps", "'nesterov=perhaps', which is no bool"),
        ("adamw_anyprecision", "momentum_dtype=half_or_so", "'momentum_dtype=half_or_so', which is no dtype"),
        ("adafactor", "beta1=0.9", "optim='adafactor' takes none"),
    ],
)
def test_options_that_cannot_be_used(name, options, words):
    with pytest.raises(ArgumentError, match=words):
        optimizer_cls_and_kwargs(arguments(name, options))


def test_weight_decay_among_the_options_warns():
    with pytest.warns(UserWarning, match=r"weight_decay has no effect.*TrainingArguments\(weight_decay=0.1\)"):
        by_transform(arguments("sgd", "weight_decay=0.5"), tagger(), steps=1)


def test_low_rank_optimizers_need_a_model_and_modules():
    pytest.importorskip("galore_torch")
    with pytest.raises(ArgumentError, match="optim='galore_adamw' needs the model"):
        optimizer_cls_and_kwargs(arguments("galore_adamw"))
    args = TrainingArguments(optim="galore_adamw")
    with pytest.raises(ArgumentError, match="needs optim_target_modules, not None"):
        optimizer_cls_and_kwargs(args, tagger())
    args = TrainingArguments(optim="galore_adamw", optim_target_modules=["embed", "tail"])
    with pytest.raises(ArgumentError, match=r"\['embed', 'tail'\] names no linear layer of Tagger.* It has hidden, head"):
        optimizer_cls_and_kwargs(args, tagger())


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("all-linear", ["hidden", "head"]),
        ("all_linear", ["hidden", "head"]),
        (r"h.*", ["hidden", "head"]),
        ("head", ["head"]),
        ("hea", None),
        (["hea"], ["head"]),
        ([r".*d{2}.*"], ["hidden"]),
        (["embed", "head"], ["head"]),
    ],
)
def test_target_modules(modules, expected):
    pytest.importorskip("galore_torch")
    model = tagger()
    args = TrainingArguments(optim="galore_adamw", optim_target_modules=modules)
    if expected is None:
        with pytest.raises(ArgumentError, match="names no linear layer"):
            optimizer_cls_and_kwargs(args, model)
        return
    _, kwargs = optimizer_cls_and_kwargs(args, model)
    assert [id(p) for p in kwargs["params"][1]["params"]] == [id(getattr(model, name).weight) for name in expected]
