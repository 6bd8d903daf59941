"""What Python users see of calls that fail or are interrupted: kinds, tracebacks, what is kept."""

from __future__ import annotations

import pickle
import threading
import traceback
import warnings

import pytest
from hangs import HANGS

import streamshard
from streamshard.errors import BusyError, InputError, StreamshardError, UsageError


def merged(pair, **more):
    return streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, **more)


# --- names ------------------------------------------------------------------------------------------


def test_errors_are_found_where_people_look():
    """Without any command having been called before."""
    import subprocess
    import sys

    code = (
        "import sys, streamshard; streamshard.errors.InputError; "
        "from streamshard import AdapterError, InputError, WriteError; "
        "print({'numpy', 'torch', 'huggingface_hub'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    names = {name for name in streamshard.errors.__all__ if name[0].isupper()}
    assert names <= {*dir(streamshard)}
    assert {*dir(streamshard.errors)} == names
    assert all(getattr(streamshard, name) is getattr(streamshard.errors, name) for name in names)


def test_wrong_arguments_are_value_errors(pair):
    with pytest.raises(ValueError, match="`dtype` is 'int8'") as raised:
        merged(pair, dtype="int8")
    assert type(raised.value) is UsageError
    assert type(pickle.loads(pickle.dumps(raised.value))) is UsageError


@pytest.mark.parametrize(
    "call",
    [
        lambda pair: streamshard.inspect(pair.root / "nothing"),
        lambda pair: streamshard.verify("./nothing"),
        lambda pair: streamshard.diff(pair.base, pair.root / "nothing"),
        lambda pair: streamshard.merge_lora(base=pair.base, adapter="./nothing", output="o"),
        lambda pair: streamshard.merge_lora(base="./nothing", adapter=pair.adapter, output="o"),
    ],
)
def test_what_is_not_there_is_a_file_not_found(call, pair):
    with pytest.raises(FileNotFoundError, match=r"nothing: no such .* Check the path") as raised:
        call(pair)
    assert type(raised.value) is streamshard.NotFoundError
    assert isinstance(raised.value, InputError)
    assert raised.value.exit_code == 3
    assert type(pickle.loads(pickle.dumps(raised.value))) is streamshard.NotFoundError


def test_what_is_broken_is_no_file_not_found(pair):
    (pair.base / "config.json").write_text("{")
    with pytest.raises(InputError) as raised:
        streamshard.inspect(pair.base)
    assert not isinstance(raised.value, OSError)


# --- what a notebook shows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"base": "nothing-here"}, InputError), ({"adapter": "no-adapter"}, StreamshardError)],
    ids=str,
)
def test_a_traceback_ends_at_the_call(given, kind, pair):
    """Not in the depths of the package; a log of level DEBUG has these."""
    with pytest.raises(kind) as raised:
        streamshard.merge_lora(
            **{"base": pair.base, "adapter": pair.adapter, "output": pair.output, **given}
        )
    assert frames_of(raised.value) == ["call"]


@pytest.mark.parametrize("given", [{"overwite": True}, {"base": 3}, {"workers": 0}], ids=str)
def test_so_does_that_of_wrong_arguments(given, pair):
    with pytest.raises((TypeError, ValueError)) as raised:
        streamshard.merge_lora(**{"base": pair.base, "adapter": pair.adapter, **given})
    assert frames_of(raised.value) == ["call"]


def frames_of(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if "streamshard/" in frame.filename]


def test_the_way_of_an_error_is_logged(pair, caplog):
    with caplog.at_level("DEBUG", "streamshard"), pytest.raises(InputError):
        streamshard.inspect(pair.root / "nothing")
    assert any(
        "open_checkpoint" in str(one.exc_text or traceback.format_tb(one.exc_info[2]))
        for one in caplog.records
        if one.exc_info
    )


def test_an_error_of_a_warning_has_the_report(pair):
    (pair.base / "config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(streamshard.StreamshardWarning) as raised:
            merged(pair)
    assert raised.value.report["output"] == str(pair.output)
    assert (pair.output / "streamshard.json").exists()
    assert "is done" in raised.value.__notes__[0]


# --- interrupts ---------------------------------------------------------------------------------------


def test_an_interrupt_says_what_is_kept(pair):
    def stop(_nbytes, _name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        merged(pair, progress=stop)
    assert "call it again" in "".join(traceback.format_exception(raised.value))
    assert "same command" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(KeyboardInterrupt) as raised:
        streamshard.verify(pair.base, progress=stop)
    assert not getattr(raised.value, "__notes__", None)


def test_an_interrupt_says_how_much_is_done(pair, monkeypatch):
    """As whoever was writing has added it, in the words of Python."""
    from streamshard.engine import run

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt("What is finished is kept: run the same command again to continue.")

    monkeypatch.setattr(run, "write_shards", stopped)
    with pytest.raises(KeyboardInterrupt, match="is kept: call it again to continue") as raised:
        merged(pair)
    assert not getattr(raised.value, "__notes__", None)


def test_another_call_in_this_process_is_said_to_be_one(pair):
    entered, leave = threading.Event(), threading.Event()

    def wait(_nbytes, _name):
        entered.set()
        leave.wait(HANGS)

    thread = threading.Thread(target=merged, args=(pair,), kwargs={"progress": wait})
    thread.start()
    try:
        assert entered.wait(HANGS)
        with pytest.raises(BusyError, match="another call in this process") as raised:
            merged(pair)
        assert "remove" not in str(raised.value)
    finally:
        leave.set()
        thread.join()


# --- progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"heatmap": True}, {"sha256": True}, {}], ids=str)
def test_a_bar_ends_at_its_total(more, pair, monkeypatch):
    """What is read for a picture, or hashed, is counted, too."""
    import tqdm.auto

    bars = []

    class Kept(tqdm.auto.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Kept)
    merged(pair, progress=True, **more)
    (bar,) = bars
    assert bar.n == bar.total > 0


def test_no_bar_of_what_fails_before_it_begins(pair, capfd):
    with pytest.raises(InputError):
        streamshard.merge_lora(base="nothing", adapter=pair.adapter, output="o", progress=True)
    assert capfd.readouterr().err == ""


def test_a_plan_has_a_short_repr(pair):
    plans = []
    merged(pair, on_plan=plans.append)
    assert repr(plans[0]).startswith(f"<Plan of merge-lora: {pair.output}, 2 weight files, ")
    assert len(repr(plans[0])) < 200 + len(str(pair.output))


# --- plot ---------------------------------------------------------------------------------------------


def test_plot_says_what_it_was_given(pair):
    for given, said in (
        (pair.base, "is no output of streamshard: it has no streamshard.json"),
        (pair.root / "bas", "'base'"),
        (3, "`report` is 3; a report, or the path of an output, was expected"),
    ):
        with pytest.raises(StreamshardError, match=said):
            streamshard.plot(given)
    with pytest.raises(UsageError, match=r"^`file` is x\.jpg"):
        streamshard.plot(pair.base, "x.jpg")


# --- reports ------------------------------------------------------------------------------------------


def test_a_report_says_its_result(pair):
    """In its repr, which is what most people see of it."""
    assert "4 tensors, 2 of them merged, L2 " in repr(merged(pair))
    assert ", as it was written; " in repr(streamshard.verify(pair.output))
    assert "no fault found, nothing recorded" in repr(streamshard.verify(pair.base))
    assert "equal in all of 4 tensors" in repr(streamshard.diff(pair.base, pair.base))
    said = repr(streamshard.diff(pair.base, pair.output))
    assert f"{pair.base} against {pair.output}, 2 of 4 tensors differ, L2 " in said
    said = repr(streamshard.diff(pair.base, pair.base, names=True))
    assert "equal in names, shapes and dtypes" in said
    assert "an adapter (LORA, r " in repr(streamshard.inspect(pair.adapter))
    env = repr(streamshard.environment())
    assert f"streamshard {streamshard.__version__}, Python 3." in env
    assert "tensors" not in env
