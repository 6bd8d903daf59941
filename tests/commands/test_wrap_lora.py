"""`wrap-lora` and wrapping live models, against peft itself."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
import trainer_models
from hypothesis import given
from hypothesis import strategies as st
from marks import PEERS
from models import MODELS, TINY, dims, hf_model, stored
from peft.utils.other import get_pattern_key
from peft_models import layers
from presets import PRESETS, model_config, tensor_shapes
from reference import read, same_tensor
from safetensors.torch import load_file
from torch import nn

import streamshard
from streamshard import wrap_lora
from streamshard.errors import InputError, UsageError
from streamshard.internvl.lora_targets import parameters, target_modules
from streamshard.lora.saved_adapter import adapter_config, selection
from streamshard.lora.settings import read_settings
from streamshard.lora.wrapped_names import unwrap

pytestmark = PEERS


# --- wrapped checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [*TINY, "tiny-6b-vit"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_wrapped_checkpoint_is_the_state_dict_of_peft(preset, dtype, tmp_path):
    """The same names and bits; peft 0.21 holds the bf16 values of A in fp32, the trainer's in bf16."""
    base = trainer_models.save_base(tmp_path / "base", preset, dtype)
    report = wrap_lora(base=base, output=tmp_path / "out", llm_r=4, backbone_r=3, seed=5)
    model = trainer_models.load(base, preset, dtype)
    torch.manual_seed(5)
    trainer_models.wrap(model, preset, llm=4, backbone=3)
    written, expected = read(tmp_path / "out"), model.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(written[name], tensor.to(trainer_models.TORCH[dtype])), name
        assert torch.equal(written[name].float(), tensor.float())
    assert report["tensors"] == len(expected)
    for part in ("vision_model", "language_model"):
        trainable, total = getattr(model, part).get_nb_trainable_parameters()
        count = report["trainable"][part]
        assert (count["trainable"], count["all"]) == (trainable, total)
    model.load_state_dict(written, strict=True)


def test_everything_beside_the_weights_is_carried(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    report = wrap_lora(base=base, output=tmp_path / "out", llm_r=4)
    assert report["l2"] is None
    assert report["layout"] == "custom"
    assert report["warnings"] == []
    names = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    out = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert {name for name in out if "/" not in name} >= names
    assert out - names == {"streamshard.json"}
    config = json.loads((base / "config.json").read_text())
    expected = config | {"use_llm_lora": 4, "use_backbone_lora": 0}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    # Pairs are in the file of their weight.
    index = json.loads((tmp_path / "out" / reference.INDEX).read_text())["weight_map"]
    for name, file in index.items():
        if "lora_" in name:
            assert file == index[name.rpartition(".lora_")[0] + ".base_layer.weight"]
    plain = unwrap(index)
    own = read(base)
    written = read(tmp_path / "out")
    assert plain.base.keys() == own.keys()
    assert all(same_tensor(written[plain.base[name]], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("ranks", [{"llm_r": 4}, {"backbone_r": 3}, {"llm_r": 2, "backbone_r": 5}])
def test_command_line_prints_what_peft_prints(ranks, tmp_path, cli):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    options = [f"--{name}={value}" for name, value in ranks.items()]
    done = cli("wrap-lora", "--base", base, "--output", tmp_path / "out", *options)
    assert done.code == 0, done.err
    given = {name.removesuffix("_r"): r for name, r in ranks.items()}
    model = trainer_models.wrap(trainer_models.load(base, "tiny"), "tiny", **given)
    for part in ("vision_model", "language_model"):
        if isinstance(getattr(model, part), peft.PeftModel):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                getattr(model, part).print_trainable_parameters()
            assert f"{part}: {printed.getvalue().strip()}\n" in done.out
    assert "without --use_llm_lora" in done.out


def test_seeds_and_runs(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    options = {"base": base, "llm_r": 4, "max_shard_size": "100KB"}
    for name, more in {"a": {}, "b": {"workers": 3}, "c": {"seed": 1}}.items():
        wrap_lora(output=tmp_path / name, **options, **more)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert all(same_tensor(a[name], b[name]) for name in a)
    differ = {name for name in a if not same_tensor(a[name], c[name])}
    assert differ == {name for name in a if ".lora_A." in name}


def test_dtype_of_everything_can_be_changed(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    wrap_lora(base=base, output=tmp_path / "wide", llm_r=4, dtype="fp32")
    wrap_lora(base=base, output=tmp_path / "keep", llm_r=4)
    wide, keep = read(tmp_path / "wide"), read(tmp_path / "keep")
    assert all(same_tensor(wide[name], keep[name].float()) for name in keep)


def test_dry_run(tmp_path, cli):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    done = cli("wrap-lora", "--base", base, "--output", tmp_path / "out", "--llm-r=4", "--dry-run")
    assert done.code == 0
    assert "21 LoRA pairs are written" in done.out
    assert not (tmp_path / "out").exists()


# --- published models, by their shapes ------------------------------------------------------------


def trainable(preset: str, part: str, r: int) -> tuple[int, int]:
    base = stored(tensor_shapes(PRESETS[preset], "custom"))
    own = dims(preset)
    found = target_modules(base, own, "custom", {part: r})
    shapes = [base[f"{target.module}.weight"].shape for target in found]
    new = sum(r * sum(shape) for shape in shapes)
    return new, new + parameters(base, own, "custom", f"{part}.")


@pytest.mark.parametrize(
    ("preset", "part", "expected"),
    [
        ("InternVL3-8B", "language_model", 40_370_176),
        ("InternVL2-8B", "language_model", 37_748_736),
        ("InternVL2-8B", "vision_model", 6_291_456),
    ],
)
def test_trainable_parameters_of_published_models(preset, part, expected):
    assert trainable(preset, part, 16)[0] == expected


def test_the_line_of_an_issue_of_internvl():
    new, total = trainable("InternVL2-8B", "language_model", 16)
    line = streamshard.cli.texts._trainable_text(
        {"trainable": new, "all": total, "percent": 100 * new / total}
    )
    assert line == (
        "trainable params: 37,748,736 || all params: 7,775,531,008 || trainable%: 0.4855"
    )


@pytest.mark.parametrize("preset", MODELS)
def test_targets_of_every_published_model(preset):
    base = stored(tensor_shapes(PRESETS[preset], "custom"))
    both = {"vision_model": 1, "language_model": 1}
    found = [t.module for t in target_modules(base, dims(preset), "custom", both)]
    ends = (*trainer_models.BACKBONE, *trainer_models.LLM[PRESETS[preset].arch])
    expected = {
        name.removesuffix(".weight")
        for name, tensor in base.items()
        if len(tensor.shape) == 2 and name.endswith(tuple(f".{end}.weight" for end in ends))
    }
    assert len(found) == len(set(found))
    assert set(found) == expected


# --- adapters -------------------------------------------------------------------------------------


RANKS = [
    {"llm_r": 4},
    {"backbone_r": 3},
    {"llm_r": 4, "backbone_r": 4, "llm_alpha": 3},
    {"llm_r": 4, "backbone_r": 2, "llm_alpha": 5, "backbone_alpha": 7, "dropout": 0.25},
]


def plain_model(layout: str, preset: str, base: Path) -> nn.Module:
    if layout == "custom":
        return trainer_models.load(base, preset, "fp32")
    return hf_model(model_config(PRESETS[preset], "hf", tied=False, torch_dtype="float32"))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(
    ("layout", "preset"),
    [
        *(("custom", preset) for preset in TINY),
        *(("hf", p) for p in TINY if p not in {"tiny-qwen3-moe", "tiny-phi3"}),
    ],
)
def test_adapter_is_loaded_by_peft(layout, preset, ranks, tmp_path):
    """Every tensor has a place, and each module the rank and alpha that were asked for."""
    base = trainer_models.save_base(tmp_path / "base", preset, "fp32", layout)
    out = tmp_path / "out"
    report = wrap_lora(base=base, output=out, format="peft", **ranks)
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "streamshard.json",
    }  # fmt: skip
    model = peft.PeftModel.from_pretrained(plain_model(layout, preset, base), out)
    written, loaded = load_file(out / "adapter_model.safetensors"), {}
    for name, layer in layers(model):
        loaded[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach()
        loaded[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach()
        vision = "vision" in name
        r = ranks["backbone_r" if vision else "llm_r"]
        alpha = ranks.get("backbone_alpha" if vision else "llm_alpha", 2 * r)
        assert layer.r["default"] == r
        assert layer.scaling["default"] == alpha / r
        assert layer.lora_dropout["default"].p == ranks.get("dropout", 0.05)
    assert loaded.keys() == written.keys()
    assert all(same_tensor(loaded[name], written[name]) for name in written)
    trainable, total = model.get_nb_trainable_parameters()  # loaded for inference: none
    assert trainable == 0
    counts = report["trainable"]["model"]
    assert counts["all"] == total
    assert counts["trainable"] == sum(t.numel() for t in written.values())
    # Our own reading of the config agrees.
    config = json.loads((out / "adapter_config.json").read_text())
    ours = read_settings(config, "x")
    for name, layer in layers(model):
        module = name.removeprefix("base_model.model.")
        assert ours.rank(module) == layer.r["default"]
        assert ours.scaling(module) == layer.scaling["default"]


@pytest.mark.parametrize(("layout", "preset"), [("custom", "tiny-internlm2"), ("hf", "tiny-qwen2")])
def test_adapter_has_the_values_of_a_fresh_one(layout, preset, tmp_path):
    """Those that peft draws if it wraps the whole model by the config that was written."""
    base = trainer_models.save_base(tmp_path / "base", preset, "fp32", layout)
    out = tmp_path / "out"
    wrap_lora(base=base, output=out, llm_r=4, backbone_r=2, format="peft", seed=11)
    model = plain_model(layout, preset, base)
    config = peft.LoraConfig.from_pretrained(out)
    config.inference_mode = False
    torch.manual_seed(11)
    fresh = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == fresh.keys()
    assert all(same_tensor(written[name], tensor) for name, tensor in fresh.items())


def test_patterns_that_would_catch_too_much_are_written_in_full():
    """An expert's end is also the end of a dense layer's module: then only whole names do."""
    ranks = {
        "language_model.model.layers.0.mlp.up_proj": 8,
        "language_model.model.layers.1.mlp.experts.0.up_proj": 2,
        "language_model.model.layers.1.mlp.experts.1.up_proj": 8,
    }
    config = adapter_config(ranks, ranks, targets=["up_proj"], task_type=None, base=None, dropout=0)
    assert config["rank_pattern"] == {"model.layers.1.mlp.experts.0.up_proj": 2}
    settings = read_settings(config, "x")
    assert {module: settings.rank(module) for module in ranks} == ranks
    assert {settings.scaling(module) for module in ranks} == {1}


@given(st.data())
def test_patterns_give_every_module_its_own(data):
    modules = [
        f"m.layers.{i}.{end}" for i in range(3) for end in ("a.q", "b.q", "experts.0.q", "q")
    ]
    ranks = {m: data.draw(st.integers(1, 3)) for m in modules}
    alphas = {m: data.draw(st.integers(1, 2)) for m in modules}
    config = adapter_config(
        ranks, alphas, targets=["q"], task_type="CAUSAL_LM", base=None, dropout=0
    )
    settings = read_settings(config, "x")
    assert {m: settings.rank(m) for m in modules} == ranks
    assert {m: settings.alpha(m) for m in modules} == alphas
    for m in modules:
        pattern = config["rank_pattern"]
        assert pattern.get(get_pattern_key(pattern.keys(), m), config["r"]) == ranks[m]


@given(st.sets(st.integers(0, 11), min_size=1))
def test_a_selection_is_exact(numbers):
    modules = [
        f"m.layers.{i}.{end}" for i in range(3) for end in ("a.q", "b.q", "experts.0.q", "q")
    ]
    chosen = [modules[number] for number in sorted(numbers)]
    ends = selection(chosen, modules)
    assert {m for m in modules if any(m == e or m.endswith(f".{e}") for e in ends)} == {*chosen}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "nothing to wrap: give `llm_r`, `backbone_r`"),
        ({"llm_r": 0}, "`llm_r` is 0"),
        ({"backbone_r": -1}, "`backbone_r` is -1"),
        ({"llm_r": 4, "backbone_alpha": 3}, "`backbone_alpha` needs `backbone_r`"),
        ({"llm_r": 4, "llm_alpha": 4}, "stores no alpha"),
        ({"llm_r": 4, "llm_alpha": math.inf, "format": "peft"}, "`llm_alpha` is inf"),
        ({"llm_r": 4, "dropout": 0.1}, "stores none"),
        ({"llm_r": 4, "dropout": 1.0, "format": "peft"}, "`dropout` is 1.0"),
        ({"llm_r": 4, "seed": -1}, "`seed` is -1"),
        ({"llm_r": 4, "seed": 2**32}, "`seed` is 4294967296"),
        ({"llm_r": 4, "format": "gguf"}, "wrapped or peft"),
        ({"llm_r": 4, "format": "peft", "max_shard_size": "1MB"}, "always one file"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, expected, tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    with pytest.raises(UsageError, match=expected):
        wrap_lora(base=base, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_alpha_of_twice_the_rank_may_be_given(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    report = wrap_lora(base=base, output=tmp_path / "out", llm_r=4, llm_alpha=8, dropout=0.05)
    assert report["lora_alpha"] == {"vision_model": None, "language_model": 8}


def refused(base: Path, match: str, **options: Any) -> None:
    out = base.parent / "refused"
    with pytest.raises(InputError, match=match):
        wrap_lora(base=base, output=out, llm_r=4, **options)
    assert not out.exists()


def test_bases_that_cannot_be_wrapped(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny")
    refused(
        trainer_models.save_base(tmp_path / "hf", "tiny", layout="hf"), "only the custom layout"
    )
    wrap_lora(base=base, output=tmp_path / "wrapped", llm_r=4)
    refused(tmp_path / "wrapped", "a LoRA-wrapped training checkpoint")
    tensors = read(base)
    config = json.loads((base / "config.json").read_text())
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    cases = {
        "lacks .*layers.1.mlp.up_proj.weight": {n: t for n, t in tensors.items() if n != name},
        "has 'language_model.extra.weight'": tensors
        | {"language_model.extra.weight": torch.ones(3)},
        "up_proj.weight' has whole numbers": tensors | {name: tensors[name].int()},
        "is quantized: it has": tensors | {name.replace("weight", "qweight"): torch.ones(3)},
    }
    for number, (match, content) in enumerate(cases.items()):
        refused(reference.save_checkpoint(tmp_path / str(number), content, config=config), match)
    bare = tmp_path / "bare.safetensors"
    reference.save_file(tensors, bare)
    refused(bare, "has no config.json")
    report = wrap_lora(base=bare, output=tmp_path / "out", llm_r=4, format="peft")
    assert report["pairs"] == 21


def test_upstream_does_not_know_all_families(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny-gpt-oss")
    report = wrap_lora(base=base, output=tmp_path / "out", llm_r=4)
    unknown, packed = report["warnings"]
    assert "does not know GptOssForCausalLM" in unknown
    assert "only the attention gets pairs" in packed
    assert report["pairs"] == 12
