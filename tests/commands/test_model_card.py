"""The model card of an output, as the hub's own client reads it."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import reference
from adapters import adapter_of
from folders import OTHER, convert, edit, make
from huggingface_hub import ModelCard
from pairs import wrap_as_the_trainer

from streamshard import merge_lora, verify
from streamshard.errors import OutputError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE_CARD = """---
license: other
license_name: qwen
license_link: https://example.org/LICENSE
base_model:
- OpenGVLab/InternVL3-8B-Instruct
base_model_relation: quantized
pipeline_tag: image-to-text
library_name: onnx
language: [multilingual, no]
datasets: [a/of-the-base]
new_version: OpenGVLab/InternVL3_5-8B
tags: [internvl, custom_code, GGUF, 4-bit, "license:mit", "base_model:x", chat]
---
# InternVL3-8B, the best
"""


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def front_of(folder: Path) -> dict:
    return card_of(folder).data.to_dict()


def cached(root: Path, repository: str) -> Path:
    """Where the hub's cache has a commit of a repository."""
    folder = root / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    return folder


@pytest.fixture
def base(tmp_path):
    folder = make(tmp_path / "InternVL3-8B", "tiny", "custom")
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture
def lora(tmp_path):
    return adapter_of(tmp_path / "my|lora", "tiny", "custom")


def test_what_still_holds_is_taken_over(base, lora, tmp_path):
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    assert front_of(tmp_path / "out") == {
        "license": "other",
        "license_name": "qwen",
        "license_link": "https://example.org/LICENSE",
        "base_model": ["OpenGVLab/InternVL3-8B-Instruct"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "language": ["multilingual", "no"],
        "tags": ["internvl", "chat", "custom_code", "streamshard"],
    }
    text = card_of(tmp_path / "out").text
    assert "the best" not in text
    assert "By the card of `InternVL3-8B`" in text


def test_it_says_what_the_report_says(base, lora, tmp_path):
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    text = card_of(tmp_path / "out").text
    assert "| `my\\|lora` | lora | 8 | 32 | 4 | 1 |" in text
    assert f"{report['merged']} tensors of `InternVL3-8B` were changed" in text
    assert f"{report['exactness']['elements']:,} merged elements" in text
    l2 = report["l2"]
    assert f"{l2['global']:.4g} over all elements of {l2['compared']} tensors" in text
    assert f"sum of the tensors' {l2['sum']:.4g}, per parameter {l2['per_parameter']:.4g}" in text
    assert f"Norm of the update: {report['update']['intended']:.4g}" in text
    assert f"streamshard {report['version']}" in text
    assert str(tmp_path) not in text  # a card is published, a path is nobody's business
    assert verify(tmp_path / "out", strict=True)["checked_files"].count("README.md") == 1


def test_the_code_that_it_shows_is_python(base, lora, tmp_path):
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    convert("hf", base, make(tmp_path / "hf", "tiny", "hf"), tmp_path / "converted")
    custom, hf = (card_of(tmp_path / name).text for name in ("out", "converted"))
    import transformers

    for text in (custom, hf):
        tree = ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
        imported = next(n for n in tree.body if isinstance(n, ast.ImportFrom))
        assert imported.module == "transformers"
        assert all(hasattr(transformers, alias.name) for alias in imported.names)
    assert "trust_remote_code=True" in custom
    assert "vllm serve . --trust-remote-code\n" in custom
    assert "trust_remote_code" not in hf
    assert "vllm serve .\n" in hf


def test_the_model_of_the_hf_layout_loads_as_the_card_says(base, tmp_path):
    convert("hf", base, make(tmp_path / "hf", "tiny", "hf"), tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path / "out").text, re.DOTALL)[1]
    code = "\n".join(line for line in code.splitlines() if "rocessor" not in line)  # needs images
    names: dict = {}
    code = code.replace('"."', repr(str(tmp_path / "out")))
    exec("from transformers import AutoModelForImageTextToText\n" + code, names)
    assert type(names["model"]).__name__ == "InternVLForConditionalGeneration"


def test_the_place_in_the_cache_tells_repository_and_commit(base, lora, tmp_path):
    folder = cached(tmp_path, "OpenGVLab/InternVL3-8B")
    shutil.move(base, folder)
    merge_lora(base=folder, adapter=lora, output=tmp_path / "out")
    front, text = front_of(tmp_path / "out"), card_of(tmp_path / "out").text
    assert front["base_model"] == ["OpenGVLab/InternVL3-8B"]
    assert f"(https://huggingface.co/OpenGVLab/InternVL3-8B) at commit `{COMMIT}`" in text


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ("OpenGVLab/InternVL3-8B", "OpenGVLab/InternVL3-8B"),
        ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-8B-hf"),
        ("OpenGVLab/InternVL3-2B", None),  # another one than the base, by its name
        ("/data/models/InternVL3-8B", None),
        ("work_dirs/InternVL3-8B", None),
        (["OpenGVLab/InternVL3-8B"], None),
        (None, None),
    ],
)
def test_the_adapters_config_may_name_the_base(base, lora, stated, named, tmp_path):
    (base / "README.md").unlink()
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = stated
    (lora / "adapter_config.json").write_text(json.dumps(config))
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    front, text = front_of(tmp_path / "out"), card_of(tmp_path / "out").text
    assert front.get("base_model") == ([named] if named else None)
    assert front.get("base_model_relation") == ("finetune" if named else None)
    assert "license" not in front
    assert "No licence is known: see that of `InternVL3-8B`." in text
    assert front["pipeline_tag"] == "image-text-to-text"


def test_several_adapters_are_a_merge(base, tmp_path):
    one = adapter_of(cached(tmp_path, "me/one"), "tiny", "custom")
    other = adapter_of(tmp_path / "other", "tiny", "custom", seed=2)
    (one / "README.md").write_text("---\nlicense: mit\ndatasets: [me/data]\n---\n")
    (other / "README.md").write_text("---\nlicense: other\ndatasets: me/more\n---\n")
    merge_lora(base=base, adapter=[one, other], weight=[0.5, 2], output=tmp_path / "out")
    front, text = front_of(tmp_path / "out"), card_of(tmp_path / "out").text
    assert front["base_model_relation"] == "merge"
    assert front["base_model"] == ["OpenGVLab/InternVL3-8B-Instruct", "me/one"]
    assert front["datasets"] == ["me/data", "me/more"]
    assert front["tags"][-2:] == ["merge", "streamshard"]
    assert "| `me/one` | lora | 8 | 32 | 4 | 0.5 |" in text
    assert "The licence that the adapter `me/one` states is `mit`." in text
    assert "`other` states" not in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_conversion_is_none_of_the_hubs_relations(layout, tmp_path):
    source = make(cached(tmp_path, "me/tuned"), "tiny", OTHER[layout])
    (source / "README.md").write_text("---\nlicense: mit\ntags: [mine, custom_code]\n---\n")
    ref = make(tmp_path / "ref", "tiny", layout)
    (ref / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Reference\n")
    report = convert(layout, source, ref, tmp_path / "out")
    code = ["custom_code"] if layout == "custom" else []
    assert front_of(tmp_path / "out") == {
        "license": "mit",
        "base_model": ["me/tuned"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "language": "en",
        "tags": ["mine", *code, "streamshard"],
    }
    text = card_of(tmp_path / "out").text
    assert "Nothing was trained." in text
    assert f"L2 distance from the reference's weights: {report['l2']['global']:.4g}" in text


def test_a_conversion_is_what_its_source_is(base, tmp_path):
    convert("hf", base, make(tmp_path / "hf", "tiny", "hf"), tmp_path / "out")
    front = front_of(tmp_path / "out")
    assert front["base_model"] == ["OpenGVLab/InternVL3-8B-Instruct"]
    assert front["base_model_relation"] == "quantized"


def test_what_is_missing_is_said(tmp_path):
    source = make(tmp_path / "source", "tiny", "custom")
    tensors = reference.read(source)
    reference.save_file(
        {n: t for n, t in tensors.items() if n != "mlp1.1.bias"}, source / "model.safetensors"
    )
    ref = make(tmp_path / "ref", "tiny", "hf")
    convert("hf", source, ref, tmp_path / "out", allow_missing=True)
    text = card_of(tmp_path / "out").text
    assert "Missing, of 1 tensor: `mlp1.1.bias`." in text


def test_a_training_checkpoint_is_of_its_reference(base, tmp_path):
    original = cached(tmp_path, "OpenGVLab/InternVL3-8B")
    shutil.copytree(base, original)
    (base / "README.md").unlink()
    wrap_as_the_trainer(base)
    merge_lora(checkpoint=base, reference=original, output=tmp_path / "out")
    front, text = front_of(tmp_path / "out"), card_of(tmp_path / "out").text
    assert front["base_model"] == ["OpenGVLab/InternVL3-8B"]
    assert front["license"] == "other"
    assert "its code was taken" in text
    assert "| adapter |" not in text


@pytest.mark.parametrize("layout", ["keep", "hf"])
def test_the_bases_own_card_or_none(base, lora, layout, tmp_path):
    ref = make(tmp_path / "ref", "tiny", "hf")
    (ref / "README.md").write_text("# Of the reference")
    more = {"layout": layout, "reference": ref} if layout == "hf" else {}
    for card in ("base", "none"):
        merge_lora(base=base, adapter=lora, output=tmp_path / card, card=card, **more)
    expected = (ref if layout == "hf" else base) / "README.md"
    assert (tmp_path / "base" / "README.md").read_bytes() == expected.read_bytes()
    assert not (tmp_path / "none" / "README.md").exists()


def test_a_card_in_other_letters_is_not_carried_but_other_texts_are(base, lora, tmp_path):
    (base / "README.md").unlink()
    for name in ("Readme.MD", "README_zh.md", "LICENSE"):
        (base / name).write_text(name)
    (base / "docs").mkdir()
    (base / "docs" / "README.md").write_text("inner")
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "README_zh.md", "LICENSE"} <= names
    assert "Readme.MD" not in names
    assert (tmp_path / "out" / "docs" / "README.md").read_text() == "inner"


def test_a_card_that_cannot_be_read_is_a_warning(base, lora, tmp_path):
    (base / "README.md").write_text("---\na: &a [x]\nb: *a\nlicense: mit\n---\n")
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    assert any("refers to parts of itself" in text for text in report["warnings"])
    assert "license" not in front_of(tmp_path / "out")


def test_names_of_others_make_no_markdown(base, tmp_path):
    lora = adapter_of(tmp_path / "`<b>\n# x|", "tiny", "custom")
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    text = card_of(tmp_path / "out").text
    assert "| `` `<b>\\n# x\\| `` |" in text
    assert "\n# x" not in text


def test_weights_alone_are_not_said_to_load(pair):
    for file in pair.base.glob("*.json"):
        if "index" not in file.name:
            file.unlink()
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert "library_name" not in front_of(pair.output)
    assert "## Use" not in card_of(pair.output).text


def test_code_that_is_missing_is_said(base, lora, tmp_path):
    for file in base.glob("*.py"):
        file.unlink()
    edit(base, lambda config: config.pop("auto_map"))
    merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    assert "copy it from the original model" in card_of(tmp_path / "out").text
    assert "custom_code" not in front_of(tmp_path / "out")["tags"]


def test_the_same_card_for_any_place_and_number_of_threads(base, lora, tmp_path):
    merge_lora(base=base, adapter=lora, output=tmp_path / "one", workers=1)
    merge_lora(base=base, adapter=lora, output=tmp_path / "two", workers=3, max_shard_size="20KB")
    one, two = ((tmp_path / name / "README.md").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_interrupted_run_goes_on_with_the_same_card_only(pair, monkeypatch):
    import streamshard.engine.run as engine

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    call = {"base": pair.base, "adapter": pair.adapter, "output": pair.output}
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_write_beside", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_lora(**call)
    with pytest.raises(OutputError, match="`card` was new and is none"):
        merge_lora(**call, card="none")
    (pair.adapter / "README.md").write_text("---\ndatasets: [x/y]\n---\n")
    with pytest.raises(OutputError, match=r"file README.md .* has changed"):
        merge_lora(**call)
    (pair.adapter / "README.md").unlink()
    assert merge_lora(**call)["resumed"] == 2
    assert "LoRA merged" in card_of(pair.output).text


def test_another_choice_is_an_error_before_anything_is_read(pair):
    with pytest.raises(UsageError, match="choose one of new, base, none"):
        merge_lora(base="nowhere", adapter=pair.adapter, output=pair.output, card="old")
    with pytest.raises(UsageError, match="`card` is"):
        convert("hf", pair.base, pair.base, pair.output, card=True)


def test_on_the_command_line(pair, cli):
    assert cli(*pair.command, "--card", "none").code == 0
    assert not (pair.output / "README.md").exists()
    assert cli(*pair.command, "--card", "old").code == 2
