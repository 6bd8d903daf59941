"""Part 4: messages that lead on. Each is tried in every command that can say it, and from Python."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import trainer_models

import streamshard
from streamshard.errors import HubError, InputError, StreamshardError, UsageError
from streamshard.wording import KEYWORDS


def lines(pair, path) -> dict[str, list[object]]:
    """Commands that are given `path` as what they read first."""
    out = pair.root / "out" / "o"
    return {
        "merge-lora": ["merge-lora", "--adapter", pair.adapter, "--base", path, "--output", out],
        "hf2custom": [
            *("hf2custom", "--hf-path", path, "--custom-path", pair.base, "--save-path", out)
        ],
        "custom2hf": [
            *("custom2hf", "--custom-path", path, "--hf-path", pair.base, "--save-path", out)
        ],
        "wrap-lora": ["wrap-lora", "--base", path, "--output", out, "--llm-r", "2"],
        "extract-lora": ["extract-lora", path, "--output", out],
        "diff": ["diff", path, pair.base],
        "inspect": ["inspect", path],
        "verify": ["verify", path],
    }


COMMANDS = ["merge-lora", "hf2custom", "custom2hf", "wrap-lora", "extract-lora", "diff"]
READING = ["inspect", "verify"]


def own_options(command: str) -> set[str]:
    from streamshard.cli.main import cli

    return {one for param in cli.commands[command].params for one in param.opts}


def check_options(said: str, command: str) -> None:
    """Every option that is told is one of the command, of a command in backquotes, or told whose."""
    free = re.sub(r"`[^`]*`", "", said)
    for option in re.findall(r"(?<![\w/-])--[a-z][a-z-]*(?! \(of )", free):
        assert option in own_options(command), said


# --- a typo in a local path -------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*COMMANDS, *READING])
def test_a_typo_is_told_with_what_is_there(command, pair, cli, monkeypatch):
    """Part 4: not as a hub id, where the folder around it is there."""
    monkeypatch.chdir(pair.root)
    (pair.root / "models").mkdir()
    (pair.root / "models" / "InternVL3-8B").mkdir()
    for typo in ("models/InternVL-8B", "models/internvl3-8b", pair.root / "models" / "InterVL3-8B"):
        done = cli(*lines(pair, typo)[command])
        assert done.code == 3
        assert "'InternVL3-8B'" in done.err
        assert "hub" not in done.err.replace(str(pair.root), "")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing/like-it", "hub"),
        ("Nothing/Like-it@main", "hub"),
        ("base/config.json/x", "is a file"),
        ("base/no/such/folder", "there is no 'no'"),
        ("./nothing/like-it", "Check the path"),
        ("link", "link to nothing"),
        ("bas", "'base'"),
        ("completely-else", "Check the path"),
        ("org/name/sub/folder", "in a model on the hub it would be hf://org/name/sub/folder."),
        ("org/name/sub", "In this folder there is no 'org'. Check the path; in a model"),
    ],
)
def test_what_is_not_there(path, said, pair, monkeypatch):
    monkeypatch.chdir(pair.root)
    (pair.root / "link").symlink_to("nowhere")
    for call in (
        lambda: streamshard.inspect(path),
        lambda: streamshard.merge_lora(base=path, adapter=pair.adapter, output="o"),
        lambda: streamshard.merge_lora(base=pair.base, adapter=path, output="o"),
    ):
        with pytest.raises((InputError, HubError), match=re.escape(said)) as raised:
            call()
        assert path.removeprefix("./") in str(raised.value)


# --- adapters in place of checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_in_place_of_a_checkpoint(command, file, pair, cli):
    """Part 4: `diff` and `extract-lora` advised --adapter, which they lack; files had none of it."""
    done = cli(*lines(pair, pair.adapter / file)[command])
    assert done.code == 3
    assert "is a PEFT adapter" in done.err
    check_options(done.err, command)
    (advice,) = re.findall(r"`streamshard (merge-lora [^`]*)`", done.err)
    again = [str(pair.base) if word == "MODEL" else word for word in shlex.split(advice)]
    out = pair.root / "out" / "advised"
    assert cli(*again, "--output", out, "--overwrite").code == 0


def test_an_adapter_as_the_second_of_two(pair, cli):
    done = cli("diff", pair.base, pair.adapter)
    assert done.code == 3
    check_options(done.err, "diff")
    with pytest.raises(InputError, match=r"streamshard\.merge_lora\(adapter=.*, base=MODEL\)"):
        streamshard.diff(pair.base, pair.adapter)


# --- less, or other things, than a merge needs ----------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA-wrapped training checkpoint, and the base of it."""
    root = tmp_path_factory.mktemp("trained")
    base = trainer_models.save_base(root / "base", "tiny")
    streamshard.wrap_lora(base=base, output=root / "run", llm_r=2, max_shard_size="1GB")
    return root


def test_a_training_checkpoint_as_an_adapter(trained, cli):
    """Part 4: whatever else is given, the message says what it is and how it is merged."""
    run, base = trained / "run", trained / "base"
    for given in (
        ["--adapter", run],
        ["--adapter", run, "--base", base],
        ["--base", run],
        ["--adapter", run / "model.safetensors"],
        ["--adapter", run / "model.safetensors", "--base", base],
    ):
        done = cli("merge-lora", *given, "--output", trained / "o")
        assert done.code in {2, 3}, done.err
        assert "training checkpoint" in done.err
        assert re.search(rf"`streamshard merge-lora {re.escape(str(run))}[^`]*`", done.err), (
            done.err
        )
    with pytest.raises(StreamshardError, match=r"streamshard\.merge_lora\(checkpoint=\"") as raised:
        streamshard.merge_lora(adapter=run, base=base, output=trained / "o")
    assert "--" not in str(raised.value).replace(str(trained), "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing to merge"),
        (["adapter"], "--base is missing"),
        (["base"], "--adapter is missing"),
        (["checkpoint", "base"], ": --base cannot be given"),
        (["checkpoint", "adapter", "base"], ": --adapter and --base cannot be given"),
    ],
    ids=str,
)
def test_options_that_are_missing(given, said, pair, cli):
    values = {"adapter": pair.adapter, "base": pair.base, "checkpoint": pair.base}
    line: list[object] = ["merge-lora", "--output", pair.output]
    for name in given:
        line += [values[name]] if name == "checkpoint" else [f"--{name}", values[name]]
    done = cli(*line)
    assert done.code == 2
    assert said in done.err
    with pytest.raises(UsageError) as raised:
        streamshard.merge_lora(output=pair.output, **{name: values[name] for name in given})
    assert said.replace("--adapter", "`adapter`").replace("--base", "`base`") in str(raised.value)


def test_a_whole_model_as_an_adapter(pair, cli):
    done = cli("merge-lora", "--adapter", pair.base, "--base", pair.base, "--output", pair.output)
    assert done.code == 3
    assert "is a whole model and no adapter" in done.err


def test_a_plain_model_as_a_training_checkpoint(pair, cli):
    for command in ("merge-lora", "extract-lora"):
        done = cli(command, pair.base, "--output", pair.output)
        assert done.code == 3
        advice = f"`streamshard merge-lora --adapter ADAPTER --base {pair.base}`"
        assert (advice in done.err) == (command == "merge-lora")
        assert ("what can be extracted" in done.err) == (command == "extract-lora")
        check_options(done.err, command)


# --- every message --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KEYWORDS if KEYWORDS[name]])
def test_no_message_of_python_names_an_option(name, pair, trained, monkeypatch):
    """What each function says of options that do not go together, of what is there, and of nothing."""
    run = str(trained / "run")
    (pair.output).mkdir()
    (pair.output / "file").write_text("")
    every = {
        "merge_lora": [
            {"base": pair.base, "adapter": pair.adapter, "weight": [1, 2]},
            {"base": pair.base, "adapter": pair.adapter, "weight": 0},
            {"base": pair.base, "adapter": pair.adapter, "reference": pair.base},
            {"base": pair.base, "adapter": pair.adapter, "alpha": 3},
            {"base": pair.base, "adapter": [pair.adapter, pair.adapter]},
            {"base": pair.base, "adapter": []},
            {"base": pair.base, "adapter": pair.adapter, "layout": "hf"},
            {"base": pair.base, "adapter": pair.adapter, "expert_order": "no"},
            {"base": pair.base, "adapter": pair.adapter, "adapter_name": "no"},
            {"checkpoint": run, "alpha": 0},
        ],
        "extract_lora": [{"checkpoint": run, "max_shard_size": 5}, {"checkpoint": pair.base}],
        "wrap_lora": [{"base": pair.base}, {"base": pair.base, "llm_r": 2, "dropout": 0.5}],
        "hf_to_custom": [{"hf_path": run, "custom_path": run, "tokenizer_from": "no"}],
        "custom_to_hf": [{"custom_path": run, "hf_path": run}],
        "verify": [{"path": pair.base, "strict": True}, {"path": pair.base, "sample": "no"}],
        "diff": [{"a": pair.adapter, "b": pair.base}],
        "inspect": [{"path": pair.root}],
    }
    common = [
        {"dtype": "no"},
        {"workers": 0},
        {"max_memory": 5},
        {"max_memory": "no"},
        {"max_shard_size": "no"},
        {"overwrite": True},
        {},
    ]
    writes = "save_path" if "save_path" in KEYWORDS[name] else "output"
    first = every[name][0]
    if name == "merge_lora":
        first = {"base": pair.base, "adapter": pair.adapter}
    calls = list(every[name])
    if writes in KEYWORDS[name]:
        calls = [{writes: pair.root / "new", **one} for one in calls]
        calls += [{**first, writes: pair.output, **more} for more in common]
    said = []
    for call in calls:
        with pytest.raises(StreamshardError) as raised:
            getattr(streamshard, name)(**call)
        said.append(str(raised.value).replace(str(pair.root), "").replace(str(trained), ""))
    assert not [text for text in said if "--" in text]
    assert not [text for text in said if "CHECKPOINT" in re.sub(r"`streamshard[^`]*`", "", text)]


def test_warnings_name_keywords_too(trained):
    report = streamshard.extract_lora(checkpoint=trained / "run", output=trained / "taken")
    assert any("`base`" in text for text in report["warnings"])
    kept = json.loads((trained / "taken" / "streamshard.json").read_text())
    assert any("--base" in text for text in kept["warnings"])  # the file is the same for everybody


def test_the_drop_in_scripts_say_whose_an_option_is(pair, trained):
    import subprocess
    import sys

    script = Path(__file__).parents[2] / "tools" / "merge_lora.py"
    pair.output.mkdir()
    (pair.output / "file").write_text("")
    line = [sys.executable, script, trained / "run", pair.output]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    free = re.sub(r"--[a-z-]+ \(of streamshard merge-lora\)", "", done.stderr)
    assert "--" not in free.replace(str(pair.root), "")
