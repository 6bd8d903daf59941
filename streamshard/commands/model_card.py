"""The model card of an output, `README.md`: where the model is from, and what was done.

A base's own card describes the base, and an output with a copy of it would claim to be that. Of the
base's front matter what still holds is taken over: licence, languages, the task, and tags but those that
tell a format or where files lie. Nothing is stated that is not known: a base without a known place on
the hub is named in the text only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import CARD_NAME, MODEL_CONFIG_NAME
from streamshard.checkpoint.front_matter import FrontMatter, front_matter_bytes, read_front_matter
from streamshard.checkpoint.hub_names import is_repository, origin_of
from streamshard.checkpoint.json_files import MAX_JSON_BYTES, json_object
from streamshard.commands.card_text import Facts, body
from streamshard.commands.identify import Model
from streamshard.commands.provenance import other_base
from streamshard.disk.existence import is_file
from streamshard.disk.files import read_bytes
from streamshard.disk.system import reading
from streamshard.engine.job import Beside
from streamshard.errors import InputError, UsageError, printable
from streamshard.notes import note
from streamshard.values import frozen

__all__ = ["CARDS", "Card", "check_card", "conversion_card", "merge_card", "with_card"]

CARDS = ("new", "base", "none")

NAMED = "base_model_name_or_path"

_LICENCE = ("license", "license_name", "license_link")
# What a format, a library or a hub says of files, and not of the model.
_NO_LONGER = {
    *("adapter", "autotrain_compatible", "awq", "base_model", "bitsandbytes", "custom_code"),
    *("deploy:azure", "dora", "endpoints_compatible", "exl2", "fp8", "gguf", "gptq", "jax", "lora"),
    *("merge", "mergekit", "mlx", "onnx", "openvino", "peft", "pytorch", "quantized", "qlora"),
    *("safetensors", "tensorboard", "text-generation-inference", "tf", "transformers"),
    *("4-bit", "4bit", "8-bit", "8bit", "int4", "int8"),
}
_OF_THE_HUB = ("arxiv:", "base_model:", "dataset:", "deploy:", "doi:", "license:", "region:")


@frozen
class Card:
    """A model card that lacks only what the report will say."""

    front: tuple[tuple[str, str | tuple[str, ...]], ...]
    facts: Facts

    def content(self, report: Mapping[str, Any]) -> bytes:
        """`README.md`: front matter, and what was done."""
        front = {key: value if isinstance(value, str) else [*value] for key, value in self.front}
        return front_matter_bytes(front) + body(self.facts, report).encode(
            errors="backslashreplace"
        )


def check_card(choice: object) -> None:
    """Raise `UsageError` for what is none of the values of `--card`."""
    if choice not in CARDS:
        raise UsageError(
            f"--card is {printable(repr(choice), 60)}; choose one of {', '.join(CARDS)}."
        )


def with_card(
    choice: str, files: Mapping[str, Beside], make: Callable[[], Card]
) -> dict[str, Beside]:
    """The files beside the weights with the card that is chosen: a new one, the base's, or none."""
    if choice == "base":
        return dict(files)
    # Also one that is spelled otherwise: some disks do not tell the two apart.
    rest = {name: file for name, file in files.items() if name.lower() != CARD_NAME.lower()}
    return {**rest, CARD_NAME: make()} if choice == "new" else rest


def merge_card(
    base: Model,
    reference: Path | None,
    adapters: Sequence[tuple[Path, Mapping[str, Any]]],
    files: Mapping[str, Beside],
    *,
    layout: str | None,
    dtype: str,
    is_training_checkpoint: bool,
) -> Card:
    """The card of a merge: `adapters` are the folders, each with its config; none for pairs inside.

    `reference` is the original model, which also tells what a trainer's folder does not. `layout` is
    that of the output.
    """
    own, known = _front(base), {} if reference is None else _front_of(reference)
    origin = origin_of(base.path)
    source, how = None if origin is None else origin.repository, "hub"
    if source is None:
        stated = {str(config.get(NAMED)) for _, config in adapters}
        named = stated.pop() if len(stated) == 1 else ""
        if is_repository(named) and not other_base(named, base):
            source, how = named, "adapter"
    if source is None and is_training_checkpoint and reference is not None:
        found = origin_of(reference)
        source, how = (None, "") if found is None else (found.repository, "reference")
    sources = [] if source is None else [source]
    if not sources:  # what the base was made from, this was made from, too
        sources, how = _stated_bases(own), "card"
    several = len(adapters) > 1
    if several and sources:
        origins = [origin_of(path) for path, _ in adapters]
        sources += [found.repository for found in origins if found is not None]
    cards = [_front_of(path) for path, _ in adapters]
    datasets = [one for card in cards for one in _texts(card.get("datasets"))]
    facts = Facts(
        kind="checkpoint" if is_training_checkpoint else "merge",
        source=sources[0] if sources else None,
        source_by=how if sources else None,
        commit=None if origin is None else origin.commit,
        adapters=tuple(_adapter_name(path) for path, _ in adapters),
        adapter_licences=tuple(str(card.get("license") or "") for card in cards),
        licence=_licence(own, known),
        layout=layout,
        was=base.layout,
        loader=_loader(files, layout),
        is_relative=base.relative is not None,
        dtype=dtype,
    )
    relation = "merge" if several else "finetune"
    return _card(sources, relation, [own, known], files, facts, ["merge"] * several, datasets)


def conversion_card(
    source: Model, reference: Path, files: Mapping[str, Beside], *, layout: str | None, dtype: str
) -> Card:
    """The card of a conversion, which has the weights of its source.

    It is what its source is: with a source on the hub that is what it is from, and none of the
    relations that the hub knows (adapter, finetune, merge, quantized) has happened; else it is from
    what the source is from, in the way that the source's card says.
    """
    own, known = _front(source), _front_of(reference)
    origin = origin_of(source.path)
    if origin is None:
        sources, how, stated = _stated_bases(own), "card", own.get("base_model_relation")
        relation = stated if isinstance(stated, str) else None
    else:
        sources, how, relation = [origin.repository], "hub", None
    facts = Facts(
        kind="conversion",
        source=sources[0] if sources else None,
        source_by=how if sources else None,
        commit=None if origin is None else origin.commit,
        licence=_licence(own, known),
        layout=layout,
        was=source.layout,
        loader=_loader(files, layout),
        dtype=dtype,
    )
    return _card(sources, relation, [own, known], files, facts)


def _card(
    sources: Sequence[str],
    relation: str | None,
    cards: Sequence[FrontMatter],
    files: Mapping[str, Beside],
    facts: Facts,
    more_tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> Card:
    front: dict[str, str | tuple[str, ...]] = {}
    licensed = next((card for card in cards if "license" in card), {})
    front |= {key: _plain(licensed[key]) for key in _LICENCE if key in licensed}
    if sources:
        front["base_model"] = tuple(dict.fromkeys(sources))
        front |= {} if relation is None else {"base_model_relation": relation}
    if facts.loader is not None:
        front["library_name"] = "transformers"
    task = _first(cards, "pipeline_tag") or (
        None if facts.layout is None or facts.is_relative else "image-text-to-text"
    )
    front |= {} if task is None else {"pipeline_tag": _plain(task)}
    language = _first(cards, "language")
    front |= {} if language is None else {"language": _plain(language)}
    front |= {"datasets": tuple(dict.fromkeys(datasets))} if datasets else {}
    tags = [tag for tag in _texts(_first(cards, "tags")) if _holds(tag)]
    tags += ["custom_code"] if any(name.endswith(".py") for name in files) else []
    front["tags"] = tuple(dict.fromkeys([*tags, *more_tags, "streamshard"]))
    return Card(tuple(front.items()), facts)


def _holds(tag: str) -> bool:
    return tag.lower() not in _NO_LONGER and not tag.lower().startswith(_OF_THE_HUB)


def _first(cards: Sequence[FrontMatter], key: str) -> str | list[str] | None:
    return next((card[key] for card in cards if key in card), None)


def _plain(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _texts(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _licence(*cards: FrontMatter) -> str | None:
    licence = _first(cards, "license")
    return None if licence is None else ", ".join(_texts(licence))


def _stated_bases(card: FrontMatter) -> list[str]:
    return [one for one in _texts(card.get("base_model")) if is_repository(one)]


def _front(model: Model) -> FrontMatter:
    file = model.checkpoint.side_files.get(CARD_NAME)
    return {} if file is None else _read(file)


def _front_of(folder: Path) -> FrontMatter:
    """The front matter of a folder's card; a warning if there is one that cannot be read."""
    file = folder / CARD_NAME
    with reading(file):
        there = is_file(file)
    return _read(file) if there else {}


def _read(file: Path) -> FrontMatter:
    try:
        return read_front_matter(file)
    except InputError as error:
        note(f"{error} The new model card has nothing of it, no licence either")
        return {}


def _adapter_name(path: Path) -> str:
    origin = origin_of(path)
    return path.absolute().name if origin is None else origin.repository


def _loader(files: Mapping[str, Beside], layout: str | None) -> str | None:
    """The class of transformers that loads the output, "code" if that is not there; None if unknown."""
    config = files.get(MODEL_CONFIG_NAME)
    if layout is None or not isinstance(config, (bytes, Path)):
        return None
    text = config if isinstance(config, bytes) else read_bytes(config, MAX_JSON_BYTES)
    named = json_object(text, Path(MODEL_CONFIG_NAME)).get("auto_map")
    if layout == "hf" and not isinstance(named, dict):
        return "AutoModelForImageTextToText"
    if not any(name.endswith(".py") for name in files):
        return "code" if layout == "custom" else None
    wanted = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    return next((one for one in wanted if isinstance(named, dict) and one in named), "AutoModel")
