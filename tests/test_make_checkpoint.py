"""The synthetic checkpoints against the published sizes and the libraries that read them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import make_checkpoint
import pytest
from make_checkpoint import PRESETS, tensor_shapes, write_adapter, write_checkpoint
from presets import SPELLINGS, model_config

if TYPE_CHECKING:
    from torch import Tensor

safetensors_torch = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")


TINY = [name for name in PRESETS if name.startswith("tiny")]
FAMILIES = [name for name in TINY if name != "tiny-qwen2"]  # it is the same as tiny

# Published sizes: names, parameters as published (billions when not exact), bf16 bytes when
# exact, number of tensors custom / hf. No hf twin was published where the last is None.
PUBLISHED: list[tuple[str, float, int | None, int, int | None]] = [
    ("Mini-InternVL-2B-V1-5 InternVL2-2B InternVL2_5-2B InternVL2_5-2B-MPO",
     2.206, 4_411_508_736, 517, 661),
    ("InternVL2-8B InternVL2-8B-MPO InternVL2_5-8B InternVL2_5-8B-MPO",
     8.075, 16_150_730_752, 573, 733),
    ("InternVL-Chat-V1-5 InternVL2-26B InternVL2_5-26B InternVL2_5-26B-MPO",
     25.514, 51_028_372_224, 934, 1120),
    ("Mini-InternVL-4B-V1-5 InternVL2-4B", 4.147, 8_293_711_872, 541, None),
    ("InternVL-Chat-V1-2 InternVL-Chat-V1-2-Plus InternVL2-40B", 40.07, None, 1138, None),
    ("InternVL2-Llama3-76B", 76.262, 152_524_716_800, 1318, None),
    ("InternVL2-1B", 0.938, 1_876_317_952, 637, None),
    ("InternVL2_5-1B InternVL2_5-1B-MPO InternVL3-1B", 0.938, 1_876_386_048, 637, 733),
    ("InternVL3-2B", 2_088_957_440, 4_177_914_880, 685, 781),
    ("InternVL2_5-4B InternVL2_5-4B-MPO", 3.713, 7_425_275_904, 781, 877),
    ("InternVL3-8B", 7.944, 15_888_747_520, 685, 781),
    ("InternVL3-9B", 9.14, None, 781, 877),
    ("InternVL3-14B", 15.117, 30_234_513_408, 925, 1021),
    ("InternVL2_5-38B InternVL2_5-38B-MPO InternVL3-38B", 38.388, 76_776_329_984, 1366, 1456),
    ("InternVL2_5-78B InternVL2_5-78B-MPO InternVL3-78B", 78.408, 156_816_636_672, 1558, 1648),
    ("InternVL3_5-1B", 1.061, 2_121_795_584, 657, 753),
    ("InternVL3_5-2B", 2.348, 4_696_694_784, 657, 753),
    ("InternVL3_5-4B", 4.732, 9_464_978_432, 745, 841),
    ("InternVL3_5-8B", 8.528, 17_056_636_928, 745, 841),
    ("InternVL3_5-14B", 15.120, 30_239_047_680, 789, 885),
    ("InternVL3_5-38B", 38.390, 76_780_811_008, 1302, 1392),
    ("InternVL3_5-30B-A3B", 30.849, 61_697_460_224, 19213, 19309),
    ("InternVL3_5-241B-A28B", 240.699, 481_398_740_736, 37540, 37630),
    ("InternVL3_5-GPT-OSS-20B-A4B-Preview", 21.239, 42_477_748_608, 757, 853),
]  # fmt: skip


def read(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a folder with safetensors' own reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors_torch.load_file(file)
    return tensors


def assert_reference_bytes(file: Path) -> None:
    """Compare a file with what the reference writer makes of its content."""
    content = safetensors_torch.load_file(file)
    assert file.read_bytes() == safetensors_torch.save(content, {"format": "pt"})


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def base(folder: Path) -> Any:
    """Load an hf checkpoint; every key must have found its place."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    return model.eval()


def logits(model: Any) -> Tensor:
    """Compute the outputs for two tokens, one image and one more token."""
    image = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.tensor([[1, 2, 261, 3]]), pixel_values=image).logits
    assert output.isfinite().all()
    return output


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0].split()[0])
def test_published_sizes(row: tuple[str, float, int | None, int, int | None]) -> None:
    names, published, nbytes, custom, hf = row
    for name in names.split():
        shapes = {layout: tensor_shapes(name, layout) for layout in ("custom", "hf")}
        total = parameters(shapes["custom"])
        assert parameters(shapes["hf"]) == total
        if isinstance(published, int):
            assert total == published
        else:
            decimals = 2 if nbytes is None else 3
            assert round(total / 1e9, decimals) == published
        assert nbytes in {None, 2 * total}
        assert len(shapes["custom"]) == custom
        assert hf in {None, len(shapes["hf"])}


def test_every_preset_is_tested() -> None:
    published = {name for row in PUBLISHED for name in row[0].split()}
    assert set(PRESETS) == published | set(TINY)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_bytes_are_those_of_the_reference_writer(tmp_path: Path, preset: str, layout: str) -> None:
    written = write_checkpoint(tmp_path, preset, layout=layout)
    (file,) = written.files
    assert file.name == "model.safetensors"
    assert_reference_bytes(file)
    tensors = read(tmp_path)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == tensor_shapes(preset, layout)
    assert written.parameters == sum(t.numel() for t in tensors.values())
    assert written.nbytes == 2 * written.parameters
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_values(tmp_path: Path, dtype: str) -> None:
    # An embedding of several chunks, the last one of an odd length.
    preset = replace(PRESETS["tiny"], hidden=63, vocab=20001)
    write_checkpoint(tmp_path, preset, layout="hf", dtype=dtype)
    assert_reference_bytes(tmp_path / "model.safetensors")
    tensors = {name: t.float() for name, t in read(tmp_path).items()}
    embedding = tensors["language_model.model.embed_tokens.weight"]
    assert abs(embedding.mean()) < 1e-3
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    norm = tensors["language_model.model.norm.weight"]
    assert norm.mean() == pytest.approx(1, abs=0.05)
    assert norm.std() == pytest.approx(0.05, rel=0.5)
    scale = tensors["vision_tower.encoder.layer.0.lambda_1"]
    assert scale.mean() == pytest.approx(0.1, abs=0.01)
    seen = set()
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        seen.add(tensor.numpy().tobytes())
        # A leading dimension of 1 is no row; a vector is one row.
        rows = tensor.squeeze(0).reshape(tensor.squeeze(0).shape[0], -1)
        rows = rows.T if rows.shape[1] == 1 else rows
        assert len({row.tobytes() for row in rows.numpy()}) == len(rows), name
    assert len(seen) == len(tensors)


def test_values_depend_on_name_and_seed_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", "tiny", layout="hf", seed=1)
    write_checkpoint(tmp_path / "b", "tiny", layout="hf", seed=1, max_shard_size=20_000)
    write_checkpoint(tmp_path / "custom", "tiny", layout="custom", seed=1)
    write_checkpoint(tmp_path / "other", "tiny", layout="hf", seed=2)
    tensors, other, custom = (read(tmp_path / name) for name in ("a", "other", "custom"))
    sharded = read(tmp_path / "b")
    assert tensors.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in tensors.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in tensors.items())
    shared = tensors.keys() & custom.keys()
    assert len(shared) == 3 * 12 + 3
    assert all(torch.equal(tensors[name], custom[name]) for name in shared)


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3-moe", "tiny-gpt-oss"])
def test_shards_are_those_of_huggingface_hub(tmp_path: Path, preset: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    # Some tensors are larger than a shard, and so have one of their own.
    written = write_checkpoint(tmp_path, preset, layout="hf", max_shard_size="20KB")
    text = (tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8")
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    state = {
        name: torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in tensor_shapes(preset, "hf").items()
    }
    split = hub.split_torch_state_dict_into_shards(state, max_shard_size="20KB")
    assert index["weight_map"] == split.tensor_to_filename
    assert [file.name for file in written.files] == sorted(split.filename_to_tensors)
    total = parameters(tensor_shapes(preset, "hf"))
    assert index["metadata"] == {"total_parameters": total, "total_size": 2 * total}
    for file in written.files:
        assert_reference_bytes(file)


def test_spellings_hold_the_same_model(tmp_path: Path) -> None:
    expected = None
    for spelling in SPELLINGS:
        write_checkpoint(tmp_path / spelling, "tiny", layout="hf", spelling=spelling)
        output = logits(base(tmp_path / spelling))
        expected = output if expected is None else expected
        assert torch.equal(output, expected), spelling


def test_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", layout="hf", tied=True)
    assert not [name for name in read(tmp_path) if "lm_head" in name]
    model = base(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.config.text_config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_published_configs_load() -> None:
    transformers = pytest.importorskip("transformers")
    for name, preset in PRESETS.items():
        config = model_config(preset, "hf", tied=False, torch_dtype="bfloat16")
        loaded = transformers.InternVLConfig(**config)
        assert loaded.text_config.hidden_size == preset.hidden, name
        rope = loaded.text_config.rope_parameters
        assert rope["rope_theta"] == preset.rope_theta, name
        assert loaded.image_token_id < preset.vocab, name
        assert loaded.vision_config.use_qk_norm == preset.vision.qk_normalization, name


@pytest.mark.parametrize("preset", TINY)
def test_custom_side_files(tmp_path: Path, preset: str) -> None:
    write_checkpoint(tmp_path, preset, layout="custom", dtype="fp16")
    config = json.loads((tmp_path / "config.json").read_bytes())
    llm = config["llm_config"]
    assert config["model_type"] == "internvl_chat"
    assert config["torch_dtype"] == llm["torch_dtype"] == "float16"
    assert config["tie_word_embeddings"] is llm["tie_word_embeddings"] is False
    assert llm["architectures"] == [PRESETS[preset].arch]
    references = [*config["auto_map"].values(), *llm.get("auto_map", {}).values()]
    for reference in references:
        source = (tmp_path / f"{reference.split('.')[0]}.py").read_text(encoding="utf-8")
        compile(source, reference, "exec")
        assert "laceholder" in source
    assert (tmp_path / "generation_config.json").stat().st_size == 69


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_tokenizer(tmp_path: Path, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path, "tiny", layout=layout)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == PRESETS["tiny"].image_token
    assert len(tokenizer) <= PRESETS["tiny"].vocab
    text = "Zwölf <img><IMG_CONTEXT></img> Boxkämpfer"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if layout == "hf":
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
        ids = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
        assert PRESETS["tiny"].image_token in ids
        assert tokenizer.decode(ids).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("preset", FAMILIES)
def test_transformers_and_peft_load_hf(tmp_path: Path, preset: str) -> None:
    peft = pytest.importorskip("peft")
    write_checkpoint(tmp_path / "base", preset, layout="hf")
    written = write_adapter(tmp_path / "lora", preset, layout="hf", r=4, targets="all")
    assert_reference_bytes(*written.files)
    model = base(tmp_path / "base")
    text = model.config.text_config
    assert text.vocab_size == PRESETS[preset].vocab
    assert model.config.tie_word_embeddings is text.tie_word_embeddings is False
    before = logits(model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    stored, loaded = read(tmp_path / "lora"), peft.get_peft_model_state_dict(adapted)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.items())
    assert not torch.allclose(before, logits(adapted), atol=1e-4)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_adapter_targets(tmp_path: Path, layout: str) -> None:
    tensors, modules = {}, {}
    for targets in ("llm", "vision", "all"):
        folder = tmp_path / targets
        write_adapter(folder, "tiny", layout=layout, r=4, targets=targets)
        tensors[targets] = read(folder)
        config = json.loads((folder / "adapter_config.json").read_bytes())
        modules[targets] = set(config["target_modules"])
    assert tensors["llm"].keys() | tensors["vision"].keys() == tensors["all"].keys()
    assert all("language_model" in name for name in tensors["llm"])
    assert not any("language_model" in name for name in tensors["vision"])
    # A suffix of one side must not fit a module of the other.
    assert modules["llm"] | modules["vision"] == modules["all"]
    for targets, other in (("llm", "vision"), ("vision", "llm")):
        fitting = tuple(f".{suffix}.lora_A.weight" for suffix in modules[targets])
        assert not [name for name in tensors[other] if name.endswith(fitting)]


def test_adapter_config_has_the_fields_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write_adapter(tmp_path / "a", "tiny", r=4, lora_alpha=8, use_rslora=True, base_model_name="b")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_bytes())
    reference = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        target_modules=config["target_modules"],
        base_model_name_or_path="b",
        inference_mode=True,
    )
    reference.save_pretrained(tmp_path)
    expected = json.loads((tmp_path / "adapter_config.json").read_bytes())
    for fields in (config, expected):
        fields["target_modules"] = sorted(fields["target_modules"])
    assert config == expected


@pytest.mark.parametrize("preset", TINY)
def test_custom_adapter_fits_the_checkpoint(tmp_path: Path, preset: str) -> None:
    write_adapter(tmp_path, preset, layout="custom", r=4, targets="all", dtype="bf16")
    shapes, stored = tensor_shapes(preset, "custom"), read(tmp_path)
    pairs = {name.rsplit(".lora_", 1)[0] for name in stored}
    assert len(stored) == 2 * len(pairs)
    for pair in pairs:
        a, b = (stored[f"{pair}.lora_{x}.weight"] for x in "AB")
        module = pair.removeprefix("base_model.model.")
        if preset == "tiny-gpt-oss" and ".experts" in module:
            parameter = "gate_up_proj" if module.endswith(".base_layer") else "down_proj"
            experts, d1, d2 = shapes[f"{module.removesuffix('.base_layer')}.{parameter}"]
            assert (*a.shape, *b.shape) == (experts * 4, d1, d2, experts * 4)
        else:
            assert (b.shape[0], a.shape[1]) == shapes[f"{module}.weight"]
            assert a.shape[0] == b.shape[1] == 4


def test_adapter_values(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", "tiny", r=64, lora_alpha=16.5, targets="all")
    for name, tensor in read(tmp_path / "a").items():
        if ".lora_A." in name:
            bound = tensor.shape[1] ** -0.5
            assert bound * 0.98 < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert tensor.std() == pytest.approx(0.02, rel=0.1)


def test_adapter_bin(tmp_path: Path) -> None:
    for dtype in ("bf16", "fp32"):
        write_adapter(tmp_path / dtype / "a", "tiny", r=2, dtype=dtype)
        write_adapter(tmp_path / dtype / "b", "tiny", r=2, dtype=dtype, bin=True)
        stored = read(tmp_path / dtype / "a")
        state = torch.load(tmp_path / dtype / "b" / "adapter_model.bin", weights_only=True)
        assert state.keys() == stored.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("preset", "r", "count"),
    [
        ("InternVL3-8B", 16, 40_370_176),
        ("InternVL2-8B", 16, 37_748_736),
    ],
)
def test_adapter_parameter_counts(preset: str, r: int, count: int) -> None:
    """Counts that trainers print for the language models."""
    groups = make_checkpoint._adapted(PRESETS[preset], "custom", "llm")
    tensors = make_checkpoint._adapter_tensors(PRESETS[preset], groups, r)
    assert sum(tensor.elements for tensor in tensors) == count


def test_importing_needs_only_numpy() -> None:
    code = "import sys, make_checkpoint; print(*sys.modules)"
    tools = Path(make_checkpoint.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tools, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "safetensors", "streamshard", "click"}
    assert not heavy & set(run.stdout.split())
