"""Tiny models under peft, and what they compute in exact arithmetic.

`exact_weights` walks a model that peft wrapped and evaluates the formulas of the papers (LoRA
arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353) in fp64; of peft it takes only
the factors, the scalings, and what is active. It uses neither peft's merge nor the package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from pairs import Pair
from peft.tuners.lora import layer as lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from reference import Float64, Tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamshard import merge_lora
from streamshard.errors import AdapterError, InputError, StreamshardError, UsageError

WEIGHTS = "adapter_model.safetensors"

# --- models ---------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One layer of every kind that LoRA can adapt, each large enough to count roundings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 48)
        self.line = nn.Conv1d(48, 64, 3, padding=1)
        self.plane = nn.Conv2d(3, 160, 4, stride=4)
        self.space = nn.Conv3d(3, 96, (2, 3, 3), bias=False)
        self.body = nn.ModuleDict(
            {"fc1": nn.Linear(48, 200), "fc2": nn.Linear(200, 56, bias=False)},
        )
        self.wide = Conv1D(120, 48)
        self.norm = nn.LayerNorm(56)
        self.head = nn.Linear(56, 90)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        hidden = self.norm(self.body["fc2"](self.body["fc1"](x).tanh()))
        parts = [
            self.line(x.mT),
            self.plane(x.reshape(-1, 3, 16, 16)),
            self.space(x.reshape(-1, 3, 4, 8, 8)),
            self.wide(x),
            self.head(hidden),
        ]
        return torch.cat([part.flatten(1) for part in parts], 1)


class Experts(nn.Module):
    """Fused experts as transformers holds them, in either orientation, and a matrix of its own."""

    def __init__(self, experts: int, hidden: int, inner: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (hidden, 2 * inner), (inner, hidden)
        for name, shape in (("gate_up_proj", up), ("down_proj", down)):
            shape_here = shape if transposed else shape[::-1]
            setattr(self, name, nn.Parameter(torch.zeros(experts, *shape_here)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        gate, value = torch.einsum("nh,ehi->nei", x, up).chunk(2, dim=-1)
        return torch.einsum("nei,eih->nh", gate.tanh() * value, down)


TOKENS = torch.arange(32).reshape(2, 16) * 2 + 3


def fill(model: nn.Module) -> Any:
    """Give every parameter values that bf16 can hold; norms are around one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = reference.normal(parameter.shape, 0.08, seed=sum(name.encode()))
            noise += "norm" in name and name.endswith("weight")
            parameter.copy_(noise.bfloat16())
    return model.eval()


TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def language_model(kind: str = "qwen2", *, tied: bool = False, **config: Any) -> Any:
    """A tiny causal model of transformers, in fp32."""
    settings = {**TEXT, "tie_word_embeddings": tied, **config}
    made = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", dtype=torch.float32
    )
    return fill(model)


def double(tensor: Tensor) -> Float64:
    return reference.double(tensor.detach())


# --- training, and what was trained ---------------------------------------------------------------


def adapted(model: nn.Module, *, name: str = "default", std: float = 0.04, **config: Any) -> Any:
    """A copy of the model under peft, everything trainable in it moved as by training."""
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), settings, adapter_name=name)
    return trained(wrapped, std)


def trained(wrapped: Any, std: float = 0.04) -> Any:
    """Move everything that an optimizer would move, by noise of the given size."""
    moved = 0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                seed = sum(name.encode())
                parameter.add_(reference.normal(parameter.shape, std, seed=seed))
                moved += 1
    assert moved
    return wrapped.eval()


def exact_weights(wrapped: Any, weights: Mapping[str, float] | None = None) -> dict[str, Float64]:
    """Every parameter of the plain model that computes the same, by its name there.

    `weights` are the active adapters and what each is scaled by; by default those that peft
    has active, at 1.
    """
    model = wrapped.get_base_model()
    return _of(
        model, "", dict.fromkeys(wrapped.active_adapters, 1.0) if weights is None else weights
    )


def _of(module: nn.Module, prefix: str, active: Mapping[str, float]) -> dict[str, Float64]:
    if isinstance(module, ModulesToSaveWrapper):
        (name,) = [name for name in active if name in module.modules_to_save]
        return _of(module.modules_to_save[name], prefix, active)
    if isinstance(module, TrainableTokensWrapper):
        return _of(module.token_adapter, prefix, active)
    if isinstance(module, TrainableTokensLayer):
        found = _of(module.base_layer, prefix, active)
        source = module.tied_adapter or module
        for name in active:
            if name in source.trainable_tokens_delta:
                rows = double(source.trainable_tokens_delta[name])
                found[f"{prefix}weight"][source.token_indices[name]] = rows
        return found
    if isinstance(module, lora.LoraLayer):
        return _adapted(module, prefix, active)
    found = {f"{prefix}{n}": double(p).copy() for n, p in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        found |= _of(child, f"{prefix}{name}.", active)
    return found


def _adapted(layer: Any, prefix: str, active: Mapping[str, float]) -> dict[str, Float64]:
    found = _of(layer.base_layer, prefix, active)
    fused = isinstance(layer, lora.ParamWrapper)
    key = f"{prefix}{layer.parameter_name if fused else 'weight'}"
    W = found[key]
    for name, weight in active.items():
        embeds = isinstance(layer, lora.Embedding)
        if name not in (layer.lora_embedding_A if embeds else layer.lora_A):
            continue
        scale = weight * layer.scaling[name]
        if fused:
            A, B = (double(f[name].weight) for f in (layer.lora_A, layer.lora_B))
            W = W + scale * _experts(layer, W.shape, A, B)
            continue
        if embeds:
            A, B = double(layer.lora_embedding_A[name]), double(layer.lora_embedding_B[name])
            delta, axes = (B @ A).T, (0,)
        else:
            A, B = (double(f[name].weight) for f in (layer.lora_A, layer.lora_B))
            # A kernel is a matrix; Conv1D of transformers is (in, out).
            delta = B.reshape(len(B), -1) @ A.reshape(len(A), -1)
            transposed = isinstance(layer.get_base_layer(), Conv1D)
            delta = delta.T if transposed else delta.reshape(W.shape)
            axes = (0,) if transposed else tuple(range(1, W.ndim))
            if layer.lora_bias[name]:
                found[f"{prefix}bias"] += scale * double(layer.lora_B[name].bias)
        W = W + scale * delta
        if layer.use_dora[name]:
            norm = np.sqrt((W**2).sum(axes, keepdims=True))
            W = double(layer.lora_magnitude_vector[name].weight).reshape(norm.shape) / norm * W
    return found | {key: W}


def _experts(layer: Any, shape: Sequence[int], A: Float64, B: Float64) -> Float64:
    count = shape[0] if len(shape) == 3 else 1
    rank = len(A) // count
    each = [B[:, e::count] @ A[e * rank : (e + 1) * rank] for e in range(count)]
    if len(shape) == 2:
        return each[0]
    return np.stack([d.T if getattr(layer.get_base_layer(), "is_transposed", False) else d
                     for d in each])  # fmt: skip


# --- files ----------------------------------------------------------------------------------------


def save_base(
    folder: Path, model: nn.Module, dtype: str = "F32", config: Mapping[str, Any] | None = None
) -> Path:
    """The weights of any module as a checkpoint; transformers' classes save themselves."""
    if isinstance(model, transformers.PreTrainedModel):
        copy.deepcopy(model).to(reference.TORCH[dtype]).save_pretrained(folder)
        return folder
    state = {n: t.to(reference.TORCH[dtype]).contiguous() for n, t in model.state_dict().items()}
    return reference.save_checkpoint(folder, state, config=config or {"model_type": "zoo"})


def save_adapter(folder: Path, wrapped: Any, **options: Any) -> Path:
    wrapped.save_pretrained(folder, **options)
    assert (folder / "adapter_model.safetensors").exists()
    return folder


def loaded(model: nn.Module, folder: Path) -> Any:
    """The folder in the plain class of `model`: every weight there, and every one has a place."""
    if not isinstance(model, transformers.PreTrainedModel):
        plain = copy.deepcopy(model)
        plain.load_state_dict({n: t.float() for n, t in reference.read(folder).items()})
        return plain.eval()
    cls = type(model)
    plain, found = cls.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not found[problem], (problem, found[problem])
    return plain.eval()


def outputs(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def assert_as_peft(output: Path, wrapped: Any) -> None:
    """The tensors of a merge of fp32 are those that PEFT makes of the same adapter."""
    expected = wrapped.merge_and_unload().state_dict()
    for name, tensor in reference.read(output).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), name


def assert_exact(
    written: Tensors, base: Tensors, exact: Mapping[str, Float64], *, equal: float = 0.9999
) -> None:
    """Every tensor is the correctly rounded exact one, all but rarely by one step of the dtype.

    Where the exact values are those of the base, the bytes are those of the base. Of few elements,
    three may be among the one in ten thousand.
    """
    assert set(written) == set(exact)
    elements = different = changed = 0
    for name, values in exact.items():
        tensor, spelled = written[name], reference.SPELLED[written[name].dtype]
        expected = reference.round_once(values, spelled)
        assert tuple(tensor.shape) == values.shape, name
        before = base.get(name)
        if before is not None and before.shape == tensor.shape:
            assert before.dtype == tensor.dtype, name
            if (double(before) == values).all():
                assert reference.same_tensor(tensor, before), name
                continue
        changed += 1
        result = double(tensor)
        scale = np.maximum(np.abs(expected), np.abs(values))
        if before is not None and before.shape == tensor.shape:
            scale = np.maximum(scale, np.abs(double(before)))
        # Products in fp32 may cancel: their error is one of the largest, not of the sum.
        bound = 3e-6 * scale.max() if spelled == "F32" else reference.step(scale, spelled)
        assert (np.abs(result - expected) <= bound).all(), name
        elements += result.size
        different += int((result != expected).sum())
    assert changed
    if next(iter(written.values())).dtype != torch.float32:
        allowed = max(3.0, (1 - equal) * elements)
        assert different <= allowed, f"{different} of {elements} differ"


def assert_distance(report: Mapping[str, Any], written: Tensors, base: Tensors) -> None:
    """The reported L2 is that of the files, replaced tensors included."""
    same = [n for n, t in base.items() if n in written and written[n].shape == t.shape]
    norms = [float(np.linalg.norm(double(written[n]) - double(base[n]))) for n in same]
    assert report["l2"]["sum"] == pytest.approx(sum(norms), rel=1e-6)
    assert report["l2"]["global"] == pytest.approx(float(np.linalg.norm(norms)), rel=1e-6)


def check(
    folder: Path,
    model: nn.Module,
    wrapped: Any,
    *,
    disk: Callable[[dict[str, Float64]], dict[str, Float64]] = dict,
    tokens: Tensor = TOKENS,
    saved: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge what peft saves of `wrapped` into the saved `model`, in fp32 and in bf16.

    In fp32 the merged checkpoint, loaded plainly, must compute what `wrapped` computes; in bf16 every
    element must be the correctly rounded one. `disk` turns the parameters of the model into the
    tensors of its files, `saved` are options of `save_pretrained`. Returns the report of the
    merge in bf16.
    """
    expected = outputs(wrapped, tokens)
    assert (expected - outputs(model, tokens)).abs().max() > 1e-3  # the adapter matters
    exact = disk(exact_weights(wrapped))
    adapter = save_adapter(folder / "adapter", wrapped, **(saved or {}))
    base = save_base(folder / "base", model)
    half = save_base(folder / "base-bf16", model, "BF16")
    before = reference.digests(folder)
    report = merge_lora(base=base, adapter=adapter, output=folder / "out", **options)
    assert_close(outputs(loaded(model, folder / "out"), tokens), expected)
    assert_exact(reference.read(folder / "out"), reference.read(base), exact)
    assert_distance(report, reference.read(folder / "out"), reference.read(base))

    report = merge_lora(base=half, adapter=adapter, output=folder / "out-bf16", **options)
    assert_exact(reference.read(folder / "out-bf16"), reference.read(half), exact)
    assert_distance(report, reference.read(folder / "out-bf16"), reference.read(half))
    after = reference.digests(folder)
    assert {name: after[name] for name in before} == before
    return report


def stated_scalings(said: Mapping[str, Any]) -> list[float]:
    """The different scalings that a report states of an adapter, in a list or as keys of counts."""
    return sorted(float(value) for value in said["scalings"])


def configure(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's config; `...` removes one."""
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


# --- refusals --------------------------------------------------------------------------------------


# What a merge that cannot be right may raise before anything is written.
REFUSALS = (AdapterError, InputError, UsageError)


def edited(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """Change the tensors of an adapter in place, and fields of its config."""
    content = reference.load_file(adapter / WEIGHTS)
    content = change(content) or content
    content = {key: tensor.contiguous() for key, tensor in content.items()}
    reference.save_file(content, adapter / WEIGHTS, {"format": "pt"})
    configure(adapter, **config)
    return adapter


def extended(base: Path, **tensors: torch.Tensor) -> Path:
    """Add tensors to a base, in one file; `__` in a name is a dot."""
    content = reference.read(base) | {name.replace("__", "."): t for name, t in tensors.items()}
    for file in base.glob("model*.safetensors*"):
        file.unlink()
    reference.save_file(content, base / "model.safetensors", {"format": "pt"})
    return base


def raises(folder: Path, *expected: str, code: int = 4, **call: Any) -> str:
    """A merge in Python that is refused; every file below `folder` stays as it is."""
    before = reference.digests(folder)
    with pytest.raises(StreamshardError) as raised:
        merge_lora(output=folder / "refused", **call)
    said = str(raised.value)
    assert raised.value.exit_code == code, said
    for fragment in expected:
        assert fragment in said
    # What is wrong, and then what to do.
    assert len([part for part in said.replace("\n", " ").split(". ") if part.strip()]) > 1, said
    assert reference.digests(folder) == before
    return said


def merged(pair: Pair, name: str = "merged", **call: Any) -> dict[str, torch.Tensor]:
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.root / "out" / name, **call)
    return reference.read(pair.root / "out" / name)
