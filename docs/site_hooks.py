"""What the pages have from elsewhere, so that no copy is kept by hand.

`python docs/site_hooks.py` writes what is between `<!-- commands -->` or `<!-- exit codes -->` and
`<!-- end -->` anew: all commands and options, from click, and the table of exit codes. They are kept, so
that they can be read in the repository, too; a test compares.

When the site is built, a line that ends in `<!-- file NAME -->` becomes a Markdown file of the
repository, without its title, and one in `<!-- notebook NAME -->` the cells of a notebook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

DOCS = Path(__file__).parent
GENERATED = (DOCS / "reference/cli.md",)
MARK = re.compile(r"^.*<!-- (file|notebook) (\S+) -->$", re.MULTILINE)
KEPT = re.compile(r"(?<=<!-- )(commands|exit codes) -->\n.*?(?=\n<!-- end -->)", re.DOTALL)


def on_page_markdown(markdown: str, **_site: Any) -> str:
    """The page with every line that stands for something replaced; mkdocs calls this for each page."""
    return MARK.sub(lambda found: MADE[found[1]](found[2]), markdown)


def generated(markdown: str) -> str:
    """The page with what is kept in it made anew."""
    return KEPT.sub(lambda found: f"{found[1]} -->\n\n{KEPT_OF[found[1]]()}", markdown)


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
KEPT_OF = {"commands": commands, "exit codes": exit_codes}


if __name__ == "__main__":
    for page in GENERATED:
        page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
