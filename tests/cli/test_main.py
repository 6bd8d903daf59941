"""Signals and exit codes."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest
import reference
from interrupted_runs import INTERRUPT, TOLD, signalled
from pairs import record_of
from sparse_folders import sparse_adapter, sparse_base

# Every thread stops in its first write of weights, and goes on when the run has heard of the signal; what
# each then still writes is counted.
AT_WORK = f"""{INTERRUPT}
from streamshard.disk.new_files import OutputFile
write, one, counted = OutputFile.write, threading.Lock(), []
def stop(self, data, offset):
    if self.path.name.endswith(".part") and offset:
        if one.acquire(blocking=False):
            interrupt(number)
        elif not ended.is_set():
            ended.wait(600)
        counted.append(threading.get_ident())
    write(self, data, offset)
OutputFile.write = stop
still = lambda: max(map(counted.count, counted))
{TOLD}"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_signals_leave_nothing_where_nothing_is_finished(number, code, said, overwrite, tmp_path):
    """And the run ends soon, with 512 MB still to be written: in the block at which it is."""
    base = sparse_base(tmp_path / "base", tensors=8)
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
    done = signalled(AT_WORK, number, "merge-lora", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert int(done.stdout) <= 2
    assert reference.digests(tmp_path / "out") == before


def test_a_closed_pipe_is_no_error_message(pair):
    command = f"{shlex.join([sys.executable, '-m', 'streamshard', *pair.command])} --json | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (pair.output / "streamshard.json").exists()


NOTED = "import os; end = os._exit; os._exit = lambda code: (os.write(1, b'at once'), end(code))"
RUN = "from streamshard.__main__ import main; main()"


def test_it_ends_at_once_unless_something_else_runs_it(tmp_path):
    """A profiler, say, has its result to write."""
    line = [sys.executable, "-c", f"{NOTED}; {RUN}", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("at once")
    line[2] = f"{NOTED}\ntry:\n    exec({RUN!r})\nfinally:\n    print('the rest')"
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("the rest\n")
    found = tmp_path / "profile"
    line[1:] = ["-m", "cProfile", "-o", str(found), "-m", "streamshard", "--version"]
    subprocess.run(line, capture_output=True, check=True)
    assert found.stat().st_size
