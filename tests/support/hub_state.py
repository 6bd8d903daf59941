"""What the local hub knows while it runs: its repositories, who may do what, what it was told to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from hangs import HANGS
from hub_messages import Refusal, Request
from hub_store import Links, Repo, Store


@dataclass
class State:
    store: Store
    token: str = "hf_of_the_local_hub"
    name: str = "tester"
    organizations: tuple[str, ...] = ("org",)
    page: int = 1000  # entries of a tree in one answer
    part_size: int = 16_000_000  # an upload larger than this is sent in parts of so many bytes
    large: int = 10_000_000  # a file from this size on is stored by LFS, whatever its name
    ignore: Callable[[str], bool] = lambda name: False
    links: Links = field(default_factory=Links)
    hub_url: str = ""
    content_url: str = ""
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of the hub itself
    stop: threading.Event = field(default_factory=threading.Event)

    def user(self, request: Request) -> str | None:
        """Who asks; None without a token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if scheme != "Bearer" or token != self.token:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.name

    def readable(self, request: Request, repo_id: str) -> Repo:
        """A private repository of nobody we know is told as a missing one."""
        user = self.user(request)
        repo = self.store.repos.get(repo_id)
        if repo is None or (repo.private and user is None):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        repo = self.readable(request, repo_id)
        if self.user(request) is None:
            raise Refusal(401, "Invalid username or password.")
        return repo

    def settled(self, but: Request | None = None) -> list[Request]:
        """All requests so far, oldest first; those being answered are waited for."""
        seen = [request for request in self.requests if request is not but]
        for request in seen:
            assert request.done.wait(HANGS), f"{request.method} {request.target} does not end"
        return seen
