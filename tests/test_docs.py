"""The documentation says what is so: every example runs, every quoted message is in the code."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from docs_world import (
    DOCS,
    FENCE,
    ROOT,
    Block,
    blocks,
    cells,
    copied,
    environment,
    fill_hub,
    make_folders,
    make_programs,
    pages,
    site_hooks,
)
from fake_hub import Hub
from hangs import HANGS

EXECUTED = ("sh", "python")
README = ROOT / "README.md"
SET_UP = ".venv"  # in the README's first two commands, which the checks run by themselves
KNOWN = {*EXECUTED, "text", "json", "yaml", "toml"}
OTHERS = DOCS / "clusters"  # with tests of its own
NUMBER = r"-?\d+(?:[.,]\d+)*(?:e-?\d+)?"
VARYING = re.compile(rf"(?P<number>{NUMBER})(?P<unit> [KMGT]?B\b)?|(?P<kernel>avx512)|(?P<any>…)")


def own_pages() -> list[Path]:
    """Pages with examples that are executed here."""
    return [
        page
        for page in [README, *pages()]
        if OTHERS not in page.parents and any(one.language in EXECUTED for one in blocks(page))
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_folders(folder)
    return folder


@pytest.fixture(scope="module")
def hub(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), name="your-name") as hub:
        fill_hub(hub, world)
        yield hub


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs") / "bin"
    make_programs(folder)
    return folder


@pytest.mark.parametrize("page", own_pages(), ids=named)
def test_the_examples_run_as_they_are_written(page, world, hub, programs, tmp_path):
    """In the order of the page, each with the output that is shown below it."""
    folder = copied(world, tmp_path / "page")
    env = environment(tmp_path / "home", programs, hub)
    Path(env["HOME"]).mkdir()
    shown = ""
    for block in blocks(page):
        if page == README and SET_UP in block.text:
            continue
        if block.language in EXECUTED:
            command = {
                "sh": ["bash", "-euo", "pipefail", "-c"],
                "python": [sys.executable, "-W", "ignore", "-c"],
            }[block.language]
            done = subprocess.run(
                [*command, block.text],
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=HANGS,
                check=False,
            )
            where = f"{page.relative_to(ROOT)}:{block.line}"
            assert done.returncode == 0, f"{where}\n{block.text}\n{done.stdout}\n{done.stderr}"
            shown = done.stdout
        elif block.language == "text" and shown:
            assert_shown(block, shown, page)
            shown = ""


def assert_shown(block: Block, output: str, page: Path) -> None:
    """Output is as it is shown but for numbers, and for whatever stands at an ellipsis."""
    pattern, at, text = "", 0, block.text.strip()
    for found in VARYING.finditer(text):
        pattern += re.escape(text[at : found.start()])
        pattern += (
            ".*"
            if found["any"]
            else r"\w+"
            if found["kernel"]
            else NUMBER + (r" [KMGT]?B" if found["unit"] else "")
        )
        at = found.end()
    pattern += re.escape(text[at:])
    where = f"{page.relative_to(ROOT)}:{block.line}"
    assert re.fullmatch(pattern, output.strip(), re.DOTALL), f"{where}\n{output}"


def test_output_that_differs_is_noticed():
    block = Block("text", "Merged 3 of …: 1.5 MB, (avx512)\n", 1)
    assert_shown(block, "Merged 21 of a/b: 17 KB, (numpy)\n", DOCS / "x.md")
    for other in ("Merged into a", "Merged 3 of x: 1.5 s, (avx2)", "Merged x of y: 1 B, (avx2)"):
        with pytest.raises(AssertionError):
            assert_shown(block, other, DOCS / "x.md")


def test_the_readme_is_short_and_its_links_lead_somewhere():
    """At most 900 words before the tables."""
    text = README.read_text(encoding="utf-8")
    assert len(text.partition("## Coming from")[0].split()) < 900
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [README, *pages()], ids=named)
def test_all_blocks_are_of_a_kind_that_is_looked_at(page):
    for block in blocks(page):
        assert OTHERS in page.parents or block.language in KNOWN, (page, block.line, block.language)
        if block.language == "json":
            json.loads(block.text)


def texts_of_the_code() -> list[str]:
    """All strings of the package, with `…` for what is put in."""
    found = []
    for file in sorted((ROOT / "streamshard").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [node.value] if id(node) not in described else []
    return found


QUOTED = re.compile(r"^#{3,4} `(.+)`$", re.MULTILINE)


def test_every_message_of_the_page_on_troubleshooting_is_in_the_code():
    """Between its ellipses it stands in one string of the code, in that order."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = QUOTED.findall(page)
    known = [" ".join(text.split()) for text in texts_of_the_code()]
    assert len(messages) > 50
    assert len({*messages}) == len(messages)
    unknown = []
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        if not any(pattern.search(text) for text in known):
            unknown.append(message)
    assert not unknown


def test_a_message_that_is_not_in_the_code_would_be_noticed():
    known = texts_of_the_code()
    assert any("exists. Choose another output" in text for text in known)
    assert not any("exists, so choose another output" in text for text in known)


def test_the_command_reference_has_every_command_and_option():
    from streamshard.cli.main import cli

    page = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    # A command keeps the help option that it makes for the first context: as it is for people.
    context = click.Context(cli, info_name="streamshard", **cli.context_settings)
    for name, command in cli.commands.items():
        own = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert own, name
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(option in own for option in parameter.opts), (name, parameter.opts)


def test_what_is_generated_is_of_this_version():
    """`python docs/site_hooks.py` writes it anew."""
    hooks = site_hooks()
    for page in hooks.GENERATED:
        text = page.read_text(encoding="utf-8")
        assert hooks.generated(text) == text, f"{page.name}: run python docs/site_hooks.py"
        assert hooks.generated(text.replace("0 done", "").replace("| 0 |", "| x |")) == text


def test_pages_that_stand_for_files_lead_there_in_the_repository():
    hooks, found = site_hooks(), 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for mark in hooks.MARK.finditer(text):
            (link,) = re.findall(r"\]\(([^)]+)\)", mark[0])
            assert (page.parent / link).is_file()
            assert link not in hooks.on_page_markdown(text) or link.endswith(".ipynb")
            found += 1
    assert found == 3


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them of its headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [README, *pages()], ids=named)
def test_links_lead_somewhere(page):
    """In the repository as it is, to headings too."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"


def test_the_python_reference_has_every_public_name():
    import streamshard

    page = (DOCS / "reference/python.md").read_text(encoding="utf-8")
    asked = [name for names in re.findall(r"<!-- python (.*) -->", page) for name in names.split()]
    assert {*streamshard.__all__} - {*asked} == {"__version__", "errors"}
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == asked
    for name in asked:
        own = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        value = getattr(streamshard, name)
        if callable(value):
            assert value.__doc__
            assert value.__doc__.split("\n")[0] in own
        if callable(value) and not isinstance(value, type):  # each parameter that the source has
            code = inspect.unwrap(value).__code__
            count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 8)
            assert all(f"{one}: " in own for one in code.co_varnames[:count]), name
            assert f"{name}(" in own


def test_the_page_on_the_record_has_every_key_that_there_is(world, tmp_path):
    """And no other: of a merge, a conversion, a wrapped and an extracted one."""
    import streamshard

    base, run = world / "InternVL3-8B", world / "work_dirs/my-run"
    reports = [
        streamshard.merge_lora(base=base, adapter=world / "my-lora", output=tmp_path / "merged"),
        streamshard.custom_to_hf(
            custom_path=base, hf_path=world / "InternVL3-8B-hf", save_path=tmp_path / "hf"
        ),
        streamshard.wrap_lora(base=base, llm_r=4, output=tmp_path / "wrapped"),
        streamshard.extract_lora(checkpoint=run, base=base, output=tmp_path / "pairs"),
    ]
    keys: set[str] = set()
    for report in reports:
        record = json.loads((Path(report["output"]) / "streamshard.json").read_text())
        keys |= {*record}
    page = (DOCS / "reference/record.md").read_text(encoding="utf-8")
    firsts = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    assert {key for first in firsts for key in re.findall(r"`([^`]+)`", first)} == keys


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell, in an empty folder; what one ends with is shown as text, HTML or a picture."""
    monkeypatch.chdir(tmp_path)
    installed = ModuleType("streamshard_tools")
    installed.__path__ = [str(ROOT / "tools")]
    monkeypatch.setitem(sys.modules, "streamshard_tools", installed)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names: dict[str, object] = {"__name__": "__main__"}
    shown: dict[str, list[object]] = {"text": [], "html": [], "png": []}
    for cell in cells(DOCS / "example.ipynb"):
        tree = ast.parse(cell)
        *before, last = tree.body
        if not isinstance(last, ast.Expr):
            before, last = tree.body, None
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(ast.Module(before, []), "cell", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
                shown["text"].append(repr(value))
                for kind in ("html", "png"):
                    method = getattr(value, f"_repr_{kind}_", None)
                    found = None if method is None else method()
                    shown[kind] += [] if found is None else [found]
    assert sum("<table" in text for text in shown["html"]) >= 3
    if importlib.util.find_spec("matplotlib") is not None:
        (picture,) = shown["png"]
        assert picture.startswith(b"\x89PNG")


def test_the_citation_is_of_this_version():
    import yaml

    import streamshard

    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == streamshard.__version__
    assert {"cff-version", "message", "title", "authors"} <= found.keys()


def test_contributing_has_the_test_command_of_the_readme():
    """In two commands, which are the same words."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = " ".join(readme.replace("\\", " ").split())
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = contributing.partition("```sh\n")[2].partition("```")[0].strip().split("\n")
    assert len(commands) == 2
    assert all(" ".join(command.split()) in words for command in commands)
