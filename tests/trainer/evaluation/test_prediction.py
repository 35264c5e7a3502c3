import dataclasses
from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn

from fts.errors import BatchError, LossError
from fts.trainer.evaluation.prediction import PredictionConfig, has_loss, keys_to_ignore, predict_batch, select_logits
from fts.trainer.evaluation.pytree import tree_leaves_with_path

transformers = pytest.importorskip("transformers")


def own_loss(model, inputs):
    outputs = model(**inputs)
    loss = outputs["loss"] if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    return (outputs[0] if loss is None else loss), outputs


class Net(nn.Module):
    """A model whose outputs have any form."""

    def __init__(self, form):
        super().__init__()
        self.w = nn.Parameter(torch.full((4,), 0.5))
        self.form = form

    def forward(self, x, labels=None, more_labels=None):
        logits = x * self.w
        loss = None if labels is None else (logits.sum(-1) - labels).square().mean()
        return self.form(loss, logits)


Named = namedtuple("Named", "loss logits")
Object = dataclasses.make_dataclass("Object", ["loss", "logits"])
Frozen = attrs.make_class("Frozen", ["loss", "logits"], frozen=True)

BATCH = {"x": torch.arange(12.0).reshape(3, 4), "labels": torch.ones(3)}
LOGITS = BATCH["x"] * 0.5


def predict(form, batch=BATCH, compute_loss=own_loss, label_names=("labels",), **options):
    return predict_batch(Net(form), batch, PredictionConfig(compute_loss, label_names), **options)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, logits: {"loss": loss, "logits": logits, "cache": None, "text": "a"},
        Named,
        Object,
        Frozen,
        lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
        lambda loss, logits: (loss, logits) if loss is not None else (logits,),
        lambda loss, logits: [loss, logits] if loss is not None else [logits],
        lambda loss, logits: transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits),
    ],
)
def test_outputs_of_any_form(form):
    found = predict(form)
    assert found.loss == (LOGITS.sum(-1) - 1).square().mean()
    assert torch.equal(found.logits, LOGITS)
    assert torch.equal(found.labels, BATCH["labels"])
    assert not found.loss.requires_grad and not found.logits.requires_grad
    bare = predict(form, {"x": BATCH["x"]})
    assert bare.loss is None and bare.labels is None
    assert torch.equal(bare.logits, LOGITS)
    alone = predict(form, prediction_loss_only=True)
    assert alone.loss == found.loss
    assert alone.logits is None and alone.labels is None


def test_a_tensor_alone():
    assert torch.equal(predict(lambda loss, logits: logits, {"x": BATCH["x"]}).logits, LOGITS)
    one = predict(lambda loss, logits: logits, {"x": BATCH["x"][:1]}).logits
    assert one.shape == (1, 4)  # the rows stay rows
    loss = predict(lambda loss, logits: loss, compute_loss=lambda model, inputs: ((out := model(**inputs)), out))
    assert loss.loss.ndim == 0 and loss.logits == ()


def test_a_custom_loss_of_a_tuple_keeps_its_first():
    def compute_loss(model, inputs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return (outputs[0].sum(-1) - labels).square().mean(), outputs

    found = predict(lambda loss, logits: (logits, logits + 1), compute_loss=compute_loss)
    assert torch.equal(found.logits[0], LOGITS)
    assert len(found.logits) == 2
    assert torch.equal(found.labels, BATCH["labels"])
    assert "labels" in BATCH


def test_ignored_keys():
    def form(loss, logits):
        return {"loss": loss, "logits": logits, "pooled": logits.mean(-1), "hidden": logits}

    assert len(predict(form).logits) == 3
    assert len(predict(form, ignore_keys=["hidden"]).logits) == 2
    assert torch.equal(predict(form, ignore_keys=["hidden", "pooled"]).logits, LOGITS)
    model = Net(form)
    model.config = SimpleNamespace(keys_to_ignore_at_inference=["pooled", "hidden"])
    found = predict_batch(model, BATCH, PredictionConfig(own_loss, ["labels"]))
    assert torch.equal(found.logits, LOGITS)
    model.config = SimpleNamespace()
    assert keys_to_ignore(model) == ["cache"]


def test_several_labels():
    batch = BATCH | {"more_labels": torch.zeros(3)}
    names = ["labels", "more_labels"]
    found = predict(Named, batch, label_names=names)
    assert [labels.tolist() for labels in found.labels] == [[1.0] * 3, [0.0] * 3]
    part = predict(Named, BATCH, label_names=names)  # a batch that lacks some is not labelled
    assert part.loss is None and part.labels is None


def test_labels_of_another_name():
    class Other(nn.Module):
        def forward(self, x, target=None):
            return {"loss": (x - target).square().mean(), "logits": x}

    batch = {"x": torch.ones(2), "target": torch.zeros(2)}
    found = predict_batch(Other(), batch, PredictionConfig(own_loss, ["target"]))
    assert found.loss == 1.0
    assert found.labels.tolist() == [0.0, 0.0]


def test_a_loss_of_several_elements_is_averaged():
    found = predict(Named, compute_loss=lambda model, inputs: (torch.tensor([1.0, 3.0]), model(**inputs)))
    assert found.loss == 2.0


def test_a_loss_without_labels():
    assert has_loss({"x": 1, "return_loss": True}, [])
    assert not has_loss({"x": 1, "return_loss": False}, [], can_return_loss=True)
    assert not has_loss({"x": 1}, ["labels"], can_return_loss=True)
    found = predict_batch(
        Net(lambda loss, logits: {"loss": logits.mean(), "logits": logits}),
        {"x": BATCH["x"]},
        PredictionConfig(own_loss, [], can_return_loss=True),
    )
    assert found.loss == LOGITS.mean()
    assert found.labels == ()


def test_half_precision_of_autocast_becomes_float32():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.layer(x), "cls": (self.layer(x),)}

    def logits(model, x, context):
        return predict_batch(model, {"x": x}, PredictionConfig(own_loss, ["labels"], context=context)).logits

    first, second = logits(Small(), BATCH["x"], lambda: torch.autocast("cpu", torch.bfloat16))
    assert first.dtype == second[0].dtype == torch.float32
    assert torch.equal(first, first.bfloat16().float())
    assert logits(Small().bfloat16(), BATCH["x"].bfloat16(), nullcontext)[0].dtype == torch.bfloat16


def test_errors():
    with pytest.raises(BatchError, match="must be a dictionary, not list"):
        predict(Named, [1])
    with pytest.raises(LossError, match=r"must return \(loss, outputs\)"):
        predict(Named, compute_loss=lambda model, inputs: torch.tensor(1.0))
    with pytest.raises(LossError, match="returned NoneType as the loss"):
        predict(Named, compute_loss=lambda model, inputs: (None, model(**inputs)))


# Against transformers


def theirs(model, batch, tmp_path, label_names=None, **options):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_names=label_names)
    trainer = transformers.Trainer(model, args)
    return trainer, trainer.prediction_step(model, dict(batch), False, **options)


def check(model, batch, tmp_path, label_names=None, **options):
    model.eval()
    trainer, expected = theirs(model, batch, tmp_path, label_names, **options)

    def compute_loss(model, inputs):
        count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        return trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=count)

    config = PredictionConfig(compute_loss, trainer.label_names, trainer.can_return_loss)
    found = predict_batch(model, batch, config, **options)
    for ours, other in zip(found, expected, strict=True):
        assert type(ours) is type(other)
        mine, other = dict(tree_leaves_with_path(ours)), dict(tree_leaves_with_path(other))
        assert mine.keys() == other.keys()
        for path, leaf in other.items():
            torch.testing.assert_close(mine[path], leaf)
    return found


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_classifier_equals_transformers(tmp_path, return_dict):
    config = transformers.BertConfig(vocab_size=20, num_labels=3, return_dict=return_dict, output_hidden_states=True, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    labelled = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    found = check(model, labelled, tmp_path)
    assert found.logits[0].shape == (2, 3)
    check(model, {"input_ids": IDS}, tmp_path)
    if return_dict:
        assert torch.equal(check(model, labelled, tmp_path, ignore_keys=["hidden_states"]).logits, found.logits[0])


def test_question_answering_has_two_labels(tmp_path):
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=20, **SIZES))
    batch = {"input_ids": IDS, "start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    found = check(model, batch, tmp_path)
    assert len(found.labels) == len(found.logits) == 2


def test_a_causal_model_equals_transformers(tmp_path):
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    found = check(transformers.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}, tmp_path)
    assert found.logits.shape == (2, 6, 20)  # without the cache


def test_a_model_that_returns_a_loss_by_itself(tmp_path):
    text = {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 12, **SIZES}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={"image_size": 8, "patch_size": 4, **SIZES}, projection_dim=8
    )
    batch = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 8, 8)}
    model = transformers.CLIPModel(config)
    assert check(model, batch, tmp_path).loss is None
    found = check(model, batch | {"return_loss": True}, tmp_path)
    assert found.labels == ()
    assert len(found.logits) == 6  # the last two are outputs of their own


def test_outputs_nested_in_dictionaries(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            x = x * self.w
            return {"loss": (x - labels).mean(), "heads": {"a": x, "b": [x, (x,)]}, "logits": x}

    found = check(Nested(), {"x": torch.ones(2), "labels": torch.zeros(2)}, tmp_path)
    assert set(found.logits[0]) == {"a", "b"}


def test_the_loss_is_not_among_the_logits():
    assert select_logits({"loss": 1, "logits": torch.ones(1)}, ["loss"]).tolist() == [1.0]
    assert select_logits({"text": "a"}) == ()
