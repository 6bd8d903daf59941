"""With `--json` an error is one JSON document on standard output, whatever the error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from foreign_things import make_output
from pairs import heed_interrupts

from streamshard.cli.app import cli as main

COMMANDS = sorted(main.commands)


def error_of(outcome, code):
    """The document, which says the same as the exit code and the message for people."""
    assert outcome.code == code
    assert outcome.out.count("\n") == 1
    document = json.loads(outcome.out)
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"type", "exit_code", "message"}
    assert error["exit_code"] == code
    assert error["message"] in outcome.err
    return error


NEEDED = {
    "merge-lora": (["--base", "x"], "--adapter"),
    "hf2custom": (["--hf-path", "x", "--save-path", "o"], "--custom-path"),
    "custom2hf": (["--hf-path", "x", "--custom-path", "x"], "--save-path"),
    "wrap-lora": (["--output", "o"], "--base"),
    "extract-lora": (["x"], "--output"),
    "diff": (["x"], "B"),
    "inspect": ([], "PATH"),
    "verify": ([], "PATH"),
}


@pytest.mark.parametrize("command", NEEDED)
def test_what_is_needed_is_missing(command, cli):
    arguments, named = NEEDED[command]
    error = error_of(cli(command, *arguments, "--json"), 2)
    assert error["type"] == "UsageError"
    assert named in error["message"]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option(command, place, cli):
    arguments = [command, "--frobnicate"]
    arguments.insert(place, "--json")
    error = error_of(cli(*arguments), 2)
    assert error["type"] == "UsageError"
    assert "--frobnicate" in error["message"] or "--json" in error["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate", "--json"],
        ["--json"],
        ["--json", "inspect", "x"],
        ["merge-lora", "--weight", "much", "--json"],
        ["merge-lora", "--json", "--workers"],
        ["merge-lora", "--layout", "other", "--json"],
        ["merge-lora", "--alpha", "1", "--json"],
        ["wrap-lora", "--base", "x", "--output", "o", "--llm-r", "1.5", "--json"],
        ["hf2custom", "--json", "--hf-path=a", "--custom-path=b", "--save-path=c", "d"],
        ["inspect", "--json", "a", "b"],
        ["verify", "", "--json"],
        ["verify", "x", "--quiet", "--json", "--sample"],
    ],
    ids=" ".join,
)
def test_other_misuse(arguments, cli):
    assert error_of(cli(*arguments), 2)["type"] == "UsageError"


@pytest.mark.parametrize("option", ["--max-shard-size", "--max-memory", "--dtype", "--workers"])
def test_bad_values_of_options(option, pair, cli):
    error = error_of(cli(*pair.command, option, "-5", "--json"), 2)
    assert option in error["message"]


@pytest.mark.parametrize("command", NEEDED)
def test_inputs_that_are_not_there(command, cli, tmp_path):
    x, o = str(tmp_path / "x"), str(tmp_path / "o")
    arguments = {
        "merge-lora": ["--base", x, "--adapter", x, "--output", o],
        "wrap-lora": ["--base", x, "--output", o, "--llm-r", "2"],
        "extract-lora": [x, "--output", o],
        "diff": [x, x],
        "inspect": [x],
        "verify": [x],
    }.get(command, ["--hf-path", x, "--custom-path", x, "--save-path", o])
    error = error_of(cli(command, *arguments, "--json"), 3)
    assert error["type"] == "InputError"
    assert x in error["message"]


def test_every_class_of_error(pair, cli):
    pair.output.write_text("mine")
    assert error_of(cli(*pair.command, "--json"), 5)["type"] == "OutputError"
    pair.output.unlink()
    (pair.adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert error_of(cli(*pair.command, "--json"), 4)["type"] == "AdapterError"
    (pair.adapter / "adapter_config.json").write_text("{")
    assert error_of(cli(*pair.command, "--json"), 3)["type"] == "InputError"
    long = [*pair.command[:-1], str(pair.root / ("a" * 300))]
    (pair.adapter / "adapter_config.json").unlink()
    assert error_of(cli(*long, "--json"), 3)["type"] == "InputError"


def test_a_bug_is_told_too(pair, cli, monkeypatch):
    def broken(**_: object) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr("streamshard.merge_lora", broken, raising=False)
    outcome = cli(*pair.command, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["error"] == {
        "type": "ZeroDivisionError",
        "exit_code": 1,
        "message": "oh\nno",
    }


def test_verify_has_its_report_and_the_error(pair, cli):
    """One document: what a report has, and the error beside it."""
    make_output(pair)
    (pair.output / "config.json").write_text("{}")
    outcome = cli("verify", pair.output, "--json")
    assert outcome.code == 8
    document = json.loads(outcome.out)
    assert document["error"]["type"] == "VerificationError"
    assert document["error"]["exit_code"] == 8
    assert document["problems"]
    assert document["error"]["message"] in outcome.err


@pytest.mark.parametrize("arguments", [["inspect", "--", "--json"], ["inspect", "json"]])
def test_where_json_is_no_option(arguments, cli):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (3, "")


def test_without_json_nothing_goes_to_stdout(cli):
    for arguments in (["inspect"], ["frobnicate"], ["inspect", "nowhere"]):
        assert cli(*arguments).out == ""


# --- signals --------------------------------------------------------------------------------------


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )


SIGNALS = [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]


@pytest.mark.parametrize(("number", "code", "kind"), SIGNALS, ids=["INT", "TERM"])
@pytest.mark.parametrize("module", ["click", "numpy", "streamshard.engine.writer"])
def test_a_signal_at_any_time(number, code, kind, module, pair):
    """Also before click is imported, or in the middle of an import."""
    script = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
            for _ in range(1000): pass
sys.meta_path.insert(0, Finder())
sys.argv = ["streamshard", *sys.argv[1:]]
runpy.run_module("streamshard", run_name="__main__")
"""
    done = run(script, *pair.command, "--json")
    assert done.returncode == code, done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert "run the same command again" in error["message"]


@pytest.mark.parametrize(("number", "code", "kind"), SIGNALS, ids=["INT", "TERM"])
def test_a_signal_while_the_report_is_printed_adds_no_second_document(number, code, kind, pair):
    script = f"""
import os
from streamshard.cli import console
class json:
    class JSONEncoder:
        def iterencode(self, document):
            yield "{{"
            os.kill(os.getpid(), {int(number)})
            for _ in range(1000): pass
            yield "}}"
console.json = json
from streamshard.__main__ import main
main()
"""
    done = run(script, *pair.command, "--json")
    assert done.returncode == code
    assert "error" not in done.stdout
    assert f"{kind}. {pair.output} is complete." in done.stderr


@pytest.mark.parametrize("stream", [">&-", ">/dev/full"])
def test_an_error_that_cannot_be_printed_keeps_its_code(stream):
    line = f"{sys.executable} -m streamshard inspect nowhere --json {stream}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert os.linesep in done.stderr
