"""Front matter of model cards, beside the hub's own reader of them."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from streamshard.checkpoint.front_matter import front_matter_bytes, read_front_matter
from streamshard.checkpoint.hub_names import is_repository, origin_of
from streamshard.errors import InputError

CARD = """---
license: apache-2.0
language:
- en
- zh
pipeline_tag: image-text-to-text
tags: [internvl, "a: b", 'it''s']
---

# A model
"""


def card(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("text", [CARD, CARD.replace("\n", "\r\n"), f"\n\n{CARD}"])
def test_it_reads_what_the_hub_reads(tmp_path, text):
    theirs = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    assert read_front_matter(card(tmp_path, text)) == theirs


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    assert read_front_matter(card(tmp_path, f"\ufeff{CARD}"))["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text", ["", "# A model", "---\n", "a\n---\nlicense: mit\n---\n", "----\nlicense: mit\n---\n"]
)
def test_a_card_may_have_none(tmp_path, text):
    assert read_front_matter(card(tmp_path, text)) == {}


def test_texts_stay_texts(tmp_path):
    """What YAML has as a truth value, a number, a date or nothing is none here."""
    text = "---\nlanguage: no\nlicense: 1.0\ndate: 2026-01-01\nempty:\nnull: x\nn: ~\n---\n"
    found = read_front_matter(card(tmp_path, text))
    assert found == {"language": "no", "license": "1.0", "date": "2026-01-01"}


def test_texts_of_their_own_lines(tmp_path):
    """They end with that of the line."""
    (tmp_path / "README.md").write_text("---\nlicense: >\n  mit\ntags:\n- |\n  a b\n- c\n---\n")
    assert read_front_matter(tmp_path / "README.md") == {"license": "mit", "tags": ["a b", "c"]}


def test_other_values_are_left_out(tmp_path):
    text = (
        "---\nmodel-index:\n- name: x\n  results: []\nlicense: mit\n"
        "tags: [a, {b: c}, [d], 'e\\n', \"f\\u0007\", "
        + "x" * 301
        + "]\n? [1, 2]\n: y\n!!python/object:os.system z: 1\n---\n"
    )
    text = text.replace("? [1, 2]\n: y\n", "")
    assert read_front_matter(card(tmp_path, text)) == {
        "license": "mit",
        "tags": ["a", "e\\n"],
        "z": "1",
    }


BOMB = "a: &a [x]\n" + "\n".join(f"b{n}: &b{n} [*a, *a]" for n in range(5))


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (BOMB, "refers to parts of itself"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: [1", "not valid YAML"),
        ("? [1, 2]\n: y", "not valid YAML"),
        ("- a\n- b", "no mapping"),
        ("a: \x07", "not valid YAML"),
        ("a: b\n" * 20_000, "characters"),
    ],
)
def test_hostile_ones_are_refused(tmp_path, inner, said):
    file = card(tmp_path, f"---\n{inner}\n---\n")
    with pytest.raises(InputError, match=said) as caught:
        read_front_matter(file)
    assert "README.md" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        read_front_matter(card(tmp_path, b"---\nlicense: \xff\n---\n"))


def test_what_is_written_is_read_by_the_hub_and_by_us(tmp_path):
    values = {
        "license": "other",
        "license_name": "yes",
        "language": ["no", "en"],
        "tags": ["1.0", "a: b", "- x", "---", "#y", "'", '"', "{}", "*a", "&b", "ü", "null", "%"],
    }
    content = front_matter_bytes(values)
    theirs = ModelCard(content.decode()).data.to_dict()
    assert theirs == values
    values["tags"].remove("null")
    assert read_front_matter(card(tmp_path, content)) == values


def test_names_of_repositories():
    good = ["OpenGVLab/InternVL3-8B", "a/b", "org.x/name_1-2.3"]
    assert all(map(is_repository, good))
    bad = ["InternVL3-8B", "/a/b", "./a", "../a", "a/b/c", "a/", "/a", "~/a", "a b/c", "", None, 3]
    bad += [
        "work_dirs/run",
        "models/InternVL3",
        "Checkpoints/x",
        "a/b..c",
        "a/b--c",
        "-a/b",
        "a/b-",
    ]
    assert not any(map(is_repository, bad))


def test_where_a_folder_of_the_cache_is_from(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--OpenGVLab--InternVL3-8B" / "snapshots" / commit
    found = origin_of(snapshot)
    assert found == ("OpenGVLab/InternVL3-8B", commit)
    assert origin_of(snapshot / "model.safetensors") == found
    assert origin_of(snapshot.parent) is None
    assert origin_of(tmp_path) is None
    assert origin_of(snapshot.with_name("main")) is None
    assert origin_of(tmp_path / "datasets--a--b" / "snapshots" / commit) is None
