"""R3, R4, R11, R12: what people have in adapter files, beside pairs as PEFT saves them today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from adapters import adapter_of
from folders import make
from marks import PEERS
from safetensors.torch import load_file, save_file

import streamshard
from streamshard import inspect, merge_lora, verify
from streamshard.errors import AdapterError, InputError

pytestmark = PEERS

PREFIX = "base_model.model."
TABLES = ("model.embed_tokens", "lm_head")


def language_model(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(200, 300)[None]).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[290, 299, 3], {"embed_tokens": [5, 298], "lm_head": [291]}])
def test_R3_a_resized_table_and_rows_of_it(indices, tied, tmp_path):
    """peft PR 2376, 2863: first the table, then its rows."""
    language_model(tied=tied).save_pretrained(tmp_path / "base")
    model = language_model(tied=tied)
    model.resize_token_embeddings(300)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=indices
    )
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith("token_adapter.base_layer.weight") for key in keys)
    merge_lora(base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out")
    found = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.vocab_size == 300
    assert torch.allclose(logits(found), logits(trained), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pairs", ["none", "zero"])
@pytest.mark.parametrize("saved", [[], ["embed_tokens", "lm_head"]])
def test_R4_an_adapter_that_only_resizes(saved, pairs, tied, tmp_path):
    """Old rows are as they were; that there are more counts as a change."""
    model = language_model(tied=tied)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(300)
    table = model.get_input_embeddings().weight.detach().clone()
    table[:288] = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    content = {f"{PREFIX}{name}.weight": table.clone() for name in TABLES}
    if not tied:
        content[f"{PREFIX}lm_head.weight"] = model.lm_head.weight.detach().clone()
    for layer in range(3 if pairs == "zero" else 0):
        stem = f"{PREFIX}model.layers.{layer}.self_attn.q_proj"
        content |= {
            f"{stem}.lora_A.weight": torch.ones(4, 64),
            f"{stem}.lora_B.weight": torch.zeros(64, 4),
        }
    reference.save_adapter(
        tmp_path / "adapter", content, r=4, lora_alpha=8, modules_to_save=saved or None
    )
    merge_lora(base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out")
    found = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.vocab_size == 300
    assert torch.equal(found.get_input_embeddings().weight, table)
    assert torch.equal(found.lm_head.weight, content[f"{PREFIX}lm_head.weight"])


# --- R11 ------------------------------------------------------------------------------------------


def sharded(folder: Path, *, pickled: bool = False, count: int = 3) -> list[Path]:
    """The adapter of a folder in several files with an index."""
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    end = "bin" if pickled else "safetensors"
    weight_map, files, names = {}, [], list(tensors)
    for number in range(count):
        own = {name: tensors[name] for name in names[number::count]}
        file = folder / f"adapter_model-{number + 1:05d}-of-{count:05d}.{end}"
        torch.save(own, file) if pickled else save_file(own, file)
        weight_map |= dict.fromkeys(own, file.name)
        files.append(file)
    (folder / f"adapter_model.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("pickled", [False, True])
def test_R11_an_adapter_in_several_files(pickled, tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    before = inspect(adapter)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "expected")
    files = sharded(adapter, pickled=pickled)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    expected = reference.read(tmp_path / "expected")
    found = reference.read(tmp_path / "out")
    assert all(reference.same_tensor(found[name], expected[name]) for name in expected)
    seen = inspect(adapter)
    assert (seen["tensors"], seen["shards"]) == (before["tensors"], 3)
    assert verify(adapter)["checked"]["tensors"] == before["tensors"]
    # The same adapter again is told, as for one file.
    with pytest.raises(AdapterError, match="once more"):
        merge_lora(base=tmp_path / "out", adapter=adapter, output=tmp_path / "twice")
    files[1].unlink()
    with pytest.raises(InputError, match=files[1].name):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "less")


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("wide", [False, True])
def test_R11_base_tensors_in_an_adapter_are_inert(wide, layout, tmp_path):
    base = make(tmp_path / "base", "tiny", layout)
    adapter = adapter_of(tmp_path / "adapter", "tiny", layout, targets="llm")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "expected")
    file = adapter / "adapter_model.safetensors"
    own = load_file(file)
    live = "model.language_model.layers.0" if layout == "hf" else "language_model.model.layers.0"
    weights = reference.read(base)
    same = {
        f"{PREFIX}{live}.{end}": weights[f"language_model.model.layers.0.{end}"]
        for end in ("input_layernorm.weight", "mlp.down_proj.weight", "self_attn.q_proj.bias")
    }
    same = {name: tensor.float() if wide else tensor for name, tensor in same.items()}
    save_file(own | same, file)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    expected, found = reference.read(tmp_path / "expected"), reference.read(tmp_path / "out")
    assert all(reference.same_tensor(found[name], expected[name]) for name in expected)
    assert sorted(report["adapters"][0]["inert"]) == sorted(same)
    # Other values were trained, and no config says so.
    for name in same:
        save_file(own | same | {name: same[name] + 1}, file)
        with pytest.raises(AdapterError, match="whole tensors"):
            merge_lora(base=base, adapter=adapter, output=tmp_path / "no")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_R11_experts_of_gpt_oss_in_a_list(prefix, layout, name, tmp_path):
    """unsloth has a layer an expert, with the transpose of the expert's matrix."""
    base = make(tmp_path / "base", "tiny-gpt-oss", layout)
    weights = reference.read(base)
    stem = "language_model.model.layers.1.mlp.experts"
    live = "model.language_model.layers.1.mlp.experts" if layout == "hf" else stem
    packed = weights[f"{stem}.{name}"]
    _, rows, columns = packed.shape
    A = reference.normal((4, rows), 1, seed=1)
    B = reference.normal((columns, 4), 0.1, seed=2)
    content = {
        f"{prefix}{live}.{name}s.3.lora_A.weight": A, f"{prefix}{live}.{name}s.3.lora_B.weight": B,
    }  # fmt: skip
    config = {"layers_to_transform": [1], "layers_pattern": "layers"}
    adapter = reference.save_adapter(tmp_path / "adapter", content, r=4, lora_alpha=8, **config)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["merged"] == 1
    found = reference.read(tmp_path / "out")
    expected = reference.double(packed)
    expected[3] += (2.0 * reference.double(B) @ reference.double(A)).T
    difference = np.abs(reference.double(found[f"{stem}.{name}"]) - expected)
    assert (difference <= reference.step(expected, "BF16") * 0.51).all()
    for other, tensor in weights.items():
        assert other == f"{stem}.{name}" or reference.same_tensor(found[other], tensor)


def test_R11_an_expert_that_the_base_does_not_have(tmp_path):
    base = make(tmp_path / "base", "tiny-gpt-oss", "custom")
    stem = f"{PREFIX}language_model.model.layers.0.mlp.experts.down_projs.99"
    weights = reference.read(base)
    _, rows, columns = weights["language_model.model.layers.0.mlp.experts.down_proj"].shape
    content = {
        f"{stem}.lora_A.weight": torch.ones(4, rows),
        f"{stem}.lora_B.weight": torch.ones(columns, 4),
    }
    adapter = reference.save_adapter(tmp_path / "adapter", content, r=4, lora_alpha=8)
    with pytest.raises(AdapterError, match=r"down_projs\.99"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")


# --- R12 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("counted", [7, 0])
def test_R12_counters_of_a_saved_module(counted, beside, tmp_path):
    """BatchNorm counts batches in an integer, which PEFT saves with its module."""
    norm = torch.nn.BatchNorm1d(8)
    base = reference.save_checkpoint(
        tmp_path / "base",
        {f"head.norm.{name}": tensor for name, tensor in norm.state_dict().items()}
        | {
            "q_proj.weight": reference.normal((8, 8), 1, seed=1),
            "mask": torch.tensor([True, False]),
        },
    )
    trained = norm.state_dict() | {"num_batches_tracked": torch.tensor(counted)}
    trained["running_mean"] = torch.ones(8) * counted
    whole = {f"{PREFIX}head.norm.{name}": tensor for name, tensor in trained.items()}
    pairs = {
        f"{PREFIX}q_proj.lora_A.weight": torch.ones(2, 8),
        f"{PREFIX}q_proj.lora_B.weight": torch.ones(8, 2),
    }
    saved = None if beside else ["norm"]
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        pairs | ({} if beside else whole),
        r=2,
        lora_alpha=2,
        modules_to_save=saved,
    )
    if beside:
        torch.save(whole, adapter / "non_lora_trainables.bin")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    found = reference.read(tmp_path / "out")
    for name, tensor in trained.items():
        assert reference.same_tensor(found[f"head.norm.{name}"], tensor), name


def test_R12_only_a_counter_has_changed(tmp_path):
    """No distance tells of integers, and it is a change all the same."""
    base = reference.save_checkpoint(
        tmp_path / "base",
        {
            "norm.count": torch.tensor(0),
            "norm.weight": torch.ones(4),
            "q_proj.weight": torch.ones(4, 4),
        },
    )
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        {f"{PREFIX}norm.count": torch.tensor(5), f"{PREFIX}norm.weight": torch.ones(4)},
        r=2,
        lora_alpha=2,
        modules_to_save=["norm"],
    )
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert int(reference.read(tmp_path / "out")["norm.count"]) == 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_R12_a_counter_of_another_dtype_is_refused(dtype, tmp_path):
    base = reference.save_checkpoint(
        tmp_path / "base", {"norm.count": torch.tensor(0), "norm.weight": torch.ones(4)}
    )
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        {
            f"{PREFIX}norm.count": torch.tensor(5, dtype=dtype),
            f"{PREFIX}norm.weight": torch.zeros(4),
        },
        r=2,
        lora_alpha=2,
        modules_to_save=["norm"],
    )
    with pytest.raises((AdapterError, InputError), match=r"norm\.count"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")


@pytest.mark.parametrize("command", ["merge", "convert", "reference", "inspect"])
def test_R12_a_bare_file_beside_a_config(command, tmp_path):
    folders = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    bare = {side: folder / "model.safetensors" for side, folder in folders.items()}
    assert all(file.exists() for file in bare.values())
    if command == "inspect":
        assert inspect(bare["hf"])["dimensions"] == inspect(folders["hf"])["dimensions"]
        return
    adapter = adapter_of(tmp_path / "adapter", "tiny", "custom", targets="llm")
    outputs = []
    for number, given in enumerate((folders, bare)):
        output = tmp_path / f"out{number}"
        outputs.append(output)
        if command == "merge":
            merge_lora(base=given["custom"], adapter=adapter, output=output)
        elif command == "convert":
            streamshard.custom_to_hf(
                custom_path=given["custom"], hf_path=folders["hf"], save_path=output
            )
        else:
            streamshard.custom_to_hf(
                custom_path=folders["custom"], hf_path=given["hf"], save_path=output
            )
    one, other = (reference.digests(output) for output in outputs)
    for name in ("streamshard.json", "README.md"):  # which say what each was made of
        del one[name], other[name]
    assert one == other
