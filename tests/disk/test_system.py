"""Calls to the operating system stand in one place, so that a test that replaces them sees all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from streamshard import disk

FILES = sorted(Path(disk.__path__[0]).glob("*.py"))
# What asks no disk, and the look at a held folder that is part of each call of `System`.
NO_CALLS = {
    "os.environ.get",
    "os.fspath",
    "os.fsdecode",
    "os.fsencode",
    "os.getcwd",
    "os.geteuid",
    "os.path.samestat",
}
NO_CALLS |= {"os.path.expanduser"}  # asks the environment and the list of users
PART_OF_EACH = {"held.py": {"os.lstat"}, "pictures.py": {"os.getpid"}}


def calls(file: Path) -> set[str]:
    """What is called outside of `System` and of the positioned calls that it chooses from."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    outside = [n for n in body if getattr(n, "name", "") != "System" and not isinstance(n, ast.If)]
    nodes = (node for part in outside for node in ast.walk(part))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_seam_has_every_call_of_files(file):
    """`os` is asked by the methods of `System` only."""
    of_the_system = {c for c in calls(file) if c.startswith(("os.", "shutil.")) or c == "open"}
    assert of_the_system <= NO_CALLS | PART_OF_EACH.get(file.name, set())


def test_the_reader_of_calls_sees_them():
    assert "system.open" in calls(FILES[0].with_name("files.py"))
    assert {"files.py", "folders.py", "inputs.py", "new_files.py"} <= {file.name for file in FILES}
