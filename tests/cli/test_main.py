"""Signals and exit codes."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time

import pytest
import reference
from pairs import begun, record_of
from sparse_folders import sparse_adapter, sparse_base


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
