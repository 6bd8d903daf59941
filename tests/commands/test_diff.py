"""`diff` and `inspect`: what two checkpoints differ in, and what one is."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from folders import (
    KEYS,
    OTHER,
    as_custom,
    as_hf,
    carried,
    convert,
    distances,
    flattened,
    make,
    put,
    refused,
)
from make_checkpoint import write_checkpoint
from models import TINY, pack
from presets import PRESETS, SPELLINGS, tensor_shapes
from reference import digests, read
from safetensors.torch import save_file

from streamshard import diff, wrap_lora
from streamshard.errors import InputError, UsageError


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
    assert "\n  only in A: mlp1.0.bias\n" in text
    assert "dtypes differ: mlp1.3.bias: BF16 and F32" in text
    assert re.search(r"L2 of A from B: \S+ \(sum over tensors \S+, per parameter \S+\)", text)
    assert "two unrelated models, it seems" in text
    assert max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))
    assert len(text.splitlines()) < 30
    assert cli("diff", one, other, "--quiet").out == ""


def test_several_names_share_one_title(tmp_path, cli):
    """A terminal would break a line of title and long name in two, each with the title again."""
    one = make(tmp_path / "one", "tiny", "custom")
    other = make(tmp_path / "other", "tiny-qwen3", "custom")
    text = cli("diff", one, other).out
    assert "\n  only in A:\n    language_model.model.layers.0.self_attn.k_proj.bias\n" in text
    first = "language_model.model.layers.0.self_attn.k_proj.weight: [32, 64] and [64, 64]"
    assert f"\n  shapes differ:\n    {first}\n" in text
    assert [text.count(what) for what in ("  only in A", "  only in B", "shapes differ")] == [1] * 3
    assert "\n    and 2 more\n" in f"{text}\n"


@pytest.mark.parametrize("gone", ["one", "other"])
def test_diff_with_nothing(gone, tmp_path, cli):
    folders = {n: make(tmp_path / n, "tiny", "custom") for n in ("one", "other")}
    folders[gone] = tmp_path / "nowhere"
    assert "nowhere" in refused(cli, tmp_path, 3, "diff", *folders.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said_so(value, tmp_path, cli):
    """JSON has no such numbers, so the report has None."""
    for name, number in (("a", value), ("b", 0.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4, 4), number)}, tmp_path / name / "model.safetensors")
    outcome = cli("diff", tmp_path / "a", tmp_path / "b")
    assert outcome.code == 0, outcome.err
    assert "B: not finite (sum over tensors not finite, per parameter not finite)" in outcome.out
    assert re.search(r"not finite +w$", outcome.out, re.MULTILINE)


def test_one_that_is_wrapped_is_told(tmp_path, cli):
    """Else two hundred names that are in one only would be all that is said."""
    base = make(tmp_path / "base", "tiny", "custom")
    for name in ("one", "other"):
        wrap_lora(base=base, output=tmp_path / name, llm_r=2)
    for pair in ((base, tmp_path / "one"), (tmp_path / "one", base)):
        outcome = cli("diff", *pair)
        assert outcome.code == 0
        assert f"`streamshard merge-lora {tmp_path / 'one'}`" in outcome.err
    assert not diff(tmp_path / "one", tmp_path / "other")["warnings"]


def test_nothing_in_common_is_no_distance(tmp_path, cli):
    """S13: of the command, too."""
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    outcome = cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "L2: none, since no tensor could be compared" in outcome.out
    assert "sum over" not in outcome.out


def test_names_only_read_no_values(tmp_path):
    """Of models that differ in values alone nothing is said; shapes, dtypes and names are compared."""
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), "tiny", layout="custom", seed=seed)
    write_checkpoint(tmp_path / "wide", "tiny", layout="custom", dtype="fp32")
    same = diff(tmp_path / "0", tmp_path / "1", names=True)
    assert (same["l2"], same["different"], same["differ"], same["heat_map"]) == (
        None,
        [],
        False,
        None,
    )
    assert same["equal"] == same["tensors"]
    wide = diff(tmp_path / "0", tmp_path / "wide", names=True)
    assert wide["differ"]
    assert len(wide["dtypes"]) == wide["tensors"]
    assert wide["equal"] == 0
    with pytest.raises(UsageError, match="names"):
        diff(tmp_path / "0", tmp_path / "1", names=True, plot="a.png")
