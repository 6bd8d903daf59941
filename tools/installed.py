"""The scripts beside this file as commands that are installed, in the package `streamshard_tools`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

__all__ = ["custom2hf", "demo", "hf2custom", "make_checkpoint", "merge_lora"]

_HERE = Path(__file__).parent


def make_checkpoint() -> None:
    """Run `make_checkpoint.py`."""
    _run("make_checkpoint")


def demo(folder: str | Path) -> None:
    """Write small models to try everything on, as `streamshard-make-checkpoint --demo FOLDER` does.

    What is there from an earlier time stays.
    """
    if not (Path(folder) / "base").exists():
        line = [sys.executable, str(_HERE / "make_checkpoint.py"), "--demo", str(folder)]
        subprocess.run(line, check=True)


def merge_lora() -> None:
    """Run `merge_lora.py`."""
    _run("merge_lora")


def hf2custom() -> None:
    """Run `internvl_hf2custom.py`."""
    _run("internvl_hf2custom")


def custom2hf() -> None:
    """Run `internvl_custom2hf.py`."""
    _run("internvl_custom2hf")


def _run(name: str) -> None:
    """Run a script under the name that was typed: it finds those beside it by their plain names."""
    sys.path.insert(0, str(_HERE))
    importlib.import_module(name).main()
