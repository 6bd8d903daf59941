"""R8: checkpoints of torch's files, in one or several, wherever a checkpoint is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from adapters import adapter_of
from folders import make
from reference import INDEX

import streamshard
from streamshard.errors import InputError

BIN_INDEX = "pytorch_model.bin.index.json"


def as_bin(folder: Path, shards: int = 1, **how: Any) -> Path:
    """The same checkpoint, as transformers wrote them before safetensors."""
    tensors = reference.read(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **how)
        return folder
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        own = names[number::shards]
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in own}, folder / file, **how)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / BIN_INDEX).write_text(json.dumps(index))
    return folder


def equal(one: Path, other: Path) -> None:
    mine, theirs = reference.read(one), reference.read(other)
    assert mine.keys() == theirs.keys()
    assert all(reference.same_tensor(mine[name], theirs[name]) for name in mine)
    assert not [*one.glob("*.bin*")]


@pytest.mark.parametrize("shards", [1, 3])
def test_R8_as_a_base(shards, tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    hf = make(tmp_path / "hf", "tiny", "hf")
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "expected")
    as_bin(base, shards)
    report = streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    equal(tmp_path / "out", tmp_path / "expected")
    assert not report["warnings"]
    assert report["shards"] == shards
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == ("model.safetensors" if shards == 1 else "model-00001-of-00003.safetensors")
    how = {"layout": "hf", "reference": hf}
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "turned", **how)
    expected = {"hf_path": hf, "custom_path": tmp_path / "out", "save_path": tmp_path / "two"}
    streamshard.custom_to_hf(**expected)
    equal(tmp_path / "turned", tmp_path / "two")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("side", ["custom", "hf"])
def test_R8_as_source_and_as_reference(side, shards, tmp_path):
    folders = {s: make(tmp_path / s, "tiny", s) for s in ("custom", "hf")}
    convert = streamshard.custom_to_hf if side == "custom" else streamshard.hf_to_custom
    paths = {f"{name}_path": path for name, path in folders.items()}
    before = convert(**paths, save_path=tmp_path / "expected")
    for folder in folders.values():
        as_bin(folder, shards)
    report = convert(**paths, save_path=tmp_path / "out")
    equal(tmp_path / "out", tmp_path / "expected")
    # Such a reference is not one without weights.
    assert report["l2"]["compared"] == before["l2"]["compared"] > 0
    assert report["l2"]["global"] == before["l2"]["global"]
    assert convert(**paths, save_path=tmp_path / "dry", dry_run=True)
    difference = streamshard.diff(folders[side], tmp_path / "out")
    assert difference["different"] == difference["missing"] == difference["unexpected"] == []


@pytest.mark.parametrize("shards", [1, 2])
def test_R8_to_look_at_and_to_verify(shards, tmp_path):
    base = as_bin(make(tmp_path / "base", "tiny", "custom"), shards)
    seen = streamshard.inspect(base)
    assert sorted(seen["files"]) == sorted(path.name for path in base.glob("*.bin"))
    assert seen["layout"] == "custom"
    checked = streamshard.verify(base)
    assert checked["checked"]["tensors"] == seen["tensors"]
    file = next(base.glob("*.bin"))
    tensors = torch.load(file, weights_only=True)
    next(iter(tensors.values())).fill_(float("inf"))
    torch.save(tensors, file)
    with pytest.raises(streamshard.errors.VerificationError, match="NaN"):
        streamshard.verify(base)


def test_R8_wrapped_and_extracted(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    streamshard.wrap_lora(base=base, output=tmp_path / "wrapped", llm_r=4)
    as_bin(base, 2)
    streamshard.wrap_lora(base=base, output=tmp_path / "again", llm_r=4)
    equal(tmp_path / "again", tmp_path / "wrapped")
    wrapped = as_bin(tmp_path / "again")
    (wrapped / "streamshard.json").unlink()
    streamshard.extract_lora(checkpoint=wrapped, output=tmp_path / "adapter", base=base)
    streamshard.extract_lora(checkpoint=tmp_path / "wrapped", output=tmp_path / "same", base=base)
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "same")
    )
    assert one == other


@pytest.mark.parametrize("end", [".bin", ".pt", ".pth"])
def test_R8_a_file_itself(end, tmp_path):
    base = as_bin(make(tmp_path / "base", "tiny", "custom"))
    file = base / f"mine{end}"
    (base / "pytorch_model.bin").rename(file)
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    streamshard.merge_lora(base=file, adapter=adapter, output=tmp_path / "out")
    # R12: the config beside a bare file is used.
    assert (tmp_path / "out" / "config.json").exists()
    assert reference.read(tmp_path / "out").keys() == torch.load(file, weights_only=True).keys()


def test_R8_tied_tensors_share_their_bytes(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    tensors = reference.read(base)
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    tensors[names[1]] = tensors[names[0]]
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    found = reference.read(tmp_path / "out")
    assert all(reference.same_tensor(found[name], tensors[name]) for name in names)


def test_R8_safetensors_come_first(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    assert not streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")[
        "warnings"
    ]


def test_R8_heads_beside_a_bin_are_no_checkpoint(tmp_path):
    """A file of safetensors of an unknown name is one only if there is nothing of a known name."""
    base = as_bin(make(tmp_path / "base", "tiny", "custom"))
    reference.save_file({"v_head.weight": torch.ones(2)}, base / "value_head.safetensors", {})
    reference.save_file({"x.weight": torch.ones(2)}, base / "extra.safetensors", {})
    seen = streamshard.inspect(base)
    assert [*seen["files"]] == ["pytorch_model.bin"]
    (warning,) = seen["warnings"]
    assert "'extra.safetensors'" in warning
    assert "value_head" not in warning


def strided(file: Path) -> None:
    tensors = torch.load(file, weights_only=True)
    name = next(n for n, t in tensors.items() if t.dim() == 2 and t.shape[0] != t.shape[1])
    torch.save(tensors | {name: tensors[name].T.contiguous().T}, file)


REFUSED = {
    "legacy": (
        lambda p: torch.save(torch.load(p, weights_only=True), p,
                             _use_new_zipfile_serialization=False), "torch.save",
    ),
    "garbage": (lambda p: p.write_bytes(b"garbage"), "pytorch_model.bin"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "pytorch_model.bin"),
    "views": (strided, "another order"),
    "lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
        "git lfs pull",
    ),
    "optimizer": (
        lambda p: torch.save({"state": {0: {"x": torch.ones(2)}}, "param_groups": []}, p), "'state'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_R8_what_is_refused_is_told(kind, tmp_path):
    base = as_bin(make(tmp_path / "base", "tiny", "custom"))
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    change, expected = REFUSED[kind]
    change(base / "pytorch_model.bin")
    with pytest.raises(InputError, match=expected):
        streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["legacy", "views"])
def test_R8_the_command_that_is_told_makes_it_readable(kind, tmp_path):
    base = as_bin(make(tmp_path / "base", "tiny", "custom"))
    REFUSED[kind][0](base / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        streamshard.inspect(base)
    command = str(caught.value).partition("python -c ")[2]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True)
    assert streamshard.inspect(base)["layout"] == "custom"
    assert [path.name for path in base.glob("*.bin*")] == ["pytorch_model.bin"]


def test_R8_an_index_that_leads_elsewhere_is_refused(tmp_path):
    base = as_bin(make(tmp_path / "base", "tiny", "custom"), 2)
    index = json.loads((base / BIN_INDEX).read_text())
    for name in ("../x.bin", "x.safetensors", "a/b.bin"):
        weights = index["weight_map"] | {"a": name}
        (base / BIN_INDEX).write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(InputError, match="folder are allowed"):
            streamshard.inspect(base)
