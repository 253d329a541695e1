"""The whole way from bytes or odd values to examples: examples come out, or one DataError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data.dataset import load_preferences, load_prompts, load_sft
from rlhf_fast.data.examples import LoadOptions
from rlhf_fast.errors import DataError

LOADERS = [load_sft, load_preferences, load_prompts]

texts = st.sampled_from(
    ["", " ", "the cat", "the cat sat", "<|im_end|>", "\x00", "\ud800", "\ufdd0", "a" * 60, "é\n"]
)
scalars = st.one_of(texts, st.none(), st.booleans(), st.integers(-3, 3), st.floats())
message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", None, 3])},
        optional={"content": scalars, "from": texts},
    ),
    scalars,
)
values = st.one_of(scalars, st.lists(message, max_size=4), st.lists(st.lists(message), max_size=3))
columns = st.sampled_from(
    ["prompt", "completion", "text", "messages", "chosen", "rejected", "completions", "ranks",
     "scores", "margin", "other", "\ud800"]
)  # fmt: skip
rows = st.lists(st.one_of(st.dictionaries(columns, values, max_size=5), scalars), max_size=5)


@pytest.mark.parametrize("load", LOADERS)
@given(
    rows=rows,
    on_bad_row=st.sampled_from(["error", "skip"]),
    overlong=st.sampled_from(["filter", "truncate-left", "error"]),
    length=st.integers(2, 40),
    replace=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_odd_rows_give_sound_examples_or_one_data_error(
    bpe: PreTrainedTokenizerFast,
    load: Any,
    rows: list[Any],
    on_bad_row: str,
    overlong: str,
    length: int,
    replace: bool,
) -> None:
    options = LoadOptions(
        max_prompt_length=length,
        max_length=length,
        on_bad_row=on_bad_row,
        overlong=overlong,
        replace_invalid_text=replace,
    )
    data, error = None, None
    try:
        data = load(rows, bpe, options)
    except DataError as caught:
        error = caught
    if error is not None:
        assert error.where
        assert error.remedy
        str(error).encode("utf-8")
        return
    report = data.report
    assert report.read == len(rows)
    assert report.read == report.kept + sum(report.filtered.values())
    for example in data.examples:
        tensors = example.sequences() if load is load_preferences else [example.ids]
        assert all(1 <= t.numel() <= length for t in tensors)
        if load is load_preferences:
            assert len({tuple(c.tolist()) for c in example.completions}) == len(tensors) >= 2
            assert example.prompt_ids.numel() >= 1


@pytest.mark.parametrize("load", LOADERS)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=6), at=st.integers(0, 400), cut=st.integers(0, 30))
def test_mutated_files_give_examples_or_one_data_error(
    bpe: PreTrainedTokenizerFast, tmp_path: Path, load: Any, noise: bytes, at: int, cut: int
) -> None:
    valid = (
        b'{"prompt": "the cat", "completion": " sat", "chosen": " on", "rejected": " off"}\n'
        b'{"prompt": [{"role": "user", "content": "hi"}],'
        b' "completion": [{"role": "assistant", "content": "ho"}],'
        b' "chosen": [{"role": "assistant", "content": "a"}],'
        b' "rejected": [{"role": "assistant", "content": "b"}]}\n'
    )
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(valid[:at] + noise + valid[at + cut :])
    data, error = None, None
    try:
        data = load(path, bpe)
    except DataError as caught:
        error = caught
    if error is not None:
        assert error.where.startswith(str(path))
        assert error.remedy
    else:
        assert 1 <= len(data) <= 2 + noise.count(b"\n")
