"""C2: `~` in every path of every command, function and script."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from folders import make
from make_checkpoint import write_adapter
from pairs import wrap_as_the_trainer
from scripts import TOOLS

import streamshard
from streamshard.errors import UsageError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a checkpoint of each layout, an adapter and a training checkpoint."""
    folder = tmp_path_factory.mktemp("home")
    for side in ("custom", "hf"):
        make(folder / side, "tiny", side)
    write_adapter(folder / "lora", "tiny", layout="custom")
    make(folder / "wrapped", "tiny", "custom")
    wrap_as_the_trainer(folder / "wrapped")
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """Another folder to be in, with that home."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = {
    "merge-lora": ["--base=~/custom", "--adapter=~/lora", "--output=~/{}"],
    "merge-lora CHECKPOINT": ["~/wrapped", "--output=~/{}", "--reference=~/custom"],
    "merge-lora --layout": [
        "--base=~/custom", "--adapter=~/lora", "--layout=hf", "--reference=~/hf", "--output=~/{}",
    ],
    "hf2custom": ["--hf-path=~/hf", "--custom-path=~/custom", "--save-path=~/{}"],
    "custom2hf": ["--custom_path=~/custom", "--hf_path=~/hf", "--save_path=~/{}"],
    "wrap-lora": ["--base=~/custom", "--llm-r=2", "--format=peft", "--output=~/{}"],
    "extract-lora": ["~/wrapped", "--base=~/custom", "--output=~/{}"],
    "diff": ["~/custom", "~/hf"],
    "inspect": ["~/custom"],
    "inspect adapter": ["~/lora"],
    "verify": ["~/custom"],
    "verify file": ["~/custom/model.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
def test_C2_on_the_command_line(command, dry, here, home, cli):
    arguments = [part.format(here.name) for part in COMMANDS[command]]
    writes = arguments != COMMANDS[command]
    if dry and not writes:
        return
    outcome = cli(command.split()[0], *arguments, *["--dry-run"] * dry)
    assert outcome.code == 0, outcome.err
    assert (home / here.name / "streamshard.json").exists() == (writes and not dry)
    assert "~" not in outcome.out + outcome.err
    for name in ("streamshard.json", "adapter_config.json"):
        if (home / here.name / name).exists():
            assert "~" not in (home / here.name / name).read_text()
    assert [*here.iterdir()] == []


def test_C2_in_python(here, home):
    for kind in (str, Path, os.fsencode):
        new = f"~/{here.name}-{kind.__name__}"
        report = streamshard.merge_lora(
            base=kind("~/custom"), adapter=[kind("~/lora")], output=kind(new)
        )
        assert report["output"] == os.path.expanduser(new)
        assert streamshard.verify(kind(new))["path"] == os.path.expanduser(new)
        assert streamshard.inspect(kind("~/custom"))["path"] == str(home / "custom")
        assert streamshard.diff(kind("~/custom"), kind(new))["different"]
        out = streamshard.hf_to_custom(
            hf_path=kind("~/hf"), custom_path=kind("~/custom"), save_path=kind(f"{new}-2")
        )
        assert out["output"] == os.path.expanduser(f"{new}-2")
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("merge_lora.py", ["~/wrapped", "~/{}"]),
        (
            "internvl_hf2custom.py",
            ["--custom_path=~/custom", "--hf_path=~/hf", "--save_path=~/{}"],
        ),
        (
            "internvl_custom2hf.py",
            ["--custom_path=~/custom", "--hf_path=~/hf", "--save_path=~/{}"],
        ),
        ("make_checkpoint.py", ["--preset=tiny", "--layout=hf", "--output=~/{}"]),
    ],
)
def test_C2_in_the_scripts(script, arguments, here, home):
    arguments = [part.format(here.name) for part in arguments]
    done = subprocess.run(
        [sys.executable, TOOLS / script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (home / here.name / "config.json").exists()
    assert [*here.iterdir()] == []


def test_C2_the_home_of_a_user_by_name(here, cli):
    user = pwd.getpwuid(os.getuid())
    outcome = cli("inspect", f"~{user.pw_name}/nowhere")
    assert outcome.code == 3
    assert outcome.err.startswith(f"error: {user.pw_dir}/nowhere: no such")


def test_C2_what_is_really_called_so(here, home, cli):
    """A home folder first, as in a shell; then what has that very name; `./~` is never a home."""
    make(here / "~" / "mine", "tiny", "custom")
    make(here / "~" / "custom", "tiny", "hf")
    make(here / "~no-such-user", "tiny", "custom")
    assert streamshard.inspect("~/mine")["path"] == "~/mine"
    assert streamshard.inspect("~/custom")["path"] == str(home / "custom")
    assert streamshard.inspect("./~/custom")["layout"] == "hf"
    assert streamshard.inspect("~no-such-user")["path"] == "~no-such-user"
    merged = ["merge-lora", "--base=./~/mine", "--adapter=~/lora"]
    assert cli(*merged, "--output=./~/out").code == 0
    assert (here / "~" / "out" / "config.json").exists()


@pytest.mark.parametrize("path", ["~nobody-here", "~nobody-here/x"])
def test_C2_an_output_in_the_home_of_nobody(path, here, cli):
    outcome = cli("merge-lora", "--base=~/custom", "--adapter=~/lora", "--output", path)
    assert outcome.code == 2
    assert "'nobody-here'" in outcome.err
    assert f"./{path}" in outcome.err
    assert [*here.iterdir()] == []


def test_C2_no_home_is_known(here, monkeypatch):
    monkeypatch.delenv("HOME")

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UsageError, match="the system knows none"):
        streamshard.inspect("~/custom")


def test_C2_a_tilde_elsewhere_is_a_letter(here, cli):
    make(here / "a~b", "tiny", "custom")
    assert streamshard.inspect("a~b")["path"] == "a~b"
    assert streamshard.inspect(f"{here}/a~b")["path"] == f"{here}/a~b"
