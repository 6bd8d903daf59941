"""How a process ends when its surroundings are not as usual: the exit code is always of the table."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import reference
from pairs import heed_interrupts

import streamshard
from streamshard import limits
from streamshard.cli import console
from streamshard.disk.system import System
from streamshard.errors import OutOfMemoryError, StreamshardError

PROGRAM = [sys.executable, "-m", "streamshard"]


def shell(
    redirections: str, *arguments: str, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run streamshard from a shell; what it says must never look like a crash."""
    line = f"{before} {shlex.join([*PROGRAM, *map(str, arguments)])} {redirections}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        errors="surrogateescape",
    )
    for sign in ("Traceback", "Exception ignored", "This is a bug"):
        assert sign not in done.stderr, done.stderr
    assert done.returncode not in {1, 120}, done.stderr
    return done


# --- standard streams -----------------------------------------------------------------------------

CLOSED = ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("more", [[], ["--json"], ["--quiet"]], ids=str)
def test_closed_streams_change_nothing_that_is_written(closed, more, pair):
    (pair.base / "config.json").unlink()  # so that there is a warning
    done = shell(closed, *pair.command, *more)
    assert done.returncode == 0, done.stderr
    found = reference.digests(pair.output)
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, overwrite=True)
    wanted = reference.digests(pair.output)
    for digests in (found, wanted):
        del digests["streamshard.json"]  # has the time
    assert found == wanted


@pytest.mark.parametrize("closed", [*CLOSED, ">/dev/full", "2>/dev/full", ">&- 2>/dev/full"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["merge-lora", "--nothing"], 2),
        ([], 2),
        (["inspect", "nowhere"], 3),
        (["diff", "nowhere", "nowhere", "--json"], 3),
        (["verify", "nowhere"], 3),
    ],
    ids=str,
)
def test_the_code_of_an_error_stays_though_nobody_hears_of_it(closed, arguments, code):
    assert shell(closed, *arguments).returncode == code


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["diff", "--help"]], ids=str)
@pytest.mark.parametrize(
    ("streams", "code"),
    [(">&-", 0), ("2>&-", 0), (">/dev/full", 6), (">/dev/full 2>&-", 6), ("| exec true", 0)],
)
def test_help_that_cannot_be_printed(arguments, streams, code):
    done = shell(streams, *arguments)
    assert done.returncode == code


@pytest.mark.parametrize("more", [[], ["--json"], ["--dry-run"]], ids=str)
def test_a_result_that_cannot_be_printed(more, pair):
    done = shell(">/dev/full", *pair.command, *more)
    assert done.returncode == 6
    assert "cannot be printed: No space left" in done.stderr
    assert pair.output.exists() == (more != ["--dry-run"])
    assert ("is complete" in done.stderr) == (more != ["--dry-run"])


# Nobody reads any more when it is told what follows.
DEAF = "| { exec <&-; sleep 0.3; }"


@pytest.mark.parametrize("more", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("streams", [DEAF, f"2>&1 {DEAF}", "| head -c 1"])
def test_who_has_read_enough_does_not_change_how_it_ends(streams, more, pair):
    assert shell(streams, *pair.command, *more).returncode == 0
    assert (pair.output / "streamshard.json").exists()
    same = shell(streams, "diff", str(pair.base), str(pair.base), "--exit-code", *more)
    other = shell(streams, "diff", str(pair.base), str(pair.output), "--exit-code", *more)
    assert (same.returncode, other.returncode) == (0, 8)
    (pair.output / "model.safetensors").write_bytes(b"")
    assert shell(streams, "verify", str(pair.output), *more).returncode == 8
    assert shell(streams, "inspect", str(pair.base), *more).returncode == 0
    assert shell(streams, "inspect", "nowhere", *more).returncode == 3
    assert shell(streams, "env", *more).returncode == 0


def test_a_full_log_does_not_stop_the_work(pair):
    (pair.base / "config.json").unlink()
    assert shell("2>/dev/full", *pair.command).returncode == 0
    assert (pair.output / "streamshard.json").exists()


def test_a_closed_stream_is_open_before_anything_else_is(pair):
    """An output that got number 1 or 2 would have what libraries print in it."""
    script = """
import os, sys
from streamshard.cli.console import open_streams
open_streams()
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert opened > 2, opened
os.write(1, b"x"), os.write(2, b"x")
print("x"), print("x", file=sys.stderr)
"""
    path = pair.root / "file"
    line = shlex.join([sys.executable, "-c", script, str(path)])
    done = subprocess.run(["bash", "-c", f"{line} <&- >&- 2>&-"], check=False)
    assert done.returncode == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
    ],
    ids=str,
)
def test_names_that_the_terminal_does_not_know(environment, pair):
    output = pair.root / "größe 模型"
    done = shell("", *pair.command[:-1], str(output), **environment)
    assert done.returncode == 0, done.stderr
    assert "Merged into 2 tensors" in done.stdout
    assert (output / "streamshard.json").exists()
    assert shell("", "inspect", str(output), **environment).returncode == 0


# --- the current folder ---------------------------------------------------------------------------


def gone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder that has been removed."""
    folder.mkdir()
    where = shlex.quote(str(folder))
    return shell("", *map(str, arguments), before=f"cd {where} && rmdir {where} &&")


def test_whole_paths_need_no_current_folder(pair):
    for more in ([], ["--overwrite"]):
        done = gone(pair.root / "gone", *pair.command, *more)
        assert done.returncode == 0, done.stderr
    for arguments in (["inspect", pair.base], ["verify", pair.output], ["diff", *[pair.base] * 2]):
        assert gone(pair.root / "gone", *arguments).returncode == 0


@pytest.mark.parametrize(
    ("option", "path", "code"),
    [
        ("--base", "base", 3),
        ("--adapter", ".", 3),
        ("--output", "out/merged", 6),
        ("--output", ".", 6),
        ("--output", "../merged", 6),
        ("--output", None, 6),
    ],
)
def test_paths_that_begin_in_a_folder_that_is_gone(option, path, code, pair):
    command = list(pair.command)
    place = command.index(option)
    command[place : place + 2] = [] if path is None else [option, path]
    done = gone(pair.root / "gone", *command)
    assert done.returncode == code
    assert "the current folder no longer exists" in done.stderr


# --- paths ----------------------------------------------------------------------------------------

NO_FILE = ["x" * 300, "x/" * 3000, "file/x", "loop", "loop/x"]
NO_PATH = ["", "a\0b", "a\ud800b", 3, None, b"a\0"]


def calls(pair, path, where):
    """Every public function with `path` as what is read, or as what is written."""
    kept = {"base": pair.base, "adapter": pair.adapter, "output": pair.output}
    convert = {"hf_path": pair.base, "custom_path": pair.base, "save_path": pair.output}
    wrap = {"base": pair.base, "output": pair.output, "llm_r": 2}
    extract = {"checkpoint": pair.base, "output": pair.output}
    if where == "out":
        return [
            (streamshard.merge_lora, {**kept, "output": path}),
            (streamshard.merge_lora, {**kept, "output": path, "overwrite": True}),
            (streamshard.merge_lora, {**kept, "output": path, "dry_run": True}),
            (streamshard.wrap_lora, {**wrap, "output": path}),
        ]
    return [
        (streamshard.merge_lora, {**kept, "base": path}),
        (streamshard.merge_lora, {**kept, "adapter": path}),
        (streamshard.merge_lora, {**kept, "layout": "hf", "reference": path}),
        (streamshard.merge_lora, {"checkpoint": path, "output": pair.output}),
        (streamshard.hf_to_custom, {**convert, "hf_path": path}),
        (streamshard.custom_to_hf, {**convert, "custom_path": path}),
        (streamshard.wrap_lora, {**wrap, "base": path}),
        (streamshard.extract_lora, {**extract, "checkpoint": path}),
        (streamshard.inspect, {"path": path}),
        (streamshard.verify, {"path": path}),
        (streamshard.diff, {"a": path, "b": pair.base}),
        (streamshard.diff, {"a": pair.base, "b": path}),
    ]


@pytest.mark.parametrize("where", ["in", "out"])
@pytest.mark.parametrize("path", [*NO_FILE, *NO_PATH], ids=lambda path: repr(path)[:12])
def test_paths_that_no_file_can_have(path, where, pair, monkeypatch):
    monkeypatch.chdir(pair.root)
    (pair.root / "file").write_text("x")
    (pair.root / "loop").symlink_to("loop")
    before = reference.digests(pair.base)
    for function, arguments in calls(pair, path, where):
        if path is None and (function is streamshard.merge_lora):
            continue  # None is "not given" there
        with pytest.raises(StreamshardError) as caught:
            function(**arguments)
        allowed = {2} if path in NO_PATH else {3} if where == "in" else {5, 6}
        if function is streamshard.wrap_lora and where == "out":
            allowed |= {3, 4}  # the base is no model that can be wrapped
        assert caught.value.exit_code in allowed, (function, str(caught.value))
    assert reference.digests(pair.base) == before


# --- disks ----------------------------------------------------------------------------------------


def test_a_disk_that_does_not_tell_its_free_space(pair, cli, monkeypatch):
    monkeypatch.setattr(System, "disk_free", lambda *_: None)
    outcome = cli(*pair.command, "--dry-run", "--json")
    assert json.loads(outcome.out)["plan"]["free_bytes"] is None
    assert "free space unknown" in cli(*pair.command, "--dry-run").out
    assert cli(*pair.command).code == 0


def test_a_disk_that_is_full_is_full(pair, cli, monkeypatch):
    monkeypatch.setattr(System, "disk_free", lambda *_: 0)
    assert cli(*pair.command).code == 6


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EIO])
def test_disks_that_cannot_be_asked(answer, pair, cli, monkeypatch):
    def fail(_path):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("shutil.disk_usage", fail)
    assert cli(*pair.command).code == (0 if answer == errno.ENOSYS else 6)


def test_ramfs(pair):
    disk = pair.root / "disk"
    disk.mkdir()
    line = shlex.join([*PROGRAM, *pair.command[:-1], str(disk / "out")])
    script = f"mount -t ramfs none {shlex.quote(str(disk))} 2>/dev/null || exit 99; {line}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip("cannot mount a file system")
    assert done.returncode == 0, done.stderr


# --- memory, threads, files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merge_lora", "inspect", "diff", "verify"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 GB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_a_shortage_is_told_as_what_it_is(name, error, pair, monkeypatch):
    def fail(*_, **__):
        raise error

    arguments = {
        "merge_lora": {"base": pair.base, "adapter": pair.adapter, "output": pair.output},
        "diff": {"a": pair.base, "b": pair.base},
    }.get(name, {"path": pair.base})
    function = getattr(streamshard, name)
    monkeypatch.setattr("streamshard.checkpoint.json_files.parse_json", fail)
    with pytest.raises(OutOfMemoryError, match="not enough memory") as caught:
        function(**arguments)
    assert caught.value.exit_code == 6
    assert not pair.output.exists()


def test_a_shortage_in_a_thread(pair, cli, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(System, "pwrite", fail)
    outcome = cli(*pair.command)
    assert outcome.code == 6
    assert "not enough memory" in outcome.err


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_fewer_threads_do_the_same(allowed, pair, cli, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if sum(one.is_alive() for one in started) > allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    outcome = cli(*pair.command, "--workers", "4")
    # One thread waits for the disk, and one works at least.
    assert outcome.code == (6 if allowed == 0 else 0), outcome.err


def test_the_rooms_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_GROUPS", tmp_path)
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/a/b\n")
    for path, limit, taken, cached in (("a/b", "max", 1, 0), ("a", "1000", 900, 300)):
        group = tmp_path / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{taken}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")
    assert limits.group_room() == 1000 - 900 + 307
    with pytest.raises(OutOfMemoryError, match="control group of this process has room for 407"):
        limits.fitting(1, 10_000_000)
    (tmp_path / "membership").write_text("3:cpu:/x\n4:memory:/not/here\n")
    (tmp_path / "memory").mkdir()
    assert limits.group_room() is None
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("500000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("400000000\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 0\n")
    assert limits.group_room() == 100_000_000
    assert 1 < limits.fitting(64, 10_000_000) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
@pytest.mark.parametrize(
    ("limit", "codes"),
    [("-n 8", {6, 7}), ("-n 16", {0, 6, 7}), ("-f 4", {6}), ("-s 1024", {0})],
)
def test_other_limits(limit, codes, pair):
    before = reference.digests(pair.base)
    done = shell("", *pair.command, before=f"ulimit {limit};")
    assert done.returncode in codes, done.stderr
    assert (done.returncode == 0) == pair.output.exists()
    assert reference.digests(pair.base) == before


# --- signals that come early ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
@pytest.mark.parametrize("module", ["click", "json", "numpy", "streamshard.engine.writer"])
def test_a_signal_during_an_import_is_no_traceback(module, number, pair):
    """The signal arrives when `module` is looked for, whatever that makes of it."""
    script = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), {int(number)})
                for _ in range(1000): pass
            except BaseException as error:
                raise ImportError("cannot import") from error
sys.meta_path.insert(0, Finder())
sys.modules.pop({module!r}, None)
sys.argv = {["streamshard", *pair.command]!r}
runpy.run_module("streamshard", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )
    assert done.returncode in ({130} if number == signal.SIGINT else {143, -signal.SIGTERM})
    assert "Traceback" not in done.stderr
    assert not pair.output.exists()


def test_a_full_pipe_that_does_not_block_is_waited_for(monkeypatch):
    """Whoever shares a pipe can have made it so: then what it has no room for was an error."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(writing, b"." * 4096)
    waited = []

    def wait(*_):
        waited.append(os.read(reading, filled))

    monkeypatch.setattr(select, "select", wait)
    with open(writing, "w", encoding="utf-8") as given:
        stream = console._as_pipe(given, writing)
        stream.write("the end")
        stream.flush()
    assert b"".join(waited) == b"." * filled
    assert os.read(reading, 100) == b"the end"
    os.close(reading)
