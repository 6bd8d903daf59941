"""Written files against those of the official writers, and the same bytes however it is done."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
import reference
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from make_checkpoint import write_adapter, write_checkpoint
from reference import INDEX, load_file

from streamshard import StreamshardError, merge_lora
from streamshard.engine.lanes import STRETCH_BYTES, ordered
from streamshard.engine.shard_task import Member
from streamshard.engine.writer import NOTED_BYTES
from streamshard.tensors.computed import Computed
from streamshard.tensors.lazy import Stored
from streamshard.tensors.low_rank import LowRank

LAYER = "language_model.model.layers.0.mlp"
WIDE = f"{LAYER}.down_proj.weight"


def many_dtypes() -> reference.Tensors:
    """Tensors of every dtype that torch and safetensors share, with awkward names and shapes."""
    odd: reference.Tensors = {
        "ä.weight": reference.normal((3, 5), 1, seed=1, dtype="F16"),
        "日本.bias": reference.normal((7,), 1, seed=2),
        'quote"\\and\nnewline': reference.normal((2, 2), 1, seed=3),
        "": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "cube": torch.arange(60, dtype=torch.int16).reshape(3, 4, 5),
        "double": reference.normal((4,), 1, seed=4).double(),
        "float8": reference.normal((5,), 1, seed=5).to(torch.float8_e4m3fn),
        "complex": torch.complex(torch.ones(2), torch.zeros(2)),
        "B": torch.arange(3, dtype=torch.uint8),
        "b": torch.arange(3, dtype=torch.int8),
    }
    return odd


@pytest.fixture
def mixed(tmp_path):
    """A base of three shards with many dtypes, one adapted weight, and its adapter."""
    odd = list(many_dtypes().items())
    base = reference.save_checkpoint(
        tmp_path / "base",
        dict(odd[:5]),
        dict(odd[5:]) | {WIDE: reference.normal((70, 33), 0.1, seed=6, dtype="BF16")},
        {"only.empty": torch.zeros(0, 2, dtype=torch.float16), "and": torch.zeros(3, 0)},
    )
    return base, one_pair(tmp_path / "adapter", 70, 33)


def one_pair(folder: Path, rows: int, columns: int, r: int = 4) -> Path:
    stem = f"base_model.model.{WIDE.removesuffix('.weight')}"
    pair = {
        f"{stem}.lora_A.weight": reference.normal((r, columns), 1, seed=7),
        f"{stem}.lora_B.weight": reference.normal((rows, r), 0.01, seed=8),
    }
    return reference.save_adapter(folder, pair, r=r, lora_alpha=2 * r)


def assert_official(file: Path) -> None:
    """The file is what the official writer makes of its content."""
    assert file.read_bytes() == safetensors.torch.save(load_file(file), {"format": "pt"})


def files(folder: Path) -> dict[str, bytes]:
    """Weights and index."""
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.suffix == ".safetensors" or p.name == INDEX
    }


def test_files_are_those_of_save_file(mixed, tmp_path):
    base, adapter = mixed
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    for name in names:
        assert_official(tmp_path / "out" / name)
        assert set(load_file(tmp_path / "out" / name)) == set(load_file(base / name))
    reference.assert_merged(
        reference.read(tmp_path / "out"), reference.read(base), reference.updates_of(adapter)
    )
    old, new = (json.loads((f / INDEX).read_text()) for f in (base, tmp_path / "out"))
    assert new["weight_map"] == old["weight_map"]


@pytest.mark.parametrize(("size", "least"), [("1KB", 30), ("50KB", 5), ("1GB", 1)])
def test_resharding_is_that_of_huggingface_hub(size, least, tmp_path):
    """Names, split, headers and the map are those of `save_torch_state_dict`."""
    base = tmp_path / "base"
    write_checkpoint(base, "tiny-llama", layout="custom")
    write_adapter(tmp_path / "adapter", "tiny-llama", layout="custom", targets="all")
    output = tmp_path / "out"
    merge_lora(base=base, adapter=tmp_path / "adapter", output=output, max_shard_size=size)
    content = reference.read(output)
    in_file_order = {name: content[name] for name in load_file(base / "model.safetensors")}
    peer = tmp_path / "peer"
    peer.mkdir()
    save_torch_state_dict(in_file_order, peer, max_shard_size=size, safe_serialization=True)
    ours, theirs = files(output), files(peer)
    assert sorted(ours) == sorted(theirs)
    assert len(ours) >= least
    for name in ours:
        if name != INDEX:
            assert ours[name] == theirs[name]
            continue
        one, other = json.loads(ours[name]), json.loads(theirs[name])
        assert one["weight_map"] == other["weight_map"]
        assert one["metadata"]["total_size"] == other["metadata"]["total_size"]
        parameters = sum(t.numel() for t in content.values())
        assert one["metadata"] == {
            "total_parameters": parameters,
            "total_size": sum(t.nbytes for t in content.values()),
        }


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base whose tensors are cut into several units of work, and a pair on the largest."""
    folder = tmp_path_factory.mktemp("large")
    base = reference.save_checkpoint(
        folder / "base",
        {WIDE: reference.normal((2500, 2100), 0.02, seed=1, dtype="BF16")},
        {
            "language_model.lm_head.weight": reference.normal((900, 5000), 1, seed=2, dtype="F16"),
            "mlp1.1.weight": reference.normal((300, 300), 1, seed=3),
        },
    )
    adapter = one_pair(folder / "adapter", 2500, 2100, r=16)
    report = merge_lora(base=base, adapter=adapter, output=folder / "out", workers=1)
    return base, adapter, folder / "out", report


WAYS = [
    {"workers": 1},
    {"workers": 2},
    {"workers": 3},
    {"workers": 4},
    {"max_memory": "70MB"},
    {"workers": 4, "max_memory": "60MB"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_files_however_they_are_written(way, large, tmp_path):
    base, adapter, expected, report = large
    found = merge_lora(base=base, adapter=adapter, output=tmp_path / "out", **way)
    assert files(tmp_path / "out") == files(expected)
    for key in ("sum", "global", "per_parameter", "compared"):
        assert found["l2"][key] == report["l2"][key]


def test_the_same_files_without_the_compiled_kernel(large, tmp_path, monkeypatch):
    base, adapter, expected, report = large
    monkeypatch.setenv("STREAMSHARD_KERNEL", "numpy")
    found = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert files(tmp_path / "out") == files(expected)
    assert found["l2"]["global"] == pytest.approx(report["l2"]["global"], rel=1e-9)


@pytest.mark.parametrize("size", [1000, "100KB", "9MB", "12MB", "5GB"])
def test_the_same_tensors_however_they_are_sharded(size, large, tmp_path):
    base, adapter, expected, report = large
    found = merge_lora(
        base=base, adapter=adapter, output=tmp_path / "out", max_shard_size=size, workers=3
    )
    ours, theirs = reference.read(tmp_path / "out"), reference.read(expected)
    assert set(ours) == set(theirs)
    assert all(reference.same_tensor(ours[name], theirs[name]) for name in ours)
    assert found["l2"]["sum"] == pytest.approx(report["l2"]["sum"], rel=1e-15)
    content = {
        name: theirs[name] for name in (WIDE, "mlp1.1.weight", "language_model.lm_head.weight")
    }
    split = split_torch_state_dict_into_shards(content, max_shard_size=size)
    assert set(split.filename_to_tensors) == {
        p.name for p in (tmp_path / "out").glob("*.safetensors")
    }
    for file, names in split.filename_to_tensors.items():
        assert_official(tmp_path / "out" / file)
        assert set(load_file(tmp_path / "out" / file)) == set(names)


def test_numbers_of_the_large_merge(large):
    base, adapter, output, report = large
    content, written = reference.read(base), reference.read(output)
    reference.assert_merged(written, content, reference.updates_of(adapter))
    # The distance is summed over several units of work.
    assert content[WIDE].nbytes > NOTED_BYTES
    change = reference.double(written[WIDE]) - reference.double(content[WIDE])
    assert report["l2"]["global"] == pytest.approx(math.sqrt((change**2).sum()), rel=1e-6)


def test_a_budget_too_small_for_one_worker(large, tmp_path):
    base, adapter, _, _ = large
    with pytest.raises(StreamshardError, match="`max_memory`") as raised:
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", max_memory="20MB")
    assert raised.value.exit_code == 2


def test_a_budget_limits_the_workers(large, tmp_path):
    base, adapter, _, _ = large
    plans = [
        merge_lora(
            base=base, adapter=adapter, output=tmp_path / "o", workers=4, max_memory=m, dry_run=True
        )["plan"]
        for m in (None, "100MB", "60MB")
    ]
    counts = [plan["workers"] for plan in plans]
    assert counts[0] == 4 > counts[2] >= 1
    assert counts[1] >= counts[2]
    assert plans[2]["memory_bytes"] <= 60_000_000


def test_one_shard_is_one_file_without_an_index(pair):
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, max_shard_size="1GB")
    assert [*files(pair.output)] == ["model.safetensors"]
    assert_official(pair.output / "model.safetensors")


def test_a_single_file_of_any_name_becomes_the_usual_one(pair, tmp_path):
    content = reference.read(pair.base)
    base = reference.save_checkpoint(tmp_path / "one", content)
    (base / "model.safetensors").rename(base / "weights.safetensors")
    merge_lora(base=base, adapter=pair.adapter, output=pair.output)
    assert [*files(pair.output)] == ["model.safetensors"]
    merge_lora(base=base / "weights.safetensors", adapter=pair.adapter, output=tmp_path / "bare")
    # What lies beside it goes with it, if a config does.
    assert files(tmp_path / "bare") == files(pair.output)
    names = ["README.md", "config.json", "model.safetensors", "streamshard.json"]
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == names
    alone = tmp_path / "alone" / "weights.safetensors"
    alone.parent.mkdir()
    (base / "weights.safetensors").rename(alone)
    merge_lora(base=alone, adapter=pair.adapter, output=tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["README.md", *names[2:]]


def test_metadata_is_kept_and_completed(pair, tmp_path):
    content = reference.read(pair.base)
    base = reference.save_checkpoint(tmp_path / "one", content, metadata={"made by": "ä"})
    merge_lora(base=base, adapter=pair.adapter, output=pair.output)
    with safetensors.safe_open(pair.output / "model.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "ä"}


def test_the_index_is_formatted_as_transformers_does(pair):
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    content = reference.read(pair.output)
    expected = {
        "metadata": {
            "total_parameters": sum(t.numel() for t in content.values()),
            "total_size": sum(t.nbytes for t in content.values()),
        },
        "weight_map": json.loads((pair.base / INDEX).read_text())["weight_map"],
    }
    text = json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert (pair.output / INDEX).read_text() == text


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_modes_follow_the_umask(umask, pair):
    before = os.umask(umask)
    try:
        merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    finally:
        os.umask(before)
    for path in pair.output.iterdir():
        if path.name != "tokenizer_config.json":  # copies may keep the mode of their source
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE(pair.output.stat().st_mode) == 0o777 & ~umask


def test_progress_counts_every_byte_once(large, tmp_path):
    base, adapter, _, _ = large
    seen: list[tuple[int, str]] = []
    plans = []
    merge_lora(
        base=base,
        adapter=adapter,
        output=tmp_path / "out",
        workers=2,
        progress=lambda nbytes, name: seen.append((nbytes, name)),
        on_plan=plans.append,
    )
    content = reference.read(tmp_path / "out")
    for name, tensor in content.items():
        assert sum(nbytes for nbytes, seen_name in seen if seen_name == name) == tensor.nbytes
    assert {name for _, name in seen} == set(content)
    (plan,) = plans
    assert plan.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_an_error_in_progress_stops_the_run(pair):
    def fail(nbytes: int, name: str) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, progress=fail)
    assert [*pair.output.parent.iterdir()] == []


def test_what_lies_beside_the_weights(pair):
    """Everything a loadable folder needs, byte for byte; nothing of the old weights."""
    keep = {
        "config.json": (pair.base / "config.json").read_bytes(),
        "tokenizer_config.json": (pair.base / "tokenizer_config.json").read_bytes(),
        "generation_config.json": b"{ }",
        "tokenizer.model": bytes(range(256)),
        "chat_template.jinja": b"{{ x }}\r\n",
        "modeling_internvl_chat.py": b"raise SystemExit('executed')\n",
        "examples/image1.jpg": b"\xff\xd8",
        "README.md": "ä".encode("latin-1"),
        ".gitattributes": b"* text\n",
        "adapter_notes.py": b"# remote code may have any name\n",
    }
    drop = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.pth", "model.gguf",
        "optimizer.pt", "adapter_model.safetensors", "adapter_config.json", "streamshard.json",
        "trainer_state.json", ".git/config", ".cache/huggingface/x", "checkpoint-10/config.json",
        "__pycache__/modeling.pyc", "flax_model.msgpack", "tf_model.h5", "old/model.safetensors",
        "stray.safetensors", "model.fp16.safetensors.index.json",
    ]  # fmt: skip
    for name, data in (keep | dict.fromkeys(drop, b"x")).items():
        (pair.base / name).parent.mkdir(parents=True, exist_ok=True)
        (pair.base / name).write_bytes(data)
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, card="base")
    found = {
        p.relative_to(pair.output).as_posix(): p.read_bytes()
        for p in pair.output.rglob("*")
        if p.is_file()
    }
    weights = set(files(pair.output))
    assert set(found) - weights - {"streamshard.json"} == set(keep)
    assert {name: found[name] for name in keep} == keep


def test_a_base_in_the_cache_of_the_hub(pair, tmp_path):
    """Snapshots are links to blobs; the output has files of its own."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(pair.base.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    merge_lora(base=snapshot, adapter=pair.adapter, output=pair.output)
    merge_lora(base=pair.base, adapter=pair.adapter, output=tmp_path / "plain")
    assert files(pair.output) == files(tmp_path / "plain")
    assert not any(path.is_symlink() for path in pair.output.iterdir())
    assert (pair.output / "tokenizer_config.json").exists()


def stored(name: str, nbytes: int) -> Member:
    return Member(name, 0, Stored("f", 0, (nbytes,), "U8", nbytes))


def added(name: str) -> Member:
    pair = LowRank(Stored("a", 0, (1, 4), "F32", 16), Stored("b", 0, (4, 1), "F32", 16), 1.0, 0, 4)
    source = Stored("f", 0, (4, 4), "BF16", 32)
    return Member(name, 0, Computed(source, (pair,), "BF16", (4, 4)))


def test_one_worker_copies_long_stretches_while_others_compute():
    half = STRETCH_BYTES // 2
    members = [stored("norm", 8), added("q"), stored("bias", 8), added("k")]
    members += [stored("vision.0", half), stored("vision.1", half), stored("vision.2", 8)]
    nobody = iter([True, False, True, False, True])
    assert [*ordered(members, lambda: next(nobody))] == [
        *((4, True), (0, False), (5, True), (1, False), (6, True), (2, False), (3, False))
    ]
