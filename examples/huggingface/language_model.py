"""Train a causal language model from scratch, or fine-tune one, on plain text.

    python examples/huggingface/language_model.py --model_type llama --config_overrides num_hidden_layers=2,hidden_size=128
        --tokenizer_name TOKENIZER --train_file book.txt --output_dir runs/language_model --do_train --do_eval

A typical script for Hugging Face's Trainer: all texts are concatenated and split into blocks of one size, without padding. If
there is no validation file, the last blocks are held out. The only line that differs is the import from fts.
"""

import logging
import math
import sys
from dataclasses import dataclass, field
from itertools import chain

from datasets import DatasetDict, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator, set_seed

from fts import Trainer, TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model to fine-tune; not given: train from scratch."})
    model_type: str = field(default="llama", metadata={"help": "Architecture of a model that is trained from scratch."})
    config_overrides: str = field(
        default="", metadata={"help": "Settings of the architecture, such as num_hidden_layers=2,hidden_size=64."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "Text file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file to evaluate on."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of blocks to hold out without a validation file."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})


def make_model(model_args, tokenizer):
    if model_args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    config = AutoConfig.for_model(model_args.model_type, vocab_size=len(tokenizer))
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(config)


def group_texts(examples, block_size):
    """Concatenate the tokens of all examples, and split them into blocks; the remainder is dropped."""
    joined = {name: list(chain.from_iterable(values)) for name, values in examples.items()}
    total = len(joined["input_ids"]) // block_size * block_size
    blocks = {name: [values[i : i + block_size] for i in range(0, total, block_size)] for name, values in joined.items()}
    return {**blocks, "labels": [list(block) for block in blocks["input_ids"]]}


def preprocess_logits_for_metrics(logits, labels):
    """Keep only the most likely tokens: the logits of a validation set would not fit into memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def compute_metrics(prediction):
    guessed, wanted = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guessed == wanted).mean())}


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logger.setLevel(training_args.get_process_log_level())
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = make_model(model_args, tokenizer)
    logger.info("%.2fM parameters", sum(parameter.numel() for parameter in model.parameters()) / 1e6)

    named = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw = load_dataset(
        "text", data_files={split: file for split, file in named.items() if file is not None}, keep_linebreaks=True
    )
    with training_args.main_process_first(desc="grouping texts into blocks"):
        tokens = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])
        blocks = tokens.map(group_texts, batched=True, fn_kwargs={"block_size": data_args.block_size})
    if "validation" not in blocks:
        parts = blocks["train"].train_test_split(test_size=data_args.validation_share, shuffle=False)
        blocks = DatasetDict(train=parts["train"], validation=parts["test"])

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": len(blocks["train"])}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(blocks["validation"])
        metrics["perplexity"] = math.exp(metrics["eval_loss"]) if metrics["eval_loss"] < 700 else math.inf
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
