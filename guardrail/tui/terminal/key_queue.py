"""Keys in the order in which they were pressed: each is handed on when the one before has done all
that it does.

A key may open a dialog, which takes some frames until it stands. Keys that were typed ahead wait
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

LEAVING = ("escape", "ctrl+c", "ctrl+q")  # these wait for no dialog that does not come
PATIENCE = 0.5  # seconds after which they stop waiting
_LOOK_SECONDS = 0.01  # between two looks whether a dialog stands
_SETTLE_SECONDS = 2.0  # longest wait for a part of the screen that answers no more

NOW, LATER, NEVER = "now", "later", "never"


class KeyQueue:
    """Args:
    hand_on: gives a key to whatever has the keys.
    takes: what the dialog on top does with a key: NOW, LATER or NEVER.
    busy: the parts of the screen that may have something left to do for the last key, in order.
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
        """A key was pressed; it is handed on at once where nothing is in its way."""
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
        """Until the first key can be handed on; what nothing takes is dropped."""
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
        """Until these parts, and those that are there now, have done what a key gave them to do.

        Twice: what the first round did may have given something to do to another part.
        """
        for _ in range(2):
            for part in [*parts, *self._busy()]:
                await _done(part)


async def _done(part: MessagePump) -> None:
    """Until a part has worked through all that waits for it now."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done() -> None:
        if not future.done():
            future.set_result(None)

    if part.is_running and part.call_later(done):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(future, _SETTLE_SECONDS)
