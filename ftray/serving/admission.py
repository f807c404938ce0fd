"""Who may be in a step of the engine, and who surely is not: those that wait here."""

import asyncio
from collections import deque


class Admission:
    """Lets requests into the engine in the order they came, while it has slots for them and a few more.

    Args:
        slots: of the engine.
    """

    def __init__(self, slots: int):
        self.most = slots + max(1, slots // 8)  # a slot that gets free need not wait for a request to be let in
        self._free = self.most
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, count: int) -> int:
        """Wait for `count` slots, or all, if there are less; returns how many :meth:`leave` is to give back."""
        count = min(count, self.most)
        if not self._line and count <= self._free:
            self._free -= count
            return count
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was let in at the same time
                self.leave(count)
            else:
                self._line.remove((count, turn))
                self.leave(0)
            raise
        return count

    def leave(self, count: int) -> None:
        """Give back so many slots."""
        self._free += count
        while self._line and self._line[0][0] <= self._free:
            taken, turn = self._line.popleft()
            self._free -= taken
            turn.set_result(None)
