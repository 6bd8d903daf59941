"""The installed huggingface_hub, told in this process to use a local hub.

It reads its environment once, when it is imported, so that here its constants are replaced. Other
processes need only `Hub.env`.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_hub import Hub
from hangs import HANGS

BIG = bytes(range(251)) * 12_000  # 3 MB, no two places alike
FILES = {
    "config.json": b'{"model_type": "internvl"}',
    "model.safetensors": BIG,
    "more/deep/notes.txt": b"words",
    "more/second.safetensors": BIG[:1000],
}


@contextlib.contextmanager
def client(hub: Hub, home: Path, *, xet: bool = False, token: bool = True) -> Iterator[Any]:
    """An `HfApi` of the hub; the module's functions use it as well. Its cache is in `home`.

    Waits between tries are not slept but noted in `.slept` (seconds).
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    environment = hub.env(home, xet=xet, token=token)
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE"):
            patch.setattr(constants, name, environment[name])
        bars = sys.modules["huggingface_hub.utils.tqdm"]  # the package's attribute is the class
        patch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        for module in (_http, file_download):
            patch.setattr(module, "time", _Clock(module.time, slept))
        huggingface_hub.close_session()
        try:
            api = huggingface_hub.HfApi()
            api.slept = slept
            yield api
        finally:
            huggingface_hub.close_session()


class _Clock:
    """The module `time`, whose `sleep` notes."""

    def __init__(self, time: Any, slept: list[float]) -> None:
        self._time, self.sleep = time, slept.append

    def __getattr__(self, name: str) -> Any:
        return getattr(self._time, name)


def link(hub: Hub, name: str = "model.safetensors") -> str:
    """Where the hub sends us for a large file."""
    answer, _ = asked(f"{hub.url}/org/base/resolve/main/{name}")
    return answer.headers["Location"]


def asked(url: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[Any, bytes]:
    """A plain request, and its body as far as it came."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=HANGS)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", body, headers)
        answer = connection.getresponse()
        try:
            return answer, answer.read()
        except http.client.IncompleteRead as error:
            return answer, error.partial
    finally:
        connection.close()
