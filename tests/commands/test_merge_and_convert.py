"""Merging and converting in one pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from adapters import HOME, ODD, adapter_of, carried_to, weights_of
from folders import (
    OTHER,
    assert_files_of_safetensors,
    assert_same,
    carried,
    config_of,
    convert,
    make,
    without_weights,
)
from marks import slow, slow_but
from presets import PRESETS, Preset
from reference import read, same_tensor
from safetensors.torch import load_file

from streamshard import merge_lora
from streamshard.errors import InputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", slow_but(["bf16", "fp32"], "bf16"))
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_merging_and_converting_commute(layout, trained, dtype, size, tmp_path):
    """Base, adapter and output in any two layouts: the same files whichever comes first."""
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, OTHER[layout], dtype=dtype, max_shard_size=size)
    ref = make(tmp_path / "ref", preset, layout, dtype=dtype)
    adapter = adapter_of(tmp_path / "adapter", preset, trained)
    commutes(base, ref, adapter, layout, tmp_path, preset)


@slow
@pytest.mark.parametrize("r", [8, 80])
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_merging_and_converting_commute_for_any_size(layout, trained, r, tmp_path):
    """Heads and rows that do not fill tiles, columns of several tiles, ranks summed in fp64."""
    base = make(tmp_path / "base", ODD, OTHER[layout])
    ref = make(tmp_path / "ref", ODD, layout)
    adapter = adapter_of(tmp_path / "adapter", ODD, trained, r=r)
    commutes(base, ref, adapter, layout, tmp_path, ODD)


def commutes(base: Path, ref: Path, adapter: Path, layout: str, root: Path, preset: Preset) -> None:
    report = merge_lora(
        base=base, adapter=adapter, output=root / "at-once", layout=layout, reference=ref
    )
    assert report["layout"] == layout
    merge_lora(base=base, adapter=adapter, output=root / "merged")
    convert(layout, root / "merged", ref, root / "merged-converted")
    convert(layout, base, ref, root / "converted")
    merge_lora(base=root / "converted", adapter=adapter, output=root / "converted-merged")
    expected = weights_of(root / "at-once")
    assert weights_of(root / "merged-converted") == expected
    assert weights_of(root / "converted-merged") == expected
    assert config_of(root / "at-once") == config_of(root / "merged-converted")
    assert_files_of_safetensors(root / "at-once")
    # And it is right in the first place.
    content = carried(read(base), preset, layout)
    keys = load_file(adapter / "adapter_model.safetensors")
    trained = "custom" if any("vision_model" in key for key in keys) else "hf"
    updates = reference.updates_of(adapter, home=HOME[trained])
    before = carried_to(content, preset, layout, trained)
    after = carried_to(read(root / "at-once"), preset, layout, trained)
    if next(iter(content.values())).dtype != torch.float32:
        reference.assert_merged(after, before, updates, equal=0.999)
        return
    # fp32 is also what sums are made in, so the last digit may differ.
    for name, exact in reference.exactly_merged(before, updates).items():
        found = after.pop(name).double()
        torch.testing.assert_close(found, torch.from_numpy(exact), atol=1e-6, rtol=1e-6)
        del before[name]
    assert_same(after, before)


@pytest.mark.parametrize("trained", ["custom", "hf"])
def test_any_number_of_workers(trained, tmp_path):
    base = make(tmp_path / "base", ODD, "hf", max_shard_size="500KB")
    ref = make(tmp_path / "ref", ODD, "custom")
    adapter = adapter_of(tmp_path / "adapter", ODD, trained)
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out-{workers}"
        report = merge_lora(
            base=base, adapter=adapter, output=out, layout="custom", reference=ref, workers=workers
        )
        found.append((weights_of(out), report["l2"]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_distance_is_that_from_the_base(layout, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, OTHER[layout])
    ref = make(tmp_path / "ref", preset, layout, seed=3)
    adapter = adapter_of(tmp_path / "adapter", preset, OTHER[layout])
    report = merge_lora(
        base=base, adapter=adapter, output=tmp_path / "out", layout=layout, reference=ref
    )
    before, after = carried(read(base), preset, layout), read(tmp_path / "out")
    squares = [float(((after[n].double() - before[n].double()) ** 2).sum()) for n in before]
    found = report["l2"]
    assert found["reference"] == str(base)
    assert found["global"] == pytest.approx(sum(squares) ** 0.5, rel=1e-9)
    assert found["sum"] == pytest.approx(sum(s**0.5 for s in squares), rel=1e-9)
    assert found["compared"] == len(before)


def test_converting_takes_files_of_the_reference(tmp_path, cli):
    base = make(tmp_path / "base", "tiny", "hf")
    ref = without_weights(make(tmp_path / "ref", "tiny", "custom"))
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    outcome = cli(
        "merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "out",
        "--layout", "custom", "--reference", ref, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["layout"] == "custom"
    assert report["merged"] > 0
    names = {path.name for path in ref.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *names, "README.md", "model.safetensors", "streamshard.json",
    }  # fmt: skip


def test_a_layout_that_is_already_there_needs_no_reference(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "keep")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "hf", layout="hf")
    assert weights_of(tmp_path / "keep") == weights_of(tmp_path / "hf")


def test_converting_without_a_reference(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    with pytest.raises(UsageError, match="`reference`"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="custom")
    with pytest.raises(UsageError, match="`layout`"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="both")


def test_a_reference_of_the_wrong_layout(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    with pytest.raises(InputError, match="layout"):
        merge_lora(
            base=base, adapter=adapter, output=tmp_path / "out", layout="custom", reference=base
        )
    assert not (tmp_path / "out").exists()


def test_a_tied_base_is_untied(tmp_path):
    """The adapter leaves the embedding alone, so head and embedding stay equal."""
    base = make(tmp_path / "base", "tiny", "hf", tied=True)
    ref = make(tmp_path / "ref", "tiny", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="custom", reference=ref)
    written = read(tmp_path / "out")
    assert same_tensor(
        written["language_model.lm_head.weight"],
        written["language_model.model.embed_tokens.weight"],
    )
    assert config_of(tmp_path / "out")["llm_config"]["tie_word_embeddings"] is False


def test_another_vocabulary(tmp_path):
    grown = replace(PRESETS["tiny"], vocab=297, image_token=270)
    base = make(tmp_path / "base", grown, "custom")
    ref = make(tmp_path / "ref", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", grown, "custom")
    call = {
        "base": base, "adapter": adapter, "output": tmp_path / "out", "layout": "hf",
        "reference": ref,
    }  # fmt: skip
    with pytest.raises(InputError, match="tokenizer_from"):
        merge_lora(**call)
    merge_lora(**call, tokenizer_from="source")
    config = config_of(tmp_path / "out")
    assert (config["image_token_id"], config["text_config"]["vocab_size"]) == (270, 297)
