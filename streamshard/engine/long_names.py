"""Names beside other names, also where these are as long as a disk takes."""

from __future__ import annotations

import os

from streamshard.checkpoint.digests import new_digest

__all__ = ["beside", "part_name"]


LONGEST_NBYTES = 255


def beside(prefix: str, name: str, suffix: str) -> str:
    """`name` with something before and after it; if that is too long, its digest in place of its end."""
    whole = f"{prefix}{name}{suffix}"
    if len(os.fsencode(whole)) <= LONGEST_NBYTES:
        return whole
    digest = new_digest()
    digest.update(os.fsencode(name))
    suffix = f"-{digest.hexdigest()}{suffix}"
    room = LONGEST_NBYTES - len(os.fsencode(prefix + suffix))
    begin = os.fsencode(name)[:room].decode(errors="ignore")  # no half characters
    return f"{prefix}{begin}{suffix}"


def part_name(name: str) -> str:
    """What a weight file is called while it is being written."""
    return beside("", name, ".part")
