"""Tokenizers as values: the same tokens in every form of files, and what is no tokenizer."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from streamshard.checkpoint import tokenizer as module
from streamshard.checkpoint.tokenizer_differences import differences, is_comparable
from streamshard.checkpoint.vocabulary import (
    of_vocab_json,
    scan_tokenizer_json,
    sentencepiece,
)
from streamshard.errors import InputError

PIECES = ["<unk>", "<s>", "</s>", "▁a", "b", "<0x0A>", "é", "[UNUSED_TOKEN_1]", "😀", 'q"\\']
ADDED = {7: "<|im_start|>", 10: "<img>", 11: "<IMG_CONTEXT>"}


def of(**files: Any) -> module.Tokenizer:
    named = {
        name.replace("__", "."): content if isinstance(content, bytes) else dumped(content)
        for name, content in files.items()
    }
    return module.Tokenizer.of("here", named)


def dumped(content: Any, **how: Any) -> bytes:
    return json.dumps(content, **{"ensure_ascii": False, **how}).encode()


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def model(pieces: list[str]) -> bytes:
    """A sentencepiece model: pieces with scores and kinds, and a field of settings."""
    made = b""
    for piece in pieces:
        text = piece.encode()
        inner = b"\x0a" + varint(len(text)) + text + b"\x15\x00\x00\x80\x3f" + b"\x18\x01"
        made += b"\x0a" + varint(len(inner)) + inner
    settings = b"x" * 300
    return made + b"\x12" + varint(len(settings)) + settings + b"\x18\x05"


def decoder(added: dict[int, str]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(n): {"content": token} for n, token in added.items()}}


def library(kind: str, added: dict[int, str], **how: Any) -> bytes:
    """What the tokenizers library writes."""
    if kind == "unigram":
        made = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0))
    elif kind == "words":
        made = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(PIECES)}, "<unk>"))
    else:
        vocab = {piece: n for n, piece in enumerate(PIECES)}
        made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.decoder = decoders.ByteLevel()
    content = json.loads(made.to_str())
    made.add_tokens([AddedToken(added[n]) for n in sorted(added) if n >= len(PIECES)])
    content["added_tokens"] = [
        {"id": n, "content": token, "special": True} for n, token in added.items()
    ]
    return dumped(content, **how)


FORMS: dict[str, Any] = {
    "bpe": lambda: of(tokenizer__json=library("bpe", ADDED)),
    "spaced": lambda: of(tokenizer__json=library("bpe", ADDED, indent=4, ensure_ascii=True)),
    "unigram": lambda: of(tokenizer__json=library("unigram", ADDED)),
    "words": lambda: of(tokenizer__json=library("words", ADDED)),
    "slow": lambda: of(
        vocab__json={piece: n for n, piece in enumerate(PIECES)},
        tokenizer_config__json=decoder(ADDED),
    ),
    "sentencepiece": lambda: of(
        tokenizer__model=model(PIECES), tokenizer_config__json=decoder(ADDED)
    ),
    "list": lambda: of(
        tokenizer__model=model(PIECES),
        added_tokens__json={token: n for n, token in ADDED.items()},
    ),
    "reversed": lambda: of(
        vocab__json={piece: n for n, piece in reversed(list(enumerate(PIECES)))},
        added_tokens__json={token: n for n, token in reversed(ADDED.items())},
    ),
}


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("one", FORMS)
def test_S3_the_same_tokens_in_any_form(one, other):
    """An added token that takes a place in the vocabulary is what is there."""
    mine, theirs = FORMS[one](), FORMS[other]()
    assert differences(mine, theirs) == {}
    assert is_comparable(mine, theirs)
    assert [mine.id_of(token) for token in ("<IMG_CONTEXT>", "b", "😀", 'q"\\')] == [11, 4, 8, 9]
    assert mine.id_of("nowhere") is None
    assert not mine.problems


@pytest.mark.parametrize("form", FORMS)
def test_S3_one_token_more_or_another(form):
    mine = FORMS[form]()
    more = of(tokenizer__json=library("bpe", {**ADDED, 12: "<think>"}))
    assert differences(mine, more) == {12: (None, "<think>")}
    assert differences(more, mine) == {12: ("<think>", None)}
    moved = of(tokenizer__json=library("bpe", {**ADDED, 10: "<IMG_CONTEXT>", 11: "<img>"}))
    assert differences(mine, moved) == {
        10: ("<img>", "<IMG_CONTEXT>"),
        11: ("<IMG_CONTEXT>", "<img>"),
    }
    vocab = {piece: n for n, piece in enumerate(PIECES)}
    del vocab["b"]
    other = of(vocab__json={**vocab, "c": 4}, tokenizer_config__json=decoder(ADDED))
    assert differences(mine, other) == {4: ("b", "c")}


def test_S3_a_placeholder_is_no_difference():
    video = of(
        tokenizer__json=library("bpe", {**ADDED, 12: "<video>"}),
        tokenizer_config__json={"extra_special_tokens": {"video_token": "<video>"}},
    )
    assert differences(FORMS["bpe"](), video) == {}
    assert video.beyond(12) == {}
    assert FORMS["bpe"]().beyond(11) == {11: "<IMG_CONTEXT>"}


@pytest.mark.parametrize("form", ["bpe", "spaced", "words", "slow", "reversed"])
def test_S3_ids_beyond_the_rows(form):
    """Tokens of the vocabulary proper too."""
    found = FORMS[form]()
    assert found.beyond(8) == {8: "😀", 9: 'q"\\', 10: "<img>", 11: "<IMG_CONTEXT>"}
    assert found.beyond(12) == {}


def test_what_cannot_be_read_is_told_and_not_compared():
    mine, broken = (
        FORMS["bpe"](),
        of(tokenizer__model=b"not a model", tokenizer_config__json=decoder(ADDED)),
    )
    assert differences(mine, broken) == {}
    assert not is_comparable(mine, broken)
    assert ["tokenizer.model" in text for text in broken.problems] == [True]
    assert is_comparable(broken, of(tokenizer__model=b"not a model"))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":"1"}', b'{"a":-1}',
        b'{"a":1 "b":2}', b'{"a":99999999999999999999999999}', b'{"a":123456789}', b'{"a":{}}',
    ],
)  # fmt: skip
def test_no_vocabulary(text):
    with pytest.raises(ValueError, match=r"."):
        of_vocab_json(text)


def test_damaged_files_end_in_words():
    """Whatever is cut or changed: a vocabulary, or a ValueError."""
    whole = {
        scan_tokenizer_json: library("bpe", ADDED),
        of_vocab_json: dumped({piece: n for n, piece in enumerate(PIECES)}),
        sentencepiece: model(PIECES),
    }
    chance = random.Random(0)
    for read, text in whole.items():
        for _ in range(300):
            bad = bytearray(text[: chance.randrange(len(text))] if chance.random() < 0.5 else text)
            for _ in range(chance.randrange(4)):
                if bad:
                    bad[chance.randrange(len(bad))] = chance.randrange(256)
            try:
                found = read(bytes(bad))
                if read is scan_tokenizer_json:
                    found = scan_tokenizer_json(bytes(bad), merges=True)
                    found.vocabulary()
                    found.added_tokens()
                    list(found.merge_lines())
            except (ValueError, InputError):
                continue


@pytest.mark.parametrize("number", [-1, True, 1.5, "-7", None, [], 10**300, 2**63])
def test_numbers_that_are_no_ids(number):
    """Nothing counts up to them, and nothing is looked for there."""
    mine = FORMS["bpe"]()
    odd = of(
        vocab__json={piece: n for n, piece in enumerate(PIECES[:5])},
        added_tokens__json={"<img>": number},
        tokenizer_config__json={"added_tokens_decoder": {"9" * 5000: {"content": "x"}}},
    )
    assert differences(mine, odd)
    assert odd.beyond(0).keys() == {0, 1, 2, 3, 4}


def test_templates_in_all_forms():
    assert of(tokenizer_config__json={"chat_template": "a"}).template == {"default": "a"}
    both = of(tokenizer_config__json={"chat_template": "a"}, chat_template__jinja=b"b\r\nc\n")
    assert both.template == {"default": "b\nc"}
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    assert of(tokenizer_config__json={"chat_template": named}).template == {
        "default": "a",
        "tools": "b",
    }
    assert of(chat_template__json={"chat_template": "a"}).template == {"default": "a"}
