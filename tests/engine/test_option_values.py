"""R13: sizes and dtypes as people type them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import streamshard
from streamshard.engine.option_values import dtype_option, parse_size
from streamshard.errors import UsageError

SIZES = {
    "5GB": 5 * 10**9, "5 GB": 5 * 10**9, "5gb": 5 * 10**9, "5Gb": 5 * 10**9, "5G": 5 * 10**9,
    "5g": 5 * 10**9, " 5GB ": 5 * 10**9, "5GiB": 5 * 2**30, "5 gib": 5 * 2**30, "5GIB": 5 * 2**30,
    "500MB": 5 * 10**8, "0.5GB": 5 * 10**8, "1.5 KiB": 1536, "2TB": 2 * 10**12, "100kb": 10**5,
    "70000B": 70000, "7 b": 7, "5\u00a0GB": 5 * 10**9,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_R13_sizes(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("number", [1000, 5 * 10**9, 5e9, np.int64(10**6), np.float32(4096)])
def test_R13_numbers_are_bytes_in_python(number):
    assert parse_size(number) == number


@pytest.mark.parametrize("number", [1, 5, 999, 2.5])
def test_numbers_that_nobody_means_as_bytes_ask_for_a_unit(number):
    with pytest.raises(ValueError, match=f'{number} would be bytes; write "{number}GB"'):
        parse_size(number)


@pytest.mark.parametrize("text", ["5", "5000000000", "0.5", " 5 "])
def test_R13_text_without_a_unit_asks_for_one(text):
    with pytest.raises(ValueError, match=f"{text.strip()} has no unit; write {text.strip()}GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "size",
    ["", "0", "GB", "5XB", "-5GB", "5,5GB", "1e9B", "0GB", "0.1B", "9" * 400 + "GB", "5GB GB"],
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"size|disk"):
        parse_size(size)


@pytest.mark.parametrize("size", [0, -1, True, float("nan"), float("inf"), 2**63, [5], b"5GB"])
def test_what_is_no_number_of_bytes(size):
    with pytest.raises(ValueError, match=r"size|disk"):
        parse_size(size)


DTYPE_NAMES = {
    "bf16": ["bf16", "BF16", "bfloat16", "BFloat16", "torch.bfloat16", "Torch.BFLOAT16", " bf16 "],
    "fp16": ["fp16", "FP16", "f16", "F16", "float16", "torch.float16", "half", "torch.half"],
    "fp32": ["fp32", "F32", "float32", "torch.float32", "float", "torch.float", "FLOAT32"],
    "keep": ["keep", "Keep"],
}


@pytest.mark.parametrize(
    ("name", "wanted"), [(name, wanted) for wanted, names in DTYPE_NAMES.items() for name in names]
)
def test_R13_names_of_dtypes(name, wanted):
    assert dtype_option(name) == wanted


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
def test_R13_dtypes_of_torch(wanted):
    """Whatever torch can say of the name of a type is understood, and the type."""
    names = DTYPE_NAMES[wanted]
    types = {getattr(torch, n.removeprefix("torch.")) for n in names if n.startswith("torch.")}
    (dtype,) = types
    assert dtype_option(dtype) == wanted


@pytest.mark.parametrize(
    "name", ["fp8", "float64", "torch.float64", "int8", "torch", "torch.", "", None, "16", "double"]
)
def test_other_dtypes_are_refused(name):
    with pytest.raises(UsageError, match="keep, bf16, fp16, fp32 can be chosen"):
        dtype_option(name)


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16", "Torch.BFloat16"])
def test_R13_a_synonym_gives_the_same_bytes_and_config(name, pair, cli):
    """Also what goes into config.json, and what decides whether a run may be continued."""
    import reference

    streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.root / "out" / "plain", dtype="bf16"
    )
    assert cli(*pair.command, "--dtype", name).code == 0
    ours, same = (reference.digests(pair.root / "out" / side) for side in ("merged", "plain"))
    del ours["streamshard.json"], same["streamshard.json"]
    assert ours == same


@pytest.mark.parametrize("size", ["5KB", "5 KB", "5kb", "0.005MB", "5000 b", "0.0000047GiB"])
def test_R13_sizes_on_the_command_line(size, pair, cli):
    for more in (["--max-shard-size", size], [f"--max_shard_size={size}"]):
        outcome = cli(*pair.command, *more, "--max-memory", "1 GB", "--dry-run", "--json")
        assert outcome.code == 0, outcome.err
        assert len(json.loads(outcome.out)["plan"]["files"]) == 3


@pytest.mark.parametrize("option", ["--max-shard-size", "--max-memory"])
@pytest.mark.parametrize("number", ["5", "5000000000"])
def test_R13_a_bare_number_is_a_usage_error(option, number, pair, refused):
    refused(2, option, f"{number} has no unit", f"{number}GB", more=[option, number])
