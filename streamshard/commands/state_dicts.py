"""State dicts in memory: the same tables and the same distance as for files.

torch is only used for tensors that are torch's already; numpy arrays work as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, Protocol

from streamshard.commands.arguments import shown
from streamshard.errors import InputError, StreamshardWarning, listed, printable
from streamshard.internvl.detection import dims_from_names, layout_of
from streamshard.internvl.dims import Dims
from streamshard.internvl.families import Layout
from streamshard.internvl.layouts import to_custom, to_hf
from streamshard.internvl.model_config import OTHER, dims_from_config
from streamshard.internvl.row_parts import Ops, in_memory
from streamshard.internvl.shapes import check_shapes
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tables import TITLES
from streamshard.tensor_names import factors_among

__all__ = ["compute_l2_distance", "convert_keys_back", "convert_keys_to_hf"]

_STATE = "_extra_state"
"""What ends names of what modules keep beside tensors: anything at all."""


class Config(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` has of it."""


def convert_keys_back(
    hf_state_dict: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | Config | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """A state dict of `InternVLForConditionalGeneration` under the names of `InternVLChatModel`.

    Names may be in any spelling that transformers wrote. `config` is the HF `config.json`, or
    `model.config`, needed for InternLM2 (head counts) and tied models without a head; `architecture` is
    the custom `llm_config.architectures[0]`, needed for InternLM2, whose HF names are Llama's. Tensors
    are views of the given ones where rows need not be joined.

    Raises `InputError` for names that are missing or not known, `TypeError` for what is no mapping of
    names to tensors.
    """
    given = _tensors(hf_state_dict, "hf")
    config = _config(config)
    dims = _dims(given, "hf", config, architecture)
    made = to_custom(dict(given), dims, _ops(given))
    check_shapes("the state dict", given, flat_names(given, "hf"), dims, "hf")
    return made


def convert_keys_to_hf(
    custom_state_dict: Mapping[str, Any], *, config: Mapping[str, Any] | Config | None = None
) -> dict[str, Any]:
    """A state dict of `InternVLChatModel` under the names of `InternVLForConditionalGeneration`.

    These are the ones that its `load_state_dict` takes (the *nested* spelling); experts come out one
    by one, as in files, which transformers 5 packs when it loads a folder. `config` is the custom
    `config.json`, or `model.config`, needed for InternLM2 (head counts). Tensors are views of the given
    ones.

    Raises `InputError` for names that are missing or not known, `TypeError` for what is no mapping of
    names to tensors.
    """
    given = _tensors(custom_state_dict, "custom")
    config = _config(config)
    dims = _dims(given, "custom", config, None)
    made = to_hf(dict(given), dims, _ops(given), spelling="nested")
    check_shapes("the state dict", given, flat_names(given, "custom"), dims, "custom")
    return made


def compute_l2_distance(a: Any, b: Any) -> float:
    """Sum over the tensors that both have, in one shape, of the L2 norm of their difference.

    `a` and `b` are mappings of names to tensors or arrays, or modules with a `state_dict`.
    What InternVL's conversion tools print as total L2 distance; sums are in fp64.

    Tensors that are only in one, or in another shape, are not compared, and a `StreamshardWarning` says
    how many these are.

    Raises `ValueError` if nothing can be compared, since 0 would be the distance of equal ones: if no
    name is in both, no tensor has one shape in both, or one is no tensor of numbers.
    Raises `TypeError` for what is neither mapping nor module.
    """
    one, other = _mapping(a), _mapping(b)
    common = [name for name in one if name in other]
    if not common:
        raise ValueError(
            f"nothing can be compared: no name is in both. The first has {listed(one, 2) or 'none'}, "
            f"the second {listed(other, 2) or 'none'}; wrappers (module., base_model.model.) and layouts "
            "(convert_keys_to_hf) change names."
        )
    norms, elements, unequal = [], 0, []
    for name in common:
        left, right = one[name], other[name]
        try:
            shape, its_shape = _shape(left), _shape(right)
            if shape == its_shape:
                norms.append(_norm(_flat(left), _flat(right)))
                elements += math.prod(shape)
            else:
                unequal.append(f"'{printable(str(name))}' is {shape} and {its_shape}")
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # NotImplementedError is of the latter
            if not str(name).endswith(_STATE):  # of a module, and anything at all
                raise ValueError(f"'{printable(str(name))}' cannot be compared: {error}") from error
    if not elements:
        why = f"no shape is the same in both: {unequal[0]}" if unequal else "no tensor has elements"
        raise ValueError(f"nothing can be compared: {why}.")
    only = [name for one, two in ((one, other), (other, one)) for name in one if name not in two]
    only = [str(name) for name in only if not str(name).endswith(_STATE)]
    if only or unequal:
        warnings.warn(_uncompared(len(norms), only, unequal), StreamshardWarning, stacklevel=2)
    return math.fsum(norms)


def _uncompared(compared: int, only: list[str], unequal: list[str]) -> str:
    parts = [f"{len(only):,} names are only in one of the two ({listed(only, 2)})"] if only else []
    parts += [f"{len(unequal):,} have another shape ({unequal[0]})"] if unequal else []
    every = compared + len(only) + len(unequal)
    return f"only {compared:,} of {every:,} tensors were compared: {' and '.join(parts)}"


_MAKES = {"custom": "convert_keys_back", "hf": "convert_keys_to_hf"}
"""What makes a state dict of each layout."""


def _tensors(model: Any, side: Layout) -> Mapping[str, Any]:
    """The tensors of a state dict of `side`; raises what is wrong with it as a whole."""
    given = _mapping(model)
    for name, value in given.items():
        if not isinstance(name, str):
            raise TypeError(
                f"{printable(repr(name), 60)} is no name of a tensor; text was expected."
            )
        if not hasattr(value, "shape") and not name.endswith(_STATE):
            raise TypeError(f"'{printable(name)}' is {shown(value)}; a tensor was expected.")
    if factors_among(given):
        raise InputError(
            "this is the state dict of a model that is wrapped by LoRA: merge its pairs first, with "
            "PEFT's merge_and_unload(), or in files with streamshard.merge_lora(checkpoint=…)."
        )
    if layout_of(given) not in (None, side):
        raise InputError(
            f"these are names of the {TITLES[OTHER[side]]} layout already. To convert them to the "
            f"{TITLES[side]} layout use streamshard.{_MAKES[side]}."
        )
    return given


def _config(config: Any) -> Mapping[str, Any] | None:
    """A config as a mapping."""
    if config is None or isinstance(config, Mapping):
        return config
    made = config.to_dict() if hasattr(config, "to_dict") else None
    if not isinstance(made, Mapping):
        raise TypeError(f"`config` is {shown(config)}; the content of config.json was expected.")
    return made


def _dims(
    tensors: Mapping[str, Any],
    layout: Layout,
    config: Mapping[str, Any] | None,
    architecture: str | None,
) -> Dims:
    if config is not None:
        dims = dims_from_config(config, architecture=architecture)
    elif architecture is not None:
        raise InputError("architecture is given without config: the head counts are needed too.")
    else:
        dims = dims_from_names(list(tensors), layout)
    return dims


def _ops(tensors: Mapping[str, Any]) -> Ops[Any]:
    if all(hasattr(tensor, "storage_offset") for tensor in tensors.values()):
        import torch

        return in_memory(torch.cat)
    import numpy as np

    return in_memory(np.concatenate)


def _mapping(model: Any) -> Mapping[str, Any]:
    """The tensors of a mapping or a module by name."""
    if isinstance(model, Mapping):
        return model
    state_dict = getattr(model, "state_dict", None)
    if state_dict is None or isinstance(model, type):
        hint = " For folders and files there is diff." if isinstance(model, (str, PathLike)) else ""
        raise TypeError(
            "a mapping of names to tensors, or a module with a state_dict, was expected, not "
            f"{printable(repr(model), 120)}.{hint}"
        )
    found = state_dict()
    return found if isinstance(found, Mapping) else dict(found)


def _shape(tensor: Any) -> list[int]:
    import numpy as np

    return [int(size) for size in (tensor.shape if hasattr(tensor, "shape") else np.shape(tensor))]


def _flat(tensor: Any) -> Any:
    """All numbers of a tensor or array in a row; raises `TypeError` if it has none."""
    import numpy as np

    if hasattr(tensor, "detach"):
        there = tensor.detach().cpu()
        return (there if str(there.layout) == "torch.strided" else there.to_dense()).reshape(-1)
    array = np.asarray(tensor)
    if tensor is None or array.dtype.kind in "SUMm":
        raise TypeError(f"it is {printable(repr(tensor), 60)}, and no tensor of numbers")
    return array.reshape(-1)


def _norm(left: Any, right: Any) -> float:
    """L2 norm of a difference, a piece at a time so that no fp64 copy of a tensor is made."""
    import numpy as np

    step, total = 1 << 20, 0.0
    for start in range(0, left.shape[0], step):
        one, other = (_exact(t[start : start + step]) for t in (left, right))
        with np.errstate(invalid="ignore", over="ignore"):  # the result says so
            difference = one - other
            total += float(np.vdot(difference, difference).real)
    return math.sqrt(total)


def _exact(numbers: Any) -> Any:
    """Numbers in fp64, complex ones in the like of it."""
    import numpy as np

    if hasattr(numbers, "detach"):
        if not numbers.is_complex():
            return numbers.double().numpy()
        numbers = numbers.resolve_conj().numpy()
    return numbers.astype(np.complex128 if np.iscomplexobj(numbers) else np.float64)
