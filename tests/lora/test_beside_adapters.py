"""S2: weights that trainers save beside an adapter are merged, inert, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from adapters import adapter_of
from folders import make
from safetensors.torch import load_file, save_file

from streamshard import inspect, merge_lora, verify, wrap_lora
from streamshard.errors import AdapterError, VerificationError

PREFIX = "base_model.model."
# What each layout calls the projector and the vision encoder in memory, and on disk.
LIVE = {"custom": "mlp1.", "hf": "model.multi_modal_projector."}
FLAT = {"custom": "mlp1.", "hf": "multi_modal_projector."}
FILES = [
    "vit.safetensors",
    "non_lora_trainables.bin",
    "non_lora_state_dict.bin",
    "trainable_params.bin",
    "mm_projector.pt",
    "projector.pth",
    "parts/vit.safetensors",
    "VIT.SAFETENSORS",
    "projector.ckpt",
]


def put(path: Path, tensors: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


class Case:
    """A tiny base and an adapter of some layout, and trained weights for the projector."""

    def __init__(self, root: Path, layout: str, adapted: str | None = None) -> None:
        self.root = root
        self.layout = layout
        self.base = make(root / "base", "tiny", layout)
        self.adapter = adapter_of(root / "adapter", "tiny", adapted or layout, targets="llm")
        self.weights = reference.read(self.base)
        self.trained = {
            name: reference.normal(tensor.shape, 1, seed=number).to(tensor.dtype)
            for number, (name, tensor) in enumerate(self.weights.items())
            if name.startswith(FLAT[layout])
        }
        assert len(self.trained) == 6

    def live(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By the names that a trainer sees."""
        old, new = FLAT[self.layout], LIVE[self.layout]
        return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}

    def merged(self, name: str = "out", **how: Any) -> dict[str, torch.Tensor]:
        self.report = merge_lora(
            base=self.base, adapter=self.adapter, output=self.root / name, **how
        )
        return reference.read(self.root / name)

    def expect(self, changed: dict[str, torch.Tensor]) -> None:
        """The merge is that without the files, but for these tensors."""
        found = self.merged()
        for path in [*self.adapter.rglob("*")]:
            if path.is_file() and not path.name.startswith("adapter_"):
                path.unlink()
        plain = self.merged("plain")
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            assert reference.same_tensor(found[name], changed.get(name, tensor)), name


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("file", FILES)
def test_S2_trained_weights_take_the_place_of_the_bases(file, layout, tmp_path):
    case = Case(tmp_path, layout)
    put(case.adapter / file, {PREFIX + n: t for n, t in case.live(case.trained).items()})
    case.expect(case.trained)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("spelling", ["live", "flat", "peft-flat", "wrapped", "state_dict"])
def test_S2_by_any_name_that_an_adapter_may_use(spelling, layout, tmp_path):
    case = Case(tmp_path, layout)
    live = case.live(case.trained)
    content: Any = {
        "live": live,
        "flat": case.trained,
        "peft-flat": {PREFIX + n: t for n, t in case.trained.items()},
        "wrapped": {
            f"{PREFIX}{n.rpartition('.')[0]}.modules_to_save.default.{n.rpartition('.')[2]}": t
            for n, t in live.items()
        },
        "state_dict": {"state_dict": live, "step": 3},
    }[spelling]
    put(case.adapter / "non_lora_trainables.bin", content)
    case.expect(case.trained)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S2_trained_in_the_other_layout(layout, tmp_path):
    other = {"custom": "hf", "hf": "custom"}[layout]
    case = Case(tmp_path, layout, adapted=other)
    names = {
        "mlp1.0.": "multi_modal_projector.layer_norm.",
        "mlp1.1.": "multi_modal_projector.linear_1.",
        "mlp1.3.": "multi_modal_projector.linear_2.",
    }
    content = {}
    for name, tensor in case.trained.items():
        for custom, hf in names.items():
            mine, theirs = (custom, hf) if layout == "custom" else (hf, custom)
            if name.startswith(mine):
                theirs = f"model.{theirs}" if other == "hf" else theirs
                content[PREFIX + name.replace(mine, theirs)] = tensor
    put(case.adapter / "vit.safetensors", content)
    case.expect(case.trained)


def test_S2_a_vision_encoder_as_ms_swift_saves_it(tmp_path):
    """Every `vision_model.*` and `mlp1.*`, of which training changed some; others are inert."""
    case = Case(tmp_path, "custom")
    parts = ("vision_model.", "mlp1.")
    content = {n: t for n, t in case.weights.items() if n.startswith(parts)}
    put(
        case.adapter / "vit.safetensors",
        {PREFIX + n: t for n, t in (content | case.trained).items()},
    )
    case.expect(case.trained)
    (facts,) = case.report["adapters"]
    assert not facts["inert"]  # of the run without the file
    put(
        case.adapter / "vit.safetensors",
        {PREFIX + n: t for n, t in (content | case.trained).items()},
    )
    case.merged("again")
    (facts,) = case.report["adapters"]
    assert len(facts["inert"]) == len(content) - len(case.trained)
    assert any("vit.safetensors" in warning for warning in case.report["warnings"])


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_S2_values_in_another_dtype_are_rounded_once(dtype, tmp_path):
    case = Case(tmp_path, "custom")
    wide = {n: t.to(reference.TORCH[dtype]) * 1.001 for n, t in case.trained.items()}
    put(case.adapter / "non_lora_state_dict.bin", wide)
    case.expect({n: wide[n].to(t.dtype) for n, t in case.trained.items()})


def test_S2_equal_values_are_inert(tmp_path):
    case = Case(tmp_path, "custom")
    same = {n: case.weights[n].float() for n in case.trained}
    put(case.adapter / "non_lora_trainables.bin", same)
    case.expect({})


def test_S2_a_file_with_all_that_the_trainer_had(tmp_path):
    """As accelerate saves a wrapped model: pairs as well, which are those of the adapter."""
    case = Case(tmp_path, "custom")
    pairs = load_file(case.adapter / "adapter_model.safetensors")
    content = {key.replace(".weight", ".default.weight"): tensor for key, tensor in pairs.items()}
    adapted = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in pairs}
    for name, tensor in (case.weights | case.trained).items():
        module, _, end = name.rpartition(".")
        content[PREFIX + (f"{module}.base_layer.{end}" if module in adapted else name)] = tensor
    put(case.adapter / "model.safetensors", {n: t.contiguous() for n, t in content.items()})
    case.expect(case.trained)


def test_S2_pieces_of_the_adapter_itself_are_inert(tmp_path):
    """As an earlier save left them: pairs are cut apart, but all values are the adapter's."""
    case = Case(tmp_path, "custom")
    pairs = load_file(case.adapter / "adapter_model.safetensors")
    for number in range(3):
        own = {key: pairs[key] for key in [*pairs][number::3]}
        put(case.adapter / f"adapter_model-0000{number + 1}-of-00003.safetensors", own)
    plain = case.merged()
    for file in case.adapter.glob("adapter_model-*"):
        file.unlink()
    again = case.merged("again")
    assert all(reference.same_tensor(plain[name], again[name]) for name in again)


STATES = [
    "optimizer.pt", "optimizer.bin", "optimizer_0.bin", "scheduler.pt", "scheduler.bin",
    "rng_state.pth", "rng_state_0.pth", "scaler.pt", "training_args.bin", "value_head.bin",
    "value_head.safetensors", "random_states_0.pkl", "sampler.bin", "dl_state_dict.bin",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "adapter_model.bin",
    "global_step7/mp_rank_00_model_states.pt", "checkpoint-3/vit.safetensors",
    "pytorch_model_fsdp_0/__0_0.distcp", "runs/x.pt", ".cache/x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", STATES)
def test_S2_what_a_trainer_needs_is_left_alone(file, tmp_path):
    case = Case(tmp_path, "custom")
    plain = case.merged("plain")
    path = case.adapter / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({"v_head.summary.weight": torch.ones(2, 2)}, path)
    elif file.endswith(".bin"):
        torch.save({"v_head.summary.weight": torch.ones(2, 2)}, path)
    else:
        path.write_bytes(b"whatever")
    found = case.merged()
    assert all(reference.same_tensor(found[name], plain[name]) for name in plain)
    assert not case.report["warnings"]


def test_S2_a_state_by_what_is_in_it(tmp_path):
    case = Case(tmp_path, "custom")
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), case.adapter / "something.pt")
    torch.save({"epoch": 3, "args": Path("x")}, case.adapter / "notes.bin")
    state = {"optimizer": optimizer.state_dict(), "model": case.trained, "epoch": 3}
    torch.save(state, case.adapter / "last.pt")
    case.expect(case.trained)


def test_S2_parameters_with_attributes_of_their_own(tmp_path):
    """As parallel trainers mark them; torch pickles these in another way."""
    case = Case(tmp_path, "custom")
    marked: dict[str, Any] = {n: torch.nn.Parameter(t) for n, t in case.trained.items()}
    for number, (name, tensor) in enumerate(marked.items()):
        marked[name] = tensor if number % 2 else tensor.detach()
        marked[name].tensor_model_parallel = False
    put(case.adapter / "non_lora_trainables.bin", marked)
    case.expect(case.trained)


class Turned(torch.Tensor):
    """A tensor of a class that is not torch's own."""


HIDDEN: dict[str, Any] = {
    "two-mappings": lambda t: {"projector": t, "vit": dict(t)},
    "beside-a-tensor": lambda t: {"step": torch.tensor(3), "state_dict": t},
    "list": lambda t: {"weights": [*t.values()]},
    "list-within": lambda t: {"model": {"weights": [*t.values()]}},
    "module": lambda t: {"projector": torch.nn.Linear(2, 2)},
    "numbers": lambda t: dict(enumerate(t.values())),
    "class": lambda t: {n: v.as_subclass(Turned) for n, v in t.items()},
    "conjugated": lambda t: {"x": torch.ones(2, dtype=torch.complex64).conj()},
    "sparse": lambda t: {n: v.float().to_sparse() for n, v in t.items()},
    "one-of-many": lambda t: t | {"x": [torch.ones(2)]},
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_S2_tensors_that_have_no_name_are_not_passed_over(kind, tmp_path):
    case = Case(tmp_path, "custom")
    put(case.adapter / "non_lora_trainables.bin", HIDDEN[kind](case.trained))
    with pytest.raises(AdapterError, match=r"non_lora_trainables\.bin"):
        case.merged()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["projector.npz", "parts/projector.pkl", "WEIGHTS.H5"])
def test_S2_a_format_that_is_not_read_is_told(file, tmp_path):
    case = Case(tmp_path, "custom")
    (case.adapter / "parts").mkdir()
    (case.adapter / file).write_bytes(b"whatever")
    case.merged()
    assert any(file in warning for warning in case.report["warnings"])


NOWHERE: dict[str, tuple[str, Any, str]] = {
    "no-such-module": (
        "non_lora_trainables.bin",
        {"base_model.model.model.mm_projector.0.weight": torch.ones(2, 2)}, "1 tensor ",
    ),
    "vllm": (
        "new_embeddings.safetensors",
        {"input_embeddings": torch.ones(3, 64), "output_embeddings": torch.ones(3, 64)}, "2 tensors",
    ),
    "other-shape": ("vit.safetensors", {"mlp1.1.weight": torch.ones(3, 3)}, "mlp1.1.weight"),
    "other-update": (
        "more.safetensors",
        {"language_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 64),
         "language_model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 8)}, "2 tensors",
    ),
    "merged-already": (
        "pytorch_model.bin",
        {"language_model.model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64).bfloat16()},
        "q_proj",
    ),
    "integers": ("vit.safetensors", {"mlp1.1.bias": torch.ones(64, dtype=torch.int64)}, "I64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOWHERE)
def test_S2_without_a_place_the_file_is_named(kind, tmp_path, cli):
    case = Case(tmp_path, "custom")
    file, content, expected = NOWHERE[kind]
    put(case.adapter / file, content)
    before = reference.digests(tmp_path)
    for more in ([], ["--dry-run"]):
        done = cli("merge-lora", "--base", case.base, "--adapter", case.adapter,
                   "--output", tmp_path / "out", *more)  # fmt: skip
        assert done.code == 4, done.err
        assert file in done.err
        assert expected in done.err
    assert reference.digests(tmp_path) == before


@pytest.mark.parametrize("how", ["garbage", "legacy", "cut", "lfs"])
def test_S2_what_cannot_be_read_is_named(how, tmp_path):
    case = Case(tmp_path, "custom")
    path = case.adapter / "non_lora_trainables.bin"
    torch.save(case.trained, path, _use_new_zipfile_serialization=how != "legacy")
    if how == "garbage":
        path.write_bytes(b"garbage")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    if how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(AdapterError, match=r"non_lora_trainables\.bin"):
        case.merged()


def test_S2_a_weight_can_not_scale_what_replaces(tmp_path):
    case = Case(tmp_path, "custom")
    put(case.adapter / "vit.safetensors", case.trained)
    with pytest.raises(AdapterError, match="weight 1"):
        case.merged(weight=[0.5])


def test_S2_an_adapter_of_its_own_in_a_folder_below_is_told(tmp_path):
    case = Case(tmp_path, "custom")
    (case.adapter / "reference").mkdir()
    for file in case.adapter.glob("adapter_*"):
        (case.adapter / "reference" / file.name).write_bytes(file.read_bytes())
    case.merged()
    assert any("'reference'" in warning for warning in case.report["warnings"])


def test_S2_resized_tables_beside_the_adapter(tmp_path):
    """As LongLoRA saves them: the vocabulary grows, and the config says so."""
    case = Case(tmp_path, "custom")
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    rows = case.weights[names[0]].shape[0] + 3
    content = {
        n: reference.normal((rows, case.weights[n].shape[1]), 1, seed=9).bfloat16() for n in names
    }
    put(case.adapter / "trainable_params.bin", {PREFIX + n: t for n, t in content.items()})
    found = case.merged()
    assert all(reference.same_tensor(found[n], content[n]) for n in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["llm_config"]["vocab_size"] == rows


def test_S2_inspect_and_verify_look_at_it(tmp_path):
    case = Case(tmp_path, "custom")
    put(case.adapter / "vit.safetensors", case.trained)
    assert "vit.safetensors" in inspect(case.adapter)["files"]
    assert any("vit.safetensors" in warning for warning in inspect(case.adapter)["warnings"])
    assert verify(case.adapter)["checked"]["tensors"] > len(case.trained)
    broken = dict(case.trained)
    name = next(iter(broken))
    broken[name] = torch.full_like(broken[name], float("nan"))
    put(case.adapter / "vit.safetensors", broken)
    with pytest.raises(VerificationError, match="NaN"):
        verify(case.adapter)
    with pytest.raises(AdapterError, match="NaN"):
        case.merged()


@pytest.mark.parametrize("how", ["same", "other", "more"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "vit.safetensors"])
def test_S2_beside_a_training_checkpoint(file, prefix, how, tmp_path, cli):
    """Its weights are all inside: other values for the same names are refused, unknown names told."""
    case = Case(tmp_path, "custom")
    wrap_lora(base=case.base, output=tmp_path / "wrapped", llm_r=4)
    weights = reference.read(tmp_path / "wrapped")
    filled = {n: t + (1 if ".lora_B." in n else 0) for n, t in weights.items()}
    save_file(filled, tmp_path / "wrapped" / "model.safetensors")
    content = {name: case.weights[name] for name in case.trained}
    content |= {"same": {}, "other": case.trained, "more": {"x.y": torch.ones(2)}}[how]
    put(tmp_path / "wrapped" / file, {prefix + name: t for name, t in content.items()})
    done = cli("merge-lora", tmp_path / "wrapped", "--output", tmp_path / "out", "--json")
    assert done.code == (4 if how == "other" else 0), done.err
    if how == "other":
        assert file in done.err
        assert "6 tensors" in done.err
        return
    told = [warning for warning in json.loads(done.out)["warnings"] if file in warning]
    assert bool(told) == (how == "more")


@pytest.mark.parametrize("name", ["vit.safetensors", "extra.bin", "adapter_model.safetensors"])
def test_weights_beside_a_base_are_told(name, tmp_path):
    """The rule for checkpoints: what the index does not name is no part of it, and said."""
    case = Case(tmp_path, "custom")
    put(case.base / name, case.trained)
    case.merged()
    assert any(f"'{name}'" in warning for warning in case.report["warnings"])
    assert any(f"'{name}'" in warning for warning in inspect(case.base)["warnings"])
