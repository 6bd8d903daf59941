"""`extract-lora`: wrapped checkpoints as the trainer saves them, the adapters loaded by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainer_models
from folders import config_of
from marks import PEERS, slow_but
from models import TINY, hf_model
from reference import read, same_tensor, save_file
from safetensors.torch import load_file

from streamshard import extract_lora, merge_lora, wrap_lora
from streamshard.errors import AdapterError, InputError, StreamshardError, UsageError

pytestmark = PEERS


RUNS = [p for p in TINY if p != "tiny-qwen3-moe"]  # those that can run with single experts too


def trained(
    tmp_path: Path, preset: str = "tiny", *, llm: int = 4, backbone: int = 3
) -> tuple[torch.nn.Module, Path, Path]:
    """Base, wrapped by `wrap-lora`, loaded as upstream loads it, trained, saved: the whole cycle."""
    base = trainer_models.save_base(tmp_path / "base", preset, "fp32")
    ranks = {"llm_r": llm or None, "backbone_r": backbone or None}
    wrap_lora(base=base, output=tmp_path / "fresh", **ranks)
    config = config_of(tmp_path / "fresh")
    ranks = {"llm": config["use_llm_lora"], "backbone": config["use_backbone_lora"]}
    model = trainer_models.wrap(trainer_models.model_of(preset, "fp32"), preset, **ranks)
    model.load_state_dict(read(tmp_path / "fresh"), strict=True)
    trainer_models.train(trainer_models.freeze_as_upstream(model))
    checkpoint = trainer_models.save(model, tmp_path / "trained", config)
    return model, base, checkpoint


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return trainer_models.forward(model.eval())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("preset", slow_but(RUNS, "tiny"))
@pytest.mark.parametrize(
    "ranks", [{"backbone": 0}, {"llm": 0}, {"llm": 4, "backbone": 3}], ids=["llm", "vit", "both"]
)
def test_the_whole_cycle(preset, ranks, tmp_path):
    """Wrap, train, save, extract: peft, with the adapter on the base, is the trained model."""
    model, base, checkpoint = trained(tmp_path, preset, **ranks)
    out = tmp_path / "adapter"
    report = extract_lora(checkpoint=checkpoint, base=base, output=out)
    assert report["modules_to_save"] == ["mlp1"]
    assert report["warnings"] == []
    plain = trainer_models.load(base, preset, "fp32")
    before = logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, out)
    after, expected = logits(adapted.base_model.model), logits(model)
    assert close(after, expected)
    assert not close(before, expected)
    # Nothing in the file is without a place, and nothing in the model without a value.
    state = peft.get_peft_model_state_dict(adapted)
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all(same_tensor(written[name], state[name]) for name in written)
    merged = adapted.merge_and_unload()
    assert close(logits(merged), expected)


@pytest.mark.parametrize("preset", slow_but(RUNS, "tiny"))
def test_the_whole_cycle_to_a_merged_model(preset, tmp_path):
    """Merged as it is, and as the adapter taken out of it: the trained model, without peft."""
    model, base, checkpoint = trained(tmp_path, preset)
    expected = logits(model)
    extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "adapter")
    merge_lora(base=base, adapter=tmp_path / "adapter", output=tmp_path / "one")
    merge_lora(checkpoint=checkpoint, output=tmp_path / "other")
    one, other = read(tmp_path / "one"), read(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(same_tensor(one[name], other[name]) for name in one)
    assert close(logits(trainer_models.load(tmp_path / "one", preset, "fp32")), expected)
    assert not close(logits(trainer_models.load(base, preset, "fp32")), expected)


def test_of_the_trained_nothing_is_computed(tmp_path):
    """Pairs are copied as they are; the file has as many bytes as they need and not more."""
    _, base, checkpoint = trained(tmp_path)
    report = extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "out")
    inside = load_file(checkpoint / "model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in written.items():
        child, _, rest = name.removeprefix("base_model.model.").partition(".")
        given = f"{child}.base_model.model.{rest}".replace(".weight", ".default.weight")
        assert same_tensor(tensor, inside[given if "lora_" in name else f"{child}.{rest}"])
    assert len(written) == 2 * report["pairs"] + 6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert set(config["target_modules"]) == {*trainer_models.BACKBONE, *trainer_models.SEVEN}
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == dict.fromkeys(trainer_models.BACKBONE, 3)
    assert config["alpha_pattern"] == dict.fromkeys(trainer_models.BACKBONE, 6)


def test_experts(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny-qwen3-moe", "fp32")
    wrap_lora(base=base, output=tmp_path / "fresh", llm_r=2)
    report = extract_lora(checkpoint=tmp_path / "fresh", base=base, output=tmp_path / "out")
    wrap_lora(base=base, output=tmp_path / "peft", llm_r=2, format="peft")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out", "peft"))
    assert one.keys() == other.keys()
    assert all(same_tensor(one[name], other[name]) for name in one)
    assert report["modules_to_save"] == []
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(trainer_models.LLM["Qwen3MoeForCausalLM"])


def test_without_a_base_what_is_left_out_is_told(tmp_path, cli):
    _, _, checkpoint = trained(tmp_path, backbone=0)
    done = cli("extract-lora", checkpoint, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (warning,) = report["warnings"]
    assert "mlp1 (6 tensors)" in warning
    assert "vision_model (" in warning
    assert "--base" in warning
    assert (report["base"], report["pairs"], report["l2"], report["merged"]) == (
        None,
        21,
        None,
        None,
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(written) == 42


@pytest.mark.parametrize("option", ["--alpha", "--lora-alpha"])
def test_another_alpha(option, tmp_path, cli):
    model, base, checkpoint = trained(tmp_path)
    for part in (model.vision_model, model.language_model):
        for layer in part.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scaling["default"] = 5 / layer.r["default"]
    out = tmp_path / "out"
    done = cli("extract-lora", checkpoint, "--base", base, "--output", out, option, "5")
    assert done.code == 0, done.err
    assert "lora_alpha 5" in done.out
    adapted = peft.PeftModel.from_pretrained(trainer_models.load(base, "tiny", "fp32"), out)
    assert close(logits(adapted.base_model.model), logits(model))


def test_names_of_old_peft_and_of_wrappers(tmp_path):
    """The same adapter, whoever wrote the checkpoint."""
    _, base, checkpoint = trained(tmp_path)
    extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "out")
    tensors = load_file(checkpoint / "model.safetensors")
    for number, spell in enumerate(
        (
            lambda name: name.replace(".base_layer.", "."),
            lambda name: f"module._orig_mod.{name}",
        )
    ):
        other = tmp_path / f"other{number}"
        other.mkdir()
        save_file({spell(n): t for n, t in tensors.items()}, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(config_of(checkpoint)))
        extract_lora(checkpoint=other, base=base, output=tmp_path / f"out{number}")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            expected = (tmp_path / "out" / file).read_bytes()
            assert (tmp_path / f"out{number}" / file).read_bytes() == expected


def test_wrapped_twice(tmp_path):
    """A run that went on from a wrapped checkpoint: its pairs are right, the earlier ones are gone."""
    base = trainer_models.save_base(tmp_path / "base", "tiny", "fp32")
    model = trainer_models.load(base, "tiny", "fp32")
    trainer_models.train(
        trainer_models.freeze_as_upstream(trainer_models.wrap(model, "tiny", llm=4))
    )
    once = model.language_model
    trainer_models.wrap(model, "tiny", llm=4)
    twice = model.language_model
    model.language_model = once  # the layers of both are the same
    once.requires_grad_(False)
    for name, parameter in once.named_parameters():
        parameter.requires_grad = "lora_" in name
    trainer_models.train(model)
    expected = logits(model)
    model.language_model = twice
    names = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    checkpoint = tmp_path / "trained"
    checkpoint.mkdir()
    save_file(names, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps({"use_llm_lora": 4}))
    assert any(".base_model.model.base_model.model." in name for name in names)
    report = extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "out")
    assert "language_model is wrapped 2 times" in report["warnings"][0]
    adapted = peft.PeftModel.from_pretrained(
        trainer_models.load(base, "tiny", "fp32"), tmp_path / "out"
    )
    assert close(logits(adapted.base_model.model), expected)


# --- other things that were trained -----------------------------------------------------------------

HEAD = "language_model.base_model.model.lm_head.weight"
NORM = "language_model.base_model.model.model.layers.1.input_layernorm.weight"


def changed(checkpoint: Path, *names: str) -> Path:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    assert set(names) <= set(tensors)
    save_file({n: t + 0.25 if n in names else t for n, t in tensors.items()}, file)
    return checkpoint


def test_other_trained_modules_go_whole(tmp_path):
    model, base, checkpoint = trained(tmp_path, backbone=0)
    bias = "vision_model.encoder.layers.0.mlp.fc1.bias"
    changed(checkpoint, HEAD, NORM, bias)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    report = extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "out")
    assert report["modules_to_save"] == [
        "language_model.lm_head",
        "language_model.model.layers.1.input_layernorm",
        "mlp1",
        "vision_model.encoder.layers.0.mlp.fc1",
    ]
    adapted = peft.PeftModel.from_pretrained(
        trainer_models.load(base, "tiny", "fp32"), tmp_path / "out"
    )
    assert close(logits(adapted.base_model.model), logits(model))


def test_modules_that_peft_saved_as_such(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny", "fp32")
    model = trainer_models.load(base, "tiny", "fp32")
    trainer_models.wrap(model, "tiny", llm=4, modules_to_save=["lm_head"])
    trainer_models.train(trainer_models.freeze_as_upstream(model))
    checkpoint = trainer_models.save(model, tmp_path / "trained", {"use_llm_lora": 4})
    for more in ({}, {"base": base}):
        out = tmp_path / f"out{len(more)}"
        report = extract_lora(checkpoint=checkpoint, output=out, **more)
        assert report["modules_to_save"] == ["language_model.lm_head", "mlp1"][: 1 + len(more)]
    adapted = peft.PeftModel.from_pretrained(trainer_models.load(base, "tiny", "fp32"), out)
    assert close(logits(adapted.base_model.model), logits(model))


@pytest.mark.parametrize(
    "name",
    [
        "language_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "language_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
        "vision_model.base_model.model.embeddings.class_embedding",
        "vision_model.base_model.model.encoder.layers.0.ls1",
    ],
)
def test_what_an_adapter_cannot_hold(name, tmp_path):
    _, base, checkpoint = trained(tmp_path)
    changed(checkpoint, name)
    plain = name.replace("base_model.model.", "").replace("base_layer.", "")
    with pytest.raises(AdapterError, match=f"cannot be part of an adapter: '{plain}'"):
        extract_lora(checkpoint=checkpoint, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- HF layout --------------------------------------------------------------------------------------


def test_a_wrapped_hf_model(tmp_path):
    """The state dict of a whole HF model under peft, names as in memory."""
    from presets import PRESETS, model_config

    settings = model_config(PRESETS["tiny"], "hf", tied=False, torch_dtype="float32")
    model = peft.get_peft_model(
        hf_model(settings), peft.LoraConfig(r=4, target_modules=["self_attn.q_proj", "mlp.fc1"])
    )
    checkpoint = tmp_path / "trained"
    checkpoint.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="Say which alpha"):
        extract_lora(checkpoint=checkpoint, output=tmp_path / "out")
    extract_lora(checkpoint=checkpoint, output=tmp_path / "out", alpha=8)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model)
    assert written.keys() == state.keys()
    assert all(same_tensor(written[name], state[name]) for name in written)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * ("lora_B" in name))
    save_file(model.state_dict(), checkpoint / "model.safetensors", {"format": "pt"})
    report = merge_lora(checkpoint=checkpoint, output=tmp_path / "merged", alpha=8)
    (warning,) = report["warnings"]  # an HF model needs no code of its own
    assert "the output lacks a vocabulary" in warning
    plain, info = type(model.get_base_model()).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert close(plain.eval()(tokens).logits, model.eval()(tokens).logits)


# --- what is refused --------------------------------------------------------------------------------


def refused(
    error: type[StreamshardError], match: str, checkpoint: Path, tmp_path: Path, **options: Any
) -> None:
    with pytest.raises(error, match=match):
        extract_lora(checkpoint=checkpoint, output=tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def rewrite(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


def test_flags_must_agree(tmp_path):
    _, base, checkpoint = trained(tmp_path, backbone=0)
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    cases = [
        ({"use_llm_lora": 8}, "use_llm_lora in config.json is 8, but the pairs have rank 4"),
        ({"use_backbone_lora": 8}, "there are no pairs in vision_model"),
    ]
    for flags, match in cases:
        file.write_text(json.dumps(config | flags))
        refused(AdapterError, match, checkpoint, tmp_path, base=base)
    file.write_text(json.dumps(config | {"use_llm_lora": 0}))
    report = extract_lora(checkpoint=checkpoint, output=tmp_path / "out", base=base)
    assert "use_llm_lora in config.json is 0 although there are pairs" in report["warnings"][0]


def test_checkpoints_that_have_no_plain_pairs(tmp_path):
    _, base, checkpoint = trained(tmp_path, backbone=0)
    refused(InputError, "no LoRA found", base, tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    A = next(name for name in tensors if ".lora_A." in name)
    B = A.replace("lora_A", "lora_B")
    cases = [
        ({B: None}, AdapterError, "the partner"),
        ({A: torch.zeros(0)}, InputError, "no elements.*ZeRO-3"),
        ({A: torch.zeros(4, 64).int()}, AdapterError, "is I32"),
        ({A: torch.zeros(4, 3)}, AdapterError, "do not fit"),
        ({A: torch.zeros(5, 64)}, AdapterError, "the pairs have rank 4, 5"),
        ({A.replace("default", "other"): tensors[A] + 1}, AdapterError, "several adapters"),
        ({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}, AdapterError, "DoRA"),
        ({n: None for n in tensors if "lora_" in n}, InputError, "the pairs are lost"),
    ]
    for change, error, match in cases:
        new = {n: t for n, t in (tensors | change).items() if t is not None}
        refused(error, match, rewrite(checkpoint, new), tmp_path)


def test_one_of_several_adapters(tmp_path):
    base = trainer_models.save_base(tmp_path / "base", "tiny", "fp32")
    model = trainer_models.wrap(trainer_models.load(base, "tiny", "fp32"), "tiny", llm=4)
    model.language_model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    checkpoint = trainer_models.save(model, tmp_path / "trained", {})
    extract_lora(
        checkpoint=checkpoint, base=base, output=tmp_path / "out", alpha=4, adapter_name="other"
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    state = model.language_model.state_dict()
    assert len(written) == 6
    for name, tensor in written.items():
        stem, _, word = name.removesuffix(".weight").rpartition(".")
        live = stem.replace("language_model.", "", 1)
        assert same_tensor(tensor, state[f"{live}.{word}.other.weight"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["self_attn.o_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 4)


def test_bases_that_do_not_fit(tmp_path):
    _, base, checkpoint = trained(tmp_path, backbone=0)
    tensors = read(base)
    config = config_of(base)

    def other(**change: torch.Tensor | None) -> Path:
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        content = {n: t for n, t in (tensors | change).items() if t is not None}
        save_file(content, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    head = "language_model.lm_head.weight"
    for change, match in (
        ({head: None}, f"lacks '{head}'"),
        ({"language_model.extra.weight": torch.ones(2)}, "lacks 'language_model.extra.weight'"),
        ({head: tensors[head].bfloat16()}, r"but BF16 \["),
        ({head: tensors[head][:-1]}, "an adapter cannot change a shape"),
    ):
        refused(InputError, match, checkpoint, tmp_path, base=other(**change))
    hf = trainer_models.save_base(tmp_path / "hf", "tiny", "fp32", "hf")
    refused(InputError, "give it in the custom layout", checkpoint, tmp_path, base=hf)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"max_shard_size": "1MB"}], ids=str)
def test_options_that_cannot_be(options, tmp_path):
    _, _, checkpoint = trained(tmp_path, backbone=0)
    refused(UsageError, "`alpha`|always one file", checkpoint, tmp_path, **options)
