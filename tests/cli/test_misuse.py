"""What is typed wrongly is told in one way: what is meant, and what to type next."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge-lora --lora x", "there is no option --lora here. Is --adapter meant?"),
        ("merge-lora --model x", "there is no option --model here. Is --base meant?"),
        ("merge-lora --adaptr x", "there is no option --adaptr here. Is --adapter meant?"),
        ("merge_lora --lora_path x", "there is no option --lora-path here. Is --adapter meant?"),
        ("diff --model a b", "there is no option --model here."),
        ("help-me", "there is no command 'help-me'. There are: merge-lora, hf2custom,"),
        ("convert x", "there is no command 'convert'. Is hf2custom or custom2hf meant?"),
        ("inspec x", "there is no command 'inspec'. Is inspect meant?"),
        ("--frob", "there is no option --frob here."),
        ("custom2hf", "--custom-path CHECKPOINT and --hf-path FOLDER are missing."),
        ("custom2hf --hf-path x", "--custom-path CHECKPOINT is missing."),
        ("diff", "A and B are missing."),
        ("diff a", "B is missing."),
        ("inspect", "PATH is missing."),
        ("inspect a b", "too many arguments: 'b'. inspect takes PATH and no more;"),
        ("env a", "too many arguments: 'a'. env takes options only;"),
        (
            "merge-lora --base x --adapter a b c",
            "To give several adapters, write --adapter before each.",
        ),
        ("merge-lora --workers many", "invalid value for '--workers': 'many' is not"),
    ],
)
def test_messages(line, message, cli):
    done = cli(*line.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("Try `streamshard")
    assert done.err.count("\n") == 2


def test_an_option_before_the_command(cli):
    done = cli("--json", "inspect", "x")
    assert done.code == 2
    said = json.loads(done.out)["error"]["message"]
    assert said.endswith("It goes behind the command: `streamshard inspect … --json`.")
    assert said in done.err


@pytest.mark.parametrize("command", ["", "diff", "merge-lora"])
def test_help_as_a_command(command, cli):
    asked = cli("help", *command.split())
    assert asked.code == 0
    assert asked == cli(*command.split(), "--help")
