"""Adapters saved as `.bin`, hostile ones too."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pairs import LAYER, Pair
from reference import load_file

KEY = f"base_model.model.{LAYER}.q_proj.lora_A.weight"


def whole(pair: Pair) -> dict[str, torch.Tensor]:
    return load_file(pair.adapter / "adapter_model.safetensors")


def rewritten(path: Path, *, compression: int = zipfile.ZIP_STORED, bomb: int = 0) -> None:
    """The same archive, compressed, or with an entry of so many zeros."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        if bomb:
            archive.writestr("archive/data/9", bytes(bomb))


def claims_more(path: Path) -> None:
    """The central directory says that an entry is larger than the whole file."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(content)


def sparse(t: torch.Tensor) -> torch.Tensor:
    return t.to_sparse()


PICKLES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "sparse": lambda p, c: torch.save(c | {KEY: c[KEY].to_sparse()}, p),
    "sparse-csr": lambda p, c: torch.save(c | {KEY: c[KEY].to_sparse_csr()}, p),
    "quantized": lambda p, c: torch.save(
        c | {KEY: torch.quantize_per_tensor(c[KEY].float(), 0.1, 0, torch.qint8)}, p
    ),
    "nested": lambda p, c: torch.save(
        c | {KEY: torch.nested.nested_tensor([c[KEY].float(), c[KEY].float()])}, p
    ),
    "meta": lambda p, c: torch.save(c | {KEY: c[KEY].to("meta")}, p),
    "complex": lambda p, c: torch.save(c | {KEY: c[KEY].to(torch.complex64)}, p),
    "negative-view": lambda p, c: torch.save(c | {KEY: torch.view_as_complex(
        torch.ones(4, 40, 2)).conj().imag}, p),
    "stride-0": lambda p, c: torch.save(c | {KEY: torch.ones(1).expand(10**6, 10**6)}, p),
    "many-views": lambda p, c: torch.save(
        {str(n): torch.ones(2000, 2000).T for n in [0]}
        | {f"{n}": v for n, v in enumerate([torch.ones(1000, 1000).T] * 300)}, p),
    "list": lambda p, c: torch.save(list(c.values()), p),
    "scalar": lambda p, c: torch.save(c | {"epoch": 3}, p),
    "integer-name": lambda p, c: torch.save({0: c[KEY]}, p),
    "long-name": lambda p, c: torch.save(c | {"a" * 2000: c[KEY]}, p),
    "legacy": lambda p, c: torch.save(c, p, _use_new_zipfile_serialization=False),
    "compressed": lambda p, c: (torch.save(c, p), rewritten(p, compression=zipfile.ZIP_DEFLATED)),
    "bomb": lambda p, c: (
        torch.save(c, p), rewritten(p, compression=zipfile.ZIP_DEFLATED, bomb=300_000_000),
    ),
    "claims-more": lambda p, c: (torch.save(c, p), claims_more(p)),
    "script": lambda p, c: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
    "empty": lambda p, c: p.write_bytes(b""),
    "empty-zip": lambda p, c: zipfile.ZipFile(p, "w").close(),
    "cut": lambda p, c: (torch.save(c, p), p.write_bytes(p.read_bytes()[:-100])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_are_no_plain_tensors(kind, pair, refused):
    PICKLES[kind](pair.adapter / "adapter_model.bin", whole(pair))
    (pair.adapter / "adapter_model.safetensors").unlink()
    refused(4 if kind == "complex" else 3, "adapter_model.bin")


def test_views_and_shared_tensors_are_read(pair, cli):
    """Not contiguous, or sharing a storage, is nothing bad."""
    content = {key: value.T.contiguous().T for key, value in whole(pair).items()}
    assert not content[KEY].is_contiguous()
    cli(*pair.command)
    expected = reference.read(pair.output)
    (pair.adapter / "adapter_model.safetensors").unlink()
    torch.save(content, pair.adapter / "adapter_model.bin")
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 0, outcome.err
    found = reference.read(pair.output)
    assert all(reference.same_tensor(found[name], expected[name]) for name in expected)
