"""Whose tokenizer belongs beside the weights that are written.

Decided by the tokens and never by the number of rows: embeddings have spare rows. Merges, conversions,
and both in one pass ask here; what is chosen in any other case than that all tokenizers agree is noted,
or asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamshard.checkpoint.tokenizer import Content, Tokenizer
from streamshard.checkpoint.tokenizer_differences import differences, is_comparable
from streamshard.checkpoint.tokenizer_files import exchanged, with_tokens
from streamshard.errors import AdapterError, InputError, printable
from streamshard.internvl.families import Layout
from streamshard.notes import note

__all__ = [
    "after_conversion",
    "after_merge",
    "context_token",
    "for_adapter",
    "for_checkpoint",
    "image_token_id",
    "note_beyond",
    "replaced",
]

_CONTEXT = "<IMG_CONTEXT>"
Pairs = dict[int, tuple[str | None, str | None]]


def after_merge(
    side_files: Mapping[str, Content],
    base: Tokenizer,
    adapters: Sequence[Tokenizer],
    trained: Callable[[int], bool],
) -> dict[str, Content]:
    """The files of a base into which adapters are merged, whose folders may have tokenizers.

    The adapter's is taken if it has tokens that the base's lacks and the rows of these were trained,
    which `trained` says of an id; all of several if they agree. Raises `AdapterError` if two of them
    mean different tokens by an id.
    """
    found: list[tuple[Tokenizer, Pairs, dict[int, str]]] = []
    for own in adapters:
        pairs = _compared(base, own)
        new = {n: token for n, (_, token) in pairs.items() if token is not None}
        learned = {n: token for n, token in new.items() if trained(n)} if base.has_tokens else new
        if learned:
            found.append((own, pairs, learned))
        elif pairs:
            note(
                f"the tokenizer in {own.where} differs from the base's ({_told(pairs)}), but no row "
                "of such tokens was trained: the base's is written. If the adapter needs these "
                "tokens, copy its tokenizer into the output"
            )
        else:
            _note_settings(base, own, "the base's is written")
    if not found:
        return dict(side_files)
    own, pairs, learned = max(found, key=lambda one: len(one[2]))
    if base.has_tokens:
        text = f"it has {_listed(learned)}, whose rows were trained and which the base's lacks"
    else:
        text = "the base has none"
    note(f"the tokenizer is that of {own.where}: {text}")
    lost = {n: pair for n, pair in pairs.items() if pair[0] is not None and n not in learned}
    if lost and own.is_whole:
        note(f"the tokenizer of {own.where} is not the base's in other tokens, too: {_told(lost)}")
    files = replaced(side_files, base, own)
    more: dict[int, dict[str, Any]] = {}
    for other, _, theirs in found:
        for n, (mine, token) in differences(own, other).items():
            if n not in theirs or token is None:
                continue
            if mine is not None or more.get(n, {"content": token})["content"] != token:
                before = mine if mine is not None else more[n]["content"]
                raise AdapterError(
                    f"{own.where} and {other.where}: token {n} is {_quoted(before)} in the "
                    f"tokenizer of one, {_quoted(token)} in that of the other, and its row was "
                    "trained. No tokenizer fits both: merge one of them, or train them with one "
                    "tokenizer."
                )
            more[n] = other.added.get(n, {"content": token})
    if more:
        note(
            f"{_listed({n: e['content'] for n, e in more.items()})} of other adapters are added to it"
        )
    return with_tokens(files, Tokenizer.of(own.where, files), more)


def for_checkpoint(
    side_files: Mapping[str, Content], donor: Tokenizer, own: Tokenizer
) -> dict[str, Content]:
    """The files of a donor beside a training checkpoint, whose own tokenizer belongs to its weights."""
    if not own.files:
        return dict(side_files)
    pairs = _compared(donor, own) if donor.has_tokens else {}
    if pairs:
        note(
            f"the tokenizer is that of the checkpoint, which differs from the reference's: "
            f"{_told(pairs, 'reference', 'checkpoint')}"
        )
    return replaced(side_files, donor, own)


def for_adapter(base: Tokenizer, own: Tokenizer) -> dict[str, Content]:
    """The tokenizer that an adapter from a checkpoint needs; none if it is the base's."""
    pairs = _compared(base, own)
    if not pairs:
        return {}
    note(
        "the checkpoint's tokenizer goes to the adapter, as it is not the base's: "
        f"{_told(pairs, 'base', 'checkpoint')}"
    )
    return dict(own.files)


def after_conversion(
    source: Tokenizer,
    reference: Tokenizer,
    side_files: Mapping[str, Content],
    rows: tuple[int | None, object],
    whose: str | None,
    layout: Layout,
) -> dict[str, Content]:
    """The files of a reference beside the weights of a source, which has `rows[0]` rows of tokens.

    `rows[1]` are the reference's; `whose` says whose tokenizer is meant. Raises `InputError` if that
    is not said where rows or tokens differ, or cannot be done.
    """
    have, theirs = rows
    pairs = _compared(reference, source) if reference.has_tokens else {}
    known = {n: pair for n, pair in pairs.items() if have is None or n < have}
    question = (
        "Say whose tokenizer belongs to the weights: --tokenizer-from source (usual after adding "
        "tokens) or reference."
    )
    if whose is None and isinstance(theirs, int) and have not in (None, theirs):
        raise InputError(
            f"the embedding of {source.where} has {have:,} rows, that of the reference "
            f"{reference.where} {theirs:,}: the vocabularies differ. {question}"
        )
    if whose is None and known:
        raise InputError(
            f"the tokenizers of {source.where} and of the reference {reference.where} have not the "
            f"same tokens: {_told(known, 'reference', 'source')}. {question}"
        )
    if whose != "source":
        _note_reference(source, reference, known)
        return dict(side_files)
    if not source.files:
        raise InputError(
            f"{source.where}: has no tokenizer files, so --tokenizer-from source cannot "
            "be done. Give the folder with the tokenizer, or --tokenizer-from reference."
        )
    return replaced(side_files, reference, source, layout)


def _note_reference(source: Tokenizer, reference: Tokenizer, known: Pairs) -> None:
    if not reference.has_tokens and source.has_tokens:
        note(
            f"the reference {reference.where} has no tokenizer, so the output has none: "
            "--tokenizer-from source takes that of the source"
        )
    elif known:
        note(
            "the tokenizer is the reference's, as was said, and not the source's: "
            f"{_told(known, 'reference', 'source')}"
        )
    elif source.has_tokens:
        _note_settings(reference, source, "the reference's is written", names=("eos_token",))


def replaced(
    side_files: Mapping[str, Content], old: Tokenizer, new: Tokenizer, layout: Layout | None = None
) -> dict[str, Content]:
    """The files of a folder with `new` in the place of its own tokenizer `old`.

    Of a tokenizer without vocabulary only the tokens are taken. In a conversion to the HF layout the
    template stays if only that one has a place for images.
    """
    if not new.is_whole and old.is_whole:
        pairs = differences(old, new)
        other = {n: pair for n, pair in pairs.items() if None not in pair}
        if other:
            note(
                f"{new.where} has no whole tokenizer (no vocabulary), and these of its tokens are "
                f"others in the one that is written: {_told(other)}"
            )
        more = {
            n: new.added.get(n, {"content": token})
            for n, (before, token) in pairs.items()
            if before is None and token is not None
        }
        return with_tokens(side_files, old, more)
    keep = layout == "hf" and _shows_images(old) and not _shows_images(new)
    if keep and new.template:
        note(
            f"the chat template is that of {old.where}: the one of {new.where} has no place for "
            "images, which a processor needs"
        )
    files = exchanged(side_files, old, new, keep_template=keep)
    written = Tokenizer.of(new.where, files)
    lacking = [t for t in written.named.values() if written.id_of(t) is None]
    lacking = [t for t in lacking if t not in written.placeholders]
    if lacking:
        note(
            f"the tokenizer of {new.where} has no {_names(dict.fromkeys(lacking))}, which the "
            "processor of the output looks for: it cannot process images"
        )
    if layout == "hf" and "AutoTokenizer" in (written.settings.get("auto_map") or ()):
        note(
            f"the tokenizer of {new.where} is code of its own ({_names(written.modules)}): load the "
            "output with trust_remote_code=True"
        )
    return files


def context_token(tokenizer: Tokenizer) -> str:
    """The token that stands for a part of an image."""
    return tokenizer.named.get("context_image_token", _CONTEXT)


def image_token_id(tokenizer: Tokenizer) -> int:
    """The id of that token, which the HF config states; raises `InputError` if there is none."""
    token = context_token(tokenizer)
    found = tokenizer.id_of(token)
    if found is None:
        raise InputError(
            f"{tokenizer.where}: its tokenizer files do not say which id {printable(token)} has, and "
            "the HF config needs it as image_token_id. Use --tokenizer-from reference."
        )
    return found


def note_beyond(files: Mapping[str, Content], rows: int | None, *known: Tokenizer) -> None:
    """Note the tokens of what is written that the weights have no rows for.

    Of `known` tokenizers, one with the same files has read them already.
    """
    written = Tokenizer.of("the output", files)
    written = next((one for one in known if one.files == written.files), written)
    found = {} if rows is None else written.beyond(rows)
    if found:
        note(
            f"the tokenizer has {_listed(found)}, but the embedding has {rows:,} rows: such tokens "
            "fail in the model. The tokenizer is of another model, or the rows are lost"
        )
    note(*(f"{problem}; it is carried as it is" for problem in written.problems))


def _compared(one: Tokenizer, other: Tokenizer) -> Pairs:
    """What two tokenizers differ in, if `other` has tokens; what cannot be compared is noted.

    `one` is that of the folder to write. What the other does not list says nothing if it is no whole
    tokenizer and `one` is.
    """
    if not other.has_tokens:
        return {}
    found = differences(one, other)
    if one.is_whole and not other.is_whole:
        found = {number: pair for number, pair in found.items() if pair[1] is not None}
    if not is_comparable(one, other):
        note(
            f"the vocabularies of {one.where} and {other.where} cannot be compared: only the tokens "
            "that are listed beside them were"
        )
    note(*(f"{problem}; it is carried as it is" for problem in (*one.problems, *other.problems)))
    return found


def _note_settings(
    written: Tokenizer,
    other: Tokenizer,
    which: str,
    names: Iterable[str] = ("bos_token", "eos_token", "pad_token"),
) -> None:
    """Note what two tokenizers of the same tokens differ in all the same."""
    different = [
        f"{name} ({_quoted(other.special(name))}, written is {_quoted(written.special(name))})"
        for name in names
        if None not in (written.special(name), other.special(name))
        and written.special(name) != other.special(name)
    ]
    if "pad_token" in names and other.template and other.template != written.template:
        different.append("the chat template")
    if different:
        note(f"the tokenizer in {other.where} has the same tokens but differs in {', '.join(different)}; "
             f"{which}")  # fmt: skip


def _shows_images(tokenizer: Tokenizer) -> bool:
    return any(_CONTEXT in text or "image" in text for text in tokenizer.template.values())


def _told(pairs: Pairs, one: str = "base", other: str = "adapter") -> str:
    """Some of what two tokenizers differ in, in words."""
    shown = [
        f"{n} is {_quoted(mine)} in the {one}'s and {_quoted(theirs)} in the {other}'s"
        for n, (mine, theirs) in list(pairs.items())[:3]
    ]
    rest = len(pairs) - len(shown)
    return "; ".join(shown) + (f"; and {rest:,} more" if rest else "")


def _listed(tokens: Mapping[int, str]) -> str:
    shown = [f"{_quoted(token)} ({n})" for n, token in list(tokens.items())[:5]]
    rest = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def _names(names: Iterable[str]) -> str:
    return ", ".join(_quoted(name) for name in names)


def _quoted(token: str | None) -> str:
    return "no token" if token is None else f"'{printable(token, 60)}'"
