"""A Hub on this machine, in the place of huggingface.co."""

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from fts.trainer.hub import repository
from tests.trainer.hub.server import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that is empty; nobody is logged in. huggingface_hub tries failed requests again without waiting."""
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage is another service
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds, sleep=_http.time.sleep: sleep(min(seconds, 0.01)))
    huggingface_hub.close_session()
    yield found
    found.close()
    huggingface_hub.close_session()


@pytest.fixture
def impatient(monkeypatch):
    """A server that is silent is given up soon."""
    monkeypatch.setattr(repository, "READ_TIMEOUT", 0.3)
