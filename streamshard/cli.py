"""The command line: parses, calls one public function, prints its report. Nothing else prints.

Results go to stdout, progress and messages to stderr; `--json` prints one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from streamshard import __version__
from streamshard.errors import StreamshardError

if TYPE_CHECKING:
    from tqdm import tqdm

    from streamshard.run import Plan

__all__ = ["main"]

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    # Upstream's scripts spell --hf_path; both are understood everywhere.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class _Terminated(BaseException):
    """SIGTERM arrived."""


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="streamshard")
def cli() -> None:
    """Merge LoRA adapters into InternVL checkpoints, tensor by tensor.

    Works on a CPU-only machine in some tens of MB of memory, whatever the model's size, and
    refuses what it cannot do exactly.

    \b
    Example:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --output ./merged
    """


def _output_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all writing commands share."""
    options = [
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            help="Split the output anew, like 5GB or 500MB.  [default: files as in the source]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["keep", "bf16", "fp16", "fp32"]),
            default="keep",
            show_default=True,
            help="Round every float tensor to this dtype, once.",
        ),
        click.option(
            "--workers", type=click.IntRange(min=1), help="Threads.  [default: one a processor]"
        ),
        click.option(
            "--max-memory", metavar="SIZE", help="Use fewer threads to stay below this, like 512MB."
        ),
        click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
        click.option(
            "--dry-run", is_flag=True, help="Check everything, show the plan, write nothing."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no messages but errors."),
        click.option("-v", "--verbose", is_flag=True, help="Log details; tracebacks of errors."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("merge-lora", short_help="Fold PEFT LoRA adapters into a base checkpoint.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="FOLDER",
    help="PEFT adapter folder. Give it again to sum several adapters.",
)
@click.option(
    "--base", required=True, metavar="PATH", help="Checkpoint folder or .safetensors file."
)
@click.option(
    "--output", metavar="FOLDER", help="New folder to write.  [default: ./<base name>-merged]"
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    metavar="W",
    help="Factor on an adapter's update, once per --adapter.  [default: 1]",
)
@_output_options
def merge_lora(
    adapters: tuple[str, ...],
    base: str,
    output: str | None,
    weights: tuple[float, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Fold PEFT LoRA adapters into a base checkpoint.

    The output is a complete folder: merged weights, config, tokenizer and every other file of
    the base. A merged element is W + s*B*A accumulated in fp32 and rounded once; everything else is
    copied byte for byte. Each tensor of the adapter must find its weight, or nothing is written.

    \b
    Examples:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --output ./merged
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --dry-run
      streamshard merge-lora --adapter ./a --weight 0.7 --adapter ./b --weight 0.3 \\
          --base ./InternVL3-8B --output ./merged --max-shard-size 2GB
    """
    _log_to_stderr(verbose=verbose)
    _one_blas_thread()
    from streamshard import commands

    screen = _Screen(as_json=as_json, quiet=quiet)
    with contextlib.closing(screen):
        report = commands.merge_lora(
            base=base,
            adapter=list(adapters),
            output=output,
            weight=list(weights),
            on_plan=screen.plan,
            progress=screen.progress,
            **options,
        )
    screen.result(report)


class _Screen:
    """Where progress, messages and results go."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def plan(self, plan: Plan) -> None:
        """Begin the progress bar."""
        if self._quiet:
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=sum(t.nbytes for shard in plan.shards for t in shard.tensors.values()),
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.2,
            file=sys.stderr,
            # A log file gets no bar; a terminal does.
            disable=None,
        )

    def progress(self, nbytes: int, name: str) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix({"tensor": name[-40:]}, refresh=False)
            self._bar.update(nbytes)

    def result(self, report: dict[str, Any]) -> None:
        """Print the report."""
        if self._as_json:
            click.echo(json.dumps(report))
            return
        for warning in report["warnings"]:
            click.echo(f"warning: {warning}", err=True)
        if not self._quiet:
            click.echo(_plan_text(report) if report["dry_run"] else _result_text(report))


def _plan_text(report: dict[str, Any]) -> str:
    plan = report["plan"]
    files = [f"  {file['name']}  {_bytes(file['bytes'])}" for file in plan["files"]]
    return "\n".join(
        [
            f"Would write {report['output']} ({_bytes(report['bytes'])}; "
            f"{_bytes(plan['free_bytes'])} free on that disk):",
            *files[:20],
            *([f"  and {len(files) - 20} more files"] if len(files) > 20 else []),
            f"{report['merged']} of {report['tensors']} tensors get an update, the others are "
            f"copied; {plan['workers']} threads, about {_bytes(plan['memory_bytes'])} of memory.",
            "Nothing was written.",
        ]
    )


def _result_text(report: dict[str, Any]) -> str:
    l2 = report["l2"]
    return "\n".join(
        [
            f"Merged {report['merged']} of {report['tensors']} tensors into {report['output']}",
            f"  {_bytes(report['bytes'])} in {report['shards']} files, {report['seconds']:.1f} s, "
            f"{_bytes(report['bytes'] / report['seconds'])}/s, peak memory "
            f"{_bytes(report['peak_rss_bytes'])}",
            f"  L2 from the base: {l2['global']:.6g} (sum over tensors {l2['sum']:.6g}, "
            f"per parameter {l2['per_parameter']:.6g})",
        ]
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(capture=True)


def _one_blas_thread() -> None:
    # Read when numpy is first imported; saves the memory that each BLAS thread would reserve.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _on_terminate(_signum: int, _frame: FrameType | None) -> None:
    raise _Terminated


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    verbose = {"-v", "--verbose"} & set(sys.argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_terminate)
    try:
        cli.main(prog_name="streamshard", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted: nothing was written. Run the same command again.", err=True)
        sys.exit(130)
    except _Terminated:
        click.echo("Terminated: nothing was written. Run the same command again.", err=True)
        sys.exit(143)
    except StreamshardError as error:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
