"""`streamshard.json` against the schema that it names, by jsonschema."""

from __future__ import annotations

import copy
import datetime as dt
import importlib.resources
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from adapters import adapter_of
from folders import make, without_weights
from pairs import wrap_as_the_trainer

import streamshard
from streamshard.engine.kept import SCHEMA

SOURCE = importlib.resources.files("streamshard.engine") / "record.schema.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def check() -> Any:
    schema = json.loads(SOURCE.read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    assert schema["$id"] == SCHEMA
    return kind(schema, format_checker=kind.FORMAT_CHECKER).validate


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "streamshard.json").read_text(encoding="utf-8"))


def test_of_merges(pair, check):
    report = streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    record = record_of(pair.output)
    check(record)
    assert next(iter(record)) == "$schema"
    assert not {"dry_run", "plan"} & record.keys()
    assert report["dry_run"] is False
    date = dt.datetime.fromisoformat(record["date"])
    assert abs(dt.datetime.now(dt.UTC) - date) < dt.timedelta(minutes=10)
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["kernel"] == record["exactness"]["kernel"]
    paths = {Path(one["path"]) for one in record["inputs"]}
    assert paths == {*pair.base.glob("*.safetensors"), *pair.adapter.glob("*.safetensors")}
    (adapter,) = (one for one in record["inputs"] if "adapter_model" in one["path"])
    assert adapter["digest"] == f"xxh3-128:{record['adapters'][0]['digest']}"
    assert {one["digest_of"] for one in record["inputs"]} == {"content"}
    assert {one["repository"] for one in record["inputs"]} == {None}


@pytest.mark.parametrize("more", [{"dtype": "fp32"}, {"sha256": True}, {"max_shard_size": "5KB"}])
def test_of_merges_otherwise(more, pair, check):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, **more)
    check(record_of(pair.output))


def test_of_every_other_command(tmp_path, check):
    custom, hf = (make(tmp_path / layout, "tiny", layout) for layout in ("custom", "hf"))
    bare = without_weights(shutil.copytree(hf, tmp_path / "bare"))
    wrapped = tmp_path / "wrapped"
    streamshard.custom_to_hf(custom_path=custom, hf_path=hf, save_path=tmp_path / "a")
    streamshard.custom_to_hf(custom_path=custom, hf_path=bare, save_path=tmp_path / "b")
    streamshard.hf_to_custom(hf_path=hf, custom_path=custom, save_path=tmp_path / "c")
    streamshard.wrap_lora(base=custom, output=wrapped, llm_r=2)
    streamshard.wrap_lora(base=custom, output=tmp_path / "d", llm_r=2, format="peft")
    streamshard.extract_lora(checkpoint=wrapped, output=tmp_path / "e")
    trained = shutil.copytree(custom, tmp_path / "trained")
    wrap_as_the_trainer(trained)
    streamshard.merge_lora(checkpoint=trained, output=tmp_path / "f")
    for name in ("a", "b", "c", "wrapped", "d", "e", "f"):
        check(record_of(tmp_path / name))


def test_large_files_are_told_by_samples_and_places_of_the_cache_by_commit(tmp_path, check):
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    base = make(folder, "tiny", "custom")
    file = base / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin = len(content) - 8 - length
    header["extra"] = {"dtype": "U8", "shape": [2**21], "data_offsets": [begin, begin + 2**21]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(2**21))
    adapter = adapter_of(tmp_path / "lora", "tiny", "custom")
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    record = record_of(tmp_path / "out")
    check(record)
    found = {Path(one["path"]).name: one for one in record["inputs"]}
    assert found["model.safetensors"]["digest_of"] == "samples"
    assert found["model.safetensors"]["repository"] == "org/name"
    assert found["model.safetensors"]["commit"] == COMMIT
    assert found["adapter_model.safetensors"]["repository"] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("digests"),
        lambda record: record.update(plan=None),
        lambda record: record.update(date="2026-11-26 20:00"),
        lambda record: record.update(tensors="2"),
        lambda record: record["l2"].update(more=1),
        lambda record: record["inputs"][0].update(digest="x"),
        lambda record: record["digests"]["tensors"].update(x="0"),
        lambda record: record.update(kernel="fast"),
    ],
)
def test_the_schema_refuses_what_is_none(change, pair, check):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    record = record_of(pair.output)
    broken = copy.deepcopy(record)
    change(broken)
    check(record)
    with pytest.raises(jsonschema.ValidationError):
        check(broken)
