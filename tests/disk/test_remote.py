"""Files that are read by ranges over a network: right bytes however streams break, or a refusal."""

from __future__ import annotations

import hashlib
import random
import threading
import time

import pytest

from streamshard.disk import remote as module
from streamshard.disk import remote_digest
from streamshard.disk.remote import BLOCK_NBYTES, GAP_NBYTES, MOST_STREAMS, AgainError, Remote
from streamshard.disk.remote_digest import WrongDigestError
from streamshard.disk.waiting import wait, wait_by
from streamshard.errors import HubError

DATA = random.Random(5).randbytes(3_000_000)
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


class Store:
    """Keeps `data`. `faults` are taken one for each stream that is opened: bytes until it breaks."""

    def __init__(self, data=DATA, faults=(), piece=70_000):
        self.data, self.faults, self.piece = data, iter(faults), piece
        self.asked = []
        self.open_now = 0
        self.lock = threading.Lock()

    def open(self, start, stop):
        self.asked.append((start, stop))
        fault = next(self.faults, None)
        if isinstance(fault, Exception):
            raise fault
        with self.lock:
            self.open_now += 1
        return Pieces(self, start, stop if fault is None else min(start + fault, stop), fault)


class Pieces:
    def __init__(self, store, at, stop, fault):
        self.store, self.at, self.stop, self.fault = store, at, stop, fault
        self.closed = False

    def read_into(self, out):
        assert not self.closed
        assert len(out)
        count = min(len(out), self.stop - self.at, self.store.piece)
        if not count and self.fault is not None and self.fault % 2:
            raise AgainError("reset")
        out[:count] = self.store.data[self.at : self.at + count]
        self.at += count
        return count

    def close(self):
        if not self.closed:
            self.closed = True
            with self.store.lock:
                self.store.open_now -= 1


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(module, "wait", seconds.append)
    return seconds


def remote_of(store, digest=SHA256, **known):
    return Remote("org/base/model.safetensors", len(store.data), digest, store, **known)


def read_all(remote, step=256 * 1024, start=0):
    out = bytearray(remote.nbytes)
    with remote.open("key") as file:
        file.onward = True
        for at in range(start, remote.nbytes, step):
            part = memoryview(out)[at : at + step]
            assert file.read_into(part, at) == len(part)
    return bytes(out[start:])


@pytest.mark.parametrize("step", [1000, 4097, BLOCK_NBYTES, 256 * 1024, 10_000_000])
def test_one_stream_gives_a_file_that_is_read_in_order(step):
    store = Store()
    remote = remote_of(store)
    assert read_all(remote, step) == DATA
    assert store.asked == [(0, len(DATA))]
    assert store.open_now == 0
    assert remote.frontier.outcome()[0]
    assert remote.opened == 1


@pytest.mark.parametrize("every", [1, 2, 3, 100, 4095, 4096, 65_536, 131_071, 262_144, 262_145])
def test_streams_that_break_go_on_where_they_broke(every, slept):
    data = DATA[: every * 300]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    store = Store(data, [every] * 400)
    remote = remote_of(store, digest)
    assert read_all(remote) == data
    assert remote.frontier.outcome()[0]
    assert [start for start, _ in store.asked] == [*range(0, len(data), every)]
    assert set(slept) <= {module.WAITS[0]}


def test_failures_without_progress_are_the_end(slept):
    store = Store(faults=[1000, *[AgainError("answered 503")] * 20])
    with pytest.raises(
        HubError, match=r"from byte 1,000 on, in 5 tries: answered 503\. Run the same"
    ):
        read_all(remote_of(store))
    assert slept == [*module.WAITS]


def test_answers_without_bytes_are_failures(slept):
    with pytest.raises(HubError, match="in 5 tries: the connection ended too early"):
        read_all(remote_of(Store(faults=[0] * 100)))
    assert len(slept) == 4


def test_four_failures_are_not_the_end(slept):
    store = Store(faults=[*[AgainError("x")] * 4, 10, *[AgainError("x")] * 3])
    assert read_all(remote_of(store)) == DATA
    assert slept == [*module.WAITS, *module.WAITS]


@pytest.mark.parametrize(("asked", "waited"), [(7.0, 7.0), (0.0, 0.5), (None, 0.5)])
def test_the_wait_that_a_server_asks_for_is_kept(asked, waited, slept):
    assert read_all(remote_of(Store(faults=[AgainError("429", asked)]))) == DATA
    assert slept == [waited]


def test_a_wait_of_an_hour_is_left_to_the_user():
    with pytest.raises(HubError, match="asks to wait 3,600 seconds"):
        read_all(remote_of(Store(faults=[AgainError("answered 429", 3600.0)])))


def test_other_errors_are_raised_at_once():
    with pytest.raises(HubError, match="gated"):
        read_all(remote_of(Store(faults=[HubError("gated")])))


@pytest.mark.parametrize("seed", range(40))
def test_any_ranges_in_any_order_with_any_breaks(seed):
    chance = random.Random(seed)
    faults = [
        one for _ in range(100) for one in (chance.choice([None, 1, 50_000]), AgainError("x"))
    ]
    store = Store(faults=faults, piece=chance.choice([1 << 20, 5000]))
    head = DATA[: chance.choice([0, 1000])]
    remote = remote_of(store, head=head)
    with remote.open("key") as file:
        for _ in range(60):
            start = chance.randrange(len(DATA) + 10)
            nbytes = chance.choice([0, 1, 100, 70_000, 600_000])
            wanted = DATA[start : start + nbytes]
            if chance.random() < 0.5:
                assert file.read(start, nbytes) == wanted
            else:
                out = bytearray(nbytes)
                assert file.read_into(memoryview(out), start) == len(wanted)
                assert out[: len(wanted)] == wanted
        assert store.open_now <= MOST_STREAMS
    assert store.open_now == 0


def test_three_places_are_read_forwards_by_three_streams():
    data = DATA * 4
    store = Store(data)
    with remote_of(store).open("key") as file:
        file.onward = True
        for row in range(0, 300_000, 10_000):
            for begin in (9_000_000, 0, 5_000_000):
                out = bytearray(10_000)
                file.read_into(memoryview(out), begin + row)
                assert out == data[begin + row : begin + row + 10_000]
    assert [start for start, _ in store.asked] == [9_000_000, 0, 5_000_000]


def test_a_thread_has_few_streams_whatever_they_are_of():
    """Of a hundred files; the client has no more connections than that."""
    store = Store()
    remotes = [remote_of(store) for _ in range(12)]
    files = [remote.open("key") for remote in remotes]
    for start in (0, 1_000_000, 2_000_000):
        for file in files:
            file.onward = True
            out = bytearray(1000)
            file.read_into(memoryview(out), start)
            assert out == DATA[start : start + 1000]
            assert store.open_now <= MOST_STREAMS
    for file in files:
        file.close()
    assert store.open_now == 0


def test_small_gaps_are_read_over_and_large_ones_are_not():
    store = Store()
    with remote_of(store).open("key") as file:
        for start in (0, 300_000, 300_000 + GAP_NBYTES, len(DATA) - 5):
            assert file.read(start, 5) == DATA[start : start + 5]
    assert [start for start, _ in store.asked] == [
        0,
        BLOCK_NBYTES,
        300_000 + BLOCK_NBYTES,
        len(DATA) - 5,
    ]


def test_what_is_read_for_itself_asks_for_little_more():
    store = Store()
    with remote_of(store).open("key") as file:
        file.read(2_000_000, 8)
    assert store.asked == [(2_000_000, 2_000_000 + BLOCK_NBYTES)]


def test_the_beginning_that_is_known_is_not_asked_for():
    store = Store()
    remote = remote_of(store, head=DATA[:5000])
    with remote.open("key") as file:
        assert file.read(0, 4000) == DATA[:4000]
        assert not store.asked
    assert read_all(remote) == DATA
    assert store.asked == [(5000, len(DATA))]
    assert remote.frontier.outcome() == (
        True,
        "streamed in order, and equal to the digest of the hub",
    )


def test_one_wrong_bit_is_found_with_the_last_byte():
    wrong = bytearray(DATA)
    wrong[1234] ^= 1
    with pytest.raises(WrongDigestError, match="what came is not what the hub has"):
        read_all(remote_of(Store(bytes(wrong))))
    with pytest.raises(WrongDigestError):
        read_all(remote_of(Store(), head=bytes(wrong[:5000])))


@pytest.mark.parametrize(("files", "threads"), [(1, 1), (2, 0)])
def test_a_digest_has_a_thread_where_a_processor_is_left(files, threads, monkeypatch):
    monkeypatch.setattr(remote_digest, "processors", lambda: 2)
    before = {*threading.enumerate()}  # some of them may end meanwhile
    opened = [remote_of(Store()).open("key") for _ in range(files)]
    for start in range(0, 2_900_000, 100_000):
        for file in opened:
            file.onward = True
            file.read_into(memoryview(bytearray(100_000)), start)
    assert len({*threading.enumerate()} - before) == threads
    for file in opened:
        file.close()
    assert {*threading.enumerate()} <= before
    assert not remote_digest._busy


@pytest.mark.parametrize("processors", [1, 64])
def test_what_is_hashed_by_another_thread_does_not_change(processors, monkeypatch):
    """However slow that is."""
    real = hashlib.sha256

    class Slow:
        def __init__(self):
            self.found = real()
            self.hexdigest = self.found.hexdigest

        def update(self, block):
            time.sleep(0.002)
            self.found.update(block)

    monkeypatch.setattr(remote_digest, "processors", lambda: processors)
    monkeypatch.setattr(hashlib, "sha256", lambda **_: Slow())
    data = DATA * 5
    remote = remote_of(Store(data), f"sha256:{real(data).hexdigest()}")
    assert read_all(remote) == data
    assert remote.frontier.outcome()[0]


def test_digests_of_git_are_known_too():
    blob = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA, usedforsecurity=False).hexdigest()
    remote = remote_of(Store(), f"git:{blob}")
    read_all(remote)
    assert remote.frontier.outcome()[0]
    with pytest.raises(WrongDigestError):
        read_all(remote_of(Store(), f"git:{blob[::-1]}"))


def test_what_could_not_be_checked_is_told():
    remote = remote_of(Store())
    read_all(remote, start=1_500_000)
    assert remote.frontier.outcome() == (False, "parts of it were read, or in another order")
    read_all(remote)  # what was missing comes: then it is known
    assert remote.frontier.outcome()[0]
    assert remote_of(Store(), "cache:x").frontier.outcome() == (
        False,
        "the hub tells no digest of its content",
    )
    remote = remote_of(Store(), head=DATA[:2000])
    assert remote.frontier.outcome() == (
        False,
        "only its first 2,000 bytes were read by who wrote this",
    )


def test_threads_have_their_own_streams():
    store = Store(DATA * 3)
    remote, wrong = remote_of(store, "cache:"), []
    together = threading.Barrier(3)

    def read(part):
        together.wait()  # threads that are there at the same time
        for at in range(part * len(DATA), (part + 1) * len(DATA), 100_000):
            out = bytearray(min(100_000, (part + 1) * len(DATA) - at))
            file.read_into(memoryview(out), at)
            if out != store.data[at : at + len(out)]:
                wrong.append(at)

    with remote.open("key") as file:
        file.onward = True
        threads = [threading.Thread(target=read, args=(part,)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(store.asked) == 3
    assert store.open_now == 0


def test_the_identity_is_that_of_the_content():
    one, other = remote_of(Store()), remote_of(Store(), SHA256[:-1] + "0")
    assert one.open("a").stamp == remote_of(Store()).open("b").stamp
    assert remote_of(Store(), "sha256:" + "0" * 64).stamp != one.stamp
    assert one.stamp.nbytes == other.stamp.nbytes == len(DATA)


def test_python_reads_it_as_a_file():
    with remote_of(Store()).open("key") as file, file.stream() as stream:
        stream.seek(100)
        assert stream.read(2000) == DATA[100:2100]
        stream.seek(0, 2)
        assert stream.tell() == len(DATA)
        assert file.mapping() is None
        assert file.abilities.in_order
        file.check()


def test_a_run_that_ends_does_not_wait():
    class Ended(Exception):  # noqa: N818
        pass

    def end(seconds):
        raise Ended(seconds)

    def work():
        wait_by(end)
        with pytest.raises(Ended, match="3"):
            wait(3)
        done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
