"""The sdist and the wheel hold all of the package: built, installed away from here, and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from adapters import weights_of
from marks import slow
from pairs import new_pair

import streamshard

pytestmark = slow

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "streamshard"
SOURCES = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
TOOLS = {f"streamshard_tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
COMPILED = ("streamshard/disk/_mapping", "streamshard/tensors/_kernels")
TYPES = {"streamshard/py.typed", *(f"{name}.pyi" for name in COMPILED)}
TYPES |= {"streamshard/engine/record.schema.json"}
C_SOURCES = {*(f"{name}.c" for name in COMPILED), "streamshard/tensors/_tiles.h"}
# Nothing of this repository, and of what is installed here only the dependencies.
ELSEWHERE = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}


def run(*line: object, cwd: Path, **more: str) -> str:
    done = subprocess.run(
        [*map(str, line)],
        cwd=cwd,
        env=ELSEWHERE | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the files that git would have, without what was built here; by the build backend itself."""
    root = tmp_path_factory.mktemp("sdist")
    tree = root / "tree"
    unwanted = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info")
    for name in ("streamshard", "tools", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tree)
    code = "import setuptools.build_meta as b; print(b.build_sdist('../dist'))"
    name = run(sys.executable, "-c", code, cwd=tree).splitlines()[-1]
    return root / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as pip does it where there is no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, "-w", folder, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet")
    target = ("--target", folder / "site")
    run(sys.executable, "-m", "pip", "install", *options, *target, wheel, cwd=folder)
    return folder / "site"


def has_compiler() -> bool:
    import sysconfig

    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(compiler) is not None


def test_the_sdist_has_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *SOURCES,
        *TYPES,
        *C_SOURCES,
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    } <= names


def test_the_sdist_passes_tests_of_its_own(sdist, site, tmp_path):
    """Unpacked, with the compiled parts of its wheel: some files of tests as examples."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for compiled in site.glob("streamshard/*/*.abi3.so"):
        shutil.copy(compiled, tree / compiled.relative_to(site).parent)
    chosen = (
        "tests/checkpoint/test_header.py",
        "tests/cli/test_help.py",
        "tests/test_architecture.py",
    )
    options = ("-p", "no:cacheprovider", "-p", "no:randomly")
    run(sys.executable, "-m", "pytest", *options, *chosen, cwd=tree, PYTHONPATH=str(tree))


def test_the_wheel_has_all_that_runs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        compiled = {name for name in names if name.endswith((".so", ".pyd"))}
        entries = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        script = archive.read(entries).decode()
    assert names - compiled - C_SOURCES == SOURCES | TYPES | TOOLS
    assert len(compiled) == len(COMPILED) * has_compiler()
    # One for all versions of Python from 3.11 on.
    assert "-cp311-abi3-" in wheel.name
    assert all(name.endswith((".abi3.so", ".pyd")) for name in compiled)
    assert "streamshard = streamshard.__main__:main" in script


def test_every_module_imports_from_there(site, tmp_path):
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in SOURCES
    )
    if has_compiler():
        modules += [name.replace("/", ".") for name in COMPILED]
    code = f"""
import importlib, json
found = {{name: importlib.import_module(name).__file__ for name in {modules}}}
print(json.dumps(found))
"""
    said = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    found = json.loads(said)
    assert len(found) == len(modules) > 80
    assert all(Path(file).is_relative_to(site) for file in found.values())


def test_the_command_merges(site, tmp_path):
    """By the script that pip makes of the entry point; the bytes are those that this tree writes."""
    pair = new_pair(tmp_path)
    script = site / "bin" / ("streamshard.exe" if sys.platform == "win32" else "streamshard")
    elsewhere = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    run(script, *pair.command, cwd=tmp_path, **elsewhere)
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=tmp_path / "here")
    assert weights_of(pair.output) == weights_of(tmp_path / "here")
    assert "is right" in run(script, "verify", pair.output, cwd=tmp_path, **elsewhere)
    assert run(script, "--version", cwd=tmp_path, **elsewhere)


def test_the_tools_are_commands(site, tmp_path):
    """A checkpoint and an adapter by the installed command, merged by the installed drop-in's engine."""
    elsewhere = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def tool(name: str, *line: object) -> str:
        return run(site / "bin" / f"streamshard-{name}", *line, cwd=tmp_path, **elsewhere)

    tool("make-checkpoint", "--preset", "tiny", "--layout", "custom", "--output", "custom")
    tool("make-checkpoint", "--preset", "tiny", "--layout", "hf", "--output", "hf")
    said = tool(
        "internvl_hf2custom", "--hf_path", "hf", "--custom_path", "custom", "--save_path", "out"
    )
    assert "Missing keys: []" in said
    assert "Missing keys: []" in tool(
        "internvl_custom2hf", "--custom_path", "out", "--hf_path", "hf", "--save_path", "back"
    )
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "hf")
    assert "INPUT_PATH" in tool("merge_lora", "--help")
