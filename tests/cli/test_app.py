"""The command line: what goes to stdout and stderr, what a dry run does, and how signals end it."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import reference
from make_checkpoint import write_adapter, write_checkpoint
from pairs import wrap_as_the_trainer
from sparse_folders import KEYS, sparse_adapter, sparse_base

import streamshard
from streamshard.cli import texts
from streamshard.cli.app import cli as main

COMMANDS = sorted(main.commands)
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
    assert report["seconds"] > 0
    assert 10**7 < report["peak_rss_bytes"] < 10**10
    assert report["missing"] == report["unexpected"] == report["warnings"] == []
    assert report["l2"]["reference"] == str(pair.base)


def test_the_document_is_kept_beside_the_weights(pair, cli):
    report = json.loads(cli(*pair.command, "--json").out)
    kept = json.loads((pair.output / "streamshard.json").read_text())
    of_the_run = {"dry_run", "part", "plan", "pushed", "scheduler"}
    assert kept.keys() >= report.keys() - of_the_run
    for key in report.keys() - of_the_run - {"seconds", "peak_rss_bytes"}:
        assert kept[key] == report[key]
    assert kept["seconds"] > 0
    assert len(kept["l2_per_tensor"]) == 2


def test_without_json_the_result_is_for_people(pair, cli):
    outcome = cli(*pair.command)
    assert outcome.code == 0
    assert str(pair.output) in outcome.out
    assert "Merged into 2 tensors" in outcome.out
    assert outcome.err.startswith("merging: ")


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
    for name in ("InternVL3-8B", "my-finetune", "OpenGVLab/InternVL3-8B"):
        write_checkpoint(folder / name, "tiny", layout="custom")
    for name in ("InternVL3-8B-hf", "my-finetune-hf", "tuned-hf"):
        write_checkpoint(folder / name, "tiny", layout="hf")
    for name in ("my-lora", "a", "b"):
        write_adapter(folder / name, "tiny", layout="custom", seed=ord(name[0]))
    write_adapter(folder / "hf-lora", "tiny", layout="hf")
    streamshard.merge_lora(
        base=folder / "InternVL3-8B", adapter=folder / "my-lora", output=folder / "merged"
    )
    wrapped = folder / "work_dirs" / "my-lora-run"
    write_checkpoint(wrapped, "tiny", layout="custom")
    wrap_as_the_trainer(wrapped)
    return folder


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
        if "--against" in arguments:
            continue  # tests/commands/test_verify_against.py
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


def test_help_lists_no_option_that_is_always_refused(cli):
    """An adapter is one file; the option is understood, to be told so."""
    assert "--max-shard-size" not in cli("extract-lora", "--help").out
    done = cli("extract-lora", "x", "--output", "y", "--max-shard-size", "5 GB")
    assert (done.code, "always one file" in done.err) == (2, True)


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
    pair.output.write_text("mine")
    assert cli(*pair.command, "--dry-run").code == 5


def test_a_dry_run_of_a_large_base_reads_little_of_it(tmp_path, cli, nbytes_read, monkeypatch):
    """And so is quick: of gigabytes only the header and samples."""
    monkeypatch.setattr("streamshard.engine.plan.disk_free", lambda _: 10**15)
    base = sparse_base(tmp_path / "base", tensors=60)  # 4 GB
    adapter = sparse_adapter(tmp_path / "adapter")
    outcome = cli(
        "merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "o", "--dry-run"
    )
    assert outcome.code == 0, outcome.err
    assert "4.03 GB" in outcome.out
    assert 0 < sum(nbytes_read) < 16_000_000
    assert (base / "model.safetensors").stat().st_blocks * 512 < 100_000  # still holes


def test_numbers_that_are_not_finite_are_said_so():
    """A report has None for them."""
    l2 = {"reference": "r", "sum": None, "per_parameter": None, "global": None, "compared": 1}
    effort = {"output": "o", "bytes": 1, "shards": 1, "seconds": 1, "peak_rss_bytes": 1}
    report = {**effort, "l2": l2, "tensors": 1, "missing": [], "unexpected": []}
    merged = {
        "merged": 1,
        "adapters": [],
        "update": {"intended": None, "effected": 1, "unchanged": 0},
    }
    for text in (
        texts.conversion_text(report),
        texts.upstream_text(report),
        texts.merge_text({**report, **merged}),
    ):
        assert text.count("not finite") >= 2
