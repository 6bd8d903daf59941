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
# Ends the process before its call of this number to the operating system.
AT_A_CALL = """
import threading
from streamshard.disk.system import System, system
left, counting = [{}], threading.Lock()
def counted(call):
    def made(*given):
        with counting:
            left[0] -= 1
            if not left[0]:
                kill()
        return call(*given)
    return made
for name in vars(System):
    if not name.startswith("_"):
        setattr(system, name, counted(getattr(system, name)))
"""
CALLS_OF_A_PART = 1800
"""About as many as there are, if it is not all done yet."""


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
    """Run all parts of an output at once, each killed at some call and run again until it ends.

    Returns how many kills there were. Raises `AssertionError` if one ends otherwise than it should.
    """
    kills = 0
    left = dict.fromkeys(range(1, count + 1), 3)
    running: dict[int, subprocess.Popen[str]] = {}
    while left:
        for number in [number for number in left if number not in running]:
            code = AT_A_CALL.format(chance.randrange(1, CALLS_OF_A_PART)) if left[number] else ""
            running[number] = process([*command, "--part", f"{number}/{count}"], code)
        time.sleep(0.01)
        for number, found in list(running.items()):
            code = found.poll()
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
