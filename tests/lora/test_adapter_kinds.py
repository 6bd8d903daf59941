"""Every kind of adapter that peft trains: outputs of the adapted model, elements of exact merges.

The models are tiny and real, and so are the adapters (`peft_cases`).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import peft
import peft_cases
import pytest
import reference
import torch
import transformers
from marks import PEERS
from peft.tuners.lora import LoraLayer
from peft_cases import (
    TOKENS,
    Zoo,
    adapted,
    assert_close,
    assert_exact,
    check,
    exact_weights,
    fill,
    loaded,
    outputs,
    save_adapter,
    save_base,
    stated_scalings,
    trained,
)
from reference import read

from streamshard import merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS


LINEAR = ["fc1", "fc2", "head"]
ALL = [*LINEAR, "embed", "line", "plane", "space"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "everything": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 6, "lora_alpha": 5},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"fc1": 3, r".*\.fc[2-9]": 7, "^line$": 5, "space": 1},
        "alpha_pattern": {"embed": 3, r"body\.fc1|plane": 11.5},
    },
    "rslora-patterns": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"embed": 9, "fc2": 2},
        "alpha_pattern": {"fc2": 1, "p.*e": 13},
    },
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "embedding": {"target_modules": ["embed"]},
    "embedding-wide": {"target_modules": ["embed"], "r": 60},
    "conv1d": {"target_modules": ["line"]},
    "conv2d": {"target_modules": ["plane"]},
    "conv3d": {"target_modules": ["space"]},
    "fan-in-fan-out": {"target_modules": ["wide"], "fan_in_fan_out": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora-rslora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "r": 7},
    "dora-embedding": {"target_modules": ["embed"], "use_dora": True},
    "dora-convolutions": {"target_modules": ["line", "plane", "space"], "use_dora": True},
    "dora-fan-in-fan-out": {"target_modules": ["wide"], "fan_in_fan_out": True, "use_dora": True},
    "dora-everything": {
        "target_modules": ALL,
        "use_dora": True,
        "rank_pattern": {"plane": 3},
        "alpha_pattern": {"embed": 2},
    },
    "bias-all": {"target_modules": ["fc1", "plane"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["fc1", "fc2", "line"], "bias": "lora_only"},
    # No adapted layer has one, so there is none in the file.
    "bias-lora-only-without-any": {"target_modules": ["fc2", "space"], "bias": "lora_only"},
    # PEFT then writes the trained bias twice, and the original beside it.
    "bias-all-and-modules-to-save": {
        "target_modules": ["fc1"],
        "bias": "all",
        "modules_to_save": ["norm", "head"],
    },
    "dora-bias-all": {"target_modules": ["fc1", "plane"], "bias": "all", "use_dora": True},
    "lora-bias": {"target_modules": ["fc1", "head", "line", "plane"], "lora_bias": True},
    "lora-bias-rslora": {
        "target_modules": ["fc1", "head"],
        "lora_bias": True,
        "use_rslora": True,
        "rank_pattern": {"head": 3},
    },
    "lora-bias-and-trained-bias": {
        "target_modules": ["fc1", "head"],
        "lora_bias": True,
        "bias": "all",
    },
    "modules-to-save": {"target_modules": ["fc1"], "modules_to_save": ["head", "norm", "plane"]},
    "modules-to-save-embedding": {"target_modules": ["fc2"], "modules_to_save": ["embed"]},
    "token-rows": {"target_modules": ["fc1"], "trainable_token_indices": {"embed": [3, 70, 5]}},
    "two-dimensional-parameter": {"target_modules": ["fc1"], "target_parameters": ["head.weight"]},
    "dora-and-the-rest": {
        "target_modules": ["fc1", "line"],
        "use_dora": True,
        "modules_to_save": ["norm", "head"],
        "trainable_token_indices": {"embed": [11, 3]},
    },
}


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return fill(Zoo())


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_every_kind(config, zoo, tmp_path):
    wrapped = adapted(zoo, **config)
    report = check(tmp_path, zoo, wrapped)
    exact, before = exact_weights(wrapped), zoo.state_dict()
    changed = [n for n, v in exact.items() if (reference.double(before[n]) != v).any()]
    assert report["merged"] == len(changed)
    (said,) = report["adapters"]
    assert (said["weight"], said["r"]) == (1, config.get("r", 4))
    assert said["lora_alpha"] == config.get("lora_alpha", 6)
    assert said["use_rslora"] == config.get("use_rslora", False)
    assert ("dora" in said["kinds"]) == config.get("use_dora", False)
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    scalings = {layer.scaling["default"] for layer in layers}
    assert stated_scalings(said) == pytest.approx(sorted(scalings), rel=1e-5)


def test_patterns_that_overlap(zoo, tmp_path):
    """PEFT trains by the first pattern and saves them sorted: the first is lost, so nobody knows."""
    patterns = {"fc1": 30, r"body\.fc\d": 3}
    wrapped = adapted(zoo, target_modules=["fc1"], alpha_pattern=patterns)
    (layer,) = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    assert layer.scaling["default"] == 30 / 4
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    kept = json.loads((adapter / "adapter_config.json").read_text())["alpha_pattern"]
    assert list(kept) == sorted(patterns) != list(patterns)
    base = save_base(tmp_path / "base", zoo)
    try:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    except AdapterError as error:
        assert "alpha_pattern" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        assert_exact(read(tmp_path / "out"), read(base), exact_weights(wrapped))


@pytest.mark.parametrize("target", ["lin", "conv"])
def test_an_update_that_changes_all_is_reported_by_norm(target, zoo, tmp_path):
    """Intended against effected update, and the elements that rounding left as they were."""
    config: dict[str, Any] = {"lin": CASES["plain"], "conv": CASES["conv2d"]}[target]
    wrapped = adapted(zoo, std=0.01, **config)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", zoo, "BF16")
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    content, written = read(base), read(tmp_path / "out")
    intended = effected = 0.0
    same = total = 0
    for name, values in exact_weights(wrapped).items():
        before = reference.double(content[name])
        if (before == values).all():
            continue
        intended += float(((values - before) ** 2).sum())
        after = reference.double(written[name])
        effected += float(((after - before) ** 2).sum())
        same += int((after == before).sum())
        total += before.size
    update = report["update"]
    assert update["intended"] == pytest.approx(math.sqrt(intended), rel=1e-5)
    assert update["effected"] == pytest.approx(math.sqrt(effected), rel=1e-5)
    assert update["unchanged"] == pytest.approx(same / total, abs=1e-9)
    assert 0 < same < total
    kept = json.loads((tmp_path / "out" / "streamshard.json").read_text())
    assert kept["update"] == update


def test_conv1d_of_transformers_in_a_real_model(tmp_path):
    """GPT-2's projections; the square one can be taken either way only by who knows the class."""
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=160, n_positions=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = fill(transformers.GPT2LMHeadModel(config))
    wrapped = adapted(model, std=0.3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    check(tmp_path / "wide", model, wrapped)
    square = adapted(model, std=0.3, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    try:
        check(tmp_path / "square", model, square)
    except AdapterError as error:
        assert "fan_in_fan_out" in str(error)  # noqa: PT017
        assert not (tmp_path / "square" / "out").exists()


@pytest.mark.parametrize("dora", [False, True])
def test_all_kinds_with_one_row_or_column(dora, tmp_path):
    """Shapes at the edge: one output, one input, one token, kernels of one."""
    model = torch.nn.ModuleDict(
        {
            "out": torch.nn.Linear(5, 1),
            "in": torch.nn.Linear(1, 5),
            "token": torch.nn.Embedding(1, 3),
            "width": torch.nn.Embedding(7, 1),
            "point": torch.nn.Conv2d(4, 2, 1),
        }
    )
    fill(model)
    wrapped = adapted(model, r=1, target_modules=[*model], use_dora=dora)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    exact = exact_weights(wrapped)
    assert_exact(read(tmp_path / "out"), read(base), exact)


# --- what must not change a byte -------------------------------------------------------------------


@pytest.mark.parametrize("config", ["everything", "fan-in-fan-out", "two-dimensional-parameter"])
def test_zero_factors_keep_every_byte(config, zoo, tmp_path):
    """Minus zeros too; one module keeps its update, as an adapter without any is refused."""
    model = fill(Zoo())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0
    settings = dict(CASES[config])
    settings["target_modules"] = sorted({*settings["target_modules"], "fc1"})
    wrapped = adapted(model, **settings)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    file = adapter / "adapter_model.safetensors"
    zeroed = {
        key: tensor if ".fc1." in key or "lora_A" in key or "embedding_A" in key else tensor * 0
        for key, tensor in reference.load_file(file).items()
    }
    reference.save_file(zeroed, file, {"format": "pt"})
    base = save_base(tmp_path / "base", model, "BF16")
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["merged"] == 1
    before, after = read(base), read(tmp_path / "out")
    changed = [n for n in before if not reference.same_tensor(before[n], after[n])]
    assert changed == ["body.fc1.weight"]


ZEROED = ["dora", "dora-embedding", "lora-bias", "modules-to-save", "bias-all", "token-rows"]


@pytest.mark.parametrize("config", ZEROED)
def test_zero_factors_beside_what_was_trained(config, zoo, tmp_path):
    """B is zero, but magnitudes, biases, modules or rows are not those of the base."""
    wrapped = adapted(zoo, **CASES[config])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if re.search(r"lora_(B\.default\.weight|embedding_B)", name):
                parameter.zero_()
    check(tmp_path, zoo, wrapped)


@pytest.mark.parametrize(("base", "dtype"), [("BF16", "fp32"), ("F16", "bf16"), ("F32", "fp16")])
@pytest.mark.parametrize("config", ["dora-and-the-rest", "lora-bias-and-trained-bias"])
def test_another_dtype_is_one_rounding(config, base, dtype, zoo, tmp_path):
    """Of replaced values too: fp32 rows never pass through the dtype of the base."""
    wrapped = adapted(zoo, **CASES[config])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    folder = save_base(tmp_path / "base", zoo, base)
    merge_lora(base=folder, adapter=adapter, output=tmp_path / "out", dtype=dtype)
    spelled = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]
    content = {n: t.to(reference.TORCH[spelled]) for n, t in read(folder).items()}
    # In fp16 the eight times finer grid is missed eight times as often.
    equal = 0.9995 if spelled == "F16" else 0.9999
    assert_exact(read(tmp_path / "out"), content, exact_weights(wrapped), equal=equal)


@pytest.mark.parametrize("config", ["dora-everything", "everything", "dora-fan-in-fan-out"])
def test_neither_workers_nor_shards_change_a_byte(config, tmp_path):
    model = fill(torch.nn.ModuleDict({"zoo": Zoo(), "long": torch.nn.Embedding(3000, 70)}))
    wrapped = adapted(
        model, **{**CASES[config], "target_modules": [*CASES[config]["target_modules"], "long"]}
    )
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model, "BF16")
    found = []
    for workers, size in ((1, None), (3, None), (2, "20KB"), (4, "300KB")):
        out = tmp_path / f"out-{workers}"
        merge_lora(base=base, adapter=adapter, output=out, workers=workers, max_shard_size=size)
        found.append({name: reference.bits(t) for name, t in read(out).items()})
    assert all(other == found[0] for other in found[1:])
    assert_exact(read(out), read(base), exact_weights(wrapped))


# --- several adapters -----------------------------------------------------------------------------


def several(model: torch.nn.Module, *configs: dict[str, Any]) -> Any:
    names = [f"number{i}" for i in range(len(configs))]
    wrapped = adapted(model, name=names[0], **configs[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        wrapped.add_adapter(name, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
    wrapped.base_model.set_adapter(names)
    return trained(wrapped)


MIXTURES: dict[str, list[dict[str, Any]]] = {
    "plain-rslora-patterns": [
        {"target_modules": ALL},
        {"target_modules": ["fc1", "embed", "plane"], "use_rslora": True, "r": 8},
        {
            "target_modules": ["fc1", "head"],
            "alpha_pattern": {"fc1": 30},
            "rank_pattern": {"head": 2},
        },
    ],
    "dora-and-plain-apart": [
        {"target_modules": ["fc1", "embed"], "use_dora": True},
        {"target_modules": ["fc2", "line"]},
    ],
    "saved-and-plain": [
        {"target_modules": ["fc1"], "modules_to_save": ["norm"]},
        {"target_modules": ["fc1", "wide"], "fan_in_fan_out": True},
    ],
}


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, -0.4, 1.5]], ids=["ones", "weighted"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_are_summed_and_rounded_once(mixture, weights, zoo, tmp_path):
    """A weight scales updates; what replaces a tensor takes no weight but 1."""
    weights = weights[: len(MIXTURES[mixture])]
    if mixture != "plain-rslora-patterns":
        weights = [1, *weights[1:]]
    wrapped = several(zoo, *MIXTURES[mixture])
    wrapped.save_pretrained(tmp_path / "adapters")
    names = [f"number{i}" for i in range(len(weights))]
    exact = exact_weights(wrapped, dict(zip(names, weights, strict=True)))
    base = save_base(tmp_path / "base", zoo, "BF16")
    report = merge_lora(
        base=base,
        adapter=[tmp_path / "adapters" / name for name in names],
        weight=weights,
        output=tmp_path / "out",
    )
    assert_exact(read(tmp_path / "out"), read(base), exact)
    assert [said["weight"] for said in report["adapters"]] == weights
    if set(weights) == {1}:
        wide = save_base(tmp_path / "base32", zoo)
        merge_lora(
            base=wide,
            adapter=[tmp_path / "adapters" / name for name in names],
            output=tmp_path / "out32",
        )
        assert_close(outputs(loaded(zoo, tmp_path / "out32")), outputs(wrapped))


def test_adapters_of_different_tensors(zoo, tmp_path):
    """Token rows, biases and plain updates: every tensor is that of the adapter that has it."""
    first = adapted(zoo, target_modules=["fc1"], trainable_token_indices={"embed": [4, 80]})
    second = adapted(zoo, target_modules=["line", "head"], lora_bias=True)
    paths = [save_adapter(tmp_path / "one", first), save_adapter(tmp_path / "two", second)]
    base = save_base(tmp_path / "base", zoo, "BF16")
    report = merge_lora(base=base, adapter=paths, output=tmp_path / "out")
    exact, other = exact_weights(first), exact_weights(second)
    changed = [name for name in other if name.startswith(("line.", "head."))]
    exact |= {name: other[name] for name in changed}
    assert_exact(read(tmp_path / "out"), read(base), exact)
    assert report["merged"] == 2 + len(changed)


@pytest.mark.parametrize("name", ["dora", "bias-all", "modules-to-save", "token-rows"])
def test_a_weight_on_what_is_no_sum(name, zoo, tmp_path):
    """Updates are scaled; what replaces the base is scaled likewise, or refused, or named."""
    base = save_base(tmp_path / "base", zoo)
    wrapped = adapted(zoo, **CASES[name])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    try:
        report = merge_lora(base=base, adapter=adapter, weight=[0.5], output=tmp_path / "out")
    except AdapterError as error:
        assert "weight" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
        return
    full, written = exact_weights(wrapped), read(tmp_path / "out")
    half = {n: (v + reference.double(zoo.state_dict()[n])) / 2 for n, v in full.items()}
    scaled = exact_weights(wrapped, {"default": 0.5})

    def fits(expected: dict[str, Any]) -> bool:
        return all(abs(reference.double(written[n]) - v).max() < 1e-5 for n, v in expected.items())

    assert fits(half) or fits(scaled)
    if not fits(half) and name != "dora":
        assert any("weight" in warning for warning in report["warnings"])


# --- initialisations that change the base -----------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_onto_the_residual_base(init, zoo, tmp_path):
    wrapped = adapted(zoo, target_modules=LINEAR, init_lora_weights=init, std=0.05)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    residual = {
        name.replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in wrapped.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    base = reference.save_checkpoint(tmp_path / "base", residual, config={"model_type": "zoo"})
    assert (residual["body.fc1.weight"] - zoo.body["fc1"].weight).abs().max() > 1e-3
    with pytest.raises(AdapterError, match="init_lora_weights") as raised:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert "`base_is_residual=True`" in str(raised.value)
    assert not (tmp_path / "out").exists()
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", base_is_residual=True)
    assert_close(outputs(loaded(zoo, tmp_path / "out")), outputs(wrapped))


def test_an_adapter_converted_to_plain(zoo, tmp_path):
    """PEFT's own way out: rank and alpha doubled, for the original base."""
    config = {"target_modules": LINEAR, "init_lora_weights": "pissa"}
    settings = peft.LoraConfig(r=4, lora_alpha=6, **config)
    wrapped = peft.get_peft_model(fill(Zoo()), settings)
    settings.init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    settings.init_lora_weights = "pissa"
    trained(wrapped, 0.05)
    expected = outputs(wrapped)
    wrapped.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    base = save_base(tmp_path / "base", zoo)
    merge_lora(base=base, adapter=tmp_path / "adapter", output=tmp_path / "out")
    assert_close(outputs(loaded(zoo, tmp_path / "out")), expected)


def test_base_is_residual_changes_nothing_for_plain_adapters(zoo, tmp_path):
    """The statement is about initialisations that changed the base; here there is none."""
    adapter = save_adapter(tmp_path / "adapter", adapted(zoo, **CASES["plain"]))
    base = save_base(tmp_path / "base", zoo)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "plain")
    try:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", base_is_residual=True)
    except peft_cases.REFUSALS as error:
        assert "residual" in str(error)  # noqa: PT017
    else:
        one, other = (read(tmp_path / name) for name in ("plain", "out"))
        assert all(reference.same_tensor(one[name], other[name]) for name in one)


def test_tokens_of_the_tests_fit_every_vocabulary():
    assert int(TOKENS.max()) < 90
