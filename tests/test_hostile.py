"""Hostile folders: any JSON anywhere, links, pipes, bombs, and names that would move the cursor."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import LAYER, Pair
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import INDEX, load_file, save_file, save_index
from test_bad_input import SECOND, weight_map
from test_conversion import make

from streamshard import diff, hf_to_custom, inspect, merge_lora
from streamshard.checkpoint import open_checkpoint, read_json_object
from streamshard.errors import AdapterError, InputError, StreamshardError
from streamshard.strict_json import MAX_DEPTH, MAX_VALUES, parse_json

# --- any JSON value anywhere ----------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**299, -(10**30), 10_001, 10**6]),
    st.sampled_from([0.0, -0.5, 1e300, -1e300, 1e-300, 2.0, 5e-324]),
)
texts = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        ["qwen2", "internvl", "internvl_chat", "llama", "all", "bfloat16", "\x1b[2J", "(a+)+"]
    ),
    st.sampled_from(["Qwen2ForCausalLM", "default", "linear", "longrope", "rms_norm", "LORA"]),
)
keys = st.one_of(
    texts, st.sampled_from(["rope_type", "type", "factor", "rope_theta", "0", "dtype"])
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=5,
)


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


def only_our_errors(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Run it; whatever goes wrong must be said by an error of ours, in printable words, and soon."""
    started = time.perf_counter()
    try:
        function(*arguments, **options)
    except StreamshardError as error:
        assert str(error).replace("\n", "").isprintable()  # noqa: PT017
        assert len(str(error)) < 3000  # noqa: PT017
    assert time.perf_counter() - started < 5


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


# --- strict JSON ----------------------------------------------------------------------------------


@settings(max_examples=500)
@given(anything)
def test_plain_json_is_read_as_by_python(value):
    text = json.dumps(value).encode("utf-8")
    assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"x": {"a": 1, "\\u0061": 1}}', "'a' occurs twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * 301 + b"]", "301 digits"),
        (b"[" + b"9" * 10**6 + b"]", "digits"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'["\xff"]', "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"{} {}", "JSON"),
        (b"{'a': 1}", "JSON"),
        (b"[1,]", "JSON"),
        (b'["\n"]', "JSON"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "values"),
        (b"[" + b"[]," * MAX_VALUES + b"0]", "values"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_strict_json(text, problem):
    started = time.perf_counter()
    with pytest.raises(InputError, match=problem) as raised:
        parse_json(text, "x")
    assert len(str(raised.value)) < 1000
    assert time.perf_counter() - started < 1


def test_limits_of_json_are_reached():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x")
    assert parse_json(b"[" + b"9" * 300 + b"]", "x") == [int("9" * 300)]
    assert parse_json('["\\ud83d\\ude00", "ä"]'.encode(), "x") == ["😀", "ä"]


def test_a_large_index(tmp_path, pair, refused):
    """One of 4 MB, as 241B has, is read; above 10 MB is not."""
    file = tmp_path / "x.json"
    content = {
        f"model.layers.{n}.mlp.experts.{n}.gate_proj.weight": "x" * 60 for n in range(40_000)
    }
    file.write_text(json.dumps({"weight_map": content}))
    assert file.stat().st_size > 4_000_000
    assert len(read_json_object(file)["weight_map"]) == 40_000
    (pair.base / INDEX).write_bytes(b'{"weight_map":{"a":"' + b"b" * 10**7 + b'"}}')
    refused(3, INDEX, "10,000,000 bytes")


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
    signal.alarm(20)
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
    outcome = cli(*pair.command)
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


# --- pickles --------------------------------------------------------------------------------------

KEY = f"base_model.model.{LAYER}.q_proj.lora_A.weight"


def whole(pair: Pair) -> dict[str, torch.Tensor]:
    return load_file(pair.adapter / "adapter_model.safetensors")


def rewritten(path: Path, *, compression: int = zipfile.ZIP_STORED, bomb: int = 0) -> None:
    """The same archive, compressed, or with an entry of so many zeros."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        if bomb:
            archive.writestr("archive/data/9", bytes(bomb))


def claims_more(path: Path) -> None:
    """The central directory says that an entry is larger than the whole file."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(content)


def sparse(t: torch.Tensor) -> torch.Tensor:
    return t.to_sparse()


PICKLES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "sparse": lambda p, c: torch.save(c | {KEY: c[KEY].to_sparse()}, p),
    "sparse-csr": lambda p, c: torch.save(c | {KEY: c[KEY].to_sparse_csr()}, p),
    "quantized": lambda p, c: torch.save(
        c | {KEY: torch.quantize_per_tensor(c[KEY].float(), 0.1, 0, torch.qint8)}, p
    ),
    "nested": lambda p, c: torch.save(
        c | {KEY: torch.nested.nested_tensor([c[KEY].float(), c[KEY].float()])}, p
    ),
    "meta": lambda p, c: torch.save(c | {KEY: c[KEY].to("meta")}, p),
    "complex": lambda p, c: torch.save(c | {KEY: c[KEY].to(torch.complex64)}, p),
    "negative-view": lambda p, c: torch.save(c | {KEY: torch.view_as_complex(
        torch.ones(4, 40, 2)).conj().imag}, p),
    "stride-0": lambda p, c: torch.save(c | {KEY: torch.ones(1).expand(10**6, 10**6)}, p),
    "many-views": lambda p, c: torch.save(
        {str(n): torch.ones(2000, 2000).T for n in [0]}
        | {f"{n}": v for n, v in enumerate([torch.ones(1000, 1000).T] * 300)}, p),
    "list": lambda p, c: torch.save(list(c.values()), p),
    "scalar": lambda p, c: torch.save(c | {"epoch": 3}, p),
    "integer-name": lambda p, c: torch.save({0: c[KEY]}, p),
    "long-name": lambda p, c: torch.save(c | {"a" * 2000: c[KEY]}, p),
    "legacy": lambda p, c: torch.save(c, p, _use_new_zipfile_serialization=False),
    "compressed": lambda p, c: (torch.save(c, p), rewritten(p, compression=zipfile.ZIP_DEFLATED)),
    "bomb": lambda p, c: (
        torch.save(c, p), rewritten(p, compression=zipfile.ZIP_DEFLATED, bomb=300_000_000),
    ),
    "claims-more": lambda p, c: (torch.save(c, p), claims_more(p)),
    "script": lambda p, c: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
    "empty": lambda p, c: p.write_bytes(b""),
    "empty-zip": lambda p, c: zipfile.ZipFile(p, "w").close(),
    "cut": lambda p, c: (torch.save(c, p), p.write_bytes(p.read_bytes()[:-100])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_are_no_plain_tensors(kind, pair, refused):
    PICKLES[kind](pair.adapter / "adapter_model.bin", whole(pair))
    (pair.adapter / "adapter_model.safetensors").unlink()
    refused(3, "adapter_model.bin")


def test_views_and_shared_tensors_are_read(pair, cli):
    """Not contiguous, or sharing a storage, is nothing bad."""
    content = {key: value.T.contiguous().T for key, value in whole(pair).items()}
    assert not content[KEY].is_contiguous()
    cli(*pair.command)
    expected = reference.read(pair.output)
    (pair.adapter / "adapter_model.safetensors").unlink()
    torch.save(content, pair.adapter / "adapter_model.bin")
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 0, outcome.err
    found = reference.read(pair.output)
    assert all(reference.same_tensor(found[name], expected[name]) for name in expected)


# --- patterns and numbers of adapter configs ------------------------------------------------------


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", r"(\w*_?)*proj!", "(?=a)", "a" * 5000])
def test_patterns_that_could_take_forever_are_refused(field, pattern, pair, refused):
    file = pair.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: {pattern: 4}}))
    refused(4, field)


def test_huge_numbers_in_the_adapter_config(pair):
    file = pair.adapter / "adapter_config.json"
    before = json.loads(file.read_text())
    for field in ("r", "lora_alpha"):
        for value in (10**299, 10**30, 2**64):
            file.write_text(json.dumps(copy.deepcopy(before) | {field: value}))
            try:
                merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True)
            except AdapterError as error:
                assert field in str(error) or "says" in str(error) or "row" in str(error)  # noqa: PT017


@pytest.mark.parametrize("digest", [[], {}, 1, None, "x"])
def test_any_record_of_earlier_merges(digest, pair):
    (pair.base / "streamshard.json").write_text(json.dumps({"adapters": [{"digest": digest}, 1]}))
    only_our_errors(
        merge_lora, base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
    )


def test_a_record_of_many_tensors_is_read(pair):
    norms = {f"model.layers.{n}.mlp.experts.1.gate_proj.weight" * 3: 0.5 for n in range(80_000)}
    (pair.base / "streamshard.json").write_text(json.dumps({"l2_per_tensor": norms}, indent=2))
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True)
