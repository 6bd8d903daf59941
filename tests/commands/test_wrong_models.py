"""What would be merged into a model that no loader loads as it was trained: refused, or put right.

The checkpoints are those that a run leaves: without a config, with one of another model, with a
trainer's words in the names, incomplete, damaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import (
    OTHER,
    config_of,
    convert,
    edit,
    make,
    put,
    refused,
    without_weights,
    wrapped,
)
from make_checkpoint import write_adapter
from peft_cases import adapted, fill
from reference import read, same_tensor
from safetensors.torch import load_file, save_file

import streamshard
from streamshard.commands.bare_names import bare_names
from streamshard.errors import InputError, VerificationError

LAYERS = {"custom": "llm_config", "hf": "text_config"}


def run_of(folder: Path, *, flag: int = 4) -> Path:
    """What InternVL's trainer saves: the rank is the flag."""
    put(
        make(folder, "tiny", "custom"),
        wrapped(read(make(folder.with_name("plain"), "tiny", "custom"))),
    )
    return edit(folder, lambda c: c.update(use_llm_lora=flag))


def alike(one: Path, other: Path) -> bool:
    mine, theirs = read(one), read(other)
    return mine.keys() == theirs.keys() and all(same_tensor(mine[n], theirs[n]) for n in mine)


# --- a config from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["run", "plain"])
@pytest.mark.parametrize("how", ["folder", "file", "bin"])
def test_the_config_of_a_reference_has_no_lora_flags(how, reference, tmp_path):
    """As after zero_to_fp32, whose output is nothing but weights."""
    run = run_of(tmp_path / "run")
    streamshard.merge_lora(checkpoint=run, output=tmp_path / "expected")
    bare = tmp_path / "bare"
    bare.mkdir()
    source = bare / "model.safetensors"
    if how == "bin":
        source = bare / "pytorch_model.bin"
        torch.save(read(run), source)
    else:
        source.write_bytes((run / "model.safetensors").read_bytes())
    report = streamshard.merge_lora(
        checkpoint=bare if how == "folder" else source,
        reference=tmp_path / reference,
        output=tmp_path / "out",
    )
    (warning,) = [w for w in report["warnings"] if "config.json" in w]
    assert warning.endswith(f"the output's is that of {tmp_path / reference}")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")
    assert alike(tmp_path / "out", tmp_path / "expected")
    assert streamshard.verify(tmp_path / "out")["problems"] == []


def test_a_reference_of_another_model_is_none(tmp_path):
    run = run_of(tmp_path / "run")
    other = edit(
        make(tmp_path / "other", "tiny", "custom"), lambda c: c["llm_config"].update(hidden_size=32)
    )
    hf = make(tmp_path / "hf", "tiny", "hf")
    for name in (other, hf):
        without_weights(name)
    (run / "config.json").unlink()
    with pytest.raises(InputError, match=r"\[\d+, 32\] was expected|was expected, by the config"):
        streamshard.merge_lora(checkpoint=run, reference=other, output=tmp_path / "out")
    with pytest.raises(InputError, match="is of the hf layout"):
        streamshard.merge_lora(checkpoint=run, reference=hf, output=tmp_path / "out")
    streamshard.merge_lora(checkpoint=run, reference=hf, output=tmp_path / "out", layout="hf")
    assert streamshard.verify(tmp_path / "out")["problems"] == []


def test_no_config_at_all_is_told(tmp_path):
    run = run_of(tmp_path / "run")
    (run / "config.json").unlink()
    report = streamshard.merge_lora(checkpoint=run, output=tmp_path / "out")
    (warning,) = [w for w in report["warnings"] if "config.json" in w]
    assert "the output has none either" in warning
    assert "`reference`" in warning


# --- words of training in the names ------------------------------------------------------------------

WORDS: dict[str, Callable[[str], str]] = {
    "module": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "fsdp": lambda n: n.replace("layers.", "_fsdp_wrapped_module.layers."),
    "checkpointing": lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "lightning": lambda n: f"net.{n}",
}


def spelled(folder: Path, words: str) -> Path:
    return put(folder, {WORDS[words](n): t for n, t in read(folder).items()})


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("words", WORDS)
def test_words_of_training_are_not_written(words, layout, tmp_path):
    """By no command, of a base of either layout; and `verify` tells them."""
    plain = make(tmp_path / "plain", "tiny", layout)
    base = spelled(make(tmp_path / "base", "tiny", layout), words)
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    for source, out in ((plain, "expected"), (base, "out")):
        report = streamshard.merge_lora(
            base=source, adapter=tmp_path / "adapter", output=tmp_path / out
        )
    assert alike(tmp_path / "out", tmp_path / "expected")
    (warning,) = report["warnings"]
    assert "words of training" in warning
    ref = without_weights(make(tmp_path / "ref", "tiny", OTHER[layout]))
    for source, out in ((plain, "expected2"), (base, "out2")):
        convert(OTHER[layout], source, ref, tmp_path / out)
    assert alike(tmp_path / "out2", tmp_path / "expected2")
    for source, out in ((plain, "expected3"), (base, "out3")):
        streamshard.wrap_lora(base=source, output=tmp_path / out, llm_r=2, format="peft")
    one, other = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out3", "expected3")
    )
    assert one.keys() == other.keys()
    assert all(same_tensor(one[n], other[n]) for n in one)
    with pytest.raises(VerificationError, match="words of training"):
        streamshard.verify(base)


def test_transformers_finds_none_of_these(tmp_path):
    """So that the test above changes what nobody can use."""
    folder = spelled(make(tmp_path / "m", "tiny", "hf"), "module")
    model = transformers.InternVLForConditionalGeneration
    _, said = model.from_pretrained(folder, output_loading_info=True)
    assert len(said["missing_keys"]) > 50


@pytest.mark.parametrize("words", WORDS)
def test_words_of_training_around_pairs(words, tmp_path):
    run = run_of(tmp_path / "run")
    streamshard.merge_lora(checkpoint=run, output=tmp_path / "expected")
    spelled(run, words)
    streamshard.merge_lora(checkpoint=run, output=tmp_path / "out")
    assert alike(tmp_path / "out", tmp_path / "expected")
    base = make(tmp_path / "base", "tiny", "custom")
    report = streamshard.extract_lora(checkpoint=run, base=base, output=tmp_path / "lora")
    assert report["pairs"] == 3


def test_names_that_are_meant_stay():
    """Of other models, where two would be one, and where all tensors of HF share a beginning."""
    for names in (
        ["foo.weight", "module.foo.weight"],
        ["module.foo.weight", "bar.weight"],
        ["encoder.a.weight", "encoder.b.weight"],
        ["model.language_model.norm.weight", "model.vision_tower.layernorm.weight"],
        ["mlp1.0.weight"],
    ):
        assert bare_names(names) == {}
    assert bare_names(["module.foo.weight"]) == {"foo.weight": "module.foo.weight"}


def test_the_names_of_another_model_stay(tmp_path):
    """transformers' own Idefics3 with a tied head: all names have one word before InternVL's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4}
    text = {
        "model_type": "llama",
        "vocab_size": 120,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    made = transformers.AutoConfig.for_model(
        "idefics3",
        text_config={**sizes, **heads, **text},
        vision_config={**sizes, **heads, "image_size": 28, "patch_size": 14},
        tie_word_embeddings=True,
        scale_factor=1,
    )
    model = fill(transformers.AutoModelForImageTextToText.from_config(made, dtype=torch.float32))
    model.save_pretrained(tmp_path / "base")
    adapted(model, target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    assert all(name.startswith("model.") for name in read(tmp_path / "base"))
    assert streamshard.verify(tmp_path / "base")["problems"] == []
    report = streamshard.merge_lora(
        base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "out"
    )
    assert report["warnings"] == []
    assert read(tmp_path / "out").keys() == read(tmp_path / "base").keys()


def test_another_vision_encoder_is_not_incomplete(tmp_path):
    """The tables say nothing of a model with SigLIP inside, by its config: it merges as it is."""
    base = make(tmp_path / "base", "tiny", "custom")
    content = {
        n.replace("vision_model.", "vision_model.vision_model."): t for n, t in read(base).items()
    }
    put(base, content)
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    merge = {"base": base, "adapter": tmp_path / "adapter", "output": tmp_path / "out"}
    with pytest.raises(InputError, match="which it does not have"):
        streamshard.merge_lora(**merge)
    edit(base, lambda c: c["vision_config"].update(model_type="siglip_vision_model"))
    report = streamshard.merge_lora(**merge)
    assert report["warnings"] == []
    assert read(tmp_path / "out").keys() == content.keys()
    checked = streamshard.verify(tmp_path / "out")
    assert checked["problems"] == []
    assert not any("completeness" in what for what in checked["checked"])


@pytest.mark.parametrize("inside", ["", "language_model."])
def test_names_of_peft_without_pairs(inside, tmp_path, cli):
    """The updates are in such weights, or not: nobody can tell."""
    base = make(tmp_path / "base", "tiny", "custom")
    wrapped_names = {
        f"{inside}base_model.model.{n.removeprefix(inside)}" if n.startswith(inside) else n: t
        for n, t in read(base).items()
    }
    put(base, wrapped_names)
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    merge = ["merge-lora", "--base", base, "--adapter", tmp_path / "adapter"]
    hf = without_weights(make(tmp_path / "hf", "tiny", "hf"))
    for call in (
        [*merge, "--output", tmp_path / "out"],
        ["custom2hf", "--custom-path", base, "--hf-path", hf, "--save-path", tmp_path / "out"],
        ["wrap-lora", "--base", base, "--llm-r", "2", "--output", tmp_path / "out"],
    ):
        text = refused(cli, tmp_path, 3, *call)
        assert "they are lost, or were merged before" in text
    assert cli("verify", base).code == 8


# --- a config of another model, an incomplete one ----------------------------------------------------

CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any], str], Any], str]] = {
    "layers": ("tiny", lambda c, inner: c[inner].update(num_hidden_layers=2), "2 language model"),
    "vision": ("tiny", lambda c, _: c["vision_config"].update(num_hidden_layers=1), "1 vision"),
    "experts": (
        "tiny-qwen3-moe",
        lambda c, inner: c[inner].update(num_experts=2),
        "2 experts",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_config_with_less_than_the_weights(layout, case, tmp_path, cli):
    preset, change, said = CONFIGS[case]
    base = make(tmp_path / "base", preset, layout)
    edit(base, lambda c: change(c, LAYERS[layout]))
    write_adapter(tmp_path / "adapter", preset, layout=layout, targets="llm")
    merge = ["merge-lora", "--base", base, "--adapter", tmp_path / "adapter"]
    for more in ([], ["--dry-run"], ["--allow-missing"]):
        text = refused(cli, tmp_path, 3, *merge, "--output", tmp_path / "out", *more)
        assert "by the config there are" in text or "was expected, by the config" in text
    wrap = ["wrap-lora", "--base", base, "--output", tmp_path / "out", "--llm-r", "2"]
    refused(cli, tmp_path, 3, *wrap, "--format", "peft")
    assert cli("verify", base).code == 8
    assert said


def test_a_config_with_less_than_a_training_checkpoint(tmp_path, cli):
    run = edit(run_of(tmp_path / "run"), lambda c: c["llm_config"].update(num_hidden_layers=2))
    for command in ("merge-lora", "extract-lora"):
        text = refused(cli, tmp_path, 3, command, run, "--output", tmp_path / "out")
        assert "by the config there are 2 language model layers" in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_config_of_the_other_layout(layout, tmp_path):
    base, other = (
        make(tmp_path / "base", "tiny", layout),
        make(tmp_path / "o", "tiny", OTHER[layout]),
    )
    (base / "config.json").write_bytes((other / "config.json").read_bytes())
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    with pytest.raises(InputError, match=f"is of the {OTHER[layout]} layout"):
        streamshard.merge_lora(base=base, adapter=tmp_path / "adapter", output=tmp_path / "out")
    with pytest.raises(VerificationError, match="layout"):
        streamshard.verify(base)


LACKS: dict[str, Callable[[str], bool]] = {
    "layer": lambda n: ".layers.2." in n and n.startswith("language_model."),
    "norm": lambda n: n.endswith("layers.0.input_layernorm.weight"),
    "head": lambda n: n == "language_model.lm_head.weight",
    "projector": lambda n: n.startswith(("mlp1.", "multi_modal_projector.")),
}


@pytest.mark.parametrize("lacks", LACKS)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_an_incomplete_base_is_refused(layout, lacks, tmp_path, cli):
    """Unless that is said to be meant; then the output lacks the same, and the report lists it."""
    base = make(tmp_path / "base", "tiny", layout)
    content = read(base)
    gone = {n for n in content if LACKS[lacks](n)}
    put(base, {n: t for n, t in content.items() if n not in gone})
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="vision")
    merge = ["merge-lora", "--base", base, "--adapter", tmp_path / "adapter"]
    merge += ["--output", tmp_path / "out"]
    text = refused(cli, tmp_path, 3, *merge)
    assert f"{len(gone)} tensors are missing" in text
    assert "--allow-missing writes it nevertheless" in text
    outcome = cli(*merge, "--allow-missing", "--json")
    assert outcome.code == 0
    assert set(json.loads(outcome.out)["missing"]) == gone
    assert read(tmp_path / "out").keys() == content.keys() - gone


# --- values that no trained model has ----------------------------------------------------------------


def damaged(folder: Path, name: str, how: Callable[[torch.Tensor], Any]) -> Path:
    content = read(folder)
    how(content[name])
    return put(folder, content)


VALUES: dict[str, tuple[str, Callable[[torch.Tensor], Any], str]] = {
    "nan": ("mlp1.1.weight", lambda t: t.view(-1)[5].fill_(float("nan")), "NaN"),
    "minus-infinity": ("mlp1.3.bias", lambda t: t[-1].fill_(float("-inf")), "NaN"),
    "zero-norm": ("language_model.model.norm.weight", lambda t: t.zero_(), "all values are zero"),
    "zero-matrix": ("mlp1.3.weight", lambda t: t.zero_(), "all values are zero"),
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_values_that_no_model_has_are_told(case, dtype, tmp_path):
    """By every command that copies them."""
    name, how, said = VALUES[case]
    base = damaged(make(tmp_path / "base", "tiny", "custom", dtype=dtype), name, how)
    ref = without_weights(make(tmp_path / "ref", "tiny", "hf"))
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm", dtype=dtype)
    reports = [
        streamshard.merge_lora(base=base, adapter=tmp_path / "adapter", output=tmp_path / "a"),
        streamshard.custom_to_hf(custom_path=base, hf_path=ref, save_path=tmp_path / "b"),
        streamshard.wrap_lora(base=base, output=tmp_path / "c", llm_r=2),
    ]
    for report in reports:
        (warning,) = report["warnings"]
        assert said in warning
        if report["command"] == "merge-lora":
            assert f"'{name}'" in warning


def test_biases_and_fresh_pairs_may_be_zero(tmp_path):
    base = damaged(make(tmp_path / "base", "tiny", "custom"), "mlp1.3.bias", lambda t: t.zero_())
    report = streamshard.wrap_lora(base=base, output=tmp_path / "out", llm_r=2)
    assert report["warnings"] == []


@pytest.mark.parametrize("how", ["tail", "norm", "over-several"])
def test_a_file_whose_end_was_never_written(how, tmp_path, cli):
    """It has its size, and every header is right."""
    base = make(tmp_path / "base", "tiny", "custom")
    assert streamshard.verify(base)["warnings"] == [
        "no digests are recorded: there is no streamshard.json"
    ]
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    lost = {"tail": 4100, "over-several": 60_000}.get(how, 1)
    if how == "norm":
        damaged(base, "language_model.model.norm.weight", lambda t: t.zero_())
    else:
        content[-lost:] = bytes(lost)
        file.write_bytes(content)
    outcome = cli("verify", base, "--json")
    assert outcome.code == 0
    said = json.loads(outcome.out)["warnings"]
    assert any(f"ends in {lost:,} bytes of zeros" in w for w in said) == (how != "norm")
    assert any("all values are zero" in w for w in said)


@pytest.mark.parametrize("lost", [0, 200])
def test_rows_that_fill_a_table_of_tokens_up_are_no_lost_pages(lost, tmp_path):
    """Sizes are rounded up with rows of zeros, and a head may be the last of its file."""
    head = torch.randn(320, 64).bfloat16()
    head[288:] = 0
    file = tmp_path / "m.safetensors"
    save_file({"model.norm.weight": torch.ones(64), "output.weight": head}, file)
    content = bytearray(file.read_bytes())
    assert not any(content[-32 * 64 * 2 :])
    content[len(content) - 32 * 64 * 2 - lost :] = bytes(32 * 64 * 2 + lost)
    file.write_bytes(content)
    said = [w for w in streamshard.verify(file)["warnings"] if "bytes of zeros" in w]
    assert len(said) == (lost > 0)


def test_fresh_pairs_are_no_lost_pages(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    for kind in ("wrapped", "peft"):
        out = tmp_path / kind
        streamshard.wrap_lora(base=base, output=out, llm_r=8, backbone_r=8, format=kind)
        assert streamshard.verify(out)["warnings"] == []


# --- files as a run leaves them ----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["folder", "inside"])
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_with_the_name_of_a_file(count, config, given, tmp_path):
    """Newer DeepSpeeds put shards and index into a folder `pytorch_model.bin`."""
    run = run_of(tmp_path / "run")
    streamshard.merge_lora(checkpoint=run, output=tmp_path / "expected")
    content = read(run)
    (run / "model.safetensors").unlink()
    inside = run / "pytorch_model.bin"
    inside.mkdir()
    if count == 1:
        torch.save(content, inside / "pytorch_model.bin")
    else:
        names, weight_map = sorted(content), {}
        for number in range(count):
            file = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
            part = names[number::count]
            torch.save({name: content[name] for name in part}, inside / file)
            weight_map |= dict.fromkeys(part, file)
        index = inside / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not config:
        (run / "config.json").unlink()
    source = run if given == "folder" else inside
    ref = None if config else tmp_path / "plain"
    report = streamshard.merge_lora(checkpoint=source, output=tmp_path / "out", reference=ref)
    assert alike(tmp_path / "out", tmp_path / "expected")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")
    assert len(report["warnings"]) == (not config)
    assert streamshard.inspect(source)["tensors"] == len(content)


def test_a_folder_with_the_name_of_a_file_and_no_index(tmp_path):
    """Nobody is told to remove what may be the only weights."""
    run = run_of(tmp_path / "run")
    inside = run / "pytorch_model.bin"
    inside.mkdir()
    (run / "model.safetensors").unlink()
    with pytest.raises(InputError, match="Move it elsewhere"):
        streamshard.inspect(run)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (inside / name).write_bytes(b"weights")
    with pytest.raises(InputError, match=r"00001-of-00002\.bin.*without their index"):
        streamshard.inspect(run)


def test_words_around_pairs_are_told_by_the_names_of_the_output(tmp_path):
    run = spelled(run_of(tmp_path / "run"), "module")
    report = streamshard.merge_lora(checkpoint=run, output=tmp_path / "out")
    (warning,) = report["warnings"]
    assert warning.rpartition("loaders look for ")[2].strip("'") in read(tmp_path / "out")


def test_shards_that_say_they_are_all_need_no_index(tmp_path, cli):
    base = make(tmp_path / "base", "tiny", "custom", max_shard_size=100_000)
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    merge = ["merge-lora", "--adapter", tmp_path / "adapter", "--base", base, "--output"]
    assert cli(*merge, tmp_path / "expected").code == 0
    (base / "model.safetensors.index.json").unlink()
    assert cli(*merge, tmp_path / "out").code == 0
    assert alike(tmp_path / "out", tmp_path / "expected")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert "no model.safetensors.index.json" in cli("verify", base).out
    shards = sorted(base.glob("*.safetensors"))
    (base / "extra.safetensors").write_bytes(shards[0].read_bytes())
    assert "what belongs together" in refused(cli, tmp_path, 3, *merge, tmp_path / "o")
    (base / "extra.safetensors").unlink()
    shards[1].write_bytes(shards[0].read_bytes())
    assert "is in both" in refused(cli, tmp_path, 3, *merge, tmp_path / "o")
    shards[1].unlink()
    assert "what belongs together" in refused(cli, tmp_path, 3, *merge, tmp_path / "o")


def test_what_a_run_noted_of_itself_is_not_the_models(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    for name in ("training_log.txt", "all_results.json", "train_results.json", "eval_results.json"):
        (base / name).write_text("{}")
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    streamshard.merge_lora(base=base, adapter=tmp_path / "adapter", output=tmp_path / "out")
    assert not [file.name for file in (tmp_path / "out").iterdir() if "results" in file.name]
    assert not (tmp_path / "out" / "training_log.txt").exists()


LACKING = {
    "vocabulary": (("vocab.json",), "a vocabulary"),
    "merges": (("merges.txt",), "'merges.txt'"),
    "settings": (("tokenizer_config.json",), "'tokenizer_config.json'"),
    "everything": (("vocab.json", "merges.txt", "tokenizer_config.json"), "a vocabulary"),
    "code": (("modeling_internvl_chat.py",), "'modeling_internvl_chat.py'"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_loaders_need_beside_the_weights(case, tmp_path):
    """Told once, with where it can be taken from; the reference gives it."""
    gone, said = LACKING[case]
    run = run_of(tmp_path / "run")
    base = make(tmp_path / "base", "tiny", "custom")
    names = {file.name for file in base.iterdir()}
    for folder in (run, base):
        for name in gone:
            (folder / name).unlink()
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    (warning,) = streamshard.merge_lora(checkpoint=run, output=tmp_path / "a")["warnings"]
    assert said in warning
    assert "`reference` ORIGINAL" in warning
    (warning,) = streamshard.merge_lora(
        base=base, adapter=tmp_path / "adapter", output=tmp_path / "b"
    )["warnings"]
    assert said in warning
    assert "Copy such files from the original model" in warning
    report = streamshard.merge_lora(
        checkpoint=run, output=tmp_path / "c", reference=tmp_path / "plain"
    )
    assert report["warnings"] == []
    assert {file.name for file in (tmp_path / "c").iterdir()} == names | {
        "README.md",
        "streamshard.json",
    }


# --- only what was trained ---------------------------------------------------------------------------


def test_a_checkpoint_of_nothing_but_what_was_trained(tmp_path, cli):
    """Its pairs can be had with the model that the training started from, and fit in there."""
    run = run_of(tmp_path / "run")
    content = read(run)
    content["mlp1.3.bias"] = content["mlp1.3.bias"] + 1
    put(run, content)
    streamshard.extract_lora(checkpoint=run, base=tmp_path / "plain", output=tmp_path / "expected")
    put(run, {n: t for n, t in content.items() if ".lora_" in n or n.startswith("mlp1.")})
    for command in ("merge-lora", "extract-lora"):
        text = refused(cli, tmp_path, 3, command, run, "--output", tmp_path / "out")
        assert "only what was trained was saved" in text
        assert f"streamshard extract-lora {run} --base MODEL --output ADAPTER" in text
    out = tmp_path / "out"
    streamshard.extract_lora(checkpoint=run, base=tmp_path / "plain", output=out)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    hf = make(tmp_path / "hf", "tiny", "hf")
    extract = ["extract-lora", run, "--base", hf, "--output", tmp_path / "o"]
    assert "is of the hf layout" in refused(cli, tmp_path, 3, *extract)


# --- what is said ------------------------------------------------------------------------------------


def test_a_tensor_that_internvl_does_not_have_is_told(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    put(base, {**read(base), "my_head.weight": torch.ones(2, 2)})
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    report = streamshard.merge_lora(
        base=base, adapter=tmp_path / "adapter", output=tmp_path / "out"
    )
    (warning,) = report["warnings"]
    assert "models of InternVL have no tensor like 'my_head.weight'" in warning
    assert same_tensor(read(tmp_path / "out")["my_head.weight"], torch.ones(2, 2))


def test_a_training_checkpoint_against_the_model_it_began_with(tmp_path, cli):
    """What was trained beside the pairs shows; that these are not in there is said."""
    run = run_of(tmp_path / "run")
    content = read(run)
    put(run, {**content, "mlp1.3.bias": content["mlp1.3.bias"] + 1})
    report = streamshard.diff(run, tmp_path / "plain")
    assert [row["name"] for row in report["different"]] == ["mlp1.3.bias"]
    assert report["missing"] == []
    assert len(report["unexpected"]) == 6
    assert any("without the updates" in warning for warning in report["warnings"])
    again = streamshard.diff(tmp_path / "plain", run)
    assert (again["different"][0]["name"], len(again["missing"])) == ("mlp1.3.bias", 6)


def test_all_ranks_are_said(tmp_path, cli):
    run = run_of(tmp_path / "run")
    content = read(run)
    one = next(n for n in content if ".lora_A." in n)
    other = one.replace("lora_A", "lora_B")
    put(run, {**content, one: content[one][:2], other: content[other][:, :2]})
    outcome = cli("merge-lora", run, "--output", tmp_path / "out", "--alpha", "8")
    assert "r 2 (1 modules), 4 (2 modules)" in outcome.out
    assert "L2 from the base weights inside the checkpoint" in outcome.out
    record = json.loads((tmp_path / "out" / "streamshard.json").read_text())
    assert record["adapters"][0]["ranks"] == {"2": 1, "4": 2}


def test_a_norm_that_is_numbered_as_a_layer_lacks_no_pair(tmp_path):
    """mlp1.0 of the projector is one, beside the matrices mlp1.1 and mlp1.3."""
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = tmp_path / "adapter"
    write_adapter(adapter, "tiny", layout="hf", targets="llm")
    content, config = (
        load_file(adapter / "adapter_model.safetensors"),
        adapter / "adapter_config.json",
    )
    settings = json.loads(config.read_text())
    r, weights = settings["r"], read(base)
    for number, place in ((1, 1), (2, 3)):
        rows, columns = weights[f"mlp1.{place}.weight"].shape
        stem = f"base_model.model.model.multi_modal_projector.linear_{number}"
        content[f"{stem}.lora_A.weight"] = torch.ones(r, columns)
        content[f"{stem}.lora_B.weight"] = torch.ones(rows, r)
    save_file(content, adapter / "adapter_model.safetensors")
    settings["target_modules"] += [f"multi_modal_projector.linear_{number}" for number in (1, 2)]
    config.write_text(json.dumps(settings))
    report = streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["warnings"] == []


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3"])
def test_the_trainers_hint_where_the_trainer_wraps(preset, tmp_path, cli):
    base = make(tmp_path / "base", preset, "custom")
    outcome = cli("wrap-lora", "--base", base, "--output", tmp_path / "out", "--llm-r", "2")
    assert ("InternVL's trainer wraps by" in outcome.out) == (preset == "tiny")
    assert ("wrap_llm_lora does not know" in outcome.err) == (preset != "tiny")


def test_fp32_of_a_model_of_bf16_is_told(tmp_path):
    run = run_of(tmp_path / "run")
    put(run, {name: tensor.float() for name, tensor in read(run).items()})
    report = streamshard.merge_lora(checkpoint=run, output=tmp_path / "out")
    (warning,) = report["warnings"]
    assert "`dtype` bf16 writes half of the bytes" in warning or 'dtype="bf16"' in warning
    half = streamshard.merge_lora(checkpoint=run, output=tmp_path / "half", dtype="bf16")
    assert half["warnings"] == []
    assert half["bytes"] * 1.8 < report["bytes"]


def test_one_alpha_for_several_ranks_is_told(tmp_path):
    run = run_of(tmp_path / "run")
    content = read(run)
    one = next(n for n in content if ".lora_A." in n)
    other = one.replace("lora_A", "lora_B")
    put(run, {**content, one: content[one][:2], other: content[other][:, :2]})
    report = streamshard.merge_lora(checkpoint=run, output=tmp_path / "out", alpha=8)
    assert any("ranks 2, 4" in warning for warning in report["warnings"])
