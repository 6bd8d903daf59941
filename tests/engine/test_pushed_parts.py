"""An output in parts that goes to the hub: the bytes of a local merge, in one commit, come what may."""

from __future__ import annotations

import random
import signal
import subprocess
import threading

import hub_commands
import pytest
from fake_hub import Hub
from hangs import HANGS, ended
from hub_faults import First, LoseAnswer, NoAnswer, Status
from interrupted_runs import killed
from marks import slow, slow_but
from parts_runs import AFTER_A_RECORD, AFTER_ADOPTING, WHILE_ADOPTING
from pushes import (
    RECORD,
    REPO,
    Ended,
    begin,
    commits_of,
    contents,
    new_shop,
    pushed,
    pushing,
    sent_twice,
)

import streamshard
from streamshard.engine import parts as engine_parts
from streamshard.errors import HubError, OutputError

BASE = "org/base"


def right_in_the_end(shop, hub, place):
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert [*place.iterdir()] == []
    assert sent_twice(hub) == []


def weights_in(place) -> int:
    """How many files of weights are in the folder of the parts, finished or not, without records."""
    return sum(path.suffix in (".safetensors", ".part") for path in place.rglob("*.safetensors*"))


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["123", "312"])
def test_the_last_part_commits(order, shop, hub, place, push_by_both):
    for number in order[:-1]:
        report = push_by_both(part=f"{number}/3")
        assert not report["part"]["complete"]
        assert report["output"] is None
        assert (report["pushed"]["repository"], report["pushed"]["commit"]) == (REPO, None)
        assert commits_of(hub, "the output") == 0
        assert weights_in(place) == 0, "what is sent goes"
    report = push_by_both(part=f"{order[-1]}/3")
    assert report["part"]["complete"]
    assert report["pushed"]["commit"] == hub.head(REPO)
    right_in_the_end(shop, hub, place)


def test_with_an_output_it_stays(shop, hub, place, push_by_both):
    push_by_both(part="1/2", output="kept")
    report = push_by_both(part="2/2", output="kept")
    assert report["part"]["complete"]
    assert pushed(hub) == shop.right == contents(place / "kept")
    assert hub.files(REPO)[RECORD].read_bytes() == (place / "kept" / RECORD).read_bytes()
    assert [path.name for path in place.iterdir()] == ["kept"]
    assert commits_of(hub, "the output") == 1
    assert sent_twice(hub) == []


def test_finish_commits(shop, hub, place, push):
    """It sends no weights, and needs none here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_parts.Output, "is_finished", False)
        push(part="1/2")
        assert not push(part="2/2")["part"]["complete"]
    assert weights_in(place) == 0
    hub.forget()
    report = push(part="finish")
    assert report["part"]["finished"] == report["shards"] == report["resumed"]
    assert not [r for r in hub.requests if r.method == "PUT"]
    right_in_the_end(shop, hub, place)


@pytest.mark.parametrize("which", ["1/2", "2/2", "finish"])
@pytest.mark.parametrize("keeps", [False, True], ids=["gone", "kept"])
def test_what_is_complete_stays_so(which, keeps, shop, hub, place, push):
    more = {"output": "kept"} if keeps else {}
    for number in (1, 2):
        push(part=f"{number}/2", **more)
    head = hub.head(REPO)
    hub.forget()
    report = push(part=which, **more)
    assert report["part"]["complete"]
    assert report["pushed"]["commit"] == head == hub.head(REPO)
    assert {*report["pushed"]["files"]} >= {*shop.right}
    assert not [r for r in hub.requests if r.method in ("PUT", "POST")]
    assert [one.name for one in place.iterdir()] == ["kept"] * keeps


def test_a_part_with_nothing_to_do_leaves_nothing(hub, place, push):
    report = push(part="99/99")
    assert report["part"]["files"] == []
    assert not hub.exists(REPO)
    assert [*place.iterdir()] == []


def test_another_command(shop, hub, place, push, tmp_path):
    """Whatever writes takes both options."""
    streamshard.wrap_lora(base=shop.base, llm_r=4, output=tmp_path / "wrapped")
    for number in (1, 2):
        report = streamshard.wrap_lora(base=shop.base, llm_r=4, push_to=REPO, part=f"{number}/2")
    assert report["part"]["complete"]
    assert pushed(hub) == contents(tmp_path / "wrapped")
    assert [*place.iterdir()] == []


def test_what_is_said_of_it(shop, hub, place):
    """Each in its words: a part, finish before all is there, the last one, and one that comes late."""
    dry = begin(shop, hub, place, "--part", "1/2", "--dry-run").communicate(timeout=HANGS)[0]
    assert "At most 3 files of weights on disk at a time, of each part, " in dry
    said = {}
    for which in ("1/2", "finish", "2/2", "1/2 again"):
        found = begin(shop, hub, place, "--part", which.split()[0])
        said[which] = (*found.communicate(timeout=HANGS), found.returncode)
    assert f"Part 1/2 of {REPO} is uploaded: " in said["1/2"][0]
    assert "of 5 files of the output are finished. The last part completes it" in said["1/2"][0]
    assert "of its 5 weight files are not uploaded: 'model-" in said["finish"][1]
    assert f"files in one commit, {hub.url}/{REPO}/tree/{hub.head(REPO)}" in said["2/2"][0]
    assert "the output is complete already" in said["1/2 again"][1]
    assert [code for _, _, code in said.values()] == [0, 5, 0, 0]


# --- what is refused ------------------------------------------------------------------------------


def test_finish_before_all_are_there(shop, hub, place, push):
    with pytest.raises(
        OutputError, match=rf"{REPO}: cannot be completed, as no part of it"
    ) as caught:
        push(part="finish")
    assert caught.value.exit_code == 5
    push(part="1/2")
    with pytest.raises(OutputError, match=r"weight files are not uploaded: .*Run the parts"):
        push(part="finish")
    assert commits_of(hub, "the output") == 0
    push(part="2/2")
    right_in_the_end(shop, hub, place)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (
            {"push_to": "org/other", "output": "org--new"},
            "push_to` was .*org/new and is .*org/other",
        ),
        ({"output": "org--new"}, "output` was not given and is True"),
        (
            {"push_to": None, "commit_message": None, "output": "org--new"},
            "push_to` was .*not given",
        ),
        ({"dtype": "fp16"}, "dtype` was keep and is fp16"),
    ],
)
def test_parts_that_go_elsewhere(options, fragment, hub, place, push):
    """Another place is another plan: what was sent to one is not in the other."""
    push(part="1/2")
    before = {path.name for path in (place / ".org--new.parts").iterdir()}
    with pytest.raises(OutputError, match=fragment) as caught:
        push(part="2/2", **options)
    assert caught.value.exit_code == 5
    assert {path.name for path in (place / ".org--new.parts").iterdir()} == before


def test_a_run_of_the_whole_says_what_is_there(hub, place, push):
    push(part="1/2")
    with pytest.raises(OutputError, match=r"parts of it .*finished weight files"):
        push()


def test_a_model_that_is_there(shop, hub, place, push):
    hub.add_repo(REPO, {"model.safetensors": b"old", "config.json": b"{}", "notes.txt": b"mine"})
    with pytest.raises(OutputError, match=r"holds a model already .*model\.safetensors.*overwrite"):
        push(part="1/2")
    assert [*place.iterdir()] == []
    first = push(part="1/2", overwrite=True)
    assert any("model.safetensors" in text for text in first["warnings"])
    report = push(part="2/2", overwrite=True)
    assert report["pushed"]["deleted"] == ["model.safetensors"]
    assert pushed(hub) == {**shop.right, "notes.txt": b"mine"}
    assert commits_of(hub, "the output") == 1
    assert [*place.iterdir()] == []


def test_a_dry_run_says_what_would_be(hub, place, push):
    report = push(part="1/2", dry_run=True)
    assert not hub.exists(REPO)
    assert [*place.iterdir()] == []
    assert len(report["plan"]["parts"]) == 2
    assert report["pushed"]["commit"] is None
    push(part="1/2")
    report = push(part="2/2", dry_run=True)
    assert report["part"]["finished"] == len(report["plan"]["parts"][0]["files"])
    push(part="2/2")
    assert push(part="2/2", dry_run=True)["part"]["complete"]


def test_without_a_token(hub, place, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token"):
        push(part="1/2")
    assert [*place.iterdir()] == []


@pytest.mark.parametrize("fault", [Status(500), Status(403), NoAnswer()], ids=repr)
@pytest.mark.parametrize("which", ["1/2", "finish"])
def test_a_hub_that_does_not_answer(which, fault, hub, place, push):
    """What is there cannot be told: nothing is begun."""
    hub.fail(fault, f"/api/models/{REPO}*", times=None)
    with pytest.raises(HubError, match=REPO) as caught:
        push(part=which)
    assert caught.value.exit_code == 9
    assert [*place.iterdir()] == []


# --- what goes wrong ------------------------------------------------------------------------------


def test_an_upload_that_fails(shop, hub, place, push):
    """What arrived is not sent again; what did not is kept here, and is sent by the same part."""
    hub.fail(Status(403), "/upload/*", method="PUT", nth=2, times=None)
    with pytest.raises(
        HubError, match=r"What parts have finished of it is kept in .*call it again"
    ):
        push(part="1/2")
    assert weights_in(place) > 0
    with pytest.raises(OutputError, match="cannot be completed"):
        push(part="finish")
    hub.faults.rules.clear()
    push(part="1/2")
    push(part="2/2")
    right_in_the_end(shop, hub, place)


@pytest.mark.parametrize("then", ["1/2", "finish"])
def test_a_commit_whose_answer_is_lost_for_good(then, shop, hub, place, push):
    push(part="1/2")
    hub.fail(LoseAnswer(), "*/commit/main")
    looks = hub.fail(Status(500), f"/api/models/{REPO}*", method="GET", nth=99, times=None)

    def go_dark() -> None:
        looks.seen = looks.nth

    hub.fail(First(go_dark), "*/commit/main")
    with pytest.raises(HubError):
        push(part="2/2")
    assert commits_of(hub, "the output") == 1
    hub.faults.rules.clear()
    hub.forget()
    report = push(part=then)
    assert report["part"]["complete"]
    assert report["pushed"]["commit"] == hub.head(REPO)
    assert not [r for r in hub.requests if r.path.endswith("/commit/main")]
    right_in_the_end(shop, hub, place)


def test_a_head_that_moved_between_parts(shop, hub, place, push):
    """What others have changed of the output's own files is told before it is replaced."""
    push(part="1/2")
    hub.advance(REPO, {"vocab.json": b"{}"})
    with pytest.raises(HubError, match=r"somebody else has committed .*vocab\.json.*call it again"):
        push(part="2/2")
    report = push(part="2/2")
    assert report["part"]["complete"]
    assert "vocab.json" in report["pushed"]["replaced"]
    right_in_the_end(shop, hub, place)


def test_a_head_that_moved_at_the_end(shop, hub, place, push):
    push(part="1/2")
    hub.fail(First(lambda: hub.advance(REPO, {"notes.txt": b"mine"})), "*/commit/main")
    with pytest.raises(HubError, match=r"somebody else has committed .*notes\.txt"):
        push(part="2/2")
    hub.forget()
    assert push(part="finish")["part"]["complete"]
    assert not [r for r in hub.requests if r.method == "PUT"]
    assert pushed(hub) == {**shop.right, "notes.txt": b"mine"}
    assert [*place.iterdir()] == []


def test_files_that_the_hub_takes_with_the_commit_only(shop, hub, place, push, monkeypatch):
    import hub_writing

    monkeypatch.setattr(hub_writing, "is_lfs_name", lambda name: False)
    decode = hub_writing.base64.b64decode
    monkeypatch.setattr(
        hub_writing.base64,
        "b64decode",
        lambda text, **how: decode(text, **how) if how else decode(text).replace(b"\0", b""),
    )
    push(part="1/2")
    assert weights_in(place) > 0
    assert push(part="2/2")["part"]["complete"]
    assert not [r for r in hub.requests if r.method == "PUT"]
    right_in_the_end(shop, hub, place)


def test_one_that_was_slower(shop, hub, place, push):
    """The same part in another process has sent a file, and removed it, right before."""
    done: list[streamshard.Report] = []
    hub.fail(
        First(lambda: done.append(push(part="1/2"))), f"/api/models/{REPO}/preupload/main", nth=1
    )
    report = push(part="1/2")
    assert done
    assert report["part"]["finished"] == done[0]["part"]["finished"]
    push(part="2/2")
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert [*place.iterdir()] == []


def test_one_that_wakes_when_all_is_done(shop, hub, place, push):
    """Its folder is gone; all it was to do is on the hub."""
    done: list[streamshard.Report] = []

    def others() -> None:
        done.extend(push(part=f"{number}/2") for number in (1, 2))

    hub.fail(First(others), f"/api/models/{REPO}/preupload/main", nth=1)
    report = push(part="1/2")
    assert done[-1]["part"]["complete"]
    assert report["part"]["complete"]
    right_in_the_end(shop, hub, place)


def test_all_at_once(shop, hub, place):
    """Every part twice, each a process: one commit, and every one ends well."""
    running = [begin(shop, hub, place, "--part", f"{n}/2") for n in (1, 2, 1, 2)]
    said = [ended(found) for found in running]
    assert [found.returncode for found in running] == [0] * 4, said
    ends_well(begin(shop, hub, place, "--part", "finish"))
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert [*place.iterdir()] == []


# --- kills ----------------------------------------------------------------------------------------

STAGES = {
    "create": ("POST", "/api/repos/create"),
    "modes": ("POST", f"/api/models/{REPO}/preupload/main"),
    "upload": ("PUT", "/upload/*"),
    "verify": ("POST", f"/{REPO}.git/info/lfs/verify"),
    "commit": ("POST", f"/api/models/{REPO}/commit/main"),
}


def ends_well(process: subprocess.Popen[str]) -> None:
    told = ended(process)
    assert process.returncode == 0, told


@pytest.mark.parametrize("stage", ["upload", pytest.param("create", marks=slow), "commit"])
@pytest.mark.parametrize("done", [pytest.param(False, marks=slow), True], ids=["before", "after"])
@pytest.mark.parametrize("keeps", [False, pytest.param(True, marks=slow)], ids=["gone", "kept"])
def test_a_kill_at_a_stage(stage, done, keeps, shop, hub, place):
    method, path = STAGES[stage]
    running: list[subprocess.Popen[str]] = []
    hub.fail(Ended(running, done), path, method=method, nth=2 if stage == "upload" else 1)
    more = ["--output", "kept"] if keeps else []
    if stage == "commit":
        ends_well(begin(shop, hub, place, *more, "--part", "2/2"))
    running.append(begin(shop, hub, place, *more, "--part", "1/2"))
    ended(running[0])
    assert running[0].returncode == -signal.SIGKILL
    for number in (1, 2):
        ends_well(begin(shop, hub, place, *more, "--part", f"{number}/2"))
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert sent_twice(hub) == []
    if keeps:
        assert contents(place / "kept") == shop.right
    assert [one.name for one in place.iterdir()] == ["kept"] * keeps


# Where a part, or who completes the output, is killed, beside requests of the hub.
MOMENTS = {
    "written": AFTER_A_RECORD,
    "sent": """
from streamshard.engine.parts_folder import PartsFolder
drop = PartsFolder.drop
PartsFolder.drop = lambda self, name: kill()
""",
    "noted": """
from streamshard.engine.parts_folder import PartsFolder
add = PartsFolder.add_elsewhere
def last(self, key, noted):
    add(self, key, noted)
    if noted.sent:
        kill()
PartsFolder.add_elsewhere = last
""",
    "adopting": WHILE_ADOPTING,
    "adopted but not what was sent": """
from streamshard.engine.journal import Journal
Journal.add_elsewhere = lambda self, key, noted: kill()
""",
    "adopted": AFTER_ADOPTING,
    "discarding": """
from streamshard.engine import parts_cleanup, parts_folder
remove = parts_folder.remove
def some(folder, names):
    remove(folder, {name for name in names if name.endswith(".sent")})
    kill()
parts_folder.remove = some
""",
    "ready": """
from streamshard.engine.sending import Publishing
Publishing.finish = lambda self, on_step: kill()
""",
    "committed": """
from streamshard.engine.staging_folder import Staging
Staging.discard = lambda self: kill()
Staging.remove_journal = lambda self: kill()
""",
}


@pytest.mark.parametrize("then", slow_but(["2/2", "1/3", "finish"], "2/2"))
@pytest.mark.parametrize(
    ("moment", "keeps"),
    slow_but(
        [(m, keeps) for m in MOMENTS for keeps in (False, True) if not (keeps and m == "sent")],
        ("sent", False),
        ("adopted but not what was sent", False),
    ),
)
def test_a_kill_at_a_moment(moment, keeps, then, shop, hub, place, push, monkeypatch):
    more = {"output": "kept"} if keeps else {}
    push(part="1/2", **more)
    asked = ["--adapter", shop.adapter, "--base", shop.base, "--push-to", REPO]
    asked += ["--commit-message", "the output", *(["--output", "kept"] if keeps else [])]
    killed(MOMENTS[moment], ["merge-lora", *map(str, asked), "--part", "2/2"])
    if then == "finish" and moment in ("written", "sent", "noted"):
        with pytest.raises(OutputError, match="not uploaded"):
            push(part="finish", **more)
        push(part="2/2", **more)
    if then == "1/3":  # who does other shards ends well, and whoever is last completes it
        for number in (1, 2):
            push(part=f"{number}/3", **more)
        then = "3/3"
    assert push(part=then, **more)["part"]["complete"]
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert sent_twice(hub) == []
    if keeps:
        assert contents(place / "kept") == shop.right
    assert [one.name for one in place.iterdir()] == ["kept"] * keeps


def with_kills(shop, hub, place, chance, *more) -> int:
    """All parts at once; at some requests one of them is killed, which is then run again.

    Returns how many were.
    """
    running: dict[int, subprocess.Popen[str]] = {}
    starting = threading.Lock()
    kills: list[int] = []
    errors: list[BaseException] = []

    def kill(*, everyone: bool = False) -> None:
        with starting:
            living = [running[n] for n in sorted(running) if running[n].poll() is None]
        for process in living if everyone else living and [chance.choice(living)]:
            process.kill()

    def one(number: int) -> None:
        while True:
            with starting:
                running[number] = begin(shop, hub, place, "--part", f"{number}/3", *more)
            told = ended(running[number])
            code = running[number].returncode
            if code == 0:
                return
            assert code == -signal.SIGKILL, told
            kills.append(number)
            hub.settle()  # what it has sent has arrived by now, or does not

    def guarded(number: int) -> None:
        try:
            one(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    first, *others = chance.sample(range(1, 50), 6)
    hub.fail(First(lambda: kill(everyone=True)), nth=first)  # who asks lives, whoever else does
    for nth in others:
        hub.fail(First(kill), nth=nth)
    threads = [threading.Thread(target=guarded, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    ends_well(begin(shop, hub, place, "--part", "finish", *more))
    return len(kills)


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=slow) for n in range(2, 7))])
def test_parts_that_are_killed_at_random(seed, shop, hub, place):
    chance = random.Random(seed)
    keeps = seed % 2 == 0
    more = ["--output", "kept"] if keeps else []
    assert with_kills(shop, hub, place, chance, *more) > 0
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert sent_twice(hub) == []
    assert [one.name for one in place.iterdir()] == ["kept"] * keeps


# --- from the hub to the hub ----------------------------------------------------------------------


def ranges_of(hub: Hub) -> dict[str, int]:
    """Bytes that were given of every file of the base."""
    found: dict[str, int] = {}
    for r in hub.requests:
        if r.port == "content" and r.method == "GET" and r.path.endswith(".safetensors"):
            name = r.path.rpartition("/")[2]
            found[name] = found.get(name, 0) + r.bytes
    return found


def test_each_part_reads_what_it_writes(hub, place, tmp_path, monkeypatch):
    """By ranges, and nothing is stored; what is there in the end is the bytes of a merge of folders."""
    large = new_shop(tmp_path / "large", "200KB")  # more than is read of every file
    hub.add_repo(BASE, large.base)
    with pushing(large, hub, place, monkeypatch) as push:
        push(base=BASE, stream=True, part="1/2", dry_run=True)
        hub.forget()
        push(base=BASE, stream=True, part="1/2", dry_run=True)
        looked_at = ranges_of(hub)  # headers, and what tells whether the adapter fits
        for number in (1, 2):
            hub.forget()
            report = push(base=BASE, stream=True, part=f"{number}/2")
            (own,) = report["part"]["files"]
            came = ranges_of(hub)
            size = (large.base / own).stat().st_size
            assert size <= came.pop(own) <= size + looked_at[own]
            assert came == {name: n for name, n in looked_at.items() if name != own}
    assert report["part"]["complete"]
    got, right = pushed(hub), dict(large.right)
    assert got.pop(hub_commands.CARD) != right.pop(hub_commands.CARD)  # says where the base is from
    assert got == right
    assert [*place.iterdir()] == []
    assert [*(place.parent / "home").rglob("*.safetensors")] == []
