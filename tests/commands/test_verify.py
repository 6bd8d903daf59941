"""`verify`: everything that can go wrong with a checkpoint on disk is found and named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from pairs import LAYER, Pair
from reference import INDEX, load_file, save_file
from sparse_folders import KEYS
from verify_helpers import FIRST, SECOND, flip, problems

import streamshard
from streamshard.errors import InputError, UsageError, VerificationError
from streamshard.tensors.rounding import count_not_finite

Q = f"{LAYER}.q_proj.weight"


@pytest.fixture
def merged(pair: Pair) -> Path:
    """An output of ours, with digests."""
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, sha256=True)
    return pair.output


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def place(file: Path, name: str) -> int:
    """Where a tensor's bytes begin, from the header as the format describes it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    begin: int = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    return 8 + length + begin


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 4}], ids=str)
def test_what_was_written_is_right(options, merged):
    seen: list[int] = []
    totals: list[int] = []
    report = streamshard.verify(
        merged, progress=lambda n, _: seen.append(n), on_total=totals.append, **options
    )
    loaded = reference.read(merged)
    assert report["recorded"] is True
    assert report["problems"] == report["missing"] == report["different"] == []
    assert report["checked"]["tensors"] == report["tensors"] == len(loaded)
    assert report["checked"]["bytes"] == sum(tensor.nbytes for tensor in loaded.values())
    assert report["checked"]["files"] == len([*merged.iterdir()]) - 1
    # Each file is read again for its SHA-256.
    again = sum(p.stat().st_size for p in merged.iterdir() if p.name != "streamshard.json")
    assert [sum(seen)] == totals == [report["checked"]["bytes"] + again]


def test_every_bit_of_every_tensor_counts(merged):
    for file in (FIRST, SECOND):
        for name, tensor in load_file(merged / file).items():
            begin = place(merged / file, name)
            for where in (begin, begin + tensor.nbytes // 2, begin + tensor.nbytes - 1):
                flip(merged / file, where)
                report = problems(merged)
                assert report["different"] == [name]
                assert any(name in text and file in text for text in report["problems"])
                flip(merged / file, where)
    assert streamshard.verify(merged)["problems"] == []


def test_several_problems_are_all_listed(merged):
    for name in (Q, "vision_model.embeddings.class_embedding"):
        flip(merged / FIRST, place(merged / FIRST, name))
    flip(merged / "tokenizer_config.json", 3)
    report = problems(merged)
    assert report["different"] == sorted([Q, "vision_model.embeddings.class_embedding"])
    assert len(report["problems"]) == 4  # and the SHA-256 of the weight file


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (lambda f: os.truncate(f / SECOND, 500), [SECOND]),
    "appended": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes() + b"x"),
        [SECOND, "appended"],
    ),
    "empty": (lambda f: os.truncate(f / SECOND, 0), [SECOND]),
    "header": (lambda f: flip(f / SECOND, 9), [SECOND]),
    "metadata": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes().replace(b'"pt"', b'"pu"')),
        [SECOND, "header has changed"],
    ),
    "missing file": (lambda f: (f / SECOND).unlink(), [SECOND]),
    "side file": (lambda f: flip(f / "tokenizer_config.json", 5), ["tokenizer_config.json", "changed"]),
    "side file gone": (lambda f: (f / "config.json").unlink(), ["config.json: is missing"]),
    "side file longer": (lambda f: (f / "config.json").write_text("{}  "), ["config.json", "bytes"]),
    "index": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({Q: SECOND})),
        [INDEX],
    ),
    "index gone": (lambda f: (f / INDEX).unlink(), [INDEX]),
    "index garbage": (lambda f: (f / INDEX).write_text("{"), [INDEX, "JSON"]),
    "report garbage": (lambda f: (f / "streamshard.json").write_text("{"), ["streamshard.json"]),
    "digests garbage": (
        lambda f: edit(f / "streamshard.json", lambda r: r.update(digests=[1])),
        ["streamshard.json"],
    ),
    "another algorithm": (
        lambda f: edit(f / "streamshard.json", lambda r: r["digests"].update(algorithm="md5")),
        ["xxh3-128"],
    ),
    "record of a file": (
        lambda f: edit(f / "streamshard.json", lambda r: r["digests"]["files"].update({FIRST: 1})),
        ["broken record"],
    ),
    "record outside": (
        lambda f: edit(
            f / "streamshard.json", lambda r: r["digests"]["files"].update({"../base/x": {"bytes": 1}})
        ),
        ["broken record", "../base/x"],
    ),
    "record of a tensor": (
        lambda f: edit(f / "streamshard.json", lambda r: r["digests"]["tensors"].update({Q: 1})),
        [Q],
    ),
    "sha256": (
        lambda f: edit(
            f / "streamshard.json",
            lambda r: r["digests"]["files"][FIRST].update(sha256="0" * 64),
        ),
        [FIRST, "SHA-256"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what, merged, cli):
    change, expected = DAMAGE[what]
    change(merged)
    report = problems(merged)
    for part in expected:
        assert any(part in text for text in report["problems"]), report["problems"]
    outcome = cli("verify", merged)
    assert outcome.code == 8
    assert expected[0] in outcome.out
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err


def test_an_extra_and_a_missing_tensor(merged):
    content = load_file(merged / FIRST)
    content["extra"] = content.pop(Q)
    save_file(content, merged / FIRST, {"format": "pt"})
    edit(merged / INDEX, lambda i: i["weight_map"].update(extra=i["weight_map"].pop(Q)))
    report = problems(merged)
    assert (report["missing"], report["unexpected"]) == ([Q], ["extra"])
    assert any("'extra'" in text for text in report["problems"])


def test_healthy_files_are_checked_beside_broken_ones(merged):
    os.truncate(merged / SECOND, 100)
    flip(merged / FIRST, place(merged / FIRST, Q))
    report = problems(merged)
    assert report["different"] == [Q]
    assert any(SECOND in text for text in report["problems"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_values_that_are_not_finite(value, pair):
    """Found without any records too, and counted."""
    content = load_file(pair.base / SECOND)
    name = f"{LAYER}.k_proj.weight"
    content[name][3, 7] = value
    content[name][129, 39] = value
    save_file(content, pair.base / SECOND, {"format": "pt"})
    report = problems(pair.base)
    assert report["nonfinite"] == {name: 2}
    assert report["recorded"] is False
    assert any(name in text and "2 values" in text for text in report["problems"])


TORCH_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def patterns(dtype: str) -> np.ndarray:
    """Elements of a dtype, one a row: all of their highest 16 bits, over zeros and over ones."""
    nbytes = torch.tensor([], dtype=TORCH_TYPES[dtype]).element_size()
    if nbytes == 1:
        block = np.arange(256, dtype=np.uint8)
    else:
        # The highest 16 bits hold sign and exponent.
        block = np.zeros((65536 * 2, nbytes), np.uint8)
        block[65536:, :-2] = 255
        high = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
        block[:65536, -2:] = block[65536:, -2:] = high
    return block.reshape(-1, nbytes)


def not_finite(block: np.ndarray, dtype: str) -> int:
    values = torch.from_numpy(block.reshape(-1).copy()).view(TORCH_TYPES[dtype])
    return int((~torch.isfinite(values.to(torch.float64))).sum())


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_the_count_is_that_of_torch(dtype):
    """Of all elements, and of few neighbours, so that none is counted in the place of another."""
    every = patterns(dtype)
    assert count_not_finite(every.reshape(-1), dtype) == not_finite(every, dtype) > 0
    step = max(len(every) // 4096, 1)
    for first in range(0, len(every), step):
        few = every[first : first + step]
        assert count_not_finite(few.reshape(-1), dtype) == not_finite(few, dtype)


def test_integers_are_always_finite():
    block = np.full(64, 255, np.uint8)
    assert {count_not_finite(block, dtype) for dtype in ("I64", "U8", "BOOL", "F4", "I32")} == {0}


# --- any checkpoint -------------------------------------------------------------------------------


def test_without_records_the_rest_is_checked(pair, cli):
    outcome = cli("verify", pair.base)
    assert outcome.code == 0
    assert "no digests are recorded" in outcome.err
    assert "no digests are recorded" in outcome.out
    os.truncate(pair.base / SECOND, 200)
    assert cli("verify", pair.base).code == 8


def test_an_adapter_and_a_bare_file(pair):
    assert streamshard.verify(pair.adapter)["checked"]["tensors"] == 4
    assert streamshard.verify(pair.base / FIRST)["checked"]["tensors"] == 2
    content = load_file(pair.adapter / "adapter_model.safetensors")
    next(iter(content.values()))[0, 0] = float("nan")
    save_file(content, pair.adapter / "adapter_model.safetensors")
    assert len(problems(pair.adapter)["nonfinite"]) == 1
    os.truncate(pair.adapter / "adapter_model.safetensors", 300)
    assert "adapter_model.safetensors" in problems(pair.adapter)["problems"][0]
    os.truncate(pair.base / FIRST, 300)
    problems(pair.base / FIRST)


def test_links_of_a_cache(merged, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0a1b2c", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(merged.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert streamshard.verify(snapshot)["recorded"] is True


@pytest.mark.parametrize("what", ["nothing", "empty", "text"])
def test_what_is_no_checkpoint_at_all(what, tmp_path, cli):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "text":
        path.write_text("x")
    with pytest.raises(InputError):
        streamshard.verify(path)
    assert cli("verify", path).code == 3


# --- a part of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "count"),
    [("50%", 2), ("1%", 1), (3, 3), ("4", 4), ("100%", 4), (99, 4), (" 75 %", None)],
)
def test_a_sample(sample, count, merged):
    if count is None:
        with pytest.raises(UsageError, match="`sample` is"):
            streamshard.verify(merged, sample=sample)
        return
    report = streamshard.verify(merged, sample=sample)
    assert report["checked"]["tensors"] == count


@pytest.mark.parametrize("sample", ["0", "0%", "101%", "x", "-1", "", "1e9"])
def test_samples_that_are_none(sample, merged, cli):
    outcome = cli("verify", merged, "--sample", sample)
    assert outcome.code == 2
    assert "--sample" in outcome.err


def test_samples_differ_and_find_what_they_read(merged):
    flip(merged / FIRST, place(merged / FIRST, Q))
    found = 0
    for _ in range(60):
        with contextlib.suppress(VerificationError):
            streamshard.verify(merged, sample=2)
            continue
        found += 1
    assert 5 < found < 55  # 30 on average


def test_files_beside_the_weights_are_not_left_out(merged):
    flip(merged / "config.json", 1)
    assert problems(merged, sample=1)


# --- the command ----------------------------------------------------------------------------------


def test_the_document(merged, cli):
    outcome = cli("verify", merged, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report.keys() >= KEYS
    assert report["command"] == "verify"
    assert report["output"] is None
    flip(merged / FIRST, -1)
    outcome = cli("verify", merged, "--json")
    assert outcome.code == 8
    report = json.loads(outcome.out)
    assert len(report["different"]) == 1
    assert len(report["problems"]) == 2
    assert "2 problems found" in outcome.err


def test_quiet(merged, cli):
    outcome = cli("verify", merged, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    flip(merged / FIRST, -1)
    outcome = cli("verify", merged, "--quiet")
    assert (outcome.code, outcome.out) == (8, "")
    assert outcome.err.startswith("error: ")


def test_nothing_is_changed(merged, cli):
    shutil.rmtree(merged / "__pycache__", ignore_errors=True)
    before = reference.digests(merged)
    assert cli("verify", merged, "--workers", "2").code == 0
    assert reference.digests(merged) == before
