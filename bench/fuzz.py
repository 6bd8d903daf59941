"""Mutated safetensors headers against our parser and the official one.

    python bench/fuzz.py --count 100000 --seed 0

Each file is judged three times: by our parser alone, by `read_header` (ours, then the official one),
and by `safetensors.safe_open`. It is a violation if ours raises anything but its own errors, needs
more than a second of the processor or 200 MB (of the whole process), or takes a file that the
official parser refuses or reads differently. Exits with 1 on any violation; the same seed gives the
same files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_SECONDS = 1.0
MAX_BYTES = 200_000_000
LARGEST = 99_999_000  # just below what the format allows

DTYPES = {"BOOL": 8, "U8": 8, "F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "BF16": 16, "F32": 32, "I64": 64}
NAMES = ["", "a", "b", "model.layers.0.q_proj.weight", "ä", "😀", "\n", '"\\', "../x", "\x00", "}{"]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, 10**400, 0.0, -0.0, 2.0, 1e300, "", "0", "F32", "f32", "F31", "BF16", "__metadata__",
    [], [0], [2], [0, 8], [0, 8, 8], [[2]], {}, {"a": "b"}, {"dtype": "F32"},
]  # fmt: skip
# What is put into the text of a header, as bytes.
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\t", b"\r", b"\x0b", b"\x00",
    b"\x1f", b"\x7f", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf",
    b"\xc2\xa0", b"\xe2\x80\xa8", b"NaN", b"Infinity", b"-Infinity", b"null", b"true", b"-", b"+",
    b"-0", b"0", b"00", b"1e1", b"1E400", b"1.0", b".5", b"0x1", b"1_0", b"/**/", b"//", b"'",
    b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\\ud83d\\ude00", b"\\u00e4", b"\\u", b"\\x41",
    b"\\/", b'"a":', b'"a":1,', b'"__metadata__":{},', b'"__metadata__":{"a":"b"},',
    b'"dtype":"F32",', b'"shape":[2],', b'"data_offsets":[0,8],', b"9" * 30, b"9" * 5000,
    b"[" * 2000, b'{"a":' * 2000,
]  # fmt: skip


def valid(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A valid header, and the bytes of data that it describes."""
    header: dict[str, Any] = {}
    if rng.random() < 0.5:
        header["__metadata__"] = {
            rng.choice(NAMES): rng.choice(NAMES) for _ in range(rng.randrange(3))
        }
    end = 0
    for name in rng.sample(NAMES, rng.randrange(5)):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
        bits = DTYPES[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    return header, end


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _change_value(rng: random.Random, header: dict[str, Any]) -> None:
    places = list(_places(header))
    if not places:
        return
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0:
        holder[key] = json.loads(json.dumps(rng.choice(ODD)))
    elif how == 1 and type(holder[key]) is int:
        holder[key] += rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])
    elif how == 2:
        del holder[key]
    elif how == 3 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice([*NAMES, "dtype", "extra"])] = json.loads(json.dumps(rng.choice(ODD)))
    else:
        holder.append(json.loads(json.dumps(rng.choice(ODD))))


def _change_text(rng: random.Random, text: bytearray) -> None:
    at = rng.randrange(len(text) + 1)
    how = rng.randrange(6)
    if how == 0 and text:
        text[at % len(text)] ^= 1 << rng.randrange(8)
    elif how == 1:
        text[at:at] = rng.choice(TOKENS)
    elif how == 2:
        token = rng.choice(TOKENS)
        text[at : at + len(token)] = token
    elif how == 3:
        del text[at : at + rng.randrange(1, 9)]
    elif how == 4:
        part = text[at : at + rng.randrange(1, 60)]
        to = rng.randrange(len(text) + 1)
        text[to:to] = part
    else:
        text[at : at + 1] = rng.randbytes(rng.randrange(3))


def _large(rng: random.Random, largest: int) -> tuple[bytes, int]:
    """A header of many megabytes that repeats something."""
    nbytes = largest // rng.choice([1, 10, 100])
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    before, part, after = rng.choice(
        [
            (b"{", b'"a":%s,' % entry, b'"b":%s}' % entry),
            (b'{"a":%s' % entry, b" ", b"}"),
            (b'{"a":%s}' % entry, b" ", b""),
            (b'{"a":', b"[", b"]}"),
            (b'{"a":[', b"[],", b"0]}"),
            (b'{"a":{"shape":[', b"1,", b"0]}}"),
            (b'{"a":{"shape":[', b"9", b"]}}"),
            (b'{"', b"a", b'":%s}' % entry),
            (b'{"', "😀".encode(), b'":%s}' % entry),
            (b'{"', b"\\n", b'":%s}' % entry),
            (b'{"', b"\\\\", b'":%s}' % entry),
            (b'{"__metadata__":{"a":"', b"\\n", b'"}}'),
            (b'{"__metadata__":{', b'"":"",', b'"a":"b"}}'),
            (b'{"__metadata__":', b'{"a":', b"}"),
            (b'{"__metadata__":{"a":"', "ä".encode(), b'"}}'),
            (b"", b"{", b""),
            (b"{", b'"', b"}"),
            (b'{"a', b"\xff", b'"}'),
        ]
    )
    if before == b"{" and part.startswith(b'"a":') and rng.random() < 0.5:  # names that differ
        names = range(nbytes // 60)
        return b"{%s}" % b",".join(b'"%d":%s' % (number, entry) for number in names), 0
    return before + part * (nbytes // len(part)) + after, 0


def mutant(seed: int, number: int, large: float, largest: int = LARGEST) -> bytes:
    """The file of this number; `large` is the share of headers of up to `largest` bytes."""
    rng = random.Random(f"{seed}-{number}")
    if rng.random() < large:
        made, end = _large(rng, largest)
        text = bytearray(made)
    else:
        header, end = valid(rng)
        for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
            _change_value(rng, header)
        spaced = rng.random() < 0.3
        text = bytearray(
            json.dumps(
                header,
                ensure_ascii=rng.random() < 0.5,
                separators=None if spaced else (",", ":"),
                indent=1 if spaced and rng.random() < 0.3 else None,
            ).encode("utf-8", "surrogatepass")
        )
        text += b" " * rng.choice([0, 0, -len(text) % 8, 3])
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
            _change_text(rng, text)
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice(
            [length - 1, length + 1, length + end, 0, 10**8, 10**8 + 1, 2**63, 2**64 - 1, 2**64 - 8]
        )
    content = struct.pack("<Q", max(length, 0)) + bytes(text) + bytes(end)
    if rng.random() < 0.1:
        content = rng.choice(
            [
                content + b"\0",
                content[:-1],
                content[: rng.randrange(len(content) + 1)],
                content + content,
            ]
        )
    return content


def ours(path: Path) -> dict[str, Any]:
    """What our parser alone and `read_header` say of a file, and what that took."""
    from streamshard.checkpoint import header as header_module
    from streamshard.errors import InputError, ReadError

    parsers: dict[str, Callable[[], header_module.Header]] = {
        "our parser alone": lambda: header_module.parse_header(
            path, *header_module.header_text(path)
        ),
        "read_header": lambda: header_module.read_header(path),
    }
    found: dict[str, Any] = {}
    problems: list[str] = []
    longest = 0.0
    forget_peak()
    for name, parse in parsers.items():
        started = time.process_time()
        try:
            header = parse()
            found[name] = _content(header.tensors, header.metadata)
            del header
        except (InputError, ReadError) as error:
            if not str(error).isprintable() or len(str(error)) > 2000:
                problems.append(f"{name}: the message is not printable")
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        longest = max(longest, time.process_time() - started)
    if longest > MAX_SECONDS:
        problems.append(f"{longest:.1f} s")
    if peak_rss() > MAX_BYTES:
        problems.append(f"{peak_rss():,} bytes resident")
    return {"found": found, "problems": problems, "seconds": longest, "peak": peak_rss()}


def official(path: Path) -> str | None:
    """What the official parser says of a file; None if it refuses it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            names = list(opened.keys())
            if len(names) > 100_000:
                return "too many to look at"
            slices = {name: opened.get_slice(name) for name in names}
            return _content(slices, opened.metadata() or {})
    except (SafetensorError, OSError):
        return None


def _content(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """A digest of what a header says, the same for both parsers."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = tensor.dtype if hasattr(tensor, "dtype") else tensor.get_dtype()
        shape = tensor.shape if hasattr(tensor, "shape") else tensor.get_shape()
        digest.update(repr((name, dtype, list(shape))).encode())
    return digest.hexdigest()


def judged(mine: Mapping[str, Any], theirs: str | None) -> tuple[str, list[str]]:
    """Who takes a file ("both", "neither", "theirs" or "ours"), and what is wrong."""
    problems = list(mine["problems"])
    for name, found in mine["found"].items():
        if theirs is None:
            problems.append(f"{name}: takes what safetensors refuses")
        elif found != theirs:
            problems.append(f"{name}: reads something else than safetensors")
    if mine["found"]:
        return "ours" if theirs is None else "both", problems
    return "neither" if theirs is None else "theirs", problems


def peak_rss() -> int:
    """The most bytes that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent had before exec
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let `peak_rss` count from now on, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(who: str, path: Path) -> None:
    """Judge the file at `path` whenever a line comes in; each answer is a line of JSON."""
    judge = {"ours": ours, "official": official}[who]
    for _ in sys.stdin:
        print(json.dumps(judge(path)), flush=True)


class Judge:
    """A process that judges one file after the other: what one parser uses is not the other's."""

    def __init__(self, who: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", who, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def begin(self) -> None:
        """Ask."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def answer(self) -> Any:
        """Wait for the answer; raises `ValueError` if the process died."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def run(
    count: int, seed: int, large: float, largest: int = LARGEST, *, verbose: bool = True
) -> dict[str, Any]:
    """Judge `count` files; the result has the violations."""
    counts: Counter[str] = Counter()
    violations: list[str] = []
    slowest = 0.0
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        judges = [Judge(who, path) for who in ("ours", "official")]
        for number in range(count):
            path.write_bytes(mutant(seed, number, large, largest))
            for judge in judges:
                judge.begin()
            try:
                mine, theirs = (judge.answer() for judge in judges)
            except ValueError:
                violations.append(f"file {number}: a process died")
                break
            kind, problems = judged(mine, theirs)
            counts[kind] += 1
            slowest, peak = max(slowest, mine["seconds"]), max(peak, mine["peak"])
            violations += [f"file {number}: {problem}" for problem in problems]
            if verbose and (number + 1) % 10_000 == 0:
                print(f"{number + 1:,} files, {len(violations)} violations", file=sys.stderr)
        for judge in judges:
            judge.close()
    return {
        "files": sum(counts.values()),
        "seed": seed,
        "both accept": counts["both"],
        "both refuse": counts["neither"],
        "only we refuse": counts["theirs"],
        "only they refuse": counts["ours"],
        "slowest seconds": round(slowest, 3),
        "peak bytes resident": peak,
        "violations": violations,
    }


def main() -> None:
    """Parse arguments, run, print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=float, default=0.001, help="share of headers of many MB")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve[0], Path(options.serve[1]))
        return
    result = run(options.count, options.seed, options.large)
    print(json.dumps(result | {"violations": result["violations"][:50]}, indent=2))
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
