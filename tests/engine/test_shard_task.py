"""A task is a value, and doing it a pure function: anywhere, however a shard is cut, the same bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamshard.checkpoint.digests import tensor_digest
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.header import read_header
from streamshard.checkpoint.shards import Shard, plan_shards
from streamshard.disk.files import Files
from streamshard.disk.inputs import watching
from streamshard.disk.new_files import OutputFile
from streamshard.engine import lanes, shard_task, writer
from streamshard.engine.do_task import do, measure
from streamshard.engine.lanes import ALIGNED_BYTES, cuts_of
from streamshard.engine.shard_task import ShardTask, task_of
from streamshard.errors import AdapterError, ChangedError, WriteError
from streamshard.tensors import computed
from streamshard.tensors.constructors import add_low_rank, cast, with_magnitude
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.tensors.low_rank import Columns, LowRank
from streamshard.tensors.rounding import Change, Changes
from streamshard.tensors.workspace import Workspace

ROWS, COLUMNS, RANK = 300, 1100, 4


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Stored]:
    """Tensors of a file, of which others are made."""
    content = {
        "w": reference.normal((ROWS, COLUMNS), 0.02, seed=1, dtype="BF16"),
        "like w": reference.normal((ROWS, COLUMNS), 0.02, seed=2),
        "A": reference.normal((RANK, COLUMNS), 0.1, seed=3),
        "B": reference.normal((ROWS, RANK), 0.1, seed=4),
        "row": reference.normal((ROWS, 1), 1, seed=5),
        "column": reference.normal((COLUMNS, 1), 1, seed=6),
        "fused A": reference.normal((2 * RANK, COLUMNS), 0.1, seed=7),
        "fused B": reference.normal((ROWS, 2 * RANK), 0.1, seed=8),
        "bytes": torch.arange(77, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }
    return open_checkpoint(
        reference.save_checkpoint(tmp_path_factory.mktemp("inputs") / "base", content)
    ).tensors


def made(stored: dict[str, Stored]) -> dict[str, Lazy]:
    """One tensor of every kind that commands write."""
    w, term = stored["w"], LowRank(stored["A"], stored["B"], 2.0, 0, ROWS)
    expert = LowRank(
        stored["fused A"].take(0, RANK), Columns(stored["fused B"], 1, 2, RANK), 1.0, 0, ROWS
    )
    updated = add_low_rank(w, [term])
    return {
        "copied": w,
        "updated": updated,
        "twice": add_low_rank(w, [term, expert]),
        "dora": with_magnitude(w, term, stored["row"], by_row=True),
        "dora by columns": with_magnitude(w, term, stored["column"], by_row=False),
        "joined": concat([updated.take(3, 140), w.take(200, 300), updated.take(0, 7)]),
        "fused": concat([w.take(100, 300), w.take(0, 100)]),
        "wide": cast(stored["w"], "F32"),
        "narrow": cast(stored["like w"], "F16"),
        "bytes": stored["bytes"],
        "empty": stored["empty"],
    }


def whole_range(shard: Shard) -> tuple[int, int]:
    return shard.header_nbytes, shard.nbytes


def new_file(path: Path, shard: Shard) -> Path:
    """The file of a shard as tasks find it: full length, and the header."""
    path.unlink(missing_ok=True)
    with OutputFile(path, shard.nbytes) as file:
        file.write(memoryview(shard.header()[0]), 0)
    return path


@pytest.fixture(params=["as it is", "in strips"])
def shard(request, stored, monkeypatch) -> Shard:
    """All these tensors in one shard; long rows are computed in strips."""
    if request.param == "in strips":
        monkeypatch.setattr(computed, "STRIP_NBYTES", 1)
    tensors = made(stored)
    (one,) = plan_shards(tensors, shard_of=dict.fromkeys(tensors, "x"), metadata={})
    return one


def references(shard: Shard, stored: dict[str, Stored]) -> dict[str, Stored]:
    """What some of the tensors are compared with."""
    return dict.fromkeys(("updated", "fused", "wide", "copied"), stored["like w"])


def figures(results: Any) -> list[tuple[bytes, float, Change]]:
    return [(one.digest, one.squared, one.changes.total()) for one in results]


def done_in_one(
    shard: Shard, stored: dict[str, Stored], path: Path
) -> tuple[bytes, dict[str, Any]]:
    """The file, and what is known of its tensors, by one task."""
    task = task_of(
        shard, new_file(path, shard), *whole_range(shard), reference=references(shard, stored)
    )
    found = dict(zip((m.name for m in task.members), figures(do(task)), strict=True))
    return path.read_bytes(), found


def test_a_task_tells_the_digests_and_figures(shard, stored, tmp_path):
    _, found = done_in_one(shard, stored, tmp_path / "x")
    assert set(found) == set(shard.tensors)
    assert dict(shard.stored(tmp_path / "x")) == read_header(tmp_path / "x").tensors
    with contextlib.closing(Files()) as files:
        for name, tensor in shard.stored(tmp_path / "x"):
            assert found[name][0] == tensor_digest(tensor, Workspace(files)), name
    content = reference.load_file(tmp_path / "x")
    base = reference.load_file(Path(stored["w"].path))
    far = ((content["updated"].double() - base["like w"].double()) ** 2).sum()
    assert found["updated"][1] == pytest.approx(float(far))
    change = ((content["dora"].double() - base["w"].double()) ** 2).sum()
    assert found["dora"][1] == pytest.approx(float(change))
    assert found["joined"][2].updated == 144 * COLUMNS


def set_strip(nbytes: int) -> None:
    """Of the other process."""
    computed.STRIP_NBYTES = nbytes


def test_tasks_are_done_by_another_process(shard, stored, tmp_path):
    """Each tensor by itself, all sent to a process that is started anew."""
    expected, figures_of = done_in_one(shard, stored, tmp_path / "x")
    path, tasks = new_file(tmp_path / "y", shard), []
    with watching() as inputs:
        for file in {tensor.path for tensor in stored.values()}:
            read_header(Path(file))
        stamps = inputs.stamps
    whole = task_of(
        shard, path, *whole_range(shard), reference=references(shard, stored), stamps=stamps
    )
    tasks = [replace(whole, begin=m.begin, end=m.end, members=(m,)) for m in whole.members]
    with multiprocessing.get_context("spawn").Pool(1, set_strip, [computed.STRIP_NBYTES]) as pool:
        results = pool.map(do, tasks)
    assert path.read_bytes() == expected
    for task, found in zip(tasks, results, strict=True):
        (member,) = task.members
        assert figures(found) == [figures_of[member.name]]


def parts_of(
    shard: Shard, path: Path, cuts: list[int], known: dict[str, Stored]
) -> list[ShardTask]:
    first, last = whole_range(shard)
    edges = sorted({first, last, *cuts})
    return [task_of(shard, path, begin, end, reference=known) for begin, end in pairwise(edges)]


def check_cut(shard: Shard, stored: dict[str, Stored], cuts: list[int], folder: Path) -> None:
    """That the file and all figures are those of one task."""
    known = references(shard, stored)
    expected, figures_of = done_in_one(shard, stored, folder / "x")
    path = new_file(folder / "y", shard)
    changes = {name: Changes() for name in shard.tensors}
    found: dict[str, Any] = {}
    for task in reversed(parts_of(shard, path, cuts, known)):
        for member, result in zip(task.members, do(task), strict=True):
            changes[member.name].take(result.changes)
            if task.holds(member):
                found[member.name] = result
            else:
                assert not result.digest
    assert path.read_bytes() == expected
    whole = task_of(shard, path, *whole_range(shard), reference=known)
    again = dict(zip((m.name for m in whole.members), measure(whole), strict=True))
    for name, result in again.items():
        one = found.get(name, result)
        assert (one.digest, one.distance) == (result.digest, result.distance), name
        assert figures([replace(result, changes=changes[name])]) == [figures_of[name]], name


@pytest.mark.parametrize("step", [4096, 100_000, 262_144, 1_000_003])
def test_ranges_of_one_length(step, shard, stored, tmp_path):
    first, last = whole_range(shard)
    if step == 4096:  # some of them
        cuts = [*range(4096, last, 40 * 4096), *range(5 * 4096, last, 64 * 4096)]
        assert all(cut % 4096 == 0 for cut in cuts)
    else:
        cuts = [*range(first, last, step)]
    check_cut(shard, stored, [cut for cut in cuts if first < cut < last], tmp_path)


@given(data=st.data())
def test_any_ranges(data, stored, tmp_path_factory):
    tensors = dict(list(made(stored).items())[1:8:2]) | {"empty": stored["empty"]}
    known = {name: tensor.take(100, 180) for name, tensor in tensors.items() if name != "empty"}
    known |= {"empty": tensors["empty"], "joined": tensors["joined"].take(130, 160)}
    (one,) = plan_shards(known, shard_of=dict.fromkeys(known, "x"), metadata={})
    first, last = whole_range(one)
    cuts = data.draw(st.lists(st.integers(first, last), max_size=6))
    folder = tmp_path_factory.mktemp("cut")
    task = task_of(one, new_file(folder / "x", one), first, last)
    expected = dict(zip((m.name for m in task.members), do(task), strict=True))
    changes = {name: Changes() for name in known}
    seen: list[str] = []
    for part in parts_of(one, new_file(folder / "y", one), cuts, {}):
        for member, result in zip(part.members, do(part), strict=True):
            changes[member.name].take(result.changes)
            seen += [member.name] if part.holds(member) else []
    assert (folder / "y").read_bytes() == (folder / "x").read_bytes()
    assert {name: c.total() for name, c in changes.items()} == {
        name: result.changes.total() for name, result in expected.items()
    }
    assert len(seen) == len(set(seen))  # nothing is done twice, not even what has no bytes
    assert "empty" in seen


def test_a_block_is_told_and_may_end_the_task(shard, stored, tmp_path):
    task = task_of(shard, new_file(tmp_path / "x", shard), *whole_range(shard))
    told: dict[str, int] = {}

    def note(offset: int, nbytes: int, name: str) -> None:
        assert task.begin <= offset <= task.end - nbytes
        told[name] = told.get(name, 0) + nbytes

    do(task, on_block=note)
    assert told == {n: t.nbytes for n, t in shard.tensors.items() if t.nbytes}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(task, on_block=stop)


def test_a_task_is_small_and_does_not_change(shard, tmp_path):
    task = task_of(shard, new_file(tmp_path / "x", shard), *whole_range(shard))
    before = pickle.dumps(task)
    assert len(before) < 10_000
    do(task)
    assert pickle.dumps(task) == before


def test_inputs_must_be_as_they_were_planned_with(stored, tmp_path):
    (one,) = plan_shards({"w": stored["w"]}, shard_of={"w": "x"}, metadata={})
    with watching() as inputs:
        read_header(Path(stored["w"].path))
        stamps = inputs.stamps
    path = stored["w"].path
    task = task_of(one, new_file(tmp_path / "x", one), *whole_range(one), stamps=stamps)
    do(task)
    other = {path: replace(stamps[path], mtime_ns=0)}
    with pytest.raises(ChangedError):
        do(replace(task, stamps=other))


def test_the_file_must_be_the_one_that_was_made(stored, tmp_path):
    (one,) = plan_shards({"w": stored["w"]}, shard_of={"w": "x"}, metadata={})
    path = new_file(tmp_path / "x", one)
    task = task_of(one, path, *whole_range(one))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(WriteError):
        do(replace(task, path=tmp_path / "link"))
    with pytest.raises(WriteError):
        do(replace(task, path=tmp_path / "none"))
    path.write_bytes(b"short")
    with pytest.raises(WriteError):
        do(task)


def test_what_is_not_finite_is_told_with_the_tensor(stored, tmp_path):
    w = stored["w"]
    huge = add_low_rank(w, [LowRank(stored["A"], stored["B"], 1e45, 0, ROWS)])
    (one,) = plan_shards({"a.weight": huge}, shard_of={"a.weight": "x"}, metadata={})
    with pytest.raises(AdapterError, match=r"'a\.weight', row \d+"):
        do(task_of(one, new_file(tmp_path / "x", one), *whole_range(one)))


# --- which tensors are cut ------------------------------------------------------------------------


def test_large_tensors_at_the_end_are_cut(stored, monkeypatch):
    monkeypatch.setattr(shard_task, "PART_BYTES", 8192)
    w = stored["w"]
    member = shard_task.Member("w", 1000, w)
    whole = [member.begin, member.end]
    assert cuts_of(member, w.nbytes, 1) == whole
    assert cuts_of(member, 2 * w.nbytes, 2) == whole  # another one as large is to come
    cuts = cuts_of(member, w.nbytes, 2)
    assert len(cuts) > 3
    assert cuts == sorted(set(cuts))
    assert [cuts[0], cuts[-1]] == whole
    assert all(cut % ALIGNED_BYTES == 0 for cut in cuts[1:-1])
    assert min(np.diff(cuts)) >= 4096
    scaled = with_magnitude(
        w, LowRank(stored["A"], stored["B"], 1.0, 0, ROWS), stored["column"], by_row=False
    )
    assert cuts_of(replace(member, tensor=scaled), w.nbytes, 2) == whole


def test_cut_tensors_make_the_same_output(pair, tmp_path, monkeypatch):
    """By the command itself: files, record and figures."""
    from streamshard import merge_lora

    def merged(name: str, workers: int) -> tuple[Any, Any]:
        report = merge_lora(
            base=pair.base, adapter=pair.adapter, output=tmp_path / name, workers=workers
        )
        weights = {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")}
        return weights, {key: report[key] for key in ("l2", "update", "merged", "bytes")}

    expected = merged("whole", 1)
    monkeypatch.setattr(shard_task, "PART_BYTES", 512)
    monkeypatch.setattr(lanes, "ALIGNED_BYTES", 64)
    measured = []

    def measuring(*arguments: Any) -> Any:
        measured.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(writer, "measure", measuring)
    assert merged("cut", 3) == expected
    assert measured
