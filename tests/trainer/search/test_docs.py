"""The code of docs/search.md runs unchanged; its part for Ray is run in test_ray_backend.py."""

import re

import pytest

from tests.trainer.search.search_jobs import ROOT

PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "page"}
    for block in BLOCKS[:2]:
        exec(block, space)
    best, trainer = space["best"], space["trainer"]
    assert best.objective < 0.5 and best.hyperparameters.keys() == {"learning_rate", "per_device_train_batch_size"}
    assert [*(tmp_path / "runs" / f"run-{best.run_id}").glob("checkpoint-*")]
    assert trainer.args.learning_rate == best.hyperparameters["learning_rate"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)
    head = re.search(r"^trial  state.*", PAGE, re.MULTILINE)
    assert head[0] in capsys.readouterr().out
