"""Real limits: a process that may not have the memory of its model, and a disk that is full."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
from marks import linux, slow
from pairs import LAYER, Pair

from streamshard import merge_lora
from streamshard.errors import bytes_text

pytestmark = slow

LIMIT = 170_000_000  # of all private memory: interpreter, numpy and the stacks of threads included


def restricted(code: str) -> subprocess.CompletedProcess[str]:
    import resource

    return subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


def large_base(folder: Path) -> int:
    """A base of 400 MB of zeros that take no room on the disk; its size in bytes."""
    shapes = {f"{LAYER}.q_proj.weight": (96, 40), f"{LAYER}.k_proj.weight": (130, 40)}
    shapes |= {
        f"language_model.model.layers.{n}.mlp.up_proj.weight": (10_000, 1000) for n in range(20)
    }
    entries, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + rows * columns * 2
        entries[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text("{}")
    return end


@linux  # RLIMIT_DATA counts private memory there only
@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_larger_than_the_memory_that_is_allowed(workers, pair, tmp_path):
    nbytes = large_base(tmp_path / "large")
    assert nbytes > 2 * LIMIT
    assert restricted(f"bytearray({nbytes})").returncode == 1
    assert restricted(f"bytearray({LIMIT})").returncode == 1
    done = restricted(f"""
from streamshard import merge_lora
merge_lora(
    base={str(tmp_path / "large")!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r},
    workers={workers},
)
""")
    assert done.returncode == 0, done.stderr
    with (pair.output / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    assert (pair.output / "model.safetensors").stat().st_size == 8 + length + nbytes
    assert len(entries) - ("__metadata__" in entries) == 22


def ended(
    command: list[str], kind: str, limit: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command under a limit, which must end with 0 or 6 and never die of it."""
    import resource

    done = subprocess.run(
        [sys.executable, *command],
        preexec_fn=lambda: resource.setrlimit(getattr(resource, kind), (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode in {0, 6}, (kind, limit, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    if done.returncode == 6:
        assert "not enough memory" in done.stderr
        option = "d" if kind == "RLIMIT_DATA" else "v"
        assert f"{kind} (ulimit -{option}) is {bytes_text(limit)}" in done.stderr
    return done


# Up to where it ends with 6, from where with 0; bench/limits.py tries every size.
SIZES = {
    "RLIMIT_DATA": [16, 32, 48, 64, 80, 96, 104, 112, 128, 160, 256],
    "RLIMIT_AS": [100, 120, 140, 156, 168, 200, 300, 1000, 2000],
}


@linux
@pytest.mark.parametrize("kind", SIZES)
def test_every_limit_of_memory_ends_with_an_exit_code(kind, pair):
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.root / "wanted")
    wanted = reference.digests(pair.root / "wanted")
    del wanted["streamshard.json"]
    codes = []
    for size in SIZES[kind]:
        command = ["-m", "streamshard", *pair.command, "--overwrite", "--workers", "4"]
        done = ended(command, kind, size * 10**6)
        codes.append(done.returncode)
        assert (done.returncode == 0) == pair.output.exists()
        if pair.output.exists():
            found = reference.digests(pair.output)
            del found["streamshard.json"]
            assert found == wanted
    assert codes == sorted(codes, reverse=True)  # what is enough stays enough
    assert {codes[0], codes[-1]} == {0, 6}


@linux
@pytest.mark.parametrize("size", [16, 64, 100, 128, 200, 400])
@pytest.mark.parametrize("threads", ["1", "4"])
def test_from_python_it_is_an_exception(threads, size, pair):
    code = f"""
import sys
import streamshard
from streamshard.errors import OutOfMemoryError
try:
    streamshard.merge_lora(
        base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}
    )
except OutOfMemoryError as error:
    assert isinstance(error, MemoryError) and isinstance(error, streamshard.StreamshardError)
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    done = ended(["-c", code], "RLIMIT_DATA", size * 10**6, OPENBLAS_NUM_THREADS=threads)
    assert (done.returncode == 0) == pair.output.exists()
    assert done.returncode == (6 if size < 100 else 0 if size > 300 else done.returncode)


@linux
@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
@pytest.mark.parametrize("size", [32, 64, 96, 104, 128])
def test_reading_ends_with_an_exit_code_too(command, size, pair):
    paths = [str(pair.base)] * (1 + (command == "diff"))
    ended(["-m", "streamshard", command, *paths], "RLIMIT_DATA", size * 10**6)


@linux
@pytest.mark.parametrize("size", [64, 128, 200])
def test_a_pickled_adapter_needs_no_room_for_torch(size, pair):
    file = pair.adapter / "adapter_model.safetensors"
    reference.torch.save(reference.load_file(file), file.with_suffix(".bin"))
    file.unlink()
    done = ended(["-m", "streamshard", *pair.command], "RLIMIT_DATA", size * 10**6)
    assert (done.returncode == 0) == (size >= 128) == pair.output.exists()


def test_too_little_memory_is_said(pair, cli, monkeypatch):
    import streamshard.commands.merge_lora

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 9 GB")

    monkeypatch.setattr(streamshard.commands.merge_lora, "merge_lora", fail)
    outcome = cli(*pair.command)
    assert outcome.code == 6
    assert "not enough memory: Unable to allocate 9 GB" in outcome.err
    assert "bug" not in outcome.err


FULL_DISK = """
import shutil
import sys
from pathlib import Path
from streamshard import merge_lora
from streamshard.errors import StreamshardError

base, adapter, disk = map(Path, sys.argv[1:])
free = {free}

def fill(plan):
    # After the plan has found enough space, somebody else takes all but a part of it.
    with (disk / "filler").open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free > free:
            file.write(bytes(4096))

try:
    merge_lora(base=base, adapter=adapter, output=disk / "out", on_plan=fill)
except StreamshardError as error:
    print(error.exit_code, error, flush=True)
assert not (disk / "out").exists()
(disk / "filler").unlink()
merge_lora(base=base, adapter=adapter, output=disk / "out")
shutil.copytree(disk / "out", adapter.parent / "rerun")
print(sorted(path.name for path in disk.iterdir()))
"""


@pytest.mark.parametrize("free", [0, 8192, 20_000, 40_000])
def test_a_disk_that_fills_up_and_is_freed_again(free: int, pair: Pair):
    """The real thing, where the system lets us mount a small disk of our own."""
    disk = pair.root / "disk"
    disk.mkdir()
    (pair.base / "notes.txt").write_bytes(bytes(30_000))
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    inputs = [reference.digests(pair.root / name) for name in ("base", "adapter")]
    script = pair.root / "script.py"
    script.write_text(FULL_DISK.format(free=free))
    paths = [str(path) for path in (script, pair.base, pair.adapter, disk)]
    mount = f"mount -t tmpfs -o size=512k none '{disk}' 2>/dev/null || exit 99; "
    line = " ".join(f"'{part}'" for part in (sys.executable, *paths))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + line], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip("cannot mount a file system")
    assert done.returncode == 0, done.stderr
    failed, left = done.stdout.splitlines()
    assert failed.startswith("6 ")
    assert "Free some space" in failed
    assert left == "['out']"
    assert inputs == [reference.digests(pair.root / name) for name in ("base", "adapter")]
    first, again = (reference.digests(path) for path in (pair.output, pair.root / "rerun"))
    for found in (first, again):
        del found["streamshard.json"]  # has the time
    assert first == again
