"""The queue: bounded, one order at a time, the clients in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..cli.arguments import Task
from ..options import GenerationOptions
from .events import Event, Failure, Queued, StepDone


@dataclass(eq=False)
class Order:
    """What a client wants drawn.

    Attributes:
        client: who; orders of several clients take turns.
        model: the model's name.
        task: the options, checked.
        emit: takes each event, in the worker's thread, or in that of a client that comes or goes.
        previews: how many of an image's steps show a preview; None for all.
        warnings: what was left out of the request.
        keep_alive: seconds that the model stays loaded afterwards; None for the server's.
        suit: fits the options to a model that is distilled, or not, once it is open; gives them and what it left out.
        is_cancelled: whether the client has gone.
        position: orders that come before it, as it was told last.
        last_step: the last that was done of it.
    """

    client: str
    model: str
    task: Task
    emit: Callable[[Event], None]
    previews: int | None = 0
    warnings: tuple[str, ...] = ()
    keep_alive: float | None = None
    suit: Callable[[GenerationOptions, bool], tuple[GenerationOptions, list[str]]] | None = None
    is_cancelled: bool = field(default=False, init=False)
    position: int | None = field(default=None, init=False)
    last_step: StepDone | None = field(default=None, init=False)

    def interrupt(self) -> None:
        """Stop at the next step, as somebody else than the one who waits for it wants."""
        self.is_cancelled = True
        self.emit(Failure("interrupted", 409))

    def move(self, position: int) -> None:
        """Tell the client where in the queue it is, if that changed."""
        if position != self.position:
            self.position = position
            self.emit(Queued(position))


class Queue:
    """Orders that wait.

    The last quarter of the places is for clients of whom none waits, so that no client can take all of them.

    Args:
        places: the most orders that wait.
        seconds: estimates how long an order takes.
    """

    def __init__(self, places: int, seconds: Callable[[], float] = lambda: 1.0):
        self.places, self.seconds = places, seconds
        self.running: Order | None = None
        self._waiting: dict[str, deque[Order]] = {}  # by client; the first one's turn is next
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, order: Order) -> None:
        """
        Raises:
            Failure: where all places are taken (429), or the server ends (503).
        """
        with self._changed:
            if self._is_closed:
                raise Failure("the server is ending", 503)
            places = self.places - (self.places // 4 if order.client in self._waiting else 0)
            if len(self) >= places:
                wait = max(1, round(self.seconds() * (len(self) + 1)))
                raise Failure(f"{len(self)} requests wait already; try again in about {wait} s", 429, wait)
            self._waiting.setdefault(order.client, deque()).append(order)
            self._tell_positions()
            self._changed.notify_all()

    def take(self, seconds: float | None) -> Order | None:
        """The next order, which runs from now on; None where none comes for so long, or the queue was closed."""
        with self._changed:
            self.running = None
            self._changed.wait_for(lambda: self._waiting or self._is_closed, seconds)
            if not self._waiting:
                return None
            client = next(iter(self._waiting))
            orders = self._waiting.pop(client)
            self.running = orders.popleft()
            if orders:
                self._waiting[client] = orders  # behind the others
            self.running.move(0)
            self._tell_positions()
            return self.running

    def cancel(self, order: Order) -> None:
        """Take an order out of the queue; one that runs stops at its next step."""
        with self._changed:
            order.is_cancelled = True
            orders = self._waiting.get(order.client)
            if orders is not None and order in orders:
                orders.remove(order)
                if not orders:
                    del self._waiting[order.client]
                self._tell_positions()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Take no more orders, and end those that there are."""
        with self._changed:
            self._is_closed = True
            orders = [order for waiting in self._waiting.values() for order in waiting]
            self._waiting.clear()
            if self.running is not None:
                self.running.is_cancelled = True
                orders.append(self.running)
            for order in orders:
                order.emit(Failure("the server is ending", 503))
            self._changed.notify_all()

    def _tell_positions(self) -> None:
        """Tell each order that waits how many come before it, by turns."""
        position = 1 if self.running is not None else 0
        rounds = [deque(orders) for orders in self._waiting.values()]
        while rounds:
            for orders in rounds:
                orders.popleft().move(position)
                position += 1
            rounds = [orders for orders in rounds if orders]
