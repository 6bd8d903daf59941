"""The command line: parses, calls one public function, prints its report. Nothing else prints.

Results go to stdout, progress and messages to stderr; `--json` prints one JSON document.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import click

import streamshard
from streamshard import __version__, texts
from streamshard.console import end, open_streams, say, show, unprinted
from streamshard.errors import StreamshardError, VerificationError, escaped
from streamshard.limits import told

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["main", "run_upstream", "run_upstream_merge"]

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
    """Merge LoRA adapters into InternVL checkpoints and convert them, tensor by tensor.

    Works on a CPU-only machine in some tens of MB of memory, whatever the model's size, and
    refuses what it cannot do exactly.

    \b
    Examples:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --output ./merged
      streamshard hf2custom --hf-path ./tuned-hf --custom-path ./InternVL3-8B --save-path ./tuned
      streamshard inspect ./merged
      streamshard verify ./merged
    """


_Option: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]


def _with_options(command: Callable[..., None], options: Sequence[_Option]) -> Callable[..., None]:
    """A command with options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


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
            "--workers",
            type=click.IntRange(1, 64),
            help="Threads.  [default: one a processor, at most 8]",
        ),
        click.option(
            "--max-memory", metavar="SIZE", help="Use fewer threads to stay below this, like 512MB."
        ),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace an output that exists, and discard what an interrupted run began otherwise.",
        ),
        click.option(
            "--sha256",
            is_flag=True,
            help="Keep the SHA-256 of every file in streamshard.json; files are read once more.",
        ),
        click.option(
            "--dry-run", is_flag=True, help="Check everything, show the plan, write nothing."
        ),
    ]
    return _with_options(_reading_options(command), options)


def _reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that only read, which the others have too."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no messages but errors."),
        click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors."),
    ]
    return _with_options(command, options)


def _conversion_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both conversions."""
    options = [
        click.option("--save-path", required=True, metavar="FOLDER", help="New folder to write."),
        click.option(
            "--tokenizer-from",
            type=click.Choice(["source", "reference"]),
            help="Whose tokenizer belongs to the weights, if the vocabularies differ.",
        ),
        click.option(
            "--allow-missing", is_flag=True, help="Write although tensors are missing; report them."
        ),
        click.option(
            "--allow-unexpected",
            is_flag=True,
            help="Write although the source has tensors with no place; report them.",
        ),
    ]
    return _with_options(_output_options(command), options)


@cli.command("merge-lora", short_help="Fold LoRA adapters into a base checkpoint.")
@click.argument("checkpoint", metavar="[CHECKPOINT]", required=False)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER",
    help="PEFT adapter folder. Give it again to sum several adapters.",
)
@click.option("--base", metavar="PATH", help="Checkpoint folder or .safetensors file.")
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
@click.option(
    "--layout",
    type=click.Choice(["keep", "custom", "hf"]),
    default="keep",
    show_default=True,
    help="Convert in the same pass; needs --reference.",
)
@click.option(
    "--reference",
    metavar="FOLDER",
    help="With --layout: the original model in that layout, for config, code and tokenizer. With "
    "CHECKPOINT: the original model, for remote code that the trainer did not save.",
)
@click.option(
    "--tokenizer-from",
    type=click.Choice(["source", "reference"]),
    help="With --layout: whose tokenizer belongs to the weights, if the vocabularies differ.",
)
@click.option(
    "--alpha",
    "--lora-alpha",
    type=float,
    metavar="A",
    help="With CHECKPOINT: alpha of its pairs.  [default: 2 r, as InternVL's trainer has it]",
)
@click.option("--adapter-name", metavar="NAME", help="Which adapter, if a file holds several.")
@click.option(
    "--base-is-residual",
    is_flag=True,
    help="The base is the residual one that PiSSA, OLoRA, LoftQ, ... left behind.",
)
@click.option(
    "--expert-order",
    type=click.Choice(["peft", "unsloth"]),
    default="peft",
    show_default=True,
    help="How the trainer ordered the factors of fused experts.",
)
@click.option(
    "--allow-merged-base",
    is_flag=True,
    help="Merge although the base seems to hold the adapter already.",
)
@_output_options
def merge_lora(adapters: tuple[str, ...], weights: tuple[float, ...], **options: Any) -> None:
    """Fold LoRA adapters into a base checkpoint.

    Either PEFT adapters into a base (--adapter, --base), or the pairs inside a LoRA-wrapped training
    checkpoint of InternVL (CHECKPOINT: use_llm_lora, use_backbone_lora) into itself.

    The output is a complete folder: merged weights, config, tokenizer and every other file of
    the base. A merged element is W + s*B*A accumulated in fp32 and rounded once; everything else is
    copied byte for byte. Each tensor of the adapter must find its weight, or nothing is written.
    Adapter and base may be in different layouts.

    \b
    Examples:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --output ./merged
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --dry-run
      streamshard merge-lora --adapter ./a --weight 0.7 --adapter ./b --weight 0.3 \\
          --base ./InternVL3-8B --output ./merged --max-shard-size 2GB
      streamshard merge-lora --adapter ./hf-lora --base ./InternVL3-8B-hf --output ./merged \\
          --layout custom --reference ./InternVL3-8B
      streamshard merge-lora ./work_dirs/my-lora-run --output ./merged --reference ./InternVL3-8B
    """
    _write(
        "merge_lora",
        texts.merge_text,
        adapter=list(adapters) or None,
        weight=list(weights),
        **options,
    )


@cli.command("hf2custom", short_help="Convert HF weights to the custom layout.")
@click.option("--hf-path", required=True, metavar="PATH", help="Checkpoint to convert.")
@click.option(
    "--custom-path",
    required=True,
    metavar="FOLDER",
    help="Original model in the custom layout: config, code, tokenizer; weights to compare with.",
)
@_conversion_options
def hf2custom(**options: Any) -> None:
    """Convert HF weights (InternVLForConditionalGeneration) to the custom layout (InternVLChatModel).

    Weights come from --hf-path, in any spelling that transformers ever wrote; everything else from
    --custom-path, which may have no weights. If it has some, the L2 distance from them is
    printed. Missing and unexpected tensors are errors.

    \b
    Example:
      streamshard hf2custom --hf-path ./my-finetune-hf --custom-path ./InternVL3-8B \\
          --save-path ./my-finetune
    """
    _write("hf_to_custom", texts.conversion_text, **options)


@cli.command("custom2hf", short_help="Convert custom weights to the HF layout.")
@click.option("--custom-path", required=True, metavar="PATH", help="Checkpoint to convert.")
@click.option(
    "--hf-path",
    required=True,
    metavar="FOLDER",
    help="Original model in the HF layout: config, tokenizer, processor; weights to compare with.",
)
@_conversion_options
def custom2hf(**options: Any) -> None:
    """Convert custom weights (InternVLChatModel) to the HF layout (InternVLForConditionalGeneration).

    The inverse of hf2custom. Names are those that every version of transformers reads.

    \b
    Example:
      streamshard custom2hf --custom-path ./my-finetune --hf-path ./InternVL3-8B-hf \\
          --save-path ./my-finetune-hf
    """
    _write("custom_to_hf", texts.conversion_text, **options)


@cli.command("wrap-lora", short_help="Put fresh LoRA pairs into a checkpoint.")
@click.option(
    "--base", required=True, metavar="PATH", help="Checkpoint folder or .safetensors file."
)
@click.option("--output", required=True, metavar="FOLDER", help="New folder to write.")
@click.option("--llm-r", type=int, metavar="R", help="Rank in the language model.")
@click.option("--llm-alpha", type=float, metavar="A", help="Its alpha.  [default: 2 R]")
@click.option("--backbone-r", type=int, metavar="R", help="Rank in the vision encoder.")
@click.option("--backbone-alpha", type=float, metavar="A", help="Its alpha.  [default: 2 R]")
@click.option(
    "--dropout", type=float, metavar="P", help="For the adapter's config.  [default: 0.05]"
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="As of torch.manual_seed before wrapping.",
)
@click.option(
    "--format",
    type=click.Choice(["wrapped", "peft"]),
    default="wrapped",
    show_default=True,
    help="A whole checkpoint for InternVL's trainer, or a PEFT adapter folder.",
)
@_output_options
def wrap_lora(**options: Any) -> None:
    """Put fresh LoRA pairs into a checkpoint, as wrap_llm_lora and wrap_backbone_lora do.

    lora_A gets the values that PEFT draws after torch.manual_seed(SEED), lora_B is zero; everything
    else is copied byte for byte. A wrapped checkpoint stores neither alpha nor dropout: upstream's
    model takes 2 R and 0.05.

    \b
    Examples:
      streamshard wrap-lora --base ./InternVL3-8B --output ./wrapped --llm-r 16
      streamshard wrap-lora --base ./InternVL3-8B --output ./lora --llm-r 16 --llm-alpha 16 \\
          --backbone-r 8 --format peft
    """
    _write("wrap_lora", texts.wrap_text, **options)


@cli.command("extract-lora", short_help="Take the LoRA pairs out of a training checkpoint.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--output", required=True, metavar="FOLDER", help="New adapter folder to write.")
@click.option(
    "--base",
    metavar="PATH",
    help="The model that the training started from: what else was trained is kept too.",
)
@click.option(
    "--alpha",
    "--lora-alpha",
    type=float,
    metavar="A",
    help="Alpha of the pairs.  [default: 2 r, as InternVL's trainer has it]",
)
@click.option("--adapter-name", metavar="NAME", help="Which adapter, if there are several.")
@_output_options
def extract_lora(**options: Any) -> None:
    """Take the LoRA pairs out of a training checkpoint of InternVL, as a PEFT adapter folder.

    With --base, whatever else differs from it (the projector, usually) is stored in the adapter as
    modules_to_save; without, it is left out with a warning.

    \b
    Example:
      streamshard extract-lora ./work_dirs/my-lora-run --base ./InternVL3-8B --output ./adapter
    """
    _write("extract_lora", texts.extract_text, **options)


@cli.command("diff", short_help="Compare two checkpoints.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--workers", type=click.IntRange(1, 64), help="Threads.  [default: one a processor, at most 8]"
)
@_reading_options
def diff(a: str, b: str, workers: int | None, **output: Any) -> None:
    """Compare two checkpoints: names, shapes, dtypes and L2 distances, layouts reconciled.

    \b
    Example:
      streamshard diff ./merged ./InternVL3-8B
    """
    screen = _begin(**output)
    with contextlib.closing(screen):
        report = streamshard.diff(
            a, b, workers=workers, on_total=screen.begin, progress=screen.progress
        )
    screen.result(report, texts.diff_text)


@cli.command("inspect", short_help="Say what a checkpoint or adapter is.")
@click.argument("path", metavar="X")
@_reading_options
def inspect(path: str, **output: Any) -> None:
    """Say what a checkpoint or adapter is: layout, family, dimensions, dtypes, files, LoRA state.

    Reads headers and configs only.

    \b
    Example:
      streamshard inspect ./InternVL3-8B --json
    """
    screen = _begin(**output)
    screen.result(streamshard.inspect(path), texts.inspect_text)


@cli.command("verify", short_help="Read a checkpoint again and say what is wrong with it.")
@click.argument("path", metavar="X")
@click.option(
    "--sample",
    metavar="PART",
    help="Read only a part of the tensors, at random: like 10% or 200.  [default: all]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Exit with 8 also if there are no digests to compare with.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), help="Threads.  [default: one a processor, at most 8]"
)
@_reading_options
def verify(
    path: str, sample: str | None, workers: int | None, *, strict: bool, **output: Any
) -> None:
    """Read a checkpoint or adapter again and say what is wrong with it.

    Checks headers, index, and infinite or NaN values; and, where streamshard wrote a
    streamshard.json: that record itself, every file and tensor with its digest, and whether code,
    weights or configs were added. Says what was compared, what could not be, and what is extra.
    Exits with 8 and lists what differs if anything is wrong.

    \b
    Examples:
      streamshard verify ./merged
      streamshard verify ./merged --sample 10%
      streamshard verify ./merged --strict
    """
    screen = _begin(**output)
    try:
        with contextlib.closing(screen):
            report = streamshard.verify(
                path,
                sample=sample,
                strict=strict,
                workers=workers,
                on_total=screen.begin,
                progress=screen.progress,
            )
    except VerificationError as error:
        screen.result(error.report, texts.verify_text)
        raise
    screen.result(report, texts.verify_text)


def _begin(*, as_json: bool, quiet: bool, verbose: bool) -> _Screen:
    """Set up logging and memory before anything heavy is imported."""
    _log_to_stderr(verbose=verbose)
    _one_blas_thread()
    _return_memory()
    return _Screen(as_json=as_json, quiet=quiet)


def _write(
    function: str,
    text: Callable[[dict[str, Any]], str],
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Run a writing command of the Python API and print its report."""
    screen = _begin(as_json=as_json, quiet=quiet, verbose=verbose)
    with contextlib.closing(screen):
        report = getattr(streamshard, function)(
            on_plan=lambda plan: screen.begin(plan.tensor_nbytes),
            progress=screen.progress,
            **options,
        )
    screen.result(report, texts.plan_text if report["dry_run"] else text)


class _Screen:
    """Where progress, messages and results go."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def close(self) -> None:
        """End the progress bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def begin(self, nbytes: int) -> None:
        """Begin the progress bar."""
        # A log file gets no bar; a terminal does.
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        with contextlib.suppress(OSError, ValueError):
            self._bar = tqdm(
                total=nbytes,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2,
                file=sys.stderr,
            )

    def progress(self, nbytes: int, name: str) -> None:
        """Move the progress bar."""
        bar = self._bar
        if bar is not None:
            try:
                bar.set_postfix({"tensor": escaped(name[-40:])}, refresh=False)
                bar.update(nbytes)
            except (OSError, ValueError):  # the terminal is gone; the work is not
                self._bar = None

    def result(self, report: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
        """Print the report, as JSON or as `text` puts it."""
        if not self._as_json:
            report = texts.printable_report(report)
        if not self._as_json and not self._quiet:
            for warning in report["warnings"]:
                say(f"warning: {warning}")
        if self._quiet and not self._as_json:
            return
        written = report["output"] and not report.get("dry_run")
        done = f"; {report['output']} is complete" if written else ""
        # In pieces: a report on all tensors of a large model has megabytes.
        show(json.JSONEncoder().iterencode(report) if self._as_json else [text(report)], done)


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # a log that cannot be written is no reason for tracebacks


def _one_blas_thread() -> None:
    # Read when numpy is first imported; saves the memory that each BLAS thread would reserve.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _return_memory() -> None:
    """Have glibc give back the memory of freed tables of names, which otherwise stays its own.

    It raises the size from which blocks are mapped by themselves whenever such a block is freed;
    saying the size (`M_MMAP_THRESHOLD`, malloc.h) ends that. One arena is enough for threads that
    keep their buffers (`M_ARENA_MAX`).
    """
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1024 * 1024)
        libc.mallopt(-8, 1)


def _handle_signals() -> None:
    _signalled.clear()
    handlers = {"SIGINT": _on_interrupt, "SIGTERM": _on_terminate, "SIGHUP": _on_terminate}
    for signal_name, handler in handlers.items():
        number = getattr(signal, signal_name, None)  # Windows has no SIGHUP
        # Under nohup a hang-up is ignored, and stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


_signalled: list[int] = []
"""The signal that ends this process, once there is one."""


def _on_interrupt(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise KeyboardInterrupt


def _on_terminate(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise _Terminated


def _ignore_signals() -> None:
    # A second Ctrl-C must not interrupt the removal of what is half written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_upstream_merge(description: str | None) -> None:
    """InternVL's merge script: its two arguments, our engine."""

    @click.command(help=description and f"\b\n{description}", context_settings=_CONTEXT)
    @click.argument("input_path", metavar="INPUT_PATH")
    @click.argument("output_path", metavar="OUTPUT_PATH")
    def merge(input_path: str, output_path: str) -> None:
        _write(
            "merge_lora",
            texts.merge_text,
            as_json=False,
            quiet=False,
            verbose=False,
            checkpoint=input_path,
            output=output_path,
        )

    main(merge)


def run_upstream(function: str, description: str | None) -> None:
    """One of InternVL's conversion scripts: its options and printed facts, our engine."""

    @click.command(help=description and f"\b\n{description}", context_settings=_CONTEXT)
    @click.option("--custom-path", required=True, help="Checkpoint in the custom layout.")
    @click.option("--hf-path", required=True, help="Checkpoint in the HF layout.")
    @click.option("--save-path", required=True, help="New folder to write.")
    def convert(**options: Any) -> None:
        _write(function, texts.upstream_text, as_json=False, quiet=False, verbose=False, **options)

    main(convert)


def main(command: click.Command = cli) -> None:
    """Run the command line and exit with the code of what happened."""
    open_streams()
    if threading.current_thread() is threading.main_thread():
        _handle_signals()
    end(_run(command))


def _run(command: click.Command) -> int:
    """Run a command; the exit code of what happened, which is told."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv))
    try:
        told(_invoke)(command)
    except click.exceptions.Exit as error:  # --help, --version
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - each has its code
        return _end_of(error, verbose=verbose)
    return 0


def _invoke(command: click.Command) -> None:
    name = "streamshard" if command is cli else Path(sys.argv[0]).name
    if command is cli and _COMPLETION in os.environ:
        command.main(prog_name=name)
    # Not by `main`, which has ends of its own for errors of streams and for interrupts.
    with command.make_context(name, sys.argv[1:]) as context:
        command.invoke(context)


_COMPLETION = "_STREAMSHARD_COMPLETE"  # set where a shell asks click to complete a line


def _end_of(error: BaseException, *, verbose: bool) -> int:
    """Tell why a command ended; returns the exit code."""
    # Code of others that was interrupted, like an import, may make any error of it.
    signal_raised = _signalled and not isinstance(error, StreamshardError)
    if isinstance(error, _Terminated) or (signal_raised and _signalled[0] != signal.SIGINT):
        return _say_ended("Terminated", error, 143)
    if isinstance(error, KeyboardInterrupt) or signal_raised:
        return _say_ended("Interrupted", error, 130)
    if isinstance(error, click.ClickException):
        with contextlib.suppress(OSError, ValueError):
            error.show()
        return error.exit_code
    if isinstance(error, StreamshardError):
        return _say_error(error, verbose=verbose)
    if isinstance(error, OSError) and error.filename is None and error.errno in _UNPRINTED:
        return _say_error(unprinted(error), verbose=verbose)  # --help, --version
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    say(
        f"error: unexpected {type(error).__name__}: {escaped(str(error))}\n"
        "This is a bug in streamshard: please report it with the output of the same command "
        "and --verbose."
    )
    return StreamshardError.exit_code


_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)


def _say_error(error: StreamshardError, *, verbose: bool) -> int:
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    say("error: " + "\n".join(map(escaped, str(error).split("\n"))))
    return error.exit_code


def _say_ended(how: str, error: BaseException, code: int) -> int:
    # Whoever was writing has added what is kept.
    left = escaped(str(error)) if isinstance(error, (KeyboardInterrupt, _Terminated)) else ""
    say(f"{how}. {left or 'Nothing was written: run the same command again.'}")
    return code
