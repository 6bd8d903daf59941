from typing import Any

import numpy as np
import numpy.typing as npt

def names() -> tuple[str, ...]: ...
def merge(
    kernel: str,
    rows: int,
    columns: int,
    first: int,
    old: npt.NDArray[Any],
    old_dtype: str,
    out: npt.NDArray[Any] | None,
    dtype: str,
    wide: bool,
    rank: int,
    panels: npt.NDArray[np.float32],
    norms: npt.NDArray[np.float32],
    left: npt.NDArray[np.float32],
    scaled: npt.NDArray[Any],
    row_norms: npt.NDArray[np.float32],
    ends: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float64],
    safe: bool,
    bound: float,
    tiny: float,
    bound_wide: float,
    factor: npt.NDArray[np.float64] | None,
    by_row: bool,
    slack: float,
    sums: npt.NDArray[np.float64] | None,
    /,
) -> tuple[float, float, int, int, bytes]: ...
def distance_bf16(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float: ...
def scale_rows(
    rows: npt.NDArray[np.float32],
    count: int,
    rank: int,
    scale: float,
    scaled: npt.NDArray[Any],
    wide: bool,
    norms: npt.NDArray[np.float64],
    least: float,
    tiny: float,
    /,
) -> None: ...
def pack_rows(
    rows: npt.NDArray[np.float32],
    count: int,
    columns: int,
    first: int,
    panels: npt.NDArray[np.float32],
    rank: int,
    at: int,
    squares: npt.NDArray[np.float64],
    /,
) -> None: ...
def keep_subnormals() -> None: ...
