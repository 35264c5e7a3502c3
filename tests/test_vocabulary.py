"""Code and pages use the field's words (torch, optax, transformers, accelerate), not private ones."""

import re
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = ["fts", "docs", "examples", "README.md", "CONTRIBUTING.md", "SECURITY.md"]


@attrs.frozen
class Word:
    """A pattern that must not occur.

    Attributes:
        pattern: of the line.
        instead: what to write.
        allowed: uses with another meaning: a pattern of the line -> the reason.
        files: the beginning of a path where the word has another meaning -> the reason.
    """

    pattern: str
    instead: str
    allowed: dict[str, str] = attrs.Factory(dict)
    files: dict[str, str] = attrs.Factory(dict)


WORDS = [
    # names that had no meaning outside of fts
    Word(r"\bAmong\b", "Collectives"),
    Word(r"\b(?:gradients_at|reaching)\b", "compute_gradients"),
    Word(r"\bweighing\b", "weighted mean"),
    Word(r"\bExchang(?:eable|e)\b", "SwappableStep, AllGatherObject"),
    Word(r"\b(?:own_backward|OwnBackward)\b", "manual_backward"),
    Word(r"\bseeing_gradients\b", "with_gradient_callback"),
    Word(r"\b(?:finite_gradients|notice_nonfinite|raise_nonfinite)\b", "raise_if_nonfinite"),
    Word(r"\bWeightless\b", "PaddingBatch"),
    Word(r"\bmodule_at\b", "eval_module"),
    Word(r"\b(?:loss_in|label_count)\b", "extract_loss, num_label_tokens"),
    Word(r"\bof_first\b", "broadcast_from_main"),
    Word(r"\b(?:Agreement|agreeing)\b", "AsyncAllReduceMax", {"Agreement with human": "the title of a picture"}),
    Word(r"\bPeers\b", "RankMonitor"),
    Word(r"\b(?:copy_first|is_first)\b", "broadcast_, is_main_process"),
    Word(r"\bacross_devices\b", "data_parallel_loss"),
    Word(
        r"\b(?:Averaging|Replicating)\b",
        "AllReduceGradients, DDPGradients",
        {"Approximation by Averaging": "the title of a paper"},
    ),
    Word(r"\bcarrier\b", "metrics_parameter"),
    Word(r"\b(?:laid_out|laid_out_like|part_of)\b", "redistribute_like, shard_like"),
    Word(
        r"\b(?:shelter\w*|judging|judge|locating|heeding|Heeding|rehears\w*|Teller|Drawn|Replaced|replaced_by)\b",
        "a name of the field",
    ),
    Word(r"\b(?:survey|Found|Rated|Apart|cut_order|Bookmark|Unit|Single)\b", "list_checkpoints, CheckpointInfo, ..."),
    Word(r"\binterruptible\b", "handle_preemption"),
    Word(r"\b(?:write_whole|save_parts|seal|sealed|seals)\b", "atomic_directory, save_sharded, write_manifest"),
    Word(r"\b(?:OptimizerView|SchedulerView|view_of)\b", "OptimizerProxy"),
    Word(r"\b(?:follow_metric|observe_metric)\b", "reduce_on_plateau"),
    Word(
        r"\b(?:not_yet|wording|tally|Tally|Keeping|lay_out|spreading)\b",
        "unsupported, messages, running_metrics, ...",
        {'"tally"': "a key in the files of checkpoints"},
    ),
    # words with a private meaning
    Word(r"\b(?:tells?|told|telling)\b", "is called, reports, logs", {r"study\.tell": "a method of optuna"}),
    Word(r"\b(?:lends?|lent|lending)\b", "swap"),
    Word(r"\bwhole\b", "full, complete, valid, entire", {r"\bwhole numbers?\b": "a number without a fraction"}),
    Word(r"\bfigures?\b", "metrics"),
    Word(r"\brooms?\b", "packages", {r"\broom for\b": "space for"}),
    Word(
        r"\brows\b",
        "examples",
        {r"by rows of the weight": "rows of a matrix"},
        {
            "fts/cli/": "lines of a printed table",
            "fts/trainer/callbacks/displays.py": "lines of a table in a notebook",
            "fts/trainer/cards/": "lines of a table in a model card",
            "fts/trainer/evaluation/output_containers.py": "rows of arrays",
            "fts/trainer/trainer.py": "rows of arrays",
            "fts/distributed/model_shapes.py": "rows of a matrix",
            "fts/transforms/": "rows of matrices",
        },
    ),
    Word(
        r"\bitems\b(?!\()",
        "examples",
        {r"\.items\b|\bitems=source": "a field of EpochLayout"},
        {"fts/trainer/checkpoints/epoch_layout.py": "the name of a field in the files of checkpoints"},
    ),
    Word(r"\b(?:spread|spreads)\b", "sharded"),
    Word(r"\b(?:go|goes|going|went|gone) on\b", "resumes, continues"),
    Word(r"\bbeside\b", "asynchronously"),
    Word(r"\bsuspicio\w*", "validated"),
    Word(r"\blies? here\b", "the local shard"),
    Word(r"\bunfinished\b", "partial placement"),
    Word(r"\bheld by\b", "tested by"),
    Word(r"\bcut off\b", "truncated"),
    Word(r"\bdamaged\b", "corrupt"),
    Word(r"\beveryone\b", "all ranks agree"),
    Word(r"\b(?:takes?|in) turns?\b", "one rank after the other"),
    Word(r"\btries\b", "attempts"),
    Word(r"\bsettle[sd]?\b", "resolves"),
    Word(r"\bamong\b", "of, between"),
]


def lines() -> list[tuple[str, str]]:
    found = []
    for path in PATHS:
        files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
        for file in files:
            if file.suffix in (".py", ".md"):
                for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                    found.append((f"{file.relative_to(ROOT)}:{number}", line))
    return found


LINES = lines()


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.pattern)
def test_words_that_only_fts_would_use_do_not_occur(word):
    pattern = re.compile(word.pattern)
    found = []
    for place, line in LINES:
        if any(place.startswith(file) for file in word.files):
            continue
        for allowed in word.allowed:
            line = re.sub(allowed, "", line)
        if pattern.search(line):
            found.append(f"{place}: {line.strip()}")
    assert found == [], f"write: {word.instead}"


@pytest.mark.parametrize("word", [word for word in WORDS if word.allowed or word.files], ids=lambda word: word.pattern)
def test_each_exception_is_needed(word):
    for allowed in word.allowed:
        assert any(re.search(allowed, line) for _, line in LINES), f"{allowed} occurs nowhere"
    for file in word.files:
        assert any(place.startswith(file) and re.search(word.pattern, line) for place, line in LINES), f"{file} does not need it"
