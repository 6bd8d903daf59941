"""Packages that may be missing: what each is for, and the command that installs it.

What not everybody needs is an extra of this package; what everybody needs can still be missing where it
was installed without its dependencies. Both are told in one way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from streamshard.errors import UsageError

__all__ = ["EXTRAS", "NEEDED", "explained", "install", "needed_for"]


EXTRAS = {
    "torch": "converting files of torch before 1.6",
    "peft": "wrapping live models",
    "matplotlib": "drawing pictures",
    "distributed": "--scheduler",
}
"""The packages of extras, and what each is for."""
_SINCE = {
    "torch": "torch>=2.10",
    "peft": "peft>=0.10",
    "matplotlib": "matplotlib>=3.8",
    "distributed": "distributed>=2024.8",
}
"""Which releases of them will do, as `pyproject.toml` has it."""
_ALWAYS = {
    **dict.fromkeys(("click", "huggingface_hub", "numpy", "psutil", "safetensors"), ""),
    **dict.fromkeys(("tqdm", "xxhash"), ""),
    "yaml": "pyyaml",
}
"""What everybody needs, by the names of modules, and packages that are called otherwise."""
NEEDED = tuple(package or module for module, package in _ALWAYS.items())
"""The packages that everybody needs."""
_CPU = (
    " On a machine without a GPU install torch's CPU build first, as its install page shows: the usual "
    "build brings gigabytes of CUDA."
)


def install(package: str) -> str:
    """The command that installs a package, which does not depend on where this one is from.

    >>> install("matplotlib"), install("numpy")
    ("pip install 'matplotlib>=3.8'", 'pip install numpy')
    """
    return f"pip install '{_SINCE[package]}'" if package in _SINCE else f"pip install {package}"


@contextlib.contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Import in this block what `purpose` needs; a missing package is a `UsageError` that says how."""
    try:
        yield
    except ImportError as error:
        found = explained(error, purpose)
        if found is None:
            raise
        raise found from error


def explained(error: ImportError, purpose: str = "") -> UsageError | None:
    """The error of a package that is missing or cannot be imported; None if it is none of ours.

    >>> print(explained(ModuleNotFoundError(name="peft"), "this"))
    this needs peft, which is not installed: pip install 'peft>=0.10'
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS and package not in _ALWAYS:
        return None
    what = purpose or EXTRAS.get(package, "streamshard")
    package = _ALWAYS.get(package) or package
    problem = "which is not installed"
    if not isinstance(error, ModuleNotFoundError):
        problem = f"which cannot be imported ({error})"
    advice = _CPU if package == "torch" else ""
    end = "." if advice else ""
    return UsageError(f"{what} needs {package}, {problem}: {install(package)}{end}{advice}")
