"""Whether a repository can be written to is checked before time is spent on training."""

import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants

from fts.errors import FtsError, HubError
from fts.trainer.hub.repository import Repository, hidden_progress_bars, read_timeout
from tests.trainer.helpers import Linear, make_trainer
from tests.trainer.hub.server import READER, TOKEN


def pushing(tmp_path, **changes):
    return make_trainer(tmp_path / "out", Linear(), **({"push_to_hub": True, "hub_token": TOKEN} | changes))


@pytest.mark.parametrize(("given", "expected"), [("us/it", "us/it"), ("it", "me/it"), (None, "me/out")])
def test_repository_names(tmp_path, hub, given, expected):
    trainer = pushing(tmp_path, hub_model_id=given)
    assert trainer.hub_model_id == expected
    assert list(hub.repos) == [expected]
    trainer.init_hf_repo()  # 409, since it exists
    assert trainer.hub_model_id == expected
    assert len(hub.created) == 1


def test_there_are_no_requests_unless_requested(tmp_path, hub):
    trainer = make_trainer(tmp_path, Linear(), hub_token=TOKEN, max_steps=2)
    trainer.train()
    assert trainer.hub_model_id is None
    trainer.save_model()
    assert hub.requests == []
    trainer.init_hf_repo()
    assert trainer.hub_model_id == f"me/{tmp_path.name}"


@pytest.mark.parametrize(("private", "expected"), [(True, "private"), (False, "public"), (None, None)])
def test_private_or_not(tmp_path, hub, private, expected):
    pushing(tmp_path, hub_private_repo=private)
    assert [request.get("visibility") for request in hub.created] == [expected]


def test_private_for_one_call(tmp_path, hub):
    trainer = make_trainer(tmp_path, Linear(), hub_token=TOKEN)
    trainer.init_hf_repo(private=True)
    assert hub.created[0]["visibility"] == "private"


def test_tokens(tmp_path, hub, monkeypatch):
    refused = {
        "wrong": "401 .*Invalid credentials.* The attempt used hub_token. Log in with `hf auth login`",
        READER: "403 .*don't have the rights.* The attempt used hub_token",
        None: "no token was found. The attempt used the token of the login. Log in with `hf auth login`, set HF_TOKEN",
    }
    for token, message in refused.items():
        with pytest.raises(HubError, match=f"^out on the Hub cannot be written to: .*{message}") as caught:
            pushing(tmp_path, hub_token=token)
        assert caught.value.refused
        assert READER not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pushing(tmp_path, hub_token=None).hub_model_id == "me/out"
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert pushing(tmp_path, hub_token=None).hub_model_id == "me/out"
    with pytest.raises(HubError, match="401"):
        pushing(tmp_path, hub_token=None).init_hf_repo(token="other")
    trainer = make_trainer(tmp_path / "other", Linear(), hub_token="wrong")
    assert trainer.push_to_hub(token=TOKEN).startswith(hub.url)


def test_a_read_only_repository_is_refused_at_once(tmp_path, hub):
    hub.faults["GET .*/auth-check/write"] = 403
    with pytest.raises(HubError, match=r"^out on the Hub cannot be written to: 403"):
        pushing(tmp_path)


def test_a_hub_without_the_access_check_is_trusted(tmp_path, hub):
    hub.faults["GET .*/auth-check/write"] = 404
    assert pushing(tmp_path).hub_model_id == "me/out"


def test_an_organization_of_others(tmp_path, hub):
    with pytest.raises(HubError, match=r"theirs/it on the Hub cannot be written to: 403 .*rights to create a model"):
        pushing(tmp_path, hub_model_id="theirs/it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_model_id": "a b/c"}, "a b/c on the Hub cannot be written to: HFValidationError: .*See hub_model_id"),
        ({"hub_revision": "0" * 40}, "hub_revision='0{40}' is a commit, .* Give a branch"),
    ],
)
def test_invalid_names(tmp_path, hub, changes, message):
    with pytest.raises(HubError, match=message):
        pushing(tmp_path, **changes)


def test_offline(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"OfflineModeIsEnabled.* Unset HF_HUB_OFFLINE, or leave push_to_hub out"):
        pushing(tmp_path)
    assert hub.requests == []


def test_a_branch_is_created_once(hub):
    for _ in range(2):
        assert Repository("it", token=TOKEN, revision="dev").open() == "me/it"
    Repository("it", token=TOKEN, revision="refs/pr/1").open()
    Repository("it", token=TOKEN, revision="main").open()
    assert set(hub.repos["me/it"].branches) == {"main", "dev"}


def test_a_token_in_an_answer_is_not_repeated(tmp_path, hub, caplog):
    repository = Repository("it", token=TOKEN)
    assert TOKEN not in repr(repository)
    hub.faults["POST /api/repos/create"] = "echo"
    with pytest.raises(HubError, match="400 Bad Request: what is Bearer <token>") as caught:
        repository.open()
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    hub.faults.clear()
    trainer = pushing(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    hub.faults["POST .*/preupload/"] = "echo"
    trainer.train()
    assert "Bearer <token>" in caplog.text
    assert TOKEN not in caplog.text


def test_errors_are_ours():
    assert issubclass(HubError, FtsError)
    assert issubclass(HubError, RuntimeError)
    assert not HubError("text").refused


def test_requests_time_out_unless_the_user_sets_a_timeout(hub):
    from huggingface_hub.utils import get_session

    client = get_session()
    assert client.timeout.read is None
    with read_timeout():
        assert client.timeout.read == 120
    assert client.timeout.read is None
    client.timeout = 7
    with read_timeout():
        assert client.timeout.read == 7
    assert client.timeout.read == 7


def test_progress_bars_are_hidden_and_restored():
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    assert not are_progress_bars_disabled()
    with hidden_progress_bars():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    with hidden_progress_bars():
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled()
    enable_progress_bars()
