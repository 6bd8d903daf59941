"""Models on a hub in every command: the same answers and bytes as with the folders that they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
from fake_hub import Hub
from folders import make
from hangs import until
from hub_commands import contents, of_content, report, same, streamshard
from hub_faults import First, Status
from make_checkpoint import write_adapter
from pairs import wrap_as_the_trainer


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folders, by what they are called on the hub too."""
    root = tmp_path_factory.mktemp("shop")
    found = {
        "custom": make(root / "custom", "tiny", "custom", max_shard_size="40KB"),
        "hf": make(root / "hf", "tiny", "hf"),
        "wrapped": make(root / "wrapped", "tiny", "custom"),
        "lora": root / "lora",
    }
    write_adapter(root / "lora", "tiny", layout="custom")
    wrap_as_the_trainer(root / "wrapped")
    for folder in found.values():
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text")
    return found


@pytest.fixture
def hub(shop, tmp_path):
    with Hub(tmp_path / "hub") as found:
        for name, folder in shop.items():
            found.add_repo(f"org/{name}", folder)
        found.forget()
        yield found


@pytest.fixture
def home(tmp_path):
    """A cache of the hub."""
    return tmp_path / "home"


COMMANDS: dict[str, list[str]] = {
    "merge": ["merge-lora", "--adapter", "@lora", "--base", "@custom", "--output", "OUT"],
    "wrapped": ["merge-lora", "@wrapped", "--output", "OUT"],
    "across": [
        *("merge-lora", "--adapter", "@lora", "--base", "@custom", "--output", "OUT"),
        *("--layout", "hf", "--reference", "@hf"),
    ],
    "hf2custom": [
        "hf2custom",
        "--hf-path",
        "@hf",
        "--custom-path",
        "@custom",
        "--save-path",
        "OUT",
    ],
    "custom2hf": [
        "custom2hf",
        "--custom-path",
        "@custom",
        "--hf-path",
        "@hf",
        "--save-path",
        "OUT",
    ],
    "wrap": ["wrap-lora", "--base", "@custom", "--output", "OUT", "--llm-r", "2"],
    "extract": ["extract-lora", "@wrapped", "--base", "@custom", "--output", "OUT"],
    "diff": ["diff", "@custom", "@hf"],
    "inspect": ["inspect", "@custom"],
    "inspect adapter": ["inspect", "@lora"],
    "verify": ["verify", "@custom"],
    "verify adapter": ["verify", "@lora"],
}
WRITES = [name for name, line in COMMANDS.items() if "OUT" in line]


def line(command: str, shop: dict[str, Path] | None, out: Path, *more: str) -> list[str]:
    """A command with folders of this machine, or with what they are called on the hub."""
    of = {f"@{name}": f"org/{name}" for name in ("custom", "hf", "wrapped", "lora")}
    if shop is not None:
        of = {f"@{name}": str(path) for name, path in shop.items()}
    known = {**of, "OUT": str(out)}
    return [known.get(part, part) for part in COMMANDS[command]] + ["--json", *more]


def as_local(text: str, shop: dict[str, Path]) -> Any:
    """A report in which folders are called as on the hub."""
    for name, path in shop.items():
        text = text.replace(str(path), f"org/{name}")
    return json.loads(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command, shop, hub, home, tmp_path):
    """Downloaded, from the cache, and by ranges."""
    local = streamshard(hub, home, *line(command, shop, tmp_path / "local"))
    assert local.code == 0, local.err
    assert not hub.requests
    expected = as_local(local.out, shop)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ways = {"first": [], "cached": [], "streamed": ["--stream"] if command in WRITES else []}
    for way, more in ways.items():
        hub.forget()
        if way == "streamed":
            shutil.rmtree(home)
        got = streamshard(
            hub, home, *line(command, None, tmp_path / way, *more), TMPDIR=str(temporary)
        )
        found = report(got)
        assert same(found, expected), (way, got.out, local.out)
        assert [*temporary.iterdir()] == []
        if command in WRITES:
            mine, theirs = contents(tmp_path / way), contents(tmp_path / "local")
            assert mine.keys() == theirs.keys()
            for name in theirs.keys() - {"adapter_config.json"}:
                assert mine[name] == theirs[name], (way, name)
            for name in theirs.keys() & {"adapter_config.json"}:
                assert json.loads(mine[name]) == as_local(theirs[name].decode(), shop)
        if way == "cached" and command not in ("inspect", "inspect adapter", "across"):
            assert [*of_content(hub)] == []
        if way == "streamed":
            kept = {path.stat().st_size for path in home.rglob("blobs/*")}
            weights = [
                path.stat().st_size
                for name in ("custom", "hf", "wrapped")
                for path in shop[name].glob("*.safetensors")
            ]
            assert command not in WRITES or not kept & set(weights)


def test_sources_are_in_the_report_and_the_record(shop, hub, home, tmp_path):
    got = report(streamshard(hub, home, *line("merge", None, tmp_path / "out")))
    record = json.loads((tmp_path / "out" / "streamshard.json").read_text())
    assert got["sources"] == record["sources"]
    base = got["sources"]["base"]
    assert (base["repository"], base["revision"]) == ("org/custom", None)
    assert base["commit"] == hub.head("org/custom")
    files = hub.files("org/custom")
    assert {name: f"sha256:{files[name].sha256}" for name in base["files"]} == {
        name: one["digest"] for name, one in base["files"].items()
    }
    assert all(one["checked"] for one in base["files"].values())
    again = report(streamshard(hub, home, *line("merge", None, tmp_path / "again")))
    assert not any(one["checked"] for one in again["sources"]["base"]["files"].values())
    assert "in the cache" in json.dumps(again["sources"])
    local = report(streamshard(hub, home, *line("merge", shop, tmp_path / "local")))
    assert local["sources"] is None


def test_the_commit_is_resolved_once(shop, hub, home, tmp_path):
    """The head moves as soon as it was asked for: everything is of the commit that it was."""
    before = hub.head("org/custom")

    class Moves:
        def act(self, state, request, answer):
            said = answer()
            if hub.head("org/custom") == before:
                hub.advance(
                    "org/custom", {"config.json": "{}", "model.safetensors.index.json": None}
                )
            return said

    hub.fail(Moves(), path="/api/models/org/custom", times=None)
    got = report(streamshard(hub, home, *line("merge", None, tmp_path / "out")))
    assert got["sources"]["base"]["commit"] == before != hub.head("org/custom")
    expected = streamshard(hub, home, *line("merge", shop, tmp_path / "local"))
    assert expected.code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize("how", ["@REV", "hf://…@REV", "--revision", "branch"])
def test_revisions(how, hub, home):
    first = hub.head("org/custom")
    hub.advance("org/custom", {"config.json": "not JSON"})
    hub.advance("org/custom", {"README.md": "of a branch"}, ref="old/er")
    given = {
        "@REV": [f"org/custom@{first}"],
        "hf://…@REV": [f"hf://org/custom@{first}"],
        "--revision": ["org/custom", "--revision", first],
        "branch": ["org/custom@main"],
    }[how]
    got = streamshard(hub, home, "inspect", *given, "--json")
    if how == "branch":
        assert got.code == 3
        assert "org/custom@main/config.json" in got.err + got.out
        return
    assert report(got)["sources"]["path"]["commit"] == first
    assert report(got)["sources"]["path"]["revision"] == first


def test_a_folder_and_a_file_in_a_repository(shop, hub, home):
    files = {f"sub/er/{path.name}": path for path in shop["custom"].iterdir()}
    hub.add_repo("org/nested", files)
    inside = streamshard(hub, home, "inspect", "hf://org/nested/sub/er", "--json")
    plain = streamshard(hub, home, "inspect", shop["custom"], "--json")
    assert same({**report(inside), "path": None}, {**report(plain), "path": None})
    assert report(inside)["path"] == "org/nested/sub/er"
    pasted = streamshard(hub, home, "inspect", f"{hub.url}/org/nested/tree/main/sub/er", "--json")
    assert report(pasted)["path"] == "org/nested@main/sub/er"
    one = min(shop["custom"].glob("*.safetensors")).name
    got = report(streamshard(hub, home, "inspect", f"hf://org/nested@main/sub/er/{one}", "--json"))
    assert (
        got["tensors"]
        == report(streamshard(hub, home, "inspect", shop["custom"] / one, "--json"))["tensors"]
    )


def test_inspect_reads_headers_only(hub, home, tmp_path):
    """Of files of 8 MB each not more than the first 128 KB, and no file that does not tell what it is."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "large"
    folder.mkdir()
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({f"w{number}": np.zeros((2048, 1024), np.float32)}, folder / name)
        weight_map[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("[" + "1," * 500_000 + "1]")
    (folder / "README.md").write_text("# A model")
    hub.add_repo("org/large", folder)
    for line_ in (["inspect", "org/large"], ["diff", "org/large", "org/custom"]):
        hub.forget()
        got = streamshard(hub, home / line_[0], *line_)
        assert got.code == 0, got.err
        large = [r for r in hub.requests if r.port == "content" and "large" in r.path]
        if line_[0] == "inspect":
            assert len(large) == 3
            assert sum(request.bytes for request in large) <= 3 * 128 * 1024
        paths = " ".join(request.path for request in hub.requests)
        assert "tokenizer.json" not in paths
        assert "README" not in paths


def test_the_plan_says_what_is_downloaded(shop, hub, home, tmp_path):
    out = tmp_path / "out"
    begun = streamshard(hub, home, *line("merge", None, out, "--stream", "--dry-run"))
    assert report(begun)["plan"]["download_bytes"] == 0
    plan = report(streamshard(hub, home, *line("merge", None, out, "--dry-run")))["plan"]
    weights = [path.stat().st_size for path in shop["custom"].glob("*.safetensors")]
    assert plan["download_bytes"] == sum(weights)
    assert plan["download_free_bytes"] > 0
    local = report(streamshard(hub, home, *line("merge", shop, out, "--dry-run")))["plan"]
    assert plan["memory_bytes"] >= local["memory_bytes"] + 25_000_000  # the client of the hub
    assert not out.exists()


@pytest.fixture
def large(hub, tmp_path):
    """A base of three shards of a megabyte, of which headers are small parts, and an adapter."""
    layers = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(3)]
    base = reference.save_checkpoint(
        tmp_path / "large",
        *(
            {f"{layer}.weight": reference.normal((1024, 512), 0.02, seed=n, dtype="BF16")}
            for n, layer in enumerate(layers)
        ),
    )
    factors = {
        f"base_model.model.{layer}.lora_{factor}.weight": reference.normal(shape, 0.02, seed=9)
        for layer in layers
        for factor, shape in (("A", (4, 512)), ("B", (1024, 4)))
    }
    adapter = reference.save_adapter(tmp_path / "its-lora", factors, r=4, lora_alpha=8)
    hub.add_repo("org/large", base)
    hub.forget()
    return tuple(["--base", str(one), "--adapter", str(adapter)] for one in ("org/large", base))


def test_resumed_in_another_way(large, hub, home, tmp_path):
    """Begun by ranges and broken off when the hub fails; finished with files of the cache."""
    far, near = large
    out = ["--output", str(tmp_path / "out")]
    kept = ("-00001-", "-00002-")

    def finished() -> bool:
        """What was written is on its way to the disk still: an error drops what has not arrived."""
        return all([*tmp_path.glob(f".out.partial/*{which}*.safetensors")] for which in kept)

    rules = [
        hub.fail(Status(403), path="*-00003-of-*", port="content", nth=3, times=None),
        hub.fail(Status(403, code="GatedRepo"), path="*/resolve/*-00003-of-*", nth=2, times=None),
    ]
    hub.fail(First(lambda: until(finished)), path="*-00003-of-*", port="content", nth=3)
    broken = streamshard(hub, home, "merge-lora", *far, *out, "--stream", "--workers", "1")
    assert broken.code == 9, broken.err
    assert "is gated" in broken.err
    assert not [*home.rglob("*.safetensors")]
    for rule in rules:
        hub.faults.rules.remove(rule)
    hub.forget()
    done = report(streamshard(hub, home, "merge-lora", *far, *out, "--json"))
    assert done["resumed"] == 2
    assert not [r for r in of_content(hub) if r.status == 200 and any(k in r.path for k in kept)]
    whole = streamshard(hub, home, "merge-lora", *near, "--output", tmp_path / "local")
    assert whole.code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_what_was_streamed_in_order_is_checked(large, hub, home, tmp_path):
    far, near = large
    more = ["--output", tmp_path / "o", "--stream", "--json"]
    got = report(streamshard(hub, home, "merge-lora", *far, *more))
    files = got["sources"]["base"]["files"].values()
    assert [one["checked"] for one in files] == [True] * 3, files
    assert {one["how"] for one in files} == {
        "streamed in order, and equal to the digest of the hub"
    }
    assert streamshard(hub, home, "merge-lora", *near, "--output", tmp_path / "l").code == 0
    assert contents(tmp_path / "o") == contents(tmp_path / "l")


def test_the_cache_is_that_of_every_tool(shop, hub, home, tmp_path):
    """What the client downloaded is used, and what we download it finds."""
    import subprocess
    import sys

    env = {**__import__("os").environ, **hub.env(home)}
    code = "from huggingface_hub import snapshot_download as s; print(s({}, local_files_only={}))"

    def by_client(repo: str, *, offline: bool) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code.format(repr(repo), offline)],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return Path(done.stdout.strip())

    by_client("org/custom", offline=False)
    hub.forget()
    report(streamshard(hub, home, *line("merge", None, tmp_path / "out")))
    assert not [r for r in of_content(hub) if "org/custom" in r.path]
    got = report(streamshard(hub, home, "verify", "org/hf", "--json"))
    assert got["problems"] == []
    assert {path.name for path in by_client("org/hf", offline=True).iterdir()} >= {
        path.name for path in shop["hf"].glob("*.safetensors")
    }


def test_cache_dir_and_offline(shop, hub, home, tmp_path):
    cache = tmp_path / "my cache"
    first = report(
        streamshard(hub, home, *line("merge", None, tmp_path / "1", "--cache-dir", str(cache)))
    )
    assert not [*home.rglob("*.safetensors")]
    hub.forget()
    more = ["--cache-dir", str(cache), "--offline"]
    got = report(streamshard(hub, home, *line("merge", None, tmp_path / "2", *more)))
    assert not hub.requests
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert got["sources"]["base"]["commit"] == first["sources"]["base"]["commit"]
    digests = [
        {n: f["digest"] for n, f in r["sources"]["base"]["files"].items()} for r in (got, first)
    ]
    assert digests[0] == digests[1]
    by_variable = streamshard(
        hub, home, *line("merge", None, tmp_path / "3", *more[:2]), HF_HUB_OFFLINE="1"
    )
    assert report(by_variable)["merged"] == got["merged"]
    assert not hub.requests


def test_a_path_that_is_here_wins(shop, hub, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shop["hf"], tmp_path / "org" / "custom")
    got = report(streamshard(hub, home, "inspect", "org/custom", "--json"))
    assert (got["layout"], got["sources"]) == ("hf", None)
    assert not hub.requests
    got = report(streamshard(hub, home, "inspect", "hf://org/custom", "--json"))
    assert (got["layout"], got["path"]) == ("custom", "org/custom")


def test_the_output_is_called_as_the_model(hub, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = ["--adapter", "org/lora", "--base", "org/custom"]
    got = report(streamshard(hub, home, "merge-lora", *both, "--json"))
    assert got["output"] == "custom-merged"
    assert (tmp_path / "custom-merged" / "config.json").exists()


def test_several_adapters(shop, hub, home, tmp_path):
    write_adapter(tmp_path / "other", "tiny", layout="custom", seed=7)
    both = ["--adapter", "org/lora", "--adapter", str(tmp_path / "other"), "--base", "org/custom"]
    got = report(streamshard(hub, home, "merge-lora", *both, "--output", tmp_path / "o", "--json"))
    assert got["sources"].keys() == {"adapter_1", "base"}
    assert len(got["adapters"]) == 2


def test_python(shop, hub, home, tmp_path):
    """The same keywords; progress is told in bytes."""
    import os
    import subprocess
    import sys

    code = f"""
import json, streamshard
steps = []
report = streamshard.merge_lora(
    base="org/custom", adapter=["org/lora"], output={str(tmp_path / "out")!r}, revision="main",
    cache_dir={str(tmp_path / "cache")!r}, offline=False, stream=False,
    on_step=lambda *s: steps.append(s),
)
there = streamshard.inspect("org/custom", cache_dir={str(tmp_path / "cache")!r}, offline=True)
print(json.dumps([report["sources"], steps, repr(there)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | hub.env(home), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sources, steps, there = json.loads(done.stdout)
    assert sources["base"]["revision"] == "main"
    loaded = [step for step in steps if step[0] == "downloading"]
    total = sum(path.stat().st_size for path in shop["custom"].glob("*.safetensors"))
    assert loaded[0] == ["downloading", total, 0]
    assert loaded[-1] == ["downloading", total, total]
    assert "org/custom" in there


def test_nothing_of_the_hub_is_loaded_for_folders(shop, hub, home, tmp_path):
    import os
    import subprocess
    import sys

    for command in ("merge", "inspect", "verify", "diff", "hf2custom"):
        arguments = line(command, shop, tmp_path / command)
        code = f"""
import sys
sys.argv = ["streamshard", *{arguments!r}]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
wrong = {{"huggingface_hub", "httpx", "httpx2", "hf_xet", "ssl", "socket"}} & set(sys.modules)
assert not wrong, wrong
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | hub.env(home), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not hub.requests
