"""Whether a checkpoint is the whole model that its config describes: names and shapes, no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.open_anything import Opened
from streamshard.commands.bare_names import bare_names
from streamshard.commands.identify import dims_of
from streamshard.commands.verify_pairs import flag_problems, pair_problems, wrapping_problems
from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.internvl.detection import dims_from_names, layout_of
from streamshard.internvl.dims import Dims
from streamshard.internvl.families import Layout
from streamshard.internvl.model_config import INNER, config_layout, section_of
from streamshard.internvl.relatives import check_names, other_encoder, relative_of
from streamshard.internvl.shapes import check_gathered, misfits
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tables import UNKNOWN, compared_names
from streamshard.internvl.tied_embeddings import embedding_and_head
from streamshard.lora.wrapped_names import unwrap
from streamshard.tensor_names import is_wrapped
from streamshard.tensors.lazy import Lazy

__all__ = ["AsModel", "as_model"]

# What is checked, in the words of the report.
COMPLETE = f"completeness by {MODEL_CONFIG_NAME}"
SHAPES = f"shapes by {MODEL_CONFIG_NAME}"
ALIKE = "shapes against each other"


@dataclass
class AsModel:
    """What was checked, what could not be and why, the names that lack, and the problems."""

    checked: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def not_possible(self, why: str) -> AsModel:
        """The same, if nothing can be said by a config."""
        self.unchecked |= dict.fromkeys((COMPLETE, SHAPES), why)
        return self


def as_model(found: Opened) -> AsModel:
    """Compare the names and shapes of a checkpoint with its config, or with each other without one."""
    seen, tensors = AsModel(), found.tensors
    by_config = config_layout(found.config or {})
    seen.problems += _badly_saved(found)
    if not found.incomplete and not found.unread:
        seen.problems += pair_problems(tensors)
        seen.problems += flag_problems(tensors, found.config or {})
    if found.adapter:
        return seen.not_possible("this is an adapter")
    if found.incomplete or found.unread:
        return seen.not_possible("not all files could be read")
    # Where all that tells is missing, the config still says what the model should be.
    layout = layout_of(tensors) or by_config
    if by_config not in (None, layout) and relative_of(tensors, found.config) is None:
        seen.problems.append(
            f"{MODEL_CONFIG_NAME} is of the {by_config} layout, but the tensors have the names of the "
            f"{layout} layout: no class loads both."
        )
        return seen.not_possible("it is of the other layout")
    if layout is None:
        return seen.not_possible("by its names this is no whole InternVL checkpoint")
    encoder = other_encoder(found.config)
    if encoder is not None:
        return seen.not_possible(f"its vision encoder is '{printable(encoder)}', not InternVL's")
    try:
        given = _given(seen, tensors, layout)
    except AdapterError as error:  # as of two adapters at once
        return seen.not_possible(str(error))
    except InputError as error:
        seen.problems.append(str(error))
        return seen.not_possible("the names are not those of one model")
    if found.config is None:
        why = "this is a bare file" if found.bare else f"there is no {MODEL_CONFIG_NAME}"
        seen.not_possible(why)
        try:
            dims = dims_from_names(given, layout)
        except InputError:
            return seen
        seen.checked.append(ALIKE)
    else:
        try:
            dims = dims_of(found.config)
        except InputError as error:
            return seen.not_possible(str(error))
        _compare_names(seen, given, dims, layout)
        _compare_rows(seen, tensors, given, found.config, layout)
        seen.checked.append(SHAPES)
    misshapen = list(misfits(tensors, given, dims, layout))
    seen.problems += [f"{misfit}." for misfit in misshapen if misfit.found != (0,)]
    return seen


def _badly_saved(found: Opened) -> Iterator[str]:
    """What says that it was not saved as loaders need it, whatever model it is."""
    for check in (check_names, check_gathered):
        try:
            check(str(found.folder), found.tensors)
        except InputError as error:
            yield str(error)
    for bare, given in bare_names(found.tensors, found.config).items():
        if bare != given:
            yield (
                f"'{printable(given)}' and the like have words of training in their names: loaders look "
                f"for '{printable(bare)}', and find no weight. merge-lora writes it so."
            )
            break


def _given(seen: AsModel, tensors: Mapping[str, Lazy], layout: Layout) -> dict[str, str]:
    """Flat names to those of the tensors; of a wrapped checkpoint those of the model inside."""
    inside = {name: name for name in tensors}
    if is_wrapped(tensors):
        names = unwrap(tensors)
        seen.problems += wrapping_problems(tensors, names)
        inside = names.base
    return {flat: inside[name] for flat, name in flat_names(inside, layout).items()}


def _compare_names(seen: AsModel, given: Mapping[str, str], dims: Dims, layout: Layout) -> None:
    others, missing = compared_names(given, dims, layout)
    seen.checked.append(COMPLETE)
    seen.missing = missing
    if missing:
        count = f"{len(missing):,} tensors"
        seen.problems.append(
            f"{MODEL_CONFIG_NAME} describes a model with {listed(missing)}, which no file holds "
            f"({count}): the checkpoint is not complete, or this is not its config."
        )
    for name, why in others.items():
        if why != UNKNOWN:
            seen.problems.append(f"'{given.get(name, name)}' has no place in the model: {why}.")
    unknown = [given.get(name, name) for name, why in others.items() if why == UNKNOWN]
    if unknown:
        seen.unchecked["names and shapes of tensors that InternVL does not have"] = listed(unknown)


def _compare_rows(
    seen: AsModel,
    tensors: Mapping[str, Lazy],
    given: Mapping[str, str],
    config: Mapping[str, Any],
    layout: Layout,
) -> None:
    """Embedding and head have as many rows as the config has tokens, or no class can load them."""
    stated = section_of(config, INNER[layout], MODEL_CONFIG_NAME).get("vocab_size")
    names = [given[flat] for flat in embedding_and_head(given) if flat is not None]
    wrong = [name for name in names if stated is not None and tensors[name].shape[0] != stated]
    if wrong:
        rows = tensors[wrong[0]].shape[0]
        seen.problems.append(
            f"{MODEL_CONFIG_NAME} states a vocab_size of {stated}, but {listed(wrong)} have {rows:,} "
            f"rows, so that it cannot be loaded: write {rows} there, if all rows are meant."
        )
