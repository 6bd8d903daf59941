"""`make_checkpoint` as a command: its options, mistakes, interrupts, and the names that it goes by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from make_checkpoint import PRESETS
from pairs import heed_interrupts
from reference import read

import streamshard

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, ROOT / "tools/make_checkpoint.py"]
INSTALLED = """
import importlib.util, sys
package = importlib.util.spec_from_file_location("installed", {file!r})
module = importlib.util.module_from_spec(package)
package.loader.exec_module(module)
sys.argv[0] = {name!r}
module.{function}()
"""
COMMANDS = {
    "streamshard-make-checkpoint": "make_checkpoint",
    "streamshard-merge_lora": "merge_lora",
    "streamshard-internvl_hf2custom": "hf2custom",
    "streamshard-internvl_custom2hf": "custom2hf",
}


def made(*arguments: object, line: list[object] = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, line), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )


def installed(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As a command that pip has put somewhere."""
    file = str(ROOT / "tools/installed.py")
    code = INSTALLED.format(file=file, name=f"/some/where/{name}", function=COMMANDS[name])
    return made(*arguments, line=[sys.executable, "-c", code])


def test_a_checkpoint_and_an_adapter(tmp_path):
    base_folder, lora = tmp_path / "base", tmp_path / "lora"
    common = ["--preset", "TINY", "--layout", "hf"]
    options = ["--max-shard-size", "100KB", "--seed", "7", "--dtype", "fp32", "--tied"]
    adapter = ["--adapter", lora, "--adapter-r", "8", "--bin", "no", "--rslora"]
    done = made(*common, *options, "--output", base_folder, *adapter)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{base_folder}: 84 tensors, ")
    assert " KB in " in first
    assert second.startswith(f"{lora}: ")
    assert done.stderr.startswith("writing: ")
    assert "language_model.lm_head.weight" not in read(base_folder)
    config = json.loads((lora / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 32, True)
    assert config["base_model_name_or_path"] == str(base_folder)
    again = made(*common, "--adapter", lora)
    assert again.returncode == 5
    assert again.stderr == (
        f"error: {lora}: is not empty. Choose a new folder, or remove that one first.\n"
    )


def test_the_list_has_sizes_that_say_something():
    lines = made("--list").stdout.splitlines()
    assert len(lines) == len(PRESETS)
    assert lines[0].split() == ["tiny", "179K", "Qwen2ForCausalLM"]
    sizes = {line.split()[0]: line.split()[1] for line in lines}
    assert (sizes["InternVL3-1B"], sizes["InternVL3-8B"]) == ("938M", "7.94B")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge", "--layout", "hf"], "'huge' is unknown; --list shows all of them."),
        (["--preset", "internvl3-1", "--layout", "hf"], "such as InternVL3-1B and InternVL3"),
        (["--preset", "tiny", "--layout", "custom", "--tied"], "only in the hf layout"),
        (["--preset", "tiny", "--layout", "hf", "--max-shard-size", "5 potatoes"], "not a size"),
        (["--preset", "tiny"], "--layout is missing; or --demo FOLDER, which needs no more."),
        (["--layout", "hf"], "--preset is missing; or --demo FOLDER"),
        (["--preset", "tiny", "--lora", "x"], "there is no option --lora here. Is --adapter meant"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    done = made(*arguments, "--output", tmp_path / "new")
    assert done.returncode == 2
    line = done.stderr.splitlines()[0]
    assert line.startswith("error: ")
    assert message in line
    assert not line.endswith("..")
    assert "Usage" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_demo_is_one_model_in_both_layouts_an_adapter_and_a_training_checkpoint(tmp_path):
    assert made("--demo", tmp_path).returncode == 0
    found = streamshard.diff(tmp_path / "base", tmp_path / "base-hf")
    assert (found["different"], found["missing"], found["unexpected"]) == ([], [], [])
    merged = streamshard.merge_lora(
        base=tmp_path / "base", adapter=tmp_path / "lora", output=tmp_path / "merged"
    )
    trained = streamshard.merge_lora(checkpoint=tmp_path / "trained", output=tmp_path / "folded")
    assert merged["merged"] > 0
    assert trained["merged"] > 0
    assert trained["update"]["effected"] > 0
    again = made("--demo", tmp_path)
    assert again.returncode == 5
    assert "base, base-hf, lora, trained, a demo already. Use that, or choose" in again.stderr


INTERRUPTING = """
import os, signal, sys, time
sys.path.insert(0, {tools!r})
import {module} as module
write = module.{function}
def stop(*of, **how):
    write(*of, **how)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
module.{function} = stop
import make_checkpoint
make_checkpoint.main()
"""


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", ["checkpoint", "demo"])
def test_an_interrupt_leaves_nothing_and_no_traceback(what, there, tmp_path):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
    module, function, arguments = {
        "checkpoint": (
            "make_checkpoint",
            "_write_side_files",
            ["--preset", "tiny", "--layout", "custom", "--output"],
        ),
        "demo": ("demo", "write_adapter", ["--demo"]),
    }[what]
    code = INTERRUPTING.format(tools=str(ROOT / "tools"), module=module, function=function)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.endswith("Interrupted. Nothing was written: run the same command again.\n")
    assert "Traceback" not in done.stderr
    assert folder.exists() == there
    assert not there or not any(folder.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_installed_command_goes_by_its_name(name):
    done = installed(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name}" in done.stdout
    assert f"    {name} " in done.stdout or f"\n  {name} " in done.stdout
    assert "tools/" not in done.stdout
    assert ".py " not in done.stdout.replace("(*.py)", "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    wrong = installed(name, "--frobnicate")
    assert wrong.returncode == 2
    assert wrong.stderr == (f"error: there is no option --frobnicate here.\nTry `{name} --help`.\n")
