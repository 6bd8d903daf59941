"""Where the examples of the documentation run: folders of the names that they use, a hub of our own.

The folders are the small models of `make_checkpoint`. Programs that are not installed here are stood in
for by scripts that check what they are given.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fake_hub import Hub

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PROGRAMS = {
    "streamshard": "-m streamshard",
    "streamshard-make-checkpoint": f"{ROOT}/tools/make_checkpoint.py",
    "streamshard-merge_lora": f"{ROOT}/tools/merge_lora.py",
    "streamshard-internvl_hf2custom": f"{ROOT}/tools/internvl_hf2custom.py",
    "streamshard-internvl_custom2hf": f"{ROOT}/tools/internvl_custom2hf.py",
    "hf": "-m huggingface_hub.cli.hf",
    "python": "",
}

STAND_INS = {
    # Takes a folder that is whole, as a server would look for it.
    "vllm": """
assert sys.argv[1] == "serve", sys.argv
folder = Path(sys.argv[2])
assert (folder / "config.json").is_file() and [*folder.glob("*.safetensors")], folder
assert [*folder.glob("tokenizer*")], folder
""",
    # Of ours, only extras that there are; nothing is installed.
    "pip": """
import re, tomllib
project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
named = [word for word in sys.argv[1:] if "streamshard" in word or word.startswith(".")]
assert named, sys.argv
for word in named:
    extras = re.search(r"\\[(.*)\\]", word)
    for extra in extras[1].split(",") if extras else []:
        assert extra in project["optional-dependencies"], word
""",
}
STAND_INS["uvx"] = STAND_INS["pipx"] = STAND_INS["pip"]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """All pages of the documentation."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)


def site_hooks() -> ModuleType:
    """What makes the pages whole when the site is built."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_folders(world: Path) -> None:
    """The models that the pages speak of: InternVL3-8B is as small as any other."""
    from demo import write_demo
    from make_checkpoint import write_adapter, write_checkpoint

    write_demo(world, "tiny")
    names = {"base": "InternVL3-8B", "base-hf": "InternVL3-8B-hf", "lora": "my-lora"}
    for old, new in names.items():
        (world / old).rename(world / new)
    (world / "work_dirs").mkdir()
    (world / "trained").rename(world / "work_dirs" / "my-run")
    for seed, adapter, layout in ((1, "other-lora", "custom"), (2, "hf-lora", "hf")):
        write_adapter(world / adapter, "tiny", layout=layout, r=4, seed=seed)
    write_checkpoint(world / "tuned-hf", "tiny", layout="hf", seed=3)


def make_programs(folder: Path) -> None:
    """What the examples call, of this Python and this tree."""
    folder.mkdir()
    for name, arguments in PROGRAMS.items():
        _script(folder / name, f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
    for name, code in STAND_INS.items():
        head = (
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nROOT = Path({str(ROOT)!r})"
        )
        _script(folder / name, f"{head}\n{code}")


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fill_hub(hub: Hub, world: Path) -> None:
    """The repositories that the pages speak of."""
    for name, folder in (
        ("OpenGVLab/InternVL3-8B", "InternVL3-8B"),
        ("OpenGVLab/InternVL3-8B-hf", "InternVL3-8B-hf"),
        ("your-name/my-lora", "my-lora"),
    ):
        hub.add_repo(name, world / folder)


def environment(home: Path, programs: Path, hub: Hub) -> dict[str, str]:
    """Of one page: the programs first, a home of its own, our hub."""
    paths = [str(ROOT), str(ROOT / "tools")]
    return {
        **os.environ,
        **hub.env(home / "hf"),
        "HOME": str(home),
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLBACKEND": "agg",
        "COLUMNS": "100",
    }


def copied(world: Path, place: Path) -> Path:
    """The folders of all pages, for one of them."""
    return Path(shutil.copytree(world, place))


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]
