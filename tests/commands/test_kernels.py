"""The kernel that is asked for is the one that is used, and makes no difference to what is written."""

from __future__ import annotations

import json
from fractions import Fraction

import exactly
import numpy as np
import pytest
import reference
import torch
from exactly import Term

from streamshard import merge_lora
from streamshard.tensors import kernel

NAME = "language_model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("name", ["AVX2", "neon", "avx1024"])
def test_an_unknown_kernel_is_a_usage_error(name, pair, refused, monkeypatch):
    monkeypatch.setenv(kernel.VARIABLE, name)
    refused(2, "STREAMSHARD_KERNEL", name, "auto, avx512, avx2, baseline, numpy")


def test_a_kernel_that_this_machine_has_not_is_one_too(pair, refused, monkeypatch):
    monkeypatch.setattr(kernel, "available", lambda: ("baseline", "numpy"))
    kernel._of.cache_clear()
    monkeypatch.setenv(kernel.VARIABLE, "avx512")
    refused(2, "STREAMSHARD_KERNEL is avx512", "baseline, numpy can be chosen")
    kernel._of.cache_clear()


@pytest.mark.parametrize("name", ["auto", *kernel.available()])
def test_the_report_says_what_was_computed_by_what(name, pair, cli, monkeypatch):
    monkeypatch.setenv(kernel.VARIABLE, name)
    report = json.loads(cli(*pair.command, "--json").out)
    found = report["exactness"]
    assert set(found) == {"elements", "rechecked", "kernel"}
    assert found["kernel"] == (kernel.available()[0] if name == "auto" else name)
    changed = [n for n, t in reference.read(pair.base).items() if n in report_targets(pair)]
    tensors = reference.read(pair.base)
    assert found["elements"] == sum(tensors[n].numel() for n in changed)
    assert 0 <= found["rechecked"] <= found["elements"]
    kept = json.loads((pair.output / "streamshard.json").read_text())
    assert kept["exactness"] == found


def report_targets(pair) -> set[str]:
    before, after = reference.read(pair.base), reference.read(pair.output)
    return {name for name in before if not reference.same_tensor(before[name], after[name])}


def test_a_dry_run_has_computed_nothing(pair, cli):
    assert json.loads(cli(*pair.command, "--dry-run", "--json").out)["exactness"] is None


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp16", "fp32"])
def test_adapters_with_weights_are_summed_exactly(dtype, tmp_path, monkeypatch):
    """Rounded once to what is written, whichever kernel, however many workers."""
    W = reference.normal((33, 70), 0.02, seed=1, dtype="BF16")
    base = reference.save_checkpoint(tmp_path / "base", {f"{NAME}.weight": W})
    terms, folders = [], []
    for number, (r, alpha, weight) in enumerate([(3, 7, 0.7), (5, 4, -1.3)]):
        A = reference.normal((r, 70), 0.1, seed=2 + number)
        B = reference.normal((33, r), 0.1, seed=4 + number)
        stem = f"base_model.model.{NAME}"
        tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        folder = tmp_path / f"adapter{number}"
        folders.append(reference.save_adapter(folder, tensors, r=r, lora_alpha=alpha))
        terms.append(Term(alpha / r, B.numpy(), A.numpy(), weight))
    to = {"keep": "BF16", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    expected = exactly.bits(exactly.merged(W.float().numpy(), terms, to), to).tobytes()
    for name in kernel.available():
        monkeypatch.setenv(kernel.VARIABLE, name)
        for workers in (1, 2, 8):
            output = tmp_path / f"{name}{workers}"
            merge_lora(
                base=base,
                adapter=folders,
                output=output,
                weight=[0.7, -1.3],
                dtype=dtype,
                workers=workers,
            )
            found = reference.read(output)[f"{NAME}.weight"]
            assert reference.bits(found) == expected


def test_overflow_is_refused_after_exact_summing_only(tmp_path):
    """Two adapters whose updates do not fit one by one."""
    W = torch.full((4, 8), 1.5, dtype=torch.bfloat16)
    base = reference.save_checkpoint(tmp_path / "base", {f"{NAME}.weight": W})
    stem = f"base_model.model.{NAME}"
    large = torch.full((4, 1), 2.0**100)
    A = torch.full((1, 8), 2.0**60)
    one = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": large}
    other = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": -large}
    other[f"{stem}.lora_B.weight"][0] = -large[0] * (1 - 2.0**-24)
    folders = [
        reference.save_adapter(tmp_path / name, tensors, r=1, lora_alpha=1)
        for name, tensors in (("one", one), ("other", other))
    ]
    assert Fraction(2) ** 160 * Fraction(2.0**-24) > 2**128, "what is left in the first row"
    with pytest.raises(Exception, match=r"row 0: the merged weight is not finite"):
        merge_lora(base=base, adapter=folders, output=tmp_path / "out")
    tiny = {f"{stem}.lora_A.weight": torch.ones(1, 8), f"{stem}.lora_B.weight": torch.ones(4, 1)}
    fourth = reference.save_adapter(tmp_path / "fourth", tiny, r=1, lora_alpha=1)
    fifth = reference.save_adapter(
        tmp_path / "fifth", one | {f"{stem}.lora_B.weight": -large}, r=1, lora_alpha=1
    )
    merge_lora(base=base, adapter=[folders[0], fifth, fourth], output=tmp_path / "out")
    found = reference.read(tmp_path / "out")[f"{NAME}.weight"]
    np.testing.assert_array_equal(found.float().numpy(), 2.5)
