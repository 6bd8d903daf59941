"""Outputs that several processes write in parts."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from interrupted_runs import KILL, MAIN
from pairs import Pair, heed_interrupts

from streamshard.engine.beside_output import places_beside

# Ends the process after the record of a shard is there.
AFTER_A_RECORD = """
from streamshard.engine.parts_folder import PartsFolder
add = PartsFolder.add
def last(self, shard):
    add(self, shard)
    kill()
PartsFolder.add = last
"""
# Ends the process when a shard is written and has not got its name.
BEFORE_THE_NAME = """
from streamshard.disk.system import system
rename = system.rename
def last(path, other):
    if str(other).endswith(".safetensors"):
        kill()
    rename(path, other)
system.rename = last
"""
# Ends the process when it has taken one finished shard into its own folder.
WHILE_ADOPTING = """
from streamshard.engine.journal import Journal
add = Journal.add
def last(self, shard):
    if self.finished:
        kill()
    add(self, shard)
Journal.add = last
"""
# Ends the process when the parts are removed and the output is not there yet.
AFTER_ADOPTING = """
from streamshard.engine import adopting as parts
discard = parts.discard_parts
def last(*given, **how):
    discard(*given, **how)
    kill()
parts.discard_parts = last
"""


def folder_of(pair: Pair) -> Path:
    """Where parts are kept."""
    return places_beside(pair.output)["parts"]


def written(pair: Pair) -> set[str]:
    """The names in the folder of the parts."""
    return {path.name for path in folder_of(pair).iterdir()}


def process(command: Sequence[str], code: str = "") -> subprocess.Popen[str]:
    """A command in a new process, after some code."""
    return subprocess.Popen(
        [sys.executable, "-c", KILL + code + MAIN, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    )


def all_parts_with_kills(command: Sequence[str], count: int, chance: random.Random) -> int:
    """Run all parts of an output at once, each killed at some moment and run again until it ends.

    Returns how many kills there were. Raises `AssertionError` if one ends otherwise than it should.
    """
    kills = 0
    left = dict.fromkeys(range(1, count + 1), 3)
    running: dict[int, tuple[subprocess.Popen[str], float]] = {}
    while left or running:
        for number in [number for number in left if number not in running]:
            found = process([*command, "--part", f"{number}/{count}"])
            ends = time.monotonic() + chance.uniform(0.2, 2.0) if left[number] else float("inf")
            running[number] = found, ends
        time.sleep(0.01)
        for number, (found, ends) in list(running.items()):
            code = found.poll()
            if code is None and time.monotonic() > ends:
                found.kill()
                code = found.wait()
            if code is None:
                continue
            del running[number]
            said = found.communicate()[1]
            if code == -signal.SIGKILL:
                kills += 1
                left[number] -= 1
            else:
                assert code == 0, said
                del left[number]
    return kills
