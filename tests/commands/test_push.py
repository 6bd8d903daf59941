"""`push_to`: what is on the hub in the end is what a merge on this machine writes, whatever happens."""

from __future__ import annotations

import contextlib
import json

import pytest
from hub_faults import CutUpload, Drop, First, LoseAnswer, NoAnswer, Status
from pushes import OF_HUB, RECORD, REPO, commits_of, contents, pushed, sent_twice

from streamshard import verify
from streamshard.cli.push_text import pushed_text
from streamshard.errors import HubError, OutputError, UsageError, bytes_text


def test_everything_in_one_commit_and_nothing_here(shop, hub, place, push_by_both):
    report = push_by_both()
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert len(hub.commits(REPO)) == 2
    assert [*place.iterdir()] == []
    assert report["output"] is None
    told = report["pushed"]
    assert (told["repository"], told["commit"]) == (REPO, hub.head(REPO))
    assert told["url"] == f"{hub.url}/{REPO}/tree/{hub.head(REPO)}"
    assert {*told["files"]} == {*shop.right, RECORD} | ({OF_HUB} & {*told["files"]})


def test_with_an_output_it_stays_as_it_always_was(shop, hub, place, push_by_both):
    report = push_by_both(output="kept")
    assert report["output"] == "kept"
    assert pushed(hub) == shop.right == contents(place / "kept")
    record = (place / "kept" / RECORD).read_bytes()
    assert hub.files(REPO)[RECORD].read_bytes() == record
    assert [path.name for path in place.iterdir()] == ["kept"]
    assert verify(place / "kept")["problems"] == []
    assert json.loads(record)["bytes"] == report["bytes"]


def test_what_is_there_is_no_model(shop, hub, push):
    """A repository that somebody has made in the browser."""
    hub.add_repo(REPO, {"README.md": "---\nlicense: mit\n---\n", "notes.txt": "mine"})
    report = push(card="none")
    assert hub.files(REPO)["README.md"].read_bytes().startswith(b"---\nlicense: mit")
    assert report["warnings"] == []


def test_a_card_that_somebody_wrote_is_replaced_and_that_is_told(shop, hub, push):
    hub.add_repo(REPO, {"README.md": "---\nlicense: mit\n---\n", "notes.txt": "mine"})
    report = push()
    assert pushed(hub).items() >= {**shop.right, "notes.txt": b"mine"}.items()
    [told] = report["warnings"]
    assert f"{REPO}: its README.md is replaced" in told
    assert "keeps it" in told


def test_a_model_that_is_there_is_replaced_only_on_demand(shop, hub, push, place):
    there = {"model.safetensors": b"old", "config.json": b"{}", "notes.txt": b"mine"}
    hub.add_repo(REPO, there)
    head = hub.head(REPO)
    with pytest.raises(OutputError, match=r"holds a model already .*model\.safetensors.*overwrite"):
        push()
    assert hub.head(REPO) == head
    assert [*place.iterdir()] == []
    report = push(overwrite=True)
    assert pushed(hub) == {**shop.right, "notes.txt": b"mine"}
    assert report["pushed"]["deleted"] == ["model.safetensors"]
    assert "config.json" in report["pushed"]["replaced"]
    assert any("model.safetensors" in text for text in report["warnings"])


OF_ANOTHER = (
    *("adapter_config.json", "tokenizer.json", "model.bin.index.json", "processor_config.json"),
    *("chat_template.jinja", "additional_chat_templates/tool.jinja"),
)


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_nothing_stays_that_loaders_would_read_with_the_output(name, shop, hub, push):
    """Beside an adapter's config, transformers loads another base; a tokenizer.json is preferred."""
    mine = {"notes.txt": b"mine", "train_config.yaml": b"lr: 1", "handler.py": b"pass"}
    hub.add_repo(REPO, {name: b"{}", **mine})
    with pytest.raises(OutputError, match="holds a model already"):
        push()
    report = push(overwrite=True)
    assert pushed(hub) == {**shop.right, **mine}
    assert report["pushed"]["deleted"] == [name]


def test_a_dry_run_says_what_would_be_and_makes_nothing(shop, hub, push, place):
    report = push(dry_run=True)
    assert report["plan"]["committed"] is None
    whole = bytes_text(report["bytes"])
    assert (
        f"of weights on disk at a time, {whole}; nothing stays"
        in pushed_text({**report, "plan": {**report["plan"], "disk_bytes": 1 << 60}})[1]
    )
    assert not hub.exists(REPO)
    assert [*place.iterdir()] == []
    assert report["pushed"]["commit"] is None
    assert {*report["pushed"]["files"]} >= {*shop.right}
    plan = report["plan"]
    assert plan["on_disk"] == 3
    sizes = sorted((file["bytes"] for file in plan["files"]), reverse=True)
    assert 0 <= plan["disk_bytes"] - sum(sizes[:3]) < 1_000_000
    hub.add_repo(REPO, {"config.json": b"{}"})
    with pytest.raises(OutputError, match="holds a model"):
        push(dry_run=True)


def test_a_private_one(hub, push):
    assert push(private=True)["pushed"]["private"]
    assert hub.state.store.repo(REPO).private


def test_a_public_one_is_not_made_private(hub, push):
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    with pytest.raises(OutputError, match="is public"):
        push(private=True)


@pytest.mark.parametrize("name", ["new", "org/new@main", "a/b/c", "hf://org/new/sub", "", 3])
def test_names_that_are_none(push, name):
    with pytest.raises(UsageError, match="ORG/NAME"):
        push(push_to=name)


def test_options_that_go_with_it(push):
    for options in ({"private": True}, {"commit_message": "words"}):
        with pytest.raises(UsageError, match="push_to"):
            push(**{"commit_message": None, "push_to": None, **options})


def test_offline_is_not_pushed(hub, push):
    with pytest.raises(UsageError, match="sends to it"):
        push(offline=True)
    assert not hub.requests


def test_without_a_token(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token"):
        push()


ASKED = {
    "create": ("POST", "/api/repos/create"),
    "look": ("GET", f"/api/models/{REPO}"),
    "tree": ("GET", f"/api/models/{REPO}/tree/*"),
    "modes": ("POST", f"/api/models/{REPO}/preupload/main"),
    "batch": ("POST", f"/{REPO}.git/info/lfs/objects/batch"),
    "upload": ("PUT", "/upload/*"),
    "verify": ("POST", f"/{REPO}.git/info/lfs/verify"),
    "commit": ("POST", f"/api/models/{REPO}/commit/main"),
}
FAULTS = {
    "500": Status(500),
    "503": Status(503),
    "429": Status(429, {"Retry-After": "7"}),
    "no answer": NoAnswer(),
    "answer lost": LoseAnswer(),
    "answer cut": Drop(1),
    "403": Status(403),
    "400": Status(400),
}
PASSING = {"500", "503", "429", "no answer", "answer lost", "answer cut"}


class LostAndMore(LoseAnswer):
    """The answer is lost, and somebody else commits."""

    def __init__(self, hub):
        object.__setattr__(self, "hub", hub)

    def act(self, state, request, answer):
        reply = super().act(state, request, answer)
        self.hub.advance(REPO, {"notes.txt": b"of somebody"})
        return reply


def right_in_the_end(shop, hub, place):
    assert pushed(hub) == shop.right
    assert commits_of(hub, "the output") == 1
    assert [*place.iterdir()] == []
    assert sent_twice(hub) == []


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", ASKED)
def test_a_fault_that_passes(what, fault, nth, shop, hub, place, push):
    """It is tried again where that may help; else, the same command goes on."""
    method, path = ASKED[what]
    if what in ("create", "commit") and nth == 2:
        hub.fail(FAULTS[fault], path, method=method, times=2)
    else:
        hub.fail(FAULTS[fault], path, method=method, nth=nth)
    if fault in PASSING:
        push()
    else:
        with contextlib.suppress(HubError):  # what is refused for good is no reason to try again
            push()
        hub.faults.rules.clear()
        if commits_of(hub, "the output") == 0 or [*place.iterdir()]:
            push()
    right_in_the_end(shop, hub, place)
    if fault == "429" and not hub.unused:
        assert max(push.slept) >= 7


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "answer lost"])
@pytest.mark.parametrize("what", ["create", "modes", "batch", "upload", "commit"])
def test_a_fault_that_stays(what, fault, shop, hub, place, push):
    """It is told with what to do, exit 9; once it is over, the same command goes on."""
    method, path = ASKED[what]
    if fault == "answer cut" and what in ("commit", "upload"):
        pytest.skip("it is done, and that is found")
    hub.fail(FAULTS[fault], path, method=method, nth=2 if what == "upload" else 1, times=None)
    with pytest.raises(HubError, match=REPO) as caught:
        push()
    assert caught.value.exit_code == 9
    if hub.exists(REPO):
        assert commits_of(hub, "the output") == 0
    hub.faults.rules.clear()
    push()
    right_in_the_end(shop, hub, place)


@pytest.mark.parametrize("after", [0, 1, 1000, 30_000])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_uploads_that_break(after, nth, shop, hub, place, push):
    hub.fail(CutUpload(after), "/upload/*", method="PUT", nth=nth)
    push()
    right_in_the_end(shop, hub, place)


def test_a_commit_whose_answer_is_lost_for_good(shop, hub, place, push):
    """All that follows fails too, so that this run cannot know; the next one does."""
    hub.fail(LoseAnswer(), "*/commit/main")
    looks = hub.fail(Status(500), f"/api/models/{REPO}*", method="GET", nth=99, times=None)

    def go_dark() -> None:
        looks.seen = looks.nth

    hub.fail(First(go_dark), "*/commit/main")
    with pytest.raises(HubError):
        push()
    assert commits_of(hub, "the output") == 1
    hub.faults.rules.clear()
    hub.forget()
    looked = push(dry_run=True)
    assert looked["plan"]["committed"] == looked["pushed"]["commit"] == hub.head(REPO)
    (text,) = pushed_text(looked)
    assert f"Pushed to {REPO} already, by the run that was interrupted" in text
    report = push()
    right_in_the_end(shop, hub, place)
    assert report["pushed"]["commit"] == hub.head(REPO)
    assert not [r for r in hub.requests if r.path.endswith("/commit/main")]


def test_it_is_found_below_later_commits(shop, hub, place, push):
    hub.fail(LostAndMore(hub), "*/commit/main")
    report = push()
    assert report["pushed"]["commit"] == hub.commits(REPO)[1].sha
    assert commits_of(hub, "the output") == 1


@pytest.mark.parametrize("changes", [{"notes.txt": b"mine"}, {"notes.txt": b"a", "more.md": b"b"}])
def test_a_head_that_moved(changes, shop, hub, place, push):
    """Told, with what was changed; the same command then commits on top of it."""
    hub.fail(First(lambda: hub.advance(REPO, changes)), "*/commit/main")
    with pytest.raises(HubError, match=r"somebody else has committed .*notes\.txt.*call it again"):
        push()
    assert commits_of(hub, "the output") == 0
    hub.forget()
    push()
    assert pushed(hub) == {**shop.right, **changes}
    assert [commit.message for commit in hub.commits(REPO)][:2] == ["the output", "another commit"]
    assert not [r for r in hub.requests if r.method == "PUT"]
    assert [*place.iterdir()] == []


def test_a_head_that_moved_between_runs(shop, hub, place, push):
    """What others have changed of the output's own files is told once before it is replaced."""
    hub.fail(Status(403), "*/commit/main")
    with pytest.raises(HubError):
        push()
    hub.advance(REPO, {"notes.txt": b"mine"})
    hub.fail(Status(403), "*/commit/main")
    with pytest.raises(HubError, match="403"):
        push()
    hub.advance(REPO, {"vocab.json": b"{}"})
    with pytest.raises(HubError, match=r"vocab\.json"):
        push()
    report = push()
    assert pushed(hub) == {**shop.right, "notes.txt": b"mine"}
    assert report["pushed"]["replaced"] == [
        *sorted({OF_HUB} & {*report["pushed"]["files"]}),
        "vocab.json",
    ]


def test_a_model_that_came_meanwhile(shop, hub, place, push):
    hub.fail(First(lambda: hub.advance(REPO, {"model.safetensors": b"of somebody"})), "*/commit/*")
    with pytest.raises(HubError, match=r"model\.safetensors"):
        push()
    with pytest.raises(OutputError, match="holds a model"):
        push()
    push(overwrite=True)
    right_in_the_end(shop, hub, place)


def test_files_that_the_hub_leaves_out(shop, hub, place, push):
    weights = next(name for name in shop.right if name.endswith(".safetensors"))
    hub.state.ignore = lambda name: name == weights
    with pytest.raises(HubError, match="leaves out"):
        push()
    hub.state.ignore = lambda name: name == "config.json"
    with pytest.raises(HubError, match=r"config\.json.*not as it was given"):
        push()
    hub.state.ignore = lambda name: False
    push(overwrite=True)
    assert pushed(hub) == shop.right
    assert [*place.iterdir()] == []


def test_files_that_the_hub_takes_with_the_commit_only(shop, hub, place, push, monkeypatch):
    """As where nothing is said to be large; such files stay here until then."""
    import hub_writing

    monkeypatch.setattr(hub_writing, "is_lfs_name", lambda name: False)
    monkeypatch.setattr(
        hub_writing.base64, "b64decode", _without_zeros(hub_writing.base64.b64decode)
    )
    push()
    assert pushed(hub) == shop.right
    assert not [r for r in hub.requests if r.method == "PUT"]


def _without_zeros(decode):
    def decoded(text, **how):
        found = decode(text, **how)
        return found if how else found.replace(b"\0", b"")  # samples are judged by their zeros

    return decoded


def test_another_store_is_another_matter(shop, hub, place, push):
    """What was sent to one repository is not taken for what is in another one."""
    hub.fail(Status(403), "*/commit/main")
    with pytest.raises(HubError):
        push(output="kept")
    push(output="kept", push_to="org/other")
    assert pushed(hub, "org/other") == shop.right == contents(place / "kept")


def test_then_without_the_hub(shop, hub, place, push):
    """A run that was to push goes on without that."""
    hub.fail(Status(403), "*/commit/main")
    with pytest.raises(HubError):
        push(output="kept")
    report = push(output="kept", push_to=None, commit_message=None)
    assert report["resumed"] == report["shards"]
    assert contents(place / "kept") == shop.right


def test_the_record_there_is_one(hub, push):
    """As the schema has it, and with nothing of the commit that it is in."""
    push()
    record = json.loads(hub.files(REPO)[RECORD].read_bytes())
    assert record["output"] is None
    assert "pushed" not in record
