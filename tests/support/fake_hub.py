"""A Hugging Face hub on this machine, for tests: the real client takes it through `HF_ENDPOINT`.

    with Hub(tmp_path / "hub") as hub:
        hub.add_repo("org/base", folder)
        hub.fail(Drop(after=1000), path="*.safetensors", port="content")
        subprocess.run([...], env=os.environ | hub.env())
        assert [r.status for r in hub.requests if r.port == "content"] == [206, 206]

By hand, or for measurements: `python tests/support/fake_hub.py --root DIR --repo org/base=FOLDER` prints
the environment as JSON and serves until it is terminated; `/api/local-hub/log` tells what was asked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import hub_reading
import hub_writing
import hub_xet
from hub_faults import Fault, Faults, Rule
from hub_messages import Request
from hub_server import Routes, Server
from hub_state import State
from hub_store import Blob, Commit, Store, files_of, is_lfs_name

Content = bytes | str | Path

ID = r"((?:[^/]+/)??[^/]+)"
ROUTES: Routes = [
    (port, method, re.compile(pattern), endpoint)
    for port, method, pattern, endpoint in (
        ("hub", "GET", "/api/whoami-v2", hub_reading.whoami),
        ("hub", "GET", "/api/models/([^/]+/(?!refs$)[^/]+|[^/]+)", hub_reading.model_info),
        ("hub", "GET", f"/api/models/{ID}/revision/([^/]+)", hub_reading.model_info),
        ("hub", "GET", f"/api/models/{ID}/tree/([^/]+)(?:/(.+))?", hub_reading.tree),
        ("hub", "GET", f"/api/models/{ID}/commits/([^/]+)", hub_reading.commits),
        ("hub", "GET", f"/api/models/{ID}/refs", hub_reading.refs),
        ("hub", "GET", "/api/local-hub/log", hub_reading.log),
        ("hub", "POST", f"/api/models/{ID}/paths-info/([^/]+)", hub_reading.paths_info),
        ("hub", "GET", f"/api/models/{ID}/xet-(read|write)-token/([^/]+)", hub_writing.xet_token),
        ("hub", "POST", f"/api/models/{ID}/preupload/([^/]+)", hub_writing.preupload),
        ("hub", "POST", f"/api/models/{ID}/commit/([^/]+)", hub_writing.commit),
        ("hub", "POST", "/api/repos/create", hub_writing.create),
        ("hub", "POST", "/api/validate-yaml", hub_writing.validate_yaml),
        ("hub", "POST", rf"/{ID}\.git/info/lfs/objects/batch", hub_writing.batch),
        ("hub", "POST", rf"/{ID}\.git/info/lfs/verify", hub_writing.verify),
        ("hub", "POST", r"/complete/(\w+)/(\d+)/(\d+)", hub_writing.complete),
        ("hub", "GET", f"/{ID}/resolve/([^/]+)/(.+)", hub_reading.resolve),
        ("content", "GET", "/([^/]+/[^/]+|[^/]+)/([0-9a-f]{40})/(.+)", hub_reading.content),
        ("content", "PUT", r"/upload/(\w+)/(\d+)", hub_writing.put_whole),
        ("content", "PUT", r"/part/(\w+)/(\d+)/(\d+)/(\d+)/(\d+)", hub_writing.put_part),
    )
]


class Hub:
    """A running hub. Its own files are in `root` and go when it closes; served files stay where they are.

    `page`, `part_size`, `large`, `ignore`, `token`, `name`, `organizations`: see `hub_state.State`.
    """

    def __init__(
        self, root: Path, *, port: int = 0, content_port: int = 0, **settings: Any
    ) -> None:
        self.root = Path(root)
        self.state = State(Store(self.root), **settings)
        self.faults = Faults()
        self._hub = Server("hub", port, self.state, self.faults, ROUTES)
        self._content = Server("content", content_port, self.state, self.faults, ROUTES)
        self.state.hub_url, self.state.content_url = self._hub.url, self._content.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        if error[0] is None and self.state.errors:
            raise AssertionError("\n".join(["the hub itself failed:", *self.state.errors]))

    def close(self) -> None:
        self.state.stop.set()
        for server in (self._hub, self._content):
            server.close()
        self.state.store.close()

    @property
    def answering(self) -> bool:
        """Whether some client is still being answered, or heard."""
        return any(server.threads for server in (self._hub, self._content))

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return self._hub.url

    @property
    def token(self) -> str:
        return self.state.token

    # Repositories

    def add_repo(
        self,
        repo_id: str,
        files: Path | Mapping[str, Content],
        *,
        lfs: Callable[[str], bool] = is_lfs_name,
        private: bool = False,
        gated: bool = False,
        granted: bool = False,
        xet: bool = False,
        message: str = "initial commit",
    ) -> str:
        """A repository of the files of a folder, or of contents by name; returns its commit.

        private: only who has the token sees it. gated: everyone sees it, only with the token and
        `granted` are its files given. xet: large files are offered by xet too. Files on disk are
        served from there, so they must not change.
        """
        with self.state.store.lock:
            repo = self.state.store.create(repo_id, private=private)
            repo.gated, repo.granted = gated, granted
        sha = self.advance(repo_id, files, message=message, lfs=lfs)
        if xet:
            hub_xet.offer(self.state.store, [b for b in repo.head.files.values() if b.lfs])
        return sha

    def advance(
        self,
        repo_id: str,
        changes: Path | Mapping[str, Content | None],
        *,
        ref: str = "main",
        message: str = "another commit",
        lfs: Callable[[str], bool] = is_lfs_name,
    ) -> str:
        """A new commit with these files changed, those of None deleted; returns it."""
        store = self.state.store
        named = files_of(changes) if isinstance(changes, Path) else changes
        blobs = {
            name: None
            if content is None
            else store.blob(
                content.encode() if isinstance(content, str) else content, lfs=lfs(name)
            )
            for name, content in named.items()
        }
        return store.commit(store.repo(repo_id), blobs, message, ref=ref).sha

    def head(self, repo_id: str, ref: str = "main") -> str:
        return self.state.store.repo(repo_id).refs[ref]

    def commits(self, repo_id: str, ref: str = "main") -> list[Commit]:
        """From the head back to the first one."""
        return self.state.store.repo(repo_id).history(ref)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Blob]:
        """What is there, by name: `.path`, `.size`, `.lfs`, `.sha256`, `.oid`, `.read_bytes()`."""
        return dict(self.state.store.repo(repo_id).at(revision).files)

    def exists(self, repo_id: str) -> bool:
        return repo_id in self.state.store.repos

    # Clients

    def env(
        self, home: Path | None = None, *, xet: bool = False, token: bool = True
    ) -> dict[str, str]:
        """Environment variables for a process that is to use this hub, with a fresh cache."""
        if home is None:
            home = Path(tempfile.mkdtemp(prefix="home-", dir=self.root))
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN": self.token if token else "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_XET_TELEMETRY_ENABLED": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # Faults and the log

    def fail(
        self,
        fault: Fault,
        path: str = "*",
        *,
        method: str = "*",
        port: str | None = None,
        nth: int = 1,
        times: int | None = 1,
        when: Callable[[Request], bool] = lambda request: True,
    ) -> Rule:
        """The nth request that fits, and the `times - 1` after it, meet this fault (None: always).

        path: a pattern as of `fnmatch` for the unquoted path. Content is at `/<id>/<commit>/<name>`,
        uploads at `/upload/<sha256>/<size>` and `/part/<sha256>/<upload>/<number>/<start>/<length>`.
        """
        rule = Rule(fault, method, path, port, nth, times, when)
        self.faults.rules.append(rule)
        return rule

    @property
    def unused(self) -> list[Rule]:
        """Rules that wait for their request still."""
        return [rule for rule in self.faults.rules if rule.times is not None]

    @property
    def requests(self) -> list[Request]:
        """All so far, oldest first; those being answered are waited for."""
        return self.state.settled()

    def settle(self) -> None:
        """Wait until what was asked so far is answered, or cannot be."""
        self.state.settled()

    def forget(self) -> None:
        """The log starts anew."""
        self.state.requests.clear()

    def expire_links(self) -> None:
        self.state.links.expire()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face hub on this machine.")
    parser.add_argument("--root", type=Path, help="for uploads (default: a temporary folder)")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--xet", action="store_true", help="clients are to use xet")
    options = parser.parse_args()
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # of all threads to come, too
    with contextlib.ExitStack() as stack:
        root = options.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(Hub(root, port=options.port))
        for text in options.repo:
            repo_id, _, folder = text.partition("=")
            hub.add_repo(repo_id, Path(folder))
        print(json.dumps(hub.env(xet=options.xet)), flush=True)  # noqa: T201
        signal.sigwait(ends)


if __name__ == "__main__":
    sys.exit(main())
