"""What a checkpoint or adapter is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import KEYS, as_hf, edit, make, put, refused, sparse, without_weights, wrapped
from make_checkpoint import write_adapter
from models import FAMILY, TINY, pack
from presets import PRESETS, SPELLINGS, tensor_shapes
from reference import normal, read, save_adapter
from safetensors.torch import save_file

from streamshard import diff, inspect


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("name", TINY)
def test_what_a_checkpoint_is(name, layout, tmp_path):
    folder = make(tmp_path / "x", name, layout, max_shard_size="60KB", dtype="fp16")
    report = inspect(folder)
    preset, shapes = PRESETS[name], tensor_shapes(name, layout)
    family = FAMILY[name]
    if layout == "hf" and family.startswith("internlm"):
        family = "llama"
    assert (report["layout"], report["family"], report["warnings"]) == (layout, family, [])
    assert report["spelling"] == (None if layout == "custom" else "flat")
    assert (report["tensors"], report["dtypes"]) == (len(shapes), {"F16": len(shapes)})
    assert report["parameters"] == sum(map(math.prod, shapes.values()))
    assert report["bytes"] == 2 * report["parameters"]
    files = sorted(folder.glob("*.safetensors"))
    assert list(report["files"]) == [file.name for file in files]
    assert report["shards"] == len(files)
    assert sum(report["files"].values()) == report["bytes"]
    for file in files:
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert report["files"][file.name] == file.stat().st_size - header
    assert report["dimensions"] == {
        "vision_layers": preset.vision.layers,
        "vision_hidden": preset.vision.hidden,
        "layers": preset.layers,
        "heads": preset.heads,
        "kv_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "experts": preset.experts or None,
    }
    assert report["lora"]["wrapped"] is False
    assert report["lora"]["use_llm_lora"] == (0 if layout == "custom" else None)
    assert report.keys() >= KEYS
    json.dumps(report)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_are_told(spelling, tmp_path):
    folder = make(tmp_path / "x", "tiny-qwen3", "hf", spelling=spelling)
    report = inspect(folder)
    assert (report["spelling"], report["family"]) == (spelling, "qwen3")


def test_dtypes_are_counted(tmp_path):
    folder = make(tmp_path / "x", "tiny", "custom")
    content = read(folder)
    for name in ("mlp1.0.weight", "mlp1.0.bias"):
        content[name] = content[name].float()
    report = inspect(put(folder, content))
    assert report["dtypes"] == {"BF16": len(content) - 2, "F32": 2}


def test_packed_experts_are_told(tmp_path):
    folder = make(tmp_path / "x", "tiny-qwen3-moe", "hf")
    assert inspect(folder)["packed_experts"] is False
    put(folder, pack(read(folder), PRESETS["tiny-qwen3-moe"]))
    report = inspect(folder)
    assert (report["packed_experts"], report["family"]) == (True, "qwen3_moe")


def test_a_wrapped_checkpoint_is_told(tmp_path, cli):
    folder = make(tmp_path / "x", "tiny", "custom")
    edit(put(folder, wrapped(read(folder))), lambda config: config.update(use_llm_lora=16))
    report = inspect(folder)
    assert report["lora"] == {
        "wrapped": True, "pairs": 3, "ranks": [4], "use_llm_lora": 16, "use_backbone_lora": 0,
    }  # fmt: skip
    assert (report["layout"], report["family"]) == ("custom", "qwen2")
    said = cli("inspect", folder).out
    assert f"3 pairs inside, ranks 4: fold them in by `streamshard merge-lora {folder}`" in said
    assert "spelling" not in said


def test_an_adapter_is_told(tmp_path, cli):
    write_adapter(tmp_path / "a", "tiny", layout="hf", r=4, lora_alpha=8, use_rslora=True)
    report = inspect(tmp_path / "a")
    assert report["adapter"]["r"] == 4
    assert report["adapter"]["lora_alpha"] == 8
    assert report["adapter"]["use_rslora"] is True
    assert report["adapter"]["peft_type"] == "LORA"
    assert report["tensors"] == report["dtypes"]["F32"] == 2 * 7 * 3
    assert report.keys() >= KEYS
    text = cli("inspect", tmp_path / "a").out
    assert "PEFT adapter" in text
    assert "r 4, lora_alpha 8, use_rslora" in text
    assert "  target_modules self_attn.q_proj, " in text
    assert "False" not in text
    assert json.loads(cli("inspect", tmp_path / "a", "--json").out)["adapter"]["r"] == 4


def test_the_file_of_an_adapter_is_told_as_the_adapter(tmp_path, cli):
    write_adapter(tmp_path / "a", "tiny", layout="custom")
    file = tmp_path / "a" / "adapter_model.safetensors"
    assert cli("inspect", file).out == cli("inspect", tmp_path / "a").out
    (tmp_path / "a" / "adapter_config.json").unlink()
    text = cli("inspect", file).out
    assert "LoRA: 21 pairs inside, ranks 16, and nothing else: only what was trained" in text
    assert "merge-lora" not in text  # which has no weights to fold them into


@pytest.mark.parametrize(("layout", "trained"), [("custom", "custom"), ("hf", "hf")])
def test_an_adapter_says_where_it_was_trained(layout, trained, tmp_path):
    write_adapter(tmp_path / "a", "tiny", layout=trained, targets="vision")
    assert inspect(tmp_path / "a")["layout"] == layout


def test_an_adapter_whose_names_say_nothing(tmp_path):
    stem = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    pairs = {
        f"{stem}.lora_A.weight": normal((2, 64), 1, seed=1),
        f"{stem}.lora_B.weight": normal((64, 2), 1, seed=2),
    }
    save_adapter(tmp_path / "a", pairs, r=2, lora_alpha=4)
    assert inspect(tmp_path / "a")["layout"] is None


def test_a_bare_file(tmp_path, cli):
    file = make(tmp_path / "x", "tiny-internlm2", "custom") / "model.safetensors"
    assert inspect(file)["dimensions"]["heads"] == 4  # by the config beside it
    (file.parent / "config.json").unlink()
    report = inspect(file)
    assert (report["layout"], report["family"], report["dimensions"]) == (
        "custom", "internlm2", None,
    )  # fmt: skip
    assert list(report["files"]) == ["model.safetensors"]
    assert ["there is no config.json" in told for told in report["warnings"]] == [True]
    assert cli("inspect", file).err.count("copy that of the original model") == 1
    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    report = inspect(tmp_path / "other.safetensors")
    assert (report["layout"], report["tensors"]) == (None, 1)
    assert len(report["warnings"]) == 1
    outcome = cli("inspect", tmp_path / "other.safetensors")
    assert outcome.code == 0
    assert "language model unknown" in outcome.out
    json_keys = json.loads(cli("inspect", tmp_path / "other.safetensors", "--json").out).keys()
    assert json_keys >= inspect(file).keys()  # keys that do not apply are null, never absent


def test_names_are_believed(tmp_path, cli):
    folder = make(tmp_path / "x", "tiny", "custom")
    put(folder, as_hf(read(folder), PRESETS["tiny"]))
    report = inspect(folder)
    assert report["layout"] == "hf"
    assert len(report["warnings"]) == 1
    assert "warning: " in cli("inspect", folder).err


def test_both_layouts_are_no_reason_to_fail(tmp_path):
    folder = make(tmp_path / "x", "tiny", "custom")
    put(folder, read(folder) | as_hf(read(folder), PRESETS["tiny"]))
    report = inspect(folder)
    assert report["layout"] is None
    assert "mixed" in report["warnings"][0]


def test_inspect_in_words(tmp_path, cli):
    folder = make(tmp_path / "x", "tiny-qwen3", "hf", spelling="nested")
    text = cli("inspect", folder).out
    assert "layout hf, spelling nested, language model qwen3" in text
    assert "kv_heads 2" in text
    assert "LoRA: none inside" in text
    assert cli("inspect", folder, "--quiet").out == ""


def test_inspect_of_nothing(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        refused(cli, tmp_path, 3, "inspect", tmp_path / path)
    ref = without_weights(make(tmp_path / "ref", "tiny", "hf"))
    assert "has no weights of a model" in refused(cli, tmp_path, 3, "inspect", ref)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["InternVL3-8B", "InternVL3_5-8B"])
def test_of_a_real_size_little_is_read(preset, layout, tmp_path, nbytes_read):
    folder = sparse(tmp_path / "x", PRESETS[preset], layout)
    report = inspect(folder)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    assert report["shards"] == 4
    assert 0 < sum(nbytes_read) < 2_000_000
    assert all(file.stat().st_blocks * 512 < 200_000 for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_nothing_heavy_is_imported(command, tmp_path):
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", "hf", dtype="fp32")
    paths = [one] if command == "inspect" else [one, other]
    code = f"""
import sys
from streamshard.cli import main
sys.argv = ["streamshard", {command!r}, *{[str(path) for path in paths]!r}, "--quiet"]
try:
    main()
except SystemExit as exit_:
    assert not exit_.code
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_headers_are_all_that_inspect_reads(tmp_path, monkeypatch):
    folder = make(tmp_path / "x", "tiny", "custom")

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("streamshard.disk.files.Files.read_into", fail)
    assert inspect(folder)["tensors"] == 77
    with pytest.raises(AssertionError):
        diff(folder, Path(make(tmp_path / "y", "tiny", "custom", seed=1)), workers=1)
