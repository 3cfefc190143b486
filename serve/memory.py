"""Chains of thought between tool calls, kept for clients that drop them.

gpt-oss thinks on after a tool's result only if it sees what it thought before the call. Kept per
tenant under the ids of the calls, for an hour, within bounds; put back into an assistant turn that
calls tools and carries no reasoning of its own. Used by openai_compat.py on the event loop.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from serve.values import (
    ChatRequest,
    ChoiceFinished,
    Event,
    Message,
    ReasoningDelta,
    ReasoningPart,
    ToolCallStarted,
)

KEPT_SECONDS = 3600.0
MOST_CALLS = 20_000
MOST_CALLS_A_TENANT = 2_000
MOST_CHARS = 64 * 1024 * 1024

_Key = tuple[str, str]  # tenant, tool_call_id


class ThoughtMemory:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[_Key, tuple[float, str]] = OrderedDict()
        self._tenants: dict[str, OrderedDict[str, None]] = {}
        self._chars = 0

    def keep(self, tenant: str, call_id: str, thought: str) -> None:
        self._drop((tenant, call_id))
        self._kept[tenant, call_id] = (self._clock(), thought)
        calls = self._tenants.setdefault(tenant, OrderedDict())
        calls[call_id] = None
        self._chars += len(thought)
        if len(calls) > MOST_CALLS_A_TENANT:
            self._drop((tenant, next(iter(calls))))
        while self._kept and self._is_too_much():
            self._drop(next(iter(self._kept)))

    def _is_too_much(self) -> bool:
        oldest, _ = next(iter(self._kept.values()))
        return (
            len(self._kept) > MOST_CALLS
            or self._chars > MOST_CHARS
            or oldest < self._clock() - KEPT_SECONDS
        )

    def _drop(self, key: _Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self._chars -= len(kept[1])
        calls = self._tenants[key[0]]
        del calls[key[1]]
        if not calls:
            del self._tenants[key[0]]

    def recall(self, tenant: str, call_id: str) -> str:
        made, thought = self._kept.get((tenant, call_id), (0.0, ""))
        return thought if thought and made >= self._clock() - KEPT_SECONDS else ""

    def restore(self, request: ChatRequest) -> ChatRequest:
        """The request with what its assistant turns thought before they called tools."""
        restored = tuple(self._restored(message, request.tenant) for message in request.messages)
        return replace(request, messages=restored)

    def _restored(self, message: Message, tenant: str) -> Message:
        if message.role != "assistant" or message.reasoning:
            return message
        for call in message.tool_calls:
            thought = self.recall(tenant, call.id)
            if thought:
                return replace(message, parts=(ReasoningPart(thought), *message.parts))
        return message

    def recorder(self, tenant: str) -> ThoughtRecorder:
        return ThoughtRecorder(self, tenant)


class ThoughtRecorder:
    """Watches one answer; as a choice ends, its thoughts are kept under its calls."""

    def __init__(self, memory: ThoughtMemory, tenant: str) -> None:
        self._memory = memory
        self._tenant = tenant
        self._thoughts: dict[int, list[str]] = {}
        self._calls: list[tuple[str, int]] = []

    def see(self, event: Event) -> None:
        if isinstance(event, ReasoningDelta):
            self._thoughts.setdefault(event.choice, []).append(event.text)
        elif isinstance(event, ToolCallStarted):
            self._calls.append((event.id, event.choice))
        elif isinstance(event, ChoiceFinished):
            self._keep(event.choice)

    def close(self) -> None:
        """A choice that did not end is not kept: its client has no ids to ask by."""

    def _keep(self, finished: int) -> None:
        thought = "".join(self._thoughts.get(finished, ()))
        for call_id, choice in self._calls:
            if choice == finished and thought:
                self._memory.keep(self._tenant, call_id, thought)
