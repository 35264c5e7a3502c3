"""Seq2SeqTrainer: a Trainer whose evaluations can write sequences with `model.generate` instead of reading logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fts.distributed.process_group import is_initialized
from fts.errors import ArgumentError
from fts.trainer.arguments import Seq2SeqTrainingArguments
from fts.trainer.evaluation import PredictionOutput
from fts.trainer.trainer import Trainer

DEFAULT_LENGTH = 20
"""How long transformers lets a sequence get where nothing says so."""

DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")


def generate_batch(model: Any, inputs: Mapping[str, Any], gen_kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """Generate a sequence for each example of a batch.

    Labels are not shown to the model, and neither are decoder inputs that a collator made of the labels (they have the labels'
    shape): the model would only continue them. Other decoder inputs, such as a prompt, are.

    Args:
        model: has transformers' `generate`.
        inputs: a batch of its inputs, on its device; they may include labels.
        gen_kwargs: the other arguments of `generate`; those that are None are left to `model.generation_config`.

    Returns:
        The tokens: a row for each example of the batch and each of `num_return_sequences`.

    Raises:
        ArgumentError: the model has no `generate`.

    >>> class Copies(nn.Module):
    ...     def generate(self, input_ids, max_length=20):
    ...         return input_ids[:, :max_length]
    >>> generate_batch(Copies(), {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6]])}, {"max_length": 2})
    tensor([[3, 4]])
    """
    if not callable(getattr(model, "generate", None)):
        raise ArgumentError(
            f"predict_with_generate=True needs a model with a generate method; {type(model).__name__} has none. Use a model of "
            "transformers that generates, or predict_with_generate=False."
        )
    options = {name: value for name, value in (gen_kwargs or {}).items() if value is not None}
    if "synced_gpus" not in options and exchanges_parameters(model):
        options["synced_gpus"] = True  # each rank continues until all are done: every forward gathers the shards of all
    with gathered_parameters(model):
        tokens: Tensor = model.generate(**generation_inputs(inputs), **options)
    return tokens


def generation_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model may see when it generates.

    >>> batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 4), "decoder_input_ids": torch.ones(2, 4)}
    >>> list(generation_inputs(batch))
    ['input_ids']
    """
    labels, started = inputs.get("labels"), inputs.get("decoder_input_ids")
    of_labels = labels is not None and started is not None and labels.shape == started.shape
    hidden = ("labels", *DECODER_INPUTS) if of_labels else ("labels",)
    return {name: value for name, value in inputs.items() if name not in hidden}


def generation_settings(args: Any, gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` in an evaluation: those of this call, else the length and beams of the training arguments.

    >>> from types import SimpleNamespace
    >>> generation_settings(SimpleNamespace(generation_max_length=9, generation_num_beams=None), {"num_beams": 2})
    {'num_beams': 2, 'max_length': 9}
    """
    settings = dict(gen_kwargs)
    says_length = any(settings.get(name) is not None for name in ("max_length", "max_new_tokens"))
    if not says_length and args.generation_max_length is not None:
        settings["max_length"] = args.generation_max_length
    if settings.get("num_beams") is None and args.generation_num_beams is not None:
        settings["num_beams"] = args.generation_num_beams
    return settings


def load_generation_config(source: Any) -> Any:
    """A `GenerationConfig` from a file, a directory, a model's name, or a copy of one.

    Raises:
        ArgumentError: the settings contradict each other.

    >>> from transformers import GenerationConfig
    >>> load_generation_config(GenerationConfig(num_beams=3)).num_beams
    3
    """
    from transformers import GenerationConfig

    if isinstance(source, GenerationConfig):
        config = copy.deepcopy(source)
    elif Path(source).is_file():
        config = GenerationConfig.from_pretrained(Path(source).parent, Path(source).name)
    else:
        config = GenerationConfig.from_pretrained(source)
    try:
        config.validate(strict=True)  # the config is saved with the model; transformers would refuse that only then
    except ValueError as error:
        raise ArgumentError(
            f"The generation_config of the arguments cannot be used. {error}\nFix these issues to train your model."
        ) from error
    return config


def width_of(tokens: Tensor, config: Any) -> int:
    """How wide a batch of tokens is made: to the `max_length` of a generation config, or to hold its `max_new_tokens`.

    As in transformers it is the model's own config that counts, not the arguments of one call of `generate`.

    >>> from types import SimpleNamespace
    >>> width_of(torch.ones(2, 5), SimpleNamespace(max_length=None, max_new_tokens=30))
    20
    >>> width_of(torch.ones(2, 25), SimpleNamespace(max_length=None, max_new_tokens=30))
    31
    """
    width = tokens.shape[-1]
    longest = getattr(config, "max_length", None)
    longest = DEFAULT_LENGTH if longest is None else longest
    if width < longest:
        return int(longest)
    return max(width, (getattr(config, "max_new_tokens", None) or 0) + 1)


def pad_to(tokens: Tensor, width: int, pad_token_id: int) -> Tensor:
    """Widen the last axis of a batch of tokens.

    >>> pad_to(torch.tensor([[5, 6]]), 4, 0)
    tensor([[5, 6, 0, 0]])
    """
    return nn.functional.pad(tokens, (0, width - tokens.shape[-1]), value=pad_token_id)


def pad_token_of(processing_class: Any, model: nn.Module) -> int:
    """The token that fills up sequences: the tokenizer's (else the one that ends a sequence), or without a tokenizer the model's.

    Raises:
        ArgumentError: there is none.
    """
    config = getattr(model, "config", None)
    if hasattr(processing_class, "pad_token_id"):
        found, at = processing_class.pad_token_id, "tokenizer.pad_token"
        found = getattr(processing_class, "eos_token_id", None) if found is None else found
    else:
        found, at = getattr(config, "pad_token_id", None), "model.config.pad_token_id"
    if found is None:
        raise ArgumentError(f"Sequences of a batch are filled up to one length, but there is no token for that. Set {at}.")
    return int(found)


def exchanges_parameters(model: Any) -> bool:
    """Whether a forward pass gathers parameters: each rank has a local shard of them (FSDP, DeepSpeed's ZeRO-3)."""
    if not is_initialized():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered_parameters(model: Any) -> Iterator[None]:
    """Gather the parameters of a model that torch's older FSDP wraps, because `generate` bypasses its forward."""
    if not is_initialized():
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model):
        yield


class Seq2SeqTrainer(Trainer):
    """A Trainer for sequence-to-sequence models, as Hugging Face's Seq2SeqTrainer.

    With `predict_with_generate=True` the predictions of `evaluate` and `predict` are sequences that the model generated; where
    there are labels the loss is computed, too. Sequences and labels are filled up with the pad token to the `max_length` of the
    model's generation config (20 if it has none), and with -100 where batches still differ.

    Args:
        model: has transformers' `generate` if sequences are to be generated.
        args: `Seq2SeqTrainingArguments`; their `generation_config` (a `GenerationConfig`, path or name) replaces the model's.
        data_collator: this and what follows is as `Trainer` has it.
        train_dataset: see `Trainer`.
        eval_dataset: see `Trainer`.
        processing_class: see `Trainer`; its pad token fills sequences up.
        model_init: see `Trainer`.
        compute_loss_func: see `Trainer`.
        compute_metrics: see `Trainer`; gets generated tokens instead of logits.
        callbacks: see `Trainer`.
        optimizers: see `Trainer`.
        preprocess_logits_for_metrics: see `Trainer`; gets generated tokens.
        optimizer_cls_and_kwargs: see `Trainer`.
        step: see `Trainer`.

    Raises:
        ArgumentError: the arguments are not those of a Seq2SeqTrainer, or their generation config contradicts itself.
    """

    args: Seq2SeqTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        step: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            args=_checked(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            step=step,
        )
        self._gen_kwargs: dict[str, Any] = {}
        if self.args.generation_config is not None:
            self.model.generation_config = self.load_generation_config(self.args.generation_config)

    load_generation_config = staticmethod(load_generation_config)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate, as `Trainer.evaluate`.

        Args:
            eval_dataset: instead of that of the Trainer; a dictionary of several is evaluated one by one.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: the prefix of the metrics' names.
            gen_kwargs: for `model.generate` in this evaluation, such as `max_length`, `max_new_tokens`, `num_beams`; without them
                `generation_max_length` and `generation_num_beams` of the arguments count, then the model's generation config.

        Returns:
            The loss, the metrics of `compute_metrics`, and the speed.
        """
        with self._generating(gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test", **gen_kwargs: Any
    ) -> PredictionOutput:
        """Predict, as `Trainer.predict`.

        Args:
            test_dataset: labels are optional.
            ignore_keys: the model's outputs that are not predictions.
            metric_key_prefix: the prefix of the metrics' names.
            gen_kwargs: for `model.generate`, as in `evaluate`.

        Returns:
            The generated tokens (with `predict_with_generate`), labels or None, and metrics.
        """
        with self._generating(gen_kwargs):
            return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Generate for one batch, and compute its loss if it has labels.

        Args:
            model: the model; may be wrapped.
            inputs: a batch.
            prediction_loss_only: do not generate.
            ignore_keys: the model's outputs that are not predictions.
            gen_kwargs: for `model.generate`, instead of those of the evaluation that runs.

        Returns:
            The loss or None, the generated tokens, the labels or None.
        """
        if not self.args.predict_with_generate or prediction_loss_only or self.args.prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            tokens = self._widened(generate_batch(self.model, inputs, gen_kwargs or self._gen_kwargs))
        labels = inputs.get("labels")
        if labels is None:
            return None, tokens, None
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys=ignore_keys)
        return loss, tokens, self._widened(labels)

    def _widened(self, tokens: Tensor) -> Tensor:
        width = width_of(tokens, getattr(self.model, "generation_config", None))
        return tokens if width == tokens.shape[-1] else pad_to(tokens, width, pad_token_of(self.processing_class, self.model))

    @contextmanager
    def _generating(self, gen_kwargs: Mapping[str, Any]) -> Iterator[None]:
        # An evaluation of several sets calls evaluate for each: the arguments of the outer call hold in the inner ones.
        before = self._gen_kwargs
        self._gen_kwargs = generation_settings(self.args, {**before, **gen_kwargs})
        try:
            yield
        finally:
            self._gen_kwargs = before


def _checked(args: Any) -> Any:
    if args is None:
        return Seq2SeqTrainingArguments()
    names = ("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config")
    if not all(hasattr(args, name) for name in names):
        found = f"{type(args).__module__}.{type(args).__name__}"
        raise ArgumentError(f"Seq2SeqTrainer(args=...) must be fts.Seq2SeqTrainingArguments, not {found}.")
    return args
