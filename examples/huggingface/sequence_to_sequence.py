"""Fine-tune an encoder-decoder to turn one text into another, from CSV files with a column for each.

    python examples/huggingface/sequence_to_sequence.py --model_name_or_path MODEL --output_dir runs/seq2seq
        --train_file train.csv --validation_file dev.csv --test_file test.csv --do_train --do_eval --do_predict
        --predict_with_generate

A typical script for Hugging Face's Seq2SeqTrainer: translation, summaries, spelling, pronunciation. With
`--predict_with_generate` texts are generated and compared with those of the file. The only line that differs is the import from
fts.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed

from fts import Seq2SeqTrainer, Seq2SeqTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Directory or name of the model to start from."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "CSV file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "CSV file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "CSV file to write texts for."})
    source_column: str = field(default="source", metadata={"help": "Column of the source texts."})
    target_column: str = field(default="target", metadata={"help": "Column of the target texts."})
    source_prefix: str = field(default="", metadata={"help": "Prefix of each source, for T5."})
    max_source_length: int = field(default=128, metadata={"help": "Longer sources are truncated to this number of tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longer targets are truncated to this number of tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of the search; --generation_num_beams if not given."})
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    logger.setLevel(training_args.get_process_log_level())
    set_seed(training_args.seed)

    named = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw = load_dataset("csv", data_files={split: file for split, file in named.items() if file is not None})
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)

    def tokenize(examples):
        sources = [data_args.source_prefix + text for text in examples[data_args.source_column]]
        inputs = tokenizer(sources, max_length=data_args.max_source_length, truncation=True)
        targets = tokenizer(
            text_target=examples[data_args.target_column], max_length=data_args.max_target_length, truncation=True
        )
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": targets["input_ids"]}

    with training_args.main_process_first(desc="tokenizing"):
        ready = {
            split: dataset.map(tokenize, batched=True, remove_columns=dataset.column_names) for split, dataset in raw.items()
        }

    def decode(ids):
        texts = tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def compute_metrics(prediction):
        written, wanted = decode(prediction.predictions), decode(prediction.label_ids)
        lengths = np.count_nonzero(prediction.predictions != tokenizer.pad_token_id, axis=1)
        exact = [text == target for text, target in zip(written, wanted, strict=True)]
        return {"exact_match": float(np.mean(exact)), "gen_len": float(np.mean(lengths))}

    label_pad = -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=ready["train"] if training_args.do_train else None,
        eval_dataset=ready["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=label_pad),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": len(ready["train"])}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    num_beams = data_args.num_beams if data_args.num_beams is not None else training_args.generation_num_beams
    max_length = training_args.generation_max_length or data_args.max_target_length
    if training_args.do_eval:
        metrics = trainer.evaluate(max_length=max_length, num_beams=num_beams, metric_key_prefix="eval")
        metrics["eval_samples"] = len(ready["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        result = trainer.predict(ready["test"], metric_key_prefix="predict", max_length=max_length, num_beams=num_beams)
        trainer.log_metrics("predict", result.metrics)
        trainer.save_metrics("predict", result.metrics)
        if trainer.is_world_process_zero() and training_args.predict_with_generate:
            with open(os.path.join(training_args.output_dir, "generated_predictions.txt"), "w", encoding="utf-8") as file:
                file.write("\n".join(decode(result.predictions)))


if __name__ == "__main__":
    main()
