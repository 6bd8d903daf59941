"""A small run of the fuzzer of headers, and whether it would notice what it looks for."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest

import streamshard.checkpoint.header
from streamshard.errors import InputError

BENCH = Path(__file__).parents[2] / "bench" / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", BENCH)
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.mark.parametrize(("count", "large"), [(3000, 0), (40, 1)], ids=["small", "large"])
def test_no_violation(count, large):
    result = fuzz.run(count, 7, large, 2_000_000, verbose=False)
    assert result["violations"] == []
    assert result["files"] == count
    assert result["only they refuse"] == 0
    if not large:
        assert min(result["both accept"], result["both refuse"], result["only we refuse"]) > 50


def test_the_same_seed_gives_the_same_files():
    assert [fuzz.mutant(1, n, 0) for n in range(50)] == [fuzz.mutant(1, n, 0) for n in range(50)]
    assert fuzz.mutant(1, 2, 0) != fuzz.mutant(2, 2, 0)


def problems(path: Path, numbers: range) -> list[str]:
    found: list[str] = []
    for number in numbers:
        path.write_bytes(fuzz.mutant(0, number, 0))
        found += fuzz.judged(fuzz.ours(path), fuzz.official(path))[1]
    return found


def test_a_parser_that_takes_too_much_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        streamshard.checkpoint.header, "_is_size", lambda value: isinstance(value, int)
    )
    found = problems(tmp_path / "x.safetensors", range(1000))
    assert "our parser alone: takes what safetensors refuses" in found


def test_a_parser_that_reads_something_else_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        streamshard.checkpoint.header, "_checked_metadata", lambda path, metadata: {"a": "b"}
    )
    found = problems(tmp_path / "x.safetensors", range(100))
    assert "read_header: reads something else than safetensors" in found


def test_a_parser_that_crashes_or_dawdles_is_found(tmp_path, monkeypatch):
    def crash(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(streamshard.checkpoint.header, "_ask_official_parser", crash)
    assert "read_header: MemoryError: " in problems(tmp_path / "x.safetensors", range(100))

    def dawdle(path: Path) -> None:
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass
        raise InputError("slow")

    monkeypatch.setattr(streamshard.checkpoint.header, "_ask_official_parser", dawdle)
    path = tmp_path / "y.safetensors"
    path.write_bytes(b"\x03" + bytes(7) + b"{ }")  # as no writer has it: asked about
    assert "1.1 s" in fuzz.ours(path)["problems"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_counted(tmp_path):
    fuzz.forget_peak()
    before = fuzz.peak_rss()
    content = b"x" * 50_000_000
    after = fuzz.peak_rss()
    assert after - before > 0.9 * len(content)
    del content
    fuzz.forget_peak()
    assert fuzz.peak_rss() < after - 40_000_000
