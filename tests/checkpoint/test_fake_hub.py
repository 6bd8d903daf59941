"""The local hub of the tests: the installed huggingface_hub takes it for the real one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import Hub
from hangs import HANGS
from hub_client import BIG, FILES, asked, client, link
from huggingface_hub import errors


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub", page=3, part_size=1_000_000) as hub:
        hub.add_repo("org/base", FILES)
        hub.forget()
        yield hub


@pytest.fixture
def api(hub, tmp_path):
    with client(hub, tmp_path / "home") as api:
        yield api


# --- reading --------------------------------------------------------------------------------------


def test_a_commit_stays_what_it_is(hub, api, tmp_path):
    first = api.resolve_revision("org/base").resolved
    assert first == hub.head("org/base")
    second = hub.advance("org/base", {"config.json": b"{}", "more/deep/notes.txt": None})
    assert api.resolve_revision("org/base").resolved == second == hub.head("org/base")
    names = [{f.path for f in api.list_repo_tree("org/base", recursive=True, revision=sha)}
             for sha in (first, second)]  # fmt: skip
    assert names[0] - names[1] == {"more/deep", "more/deep/notes.txt"}
    for sha, content in ((first, FILES["config.json"]), (second, b"{}")):
        path = api.hf_hub_download("org/base", "config.json", revision=sha)
        assert Path(path).read_bytes() == content
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info("org/base", revision="0" * 40)


def test_trees_come_in_pages_with_the_digests_of_git_and_lfs(hub, api):
    sha = hub.head("org/base")
    found = {f.path: f for f in api.list_repo_tree("org/base", recursive=True, revision=sha)}
    assert {*found} == {*FILES, ".gitattributes", "more", "more/deep"}
    assert len([r for r in hub.requests if "/tree/" in r.path]) == 3  # seven names, three a page
    for name, content in FILES.items():
        assert found[name].size == len(content)
        if name.endswith(".safetensors"):
            assert found[name].lfs.sha256 == hashlib.sha256(content).hexdigest()
            assert found[name].lfs.size == len(content)
        else:
            blob = b"blob %d\0" % len(content) + content
            assert found[name].blob_id == hashlib.sha1(blob).hexdigest()
            assert found[name].lfs is None
    flat = [f.path for f in api.list_repo_tree("org/base", "more", revision=sha)]
    assert flat == ["more/deep", "more/second.safetensors"]


def test_an_lfs_file_has_the_id_of_its_pointer(hub, tmp_path):
    """As git itself finds it."""
    blob = hub.files("org/base")["model.safetensors"]
    text = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.sha256}\nsize {len(BIG)}\n"
    )
    (tmp_path / "pointer").write_text(text)
    command = ["git", "hash-object", "--no-filters", tmp_path / "pointer"]
    assert blob.oid == subprocess.check_output(command, text=True).strip()


def test_some_files_and_the_whole_model(hub, api):
    sha = hub.head("org/base")
    found = api.get_paths_info("org/base", ["config.json", "none", "more"], revision=sha)
    assert [entry.path for entry in found] == ["config.json", "more"]
    info = api.model_info("org/base", files_metadata=True)
    assert info.sha == sha
    sizes = {s.rfilename: s.size for s in info.siblings}
    assert sizes["model.safetensors"] == len(BIG)
    assert {s.rfilename for s in info.siblings if s.lfs} == {
        name for name in FILES if name.endswith(".safetensors")
    }
    assert api.whoami()["orgs"][0]["name"] == "org"


def test_a_snapshot_is_the_files_and_is_asked_once(hub, api):
    folder = Path(api.snapshot_download("org/base", revision=hub.head("org/base")))
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES
    hub.forget()
    assert Path(api.snapshot_download("org/base", revision=folder.name)) == folder
    assert hub.requests == []


def test_a_small_text_comes_compressed_without_a_length(hub):
    """As the real hub has it, so that nobody relies on one."""
    url = f"{hub.url}/org/base/resolve/main/config.json"
    answer, _ = asked(url, **{"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.headers["Content-Length"] is None
    answer, body = asked(url, Range="bytes=2-5")
    assert (answer.status, body) == (206, FILES["config.json"][2:6])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=1000-", slice(1000, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-99999999999", slice(5, None)),
        ("bytes=1000000-2500000", slice(1_000_000, 2_500_001)),
    ],
)
def test_ranges(hub, text, part):
    answer, body = asked(link(hub), Range=text)
    start, stop, _ = part.indices(len(BIG))
    assert (answer.status, body) == (206, BIG[part])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(BIG)}"
    assert (hub.requests[-1].range, hub.requests[-1].bytes) == (text, len(body))


def test_ranges_that_are_none(hub):
    answer, body = asked(link(hub), Range=f"bytes={len(BIG)}-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(BIG)}")
    for text in ("bytes=0-1,5-6", "bytes=-", "lines=1-2"):
        answer, body = asked(link(hub), Range=text)
        assert (answer.status, body) == (200, BIG)


def test_links_are_signed_end_and_take_no_token(hub):
    good = link(hub)
    assert asked(good, "HEAD")[0].headers["Content-Length"] == str(len(BIG))
    assert asked(good.replace("model.", "other."))[0].status == 403
    assert asked(good, Authorization=f"Bearer {hub.token}")[0].status == 400
    hub.expire_links()
    assert asked(good)[0].status == 403
    good = link(hub)
    assert asked(good)[0].status == 200
    hub.state.links.seconds = -1
    assert asked(link(hub))[0].status == 403


def test_the_client_reads_headers_by_range(hub, api, tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(9)
    hub.advance("org/base", {"model.safetensors": content})
    found = api.parse_safetensors_file_metadata("org/base", "model.safetensors")
    assert found.tensors["a"].shape == [9]


# --- who may, and what is not there ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "token", "error"),
    [
        ({}, False, None),
        ({"private": True}, True, None),
        ({"private": True}, False, errors.RepositoryNotFoundError),
        ({"gated": True}, True, errors.GatedRepoError),
        ({"gated": True}, False, errors.GatedRepoError),
        ({"gated": True, "granted": True}, True, None),
        (None, True, errors.RepositoryNotFoundError),
        (None, False, errors.RepositoryNotFoundError),
    ],
)
def test_who_may_read(hub, tmp_path, repo, token, error):
    if repo is not None:
        hub.add_repo("org/some", FILES, **repo)
    with client(hub, tmp_path / "home", token=token) as api:
        if error is None:
            assert Path(api.hf_hub_download("org/some", "config.json")).exists()
            return
        with pytest.raises(error) as caught:
            api.hf_hub_download("org/some", "config.json")
        assert type(caught.value) is error
        if error is errors.GatedRepoError:  # what it is and what is in it may be seen
            assert api.resolve_revision("org/some").resolved == hub.head("org/some")


def test_what_is_not_there_and_a_wrong_token(hub, api, monkeypatch):
    with pytest.raises(errors.RemoteEntryNotFoundError):
        api.hf_hub_download("org/base", "none.json")
    with pytest.raises(errors.RevisionNotFoundError):
        api.hf_hub_download("org/base", "config.json", revision="none")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("bare")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.model_info("org/base")
    assert caught.value.response.status_code == 401


def test_another_process_needs_the_environment_only(hub):
    code = (
        "import huggingface_hub as h, pathlib\n"
        "print(pathlib.Path(h.hf_hub_download('org/base', 'config.json')).read_text())"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, env=os.environ | hub.env(), text=True)
    assert printed.strip() == FILES["config.json"].decode()


def test_by_hand(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    script = Path(__file__).parent.parent / "support" / "fake_hub.py"
    command = [sys.executable, script, "--repo", f"org/base={tmp_path / 'base'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["HF_ENDPOINT"]
            body = asked(f"{url}/org/base/resolve/main/config.json")[1]
            log = json.loads(asked(f"{url}/api/local-hub/log")[1])
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(HANGS)
    assert (code, body) == (0, b"{}")
    (request,) = log["requests"]
    assert (request["path"], request["bytes"]) == ("/org/base/resolve/main/config.json", 2)
