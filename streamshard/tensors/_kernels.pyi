from typing import Any

import numpy as np
import numpy.typing as npt

def add_bf16(
    old: npt.NDArray[Any],
    update: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float64] | None,
    out: npt.NDArray[Any],
) -> tuple[float, float, int]: ...
def squares_bf16(
    old: npt.NDArray[Any], update: npt.NDArray[np.float32], sums: npt.NDArray[np.float64]
) -> None: ...
def distance_bf16(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float: ...
