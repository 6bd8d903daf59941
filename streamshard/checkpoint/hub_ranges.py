"""TEMPORARY: replaced by the one of branch `ranges`."""

from __future__ import annotations

import io

__all__ = ["HubFile"]


class HubFile:
    """Opens ranges of a file on the hub."""

    def __init__(
        self,
        repo: str,
        commit: str,
        name: str,
        nbytes: int,
        *,
        where: str,
        sha256: str | None = None,
    ) -> None:
        from huggingface_hub import hf_hub_url

        self._url = hf_hub_url(repo, name, revision=commit)

    def open(self, start: int, stop: int) -> io.BytesIO:
        """The bytes of a range."""
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        answer = get_session().get(self._url, headers=headers, follow_redirects=True)
        answer.raise_for_status()
        return io.BytesIO(answer.content)
