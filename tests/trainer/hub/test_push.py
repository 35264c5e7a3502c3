"""What a Trainer uploads, and when, to a server that stores it."""

import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, hf_hub_download, snapshot_download

from fts import Trainer
from fts.errors import CallbackError, HubError
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Linear, make_trainer
from tests.trainer.hub.server import PART, TOKEN

MODEL = {"model.safetensors", "training_args.json", "README.md"}


def pushing(tmp_path, model=None, **changes):
    settings = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "me/it", "max_steps": 4, "save_steps": 2}
    model = Linear() if model is None else model
    return make_trainer(tmp_path / "out", model, **(settings | {"save_strategy": "steps"} | changes))


def repository_files(directory, prefix=""):
    """The files of a directory by their names in a repository."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(directory)}": path.read_bytes() for path in files}


def has_no_hidden_files(out):
    return [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_every_save_is_a_commit_with_the_model_and_its_card(tmp_path, hub):
    trainer = pushing(tmp_path, hub_always_push=True)
    trainer.train()
    repo, out = hub.repos["me/it"], tmp_path / "out"
    assert repo.messages() == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert repo.files() == {name: (out / name).read_bytes() for name in MODEL}
    _, first = repo.branches["main"][1]
    assert first["model.safetensors"] == (out / "checkpoint-2" / "model.safetensors").read_bytes()
    assert has_no_hidden_files(out)


def test_what_is_uploaded_can_be_downloaded(tmp_path, hub):
    pushing(tmp_path).train()
    path = hf_hub_download("me/it", "model.safetensors", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == Path(path).read_bytes()


def test_end_uploads_explicit_saves(tmp_path, hub):
    trainer = pushing(tmp_path, hub_strategy="end")
    trainer.train()
    assert hub.repos["me/it"].messages() == []
    trainer.save_model()
    assert hub.repos["me/it"].messages() == ["Model save"]
    assert set(hub.repos["me/it"].files()) == MODEL


def test_the_last_checkpoint_can_be_resumed_from(tmp_path, hub):
    trainer = pushing(tmp_path, hub_strategy="checkpoint", hub_always_push=True, lr_scheduler_type="constant")
    trainer.train()
    repo, out = hub.repos["me/it"], tmp_path / "out"
    (_, first), (_, last) = repo.branches["main"][1], repo.branches["main"][-1]
    uploaded = {name: data for name, data in first.items() if name.startswith("last-checkpoint/")}
    assert uploaded == repository_files(out / "checkpoint-2", "last-checkpoint/")
    uploaded = {name: data for name, data in last.items() if name.startswith("last-checkpoint/")}
    assert uploaded == repository_files(out / "checkpoint-4", "last-checkpoint/")
    assert set(repo.files()) == MODEL | set(uploaded)

    folder = snapshot_download("me/it", cache_dir=tmp_path / "cache", endpoint=hub.url, allow_patterns="last-checkpoint/*")
    shutil.copytree(f"{folder}/last-checkpoint", tmp_path / "last-checkpoint")  # without the cache's links
    resumed = make_trainer(tmp_path / "resumed", Linear(), max_steps=6, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "last-checkpoint"))
    uninterrupted = make_trainer(tmp_path / "uninterrupted", Linear(), max_steps=6, lr_scheduler_type="constant")
    uninterrupted.train()
    assert torch.equal(resumed.model.w, uninterrupted.model.w)


def test_files_of_an_older_last_checkpoint_are_deleted(tmp_path, hub):
    trainer = pushing(tmp_path, hub_strategy="checkpoint")
    old = hub.repos["me/it"].branches["main"]
    old[-1][1].update({"last-checkpoint/optimizer-00007-of-00009.safetensors": b"old", "notes.md": b"mine"})
    trainer.train()
    files = hub.repos["me/it"].files()
    assert "last-checkpoint/optimizer-00007-of-00009.safetensors" not in files
    assert files["notes.md"] == b"mine"
    assert "last-checkpoint/optimizer.safetensors" in files


def test_all_checkpoints_are_uploaded_as_in_the_output_directory(tmp_path, hub):
    trainer = pushing(tmp_path, hub_strategy="all_checkpoints", save_steps=1)
    trainer.train()
    out = tmp_path / "out"
    files = hub.repos["me/it"].files()
    for step in (1, 2, 3, 4):  # also those whose own upload was skipped
        name = f"checkpoint-{step}"
        assert {path: data for path, data in files.items() if path.startswith(f"{name}/")} == repository_files(
            out / name, f"{name}/"
        )


class Gate:
    """A fault that blocks a commit until it is opened."""

    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        self.opened.wait()


class OpensGate(TrainerCallback):
    """Waits until an upload has begun, and lets it continue at a later save."""

    def __init__(self, gate, at):
        self.gate, self.at = gate, at

    def on_save(self, args, state, control, **kwargs):
        assert self.gate.begun.wait(60)
        if state.global_step == self.at:
            self.gate.opened.set()


def test_a_save_during_an_upload_is_skipped(tmp_path, hub, caplog):
    gate = hub.faults["POST .*/commit/"] = Gate()
    trainer = pushing(tmp_path, save_steps=1, callbacks=[OpensGate(gate, at=4)])
    with caplog.at_level(logging.INFO, "fts"):
        trainer.train()
    assert hub.repos["me/it"].messages()[0] == "Training in progress, step 1"
    assert hub.repos["me/it"].messages()[-1] == "End of training"
    assert "Training in progress, step 3" not in hub.repos["me/it"].messages()
    assert "checkpoint-3 is not uploaded, because the previous upload is still running." in caplog.text


def test_always_push_uploads_every_save_in_order(tmp_path, hub):
    gate = hub.faults["POST .*/commit/"] = Gate()
    trainer = pushing(tmp_path, save_steps=1, hub_always_push=True, callbacks=[OpensGate(gate, at=4)])
    trainer.train()
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3, 4)]
    assert hub.repos["me/it"].messages() == [*steps, "End of training"]


def test_rotation_deletes_nothing_of_an_upload(tmp_path, hub):
    gate = hub.faults["POST .*/preupload/"] = Gate()  # before any file is read
    trainer = pushing(
        tmp_path,
        save_steps=1,
        save_total_limit=1,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        callbacks=[OpensGate(gate, at=4)],
    )
    saved = {}

    class RecordsCheckpoints(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.update(
                repository_files(tmp_path / "out" / f"checkpoint-{state.global_step}", f"checkpoint-{state.global_step}/")
            )

    trainer.add_callback(RecordsCheckpoints)
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    files = hub.repos["me/it"].files()
    assert {name: data for name, data in files.items() if name.startswith("checkpoint-")} == saved
    assert {name.partition("/")[0] for name in saved} == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}


def test_training_continues_during_an_upload(tmp_path, hub):
    gate = hub.faults["POST .*/commit/"] = Gate()
    steps = []

    class Opened(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((state.global_step, gate.begun.is_set()))
            if state.global_step == 3:
                assert gate.begun.wait(60)

        def on_train_end(self, args, state, control, **kwargs):
            gate.opened.set()

    pushing(tmp_path, callbacks=[Opened()], max_steps=9).train()
    assert (9, True) in steps  # the upload could not end before
    assert hub.repos["me/it"].messages()[0] == "Training in progress, step 2"


def test_waiting_for_an_upload_prints_a_message(tmp_path, hub, capsys):
    pushing(tmp_path, disable_tqdm=False).train()
    assert "Uploading 'End of training' to me/it (0.0 MiB) …" in capsys.readouterr().err
    pushing(tmp_path, disable_tqdm=True).train()
    assert "Uploading" not in capsys.readouterr().err


def test_push_to_hub_gives_the_commit(tmp_path, hub):
    trainer = make_trainer(tmp_path / "out", Linear(), hub_token=TOKEN)  # without push_to_hub
    found = trainer.push_to_hub("First", tags="mine")
    assert isinstance(found, CommitInfo)
    assert found.startswith(f"{hub.url}/me/out/commit/")
    assert trainer.hub_model_id == "me/out"
    assert hub.repos["me/out"].messages() == ["First"]
    assert b"- mine\n" in hub.repos["me/out"].files()["README.md"]


def test_push_to_hub_without_blocking(tmp_path, hub):
    gate = hub.faults["POST .*/commit/"] = Gate()
    trainer = pushing(tmp_path)
    future = trainer.push_to_hub(blocking=False)
    assert gate.begun.wait(60)
    assert not future.done()
    trainer.model.w.data.fill_(7.0)  # what is uploaded is what was saved
    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    gate.opened.set()
    assert future.result(60).commit_message == "End of training"
    assert hub.repos["me/it"].files()["model.safetensors"] == saved


def test_an_unchanged_push_makes_no_commit(tmp_path, hub):
    trainer = pushing(tmp_path)
    trainer.train()
    before = hub.repos["me/it"].messages()
    assert trainer.push_to_hub().startswith(hub.url)
    assert hub.repos["me/it"].messages() == before


def test_hub_revision_names_a_branch(tmp_path, hub):
    trainer = pushing(tmp_path, hub_revision="dev/one")
    trainer.train()
    assert hub.repos["me/it"].messages("dev/one")[-1] == "End of training"
    assert hub.repos["me/it"].messages() == []
    trainer.push_to_hub("Elsewhere", revision="other")
    assert hub.repos["me/it"].messages("other") == ["Elsewhere"]
    assert trainer.save_model() is None
    assert hub.repos["me/it"].messages("other") == ["Elsewhere"]  # for that one call


def test_callbacks_get_on_push_begin(tmp_path, hub):
    events = []

    class RecordsPush(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            events.append((state.global_step, threading.current_thread() is threading.main_thread()))

    pushing(tmp_path, hub_always_push=True, callbacks=[RecordsPush()]).train()
    assert events == [(2, True), (4, True), (4, True)]


def test_commit_messages_name_epochs(tmp_path, hub):
    pushing(tmp_path, save_strategy="epoch", max_steps=-1, num_train_epochs=2, count=8, hub_always_push=True).train()
    assert hub.repos["me/it"].messages()[:2] == ["Training in progress, epoch 1", "Training in progress, epoch 2"]


def test_other_files_are_uploaded_but_not_hidden_ones(tmp_path, hub):
    out = tmp_path / "out"
    for name in ("runs/events.0", "all_results.json", "_private.txt", ".secret", "checkpoint-99/model.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    pushing(tmp_path, save_strategy="no").push_to_hub()
    assert set(hub.repos["me/it"].files()) == MODEL | {"runs/events.0", "all_results.json"}


def test_large_files_are_uploaded_in_parts(tmp_path, hub):
    class Large(Linear):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Parameter(torch.randn(PART))

    trainer = pushing(tmp_path, Large())
    trainer.push_to_hub()
    assert len(hub.matching_requests("PUT /storage/.*/")) == 5
    assert hub.repos["me/it"].files()["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_small_files_with_xet_storage(tmp_path, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs = False  # then no file is for the other service
    trainer = pushing(tmp_path, hub_strategy="checkpoint")
    trainer.train()
    out = tmp_path / "out"
    expected = {name: (out / name).read_bytes() for name in MODEL} | repository_files(out / "checkpoint-4", "last-checkpoint/")
    assert hub.repos["me/it"].files() == expected


def test_transformers_models_tokenizers_and_adapters(tmp_path, hub):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from tokenizers import Tokenizer, models

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16
    )
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": [1, 2, 2], "labels": i % 2} for i in range(16)]
    changes = {"train_dataset": data, "eval_dataset": None, "processing_class": tokenizer, "max_steps": 2, "save_steps": 1}
    trainer = pushing(tmp_path, model, **changes)
    trainer.train()
    folder = snapshot_download("me/it", cache_dir=tmp_path / "cache", endpoint=hub.url)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))
    assert transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [2]

    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    trainer = pushing(tmp_path / "peft", adapted, hub_model_id="me/adapters", hub_strategy="checkpoint", **changes)
    trainer.train()
    files = hub.repos["me/adapters"].files()
    at_root = {name for name in files if "/" not in name}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= at_root
    assert "model.safetensors" not in at_root
    _, first = hub.repos["me/adapters"].branches["main"][1]
    assert {name for name in first if "/" not in name} - {".gitattributes"} == at_root
    assert "last-checkpoint/trained.safetensors" in files


def test_an_overridden_save_model_uploads_once(tmp_path, hub):
    class Mine(Trainer):
        saved = 0

        def save_model(self, output_dir=None):  # without `_internal_call`
            self.saved += 1
            super().save_model(output_dir)

    made = pushing(tmp_path)
    trainer = Mine(Linear(), made.args, train_dataset=made.train_dataset, eval_dataset=made.eval_dataset)
    trainer.train()
    assert trainer.saved == 3
    assert "Model save" not in hub.repos["me/it"].messages()
    trainer.save_model()
    trainer.model.w.data.fill_(3.0)
    trainer.save_model()
    assert hub.repos["me/it"].messages()[-1] == "Model save"


def test_an_overridden_card_is_uploaded(tmp_path, hub):
    class Mine(Trainer):
        def create_model_card(self, model_name=None, **kwargs):
            (tmp_path / "out" / "README.md").write_text(f"# {model_name}, mine\n")

    made = pushing(tmp_path)
    Mine(Linear(), made.args, train_dataset=made.train_dataset).train()
    assert hub.repos["me/it"].files()["README.md"] == b"# it, mine\n"


def test_the_best_model_is_the_last_upload(tmp_path, hub):
    trainer = pushing(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        greater_is_better=True,  # so that the first is the best
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    assert hub.repos["me/it"].files()["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    from safetensors.torch import load

    assert torch.equal(load(hub.repos["me/it"].files()["model.safetensors"])["w"], trainer.model.w)
    assert b"Validation Loss" in hub.repos["me/it"].files()["README.md"]


def test_no_token_is_in_any_file_or_line(tmp_path, hub, caplog, capsys):
    hub.faults["POST .*/commit/"] = 500
    trainer = pushing(tmp_path, hub_strategy="all_checkpoints", disable_tqdm=False)
    with caplog.at_level(logging.INFO):
        trainer.train()
        with pytest.raises(HubError) as caught:
            trainer.push_to_hub()
        hub.faults.clear()
        trainer.push_to_hub()
    written = repository_files(tmp_path / "out") | hub.repos["me/it"].files() | hub.blobs
    assert len(written) > 10
    assert [name for name, data in written.items() if TOKEN.encode() in data] == []
    output = capsys.readouterr()
    for text in (caplog.text, output.out, output.err, str(caught.value), repr(trainer.hub_session), repr(trainer.args)):
        assert TOKEN not in text


def test_a_run_that_fails_does_not_wait_for_its_upload(tmp_path, hub, caplog):
    gate = hub.faults["POST .*/commit/"] = Gate()

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                assert gate.begun.wait(60)
                raise RuntimeError("mine")

    trainer = pushing(tmp_path, callbacks=[Failing()])
    with pytest.raises(CallbackError):
        trainer.train()
    assert "does not wait for the upload of 'Training in progress, step 2' to me/it (0.0 MiB)" in caplog.text
    assert hub.repos["me/it"].messages() == []
    gate.opened.set()
    trainer.hub_session.uploads.wait_until_done(print)
    assert hub.repos["me/it"].messages() == ["Training in progress, step 2"]
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_a_callback_error_before_the_last_upload_is_raised(tmp_path, hub):
    class Failing(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            raise RuntimeError("mine")

    with pytest.raises(CallbackError, match="on_push_begin"):
        pushing(tmp_path, save_strategy="no", callbacks=[Failing()]).train()
