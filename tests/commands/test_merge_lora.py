"""Merged numbers and reported distances against exact arithmetic in fp64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
from adapters import flat
from make_checkpoint import PRESETS, write_adapter, write_checkpoint
from reference import load_file, of_experts, save_file

from streamshard import merge_lora

NAME = "language_model.model.layers.0.mlp.up_proj"
TINY = [name for name in PRESETS if name.startswith("tiny")]


def make(
    folder: Path,
    *,
    shape: tuple[int, int] = (700, 500),
    base: str = "BF16",
    adapter: str = "F32",
    std: float = 0.02,
    r: int = 16,
    name: str = NAME,
    seed: int = 0,
    **config: object,
) -> tuple[Path, Path]:
    """Write one weight as trained models have it, beside one that stays, and an adapter for it.

    W has a deviation of 0.02, A of 1 / sqrt(columns), B of `std`.
    """
    rows, columns = shape
    if not (folder / "base").exists():
        reference.save_checkpoint(
            folder / "base",
            {
                f"{NAME}.weight": reference.normal(shape, 0.02, seed=1, dtype=base),
                "vision_model.norm.weight": reference.normal((9,), 1, seed=2, dtype=base),
            },
        )
    pair = {
        f"base_model.model.{name}.lora_A.weight": reference.normal(
            (r, columns), columns**-0.5, seed=3 + seed, dtype=adapter
        ),
        f"base_model.model.{name}.lora_B.weight": reference.normal(
            (rows, r), std, seed=4 + seed, dtype=adapter
        ),
    }
    config = {"r": r, "lora_alpha": 2 * r} | config
    reference.save_adapter(folder / f"adapter{seed}", pair, **config)
    return folder / "base", folder / f"adapter{seed}"


def assert_within_fp32(written, base, updates):
    """Every element within the error bound of a sum in fp32 (of products in fp32)."""
    exact = reference.exactly_merged(base, updates)
    for home, values in exact.items():
        bound = np.abs(reference.double(base[home]))
        for update in updates:
            if update.home == home:
                terms = update.A.shape[0] + 3
                bound = bound + terms * abs(update.scale) * (np.abs(update.B) @ np.abs(update.A))
        assert (np.abs(reference.double(written[home]) - values) <= 2.0**-24 * bound * 2).all()


@pytest.mark.parametrize("std", [0.02, 0.001])
@pytest.mark.parametrize("adapter", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("base", ["BF16", "F16", "F32"])
def test_every_mix_of_dtypes(base, adapter, std, tmp_path):
    paths = make(tmp_path, base=base, adapter=adapter, std=std)
    merge_lora(base=paths[0], adapter=paths[1], output=tmp_path / "out")
    written, content = reference.read(tmp_path / "out"), reference.read(paths[0])
    updates = reference.updates_of(paths[1])
    if base == "F32":
        assert_within_fp32(written, content, updates)
        return
    # fp16 has eight times as many digits after the point to get wrong: 99.989 % were measured.
    equal = 0.9999 if base == "BF16" else 0.9995
    reference.assert_merged(written, content, updates, equal=equal)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (65, 1), (64, 64), (63, 129), (191, 2053)])
@pytest.mark.parametrize("r", [1, 5, 40])
def test_any_shape_and_rank(shape, r, tmp_path):
    base, adapter = make(tmp_path, shape=shape, r=r)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    # Of few elements one or two may be among the one in ten thousand.
    reference.assert_merged(written, content, reference.updates_of(adapter), equal=0.9995)


@pytest.mark.parametrize("r", [8, 64, 128, 512])
def test_share_of_correctly_rounded_elements(r, tmp_path):
    """The target holds for the ranks in use; 128 is the default of InternVL's trainer."""
    base, adapter = make(tmp_path, shape=(1024, 1024), r=r)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    reference.assert_merged(written, content, reference.updates_of(adapter), equal=0.9999)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 1},
        {"lora_alpha": 22.627416997969522},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": -3, "use_rslora": False},
    ],
    ids=str,
)
def test_scaling(config, tmp_path):
    base, adapter = make(tmp_path, base="F32", **config)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    assert_within_fp32(written, content, reference.updates_of(adapter))
    delta = reference.double(written[f"{NAME}.weight"]) - reference.double(
        content[f"{NAME}.weight"]
    )
    (update,) = reference.updates_of(adapter)
    root = math.sqrt(16) if config.get("use_rslora") else 16
    measured = (delta * (update.B @ update.A)).sum() / ((update.B @ update.A) ** 2).sum()
    assert measured == pytest.approx(config["lora_alpha"] / root, rel=1e-4)


@pytest.mark.parametrize(
    ("rank", "alpha", "r", "scale"),
    [
        ({}, {"up_proj": 3}, 16, 3 / 16),
        ({"up_proj": 4}, {}, 4, 32 / 4),
        ({"up_proj": 4}, {"up_proj": 10}, 4, 10 / 4),
        ({"mlp.up_proj": 4, "up_proj": 8}, {"mlp": 10}, 4, 32 / 4),
        ({"up_proj": 8, "mlp.up_proj": 4}, {}, 8, 32 / 8),
        ({"p_proj": 4}, {"xup_proj": 7}, 16, 2),
        ({rf"^{NAME}": 4}, {r"gate_proj|up_proj": 7}, 4, 7 / 4),
        ({r".*layers\.0\..*": 4}, {r".*layers\.1\..*": 7}, 4, 32 / 4),
    ],
)
def test_patterns(rank, alpha, r, scale, tmp_path):
    """Keys match whole segments from the right; the first in file order wins."""
    base, adapter = make(tmp_path, base="F32", r=r)
    (update,) = reference.updates_of(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"r": 16, "lora_alpha": 32, "rank_pattern": rank, "alpha_pattern": alpha}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    assert_within_fp32(written, content, [update._replace(scale=scale)])


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_several_adapters_are_summed_and_rounded_once(dtype, tmp_path):
    weights = [0.7, -0.4, 1.0, 2.5]
    adapters = []
    for seed in range(4):
        base, adapter = make(
            tmp_path,
            base=dtype,
            r=4 * (seed + 1),
            seed=seed,
            adapter=["F32", "BF16", "F16", "F32"][seed],
            use_rslora=seed == 2,
        )
        adapters.append(adapter)
    merge_lora(base=base, adapter=adapters, weight=weights, output=tmp_path / "out")
    updates = [
        update
        for adapter, weight in zip(adapters, weights, strict=True)
        for update in reference.updates_of(adapter, weight=weight)
    ]
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    if dtype == "F32":
        assert_within_fp32(written, content, updates)
    else:  # one after the other would have 57 % right
        reference.assert_merged(written, content, updates)


def test_a_weight_defaults_to_one(tmp_path):
    base, one = make(tmp_path)
    _, two = make(tmp_path, seed=1)
    merge_lora(base=base, adapter=[one, two], output=tmp_path / "out")
    merge_lora(base=base, adapter=[one, two], weight=[1, 1], output=tmp_path / "weighed")
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    reference.assert_merged(
        written, content, [*reference.updates_of(one), *reference.updates_of(two)]
    )
    weighed = reference.read(tmp_path / "weighed")
    assert all(reference.same_tensor(written[name], weighed[name]) for name in written)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_dtype_is_one_rounding_too(dtype, tmp_path):
    spelled = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    base, adapter = make(tmp_path, base="F32" if dtype != "fp32" else "BF16")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", dtype=dtype)
    written, content = reference.read(tmp_path / "out"), reference.read(base)
    updates = reference.updates_of(adapter)
    if dtype == "fp32":
        assert_within_fp32(written, content, updates)
        assert {t.dtype for t in written.values()} == {reference.TORCH["F32"]}
    else:
        reference.assert_merged(
            written, content, updates, dtype=spelled, equal=0.9999 if dtype == "bf16" else 0.9995
        )


def test_another_dtype_is_in_the_config(tmp_path):
    base, adapter = make(tmp_path)
    config = {
        "model_type": "internvl_chat",
        "torch_dtype": "bfloat16",
        "llm_config": {"torch_dtype": "bfloat16", "hidden_size": 5},
        "vision_config": {"dtype": "bfloat16", "torch_dtype": None},
        "ä": 1e-6,
    }
    (base / "config.json").write_text(json.dumps(config))
    merge_lora(base=base, adapter=adapter, output=tmp_path / "kept")
    assert (tmp_path / "kept/config.json").read_bytes() == (base / "config.json").read_bytes()
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", dtype="fp16")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == config | {
        "torch_dtype": "float16",
        "llm_config": {"torch_dtype": "float16", "hidden_size": 5},
        "vision_config": {"dtype": "float16", "torch_dtype": None},
    }


def test_zero_changes_keep_every_bit(tmp_path):
    """Minus zero too: a weight whose update is zero is copied, not computed."""
    base, adapter = make(tmp_path, shape=(70, 50))
    content = reference.read(base)
    content[f"{NAME}.weight"][:, ::2] = -0.0
    content["language_model.model.layers.1.mlp.up_proj.weight"] = content[f"{NAME}.weight"] + 0.5
    save_file(content, base / "model.safetensors", {"format": "pt"})
    pair = load_file(adapter / "adapter_model.safetensors")
    other = {key.replace("layers.0", "layers.1"): tensor.clone() for key, tensor in pair.items()}
    pair = {key: tensor * ("lora_A" in key) for key, tensor in pair.items()}
    save_file(pair | other, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written = reference.read(tmp_path / "out")
    assert reference.same_tensor(written[f"{NAME}.weight"], content[f"{NAME}.weight"])
    changed = "language_model.model.layers.1.mlp.up_proj.weight"
    assert not reference.same_tensor(written[changed], content[changed])


# --- distances ------------------------------------------------------------------------------------


def assert_distances(output: Path, base: Path, report: dict) -> None:
    """What is reported is what a comparison of the written files gives, to 1e-6."""
    written, content = reference.read(output), reference.read(base)
    norms = {
        name: math.sqrt(((reference.double(written[name]) - reference.double(t)) ** 2).sum())
        for name, t in content.items()
        if t.is_floating_point()
    }
    l2 = report["l2"]
    assert l2["reference"] == str(base)
    assert l2["compared"] + len(l2["skipped"]) == len(content)
    total = math.fsum(norms.values())
    assert l2["sum"] == pytest.approx(total, rel=1e-6)
    assert l2["global"] == pytest.approx(math.hypot(*norms.values()), rel=1e-6)
    parameters = sum(t.numel() for t in content.values())
    assert l2["per_parameter"] == pytest.approx(total / parameters, rel=1e-6)
    kept = json.loads((output / "streamshard.json").read_text())
    per_tensor = kept["l2_per_tensor"]
    assert set(per_tensor) <= set(norms)
    for name, norm in norms.items():
        assert per_tensor.get(name, 0) == pytest.approx(norm, rel=1e-6, abs=0)
    assert kept["l2"] == l2


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp32"])
@pytest.mark.parametrize("base", ["BF16", "F32"])
def test_distances(base, dtype, tmp_path):
    paths = make(tmp_path, base=base)
    report = merge_lora(base=paths[0], adapter=paths[1], output=tmp_path / "out", dtype=dtype)
    assert report["l2"]["global"] > 0.1
    assert_distances(tmp_path / "out", paths[0], report)


def test_distances_of_a_tiny_update(tmp_path):
    """One step of bf16 in a few elements, beside large weights that stay."""
    base, adapter = make(tmp_path, std=1e-6)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert 0 < report["l2"]["global"] < 0.1
    assert_distances(tmp_path / "out", base, report)


# --- every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
def test_every_family_in_the_custom_layout(preset, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, preset, layout="custom", max_shard_size="100KB")
    write_adapter(adapter, preset, layout="custom", targets="all", r=8)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    content = reference.read(base)
    updates = [u for pair in reference.updates_of(adapter) for u in of_experts(pair, content)]
    reference.assert_merged(reference.read(tmp_path / "out"), content, updates)
    assert_distances(tmp_path / "out", base, report)
    assert report["merged"] == len(updates)
    assert (report["layout"], report["tensors"]) == ("custom", len(content))
    kept = {p.name for p in base.iterdir()} | {"README.md", "streamshard.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("spelling", ["flat", "nested"])
def test_every_family_in_the_layout_of_transformers(preset, spelling, tmp_path):
    """Adapters have the names of the loaded model; files may have others."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, preset, layout="hf", spelling=spelling)
    write_adapter(adapter, preset, layout="hf", targets="all", r=8)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    content = reference.read(base)
    home = flat if spelling == "flat" else reference.in_base
    pairs = reference.updates_of(adapter, home=home)
    updates = [update for pair in pairs for update in of_experts(pair, content)]
    reference.assert_merged(reference.read(tmp_path / "out"), content, updates)
    assert (report["merged"], report["layout"]) == (len(updates), "hf")


# --- names ----------------------------------------------------------------------------------------


def respelled(folder: Path, adapter: Path, change) -> Path:
    content = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    return reference.save_adapter(
        folder, {change(key): tensor for key, tensor in content.items()}, **config
    )


SPELLINGS = {
    "module": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled-inside": lambda key: key.replace("model.layers", "model._orig_mod.layers"),
    "compiled-layers": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda key: key.replace("mlp.", "_fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
    "in-memory": lambda key: key.replace(".weight", ".default.weight"),
    "other-name": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "twice": lambda key: f"base_model.model.{key}",
    "no-prefix": lambda key: key.removeprefix("base_model.model."),
    "everything": lambda key: f"module._orig_mod.base_model.model.{key}".replace(
        ".weight", ".default.weight"
    ),
    "more-model": lambda key: key.replace("base_model.model.", "base_model.model.model."),
    "less-outer": lambda key: key.replace("language_model.", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_spellings_of_adapter_keys(spelling, pickled, tmp_path):
    base, adapter = make(tmp_path, shape=(70, 50))
    other = respelled(tmp_path / "other", adapter, SPELLINGS[spelling])
    if pickled:
        content = load_file(other / "adapter_model.safetensors")
        reference.torch.save(content, other / "adapter_model.bin")
        (other / "adapter_model.safetensors").unlink()
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    merge_lora(base=base, adapter=other, output=tmp_path / "respelled")
    files = [tmp_path / folder / "model.safetensors" for folder in ("out", "respelled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_pickled_adapter_is_the_same_adapter(dtype, tmp_path):
    base, adapter = make(tmp_path, adapter=dtype)
    content = load_file(adapter / "adapter_model.safetensors")
    # Views with strides, as trainers save them.
    content = {key: tensor.t().contiguous().t() for key, tensor in content.items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    pickled = reference.save_adapter(tmp_path / "bin", content, pickled=True, **config)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    merge_lora(base=base, adapter=pickled, output=tmp_path / "from-bin")
    files = [tmp_path / folder / "model.safetensors" for folder in ("out", "from-bin")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    base, adapter = make(tmp_path)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    (adapter / "adapter_model.bin").write_bytes(b"garbage")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "again")
    files = [tmp_path / folder / "model.safetensors" for folder in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_names_that_fit_in_two_ways_are_refused(tmp_path):
    base, adapter = make(tmp_path, shape=(70, 50))
    content = reference.read(base)
    twin = NAME.removeprefix("language_model.")
    content[f"{twin}.weight"] = content[f"{NAME}.weight"] + 1
    save_file(content, base / "model.safetensors", {"format": "pt"})
    respelled(tmp_path / "inner", adapter, SPELLINGS["less-outer"])
    from streamshard.errors import AdapterError

    # As named, or with a leading "language_model.": both are there.
    with pytest.raises(AdapterError, match="more than one way"):
        merge_lora(base=base, adapter=tmp_path / "inner", output=tmp_path / "out")


@pytest.mark.parametrize("flag", ["top", "text", None])
def test_a_changed_head_is_not_tied_again_by_its_config(flag, tmp_path):
    """Head and embedding are both stored and differ: loaders must not overwrite one by the other."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, "tiny", layout="hf")
    head = reference.read(base)["language_model.lm_head.weight"]
    pair = {
        "base_model.model.lm_head.lora_A.weight": reference.normal((2, head.shape[1]), 1, seed=1),
        "base_model.model.lm_head.lora_B.weight": reference.normal((head.shape[0], 2), 1, seed=2),
    }
    reference.save_adapter(adapter, pair, r=2, lora_alpha=2)
    config = json.loads((base / "config.json").read_text())
    config["tie_word_embeddings"] = flag == "top"
    config["text_config"]["tie_word_embeddings"] = flag == "text"
    (base / "config.json").write_text(json.dumps(config))
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    reference.assert_merged(
        reference.read(tmp_path / "out"),
        reference.read(base),
        reference.updates_of(adapter, home=flat),
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["text_config"]["tie_word_embeddings"] is False
