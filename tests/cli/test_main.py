"""Progress, signals and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import reference
from pairs import begun, record_of
from sparse_folders import sparse_adapter, sparse_base


def test_progress_is_on_stderr_of_a_terminal_only(pair):
    """With a terminal for stderr a bar is drawn there; stdout is one JSON document all the same."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, "-m", "streamshard", *pair.command, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        out = process.communicate()[0]
    os.close(controller)
    assert process.returncode == 0
    assert json.loads(out)["merged"] == 2
    text = seen.decode()
    assert "100%" in text
    assert "B/s" in text
    assert "tensor=" in text


def test_there_is_no_progress_in_a_log_file(pair):
    command = [sys.executable, "-m", "streamshard", *pair.command, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["merged"] == 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_signals_leave_nothing_where_nothing_is_finished(number, code, said, overwrite, tmp_path):
    base = sparse_base(tmp_path / "base", tensors=8)  # 512 MB, written in about half a second
    adapter = sparse_adapter(tmp_path / "adapter")
    output = tmp_path / "out" / "merged"
    output.parent.mkdir()
    if overwrite:
        output.mkdir()
        (output / "model.safetensors.index.json").write_text("{}")
        record = record_of("model.safetensors.index.json")
        (output / "streamshard.json").write_bytes(record)
    arguments = ["--base", base, "--adapter", adapter, "--output", output, "--workers", "2"]
    arguments += ["--overwrite"] * overwrite
    before = reference.digests(tmp_path / "out")
    with begun("merge-lora", *arguments) as process:
        deadline = time.monotonic() + 60
        while not any(p.suffix == ".part" for p in output.parent.glob(".*/*")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        started = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert time.monotonic() - started < 2  # a second, and what a busy machine adds
    assert said in err
    assert "same command again" in err
    assert "Traceback" not in err
    assert out == ""
    assert reference.digests(tmp_path / "out") == before


def test_a_closed_pipe_is_no_error_message(pair):
    command = f"{shlex.join([sys.executable, '-m', 'streamshard', *pair.command])} --json | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (pair.output / "streamshard.json").exists()
