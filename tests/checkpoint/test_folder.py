"""Bad input: exit code, file and tensor in the message, nothing written, inputs as before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pairs import LAYER, Pair
from reference import INDEX, load_file, save_file, save_index
from shards_of_pair import FIRST, SECOND, K, Q, ones, put, single, weight_map

from streamshard.checkpoint.folder import open_checkpoint
from streamshard.errors import InputError

QA, QB, KA, KB = (
    f"base_model.model.{LAYER}.{module}.lora_{side}.weight"
    for module in ("q_proj", "k_proj")
    for side in "AB"
)


def remap(**changes: Any) -> Callable[[Pair], None]:
    """Let the index say of the tensors "q" and "k", or of "more", that they are elsewhere."""

    def change(pair: Pair) -> None:
        names = {"q": Q, "k": K, "more": "more"}
        save_index(pair.base, weight_map(pair.base) | {names[k]: v for k, v in changes.items()})

    return change


def adapter(
    replace: dict[str, Any] | None = None, *, drop: tuple[str, ...] = (), **config: Any
) -> Callable[[Pair], None]:
    """Save the adapter anew with other tensors (or a function of the old) and config fields."""

    def change(pair: Pair) -> None:
        content = load_file(pair.adapter / "adapter_model.safetensors")
        for name, new in (replace or {}).items():
            content[name] = new(content[name].clone()) if callable(new) else new
        content = {k: v.contiguous() for k, v in content.items() if k not in drop}
        save_file(content, pair.adapter / "adapter_model.safetensors", {"format": "pt"})
        configure(pair, **config)

    return change


def configure(pair: Pair, **config: Any) -> None:
    file = pair.adapter / "adapter_config.json"
    content = json.loads(file.read_text()) | config
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Pair], None]:
    def run(pair: Pair) -> None:
        path = pair.root / file
        path.write_bytes(change(path.read_bytes()))

    return run


def renamed(pattern: str, new: str) -> Callable[[Pair], None]:
    def change(pair: Pair) -> None:
        file = pair.adapter / "adapter_model.safetensors"
        content = load_file(file)
        assert any(pattern in key for key in content)
        save_file({k.replace(pattern, new): v for k, v in content.items()}, file)

    return change


BASES: dict[str, tuple[Callable[[Pair], None], int, list[str]]] = {
    "truncated": (edit(f"base/{SECOND}", lambda b: b[:-1]), 3, [SECOND, "truncated"]),
    "cut-in-header": (edit(f"base/{SECOND}", lambda b: b[:40]), 3, [SECOND, "claims a header"]),
    "empty": (edit(f"base/{SECOND}", lambda b: b""), 3, [SECOND, "at least 8"]),
    "garbage-header": (edit(f"base/{FIRST}", lambda b: b[:9] + b"#" + b[10:]), 3, [FIRST, "JSON"]),
    "html": (edit(f"base/{FIRST}", lambda b: b"<!DOCTYPE html>" * 20), 3, [FIRST, "website"]),
    "lfs-pointer": (
        edit(f"base/{FIRST}", lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
        3,
        [FIRST],
    ),
    "appended": (edit(f"base/{FIRST}", lambda b: b + b"\0"), 3, [FIRST, "appended"]),
    "missing-file": (lambda p: (p.base / SECOND).unlink(), 3, [INDEX, SECOND, "not in the folder"]),
    "absolute": (remap(more="/etc/passwd.safetensors"), 3, [INDEX, "/etc/passwd"]),
    "backslash": (remap(more="..\\x.safetensors"), 3, [INDEX, "damaged or hostile"]),
    "drive": (remap(more="C:x.safetensors"), 3, [INDEX, "C:x.safetensors"]),
    "extension": (remap(more="config.json"), 3, [INDEX, "config.json"]),
    "control-character": (remap(more="a\x1b.safetensors"), 3, [INDEX, "a\\x1b.safetensors"]),
    "no-string": (remap(more=1), 3, [INDEX, "weight_map"]),
    "wrong-file": (remap(q=SECOND), 3, [INDEX, Q, FIRST]),
    "not-listed": (
        lambda p: save_index(p.base, {k: v for k, v in weight_map(p.base).items() if k != K}),
        3,
        [INDEX, K, SECOND],
    ),
    "not-there": (remap(more=FIRST), 3, [INDEX, "'more'", "do not hold"]),
    "in-two-files": (
        lambda p: save_file({K: ones(2, 2)} | load_file(p.base / FIRST), p.base / FIRST),
        3,
        [INDEX, K, FIRST],
    ),
    "index-list": (edit(f"base/{INDEX}", lambda b: b"[]"), 3, [INDEX, "not a JSON object"]),
    "index-empty-map": (lambda p: save_index(p.base, {}), 3, [INDEX, "no tensors"]),
    "index-no-map": (edit(f"base/{INDEX}", lambda b: b"{}"), 3, [INDEX, "weight_map"]),
    "index-key-twice": (
        edit(f"base/{INDEX}", lambda b: b.replace(b'map": {', b'map": {"a": "b", "a": "b", ')),
        3,
        [INDEX, "twice"],
    ),
    "index-cut": (edit(f"base/{INDEX}", lambda b: b[:-9]), 3, [INDEX, "JSON"]),
    "index-latin-1": (edit(f"base/{INDEX}", lambda b: b"\xe4" + b), 3, [INDEX, "UTF-8"]),
    "index-nan": (edit(f"base/{INDEX}", lambda b: b.replace(b": 0", b": NaN")), 3, [INDEX, "NaN"]),
    "index-deep": (edit(f"base/{INDEX}", lambda b: b'{"a":' + b"[" * 10**5), 3, [INDEX]),
    "config-cut": (edit("base/config.json", lambda b: b[:-1]), 3, ["config.json", "JSON"]),
    "config-list": (edit("base/config.json", lambda b: b"[]"), 3, ["config.json", "object"]),
    "both": (
        lambda p: shutil.copy(p.base / FIRST, p.base / "model.safetensors"),
        3,
        [INDEX, "has both", "model.safetensors"],
    ),
    "no-index": (
        lambda p: ((p.base / INDEX).unlink(), (p.base / FIRST).rename(p.base / "a.safetensors")),
        3,
        ["2 .safetensors files", INDEX],
    ),
    "no-weights": (single(drop=(Q, K)), 4, ["not in the base"]),
    "only-pickles": (
        lambda p: [(p.base / f).unlink() for f in (INDEX, FIRST, SECOND)]
        + [(p.base / "pytorch_model.bin").write_bytes(b"x")],
        3,
        ["pytorch_model.bin", "no file of torch"],
    ),
    "nothing": (lambda p: shutil.rmtree(p.base), 3, ["base", "no such file"]),
    "an-adapter": (
        lambda p: (shutil.rmtree(p.base), shutil.copytree(p.adapter, p.base)),
        3,
        ["is a PEFT adapter", "--adapter"],
    ),
    "wrapped": (
        single((f"{LAYER}.q_proj.lora_A.default.weight", ones(4, 40)), drop=(Q,)),
        3,
        ["LoRA-wrapped", f"{LAYER}.q_proj.lora_A.default.weight"],
    ),
    "gptq": (
        single((f"{LAYER}.q_proj.qweight", ones(4, 4).to(torch.int32)), drop=(Q,)),
        3,
        ["quantized", f"{LAYER}.q_proj.qweight"],
    ),
    "fp8": (
        single((Q, ones(96, 40).to(torch.float8_e4m3fn)), (f"{Q}_scale_inv", ones(1, 1))),
        3,
        ["quantized", f"{Q}_scale_inv"],
    ),
    "bitsandbytes": (
        single((Q, ones(1920, 1).to(torch.uint8)), (f"{Q}.absmax", ones(60))),
        3,
        ["quantized", f"{Q}.absmax"],
    ),
    "integers": (
        single((Q, ones(96, 40).to(torch.int8))),
        3,
        [Q, "I8"],
    ),
    "fp64": (single((Q, ones(96, 40).double())), 3, [Q, "F64"]),
    "nan-in-row": (single((Q, put(95, float("nan"))(ones(96, 40)))), 4, [Q, "row 95", "NaN"]),
    "inf-in-row": (single((K, put(64, float("-inf"))(ones(130, 40)))), 4, [K, "row 64"]),
    "other-model": (single((K, ones(131, 40))), 4, [KA, K, "[130, 40]", "[131, 40]"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "code", "expected"), BASES.values(), ids=BASES)
def test_bad_bases(change, code, expected, pair, refused):
    change(pair)
    refused(code, *expected)


ADAPTERS: dict[str, tuple[Callable[[Pair], None], int, list[str]]] = {
    "no-A": (adapter(drop=(QA,)), 4, [QB, "partner"]),
    "no-B": (adapter(drop=(KB,)), 4, [KA, "partner"]),
    "rank": (adapter({QA: ones(3, 40), QB: ones(96, 3)}), 4, [QA, "rank 3", "says 4"]),
    "ranks-apart": (adapter({QB: ones(96, 3)}), 4, [QA, "rank 4", "lora_B 3"]),
    "config-rank": (adapter(r=8), 4, ["says 8"]),
    "rows": (adapter({QB: ones(97, 4)}), 4, [QA, Q, "[97, 40]", "[96, 40]"]),
    "columns": (adapter({QA: ones(4, 41)}), 4, [QA, Q, "[96, 41]", "[96, 40]"]),
    "transposed": (adapter({QA: ones(40, 4), QB: ones(4, 96)}), 4, [QA]),
    "vector": (adapter({QA: ones(160)}), 4, [QA, "[160]"]),
    "empty-factor": (adapter({QA: ones(0), QB: ones(0)}), 4, ["q_proj", "[0]", "ZeRO-3"]),
    "cube": (adapter({QA: ones(4, 40, 1)}), 4, [QA, "[4, 40, 1]"]),
    "integers": (adapter({QA: ones(4, 40).to(torch.int32)}), 4, [QA, "I32"]),
    "fp64": (adapter({QB: ones(96, 4).double()}), 4, [QB, "F64"]),
    "nan-A": (adapter({QA: put(2, float("nan"))}), 4, [QA, "row 2", "NaN"]),
    "nan-B": (adapter({KB: put(129, float("nan"))}), 4, [KB, "row 129"]),
    "inf-B": (adapter({KB: put(7, float("inf"))}), 4, [KB, "row 7"]),
    "minus-inf-bf16": (
        adapter({KB: lambda t: put(7, float("-inf"))(t.bfloat16())}), 4, [KB, "row 7"],
    ),
    "nan-beside-zero": (adapter({QA: put(2, float("nan")), QB: ones(96, 4) * 0}), 4, [QA, "row 2"]),
    "all-zero": (adapter({QB: ones(96, 4) * 0, KB: ones(130, 4) * 0}), 4, ["exactly zero"]),
    "no-alpha": (adapter(lora_alpha=...), 4, ["adapter_config.json", "lora_alpha"]),
    "null-alpha": (adapter(lora_alpha=None), 4, ["lora_alpha"]),
    "text-alpha": (adapter(lora_alpha="8"), 4, ["lora_alpha", "'8'"]),
    "infinite-alpha": (
        edit("adapter/adapter_config.json", lambda b: b.replace(b'alpha": 8', b'alpha": 1e999')),
        3,
        ["adapter_config.json", "1e999"],
    ),
    "no-r": (adapter(r=...), 4, ["adapter_config.json: r "]),
    "zero-r": (adapter(r=0), 4, ["adapter_config.json: r "]),
    "unknown-type": (adapter(peft_type="NEWLORA"), 4, ["peft_type", "NEWLORA"]),
    "no-type": (adapter(peft_type=...), 4, ["peft_type"]),
    "adalora": (adapter(peft_type="ADALORA"), 4, ["peft_type", "ADALORA"]),
    "future-field": (adapter(nvfp4_merge_aware=True), 4, ["nvfp4_merge_aware"]),
    "rank-of-zero": (adapter(rank_pattern={"q_proj": 0}), 4, ["rank_pattern['q_proj']"]),
    "pattern-list": (adapter(rank_pattern=["q_proj"]), 4, ["rank_pattern"]),
    "pattern-broken": (adapter(alpha_pattern={"q_(proj": 1}), 4, ["alpha_pattern", "q_(proj"]),
    "eras": (
        adapter(
            {QA: ones(2, 40), QB: ones(96, 2)},
            rank_pattern={"q_proj": 2}, alpha_pattern={"self_attn.q_proj": 40}, peft_version=...,
        ),
        4,
        ["q_proj", "8, 40", "peft_version"],
    ),
    "config-list": (edit("adapter/adapter_config.json", lambda b: b"[]"), 3, ["adapter_config"]),
    "config-cut": (edit("adapter/adapter_config.json", lambda b: b[:-2]), 3, ["adapter_config"]),
    "config-key-twice": (
        edit("adapter/adapter_config.json", lambda b: b.replace(b'"r": 4', b'"r": 4, "r": 8')),
        3,
        ["adapter_config.json", "'r' occurs twice"],
    ),
    "truncated": (
        edit("adapter/adapter_model.safetensors", lambda b: b[:-1]),
        3,
        ["adapter_model", "truncated"],
    ),
    "no-tensors": (adapter(drop=(QA, QB, KA, KB)), 4, ["has no tensors"]),
    "no-file": (
        lambda p: (p.adapter / "adapter_model.safetensors").unlink(), 3, ["adapter_model.bin"],
    ),
    "no-config": (lambda p: (p.adapter / "adapter_config.json").unlink(), 3, ["no adapter_config"]),
    "one-level-down": (
        lambda p: (
            p.adapter.rename(p.root / "x"),
            p.adapter.mkdir(),
            (p.root / "x").rename(p.adapter / "en"),
        ),
        3,
        ["sub-folder 'en'"],
    ),
    "mixed-prefixes": (
        adapter({QA.removeprefix("base_model.model."): ones(4, 40)}, drop=(QA,)),
        4,
        ["different ways"],
    ),
    "two-adapters": (
        adapter({QA.replace("A.w", "A.x.w"): ones(4, 40), QB.replace("B.w", "B.y.w"): ones(96, 4)},
                drop=(QA, QB)),
        4,
        ["several adapters", "'x', 'y'"],
    ),
    "same-factor-twice": (
        adapter({f"base_model.model.{QA}": ones(4, 40), f"base_model.model.{QB}": ones(96, 4),
                 f"base_model.model.{KA}": ones(4, 40), f"base_model.model.{KB}": ones(130, 4)}),
        4,
        ["same tensor"],
    ),
    "dora-tensor": (
        adapter({QA.replace("lora_A.weight", "lora_magnitude_vector"): ones(96)}),
        4,
        ["q_proj.lora_magnitude_vector", "use_dora is false"],
    ),
    "embedding": (
        adapter({"base_model.model.embed_tokens.lora_embedding_A": ones(4, 9)}),
        4,
        ["embed_tokens.lora_embedding_A"],
    ),
    "saved-module": (
        adapter({"base_model.model.language_model.model.norm.weight": ones(40)}),
        4,
        ["language_model.model.norm.weight"],
    ),
    "saved-head": (  # peft adds it where the head is a target
        adapter({"base_model.model.language_model.lm_head.base_layer.weight": ones(9, 40)}),
        4,
        ["lm_head.base_layer.weight"],
    ),
    "bias-of-B": (
        adapter({QB.replace("weight", "bias"): ones(96)}), 4, ["q_proj.lora_B.bias"],
    ),
    "kohya": (renamed("lora_A", "lora_down"), 4, ["lora_down"]),
    "pickled-executable": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(), write_malicious(p),
        ),
        3,
        ["adapter_model.bin", "plain tensors"],
    ),
    "pickled-garbage": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(),
            (p.adapter / "adapter_model.bin").write_bytes(b"garbage"),
        ),
        3,
        ["adapter_model.bin"],
    ),
    "pickled-list": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(),
            torch.save([ones(2)], p.adapter / "adapter_model.bin"),
        ),
        3,
        ["adapter_model.bin", "mapping"],
    ),
    "pickled-nested": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(),
            torch.save({"state_dict": {QA: ones(4, 40)}}, p.adapter / "adapter_model.bin"),
        ),
        3,
        ["adapter_model.bin", "'state_dict'"],
    ),
    "pickled-fp64": (
        lambda p: (
            (p.adapter / "adapter_model.safetensors").unlink(),
            torch.save({QA: ones(4, 40).double()}, p.adapter / "adapter_model.bin"),
        ),
        4,
        ["adapter_model.bin", QA],
    ),
}  # fmt: skip

HIT = "executed-by-unpickling"


class Malicious:
    """Creates a file in the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (HIT,)


def write_malicious(pair: Pair) -> None:
    torch.save({QA: ones(4, 40), "x": Malicious()}, pair.adapter / "adapter_model.bin")


@pytest.mark.parametrize(("change", "code", "expected"), ADAPTERS.values(), ids=ADAPTERS)
def test_bad_adapters(change, code, expected, pair, refused, monkeypatch):
    monkeypatch.chdir(pair.root)
    change(pair)
    refused(code, *expected)


def test_the_malicious_pickle_is_one(pair, monkeypatch):
    """Otherwise its refusal above would prove nothing."""
    monkeypatch.chdir(pair.root)
    write_malicious(pair)
    torch.load(pair.adapter / "adapter_model.bin", weights_only=False)
    assert Path(HIT).is_dir()


@pytest.mark.parametrize("place", ["../x", "a/x", "a/../x", "./x", "absolute", "..\\x", "C:x"])
def test_files_elsewhere_are_refused_even_if_they_are_there(place, pair, refused):
    """The content is right and only the place is wrong; nothing but the place may be said."""
    (pair.base / "a").mkdir()
    name = f"{pair.root}/x.safetensors" if place == "absolute" else f"{place}.safetensors"
    (pair.base / SECOND).rename(pair.base / name)
    moved = {k: name if v == SECOND else v for k, v in weight_map(pair.base).items()}
    save_index(pair.base, moved)
    refused(3, INDEX, name, "same folder")


def test_a_file_of_any_plain_name_is_accepted(pair, cli):
    """So that the test above can fail."""
    (pair.base / SECOND).rename(pair.base / "x.safetensors")
    moved = {k: "x.safetensors" if v == SECOND else v for k, v in weight_map(pair.base).items()}
    save_index(pair.base, moved)
    assert cli(*pair.command).code == 0
    assert set(reference.read(pair.output)) == set(moved)


def test_unknown_modules_are_listed_with_the_nearest_names(pair, refused):
    renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.q_prj")(pair)
    said = refused(4, "1 of 2 modules", "q_prj.lora_A.weight")
    assert f"nearest in the base: '{LAYER}.q_proj.weight'" in said


def test_another_layout_is_no_guess(pair, refused):
    """Never by a common suffix: vision and language model both have layers."""
    renamed("language_model.model.layers", "vision_model.encoder.layers")(pair)
    refused(4, "2 of 2 modules", "vision_model.encoder.layers.0.self_attn.q_proj")


# Every field of PEFT's config that is refused, at a value that changes the merge.
REFUSED_FIELDS: dict[str, list[Any]] = {
    "use_dora": [True],
    "bias": ["some", 1],
    "lora_bias": [True],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [0]}],
    "kasa_config": [{"beta": 0.1}],
    "layer_replication": [[[0, 2], [1, 3]]],
    "use_bdlora": [{"nblocks": 2}],
    "alora_invocation_tokens": [[5]],
    "arrow_config": [{"top_k": 3}],
    "megatron_config": [{"x": 1}],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", 1],
    "a_field_of_the_future": [True, 1, "x", [0], {"a": None}],
    "use_rslora": ["yes", 1],
}
INERT_FIELDS: dict[str, list[Any]] = {
    "use_qalora": [True],  # acts on GPTQ layers only
    "ensure_weight_tying": [True],  # nothing tied is adapted
    "fan_in_fan_out": [True],  # peft forgets it for linear layers; no shape here is square
    "use_dora": [False, None],
    "bias": ["none", None, "all", "lora_only"],  # the base has none
    "modules_to_save": [None, []],
    "trainable_token_indices": [None, []],
    "target_parameters": [None, []],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva", "mica"],
    "a_field_of_the_future": [None, False, [], {}, ""],
    "rank_pattern": [None, {}],
    "alpha_pattern": [None, {}],
    "use_rslora": [False, None, ...],
    "megatron_core": ["megatron.core"],
    "megatron_config": [None],
    "target_modules": ["all-linear", ["x"], None],
    "layers_to_transform": [[0], 1, None],
    "layers_pattern": ["layers", None],
    "exclude_modules": [["v_proj"], None],
    "lora_dropout": [0.5],
    "inference_mode": [False],
    "task_type": [None, "FEATURE_EXTRACTION"],
    "qalora_group_size": [16],
    "loftq_config": [{}, {"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "y"}],
    "revision": ["main"],
    "peft_version": ["0.9.1.dev0", ...],
    "lora_alpha": [8.5, -1],
}


def table(fields: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={'missing' if value is ... else value}")
        for name, values in fields.items()
        for value in values
    ]


@pytest.mark.parametrize(("name", "value"), table(REFUSED_FIELDS))
def test_fields_that_change_the_merge_are_refused_by_name(name, value, pair, refused):
    configure(pair, **{name: value})
    refused(4, "adapter_config.json", name)


@pytest.mark.parametrize(("name", "value"), table(INERT_FIELDS))
def test_inert_fields_are_let_through(name, value, pair, cli):
    configure(pair, **{name: value})
    outcome = cli(*pair.command, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["merged"] == 2


def test_partly_zero_adapters_are_warned_of(pair, cli):
    adapter({QB: ones(96, 4) * 0})(pair)
    outcome = cli(*pair.command, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report["merged"] == 1
    (warning,) = report["warnings"]
    assert f"{LAYER}.q_proj" in warning
    assert f"{LAYER}.q_proj" not in [*report]
    assert reference.same_tensor(reference.read(pair.output)[Q], reference.read(pair.base)[Q])


@pytest.mark.parametrize("dtype", ["base", "option"])
def test_fp16_overflow(dtype, pair, refused):
    if dtype == "base":
        single((Q, put(70, 65504.0)(ones(96, 40)).half()))(pair)
        adapter({QA: lambda a: a * 0 + 100, QB: lambda b: b * 0 + 1})(pair)
        refused(4, Q, "row 70", "F16", "--dtype bf16")
    else:
        single((Q, put(70, 1e5)(ones(96, 40)).bfloat16()))(pair)
        refused(4, Q, "row 70", "does not fit in F16", more=["--dtype", "fp16"])


@pytest.mark.parametrize("stem", ["a" * 243, "é" * 121], ids=["243 letters", "242 bytes"])
def test_a_file_name_as_long_as_a_disk_takes(stem, tmp_path):
    name = f"{stem}.safetensors"
    folder = reference.save_checkpoint(tmp_path / "x", {"a": reference.normal((2, 2), 1, seed=1)})
    (folder / "model.safetensors").rename(folder / name)
    reference.save_index(folder, {"a": name})
    assert [*open_checkpoint(folder).metadata] == [name]
    reference.save_index(folder, {"a": f"éé{name}"})
    with pytest.raises(InputError, match="hostile"):
        open_checkpoint(folder)
