"""LoRA-wrapped training checkpoints: what InternVL's trainer saves, merged to what it computed.

The modules are those of `internvit` and transformers, wrapped by the installed peft as upstream's
`wrap_llm_lora` and `wrap_backbone_lora` wrap them: alpha is twice the rank and in no file.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import internvit
import peft
import pytest
import reference
import torch
from folders import as_hf, config_of, edit, make, put, settings_of
from marks import PEERS, slow_but
from models import custom_model, load_custom
from peft_cases import (
    assert_close,
    assert_exact,
    double,
    exact_weights,
    fill,
    stated_scalings,
    trained,
)
from presets import PRESETS
from reference import Float64, read

from streamshard import merge_lora
from streamshard.errors import StreamshardError

pytestmark = PEERS


SCRIPT = Path(__file__).parents[2] / "tools" / "merge_lora.py"
BACKBONE = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLAMA = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
LLM = {
    "tiny": LLAMA,
    "tiny-llama": LLAMA,
    "tiny-internlm2": ["attention.wqkv", "attention.wo"] + [f"feed_forward.w{i}" for i in "123"],
    "tiny-6b-vit": LLAMA,
    # Upstream has no targets for it; people wrap it as Qwen2.
    "tiny-qwen3": LLAMA,
    "tiny-phi3": ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"],
}
CHILDREN = {"llm": ["language_model"], "backbone": ["vision_model"]}
CHILDREN["both"] = CHILDREN["llm"] + CHILDREN["backbone"]
FLAGS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}
RANKS = {"language_model": 6, "vision_model": 3}


class Trainer:
    """A tiny model as the trainer holds it, some time into a run."""

    def __init__(self, preset: str = "tiny", children: str = "both", **config: Any) -> None:
        self.preset = PRESETS[preset]
        self.model = fill(custom_model(settings_of(self.preset, "custom"), self.preset.image_token))
        self.before = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.children = CHILDREN[children]
        for child in self.children:
            r = RANKS[child]
            vision = child == "vision_model"
            settings = peft.LoraConfig(
                **{
                    "r": r,
                    "lora_alpha": 2 * r,
                    "lora_dropout": 0.05,
                    "target_modules": BACKBONE if vision else LLM[preset],
                    "task_type": None if vision or preset == "tiny-internlm2" else "CAUSAL_LM",
                    **config,
                }
            )
            wrapped = peft.get_peft_model(getattr(self.model, child), settings)
            setattr(self.model, child, trained(wrapped))
        trained(self.model.mlp1)
        self.model.eval()

    def state(self, dtype: str = "F32") -> dict[str, torch.Tensor]:
        """What `save_pretrained` of the whole writes; the pairs stay fp32, as with peft >= 0.15."""
        return {
            name: tensor if "lora_" in name else tensor.to(reference.TORCH[dtype])
            for name, tensor in self.model.state_dict().items()
        }

    def save(self, folder: Path, state: dict[str, Any] | None = None, **flags: int) -> Path:
        """A checkpoint folder; the flags of the config are the ranks."""
        make(folder, self.preset, "custom", dtype="fp32")
        ranks = {FLAGS[child]: RANKS[child] for child in self.children}
        flags = {**dict.fromkeys(FLAGS.values(), 0), **ranks, **flags}
        edit(folder, lambda config: config.update(flags))
        return put(folder, self.state() if state is None else state)

    def exact(self, scale: float = 1.0) -> dict[str, Float64]:
        """Every tensor of the plain model; `scale` is laid over all updates."""
        found = {n: double(t) for n, t in self.model.state_dict().items() if n.startswith("mlp1.")}
        for child in ("language_model", "vision_model"):
            module = getattr(self.model, child)
            if child in self.children:
                part = exact_weights(module, {"default": scale})
            else:
                part = {n: double(p) for n, p in module.named_parameters()}
            found |= {f"{child}.{name}": value for name, value in part.items()}
        return found

    def outputs(self) -> torch.Tensor:
        """Of the wrapped model, nothing merged."""
        return run(self.model, self.preset.image_token)

    def loaded(self, folder: Path) -> Any:
        """The merged folder in the plain class, by its own config, every name accounted for."""
        plain = custom_model(config_of(folder), self.preset.image_token)
        load_custom(plain, {n: t.float() for n, t in read(folder).items()}, self.preset)
        return plain


def bare(child: Any) -> Any:
    return child.get_base_model() if isinstance(child, peft.PeftModel) else child


def run(model: Any, image_token: int) -> torch.Tensor:
    """`CustomModel.forward`, through peft's wrappers where there are some."""
    tokens = torch.tensor([[5, image_token, 7, 8, 9], [1, 2, image_token, 200, 17]])
    with torch.no_grad():
        seen = model.vision_model(reference.normal((2, 3, 28, 28), 1, seed=2))[:, 1:]
        images = model.mlp1(internvit.shuffle(seen))
        inner = bare(model.language_model)
        internlm2 = isinstance(inner, internvit.InternLM2)
        embed = inner.model.tok_embeddings if internlm2 else inner.model.embed_tokens
        embedded = embed(tokens).clone()
        embedded[tokens == image_token] = images.flatten(0, 1)
        if internlm2:
            return inner.logits(embedded)
        return model.language_model(inputs_embeds=embedded).logits


def old_spelling(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As peft up to 0.6 names the base of an adapted layer."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def nested(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a run that was resumed from a wrapped checkpoint names everything."""
    once = "base_model.model."
    return {name.replace(once, once * 2, 1): tensor for name, tensor in state.items()}


SPELLINGS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "new": dict,
    "old": old_spelling,
}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer()


def test_the_trainer_is_one(trainer):
    """Names are those that the trainer saves, and the adapters and the projector matter."""
    names = trainer.state().keys()
    stem = "language_model.base_model.model.model.layers.0.self_attn.q_proj"
    for name in (
        f"{stem}.base_layer.weight",
        f"{stem}.base_layer.bias",
        f"{stem}.lora_A.default.weight",
        f"{stem}.lora_B.default.weight",
        "language_model.base_model.model.lm_head.weight",
        "vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.weight",
        "vision_model.base_model.model.embeddings.class_embedding",
        "mlp1.0.weight",
    ):
        assert name in names
    plain = custom_model(settings_of(trainer.preset, "custom"), trainer.preset.image_token)
    load_custom(plain, trainer.before, trainer.preset)
    assert (run(plain, trainer.preset.image_token) - trainer.outputs()).abs().max() > 1e-2


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("children", CHILDREN)
@pytest.mark.parametrize("preset", slow_but((name for name in LLM if "vit" not in name), "tiny"))
def test_the_merged_model_is_the_trained_model(preset, children, spelling, tmp_path):
    made = Trainer(preset, children)
    state = SPELLINGS[spelling](made.state())
    source = made.save(tmp_path / "in", state)
    before = reference.digests(source)
    report = merge_lora(checkpoint=source, output=tmp_path / "out")
    assert reference.digests(source) == before
    merged = made.loaded(tmp_path / "out")
    assert_close(run(merged, made.preset.image_token), made.outputs())
    # Against the state before: the projector is the trained one, to the byte.
    content = {n: t for n, t in made.before.items() if not n.startswith("mlp1.")}
    content |= {n: t for n, t in state.items() if n.startswith("mlp1.")}
    assert_exact(read(tmp_path / "out"), content, made.exact())
    pairs = sum(".lora_A." in name for name in state)
    assert (report["command"], report["merged"], report["layout"]) == (
        "merge-lora",
        pairs,
        "custom",
    )
    assert report["tensors"] == len(content)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("pairs", ["F32", "BF16"])
def test_bf16_is_rounded_once(pairs, spelling, trainer, tmp_path):
    """Pairs are fp32 or, with peft 0.7 to 0.10, of the base's dtype."""
    state = {
        n: t.to(reference.TORCH[pairs]) for n, t in trainer.state("BF16").items() if "lora_" in n
    }
    state = trainer.state("BF16") | state
    source = trainer.save(tmp_path / "in", SPELLINGS[spelling](state))
    report = merge_lora(checkpoint=source, output=tmp_path / "out")
    exact = trainer.exact()
    for name in exact:  # what was stored is what counts
        if name.startswith("mlp1."):
            exact[name] = double(state[name])
    if pairs == "BF16":
        for child in ("language_model", "vision_model"):
            stem = f"{child}.base_model.model."
            for key in [k for k in state if k.startswith(stem) and ".lora_A." in k]:
                module = key.removesuffix(".lora_A.default.weight")
                A, B = (double(state[f"{module}.lora_{s}.default.weight"]) for s in "AB")
                W = double(state[f"{module}.base_layer.weight"])
                exact[f"{child}.{module.removeprefix(stem)}.weight"] = W + 2 * B @ A
    content = {n: t.bfloat16() for n, t in trainer.before.items()}
    content |= {n: t for n, t in state.items() if n.startswith("mlp1.")}
    written = read(tmp_path / "out")
    assert_exact(written, content, exact)
    # The distances are those from the weights in the checkpoint.
    squares = [float(((double(written[n]) - double(content[n])) ** 2).sum()) for n in written]
    assert report["l2"]["global"] == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-6)
    assert report["l2"]["sum"] == pytest.approx(math.fsum(map(math.sqrt, squares)), rel=1e-6)
    intended = math.sqrt(
        math.fsum(float(((v - double(content[n])) ** 2).sum()) for n, v in exact.items())
    )
    assert report["update"]["intended"] == pytest.approx(intended, rel=1e-5)
    assert report["update"]["effected"] == pytest.approx(report["l2"]["global"], rel=1e-6)
    assert 0 <= report["update"]["unchanged"] < 0.5


def test_a_backbone_without_biases(tmp_path):
    """InternViT-6B has norms on queries and keys, and no bias on qkv."""
    made = Trainer("tiny-6b-vit", "backbone")
    merge_lora(checkpoint=made.save(tmp_path / "in"), output=tmp_path / "out")
    assert_close(run(made.loaded(tmp_path / "out"), made.preset.image_token), made.outputs())


def test_conversion_in_the_same_pass(trainer, tmp_path):
    source = trainer.save(tmp_path / "in")
    ref = make(tmp_path / "ref", trainer.preset, "hf")
    merge_lora(checkpoint=source, output=tmp_path / "out", layout="hf", reference=ref)
    merge_lora(checkpoint=source, output=tmp_path / "custom")
    expected, found = as_hf(read(tmp_path / "custom"), trainer.preset), read(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(reference.same_tensor(found[name], expected[name]) for name in found)


def test_config_and_files(trainer, tmp_path):
    """Both flags are reset, nothing else is; remote code and tokenizer come along."""
    source = trainer.save(tmp_path / "in")
    (source / "modeling_extra.py").write_text("code = True\n")
    merge_lora(checkpoint=source, output=tmp_path / "out")
    expected = config_of(source) | {"use_llm_lora": 0, "use_backbone_lora": 0}
    assert config_of(tmp_path / "out") == expected
    ours, theirs = reference.digests(tmp_path / "out"), reference.digests(source)
    rewritten = {"README.md", "config.json", "model.safetensors", "streamshard.json"}
    assert ours.keys() == theirs.keys() | {"README.md", "streamshard.json"}
    assert {n: d for n, d in ours.items() if n not in rewritten} == {
        n: d for n, d in theirs.items() if n not in rewritten
    }
    assert not any("lora" in name or "base_model" in name for name in read(tmp_path / "out"))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_wrappers_of_training_are_taken_off(wrapper, trainer, tmp_path):
    plain = trainer.save(tmp_path / "plain")
    state = {wrapper + name: tensor for name, tensor in trainer.state().items()}
    source = trainer.save(tmp_path / "in", state)
    merge_lora(checkpoint=plain, output=tmp_path / "a")
    merge_lora(checkpoint=source, output=tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(reference.same_tensor(a[name], b[name]) for name in a)


def sharded(folder: Path) -> Path:
    """Pairs, bases and untouched tensors apart, as no writer would place them."""
    content = read(folder)
    parts: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, tensor in content.items():
        parts[0 if "lora_A" in name else 1 if "base_layer" in name else 2][name] = tensor
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        reference.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    reference.save_index(folder, weight_map)
    return folder


def test_pairs_in_other_files_than_their_base(trainer, tmp_path):
    one = trainer.save(tmp_path / "one")
    three = sharded(trainer.save(tmp_path / "three"))
    merge_lora(checkpoint=one, output=tmp_path / "a", workers=1)
    report = merge_lora(checkpoint=three, output=tmp_path / "b", workers=3)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(reference.same_tensor(a[name], b[name]) for name in a)
    index = tmp_path / "b" / reference.INDEX
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert report["shards"] == len(files)
    if len(files) > 1:  # the file that had nothing but pairs is gone
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in b.values())
        assert sorted(set(content["weight_map"].values())) == files
        assert files[-1].endswith(f"-of-{len(files):05d}.safetensors")
    load_custom(
        custom_model(config_of(tmp_path / "b"), trainer.preset.image_token), b, trainer.preset
    )


def test_another_alpha(tmp_path):
    """The convention is twice the rank; a run that had another one can say so."""
    made = Trainer(children="llm")
    source = made.save(tmp_path / "in")
    merge_lora(checkpoint=source, output=tmp_path / "two", alpha=12)
    merge_lora(checkpoint=source, output=tmp_path / "default")
    two, default = (tmp_path / n / "model.safetensors" for n in ("two", "default"))
    assert two.read_bytes() == default.read_bytes()
    report = merge_lora(checkpoint=source, output=tmp_path / "out", alpha=3)
    content = read(tmp_path / "out")
    base = made.before | {n: t for n, t in made.state().items() if n.startswith("mlp1.")}
    assert_exact(content, base, made.exact(0.25))
    (said,) = report["adapters"]
    assert (said["r"], said["lora_alpha"]) == (6, 3)


def test_the_report_says_rank_and_scaling(trainer, tmp_path):
    report = merge_lora(checkpoint=trainer.save(tmp_path / "in"), output=tmp_path / "out")
    assert report["adapters"]
    assert all(stated_scalings(said) == [2] for said in report["adapters"])


def test_trained_modules_of_peft_replace_the_originals(tmp_path):
    """`original_module` and `modules_to_save` side by side: the second was trained."""
    made = Trainer(children="llm", modules_to_save=["lm_head"])
    names = made.state().keys()
    assert "language_model.base_model.model.lm_head.modules_to_save.default.weight" in names
    merge_lora(checkpoint=made.save(tmp_path / "in"), output=tmp_path / "out")
    assert_close(run(made.loaded(tmp_path / "out"), made.preset.image_token), made.outputs())


def test_ranks_by_layer(tmp_path):
    """Alpha is twice the rank of the flag for every module; with other ranks it must be given."""
    made = Trainer(children="llm", rank_pattern={"q_proj": 2})
    source = made.save(tmp_path / "in")
    refused(tmp_path, source, "use_llm_lora", "2", "6", "`alpha`")


# --- what is no training checkpoint of upstream's ----------------------------------------------------


def refused(folder: Path, source: Path, *expected: str, **options: Any) -> str:
    before = reference.digests(folder)
    with pytest.raises(StreamshardError) as raised:
        merge_lora(checkpoint=source, output=folder / "out", **options)
    said = str(raised.value)
    # The pairs are an adapter, the file is an input: either class says so.
    assert raised.value.exit_code in (3, 4), said
    for fragment in expected:
        assert fragment in said
    assert reference.digests(folder) == before
    return said


def test_a_checkpoint_without_pairs(trainer, tmp_path):
    source = trainer.save(tmp_path / "in", trainer.before, use_llm_lora=0, use_backbone_lora=0)
    refused(tmp_path, source, "LoRA")


def test_flags_without_pairs(trainer, tmp_path):
    source = trainer.save(tmp_path / "in", trainer.before)
    refused(tmp_path, source, "LoRA")


def test_a_flag_whose_child_has_no_pairs(tmp_path):
    made = Trainer(children="llm")
    source = made.save(tmp_path / "in", use_backbone_lora=8)
    refused(tmp_path, source, "use_backbone_lora")


def test_pairs_without_a_flag(tmp_path):
    """Stale, or alpha was never stated: refused until --alpha is given, or said in a warning."""
    made = Trainer(children="llm")
    source = made.save(tmp_path / "in", use_llm_lora=0)
    try:
        report = merge_lora(checkpoint=source, output=tmp_path / "guessed")
    except StreamshardError as error:
        assert "`alpha`" in str(error)  # noqa: PT017
        assert not (tmp_path / "guessed").exists()
    else:
        assert any("use_llm_lora" in w and "alpha" in w for w in report["warnings"])
    merge_lora(checkpoint=source, output=tmp_path / "out", alpha=12)
    assert_close(run(made.loaded(tmp_path / "out"), made.preset.image_token), made.outputs())


def test_a_flag_of_another_rank(tmp_path):
    made = Trainer(children="llm")
    source = made.save(tmp_path / "in", use_llm_lora=16)
    refused(tmp_path, source, "use_llm_lora", "16", "6")
    merge_lora(checkpoint=source, output=tmp_path / "out", alpha=12)
    assert config_of(tmp_path / "out")["use_llm_lora"] == 0


def test_a_doubled_prefix(trainer, tmp_path):
    """Merged rightly with a loud word about the earlier adapter, or refused; never dropped."""
    plain = trainer.save(tmp_path / "plain")
    source = trainer.save(tmp_path / "in", nested(trainer.state()))
    merge_lora(checkpoint=plain, output=tmp_path / "a")
    try:
        report = merge_lora(checkpoint=source, output=tmp_path / "b")
    except StreamshardError as error:
        assert error.exit_code in (3, 4)  # noqa: PT017
        assert "base_model.model.base_model.model" in str(error)  # noqa: PT017
        assert not (tmp_path / "b").exists()
        return
    assert report["warnings"]
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(reference.same_tensor(a[name], b[name]) for name in a)


def test_two_levels_of_pairs(tmp_path):
    """A pair inside `base_layer` is an update too: added, or refused by name."""
    made = Trainer(children="llm")
    state = made.state()
    stem = "language_model.base_model.model.model.layers.0.self_attn.q_proj"
    for side in "AB":
        state[f"{stem}.base_layer.lora_{side}.default.weight"] = (
            state[f"{stem}.lora_{side}.default.weight"] + 1
        )
    refused(tmp_path, made.save(tmp_path / "in", state), "q_proj")


def test_several_adapter_names(tmp_path):
    made = Trainer(children="llm")
    state = made.state()
    state |= {n.replace(".default.", ".second."): t * 2 for n, t in state.items() if "lora_" in n}
    source = made.save(tmp_path / "in", state)
    refused(tmp_path, source, "default", "second", "`adapter_name`")
    refused(tmp_path, source, "third", "second", adapter_name="third")
    plain = made.save(tmp_path / "plain")
    merge_lora(checkpoint=plain, output=tmp_path / "a")
    merge_lora(checkpoint=source, output=tmp_path / "b", adapter_name="default")
    a, b = (tmp_path / n / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    merge_lora(checkpoint=source, output=tmp_path / "c", adapter_name="second")
    assert_exact(
        read(tmp_path / "c"),
        made.before | {n: t for n, t in state.items() if n.startswith("mlp1.")},
        made.exact(4),
    )


STEM = "language_model.base_model.model.model.layers.1.mlp.up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "lone-A": (lambda s: s.pop(f"{STEM}.lora_B.default.weight"), [STEM, "lora_A", "lora_B"]),
    "lone-B": (lambda s: s.pop(f"{STEM}.lora_A.default.weight"), [STEM, "lora_A", "lora_B"]),
    "no-base": (lambda s: s.pop(f"{STEM}.base_layer.weight"), ["up_proj"]),
    "two-bases": (
        lambda s: s.update({f"{STEM}.weight": s[f"{STEM}.base_layer.weight"].clone()}),
        ["up_proj"],
    ),
    "partitioned": (
        lambda s: s.update({f"{STEM}.base_layer.weight": torch.zeros(0)}),
        ["up_proj"],
    ),
    "partitioned-pair": (
        lambda s: s.update({f"{STEM}.lora_A.default.weight": torch.zeros(0)}),
        ["up_proj", "lora_A"],
    ),
    "partitioned-rest": (
        lambda s: s.update({"language_model.base_model.model.model.norm.weight": torch.zeros(0)}),
        ["norm.weight"],
    ),
    "dora": (
        lambda s: s.update({f"{STEM}.lora_magnitude_vector.default.weight": torch.ones(96)}),
        ["lora_magnitude_vector"],
    ),
    "token-rows": (
        lambda s: s.update(
            {
                "language_model.base_model.model.model.embed_tokens.token_adapter."
                "trainable_tokens_delta.default": torch.ones(2, 64)
            }
        ),
        ["trainable_tokens_delta"],
    ),
    "shape": (
        lambda s: s.update({f"{STEM}.lora_B.default.weight": torch.ones(95, 6)}),
        ["up_proj"],
    ),
    "not-finite": (
        lambda s: s[f"{STEM}.lora_B.default.weight"].__setitem__((3, 2), float("nan")),
        ["up_proj", "lora_B"],
    ),
    "integers": (
        lambda s: s.update({f"{STEM}.base_layer.weight": torch.ones(96, 64, dtype=torch.int8)}),
        ["up_proj"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, tmp_path, trainer):
    change, expected = BROKEN[case]
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    change(state)
    refused(tmp_path, trainer.save(tmp_path / "in", state), *expected)


def test_an_adapter_onto_a_wrapped_base(trainer, tmp_path):
    """The base has updates of its own that are not in its weights yet."""
    source = trainer.save(tmp_path / "in")
    key = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {key.format("A"): torch.ones(4, 64), key.format("B"): torch.ones(64, 4)}
    adapter = reference.save_adapter(tmp_path / "adapter", pair, r=4, lora_alpha=4)
    with pytest.raises(StreamshardError, match="merge_lora") as raised:
        merge_lora(base=source, adapter=adapter, output=tmp_path / "out")
    assert raised.value.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()


# --- the command line --------------------------------------------------------------------------------


def test_the_command(trainer, tmp_path, cli):
    source = trainer.save(tmp_path / "in")
    merge_lora(checkpoint=source, output=tmp_path / "api")
    dry = cli("merge-lora", source, "--output", tmp_path / "out", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "out").exists()
    outcome = cli("merge-lora", source, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["merged"] == json.loads(dry.out)["merged"] == 3 * 7 + 2 * 4
    assert report["l2"]["global"] > 0
    one, other = (tmp_path / n / "model.safetensors" for n in ("api", "out"))
    assert one.read_bytes() == other.read_bytes()
    again = cli("merge-lora", tmp_path / "out", "--output", tmp_path / "again")
    assert again.code in (3, 4)
    assert "LoRA" in again.err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("more", [["--adapter", "x"], ["--base", "x"], ["--alpha", "much"]])
def test_options_that_contradict(more, trainer, tmp_path, cli):
    source = trainer.save(tmp_path / "in")
    outcome = cli("merge-lora", source, "--output", tmp_path / "out", *more)
    assert outcome.code == 2
    assert more[0] in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", ["nan", "inf", "-inf"])
def test_alphas_that_are_none(alpha, trainer, tmp_path, cli):
    source = trainer.save(tmp_path / "in")
    outcome = cli("merge-lora", source, "--output", tmp_path / "out", f"--alpha={alpha}")
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


def test_the_script_of_upstream(trainer, tmp_path):
    """`merge_lora.py IN OUT`, in its own process, gives the bytes of the command."""
    source = trainer.save(tmp_path / "in")
    merge_lora(checkpoint=source, output=tmp_path / "api")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, other = (tmp_path / n / "model.safetensors" for n in ("api", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert config_of(tmp_path / "out")["use_llm_lora"] == 0
    wrong = subprocess.run(
        [sys.executable, str(SCRIPT), str(source)], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
