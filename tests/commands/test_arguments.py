"""What public functions are given from Python: one meaning is taken in every form, others are refused."""

from __future__ import annotations

import inspect
import shutil
import typing
from pathlib import Path

import pytest

import streamshard
from streamshard.engine.job import Options, OutputOptions
from streamshard.errors import StreamshardError, UsageError
from streamshard.wording import KEYWORDS


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture
def second(pair, tmp_path):
    """Another adapter for the same base."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(pair.adapter, tmp_path / "second"))
    file = copy / "adapter_model.safetensors"
    save_file({name: 0.25 * one for name, one in load_file(file).items()}, file)
    return copy


# --- adapters and their weights ---------------------------------------------------------------------


def test_adapters_and_weights_in_all_forms_that_mean_one_thing(pair, second):
    """Which weight is whose shows in the bytes: the two adapters differ."""
    import numpy as np
    import torch

    one, two = str(pair.adapter), str(second)
    forms = [
        {"adapter": [one, two], "weight": [0.5, 2.0]},
        {"adapter": (one, two), "weight": (0.5, 2)},
        {"adapter": {one: 0.5, two: 2.0}},
        {"adapter": {pair.adapter: 0.5, second: 2}},
        {"adapter": (path for path in (one, two)), "weight": (w for w in (0.5, 2.0))},
        {"adapter": {one: 0, two: 0}.keys(), "weight": np.array([0.5, 2.0])},
        {"adapter": [one, two], "weight": torch.tensor([0.5, 2.0])},
        {"adapter": [one, two], "weight": [torch.tensor(0.5), np.float32(2)]},
    ]
    made = []
    for number, form in enumerate(forms):
        out = pair.root / f"o{number}"
        report = streamshard.merge_lora(base=pair.base, output=out, card="none", **form)
        assert [row["weight"] for row in report["adapters"]] == [0.5, 2.0]
        made.append(weights_of(out))
    assert all(one == made[0] for one in made)
    streamshard.merge_lora(
        base=pair.base, output=pair.root / "other", adapter=[one, two], weight=[2.0, 0.5]
    )
    assert weights_of(pair.root / "other") != made[0]


def test_one_weight_of_torch_or_numpy(pair):
    import numpy as np
    import torch

    for number, weight in enumerate((torch.tensor(0.5), np.array(0.5), np.float64(0.5))):
        out = pair.root / f"o{number}"
        report = streamshard.merge_lora(
            base=pair.base, adapter=pair.adapter, output=out, weight=weight
        )
        assert report["adapters"][0]["weight"] == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter": {"a", "b"}}, "`adapter` is a set, which has no order"),
        ({"adapter": frozenset(["a"])}, "`adapter` is a set, which has no order"),
        ({"adapter": {"a": 1}, "weight": 2}, "`adapter` has weights itself"),
        ({"adapter": {"a": "much"}}, "`adapter` has for 'a' what is .*a number, its weight, was"),
        ({"adapter": {"a": None}}, "`adapter` has for 'a' what is .*a number, its weight, was"),
        ({"adapter": {1: 0.5}}, "`adapter` is of type dict; a path was expected"),
        ({"adapter": ["a", 3]}, r"`adapter\[1\]` is 3; a path was expected"),
        ({"adapter": [""]}, r"`adapter\[0\]` is empty"),
        ({"adapter": 3}, "`adapter` is 3; a path was expected"),
        ({"adapter": iter([])}, "no adapter given"),
        ({"adapter": {}}, "no adapter given"),
        ({"adapter": {"a": [0.5, 0.5]}}, "for 'a' what is of type list; a number, its weight"),
        ({"adapter": "a", "weight": "5"}, "`weight` is '5'; a number was expected"),
        ({"adapter": "a", "weight": b"5"}, "`weight` is b'5'; a number was expected"),
        ({"adapter": "a", "weight": True}, "`weight` is True; a number was expected"),
        ({"adapter": "a", "weight": [True]}, "`weight` is of type list; a number was expected"),
        ({"adapter": "a", "weight": {1: 2}}, "`weight` is of type dict; a number was expected"),
        ({"adapter": ["a", "b"], "weight": {0.5, 2}}, "`weight` is of type set"),
    ],
)
def test_adapters_and_weights_that_say_something_else(given, said, pair):
    with pytest.raises(UsageError, match=said):
        streamshard.merge_lora(base=pair.base, output=pair.output, **given)


def test_one_number_is_not_for_two_adapters(pair, second):
    with pytest.raises(UsageError, match="2 `adapter` but 1 `weight`: give one for each"):
        streamshard.merge_lora(
            base=pair.base, adapter=[pair.adapter, second], output=pair.output, weight=0.5
        )


# --- paths ------------------------------------------------------------------------------------------


PATHS = {"merge_lora": "base", "hf_to_custom": "hf_path", "wrap_lora": "base"}
PATHS |= {"extract_lora": "checkpoint", "diff": "b", "verify": "path", "inspect": "path"}
PATHS |= {"custom_to_hf": "save_path"}


@pytest.mark.parametrize(("name", "keyword"), PATHS.items())
def test_what_is_no_path_is_told_with_its_keyword(name, keyword, tmp_path):
    import torch

    module = torch.nn.Linear(300, 300)
    signature = inspect.signature(getattr(streamshard, name))
    needed = {
        key: tmp_path / "x" for key, one in signature.parameters.items() if one.default is one.empty
    }
    for value, said in (
        (3, "is 3; a path was expected"),
        ("", "is empty; a path was expected"),
        ([tmp_path], "is of type list; a path was expected"),
        (module, "is of type torch.nn.modules.linear.Linear; a path was expected. Save it with"),
        (module.state_dict(), "OrderedDict; a path was expected. Save it with `save_pretrained`"),
        (streamshard.Report(output="o"), "Of a report that is its 'output'"),
    ):
        with pytest.raises(UsageError) as raised:
            getattr(streamshard, name)(**{**needed, keyword: value})
        assert str(raised.value).startswith(f"`{keyword}` ")
        assert said in str(raised.value)
        assert len(str(raised.value)) < 200


# --- keywords ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("merge_lora", "lora", "Did you mean 'adapter'"),
        ("merge_lora", "model", "Did you mean 'base'"),
        ("merge_lora", "save_path", "Did you mean 'output'"),
        ("merge_lora", "json", "What is returned is that document"),
        ("merge_lora", "verbose", "`progress=True` shows a bar"),
        ("custom_to_hf", "output", "Did you mean 'save_path'"),
        ("custom_to_hf", "model", "Did you mean 'custom_path'"),
        ("wrap_lora", "r", "Did you mean 'llm_r'"),
        ("wrap_lora", "lora_alpha", "Did you mean 'llm_alpha'"),
        ("extract_lora", "lora_alpha", "Did you mean 'alpha'"),
        ("extract_lora", "path", "Did you mean 'checkpoint'"),
        ("verify", "checkpoint", "Did you mean 'path'"),
        ("diff", "exit_code", "'differ'"),
    ],
)
def test_keywords_of_other_tools(name, given, said, tmp_path):
    with pytest.raises(TypeError, match=said):
        getattr(streamshard, name)(**{given: tmp_path})


@pytest.mark.parametrize("name", [name for name in KEYWORDS if name != "environment"])
def test_too_many_arguments_by_position_are_told_with_their_names(name):
    with pytest.raises(TypeError, match=rf"{name}\(\).*name them, {name}\(\w+=….*\)") as raised:
        getattr(streamshard, name)("a", "b", "c")
    first = str(raised.value).partition("name them")[2]
    assert all(
        word in KEYWORDS[name] for word in first.replace("=…", "").split("(")[1][:-2].split(", ")
    )


def test_what_is_given_twice_or_not_at_all():
    with pytest.raises(TypeError, match="'path' twice"):
        streamshard.verify("a", path="b")
    with pytest.raises(TypeError, match=r"needs custom_path, too: .*hf_path=…, custom_path=…"):
        streamshard.hf_to_custom(hf_path="a", save_path="b")
    with pytest.raises(TypeError, match="needs a and b, too"):
        streamshard.diff()


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_is_in_the_signature(name):
    """What `help` shows and what completes; the defaults are those that hold."""
    parameters = inspect.signature(getattr(streamshard, name)).parameters
    assert {*parameters} == {*KEYWORDS[name]}
    for one in parameters.values():
        assert one.kind is not one.VAR_KEYWORD
        if one.name in Options.__dataclass_fields__ and one.name != "outlet":
            assert one.default == Options.__dataclass_fields__[one.name].default, one


@pytest.mark.parametrize("name", [one for one in streamshard.__all__ if one[0].islower()])
def test_types_can_be_asked_for(name):
    thing = getattr(streamshard, name)
    if callable(thing):
        assert "return" in typing.get_type_hints(thing)


@pytest.mark.parametrize("name", ["OutputOptions", "ConversionOptions"])
def test_types_of_keywords_can_be_asked_for_and_are_described(name):
    typed = getattr(streamshard, name)
    assert {*typing.get_type_hints(typed)} == {*typed.__annotations__}
    described = [line.strip() for line in typed.__doc__.splitlines()]
    own = {"ConversionOptions": {*typed.__annotations__} - {*OutputOptions.__annotations__}}
    for keyword in own.get(name, typed.__annotations__):
        assert any(line.startswith(f"- `{keyword}`: ") for line in described), keyword


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("merge_lora", {"overwrite": "no"}, "^`overwrite` is 'no'; True or False was expected"),
        ("merge_lora", {"workers": True}, "^`workers` is True; a whole number was expected"),
        ("merge_lora", {"alpha": True}, "^`alpha` is True; a number was expected"),
        ("merge_lora", {"progress": 1}, "^`progress` is 1; True, False or a function was expected"),
        ("merge_lora", {"on_plan": True}, "^`on_plan` is True; a function was expected"),
        ("merge_lora", {"max_shard_size": 5}, '^`max_shard_size`: 5 would be bytes; write "5GB"'),
        ("merge_lora", {"reference": "r"}, "^`reference` would change nothing here"),
        ("merge_lora", {"tokenizer_from": "source"}, "^`tokenizer_from` would change nothing here"),
        ("verify", {"sample": 0.1}, "^`sample` is 0.1; write it like 10% or 200"),
        ("verify", {"sample": "0.1"}, "^`sample` is '0.1'; write it like 10% or 200"),
        ("verify", {"sample": 2.5}, "^`sample` is 2.5; write it like 10% or 200"),
        ("verify", {"sample": True}, "^`sample` is True; write it like 10% or 200"),
    ],
)
def test_values_that_say_something_else_than_is_meant(name, given, said, pair):
    inputs = {"base": pair.base, "adapter": pair.adapter, "output": pair.output}
    needed = {"path": pair.base} if name == "verify" else inputs
    with pytest.raises(UsageError, match=said):
        getattr(streamshard, name)(**needed, **given)


@pytest.mark.parametrize("sample", [2, 2.0, "2", "50%"])
def test_how_many_were_sampled_is_seen(sample, pair):
    report = streamshard.verify(pair.base, sample=sample)
    assert report["checked"]["tensors"] == 2
    assert "2 of 4 tensors read" in repr(report)
    assert "read" not in repr(streamshard.verify(pair.base))


def test_options_are_looked_at_before_the_output(pair):
    """Else they are told in a second round."""
    pair.output.mkdir()
    (pair.output / "mine").write_text("x")
    for wrong in ({"workers": 0}, {"workers": 65}, {"dtype": "int8"}, {"max_memory": "1KB"}):
        with pytest.raises(UsageError, match=f"`{next(iter(wrong))}`"):
            streamshard.merge_lora(
                base=pair.base, adapter=pair.adapter, output=pair.output, **wrong
            )


def test_no_message_of_python_names_a_command_to_run_again(pair, monkeypatch):
    """`run the same command again` is of the command line."""
    from streamshard.engine import run

    def stopped(*_args, **_kwargs):
        raise streamshard.WriteError("x: broke. Run the same command again.")

    monkeypatch.setattr(run, "write_shards", stopped)
    with pytest.raises(StreamshardError, match="Call it again"):
        streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
