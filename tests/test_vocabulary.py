"""Code and pages use the field's words (torch, optax, transformers, accelerate), and none that a reader would first have to learn."""

import re
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = ["fts", "docs", "examples", "README.md", "CONTRIBUTING.md", "SECURITY.md"]


@attrs.frozen
class Word:
    """A pattern that must not occur, what to write instead, and the uses that are another word: a pattern of the line -> the reason."""

    pattern: str
    instead: str
    allowed: dict[str, str] = attrs.Factory(dict)


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
    Word(r"\b(?:Agreement|agreeing)\b", "AsyncAllReduceMax"),
    Word(r"\bPeers\b", "RankMonitor"),
    Word(r"\b(?:copy_first|is_first)\b", "broadcast_, is_main_process"),
    Word(r"\bacross_devices\b", "data_parallel_loss"),
    Word(r"\b(?:Averaging|Replicating)\b", "AllReduceGradients, DDPGradients"),
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
    Word(r"\b(?:not_yet|wording|tally|Tally|Keeping|lay_out|spreading)\b", "unsupported, messages, running_metrics, ..."),
    # words with a private meaning
    Word(r"\b(?:tells?|told|telling)\b", "is called, reports, logs"),
    Word(r"\b(?:lends?|lent|lending)\b", "swap"),
    Word(r"\bwhole\b", "full, complete, valid, entire", {r"\bwhole numbers?\b": "a number without a fraction"}),
    Word(r"\bfigures?\b", "metrics"),
    Word(r"\brooms?\b", "packages"),
    Word(r"\brows\b", "examples"),
    Word(r"\bitems\b(?!\()", "examples"),
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
        for allowed in word.allowed:
            line = re.sub(allowed, "", line)  # noqa: PLW2901
        if pattern.search(line):
            found.append(f"{place}: {line.strip()}")
    assert found == [], f"write: {word.instead}"


@pytest.mark.parametrize("word", [word for word in WORDS if word.allowed], ids=lambda word: word.pattern)
def test_each_exception_is_needed(word):
    for allowed in word.allowed:
        assert any(re.search(allowed, line) for _, line in LINES), f"{allowed} occurs nowhere"
