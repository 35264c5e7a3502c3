"""Model cards, read back with huggingface_hub's own parser."""

import dataclasses
import re

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, constants, metadata_eval_result
from huggingface_hub.repocard_data import model_index_to_eval_results

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer.cards import TrainingSummary, card as cards
from fts.trainer.cards.fields import infer_fields
from fts.trainer.cards.metadata import license_of
from fts.trainer.cards.results import MAX_TABLE_ROWS, evaluation_table, final_results, format_value, markdown_table
from tests.trainer.helpers import Linear, make_trainer


def accuracy(prediction):
    return {"accuracy": 0.875, "exact_match": 12.5, "note": float("nan")}


def trained(tmp_path, **changes):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "compute_metrics": accuracy}
    trainer = make_trainer(tmp_path, Linear(), **(settings | changes))
    trainer.train()
    return trainer


def card(tmp_path):
    return ModelCard.load(tmp_path / "README.md")


GIVEN = {
    "language": "en",
    "license": "apache-2.0",
    "tags": ["small", "linear"],
    "model_name": "A Name: with # signs",
    "finetuned_from": "google/some-model",
    "tasks": "text-classification",
    "dataset_tags": "glue",
    "dataset": "GLUE MRPC",
    "dataset_args": "mrpc",
}


def test_given_fields_are_read_back(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card(**GIVEN)
    data = card(tmp_path).data
    assert (data.language, data.license, data.base_model) == (["en"], "apache-2.0", "google/some-model")
    assert data.tags == ["small", "linear", "generated_from_trainer"]
    assert (data.datasets, data.metrics) == (["glue"], ["accuracy", "exact_match"])
    assert data.model_name == "A Name: with # signs"
    loss = trainer.state.log_history[-2]["eval_loss"]
    common = {"task_type": "text-classification", "task_name": "Text Classification", "dataset_type": "glue"}
    common |= {"dataset_name": "GLUE MRPC", "dataset_config": "mrpc"}
    assert data.eval_results == [
        EvalResult(**common, metric_type="loss", metric_name="Loss", metric_value=loss),
        EvalResult(**common, metric_type="accuracy", metric_name="Accuracy", metric_value=0.875),
        EvalResult(**common, metric_type="exact_match", metric_name="Exact Match", metric_value=12.5),
    ]
    text = card(tmp_path).text
    assert "# A Name: with # signs" in text
    assert "[google/some-model](https://huggingface.co/google/some-model), fine-tuned on the GLUE MRPC dataset." in text


def test_the_index_is_that_of_metadata_eval_result(tmp_path):
    trained(tmp_path).create_model_card(**GIVEN)
    theirs = metadata_eval_result(
        model_pretty_name=GIVEN["model_name"],
        task_pretty_name="Text Classification",
        task_id="text-classification",
        metrics_pretty_name="Accuracy",
        metrics_id="accuracy",
        metrics_value=0.875,
        dataset_pretty_name="GLUE MRPC",
        dataset_id="glue",
        dataset_config="mrpc",
    )
    name, (expected,) = model_index_to_eval_results(theirs["model-index"])
    data = card(tmp_path).data
    assert data.model_name == name
    assert dataclasses.replace(expected, verified=None) in data.eval_results


def test_several_tasks_and_data_sets(tmp_path):
    trained(tmp_path).create_model_card(
        tasks=["summarization", "translation"],
        dataset_tags=["a", "b"],
        dataset=["A", "B"],
        dataset_args=["x"],
        language=["en", "de"],
    )
    found = {(result.task_type, result.dataset_name, result.dataset_config) for result in card(tmp_path).data.eval_results}
    assert found == {(task, *data) for task in ("summarization", "translation") for data in (("A", "x"), ("B", None))}
    assert card(tmp_path).data.language == ["en", "de"]
    assert "on the A dataset and the B dataset." in card(tmp_path).text


def test_without_given_fields(tmp_path):
    trained(tmp_path).create_model_card()
    data = card(tmp_path).data
    assert data.to_dict() == {"tags": ["generated_from_trainer"], "metrics": ["accuracy", "exact_match"]}
    assert f"# {tmp_path.name}\n" in card(tmp_path).text
    assert "A model trained from scratch on data" in card(tmp_path).text


def test_the_table_has_every_evaluation(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card()
    lines = [line for line in card(tmp_path).text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["Training Loss", "Epoch", "Step", "Validation Loss", "Accuracy", "Exact Match", "Note"]
    assert cells[0] == names
    assert all(re.fullmatch("-+:", cell) for cell in cells[1])
    history = trainer.state.log_history
    for row, step in zip(cells[2:], (2, 4), strict=True):
        loss = next(entry["loss"] for entry in history if "loss" in entry and entry["step"] == step)
        evaluated = next(entry for entry in history if "eval_loss" in entry and entry["step"] == step)
        expected = (loss, evaluated["epoch"], step, evaluated["eval_loss"], 0.875, 12.5, float("nan"))
        assert row == [format_value(value) for value in expected]
    assert len({len(line) for line in lines}) == 1


def test_hyperparameters_and_versions(tmp_path):
    trainer = trained(tmp_path, gradient_accumulation_steps=2, warmup_steps=3, seed=5, lr_scheduler_type="cosine")
    trainer.create_model_card()
    text = card(tmp_path).text
    for line in (
        "- learning_rate: 0.01",
        "- train_batch_size: 4",
        "- gradient_accumulation_steps: 2",
        "- total_train_batch_size: 8",
        "- seed: 5",
        "- optimizer: adamw_torch (betas 0.9, 0.999; epsilon 1e-08)",
        "- lr_scheduler_type: cosine",
        "- warmup_steps: 3",
        "- training_steps: 4",
        f"- Pytorch {torch.__version__}".partition("+")[0],
    ):
        assert f"\n{line}" in text, line
    assert "Transformers" not in text  # this model is not from it


def test_the_optimizer(tmp_path):
    def description(**changes):
        return TrainingSummary.from_trainer(make_trainer(tmp_path, **changes)).optimizer

    model = Linear()
    assert description(optim="sgd", optim_args="momentum=0.9") == "sgd (momentum=0.9)"
    assert description(step=tx.sgd(0.1)) == "given as Trainer(step=...)"
    assert description(model=model, optimizers=(torch.optim.Adagrad(model.parameters()), None)) == "Adagrad"
    assert description(optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 0.1})) == "RMSprop"


def test_results_are_those_of_the_current_weights(tmp_path):
    history = [
        {"loss": 2.0, "step": 1},
        {"eval_loss": 0.1, "eval_runtime": 3.0, "step": 1},
        {"eval_loss": 0.3, "step": 2},
        {"train_runtime": 1.0, "step": 2},
    ]
    assert final_results(history) == {"loss": 0.3}
    assert final_results(history, best_step=1) == {"loss": 0.1}
    assert final_results([*history, {"eval_f1": 0.9, "step": 2}], best_step=1) == {"f1": 0.9}
    assert final_results([{"loss": 1.0, "step": 1}]) == {}
    several = [{"eval_a_loss": 1.0, "step": 2}, {"eval_b_loss": 2.0, "step": 2}]
    assert final_results(several) == {"a_loss": 1.0, "b_loss": 2.0}
    assert evaluation_table(several) == [{"Training Loss": "No log", "Epoch": None, "Step": 2, "A Loss": 1.0, "B Loss": 2.0}]


def test_long_tables_are_thinned():
    rows = evaluation_table([{"eval_loss": 1.0, "step": step} for step in range(1, 1001)])
    assert len(rows) == MAX_TABLE_ROWS
    assert rows[-1]["Step"] == 1000
    assert "| 1000 |" in markdown_table(rows)


def test_user_sections_are_kept(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card(tags="first", license="mit")
    path = tmp_path / "README.md"
    text = path.read_text()
    text = text.replace(f"## Model description\n\n{cards.PLACEHOLDER}", "## Model description\n\nIt adds.\n\n### More\n\nOf it.")
    path.write_text(text.replace("license: mit", "license: mit\nthumbnail: a.png"))
    trainer.log({"eval_accuracy": 0.5})
    trainer.create_model_card(tags=["second"])
    found = card(tmp_path)
    assert "## Model description\n\nIt adds.\n\n### More\n\nOf it.\n\n## Intended uses" in found.text
    assert "- Accuracy: 0.5" in found.text
    assert found.text.count("## Training procedure") == 1
    assert found.data.tags == ["second", "generated_from_trainer", "first"]
    assert (found.data.license, found.data.thumbnail) == ("mit", "a.png")
    make_trainer(tmp_path, Linear()).create_model_card()  # which has no metrics
    assert card(tmp_path).data.get("metrics") is None
    assert card(tmp_path).data.thumbnail == "a.png"


def test_a_user_written_card_keeps_its_text(tmp_path):
    trainer = trained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nAll of it.\n")
    trainer.create_model_card(**GIVEN)
    found = card(tmp_path)
    assert found.text.strip() == "# Mine\n\nAll of it."
    assert found.data.license == "apache-2.0"
    assert "mine" in found.data.tags
    assert found.data.eval_results
    (tmp_path / "README.md").write_text("No metadata.\n")
    trainer.create_model_card()
    assert card(tmp_path).text.strip() == "No metadata."


def test_an_unreadable_card_is_not_replaced(tmp_path):
    trainer = trained(tmp_path)
    (tmp_path / "README.md").write_text("---\na: [\n---\nmine\n")
    with pytest.raises(ArgumentError, match=r"README.md is not replaced by a new model card.* Fix it or move it away"):
        trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "---\na: [\n---\nmine\n"


def bert(name="google/some-bert"):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)
    model.config._name_or_path = name
    return model


def test_fields_inferred_from_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    license_of.cache_clear()
    examples = [{"input_ids": [1, 2], "labels": 0}]
    trainer = make_trainer(tmp_path, bert(), train_dataset=examples, eval_dataset=None)
    trainer.create_model_card()
    data = card(tmp_path).data
    assert (data.library_name, data.base_model, data.license) == ("transformers", "google/some-bert", None)
    assert infer_fields(trainer.model, trainer.train_dataset).tasks == ["text-classification"]
    assert "- Transformers 5." in card(tmp_path).text
    for local in (str(tmp_path), "a/path/of/folders", ""):
        made = make_trainer(tmp_path, bert(local), train_dataset=examples, eval_dataset=None)
        assert infer_fields(made.model, made.train_dataset).finetuned_from is None


def test_fields_inferred_from_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    examples = datasets.Dataset.from_dict({"x": [[0.0] * 4], "labels": [0.0]}, split="validation")
    trainer = make_trainer(tmp_path, Linear(), eval_dataset=examples)
    assert infer_fields(trainer.model, trainer.eval_dataset).dataset_tags == []
    examples.info.builder_name, examples.info.dataset_name, examples.info.config_name = "parquet", "glue", "mrpc"
    examples.info.builder_name = "glue"
    trainer.log({"eval_f1": 0.5})
    trainer.create_model_card(tasks="text-classification")
    (result,) = card(tmp_path).data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("glue", "mrpc", "validation")
    assert card(tmp_path).data.datasets == ["glue"]


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    trainer = make_trainer(tmp_path, model, train_dataset=[{"input_ids": [1], "labels": 0}], eval_dataset=None)
    trainer.save_model()
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()  # peft's own draft
    trainer.create_model_card(tags="mine", license="mit")
    found = card(tmp_path)
    assert found.data.library_name == "peft"
    assert found.data.base_model == "google/some-bert"
    assert {"mine", "generated_from_trainer", "lora"} <= set(found.data.tags)
    assert "- PEFT 0." in found.text
    assert "[More Information Needed]" not in found.text


def test_the_license_of_the_base_model(tmp_path, monkeypatch):
    from tests.trainer.hub.server import Hub

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    license_of.cache_clear()
    hub.cards["google/some-bert"] = {"license": "mit"}
    examples = [{"input_ids": [1, 2], "labels": 0}]
    trainer = make_trainer(tmp_path, bert(), train_dataset=examples, eval_dataset=None)
    trainer.create_model_card()
    trainer.create_model_card()
    assert card(tmp_path).data.license == "mit"
    assert len(hub.matching_requests("GET /api/models/google/some-bert")) == 1
    trainer.create_model_card(finetuned_from="google/other")
    assert card(tmp_path).data.license == "mit"  # as the card said
    hub.close()
    license_of.cache_clear()
