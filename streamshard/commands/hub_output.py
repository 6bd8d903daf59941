"""An output that goes to the hub: the options that say so, as the store that the engine knows.

Where no folder is given the output is built in a hidden one, beside which nothing else has its name, and
does not stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamshard.checkpoint.hub_ids import hub_id
from streamshard.errors import UsageError, printable

__all__ = ["hub_output"]

_OUTPUTS = {
    "merge_lora": "output",
    "hf_to_custom": "save_path",
    "custom_to_hf": "save_path",
    "wrap_lora": "output",
    "extract_lora": "output",
}
"""What names the output, of each command."""
_HAS_DEFAULT = {"merge_lora"}


def hub_output(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command with an `outlet`, and a folder to build in, in place of the hub's.

    Raises `UsageError` for values that do not go together, and if there is no place for the output.
    """
    plain = dict(given)
    if command not in _OUTPUTS:
        return plain
    where, output = plain.pop("push_to", None), plain.get(_OUTPUTS[command])
    private, message = bool(plain.pop("private", False)), plain.pop("commit_message", None)
    if where is None:
        for name, value in (("private", private), ("commit-message", message)):
            if value:
                raise UsageError(
                    f"--{name} is for what goes to the hub; give --push-to ORG/NAME too."
                )
        if output is None and command not in _HAS_DEFAULT:
            option = _OUTPUTS[command].replace("_", "-")
            raise UsageError(f"--{option} is missing: a folder to write, or --push-to ORG/NAME.")
        return plain
    repo = _repository(where)
    if plain.get("offline"):
        raise UsageError(
            "--offline has the hub asked nothing, and --push-to sends to it; leave one of them out."
        )
    if message is not None and (not isinstance(message, str) or not message.strip()):
        raise UsageError(
            f"--commit-message is {printable(repr(message), 60)}; words were expected."
        )
    from streamshard.checkpoint.hub_push import HubPush

    plain["outlet"] = HubPush(repo, private, message, keeps=output is not None)
    if output is None:
        plain[_OUTPUTS[command]] = repo.replace("/", "--")
    return plain


def _repository(text: object) -> str:
    """The repository that is meant."""
    found = hub_id(text, only=True) if isinstance(text, str) else None
    if found is None or found.inside or found.revision is not None:
        raise UsageError(
            f"--push-to is {printable(repr(text), 120)}; a model on the hub it is: ORG/NAME. What is "
            "pushed goes to its main branch."
        )
    return found.repo
