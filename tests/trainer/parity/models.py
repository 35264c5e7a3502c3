"""Tiny models without dropout, and examples for them; every call gives the same ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(labels: int = 3, **changes: Any) -> Any:
    """A BERT classifier."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=labels,
        **changes,
    )
    return transformers.BertForSequenceClassification(config)


def masked_bert() -> Any:
    """A BERT that predicts masked tokens; its input and output embeddings are tied."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config)


def llama(**changes: Any) -> Any:
    """A Llama that predicts the next token."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=16, **changes))


def gpt2() -> Any:
    """A GPT-2 that predicts the next token; its embeddings are tied."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    """A T5."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


class Plain(nn.Module):
    """A classifier that is no transformers model, and takes nothing but its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tuples(Plain):
    """The same, but returns a tuple."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = super().forward(input_ids, labels)
        return (outputs["logits"],) if labels is None else (outputs["loss"], outputs["logits"])


def sentences(count: int = 30, seed: int = 0, kind: str = "class") -> list[dict[str, Any]]:
    """Rows for a classifier: one class each, or several ("several"), or a number ("number")."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    labels: list[Any] = [int(row[0]) % 3 for row in ids]
    if kind == "several":
        labels = [torch.nn.functional.one_hot(torch.tensor(label), 3).float() for label in labels]
    elif kind == "number":
        labels = [float(row[0]) / 50 for row in ids]
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def texts(count: int = 30, seed: int = 0, length: int = 8) -> list[dict[str, Any]]:
    """Rows for a language model, in which between none and most of the tokens do not count (-100)."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        ids = torch.randint(1, 50, (length,), generator=generator)
        ignored = int(torch.randint(0, length - 2, (), generator=generator))
        labels = ids.clone()
        labels[:ignored] = -100
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return examples


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of right classes."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
