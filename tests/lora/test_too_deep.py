"""An adapter of a larger model is told as that, and not as many names without a place."""

from __future__ import annotations

import difflib

import pytest
from folders import make
from make_checkpoint import PRESETS, write_adapter, write_checkpoint

from streamshard import merge_lora
from streamshard.errors import AdapterError
from streamshard.lora.too_deep import too_deep


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_an_adapter_of_a_deeper_model(layout, tmp_path):
    write_adapter(tmp_path / "lora", "InternVL3-1B", layout=layout, r=2)
    base = make(tmp_path / "base", "tiny", layout)
    with pytest.raises(AdapterError) as raised:
        merge_lora(base=base, adapter=tmp_path / "lora", output=tmp_path / "out")
    layers = PRESETS["tiny"].layers
    assert f"the base ends before layer {layers}: the adapter was trained on" in str(raised.value)
    assert "up to 23 of '" in str(raised.value)
    assert "nearest" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_other_names_are_still_listed(tmp_path, monkeypatch):
    """Modules that the base does not have in any layer, however many layers there are.

    Likenesses are slow to find: they are asked of the names that are shown, not in every reading.
    """
    asked: list[object] = []
    alike = difflib.get_close_matches
    monkeypatch.setattr(
        difflib,
        "get_close_matches",
        lambda name, *a, **k: asked.append(name) or alike(name, *a, **k),
    )
    write_adapter(tmp_path / "lora", "tiny-internlm2", layout="custom", r=2)
    write_checkpoint(tmp_path / "base", "tiny", layout="custom")
    with pytest.raises(AdapterError, match="nearest in the base"):
        merge_lora(base=tmp_path / "base", adapter=tmp_path / "lora", output=tmp_path / "out")
    assert len(asked) == 3


def test_only_what_lies_behind_all_others_is_deeper():
    names = ["a.layers.0.q", "a.layers.1.q", "a.layers.2.q"]
    assert "up to 2 of 'a.layers', but the base ends before layer 1" in too_deep(names, names[1:])
    assert too_deep(names, names[:1]) is None
    assert too_deep([*names, "head"], [names[2], "head"]) is None
    assert too_deep(names, []) is None
