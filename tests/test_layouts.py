"""Layouts: names and shapes of every model, forward passes, spellings, ties, and what is refused.

Names and shapes are compared with `tools/families.py`, values with running models: transformers'
own for the HF layout, and those of `internvit` for the custom layout.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace
from typing import Any

import internvit
import numpy as np
import pytest
import torch
import transformers
from families import PRESETS, SPELLINGS, model_config, tensor_shapes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streamshard.detection import Detected, detect, dims_from_names, layout_of
from streamshard.errors import InputError, UsageError
from streamshard.families import (
    FAMILIES,
    INNER,
    OTHER,
    Dims,
    check_config,
    config_fixes,
    config_layout,
    dims_from_config,
    llm_architecture,
)
from streamshard.layouts import convert, pieces, to_custom, to_hf
from streamshard.rows import in_memory
from streamshard.spelling import flat_name, spell
from streamshard.tensors import Array, Concat, Stored

NUMPY, TORCH = in_memory(np.concatenate), in_memory(torch.cat)

TINY = [name for name in PRESETS if name.startswith("tiny-")]
# One name for each set of dimensions: models that differ in nothing here are left out.
MODELS = list(
    {repr(replace(p, name="", dynamic_rope=0)): name for name, p in PRESETS.items()}.values()
)

# Published numbers of tensors, custom and HF (None where there is no HF model).
COUNTS = {
    "InternVL2-2B": (517, 661), "InternVL2-8B": (573, 733), "InternVL2-26B": (934, 1120),
    "InternVL2-4B": (541, None), "InternVL2-40B": (1138, None), "InternVL2-1B": (637, None),
    "InternVL-Chat-V1-2": (1138, None), "InternVL2-Llama3-76B": (1318, None),
    "InternVL2_5-1B": (637, 733), "InternVL3-1B": (637, 733), "InternVL3-2B": (685, 781),
    "InternVL2_5-4B": (781, 877), "InternVL3-8B": (685, 781), "InternVL3-9B": (781, 877),
    "InternVL3-14B": (925, 1021), "InternVL2_5-38B": (1366, 1456), "InternVL3-38B": (1366, 1456),
    "InternVL2_5-78B": (1558, 1648), "InternVL3-78B": (1558, 1648), "InternVL3_5-1B": (657, 753),
    "InternVL3_5-2B": (657, 753), "InternVL3_5-4B": (745, 841), "InternVL3_5-8B": (745, 841),
    "InternVL3_5-14B": (789, 885), "InternVL3_5-38B": (1302, 1392),
    "InternVL3_5-30B-A3B": (19213, 19309), "InternVL3_5-241B-A28B": (37540, 37630),
    "InternVL3_5-GPT-OSS-20B-A4B-Preview": (757, 853),
}  # fmt: skip


def config(preset: str, layout: str, *, tied: bool = False) -> dict[str, Any]:
    return model_config(PRESETS[preset], layout, tied=tied, torch_dtype="bfloat16")


def dims(preset: str, layout: str = "custom", *, tied: bool = False) -> Dims:
    return dims_from_config(config(preset, layout, tied=tied), architecture=PRESETS[preset].arch)


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Tensors that follow each other in one file, which nobody reads."""
    ends = itertools.accumulate((2 * math.prod(s) for s in shapes.values()), initial=1000)
    return {
        name: Stored("model.safetensors", at, shape, "BF16", 10**15)
        for (name, shape), at in zip(shapes.items(), ends, strict=False)
    }


def lazy(preset: str, layout: str, **how: Any) -> dict[str, Stored]:
    return stored(tensor_shapes(preset, layout, **how))


def shapes_of(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def values(preset: str, layout: str, **how: Any) -> dict[str, np.ndarray]:
    """Every element is different, so that a misplaced one shows."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(preset, layout, **how)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def message(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


# --- every model, by headers -------------------------------------------------------------------


@pytest.mark.parametrize("preset", MODELS)
def test_names_and_shapes_of_every_model(preset):
    custom, hf = lazy(preset, "custom"), lazy(preset, "hf")
    made_hf = to_hf(custom, dims(preset))
    made_custom = to_custom(hf, dims(preset, "hf"))
    assert shapes_of(made_hf) == shapes_of(hf)
    assert shapes_of(made_custom) == shapes_of(custom)
    # There and back is the very same place in the very same file, in the same order.
    again = to_custom(made_hf, dims(preset, "hf"))
    assert again == custom
    assert list(again) == list(custom)
    assert to_hf(made_custom, dims(preset)) == hf


@pytest.mark.parametrize("preset", COUNTS)
def test_counts_of_every_published_model(preset):
    custom, hf = COUNTS[preset]
    assert len(tensor_shapes(preset, "custom")) == custom
    if hf is not None:
        assert len(to_hf(lazy(preset, "custom"), dims(preset))) == hf


def test_the_parts_of_a_qkv_are_rows_of_one_range():
    made = to_hf(lazy("tiny", "custom"), dims("tiny"))
    whole = lazy("tiny", "custom")["vision_model.encoder.layers.0.attn.qkv.weight"]
    q, k, v = (made[f"vision_tower.encoder.layer.0.attention.{p}_proj.weight"] for p in "qkv")
    assert [q, k, v] == [whole.take(0, 32), whole.take(32, 64), whole.take(64, 96)]


def test_parts_may_lie_in_different_files():
    hf = lazy("tiny", "hf")
    names = [f"vision_tower.encoder.layer.0.attention.{p}_proj.weight" for p in "qkv"]
    for name, path in zip(names, ("a", "b", "c"), strict=True):
        hf[name] = replace(hf[name], path=path)
    whole = to_custom(hf, dims("tiny", "hf"))["vision_model.encoder.layers.0.attn.qkv.weight"]
    assert isinstance(whole, Concat)
    assert whole.parts == tuple(hf[name] for name in names)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", TINY)
def test_the_order_of_the_source_does_not_matter(preset, seed):
    hf = lazy(preset, "hf")
    names = list(hf)
    random.Random(seed).shuffle(names)
    shuffled = {name: hf[name] for name in names}
    assert to_custom(shuffled, dims(preset, "hf")) == to_custom(hf, dims(preset, "hf"))
    assert to_hf(to_custom(shuffled, dims(preset, "hf")), dims(preset)) == hf


# --- InternLM2's grouped rows ------------------------------------------------------------------

GROUPED = "language_model.model.layers.0.attention.wqkv.weight"


def wqkv_rows(heads: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    """Convert a `wqkv` whose rows hold their own number; answer the rows of q, k and v."""
    made = dims("tiny-internlm2")
    made = replace(made, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    custom = values("tiny-internlm2", "custom")
    total = (heads + 2 * kv_heads) * head_dim
    for name in [n for n in custom if n.endswith("wqkv.weight")]:
        custom[name] = np.arange(total)[:, None] * np.ones((1, 3))
    result = to_hf(custom, made, NUMPY)
    stem = "language_model.model.layers.0.self_attn."
    back = to_custom(result, made, NUMPY)
    assert np.array_equal(back[GROUPED], custom[GROUPED])
    return [result[f"{stem}{p}_proj.weight"][:, 0].astype(int) for p in "qkv"]


def test_grouped_rows_of_a_small_model():
    q, k, v = wqkv_rows(4, 2, 2)
    assert q.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.tolist() == [4, 5, 12, 13]
    assert v.tolist() == [6, 7, 14, 15]


def test_grouped_rows_of_internvl2_8b():
    q, k, v = wqkv_rows(32, 8, 128)
    assert q[:512].tolist() == list(range(512))
    assert (q[512], q[4095], k[0], k[128], v[0], v[1023]) == (768, 5887, 512, 1280, 640, 6143)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_grouped_rows_are_those_of_a_view(kv_heads, share, head_dim):
    q, k, v = wqkv_rows(kv_heads * share, kv_heads, head_dim)
    view = np.arange(kv_heads * (share + 2) * head_dim).reshape(kv_heads, share + 2, head_dim)
    assert np.array_equal(q, view[:, :share].ravel())
    assert np.array_equal(k, view[:, share].ravel())
    assert np.array_equal(v, view[:, share + 1].ravel())


def test_grouped_biases():
    custom = lazy("tiny-internlm2", "custom")
    stem = "language_model.model.layers.{}.attention."
    for layer in range(3):
        custom[f"{stem.format(layer)}wqkv.bias"] = Stored("b", 0, (128,), "BF16", 999)
        custom[f"{stem.format(layer)}wo.bias"] = Stored("b", 500, (64,), "BF16", 999)
    made = dims_from_config({**config("tiny-internlm2", "custom")})
    made = replace(made, attention_bias=True)
    hf = to_hf(custom, made)
    assert hf["language_model.model.layers.2.self_attn.k_proj.bias"].shape == (32,)
    assert to_custom(hf, made) == custom


# --- forward passes ----------------------------------------------------------------------------

KINDS = [*TINY, "tiny-6b-vit tiny-internlm2", "tiny-6b-vit tiny-qwen3"]


def preset_of(kind: str) -> Any:
    """A tiny preset; two names are the vision encoder of one with the language model of another."""
    first, *rest = kind.split()
    if not rest:
        return PRESETS[first]
    return replace(PRESETS[rest[0]], vision=PRESETS[first].vision)


def scramble(model: torch.nn.Module) -> None:
    """Give every parameter random values, those of norms too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def hf_model(settings: dict[str, Any]) -> torch.nn.Module:
    made = transformers.InternVLConfig.from_dict({**settings, "dtype": "float32"})
    made._attn_implementation = "eager"
    model = transformers.InternVLForConditionalGeneration._from_config(
        made, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def custom_model(settings: dict[str, Any], image_token: int) -> torch.nn.Module:
    return internvit.CustomModel({**settings, "image_token_id": image_token}).eval()


def logits_of(model: torch.nn.Module, image_token: int) -> torch.Tensor:
    torch.manual_seed(2)
    tokens = torch.tensor([[5, image_token, 7, 8, 9], [1, 2, image_token, 200, 17]])
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        if isinstance(model, internvit.CustomModel):
            return model(tokens, pixels)
        mask = torch.ones_like(tokens)
        return model(input_ids=tokens, pixel_values=pixels, attention_mask=mask).logits


def load_custom(model: torch.nn.Module, tensors: dict[str, torch.Tensor], preset: Any) -> None:
    """Load all of it and nothing else; transformers 5 holds Qwen3-MoE's experts packed."""
    if preset.arch == "Qwen3MoeForCausalLM":
        tensors = pack(tensors, preset)
    model.load_state_dict(tensors, strict=True)


def pack(tensors: dict[str, Any], preset: Any) -> dict[str, Any]:
    packed = {n: t for n, t in tensors.items() if not re.search(r"\.experts\.\d+\.", n)}
    stems = {m[1] for n in tensors if (m := re.match(r"(.+\.experts)\.\d+\.", n))}
    for stem in stems:
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{e}.{p}_proj.weight"] for e in range(preset.experts)])
            for p in ("gate", "up", "down")
        )
        packed[f"{stem}.gate_up_proj"] = torch.cat([gate, up], 1)
        packed[f"{stem}.down_proj"] = down
    return packed


def load_hf(folder: Any, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
    """Load with transformers from a folder; every tensor must find its place."""
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_fixes(settings, "hf")))
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_equal_after_conversion(kind, tmp_path):
    preset = preset_of(kind)
    settings = {
        layout: model_config(preset, layout, tied=False, torch_dtype="float32")
        for layout in ("custom", "hf")
    }
    from_custom = dims_from_config(settings["custom"])
    from_hf = dims_from_config(settings["hf"], architecture=llm_architecture(settings["custom"]))
    original = hf_model(settings["hf"])
    scramble(original)
    expected = logits_of(original, preset.image_token)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.1

    # HF to custom, from the names in memory and from those on disk.
    original.save_pretrained(tmp_path / "saved")
    on_disk = load_file(tmp_path / "saved" / "model.safetensors")
    made = to_custom(original.state_dict(), from_hf, TORCH)
    also = to_custom(on_disk, from_hf, TORCH)
    assert made.keys() == also.keys()
    assert all(torch.equal(made[name], also[name]) for name in made)
    converted = custom_model(settings["custom"], preset.image_token)
    load_custom(converted, made, preset)
    found = logits_of(converted, preset.image_token)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    # Custom to HF, in both spellings that are written.
    fresh = custom_model(settings["custom"], preset.image_token)
    scramble(fresh)
    expected = logits_of(fresh, preset.image_token)
    for spelling in ("flat", "nested"):
        tensors = to_hf(fresh.state_dict(), from_custom, TORCH, spelling=spelling)
        loaded = load_hf(tmp_path / spelling, tensors, settings["hf"])
        found = logits_of(loaded, preset.image_token)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_naive_split_would_be_noticed(tmp_path):
    """The forward pass is a judge: rows of wqkv cut in three give other logits."""
    preset = PRESETS["tiny-internlm2"]
    settings = model_config(preset, "custom", tied=False, torch_dtype="float32")
    model = custom_model(settings, preset.image_token)
    scramble(model)
    made = to_hf(model.state_dict(), dims_from_config(settings), TORCH)
    for name in [n for n in made if n.endswith("self_attn.q_proj.weight")]:
        wqkv = model.state_dict()[name.replace("self_attn.q_proj", "attention.wqkv")]
        made[name] = wqkv[: len(made[name])]
    hf = load_hf(tmp_path, made, model_config(preset, "hf", tied=False, torch_dtype="float32"))
    difference = logits_of(hf, preset.image_token) - logits_of(model, preset.image_token)
    assert difference.abs().max() > 1e-3


# --- spellings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe", "tiny-gpt-oss"])
def test_every_spelling_is_read(preset, spelling, wrapper):
    flat = lazy(preset, "hf")
    spelled = {wrapper + n: t for n, t in lazy(preset, "hf", spelling=spelling).items()}
    assert to_custom(spelled, dims(preset, "hf")) == to_custom(flat, dims(preset, "hf"))
    assert [flat_name(name) for name in spelled] == list(flat)
    found = detect(spelled, config(preset, "hf"))
    assert (found.layout, found.spelling, found.warnings) == ("hf", spelling, ())


def test_wrappers_within_names_are_removed():
    custom = lazy("tiny", "custom")
    wrapped = {
        "module." + n.replace("layers.", "layers._orig_mod.", 1): t for n, t in custom.items()
    }
    assert to_hf(wrapped, dims("tiny")) == to_hf(custom, dims("tiny"))
    assert layout_of(wrapped) == "custom"


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("preset", TINY)
def test_spellings_that_are_written(preset, spelling):
    made = to_hf(lazy(preset, "custom"), dims(preset), spelling=spelling)
    assert shapes_of(made) == tensor_shapes(preset, "hf", spelling=spelling)


@pytest.mark.parametrize("spelling", ["hybrid", "mid", "short", "other"])
def test_spellings_that_are_not_written(spelling):
    with pytest.raises(UsageError, match="cannot be written; flat, nested can"):
        to_hf(lazy("tiny", "custom"), dims("tiny"), spelling=spelling)
    with pytest.raises(UsageError, match="cannot be written"):
        spell("lm_head.weight", spelling)


def test_the_head_that_upstream_misnames_is_read():
    hf = lazy("tiny", "hf", spelling="nested")
    hf["model.lm_head.weight"] = hf.pop("lm_head.weight")
    made = to_custom(hf, dims("tiny", "hf"))
    assert made["language_model.lm_head.weight"] == hf["model.lm_head.weight"]
    assert detect(hf).spelling == "mixed"


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "model.lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.cls_token"),
        ("multi_modal_projector.linear_1.bias", "module.multi_modal_projector.linear_1.bias"),
    ],
)
def test_two_spellings_of_one_tensor_are_refused(name, again):
    hf = lazy("tiny", "hf")
    hf[again] = hf[name]
    text = message(lambda: to_custom(hf, dims("tiny", "hf")))
    assert f"'{name}' and '{again}' are both '{name}'" in text


# --- detection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
def test_detection_without_a_config(preset):
    family = dims(preset).family
    in_hf = "llama" if family.startswith("internlm") else family
    in_custom = "llama" if family == "internlm3" else family
    custom, hf = detect(lazy(preset, "custom")), detect(lazy(preset, "hf"))
    assert (custom.layout, custom.spelling, custom.family) == ("custom", None, in_custom)
    assert (hf.layout, hf.spelling, hf.family) == ("hf", "flat", in_hf)
    assert dims_from_names(list(lazy(preset, "custom")), "custom") == Dims(in_custom)
    for found in (custom, hf):
        assert not found.lora_wrapped
        assert not found.packed_experts
        assert not found.warnings
    assert custom.evidence == ("vision_model.embeddings.class_embedding",)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_detection_with_a_config(preset, layout):
    found = detect(lazy(preset, layout), config(preset, layout))
    architecture = FAMILIES[found.family or ""].architecture
    expected = PRESETS[preset].arch
    if layout == "hf" and expected.startswith("InternLM"):
        expected = "LlamaForCausalLM"
    assert (found.layout, architecture, found.warnings) == (layout, expected, ())


def test_detection_of_a_wrapped_checkpoint():
    names = {
        re.sub(r"^(language_model|vision_model)\.", r"\1.base_model.model.", name)
        for name in lazy("tiny-internlm2", "custom")
    }
    for stem in ("attention.wqkv", "attention.wo"):
        plain = f"language_model.base_model.model.model.layers.0.{stem}.weight"
        names.remove(plain)
        names.add(plain.replace(".weight", ".base_layer.weight"))
        names |= {plain.replace(".weight", f".lora_{x}.default.weight") for x in "AB"}
    found = detect(sorted(names), config("tiny-internlm2", "custom"))
    assert (found.layout, found.family, found.lora_wrapped) == ("custom", "internlm2", True)
    assert not found.warnings
    text = message(lambda: to_hf(dict.fromkeys(names, 0), dims("tiny-internlm2"), NUMPY))
    assert "LoRA-wrapped training checkpoint: merge its pairs first" in text


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mlp1.0.weight", "custom"),
        ("base_model.model.mlp1.1.weight", "custom"),
        ("vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.weight", "custom"),
        ("base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_A.weight", "custom"),
        ("base_model.model.model.vision_tower.encoder.layer.0.mlp.fc1.lora_B.weight", "hf"),
        ("base_model.model.multi_modal_projector.linear_1.weight", "hf"),
        ("module.model.multi_modal_projector.linear_1.weight", "hf"),
        ("language_model.model.vision_model.x", None),
        ("my_vision_model.x", None),
    ],
)
def test_names_that_tell_the_layout(name, layout):
    assert layout_of(["language_model.model.norm.weight", name]) == layout


def test_names_of_the_language_model_alone_prove_nothing():
    names = [name for name in lazy("tiny", "custom") if name.startswith("language_model.")]
    assert layout_of(names) is None
    text = message(lambda: detect(names))
    assert "language model do not tell the layout" in text
    assert "'language_model.model.embed_tokens.weight'" in text
    for layout in ("custom", "hf"):
        found = detect(names, config("tiny", layout))
        assert found.layout == layout
        assert found.evidence[0] == "config.json: model_type"


def test_both_layouts_are_refused():
    names = [*lazy("tiny", "custom"), "model.vision_tower.embeddings.cls_token"]
    both = ("'vision_model.embeddings.class_embedding' is of the custom layout and "
            "'model.vision_tower.embeddings.cls_token' of the HF layout")  # fmt: skip
    assert both in message(lambda: detect(names, config("tiny", "custom")))
    assert both in message(lambda: to_hf(dict.fromkeys(names, 0), dims("tiny"), NUMPY))
    assert layout_of(names) is None


def test_the_names_are_believed_against_the_config():
    found = detect(lazy("tiny", "custom"), config("tiny", "hf"))
    assert found.layout == "custom"
    assert "config.json is of the HF layout" in found.warnings[0]
    found = detect(lazy("tiny-qwen3", "hf"), config("tiny", "hf"))
    assert found.family == "qwen3"
    assert "language model is qwen2, but the names are those of qwen3" in found.warnings[0]


def test_names_of_no_family():
    names = [n.replace("mlp", "ffn") for n in lazy("tiny", "hf")]
    assert detect(names, config("tiny", "hf")).family is None
    assert "are not those of any of the families" in message(lambda: dims_from_names(names, "hf"))


def test_detection_is_a_value():
    assert detect(lazy("tiny", "hf")) == Detected(
        layout="hf",
        spelling="flat",
        family="qwen2",
        lora_wrapped=False,
        packed_experts=False,
        evidence=(
            "vision_tower.embeddings.cls_token",
            "language_model.model.embed_tokens.weight",
        ),
        warnings=(),
    )


# --- heads and ties ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
def test_a_tied_head_becomes_one_of_its_own(preset):
    hf = lazy(preset, "hf", tied=True)
    made = to_custom(hf, dims(preset, "hf", tied=True))
    assert shapes_of(made) == tensor_shapes(preset, "custom")
    internlm2 = preset == "tiny-internlm2"
    head = "language_model.output.weight" if internlm2 else "language_model.lm_head.weight"
    assert made[head] == hf["language_model.model.embed_tokens.weight"]
    # Both are written on the way back, as an untied checkpoint has them.
    assert shapes_of(to_hf(made, dims(preset))) == tensor_shapes(preset, "hf")


def test_a_head_that_is_stored_is_kept_though_tied():
    hf = lazy("tiny", "hf")
    made = to_custom(hf, dims("tiny", "hf", tied=True))
    assert made["language_model.lm_head.weight"] == hf["language_model.lm_head.weight"]


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
def test_a_head_is_never_invented(preset):
    hf = lazy(preset, "hf", tied=True)
    for made in (dims(preset, "hf"), Dims(dims(preset).family, heads=4, kv_heads=2, head_dim=16)):
        text = message(lambda made=made: to_custom(hf, made))
        assert "missing in the HF layout" in text
        assert "'language_model.lm_head.weight'" in text
        assert "a head is never invented" in text
    custom = lazy("tiny", "custom")
    del custom["language_model.lm_head.weight"]
    assert "'language_model.lm_head.weight'" in message(lambda: to_hf(custom, dims("tiny")))


def test_a_tied_embedding_is_not_invented_either():
    hf = lazy("tiny", "hf", tied=True)
    del hf["language_model.model.embed_tokens.weight"]
    text = message(lambda: to_custom(hf, dims("tiny", "hf", tied=True)))
    assert "missing" in text
    assert "'language_model.model.embed_tokens.weight'" in text


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        (True, True, True), (True, False, True), (True, None, True),
        (None, True, True), (None, False, True), (None, None, True),
        (False, True, True), (False, False, False), (False, None, False),
    ],
)  # fmt: skip
def test_what_the_flags_say_of_an_absent_head(outer, inner, tied):
    made = config("tiny", "hf")
    del made["tie_word_embeddings"], made["text_config"]["tie_word_embeddings"]
    made |= {} if outer is None else {"tie_word_embeddings": outer}
    made["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    assert dims_from_config(made).tied is tied


def test_what_transformers_leaves_out_when_tied(tmp_path):
    settings = {**config("tiny", "hf", tied=True), "dtype": "float32"}
    model = hf_model(settings)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensor_shapes("tiny", "hf", tied=True).keys()
    made = dims_from_config(json.loads((tmp_path / "config.json").read_text()))
    head = to_custom(saved, made, TORCH)["language_model.lm_head.weight"]
    assert torch.equal(head, saved["language_model.model.embed_tokens.weight"])


# --- experts -----------------------------------------------------------------------------------

MOE = "tiny-qwen3-moe"


def packed_values(layout: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    plain = {n: torch.from_numpy(t) for n, t in values(MOE, layout).items()}
    packed = pack(plain, PRESETS[MOE])
    return ({n: t.numpy() for n, t in each.items()} for each in (plain, packed))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_packed_experts_are_read(layout):
    plain, packed = packed_values(layout)
    assert detect(packed, config(MOE, layout)).packed_experts
    assert detect(packed).family == "qwen3_moe"
    for made in (dims(MOE, layout), Dims("qwen3_moe")):
        call = to_custom if layout == "hf" else to_hf
        one, other = call(plain, made, NUMPY), call(packed, made, NUMPY)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_packed_experts_are_ranges_of_one_tensor():
    hf = {n: t for n, t in lazy(MOE, "hf").items() if ".experts." not in n}
    for layer in range(3):
        stem = f"language_model.model.layers.{layer}.mlp.experts"
        hf[f"{stem}.gate_up_proj"] = Stored("p", 0, (4, 48, 64), "BF16", 10**9)
        hf[f"{stem}.down_proj"] = Stored("p", 24576, (4, 64, 24), "BF16", 10**9)
    made = to_custom(hf, dims(MOE, "hf"))
    stem = "language_model.model.layers.1.mlp.experts.2"
    assert made[f"{stem}.up_proj.weight"] == Stored(
        "p", 2 * (2 * 48 * 64 + 24 * 64), (24, 64), "BF16", 10**9
    )
    assert made[f"{stem}.down_proj.weight"] == Stored(
        "p", 24576 + 2 * 2 * 64 * 24, (64, 24), "BF16", 10**9
    )


def test_experts_packed_and_single_are_refused():
    hf = lazy(MOE, "hf")
    name = "language_model.model.layers.1.mlp.experts.down_proj"
    hf[name] = Stored("p", 0, (4, 64, 24), "BF16", 10**9)
    text = message(lambda: to_custom(hf, dims(MOE, "hf")))
    assert "layers.1.mlp.experts.0.down_proj.weight' is there twice" in text


@pytest.mark.parametrize("shape", [(3, 48, 64), (4, 48), (4, 48, 8, 8)])
def test_packed_experts_of_another_number(shape):
    hf = {n: t for n, t in lazy(MOE, "hf").items() if ".experts." not in n}
    hf["language_model.model.layers.0.mlp.experts.gate_up_proj"] = Stored("", 0, shape, "BF16", 9)
    text = message(lambda: to_custom(hf, dims(MOE, "hf")))
    assert "experts.gate_up_proj' has the shape" in text
    assert "[4, rows, columns] was expected" in text


def moe_with_dense_layer(layout: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The middle one of three layers has no experts."""
    made = config(MOE, layout)
    made[INNER[layout]]["mlp_only_layers"] = [1]
    tensors = {
        n: t for n, t in lazy(MOE, layout).items() if not re.search(r"model\.layers\.1\.mlp", n)
    }
    for part in ("gate", "up", "down"):
        tensors[f"language_model.model.layers.1.mlp.{part}_proj.weight"] = Stored(
            "d", 0, (128, 64), "BF16", 10**9
        )
    return tensors, made


def test_layers_without_experts():
    custom, made = moe_with_dense_layer("custom")
    for known in (dims_from_config(made), Dims("qwen3_moe")):
        assert to_custom(to_hf(custom, known), replace(known, tied=False)) == custom
    assert dims_from_config(made).dense_layers == {1}
    assert detect(custom, made).family == "qwen3_moe"
    text = message(lambda: to_hf(custom, dims(MOE)))
    assert "layers.1.mlp.gate_proj.weight': by the config this layer has experts" in text
    assert "(14)" not in text
    assert "missing in the custom layout of qwen3_moe (13)" in text
    text = message(lambda: to_hf(lazy(MOE, "custom"), dims_from_config(made)))
    assert "by the config this layer has no experts" in text


def test_every_second_layer_without_experts():
    made = config(MOE, "custom")
    made["llm_config"] |= {"decoder_sparse_step": 2, "mlp_only_layers": None}
    assert dims_from_config(made).dense_layers == {0, 2}


# --- incomplete, foreign, damaged --------------------------------------------------------------


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("known", [True, False])
def test_a_missing_part_of_a_triple(part, known):
    hf = lazy("tiny", "hf")
    name = f"vision_tower.encoder.layer.1.attention.{part}_proj.weight"
    del hf[name]
    made = dims("tiny", "hf") if known else Dims("qwen2")
    text = message(lambda: to_custom(hf, made))
    assert f"missing in the HF layout of qwen2 (1): '{name}'" in text
    result = convert(hf, made, "custom")
    assert result.missing == (name,)
    assert not result.unexpected
    assert "vision_model.encoder.layers.1.attn.qkv.weight" not in result.tensors
    assert len(result.tensors) == len(lazy("tiny", "custom")) - 1


# --- to the layout that it has -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", MODELS)
def test_to_its_own_layout_nothing_changes(preset, layout):
    tensors = lazy(preset, layout)
    result = convert(tensors, dims(preset, layout), layout, side=layout)
    assert list(result.tensors.items()) == list(tensors.items())
    assert (result.missing, result.unexpected, result.left) == ((), {}, ())
    # A large model has 40,000 names: no second set of them is made (the head's is a constant).
    assert len({id(name) for name in result.tensors} - {id(name) for name in tensors}) <= 1


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_to_its_own_layout_names_are_flat(spelling):
    tensors = lazy("tiny", "hf", spelling=spelling)
    result = convert(tensors, dims("tiny", "hf"), "hf", side="hf")
    assert result.tensors == lazy("tiny", "hf")


def test_to_its_own_layout_a_tied_head_is_written_out():
    result = convert(lazy("tiny", "hf", tied=True), dims("tiny", "hf", tied=True), "hf", side="hf")
    embedding = result.tensors["language_model.model.embed_tokens.weight"]
    assert result.tensors["language_model.lm_head.weight"] == embedding
    assert result.tensors.keys() == tensor_shapes("tiny", "hf").keys()


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_to_its_own_layout_packed_experts_come_apart(layout):
    plain, packed = packed_values(layout)
    result = convert(packed, dims(MOE, layout), layout, NUMPY, side=layout)
    assert result.tensors.keys() == plain.keys()
    assert all(np.array_equal(result.tensors[name], plain[name]) for name in plain)


def test_what_nothing_was_made_of():
    hf = lazy("tiny", "hf")
    triple = [f"vision_tower.encoder.layer.1.attention.{part}_proj.weight" for part in "qkv"]
    dropped = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    del hf[triple[0]]
    hf |= dict.fromkeys(("x", dropped), hf[triple[1]])
    result = convert(hf, dims("tiny", "hf"), "custom")
    assert (result.missing, list(result.unexpected)) == ((triple[0],), ["x"])
    assert sorted(result.left) == sorted([*triple[1:], dropped, "x"])
    # In their own layout the rest of a triple stays what it is.
    result = convert(hf, dims("tiny", "hf"), "hf", side="hf")
    assert sorted(result.left) == sorted([dropped, "x"])
    assert result.tensors.keys() == hf.keys() - {dropped, "x"}


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_every_tensor_is_needed(preset, layout):
    tensors = lazy(preset, layout)
    made = dims(preset, layout)
    for name in tensors:
        rest = {n: t for n, t in tensors.items() if n != name}
        assert convert(rest, made, OTHER[layout]).missing == (name,)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_no_other_name_is_accepted(preset, layout):
    tensors, made = lazy(preset, layout), dims(preset, layout)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.scale",
        "language_model.model.layers.00.mlp.up_proj.weight",
        "language_model.model.layers.{}.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight.weight",
        "language_model.model.layers.9999999999999.mlp.up_proj.weight",
        "mlp1.2.weight",
        "mlp1.{}.weight" if layout == "custom" else "vision_tower.layernorm.weight",
        "x",
        "",
    ):
        extra = {**tensors, name: tensors["language_model.model.norm.weight"]}
        result = convert(extra, made, OTHER[layout]) if layout_of(extra) else None
        if result is None:
            assert "two checkpoints are mixed" in message(
                lambda extra=extra: convert(extra, made, OTHER[layout])
            )
        else:
            assert list(result.unexpected) == [name]
            assert not result.missing


def test_unknown_names_are_listed_with_the_nearest():
    hf = lazy("tiny", "hf")
    hf["vision_tower.encoder.layer.1.attention.query.weight"] = hf["language_model.lm_head.weight"]
    text = message(lambda: to_custom(hf, dims("tiny", "hf")))
    assert "not in the HF layout of qwen2 (1):\n" in text
    assert "'vision_tower.encoder.layer.1.attention.query.weight': nearest: 'vision_tower" in text
    assert "layer.1.attention." in text.split("nearest")[1]
    assert "is this its config?" in text


def test_unexpected_names_are_as_the_file_has_them():
    hf = lazy("tiny", "hf", spelling="nested")
    hf["model.language_model.layers.7.mlp.up_proj.weight"] = hf["lm_head.weight"]
    assert convert(hf, dims("tiny", "hf"), "custom").unexpected == {
        "model.language_model.layers.7.mlp.up_proj.weight": "by the config there are 3 language "
        "model layers"
    }


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_layer_too_few_and_too_many(layout):
    tensors, made = lazy("tiny", layout), dims("tiny", layout)
    call = to_hf if layout == "custom" else to_custom
    text = message(lambda: call(tensors, replace(made, layers=4)))
    assert "layout of qwen2 (12): 'language" in text
    assert "'language_model.model.layers.3.self_attn.q_proj.weight'" in text
    text = message(lambda: call(tensors, replace(made, layers=2)))
    assert "layout of qwen2 (12):\n" in text
    assert "by the config there are 2 language model layers" in text
    text = message(lambda: call(tensors, replace(made, blocks=1)))
    assert "by the config there are 1 vision layers" in text
    # Without a config, a hole between layers still shows.
    holed = {n: t for n, t in tensors.items() if "language_model.model.layers.1." not in n}
    assert "layers.1." in message(lambda: call(holed, Dims("qwen2")))


def test_absurd_counts_cost_nothing():
    hf = lazy("tiny", "hf")
    hf["language_model.model.layers.999999.mlp.up_proj.weight"] = hf[
        "language_model.lm_head.weight"
    ]
    text = message(lambda: to_custom(hf, Dims("qwen2")))
    assert "missing in the HF layout of qwen2 (1,000 or more)" in text


@pytest.mark.parametrize(
    ("preset", "switch", "wrong", "name"),
    [
        ("tiny", "qkv_bias", False, "vision_model.encoder.layers.0.attn.qkv.bias"),
        ("tiny", "norm_bias", False, "vision_model.encoder.layers.0.norm1.bias"),
        ("tiny", "qk_norm", True, "vision_model.encoder.layers.0.attn.q_norm.weight"),
        ("tiny-6b-vit", "qk_norm", False, "vision_model.encoder.layers.0.attn.k_norm.weight"),
        ("tiny-6b-vit", "qkv_bias", True, "vision_model.encoder.layers.1.attn.qkv.bias"),
        ("tiny-llama", "mlp_bias", True, "language_model.model.layers.0.mlp.gate_proj.bias"),
        ("tiny-llama", "attention_bias", True, "language_model.model.layers.2.self_attn"),
    ],
)
def test_switches_of_the_config_are_checked(preset, switch, wrong, name):
    made = replace(dims(preset), **{switch: wrong})
    text = message(lambda: to_hf(lazy(preset, "custom"), made))
    assert name in text or name.replace(".0.", ".1.") in text
    assert ("missing" if wrong else "by the config there is no") in text
    unknown = replace(dims(preset), **{switch: None})
    assert len(to_hf(lazy(preset, "custom"), unknown)) == len(lazy(preset, "hf"))


def test_a_switch_is_on_in_all_layers_or_in_none():
    custom = lazy("tiny-6b-vit", "custom")
    for name in [n for n in custom if ".layers.1." in n and "q_norm" in n]:
        del custom[name]
    text = message(lambda: to_hf(custom, Dims("qwen2")))
    assert "'vision_model.encoder.layers.1.attn.q_norm.weight'" in text


def test_the_other_layout_is_refused():
    text = message(lambda: to_custom(lazy("tiny", "custom"), dims("tiny")))
    assert "'vision_model.embeddings.class_embedding' is of the custom layout" in text
    assert "the wrong way round" in text
    text = message(lambda: to_hf(lazy("tiny", "hf"), dims("tiny")))
    assert "'vision_tower.embeddings.cls_token' is of the HF layout" in text


def test_another_family_is_refused():
    text = message(lambda: to_custom(lazy("tiny-qwen3", "hf"), dims("tiny", "hf")))
    assert "self_attn.q_norm.weight'" in text
    assert "missing in the HF layout of qwen2 (9)" in text
    both = {**lazy("tiny-internlm2", "custom"), **lazy("tiny-llama", "custom")}
    text = message(lambda: to_hf(both, dims("tiny-internlm2")))
    assert "not in the custom layout of internlm2" in text


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vision_model.encoder.layers.0.attn.qkv.weight", (97, 32), "has 97 rows; 3 x 32 were"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (99,), "has 99 rows; 3 x 32 were"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (), "is a single number"),
    ],
)
def test_shapes_that_do_not_fit_when_split(name, shape, expected):
    custom = lazy("tiny", "custom")
    custom[name] = replace(custom[name], shape=shape)
    text = message(lambda: to_hf(custom, dims("tiny")))
    assert f"'{name}' {expected}" in text


def test_rows_that_cannot_be_cut_in_three():
    custom = lazy("tiny", "custom")
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    custom[name] = replace(custom[name], shape=(97, 32))
    text = message(lambda: to_hf(custom, Dims("qwen2")))
    assert f"'{name}' has 97 rows; 3 x 32 were expected" in text


def test_shapes_and_dtypes_that_do_not_fit_when_joined():
    stem = "vision_tower.encoder.layer.0.attention."
    for change, expected in (
        ({"shape": (31, 32)}, f"'{stem}k_proj.weight' has 31 rows; 32 were expected"),
        ({"shape": (32, 33)}, "is BF16 with columns [32] and"),
        ({"dtype": "F32"}, "'vision_tower.encoder.layer.0.attention.k_proj.weight' is F32"),
    ):
        hf = lazy("tiny", "hf")
        hf[f"{stem}k_proj.weight"] = replace(hf[f"{stem}k_proj.weight"], **change)
        assert expected in message(lambda hf=hf: to_custom(hf, dims("tiny", "hf")))


def test_grouped_rows_that_do_not_fit():
    custom, hf = lazy("tiny-internlm2", "custom"), lazy("tiny-internlm2", "hf")
    made = dims("tiny-internlm2")
    text = message(lambda: to_hf(custom, replace(made, head_dim=8)))
    assert f"'{GROUPED}' has 128 rows; 32 + 16 + 16 were expected" in text
    text = message(lambda: to_hf(custom, replace(made, heads=None)))
    assert "the config must say num_attention_heads" in text
    text = message(lambda: to_hf(custom, replace(made, heads=3)))
    assert "3 heads cannot be shared by 2 key-value heads" in text
    text = message(lambda: to_custom(hf, replace(made, kv_heads=4)))
    assert "self_attn.k_proj.weight' has 32 rows; 64 were expected" in text


def test_frequencies_of_old_files_are_dropped():
    for preset, name in (
        ("tiny-llama", "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("tiny-internlm2", "language_model.model.layers.1.attention.rotary_emb.inv_freq"),
        ("tiny", "language_model.model.rotary_emb.inv_freq"),
    ):
        custom = lazy(preset, "custom")
        extra = {**custom, name: Stored("", 0, (8,), "F32", 99)}
        assert to_hf(extra, dims(preset)) == to_hf(custom, dims(preset))
        assert detect(extra).family in (dims(preset).family, "llama")
        assert pieces(name, 8, dims(preset), "hf") == []


# --- updates -----------------------------------------------------------------------------------


def moved(preset: str, layout: str, delta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Carry every row of every tensor to `layout` by `pieces`."""
    target = {n: np.full(s, np.nan) for n, s in tensor_shapes(preset, layout).items()}
    for name, rows in delta.items():
        matrix = rows.reshape(-1, rows.shape[-1]) if ".experts." in name else rows
        source = dims(preset, OTHER[layout])
        for piece in pieces(name, len(matrix), source, layout):
            start, stop = piece.source_start, piece.source_start + piece.rows
            into = target[piece.target]
            into = into.reshape(-1, into.shape[-1]) if ".experts." in piece.target else into
            place = into[piece.target_start : piece.target_start + piece.rows]
            assert np.isnan(place).all()
            place[:] = matrix[start:stop]
    return target


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_updates_go_where_the_weights_go(preset, layout):
    delta = values(preset, OTHER[layout])
    call = to_custom if layout == "custom" else to_hf
    expected = call(delta, dims(preset, OTHER[layout]), NUMPY)
    found = moved(preset, layout, delta)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_updates_of_packed_experts(layout):
    plain, packed = packed_values(OTHER[layout])
    one, other = moved(MOE, layout, plain), moved(MOE, layout, packed)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    name = "language_model.model.layers.0.mlp.experts.gate_up_proj"
    text = message(lambda: pieces(name, 4, Dims("qwen3_moe"), layout))
    assert "the config must say num_experts" in text


def test_updates_in_any_spelling():
    for name in (
        "model.vision_tower.encoder.layer.3.attention.v_proj.weight",
        "vision_tower.encoder.layer.3.attention.v_proj.weight",
    ):
        (piece,) = pieces(name, 32, dims("tiny"), "custom")
        assert piece.target == "vision_model.encoder.layers.3.attn.qkv.weight"
        assert (piece.target_start, piece.source_start, piece.rows) == (64, 0, 32)


def test_updates_that_have_no_place():
    text = message(lambda: pieces("vision_model.x.weight", 4, dims("tiny"), "hf"))
    assert "'vision_model.x.weight' is no tensor of the custom layout of qwen2" in text
    name = "vision_tower.encoder.layer.0.attention.q_proj.weight"
    text = message(lambda: pieces(name, 31, dims("tiny"), "custom"))
    assert f"'{name}' has 31 rows; 32 were expected" in text


def test_a_lora_pair_moves_with_its_rows():
    """B @ A of an InternLM2 `wqkv` is, row by row, that of q, k and v."""
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((2, 64)), rng.standard_normal((128, 2))
    custom = values("tiny-internlm2", "custom")
    custom[GROUPED] = B @ A
    expected = to_hf(custom, dims("tiny-internlm2"), NUMPY)
    for piece in pieces(GROUPED, 128, dims("tiny-internlm2"), "hf"):
        rows = B[piece.source_start : piece.source_start + piece.rows] @ A
        place = slice(piece.target_start, piece.target_start + piece.rows)
        np.testing.assert_allclose(expected[piece.target][place], rows)


# --- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", MODELS)
def test_both_configs_of_a_model_say_the_same(preset):
    one, other = dims(preset, "custom"), dims(preset, "hf")
    assert replace(one, attention_bias=None, mlp_bias=None, head_dim=None) == replace(
        other, attention_bias=None, mlp_bias=None, head_dim=None
    )
    assert (one.vision_hidden, one.blocks) == (
        PRESETS[preset].vision.hidden,
        PRESETS[preset].vision.layers,
    )


def test_dimensions_of_a_real_config():
    assert dims("InternVL2-8B") == Dims(
        family="internlm2",
        blocks=24,
        layers=32,
        vision_hidden=1024,
        heads=32,
        kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        qk_norm=False,
        norm_bias=True,
        attention_bias=False,
        mlp_bias=False,
        tied=False,
    )


def test_absent_keys_mean_the_defaults_of_the_class():
    custom, hf = config("tiny", "custom"), config("tiny", "hf")
    custom["vision_config"], hf["vision_config"] = {}, {}
    made = dims_from_config(custom)
    assert (made.blocks, made.vision_hidden) == (48, 3200)
    assert (made.qkv_bias, made.qk_norm, made.norm_bias) == (False, True, False)
    made = dims_from_config(hf)
    assert (made.blocks, made.vision_hidden) == (24, 1024)
    assert (made.qkv_bias, made.qk_norm, made.norm_bias) == (False, False, True)
    expected = transformers.InternVLConfig().vision_config
    assert (expected.num_hidden_layers, expected.hidden_size) == (24, 1024)
    assert (expected.attention_bias, expected.use_qk_norm) == (False, False)


def test_configs_that_transformers_writes(tmp_path):
    for preset in TINY:
        made = transformers.InternVLConfig.from_dict(config(preset, "hf"))
        made.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        found = dims_from_config(saved, architecture=PRESETS[preset].arch)
        assert found == dims(preset, "hf")


def test_llama_may_be_three_families():
    hf = config("tiny-internlm2", "hf")
    text = message(lambda: dims_from_config(hf))
    assert "'LlamaForCausalLM', 'InternLM2ForCausalLM', 'InternLM3ForCausalLM'" in text
    assert "Only the config of the custom model tells" in text
    for architecture, family in (
        ("LlamaForCausalLM", "llama"),
        ("InternLM2ForCausalLM", "internlm2"),
        ("InternLM3ForCausalLM", "internlm3"),
    ):
        assert dims_from_config(hf, architecture=architecture).family == family


def changed(layout: str, **changes: Any) -> dict[str, Any]:
    """A config with some values of the language model, or of `vision`, changed or taken out."""
    made = config("tiny", layout)
    inner = made[INNER[layout]]
    for key, value in changes.items():
        section = made["vision_config"] if key.startswith("vision_") else inner
        section[key.removeprefix("vision_")] = value
        if value is None:
            del section[key]
    return made


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, "model_type is 'None'; 'internvl_chat' or 'internvl' was expected"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"model_type": "internvl_chat"}, "llm_config.architectures is missing"),
        ({"model_type": "internvl", "text_config": []}, "text_config is no object"),
        (changed("custom", architectures=["Gemma2ForCausalLM"]), "is 'Gemma2ForCausalLM'"),
        (changed("custom", architectures=[]), "architectures is missing"),
        (changed("hf", model_type="gemma2"), "text_config.model_type is 'gemma2'"),
        (changed("hf", num_key_value_heads=3), "is 4, which num_key_value_heads, 3, does not"),
        (changed("hf", hidden_size=65), "hidden_size is 65, which num_attention_heads, 4, does"),
        (changed("hf", num_hidden_layers=-1), "num_hidden_layers is -1; a whole number"),
        (changed("hf", num_hidden_layers=10**9), "num_hidden_layers is 1000000000; a whole"),
        (changed("hf", num_hidden_layers="3"), "num_hidden_layers is '3'; a whole number"),
        (changed("hf", num_attention_heads=True), "num_attention_heads is True; a whole"),
        (changed("hf", vision_attention_bias=1), "vision_config.attention_bias is 1; true or"),
        (changed("hf", vision_norm_type="group"), "norm_type is 'group'; layer_norm or rms_norm"),
        (changed("hf", attention_bias="no"), "text_config.attention_bias is 'no'; true or false"),
    ],
)
def test_configs_that_are_refused(made, expected):
    text = message(lambda: dims_from_config(made, where="some/config.json"))
    assert text.startswith("some/config.json: ")
    assert expected in text


def test_lists_of_dense_layers_that_are_none():
    made = config(MOE, "hf")
    made["text_config"]["mlp_only_layers"] = "1"
    assert "mlp_only_layers is no list of layers" in message(lambda: dims_from_config(made))


def test_configs_of_different_models():
    for layout in ("custom", "hf"):
        text = message(
            lambda layout=layout: dims_from_config(
                config("tiny", layout), architecture="Phi3ForCausalLM"
            )
        )
        assert "Phi3ForCausalLM" in text
        assert "configs of different models" in text


def test_what_hf_cannot_do_is_refused():
    made = config("tiny", "custom")
    check_config(made)
    check_config(config("tiny", "hf"))
    text = message(lambda: check_config({**made, "ps_version": "v1"}, "a/config.json"))
    assert text.startswith("a/config.json: ps_version is v1; the HF layout has only v2")
    del made["ps_version"]
    assert "ps_version is absent, which means v1" in message(lambda: check_config(made))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_flags_of_a_written_config(layout):
    before = config("tiny", layout, tied=True)
    before |= {"use_llm_lora": 16} if layout == "custom" else {}
    kept = json.dumps(before)
    after = config_fixes(before, layout)
    inner = INNER[layout]
    assert after["tie_word_embeddings"] is False
    assert after[inner]["tie_word_embeddings"] is False
    assert json.dumps(before) == kept
    assert config_layout(after) == layout
    if layout == "custom":
        assert (after["use_llm_lora"], after["use_backbone_lora"]) == (0, 0)
        after |= {"use_llm_lora": 16, "use_backbone_lora": 0}
    after["tie_word_embeddings"] = after[inner]["tie_word_embeddings"] = True
    assert after == before


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, None),
        ({"rope_theta": 1e6}, None),
        (
            {"rope_theta": 1e6, "rope_type": "dynamic", "type": "dynamic", "factor": 2.0},
            {"type": "dynamic", "factor": 2.0},
        ),
        ({"rope_theta": 1e6, "type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 32.0, "truncate": False},
            {"rope_type": "yarn", "factor": 32.0, "truncate": False},
        ),
    ],
)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_rotary_settings_of_transformers_5_are_written_back(layout, parameters, expected):
    made = changed(layout, rope_theta=None, rope_scaling=None, rope_parameters=parameters)
    inner = config_fixes(made, layout)[INNER[layout]]
    assert inner["rope_theta"] == 1e6
    assert inner.get("rope_scaling") == expected
    # transformers 5 still reads what it wrote.
    read = transformers.Qwen2Config(**inner).rope_parameters
    assert read["rope_theta"] == 1e6
    assert read["rope_type"] == (expected or {"type": "default"}).get("type", "yarn")


def test_rotary_settings_that_are_there_are_kept():
    made = changed("hf", rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    inner = config_fixes(made, "hf")["text_config"]
    assert inner["rope_theta"] == 10000.0
    made = changed("hf", rope_parameters={"full_attention": {"rope_theta": 5.0}})
    assert "differ between kinds of layers" in message(lambda: config_fixes(made, "hf"))


# --- the tables themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_name_is_in_two_rows(family):
    for side in ("custom", "hf"):
        names = [name for row in (*family.rows, *family.packed) for name in row.names(side)]
        one_sided = [n for n in names if not (side == "custom" and family.packed and "expert" in n)]
        assert len(set(one_sided)) == len(one_sided)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_rows_have_the_same_holes_on_both_sides(family):
    for row in family.rows:
        holes = [re.findall(r"\{\w+\}", n) for side in ("custom", "hf") for n in row.names(side)]
        assert all(each == holes[0] for each in holes)


def test_arrays_convert_too():
    """Tensors in memory are `Lazy` as well: those of adapters that were pickled."""
    hf = {
        n: Array(np.zeros(math.prod(s) * 2, np.uint8), s, "BF16")
        for n, s in tensor_shapes("tiny", "hf").items()
    }
    assert shapes_of(to_custom(hf, dims("tiny", "hf"))) == tensor_shapes("tiny", "custom")
