"""Reports as notebooks show them: HTML in which nothing of a file's name is HTML, with a picture."""

from __future__ import annotations

import base64
import html.parser
import importlib.util
import re

import pytest

import streamshard

BALANCED = {"table", "caption", "tr", "th", "td", "p", "b"}


class Parsed(html.parser.HTMLParser):
    """Texts and tags; every tag that is opened must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag in BALANCED | {"img"}
        if tag in BALANCED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def rows(self) -> dict[str, str]:
        return dict(zip(self.texts[1::2], self.texts[2::2], strict=False))


def test_a_table_of_what_a_report_says(pair):
    report = streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    parsed = Parsed(report._repr_html_())
    assert parsed.texts[0] == f"merge-lora (streamshard {streamshard.__version__})"
    rows = parsed.rows()
    assert rows["result"].startswith("4 tensors, 2 of them merged, L2 ")
    assert rows["merged tensors"] == "2"
    assert rows["tensors"] == "4"
    assert f"global: {report['l2']['global']:.6g}" in rows["L2 distance"]
    assert re.fullmatch(r"[\d.]+ [KM]?B", rows["size"])
    assert "missing" not in rows  # as it is empty
    assert "img" not in parsed.tags


def test_of_every_command(pair):
    for report in (
        streamshard.merge_lora(
            base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
        ),
        streamshard.inspect(pair.adapter),
        streamshard.inspect(pair.base),
        streamshard.verify(pair.base),
        streamshard.diff(pair.base, pair.base),
        streamshard.environment(),
        streamshard.Report(),
    ):
        assert Parsed(report._repr_html_()).tags.count("table") == 1


def test_the_verdict_of_a_check_comes_first(pair):
    made = streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert made["warnings"] == []
    rows = Parsed(streamshard.verify(pair.output)._repr_html_()).rows()
    assert rows["result"] == "4 tensors, as it was written"
    rows = Parsed(streamshard.verify(pair.base)._repr_html_()).rows()
    assert rows["result"] == "4 tensors, no fault found, nothing recorded to compare with"
    (pair.output / "config.json").write_text("{}")
    with pytest.raises(streamshard.VerificationError) as raised:
        streamshard.verify(pair.output)
    rows = Parsed(streamshard.Report(raised.value.report)._repr_html_()).rows()
    assert re.fullmatch(r"4 tensors, \d+ problems?", rows["result"])
    rows = Parsed(streamshard.diff(pair.base, pair.output)._repr_html_()).rows()
    assert re.fullmatch(r"2 of 4 tensors differ, L2 [\d.e-]+", rows["result"])
    assert (rows["first"], rows["second"]) == (str(pair.base), str(pair.output))


def test_packages_are_listed_with_their_versions():
    import numpy as np

    packages = {
        **streamshard.environment()["packages"],
        "peft": {"version": None, "for": "x", "install": "pip install peft"},
    }
    shown = streamshard.Report(command="env", packages=packages)
    rows = Parsed(shown._repr_html_()).rows()
    assert f"numpy {np.__version__}" in rows["packages"]
    assert "peft is missing (pip install peft)" in rows["packages"]


def test_names_are_no_html():
    report = streamshard.Report(
        command="<b>x</b>",
        output="<script>alert(1)</script>\n",
        warnings=["<i>&\x1b"] * 20,
        missing=["'<td>'"] * 50,
    )
    text = report._repr_html_()
    parsed = Parsed(text)
    assert "<script>alert(1)</script>\\n" in parsed.texts
    assert text.count("warning:") == 8
    assert "and 12 more" in parsed.texts
    assert "and 42 more" in parsed.rows()["missing"]


def test_the_picture_of_a_change(pair):
    """By matplotlib, as an image inside the page; without it the page says what would bring it."""
    report = streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.output, heatmap=True
    )
    text = report._repr_html_()
    if importlib.util.find_spec("matplotlib") is None:
        assert "pip install" in text
        return
    image = re.search(r"src='data:image/png;base64,([^']+)'", text)
    assert image is not None
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")
    assert "img" in Parsed(text).tags


def test_no_picture_without_matplotlib(pair, monkeypatch):
    import sys

    report = streamshard.diff(pair.base, pair.base)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report["heat_map"] is not None
    parsed = Parsed(report._repr_html_())
    assert "img" not in parsed.tags
    assert any("pip install 'matplotlib>=" in text for text in parsed.texts)


@pytest.mark.parametrize("value", [0, 999, 1000, 10**12 * 5])
def test_sizes_have_units(value):
    shown = Parsed(streamshard.Report(command="x", bytes=value)._repr_html_()).rows()["size"]
    number, unit = shown.split()
    factor = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == value
