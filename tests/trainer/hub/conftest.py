"""A Hub on this machine instead of huggingface.co."""

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from fts.trainer.hub import repository
from tests.trainer.hub.server import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub without a login. huggingface_hub repeats failed requests without waiting."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage is another service
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds, sleep=_http.time.sleep: sleep(min(seconds, 0.01)))
    huggingface_hub.close_session()
    yield server
    server.close()
    huggingface_hub.close_session()


@pytest.fixture
def impatient(monkeypatch):
    """Requests to a server that does not answer time out soon."""
    monkeypatch.setattr(repository, "READ_TIMEOUT", 0.3)
