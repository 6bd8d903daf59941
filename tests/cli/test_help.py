"""The help texts: options in groups, names for what is to be given, lines that fit, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from scripts import TOOLS

from streamshard.cli.app import cli as main
from streamshard.cli.command import GROUPS

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_lines_fit(command, columns, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = cli(*command.split(), "--help").out
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    examples = re.findall(r"^    streamshard .*(?:\\\n.*)*", text, re.MULTILINE)
    assert examples
    assert max(len(line) for example in examples for line in example.split("\n")) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups(command, cli):
    text = cli(command, "--help").out
    titles = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert "Options" not in titles
    wanted = {"Inputs", "Inputs on the hub", "Running"} if command != "env" else {"Running"}
    if command not in {"env", "inspect", "verify"}:
        wanted |= {"Output"}
    if command in {"merge-lora", "wrap-lora", "extract-lora"}:
        wanted |= {"Meaning of the adapter"}
    if command in {"diff", "verify"}:
        wanted |= {"Checks"}
    assert [title for title in titles if title in GROUPS] == [g for g in GROUPS if g in wanted]
    for option in main.commands[command].params:
        assert any(name in text for name in option.opts) or option.metavar.strip("[]") in text


@pytest.mark.parametrize("command", COMMANDS)
def test_names_say_what_is_to_be_given(command, cli):
    text = cli(command, "--help").out
    assert not re.search(r"\b(TEXT|INTEGER|FLOAT|RANGE|<=)\b", text)
    assert not re.search(r"--\S+ [A-Z]\s", text.replace("--workers N", ""))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_exit_codes_are_told(command, cli):
    """All that a command can end with, and no others."""
    text = " ".join(cli(*command.split(), "--help").out.split())
    assert "0 done" in text
    assert "2 usage" in text
    for code in ("3 input invalid", "4 adapter does not fit", "7 read error", "130 interrupted"):
        assert (code in text) == (command != "env")
    for code in ("5 output exists", "6 no space"):
        assert (code in text) == (command not in {"env", "inspect", "diff", "verify"})


def test_an_option_is_said_once():
    """What several commands share is the same, but for what they say differently on purpose."""
    shared: dict[str, set[str]] = {}
    for command in main.commands.values():
        for option in command.params:
            shared.setdefault(option.opts[0], set()).add(str(option.metavar))
    assert {name: kinds for name, kinds in shared.items() if len(kinds) > 1} == {
        "checkpoint": {"CHECKPOINT", "[CHECKPOINT]"},
        "--hf-path": {"CHECKPOINT", "FOLDER"},
        "--custom-path": {"CHECKPOINT", "FOLDER"},
    }


@pytest.mark.parametrize(
    "script", ["merge_lora.py", "internvl_hf2custom.py", "internvl_custom2hf.py"]
)
def test_the_scripts_have_groups_too(script):
    done = subprocess.run(
        [sys.executable, TOOLS / script, "--help"], capture_output=True, text=True, check=True
    )
    assert "Inputs:" in done.stdout
    assert "Output:" in done.stdout
    assert "TEXT" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_R13_a_size_with_its_unit_apart(pair, cli):
    """As a shell gives `--max-shard-size 5 KB`: two arguments."""
    for apart in (["--max-shard-size", "5", "KB"], ["--max_shard_size=5", "kb"]):
        outcome = cli(*pair.command, *apart, "--max-memory", "1", "GiB", "--dry-run")
        assert outcome.code == 0, outcome.err
        assert "model-00003-of-00003" in outcome.out
    alone = cli(*pair.command, "--max-shard-size", "5")
    assert alone.code == 2
    assert "5 has no unit" in alone.err
    stray = cli(*pair.command, "--workers", "5", "GB")
    assert stray.code == 2
