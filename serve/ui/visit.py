"""Who is at the page: whose budget a visitor spends, whose cache they use, what they may do.

The page knows no keys and no limits; app.py passes a function that knows both. Without one the
page is open to everybody, as in tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import gradio as gr

from serve.values import Event


class Ticket(Protocol):
    """One admitted request's place in its budget."""

    def see(self, event: Event) -> None: ...

    def close(self) -> None: ...


class NoTicket:
    """Where nothing is limited."""

    def see(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Visit:
    """`admit` raises RateLimited when the visitor's budget is spent."""

    tenant: str = "page"
    may_switch: bool = False
    admit: Callable[[], Ticket] = NoTicket


# (address, session) -> Visit
VisitOf = Callable[[str, str], Visit]


def open_visit(address: str, session: str) -> Visit:
    return Visit(f"page:{address}/{session}")


def visit_from(visit_of: VisitOf, request: gr.Request | None) -> Visit:
    """The visitor behind a Gradio event."""
    client = getattr(request, "client", None)
    address = client.host if client is not None else ""
    return visit_of(address, getattr(request, "session_hash", None) or "")
