"""The table of request fields: complete by the official SDK's types, and true of the code."""

from __future__ import annotations

import ast
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses import response_create_params as response_params

from serve.errors import InvalidRequest, Unsupported
from serve.wire import chat, completions, fields, responses
from serve.wire.body import Body
from serve.wire.fields import Field
from serve.wire.fields_chat import CHAT
from serve.wire.fields_completions import COMPLETIONS
from serve.wire.fields_responses import RESPONSES
from serve.wire.tables import rewritten

WIRE = Path(fields.__file__).parent
USER = {"messages": [{"role": "user", "content": "hi"}]}


def sdk_fields(*bases: Any) -> set[str]:
    return {name for base in bases for name in typing.get_type_hints(base)}


TABLES: list[tuple[Sequence[Field], set[str]]] = [
    (CHAT, sdk_fields(chat_params.CompletionCreateParamsBase,
                      chat_params.CompletionCreateParamsStreaming)),
    (RESPONSES, sdk_fields(response_params.ResponseCreateParamsBase,
                           response_params.ResponseCreateParamsStreaming)),
    (COMPLETIONS, sdk_fields(CompletionCreateParamsBase) | {"stream"}),
]  # fmt: skip


@pytest.mark.parametrize(("table", "official"), TABLES)
def test_no_field_of_the_official_types_is_missing_and_extras_are_marked(
    table: Sequence[Field], official: set[str]
) -> None:
    names = [row.name for row in table]
    assert len(names) == len(set(names))
    assert official <= set(names)
    assert {row.name for row in table if not row.is_extra} <= official


def read(table: Sequence[Field], extra: Mapping[str, Any]) -> Any:
    if table is CHAT:
        return chat.read(Body({**USER, **extra}))
    if table is RESPONSES:
        return responses.read(Body({"input": "hi", **extra}), lambda _: None)
    return completions.read(Body({"prompt": "hi", **extra}))


REFUSED = [(table, row) for table, _ in TABLES for row in table if row.standing == "refused"]


@pytest.mark.parametrize(("table", "row"), REFUSED, ids=lambda x: getattr(x, "name", ""))
def test_a_refused_field_is_a_400_naming_it_unless_it_asks_for_nothing(
    table: Sequence[Field], row: Field
) -> None:
    with pytest.raises(Unsupported) as refused:
        read(table, {row.name: "something"})
    assert refused.value.param == row.name and row.says in refused.value.message
    for nothing in (None, *row.neutral):
        assert read(table, {row.name: nothing}).ignored == ()


# A wrong value of each honoured field; what is accepted anyway would be accepted and ignored.
WRONG: dict[str, Any] = {"echo": 1, "input": 1, "messages": [], "prompt": 1}
HONOURED = [
    (table, row)
    for table, _ in TABLES
    for row in table
    if row.standing == "honoured" and not (table is CHAT and row.name == "input")
]


@pytest.mark.parametrize(("table", "row"), HONOURED, ids=lambda x: getattr(x, "name", ""))
def test_a_wrong_value_of_an_honoured_field_is_a_400_naming_it(
    table: Sequence[Field], row: Field
) -> None:
    wrong = WRONG.get(row.name, 3.5 if row.name in ("stop", "tool_choice", "model") else "wrong")
    if row.name in ("instructions", "previous_response_id"):
        wrong = 7
    if row.name == "stop":
        wrong = {"a": 1}
    if row.name in ("stream_options",):
        with pytest.raises(InvalidRequest):
            read(table, {"stream": True, row.name: wrong})
        return
    with pytest.raises(InvalidRequest) as refused:
        read(table, {row.name: wrong})
    assert (refused.value.param or "").startswith(row.name), refused.value.message


def test_harmless_fields_leave_the_request_as_it_is() -> None:
    plain = chat.read(Body(USER)).request
    harmless: dict[str, Any] = {
        row.name: "x" if row.schema == fields.TEXT else {"a": "b"}
        for row in CHAT
        if row.standing == "harmless"
    }
    assert chat.read(Body({**USER, **harmless})).request == plain


def test_a_misspelt_field_is_a_400_that_says_the_right_one() -> None:
    for misspelt, right in (("temprature", "temperature"), ("max_token", "max_tokens"),
                            ("response_formats", "response_format")):  # fmt: skip
        with pytest.raises(InvalidRequest, match=f"did you mean '{right}'"):
            chat.read(Body({**USER, misspelt: 1}))


def test_a_field_nobody_knows_is_reported_as_ignored() -> None:
    assert chat.read(Body({**USER, "zzz_vendor": 1})).ignored == ("zzz_vendor",)
    codex = {"input": "hi", "client_metadata": {"a": "b"}}
    assert responses.read(Body(codex), lambda _: None).ignored == ()


@pytest.mark.parametrize("name", sorted(fields.FOREIGN))
def test_another_servers_option_that_changes_answers_is_refused_by_name(name: str) -> None:
    if name in {row.name for row in COMPLETIONS}:
        return
    with pytest.raises(Unsupported) as refused:
        chat.read(Body({**USER, name: 1}))
    assert refused.value.param == name


def test_no_reader_reads_a_field_that_no_table_names() -> None:
    """Every literal name that a reader asks a top-level body for is a row (or a nested name)."""
    rows = {row.name for table, _ in TABLES for row in table}
    for module in ("chat", "sampling", "completions"):
        tree = ast.parse((WIRE / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "body"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                assert node.args[0].value in rows, (module, node.args[0].value)


def test_docs_api_md_says_what_the_code_checks() -> None:
    page = (WIRE.parent.parent / "docs" / "api.md").read_text()
    assert rewritten(page) == page, "run: python -m serve.wire.tables docs/api.md"
    for table, _ in TABLES:
        for row in table:
            assert f"| `{row.name}` | {row.standing}" in page
