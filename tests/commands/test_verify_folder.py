"""`verify` means it: the record itself, what nobody listed, what could not be compared, odd names."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pairs import LAYER, Pair
from reference import INDEX, load_file, save_file
from verify_helpers import (
    FIRST,
    RECORD,
    SECOND,
    files_of,
    flip,
    output_with_code,
    problems,
    put,
    said,
)

import streamshard
from streamshard.checkpoint.digests import file_record
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.record import read_record, sealed
from streamshard.disk.system import system
from streamshard.errors import UnreadError

Q = f"{LAYER}.q_proj.weight"


@pytest.fixture
def merged(pair: Pair) -> Path:
    return output_with_code(pair)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a record as one would who knows how it is sealed."""
    record = read_record(folder / RECORD)
    del record["record_digest"]
    change(record)
    (folder / RECORD).write_bytes(b"".join(sealed(json_pieces(record))))


def without_card(folder: Path) -> None:
    """As if made by `--card none`."""
    (folder / "README.md").unlink()
    reseal(folder, lambda record: record["digests"]["files"].pop("README.md"))


def named(report: dict[str, Any], folder: Path) -> set[str]:
    """Every file that one of the three lists names; none may be in two of them."""
    lists = [
        report["checked_files"],
        [one["name"] for one in report["not_checked"]],
        report["extra"],
    ]
    names = [name for each in lists for name in each]
    assert len(names) == len(set(names))
    assert all(one["why"] for one in report["not_checked"])
    return set(names)


# --- the record itself ----------------------------------------------------------------------------


def test_everything_is_listed_and_compared(merged):
    report = streamshard.verify(merged, strict=True)
    assert report["record"] == "whole"
    assert set(report["checked_files"]) == files_of(merged)
    assert report["not_checked"] == report["extra"] == []
    assert "examples/deep/image.jpg" in report["checked_files"]


def edited(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new, 1))

    return change


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An editor's or a script's way: parsed, changed, and written as JSON."""

    def write(file: Path) -> None:
        content = json.loads(file.read_bytes())
        change(content)
        file.write_text(json.dumps(content, indent=2) + "\n")

    return write


TAMPERED: dict[str, Callable[[Path], Any]] = {
    "key": edited(b'"digests"', b'"digestz"'),
    "empty object": lambda f: f.write_text("{}"),
    "empty": lambda f: f.write_text(""),
    "garbage": lambda f: f.write_bytes(b"\x00\xff"),
    "text of the report": edited(b'"merge-lora"', b'"merge-l0ra"'),
    "version": rewritten(lambda r: r.update(version="9")),
    "a file's record": rewritten(lambda r: r["digests"]["files"].pop("config.json")),
    "all records": rewritten(lambda r: r.pop("digests")),
    "tables": rewritten(lambda r: r["digests"].update(files={}, tensors={})),
    "own digest": rewritten(lambda r: r.pop("record_digest")),
    "written anew": lambda f: f.write_text(json.dumps(json.loads(f.read_bytes()))),
    "a space": lambda f: f.write_bytes(f.read_bytes() + b" "),
    "no last line end": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "line ends of Windows": lambda f: f.write_bytes(f.read_bytes().replace(b"\n", b"\r\n")),
    "byte order mark": lambda f: f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes()),
    "nested": lambda f: f.write_text("[" * 100_000),
    "folder": lambda f: (f.unlink(), f.mkdir()),
    "link to nothing": lambda f: (f.unlink(), f.symlink_to("gone")),
    "pipe": lambda f: (f.unlink(), os.mkfifo(f)),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_record_that_was_changed(what, merged, cli):
    TAMPERED[what](merged / RECORD)
    report = problems(merged)
    assert report["record"] == "changed"
    assert said(report, RECORD)
    assert report["checked"]["tensors"] == 4
    assert named(report, merged) >= files_of(merged)
    outcome = cli("verify", merged)
    assert outcome.code == 8
    assert RECORD in outcome.out
    assert "Traceback" not in outcome.err
    assert "is right" not in outcome.out


def test_a_changed_record_says_so_and_hides_nothing(merged):
    edited(b'"merge-lora"', b'"merge-l0ra"')(merged / RECORD)
    report = problems(merged)
    assert len(report["problems"]) == 1
    assert said(report, RECORD, "not as streamshard wrote it", "changed")
    flip(merged / "modeling_own.py", 0)
    flip(merged / SECOND, -1)
    (merged / "evil.py").write_text("")
    report = problems(merged)
    for part in ("modeling_own.py", SECOND, "evil.py", RECORD):
        assert said(report, part), part
    (merged / RECORD).write_text("{}")
    content = load_file(merged / FIRST)
    content[Q][0, 0] = float("nan")
    save_file(content, merged / FIRST, {"format": "pt"})
    assert problems(merged)["nonfinite"] == {Q: 1}


ODD_TABLES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no digests": (lambda r: r.pop("digests"), "xxh3-128"),
    "a list": (lambda r: r.update(digests=[]), "xxh3-128"),
    "null": (lambda r: r.update(digests=None), "xxh3-128"),
    "algorithm": (lambda r: r["digests"].update(algorithm="xxh3-64"), "xxh3-128"),
    "no algorithm": (lambda r: r["digests"].pop("algorithm"), "xxh3-128"),
    "files": (lambda r: r["digests"].update(files=[]), "xxh3-128"),
    "tensors": (lambda r: r["digests"].update(tensors="x"), "xxh3-128"),
    "no file": (lambda r: r["digests"].update(files={}), FIRST),
    "no tensor": (lambda r: r["digests"].update(tensors={}), Q),
    "a config left out": (lambda r: r["digests"]["files"].pop("config.json"), "config.json"),
    "code left out": (lambda r: r["digests"]["files"].pop("modeling_own.py"), "modeling_own.py"),
    "a shard left out": (lambda r: r["digests"]["files"].pop(SECOND), SECOND),
    "the index left out": (lambda r: r["digests"]["files"].pop(INDEX), INDEX),
    "a tensor left out": (lambda r: r["digests"]["tensors"].pop(Q), Q),
    "a tensor's digest": (lambda r: r["digests"]["tensors"].update({Q: None}), Q),
    "a tensor's other digest": (lambda r: r["digests"]["tensors"].update({Q: "0" * 32}), Q),
    "no bytes": (lambda r: r["digests"]["files"][FIRST].pop("bytes"), FIRST),
    "bytes of another kind": (lambda r: r["digests"]["files"][FIRST].update(bytes=True), FIRST),
    "no digest": (lambda r: r["digests"]["files"]["config.json"].pop("digest"), "config.json"),
    "SHA-256": (lambda r: r["digests"]["files"]["config.json"].update(sha256=1), "config.json"),
    "a folder above": (lambda r: _also(r, "../adapter/adapter_config.json"), "../adapter"),
    "from the root": (lambda r: _also(r, "/etc/hostname"), "/etc/hostname"),
    "written otherwise": (lambda r: _also(r, "./config.json"), "./config.json"),
    "the folder": (lambda r: _also(r, "."), "'.'"),
    "no name": (lambda r: _also(r, ""), "''"),
    "itself": (lambda r: _also(r, RECORD), RECORD),
    "a file that is not there": (lambda r: _also(r, "gone.txt"), "gone.txt"),
}


def _also(record: dict[str, Any], name: str) -> None:
    files = record["digests"]["files"]
    files[name] = files["config.json"]


@pytest.mark.parametrize("what", ODD_TABLES)
def test_a_record_that_was_changed_and_sealed_again(what, merged):
    change, expected = ODD_TABLES[what]
    reseal(merged, change)
    report = problems(merged)
    assert report["record"] == "whole"
    assert said(report, expected), report["problems"]


def test_weights_in_a_folder_that_are_recorded_count_as_bytes(merged):
    put(merged, "inner/model.safetensors")
    reseal(
        merged,
        lambda r: r["digests"]["files"].update(
            {
                "inner/model.safetensors": file_record(
                    merged / "inner/model.safetensors", sha256=False
                )
            }
        ),
    )
    assert "inner/model.safetensors" in streamshard.verify(merged)["checked_files"]
    flip(merged / "inner/model.safetensors", 0)
    assert said(problems(merged), "inner/model.safetensors", "changed")


def test_sealing_again_alone_changes_nothing(merged):
    """So that the tests above see the changes and not the way in which they are made."""
    before = (merged / RECORD).read_bytes()
    reseal(merged, lambda r: None)
    assert (merged / RECORD).read_bytes() == before


def test_without_a_record_nothing_can_be_compared(merged, cli):
    (merged / RECORD).unlink()
    outcome = cli("verify", merged)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith("no problem found; no digests to compare")
    assert "is right" not in outcome.out
    report = json.loads(cli("verify", merged, "--json").out)
    assert (report["recorded"], report["record"]) == (False, "missing")
    assert report["checked_files"] == []
    assert named(report, merged) == files_of(merged)
    outcome = cli("verify", merged, "--strict")
    assert outcome.code == 8
    assert RECORD in outcome.err
    assert "--strict" in outcome.err


# --- what nobody listed ---------------------------------------------------------------------------

HARMFUL = [
    "of two\nlines.py", "of two\nlines.bin",
    "modeling_evil.py", "MODELING.PY", "x.pyc", "__pycache__/modeling_own.cpython-311.pyc", "x.so",
    "x.so.1", "x.pyd", "x.dll", "run.sh", "a/b/.hidden/x.py", ".x.py", "pytorch_model.bin", "x.pt",
    "x.pth", "x.ckpt", "x.gguf", "tf_model.h5", "flax_model.msgpack", "x.onnx", "x.npz", "x.pkl",
    "model-00003-of-00003.safetensors", "other/model.safetensors", "X.SafeTensors",
    "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "adapter_config.json",
    "adapter_model.bin",
    "generation_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json", "x.tiktoken",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/a.jinja",
    "sub/config.json", "quantize_config.json", "model_index.json", "adapter_model.safetensors",
]  # fmt: skip
HARMLESS = [
    "README.md", "notes.txt", "picture.png", ".gitattributes", "LICENSE", "results.json", "x.csv",
    ".cache/huggingface/download/config.json.metadata",
    ".cache/huggingface/download/tokenizer.json.lock",
    ".cache/huggingface/download/added_tokens.json.metadata",
    ".cache/huggingface/.gitignore", ".git/config", "a/b/c/d.txt", "streamshard.journal",
    "sub/streamshard.json", "Readme\nof two lines.md", ".DS_Store", "python",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_code_and_weights_that_were_added(name, merged, cli):
    put(merged, name)
    report = problems(merged)
    assert report["extra"] == [name]
    assert said(report, name.replace("\n", "\\n"), "not part of this")
    outcome = cli("verify", merged)
    assert outcome.code == 8
    assert name.replace("\n", "\\n") in outcome.out


@pytest.mark.parametrize("name", HARMLESS)
def test_other_files_are_told_and_do_no_harm(name, merged, cli):
    if name == "README.md":
        without_card(merged)
    put(merged, name)
    report = streamshard.verify(merged, strict=True)
    assert report["extra"] == [name]
    assert report["problems"] == []
    assert named(report, merged) == files_of(merged)
    outcome = cli("verify", merged)
    assert outcome.code == 0
    assert "1 extra file" in outcome.out.splitlines()[-1]
    assert name.replace("\n", "\\n") in outcome.out


def test_many_harmless_files_are_shortened_for_people(merged, cli):
    for number in range(500):
        put(merged, f"logs/{number}.txt")
    outcome = cli("verify", merged)
    assert outcome.code == 0
    assert "488 more" in outcome.out
    assert len(outcome.out) < 2000
    assert len(json.loads(cli("verify", merged, "--json").out)["extra"]) == 500


def test_empty_folders_links_and_pipes(merged):
    (merged / "empty" / "inner").mkdir(parents=True)
    (merged / "gone.txt").symlink_to("nowhere")
    (merged / "self").symlink_to("self")
    (merged / "same.txt").symlink_to("config.json")
    os.mkfifo(merged / "pipe")
    report = streamshard.verify(merged)
    assert report["extra"] == ["empty/inner/", "gone.txt", "pipe", "same.txt", "self"]
    os.mkfifo(merged / "pipe.py")
    (merged / "gone.py").symlink_to("nowhere")
    report = problems(merged)
    assert said(report, "pipe.py")
    assert said(report, "gone.py")


@pytest.mark.parametrize("target", [".", "..", "/", "examples"])
def test_links_to_folders_are_not_followed(target, merged):
    (merged / "loop").symlink_to(target)
    report = problems(merged)
    assert report["extra"] == ["loop"]
    assert said(report, "loop", "link to a folder")
    assert len(report["problems"]) == 1


def test_folders_of_any_depth(merged):
    here = os.getcwd()
    os.chdir(merged)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        assert len(streamshard.verify(merged)["extra"]) == 1
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", merged / "d"], check=True)  # shutil and pytest cannot


def refusing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A call that may not do anything with this name; the tests may run as root, who may all."""

    def refuse(path: Any, *more: Any) -> Any:
        if os.path.basename(path) == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path, *more)

    return refuse


def test_a_folder_that_cannot_be_listed(merged, monkeypatch):
    (merged / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, "closed"))
    report = problems(merged)
    assert said(report, "closed", "cannot be listed")


def _elsewhere(file: Path, other: Path) -> None:
    other.parent.mkdir(exist_ok=True)
    file.rename(other)
    file.symlink_to(other)


LISTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda f: (f / "modeling_own.py").unlink(), "modeling_own.py"),
    "deep gone": (lambda f: (f / "examples/deep/image.jpg").unlink(), "examples/deep/image.jpg"),
    "deep changed": (lambda f: flip(f / "examples/deep/image.jpg", 0), "examples/deep/image.jpg"),
    "now a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json",
    ),
    "a shard is a folder": (lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), FIRST),
    "now a pipe": (
        lambda f: ((f / "modeling_own.py").unlink(), os.mkfifo(f / "modeling_own.py")),
        "modeling_own.py",
    ),
    "elsewhere": (
        lambda f: _elsewhere(f / "modeling_own.py", f.parent / "else" / "x.py"),
        "outside of the folder",
    ),
    "a shard elsewhere": (
        lambda f: _elsewhere(f / SECOND, f.parent / "else" / SECOND),
        "outside of the folder",
    ),
    "the record elsewhere": (
        lambda f: _elsewhere(f / RECORD, f.parent / "else" / "r"),
        "outside of the folder",
    ),
    "a folder elsewhere": (
        lambda f: _elsewhere(f / "examples", f.parent / "else" / "e"),
        "outside of the folder",
    ),
    "exchanged": (
        lambda f: _exchange(f / "modeling_own.py", f / "config.json"),
        "modeling_own.py",
    ),
    "shards exchanged": (lambda f: _exchange(f / FIRST, f / SECOND), FIRST),
    "no weights": (lambda f: ((f / FIRST).unlink(), (f / SECOND).unlink()), FIRST),
    "only the record": (lambda f: _keep(f, {RECORD}), FIRST),
    "no index": (lambda f: (f / INDEX).unlink(), INDEX),
    "another case": (lambda f: (f / "config.json").rename(f / "Config.json"), "'config.json'"),
}


def _exchange(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _keep(folder: Path, names: Iterable[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("what", LISTED)
def test_listed_files_that_are_not_there_as_they_were(what, merged, cli):
    change, expected = LISTED[what]
    change(merged)
    report = problems(merged)
    if what == "another case":
        expected = "config.json: is missing"
        assert said(report, "Config.json", "not part of this")
    assert said(report, expected), report["problems"]
    outcome = cli("verify", merged)
    assert outcome.code == 8
    assert "Traceback" not in outcome.err


def test_links_within_the_folder_and_of_the_hubs_cache_are_fine(merged, tmp_path):
    (merged / "examples" / "deep" / "image.jpg").rename(merged / "examples" / "kept.jpg")
    (merged / "examples" / "deep" / "image.jpg").symlink_to("../kept.jpg")
    assert streamshard.verify(merged)["extra"] == ["examples/kept.jpg"]
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(files_of(merged))):
        shutil.copyfile(merged / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert streamshard.verify(snapshot, strict=True)["recorded"] is True


def test_tensors_of_one_shape_that_changed_places(pair):
    content = load_file(pair.base / FIRST)
    content["second"] = content[Q] + 1
    save_file(content, pair.base / FIRST, {"format": "pt"})
    index = json.loads((pair.base / INDEX).read_text())
    index["weight_map"]["second"] = FIRST
    (pair.base / INDEX).write_text(json.dumps(index))
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    content = load_file(pair.output / FIRST)
    content["second"], content[Q] = content[Q], content["second"]
    save_file(content, pair.output / FIRST, {"format": "pt"})
    assert problems(pair.output)["different"] == sorted(["second", Q])


# --- adapters, bare files, other people's folders -------------------------------------------------


def test_a_sample_says_what_it_left_out(merged, cli):
    report = streamshard.verify(merged, sample=1, strict=True)
    assert {one["name"] for one in report["not_checked"]} == {FIRST, SECOND}
    assert all("tensors were read" in one["why"] for one in report["not_checked"])
    assert "is right" not in cli("verify", merged, "--sample", "1").out
    assert cli("verify", merged, "--sample", "100%").out.count("is right") == 1


def test_a_file_whose_header_is_broken(merged):
    flip(merged / SECOND, 8)
    report = problems(merged)
    assert {one["name"]: one["why"] for one in report["not_checked"]} == {
        SECOND: "its header cannot be read"
    }
    assert FIRST in report["checked_files"]


@pytest.fixture
def own_adapter(tmp_path: Path) -> Path:
    """An adapter folder that streamshard wrote."""
    from make_checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "tiny", "tiny", layout="custom")
    out = tmp_path / "own"
    streamshard.wrap_lora(base=tmp_path / "tiny", output=out, llm_r=2, format="peft")
    return out


def test_an_adapter_of_ours(own_adapter, cli):
    report = streamshard.verify(own_adapter, strict=True)
    assert set(report["checked_files"]) == files_of(own_adapter)
    put(own_adapter, "config.json")
    assert said(problems(own_adapter), "config.json", "not part of this")
    (own_adapter / "config.json").unlink()
    flip(own_adapter / "adapter_config.json", 5)
    assert said(problems(own_adapter), "adapter_config.json")
    (own_adapter / "adapter_model.safetensors").unlink()
    assert cli("verify", own_adapter).code == 8


def test_adapters_of_others(pair, cli):
    assert cli("verify", pair.adapter).code == 0
    assert cli("verify", pair.adapter, "--strict").code == 8
    (pair.adapter / "adapter_config.json").write_text("{")
    assert said(problems(pair.adapter), "adapter_config.json", "JSON")


def test_adapters_that_were_pickled(pair, cli):
    content = load_file(pair.adapter / "adapter_model.safetensors")
    (pair.adapter / "adapter_model.safetensors").unlink()
    pickled = pair.adapter / "adapter_model.bin"
    torch.save(content, pickled)
    outcome = cli("verify", pair.adapter)
    assert outcome.code == 0
    assert "no digests to compare" in outcome.out
    assert "4 of 4 tensors" in outcome.out
    assert cli("verify", pair.adapter, "--strict").code == 8
    name = next(iter(content))
    content[name][0, 0] = float("inf")
    torch.save(content, pickled)
    assert problems(pair.adapter)["nonfinite"] == {name: 1}
    pickled.write_bytes(b"x" * 50)
    assert said(problems(pair.adapter), "adapter_model.bin")
    pickled.unlink()
    outcome = cli("verify", pair.adapter)
    assert outcome.code == 3
    assert "--adapter" not in outcome.err


def test_bare_files_and_folders_with_nothing_but_weights(pair, tmp_path, cli):
    outcome = cli("verify", pair.base / FIRST)
    assert outcome.code == 0
    assert "give the folder" in outcome.err
    assert "no digests to compare" in outcome.out
    assert cli("verify", pair.base / FIRST, "--strict").code == 8
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(pair.base / FIRST, alone / "model.safetensors")
    assert cli("verify", alone).code == 0
    assert cli("verify", alone, "--strict").code == 8
    report = streamshard.verify(alone)
    assert [one["name"] for one in report["not_checked"]] == ["model.safetensors"]


def test_a_folder_of_somebody_else(pair, cli):
    """Code and configs are its own, as far as anyone knows: nothing is extra."""
    for name in ("modeling_x.py", ".cache/huggingface/x.metadata", "README.md"):
        put(pair.base, name)
    (pair.base / "loop").symlink_to(".")
    report = streamshard.verify(pair.base)
    assert report["extra"] == []
    assert named(report, pair.base) >= files_of(pair.base)
    assert cli("verify", pair.base).code == 0


NAMES = [FIRST, SECOND, RECORD, INDEX, "config.json", "modeling_own.py"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_read_is_not_called_damaged(name, number, merged, cli, monkeypatch):
    """Exit code 7, as everywhere; 8 says that the content is wrong."""
    opened = system.open

    def refuse(path: Any, *more: Any) -> Any:
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *more)

    monkeypatch.setattr(system, "open", refuse)
    with pytest.raises(UnreadError) as raised:
        streamshard.verify(merged)
    report = raised.value.report
    assert set(report["problems"]) == set(report["unreadable"])
    assert said(report, name, "cannot be read")
    assert report["missing"] == report["unexpected"] == report["different"] == []
    assert name in {one["name"] for one in report["not_checked"]}
    outcome = cli("verify", merged)
    assert outcome.code == 7
    assert name in outcome.err
    assert "could not be read as a whole" in outcome.out
    assert "damaged" not in outcome.out
    if name != RECORD:
        flip(merged / ("modeling_own.py" if name == "config.json" else "config.json"), 0)
        assert name in {one["name"] for one in problems(merged)["not_checked"]}


def test_a_disk_that_fails_amid_a_shard(merged, cli, monkeypatch):
    pread, names = system.pread, {}
    opened = system.open

    def noted(path: Any, *more: Any) -> int:
        descriptor = opened(path, *more)
        names[descriptor] = Path(path).name
        return descriptor

    def broken(descriptor: int, out: memoryview, offset: int) -> int:
        if names.get(descriptor) == SECOND and offset > 2000:
            raise OSError(errno.EIO, "broken")
        return pread(descriptor, out, offset)

    monkeypatch.setattr(system, "open", noted)
    monkeypatch.setattr(system, "pread", broken)
    outcome = cli("verify", merged)
    assert outcome.code == 7
    assert SECOND in outcome.err


def test_what_is_cut_off_is_damaged_and_not_unread(merged):
    os.truncate(merged / SECOND, 2000)
    problems(merged)


def test_a_shard_that_may_not_be_read(merged, monkeypatch):
    monkeypatch.setattr(system, "open", refusing(system.open, SECOND))
    flip(merged / "modeling_own.py", 0)
    report = problems(merged)
    assert said(report, SECOND, "cannot be read")
    assert said(report, "modeling_own.py")


@pytest.mark.parametrize("what", ["key", "empty object", "garbage", "nested", "tables"])
def test_a_tampered_record_does_not_stop_a_merge(what, merged, pair, cli):
    """There it is only a hint at what was merged before."""
    TAMPERED[what](merged / RECORD)
    factors = {
        f"base_model.model.{LAYER}.q_proj.lora_A.weight": reference.normal((4, 40), 1, seed=15),
        f"base_model.model.{LAYER}.q_proj.lora_B.weight": reference.normal((96, 4), 0.02, seed=16),
    }
    other = reference.save_adapter(pair.root / "other", factors, r=4, lora_alpha=8)
    out = pair.root / "again"
    outcome = cli("merge-lora", "--base", merged, "--adapter", other, "--output", out)
    assert outcome.code == 0, outcome.err
    assert streamshard.verify(out)["record"] == "whole"
