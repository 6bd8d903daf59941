"""Adapters that cannot be merged exactly: refused by name, before a byte is written.

Fields of the config, names of tensors, missing or malformed ones. Where peft
makes such an adapter it is made by peft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import reference
import torch
from marks import PEERS
from pairs import LAYER, Pair
from peft_cases import (
    WEIGHTS,
    Zoo,
    adapted,
    configure,
    edited,
    extended,
    fill,
    merged,
    raises,
    save_adapter,
    save_base,
    trained,
)
from reference import load_file, normal

from streamshard import merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS


Q, K = f"{LAYER}.q_proj", f"{LAYER}.k_proj"
KEY = "base_model.model."


# --- adapters of other kinds ----------------------------------------------------------------------

OTHERS: dict[str, Callable[[], Any]] = {
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["fc1"], total_step=10, init_r=4),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["fc1"], r=4),
    "LOKR": lambda: peft.LoKrConfig(target_modules=["fc1"], r=4),
    "IA3": lambda: peft.IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["fc1"], r=0, oft_block_size=8),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["fc1"], boft_block_size=8),
    "VERA": lambda: peft.VeraConfig(target_modules=["fc1"], r=4),
    "HRA": lambda: peft.HRAConfig(target_modules=["fc1"], r=4),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=["fc1"], n_frequency=20),
    "VBLORA": lambda: peft.VBLoRAConfig(
        target_modules=["fc1"], r=4, num_vectors=8, topk=2, vector_length=8
    ),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=["fc1"], r=4),
    "SHIRA": lambda: peft.ShiraConfig(target_modules=["fc1"], r=4),
    "C3A": lambda: peft.C3AConfig(target_modules=["fc1"], block_size=8),
    "MISS": lambda: peft.MissConfig(target_modules=["fc1"], r=4),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_peft(kind, tmp_path):
    """By their type; and by their tensors, if the config says LORA."""
    if kind == "IA3":
        pytest.importorskip("peft.tuners.ia3")
    model = fill(Zoo())
    wrapped = trained(peft.get_peft_model(fill(Zoo()), OTHERS[kind]()))
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, kind, "peft_type", base=base, adapter=adapter)
    configure(adapter, peft_type="LORA", r=4, lora_alpha=8)
    with pytest.raises(AdapterError):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The file alone, under the config of a plain adapter.
    plain = adapted(model, target_modules=["fc1"])
    plain.save_pretrained(tmp_path / "plain")
    (adapter / "adapter_config.json").write_bytes(
        (tmp_path / "plain" / "adapter_config.json").read_bytes()
    )
    raises(tmp_path, next(iter(load_file(adapter / WEIGHTS))), base=base, adapter=adapter)


@pytest.mark.parametrize(
    "kind", ["lora", "Lora", "XLORA", "PROMPT_TUNING", "NEW", None, ..., 1, []]
)
def test_the_type_is_exactly_lora(kind, pair, refused):
    configure(pair.adapter, peft_type=kind)
    refused(4, "peft_type", "adapter_config.json")


DIALECTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "kohya": (
        {
            "lora_unet_q_proj.lora_down.weight": "A",
            "lora_unet_q_proj.lora_up.weight": "B",
            "lora_unet_q_proj.alpha": "alpha",
        },
        ["kohya"],
    ),
    "kohya-names": (
        {f"{Q}.lora_down.weight": "A", f"{Q}.lora_up.weight": "B", f"{Q}.alpha": "alpha"},
        ["kohya"],
    ),
    "torchtune": (
        {f"{Q}.lora_a.weight": "A", f"{Q}.lora_b.weight": "B"},
        ["torchtune"],
    ),
    "old-diffusers": (
        {f"{Q}.processor.to_q_lora.down.weight": "A", f"{Q}.processor.to_q_lora.up.weight": "B"},
        ["to_q_lora"],
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("alone", [True, False])
def test_dialects_are_refused_by_name(dialect, alone, pair, refused):
    keys, expected = DIALECTS[dialect]
    made = {"A": normal((4, 40), 1, seed=1), "B": normal((96, 4), 1, seed=2)}
    made["alpha"] = torch.tensor(4.0)
    other = {key: made[what] for key, what in keys.items()}
    edited(pair.adapter, lambda content: other if alone else content | other)
    refused(4, *expected)


def test_multihead_attention(tmp_path):
    """PEFT adds the update of `out_proj` twice; nobody can say what was meant."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(32, 2, batch_first=True)

    model = fill(Model())
    wrapped = adapted(model, target_modules=["attn"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    assert any("out_proj" in key for key in load_file(adapter / WEIGHTS))
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, "out_proj", "MultiheadAttention", base=base, adapter=adapter)


# --- the config -----------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "kasa_config": {"kasa_config": {"beta": 0.1}},
    "kasa": {"init_lora_weights": "kasa"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "nvfp4_merge_aware": {"nvfp4_merge_aware": True},
    "from_the_future": {"from_the_future": {"a": 0}},
    "init_lora_weights": {"init_lora_weights": "invented"},
}


@pytest.mark.parametrize("residual", [[], ["--base-is-residual"]], ids=["", "residual"])
@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_no_option_allows(field, residual, pair, refused):
    configure(pair.adapter, **FIELDS[field])
    name = next(iter(FIELDS[field]))
    refused(4, name, "adapter_config.json", more=residual)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_changed_the_base(init, pair, refused):
    """Without a word refused; on the stated residual base it is the plain sum."""
    expected = merged(pair, "plain")
    configure(pair.adapter, init_lora_weights=init)
    refused(4, "init_lora_weights", init, "--base-is-residual")
    found = merged(pair, base_is_residual=True)
    assert all(reference.same_tensor(found[name], expected[name]) for name in expected)


def test_packed_block_diagonal_factors(pair):
    """Expanded rightly, or refused; as they stand they are of another shape."""
    configure(pair.adapter, use_bdlora={"target_modules_bd_a": ["q_proj"], "nblocks": 2})
    raises(pair.root, "use_bdlora", base=pair.base, adapter=pair.adapter)


def test_qalora_on_grouped_inputs(pair, refused):
    edited(
        pair.adapter,
        lambda c: c | {k: t[:, :10] for k, t in c.items() if "lora_A" in k},
        use_qalora=True,
        qalora_group_size=4,
    )
    refused(4, "lora_A")


@pytest.mark.parametrize("value", [None, ..., "16", True, [16]], ids=str)
def test_alpha_is_never_guessed(value, pair, refused):
    """PEFT takes 8 where it is missing."""
    configure(pair.adapter, lora_alpha=value)
    refused(4, "lora_alpha")


@pytest.mark.parametrize("config", [{"r": 8}, {"rank_pattern": {"q_proj": 3}}, {"r": 0}], ids=str)
def test_ranks_that_disagree(config, pair, refused):
    configure(pair.adapter, **config)
    refused(4, "r")


ERAS = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.q_proj": 40}}


def test_pattern_eras(pair, refused):
    """Releases read the two patterns differently, and the file does not tell the alpha."""
    configure(pair.adapter, **ERAS, peft_version=...)
    said = refused(4, "peft_version", "40", "8", Q)
    assert "alpha_pattern" in said
    configure(pair.adapter, **ERAS, peft_version="0.18.1")
    merged(pair)


def test_patterns_whose_eras_agree_need_no_version(pair):
    same = {"rank_pattern": {r"self_attn.q_proj": 4}, "alpha_pattern": {r"self_attn.q_proj": 40}}
    configure(pair.adapter, **same, peft_version=...)
    merged(pair)


# --- flags and tensors ----------------------------------------------------------------------------

magnitude = normal((96,), 1, seed=3).abs()
BIASES = {f"{Q}.bias": normal((96,), 1, seed=4, dtype="BF16")}


def with_biases(pair: Pair) -> None:
    extended(pair.base, **BIASES)


def keys(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Add tensors below the first module; `__` in a name is a dot."""
    added = {f"{KEY}{Q}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return lambda content: content | added


DISAGREE: dict[str, tuple[Callable[[Pair], Any], list[str]]] = {
    "dora-flag": (lambda p: configure(p.adapter, use_dora=True), ["use_dora", "magnitude"]),
    "dora-flag-on-some": (
        lambda p: edited(p.adapter, keys(lora_magnitude_vector=magnitude), use_dora=True),
        ["magnitude", K],
    ),
    "dora-tensor": (
        lambda p: edited(p.adapter, keys(lora_magnitude_vector=magnitude)),
        ["use_dora", "magnitude", Q],
    ),
    "dora-shape": (
        lambda p: edited(p.adapter, keys(lora_magnitude_vector=magnitude[:95]), use_dora=True),
        ["magnitude"],
    ),
    "lora-bias-flag": (
        lambda p: (with_biases(p), configure(p.adapter, lora_bias=True)),
        ["lora_bias"],
    ),
    "lora-bias-tensor": (
        lambda p: (with_biases(p), edited(p.adapter, keys(lora_B__bias=magnitude))),
        ["lora_bias", "lora_B.bias"],
    ),
    "lora-bias-without-base-bias": (
        lambda p: edited(
            p.adapter,
            lambda c: c | {k.replace("weight", "bias"): t[:, 0] for k, t in c.items() if "_B" in k},
            lora_bias=True,
        ),
        ["lora_bias", "_proj.bias", "has no place for one"],
    ),
    "bias-flag": (
        lambda p: (with_biases(p), configure(p.adapter, bias="all")),
        ["bias"],
    ),
    "bias-tensor": (
        lambda p: (with_biases(p), edited(p.adapter, keys(base_layer__bias=magnitude))),
        ["bias", "base_layer.bias"],
    ),
    "bias-unknown": (lambda p: configure(p.adapter, bias="some"), ["bias", "some"]),
    "bias-shape": (
        lambda p: (
            with_biases(p),
            edited(p.adapter, keys(base_layer__bias=magnitude[:7]), bias="lora_only"),
        ),
        ["bias"],
    ),
    "saved-flag": (
        lambda p: configure(p.adapter, modules_to_save=["norm"]),
        ["modules_to_save", "norm"],
    ),
    "saved-tensor": (
        lambda p: edited(
            p.adapter,
            lambda c: c | {f"{KEY}language_model.model.norm.weight": torch.ones(40)},
        ),
        ["modules_to_save", "language_model.model.norm.weight"],
    ),
    "saved-shape": (
        lambda p: edited(
            p.adapter,
            lambda c: c | {f"{KEY}language_model.model.norm.weight": torch.ones(41)},
            modules_to_save=["norm"],
        ),
        ["language_model.model.norm.weight"],
    ),
    "saved-unknown": (
        lambda p: edited(
            p.adapter,
            lambda c: c | {f"{KEY}score.weight": torch.ones(2, 40)},
            modules_to_save=["score"],
        ),
        ["score.weight"],
    ),
    "rows-flag": (
        lambda p: configure(p.adapter, trainable_token_indices=[1, 2]),
        ["trainable_token_indices"],
    ),
    "lone-A": (
        lambda p: edited(
            p.adapter, lambda c: {k: t for k, t in c.items() if f"{Q}.lora_B" not in k}
        ),
        [f"{Q}.lora_A", "lora_B"],
    ),
    "lone-B": (
        lambda p: edited(
            p.adapter, lambda c: {k: t for k, t in c.items() if f"{Q}.lora_A" not in k}
        ),
        [f"{Q}.lora_B", "lora_A"],
    ),
    "velora-without-flag-is-inert-or-named": (
        lambda p: edited(p.adapter, keys(lora_diag=torch.ones(4))),
        ["lora_diag"],
    ),
    "unknown-tensor": (
        lambda p: edited(p.adapter, keys(lora_gate=torch.ones(4))),
        ["lora_gate"],
    ),
    "partitioned": (
        lambda p: edited(p.adapter, lambda c: c | {f"{KEY}{Q}.lora_A.weight": torch.ones(0)}),
        [f"{Q}.lora_A.weight", "ZeRO"],
    ),
    "flattened": (
        lambda p: edited(p.adapter, lambda c: c | {f"{KEY}{Q}.lora_A.weight": torch.ones(160)}),
        [f"{Q}.lora_A.weight"],
    ),
    "embedding-lone": (
        lambda p: edited(p.adapter, keys(lora_embedding_A=torch.ones(4, 96))),
        ["lora_embedding_A"],
    ),
    "both-kinds": (
        lambda p: edited(
            p.adapter,
            keys(lora_embedding_A=torch.ones(4, 96), lora_embedding_B=torch.ones(40, 4)),
        ),
        [Q],
    ),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_config_and_tensors_disagree(case, pair, refused):
    change, expected = DISAGREE[case]
    change(pair)
    refused(4, *expected)


EMBED = "language_model.model.embed_tokens"
DELTA = f"{KEY}{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("indices", "rows", "expected"),
    [
        (None, 2, ["trainable_token_indices"]),
        ([1, 2, 3], 2, ["embed_tokens", "3", "2"]),
        ([1, 50], 2, ["50"]),
        ([1, -1], 2, ["trainable_token_indices"]),
        ([4, 4], 2, ["4"]),
        ([1, "2"], 2, ["trainable_token_indices"]),
        ([1, 2.0], 2, ["trainable_token_indices"]),
        ({"lm_head": [1, 2]}, 2, ["embed_tokens"]),
        ({"embed_tokens": 5}, 2, ["trainable_token_indices"]),
    ],
    ids=str,
)
def test_token_rows_that_do_not_fit(indices, rows, expected, pair, refused):
    extended(pair.base, **{f"{EMBED}.weight": normal((50, 40), 1, seed=1, dtype="BF16")})
    edited(
        pair.adapter,
        lambda c: c | {DELTA: normal((rows, 40), 1, seed=2)},
        trainable_token_indices=indices,
    )
    refused(4, *expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("what", ["magnitude", "saved", "rows", "bias", "lora_bias", "embedding"])
def test_values_that_are_not_finite(what, value, pair, refused):
    """In every kind of tensor, of either sign."""
    with_biases(pair)
    extended(pair.base, **{f"{EMBED}.weight": normal((50, 40), 1, seed=1, dtype="BF16")})
    bad = normal((96,), 1, seed=2).abs()
    bad[70] = value
    rows, factor = normal((2, 40), 1, seed=3), normal((4, 50), 1, seed=4)
    rows[1, 3] = factor[2, 7] = value
    changes: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
        "magnitude": (
            {
                f"{KEY}{Q}.lora_magnitude_vector": bad,
                f"{KEY}{K}.lora_magnitude_vector": torch.ones(130),
            },
            {"use_dora": True},
            "lora_magnitude_vector",
        ),
        "saved": (
            {f"{KEY}language_model.model.norm.weight": bad[40:80]},
            {"modules_to_save": ["norm"]},
            "norm.weight",
        ),
        "rows": ({DELTA: rows}, {"trainable_token_indices": [3, 4]}, "trainable_tokens_delta"),
        "bias": ({f"{KEY}{Q}.base_layer.bias": bad}, {"bias": "lora_only"}, "bias"),
        "lora_bias": ({f"{KEY}{Q}.lora_B.bias": bad}, {"lora_bias": True}, "lora_B.bias"),
        "embedding": (
            {
                f"{KEY}{EMBED}.lora_embedding_A": factor,
                f"{KEY}{EMBED}.lora_embedding_B": normal((40, 4), 1, seed=5),
            },
            {},
            "lora_embedding_A",
        ),
    }
    tensors, config, name = changes[what]
    drop = f"{K}.lora_" if what == "lora_bias" else "nothing"
    edited(
        pair.adapter,
        lambda c: {k: t for k, t in c.items() if drop not in k} | tensors,
        **config,
    )
    refused(4, name)


# --- DoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_a_norm_of_zero(kind, tmp_path):
    """PEFT writes NaN there; the tensor and the row are named."""
    model = fill(Zoo())
    name, at = {
        "linear": ("body.fc2", 33),
        "convolution": ("plane", 150),
        "embedding": ("embed", 29),
    }[kind]
    wrapped = adapted(model, target_modules=[name], use_dora=True)
    adapter = save_adapter(tmp_path / "adapter", wrapped)

    def change(content: dict[str, torch.Tensor]) -> None:
        (key,) = [k for k in content if "lora_B" in k or "embedding_B" in k]
        content[key][at] = 0

    edited(adapter, change)
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        if kind == "embedding":
            weight[:, at] = 0
        else:
            weight[at] = 0
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, f"{name}.weight", str(at), base=base, adapter=adapter)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("second", [{"use_dora": True}, {}], ids=["dora", "plain"])
def test_dora_beside_another_adapter_of_the_same_tensor(second, order, tmp_path):
    model = fill(Zoo())
    paths = [
        save_adapter(tmp_path / "one", adapted(model, target_modules=["fc1"], use_dora=True)),
        save_adapter(tmp_path / "two", adapted(model, target_modules=["fc1", "head"], **second)),
    ]
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, "body.fc1", "DoRA", base=base, adapter=[paths[i] for i in order])


REPLACING: dict[str, tuple[dict[str, Any], str]] = {
    "saved": ({"target_modules": ["fc1"], "modules_to_save": ["norm"]}, "norm."),
    "biases": ({"target_modules": ["fc1"], "bias": "lora_only"}, "body.fc1.bias"),
    "rows": ({"target_modules": ["fc1"], "trainable_token_indices": {"embed": [3, 4]}}, "embed"),
}


@pytest.mark.parametrize("case", REPLACING)
def test_two_adapters_that_replace_one_tensor(case, tmp_path):
    """PEFT refuses that too; a sum has no meaning."""
    model = fill(Zoo())
    config, name = REPLACING[case]
    paths = [
        save_adapter(tmp_path / str(i), adapted(model, std=0.1 * (i + 1), **config)) for i in (0, 1)
    ]
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, name, base=base, adapter=paths)


def test_a_saved_module_and_an_update_of_it(tmp_path):
    """One adapter replaces what the other adds to: the sum depends on who is asked."""
    model = fill(Zoo())
    paths = [
        save_adapter(
            tmp_path / "one", adapted(model, target_modules=["fc1"], modules_to_save=["head"])
        ),
        save_adapter(tmp_path / "two", adapted(model, target_modules=["head"])),
    ]
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, "head.weight", base=base, adapter=paths)


def test_saved_modules_inside_each_other(pair):
    """PEFT compares ends of names without a dot, trains two copies, and saves one of them."""
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    name = "base_model.model.multi_modal_projector.layer_norm.weight"
    folder = reference.save_adapter(
        pair.root / "nested",
        {**tensors, name: torch.ones(4)},
        r=4,
        lora_alpha=8,
        modules_to_save=["norm", "multi_modal_projector"],
    )
    with pytest.raises(AdapterError, match="one inside the other"):
        merge_lora(base=pair.base, adapter=folder, output=pair.output)
    assert not pair.output.exists()
