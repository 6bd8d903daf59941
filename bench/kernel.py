"""Nanoseconds of one thread for an element that gets an update: the kernels side by side, in one run.

    python bench/kernel.py
    python bench/kernel.py --before OLD/_kernels.cpython-311-x86_64-linux-gnu.so

With `--before`, an extension module of before the kernels were certified (which has `add_bf16`), the way
of then is measured beside them: a product by BLAS in tiles, fp64 above rank 64, and a pass that adds and
rounds. Rounds are interleaved, and the best of each is told.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamshard.disk.files import Files
from streamshard.tensors.kernel import VARIABLE, available
from streamshard.tensors.lazy import Array
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.merging import Addition
from streamshard.tensors.workspace import Workspace

__all__ = ["main"]

ROWS, COLUMNS = 128, 3584  # as a window of a merge
TILE_ROWS, TILE_COLUMNS = 128, 1024
RANKS = (8, 16, 32, 64, 128, 256)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="an extension module with add_bf16")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", type=int, action="append")
    asked = parser.parse_args()
    old = None if asked.before is None else loaded(asked.before)
    random = np.random.default_rng(0)
    W = bf16(random.standard_normal((ROWS, COLUMNS)) * 0.02)
    print(
        f"ns an element, best of {asked.rounds}, {ROWS} x {COLUMNS} bf16; in brackets computed again"
    )
    for r in asked.rank or RANKS:
        A = (random.standard_normal((r, COLUMNS)) * 0.02).astype(np.float32)
        B = (random.standard_normal((ROWS, r)) * 0.005).astype(np.float32)
        ways: dict[str, Callable[[], float]] = {
            name: partial(now, name, W, A, B, Workspace(Files())) for name in available()
        }
        if old is not None:
            ways["before"] = partial(before, old, W, A, B)
        best = dict.fromkeys(ways, float("inf"))
        again = dict.fromkeys(ways, 0.0)
        for _ in range(asked.rounds):
            for name, way in ways.items():
                for _ in range(5):  # the first ones bring the factors into the cache
                    started = time.perf_counter()
                    again[name] = way()
                    best[name] = min(best[name], time.perf_counter() - started)
        told = [f"{name} {best[name] / W.size * 1e9:6.2f} ({again[name]:.0e})" for name in ways]
        print(f"r={r:3}: " + "  ".join(told), flush=True)


def now(name: str, W: Any, A: Any, B: Any, work: Workspace) -> float:
    """By a kernel, as a merge does it; factors are at hand. Returns the share computed again."""
    os.environ[VARIABLE] = name
    key = f"{A.shape}"
    if key not in _NODES:
        _NODES[key] = (LowRank(stored(A), stored(B), 2.0, 0, ROWS),)
    out = _OUT.setdefault(W.shape, np.empty_like(W))
    done = work.changes.total().rechecked
    addition = Addition(_NODES[key], "BF16", wide=name == "numpy")
    addition.merge("BF16", W, out, (0, 0), (0, COLUMNS), work, None)
    return float((work.changes.total().rechecked - done) / W.size)


_NODES: dict[str, tuple[LowRank, ...]] = {}
_OUT: dict[tuple[int, ...], Any] = {}


def before(module: Any, W: Any, A: Any, B: Any) -> float:
    """By BLAS and the pass of then."""
    kind = np.float64 if len(A) > 64 else np.float32
    right, left = A.astype(kind), (B * 2.0).astype(kind)
    out = _OUT.setdefault(W.shape, np.empty_like(W))
    for column in range(0, COLUMNS, TILE_COLUMNS):
        across = np.s_[column : column + TILE_COLUMNS]
        for row in range(0, ROWS, TILE_ROWS):
            down = np.s_[row : row + TILE_ROWS]
            update = np.matmul(left[down], right[:, across]).astype(np.float32, copy=False)
            module.add_bf16(W[down, across], update, None, out[down, across])
    return 0.0


def bf16(values: Any) -> Any:
    """Elements near to some numbers."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def stored(values: Any) -> Array:
    """An fp32 matrix as a tensor."""
    return Array(values.reshape(-1).view(np.uint8), values.shape, "F32")


def loaded(path: Path) -> Any:
    """An extension module from its file."""
    spec = importlib.util.spec_from_file_location("_kernels", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
