"""The architecture as import statements say it, and what a run imports in the end.

The rooms and their order are told in the docstrings of the package's folders; here are the rules.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamshard

PACKAGE = Path(streamshard.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.glob("**/*.py"))

# Rooms that a room may import, itself aside. All may import the ground, and only the command line
# the face: the package's public names.
GROUND = {"errors", "extras", "limits", "notes", "tensor_names", "values", "version", "wording"}
FACE = "streamshard"
MAY = {
    "disk": set(),
    "tensors": {"disk"},
    "checkpoint": {"tensors", "disk"},
    "lora": {"tensors"},
    "internvl": {"tensors"},
    "engine": {"checkpoint", "tensors", "disk"},
    "commands": {"engine", "lora", "internvl", "checkpoint", "tensors", "disk"},
    "cli": {FACE},
}
# What is imported within functions only, if at all: it is heavy.
HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "safetensors"}
# Rooms of mathematics and names: they know of no files, but that tensors may lie in some.
PURE = {"tensors", "lora", "internvl", "tensor_names"}
FILE_MODULES = {"os", "pathlib", "shutil", "io", "tempfile"}


def name_of(file: Path) -> str:
    """The name of a module inside the package: `lora.merge`, `errors`."""
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def room_of(name: str) -> str:
    return FACE if name in {"__init__", ""} else name.partition(".")[0]


NAMES = {name_of(file) for file in FILES} | {"tensors._kernels", "disk._mapping"}


def tree_of(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(file: Path, *, top: bool = False, types: bool = True) -> set[str]:
    """Modules that a file imports; those of the package by their names inside it, like `.lora.merge`.

    `top` leaves out what functions import when they are called; without `types` what only type
    checkers see is left out.
    """
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if (
                isinstance(child, ast.If)
                and "TYPE_CHECKING" in ast.unparse(child.test)
                and not types
            ):
                for statement in child.orelse:
                    walk(statement)
                continue
            if isinstance(child, ast.Import):
                found.update(own(alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file} has a relative import"
                found.update(own(f"{child.module}.{alias.name}") for alias in child.names)
            walk(child)

    walk(tree_of(file))
    return found


def own(name: str) -> str:
    """`.lora.merge` for a module of the package or what is in it, `.` for the package's face."""
    first, _, rest = name.partition(".")
    if first != "streamshard":
        return first
    while rest and rest not in NAMES:
        rest = rest.rpartition(".")[0]
    return f".{rest}"


def arrows(file: Path, **how: bool) -> set[str]:
    """Modules of the package that a file imports."""
    return {name[1:] for name in imports(file, **how) if name.startswith(".")}


def calls(file: Path) -> set[str]:
    return {ast.unparse(n.func) for n in ast.walk(tree_of(file)) if isinstance(n, ast.Call)}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_room_imports_what_is_below(file):
    room = room_of(name_of(file))
    if room in {FACE, "__main__"}:  # the face names what the commands have; the other runs it
        return
    allowed = {room} | (MAY[room] | GROUND if room in MAY else {"errors", "values"})
    wrong = {name for name in arrows(file) if room_of(name) not in allowed}
    assert not wrong, f"{file} imports {sorted(wrong)}; {room} may import {sorted(allowed)}"


def test_every_file_is_in_a_room():
    assert {room_of(name_of(file)) for file in FILES} == {*MAY, *GROUND, FACE, "__main__"}
    assert {"lora.merge", "checkpoint.folder"} <= NAMES


def test_no_circles():
    """Neither by what is imported within functions nor by types alone."""
    left = {name_of(file): arrows(file) for file in FILES if room_of(name_of(file)) != FACE}
    while True:
        imported = set().union(*left.values())
        inner = {name for name, targets in left.items() if targets & set(left) and name in imported}
        if len(inner) == len(left):
            break
        left = {name: targets for name, targets in left.items() if name in inner}
    assert not left, f"imports in a circle, or between circles: {sorted(left)}"


def test_the_reader_of_imports_sees_them():
    merge = Path("commands/merge_lora.py")
    assert {".lora.merge", ".checkpoint.adapter_folder", "typing"} <= imports(merge)
    adapters = Path("checkpoint/adapter_folder.py")
    assert "checkpoint.pickled" in arrows(adapters)
    assert "checkpoint.pickled" not in arrows(adapters, top=True)
    assert "torch" in imports(Path("commands/state_dicts.py"))
    assert "" in arrows(Path("cli/reading_commands.py"))
    assert "checkpoint.shards" in arrows(Path("engine/budget.py"), top=True)
    assert "checkpoint.shards" not in arrows(Path("engine/budget.py"), top=True, types=False)


def test_a_name_says_which_file():
    names = [file.name for file in FILES if file.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("room", MAY)
def test_a_room_has_a_page_and_importing_it_imports_nothing(room):
    page = Path(room, "__init__.py")
    assert len(ast.get_docstring(tree_of(page)).splitlines()) > 3
    assert imports(page) == ({".cli.main", ".cli.upstream"} if room == "cli" else set())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_mathematics_knows_no_files_and_does_not_print(file):
    if room_of(name_of(file)) in PURE:
        # The environment says which kernel is wanted.
        allowed = {"os"} if file == Path("tensors/kernel.py") else set()
        assert not imports(file) & (FILE_MODULES - allowed)
        assert not {"open", "print"} & calls(file)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_heavy_at_the_top(file):
    found = imports(file, top=True, types=False)
    assert not found & HEAVY
    if room_of(name_of(file)) in {"cli", FACE, "__main__", *GROUND}:
        assert "numpy" not in found
    assert ".tensors._kernels" not in imports(file) or file == Path("tensors/kernel.py")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_command_line_prints(file):
    if room_of(name_of(file)) not in {"cli", "__main__"}:
        made = calls(file)
        assert not {call for call in made if call in {"print", "click.echo"} or "stdout" in call}
        assert "click" not in imports(file)


# --- tests ----------------------------------------------------------------------------------------

TESTS = Path(__file__).parent
TEST_FILES = sorted(path.relative_to(TESTS) for path in TESTS.glob("**/*.py"))


@pytest.mark.parametrize("file", TEST_FILES, ids=str)
def test_no_test_file_imports_another(file):
    """What several need is in `support`, and is no test itself."""
    found = {name.partition(".")[0] for name in imports(TESTS / file)}
    assert not {name for name in found if name.startswith(("test_", "tests", "conftest"))}
    if file.parts[0] == "support":
        tree = tree_of(TESTS / file)
        assert not [n for n in ast.walk(tree) if str(getattr(n, "name", "")).startswith("test_")]


def test_tests_are_in_the_rooms_they_test():
    folders = {file.parts[0] for file in TEST_FILES if len(file.parts) > 1}
    assert folders == {*MAY, "reliability", "support"}
    names = [file.name for file in TEST_FILES if file.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


# --- the page -------------------------------------------------------------------------------------

PAGE = (TESTS.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_page_names_files_that_are_there():
    """In backquotes; those of the package by their paths inside it."""
    named = set(re.findall(r"`([\w./-]+(?:/|\.(?:py|c|pyi|md)))`", PAGE))
    assert len(named) > 30
    places = (TESTS.parent, PACKAGE)
    assert not {name for name in named if not any((place / name).exists() for place in places)}


def test_the_page_shows_the_rules():
    """Its table has the rooms that may be imported, in the order of the house."""
    told: dict[str, set[str]] = {}
    for room, allowed in re.findall(r"^\| `(\w+)` \| .*? \| (.+?) \|$", PAGE, re.MULTILINE):
        told[room] = {*told} if allowed == "all above" else set(re.findall(r"`(\w+)`", allowed))
    assert told == MAY | {"cli": set()}
    assert [*told] == [*MAY]


def test_the_page_is_short():
    lines = PAGE.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 105


# --- what is loaded in the end --------------------------------------------------------------------

LOADED = "import json, sys; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{LOADED}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_is_light():
    loaded = loaded_after("import streamshard; streamshard.__version__; dir(streamshard)")
    assert not loaded & {*HEAVY, "numpy", "click", "tqdm", "psutil"}


def test_the_public_names_are_there():
    loaded = loaded_after(
        "from streamshard import *; import streamshard as s; [getattr(s, n) for n in s.__all__]"
    )
    assert not loaded & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("arguments", [["--help"], ["merge-lora", "--help"], ["diff", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["streamshard", *{arguments}]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
"""
    loaded = loaded_after(code)
    assert not loaded & {*HEAVY, "numpy", "tqdm", "psutil"}


def test_inspecting_imports_little(pair):
    """What starts in a third of a second: nothing of networks, processes, progress and digests."""
    code = f"""
import sys
sys.argv = ["streamshard", "inspect", {str(pair.base)!r}, "--json"]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
"""
    heavy = {"torch", "transformers", "peft", "huggingface_hub", "tqdm", "psutil", "threadpoolctl"}
    slow = {"asyncio", "concurrent", "email", "hashlib", "http", "multiprocessing", "socket", "ssl"}
    assert not loaded_after(code) & (heavy | slow)


def test_a_run_without_a_terminal_imports_no_progress_bar_and_no_hashlib(pair):
    """Both cost megabytes."""
    code = f"""
import sys
sys.argv = ["streamshard", "merge-lora", "--adapter", {str(pair.adapter)!r}, "--base",
            {str(pair.base)!r}, "--output", {str(pair.output)!r}]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
"""
    loaded = loaded_after(code)
    assert (pair.output / "streamshard.json").exists()
    assert not loaded & {"tqdm", "hashlib"}


@pytest.mark.parametrize("more", [{}, {"max_shard_size": "5KB"}, {"dtype": "fp32"}], ids=str)
def test_a_merge_of_safetensors_imports_no_torch(more, pair):
    code = f"""
import streamshard
report = streamshard.merge_lora(
    base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}, **{more}
)
assert report["merged"] == 2
"""
    loaded = loaded_after(code)
    assert not loaded & {"torch", "transformers", "peft"}
    assert "numpy" in loaded
    assert (pair.output / "streamshard.json").exists()


def test_nor_does_a_pickled_adapter(pair):
    import reference

    content = reference.load_file(pair.adapter / "adapter_model.safetensors")
    reference.torch.save(content, pair.adapter / "adapter_model.bin")
    (pair.adapter / "adapter_model.safetensors").unlink()
    code = f"""
import streamshard
streamshard.merge_lora(
    base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}
)
"""
    assert "torch" not in loaded_after(code)
    assert (pair.output / "streamshard.json").exists()


def test_an_import_of_torch_would_be_seen():
    """So that the tests above can fail."""
    assert "torch" in loaded_after("import torch")


def test_S6_warnings_are_noted_where_they_arise():
    """No value of a command carries them, so that none is left that nobody joins to a report."""
    for file in FILES:
        if room_of(name_of(file)) != "commands":
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef):
                fields = {ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)}
                assert "warnings" not in fields, f"{file}: {node.name} carries warnings"
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert "warnings" not in keys, f"{file}:{node.lineno} lists warnings by hand"
