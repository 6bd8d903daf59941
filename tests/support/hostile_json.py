"""Any JSON value anywhere, and what may come of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from streamshard.errors import StreamshardError

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


def only_our_errors(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Run it; whatever goes wrong must be said by an error of ours, in printable words, and soon."""
    started = time.thread_time()
    try:
        function(*arguments, **options)
    except StreamshardError as error:
        assert str(error).replace("\n", "").isprintable()  # noqa: PT017
        assert len(str(error)) < 3000  # noqa: PT017
    assert time.thread_time() - started < 30
