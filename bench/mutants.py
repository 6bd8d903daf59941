"""Break one line at a time, and see whether a test notices.

    python bench/mutants.py

Each mutant of the table in `mutations.py` is one change of the code that must not go unnoticed. It
is made in a copy of the tree, never in the tree itself, where the tests run that should fail; one in C
is compiled there. Prints a line for each mutant and ends with 1 if a mutant survives, if it no longer
applies because its text is gone or is there twice, or if its tests are gone or fail anyway. Mutants
and tests are found by their text and names, so that modules may move.

Where tests depend on each other, running them in random order shows it:

    pip install pytest-randomly; pytest -p randomly
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mutations import MUTANTS, Mutant

__all__ = ["NotApplicableError", "apply", "find_tests", "main"]

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    *("streamshard", "tests", "tools", "bench", "pyproject.toml"),
    *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"),
)
SECONDS = 900.0
PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that it could not run


class NotApplicableError(Exception):
    """The table does not fit the code or the tests any more."""


def copy_tree(place: Path) -> None:
    """Copy what tests need, and the compiled kernel wherever it is installed."""
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=skip)
        else:
            shutil.copyfile(ROOT / name, place / name)
    source = find_source(place, "PyInit__kernels")
    if not list(source.parent.glob("_kernels*.so")):
        kernel = ".".join(source.relative_to(place).with_suffix("").parts)
        found = importlib.util.find_spec(kernel)
        if found is not None and found.origin is not None:
            shutil.copy(found.origin, source.parent)


def find_source(tree: Path, text: str) -> Path:
    """The only file of the package that has this text, and has it once."""
    sources = [
        p for p in sorted((tree / "streamshard").rglob("*")) if p.suffix in {".py", ".c", ".h"}
    ]
    found = [path for path in sources for _ in range(path.read_text("utf-8").count(text))]
    if len(found) != 1:
        places = ", ".join(path.name for path in found)
        raise NotApplicableError(f"its text is there {len(found)} times, not once ({places})")
    return found[0]


def find_tests(tree: Path, names: Iterable[str]) -> list[str]:
    """What to hand to pytest for names of tests, or of files of tests without `.py`."""
    files = sorted((tree / "tests").rglob("test_*.py"))
    found = []
    for name in names:
        defines = re.compile(rf"^ *def {re.escape(name)}\(", re.MULTILINE)
        places = [str(path.relative_to(tree)) for path in files if path.stem == name] or [
            f"{path.relative_to(tree)}::{name}"
            for path in files
            if defines.search(path.read_text("utf-8"))
        ]
        if not places:
            raise NotApplicableError(f"there is no test {name}")
        found += places
    return found


def apply(mutant: Mutant, tree: Path) -> Path:
    """Make the change in a tree; returns the file."""
    path = find_source(tree, mutant.old)
    path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
    if path.suffix != ".py":
        compile_kernel(path.with_name("_kernels.c"))
    return path


def compile_kernel(source: Path) -> None:
    """Build the extension module beside its source, as setuptools does."""
    for old in source.parent.glob("_kernels*.so"):
        old.unlink()
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    include = f"-I{sysconfig.get_paths()['include']}"
    target = source.with_name(f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}")
    options = ["-O3", "-ffp-contract=off", "-shared", "-fPIC", include]
    command = [*compiler, *options, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotApplicableError(f"it does not compile: {done.stderr.strip()}")


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """The exit code of pytest, or None if it takes too long, and the end of what it said."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header"]
    command = [sys.executable, "-B", "-m", "pytest", *options, "--tb=line"]
    command += ["--basetemp", str(tree.parent / f"{tree.name}-temporary"), *tests]
    # A path before all others: that of an editable install comes after it.
    environment = {**os_environment(), "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def os_environment() -> dict[str, str]:
    """The environment, without options for pytest."""
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}


def outcome(mutant: Mutant, folder: Path, seconds: float) -> tuple[bool, str]:
    """Whether a mutant is noticed (or has a reason why not), and what to print."""
    tree = folder / re.sub(r"\W+", "-", mutant.name)
    started = time.perf_counter()
    try:
        copy_tree(tree)
        file = apply(mutant, tree)
        code, said = run_tests(tree, find_tests(tree, mutant.tests), seconds)
    except NotApplicableError as error:
        return False, f"does not apply: {mutant.name}: {error}"
    finally:
        for left in (tree, Path(f"{tree}-temporary")):
            shutil.rmtree(left, ignore_errors=True)
    where = f"{mutant.name} ({file.name}, {time.perf_counter() - started:.0f} s)"
    if code == FAILED:
        failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", said, re.MULTILINE)
        name = failed[1] if failed else "a test"
        return not mutant.reason, f"noticed: {where} by {name}{surprise(mutant)}"
    if code is None:
        return not mutant.reason, f"noticed: {where} by a hang{surprise(mutant)}"
    if code == PASSED:
        if mutant.reason:
            return True, f"survives: {where}, as {mutant.reason}"
        return False, f"SURVIVES: {where}: {mutant.breaks}"
    return False, f"does not run: {where}: {said[-500:]}"


def surprise(mutant: Mutant) -> str:
    """What to add if a mutant is noticed that was said to be harmless."""
    return ", though the table gives a reason why not: remove that" if mutant.reason else ""


def sound(mutants: Sequence[Mutant], folder: Path, seconds: float) -> str:
    """What is wrong with the tests without any mutant; empty if all of them pass."""
    tree = folder / "unchanged"
    copy_tree(tree)
    names = dict.fromkeys(name for mutant in mutants for name in mutant.tests)
    tests: list[str] = []
    for name in names:
        try:
            tests += find_tests(tree, [name])
        except NotApplicableError:
            continue  # told with the mutant
    code, said = run_tests(tree, tests, seconds * 4) if tests else (PASSED, "")
    shutil.rmtree(tree)
    return "" if code == PASSED else f"without any mutant tests fail:\n{said[-2000:]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="those with this in the name"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="until a run counts as hung")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args(arguments)
    wanted = options.only or [""]
    mutants = [one for one in MUTANTS if any(part in one.name for part in wanted)]
    if not mutants:
        sys.exit(f"no mutant is called {' or '.join(wanted)}")
    if options.list:
        sys.exit(listing(mutants))
    with tempfile.TemporaryDirectory(prefix="streamshard-mutants-", dir=options.folder) as made:
        folder = Path(made)
        problem = sound(mutants, folder, options.seconds)
        if problem:
            sys.exit(problem)
        bad = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            one = partial(outcome, folder=folder, seconds=options.seconds)
            for good, text in pool.map(one, mutants):
                print(text, flush=True)
                bad += not good
    print(f"{len(mutants) - bad} of {len(mutants)} mutants are noticed or have a reason")
    sys.exit(bool(bad))


def listing(mutants: Iterable[Mutant]) -> int:
    """Print the mutants, each with its file; returns 1 if one does not apply any more."""
    bad = 0
    for mutant in mutants:
        try:
            where = find_source(ROOT, mutant.old).name
            find_tests(ROOT, mutant.tests)
        except NotApplicableError as error:
            where, bad = f"DOES NOT APPLY: {error}", 1
        print(f"{mutant.name} ({where}): {mutant.breaks}")
    return bad


if __name__ == "__main__":
    main()
