"""Fine-tune a model to classify texts from CSV files with the columns `text` and `label`.

    python examples/huggingface/classification.py --model_name_or_path MODEL --output_dir runs/classification
        --train_file train.csv --validation_file dev.csv --test_file test.csv --do_train --do_eval --do_predict

A typical script for Hugging Face's Trainer: it takes every argument of TrainingArguments, or all arguments from a JSON file, and
an interrupted run resumes from its last checkpoint. The only line that differs is the import from fts.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from fts import EvalPrediction, Trainer, TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Directory or name of the model to start from."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "CSV file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "CSV file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "CSV file to predict; labels are not read."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are truncated to this number of tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first examples of the training file."})


def parse_arguments():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def find_checkpoint(training_args):
    """The checkpoint to resume from: as given, else the last one in the output directory, if there is one."""
    if training_args.resume_from_checkpoint is not None:
        return training_args.resume_from_checkpoint
    last = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    if last is not None:
        logger.info("Resuming from %s; choose another --output_dir to train from scratch.", last)
    return last


def compute_metrics(prediction: EvalPrediction):
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main():
    model_args, data_args, training_args = parse_arguments()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logger.setLevel(training_args.get_process_log_level())
    logger.info("device %s, %s", training_args.device, training_args.parallel_mode)
    set_seed(training_args.seed)

    named = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw = load_dataset("csv", data_files={split: file for split, file in named.items() if file is not None})
    labels = sorted(set(raw["train"]["label"]))
    label2id = {label: index for index, label in enumerate(labels)}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path, num_labels=len(labels), label2id=label2id, id2label=dict(enumerate(labels))
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)

    def tokenize(examples):
        return tokenizer(examples["text"], max_length=data_args.max_seq_length, truncation=True)

    def with_labels(examples):
        return {**tokenize(examples), "labels": [label2id[label] for label in examples["label"]]}

    with training_args.main_process_first(desc="tokenizing"):
        ready = {
            split: dataset.map(tokenize if split == "test" else with_labels, batched=True, remove_columns=dataset.column_names)
            for split, dataset in raw.items()
        }
    if data_args.max_train_samples is not None:
        ready["train"] = ready["train"].select(range(min(data_args.max_train_samples, len(ready["train"]))))

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=ready["train"] if training_args.do_train else None,
        eval_dataset=ready["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
        metrics = {**result.metrics, "train_samples": len(ready["train"])}
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(ready["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        chosen = np.argmax(trainer.predict(ready["test"], metric_key_prefix="predict").predictions, axis=1)
        if trainer.is_world_process_zero():
            with open(os.path.join(training_args.output_dir, "predictions.tsv"), "w", encoding="utf-8") as file:
                file.writelines(f"{index}\t{labels[choice]}\n" for index, choice in enumerate(chosen))


if __name__ == "__main__":
    main()
