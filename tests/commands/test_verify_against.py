"""`verify --against`: beside the digests of a hub, which are those of git and of LFS."""

from __future__ import annotations

import json
import shutil

import pytest
from fake_hub import Hub
from hub_commands import of_content, report, streamshard
from pairs import new_pair


@pytest.fixture
def pair(tmp_path):
    found = new_pair(tmp_path)
    (found.base / "sub").mkdir()
    (found.base / "sub" / "notes.txt").write_text("a note")
    (found.base / "empty.txt").touch()
    return found


@pytest.fixture
def hub(pair, tmp_path):
    shutil.copytree(pair.base, tmp_path / "published")
    with Hub(tmp_path / "hub") as found:
        found.add_repo("org/base", tmp_path / "published")
        yield found


def against(hub, tmp_path, path, *more, wanted="org/base"):
    line = ["verify", path, "--against", wanted, *more, "--json"]
    return streamshard(hub, tmp_path / "home", *line)


def test_the_same(hub, pair, tmp_path):
    found = report(against(hub, tmp_path, pair.base, "--strict"))
    said = found["against"]
    assert said["commit"] == hub.head("org/base")
    names = {p.relative_to(pair.base).as_posix() for p in pair.base.rglob("*") if p.is_file()}
    assert set(said["equal"]) == names
    assert said["different"] == said["extra"] == []
    assert said["missing"] == [".gitattributes"]
    assert found["problems"] == []
    assert [*of_content(hub)] == []
    text = streamshard(hub, tmp_path / "home", "verify", pair.base, "--against", "org/base").out
    assert f"{len(names)} files are equal, 0 differ" in text


SHARD = "model-00002-of-00002.safetensors"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "key", "name"),
    [
        (lambda b: flip(b / SHARD), "different", SHARD),
        (lambda b: (b / "config.json").write_text("{} "), "different", "config.json"),
        (lambda b: flip(b / "sub" / "notes.txt"), "different", "sub/notes.txt"),
        (lambda b: (b / "tokenizer_config.json").unlink(), "missing", "tokenizer_config.json"),
        (lambda b: (b / "modeling_x.py").write_text("import os"), "extra", "modeling_x.py"),
    ],
)  # fmt: skip
def test_what_differs(change, key, name, hub, pair, tmp_path):
    change(pair.base)
    got = against(hub, tmp_path, pair.base)
    assert got.code == 8, got.err
    found = json.loads(got.out)
    assert name in found["against"][key]
    assert any(problem.startswith(f"{name}: ") for problem in found["problems"])
    assert [*of_content(hub)] == []


def test_a_note_that_is_only_here_does_no_harm(hub, pair, tmp_path):
    (pair.base / "notes.md").write_text("mine")
    assert report(against(hub, tmp_path, pair.base))["against"]["extra"] == ["notes.md"]


def test_another_commit(hub, pair, tmp_path):
    first = hub.head("org/base")
    hub.advance("org/base", {"config.json": '{"model_type": "another"}'})
    assert against(hub, tmp_path, pair.base).code == 8
    found = report(against(hub, tmp_path, pair.base, wanted=f"org/base@{first}"))
    assert found["against"]["revision"] == first


def test_one_file(hub, pair, tmp_path):
    name = "model-00001-of-00002.safetensors"
    found = report(against(hub, tmp_path, pair.base / name))
    assert found["against"]["equal"] == [name]
    (pair.base / name).rename(pair.base / "renamed.safetensors")
    got = against(hub, tmp_path, pair.base / "renamed.safetensors")
    assert got.code == 8
    assert "renamed.safetensors: is not on the hub (org/base)" in got.out


def test_two_models_on_the_hub(hub, pair, tmp_path):
    hub.add_repo("org/same", tmp_path / "published")
    assert report(against(hub, tmp_path, "org/same"))["problems"] == []
    hub.advance("org/same", {"config.json": '{"model_type": "internvl_chat", "x": 1}'})
    assert against(hub, tmp_path, "org/same").code == 8


@pytest.mark.parametrize("wanted", ["here", "./org/base", "org/base/x", "hf://org/base/sub", "a b"])
def test_what_is_no_model_on_a_hub(wanted, hub, pair, tmp_path):
    got = against(hub, tmp_path, pair.base, wanted=wanted)
    assert got.code == 2
    assert "ORG/NAME@REVISION" in got.out
    assert not hub.requests


def test_offline_it_cannot_be(hub, pair, tmp_path):
    got = against(hub, tmp_path, pair.base, "--offline")
    assert got.code == 9
    assert not hub.requests


def test_a_copy_in_the_cache_that_is_damaged(hub, tmp_path):
    """Its name there is the hub's digest, which says nothing of its bytes."""
    assert report(against(hub, tmp_path, "org/base"))["against"]["different"] == []
    (copy,) = (tmp_path / "home").rglob(f"snapshots/*/{SHARD}")
    flip(copy.resolve())
    got = against(hub, tmp_path, "org/base")
    assert got.code == 8
    assert json.loads(got.out)["against"]["different"] == [SHARD]
