"""One turn of the page: what the browser asks, remembered and answered as a stream of snapshots.

Knows the page's turn (a JSON object, see Turn) and the service; knows no widgets. Never raises:
whatever goes wrong becomes a snapshot with phase "failed", so the page is never stuck. Called by
page.py's one generator event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import InvalidRequest, ModelLoading, ServeError, Unavailable, Unsupported
from serve.service import Service
from serve.ui.answer import Answer
from serve.ui.attachments import read_files
from serve.ui.memory import Memory, Node, messages, node_from
from serve.ui.options import Options, options_from, without_pictures
from serve.ui.pace import counted, watch
from serve.ui.visit import Visit
from serve.values import ChatRequest, Message, Part, TextPart

log = logging.getLogger(__name__)

Snapshot = dict[str, Any]
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    """`answer` is the new node, child of the user node `question`; `history` what the server may
    lack; `continues` the text an interrupted answer already has; `keep_files_of` the user node
    whose attachments an edited message keeps; `first` the message that the model reads from on,
    where the reader has left out earlier ones."""

    answer: str
    question: str
    options: Options
    parent: str = ""
    text: str | None = None
    keep_files_of: str = ""
    history: tuple[Mapping[str, Any], ...] = ()
    continues: str = ""
    first: str = ""


def turn_from(given: Mapping[str, Any]) -> Turn:
    """Raises InvalidRequest naming the field."""
    answer, question = given.get("answer"), given.get("question")
    if not isinstance(answer, str) or not isinstance(question, str) or not answer or not question:
        raise InvalidRequest("A turn names its question and its answer.", param="turn")
    text = given.get("text")
    history = given.get("history") or []
    if not isinstance(history, list) or not all(isinstance(node, dict) for node in history):
        raise InvalidRequest("history must be a list of messages.", param="history")
    return Turn(
        answer=answer,
        question=question,
        options=options_from(given.get("options") or {}),
        parent=str(given.get("parent") or ""),
        text=None if text is None else str(text),
        keep_files_of=str(given.get("keep_files_of") or ""),
        history=tuple(history),
        continues=str(given.get("continues") or ""),
        first=str(given.get("first") or ""),
    )


async def run_turn(
    service: Service,
    memory: Memory,
    given: Any,
    files: Sequence[str] = (),
    visit: Visit | None = None,
) -> AsyncGenerator[Snapshot]:
    """Snapshots of the answer, at most ten a second. Closing it stops the work."""
    asked = given if isinstance(given, dict) else {}
    if asked.get("noop"):  # an empty box was sent
        return
    answer = Answer(str(asked.get("answer") or ""), str(asked.get("continues") or ""))
    try:
        turn = turn_from(asked)
        question = await _remember(memory, turn, files, answer)
        if question is None:
            yield {"turn": turn.answer, "phase": "need_history"}
            return
        async with contextlib.aclosing(
            _answer(service, memory, turn, answer, visit or Visit())
        ) as news:
            async for _ in news:
                yield answer.snapshot()
    except ServeError as error:
        answer.fail(error)
        yield answer.snapshot()
    except Exception:  # the Gradio callback's boundary: the page gets a message, the log the trace
        log.exception("the page's turn broke")
        answer.fail(ServeError("Something broke on the server. The log has the details."))
        yield answer.snapshot()


async def _remember(
    memory: Memory, turn: Turn, files: Sequence[str], answer: Answer
) -> Node | None:
    """Put the turn's question into memory and return it; None when the browser must say more."""
    for known in turn.history:
        memory.remember(node_from(known))
    if turn.text is not None:
        kept = memory.node(turn.keep_files_of) if turn.keep_files_of else None
        if turn.keep_files_of and kept is None:
            return None
        attached = await asyncio.to_thread(read_files, files)
        answer.files = [a.record() for a in attached]
        parts = [*_files_of(kept), *(p for a in attached if (p := a.part()) is not None)]
        memory.remember(Node(turn.question, turn.parent, "user", (*parts, TextPart(turn.text))))
    if memory.path(turn.question) is None:
        return None
    return memory.node(turn.question)


def _files_of(node: Node | None) -> tuple[Part, ...]:
    """A message's attachments: every part but its own words, which come last."""
    return node.parts[:-1] if node is not None else ()


async def _answer(
    service: Service, memory: Memory, turn: Turn, answer: Answer, visit: Visit
) -> AsyncGenerator[None]:
    path = memory.path(turn.question) or []
    ids = [node.id for node in path]
    if turn.first and turn.first not in ids:
        raise InvalidRequest("first must be a message of this conversation.", param="first")
    begin = ids.index(turn.first) if turn.first else 0
    said = messages(path[begin:], turn.options.system)
    if turn.continues:
        said.append(Message("assistant", (TextPart(turn.continues),)))
    request = replace(
        turn.options.request(said),
        tenant=visit.tenant,
        may_switch=visit.may_switch,
        continue_final_message=bool(turn.continues),
    )
    try:
        async with contextlib.aclosing(_when_ready(service, request, answer, visit)) as news:
            async for _ in news:
                yield
    finally:
        if answer.text:
            memory.remember(Node(turn.answer, turn.question, "assistant", (TextPart(answer.text),)))


async def _when_ready(
    service: Service, request: ChatRequest, answer: Answer, visit: Visit
) -> AsyncGenerator[None]:
    """Wait for the model, which may still be loading or have to be switched to; then run."""
    while True:
        async with contextlib.aclosing(_wait(service, request.model, answer)) as waiting:
            async for _ in waiting:
                yield
        async with contextlib.aclosing(_run(service, request, answer, visit)) as news:
            async for _ in news:
                if isinstance(answer.failure, ModelLoading):
                    break
                yield
        if not isinstance(answer.failure, ModelLoading):
            return
        answer.begin_again()


async def _wait(service: Service, model: str, answer: Answer) -> AsyncGenerator[None]:
    """Until a model serves; after a switch was begun, until it is the one that was asked for."""
    is_switching = answer.phase == "waiting"
    while not _serves(service, model if is_switching else ""):
        if service.status().progress.phase == "failed":
            raise Unavailable("No model could be loaded; the line at the top says why.")
        answer.phase = "waiting"
        yield
        await asyncio.sleep(POLL_SECONDS)


def _serves(service: Service, model: str) -> bool:
    status = service.status()
    card = status.model
    return status.is_ready and (model not in status.offered or card is None or card.id == model)


async def _run(
    service: Service, request: ChatRequest, answer: Answer, visit: Visit
) -> AsyncGenerator[None]:
    """Pictures go to a model that sees, and to one of which that is unknown; a model that does not
    gets the text alone, and the answer says so."""
    card = service.card(request.model)
    sees = card.capabilities.vision if card is not None else None
    has_pictures = any(message.images for message in request.messages)
    if not has_pictures or sees is not False:
        async with contextlib.aclosing(_events(service, request, answer, visit)) as news:
            async for _ in news:
                if has_pictures and isinstance(answer.failure, Unsupported):
                    break
                yield
        if not (has_pictures and isinstance(answer.failure, Unsupported)):
            return
        answer.begin_again()
    if request.messages[-1].images or sees is None:
        answer.notes = [{"code": "images_not_used", "model": card.id if card else request.model}]
    request = replace(request, messages=without_pictures(request.messages))
    async with contextlib.aclosing(_events(service, request, answer, visit)) as news:
        async for _ in news:
            yield


def _events(
    service: Service, request: ChatRequest, answer: Answer, visit: Visit
) -> AsyncGenerator[None]:
    return watch(counted(service.chat(request), visit), answer)
