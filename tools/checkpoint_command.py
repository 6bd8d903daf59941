"""The command line of `make_checkpoint`: what was asked for, written, with progress, and told."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from make_checkpoint import DTYPES, TARGETS, Written, write_adapter, write_checkpoint
from presets import LAYOUTS, PRESETS, SPELLINGS, tensor_shapes

from streamshard.cli import main
from streamshard.cli.command import CONTEXT, INPUTS, RUNNING, Command, option
from streamshard.cli.progress import Progress
from streamshard.errors import OutputError, StreamshardError, UsageError, WriteError, bytes_text

__all__ = ["run"]

DEMO, CHECKPOINT, ADAPTER = "Demo", "Checkpoint", "Adapter"
CODES = ("0", "2", "5", "6", "130", "143")
HELP = """Write synthetic InternVL checkpoints and LoRA adapters with true names, shapes and configs.

Nothing is downloaded and nothing large is held in memory: values are keyed slices of one random block,
streamed to disk. A tensor's bytes depend on its name, the seed and the dtype, not on the sharding.
Remote code (*.py) and vocabulary are placeholders: nothing that was trained is in them.

\b
Examples:
  {0} --demo try
  {0} --list
  {0} --preset tiny --layout hf --output tiny-hf
  {0} --preset InternVL3-8B --layout custom \\
      --output base --adapter lora
  {0} --preset tiny --layout hf --tied \\
      --output tied --max-shard-size 100KB \\
      --adapter tied-lora --adapter-targets all
"""


def run() -> None:
    """Run the command line, and exit with the code of what happened."""
    called = Path(sys.argv[0])
    name = f"python tools/{called.name}" if called.suffix == ".py" else called.name
    command = click.command(
        cls=Command, codes=CODES, help=HELP.format(name), context_settings=CONTEXT
    )
    main(command(_with_options(_write)))


def _choice(group: str, name: str, values: Any, default: str | None, text: str) -> Any:
    kind = click.Choice(list(values), case_sensitive=False)
    how = {"type": kind, "metavar": "|".join(values), "default": default, "help": text}
    return option(group, name, show_default=default is not None, **how)


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        option(DEMO, "--demo", type=Path, metavar="FOLDER",
               help="Write base, base-hf, lora and trained into this folder: one model in both "
               "layouts, an adapter, a training checkpoint (of the preset tiny, or of --preset)."),
        option(INPUTS, "--list", "listing", is_flag=True, help="List all presets with their sizes."),
        option(INPUTS, "--preset", metavar="NAME", help="tiny, InternVL3-8B, ...; --list has all."),
        _choice(INPUTS, "--layout", LAYOUTS, None,
                "custom: InternVLChatModel; hf: transformers' own class."),
        option(INPUTS, "--seed", type=int, metavar="NUMBER", default=0, show_default=True,
               help="Other values of the same model."),
        option(CHECKPOINT, "-o", "--output", type=Path, metavar="FOLDER",
               help="Write a checkpoint into this new folder."),
        option(CHECKPOINT, "--max-shard-size", metavar="SIZE", default="5GB", show_default=True,
               help="Decimal units."),
        _choice(CHECKPOINT, "--dtype", DTYPES, "bf16", "Of all tensors."),
        option(CHECKPOINT, "--tied", is_flag=True, help="Only hf: no head, tie_word_embeddings true."),
        _choice(CHECKPOINT, "--spelling", SPELLINGS, "flat", "Only hf: names."),
        option(ADAPTER, "--adapter", type=Path, metavar="FOLDER",
               help="Write a PEFT adapter into this new folder."),
        option(ADAPTER, "--adapter-r", type=int, metavar="RANK", default=16, show_default=True,
               help="Its rank."),
        option(ADAPTER, "--adapter-alpha", type=float, metavar="ALPHA", default=32,
               show_default=True, help="Its alpha."),
        _choice(ADAPTER, "--adapter-targets", TARGETS, "llm", "Modules that have pairs."),
        _choice(ADAPTER, "--adapter-dtype", DTYPES, "fp32", "PEFT writes fp32."),
        option(ADAPTER, "--rslora", is_flag=True, help="Scale by alpha/sqrt(r), not alpha/r."),
        option(ADAPTER, "--bin", "as_bin", type=click.Choice(["yes", "no"]), metavar="yes|no",
               is_flag=False, flag_value="yes", default="no", show_default=True,
               help="Write adapter_model.bin, which needs torch."),
        option(RUNNING, "-q", "--quiet", is_flag=True, help="No progress and no report."),
    )  # fmt: skip
    for one in reversed(options):
        function = one(function)
    return function


def _write(*, listing: bool, demo: Path | None, quiet: bool, **asked: Any) -> None:
    if listing:
        print(_presets())
        return
    show = (lambda _: None) if quiet else print
    with contextlib.closing(Progress({}, quiet=quiet)) as progress, _told_as_ours():
        if demo is not None:
            from demo import write_demo

            made = write_demo(demo, asked["preset"] or "tiny", asked["seed"], **_telling(progress))
            progress.close()
            show("\n".join(f"{demo / name}: {what}" for name, what in made.items()))
            return
        given = {
            "--preset": asked["preset"],
            "--layout": asked["layout"],
            "--output or --adapter (or both)": asked["output"] or asked["adapter"],
        }
        lacking = [name for name, value in given.items() if not value]
        if lacking:
            verb = "is" if len(lacking) == 1 else "are"
            raise UsageError(
                f"{' and '.join(lacking)} {verb} missing; or --demo FOLDER, which needs no more."
            )
        if asked["output"]:
            show(_timed(asked["output"], progress, lambda: _checkpoint(progress, **asked)))
        if asked["adapter"]:
            show(_timed(asked["adapter"], progress, lambda: _adapter(progress, **asked)))


def _checkpoint(progress: Progress, **asked: Any) -> Written:
    names = ("layout", "seed", "dtype", "max_shard_size", "tied", "spelling")
    same = {name: asked[name] for name in names}
    return write_checkpoint(asked["output"], asked["preset"], **same, **_telling(progress))


def _adapter(progress: Progress, **asked: Any) -> Written:
    alpha = asked["adapter_alpha"]
    return write_adapter(
        asked["adapter"],
        asked["preset"],
        layout=asked["layout"],
        r=asked["adapter_r"],
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        targets=asked["adapter_targets"],
        dtype=asked["adapter_dtype"],
        seed=asked["seed"],
        use_rslora=asked["rslora"],
        base_model_name=str(asked["output"] or asked["preset"]),
        bin=asked["as_bin"] == "yes",
        **_telling(progress),
    )


def _telling(progress: Progress) -> dict[str, Any]:
    return {
        "on_total": lambda nbytes: progress.step("writing", nbytes),
        "progress": progress.piece,
    }


def _timed(folder: Path, progress: Progress, write: Callable[[], Written]) -> str:
    started = time.perf_counter()
    written = write()
    seconds = time.perf_counter() - started
    progress.close()
    files = f"{len(written.files)} file{'s' * (len(written.files) != 1)}"
    return (
        f"{folder}: {written.tensors} tensors, {written.parameters:,} parameters, "
        f"{bytes_text(written.nbytes)} in {files}, {seconds:.1f} s"
    )


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    """Have mistakes told, with exit codes, as the other commands have them."""
    try:
        yield
    except StreamshardError:  # a UsageError is a ValueError, too
        raise
    except FileExistsError as error:
        raise OutputError(str(error)) from error
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    except OSError as error:
        raise WriteError(f"{error.filename}: cannot be written: {error.strerror}.") from error


def _presets() -> str:
    lines = []
    for name, preset in PRESETS.items():
        parameters = sum(map(math.prod, tensor_shapes(preset, "custom").values()))
        lines.append(f"{name:36}{_count(parameters):>9}  {preset.arch}")
    return "\n".join(lines)


def _count(parameters: int) -> str:
    """A number of parameters as models are called by it.

    >>> _count(200_000), _count(938_158_000), _count(78_400_000_000)
    ('200K', '938M', '78.4B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return f"{parameters / 1000:.3g}K"
