"""What a checkpoint is, asked once: layout, names, dimensions, tie; and whether two are one model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import Checkpoint
from streamshard.checkpoint.tokenizer import Tokenizer
from streamshard.errors import InputError, listed, printable
from streamshard.internvl.detection import Detected, detect, dims_from_names, layout_of
from streamshard.internvl.families import FAMILIES, LAYOUTS, Layout
from streamshard.internvl.model_config import (
    INNER,
    OTHER,
    Dims,
    check_config,
    config_layout,
    dims_from_config,
    inferred_architecture,
    llm_architecture,
    section_of,
)
from streamshard.internvl.relatives import check_names, no_conversion, other_encoder, relative_of
from streamshard.internvl.same_model import differences
from streamshard.internvl.shapes import check_gathered, check_shapes
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tables import TITLES, UNKNOWN, compared_names
from streamshard.internvl.tied_embeddings import embedding_and_head, tied_names
from streamshard.notes import note
from streamshard.tensors.lazy import Stored
from streamshard.values import frozen

__all__ = ["Model", "architecture_of", "dimensions", "dims_of", "model_dims"]

# How the tensors of InternLM2 are called, and no others of what HF has as llama.
_INTERNLM2 = re.compile(
    r"\.(?:attention\.w|feed_forward\.w|tok_embeddings\.)|language_model\.output\."
)


@frozen(slots=False)
class Model:
    """What a checkpoint is, told once: made where it is opened, and passed on.

    Every answer takes a pass over all names, of which there may be 40,000: it is found when somebody
    first asks, and is the same for all who ask later.
    """

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def where(self) -> str:
        """What messages call it."""
        return printable(str(self.path))

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.checkpoint.tensors

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.checkpoint.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer among the folder's files."""
        return Tokenizer.of(self.where, self.checkpoint.side_files)

    @cached_property
    def layout(self) -> Layout | None:
        """The layout of the names; None where they do not tell."""
        return layout_of(self.tensors)

    @property
    def described_layout(self) -> Layout | None:
        """The like by the config where the names do not tell, as of a language model by itself."""
        return self.layout or config_layout(self.config or {})

    @cached_property
    def detected(self) -> Detected:
        """Spelling, family and evidence; raises `InputError` if this is no InternVL."""
        return detect(self.tensors, self.config)

    def given(self, layout: Layout) -> Mapping[str, str]:
        """The names of `layout` in the flat spelling, to those of the tensors.

        Raises `InputError` if two of them are the same tensor.
        """
        if layout not in self._given:
            self._given[layout] = MappingProxyType(flat_names(self.tensors, layout))
        return self._given[layout]

    @cached_property
    def _given(self) -> dict[Layout, Mapping[str, str]]:
        return {}

    @cached_property
    def embedding_and_head(self) -> tuple[str | None, str | None]:
        """The names of both, as far as they are there."""
        return embedding_and_head(self.tensors)

    @cached_property
    def tie(self) -> tuple[str, str] | None:
        """Embedding and head if the config has them as one; the bytes may differ all the same."""
        return tied_names(*self.embedding_and_head, self.config, lambda: self.detected)

    @cached_property
    def relative(self) -> str | None:
        """The name of the relative of InternVL that this is, None for InternVL itself."""
        return relative_of(self.tensors, self.config)

    def check(self, inside: Mapping[str, str] | None = None) -> None:
        """Raise `InputError` unless every tensor has the shape that the config says.

        `inside` maps the names of a model to those of `tensors` where it is wrapped. What is of no
        known family is passed over, but for tensors that were never gathered.
        """
        check_names(self.where, self.tensors)
        layout = self.described_layout
        if layout is not None:
            try:
                dims, given = self.dims, self.given(layout)
                if inside is not None:
                    given = {f: inside[name] for f, name in flat_names(inside, layout).items()}
            except InputError:  # merging needs no table
                pass
            else:
                check_shapes(self.where, self.tensors, given, dims, layout)
        check_gathered(self.where, self.tensors)

    def check_described(self, inside: Mapping[str, str] | None = None) -> list[str]:
        """Raise `InputError` if the config is of another model; answers what it has and this lacks.

        Tensors that InternVL does not have are not counted, nor is what is of no known family.
        `inside` is as in `check`.
        """
        by_config = config_layout(self.config or {})
        layout = self.layout or by_config
        if layout is None or self.config is None:
            return []
        if by_config not in (None, layout) and self.relative is None:
            raise InputError(
                f"{self.where}: its tensors have the names of the {layout} layout, but its "
                f"{MODEL_CONFIG_NAME} is of the {by_config} layout: no class loads both. Take "
                f"{MODEL_CONFIG_NAME} from the original model in the {layout} layout."
            )
        if other_encoder(self.config) is not None:  # merging needs no table
            return []
        try:
            given = flat_names(self.tensors if inside is None else inside, layout)
            others, lacking = compared_names(given, self.dims, layout)
        except InputError:  # merging needs no table
            return []
        denied = {given.get(n, n): why for n, why in others.items() if why != UNKNOWN}
        if denied:
            raise InputError(
                f"{self.where}: {listed(denied, 3)}: {next(iter(denied.values()))}. A loader would drop "
                f"such tensors ({len(denied):,} of them) without a word: correct {MODEL_CONFIG_NAME}, or "
                "take it from the model that the weights are of."
            )
        strange = [given.get(name, name) for name, why in others.items() if why == UNKNOWN]
        if strange and self.relative is None and self.detected.family is not None:
            note(
                f"{self.where}: the published models of InternVL have no tensor like "
                f"{listed(strange, 3)}: see that your loader takes it; such are copied as they are"
            )
        return lacking

    def check_whole(self, *, allow_missing: bool = False) -> list[str]:
        """As `check_described`, and raise `InputError` if something lacks, unless that is allowed."""
        lacking = self.check_described()
        if lacking:
            what = f"{self.where}: its config describes {listed(lacking)}, which it does not have"
            if not allow_missing:
                raise InputError(
                    f"{what}: {len(lacking):,} tensors are missing, and a loader would make them up. "
                    f"Complete the checkpoint, or correct {MODEL_CONFIG_NAME}; --allow-missing writes it "
                    "nevertheless."
                )
            note(f"{what}: the output lacks these {len(lacking):,} tensors, too")
        return lacking

    @cached_property
    def dims(self) -> Dims:
        """The dimensions by the config, or by the names where there is none."""
        if self.config is None:
            return dims_from_names(self.tensors, self.layout or "custom")
        return dims_of(self.config, where=printable(str(self.path / MODEL_CONFIG_NAME)))


def dims_of(config: Mapping[str, Any], name: str = "", where: str = "config.json") -> Dims:
    """The dimensions by one config alone.

    What HF calls llama has several custom classes: the same names in HF, the same dimensions. Which
    one is meant, the `name` of a tensor of an adapter may tell.
    """
    return dims_from_config(config, architecture=architecture_of(config, name), where=where)


def is_of_internlm2(name: str) -> bool:
    """Whether a tensor is of InternLM2's own class, by its name."""
    return _INTERNLM2.search(name) is not None


def architecture_of(config: Mapping[str, Any], name: str = "") -> str | None:
    """The custom class to take where an HF config does not say it; None where it does."""
    inner = config.get(INNER["hf"])
    if not isinstance(inner, dict) or inner.get("model_type") != "llama":
        return None
    return "InternLM2ForCausalLM" if is_of_internlm2(name) else "LlamaForCausalLM"


def model_dims(source: Model, reference: Model, layout: Layout) -> Dims:
    """The dimensions of a model that goes to `layout`; both configs must agree on them.

    `tied` is the source's. Raises `InputError` if they are of different models, of relatives of
    InternVL that have one layout only, or describe what HF cannot express.
    """
    for model in (source, reference):
        if model.relative is not None:
            raise no_conversion(model.where, model.relative)
    configs = {OTHER[layout]: source, layout: reference}
    custom, hf = configs["custom"], configs["hf"]
    architecture = None
    if custom.config is not None:
        where = printable(str(custom.path / MODEL_CONFIG_NAME))
        _check_layout(custom, "custom", where, hf, given=custom is source)
        check_config(custom.config, where)
        architecture = llm_architecture(custom.config, where)
        _check_inferred(custom, architecture, where)
    found = {}
    for side in LAYOUTS:
        config = configs[side].config
        if config is not None:
            where = printable(str(configs[side].path / MODEL_CONFIG_NAME))
            own, other = configs[side], configs[OTHER[side]]
            _check_layout(own, side, where, other, given=own is source)
            found[side] = dims_from_config(config, architecture=architecture, where=where)
    if not found:
        raise InputError(
            f"{source.where}: has no config.json, so the heads of its attention are not "
            "known. Give the whole folder."
        )
    of_source = found.get(OTHER[layout])
    dims = found.get("hf", next(iter(found.values())))
    if len(found) == len(LAYOUTS):
        _compare_configs(custom, hf, dims.family, reference.path)
        _compare_dims(found["custom"], found["hf"], reference.path)
    # Of a file by itself nobody has said that it lacks its head on purpose.
    return replace(dims, tied=of_source is not None and of_source.tied)


def _check_layout(model: Model, side: Layout, where: str, other: Model, *, given: bool) -> None:
    """Raise `InputError` unless a config is of `side`; `given` is the model that has the weights."""
    found = config_layout(model.config or {})
    if found == side:
        return
    kind = printable(str((model.config or {}).get("model_type")))
    what, named = "a custom" if side == "custom" else "an HF", TITLES[side]
    option = ("--custom-path" if side == "custom" else "--hf-path") + (
        "|--base" if given else "|--reference"
    )
    if found is not None and config_layout(other.config or {}) == side:
        hint = "Are the two folders swapped?"
    elif given:
        hint = f"Give, as {option}, the model to convert, which is in the {named} layout."
        if found is not None:
            command = "hf2custom" if found == "hf" else "custom2hf"
            hint += f" A model in the {TITLES[found]} layout goes through `{command}`."
    else:
        hint = (
            f"Give, as {option}, the original model in the {named} layout: it is published under a "
            "name of its own, like InternVL3-8B and InternVL3-8B-hf."
        )
    raise InputError(
        f"{where}: model_type is '{kind}', {f'of the {found} layout' if found else 'not known'}, "
        f"but {what} model (model_type "
        f"'{'internvl_chat' if side == 'custom' else 'internvl'}') was expected here. {hint}"
    )


def _check_inferred(custom: Model, architecture: str, where: str) -> None:
    """Raise `InputError` if the class is known by model_type only, and the names are of another."""
    llm = section_of(custom.config or {}, INNER["custom"], where)
    if inferred_architecture(llm) is None or custom.layout != "custom":
        return
    found = custom.detected.family
    if found is not None and FAMILIES[found].architecture != architecture:
        raise InputError(
            f"{where}: llm_config.architectures is missing, and model_type there says {architecture}, "
            f"but the tensors have the names of {FAMILIES[found].architecture}. Take config.json from "
            "the original model."
        )


def _compare_dims(custom: Dims, hf: Dims, path: Path) -> None:
    for field in fields(Dims):
        if field.name == "tied":
            continue
        one, other = getattr(custom, field.name), getattr(hf, field.name)
        if one is not None and other is not None and one != other:
            raise InputError(
                f"{printable(str(path))}: is of another model: {field.name} is {one} in the custom "
                f"config but {other} in the HF config. Give the reference of the same model."
            )


def _compare_configs(custom: Model, hf: Model, family: str, path: Path) -> None:
    for key, left, right in differences(custom.config or {}, hf.config or {}, family):
        raise InputError(
            f"{printable(str(path))}: is of another model: {key} is "
            f"{printable(str(left))} in the custom config but {printable(str(right))} in the HF "
            "config, and the weights were trained with one of them; what a config does not say has "
            "the default of its class. Give the reference of the same model, or make the configs "
            "agree."
        )


def dimensions(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The dimensions in `config.json`, as far as they can be told without another folder."""
    if config is None:
        return None
    try:
        dims = dims_of(config)
    except InputError:
        return None
    return {
        "vision_layers": dims.blocks,
        "vision_hidden": dims.vision_hidden,
        "layers": dims.layers,
        "heads": dims.heads,
        "kv_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "experts": dims.experts,
    }
