"""Handles keys in the order in which they were pressed, one after the other.

A key may open a dialog, which needs some frames until it is drawn. Keys that were typed ahead wait
for it. A dialog that opened by itself takes no key that was pressed before it was drawn: that key
was meant for something else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from textual.events import Key
from textual.message_pump import MessagePump

LEAVING = ("escape", "ctrl+c", "ctrl+q")  # these do not wait for a dialog for ever
PATIENCE = 0.5  # seconds that they wait
_LOOK_SECONDS = 0.01  # between two checks whether a dialog is drawn
_SETTLE_SECONDS = 2.0  # longest wait for a part of the screen that does not respond

NOW, LATER, NEVER = "now", "later", "never"


class KeyQueue:
    """Keys that were pressed and are not handled yet.

    Args:
        hand_on: gives a key to the focused part.
        takes: what the dialog on top does with a key: NOW, LATER or NEVER.
        busy: the parts of the screen that may still have work to do for the last key, in order.
    """

    def __init__(
        self,
        hand_on: Callable[[Key], Awaitable[None]],
        takes: Callable[[Key], str],
        busy: Callable[[], Iterable[MessagePump]],
    ) -> None:
        self._hand_on, self._takes, self._busy = hand_on, takes, busy
        self._keys: deque[Key] = deque()
        self._task: asyncio.Task[None] | None = None

    async def press(self, key: Key) -> None:
        """Take a key that was pressed; handle it at once where no other key waits."""
        if self._task is None and self._takes(key) == NOW:
            parts = list(self._busy())
            await self._hand_on(key)
            self._task = asyncio.create_task(self._go_on(parts))
        else:
            self._keys.append(key)
            if self._task is None:
                self._task = asyncio.create_task(self._go_on([]))

    async def _go_on(self, parts: list[MessagePump]) -> None:
        try:
            await self._settle(parts)
            while self._keys:
                await self._wait()
                if not self._keys:
                    continue
                key = self._keys.popleft()
                parts = list(self._busy())
                await self._hand_on(key)
                await self._settle(parts)
        finally:
            self._task = None

    async def _wait(self) -> None:
        """Wait until the first key can be handled; keys that nothing takes are dropped."""
        waited = 0.0
        while self._keys:
            takes = self._takes(self._keys[0])
            if takes == NOW:
                return
            if takes == NEVER:
                self._keys.popleft()
                continue
            if waited >= PATIENCE and any(key.key in LEAVING for key in self._keys):
                while self._keys[0].key not in LEAVING:
                    self._keys.popleft()
                return
            await asyncio.sleep(_LOOK_SECONDS)
            waited += _LOOK_SECONDS

    async def _settle(self, parts: list[MessagePump]) -> None:
        """Wait until these parts, and those that exist now, have finished their work for a key.

        This is done twice: the work of one part may give work to another.
        """
        for _ in range(2):
            for part in [*parts, *self._busy()]:
                await _done(part)


async def _done(part: MessagePump) -> None:
    """Wait until a part has handled all messages that wait for it now."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done() -> None:
        if not future.done():
            future.set_result(None)

    if part.is_running and part.call_later(done):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(future, _SETTLE_SECONDS)
