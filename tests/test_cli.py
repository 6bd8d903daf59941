"""The command line: what goes to stdout and stderr, what a dry run does, and how signals end it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import reference
from conftest import heed_interrupts, record_of
from make_checkpoint import write_adapter, write_checkpoint
from reference import save_adapter
from safetensors.torch import save_file

import streamshard
from streamshard.cli import cli as main

COMMANDS = sorted(main.commands)
KEYS = {
    "command", "version", "output", "layout", "tensors", "bytes", "shards", "seconds",
    "peak_rss_bytes", "merged", "l2", "missing", "unexpected", "warnings",
}  # fmt: skip
L2_KEYS = {"reference", "sum", "per_parameter", "global", "compared", "skipped"}


def test_json_is_one_document_with_every_key(pair, cli):
    outcome = cli(*pair.command, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert report.keys() >= KEYS
    assert report["l2"].keys() >= L2_KEYS
    weights = [p for p in pair.output.iterdir() if p.suffix == ".safetensors"]
    assert report["command"] == "merge-lora"
    assert report["version"] == streamshard.__version__
    assert report["output"] == str(pair.output)
    assert report["layout"] == "custom"
    assert report["tensors"] == report["l2"]["compared"] == 4
    assert report["merged"] == 2
    assert report["bytes"] == sum(p.stat().st_size for p in weights)
    assert report["shards"] == len(weights) == 2
    assert 0 < report["seconds"] < 60
    assert 10**7 < report["peak_rss_bytes"] < 10**10
    assert report["missing"] == report["unexpected"] == report["warnings"] == []
    assert report["l2"]["reference"] == str(pair.base)


def test_the_document_is_kept_beside_the_weights(pair, cli):
    report = json.loads(cli(*pair.command, "--json").out)
    kept = json.loads((pair.output / "streamshard.json").read_text())
    assert kept.keys() >= report.keys()
    for key in report.keys() - {"seconds", "peak_rss_bytes"}:
        assert kept[key] == report[key]
    assert kept["seconds"] > 0
    assert len(kept["l2_per_tensor"]) == 2


def test_without_json_the_result_is_for_people(pair, cli):
    outcome = cli(*pair.command)
    assert outcome.code == 0
    assert str(pair.output) in outcome.out
    assert "Merged into 2 tensors" in outcome.out
    assert outcome.err == ""


def test_quiet(pair, cli):
    outcome = cli(*pair.command, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_quiet_still_tells_errors(pair, cli):
    outcome = cli(*pair.command, "--quiet", "--weight", "nan")
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")


def test_warnings_go_to_stderr(pair, cli):
    (pair.base / "config.json").unlink()
    outcome = cli(*pair.command)
    assert outcome.code == 0
    assert "warning: " in outcome.err
    assert "config.json" in outcome.err
    assert "warning:" not in outcome.out


def test_tracebacks_only_where_asked_for(pair, cli):
    (pair.base / "config.json").write_text("{")
    assert "Traceback" not in cli(*pair.command).err
    assert "Traceback" in cli(*pair.command, "--verbose").err


@pytest.mark.parametrize("separator", ["=", " "])
def test_underscores_are_hyphens(separator, pair, cli):
    more = f"--max_shard_size{separator}5KB --dry_run --max_memory{separator}1GB".split()
    outcome = cli(*pair.command, *more, "--json")
    assert outcome.code == 0, outcome.err
    assert len(json.loads(outcome.out)["plan"]["files"]) > 2
    assert not pair.output.exists()


def test_commands_with_underscores(pair, cli):
    assert cli("merge_lora", *pair.command[1:], "--dry-run").code == 0


def test_the_default_output(pair, cli, monkeypatch):
    monkeypatch.chdir(pair.root / "out")
    assert cli(*pair.command[:-2]).code == 0
    assert (pair.root / "out" / "base-merged" / "config.json").exists()


def test_relative_paths(pair, cli, monkeypatch):
    monkeypatch.chdir(pair.root)
    outcome = cli("merge-lora", "--base", "base/", "--adapter", "./adapter/", "--output", "o/p/")
    assert outcome.code == 0, outcome.err
    assert (pair.root / "o" / "p" / "config.json").exists()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder in which every path of the examples in the help texts is there."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("InternVL3-8B", "my-finetune", "merged"):
        write_checkpoint(folder / name, "tiny", layout="custom")
    for name in ("InternVL3-8B-hf", "my-finetune-hf", "tuned-hf"):
        write_checkpoint(folder / name, "tiny", layout="hf")
    for name in ("my-lora", "a", "b"):
        write_adapter(folder / name, "tiny", layout="custom", seed=ord(name[0]))
    write_adapter(folder / "hf-lora", "tiny", layout="hf")
    wrapped = folder / "work_dirs" / "my-lora-run"
    write_checkpoint(wrapped, "tiny", layout="custom")
    wrap_as_the_trainer(wrapped)
    return folder


def wrap_as_the_trainer(folder: Path) -> None:
    """Make a checkpoint one whose language model InternVL's trainer had wrapped by LoRA."""
    prefix = "language_model.base_model.model."
    tensors = {}
    for name, tensor in reference.read(folder).items():
        inner = name.replace("language_model.", prefix, 1)
        if name.endswith("q_proj.weight"):
            stem = inner.removesuffix(".weight")
            inner = f"{stem}.base_layer.weight"
            A, B = (2, tensor.shape[1]), (tensor.shape[0], 2)
            tensors[f"{stem}.lora_A.default.weight"] = reference.normal(A, 1, seed=1)
            tensors[f"{stem}.lora_B.default.weight"] = reference.normal(B, 1, seed=2)
        elif name.endswith("q_proj.bias"):
            inner = inner.replace(".bias", ".base_layer.bias")
        tensors[inner] = tensor
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"use_llm_lora": 2}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_of_the_help_run(command, cli, shop, monkeypatch):
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    text = re.sub(r"\\\n\s*", "", outcome.out)
    lines = [line.strip() for line in text.splitlines()]
    examples = [line for line in lines if line.startswith("streamshard ")]
    assert len(examples) >= (3 if command == "merge-lora" else 1)
    monkeypatch.chdir(shop)
    for example in examples:
        arguments = shlex.split(example)[1:]
        for option in ("--output", "--save-path"):
            if option in arguments:
                target = shop / arguments[arguments.index(option) + 1]
                shutil.rmtree(target, ignore_errors=True)
        outcome = cli(*arguments)
        assert outcome.code == 0, (example, outcome.err)


def test_help_lists_every_option(cli):
    text = cli("merge-lora", "--help").out
    for option in (
        "--adapter", "--base", "--output", "--weight", "--max-shard-size", "--dtype", "--workers",
        "--max-memory", "--dry-run", "--overwrite", "--sha256", "--json", "--quiet", "--verbose",
    ):  # fmt: skip
        assert option in text


def test_version(cli):
    assert cli("--version").out.strip().endswith(streamshard.__version__)


def test_no_arguments_show_the_help(cli):
    outcome = cli()
    assert outcome.code in (0, 2)
    assert "merge-lora" in outcome.out + outcome.err


# --- dry run --------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(pair, cli):
    before = reference.digests(pair.root)
    outcome = cli(*pair.command, "--dry-run", "--json")
    assert outcome.code == 0
    assert reference.digests(pair.root) == before
    report = json.loads(outcome.out)
    assert report.keys() >= KEYS
    assert report["dry_run"] is True
    assert report["l2"] is None
    plan = report["plan"]
    assert plan["free_bytes"] > 0
    assert plan["memory_bytes"] > 0
    assert report["merged"] == 2
    assert cli(*pair.command).code == 0
    sizes = {p.name: p.stat().st_size for p in pair.output.glob("*.safetensors")}
    assert {f["name"]: f["bytes"] for f in plan["files"]} == sizes


def test_a_dry_run_in_words(pair, cli):
    outcome = cli(*pair.command, "--dry-run")
    for part in (
        "free",
        "Nothing was written",
        "2 tensors get an update",
        "model-00001-of-00002.safetensors",
    ):
        assert part in outcome.out
    assert str(pair.output) in outcome.out


def test_a_dry_run_finds_what_a_run_would(pair, cli):
    (pair.output).mkdir()
    assert cli(*pair.command, "--dry-run").code == 5


SPARSE = "language_model.model.layers.{}.mlp.up_proj.weight"


def sparse_base(folder: Path, *, tensors: int, columns: int = 8192) -> Path:
    """A base of 64 MB a tensor that takes no space: its files are holes after the header."""
    folder.mkdir(parents=True)
    rows, end = 4096, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number in sorted(range(tensors), key=SPARSE.format):
        begin, end = end, end + rows * columns * 2
        header[SPARSE.format(number)] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text("{}")
    return folder


def sparse_adapter(folder: Path, columns: int = 8192) -> Path:
    stem = f"base_model.model.{SPARSE.format(0).removesuffix('.weight')}"
    pair = {
        f"{stem}.lora_A.weight": reference.normal((2, columns), 1, seed=1),
        f"{stem}.lora_B.weight": reference.normal((4096, 2), 1, seed=2),
    }
    return save_adapter(folder, pair, r=2, lora_alpha=2)


def test_a_dry_run_of_a_large_base_is_quick(tmp_path, cli):
    base = sparse_base(tmp_path / "base", tensors=60)  # 4 GB
    adapter = sparse_adapter(tmp_path / "adapter")
    started = time.perf_counter()
    outcome = cli(
        "merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "o", "--dry-run"
    )
    assert outcome.code == 0, outcome.err
    assert "4.03 GB" in outcome.out
    assert time.perf_counter() - started < 2
    assert (base / "model.safetensors").stat().st_blocks * 512 < 100_000  # still holes


# --- progress and signals -------------------------------------------------------------------------


def test_progress_is_on_stderr_of_a_terminal_only(pair):
    """With a terminal for stderr a bar is drawn there; stdout is one JSON document all the same."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, "-m", "streamshard", *pair.command, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        out = process.communicate()[0]
    os.close(controller)
    assert process.returncode == 0
    assert json.loads(out)["merged"] == 2
    text = seen.decode()
    assert "100%" in text
    assert "B/s" in text
    assert "tensor=" in text


def test_there_is_no_progress_in_a_log_file(pair):
    command = [sys.executable, "-m", "streamshard", *pair.command, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["merged"] == 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_signals_leave_nothing_where_nothing_is_finished(number, code, said, overwrite, tmp_path):
    base = sparse_base(tmp_path / "base", tensors=8)  # 512 MB, written in about half a second
    adapter = sparse_adapter(tmp_path / "adapter")
    output = tmp_path / "out" / "merged"
    output.parent.mkdir()
    if overwrite:
        output.mkdir()
        (output / "model.safetensors.index.json").write_text("{}")
        record = record_of("model.safetensors.index.json")
        (output / "streamshard.json").write_bytes(record)
    arguments = ["--base", base, "--adapter", adapter, "--output", output, "--workers", "2"]
    arguments += ["--overwrite"] * overwrite
    command = [sys.executable, "-m", "streamshard", "merge-lora", *map(str, arguments)]
    before = reference.digests(tmp_path / "out")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    ) as process:
        deadline = time.monotonic() + 60
        while not any(p.suffix == ".part" for p in output.parent.glob(".*/*")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        started = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert time.monotonic() - started < 2  # a second, and what a busy machine adds
    assert said in err
    assert "same command again" in err
    assert "Traceback" not in err
    assert out == ""
    assert reference.digests(tmp_path / "out") == before


def test_a_closed_pipe_is_no_error_message(pair):
    command = f"{shlex.join([sys.executable, '-m', 'streamshard', *pair.command])} --json | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (pair.output / "streamshard.json").exists()
