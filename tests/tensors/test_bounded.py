"""Memory that does not grow with the length of rows, and the same bytes and sums on that way.

Peaks are those of processes of their own (the `VmHWM` that their reports have). Bases are holes, which
read as zeros and cost no disk, as far as their values do not matter.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import linux, slow

from streamshard import merge_lora
from streamshard.checkpoint.shards import Shard
from streamshard.disk.files import Files
from streamshard.engine.budget import Needs, worker_count
from streamshard.tensors import computed, kernel, numpy_kernel
from streamshard.tensors.comparing import equal_bytes, tensor_distance
from streamshard.tensors.computed import Computed
from streamshard.tensors.constructors import add_low_rank, cast, with_magnitude
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Array, Lazy, Stored, read_float32
from streamshard.tensors.low_rank import Columns, LowRank, Transposed
from streamshard.tensors.rounding import MAX_TERMS, Change, Changes
from streamshard.tensors.workspace import Workspace

LAYER = "language_model.model.layers.0.mlp"
WEIGHT = f"{LAYER}.down_proj.weight"
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
MOST = 160_000_000
LITTLE = 1  # a strip of one tile


def numbers(shape: tuple[int, ...], size: float, seed: int, dtype: str = "F32") -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(size)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


Content = tuple[str, tuple[int, ...], "np.ndarray | None"]


def tensor(shape: tuple[int, ...], size: float, seed: int, dtype: str = "BF16") -> Content:
    return dtype, shape, numbers(shape, size, seed, dtype)


def hole(*shape: int, dtype: str = "BF16") -> Content:
    return dtype, shape, None


def save(file: Path, tensors: Mapping[str, Content]) -> None:
    """A safetensors file; tensors without values are holes."""
    file.parent.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
        for name, (_, _, values) in tensors.items():
            if values is not None:
                out.seek(8 + len(text) + entries[name]["data_offsets"][0])
                values.tofile(out)


def save_base(folder: Path, tensors: Mapping[str, Content]) -> Path:
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text('{"model_type": "internvl_chat"}')
    return folder


def save_adapter(folder: Path, tensors: Mapping[str, Content], r: int, **config: Any) -> Path:
    named = {f"base_model.model.{name}": content for name, content in tensors.items()}
    save(folder / "adapter_model.safetensors", named)
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def pair(rows: int, columns: int, r: int, module: str = f"{LAYER}.down_proj") -> dict[str, Content]:
    return {
        f"{module}.lora_A.weight": tensor((r, columns), 0.05, 1),
        f"{module}.lora_B.weight": tensor((rows, r), 0.05, 2),
    }


def measured(*command: str | Path) -> dict[str, Any]:
    """The report of a command, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "streamshard", *map(str, command), "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- peaks ----------------------------------------------------------------------------------------


def merge(folder: Path, *more: str, verified: bool = False) -> dict[str, Any]:
    """Merge `folder`'s adapter into its base, and hold the peaks against the bound and the estimate."""
    base, out = folder / "base", folder / "out"
    command = [
        "merge-lora",
        "--base",
        base,
        "--adapter",
        folder / "adapter",
        "--output",
        out,
        *more,
    ]
    planned = measured(*command, "--dry-run")
    alone = measured(*command, "--dry-run", "--workers", "1")
    report = measured(*command)
    estimate, peak = planned["plan"]["memory_bytes"], report["peak_rss_bytes"]
    assert max(peak, planned["peak_rss_bytes"]) < MOST
    assert peak < 1.5 * estimate
    # A worker that was late may have found nothing left to do: one of them is sure.
    assert alone["plan"]["memory_bytes"] < 1.5 * peak
    if verified:
        assert measured("verify", out)["peak_rss_bytes"] < MOST
        found = measured("diff", out, base)
        assert found["peak_rss_bytes"] < MOST
        assert len(found["different"]) + len(found["dtypes"]) > 0
    return report


@slow
@linux
@pytest.mark.parametrize(
    ("rows", "columns"),
    # Of 130 x 2,000,000 and 1 x 20,000,000, for which 1.6 and 2.6 GB were taken once, what is enough to
    # break the bound ten times.
    [(130, 600_000), (1, 1_500_000)],
    ids=str,
)
def test_merges_of_long_rows(rows, columns, tmp_path):
    save_base(tmp_path / "base", {WEIGHT: hole(rows, columns)})
    r = 16
    save_adapter(tmp_path / "adapter", pair(rows, columns, r), r)
    merge(tmp_path, verified=True)


@slow
@linux
@pytest.mark.parametrize("shape", [(128, 300_000), (1, 40_000_000), (40_000_000,)], ids=str)
def test_casts_of_long_rows(shape, tmp_path):
    save_base(tmp_path / "base", {"x": hole(*shape), WEIGHT: hole(4, 1000)})
    save_adapter(tmp_path / "adapter", pair(4, 1000, 4), 4)
    merge(tmp_path, "--dtype", "fp32", verified=True)


@slow
@linux
@pytest.mark.parametrize("turned", [False, True], ids=["by row", "by column"])
def test_dora_of_long_rows(turned, tmp_path):
    rows, columns, r = 130, 200_000, 8  # wide enough for many strips
    save_base(tmp_path / "base", {WEIGHT: tensor((rows, columns), 0.02, 3)})
    content = pair(columns, rows, r) if turned else pair(rows, columns, r)
    count = columns if turned else rows
    content[f"{LAYER}.down_proj.lora_magnitude_vector"] = tensor((count,), 0.1, 4)
    save_adapter(tmp_path / "adapter", content, r, use_dora=True, fan_in_fan_out=turned)
    merge(tmp_path, verified=True)


@slow
@linux
def test_what_an_adapter_replaces_may_have_long_rows(tmp_path):
    shape = (3, 4_000_000)
    save_base(tmp_path / "base", {WEIGHT: hole(4, 1000), "norm.weight": hole(*shape)})
    content = pair(4, 1000, 4) | {"norm.weight": tensor(shape, 0.1, 5, "F32")}
    save_adapter(tmp_path / "adapter", content, 4, modules_to_save=["norm"])
    merge(tmp_path)


LARGE = {
    "8": (4096, 4096, 8),
    "64": (2048, 18944, 64),
    "256": (768, 14336, 256),
    "512": (256, 29568, 512),
}


@slow
@linux
@pytest.mark.parametrize("r", LARGE)
def test_high_ranks(r, tmp_path):
    """Two tensors of the columns of 1B to 72B models, so that two workers have one each."""
    rows, columns, rank = LARGE[r]
    names = [f"{LAYER}.{kind}_proj" for kind in ("up", "down")]
    save_base(tmp_path / "base", {f"{name}.weight": hole(rows, columns) for name in names})
    content = pair(rows, columns, rank, names[0]) | pair(rows, columns, rank, names[1])
    save_adapter(tmp_path / "adapter", content, rank, target_modules=["up_proj", "down_proj"])
    merge(tmp_path, "--workers", "2", "--max-memory", "200MB")


@slow
@linux
@pytest.mark.parametrize("r", [16, 128])
def test_fused_experts(r, tmp_path):
    experts = 64
    up, down = (experts, 256, 512), (experts, 512, 128)
    names = [f"{LAYER}.experts.{kind}_proj" for kind in ("gate_up", "down")]
    save_base(tmp_path / "base", {names[0]: hole(*up), names[1]: hole(*down)})
    content = pair(up[1], up[2], r * experts, f"{LAYER}.experts.base_layer")
    content |= pair(down[1], down[2], r * experts, f"{LAYER}.experts")
    targets = [f"mlp.experts.{kind}_proj" for kind in ("gate_up", "down")]
    save_adapter(tmp_path / "adapter", content, r, target_modules=[], target_parameters=targets)
    merge(tmp_path, "--workers", "2", "--max-memory", "200MB")


SHAPES_OF_MODELS = [
    (2048, 768),
    (14336, 4096),
    (4096, 14336),
    (8192, 29568),
    (29568, 8192),
    (151674, 8192),
]


@pytest.mark.parametrize("r", [8, 16, 64, 128, 256, 512])
@pytest.mark.parametrize("dora", [False, True])
def test_a_bound_of_200_mb_is_never_refused(r, dora):
    tensors: dict[str, Lazy] = {}
    for rows, columns in SHAPES_OF_MODELS:
        w, a, b = (Stored("x", 0, s, "BF16", 0) for s in ((rows, columns), (r, columns), (rows, r)))
        term = LowRank(a, b, 1.0, 0, rows)
        vector = Stored("x", 0, (rows,), "F32", 0)
        made = with_magnitude(w, term, vector, by_row=True) if dora else add_low_rank(w, [term])
        tensors[f"{rows}"] = made
        tensors[f"{rows} cast"] = cast(made, "F32")
    needs = Needs.of([Shard("x", tensors, {}, 0)])
    assert worker_count(needs, 8, 200_000_000) >= 2
    assert needs.nbytes(2) < MOST


# --- the same bytes and sums ----------------------------------------------------------------------


def array(shape: tuple[int, ...], size: float, seed: int, dtype: str) -> Array:
    return Array(numbers(shape, size, seed, dtype).reshape(-1).view(np.uint8), shape, dtype)


def made_of(kind: str, rows: int, columns: int, dtype: str, r: int) -> Lazy:
    """A tensor of each kind of node that a merge can make."""
    W = array((rows, columns), 0.1, 1, dtype)
    half = rows // 2
    A, B = array((r, columns), 1, 2, "F32"), array((rows, r), 0.1, 3, dtype)
    term = LowRank(A, B, 0.5, 0, rows)
    if kind == "transposed":
        turned = [array((columns, r), 1, 4, "BF16"), array((r, rows), 0.1, 5, "F32")]
        return add_low_rank(
            W, [LowRank(Transposed(turned[0]), Transposed(turned[1]), 1.0, 0, rows)]
        )
    if kind == "several":
        more = LowRank(
            array((70, columns), 1, 6, "F16"), array((rows, 70), 0.1, 7, "F32"), 2, 0, rows
        )
        return add_low_rank(W, [term, more])
    if kind == "experts":
        left = Columns(array((rows, 3 * r), 0.1, 8, "F32"), 1, 3, r)
        right = Transposed(Columns(array((columns, 2 * r), 1, 9, "F32"), r, 1, r))
        return add_low_rank(W, [LowRank(right, left, 1.0, 0, rows)])
    if kind == "window":
        taller = LowRank(A, array((rows + 201, r), 0.1, 10, "F32"), 0.5, 77, rows + 77)
        return add_low_rank(W, [taller])
    if kind == "joined":
        joined = concat([W.take(half, rows), W.take(0, half)])
        return concat([add_low_rank(joined, [term]).take(1, rows), W.take(0, 1)])
    if kind == "by row":
        return with_magnitude(W, term, array((rows,), 1, 11, "F32"), by_row=True)
    if kind == "by column":
        return with_magnitude(W, term, array((columns,), 1, 12, "F32"), by_row=False)
    return (
        cast(W, "BF16" if dtype == "F32" else "F32") if kind == "cast" else add_low_rank(W, [term])
    )


KINDS = [
    "plain",
    "transposed",
    "several",
    "experts",
    "window",
    "joined",
    "by row",
    "by column",
    "cast",
]


def filled(node: Lazy, work: Workspace, nbytes: int) -> tuple[bytes, Change]:
    """All bytes, and what was changed, window by window."""
    work.changes = Changes()
    item = np.dtype(NUMPY[node.dtype]).itemsize
    whole = np.full(node.nbytes, 0xA5, np.uint8)
    at = 0
    for piece in node.pieces:
        work.forget()
        place = whole[at : at + piece.nbytes].reshape(piece.rows, -1)
        for start, stop, first, last in piece.windows(nbytes):
            out = np.full((stop - start) * (last - first) * item, 0x5A, np.uint8)
            piece.window(start, stop, first, last, out, work)
            place[start:stop, first * item : last * item] = out.reshape(stop - start, -1)
        at += piece.nbytes
    return whole.tobytes(), work.changes.total()


@slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(
    st.integers(2, 300),
    st.one_of(st.integers(1, 5000), st.sampled_from([1024, 1025, 2047, 2049, 3072, 4097])),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.sampled_from([1, 5, 64, 65]),
    st.sampled_from(["keep", "BF16", "F32"]),
    st.data(),
)
def test_strips_give_the_bytes_and_the_sums_of_whole_rows(kind, rows, columns, dtype, r, to, data):
    work = Workspace(Files())
    node = made_of(kind, rows, columns, dtype, r)
    node = node if to == "keep" else cast(node, to)
    with pytest.MonkeyPatch.context() as patch:
        expected, change = filled(node, work, 256 * 1024)
        patch.setattr(computed, "STRIP_NBYTES", data.draw(st.sampled_from([LITTLE, 3_000_000])))
        found, changed = filled(node, work, 256 * 1024)
        assert found == expected
        if kind != "cast":
            assert changed.updated == change.updated
            assert changed.unchanged == change.unchanged
            assert changed.effected == pytest.approx(change.effected, rel=1e-12)
        # Any window, also one that crosses the tiles' edges, and any run of elements.
        item = np.dtype(NUMPY[node.dtype]).itemsize
        whole = np.frombuffer(expected, np.uint8).reshape(rows, columns * item)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, columns)] * 2)))
        out = np.empty((stop - start) * (last - first) * item, np.uint8)
        work.forget()
        node.window(start, stop, first, last, out, work)
        assert out.tobytes() == whole[start:stop, first * item : last * item].tobytes()
        low, high = sorted((start * columns + first, stop * columns - last))
        low = max(low, 0)
        out = np.empty((high - low) * item, np.uint8)
        node.elements(low, high, out, work)
        assert out.tobytes() == expected[low * item : high * item]


WAYS = [{"workers": 1}, {"workers": 3}, {"max_shard_size": "100KB"}]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base of short and long rows, an adapter of pairs on all of them, and another one."""
    root = tmp_path_factory.mktemp("wide")
    names = {f"{LAYER}.{kind}_proj": shape for kind, shape in SHAPES.items()}
    base = {f"{name}.weight": tensor(s, 0.02, i) for i, (name, s) in enumerate(names.items())}
    save_base(root / "base", base | {"x": tensor((3, 200_000), 1, 9, "F16")})
    content = {}
    for name, (rows, columns) in names.items():
        content |= pair(rows, columns, 4, name)
    save_adapter(root / "adapter", content, 4, target_modules=["up_proj", "down_proj", "gate_proj"])
    magnitudes = {
        f"{name}.lora_magnitude_vector": tensor((shape[0],), 1, 3) for name, shape in names.items()
    }
    save_adapter(
        root / "dora",
        content | magnitudes,
        4,
        target_modules=["up_proj", "down_proj", "gate_proj"],
        use_dora=True,
    )
    return root


SHAPES = {"up": (300, 4097), "down": (130, 9000), "gate": (1, 5000)}
SUMS = ("update", "l2", "l2_per_tensor", "exactness")
VARYING = ("seconds", "peak_rss_bytes", "date", "record_digest", "output", "kernel")


def lasting(folder: Path) -> tuple[dict[str, bytes], Any]:
    """The bytes of the weights, and what the record says of them."""
    record = json.loads((folder / "streamshard.json").read_text())
    weights = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    return weights, {key: value for key, value in record.items() if key not in VARYING}


@slow
@pytest.mark.parametrize("adapter", ["adapter", "dora"])
@pytest.mark.parametrize("dtype", ["keep", "fp32"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_output_in_strips(adapter, dtype, way, wide, tmp_path, monkeypatch):
    """Weights, digests and sums."""
    options = {"base": wide / "base", "adapter": wide / adapter, "dtype": dtype, **way}
    told = [0, 0]
    merge_lora(output=tmp_path / "one", **options)
    monkeypatch.setattr(computed, "STRIP_NBYTES", LITTLE)

    def progress(nbytes: int, name: str) -> None:
        told[0] += nbytes

    merge_lora(
        output=tmp_path / "other",
        progress=progress,
        on_plan=lambda plan: told.__setitem__(1, plan.tensor_nbytes),
        **options,
    )
    (weights, record), (others, other) = (lasting(tmp_path / name) for name in ("one", "other"))
    assert weights == others
    # Strips are no option: only the order of sums is another one.
    mine, theirs = ([one.pop(key) for key in SUMS] for one in (record, other))
    assert record == other
    assert mine[0] == pytest.approx(theirs[0], rel=1e-12)
    assert mine[1]["global"] == pytest.approx(theirs[1]["global"], rel=1e-12)
    assert mine[2] == pytest.approx(theirs[2], rel=1e-12)
    assert mine[3]["elements"] == theirs[3]["elements"]
    assert told[0] == told[1]


@pytest.mark.parametrize("adapter", ["adapter", "dora"])
@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp16"])
def test_the_files_are_the_same_from_every_kernel(adapter, dtype, wide, tmp_path, monkeypatch):
    """And so are the records, but for which one it was, and the last digits of sums."""
    options = {"base": wide / "base", "adapter": wide / adapter, "dtype": dtype}
    found = []
    for name in kernel.available():
        monkeypatch.setenv(kernel.VARIABLE, name)
        merge_lora(output=tmp_path / name, **options)
        weights, record = lasting(tmp_path / name)
        update, l2, each, exactness = (record.pop(key) for key in SUMS)
        assert exactness["kernel"] == name
        found.append((weights, record, update, l2["global"], each))
    for weights, record, update, l2, each in found:
        assert (weights, record) == found[0][:2]
        assert update["unchanged"] == found[0][2]["unchanged"]
        assert update["intended"] == pytest.approx(found[0][2]["intended"], rel=1e-6)
        assert update["effected"] == pytest.approx(found[0][2]["effected"], rel=1e-12)
        assert l2 == pytest.approx(found[0][3], rel=1e-12)
        assert each == pytest.approx(found[0][4], rel=1e-12)


@pytest.mark.skipif(kernel._kernels is None, reason="no kernel is compiled here")
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 28_000), st.integers(0, 1000))
def test_kernel_and_numpy_add_distances_in_one_order(count, seed):
    random = np.random.default_rng(seed)
    # Of all magnitudes, so that another order shows; zeros of both signs too.
    size = np.exp(random.uniform(-8, 8, (2, count))).astype(np.float32)
    pair = (numbers((2, count), 1, seed) * size).view(np.uint32) >> 16
    pair = np.where(random.random(pair.shape) < 0.1, pair & 0x8000, pair).astype(np.uint16)
    assert kernel._kernels.distance_bf16(*pair) == numpy_kernel.distance_bf16(*pair)


def test_factors_by_column_of_a_block_of_one_column(work):
    """They are by column, whatever their shape says."""
    for columns in (1, 1025):
        node = made_of("by column", 5, columns, "BF16", 2)
        whole, _ = filled(node, work, 256 * 1024)
        wider, _ = filled(cast(node, "F32"), work, 256 * 1024)
        exact = np.frombuffer(wider, np.float32).view(np.uint32)
        rounded = (exact + 0x7FFF + (exact >> 16 & 1)) >> 16
        assert np.frombuffer(whole, np.uint16).tolist() == rounded.tolist()


def test_sums_of_changes_do_not_depend_on_order():
    values = np.exp(np.random.default_rng(0).uniform(-30, 30, 3 * MAX_TERMS)).tolist()
    totals = []
    for order in (values, sorted(values), values[::-1]):
        changes = Changes()
        for value in order:
            changes.add(Change(value, 2 * value, 3, 1, value / 4))
        totals.append(changes.total())
    exact = math.fsum(values)
    count = len(values)
    assert set(totals) == {Change(exact, 2 * exact, 3 * count, count, exact / 4)}


# --- the rest that reads long rows ----------------------------------------------------------------


class Counted(Files):
    """Files that remember how much was read at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def read_into(self, source: Any, out: memoryview) -> None:
        self.largest = max(self.largest, len(out))
        super().read_into(source, out)


@pytest.fixture
def long_rows(tmp_path):
    file = tmp_path / "model.safetensors"
    save(file, {"a": hole(2, 3_000_000, dtype="F32"), "b": hole(2, 3_000_000, dtype="F32")})
    nbytes, header = file.stat().st_size, file.stat().st_size - 2 * 24_000_000
    made = [Stored(str(file), header + at, (2, 3_000_000), "F32", nbytes) for at in (0, 24_000_000)]
    with file.open("r+b") as out:  # the last element of the second
        out.seek(nbytes - 4)
        out.write(struct.pack("<f", 3.0))
    return made


@slow
def test_comparing_and_reading_long_rows(long_rows):
    one, other = long_rows
    files = Counted()
    work = Workspace(files)
    assert equal_bytes(one, one, work)
    assert not equal_bytes(one, other, work)
    assert tensor_distance(one, other, work) == (9.0, 9.0)
    assert equal_bytes(cast(other, "BF16"), cast(other, "BF16"), work)
    assert not equal_bytes(cast(one, "BF16"), cast(other, "BF16"), work)
    assert read_float32(other, 1, 2, work)[0, -1] == 3
    assert files.largest <= 2_000_000
    files.close()


def test_elements_of_less_than_a_byte(tmp_path):
    """Rows of five elements of four bits do not begin with bytes; all together they do."""
    file = tmp_path / "x"
    file.write_bytes(bytes(range(10)) + bytes(range(9)) + b"x")
    one, other = (Stored(str(file), at, (4, 5), "F4", 20) for at in (0, 10))
    work = Workspace(Files())
    assert equal_bytes(one, one, work)
    assert not equal_bytes(one, other, work)  # they differ in the last byte only


def test_a_tall_factor_is_not_read_element_by_element(tmp_path, monkeypatch):
    """Of an embedding of 200,000 columns A is the transpose of what is stored."""
    file = tmp_path / "x"
    values = numbers((200_000, 8), 1, 1)
    values.tofile(file)
    stored = Stored(str(file), 0, values.shape, "F32", values.nbytes)
    calls = 0
    read_into = Files.read_into

    def counted(self: Files, source: Any, out: memoryview) -> None:
        nonlocal calls
        calls += 1
        read_into(self, source, out)

    monkeypatch.setattr(Files, "read_into", counted)
    found = read_float32(Transposed(stored), 0, 8, Workspace(Files()))
    np.testing.assert_array_equal(found, values.T)
    assert calls < 20


def test_windows_make_up_everything_once():
    for kind in KINDS:
        for piece in made_of(kind, 300, 3000, "BF16", 5).pieces:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(computed, "STRIP_NBYTES", LITTLE)
                seen = np.zeros((piece.rows, piece.columns), int)
                for start, stop, first, last in piece.windows(4096):
                    seen[start:stop, first:last] += 1
                assert (seen == 1).all()
                if isinstance(piece, Computed) and piece.terms:
                    strips = list(piece.strips())
                    assert len(strips) == 3
                    assert all(one[1] == other[0] for one, other in pairwise(strips))
