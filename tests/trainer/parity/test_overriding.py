"""Methods that user code overrides: one body, mixed into both Trainers, gives the same run."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainer.parity.compare import OURS, THEIRS, assert_same_metrics, assert_same_training, both, entries, made
from tests.trainer.parity.models import Plain, accuracy, bert, llama, sentences, texts


def classes(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1), "compute_metrics": accuracy}


def tokens(model):
    return {"train_dataset": texts(), "eval_dataset": texts(10, seed=1)}


# compute_loss: of the signatures that are around


def weighted_loss(base, side):
    class Weighted(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            weight = torch.tensor([1.0, 2.0, 0.5], device=labels.device)
            loss = nn.functional.cross_entropy(outputs["logits"], labels, weight=weight)
            return (loss, outputs) if return_outputs else loss

    return Weighted


def loss_with_kwargs(base, side):
    class Scaled(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.called = getattr(self, "called", 0) + 1
            return (3 * loss, outputs) if return_outputs else 3 * loss

    return Scaled


def loss_by_count(base, side):
    class Counted(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            count = (wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") / count
            return (loss, outputs) if return_outputs else loss

    return Counted


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("change", "model", "parts"),
    [
        (weighted_loss, bert, classes),
        (weighted_loss, Plain, classes),
        (loss_with_kwargs, bert, classes),
        (loss_by_count, llama, tokens),
    ],
)
def test_compute_loss(change, model, parts, accumulate, tmp_path, capsys):
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 5, "per_device_eval_batch_size": 10}
    theirs, ours = both(tmp_path, model(), parts, change=change, **options)
    assert_same_training(theirs, ours)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=2e-5)
    if change is loss_with_kwargs:
        assert ours.called == theirs.called == (14 if accumulate == 3 else 5) + 1  # an epoch has 8 micro-batches; one evaluation


# training_step: calling super, and doing it all


def noted_step(base, side):
    class Noted(base):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.noted = [*getattr(self, "noted", ()), loss.item()]
            assert model.training
            assert not loss.requires_grad
            return loss

    return Noted


def own_step(base, side):
    class Own(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            loss = loss * 2
            self.accelerator.backward(loss)
            return loss.detach()

    return Own


def perturbed_step(base, side):
    """Adversarial weights: two backward passes in a step, and parameters that move in between."""

    class Perturbed(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            weight = model.get_input_embeddings().weight
            step = 0.01 * weight.grad.sign()
            with torch.no_grad():
                weight.add_(step)
            super().training_step(model, dict(inputs), num_items_in_batch)
            with torch.no_grad():
                weight.sub_(step)
            return loss

    return Perturbed


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("change", [noted_step, own_step, perturbed_step])
def test_training_step(change, accumulate, tmp_path, capsys):
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 5}
    theirs, ours = both(tmp_path, llama(), tokens, change=change, **options)
    assert_same_training(theirs, ours)
    if change is noted_step:
        assert ours.noted == pytest.approx(theirs.noted, rel=2e-5)


# Optimizer and schedule


def own_optimizer(base, side):
    class Own(base):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, momentum=0.9)
            return self.optimizer

    return Own


def own_scheduler(base, side):
    class Own(base):
        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, num_training_steps // 4, gamma=0.3)
            return self.lr_scheduler

    return Own


def own_both(base, side):
    class Own(base):
        def create_optimizer(self, model=None):
            groups = [{"params": [parameter], "lr": 0.01 * (i + 1)} for i, parameter in enumerate(self.model.parameters())]
            self.optimizer = torch.optim.Adam(groups)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
            return self.lr_scheduler

    return Own


def own_decay(base, side):
    class Own(base):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if "embed" in name]

    return Own


def own_class(base, side):
    class Own(base):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.Adamax, {"lr": args.learning_rate / 2}

    return Own


@pytest.mark.parametrize("change", [own_optimizer, own_scheduler, own_both, own_decay, own_class])
def test_optimizer_and_scheduler(change, tmp_path, capsys):
    theirs, ours = both(tmp_path, Plain(), classes, change=change, weight_decay=2.0)
    assert_same_training(theirs, ours)
    assert ours.get_learning_rates() == pytest.approx(theirs.get_learning_rates())


# Data


def own_loaders(base, side):
    class Own(base):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)

        def get_eval_dataloader(self, eval_dataset=None):
            examples = self.eval_dataset if eval_dataset is None else eval_dataset
            return torch.utils.data.DataLoader(examples[:6], batch_size=2, collate_fn=self.data_collator)

        def get_test_dataloader(self, test_dataset):
            return torch.utils.data.DataLoader(test_dataset[:4], batch_size=2, collate_fn=self.data_collator)

    return Own


class Batches:
    """A loader without a `.dataset`, and no torch one."""

    def __init__(self, examples, size):
        self.examples, self.size = examples, size

    def __len__(self):
        return len(self.examples) // self.size

    def __iter__(self):
        for start in range(0, len(self) * self.size, self.size):
            part = self.examples[start : start + self.size]
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in part]) for name in part[0]}
            yield {name: value for name, value in batch.items() if name != "attention_mask"}


def foreign_loader(base, side):
    class Own(base):
        def get_train_dataloader(self):
            return Batches(self.train_dataset, 3)

    return Own


@pytest.mark.parametrize("change", [own_loaders, foreign_loader])
def test_data_loaders(change, tmp_path, capsys):
    # examples as the model takes them, since a loader of one's own keeps all columns
    def parts(model):
        examples = {
            name: [{k: v for k, v in row.items() if k != "attention_mask"} for row in value] for name, value in data.items()
        }
        return examples | {"compute_metrics": accuracy}

    data = {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1)}
    theirs, ours = both(tmp_path, Plain(), parts, change=change, max_steps=-1, num_train_epochs=1.5)
    assert_same_training(theirs, ours)
    assert ours.state.global_step == theirs.state.global_step == 15
    if change is own_loaders:
        assert_same_metrics(theirs.evaluate(), ours.evaluate())
        examples = parts(None)["eval_dataset"]
        one, other = theirs.predict(examples), ours.predict(examples)
        np.testing.assert_allclose(other.predictions, one.predictions, rtol=1e-4, atol=1e-5)
        assert len(other.predictions) == 4


def counted_samples(base, side):
    class Own(base):
        def get_batch_samples(self, epoch_iterator, num_batches, device=None):
            self.asked = [*getattr(self, "asked", ()), num_batches]
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.taken = [*getattr(self, "taken", ()), (len(batches), int(count))]
            return batches, count * 2

    return Own


def test_get_batch_samples(tmp_path, capsys):
    theirs, ours = both(tmp_path, llama(), tokens, change=counted_samples, gradient_accumulation_steps=3, max_steps=5)
    assert_same_training(theirs, ours)
    assert ours.taken == theirs.taken
    assert ours.asked[:5] == theirs.asked == [3, 3, 2, 3, 3]


# Evaluation


def own_prediction_step(base, side):
    class Own(base):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
            return loss + 1, logits.flip(-1), labels

    return Own


def complete_prediction_step(base, side):
    class Own(base):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                outputs = model(**inputs)
            return outputs["loss"], outputs["logits"].softmax(-1), inputs["labels"]

    return Own


def own_evaluation_loop(base, side):
    class Own(base):
        def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            output.metrics[f"{metric_key_prefix}_extra"] = len(dataloader)
            return output

    return Own


def own_evaluate(base, side):
    class Own(base):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            self.log({"eval_twice": 2 * metrics["eval_loss"]})
            return metrics | {"eval_mine": -metrics["eval_loss"]}

    return Own


@pytest.mark.parametrize("change", [own_prediction_step, complete_prediction_step, own_evaluation_loop, own_evaluate])
def test_evaluation(change, tmp_path, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 4}
    theirs, ours = both(tmp_path, Plain(), classes, change=change, **options)
    assert_same_training(theirs, ours)
    for one, other in zip(entries(theirs, "eval_loss"), entries(ours, "eval_loss"), strict=True):
        assert_same_metrics(one, other)
    assert_same_metrics(theirs.evaluate(), ours.evaluate())
    assert [len(e) for e in entries(ours, "eval_twice")] == [len(e) for e in entries(theirs, "eval_twice")]


def test_a_metric_of_ones_own_evaluate_can_be_the_best(tmp_path, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "mine", "save_strategy": "best"}
    theirs, ours = both(tmp_path, Plain(), classes, change=own_evaluate, **options)
    assert ours.state.best_global_step == theirs.state.best_global_step
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=1e-4)


# Logging, saving, counting


def own_log(base, side):
    class Own(base):
        def log(self, logs, start_time=None):
            logs["mine"] = len(logs)
            super().log(logs, start_time)

    return Own


def older_log(base, side):
    class Own(base):
        def log(self, logs):
            super().log({**logs, "mine": 1.0})

    return Own


def test_log(tmp_path, capsys):
    theirs, ours = both(tmp_path, Plain(), classes, change=own_log, eval_strategy="steps", eval_steps=4)
    assert [list(entry) for entry in ours.state.log_history] == [list(entry) for entry in theirs.state.log_history]
    assert all("mine" in entry for entry in ours.state.log_history)


def test_log_with_one_argument(tmp_path, capsys):
    ours = made(tmp_path, Plain(), classes, change=older_log)[1]
    ours.train()
    assert all("mine" in entry for entry in ours.state.log_history)


def own_saving(base, side):
    class Own(base):
        def save_model(self, output_dir=None, _internal_call=False):
            # fts writes into a temporary directory, which it renames when it is complete
            self.saved = [*getattr(self, "saved", ()), re.search(r"checkpoint-\d+", str(output_dir))[0]]
            super().save_model(output_dir, _internal_call)

        def floating_point_ops(self, inputs):
            return 100

    return Own


def test_saving_and_counting(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "gradient_accumulation_steps": 2}
    theirs, ours = both(tmp_path, Plain(), classes, change=own_saving, **options)
    assert ours.saved == theirs.saved == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert ours.state.total_flos == theirs.state.total_flos
    assert (tmp_path / "fts" / "checkpoint-4" / "model.safetensors").is_file()


def test_methods_have_the_parameters_of_transformers():
    for kind in ("Trainer", "Seq2SeqTrainer"):
        for name, method in inspect.getmembers(THEIRS.kind(kind), inspect.isfunction):
            own = getattr(OURS.kind(kind), name, None)
            if name.startswith("_") or own is None or name in ELSEWHERE:
                continue
            expected = list(inspect.signature(method).parameters)
            assert [item for item in inspect.signature(own).parameters if item in expected] == expected, name


# as documented, not as in transformers 5.24; and what is in another place
ELSEWHERE = ("metrics_format", "set_initial_training_values", "load_generation_config")
