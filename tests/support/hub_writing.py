"""What the local hub does for writers: new repositories, uploads of large files, commits."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hub_xet
from hub_messages import Refusal, Reply, Request, as_json
from hub_state import State
from hub_store import Blob, Repo, is_lfs_name


def create(state: State, request: Request) -> Reply:
    asked = request.json()
    user = state.user(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    owner = asked.get("organization") or user
    if owner not in {user, *state.organizations}:
        raise Refusal(
            403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
        )
    repo_id = f"{owner}/{asked['name']}"
    url = f"{state.hub_url}/{repo_id}"
    with state.store.lock:
        if repo_id in state.store.repos:
            said = {"error": "You already created this model repo", "url": url}
            return as_json(said, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        state.store.create(repo_id, private=private)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


def validate_yaml(state: State, request: Request) -> Reply:
    request.json()
    return as_json({"errors": [], "warnings": []})


def preupload(state: State, request: Request, repo_id: str, revision: str) -> Reply:
    commit = state.writable(request, repo_id).at(revision)
    asked = request.json()
    patterns = [line for line in asked.get("gitIgnore", "").split() if not line.startswith("#")]
    answers = []
    for file in asked["files"]:
        name, sample = file["path"], base64.b64decode(file["sample"])
        large = is_lfs_name(name) or file["size"] >= state.large or b"\0" in sample
        ignored = state.ignore(name) or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        answer = {
            "path": name,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": ignored,
        }
        if name in commit.files:
            answer["oid"] = commit.files[name].etag
        answers.append(answer)
    return as_json({"files": answers, "commitOid": commit.sha})


def batch(state: State, request: Request, repo_id: str) -> Reply:
    """What is to be sent where: nothing, one body, or parts."""
    repo = state.writable(request, repo_id)
    asked = request.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise Refusal(422, "only uploads by sha256")
    parts_allowed = "multipart" in asked.get("transfers", ())
    objects = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if state.store.object(oid, repo) is None:
            by_parts = parts_allowed and size > state.part_size
            upload = _parts(state, oid, size) if by_parts else _whole(state, oid, size)
            verify = {"href": f"{state.hub_url}/{repo.id}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


def _signed(state: State, base: str, path: str) -> str:
    return f"{base}{path}?{state.links.query(path)}"


def _whole(state: State, oid: str, size: int) -> dict[str, Any]:
    return {"href": _signed(state, state.content_url, f"/upload/{oid}/{size}")}


def _parts(state: State, oid: str, size: int) -> dict[str, Any]:
    upload = next(state.store.numbers)
    step = state.part_size
    header = {"chunk_size": str(step)}
    for number in range(-(-size // step)):
        length = min(step, size - number * step)
        path = f"/part/{oid}/{upload}/{number + 1}/{number * step}/{length}"
        header[str(number + 1)] = _signed(state, state.content_url, path)
    return {
        "href": _signed(state, state.hub_url, f"/complete/{oid}/{upload}/{size}"),
        "header": header,
    }


def put_whole(state: State, request: Request, oid: str, size: str) -> Reply:
    state.links.check(request.raw_path, request.query)
    part = state.store.uploads / f"{oid}.{next(state.store.numbers)}"
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            for piece in request.pieces():
                file.write(piece)
                digest.update(piece)
        if (request.received, digest.hexdigest()) != (int(size), oid):
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        state.store.keep(part, oid)
    finally:
        part.unlink(missing_ok=True)
    return Reply(200, {"ETag": f'"{oid}"'})


def put_part(
    state: State, request: Request, oid: str, upload: str, number: str, start: str, length: str
) -> Reply:
    """A part goes to its place in the file that will be the object."""
    state.links.check(request.raw_path, request.query)
    digest = hashlib.md5()
    file = os.open(_upload_file(state, oid, upload), os.O_CREAT | os.O_WRONLY)
    try:
        at = int(start)
        for piece in request.pieces():
            os.pwrite(file, piece, at)
            digest.update(piece)
            at += len(piece)
    finally:
        os.close(file)
    if request.received != int(length):
        raise Refusal(400, "IncompleteBody")
    etag = f'"{digest.hexdigest()}"'
    with state.store.lock:
        state.store.parts.setdefault((oid, upload), {})[int(number)] = etag
    return Reply(200, {"ETag": etag})


def complete(state: State, request: Request, oid: str, upload: str, size: str) -> Reply:
    state.links.check(request.raw_path, request.query)
    asked = request.json()
    etags = {part["partNumber"]: part["etag"] for part in asked["parts"]}
    path = _upload_file(state, oid, upload)
    if asked["oid"] != oid or etags != state.store.parts.get((oid, upload)):
        raise Refusal(400, "InvalidPart")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (path.stat().st_size, digest) != (int(size), oid):
        raise Refusal(400, "the parts are not the object")
    state.store.keep(path, oid)
    return as_json({"success": True})


def _upload_file(state: State, oid: str, upload: str) -> Path:
    return state.store.uploads / f"{oid}.parts.{int(upload)}"


def verify(state: State, request: Request, repo_id: str) -> Reply:
    repo = state.writable(request, repo_id)
    asked = request.json()
    blob = state.store.object(asked["oid"], repo)
    if blob is None or blob.size != asked["size"]:
        raise Refusal(404, "Object does not exist")
    return as_json({"message": "Success"})


def xet_token(state: State, request: Request, repo_id: str, kind: str, revision: str) -> Reply:
    repo = (state.writable if kind == "write" else state.readable)(request, repo_id)
    if revision != "None":  # of a pull request that is not there yet
        repo.at(revision)
    url, token, until = f"local://{state.store.cas}", "xet_of_the_local_hub", hub_xet.LATER
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(until),
    }
    return as_json({"casUrl": url, "accessToken": token, "exp": until}, **headers)


def commit(state: State, request: Request, repo_id: str, ref: str) -> Reply:
    """All lines are judged before anything changes."""
    repo = state.writable(request, repo_id)
    try:
        lines = [json.loads(line) for line in request.body().splitlines()]
    except ValueError:
        raise Refusal(400, "a line is not JSON") from None
    if not lines or lines[0]["key"] != "header":
        raise Refusal(400, "the header is missing")
    header = lines[0]["value"]
    if not header.get("summary"):
        raise Refusal(400, "the summary is empty")
    with state.store.lock:
        if ref in repo.commits and ref not in repo.refs:
            raise Refusal(400, "a commit takes none")
        head = repo.at(ref)
        if header.get("parentCommit") not in {None, head.sha}:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        pointed = {line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
        hub_xet.fetch(state.store, {oid for oid in pointed if not state.store.object(oid, repo)})
        changes: dict[str, Blob | None] = {}
        for line in lines[1:]:
            changes |= _change(state, repo, head.files, line["key"], line["value"])
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        parent = None
        if request.query.get("create_pr") == "1":
            number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
            ref, parent = f"refs/pr/{number}", head.sha
            answer["pullRequestUrl"] = f"{state.hub_url}/{repo.id}/discussions/{number}"
        made = state.store.commit(repo, changes, header["summary"], ref=ref, parent=parent)
    answer |= {
        "commitOid": made.sha,
        "commitUrl": f"{state.hub_url}/{repo.id}/commit/{quote(made.sha)}",
    }
    return as_json(answer)


def _change(
    state: State, repo: Repo, files: Any, key: str, value: dict[str, Any]
) -> dict[str, Blob | None]:
    name = value["path"]
    if key == "file":
        content = value["content"].encode()
        if value.get("encoding") == "base64":
            content = base64.b64decode(content, validate=True)
        return {name: state.store.blob(content, lfs=False)}
    if key == "lfsFile":
        oid = value["oid"]
        blob = state.store.object(oid, repo)
        if blob is None:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {name}")
        if value.get("size", blob.size) != blob.size:
            raise Refusal(400, f"the size of {name} is {blob.size}")
        return {name: blob}
    if key == "deletedFile":
        if name not in files:
            raise Refusal(400, f"there is no {name} to delete")
        return {name: None}
    if key == "deletedFolder":
        return {file: None for file in files if file.startswith(f"{name.rstrip('/')}/")}
    raise Refusal(400, f"unknown line {key}")
