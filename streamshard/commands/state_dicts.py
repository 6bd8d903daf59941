"""State dicts in memory: the same tables and the same distance as for files.

torch is only used for tensors that are torch's already; numpy arrays work as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streamshard.errors import InputError
from streamshard.internvl.detection import dims_from_names
from streamshard.internvl.families import Layout
from streamshard.internvl.layouts import to_custom, to_hf
from streamshard.internvl.model_config import dims_from_config
from streamshard.internvl.row_parts import Ops, in_memory

__all__ = ["compute_l2_distance", "convert_keys_back", "convert_keys_to_hf"]


def convert_keys_back(
    hf_state_dict: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """A state dict of `InternVLForConditionalGeneration` under the names of `InternVLChatModel`.

    Names may be in any spelling that transformers wrote. `config` is the HF `config.json`, needed for
    InternLM2 (head counts) and tied models without a head; `architecture` is the custom
    `llm_config.architectures[0]`, needed for InternLM2, whose HF names are Llama's. Tensors
    are views of the given ones where rows need not be joined.

    Raises `InputError` for names that are missing or not known.
    """
    dims = _dims(hf_state_dict, "hf", config, architecture)
    return to_custom(dict(hf_state_dict), dims, _ops(hf_state_dict))


def convert_keys_to_hf(
    custom_state_dict: Mapping[str, Any], *, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A state dict of `InternVLChatModel` under the names of `InternVLForConditionalGeneration`.

    These are the ones that its `load_state_dict` takes (the *nested* spelling); experts come out one
    by one, as in files, which transformers 5 packs when it loads a folder. `config` is the custom
    `config.json`, needed for InternLM2 (head counts). Tensors are views of the given ones.

    Raises `InputError` for names that are missing or not known.
    """
    dims = _dims(custom_state_dict, "custom", config, None)
    return to_hf(dict(custom_state_dict), dims, _ops(custom_state_dict), spelling="nested")


def compute_l2_distance(a: Any, b: Any) -> float:
    """Sum over the tensors that both have, in one shape, of the L2 norm of their difference.

    `a` and `b` are mappings of names to tensors or arrays, or modules with a `state_dict`.
    What InternVL's conversion tools print as total L2 distance; sums are in fp64.
    """
    one, other = _mapping(a), _mapping(b)
    norms = []
    for name in one.keys() & other.keys():
        left, right = one[name], other[name]
        if tuple(left.shape) == tuple(right.shape):
            norms.append(_norm(left, right))
    return math.fsum(norms)


def _dims(
    tensors: Mapping[str, Any],
    layout: Layout,
    config: Mapping[str, Any] | None,
    architecture: str | None,
) -> Any:
    if config is not None:
        return dims_from_config(config, architecture=architecture)
    if architecture is not None:
        raise InputError("architecture is given without config: the head counts are needed too.")
    return dims_from_names(list(tensors), layout)


def _ops(tensors: Mapping[str, Any]) -> Ops[Any]:
    if all(hasattr(tensor, "storage_offset") for tensor in tensors.values()):
        import torch

        return in_memory(torch.cat)
    import numpy as np

    return in_memory(np.concatenate)


def _mapping(model: Any) -> Mapping[str, Any]:
    return model if isinstance(model, Mapping) else model.state_dict()


def _norm(left: Any, right: Any) -> float:
    """L2 norm of a difference, a piece at a time so that no fp64 copy of a tensor is made."""
    import numpy as np

    flat = [t.detach().cpu() if hasattr(t, "detach") else np.asarray(t) for t in (left, right)]
    one, other = (t.reshape(-1) for t in flat)
    step, total = 1 << 20, 0.0
    for start in range(0, one.shape[0], step):
        parts = [t[start : start + step] for t in (one, other)]
        exact = [
            p.double().numpy() if hasattr(p, "double") else p.astype(np.float64) for p in parts
        ]
        difference = exact[0] - exact[1]
        total += float(np.dot(difference, difference))
    return math.sqrt(total)
