"""How many files are on disk while others are sent, and what is noted of it; the store is a folder."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hangs import until
from pushes import contents, new_shop, weights_here

import streamshard
from streamshard.disk.system import System
from streamshard.engine.job import Options
from streamshard.engine.outlet import AT_ONCE
from streamshard.errors import HubError, WriteError


@dataclass
class Seen:
    version: str | None = "0"
    replaced: tuple = ()
    deleted: tuple = ()
    warnings: tuple = ()


@dataclass
class Shelf:
    """A store that is a folder; `slowly` is called while a file is sent."""

    folder: Path
    keeps: bool = False
    fails: list = field(default_factory=list)
    slowly: object = lambda path: None
    sent: list = field(default_factory=list)
    where: str = "the shelf"
    key: str = "shelf"

    def look(self, names, *, overwrite):
        return Seen()

    def begin(self, names, *, overwrite, seen):
        return Seen()

    def send(self, path, file, going):
        self.slowly(path)
        if file.name in self.fails:
            self.fails.remove(file.name)
            raise HubError("the shelf is full.")
        self.sent.append(file.name)
        shutil.copy(path, self.folder / file.name)
        return True

    def find(self, files, since):
        return None

    def commit(self, folder, files, target, sent):
        for file in files:
            if file.name not in sent:
                (self.folder / file.name).parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(folder / file.name, self.folder / file.name)
        return "1"

    def described(self, version, files, target):
        return {"commit": version, "files": files}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return new_shop(tmp_path_factory.mktemp("shop"), "30KB")


@pytest.fixture
def place(tmp_path, monkeypatch):
    found = tmp_path / "here"
    found.mkdir()
    monkeypatch.chdir(found)
    return found


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    folder = tmp_path / "shelf"
    folder.mkdir()
    found = Shelf(folder)
    usual = Options.of

    def with_it(given):
        return usual({**given, "outlet": found})

    monkeypatch.setattr(Options, "of", with_it)
    return found


def merge(shop, **options):
    return streamshard.merge_lora(
        base=shop.base, adapter=shop.adapter, output="merged", workers=2, **options
    )


def test_only_so_many_files_are_here(shop, shelf, place):
    """One is written, one waits, one is sent: whoever writes is faster, and waits."""
    counts = []

    def watch(path):
        if not counts:
            until(lambda: weights_here(place) >= AT_ONCE)
        threading.Event().wait(0.05)  # who writes more than it may has begun it
        counts.append(weights_here(place))

    shelf.slowly = watch
    report = merge(shop)
    assert report["shards"] > 2 * AT_ONCE
    assert max(counts) == AT_ONCE
    assert contents(shelf.folder).keys() >= {*shelf.sent}
    assert len(shelf.sent) == report["shards"]
    assert [*place.iterdir()] == []


@pytest.mark.parametrize("fit", [1, 2])
def test_fewer_where_there_is_less_room(fit, shop, shelf, place, monkeypatch):
    sizes = sorted(
        (file["bytes"] for file in merge(shop, dry_run=True)["plan"]["files"]), reverse=True
    )
    room = merge(shop, dry_run=True)["plan"]["disk_bytes"] - sum(sizes[:AT_ONCE])
    monkeypatch.setattr(System, "disk_free", lambda self, path: sum(sizes[:fit]) + room)
    assert merge(shop, dry_run=True)["plan"]["on_disk"] == fit
    counts = []
    shelf.slowly = lambda path: counts.append(weights_here(place))
    merge(shop)
    assert max(counts) <= fit
    assert contents(shelf.folder) == shop.right


def test_no_room_for_one(shop, shelf, place, monkeypatch):
    monkeypatch.setattr(System, "disk_free", lambda self, path: 10_000)
    with pytest.raises(WriteError, match="one file at a time"):
        merge(shop)
    assert [*place.iterdir()] == []


def test_what_was_sent_is_not_sent_again(shop, shelf, place):
    """Nor written again; what was not sent is still here, and is sent first."""
    names = sorted(name for name in shop.right if name.endswith(".safetensors"))
    shelf.fails = [names[4]]
    with pytest.raises(HubError, match="call it again to continue"):
        merge(shop)
    before = [*shelf.sent]
    assert 0 < weights_here(place) <= AT_ONCE
    report = merge(shop)
    assert report["resumed"] >= len(before)
    assert sorted(shelf.sent) == names
    assert contents(shelf.folder) == shop.right
    assert [*place.iterdir()] == []


def test_what_was_sent_is_written_again_where_it_is_to_stay(shop, shelf, place):
    names = sorted(name for name in shop.right if name.endswith(".safetensors"))
    shelf.fails = [names[4]]
    with pytest.raises(HubError):
        merge(shop)
    shelf.keeps = True
    merge(shop)
    assert sorted(shelf.sent) == names
    assert contents(place / "merged") == contents(shelf.folder) == shop.right
