"""Checkpoint folders of both layouts, made, edited and compared by plain means."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import reference
import torch
from make_checkpoint import write_checkpoint
from presets import Preset, model_config, tensor_shapes
from reference import INDEX, digests, normal, same_tensor
from safetensors.torch import load_file, save_file

from streamshard import custom_to_hf, hf_to_custom

OTHER = {"custom": "hf", "hf": "custom"}
INNER = {"custom": "llm_config", "hf": "text_config"}
COMMAND = {"custom": "hf2custom", "hf": "custom2hf"}
HEADS = {"language_model.lm_head.weight", "language_model.output.weight"}


VISION_NAMES = {
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
    "vision_model.encoder.layers.": "vision_tower.encoder.layer.",
    "attn.proj.": "attention.projection_layer.",
    "attn.": "attention.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp1.0.": "multi_modal_projector.layer_norm.",
    "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2.",
}
INTERNLM2_NAMES = {
    "language_model.output.": "language_model.lm_head.",
    "tok_embeddings": "embed_tokens",
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


def as_hf(custom: Mapping[str, torch.Tensor], preset: Preset) -> dict[str, torch.Tensor]:
    """A custom checkpoint's tensors in the HF layout, flat spelling."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in custom.items():
        if name.startswith("language_model."):
            if ".wqkv." in name:
                share, groups = preset.heads // preset.kv_heads, preset.kv_heads
                view = tensor.reshape(groups, share + 2, preset.head_dim, -1)
                stem = name.replace("attention.wqkv.weight", "self_attn.{}_proj.weight")
                for part, rows in zip("qkv", (view[:, :share], view[:, share], view[:, share + 1]),
                                      strict=True):  # fmt: skip
                    out[stem.format(part)] = rows.reshape(-1, tensor.shape[1])
                continue
            names = INTERNLM2_NAMES if preset.arch == "InternLM2ForCausalLM" else {}
        elif ".qkv." in name:
            stem = name.replace("vision_model.encoder.layers.", "vision_tower.encoder.layer.")
            stem = stem.replace("attn.qkv.", "attention.{}_proj.")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[stem.format(part)] = rows
            continue
        else:
            names = VISION_NAMES
        for old, new in names.items():
            name = name.replace(old, new, 1)  # noqa: PLW2901
        name = re.sub(r"(vision_tower\..*)\.ls([12])$", r"\1.lambda_\2", name)  # noqa: PLW2901
        out[name] = tensor
    return out


def as_custom(hf: Mapping[str, torch.Tensor], preset: Preset) -> dict[str, torch.Tensor]:
    """The inverse of `as_hf`, by the place of each element."""
    shapes = tensor_shapes(preset, "custom")
    ends = list(itertools.accumulate(map(math.prod, shapes.values()), initial=0))
    places = {
        name: torch.arange(start, start + math.prod(shape)).reshape(shape)
        for (name, shape), start in zip(shapes.items(), ends, strict=False)
    }
    moved = as_hf(places, preset)
    assert moved.keys() == hf.keys()
    flat = torch.zeros(ends[-1], dtype=next(iter(hf.values())).dtype)
    for name, place in moved.items():
        flat[place.reshape(-1)] = hf[name].reshape(-1)
    return {name: flat[place] for name, place in places.items()}


def carried(tensors: Mapping[str, torch.Tensor], preset: Preset, layout: str) -> dict[str, Any]:
    return (as_custom if layout == "custom" else as_hf)(tensors, preset)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same_tensor(found[name], expected[name])]
    assert not different


def make(folder: Path, preset: Preset | str, layout: str, **how: Any) -> Path:
    write_checkpoint(folder, preset, layout=layout, **how)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the config of a folder in place."""
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_weights(folder: Path) -> Path:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    return folder


def put(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Replace the weights of a folder by these, in one file."""
    without_weights(folder)
    content = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    return folder


def convert(layout: str, source: Path, ref: Path, output: Path, **options: Any) -> dict[str, Any]:
    if layout == "custom":
        return hf_to_custom(hf_path=source, custom_path=ref, save_path=output, **options)
    return custom_to_hf(custom_path=source, hf_path=ref, save_path=output, **options)


def command(layout: str, source: Path, ref: Path, output: Path) -> list[str | Path]:
    paths = {f"--{OTHER[layout]}-path": source, f"--{layout}-path": ref, "--save-path": output}
    return [COMMAND[layout], *itertools.chain.from_iterable(paths.items())]


def assert_files_of_safetensors(folder: Path) -> None:
    """Each file is what `save_file` writes of its content, and the index what transformers does."""
    files = sorted(folder.glob("*.safetensors"))
    weight_map, size, parameters = {}, 0, 0
    for file in files:
        content = load_file(file)
        again = folder.parent / "again.safetensors"
        save_file(content, again, {"format": "pt"})
        assert file.read_bytes() == again.read_bytes(), file.name
        weight_map |= dict.fromkeys(content, file.name)
        size += sum(tensor.nbytes for tensor in content.values())
        parameters += sum(tensor.numel() for tensor in content.values())
    index = folder / INDEX
    assert index.exists() == (len(files) > 1)
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        return
    count = len(files)
    assert [f.name for f in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    content = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": weight_map,
    }
    assert index.read_text() == json.dumps(content, indent=2, sort_keys=True) + "\n"


def settings_of(preset: Preset, layout: str) -> dict[str, Any]:
    return model_config(preset, layout, tied=False, torch_dtype="float32")


def distances(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Any:
    """In fp64, what upstream prints and the global norm."""
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    squares = [float(((ours[n].double() - theirs[n].double()) ** 2).sum()) for n in shared]
    total = math.fsum(math.sqrt(square) for square in squares)
    count = sum(ours[n].numel() for n in shared)
    return {
        "sum": total,
        "per_parameter": total / count,
        "global": math.sqrt(math.fsum(squares)),
        "compared": len(shared),
    }


def flattened(tensors: Mapping[str, torch.Tensor], preset: Preset, layout: str) -> dict[str, Any]:
    """The tensors of `make`'s HF folders under flat names, with a head."""
    if layout == "custom":
        return dict(tensors)
    rules = (
        (r"^(?:model\.)?(?:language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"^(?:model\.)?(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^(?:model\.)?language_model\.(?!lm_head)(?:model\.)?", "language_model.model."),
    )
    out = {}
    for name, tensor in tensors.items():
        rule = next((p, r) for p, r in rules if re.match(p, name))
        out[re.sub(*rule, name)] = tensor
    out.setdefault("language_model.lm_head.weight", out["language_model.model.embed_tokens.weight"])
    return out


def refused(cli: Any, root: Path, code: int, *call: Any) -> str:
    """Run a command that must fail, say so in words, and leave every file as it is."""
    before = digests(root)
    outcome = cli(*call)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "unexpected " not in outcome.err.partition("\n")[0].partition(":")[2][:20]
    assert digests(root) == before
    return outcome.err


def wrapped(content: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As upstream's trainer saves a model whose language model is wrapped by PEFT."""
    out = {}
    for name, tensor in content.items():
        inner = name.replace("language_model.", "language_model.base_model.model.", 1)
        if name.endswith("self_attn.q_proj.weight"):
            stem = inner.removesuffix(".weight")
            out[f"{stem}.base_layer.weight"] = tensor
            out[f"{stem}.lora_A.default.weight"] = normal((4, tensor.shape[1]), 1, seed=1)
            out[f"{stem}.lora_B.default.weight"] = normal((tensor.shape[0], 4), 1, seed=2)
        else:
            out[inner] = tensor
    return out


KEYS = {
    "command", "version", "output", "layout", "tensors", "bytes", "shards", "seconds",
    "peak_rss_bytes", "merged", "l2", "missing", "unexpected", "warnings",
}  # fmt: skip


def sparse(folder: Path, preset: Preset, layout: str, size: float = 5e9) -> Path:
    """A checkpoint of true names and shapes whose files are holes after their headers."""
    folder.mkdir(parents=True)
    config = model_config(preset, layout, tied=False, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    for part in (config, config.get("llm_config", {})):
        for code in part.get("auto_map", {}).values():
            (folder / f"{code.partition('.')[0]}.py").write_text("")
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, shape in tensor_shapes(preset, layout).items():
        nbytes = 2 * math.prod(shape)
        if filled and filled + nbytes > size:
            shards.append({})
            filled = 0
        shards[-1][name] = shape, nbytes
        filled += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shard):
            shape, nbytes = shard[name]
            begin, end = end, end + nbytes
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(shard, file.name)
    if len(shards) == 1:
        file.rename(folder / "model.safetensors")
    else:
        reference.save_index(folder, weight_map)
    return folder
