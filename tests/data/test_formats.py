"""Column conventions: what each layout becomes, and the message for each way to get it wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_fast.data.columns import Message
from rlhf_fast.data.formats import (
    CompletionRecord,
    TextRecord,
    parse_prompt,
    parse_sft,
)
from rlhf_fast.data.preferences import parse_preference
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import DataError

ORIGIN = "train.jsonl:7"


def row(**fields: Any) -> Row:
    return Row(ORIGIN, 6, fields)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def fault(parse: Callable[[Row], Any], **fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row(**fields))
    assert caught.value.where == ORIGIN
    assert caught.value.remedy
    return caught.value


def test_prompt_text_and_messages() -> None:
    assert parse_prompt(row(prompt="hi", answer=3)).prompt == "hi"
    record = parse_prompt(row(prompt=[{"role": "system", "content": "be kind"}, user("hi")]))
    assert record.prompt == (Message("system", "be kind"), Message("user", "hi"))


def test_content_of_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_prompt(row(prompt=[user(parts)])).prompt == (Message("user", "ab"),)
    error = fault(parse_prompt, prompt=[user([{"type": "image", "url": "x"}])])
    assert error.code == "RF2021"
    assert "prompt[0].content[0]" in error.what


@pytest.mark.parametrize(
    ("parse", "fields", "hint"),
    [
        (parse_prompt, {"question": "x", "id": 1}, "rename 'question' to 'prompt'"),
        (parse_prompt, {"promt": "x"}, "rename 'promt' to 'prompt'"),
        (parse_prompt, {"Prompt ": "x"}, "rename 'Prompt ' to 'prompt'"),
        (parse_sft, {"prompt": "x", "response": "y"}, "rename 'response' to 'completion'"),
        (parse_sft, {"conversations": []}, "rename 'conversations' to 'messages'"),
        (parse_sft, {}, "rename or add"),
        (
            parse_preference,
            {"prompt": "x", "chosen": "y", "rejectd": "z"},
            "'rejectd' to 'rejected'",
        ),
        (parse_preference, {"prompt": "x", "responses": []}, "'responses' to 'completions'"),
    ],
)
def test_missing_or_renamed_column(
    parse: Callable[[Row], Any], fields: dict[str, Any], hint: str
) -> None:
    error = fault(parse, **fields)
    assert error.code == "RF2020"
    assert hint in error.remedy
    for name in fields:
        assert repr(name) in error.what


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "null"), (3, "a number"), (True, "a boolean"), ({"a": 1}, "an object")],
)
@pytest.mark.parametrize(
    ("parse", "column", "rest"),
    [
        (parse_prompt, "prompt", {}),
        (parse_sft, "text", {}),
        (parse_sft, "completion", {"prompt": "x"}),
        (parse_preference, "chosen", {"prompt": "x", "rejected": "y"}),
    ],
)
def test_null_or_number_where_text_is_expected(
    parse: Callable[[Row], Any], column: str, rest: dict[str, Any], value: Any, kind: str
) -> None:
    error = fault(parse, **{column: value}, **rest)
    assert error.code == "RF2021"
    assert f"'{column}' is {kind}" in error.what
    assert "text" in error.expected


@pytest.mark.parametrize("value", ["", "  \n\t"])
def test_empty_text(value: str) -> None:
    assert fault(parse_prompt, prompt=value).code == "RF2025"
    assert fault(parse_sft, prompt="x", completion=value).code == "RF2025"
    assert fault(parse_sft, text=value).code == "RF2025"
    assert "'prompt' is empty" in fault(parse_prompt, prompt=value).what


def test_sft_layouts_and_their_precedence() -> None:
    messages = [user("hi"), assistant("ho")]
    record = parse_sft(row(messages=messages, text="x", prompt="y", completion="z"))
    assert isinstance(record, CompletionRecord)
    assert record.prompt == ()
    assert record.completion == (Message("user", "hi"), Message("assistant", "ho"))
    pair = parse_sft(row(prompt="y", completion="z", text="x"))
    assert isinstance(pair, CompletionRecord)
    assert (pair.prompt, pair.completion) == ("y", "z")
    assert isinstance(parse_sft(row(text="x")), TextRecord)


def test_null_columns_say_nothing_about_the_format() -> None:
    nothing = dict.fromkeys(("messages", "prompt", "completion", "text"))
    text = parse_sft(row(**nothing | {"text": "t"}))
    assert isinstance(text, TextRecord)
    pair = parse_sft(row(**nothing | {"prompt": "p", "completion": "c"}))
    assert (pair.prompt, pair.completion) == ("p", "c")  # type: ignore[union-attr]
    talk = parse_sft(row(**nothing | {"messages": [user("u"), assistant("a")]}))
    assert talk.completion == (Message("user", "u"), Message("assistant", "a"))  # type: ignore[union-attr]
    nobody = dict.fromkeys(("prompt", "chosen", "rejected", "completions", "ranks"))
    record = parse_preference(row(**nobody | {"prompt": "p", "chosen": "c", "rejected": "r"}))
    assert record.completions == ("c", "r")
    ranked = {"prompt": "p", "completions": ["r", "c"], "ranks": [2, 1]}
    assert parse_preference(row(**nobody | ranked)).completions == ("c", "r")


def test_what_is_null_in_the_only_format_is_still_named() -> None:
    assert "'messages' is null" in fault(parse_sft, messages=None, id=3).what
    assert "'completion' is null" in fault(parse_sft, prompt="p", completion=None, text="t").what
    assert "'rejected' is null" in fault(parse_preference, chosen="c", rejected=None).what
    assert "'completions' is null" in fault(parse_preference, prompt="p", completions=None).what


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("human", "'user'"),
        ("gpt", "'assistant'"),
        ("asistant", "'assistant'"),
        ("Q", "one of"),
        (None, "one of"),
        (["user"], "'user'"),
    ],
)
def test_unknown_role(role: Any, hint: str) -> None:
    error = fault(parse_sft, messages=[{"role": role, "content": "x"}])
    assert error.code == "RF2023"
    assert "messages[0]" in error.what
    assert hint in error.remedy


def test_consecutive_same_role() -> None:
    error = fault(parse_sft, messages=[user("a"), user("b"), assistant("c")])
    assert error.code == "RF2024"
    assert "messages[1] has the role 'user'" in error.what
    tools = [user("a"), assistant("b"), *[{"role": "tool", "content": "c"}] * 2, assistant("d")]
    assert len(parse_sft(row(messages=tools)).completion) == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_message(content: str) -> None:
    error = fault(parse_sft, messages=[user("a"), assistant(content)])
    assert error.code == "RF2025"
    assert "messages[1].content" in error.what


@pytest.mark.parametrize(
    ("messages", "code", "what"),
    [
        ([], "RF2025", "is empty"),
        (["hi"], "RF2021", "messages[0]"),
        ([user(None)], "RF2021", "messages[0].content' is null"),
        ([user(3)], "RF2021", "a number"),
        ([{"role": "user"}], "RF2022", "'content'"),
        ("hi", "RF2021", "is text"),
    ],
)
def test_malformed_messages(messages: Any, code: str, what: str) -> None:
    error = fault(parse_sft, messages=messages)
    assert error.code == code
    assert what in error.what


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content", "thinking"])
def test_what_is_said_beside_the_content_is_not_lost(key: str) -> None:
    said = assistant("a") | {key: [{"name": "f"}] if "call" in key else "first, think"}
    error = fault(parse_sft, messages=[user("u"), said])
    assert error.code == "RF2022"
    assert f"messages[1] says something in '{key}'" in error.what
    for nothing in (None, [], ""):
        parse_sft(row(messages=[user("u"), assistant("a") | {key: nothing, "name": "x"}]))


def test_share_gpt_keys_are_explained() -> None:
    error = fault(parse_sft, messages=[{"from": "human", "value": "hi"}])
    assert error.code == "RF2022"
    assert "rename 'from' to 'role' and 'value' to 'content'" in error.remedy


def test_text_and_messages_do_not_mix() -> None:
    error = fault(parse_sft, prompt=[user("hi")], completion="ho")
    assert error.code == "RF2026"
    assert fault(parse_preference, chosen="a b", rejected=[assistant("c")]).code == "RF2026"
    assert (
        fault(parse_preference, prompt="p", chosen=[assistant("a")], rejected=[assistant("b")]).code
        == "RF2026"
    )


def test_turn_order_of_prompt_and_completion() -> None:
    assert fault(parse_prompt, prompt=[user("a"), assistant("b")]).code == "RF2022"
    assert fault(parse_sft, prompt=[user("a")], completion=[user("b")]).code == "RF2022"


def test_explicit_preference_with_margin() -> None:
    record = parse_preference(row(prompt="q", chosen=" a", rejected=" b", margin=2))
    assert (record.prompt, record.completions, record.margin) == ("q", (" a", " b"), 2.0)
    assert parse_preference(row(prompt="q", chosen="a", rejected="")).completions == ("a", "")


@pytest.mark.parametrize("margin", ["2", -1, float("nan"), float("inf"), True, [1], 10**400])
def test_bad_margin(margin: Any) -> None:
    error = fault(parse_preference, prompt="q", chosen="a", rejected="b", margin=margin)
    assert error.code == "RF2030"
    assert "finite" in error.expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("one two three", "one twenty", "one"),
        ("Q: why?\nbecause", "Q: why?\nbored", "Q: why?\n"),
        ("a b", "a b c", "a b"),
        (
            "\n\nHuman: hi\n\nAssistant: I am",
            "\n\nHuman: hi\n\nAssistant: I do",
            "\n\nHuman: hi\n\nAssistant:",
        ),
    ],
)
def test_implicit_text_prompt(chosen: str, rejected: str, prompt: str) -> None:
    record = parse_preference(row(chosen=chosen, rejected=rejected))
    assert record.prompt == prompt
    assert [prompt + str(c) for c in record.completions] == [chosen, rejected]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Paris is big", "London is big"),
        ("Parisian", "Paris"),
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: x"),
        (
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: y",
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: y",
        ),
    ],
)
def test_different_text_prompts(chosen: str, rejected: str) -> None:
    error = fault(parse_preference, chosen=chosen, rejected=rejected)
    assert error.code == "RF2027"
    assert "same prompt" in error.expected


def test_a_text_prompt_that_the_conversations_repeat() -> None:
    """The layout of UltraFeedback's pairs."""
    pair = {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No")]}
    record = parse_preference(row(prompt="Why?", **pair))
    assert record.prompt == (Message("user", "Why?"),)
    assert [c[0].content for c in record.completions] == ["So.", "No"]
    assert fault(parse_preference, prompt="When?", **pair).code == "RF2026"
    other = {
        "chosen": [user("Why?"), assistant("So.")],
        "rejected": [user("What?"), assistant("No")],
    }
    assert fault(parse_preference, prompt="Why?", **other).code == "RF2026"


def test_implicit_messages_prompt() -> None:
    record = parse_preference(
        row(chosen=[user("q"), assistant("a")], rejected=[user("q"), assistant("b")])
    )
    assert record.prompt == (Message("user", "q"),)
    assert record.completions == ((Message("assistant", "a"),), (Message("assistant", "b"),))


def test_different_message_prompts() -> None:
    pair = {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    assert fault(parse_preference, **pair).code == "RF2027"
    assert fault(parse_preference, prompt=[user("q")], **pair).code == "RF2027"
    later = {
        "chosen": [user("q"), assistant("a"), user("x"), assistant("c")],
        "rejected": [user("q"), assistant("a"), user("y"), assistant("c")],
    }
    error = fault(parse_preference, **later)
    assert error.code == "RF2027"
    assert "message 3" in error.what


def test_prompt_repeated_in_the_completions_is_taken_off() -> None:
    prompt = [user("q")]
    record = parse_preference(
        row(prompt=prompt, chosen=[*prompt, assistant("a")], rejected=[*prompt, assistant("b")])
    )
    assert record.completions == ((Message("assistant", "a"),), (Message("assistant", "b"),))
    transcript = "\n\nHuman: hi\n\nAssistant:"
    text = parse_preference(
        row(prompt=transcript, chosen=transcript + " a", rejected=transcript + " b")
    )
    assert text.completions == (" a", " b")
    # A bare text that happens to begin both answers stays.
    assert parse_preference(row(prompt="I", chosen="I am", rejected="It")).completions == (
        "I am",
        "It",
    )
    nothing = fault(parse_preference, prompt=prompt, chosen=prompt, rejected=prompt)
    assert nothing.code == "RF2022"


def test_ranked_lists() -> None:
    best_first = parse_preference(row(prompt="q", completions=["a", "b", "c"]))
    assert best_first.completions == ("a", "b", "c")
    ranks = parse_preference(row(prompt="q", completions=["a", "b", "c"], ranks=[3, 1, 2]))
    assert ranks.completions == ("b", "c", "a")
    scores = parse_preference(row(prompt="q", completions=["a", "b", "c"], scores=[0.5, -1, 2]))
    assert scores.completions == ("c", "a", "b")
    messages = parse_preference(
        row(prompt=[user("q")], completions=[[assistant("a")], [assistant("b")]], ranks=[2, 1])
    )
    assert messages.completions == ((Message("assistant", "b"),), (Message("assistant", "a"),))


def test_ties_keep_the_first() -> None:
    record = parse_preference(row(prompt="q", completions=["a", "b", "c"], scores=[1, 2, 1]))
    assert (record.completions, record.ties) == (("b", "a"), 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"ranks": [1]},
        {"scores": [1, None]},
        {"scores": [1, float("nan")]},
        {"ranks": "12"},
        {"ranks": 3},
        {"scores": [1, "2"]},
    ],
)
def test_bad_ranks_or_scores(extra: dict[str, Any]) -> None:
    error = fault(parse_preference, prompt="q", completions=["a", "b"], **extra)
    assert error.code == "RF2029"
    assert "2 finite numbers" in error.expected


@pytest.mark.parametrize(
    ("completions", "code"),
    [(["a"], "RF2022"), ([], "RF2022"), ("ab", "RF2021"), (["a", 3], "RF2021")],
)
def test_bad_completions(completions: Any, code: str) -> None:
    assert fault(parse_preference, prompt="q", completions=completions).code == code
