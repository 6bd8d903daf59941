"""Merges against peft and transformers: real tiny models, real adapters, both loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from marks import PEERS
from reference import INDEX

from streamshard import merge_lora

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = PEERS


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [28, 28],
    "patch_size": [14, 14],
    "use_qk_norm": False,
}
IMAGE_TOKEN = 150


def text_config(kind: str) -> Any:
    return {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind](**TEXT)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights; biases and norms too, so that nothing is 0 or 1."""
    torch.manual_seed(0)
    if kind.startswith("internvl"):
        config = transformers.InternVLConfig(
            vision_config=VISION,
            text_config=text_config(kind.split("-")[1]).to_dict(),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=1,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
        model = transformers.InternVLForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(text_config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + parameter.numel())
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(noise + (parameter.dim() == 1 and "norm" in name))
    return model.to(dtype).eval()


def inputs_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 27).reshape(2, 12)
    if not kind.startswith("internvl"):
        return {"input_ids": tokens}
    tokens[:, 4] = IMAGE_TOKEN
    return {
        "input_ids": tokens,
        "pixel_values": reference.normal((2, 3, 28, 28), 1, seed=9).to(dtype),
    }


def wrapped(model: Any, config: dict[str, Any], name: str = "default", *, std: float = 0.1) -> Any:
    """The model under peft, with an update that is no small one."""
    settings = peft.LoraConfig(**({"lora_alpha": 16, "r": 8} | config))
    adapted = peft.get_peft_model(model, settings, adapter_name=name)
    randomise(adapted, std)
    return adapted.eval()


def randomise(adapted: Any, std: float = 0.1) -> None:
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                generator = torch.Generator().manual_seed(sum(key.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def save_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = model_of(kind, dtype)
    model.save_pretrained(folder, **options)
    return model


def load(kind: str, folder: Path) -> Any:
    """The folder in plain transformers; every weight must be there and have a place."""
    cls = (
        transformers.InternVLForConditionalGeneration
        if kind.startswith("internvl")
        else transformers.AutoModelForCausalLM
    )
    model, found = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not found[problem], (problem, found[problem])
    return model.eval()


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(kind)).logits


LLM = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LLM},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "rslora": {"target_modules": LLM, "use_rslora": True, "r": 6, "lora_alpha": 5},
    "patterns": {
        "target_modules": LLM,
        "rank_pattern": {"q_proj": 3, r"layers\.0\.mlp\.up_proj": 5, "mlp.up_proj": 7},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, "up_proj": 40, "proj": 1000},
    },
    "patterns-rslora": {
        "target_modules": LLM,
        "use_rslora": True,
        "rank_pattern": {r".*layers.1.*": 4},
        "alpha_pattern": {
            r"^model\.layers\.0.*|^model\.model.*layers\.0.*": 3,
            "1.self_attn.o_proj": 9,
        },
    },
    "one-layer": {"target_modules": ["v_proj"], "layers_to_transform": [1], "bias": "none"},
    "regex": {"target_modules": r".*\.1\..*(gate|down)_proj"},
    "gaussian": {"target_modules": LLM, "init_lora_weights": "gaussian"},
}
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "everything": {
        "target_modules": [
            *LLM,
            "projection_layer",
            "fc1",
            "fc2",
            "linear_1",
            "linear_2",
            "lm_head",
        ],
        "rank_pattern": {"fc1": 3, r".*vision_tower.*q_proj": 5},
        "alpha_pattern": {r".*language_model.*q_proj": 2},
    },
    "vision": {"target_modules": r".*vision_tower.*(q_proj|k_proj|fc1|projection_layer)"},
}
CASES = [
    *((kind, name, CONFIGS[name]) for kind in ("qwen2", "llama") for name in CONFIGS),
    *(
        (kind, name, VISION_CONFIGS[name])
        for kind in ("internvl-qwen2", "internvl-llama")
        for name in VISION_CONFIGS
    ),
]


@pytest.mark.parametrize(
    ("kind", "config"),
    [pytest.param(kind, config, id=f"{kind}-{name}") for kind, name, config in CASES],
)
def test_merged_model_is_the_adapted_model(kind, config, tmp_path):
    """In fp32: outputs as of the unmerged model, weights as of `merge_and_unload`."""
    model = save_base(kind, tmp_path / "base")
    before = logits(model, kind)
    adapted = wrapped(model, config)
    # By default peft saves the untouched head beside its factors.
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(adapted, kind)
    assert (expected - before).abs().max() > 1e-3  # the adapter matters

    report = merge_lora(
        base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out"
    )
    merged = load(kind, tmp_path / "out")
    found = logits(merged, kind)
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * max(1, scale)

    assert report["merged"] == sum("lora_A" in key for key in adapted.state_dict())
    theirs, ours = adapted.merge_and_unload().state_dict(), merged.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)

    # Base and output name the same tensors, and only the adapted ones differ.
    base, written = reference.read(tmp_path / "base"), reference.read(tmp_path / "out")
    assert set(base) == set(written)
    changed = [name for name in base if not reference.same_tensor(base[name], written[name])]
    assert len(changed) == report["merged"]


@pytest.mark.parametrize("kind", ["qwen2", "internvl-llama"])
def test_several_adapters_are_what_peft_has_active(kind, tmp_path):
    model = save_base(kind, tmp_path / "base")
    adapted = wrapped(model, {"target_modules": ["q_proj", "down_proj"]}, "one")
    second = peft.LoraConfig(
        target_modules=["q_proj", "up_proj"], r=4, lora_alpha=3, use_rslora=True
    )
    adapted.add_adapter("two", second)
    randomise(adapted)
    adapted.base_model.set_adapter(["one", "two"])
    adapted.save_pretrained(tmp_path / "adapters")
    expected = logits(adapted.eval(), kind)
    merge_lora(
        base=tmp_path / "base",
        adapter=[tmp_path / "adapters" / "one", tmp_path / "adapters" / "two"],
        output=tmp_path / "out",
    )
    found = logits(load(kind, tmp_path / "out"), kind)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_an_adapter_of_another_name_is_in_a_sub_folder(tmp_path):
    from streamshard.errors import InputError

    adapted = wrapped(save_base("qwen2", tmp_path / "base"), {"target_modules": ["q_proj"]}, "mine")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="'mine'"):
        merge_lora(base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out")


def test_bin_and_safetensors_as_peft_writes_them(tmp_path):
    adapted = wrapped(save_base("llama", tmp_path / "base"), CONFIGS["patterns"])
    outputs = []
    for safe in (True, False):
        folder = tmp_path / f"adapter-{safe}"
        adapted.save_pretrained(folder, safe_serialization=safe)
        assert (folder / "adapter_model.bin").exists() != safe
        outputs.append(tmp_path / f"out-{safe}")
        merge_lora(base=tmp_path / "base", adapter=folder, output=outputs[-1])
    one, other = ((folder / "model.safetensors").read_bytes() for folder in outputs)
    assert one == other


@pytest.mark.parametrize("kind", ["qwen2", "internvl-qwen2"])
def test_bf16_is_nearer_to_exact_than_what_peft_writes(kind, tmp_path):
    """Against the reference in fp64; and peft's own bf16 merge is no further than it may be."""
    model = save_base(kind, tmp_path / "base", torch.bfloat16)
    adapted = wrapped(model, {"target_modules": LLM}, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_lora(base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out")

    def home(module: str) -> str:
        for nested, flat in (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
        ):
            if kind != "qwen2" and module.startswith(nested):
                return f"{flat}{module.removeprefix(nested)}.weight"
        return f"{module}.weight"

    base = reference.read(tmp_path / "base")
    updates = reference.updates_of(tmp_path / "adapter", home=home)
    written = reference.read(tmp_path / "out")
    reference.assert_merged(written, base, updates)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs = reference.read(tmp_path / "peft")
    exact = reference.exactly_merged(base, updates)
    assert set(theirs) == set(written)
    for name, tensor in theirs.items():
        if name not in exact:
            assert reference.same_tensor(tensor, written[name])
        else:
            rounded = reference.round_once(exact[name], "BF16")
            differ = [(reference.double(t) != rounded).mean() for t in (written[name], tensor)]
            assert differ[0] <= differ[1]


# --- files as transformers writes them ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "internvl-llama"])
@pytest.mark.parametrize("size", ["20KB", "60KB", "5GB"])
def test_files_are_those_of_save_pretrained(kind, size, tmp_path):
    """Of the merged model, in shards or not: every weight file and the index, byte for byte."""
    model = save_base(kind, tmp_path / "base", torch.bfloat16, max_shard_size=size)
    adapted = wrapped(model, {"target_modules": ["q_proj"]})
    adapted.save_pretrained(tmp_path / "adapter")
    merge_lora(base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out")
    merged = load(kind, tmp_path / "out").to(torch.bfloat16)
    peer = model_of(kind, torch.bfloat16)  # a loaded model would be split in another order
    peer.load_state_dict(merged.state_dict())
    peer.save_pretrained(tmp_path / "again", max_shard_size=size)
    names = {p.name for p in (tmp_path / "again").iterdir() if "safetensors" in p.name}
    assert (INDEX in names) == (size != "5GB")
    assert len(names) > 3 or size == "5GB"
    assert {p.name for p in (tmp_path / "out").iterdir() if "safetensors" in p.name} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("size", ["20KB", "60KB"])
def test_resharding_keeps_what_transformers_says_of_sizes(size, tmp_path):
    """Split anew, in the order of the file: other shards, but the index agrees with them."""
    adapted = wrapped(save_base("qwen2", tmp_path / "base"), {"target_modules": ["q_proj"]})
    adapted.save_pretrained(tmp_path / "adapter")
    merge_lora(
        base=tmp_path / "base",
        adapter=tmp_path / "adapter",
        output=tmp_path / "out",
        max_shard_size=size,
    )
    model_of("qwen2").save_pretrained(tmp_path / "peer", max_shard_size=size)
    ours, theirs = (json.loads((tmp_path / f / INDEX).read_text()) for f in ("out", "peer"))
    assert ours["metadata"] == theirs["metadata"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    load("qwen2", tmp_path / "out")
