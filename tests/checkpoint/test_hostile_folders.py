"""Hostile folders: any JSON anywhere, links, pipes, bombs, and names that would move the cursor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from folders import make
from hangs import HANGS
from hostile_json import anything, only_our_errors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import INDEX, save_file, save_index
from shards_of_pair import SECOND, weight_map

from streamshard import diff, hf_to_custom, inspect, merge_lora
from streamshard.checkpoint.folder import open_checkpoint

# --- any JSON value anywhere ----------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    found = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    for _, key in list(found):
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


@contextmanager
def altered(file: Path, data: st.DataObject, more: tuple[str, ...] = ()) -> Iterator[None]:
    """The file with one to three values replaced, added or removed; afterwards as it was."""
    before = file.read_bytes()
    content = json.loads(before)
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places(content)))
        if isinstance(holder, list):
            holder[key] = data.draw(anything)
        elif data.draw(st.booleans()):
            name = data.draw(st.sampled_from([*holder, *more]))
            holder[name] = data.draw(anything)
        else:
            del holder[key]
        if not places(content):
            break
    file.write_text(json.dumps(content))
    try:
        yield
    finally:
        file.write_bytes(before)


FIELDS = (
    "num_experts", "num_local_experts", "head_dim", "mlp_only_layers", "decoder_sparse_step",
    "attention_bias", "qkv_bias", "bias", "mlp_bias", "rope_scaling", "rope_parameters", "dtype",
    "torch_dtype", "quantization_config", "use_llm_lora", "ps_version", "tie_word_embeddings",
    "image_token_id", "vocab_size", "auto_map", "architectures", "model_type", "llm_config",
    "text_config", "vision_config", "num_key_value_heads", "norm_type", "rope_theta",
)  # fmt: skip
ADAPTER_FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "modules_to_save", "target_modules", "target_parameters", "trainable_token_indices",
    "init_lora_weights", "peft_version", "peft_type", "fan_in_fan_out", "lora_bias",
    "layers_to_transform", "exclude_modules", "ensure_weight_tying", "layer_replication",
)  # fmt: skip

of_files = settings(
    max_examples=80,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in both layouts."""
    root = tmp_path_factory.mktemp("models")
    made = {layout: make(root / layout, "tiny-qwen2", layout) for layout in ("custom", "hf")}
    return {**made, "root": root}


@of_files
@given(data=st.data())
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_any_config(layout, data, models):
    with altered(models[layout] / "config.json", data, FIELDS):
        only_our_errors(
            hf_to_custom,
            hf_path=models["hf"],
            custom_path=models["custom"],
            save_path=models["root"] / "out",
            dry_run=True,
            tokenizer_from=data.draw(st.sampled_from([None, "source", "reference"])),
        )
        only_our_errors(inspect, models[layout])
        only_our_errors(diff, models["custom"], models["hf"])


@of_files
@given(data=st.data())
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_tokenizer(file, data, models):
    from streamshard import custom_to_hf

    found = models["custom"] / file
    if not found.exists():
        pytest.skip("the model has no such file")
    others = [f for f in ("added_tokens.json", "tokenizer_config.json") if f != file]
    hidden = [models["custom"] / f for f in others if (models["custom"] / f).exists()]
    for other in hidden:
        other.rename(other.with_suffix(".hidden"))
    try:
        with altered(found, data):
            only_our_errors(
                custom_to_hf,
                custom_path=models["custom"],
                hf_path=models["hf"],
                save_path=models["root"] / "out",
                dry_run=True,
                tokenizer_from="source",
            )
    finally:
        for other in hidden:
            other.with_suffix(".hidden").rename(other)


@of_files
@given(data=st.data())
def test_any_adapter_config(data, pair):
    with altered(pair.adapter / "adapter_config.json", data, ADAPTER_FIELDS):
        only_our_errors(
            merge_lora, base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
        )
        only_our_errors(inspect, pair.adapter)


@of_files
@given(data=st.data())
def test_any_index(data, pair):
    with altered(pair.base / INDEX, data, ("weight_map", "metadata", "more")):
        only_our_errors(open_checkpoint, pair.base)
        only_our_errors(
            merge_lora, base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
        )


@of_files
@given(content=st.one_of(st.binary(max_size=30), anything.map(lambda v: json.dumps(v).encode())))
@example(content=b"")
@example(content=b"\xef\xbb\xbf{}")
@example(content=b"{}\0")
@example(content=b'{"a": -1e999}')
def test_any_bytes(content, pair):
    for file in (
        pair.base / INDEX,
        pair.base / "config.json",
        pair.adapter / "adapter_config.json",
    ):
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        only_our_errors(
            merge_lora, base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
        )
        file.unlink() if before is None else file.write_bytes(before)


# --- what is no regular file ----------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may not be long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": pipe,
    "socket": listening,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "to-nothing": lambda path: path.symlink_to("nothing"),
    "to-itself-through-a-folder": lambda path: path.symlink_to(
        Path("..", path.parent.name, path.name)
    ),
}
FILES = [
    f"base/{INDEX}",
    f"base/{SECOND}",
    "base/config.json",
    "base/tokenizer_config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


@pytest.fixture
def _no_hanging() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_no_hanging")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(kind, file, pair, cli):
    path = pair.root / file
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    outcome = cli(*pair.command)
    if kind == "folder" and file == "base/tokenizer_config.json":
        assert outcome.code == 0  # an empty folder that is carried along, as any other
        return
    assert outcome.code == 3, outcome.err
    assert path.name in outcome.err
    assert "Traceback" not in outcome.err
    assert list(pair.output.parent.iterdir()) == []


@pytest.mark.usefixtures("_no_hanging")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_no_file(kind, pair, cli):
    path = pair.root / "x.safetensors"
    KINDS[kind](path)
    outcome = cli("inspect", path)
    assert outcome.code in (3, 7)
    assert "x.safetensors" in outcome.err


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "deep/notes.txt"])
def test_links_to_what_lies_elsewhere_are_not_carried(name, pair, refused):
    """Else a folder from someone could make us publish a private key."""
    secret = pair.root / "secret"
    secret.write_text("{}")
    (pair.base / name).parent.mkdir(exist_ok=True)
    (pair.base / name).unlink(missing_ok=True)
    (pair.base / name).symlink_to(secret)
    refused(3, name, str(secret), "cp -L")


def test_links_within_the_folder_and_to_weights_elsewhere_are_followed(pair, cli):
    (pair.base / "notes.txt").write_text("notes")
    (pair.base / "README.md").symlink_to("notes.txt")
    (pair.base / SECOND).rename(pair.root / "weights")
    (pair.base / SECOND).symlink_to(pair.root / "weights")
    outcome = cli(*pair.command, "--card", "base")
    assert outcome.code == 0, outcome.err
    for name in ("README.md", SECOND):
        assert (pair.output / name).is_file()
        assert not (pair.output / name).is_symlink()
    assert (pair.output / "README.md").read_text() == "notes"


@pytest.mark.parametrize("in_cache", [True, False])
def test_links_of_the_hub(in_cache, pair, cli):
    """A snapshot of the hub's cache, or a folder that hf download once filled with links to it."""
    cache = pair.root / "hub" / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    pair.base.rename(cache / "files")
    (cache / "blobs").mkdir()
    folder = cache / "snapshots" / "0123abc" if in_cache else pair.base
    folder.mkdir()
    for number, file in enumerate(sorted((cache / "files").iterdir())):
        file.rename(cache / "blobs" / f"{number:064x}")
        blob = Path("..", "..", "blobs") if in_cache else cache / "blobs"
        (folder / file.name).symlink_to(blob / f"{number:064x}")
    command = [str(folder) if part == str(pair.base) else part for part in pair.command]
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert not any(path.is_symlink() for path in pair.output.rglob("*"))
    assert (pair.output / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", ["x" * 300, "..", "CON/x", "a\u2028b", "x.safetensors\n"])
def test_odd_file_names_in_the_index(name, pair, refused):
    names = {
        k: f"{name}.safetensors" if v == SECOND else v for k, v in weight_map(pair.base).items()
    }
    save_index(pair.base, names)
    said = refused(3, INDEX)
    assert said.rstrip("\n").isprintable()


def test_two_names_of_one_file(pair, refused):
    """Each tensor must have one place, also where a link makes two names of it."""
    (pair.base / "twin.safetensors").symlink_to(SECOND)
    name = next(k for k, v in weight_map(pair.base).items() if v == SECOND)
    save_index(pair.base, weight_map(pair.base) | {name: "twin.safetensors"})
    refused(3, INDEX, name)


# --- remote code ----------------------------------------------------------------------------------


def test_remote_code_is_copied_and_never_run(pair, cli):
    code = "raise SystemExit('executed')\n"
    for name in ("modeling_internvl_chat.py", "numpy.py", "json.py", "sitecustomize.py"):
        (pair.base / name).write_text(code)
    (pair.base / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "numpy.X"}}))
    run = subprocess.run(
        [sys.executable, "-m", "streamshard", *pair.command],
        cwd=pair.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (pair.output / "numpy.py").read_text() == code
    assert not any(pair.root.rglob("__pycache__"))


# --- names on a terminal --------------------------------------------------------------------------


NASTY = "evil\x1b[2J\r\n\x9b31m\u202e\x07"


@pytest.mark.parametrize("command", ["inspect", "diff", "merge", "plan", "refused"])
def test_control_characters_never_reach_the_terminal(command, pair, cli):
    other = pair.root / f"other {NASTY.replace('/', '')}"
    content = reference.read(pair.base)
    content[NASTY] = torch.ones(2, 2)
    other.mkdir()
    save_file(content, other / "model.safetensors", {"format": "pt"})
    target = ["--output", pair.output]
    outcome = {
        "inspect": lambda: cli("inspect", other),
        "diff": lambda: cli("diff", pair.base, other),
        "merge": lambda: cli("merge-lora", "--base", other, "--adapter", pair.adapter, *target),
        "plan": lambda: cli(
            "merge-lora", "--base", other, "--adapter", pair.adapter, *target, "--dry-run"
        ),
        "refused": lambda: cli("merge-lora", "--base", pair.base, "--adapter", other, *target),
    }[command]()
    assert outcome.code == (3 if command == "refused" else 0), outcome.err
    printed = (outcome.out + outcome.err).replace("\n", "")
    assert printed
    assert printed.isprintable(), printed


def test_the_json_report_has_no_control_characters(pair, cli):
    outcome = cli("inspect", pair.base, "--json")
    assert outcome.code == 0
    assert outcome.out.rstrip("\n").isprintable()
