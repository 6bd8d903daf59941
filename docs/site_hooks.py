"""What the pages have from elsewhere, so that no copy is kept by hand.

`python docs/site_hooks.py` writes what is between `<!-- commands -->`, `<!-- exit codes -->` or
`<!-- python NAMES -->` and `<!-- end -->` anew: all commands and options, from click, the table of exit
codes, and names of the package with their signatures and docstrings. They are kept, so that they can be
read in the repository, too; a test compares.

When the site is built, a line that ends in `<!-- file NAME -->` becomes a Markdown file of the
repository, without its title, and one in `<!-- notebook NAME -->` the cells of a notebook.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import Any, is_typeddict

import click

DOCS = Path(__file__).parent
GENERATED = (DOCS / "reference/cli.md", DOCS / "reference/python.md")
MARK = re.compile(r"^.*<!-- (file|notebook) (\S+) -->$", re.MULTILINE)
KEPT = re.compile(
    r"(?<=<!-- )(commands|exit codes|python)((?: \w+)*) -->\n.*?(?=\n<!-- end -->)", re.DOTALL
)
WIDTH = 88
"""Of signatures: a page has no more room."""


def on_page_markdown(markdown: str, **_site: Any) -> str:
    """The page with every line that stands for something replaced; mkdocs calls this for each page."""
    return MARK.sub(lambda found: MADE[found[1]](found[2]), markdown)


def generated(markdown: str) -> str:
    """The page with what is kept in it made anew."""
    return KEPT.sub(
        lambda found: f"{found[1]}{found[2]} -->\n\n{KEPT_OF[found[1]](*found[2].split())}",
        markdown,
    )


def commands() -> str:
    """All commands with their usage, explanation, examples and options."""
    from streamshard.cli.main import cli

    # As wide everywhere, whatever the terminal is.
    context = click.Context(
        cli, info_name="streamshard", **(cli.context_settings | {"terminal_width": 100})
    )
    return "\n".join(
        line
        for name in cli.list_commands(context)
        if (command := cli.get_command(context, name)) is not None and not command.hidden
        for line in _command(name, command, context)
    )


def _command(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    from streamshard.cli.command import GROUPS

    context = click.Context(command, info_name=name, parent=parent)
    yield f"## {name}\n"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        # Click leaves the lines of a paragraph that begins with a backspace as they are.
        if paragraph.lstrip(" \n").startswith("\b"):
            title, *lines = paragraph.replace("\b", "").strip(" \n").split("\n")
            yield f"{title}\n"
            yield "\n".join(["```text", *(line.removeprefix("  ") for line in lines), "```\n"])
        else:
            yield _escaped(" ".join(paragraph.split())) + "\n"
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            group = groups.setdefault(getattr(parameter, "group", GROUPS[-1]), [])
            group.append(f"- `{record[0]}`: {_escaped(' '.join(record[1].split()))}")
    for title, lines in groups.items():
        if not lines:
            continue
        yield f"**{title}**\n"
        yield "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text of a help page as Markdown: options, file names and formulas stay as they are."""
    return re.sub(r"([\\*_<>\[\]`#])", r"\\\1", text)


def exit_codes() -> str:
    """The table of exit codes."""
    from streamshard.cli.command import EXIT_CODES

    rows = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES]
    return "\n".join(["| code | |", "|---:|---|", *rows])


def python(*names: str) -> str:
    """Names of the package: what each is, and its docstring."""
    import streamshard

    return "\n".join(
        f"### {name}\n\n{_described(name, getattr(streamshard, name))}\n" for name in names
    )


def _described(name: str, value: Any) -> str:
    if not callable(value):
        return f"```text\n{name} = {pformat(value, width=WIDTH - len(name) - 3)}\n```"
    text = inspect.cleandoc(value.__doc__ or "")
    if not isinstance(value, type):
        return f"```text\n{_signature(name, value)}\n```\n\n{text}"
    if issubclass(value, Exception):
        kinds = " and ".join(f"`{base.__name__}`" for base in value.__bases__)
        code = f" Exit code {value.exit_code}." if hasattr(value, "exit_code") else ""
        return f"{text}\n\nSubclass of {kinds}.{code}"
    if is_typeddict(value):
        # Those that it explains; others are of what it extends.
        fields = {k: of for k, of in value.__annotations__.items() if f"- `{k}`:" in text}
        types = [f"{field}: {_type(of)}" for field, of in fields.items()]
        return f"{text}\n\n```text\n" + "\n".join(types) + "\n```"
    return text


def _signature(name: str, function: Any) -> str:
    """As its source has it; a parameter a line, if it is long."""
    found = inspect.signature(inspect.unwrap(function))
    kept = [one.replace(annotation=_Text(one.annotation)) for one in found.parameters.values()]
    found = found.replace(parameters=kept, return_annotation=_Text(found.return_annotation))
    whole = f"{name}{found}"
    if len(whole) <= WIDTH:
        return whole
    lines, is_keyword = [], False
    for one in kept:
        if one.kind is one.KEYWORD_ONLY and not is_keyword:
            lines.append("    *,")
            is_keyword = True
        lines.append(f"    {one},")
    return "\n".join([f"{name}(", *lines, f") -> {found.return_annotation!r}"])


class _Text(str):
    """An annotation as it stands in the source, for which `inspect` asks by its `repr`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _type(annotation: Any) -> str:
    """Of a field of a typed dictionary."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def file(name: str) -> str:
    """A Markdown file of the repository; the page has a title of its own."""
    return (DOCS.parent / name).read_text(encoding="utf-8").partition("\n")[2]


def notebook(name: str) -> str:
    """The cells of a notebook: text as it is, code in fences."""
    cells = json.loads((DOCS / name).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    )


MADE = {"file": file, "notebook": notebook}
KEPT_OF = {"commands": commands, "exit codes": exit_codes, "python": python}


if __name__ == "__main__":
    for page in GENERATED:
        page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
