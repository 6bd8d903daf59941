"""Inputs of other commands than merges that change while they are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from changing_files import (
    CHANGES,
    FIRST,
    INDEX,
    READ_OF_A_BASE,
    SECOND,
    replaced,
    stopped,
)
from make_checkpoint import write_checkpoint
from reference import load_file, save_file

import streamshard
from streamshard.checkpoint import digests
from streamshard.commands import identify, verify_content
from streamshard.errors import ChangedError
from streamshard.internvl import detection


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in both layouts, and wrapped as after a training."""
    root = tmp_path_factory.mktemp("made")
    for layout in ("hf", "custom"):
        write_checkpoint(root / layout, "tiny", layout=layout, max_shard_size="200KB")
    streamshard.wrap_lora(base=root / "custom", output=root / "wrapped", llm_r=4)
    for file in sorted((root / "wrapped").glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".lora_B." in name:
                tensors[name] = torch.full_like(tensor, 0.01)
        save_file(tensors, file, {"format": "pt"})
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    return tmp_path


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "hf2custom": (
        ["hf2custom", "--hf-path", "hf", "--custom-path", "custom", "--save-path", "out/x"],
        [
            *(f"hf/{name}" for name in READ_OF_A_BASE),
            *(f"custom/{name}" for name in READ_OF_A_BASE),
            "custom/tokenizer_config.json",
            "custom/vocab.json",
            "custom/modeling_internvl_chat.py",
        ],
    ),
    "custom2hf": (
        [
            *("custom2hf", "--custom-path", "custom", "--hf-path", "hf", "--save-path", "out/x"),
            *("--tokenizer-from", "source"),
        ],
        [
            *(f"custom/{SECOND}", "custom/vocab.json", "custom/added_tokens.json"),
            *(f"hf/{FIRST}", "hf/config.json"),
        ],
    ),
    "merge-lora CHECKPOINT": (
        ["merge-lora", "wrapped", "--output", "out/x"],
        [*(f"wrapped/{name}" for name in READ_OF_A_BASE), "wrapped/merges.txt"],
    ),
    "merge-lora CHECKPOINT --reference": (
        ["merge-lora", "wrapped", "--layout", "hf", "--reference", "hf", "--output", "out/x"],
        [f"wrapped/{FIRST}", "hf/config.json", f"hf/{SECOND}", "hf/vocab.json"],
    ),
    "extract-lora": (
        ["extract-lora", "wrapped", "--base", "custom", "--output", "out/x"],
        [f"wrapped/{SECOND}", f"custom/{FIRST}", "custom/config.json", f"wrapped/{INDEX}"],
    ),
    "wrap-lora": (
        ["wrap-lora", "--base", "custom", "--llm-r", "4", "--output", "out/x"],
        [f"custom/{FIRST}", "custom/config.json", "custom/conversation.py"],
    ),
    "wrap-lora --format peft": (
        ["wrap-lora", "--base", "custom", "--llm-r", "4", "--format", "peft", "--output", "out/x"],
        [f"custom/{FIRST}", "custom/config.json", f"custom/{INDEX}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["set back", "replaced"])
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in COMMANDS for name in COMMANDS[command][1]]
)
def test_whatever_other_commands_read(command, name, how, models, cli):
    folders = {"hf", "custom", "wrapped", "out/x"}
    line = [str(models / part) if part in folders else part for part in COMMANDS[command][0]]
    # `hf` is a folder and a layout.
    line = ["hf" if line[i - 1] == "--layout" else part for i, part in enumerate(line)]
    stopped(cli, models, line, models / name, how, "a shard")


@pytest.mark.parametrize("how", [how for how in CHANGES if how != "a folder"])
@pytest.mark.parametrize(
    "name", [f"hf/{FIRST}", f"custom/{SECOND}", "hf/config.json", f"custom/{INDEX}"]
)
def test_diff(name, how, models):
    done: list[str] = []

    def change(_: int, tensor: str) -> None:
        if not done:
            done.append(tensor)
            CHANGES[how](models / name)

    with pytest.raises(ChangedError) as raised:
        streamshard.diff(models / "hf", models / "custom", workers=1, progress=change)
    assert done
    assert how == "folder" or Path(name).name in str(raised.value)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", [FIRST, SECOND, INDEX, "config.json", "streamshard.json"])
def test_verify(name, how, full):
    streamshard.merge_lora(base=full.base, adapter=full.adapter, output=full.output)
    done: list[str] = []

    def change(_: int, tensor: str) -> None:
        done.append(tensor)
        if len(done) == 4:  # the last one
            CHANGES[how](full.output / name)

    with pytest.raises(ChangedError, match="was "):
        streamshard.verify(full.output, workers=1, progress=change)
    assert len(done) == 4


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "more/vocab.txt"])
def test_verify_what_lies_beside(name, how, full, monkeypatch):
    """It is opened by the threads that read: they note it too."""
    streamshard.merge_lora(base=full.base, adapter=full.adapter, output=full.output)
    hash_file, done = digests.hash_file, []

    def later(path: Path, *hashes: Any, **options: Any) -> int:
        if path == full.output / name:
            done.append(path)
            CHANGES[how](path)
        return hash_file(path, *hashes, **options)

    monkeypatch.setattr(verify_content, "hash_file", later)
    with pytest.raises(ChangedError, match="was "):
        streamshard.verify(full.output, workers=1)
    assert done


@pytest.mark.parametrize("name", [FIRST, "config.json"])
def test_inspect(name, full, monkeypatch):
    detect = detection.detect

    def later(*arguments: Any) -> Any:
        replaced(full.base / name)
        return detect(*arguments)

    monkeypatch.setattr(identify, "detect", later)
    with pytest.raises(ChangedError, match=name):
        streamshard.inspect(full.base)
