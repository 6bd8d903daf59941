"""Files of torch are read in place, without torch: what it reads of them, and nothing hostile."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch

from streamshard.checkpoint import pickle_program
from streamshard.checkpoint.pickle_program import PickleError, Unknown, run_program
from streamshard.checkpoint.pickled import look_into, read_pickled
from streamshard.checkpoint.weight_files import open_weights, read_weights
from streamshard.disk.files import Files
from streamshard.errors import InputError
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


def content(tensor: Lazy) -> bytes:
    with contextlib.closing(Files()) as files:
        out = np.empty(tensor.nbytes, np.uint8)
        if tensor.nbytes:
            tensor.fill(0, tensor.rows, out, Workspace(files))
    return out.tobytes()


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, also of a view."""
    return reference.bits(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()))


def model() -> dict[str, Any]:
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "plain": values, "rows": values[1:3], "scalar": torch.tensor(3), "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(values * 2), "turned": values.T, "columns": values[:, 2:4],
        "same": values, "one": values[:1, :1].T,
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_and_views_of_tensors(protocol, tmp_path):
    torch.save(model(), tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_pickled(tmp_path / "x.bin")
    assert found.keys() == model().keys()
    for name, tensor in model().items():
        assert found[name].shape == tuple(tensor.shape)
        assert content(found[name]) == bits(tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, tmp_path):
    raw = torch.arange(64, dtype=torch.uint8) % 2
    tensor = raw.view(dtype) if dtype != torch.bool else raw.bool()
    torch.save({"a": tensor, "b": tensor[2:]}, tmp_path / "x.bin")
    found = read_pickled(tmp_path / "x.bin")
    assert content(found["a"]) == raw.numpy().tobytes()
    assert content(found["b"]) == bits(tensor[2:])


def test_a_state_dict_of_a_module(tmp_path):
    """An ordered mapping with attributes of its own, counters among its values."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    found = read_pickled(tmp_path / "x.bin")
    assert {n: content(t) for n, t in found.items()} == {
        n: reference.bits(t) for n, t in module.state_dict().items()
    }


def test_nothing_that_is_named_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self):
            return (open, ("made", "w"))

    torch.save({"a": torch.ones(2), "x": Evil(), "y": {"z": Evil()}}, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"'x' is .*open"):
        read_pickled(tmp_path / "x.bin")
    assert [*look_into(tmp_path / "x.bin")] == ["a"]
    assert not (tmp_path / "made").exists()


PROGRAMS = {
    "memo-bomb": b"\x80\x02}" + b"r\xff\xff\xff\xff" + b".",
    "long-text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "pops-too-much": b"\x80\x02000.",
    "no-mark": b"\x80\x02K\x01t.",
    "no-end": b"\x80\x02}",
    "empty": b"",
    "huge-number": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "unknown-step": b"\x80\x02Ibad\n.",
    "extension": b"\x80\x02\x82\x01.",
    "calls-a-number": b"\x80\x02K\x01K\x02R.",
    "items-of-a-number": b"\x80\x02K\x01(K\x01K\x02u.",
    "odd-items": b"\x80\x02}(K\x01u.",
    "storage-of-one": b"\x80\x02K\x01\x85Q.",
    "not-utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "no-line": b"\x80\x02c" + b"a" * 5000,
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_that_torch_does_not_write(kind):
    tracemalloc.start()
    began = time.thread_time()
    with contextlib.suppress(PickleError):
        found = run_program(PROGRAMS[kind])
        assert found == {}, kind
    assert time.thread_time() - began < 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    "step", [b"(", b"}", b")", b"N", b"K\x01", b"}q\x00", b"}r\x00\x00\x00\x00", b")\x85"], ids=repr
)
def test_a_long_program_ends(step, monkeypatch):
    """After so many steps, of which none costs much memory; nesting is no recursion."""
    monkeypatch.setattr(pickle_program, "MAX_STEPS", 100_000)
    program = b"\x80\x02" + step * 100_000
    tracemalloc.start()
    with pytest.raises(PickleError, match="steps"):
        run_program(program)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_nested_values_are_neither_hashed_nor_walked():
    deep = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."
    assert len(run_program(deep)) == 1
    doubled = b"\x80\x02}" + b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00K\x01s."
    assert len(run_program(doubled)) == 1


def test_unknown_things_are_told_by_their_names():
    program = pickle.dumps({"a": Counter, "b": {"c": Path}}, protocol=2)
    found = run_program(program)
    assert found == {"a": Unknown("collections.Counter"), "b": {"c": Unknown("pathlib.Path")}}


def archive(path: Path, **changed: bytes | None) -> None:
    """A file of torch with some entries exchanged, or left out."""
    torch.save(model(), path)
    with zipfile.ZipFile(path) as given:
        entries = {name: given.read(name) for name in given.namelist()}
    with zipfile.ZipFile(path, "w") as made:
        for name, data in entries.items():
            new = changed.get(name.rpartition("/")[2].removeprefix("."), data)
            if new is not None:
                made.writestr(name, new)


BROKEN: dict[str, Any] = {
    "no-program": {"pkl": None, "data.pkl": None},
    "another-order": {"byteorder": b"big"},
    "short-data": {"0": b"1234"},
    "long-data": {"0": bytes(200)},
    "no-data": {"0": None},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_archives_that_lack_something(kind, tmp_path):
    archive(tmp_path / "x.bin", **BROKEN[kind])
    with pytest.raises(InputError, match=r"x\.bin"):
        read_pickled(tmp_path / "x.bin")


def test_any_writer_of_zip_archives_will_do(tmp_path):
    archive(tmp_path / "x.bin")
    assert content(read_pickled(tmp_path / "x.bin")["plain"]) == bits(model()["plain"])


@pytest.mark.parametrize("claim", [2**32 - 2, 2**31, 70_000_000])
def test_a_directory_that_claims_much_is_not_read(claim, tmp_path):
    file = tmp_path / "x.bin"
    torch.save(model(), file)
    data = bytearray(file.read_bytes())
    at = data.rfind(b"PK\6\6")  # torch always writes the wide form, too
    data[at + 40 : at + 48] = struct.pack("<Q", claim)
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match="directory"):
        read_pickled(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_file_of_many_tensors_is_read_in_little_time(tmp_path):
    tensors = {f"language_model.layers.{n}.experts.weight": torch.ones(1) for n in range(5000)}
    torch.save(tensors, tmp_path / "x.bin")
    began = time.thread_time()
    assert len(read_pickled(tmp_path / "x.bin")) == 5000
    assert time.thread_time() - began < 30


@pytest.mark.parametrize("seed", range(4))
def test_changed_files_are_read_as_torch_does_or_not_at_all(seed, tmp_path):
    """A byte or some are changed anywhere: never another error, never other values than torch has."""
    file = tmp_path / "x.bin"
    torch.save(model(), file)
    whole = file.read_bytes()
    rng = random.Random(seed)
    read = 0
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice(
                [0, 1, 0x2E, 0x80, 0xFF, rng.randrange(256)]
            )
        file.write_bytes(data[: rng.choice([len(data)] * 9 + [rng.randrange(len(data))])])
        try:
            found = read_pickled(file)
        except InputError:
            continue
        read += 1
        values = {name: content(tensor) for name, tensor in found.items()}
        try:
            theirs = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
            expected = {name: bits(t) for name, t in theirs.items()}
        except Exception:  # noqa: BLE001 - torch compares more of the archive
            continue
        assert values == expected
    assert read > 5


KINDS: dict[str, tuple[bytes, str]] = {
    "website": (b"\n<!DOCTYPE html><html>" + bytes(99), "website"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "compressed"),
    "gguf": (b"GGUF\x03" + bytes(99), "GGUF"),
    "zeros": (bytes(5000), "not finished"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(99), "git lfs pull"),
}


@pytest.mark.parametrize("end", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_part_4_a_file_of_another_kind_is_told_as_that(kind, end, tmp_path):
    content, expected = KINDS[kind]
    (tmp_path / f"x{end}").write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        read_weights(tmp_path / f"x{end}")
    assert "python -c" not in str(caught.value)


def test_part_4_each_format_under_the_name_of_the_other(tmp_path):
    torch.save(model(), tmp_path / "x.safetensors")
    reference.save_file({"a": torch.ones(2)}, tmp_path / "x.bin", {"format": "pt"})
    for name, expected in (("x.safetensors", r"zip.*\.bin"), ("x.bin", r"safetensors.*\.safet")):
        with pytest.raises(InputError, match=expected):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "expected"), [(["m.pt"], "give that"), (["a.bin", "b.bin"], "index")]
)
def test_part_4_a_folder_of_torch_files_of_other_names(names, expected, tmp_path):
    for name in [*names, "optimizer.pt"]:
        torch.save(model(), tmp_path / name)
    with pytest.raises(InputError, match=expected) as caught:
        open_weights(tmp_path)
    assert names[0] in str(caught.value)
    assert "optimizer" not in str(caught.value)
