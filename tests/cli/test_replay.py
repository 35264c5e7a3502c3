"""`fts replay`, as a user calls it, in a process of its own."""

import re
import subprocess
import sys
import textwrap

import pytest

from fts.cli import main

PLAIN = """
    import torch
    from torch import nn

    import fts
    from fts import loops, steps, transforms as tx

    POISONED = None


    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            x = torch.full((3,), float(index)) + torch.rand(3)
            if index == POISONED:
                x[1] = float("nan")
            return x


    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        loss = steps.module_loss(net, lambda model, batch: model(batch).square().mean())
        optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(1e-3))
        state = fts.TrainState.create(net, optimizer, seed=2)
        return steps.train_step(loss, optimizer), state, loops.source(Rows(), batch_size=4, shuffle=True, seed=2)


    def train(root):
        step, state, data = made()
        save = lambda state, position: loops.save_checkpoint(f"{root}/checkpoint-{int(state.step)}", state, position)
        for event in loops.fit(step, state, data, total_steps=10, due=loops.cadence(save=5), save=save):
            pass


    def poisoned():
        global POISONED
        step, state, data = made()
        POISONED = data.example_indices(1, 2)[3]  # the eighth step
        print("poisoned", POISONED)
        return step, state, data


    def wrong():
        return 3


    if __name__ == "__main__":
        import sys

        train(sys.argv[1])
"""

TRAINER = """
    import sys
    import torch
    from torch import nn

    from fts import Trainer, TrainingArguments


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.dropout, self.head = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)

        def forward(self, x, labels):
            return {"loss": (self.head(self.dropout(self.hidden(x).relu())).squeeze(-1) - labels).square().mean()}


    def trainer(root="."):
        torch.manual_seed(0)
        rows = [{"x": torch.randn(4), "labels": float(number)} for number in range(24)]
        args = TrainingArguments(
            output_dir=root, max_steps=10, save_steps=5, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True
        )
        return Trainer(Net(), args, train_dataset=rows)


    if __name__ == "__main__":
        trainer(sys.argv[1]).train()
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """What the command does to the path of modules ends with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def python(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, **options)


def a_run(root, program):
    script = root / "training.py"
    script.write_text(textwrap.dedent(program))
    run = python(script, root)
    assert run.returncode == 0, run.stderr
    return script


def test_a_run_of_plain_functions(tmp_path):
    script = a_run(tmp_path, PLAIN)
    run = python("-m", "fts.cli", "replay", tmp_path / "checkpoint-5", "--step", 10, "--run", f"{script}:made")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"Step 10, from {tmp_path}/checkpoint-5: epoch 1, batch 4 (from 0)"
    assert re.fullmatch(r"examples \d+, \d+, \d+, \d+", lines[1])
    assert re.fullmatch(r"loss     \d+\.\d+", lines[2])
    assert re.search(r"^  grad_norm +\d", run.stdout, re.MULTILINE)
    assert re.search(r"^  lr +0\.001", run.stdout, re.MULTILINE)
    norms = re.findall(r"^  (\S+) +([02]\.(?:weight|bias))$", run.stdout, re.MULTILINE)
    assert {name for _, name in norms} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [float(norm) for norm, _ in norms] == sorted((float(norm) for norm, _ in norms), reverse=True)
    assert lines[-2] == "All numbers of the batch, the gradients and the parameters are finite."
    assert lines[-1] == "The state after the step equals checkpoint-10, bit for bit."


def test_a_run_of_a_trainer_by_the_name_of_its_module(tmp_path):
    a_run(tmp_path, TRAINER)
    words = ["replay", tmp_path / "checkpoint-5", "--step", 10, "--run", "training:trainer", "--top", 1]
    run = python("-m", "fts.cli", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Step 10, from" in run.stdout and "epoch 1, batch 3 (from 0)" in run.stdout
    assert "  and 3 more" in run.stdout
    assert run.stdout.endswith("The state after the step equals checkpoint-10, bit for bit.\n")


def test_a_nonfinite_example_is_named(tmp_path):
    script = a_run(tmp_path, PLAIN)
    run = python("-m", "fts.cli", "replay", tmp_path / "checkpoint-5", "--step", 8, "--run", f"{script}:poisoned")
    assert run.returncode == 0, run.stderr
    item = re.search(r"^poisoned (\d+)$", run.stdout, re.MULTILINE)[1]
    assert f"The examples with such numbers: {item}\n" in run.stdout
    assert re.search(r"^loss     nan$", run.stdout, re.MULTILINE)
    assert "Not finite in the batch:\n  batch: 1 NaN and 0 infinite of 12\n" in run.stdout
    assert re.search(r"Not finite in gradients:\n(  .*\n)*  0\.weight: 12 NaN and 0 infinite of 12\n", run.stdout)
    assert "Not finite in parameters after the step:" in run.stdout and "before" not in run.stdout.replace("before clipping", "")
    assert run.stdout.splitlines()[-1].startswith(
        "The state after the step is not compared with a checkpoint: there is no complete checkpoint-8"
    )


def test_an_earlier_step_that_raises_is_located(tmp_path, capsys):
    script = a_run(tmp_path, PLAIN)
    raising = tmp_path / "raising.py"
    raising.write_text(
        script.read_text().replace("return step, state, data", "return steps.with_nonfinite_check(step), state, data")
    )
    assert main(["replay", str(tmp_path / "checkpoint-5"), "--step", "8", "--run", f"{raising}:poisoned"]) == 0
    assert "The step raised NonFiniteError: In step 8 the loss is nan" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "checkpoint-5"), "--step", "9", "--run", f"{raising}:poisoned"]) == 2
    assert "In step 8: epoch 1, batch 2 (from 0), examples" in capsys.readouterr().err


def test_a_state_that_differs_gives_the_exit_status_1(tmp_path, capsys):
    script = a_run(tmp_path, PLAIN)
    other = tmp_path / "other.py"
    other.write_text(script.read_text().replace("adamw(1e-3)", "adamw(1.1e-3)"))
    assert main(["replay", str(tmp_path / "checkpoint-5"), "--step", "10", "--run", f"{other}:made"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS from checkpoint-10 in 0.weight, 0.bias, 2.weight, 2.bias" in out
    assert "lr" in out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("{script}:nothing", "has no function 'nothing'. It has"),
        ("{script}:wrong", "returned int; it must return a Trainer"),
        ("{script}", "is not a function"),
        ("{root}/nowhere.py:made", "There is no file"),
        ("no.such.module:made", "There is no module 'no.such.module'"),
        (":made", "is not a function"),
    ],
)
def test_functions_that_do_not_exist(tmp_path, capsys, name, text):
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(PLAIN))
    words = ["replay", str(tmp_path / "checkpoint-5"), "--step", "6", "--run", name.format(script=script, root=tmp_path)]
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_a_checkpoint_that_does_not_exist_and_a_step_that_is_not_after_it(tmp_path, capsys):
    script = a_run(tmp_path, PLAIN)
    assert main(["replay", str(tmp_path / "checkpoint-7"), "--step", "8", "--run", f"{script}:made"]) == 2
    assert "There is no checkpoint at" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "checkpoint-10"), "--step", "8", "--run", f"{script}:made"]) == 2
    assert "which was written after step 10" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "checkpoint-5"), "--step", "8", "--run", f"{script}:made", "--top", "-1"]) == 2
    assert "--top -1" in capsys.readouterr().err


def test_a_module_that_fails_to_import_raises_its_error(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import there_is_no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_package"):
        main(["replay", "checkpoint-5", "--step", "6", "--run", "needy:made"])
