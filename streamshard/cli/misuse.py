"""What was typed wrongly: unknown options and commands, what is missing, what is too many.

Each message says what is meant, as far as that can be told, and what to type next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import click

__all__ = [
    "explained_misuse",
    "given_twice",
    "missing",
    "too_many",
    "unknown_command",
    "unknown_option",
]


# What other tools call the like.
_OPTIONS = {
    "--adapter": (
        "--lora",
        "--lora-path",
        "--adapter-path",
        "--adapters",
        "--peft",
        "--lora-model",
    ),
    "--base": ("--model", "--base-model", "--model-path", "--model-name-or-path", "--base-path"),
    "--output": (
        "--out",
        "--save",
        "--output-dir",
        "--out-dir",
        "--save-dir",
        "--output-path",
        "--to",
    ),
    "--reference": ("--original", "--reference-path", "--config"),
    "--hf-path": ("--hf", "--input", "--input-path", "--source"),
    "--custom-path": ("--custom", "--input", "--input-path", "--source"),
    "--dtype": ("--torch-dtype", "--precision", "--type"),
    "--weight": ("--scale", "--weights", "--factor"),
    "--llm-r": ("--r", "--rank", "--lora-r"),
    "--workers": ("--threads", "--jobs", "--num-workers", "-j"),
    "--overwrite": ("--force", "-f"),
    "--dry-run": ("--plan", "-n"),
    "--push-to": ("--push", "--push-to-hub", "--upload"),
}
_COMMANDS = {
    "merge-lora": ("merge", "export", "fold", "merge-peft", "lora"),
    "hf2custom": ("convert", "hf-to-custom", "internvl-hf2custom"),
    "custom2hf": ("convert", "custom-to-hf", "internvl-custom2hf"),
    "wrap-lora": ("wrap", "inject"),
    "extract-lora": ("extract", "unwrap"),
    "diff": ("compare",),
    "inspect": ("info", "show", "ls"),
    "verify": ("check", "validate"),
    "env": ("version", "environment", "doctor"),
}


def unknown_option(
    name: str, context: click.Context, arguments: Collection[str] = ()
) -> click.UsageError:
    """The error of an option that a command does not have; `arguments` are all that was typed."""
    name = name.replace("_", "-")
    command = context.command
    own = _options(command, context)
    meant = [option for option, others in _OPTIONS.items() if name in others and option in own]
    message = f"there is no option {name} here."
    if meant or (meant := _like(name, own)):
        message += f" Is {' or '.join(meant)} meant?"
    elif isinstance(command, click.Group) and (
        having := [one for one, of in command.commands.items() if name in _options(of, context)]
    ):
        typed = next((one for one in arguments if one in having), having[0])
        message += f" It goes behind the command: `{context.command_path} {typed} … {name}`."
    return click.UsageError(message, context)


def unknown_command(name: str, context: click.Context, known: Collection[str]) -> click.UsageError:
    """The error of a command that there is not."""
    plain = name.lower().replace("_", "-")
    meant = [command for command, others in _COMMANDS.items() if plain in others]
    meant = meant or _like(plain, known)
    then = f"Is {' or '.join(meant)} meant?" if meant else f"There are: {', '.join(known)}."
    return click.UsageError(f"there is no command {name!r}. {then}", context)


def missing(parameters: Collection[click.Parameter], context: click.Context) -> click.UsageError:
    """The error of a command that was given less than it needs: all of it, not only the first."""
    wanted = [
        parameter.make_metavar(context)
        if isinstance(parameter, click.Argument)
        else f"{parameter.opts[0]} {parameter.make_metavar(context)}"
        for parameter in parameters
    ]
    verb = "is" if len(wanted) == 1 else "are"
    every = " and ".join([*filter(None, [", ".join(wanted[:-1])]), wanted[-1]])
    return click.UsageError(f"{every} {verb} missing.", context)


def given_twice(
    arguments: Collection[str], command: click.Command, context: click.Context
) -> click.UsageError | None:
    """The error of an option that is given under two of its names, of which one would be ignored."""
    given = {one.partition("=")[0].replace("_", "-") for one in arguments if one[:1] == "-"}
    for parameter in command.get_params(context):
        names = [name for name in parameter.opts if name in given]
        if len(names) > 1 and isinstance(parameter, click.Option) and not parameter.is_flag:
            return click.UsageError(f"{' and '.join(names)} are the same: give one.", context)
    return None


def too_many(arguments: list[str], context: click.Context) -> click.UsageError:
    """The error of arguments that a command has no place for."""
    places = [
        parameter.make_metavar(context)
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Argument)
    ]
    takes = f"takes {' and '.join(places)} and no more" if places else "takes options only"
    repeated = (
        " To give several adapters, write --adapter before each."
        if "--adapter" in _options(context.command, context)
        else ""
    )
    return click.UsageError(
        f"too many arguments: {', '.join(map(repr, arguments))}. {context.info_name} {takes}; an option "
        f"has one value, and a path with spaces needs quotes.{repeated}",
        context,
    )


def explained_misuse(error: click.ClickException) -> tuple[str, str]:
    """An error of click's as a message of ours, and the text for people, with where to read on."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing typed: this is the help itself
        return message, message
    if message[1:2].islower():  # a sentence of click's
        message = message[0].lower() + message[1:]
    context = error.ctx if isinstance(error, click.UsageError) else None
    then = "" if context is None else f"\nTry `{context.command_path} --help`."
    return message, f"error: {message}{then}"


def _options(command: click.Command, context: click.Context) -> Mapping[str, click.Parameter]:
    """The options of a command by their long names."""
    return {
        name: parameter
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in parameter.opts
        if name.startswith("--")
    }


def _like(name: str, known: Collection[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=2, cutoff=0.75)
