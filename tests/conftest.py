"""Fixtures: the command line in this process, and a small base with an adapter that fits it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Examples take milliseconds, but the machine may be busy.
settings.register_profile(
    "streamshard",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("streamshard")


def heed_interrupts() -> None:
    """In a new process: SIGINT counts, also if these tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


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


@dataclass(frozen=True)
class Pair:
    """A base and an adapter that fits it, in a folder of their own."""

    root: Path
    base: Path
    adapter: Path

    @property
    def output(self) -> Path:
        """Where a merge of the two shall go; nothing is there yet, but the folder around it is."""
        return self.root / "out" / "merged"

    @property
    def command(self) -> list[str]:
        """The arguments that merge the two."""
        paths = {"--base": self.base, "--adapter": self.adapter, "--output": self.output}
        return ["merge-lora", *(str(part) for item in paths.items() for part in item)]


def record_of(*names: str) -> bytes:
    """The record of an output that has these files."""
    from streamshard.format import json_pieces
    from streamshard.record import sealed

    return b"".join(sealed(json_pieces({"digests": {"files": {name: {} for name in names}}})))


LAYER = "language_model.model.layers.0.self_attn"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base of two shards with two adapted weights, bf16, and a plain fp32 adapter of rank 4."""
    return new_pair(tmp_path)


def new_pair(root: Path) -> Pair:
    """The like in any folder."""
    import reference

    (root / "out").mkdir()
    base = reference.save_checkpoint(
        root / "base",
        {
            f"{LAYER}.q_proj.weight": reference.normal((96, 40), 0.02, seed=1, dtype="BF16"),
            "vision_model.embeddings.class_embedding": reference.normal((1, 1, 8), 1, seed=2),
        },
        {
            f"{LAYER}.k_proj.weight": reference.normal((130, 40), 0.02, seed=3, dtype="BF16"),
            "language_model.model.norm.weight": reference.normal((40,), 1, seed=4, dtype="BF16"),
        },
    )
    (base / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    adapter = reference.save_adapter(
        root / "adapter",
        {
            f"base_model.model.{LAYER}.q_proj.lora_A.weight": reference.normal((4, 40), 1, seed=5),
            f"base_model.model.{LAYER}.q_proj.lora_B.weight": reference.normal(
                (96, 4), 0.02, seed=6
            ),
            f"base_model.model.{LAYER}.k_proj.lora_A.weight": reference.normal((4, 40), 1, seed=7),
            f"base_model.model.{LAYER}.k_proj.lora_B.weight": reference.normal(
                (130, 4), 0.02, seed=8
            ),
        },
        r=4,
        lora_alpha=8,
    )
    return Pair(root, base, adapter)


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
