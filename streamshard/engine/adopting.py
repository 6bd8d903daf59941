"""What the parts of an output have finished is taken into the folder in which it is completed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamshard.disk.folders import rename, sync_folder
from streamshard.engine.journal import Elsewhere
from streamshard.engine.parts_cleanup import is_gone
from streamshard.engine.parts_folder import PartsFolder, discard_parts, opened_parts
from streamshard.engine.staging import Staging
from streamshard.errors import OutputError, WriteError

if TYPE_CHECKING:
    from streamshard.engine.parts import Output

__all__ = ["adopting"]


def adopting(output: Output) -> Callable[[Staging], None]:
    """What takes the finished shards of all parts into the folder in which the output is completed."""
    outlet = output.made.outlet

    def take(parts: PartsFolder, staging: Staging) -> None:
        if parts.shared != output.shared:
            raise OutputError.at(parts.folder, "was begun anew by others. Run all parts again.")
        for name, shard in parts.finished.items():
            # Noted before it is there: what is noted and not there is written again, or found here.
            if name not in staging.finished:
                staging.add(shard)
            mark = parts.checked(staging.finished[name])
            if mark is not None:
                staging.checked[name] = mark
            try:
                rename(parts.folder / name, staging.folder / name)
            except WriteError as error:
                if not (output.shared.goes and is_gone(error)):
                    raise
        if outlet is not None:
            noted, known = parts.elsewhere(outlet.key), staging.elsewhere(outlet.key)
            sent = {n: file for n, file in noted.sent.items() if known.sent.get(n) != file}
            staging.add_elsewhere(outlet.key, Elsewhere(known.seen or noted.seen, sent))
        sync_folder(staging.folder)
        sync_folder(parts.folder)

    def adopt(staging: Staging) -> None:
        with opened_parts(output.target) as parts:
            if parts is not None:
                take(parts, staging)
        if not staging.finished.keys() >= {shard.name for shard in output.made.shards}:
            raise OutputError.at(output.target, "was completed or discarded by others just now.")
        discard_parts(output.target, writers=True)

    return adopt
