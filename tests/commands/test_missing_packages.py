"""C3: packages that are not installed are told with the command that installs them, or not needed.

Each command runs in a process in which some packages cannot be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference

from streamshard.extras import EXTRAS, explained, needed_for

ROOT = Path(__file__).parents[2]

BLOCK = """
import sys
for name in {names}:
    sys.modules[name] = None
sys.argv = ["streamshard", *{arguments}]
"""
COMMAND = "from streamshard.__main__ import main; main()"


def run(blocked: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(names=blocked, arguments=[*map(str, arguments)]) + COMMAND
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def told(done: subprocess.CompletedProcess[str], command: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"pip install {command}" in done.stderr
    assert done.stdout == ""


NOT_NEEDED = ["torch", "huggingface_hub", "peft", "transformers", "tqdm", "psutil"]


def test_c3_merging_converting_and_reading_need_none_of_these(pair):
    for line in (
        [*pair.command],
        ["verify", pair.output],
        ["diff", pair.base, pair.output],
        ["inspect", pair.output],
        ["inspect", pair.adapter],
        [*pair.command[:-1], pair.root / "dry", "--dry-run"],
        ["--help"],
        ["--version"],
    ):
        done = run(NOT_NEEDED, *line)
        assert done.returncode == 0, done.stderr
        assert not any(word in done.stderr for word in ("error", "warning", "Traceback"))
    assert json.loads((pair.output / "streamshard.json").read_text())["merged"] == 2


def test_c3_cutting_anew_says_what_it_needs(pair):
    done = run(["huggingface_hub"], *pair.command, "--max-shard-size", "5KB")
    told(done, "huggingface_hub")
    assert not pair.output.exists()


@pytest.mark.parametrize("package", ["numpy", "xxhash", "click"])
def test_c3_what_everybody_needs_is_told_too(package, pair):
    told(run([package], *pair.command), package)
    assert not pair.output.exists()


def test_c3_headers_of_other_writers_need_the_official_parser(pair):
    file = next(iter(sorted(pair.base.glob("*.safetensors"))))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + length])).encode()  # with a space after each colon
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    told(run(["safetensors"], *pair.command), "safetensors")
    assert not pair.output.exists()


def test_c3_a_pickled_adapter_is_read_without_torch(pair):
    content = reference.load_file(pair.adapter / "adapter_model.safetensors")
    reference.torch.save(content, pair.adapter / "adapter_model.bin")
    (pair.adapter / "adapter_model.safetensors").unlink()
    for line in ([*pair.command], ["inspect", pair.adapter], ["verify", pair.adapter]):
        done = run(["torch"], *line)
        assert done.returncode == 0, done.stderr


def test_c3_a_live_model_says_what_it_needs():
    code = BLOCK.format(names=["peft"], arguments=[]) + (
        "import streamshard\n"
        "from types import SimpleNamespace as S\n"
        "llm = S(config=None, named_parameters=dict)\n"
        "model = S(language_model=llm, llm_arch_name='Qwen2ForCausalLM')\n"
        "try:\n"
        "    streamshard.wrap_llm_lora(model)\n"
        "except streamshard.StreamshardError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "needs peft" in done.stdout
    assert "pip install 'peft>=" in done.stdout


def test_c3_a_bar_says_what_it_needs(pair):
    code = BLOCK.format(names=["tqdm", "tqdm.auto"], arguments=[]) + (
        "import streamshard\n"
        "try:\n"
        f"    streamshard.diff({str(pair.base)!r}, {str(pair.base)!r}, progress=True)\n"
        "except streamshard.StreamshardError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "progress=True needs tqdm" in done.stdout
    assert "pip install tqdm" in done.stdout


def test_what_is_missing_is_explained():
    said = str(explained(ModuleNotFoundError(name="torch.nn")))
    assert "pip install 'torch>=" in said
    assert "http" not in said
    broken = ImportError("libfoo.so: cannot open", name="torch")
    assert "libfoo.so" in str(explained(broken))
    assert explained(ImportError(name="tensorflow")) is None
    assert explained(ImportError()) is None
    with pytest.raises(ImportError, match="elsewhere"), needed_for("this"):
        raise ImportError("elsewhere", name="tensorflow")


def test_extras_are_those_that_can_be_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for name in EXTRAS:
        assert f'"{name}>=' in section
    always = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    assert "huggingface_hub" in always
    assert "torch" not in always
