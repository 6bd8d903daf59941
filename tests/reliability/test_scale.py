"""A small version of what `bench/scale.py` measures; its bounds are those of the largest model."""

from __future__ import annotations

import json

import pytest
import scale
from marks import slow


def measured(tmp_path, *arguments: str) -> dict:
    """What it finds; times of a machine that does other things too do not count."""
    file = tmp_path / "found.json"
    (tmp_path / "made").mkdir()
    try:
        scale.main([*arguments, "--folder", str(tmp_path / "made"), "--json", str(file)])
    except SystemExit as ended:
        said = [line for line in str(ended.code or "").splitlines() if "seconds" not in line]
        assert said in ([], ["0"]), said
    assert [*(tmp_path / "made").iterdir()] == []
    return json.loads(file.read_text())


def check_plans(found: dict, tensors: int, shards: int) -> None:
    assert len(found["plan"]) == 3
    for case, one in found["plan"].items():
        assert (one["tensors"], one["shards"]) == (tensors, shards), case
        assert one["peak_rss_bytes"] < 200_000_000
        assert one["task_bytes"] < 300_000
        assert one["parts"]["most"] <= 5.1e9


@slow
def test_the_largest_model(tmp_path, capsys):
    found = measured(tmp_path, "--only", "plan", "--runs", "1")
    check_plans(found, 37540, 97)
    assert all(one["parts"]["least"] > 2e9 for one in found["plan"].values())
    assert "37,540 | 97 | 481.4 GB" in capsys.readouterr().out


@slow
def test_all_names_in_parts(tmp_path, capsys):
    found = measured(tmp_path, "--only", "parts", "--quick")
    assert found["parts"]["same"]
    assert found["parts"]["tensors"] == 19213
    assert "the same bytes" in capsys.readouterr().out


def test_a_smaller_model(tmp_path):
    """The command and one case alone: the others are slow."""
    found = measured(tmp_path, "--only", "plan", "--quick", "--cases", "hf2custom")
    (one,) = found["plan"].values()
    assert (one["tensors"], one["shards"]) == (19213, 13)
    assert one["task_bytes"] < 300_000
    assert one["peak_rss_bytes"] < 200_000_000


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"plan": {"x": {"seconds": 2.1, "peak_rss_bytes": 1, "task_bytes": 1}}}, "seconds 2.1"),
        ({"plan": {"x": {"seconds": 1, "peak_rss_bytes": 1, "task_bytes": 300_001}}}, "300,001"),
        ({"parts": {"same": False}}, "other bytes"),
        ({"workers": {"two_of_one": 0.61}}, "two take 0.61 of one"),
    ],
)
def test_a_bound_that_is_not_kept_is_told(found, said):
    (told,) = scale.broken(found)
    assert said in told
