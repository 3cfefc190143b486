"""Mailboxes: everything arrives in order, and one wake-up serves all of a loop's mailboxes."""

from __future__ import annotations

import asyncio
import threading

from serve.engine.face import AsyncMailbox, BlockingMailbox, Ended, Message, Tokens


async def read(mailbox: AsyncMailbox) -> list[Message]:
    return [message async for message in mailbox]


def test_messages_from_another_thread_arrive_whole_and_in_order() -> None:
    async def main() -> None:
        mailboxes = [AsyncMailbox() for _ in range(20)]
        readers = [asyncio.create_task(read(mailbox)) for mailbox in mailboxes]

        def write() -> None:
            for step in range(50):
                for mailbox in mailboxes:
                    mailbox.post([Tokens((step,))])
            for mailbox in mailboxes:
                mailbox.post([Tokens((50,)), Ended("finished")])

        thread = threading.Thread(target=write)
        thread.start()
        for messages in await asyncio.gather(*readers):
            assert [m.ids[0] for m in messages if isinstance(m, Tokens)] == list(range(51))
            assert isinstance(messages[-1], Ended)
        thread.join()

    asyncio.run(main())


def test_one_wake_up_serves_every_mailbox_of_a_step() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        mailboxes = [AsyncMailbox() for _ in range(32)]
        calls = 0
        schedule = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal calls
            calls += 1
            return schedule(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[assignment,method-assign]
        for mailbox in mailboxes:  # the loop cannot run in between: it is busy here
            mailbox.post([Ended("finished")])
        await asyncio.gather(*(read(mailbox) for mailbox in mailboxes))
        return calls

    assert asyncio.run(main()) == 1


def test_posting_to_a_closed_loop_is_harmless() -> None:
    async def make() -> AsyncMailbox:
        return AsyncMailbox()

    mailbox = asyncio.run(make())
    mailbox.post([Ended("finished")])


def test_a_blocking_mailbox_ends_after_ended() -> None:
    mailbox = BlockingMailbox()
    mailbox.post([Tokens((1,)), Ended("finished"), Tokens((2,))])
    assert [type(m).__name__ for m in mailbox] == ["Tokens", "Ended"]
