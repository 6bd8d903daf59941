"""Part 4: what a folder or file is in truth is said, with the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import Pair

from streamshard.checkpoint.other_folders import what_instead

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4936\n"


def emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def marked(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def wide(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def cached(folder: Path) -> None:
    emptied(folder)
    touched(folder / "blobs" / "0", folder / "refs" / "main", folder / "snapshots" / "abc" / "x")


def quantization(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}})
    )


CASES: dict[str, tuple[Callable[[Pair], object], int, list[str]]] = {
    "lfs-shard": (
        lambda p: (p.base / "model-00001-of-00002.safetensors").write_text(LFS),
        3, ["model-00001-of-00002.safetensors", "git lfs pull"],
    ),
    "lfs-config": (
        lambda p: (p.base / "config.json").write_text(LFS), 3, ["config.json", "git lfs pull"],
    ),
    "lfs-index": (
        lambda p: (p.base / "model.safetensors.index.json").write_text(LFS), 3, ["git lfs pull"],
    ),
    "lfs-tokenizer": (
        lambda p: (p.base / "tokenizer.json").write_text(LFS), 3, ["tokenizer.json", "git lfs pull"],
    ),
    "lfs-adapter": (
        lambda p: (p.adapter / "adapter_model.safetensors").write_text(LFS),
        3, ["adapter_model.safetensors", "git lfs pull"],
    ),
    "bom-config": (
        lambda p: ((p.base / "config.json").write_text("{}"), marked(p.base / "config.json")),
        3, ["config.json", "byte order mark"],
    ),
    "bom-adapter": (
        lambda p: marked(p.adapter / "adapter_config.json"),
        3, ["adapter_config.json", "byte order mark"],
    ),
    "bom-index": (
        lambda p: marked(p.base / "model.safetensors.index.json"), 3, ["index.json", "byte order mark"],
    ),
    "utf-16": (lambda p: wide(p.adapter / "adapter_config.json"), 3, ["UTF-8"]),
    "zero": (
        lambda p: touched(emptied(p.base) / "global_step100" / "mp_rank_00_model_states.pt"),
        3, ["DeepSpeed", "python -m deepspeed.utils.zero_to_fp32 /", "base --safe_serialization"],
    ),
    "inside-zero": (
        lambda p: touched(emptied(p.base) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        3, ["DeepSpeed", "zero_to_fp32"],
    ),
    "fsdp": (
        lambda p: touched(emptied(p.base) / "pytorch_model_fsdp_0" / "__0_0.distcp"),
        3, ["FSDP", "accelerate merge-weights /", "/pytorch_model_fsdp_0 OUTPUT"],
    ),
    "runs": (
        lambda p: touched(emptied(p.base) / "checkpoint-90" / "x", p.base / "checkpoint-100" / "x"),
        3, ["training run", "checkpoint-100", "one of 2"],
    ),
    "runs-of-adapters": (
        lambda p: touched(emptied(p.adapter) / "checkpoint-100" / "adapter_config.json"),
        3, ["checkpoint-100"],
    ),
    "adapter-runs-without-weights": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(),
            touched(p.adapter / "global_step5" / "mp_rank_00_model_states.pt"),
        ),
        3, ["zero_to_fp32"],
    ),
    "cache": (lambda p: cached(p.base), 3, ["cache of the hub", "snapshots/abc"]),
    "cache-of-an-adapter": (lambda p: cached(p.adapter), 3, ["cache of the hub", "snapshots/abc"]),
    "hub-folder": (
        lambda p: touched(emptied(p.base) / "models--org--name" / "snapshots" / "abc" / "x"),
        3, ["models--org--name", "snapshots"],
    ),
    "left-over": (lambda p: quantization(p.base), 3, ["left over", "remove that key", "config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_part_4_what_it_is_and_what_to_do(case, pair, refused):
    change, code, expected = CASES[case]
    change(pair)
    refused(code, *expected)


@pytest.mark.parametrize("name", ["run 1", "run 1/global_step7"])
def test_part_4_what_gathers_a_zero_save_can_be_pasted(name, tmp_path):
    """It lies beside the states of all steps, and names may have spaces."""
    touched(tmp_path / "run 1" / "global_step7" / "mp_rank_00_model_states.pt")
    whole = tmp_path / "run 1"
    said = what_instead(tmp_path / name)
    command = f"'{whole}' '{whole}' --safe_serialization"
    tag = " --tag global_step7" if name.endswith("step7") else ""
    assert f"python -m deepspeed.utils.zero_to_fp32 {command}{tag}, then give '{whole}'" in said
    (whole / "zero_to_fp32.py").touch()
    said = what_instead(tmp_path / name)
    assert f"python '{whole}/zero_to_fp32.py' {command}{tag}, then give '{whole}'" in said


@pytest.mark.parametrize("name", ["models--org--name", "models--org--name/snapshots"])
def test_part_4_a_cache_that_was_copied_without_its_blobs(name, tmp_path):
    touched(tmp_path / "models--org--name" / "snapshots" / "abc" / "x")
    assert "models--org--name/snapshots/abc" in what_instead(tmp_path / name)


def test_part_4_one_adapter_given_twice_is_named_once(pair, refused):
    said = refused(2, "was given 2 times", command=[*pair.command, "--adapter", str(pair.adapter)])
    assert said.count("adapter_model.safetensors") <= 1


def test_part_4_a_quantized_source_is_told_in_words_of_conversions(pair, cli):
    from safetensors.torch import save_file

    emptied(pair.base)
    save_file({"a.qweight": torch.ones(4, 4, dtype=torch.int32)}, pair.base / "model.safetensors")
    done = cli(
        "hf2custom", "--hf-path", pair.base, "--custom-path", pair.base, "--save-path", pair.output
    )
    assert done.code == 3
    assert "cannot be converted" in done.err
    assert "update" not in done.err
