"""A process that pushes is ended at each stage of it; the same command then ends in the right tree."""

from __future__ import annotations

import signal
import subprocess

import pytest
from hangs import ended
from marks import slow
from pushes import REPO, Ended, begin, commits_of, contents, pushed, sent_twice

pytestmark = slow

STAGES = {
    "create": ("POST", "/api/repos/create"),
    "modes": ("POST", f"/api/models/{REPO}/preupload/main"),
    "upload": ("PUT", "/upload/*"),
    "verify": ("POST", f"/{REPO}.git/info/lfs/verify"),
    "commit": ("POST", f"/api/models/{REPO}/commit/main"),
    "compare": ("GET", f"/api/models/{REPO}/tree/*"),
}


def code_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    told = ended(process)
    return process.returncode, told


@pytest.mark.parametrize("keeps", [False, True], ids=["gone", "kept"])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage(stage, done, keeps, shop, hub, tmp_path):
    method, path = STAGES[stage]
    nth = 2 if stage in ("modes", "upload", "verify", "compare") else 1
    running: list[subprocess.Popen[str]] = []
    hub.fail(Ended(running, done), path, method=method, nth=nth)
    place, more = tmp_path / "here", ["--output", "kept"] if keeps else []
    running.append(begin(shop, hub, place, *more))
    code, told = code_of(running[0])
    assert code == -signal.SIGKILL, told
    before = len(hub.commits(REPO)) if hub.exists(REPO) else 0
    code, told = code_of(begin(shop, hub, place, *more))
    assert code == 0, told
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert before <= len(hub.commits(REPO)) == 2
    assert sent_twice(hub) == []
    if keeps:
        assert contents(place / "kept") == shop.right
    assert [one.name for one in place.iterdir()] == ["kept"] * keeps


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(by, xet, shop, hub, tmp_path):
    """Also in the words of who is interrupted: what is finished is kept, and the command continues."""
    running: list[subprocess.Popen[str]] = []
    hub.fail(Ended(running, done=True, by=by), STAGES["modes"][1], method="POST", nth=3)
    running.append(begin(shop, hub, tmp_path / "here", xet=xet))
    code, told = code_of(running[0])
    assert code == (130 if by == signal.SIGINT else 143), told
    assert "run the same command again" in told
    assert commits_of(hub, "the output") == 0
    code, told = code_of(begin(shop, hub, tmp_path / "here", xet=xet))
    assert code == 0, told
    assert pushed(hub) == shop.right
    assert [*(tmp_path / "here").iterdir()] == []
