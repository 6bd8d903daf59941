"""`--stream`: the same bytes as from the folder, whatever happens on the way, or no output."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from itertools import cycle

import pytest
from fake_hub import Hub
from folders import make
from hangs import until
from hub_client import client
from hub_commands import contents
from hub_faults import (
    Drop,
    Expire,
    First,
    Flip,
    LoseAnswer,
    NoAnswer,
    OtherBytes,
    Short,
    Slow,
    Status,
    Whole,
    WrongRange,
)
from make_checkpoint import write_adapter

import streamshard
from streamshard.checkpoint import hub_head
from streamshard.disk import remote
from streamshard.disk.remote_digest import WrongDigestError
from streamshard.engine import lanes
from streamshard.errors import AdapterError, HubError

SHARDS = "*-of-*.safetensors"
"""Those of a base: an adapter is downloaded by the client, which takes a 403 for an answer."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Models by name: folders here, repositories on a hub, and what is made of the folders."""
    root = tmp_path_factory.mktemp("shop")
    folders = {
        "custom": make(root / "custom", "tiny-internlm2", "custom", max_shard_size="60KB"),
        "hf": make(root / "hf", "tiny-internlm2", "hf", max_shard_size="50KB"),
        "base": make(root / "base", "tiny", "hf", max_shard_size="60KB"),
        "lora": root / "lora",
    }
    write_adapter(folders["lora"], "tiny", layout="hf")
    for folder in folders.values():
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text")
    made = {
        name: contents(
            run(name, root / f"made-{name}", folders.__getitem__) and root / f"made-{name}"
        )
        for name in COMMANDS
    }
    with Hub(root / "hub") as hub, client(hub, root / "home"):
        for name, folder in folders.items():
            hub.add_repo(f"org/{name}", folder)
        yield hub, made


COMMANDS = {
    "merge": (streamshard.merge_lora, {"base": "base", "adapter": "lora"}, {}),
    "cut anew": (
        streamshard.merge_lora,
        {"base": "base", "adapter": "lora"},
        {"max_shard_size": "30KB", "workers": 3},
    ),
    "fused": (streamshard.hf_to_custom, {"hf_path": "hf", "custom_path": "custom"}, {"workers": 2}),
    "split": (streamshard.custom_to_hf, {"hf_path": "hf", "custom_path": "custom"}, {"workers": 2}),
}


def run(command, output, named, **options):
    """A command with its models, each as `named` gives it."""
    function, models, others = COMMANDS[command]
    where = "output" if function is streamshard.merge_lora else "save_path"
    given = {key: named(name) for key, name in models.items()}
    return function(**given, **{where: output}, **others, **options)


@pytest.fixture
def small(monkeypatch):
    """Everything is so small that these files are large; nobody waits."""
    monkeypatch.setattr(hub_head, "FIRST_NBYTES", 64)
    for name, value in (("GAP_NBYTES", 700), ("BLOCK_NBYTES", 500), ("LOOK_NBYTES", 900)):
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(remote, "MOST_NBYTES", 2000)
    slept = []

    def wait(seconds):
        slept.append(seconds)
        time.sleep(seconds / 100)

    monkeypatch.setattr(remote, "wait", wait)
    return slept


def is_data(size):
    """Whether a request is for the data of a file of this size, up to its end."""

    def found(request):
        first, _, last = request.range.removeprefix("bytes=").partition("-")
        return int(first) < size / 2 and int(last) == size - 1

    return found


@pytest.fixture
def hub(shop):
    hub, _ = shop
    hub.faults.rules.clear()
    hub.forget()
    yield hub
    hub.faults.rules.clear()
    hub.state.errors.clear()


@pytest.fixture
def made(shop):
    return shop[1]


def header_of(blob):
    """The header of a file of safetensors, and where its data begins."""
    data = blob.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return {k: v for k, v in json.loads(data[8:begin]).items() if k != "__metadata__"}, begin


def streamed(command, output, **options):
    return run(command, output, "org/{}".format, stream=True, **options)


MENDED = [
    *(Drop(after, reset) for after in (0, 1, 3000, 20_000) for reset in (False, True)),
    *(Status(status) for status in (401, 403, 404, 408, 429, 500, 503)),
    *(Whole(), WrongRange(1), Short(10), Expire(), NoAnswer(), LoseAnswer(), Slow(2_000_000)),
]


class Few:
    """A fault that a file meets four times at most, of all kinds: the fifth in a row is the end.

    Which file meets one is a matter of who is faster; `met` counts for all faults of a test.
    """

    def __init__(self, fault, met, most=4):
        self.fault, self.met, self.most = fault, met, most

    def act(self, state, request, answer):
        name = request.path.rpartition("/")[2]
        self.met[name] += 1
        return answer() if self.met[name] > self.most else self.fault.act(state, request, answer)


@pytest.mark.parametrize(
    ("command", "fault"),
    [*((one, None) for one in COMMANDS), *zip(cycle(COMMANDS), MENDED)],
    ids=str,
)
def test_every_fault_at_every_fifth_request(command, fault, hub, made, small, tmp_path):
    # Eight files are begun at a time: all their links together may expire now and then only.
    met = Counter()
    for nth in (
        range(2, 200, 50) if isinstance(fault, Expire) else range(2, 300, 5) if fault else ()
    ):
        hub.fail(
            fault if isinstance(fault, Expire) else Few(fault, met), SHARDS, port="content", nth=nth
        )
    streamed(command, tmp_path / "out")
    assert contents(tmp_path / "out") == made[command]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("command", ["cut anew", "fused"])
def test_all_sorts_of_faults_together(command, seed, hub, made, small, tmp_path):
    chance, met = random.Random(seed), Counter()
    own = [fault for fault in MENDED if not isinstance(fault, Expire)]
    for _ in range(40):
        fault, nth = Few(chance.choice(own), met, 3), chance.randrange(1, 120)
        hub.fail(fault, SHARDS, port="content", nth=nth)
    for _ in range(3):
        passing = Few(Status(chance.choice((408, 429, 500, 503))), met, 3)
        hub.fail(passing, "*/resolve/" + SHARDS, port="hub", nth=chance.randrange(1, 8))
    # All files meet this one, whichever asks.
    hub.fail(Expire(), SHARDS, port="content", nth=chance.randrange(1, 60))
    streamed(command, tmp_path / "out")
    assert contents(tmp_path / "out") == made[command]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_file_is_one_stream_and_is_checked(workers, hub, small, tmp_path):
    report = streamed("merge", tmp_path / "out", workers=workers)
    files = report["sources"]["base"]["files"]
    assert len(files) > 3
    for name, file in files.items():
        assert file["checked"], name
        assert file["how"] == "streamed in order, and equal to the digest of the hub"
        mine = [
            one for one in hub.requests if one.port == "content" and one.path.endswith(f"/{name}")
        ]
        to_the_end = [one for one in mine if is_data(file["bytes"])(one)]
        assert 1 <= len(to_the_end) <= 2, name  # some rows may have been looked at before


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_of_a_file_are_few(workers, hub, small, monkeypatch, tmp_path):
    """To the hub, for the header, to see whether the adapter is in there already, and for all of it."""
    monkeypatch.setattr(hub_head, "FIRST_NBYTES", 4000)
    monkeypatch.setattr(remote, "BLOCK_NBYTES", 4000)
    report = streamed("merge", tmp_path / "out", workers=workers)
    for name, file in report["sources"]["base"]["files"].items():
        mine = [one for one in hub.requests if one.path.endswith(f"/{name}")]
        assert [one.port for one in mine].count("hub") == 1, name
        assert len(mine) == file["requests"] <= 4, name


def test_a_base_that_has_the_update_is_refused_before_anything_is_written(
    shop, hub, small, tmp_path
):
    name = "org/merged-before"
    if not hub.exists(name):
        done = tmp_path / "done"
        streamshard.merge_lora(
            base="org/base", adapter="org/lora", stream=True, output=done, max_shard_size="60KB"
        )
        (done / "streamshard.json").unlink()
        hub.add_repo(name, done)
    hub.forget()
    with pytest.raises(AdapterError, match="already"):
        streamshard.merge_lora(
            base=name, adapter="org/lora", stream=True, output=tmp_path / "out", workers=1
        )
    assert not (tmp_path / "out").exists()
    asked = [one.path for one in hub.requests if one.path.endswith(".safetensors")]
    assert max(map(asked.count, asked)) <= 4


def test_what_was_not_read_in_order_is_told(hub, small, tmp_path):
    report = streamed("fused", tmp_path / "out")
    files = report["sources"]["hf_path"]["files"].values()
    unchecked = {file["how"] for file in files if not file["checked"]}
    assert unchecked == {"parts of it were read, or in another order"}


@pytest.mark.parametrize("fault", [Flip(40), OtherBytes(8)], ids=repr)
@pytest.mark.parametrize("nth", [1, 2])
def test_a_wrong_digest_leaves_nothing(fault, nth, hub, small, tmp_path):
    """Nor may a later run go on with what was made of it."""
    name = sorted(one for one in hub.files("org/base") if one.endswith(".safetensors"))[nth]
    size = hub.files("org/base")[name].size
    hub.fail(fault, f"*{name}", port="content", when=is_data(size))
    with pytest.raises(
        WrongDigestError, match=f"^org/base/{name}: what came is not what the hub has"
    ):
        streamed("merge", tmp_path / "out", workers=1)
    assert not hub.unused
    assert not [*tmp_path.iterdir()]


def test_a_wrong_byte_that_makes_nan_is_told_as_a_wrong_digest(shop, hub, small, tmp_path):
    """Whose base it is has no NaN: the way from there to here is at fault."""
    pairs, _ = header_of(hub.files("org/lora")["adapter_model.safetensors"])
    targets = tuple(
        one.removesuffix(".lora_A.weight").partition("layers.")[2] + ".weight" for one in pairs
    )
    name, place, begin, data = next(
        (name, at, begin, data)
        for name, blob in hub.files("org/base").items()
        if name.endswith(".safetensors")
        for header, begin in [header_of(blob)]
        for data in [blob.read_bytes()]
        for tensor, entry in header.items()
        if tensor.endswith(targets) and entry["dtype"] == "BF16"
        for at in range(*(begin + offset for offset in entry["data_offsets"]), 2)
        if data[at] & 0x80
    )
    nan = Flip(place + 1 - begin, 0x7F ^ data[place + 1] & 0x7F)

    def is_read(request):
        return request.range == f"bytes={begin}-{len(data) - 1}"

    hub.fail(nan, f"*{name}", port="content", when=is_read, times=None)
    with pytest.raises(WrongDigestError, match=f"^org/base/{name}: what came is not what"):
        streamed("merge", tmp_path / "out", workers=1, allow_merged_base=True)
    assert not [*tmp_path.iterdir()]


def test_what_is_finished_is_kept_when_the_hub_is_gone(hub, made, small, tmp_path):
    names = sorted(one for one in hub.files("org/base") if one.endswith(".safetensors"))
    sizes = {name: hub.files("org/base")[name].size for name in names}
    when = is_data(sizes[names[2]])
    hub.fail(Status(503), f"*{names[2]}", port="content", times=None, when=when)

    def written():
        """An error drops what is on its way to the disk still."""
        return all([*tmp_path.glob(f".out.partial/{name}")] for name in names[:2])

    hub.fail(First(lambda: until(written)), f"*{names[2]}", port="content", when=when)
    with pytest.raises(HubError, match=r"answered 503\. Call it again.*is kept in") as gone:
        streamed("merge", tmp_path / "out", workers=1)
    assert gone.value.exit_code == 9
    assert len(small) == 4
    assert not (tmp_path / "out").exists()
    hub.faults.rules.clear()
    hub.forget()
    report = streamed("merge", tmp_path / "out", workers=1)
    assert report["resumed"] == 2
    assert contents(tmp_path / "out") == made["merge"]
    read = [r.path for r in hub.requests if r.port == "content" and r.bytes > sizes[names[0]] / 2]
    assert not [path for path in read if path.endswith((names[0], names[1]))]
    files = report["sources"]["base"]["files"]
    assert [files[name]["checked"] for name in names] == [False, False, *[True] * (len(names) - 2)]


def test_tensors_of_this_machine_are_in_no_lane(tmp_path):
    from streamshard.checkpoint.shards import Shard
    from streamshard.tensors.lazy import Stored

    tensors = {name: Stored("/x", at, (4,), "F32", 100) for at, name in enumerate("ab")}
    shard = Shard("s", tensors, {}, 8)
    in_order, others = lanes.lanes([shard], {})
    assert (in_order, [*others()]) == ([], [(shard, 0, "a"), (shard, 1, "b")])
