"""Waiting between attempts to reach a broker."""

import asyncio
import random

_FIRST_S = 0.5
_LONGEST_S = 30.0


class Backoff:
    """Doubles from half a second to half a minute, with jitter, so that thousands of workers do not come back at once."""

    def __init__(self) -> None:
        self._base_s = _FIRST_S
        self.next_s = 0.0
        self._draw()

    def reset(self) -> None:
        self._base_s = _FIRST_S
        self._draw()

    async def wait(self, *, unless: asyncio.Event) -> None:
        """Until the time is over or the event is set."""
        wait_s = self.next_s
        self._base_s = min(2 * self._base_s, _LONGEST_S)
        self._draw()
        try:
            async with asyncio.timeout(wait_s):
                await unless.wait()
        except TimeoutError:
            return

    def _draw(self) -> None:
        self.next_s = self._base_s * random.uniform(0.5, 1.0)  # noqa: S311
