"""Small runs of the command line in this process, for the harnesses that let them fail.

A scenario is a command, what lies at its output's place before it, and what a clean run makes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from streamshard import cli  # noqa: E402
from streamshard.commands import merge_lora  # noqa: E402, F401 - loaded before anything may fail
from streamshard.disk.system import System  # noqa: E402
from streamshard.engine.journal import Journal  # noqa: E402
from streamshard.engine.parts import Output  # noqa: E402

__all__ = ["CALLS", "ROOT", "Scenario", "content", "digests", "replaced", "run", "scenarios"]

CALLS = [name for name in vars(System) if not name.startswith("_")]
VARYING = ("seconds", "peak_rss_bytes", "resumed", "record_digest", "date")
LAYER = "language_model.model.layers.0.self_attn"

Content = dict[str, str]


@dataclass(frozen=True)
class Scenario:
    """A command that writes `output`, and what it is to be compared with.

    `before` is copied to the folder around the output first; None if not even that folder is there.
    `then` is a second command that completes the output if the first one is not to.
    """

    name: str
    command: Sequence[str]
    inputs: Path
    output: Path
    before: Path | None
    expected: Content
    old: Content | None
    then: Sequence[str] = ()

    def begin(self) -> None:
        """Put everything at its place as it is before the command."""
        self.end()
        if self.before is not None:
            shutil.copytree(self.before, self.output.parent)

    def end(self) -> None:
        """Remove what there is."""
        shutil.rmtree(self.output.parent, ignore_errors=True)

    def left(self) -> list[str]:
        """What lies beside the output."""
        place = self.output.parent
        return sorted(p.name for p in place.iterdir() if p != self.output) if place.exists() else []


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run the command line; returns the exit code and what it said on stderr."""
    said = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments, sys.argv = sys.argv, ["streamshard", *command]
    code = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = arguments
        logging.captureWarnings(capture=False)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, said.getvalue()


def content(folder: Path) -> Content:
    """Digests of all files in a folder, but for what a report says of the run itself."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return digests({f"{path.relative_to(folder)}": path.read_bytes() for path in paths})


def digests(files: Mapping[str, bytes]) -> Content:
    """Digests of files, but for what a report says of the run itself."""
    return {name: hashlib.sha256(_lasting(name, data)).hexdigest() for name, data in files.items()}


def _lasting(name: str, data: bytes) -> bytes:
    if Path(name).name != "streamshard.json":
        return data
    try:
        report = json.loads(data)
    except ValueError:  # half of it
        return data
    place = report.pop("output")
    report |= dict.fromkeys(VARYING)
    return json.dumps(report).replace(place, "").encode()


@contextlib.contextmanager
def replaced(holder: object, calls: Mapping[str, Any]) -> Any:
    """Put other functions in the place of attributes for a while."""
    own = {name: vars(holder)[name] for name in calls if name in vars(holder)}
    try:
        for name, call in calls.items():
            setattr(holder, name, call)
        yield
    finally:
        for name in calls:
            if name in own:
                setattr(holder, name, own[name])
            else:
                delattr(holder, name)


# --- the scenarios --------------------------------------------------------------------------------


def scenarios(folder: Path, *, workers: int = 1) -> dict[str, Scenario]:
    """A merge, one over an older output, one that was interrupted, one around the cache; a conversion."""
    inputs, place = folder / "inputs", folder / "place"
    base, adapter = _pair(inputs)
    more = ["--quiet", "--workers", str(workers)]
    merge = ["merge-lora", *more, "--sha256", "--base", str(base), "--adapter", str(adapter)]

    def at(output: Path) -> list[str]:
        return [*merge, "--output", str(output)]

    clean = folder / "clean"
    _expect(run(at(clean)))
    expected = content(clean)
    older = folder / "older" / "merged"
    _expect(run([*at(older), "--weight", "0.5"]))
    interrupted = folder / "interrupted"
    with replaced(Journal, {"add": _add_one_and_stop}):
        code, said = run(at(interrupted / "merged"))
    if code != 130 or not (interrupted / ".merged.partial").exists():
        raise RuntimeError(said)
    output = place / "merged"
    found = [
        Scenario("merge-lora", at(output), inputs, output, None, expected, None),
        Scenario(
            "merge-lora --overwrite",
            [*at(output), "--overwrite"],
            inputs,
            output,
            older.parent,
            expected,
            content(older),
        ),
        Scenario("merge-lora, resumed", at(output), inputs, output, interrupted, expected, None),
        Scenario(
            "merge-lora, direct",
            [*at(output), "--io", "direct"],
            inputs,
            output,
            None,
            expected,
            None,
        ),
    ]
    found += _of_parts(at, folder, inputs, output, expected)
    hf, custom = _layouts(folder / "layouts")
    convert = ["hf2custom", *more, "--hf-path", str(hf), "--custom-path", str(custom)]
    clean = folder / "converted"
    _expect(run([*convert, "--save-path", str(clean)]))
    command = [*convert, "--save-path", str(output)]
    found.append(
        Scenario("hf2custom", command, folder / "layouts", output, None, content(clean), None)
    )
    return {scenario.name: scenario for scenario in found}


def _of_parts(
    at: Callable[[Path], list[str]], folder: Path, inputs: Path, output: Path, expected: Content
) -> list[Scenario]:
    """All in one part, one that leaves the rest to another, the last one, and what completes it."""
    half, both = folder / "one part", folder / "both parts"
    _expect(run([*at(half / "merged"), "--part", "1/2"]))
    with replaced(Output, {"is_finished": False}):
        for part in ("1/2", "2/2"):
            _expect(run([*at(both / "merged"), "--part", part]))

    def scenario(name: str, part: str, before: Path | None, then: Sequence[str] = ()) -> Scenario:
        command = [*at(output), "--part", part]
        return Scenario(
            f"merge-lora, {name}", command, inputs, output, before, expected, None, then
        )

    return [
        scenario("all in a part", "1/1", None),
        scenario("one part of two", "1/2", None, [*at(output), "--part", "2/2"]),
        scenario("the last part", "2/2", half),
        scenario("parts completed", "finish", both),
    ]


def _expect(outcome: tuple[int, str]) -> None:
    if outcome[0]:
        raise RuntimeError(outcome[1])


_add = Journal.add


def _add_one_and_stop(journal: Journal, shard: Any) -> None:
    _add(journal, shard)
    raise KeyboardInterrupt


def _pair(folder: Path) -> tuple[Path, Path]:
    """A base of three files with a folder beside them, and an adapter; so small that runs are fast."""
    base, adapter = folder / "base", folder / "adapter"
    (base / "tokenizer").mkdir(parents=True)
    adapter.mkdir()
    kinds = [(f"{LAYER}.q_proj.weight", 96), (f"{LAYER}.k_proj.weight", 130), ("norm.weight", 1)]
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for seed, (name, (tensor, rows)) in enumerate(zip(names, kinds, strict=True)):
        values = np.random.default_rng(seed).normal(0, 0.02, (rows, 40)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        _save(base / name, {tensor: ("BF16", bits)})
    weight_map = {tensor: name for name, (tensor, _) in zip(names, kinds, strict=True)}
    index = {"metadata": {"total_size": 2 * 227 * 40}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "internvl_chat"}')
    (base / "tokenizer" / "vocab.json").write_text("{}")
    factors = {}
    for seed, (tensor, rows) in enumerate(kinds[:2], 10):
        random = np.random.default_rng(seed)
        place = f"base_model.model.{tensor.removesuffix('.weight')}"
        A, B = random.normal(0, 1, (4, 40)), random.normal(0, 0.02, (rows, 4))
        factors[f"{place}.lora_A.weight"] = ("F32", A.astype(np.float32))
        factors[f"{place}.lora_B.weight"] = ("F32", B.astype(np.float32))
    _save(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def _save(file: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
    entries, end = {}, 0
    for name, (dtype, values) in tensors.items():
        begin, end = end, end + values.nbytes
        entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    data = b"".join(values.tobytes() for _, values in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _layouts(folder: Path) -> tuple[Path, Path]:
    """One tiny model in two layouts."""
    folder.mkdir()
    for layout in ("hf", "custom"):
        make = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
        make += ["--layout", layout, "--max-shard-size", "200KB"]
        subprocess.run([*make, "--output", str(folder / layout)], check=True, capture_output=True)
    return folder / "hf", folder / "custom"
