"""An argument that needs missing hardware, a missing package or a missing feature is an error at once."""

import json

import pytest
import torch

from fts.errors import ArgumentError, FtsError, MissingDependencyError
from fts.trainer.arguments import TrainingArguments, processes, requirements, tf32, tracker_packages, unsupported
from fts.trainer.arguments.requirements import REQUIREMENTS
from fts.trainer.arguments.unsupported import UNSUPPORTED

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def refuses(name, value, message, error=ArgumentError):
    with pytest.raises(error, match=message):
        TrainingArguments(**{name: value})
    args = TrainingArguments()
    before = getattr(args, name)
    with pytest.raises(error, match=message):
        setattr(args, name, value)
    assert getattr(args, name) == before


ASKED = {
    "debug": ["tpu_metrics_debug", ["underflow_overflow", "tpu_metrics_debug"]],
    "train_sampling_strategy": ["batch_rebalance"],
}


def _named(value):
    return value if isinstance(value, str) else type(value).__name__  # the same in every process that collects tests


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ASKED.items() for value in values], ids=_named)
def test_unsupported_features_are_errors(name, value):
    refuses(name, value, f"^{name}=.* is not yet in this version of fts. [A-Z].*")


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("azure_ml", "azureml-core"), ("flyte", "flytekit")])
def test_trackers_need_their_packages(name, package, monkeypatch):
    monkeypatch.setattr(tracker_packages, "_is_found", lambda module: False)
    message = rf"report_to=\[.*'{name}'\] needs the package \w+, which is not there. pip install {package}, or leave '{name}' out"
    refuses("report_to", name, message, MissingDependencyError)
    refuses("report_to", ["none", name], message, MissingDependencyError)
    assert TrainingArguments(report_to="all").report_to == ["all"]  # what is installed: nothing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, values in {"fsdp": ["", False, None, []], "report_to": [None, "none", [], ["none"]]}.items()
        for value in values
    ],
    ids=str,
)
def test_requirements_are_checked_only_of_arguments_that_are_on(name, value):
    assert not getattr(TrainingArguments(**{name: value}), name)


def test_every_entry_of_the_table_is_an_argument_with_a_remedy():
    from dataclasses import fields

    from fts.trainer.arguments import Seq2SeqTrainingArguments

    names = {field.name for field in fields(Seq2SeqTrainingArguments)}
    assert set(UNSUPPORTED) <= names
    assert set(REQUIREMENTS) <= names
    assert all(entry.remedy.endswith(".") for entry in UNSUPPORTED.values())
    for name in unsupported.UNSUPPORTED:
        default = getattr(Seq2SeqTrainingArguments(), name)
        unsupported.check_supported(name, default)


@without_cuda
def test_tf32_needs_a_gpu():
    refuses("tf32", True, "tf32=True needs an NVIDIA GPU of the Ampere generation or newer, which is not there. Leave it out")
    assert TrainingArguments(tf32=False).tf32 is False


def test_tf32_is_applied(monkeypatch):
    monkeypatch.setattr(tf32, "has_tf32", lambda: True)
    monkeypatch.setattr(requirements, "has_tf32", lambda: True)
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")
    TrainingArguments()
    assert torch.backends.fp32_precision == "none"
    args = TrainingArguments(tf32=True)
    assert torch.backends.fp32_precision == "tf32"
    args.tf32 = False
    assert torch.backends.fp32_precision == "ieee"
    TrainingArguments(torch_compile=True)
    assert torch.backends.fp32_precision == "tf32"
    TrainingArguments(torch_compile=True, tf32=False)
    assert torch.backends.fp32_precision == "ieee"


@without_cuda
def test_lower_precision_works_on_the_cpu():
    for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
        assert getattr(TrainingArguments(**{name: True}), name) is True
    for dtype in (torch.bfloat16, torch.float16):  # the measurement behind it
        layers = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        with torch.autocast("cpu", dtype=dtype):
            loss = layers(torch.randint(0, 20, (4, 7))).float().pow(2).mean()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in layers.parameters())
        assert layers.to(dtype).eval()(torch.randint(0, 20, (4, 7))).isfinite().all()


def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(processes, "resolve_device", lambda use_cpu: torch.device("cpu" if use_cpu else "cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ArgumentError, match=r"bf16=True needs a GPU that computes in bfloat16 .* Use fp16=True, or use_cpu=True"):
        TrainingArguments(bf16=True)
    assert TrainingArguments(bf16=True, use_cpu=True).bf16
    assert TrainingArguments(fp16=True).mixed_precision == "fp16"


def test_liger_needs_its_package_and_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses(
        "use_liger_kernel", True, "the package liger_kernel, which is not there. pip install liger-kernel", MissingDependencyError
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    with pytest.raises(ArgumentError, match="use_liger_kernel=True needs a GPU"):
        TrainingArguments(use_liger_kernel=True, use_cpu=True)


def test_an_unknown_compiler():
    refuses("torch_compile_backend", "tensorflow", "torch_compile_backend='tensorflow' needs a backend that torch has")
    refuses("torch_compile_mode", "fastest", "torch_compile_mode='fastest' needs a mode that torch.compile has")
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        assert TrainingArguments(torch_compile_mode=mode).torch_compile


def test_a_backend_that_torch_was_not_built_with(monkeypatch):
    assert TrainingArguments(ddp_backend="gloo").ddp_backend == "gloo"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    refuses("ddp_backend", "nccl", "ddp_backend='nccl' needs a torch that was built with it")
    refuses("ddp_backend", "hccl", "ddp_backend='hccl' needs a torch that was built with it")


def test_debugging_needs_transformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses("debug", "underflow_overflow", "the package transformers", MissingDependencyError)


def test_a_configured_state_must_exist(monkeypatch):
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(ArgumentError, match="needs an accelerate PartialState or Accelerator made before"):
        TrainingArguments(accelerator_config={"use_configured_state": True})
    monkeypatch.setattr(PartialState, "_shared_state", {"there": True})
    assert TrainingArguments(accelerator_config={"use_configured_state": True}).accelerator_config.use_configured_state


def test_settings_without_their_feature_are_kept():
    kept = {
        "run_name": "one",
        "ddp_find_unused_parameters": False,
        "project": "p",
    }
    args = TrainingArguments(**kept)
    assert {name: getattr(args, name) for name in kept} == kept
    assert json.loads(args.to_json_string())["run_name"] == "one"


def test_all_errors_are_ours():
    assert issubclass(ArgumentError, FtsError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(MissingDependencyError, ImportError)
