"""How arrays get from one device to another: the only things that devices do together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Message(NamedTuple):
    """An array to or from another device."""

    peer: int
    array: Any
    """What is sent; the array that is filled, if it is received."""


class Post(NamedTuple):
    """What a device sends, and what it receives; messages between two devices arrive in their order."""

    sent: Sequence[Message]
    received: Sequence[Message]


Wait = Callable[[], None]
"""Until then what was posted may be neither read nor freed."""
Program = Generator[Post, Wait, Result]
"""What one device does: it yields what it posts, and is sent back what it must call before it uses what arrived."""


class Exchange:
    """The devices that share a call, as one of them sees the others."""

    rank: int
    """The number of this device."""
    size: int
    """How many there are."""

    def post(self, post: Post) -> Wait:
        """Begin to send and receive; all devices post in the same order.

        The transfer may overlap what is computed until the function that is returned has been called.
        """
        raise NotImplementedError

    def run(self, program: Program[Result]) -> Result:
        """The result of a program here, while the other devices run theirs."""
        try:
            posted = next(program)
            while True:
                posted = program.send(self.post(posted))
        except StopIteration as stop:
            return stop.value


def run_together(programs: Sequence[Program[Result]]) -> list[Result]:
    """The results of the programs of all devices, run in turns from one exchange to the next."""
    results: list[Any] = [None] * len(programs)
    running = {rank: program for rank, program in enumerate(programs)}
    wait: Wait | None = None
    while running:
        posts: dict[int, Post] = {}
        for rank, program in list(running.items()):
            try:
                posts[rank] = next(program) if wait is None else program.send(wait)
            except StopIteration as stop:
                results[rank] = stop.value
                del running[rank]
        on_the_way: dict[tuple[int, int], deque[Any]] = {}
        for rank, post in posts.items():
            for message in post.sent:
                on_the_way.setdefault((rank, message.peer), deque()).append(message.array)
        for rank, post in posts.items():
            for message in post.received:
                message.array[...] = on_the_way[message.peer, rank].popleft()
        wait = _arrived
    return results


def _arrived() -> None:
    """Wait for nothing."""
