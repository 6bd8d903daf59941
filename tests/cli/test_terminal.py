"""What is seen in a terminal of a certain width, and in a log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from interrupted_runs import AFTER_A_SHARD, INTERRUPT, KILL, killed
from make_checkpoint import write_adapter, write_checkpoint
from pairs import heed_interrupts, wrap_as_the_trainer
from reference import digests
from terminals import in_terminal

import streamshard

WIDTHS = [30, 50, 80, 120, 200]
# Every piece is drawn, and told in small pieces.
SLOWLY = """
from streamshard.cli import progress
from streamshard.engine import writer
progress.DRAWN_EVERY = 0
writer.NOTED_BYTES = 2000
from streamshard.__main__ import main
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for layout in ("custom", "hf"):
        write_checkpoint(folder / layout, "tiny", layout=layout, max_shard_size="100KB")
    write_adapter(folder / "lora", "tiny", layout="custom")
    write_checkpoint(folder / "wrapped", "tiny", layout="custom")
    wrap_as_the_trainer(folder / "wrapped")
    streamshard.merge_lora(
        base=folder / "custom", adapter=folder / "lora", output=folder / "merged", sha256=True
    )
    return folder


COMMANDS = {
    "merge-lora --base {0}/custom --adapter {0}/lora --output {1}": ["merging"],
    "merge-lora {0}/wrapped --reference {0}/custom --output {1} --sha256": ["merging", "hashing"],
    "hf2custom --hf-path {0}/hf --custom-path {0}/custom --save-path {1}": ["converting"],
    "custom2hf --hf-path {0}/hf --custom-path {0}/custom --save-path {1}": ["converting"],
    "wrap-lora --base {0}/custom --llm-r 2 --output {1}": ["wrapping"],
    "extract-lora {0}/wrapped --base {0}/custom --output {1}": ["comparing", "extracting"],
    "verify {0}/merged": ["verifying"],
    "diff {0}/merged {0}/hf": ["comparing"],
}


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_progress_and_summary_fit_the_terminal(command, columns, models, tmp_path):
    arguments = command.format(models, tmp_path / "o").split()
    seen = in_terminal(columns, *arguments, code=SLOWLY)
    assert seen.code == 0, seen.text
    for what in COMMANDS[command]:
        last = [line for line in seen.drawn if line.startswith(f"{what} 100%")]
        if columns >= 50:
            assert len(last) >= 1
            # It stays, and nothing of what was longer is left behind it.
            assert last[-1] in seen.lines
    drawn = [line for line in seen.drawn if re.match(r" *[\d.]+/|\w+ +\d+%", line)]
    assert len(drawn) > 10
    for line in drawn:
        assert len(line) < columns
        assert re.search(r"[\d.]+/[\d.]+ [KM]B", line)
        assert re.search(r"\d:\d\d|-:--", line)
    named = [line for line in drawn if ".weight" in line]
    assert bool(named) == (columns >= 80)
    for line in named:
        assert re.search(r"  (…?)\w+(\.\w+)+$", line)
    # All that is printed fits, but for words that are longer.
    result = seen.text.replace("\r", "\n").split("\n")
    assert not [line for line in result if len(line) > columns and " " in line.strip()]


def test_stdout_has_only_the_document(models, tmp_path):
    """With a terminal for stderr a bar is drawn there, and stdout is one JSON document all the same."""
    code = f"import os\nos.dup2(os.open({str(tmp_path / 'out')!r}, os.O_RDWR | os.O_CREAT), 1)\n"
    command = "merge-lora --base {0}/custom --adapter {0}/lora --output {1} --json"
    seen = in_terminal(80, *command.format(models, tmp_path / "o").split(), code=code + SLOWLY)
    assert seen.code == 0
    assert json.loads((tmp_path / "out").read_text())["merged"]
    assert any("100%" in line for line in seen.lines)


def test_a_terminal_that_knows_no_letters_gets_none(models, tmp_path):
    code = "import sys\nsys.stderr.reconfigure(encoding='ascii')\n" + SLOWLY
    seen = in_terminal(100, "verify", models / "merged", code=code)
    assert seen.code == 0
    bars = [line for line in seen.drawn if "verifying" in line and "B/s" in line]
    assert bars
    assert all(line.isascii() and len(line) < 100 for line in bars)
    assert any("..." in line for line in bars)


@pytest.mark.parametrize("stream", ["terminal", "log"])
def test_quiet_draws_nothing(stream, models):
    if stream == "terminal":
        seen = in_terminal(80, "verify", models / "merged", "--quiet", code=SLOWLY)
        assert (seen.code, seen.text) == (0, "")
    else:
        done = run("verify", models / "merged", "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- without a terminal ---------------------------------------------------------------------------


def run(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    line = f"{code}\nfrom streamshard.__main__ import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", line, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "40"},
        preexec_fn=heed_interrupts,
    )


def test_a_log_has_a_line_at_the_start(models, tmp_path):
    """By a clock that stands still: after ten seconds there would be another one."""
    code = """
from streamshard.cli import progress
class time:
    monotonic = staticmethod(lambda: 1000.0)
progress.time = time
"""
    merge = ["merge-lora", "--base", models / "custom", "--adapter", models / "lora", "--output"]
    done = run(*merge, tmp_path / "o", "--json", code=code)
    assert json.loads(done.stdout)["merged"]
    assert done.stderr == "merging: 358 KB\n"
    said = run("diff", models / "merged", models / "hf", code=code).stderr
    assert said == "comparing: 358 KB\n"
    assert "\r" not in done.stderr


def test_a_log_has_a_line_every_ten_seconds(models, tmp_path):
    """By a clock that goes on by a second at each piece."""
    code = """
import itertools
from streamshard.cli import progress
from streamshard.engine import writer
writer.NOTED_BYTES = 2000
ticks = itertools.count(1000)
class time:
    monotonic = staticmethod(lambda: next(ticks))
progress.time = time
"""
    merge = ["merge-lora", "--base", models / "custom", "--adapter", models / "lora", "--output"]
    done = run(*merge, tmp_path / "o", code=code)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "merging: 358 KB"
    assert 4 < len(lines) < 40
    for line in lines[1:]:
        assert re.fullmatch(r"merging: \d+%, \d+/358 KB, [\d.]+ K?B/s, (\d:)?\d+:\d\d left", line)
    # Summaries of a file are not broken: who reads them expects lines.
    assert max(map(len, done.stdout.splitlines())) > 80


# --- interrupted runs -----------------------------------------------------------------------------

STOPPING = f"""{INTERRUPT}
import signal
from streamshard.engine.journal import Journal
add = Journal.add
def last(self, shard):
    add(self, shard)
    if len(self.finished) == 2:
        interrupt(signal.NAME)
Journal.add = last
"""


@pytest.mark.parametrize(
    ("name", "code", "how"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")]
)
def test_what_is_kept_is_said_and_continued(name, code, how, models, tmp_path):
    output = tmp_path / "o"
    merge = ["merge-lora", "--base", models / "custom", "--adapter", models / "lora"]
    merge += ["--output", output, "--workers", "1"]
    ended = run(*merge, code=STOPPING.replace("NAME", name))
    assert ended.returncode == code, ended.stderr
    assert f"{how}. What is finished (2 of the weight files) is kept in" in ended.stderr
    assert "run the same command again to continue, or remove that folder" in ended.stderr
    dry = run(*merge, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "Would continue an interrupted run: 2 of 4 files are done.\n" in dry.stdout
    report = json.loads(run(*merge, "--dry-run", "--json").stdout)
    assert (report["resumed"], report["shards"]) == (2, 4)
    other = run(*merge, "--dry-run", "--dtype", "fp32")
    real = run(*merge, "--dtype", "fp32")
    assert (other.returncode, other.stderr) == (real.returncode, real.stderr)
    assert real.returncode == 5
    assert "cannot be continued: --dtype was keep and is fp32" in real.stderr
    anew = run(*merge, "--dry-run", "--dtype", "fp32", "--overwrite")
    assert anew.returncode == 0
    assert "continue" not in anew.stdout
    seen = in_terminal(80, *merge, code=SLOWLY)
    assert seen.code == 0
    assert seen.lines[0] == "continuing: 2 of 4 files are done"
    assert seen.lines[1].startswith("checking 100%")
    assert seen.lines[2].startswith("merging 100%")
    assert "in 4 files, " in seen.text
    assert "2 of these before" in seen.text
    merging = [line for line in seen.drawn if line.startswith("merging")]
    assert int(re.search(r"(\d+)%", merging[0])[1]) > 20


def test_what_differs_is_said(pair, cli):
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    (file,) = pair.output.parent.glob(".merged.partial/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = cli(*pair.command)
    assert outcome.code == 0, outcome.err
    assert "continuing: 1 of 2 files are done\n" in outcome.err
    assert f"warning: not as written, and therefore written anew: '{file.name}'" in outcome.err


def test_a_dry_run_beside_a_run(pair, cli):
    """It says what the real run would: that another one is writing."""
    # By its own thread: that is stopped at once, and all others with it.
    own = "signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)"
    stop = "import threading\n" + AFTER_A_SHARD.replace("kill()", own)
    script = f"{KILL}{stop}\nfrom streamshard.cli import main\nmain()"
    line = [sys.executable, "-c", script, *pair.command, "--workers", "1"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as first:
        try:
            _, status = os.waitpid(first.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            dry, real = cli(*pair.command, "--dry-run"), cli(*pair.command)
            assert (dry.code, dry.err) == (real.code, real.err)
            assert f"another run (process {first.pid}" in dry.err
        finally:
            first.kill()
    assert cli(*pair.command, "--dry-run").code == 0
    assert cli(*pair.command).code == 0


def test_an_interrupt_after_the_end_says_so(pair):
    code = """
from streamshard.cli import texts
import os, signal
def stop(report):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**9): pass
texts.merge_text = stop
"""
    done = run(*pair.command, code=code)
    assert done.returncode == 130
    assert done.stderr.endswith(f"Interrupted. {pair.output} is complete.\n")


@pytest.mark.parametrize("command", ["verify", "diff"])
def test_an_interrupt_in_a_terminal_begins_a_new_line(command, models):
    arguments = [command, models / "merged", *[models / "hf"] * (command == "diff")]
    code = f"""{INTERRUPT}
from streamshard.cli.progress import Progress
import signal
piece = Progress.piece
def stop(self, *of):
    piece(self, *of)
    if self._state.done > 100_000:
        interrupt(signal.SIGINT)
Progress.piece = stop
{SLOWLY}"""
    seen = in_terminal(80, *arguments, code=code)
    assert seen.code == 130
    assert seen.lines[-2] == "Interrupted. Nothing was written: run the same command again."
    assert "%" in seen.lines[-3]


def test_an_interrupt_of_a_replacement_says_that_the_old_output_stays(pair):
    assert run(*pair.command).returncode == 0
    before = digests(pair.output)
    code = f"""{INTERRUPT}
from streamshard.cli.progress import Progress
import signal
def stop(self, *of):
    interrupt(signal.SIGINT)
Progress.piece = stop
"""
    done = run(*pair.command, "--overwrite", "--dtype", "fp32", code=code)
    assert done.returncode == 130, done.stderr
    assert "nothing of it is kept, and an earlier output is as it was: run the same" in done.stderr
    assert digests(pair.output) == before
