"""`diff` and `inspect`: what two checkpoints differ in, and what one is."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PRESETS, SPELLINGS, tensor_shapes
from make_checkpoint import write_adapter
from reference import digests, normal, read, save_adapter
from safetensors.torch import save_file
from test_conversion import (
    KEYS,
    OTHER,
    as_custom,
    as_hf,
    carried,
    convert,
    distances,
    edit,
    flattened,
    make,
    put,
    refused,
    sparse,
    without_weights,
    wrapped,
)
from test_layouts import TINY, pack

from streamshard import diff, inspect
from streamshard.errors import InputError

FAMILY = {
    "tiny": "qwen2", "tiny-qwen2": "qwen2", "tiny-6b-vit": "qwen2", "tiny-qwen3": "qwen3",
    "tiny-qwen3-moe": "qwen3_moe", "tiny-llama": "llama", "tiny-internlm2": "internlm2",
    "tiny-internlm3": "internlm3", "tiny-phi3": "phi3", "tiny-gpt-oss": "gpt_oss",
}  # fmt: skip


# --- diff ----------------------------------------------------------------------------------------


def assert_distances(report: dict[str, Any], ours: Any, theirs: Any) -> None:
    expected = distances(ours, theirs)
    for key in ("sum", "per_parameter", "global"):
        assert report["l2"][key] == pytest.approx(expected[key], rel=1e-9, abs=0)
    assert report["l2"]["compared"] == expected["compared"]
    norms = {n: float((ours[n].double() - t.double()).norm()) for n, t in theirs.items()
             if n in ours and t.shape == ours[n].shape}  # fmt: skip
    different = {n: norm for n, norm in norms.items() if norm}
    assert {row["name"] for row in report["different"]} == set(different)
    for row in report["different"]:
        # `test_differences_are_made_in_fp64` is stricter.
        assert row["l2"] == pytest.approx(different[row["name"]], rel=1e-7)
        size = float(theirs[row["name"]].double().norm())
        assert row["relative"] == pytest.approx(row["l2"] / size, rel=1e-9)
    assert [row["l2"] for row in report["different"]] == sorted(
        (row["l2"] for row in report["different"]), reverse=True
    )
    assert report["equal"] == len(norms) - len(different)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe"])
def test_two_of_one_layout(preset, layout, tmp_path):
    one = make(tmp_path / "one", preset, layout)
    other = make(tmp_path / "other", preset, layout, seed=1, max_shard_size="40KB")
    before = digests(tmp_path)
    report = diff(one, other)
    assert_distances(report, read(one), read(other))
    assert (report["missing"], report["unexpected"]) == ([], [])
    assert (report["shapes"], report["dtypes"]) == ({}, {})
    assert (report["a"], report["b"]) == (str(one), str(other))
    assert (report["command"], report["layout"]) == ("diff", layout)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_two_layouts(preset, layout, tmp_path):
    """Names and distances are those of B's layout."""
    one = make(tmp_path / "one", preset, OTHER[layout])
    other = make(tmp_path / "other", preset, layout, seed=1, max_shard_size="50KB")
    report = diff(one, other)
    assert_distances(report, carried(read(one), PRESETS[preset], layout), read(other))
    assert report["layout"] == layout
    assert (report["missing"], report["unexpected"], report["l2"]["skipped"]) == ([], [], [])
    convert(layout, one, other, tmp_path / "same")
    for pair in ((one, tmp_path / "same"), (tmp_path / "same", one)):
        report = diff(*pair)
        assert report["l2"]["sum"] == 0.0
        assert report["different"] == []
        assert report["equal"] == report["tensors"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_two_spellings(spelling, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    one = make(tmp_path / "one", preset, "hf", spelling=spelling)
    other = make(tmp_path / "other", preset, "hf", seed=1)
    expected = distances(flattened(read(one), preset, "hf"), read(other))
    for pair in ((one, other), (other, one)):
        report = diff(*pair)
        assert report["l2"]["sum"] == pytest.approx(expected["sum"], rel=1e-9)
        assert (report["missing"], report["unexpected"]) == ([], [])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_tensor_changed(dtype, tmp_path):
    one = make(tmp_path / "one", "tiny", "custom", dtype=dtype)
    other = make(tmp_path / "other", "tiny", "custom", dtype=dtype)
    content = read(one)
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    content[name][40, 3] += 0.5
    change = float(content[name].double().sub(read(other)[name].double()).norm())
    put(one, content)
    report = diff(one, other)
    assert [row["name"] for row in report["different"]] == [name]
    assert report["different"][0]["l2"] == pytest.approx(change, rel=1e-12)
    assert report["l2"]["sum"] == report["l2"]["global"] == report["different"][0]["l2"]
    count = sum(math.prod(shape) for shape in tensor_shapes("tiny", "custom").values())
    assert report["l2"]["per_parameter"] == pytest.approx(change / count)
    assert report["equal"] == len(content) - 1
    hf = make(tmp_path / "hf", "tiny", "hf")
    put(hf, as_hf(read(other), PRESETS["tiny"]))
    report = diff(one, hf)
    # Row 40 of 96 is in the second third.
    assert [row["name"] for row in report["different"]] == [
        "vision_tower.encoder.layer.1.attention.k_proj.weight"
    ]


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_shapes_dtypes_and_names(layout, tmp_path):
    """Within one layout, and across layouts with names that both share."""
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", layout)
    mine, theirs = read(one), read(other)
    stem = "language_model.model.layers.{}.mlp.up_proj.weight"
    shape, dtype, a, b = (stem.format(0), stem.format(1), stem.format(2),
                          "language_model.model.norm.weight")  # fmt: skip
    theirs[shape] = theirs[shape][:-1]
    theirs[dtype] = mine[dtype].float()
    del theirs[a], mine[b]
    put(one, mine)
    put(other, theirs)
    report = diff(one, other)
    rows, columns = tensor_shapes("tiny", "custom")[shape]
    assert {n: [list(s) for s in pair] for n, pair in report["shapes"].items()} == {
        shape: [[rows, columns], [rows - 1, columns]]
    }
    assert report["dtypes"] == {dtype: ["BF16", "F32"]}
    assert (report["missing"], report["unexpected"]) == ([b], [a])
    assert report["l2"]["skipped"] == sorted([shape, a, b])
    # The same numbers in another dtype are no distance.
    assert dtype not in {row["name"] for row in report["different"]}


EXTRA = "language_model.model.layers.0.mlp.other_proj.weight"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("custom", "custom"), ("hf", "hf"), ("custom", "hf"), ("hf", "custom"), ("hf", "nested")],
)
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_name_of_no_table_is_not_lost(mine, theirs, side, tmp_path):
    """It is on one side only: reported, or the comparison is refused; not passed over."""
    folders = []
    for number, layout in enumerate((mine, theirs)):
        how = {"layout": "hf", "spelling": "nested"} if layout == "nested" else {"layout": layout}
        folder = make(tmp_path / str(number), "tiny", **how)
        if side == "ab"[number]:
            put(folder, read(folder) | {EXTRA: torch.ones(3)})
        folders.append(folder)
    try:
        report = diff(*folders)
    except InputError as error:
        assert "other_proj" in str(error)  # noqa: PT017
        return
    assert report["missing"] == ([EXTRA] if side == "b" else [])
    assert report["unexpected"] == ([EXTRA] if side == "a" else [])


def test_parts_without_their_third_are_not_lost(tmp_path):
    """q and v are there in B, and k is not: only k is on one side."""
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", "hf")
    content = read(other)
    name = "vision_tower.encoder.layer.0.attention.k_proj.weight"
    del content[name]
    put(other, content)
    report = diff(one, other)
    assert report["unexpected"] == [name]


@pytest.mark.parametrize("case", ["custom", "hf", "nested"])
@pytest.mark.parametrize("order", [1, -1], ids=["tied-first", "tied-last"])
def test_a_tied_head_is_the_embedding(case, order, tmp_path):
    """The order of the two does not change what is the same."""
    tied = make(tmp_path / "tied", "tiny", "hf", tied=True)
    content = read(tied)
    content["language_model.lm_head.weight"] = content["language_model.model.embed_tokens.weight"]
    if case == "custom":
        other = put(make(tmp_path / "c", "tiny", "custom"), as_custom(content, PRESETS["tiny"]))
    elif case == "hf":
        other = put(make(tmp_path / "h", "tiny", "hf"), content)
    else:
        other = make(tmp_path / "n", "tiny", "hf", spelling="nested")
        names = tensor_shapes("tiny", "hf", spelling="nested")
        flat = dict(zip(names, tensor_shapes("tiny", "hf"), strict=True))
        put(other, {name: content[plain] for name, plain in flat.items()})
    report = diff(*[tied, other][::order])
    assert (report["missing"], report["unexpected"], report["l2"]["sum"]) == ([], [], 0.0)


def test_packed_experts_are_compared_one_by_one(tmp_path):
    preset = PRESETS["tiny-qwen3-moe"]
    one = make(tmp_path / "one", preset, "hf")
    packed = make(tmp_path / "packed", preset, "hf")
    put(packed, pack(read(packed), preset))
    custom = make(tmp_path / "custom", preset, "custom")
    put(custom, as_custom(read(one), preset))
    for pair in ((one, packed), (packed, one), (packed, custom), (custom, packed)):
        report = diff(*pair)
        assert report["l2"]["sum"] == 0.0
        assert (report["missing"], report["unexpected"]) == ([], [])


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_other_models_are_refused(layout, tmp_path, cli):
    one = make(tmp_path / "one", "tiny", OTHER[layout])
    other = make(tmp_path / "other", "tiny-qwen3", layout)
    refused(cli, tmp_path, 3, "diff", one, other)


def test_other_models_of_one_layout_are_compared(tmp_path):
    """Names are all there is to reconcile."""
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny-llama", "custom")
    report = diff(one, other)
    names = set(tensor_shapes("tiny", "custom")), set(tensor_shapes("tiny-llama", "custom"))
    assert report["unexpected"] == sorted(names[0] - names[1])
    assert report["missing"] == []
    assert report["l2"]["compared"] == len(names[1])


def test_files_without_config(tmp_path):
    one = make(tmp_path / "one", "tiny", "custom") / "model.safetensors"
    other = make(tmp_path / "other", "tiny", "custom", seed=2)
    assert diff(one, other)["l2"]["sum"] == diff(one.parent, other)["l2"]["sum"]
    bare = other / "model.safetensors"
    assert diff(one, bare)["l2"] == {**diff(one, other)["l2"], "reference": str(bare)}
    hf = make(tmp_path / "hf", "tiny", "hf")
    assert diff(one, hf)["unexpected"] == []


def test_any_safetensors_files_are_compared(tmp_path):
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        content = {
            "w": torch.arange(6).reshape(2, 3).to(dtype) + number,
            "n": torch.arange(4),
            "b": torch.tensor([True, False]),
            "s": torch.tensor(3.0) * number,
            "e": torch.zeros(0, 4),
        }
        save_file(content, tmp_path / f"{number}.safetensors")
    report = diff(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    found = {row["name"]: row["l2"] for row in report["different"]}
    assert found == pytest.approx({"w": math.sqrt(6), "s": 3.0})
    assert report["layout"] is None
    assert report["l2"]["skipped"] == ["b"]


@pytest.mark.parametrize(
    ("left", "right"), [(256.0, 0.01), (1.0, 2.0**-27), (3e38, -3e38)], ids=str
)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_differences_are_made_in_fp64(dtypes, left, right, tmp_path):
    """Of two bf16 numbers of distant exponents fp32 cannot hold the difference."""
    one, other = (
        torch.full((5, 3), value, dtype=torch.bfloat16).to(getattr(torch, dtype))
        for value, dtype in zip((left, right), dtypes, strict=True)
    )
    save_file({"w": one}, tmp_path / "one.safetensors")
    save_file({"w": other}, tmp_path / "other.safetensors")
    report = diff(tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    expected = float((one.double() - other.double()).norm())
    assert report["l2"]["sum"] == pytest.approx(expected, rel=1e-9)


def test_values_that_are_no_numbers(tmp_path):
    """A NaN on one side must not look like equality."""
    one, other = make(tmp_path / "one", "tiny", "custom"), make(tmp_path / "o", "tiny", "custom")
    content = read(one)
    name = "mlp1.1.weight"
    content[name][0, 0] = math.nan
    put(one, content)
    report = diff(one, other)
    assert [row["name"] for row in report["different"]] == [name]
    assert report["l2"]["sum"] is None  # JSON has no word for it
    json.dumps(report, allow_nan=False)
    put(other, content)
    assert diff(one, other)["l2"]["sum"] == 0.0


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers(workers, tmp_path):
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", "hf", dtype="fp32")
    assert diff(one, other, workers=workers)["l2"] == diff(one, other, workers=1)["l2"]


def test_the_document_of_diff(tmp_path, cli):
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", "hf")
    outcome = cli("diff", one, other, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report.keys() >= KEYS
    assert (report["command"], report["output"], report["merged"]) == ("diff", None, None)
    assert report["l2"]["reference"] == str(other)
    assert report["l2"]["sum"] == diff(one, other)["l2"]["sum"]


def test_diff_in_words(tmp_path, cli):
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny", "custom", seed=1)
    content = read(other)
    content["mlp1.3.bias"] = content["mlp1.3.bias"].float()
    del content["mlp1.0.bias"]
    put(other, content)
    text = cli("diff", one, other).out
    assert "only in A: mlp1.0.bias" in text
    assert "dtypes differ: mlp1.3.bias: BF16 and F32" in text
    assert re.search(r"L2: total \S+, average \S+, global \S+", text)
    assert len(text.splitlines()) < 30
    assert cli("diff", one, other, "--quiet").out == ""


@pytest.mark.parametrize("gone", ["one", "other"])
def test_diff_with_nothing(gone, tmp_path, cli):
    folders = {n: make(tmp_path / n, "tiny", "custom") for n in ("one", "other")}
    folders[gone] = tmp_path / "nowhere"
    assert "nowhere" in refused(cli, tmp_path, 3, "diff", *folders.values())


# --- inspect -------------------------------------------------------------------------------------


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
    assert "3 pairs inside, ranks [4]" in cli("inspect", folder).out


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
    assert "r 4" in text
    assert json.loads(cli("inspect", tmp_path / "a", "--json").out)["adapter"]["r"] == 4


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
    report = inspect(file)
    assert (report["layout"], report["family"], report["dimensions"]) == (
        "custom", "internlm2", None,
    )  # fmt: skip
    assert list(report["files"]) == ["model.safetensors"]
    assert cli("inspect", file).code == 0
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
    assert "no .safetensors weights" in refused(cli, tmp_path, 3, "inspect", ref)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["InternVL3-8B", "InternVL3_5-8B"])
def test_a_real_size_is_quick(preset, layout, tmp_path):
    folder = sparse(tmp_path / "x", PRESETS[preset], layout)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        report = inspect(folder)
        seconds.append(time.perf_counter() - started)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    assert report["shards"] == 4
    assert min(seconds) < 0.5
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

    monkeypatch.setattr("streamshard.files.Files.read_into", fail)
    assert inspect(folder)["tensors"] == 77
    with pytest.raises(AssertionError):
        diff(folder, Path(make(tmp_path / "y", "tiny", "custom", seed=1)), workers=1)
