"""What is typed wrongly is told in one way: what is meant, and what to type next."""

from __future__ import annotations

import json

import pytest
from terminals import in_terminal


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
        ("merge-lora --adapter --base b", "--adapter has no value: --base behind it is an option."),
        (
            "hf2custom --hf_path --custom_path c -o o",
            "--hf-path has no value: --custom_path behind",
        ),
        ("merge-lora --adapter a --base -o o", "--base has no value: -o behind it is an option."),
        ("merge-lora --output a -o b", "-o and --output are the same: give one."),
        ("hf2custom --save_path=a --output b", "--output and --save-path are the same: give one."),
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


def test_values_that_look_like_options_are_values_with_an_equals_sign(pair, cli, monkeypatch):
    monkeypatch.chdir(pair.root)
    assert (
        cli("merge-lora", "--adapter", pair.adapter, "--base", pair.base, "--output=--base").code
        == 0
    )
    assert cli("verify", "--quiet", "--", "--base").code == 0
    done = cli("verify", "--sample", "--workers", "1", "--", "--base")
    assert "--sample has no value: --workers behind it is an option." in done.err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_heat_map_of_names(more, pair, cli):
    done = cli("diff", pair.base, pair.base, "--names", "--heatmap", *more)
    assert done.code == 2
    assert "--heatmap shows distances, which --names does not measure" in done.err


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


def test_two_adapters_after_one_option(pair, cli):
    done = cli(
        "merge-lora",
        "--adapter",
        pair.adapter,
        pair.adapter,
        "--base",
        pair.base,
        "-o",
        pair.output,
    )
    assert done.code == 2
    assert "is an adapter, too: write --adapter before each of them." in done.err


def test_a_folder_of_folders(pair, cli):
    done = cli("inspect", pair.root)
    assert done.code == 3
    assert "A model lies in its sub-folder 'base': give that." in done.err
    (pair.root / "empty").mkdir()
    (pair.root / "empty" / "adapter_config.json").write_text("{}")
    done = cli("merge-lora", "--adapter", pair.root, "--base", pair.base, "-o", pair.output)
    assert done.code == 3
    assert "An adapter lies in its sub-folder 'adapter': give that." in done.err


def test_problems_are_told_once_in_a_terminal(pair, cli):
    assert cli(*pair.command).code == 0
    (pair.output / "config.json").write_text("{}")
    seen = in_terminal(200, "verify", pair.output)
    assert seen.code == 8
    assert seen.text.count("has changed") + seen.text.count("not the ") == 1
    assert "Fetch or copy anew what is named, or write all again with --overwrite." in seen.text
    assert "config.json" in cli("verify", pair.output).err
