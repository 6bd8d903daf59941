"""Experts: fused parameters as peft's `target_parameters`, single ones, and the two together.

Expected elements come from peft's live layers (`peft_cases`) or, where no installed release
makes such an adapter, from the formula, written out here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft_cases
import pytest
import reference
import torch
from folders import put
from marks import PEERS
from peft_cases import (
    Experts,
    adapted,
    assert_close,
    assert_exact,
    configure,
    exact_weights,
    fill,
    language_model,
    loaded,
    outputs,
    save_adapter,
    save_base,
)
from reference import Float64, double, normal, read

from streamshard import merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj"], "target_parameters": [UP, DOWN]},
    "other-order": {"target_modules": [], "target_parameters": [DOWN, UP]},
    "up": {"target_modules": [], "target_parameters": [UP]},
    "down": {"target_modules": ["o_proj"], "target_parameters": [DOWN]},
    "rank-patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": [UP, DOWN],
        "rank_pattern": {"experts.gate_up_proj": 2, "q_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 20},
        "use_rslora": True,
    },
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight", DOWN]},
}


def qwen3_moe() -> Any:
    return language_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16
    )


def gpt_oss() -> Any:
    """As in the real model, down_proj is square and stored (in, out)."""
    return language_model(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, head_dim=16
    )


def split(fused: dict[str, Any]) -> dict[str, Any]:
    """Fused experts as the files of Qwen3-MoE have them: gate rows first, then up rows."""
    found = {}
    for name, tensor in fused.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            if last == "down_proj":
                found[f"{stem}.{e}.down_proj.weight"] = matrix
                continue
            half = len(matrix) // 2
            found[f"{stem}.{e}.gate_proj.weight"] = matrix[:half]
            found[f"{stem}.{e}.up_proj.weight"] = matrix[half:]
    return found


def base_of(folder: Path, model: Any, dtype: str, *, fused: bool) -> Path:
    """The model's config with its weights in one spelling or the other."""
    save_base(folder, model, dtype)
    state = {n: t.to(reference.TORCH[dtype]) for n, t in model.state_dict().items()}
    return put(folder, state if fused else split(state))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per-expert"])
@pytest.mark.parametrize("config", TARGETS.values(), ids=TARGETS)
def test_fused_adapters_of_qwen3(config, fused, tmp_path):
    model = qwen3_moe()
    if "mlp.gate.weight" in config["target_parameters"] and config["target_modules"] == []:
        config = {**config, "target_modules": ["v_proj"]}
    wrapped = adapted(model, **config)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    exact = exact_weights(wrapped)
    for dtype in ("F32", "BF16"):
        base = base_of(tmp_path / f"base-{dtype}", model, dtype, fused=fused)
        merge_lora(base=base, adapter=adapter, output=tmp_path / dtype)
        expected = exact if fused else split(exact)
        assert_exact(read(tmp_path / dtype), read(base), expected)
    assert_close(outputs(loaded(model, tmp_path / "F32")), outputs(wrapped))


def test_what_transformers_writes_of_experts_is_per_expert(tmp_path):
    """So that the per-expert case above is what people have."""
    model = qwen3_moe()
    base = save_base(tmp_path / "base", model, "BF16")
    written = read(base)
    expected = split(model.state_dict())
    assert written.keys() == expected.keys()
    assert all((written[n] == t).all() for n, t in expected.items())


@pytest.mark.parametrize("config", ["both", "other-order", "up", "rank-patterns"])
def test_fused_adapters_of_gpt_oss(config, tmp_path):
    """Stored (in, out); a square down_proj is told by its sibling, or by what is known of the class."""
    model = gpt_oss()
    wrapped = adapted(model, **TARGETS[config])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    exact = exact_weights(wrapped)
    for dtype in ("F32", "BF16"):
        base = base_of(tmp_path / f"base-{dtype}", model, dtype, fused=True)
        merge_lora(base=base, adapter=adapter, output=tmp_path / dtype)
        assert_exact(read(tmp_path / dtype), read(base), exact)
    assert_close(outputs(loaded(model, tmp_path / "F32")), outputs(wrapped))


def test_a_square_parameter_alone_is_right_or_refused(tmp_path):
    """Only the release of PEFT and the class of the model tell; never a guess."""
    model = gpt_oss()
    wrapped = adapted(model, **TARGETS["down"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = base_of(tmp_path / "base", model, "F32", fused=True)
    try:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    except AdapterError as error:
        assert "experts" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        assert_exact(read(tmp_path / "out"), read(base), exact_weights(wrapped))
    configure(adapter, peft_version=...)
    with pytest.raises(AdapterError, match="experts"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Block(torch.nn.Module):
    """A layer whose experts have any orientation, under a class name that nobody knows."""

    def __init__(self, count: int, hidden: int, inner: int, *, transposed: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, hidden)
        self.mlp = torch.nn.ModuleDict(
            {"experts": Experts(count, hidden, inner, transposed=transposed)}
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp["experts"](self.embed(tokens).flatten(0, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("parameters", [[UP, DOWN], [DOWN], [UP]], ids=["both", "down", "up"])
def test_either_orientation_is_told_by_shapes(parameters, count, transposed, tmp_path):
    model = fill(Block(count, 20, 36, transposed=transposed))
    wrapped = adapted(model, target_modules=["embed"], target_parameters=parameters, r=3)
    peft_cases.check(tmp_path, model, wrapped)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_square_parameter_is_told_by_its_sibling(transposed, tmp_path):
    model = fill(Block(3, 32, 32, transposed=transposed))
    wrapped = adapted(model, target_modules=["embed"], target_parameters=[UP, DOWN])
    peft_cases.check(tmp_path, model, wrapped)


def test_a_single_expert_is_one_matrix(tmp_path):
    model = fill(Block(1, 20, 36, transposed=False))
    wrapped = adapted(model, target_modules=["embed"], target_parameters=[UP, DOWN])
    peft_cases.check(tmp_path, model, wrapped)


def written_out(
    W: Float64, A: Float64, B: Float64, scale: float, *, order: str, transposed: bool
) -> Float64:
    """W + s B_e A_e for every expert; `order` says how B's columns are laid out."""
    experts = len(W)
    rank = len(A) // experts
    merged = W.copy()
    for e in range(experts):
        columns = B[:, e::experts] if order == "peft" else B[:, e * rank : (e + 1) * rank]
        delta = columns @ A[e * rank : (e + 1) * rank]
        merged[e] += scale * (delta.T if transposed else delta)
    return merged


def crafted(
    folder: Path, shape: tuple[int, int, int], *, flipped: bool, **config: Any
) -> tuple[Path, Path]:
    """A base with one fused parameter and an adapter for it, in or out of the usual orientation."""
    experts, first, second = shape
    base = reference.save_checkpoint(
        folder / "base",
        {"model.layers.0.mlp.experts.gate_up_proj": normal(shape, 0.05, seed=1, dtype="BF16")},
        config={"model_type": "unknown"},
    )
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    inner, outer = (first, second) if flipped else (second, first)
    adapter = reference.save_adapter(
        folder / "adapter",
        {
            key.format("A"): normal((3 * experts, inner), 0.5, seed=2),
            key.format("B"): normal((outer, 3 * experts), 0.1, seed=3),
        },
        **{"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": [UP], **config},
    )
    return base, adapter


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", "0.19.0", "0.19.1", "0.21.2", None])
@pytest.mark.parametrize("flipped", [False, True])
def test_every_release_of_peft_by_shapes(flipped, version, tmp_path):
    """Releases differ in which side is A's; where the sides differ, the shapes say it."""
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=flipped, peft_version=version)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    content, factors = read(base), reference.load_file(adapter / "adapter_model.safetensors")
    (name,) = content
    A, B = (double(next(t for k, t in factors.items() if f"lora_{s}" in k)) for s in "AB")
    exact = written_out(double(content[name]), A, B, 2, order="peft", transposed=flipped)
    assert_exact(read(tmp_path / "out"), content, {name: exact})


def test_the_example_of_the_reference(tmp_path):
    """Two experts of rank 2, by hand."""
    base, adapter = crafted(tmp_path, (2, 3, 2), flipped=False, r=2, lora_alpha=2)
    (name,) = read(base)
    put(base, {name: torch.zeros(2, 3, 2)})
    factors = {
        "A": torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]),
        "B": torch.arange(1.0, 13).reshape(3, 4),
    }
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    content = {key.format(side): tensor for side, tensor in factors.items()}
    reference.save_file(content, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge_lora(base=base, adapter=adapter, output=tmp_path / "peft")
    expected = [[[10, 14], [26, 38], [42, 62]], [[38, 44], [86, 100], [134, 156]]]
    assert read(tmp_path / "peft")[name].tolist() == expected
    merge_lora(base=base, adapter=adapter, output=tmp_path / "unsloth", expert_order="unsloth")
    assert read(tmp_path / "unsloth")[name][0].tolist()[0] == [7, 10]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per-expert"])
def test_the_order_of_unsloth(fused, tmp_path):
    """The same update with B's columns by expert gives the same bytes under --expert-order."""
    model = qwen3_moe()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, **TARGETS["both"]))
    other = save_adapter(tmp_path / "unsloth", adapted(model, **TARGETS["both"]))
    content = reference.load_file(other / "adapter_model.safetensors")
    for key, tensor in content.items():
        if ".experts." in key and "lora_B" in key:
            rank_and_expert = tensor.reshape(len(tensor), -1, 4)
            content[key] = rank_and_expert.transpose(1, 2).reshape(tensor.shape).contiguous()
    reference.save_file(content, other / "adapter_model.safetensors", {"format": "pt"})
    base = base_of(tmp_path / "base", model, "BF16", fused=fused)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "a")
    merge_lora(base=base, adapter=other, output=tmp_path / "b", expert_order="unsloth")
    merge_lora(base=base, adapter=other, output=tmp_path / "wrong")
    a, b, wrong = (read(tmp_path / name) for name in ("a", "b", "wrong"))
    assert all(reference.same_tensor(a[name], b[name]) for name in a)
    assert not all(reference.same_tensor(a[name], wrong[name]) for name in a)


def test_an_unknown_order_is_a_usage_error(tmp_path, cli):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False)
    command = ["merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "out"]
    outcome = cli(*command, "--expert-order", "axolotl")
    assert outcome.code == 2
    assert "--expert-order" in outcome.err
    assert not (tmp_path / "out").exists()


# --- single experts -------------------------------------------------------------------------------


SINGLE = ["gate_proj", "up_proj", "down_proj"]


def single_experts(folder: Path, model: Any, **config: Any) -> tuple[Path, list[reference.Update]]:
    """As transformers 4 and InternVL's own code train them: one Linear an expert and projection."""
    tensors, updates = {}, []
    for seed, (name, tensor) in enumerate(split(model.state_dict()).items()):
        if ".mlp.experts." not in name or (name.endswith("up_proj.weight") and ".1." in name):
            continue
        out, inner = tensor.shape
        module = name.removesuffix(".weight")
        A, B = normal((4, inner), 0.3, seed=seed), normal((out, 4), 0.1, seed=seed + 1000)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
        updates.append(reference.Update(name, 2, double(A), double(B)))
    config = {"r": 4, "lora_alpha": 8, "target_modules": SINGLE, **config}
    return reference.save_adapter(folder, tensors, **config), updates


def test_single_experts_into_single_experts(tmp_path):
    model = qwen3_moe()
    adapter, updates = single_experts(tmp_path / "adapter", model)
    base = base_of(tmp_path / "base", model, "BF16", fused=False)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    reference.assert_merged(read(tmp_path / "out"), read(base), updates)


def test_single_experts_into_fused_ones(tmp_path):
    """Right, or refused with the names of both sides."""
    model = qwen3_moe()
    adapter, updates = single_experts(tmp_path / "adapter", model)
    base = base_of(tmp_path / "base", model, "BF16", fused=True)
    try:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    except AdapterError as error:
        assert "experts" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
        return
    content = {n: t.bfloat16() for n, t in split(model.state_dict()).items()}
    reference.assert_merged(split(read(tmp_path / "out")), content, updates)


def test_fused_and_plain_adapters_together(tmp_path):
    model = qwen3_moe()
    first = adapted(model, **TARGETS["both"])
    second = adapted(model, target_modules=["v_proj", "lm_head"], std=0.05)
    paths = [
        save_adapter(tmp_path / "one", first),
        save_adapter(tmp_path / "two", second, save_embedding_layers=False),
    ]
    base = base_of(tmp_path / "base", model, "BF16", fused=False)
    merge_lora(base=base, adapter=paths, weight=[0.5, -1.5], output=tmp_path / "out")
    exact = split(exact_weights(first, {"default": 0.5}))
    other = split(exact_weights(second, {"default": -1.5}))
    exact |= {n: v for n, v in other.items() if "v_proj" in n or "lm_head" in n}
    assert_exact(read(tmp_path / "out"), read(base), exact)


# --- what does not fit ----------------------------------------------------------------------------


def refused(folder: Path, base: Path, adapter: Path, *expected: str) -> None:
    before = reference.digests(folder)
    with pytest.raises(AdapterError) as raised:
        merge_lora(base=base, adapter=adapter, output=folder / "out")
    for fragment in expected:
        assert fragment in str(raised.value)
    assert reference.digests(folder) == before


def test_a_rank_that_is_no_multiple_of_the_experts(tmp_path):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False)
    file = adapter / "adapter_model.safetensors"
    factors = reference.load_file(file)
    cut = {k: (t[:-1] if "lora_A" in k else t[:, :-1]).contiguous() for k, t in factors.items()}
    reference.save_file(cut, file, {"format": "pt"})
    refused(tmp_path, base, adapter, "experts")


def test_the_rank_of_the_config_is_per_expert(tmp_path):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False, r=12)
    refused(tmp_path, base, adapter, "experts", "12")


def test_neither_orientation_fits(tmp_path):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False)
    (name,) = read(base)
    put(base, {name: torch.ones(4, 60, 45)})
    refused(tmp_path, base, adapter, "experts")


def test_fused_factors_without_target_parameters(tmp_path):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False, target_parameters=None)
    refused(tmp_path, base, adapter, "experts")


def test_target_parameters_without_their_tensors(tmp_path):
    """PEFT drops a parameter that it does not find and trains the rest: said, whatever is done."""
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False, target_parameters=[UP, DOWN])
    names = {"model.layers.0.mlp.experts.down_proj": (4, 44, 30)}
    put(base, read(base) | {n: normal(s, 0.05, seed=5, dtype="BF16") for n, s in names.items()})
    try:
        report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    except AdapterError as error:
        assert "down_proj" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        assert any("down_proj" in warning for warning in report["warnings"])
        content, written = read(base), read(tmp_path / "out")
        changed = [n for n in content if not reference.same_tensor(content[n], written[n])]
        assert changed == ["model.layers.0.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("field", [{"use_dora": True}, {"lora_bias": True}])
def test_what_peft_cannot_combine_with_fused_parameters(field, tmp_path):
    base, adapter = crafted(tmp_path, (4, 60, 44), flipped=False, **field)
    refused(tmp_path, base, adapter, next(iter(field)))


def test_two_parameters_of_one_shape_are_right_or_refused(tmp_path):
    """Names do not tell them apart, only the order of registration does."""

    class Twins(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.zeros(3, 20, 36))
            self.two = torch.nn.Parameter(torch.zeros(3, 20, 36))
            self.embed = torch.nn.Embedding(90, 36)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)[:, None]
            return x @ self.one.mT + (x @ self.two.mT).tanh()

    model = fill(torch.nn.ModuleDict({"experts": Twins()}))
    parameters = ["experts.two", "experts.one"]
    wrapped = adapted(model, target_modules=["embed"], target_parameters=parameters)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    try:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    except AdapterError as error:
        assert "experts" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        assert_exact(read(tmp_path / "out"), read(base), exact_weights(wrapped))


@pytest.mark.parametrize("workers", [1, 4])
def test_shards_and_workers_change_no_byte(workers, tmp_path):
    model = qwen3_moe()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, **TARGETS["both"]))
    base = base_of(tmp_path / "base", model, "BF16", fused=True)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "a")
    merge_lora(
        base=base, adapter=adapter, output=tmp_path / "b", workers=workers, max_shard_size="30KB"
    )
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert all(reference.same_tensor(a[name], b[name]) for name in a)


def test_the_two_spellings_of_a_base_give_the_same_bits(tmp_path):
    model = qwen3_moe()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, **TARGETS["both"]))
    merged = []
    for fused in (True, False):
        base = base_of(tmp_path / f"base-{fused}", model, "BF16", fused=fused)
        merge_lora(base=base, adapter=adapter, output=tmp_path / f"out-{fused}")
        merged.append(read(tmp_path / f"out-{fused}"))
    one, other = split(merged[0]), merged[1]
    assert one.keys() == other.keys()
    different = sum(int((one[n] != other[n]).sum()) for n in one)
    assert different <= np.ceil(1e-4 * sum(t.numel() for t in one.values()))
    report = json.loads((tmp_path / "out-False" / "streamshard.json").read_text())
    assert report["merged"] == 2 * (3 * 4 + 1)
