"""How public commands are called from Python: keywords, reports, warnings, errors, progress."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib
import inspect
import json
import logging
import multiprocessing
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import streamshard
from streamshard.commands.convert import ConversionOptions
from streamshard.engine.job import BaseOptions, CacheOptions, Options, OutputOptions
from streamshard.errors import (
    OutputError,
    StreamshardError,
    UnreadError,
    UsageError,
    VerificationError,
)
from streamshard.wording import COMMANDS, KEYWORDS, command_line, spoken

ROOT = Path(streamshard.__file__).parents[1]


# --- keywords -------------------------------------------------------------------------------------

GOOD = """
from streamshard import OutputOptions, convert_keys_back, custom_to_hf, diff, extract_lora
from streamshard import hf_to_custom, inspect, merge_lora, verify, wrap_lora
import json, pickle

merge_lora(base="b", adapter="a", output="o", overwrite=True, progress=True)
merge_lora(base="b", adapter=["a", "c"], weight=[0.5, 0.5], layout="hf", reference="r")
merge_lora(checkpoint="c", output="o", max_shard_size="5GB", progress=lambda nbytes, name: None)
hf_to_custom(hf_path="h", custom_path="c", save_path="s", tokenizer_from="source", dtype="bf16")
custom_to_hf(hf_path="h", custom_path="c", save_path="s", allow_missing=True, workers=2)
wrap_lora(base="b", output="o", llm_r=16, format="peft", sha256=True)
extract_lora(checkpoint="c", output="o", alpha=2.0, dry_run=True)
how: OutputOptions = {"overwrite": True, "max_memory": "1GB"}
report = merge_lora(base="b", adapter="a", **how)
print(report["l2"]["global"], json.dumps(report), pickle.dumps(report), {**report}, len(report))
merge_lora(base="b", adapter={"a": 0.5, "c": 2}, dtype="float16", io="direct")
diff("a", "b", workers=2, progress=True)["different"]
verify("a", sample="10%", strict=True)
inspect("a").get("layout")
"""
BAD = {
    'merge_lora(base="b", adapter="a", overwite=True)': "overwrite",
    'merge_lora(base="b", adapter="a", nonsense={"key": 1})': "nonsense",
    'merge_lora(base="b", adapter="a", layout="cutsom")': "cutsom",
    'merge_lora(base="b", adapter="a", workers="two")': "workers",
    'merge_lora("b", "a")': "positional",
    'merge_lora(base="b", adapter="a", dtype="int4")': "int4",
    'merge_lora(base="b", adapter="a", io="mmap")': "mmap",
    'merge_lora(base="b", adapter={"a": "much"})': "dict-item",
    'hf_to_custom(hf_path="h", custom_path="c", save_path="s", allow_mising=True)': "allow_missing",
    'custom_to_hf(hf_path="h", custom_path="c", save_path="s", tokenizer_from="me")': "me",
    'wrap_lora(base="b", output="o", llm_rank=16)': "llm_rank",
    'wrap_lora(base="b", output="o", format="gguf")': "gguf",
    'extract_lora(checkpoint="c", output="o", max_shard="5GB")': "max_shard",
    'diff("a", "b", worker=2)': "workers",
    'verify("a", strickt=True)': "strict",
    'inspect("a", workers=2)': "workers",
    'other: OutputOptions = {"overwrite": True, "quiet": True}': "quiet",
    'third: ConversionOptions = {"allow_missing": True, "tokenizer": "x"}': "tokenizer",
}


def checked(code: str, folder: Path) -> str:
    file = folder / "snippet.py"
    file.write_text(code)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--config-file=", f"--cache-dir={folder / 'cache'}", "--no-error-summary", file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.stdout


def test_a_type_checker_accepts_what_is_right_and_refuses_what_is_not(tmp_path):
    """One run of mypy on all of it."""
    lines = [*GOOD.strip().splitlines(), "from streamshard import ConversionOptions"]
    first_bad = len(lines) + 1
    lines += BAD
    found: dict[int, str] = {}
    for line in checked("\n".join(lines), tmp_path).splitlines():
        _, number, kind, text = line.split(":", 3)
        if kind.strip() == "error":
            found[int(number)] = found.get(int(number), "") + text
    assert not {number: text for number, text in found.items() if number < first_bad}
    for number, (line, named) in enumerate(BAD.items(), first_bad):
        assert named in found.get(number, "not refused"), line


@pytest.mark.parametrize("name", KEYWORDS)
def test_the_table_of_keywords_is_that_of_the_functions(name):
    parameters = inspect.signature(getattr(streamshard, name)).parameters
    own = {key for key, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
    for typed in (BaseOptions, CacheOptions, OutputOptions, ConversionOptions):
        if any(f"[{typed.__name__}]" in str(one.annotation) for one in parameters.values()):
            own |= typed.__annotations__.keys()
    assert set(KEYWORDS[name]) == own


def test_options_are_those_that_are_typed():
    of_hub = {*BaseOptions.__annotations__, "stream", "push_to", "private", "commit_message"}
    typed = {*OutputOptions.__annotations__} - of_hub
    ours = {"on_distances", "outlet"}  # of commands among themselves
    assert {*Options.__dataclass_fields__} == typed | ours


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("hf_to_custom", ("hf_path", "custom_path"), "save_path"),
        ("custom_to_hf", ("hf_path", "custom_path"), "save_path"),
        ("wrap_lora", ("base",), "output"),
        ("extract_lora", ("checkpoint",), "output"),
    ],
)
def test_an_output_is_a_folder_or_on_the_hub(name, given, missing):
    with pytest.raises(UsageError, match=rf"`{missing}` is missing.*`push_to`"):
        getattr(streamshard, name)(**dict.fromkeys(given, "x"))


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("merge_lora", "overwite", "overwrite"),
        ("merge_lora", "max-shard-size", "max_shard_size"),
        ("merge_lora", "adapters", "adapter"),
        ("hf_to_custom", "tokenizer_form", "tokenizer_from"),
        ("custom_to_hf", "dryrun", "dry_run"),
        ("wrap_lora", "llm_rank", "llm_r"),
        ("extract_lora", "chekpoint", "checkpoint"),
        ("diff", "worker", "workers"),
        ("verify", "samples", "sample"),
        ("inspect", "pth", "path"),
    ],
)
def test_a_misspelt_keyword_is_told_with_the_one_that_is_meant(name, given, meant, tmp_path):
    with pytest.raises(TypeError, match=f"{name}.*'{given}'.*Did you mean '{meant}'"):
        getattr(streamshard, name)(**{given: tmp_path})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("merge_lora", {"workers": "2"}),
        ("merge_lora", {"workers": 2.5}),
        ("merge_lora", {"overwrite": "no"}),
        ("merge_lora", {"weight": "x"}),
        ("merge_lora", {"weight": [1, None]}),
        ("merge_lora", {"alpha": "8"}),
        ("merge_lora", {"adapter_name": 3}),
        ("merge_lora", {"on_plan": 3}),
        ("hf_to_custom", {"progress": "yes"}),
        ("wrap_lora", {"llm_r": "4"}),
        ("wrap_lora", {"seed": None}),
        ("wrap_lora", {"dropout": "0.1"}),
        ("wrap_lora", {"backbone_alpha": "8"}),
        ("verify", {"strict": "false"}),
    ],
)
def test_a_value_of_another_type_is_told_with_its_keyword(name, given, tmp_path):
    needed = {
        key: tmp_path / "x"
        for key, one in inspect.signature(getattr(streamshard, name)).parameters.items()
        if one.default is one.empty and one.kind is one.KEYWORD_ONLY
    }
    needed |= {"path": tmp_path / "x"} if name == "verify" else {}
    with pytest.raises(UsageError, match=rf"`{next(iter(given))}(=True)?`.* was expected"):
        getattr(streamshard, name)(**needed, **given)


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_nonsense_keyword_is_told_with_those_that_there_are(name):
    last = (KEYWORDS[name] or ("none",))[-1]
    with pytest.raises(TypeError, match=rf"{name}\(\).*'zzzz'.*{last}"):
        getattr(streamshard, name)(zzzz=1)


# --- reports --------------------------------------------------------------------------------------


@pytest.fixture
def merged(pair):
    return streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)


def test_a_report_is_a_mapping_with_a_short_repr(merged, pair):
    assert isinstance(merged, dict)
    assert merged["merged"] == 2
    assert json.loads(json.dumps(merged)) == merged
    for twin in (
        copy.copy(merged),
        copy.deepcopy(merged),
        merged.copy(),
        pickle.loads(pickle.dumps(merged)),
    ):
        assert twin == merged == {**merged}
        assert type(twin) is type(merged) is streamshard.Report
    said = repr(merged)
    assert len(said) < 200 + len(str(pair.output))
    assert "\n" not in said
    assert "merge-lora" in said
    assert str(pair.output) in said
    assert "4 tensors" in said


def test_every_command_returns_such_a_report(pair, merged):
    again = streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.root / "dry", dry_run=True
    )
    found = [
        again,
        streamshard.diff(pair.base, pair.output),
        streamshard.inspect(pair.base),
        streamshard.inspect(pair.adapter),
        streamshard.verify(pair.output),
    ]
    assert "dry run" in repr(again)
    for report in found:
        assert type(report) is streamshard.Report
        assert report["command"] in repr(report)
        assert len(repr(report)) < 250 + len(str(pair.root))
    assert repr(streamshard.Report()).startswith("<Report")


def test_one_weight_may_be_a_number(pair):
    """Of one adapter; of numpy too."""
    import numpy as np

    made = []
    for number, weight in enumerate((0.5, np.float32(0.5), [0.5])):
        out = pair.root / f"w{number}"
        streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=out, weight=weight)
        made.append([file.read_bytes() for file in sorted(out.glob("*.safetensors"))])
    assert made[0] == made[1] == made[2]


# --- warnings -------------------------------------------------------------------------------------


def test_warnings_go_to_logging_and_to_warnings(pair, caplog):
    (pair.base / "config.json").unlink()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        report = streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert report["warnings"]
    assert [str(one.message) for one in caught] == report["warnings"]
    assert {one.category for one in caught} == {streamshard.StreamshardWarning}
    assert {one.filename for one in caught} == {__file__}
    logged = [one for one in caplog.records if one.name == "streamshard"]
    assert [one.getMessage() for one in logged] == report["warnings"]
    assert {one.levelname for one in logged} == {"WARNING"}


def test_without_handlers_a_warning_is_printed_once(pair):
    (pair.base / "config.json").unlink()
    code = f"""
import streamshard
streamshard.merge_lora(
    base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}
)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("has no config.json") == 1
    assert "StreamshardWarning" in done.stderr


@pytest.mark.parametrize("more", [[], ["--verbose"], ["--json"], ["--quiet"]], ids=str)
def test_the_command_line_tells_a_warning_once(more, pair):
    (pair.base / "config.json").unlink()
    line = [sys.executable, "-W", "always", "-m", "streamshard", *pair.command, *more]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    times = done.stderr.count("has no config.json")
    assert times == (0 if more in (["--json"], ["--quiet"]) else 1)
    if more == ["--json"]:
        assert len(json.loads(done.stdout)["warnings"]) == 1


def test_warnings_of_a_failed_check_are_not_lost(pair):
    with (
        pytest.warns(streamshard.StreamshardWarning, match="no digests"),
        pytest.raises(VerificationError, match="`strict=True`") as raised,
    ):
        streamshard.verify(pair.base, strict=True)
    assert "`strict=True`" in raised.value.report["problems"][0]


# --- words ----------------------------------------------------------------------------------------


def test_messages_name_keywords_in_python_and_options_on_the_command_line(pair, cli):
    pair.output.mkdir()
    (pair.output / "mine").write_text("x")
    with pytest.raises(OutputError) as raised:
        streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert "overwrite=True" in str(raised.value)
    assert "--" not in str(raised.value).replace(str(pair.root), "")
    said = cli(*pair.command).err
    assert "--overwrite" in said
    assert "overwrite=True" not in said


@pytest.mark.parametrize(
    ("text", "function", "python"),
    [
        ("--max-memory is 5 bytes", "merge_lora", "`max_memory` is 5 bytes"),
        ("(--strict).", "verify", "(`strict=True`)."),
        ("pass --overwrite.", "wrap_lora", "pass `overwrite=True`."),
        ("--layout custom or hf", "merge_lora", '`layout="custom"` or hf'),
        ("--format peft)", "wrap_lora", '`format="peft"`)'),
        ("--weight scales it", "merge_lora", "`weight` scales it"),
        ("give --adapter and --base", "merge_lora", "give `adapter` and `base`"),
        ("a training CHECKPOINT.", "merge_lora", "a training `checkpoint`."),
        ("give --adapter", "diff", "give `adapter` (of `merge_lora`)"),
        (
            "run `merge-lora --adapter A --base BASE`",
            "diff",
            "run `streamshard.merge_lora(adapter=A, base=BASE)`",
        ),
        ("`extract-lora CHECKPOINT`", "", "`streamshard.extract_lora(checkpoint=CHECKPOINT)`"),
    ],
)
def test_words(text, function, python):
    assert spoken(text, function) == python


@pytest.mark.parametrize(
    "text",
    [
        "/data/--overwrite/x: is empty.",
        "my--base: is empty.",
        "start it without --use_llm_lora",
        "/x/CHECKPOINT-100/config.json",
        "'CHECKPOINT'",
        "pip install --upgrade numpy",
        "a `mergelora` b",
    ],
)
def test_words_that_are_no_options_stay(text):
    assert spoken(text, "merge_lora") == text


def test_the_command_line_keeps_its_words_and_says_whose_an_option_is():
    with command_line(KEYWORDS["diff"]):
        assert spoken("use --workers") == "use --workers"
        assert spoken("pass --adapter") == "pass --adapter (of streamshard merge-lora)"
        assert spoken("`merge-lora --adapter A`") == "`streamshard merge-lora --adapter A`"
        assert spoken("it is `merge-lorax`") == "it is `merge-lorax`"
    with command_line({"checkpoint", "output"}):  # a drop-in script
        assert spoken("pass --overwrite.") == "pass --overwrite (of streamshard merge-lora)."


def test_the_table_of_keywords_is_that_of_the_command_line():
    from streamshard.cli.main import cli

    theirs = {"progress", "on_plan", "on_step", "on_total"}  # the command line's own
    for name, command in COMMANDS.items():
        options = {one.name for one in cli.commands[command].params}
        options -= {"as_json", "quiet", "verbose"}
        options -= {"exit_code", "heatmap"} if name == "diff" else set()  # its report has both
        same = {"adapters": "adapter", "weights": "weight"}
        assert {same.get(one, one) for one in options} == set(KEYWORDS[name]) - theirs


# --- errors ---------------------------------------------------------------------------------------


def every_error() -> list[type[BaseException]]:
    found: dict[str, type[BaseException]] = {}
    for module in pkgutil.walk_packages(streamshard.__path__, "streamshard."):
        if module.name == "streamshard.__main__":
            continue
        for one in vars(importlib.import_module(module.name)).values():
            ours = getattr(one, "__module__", "").startswith("streamshard")
            if ours and isinstance(one, type) and issubclass(one, BaseException):
                found[f"{one.__module__}.{one.__qualname__}"] = one
    return list(found.values())


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_c3_every_error_is_pickled_and_copied(kind):
    arguments = {VerificationError: ("m", {"problems": ["x"]}), UnreadError: ("m", {"a": 1})}
    error = kind(*arguments.get(kind, (3, "m") if kind.__name__ == "NotFiniteError" else ("m",)))
    error.add_note("a note")
    for twin in (
        copy.copy(error),
        copy.deepcopy(error),
        *(pickle.loads(pickle.dumps(error, protocol)) for protocol in (2, 5)),
    ):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert twin.__notes__ == ["a note"]
        assert getattr(twin, "report", None) == getattr(error, "report", None)


def test_c3_errors_are_made_again_by_dask():
    """By tblib, which calls `__new__` itself."""
    support = pytest.importorskip("tblib.pickling_support")
    for kind in every_error():
        if kind.__init__ is not VerificationError.__init__:
            made = support.unpickle_exception_with_attrs(
                kind, {"args": ("m",)}, None, None, None, False, []
            )
            assert type(made) is kind
            assert made.args == ("m",)


def test_c3_errors_come_from_other_processes(pair):
    """`VerificationError`, whose report comes along, and others."""
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    (pair.output / "config.json").write_text("{}")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(VerificationError) as raised:
            pool.submit(streamshard.verify, str(pair.output)).result()
        assert raised.value.report["problems"]
        with pytest.raises(UsageError, match="`sample`"):
            pool.submit(streamshard.verify, str(pair.output), sample="much").result()
        report = pool.submit(streamshard.inspect, str(pair.output)).result()
    assert type(report) is streamshard.Report


def test_errors_in_words_keep_their_kind_and_cause(pair):
    with pytest.raises(StreamshardError) as raised:
        streamshard.merge_lora(
            base=pair.base, adapter=pair.adapter, output=pair.output, max_memory="much"
        )
    assert type(raised.value) is UsageError
    assert isinstance(raised.value.__cause__, ValueError)
    assert str(raised.value).startswith("`max_memory`: ")


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_is_a_bar_of_tqdm_auto(progress, pair, capfd):
    plans = []
    streamshard.merge_lora(
        base=pair.base,
        adapter=pair.adapter,
        output=pair.output,
        progress=progress,
        on_plan=plans.append,
    )
    streamshard.diff(pair.base, pair.output, progress=progress)
    streamshard.verify(pair.output, progress=progress)
    said = capfd.readouterr()
    assert said.out == ""
    assert len(plans) == 1
    if not progress:
        assert said.err == ""
        return
    for name in ("merge_lora", "diff", "verify"):
        assert f"{name}: 100%" in said.err


def test_progress_may_be_a_function(pair):
    told = []
    streamshard.merge_lora(
        base=pair.base,
        adapter=pair.adapter,
        output=pair.output,
        progress=lambda nbytes, name: told.append((nbytes, name)),
    )
    assert sum(nbytes for nbytes, _ in told)


def test_c3_progress_without_a_stderr(pair):
    code = textwrap.dedent(f"""
        import sys
        sys.stderr = None
        import streamshard
        streamshard.merge_lora(base={str(pair.base)!r}, adapter={str(pair.adapter)!r},
                               output={str(pair.output)!r}, progress=True)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (pair.output / "streamshard.json").exists()
