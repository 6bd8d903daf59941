"""Fixtures: the command line in this process, and a small base with an adapter that fits it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hangs import HANGS
from hypothesis import HealthCheck, settings
from pairs import Outcome, Pair, new_pair

# No test asks the hub; those that ask one of their own say so to the processes that they start.
os.environ["HF_HUB_OFFLINE"] = "1"
# A hub of our own always answers, but the machine may be busy.
os.environ["HF_HUB_ETAG_TIMEOUT"] = os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = str(HANGS)
# Thousands of processes are started: each would compile some 180 modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Examples take milliseconds, but the machine may be busy.
settings.register_profile(
    "streamshard",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("streamshard")


@pytest.fixture(autouse=True)
def _fixed_rounding_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command line sets these for its process; here they must not outlive the test.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run `streamshard` with the given arguments, as a user would, without a new process."""
    from streamshard.cli import main

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["streamshard", *map(str, arguments)])
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {name: signal.getsignal(name) for name in names}
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
            # Warnings must stay errors in the tests that follow.
            logging.captureWarnings(capture=False)
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def work() -> Iterator[Any]:
    """A worker's buffers and files."""
    from streamshard.disk.files import Files
    from streamshard.tensors.workspace import Workspace

    with contextlib.closing(Files()) as files:
        yield Workspace(files)


@pytest.fixture
def nbytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of files was asked for at a time, by reading or in memory: no matter of load."""
    from streamshard.disk.system import system

    asked: list[int] = []
    read, populate = system.pread, system.populate

    def reading(descriptor: int, out: memoryview, offset: int) -> int:
        asked.append(len(out))
        return read(descriptor, out, offset)

    def mapping(descriptor: int, mapped: Any, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        populate(descriptor, mapped, offset, nbytes)

    monkeypatch.setattr(system, "pread", reading)
    monkeypatch.setattr(system, "populate", mapping)
    return asked


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base of two shards with two adapted weights, bf16, and a plain fp32 adapter of rank 4."""
    return new_pair(tmp_path)


@pytest.fixture
def refused(cli: Callable[..., Outcome], pair: Pair) -> Callable[..., str]:
    """Run a command that must fail and leave every file as it is; returns what it said."""
    import reference

    def run(code: int, *expected: str, command: list[str] | None = None, more: Any = ()) -> str:
        before = reference.digests(pair.root)
        outcome = cli(*(pair.command if command is None else command), *more)
        assert outcome.code == code, outcome.err
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        # What is expected must not be found in the name of a temporary folder.
        said = outcome.err.replace(str(pair.root), "")
        for fragment in expected:
            assert fragment in (outcome.err if str(pair.root) in fragment else said)
        assert reference.digests(pair.root) == before
        return outcome.err

    return run


# --- a push: models here, a hub, and the folder that it runs in ------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, an adapter, and what a merge of them on this machine writes."""
    from pushes import new_shop

    return new_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """A hub of our own, empty."""
    from fake_hub import Hub

    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder in which `push` runs."""
    return tmp_path / "here"


@pytest.fixture
def push(shop: Any, hub: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Merge and push, in this process."""
    from pushes import pushing

    with pushing(shop, hub, place, monkeypatch) as push:
        yield push


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def push_by_both(
    request: pytest.FixtureRequest,
    shop: Any,
    hub: Any,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """The same by either transport of the client."""
    from pushes import pushing

    with pushing(shop, hub, place, monkeypatch, xet=request.param) as push:
        yield push
