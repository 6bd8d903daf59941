"""Completion by the shell: what click prints for it, and what it answers, with the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def asked(instruction: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamshard"],
        env=os.environ | env | {"_STREAMSHARD_COMPLETE": instruction},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell):
    done = asked(f"{shell}_source")
    assert done.returncode == 0, done.stderr
    assert f"_STREAMSHARD_COMPLETE={shell}_complete" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("streamshard mer", "merge-lora"),
        ("streamshard merge-lora --bas", "--base-is-residual"),
        ("streamshard merge-lora --layout c", "custom"),
        ("streamshard merge-lora --dtype b", "bf16"),
        ("streamshard merge-lora --io d", "direct"),
        ("streamshard merge-lora --part f", "finish"),
    ],
)
def test_what_is_completed(words, expected):
    count = str(len(words.split()) - 1)
    done = asked("bash_complete", COMP_WORDS=words, COMP_CWORD=count)
    assert done.returncode == 0, done.stderr
    assert f"plain,{expected}" in done.stdout.splitlines()


def test_what_no_shell_asks_is_exit_code_1():
    done = asked("bash_guess")
    assert done.returncode == 1
    assert "bug" not in done.stderr
