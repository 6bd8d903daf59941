"""Part 5: relatives of InternVL are merged, extracted and verified; a conversion names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import OTHER, assert_same, command, config_of, edit, make, put, refused, wrapped
from make_checkpoint import write_adapter
from marks import PEERS
from peft_cases import trained
from presets import tensor_shapes
from reference import normal, read
from safetensors.torch import load_file, save_file

import streamshard
from streamshard.errors import InputError

pytestmark = PEERS

Content = dict[str, torch.Tensor]


def flash(content: Content) -> Content:
    """The modules of InternVL3_5-Flash beside those of InternVL: vision width 32, hidden 64."""
    more = {"pooling_before_gating.query_token": (1, 32), "gating.gate.1.weight": (2, 32)}
    for number, size, columns in ((0, 512, 0), (1, 128, 512), (4, 128, 128), (7, 64, 128)):
        more[f"mlp2.{number}.weight"] = (size, columns) if columns else (size,)
        more[f"mlp2.{number}.bias"] = (size,)
    for number in range(1, 5):
        more[f"pooling_before_gating.attn{number}.in_proj_weight"] = (96, 32)
        more[f"gating.block{number}.0.weight"] = (128, 32)
    made = {name: normal(shape, 0.02, seed=len(name), dtype="BF16") for name, shape in more.items()}
    return content | made


def internvl_u(content: Content) -> Content:
    return {**content, "special_token_embedding.weight": normal((9, 64), 1, seed=1, dtype="BF16")}


def same(content: Content) -> Content:
    return content


# The layout of the names, model_type, what else is in the config and among the tensors, the name.
KINDS: dict[str, tuple[str, str, dict[str, Any], Callable[[Content], Content], str]] = {
    "flash": ("custom", "internvl_chat", {"flash_mode": True}, flash, "InternVL3_5-Flash"),
    "flash-by-names": ("custom", "internvl_chat", {}, flash, "InternVL3_5-Flash"),
    "skywork": ("custom", "skywork_chat", {}, same, "Skywork-R1V"),
    "internvl-u": ("custom", "internvlu_chat", {}, internvl_u, "InternVL-U"),
    "intern-s1": ("hf", "interns1", {}, same, "Intern-S1"),
    "qianfan": ("custom", "qianfan_ocr", {}, same, "Qianfan-OCR"),
}


def relative(folder: Path, kind: str) -> Path:
    layout, model_type, more, change, _ = KINDS[kind]
    make(folder, "tiny-qwen3", layout)
    if kind == "qianfan":  # the names of one layout, the config of the other
        twin = config_of(make(folder.parent / f"{folder.name}-twin", "tiny-qwen3", "hf"))
        (folder / "config.json").write_text(json.dumps(twin))
    edit(folder, lambda config: config.update(model_type=model_type, **more))
    return put(folder, change(read(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_part5_conversions_name_the_relative(kind, tmp_path, cli):
    layout, *_, title = KINDS[kind]
    other = OTHER[layout]
    source = relative(tmp_path / "source", kind)
    ref = make(tmp_path / "ref", "tiny-qwen3", other)
    for call in (
        command(other, source, ref, tmp_path / "out"),
        [*command(other, source, ref, tmp_path / "out"), "--allow-unexpected"],
        command(layout, ref, source, tmp_path / "out"),  # as reference
    ):
        text = refused(cli, tmp_path, 3, *call)
        assert f"is of {title}, a relative of InternVL" in text
        assert "swapped" not in text
    write_adapter(tmp_path / "adapter", "tiny-qwen3", layout=layout)
    merge = ["merge-lora", "--base", source, "--adapter", tmp_path / "adapter", "--output"]
    both = [*merge, tmp_path / "out", "--layout", other, "--reference", ref]
    assert title in refused(cli, tmp_path, 3, *both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained_in", ["custom", "hf"])
def test_part5_relatives_are_merged_and_verified(kind, trained_in, tmp_path, cli):
    """To the same values as InternVL of these tensors; what only the relative has stays."""
    layout = KINDS[kind][0]
    source = relative(tmp_path / "source", kind)
    plain = make(tmp_path / "plain", "tiny-qwen3", layout)
    write_adapter(tmp_path / "adapter", "tiny-qwen3", layout=trained_in, targets="all")
    found = {}
    for base in (source, plain):
        out = tmp_path / f"merged-{base.name}"
        call = ["merge-lora", "--base", base, "--adapter", tmp_path / "adapter", "--output", out]
        assert cli(*call).code == 0
        found[base] = read(out)
    assert_same(found[source], read(source) | found[plain])
    assert config_of(tmp_path / "merged-source") == config_of(source)
    for folder in (source, tmp_path / "merged-source"):
        checks = {one["what"]: one["why_not"] for one in streamshard.verify(folder)["checks"]}
        assert checks["completeness by config.json"] is None
        assert checks["shapes by config.json"] is None
    assert cli("inspect", source).code == 0
    report = streamshard.diff(source, tmp_path / "merged-source")
    assert len(report["different"]) == len(streamshard.diff(plain, tmp_path / "merged-plain")
                                           ["different"])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_part5_shapes_of_relatives(kind, tmp_path, cli):
    source = relative(tmp_path / "source", kind)
    content = read(source)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    put(source, {**content, name: content[name][:-1]})
    assert cli("verify", source).code == 8
    write_adapter(tmp_path / "adapter", "tiny-qwen3", layout=KINDS[kind][0])
    merge = ["merge-lora", "--base", source, "--adapter", tmp_path / "adapter", "--output"]
    assert "[95, 64]; [96, 64]" in refused(cli, tmp_path, 3, *merge, tmp_path / "out")


@pytest.mark.parametrize("kind", ["flash", "skywork", "internvl-u"])
def test_part5_training_checkpoints_of_relatives(kind, tmp_path, cli):
    run = relative(tmp_path / "run", kind)
    content = read(run)
    put(run, wrapped(content))
    assert cli("verify", run).code == 0
    assert cli("merge-lora", run, "--output", tmp_path / "merged", "--alpha", "8").code == 0
    merged = read(tmp_path / "merged")
    assert merged.keys() == content.keys()
    extract = ["extract-lora", run, "--output", tmp_path / "lora", "--alpha", "8"]
    assert cli(*extract).code == 0
    base = put(relative(tmp_path / "base", kind), content)
    again = ["merge-lora", "--base", base, "--adapter", tmp_path / "lora"]
    assert cli(*again, "--output", tmp_path / "again").code == 0
    assert_same(read(tmp_path / "again"), merged)
    wrap = ["wrap-lora", "--base", base, "--llm-r", "2", "--output", tmp_path / "wrapped"]
    assert KINDS[kind][-1] in refused(cli, tmp_path, 3, *wrap)


def test_part5_flash_in_memory():
    content = flash(
        {n: torch.ones(shape) for n, shape in tensor_shapes("tiny-qwen3", "custom").items()}
    )
    with pytest.raises(InputError, match="names of InternVL3_5-Flash, which no class"):
        streamshard.convert_keys_to_hf(content)


def test_part5_unknown_model_types_are_named(folders, tmp_path, cli):
    edit(folders["custom"], lambda config: config.update(model_type="gemma9"))
    text = refused(
        cli, tmp_path, 3, *command("hf", folders["custom"], folders["hf"], tmp_path / "o")
    )
    assert "model_type is 'gemma9', not known" in text
    assert "swapped" not in text
    checks = {
        one["what"]: one["why_not"] for one in streamshard.verify(folders["custom"])["checks"]
    }
    for word in ("gemma9", "qianfan_ocr", "internvlu_chat", "interns1", "skywork_chat"):
        assert word in checks["completeness by config.json"]


# --- Qianfan-OCR, which transformers 5.23 has ---


@pytest.fixture(scope="module")
def qianfan(tmp_path_factory) -> dict[str, Any]:
    """A model of transformers in the three forms of its names, and an adapter by peft."""
    import peft
    import transformers

    root = tmp_path_factory.mktemp("qianfan")
    torch.manual_seed(0)
    config = transformers.QianfanOCRConfig(
        text_config={
            "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 120,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        image_token_id=99,
    )  # fmt: skip
    model = transformers.QianfanOCRForConditionalGeneration(config).eval()
    model.save_pretrained(root / "broken")
    model.save_pretrained(root / "memory", save_original_format=False)
    (root / "hub").mkdir()
    wrong, right = "language_model.model.encoder.layers", "language_model.model.layers"
    names = load_file(root / "broken" / "model.safetensors")
    save_file(
        {n.replace(wrong, right): t for n, t in names.items()}, root / "hub" / "model.safetensors"
    )
    (root / "hub" / "config.json").write_bytes((root / "broken" / "config.json").read_bytes())
    targets = r".*(?:vision_tower|language_model)\..*\.(?:[qkvo]_proj|fc1|projection_layer)"
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    tuned = trained(peft.get_peft_model(model, settings))
    tuned.save_pretrained(root / "adapter")
    merged = {n: t.clone() for n, t in tuned.merge_and_unload().state_dict().items()}
    return {"root": root, "merged": merged, "class": type(model)}


@pytest.mark.parametrize("form", ["hub", "memory"])
def test_part5_qianfan_as_transformers_has_it(form, qianfan, tmp_path):
    """Trained in memory, merged into either form, loaded by transformers: as peft merges."""
    root = qianfan["root"]
    out = tmp_path / "out"
    report = streamshard.merge_lora(base=root / form, adapter=root / "adapter", output=out)
    (warning,) = report["warnings"]
    assert "the output lacks a vocabulary" in warning
    assert set(read(out)) == set(read(root / form))
    loaded, info = qianfan["class"].from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, qianfan["merged"][name], rtol=1e-5, atol=1e-6)
    for folder in (root / form, out):
        checks = {one["what"]: one["why_not"] for one in streamshard.verify(folder)["checks"]}
        assert checks["completeness by config.json"] is None
        assert checks["shapes by config.json"] is None
    assert streamshard.diff(root / "hub", root / "memory")["different"] == []


def test_part5_qianfan_names_that_were_written_by_mistake(qianfan, tmp_path, cli):
    root = qianfan["root"]
    call = ["merge-lora", "--base", root / "broken", "--adapter", root / "adapter", "--output"]
    ref = make(tmp_path / "ref", "tiny-qwen3", "hf")
    for each in ([*call, tmp_path / "o"], command("hf", root / "broken", ref, tmp_path / "o")):
        text = refused(cli, tmp_path, 3, *each)
        assert "Qianfan-OCR" in text
    text = refused(cli, tmp_path, 3, *call, tmp_path / "o")
    assert "'language_model.model.encoder.layers.0." in text
    assert "save_original_format=False" in text
    assert cli("verify", root / "broken").code == 8
    assert cli("verify", root / "hub").code == 0


def test_part5_qianfan_wrapped_in_memory(qianfan, tmp_path):
    """A state dict of the live PEFT model: the adapter has the names of the live modules."""
    import peft

    root = qianfan["root"]
    model = qianfan["class"].from_pretrained(root / "memory")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"])
    tuned = trained(peft.get_peft_model(model, settings))
    (tmp_path / "run").mkdir()
    state = {n: t.clone() for n, t in tuned.state_dict().items()}
    put(tmp_path / "run", state)
    (tmp_path / "run" / "config.json").write_bytes((root / "memory" / "config.json").read_bytes())
    streamshard.extract_lora(checkpoint=tmp_path / "run", output=tmp_path / "lora", alpha=4)
    own = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tuned.save_pretrained(tmp_path / "peft")
    assert own.keys() == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
