from typing import Any

import numpy as np
import numpy.typing as npt

def add_bf16(
    old: npt.NDArray[Any], update: npt.NDArray[np.float32], out: npt.NDArray[Any]
) -> float: ...
def distance_bf16(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float: ...
