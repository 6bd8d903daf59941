"""What the local hub answers to readers: model info, trees, files, and the content behind links."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote

from hub_messages import Refusal, Reply, Request, as_json, ranged
from hub_state import State
from hub_store import Blob, Commit, Repo

TEXT = (".json", ".txt", ".md", ".py", ".jinja")


def whoami(state: State, request: Request) -> Reply:
    if state.user(request) is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in state.organizations]
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return as_json({"type": "user", "name": state.name, "orgs": orgs, "auth": token})


def model_info(state: State, request: Request, repo_id: str, revision: str = "main") -> Reply:
    repo = state.readable(request, repo_id)
    commit = repo.at(revision)
    siblings: list[dict[str, Any]] = []
    for name, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": name}
        if request.query.get("blobs", "").lower() in {"true", "1"}:
            entry = _entry(state, name, blob)
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                lfs = entry["lfs"]
                sibling["lfs"] = {
                    "sha256": lfs["oid"],
                    **{k: lfs[k] for k in ("size", "pointerSize")},
                }
        siblings.append(sibling)
    return as_json(
        {
            "_id": f"{abs(hash(repo.id)):024x}"[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": commit.date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    )


def tree(
    state: State, request: Request, repo_id: str, revision: str, folder: str | None = None
) -> Reply:
    commit = state.readable(request, repo_id).at(revision)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    recursive = request.query.get("recursive", "").lower() in {"true", "1"}
    files, folders = {}, set()
    for name, blob in commit.files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))}
        if recursive or len(parts) == 1:
            files[name] = blob
    if prefix and not files and not folders:
        raise _no_entry(commit)
    if not recursive:
        folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
    names = sorted([*files, *folders])
    start, size = int(request.query.get("cursor", "0")), state.page
    listed = [
        _described(state, request, commit, name, files.get(name))
        for name in names[start : start + size]
    ]
    reply = as_json(listed)
    if start + size < len(names):
        rest = {k: v for k, v in request.query.items() if k != "cursor"} | {"cursor": start + size}
        query = "&".join(f"{key}={quote(str(value))}" for key, value in rest.items())
        reply.headers["Link"] = f'<{state.hub_url}{request.raw_path}?{query}>; rel="next"'
    return reply


def commits(state: State, request: Request, repo_id: str, revision: str) -> Reply:
    """From this one back to the first."""
    repo = state.readable(request, repo_id)
    return as_json(
        [
            {
                "id": commit.sha,
                "title": commit.message,
                "message": "",
                "date": commit.date,
                "authors": [{"user": state.name}],
            }
            for commit in repo.history(revision)
        ]
    )


def refs(state: State, request: Request, repo_id: str) -> Reply:
    repo = state.readable(request, repo_id)
    kinds: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": []}
    for name, sha in repo.refs.items():
        kind = "pullRequests" if name.startswith("refs/pr/") else "branches"
        ref = name if name.startswith("refs/") else f"refs/heads/{name}"
        kinds[kind].append({"name": name, "ref": ref, "targetCommit": sha})
    return as_json(kinds | {"tags": [], "converts": []})


def log(state: State, request: Request) -> Reply:
    """Of this hub only, for who started it as a process: what was asked, and where the heads are."""
    seen = [
        {
            name: getattr(r, name)
            for name in ("method", "port", "path", "range", "status", "bytes", "received", "faults")
        }
        for r in state.settled(but=request)
    ]
    heads = {repo.id: repo.refs for repo in state.store.repos.values()}
    return as_json({"requests": seen, "refs": heads, "errors": state.errors})


def paths_info(state: State, request: Request, repo_id: str, revision: str) -> Reply:
    commit = state.readable(request, repo_id).at(revision)
    if "json" in request.headers.get("Content-Type", ""):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body().decode()).get("paths", [])
    listed = []
    for path in paths:
        inside = [name for name in commit.files if name.startswith(f"{path}/")]
        if path in commit.files or inside:
            listed.append(_described(state, request, commit, path, commit.files.get(path)))
    return as_json(listed)


def resolve(state: State, request: Request, repo_id: str, revision: str, name: str) -> Reply:
    """A small file is answered at once, a large one by a link to the content port."""
    repo = state.readable(request, repo_id)
    commit = repo.at(revision)
    _may_read_files(state, request, repo)
    blob = commit.files.get(name)
    if blob is None:
        raise _no_entry(commit)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if not blob.lfs:
        headers["ETag"] = f'"{blob.oid}"'
        if name.endswith(TEXT) and "gzip" in request.headers.get("Accept-Encoding", ""):
            # As the real one: no length, and no ranges.
            body = gzip.compress(blob.read_bytes(), 1)
            headers["ETag"] = f'W/"{blob.oid}"'
            return Reply(200, headers | {"Content-Encoding": "gzip"}, [body], chunked=True)
        return ranged(request, blob.content(), headers)
    headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
    if xet_hash := state.store.xet_hashes.get(blob.sha256):
        headers["X-Xet-Hash"] = xet_hash
        token = f"{state.hub_url}/api/models/{repo.id}/xet-read-token/{commit.sha}"
        headers["Link"] = f'<{token}>; rel="xet-auth"'
    path = f"/{repo.id}/{commit.sha}/{quote(name)}"
    headers["Location"] = f"{state.content_url}{path}?{state.links.query(path)}"
    return Reply(302, headers, [b"Found. Redirecting"])


def content(state: State, request: Request, repo_id: str, sha: str, name: str) -> Reply:
    """The content port knows links, not people: a token here is a leak, as S3 treats it."""
    if "Authorization" in request.headers:
        raise Refusal(400, "Only one auth mechanism allowed")
    state.links.check(request.raw_path, request.query)
    blob = state.store.repo(repo_id).at(sha).files[name]
    kind = {"ETag": f'"{blob.sha256}"', "Content-Type": "binary/octet-stream"}
    return ranged(request, blob.content(), kind)


def _may_read_files(state: State, request: Request, repo: Repo) -> None:
    user = state.user(request)
    if repo.gated and user is None:
        message = (
            f"Access to model {repo.id} is restricted. You must be authenticated to access it."
        )
        raise Refusal(401, message, "GatedRepo")
    if repo.gated and not repo.granted:
        message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
        raise Refusal(403, message, "GatedRepo")


def _no_entry(commit: Commit) -> Refusal:
    refusal = Refusal(404, "Entry not found", "EntryNotFound")
    refusal.headers = {"X-Repo-Commit": commit.sha}
    return refusal


def _entry(state: State, name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
    if blob.lfs:
        lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        entry["lfs"] = lfs
        if xet_hash := state.store.xet_hashes.get(blob.sha256):
            entry["xetHash"] = xet_hash
    return entry


def _described(
    state: State, request: Request, commit: Commit, name: str, blob: Blob | None
) -> dict[str, Any]:
    if blob is None:
        return {"type": "directory", "oid": _folder_id(name, commit.files), "size": 0, "path": name}
    entry = _entry(state, name, blob)
    if request.query.get("expand", "").lower() in {"true", "1"}:
        entry["lastCommit"] = {"id": commit.sha, "title": commit.message, "date": commit.date}
    return entry


def _folder_id(name: str, files: Iterable[str]) -> str:
    inside = sorted(file for file in files if file.startswith(f"{name}/"))
    return f"{abs(hash(tuple(inside))):040x}"[:40]
