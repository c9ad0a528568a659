"""The one thread that owns MLX: it opens models, draws the orders of the queue one by one, and unloads."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..cli.command import tell, tell_fault
from ..cli.runner import identity, open_pipeline, use_loras
from ..errors import CheckpointError, DeviceError, InputError
from ..pipeline import Flux2Pipeline
from ..results import Step
from ..samplings import default_guidance, default_steps
from .catalogue import Catalogue
from .events import Failure, Picture, StepDone
from .kept import KeptLatents
from .queue import Order, Queue


@dataclass(frozen=True)
class State:
    """What other threads may know of the worker.

    Attributes:
        model: the open model's name; None before one was opened.
        fault: why the last one could not be opened.
        is_loaded: whether weights are in memory.
        is_distilled, side, steps, guidance, length: what the model is, and its defaults.
    """

    model: str | None = None
    fault: str | None = None
    is_loaded: bool = False
    is_distilled: bool | None = None
    side: int | None = None
    steps: int | None = None
    guidance: float | None = None
    length: int | None = None


class Worker:
    """Draws what is ordered.

    Args:
        catalogue: what may be ordered.
        first: an order that is not drawn: its model is opened at the start.
        places: the most orders that wait.
        keep_alive: seconds without an order after which the model is unloaded; None for never.

    Attributes:
        kept: latents of the images that were drawn last; forgotten with the model.
    """

    def __init__(self, catalogue: Catalogue, first: Order, *, places: int, keep_alive: float | None):
        self.catalogue, self.keep_alive = catalogue, keep_alive
        self._first = first
        self.state = State()
        self.last_seconds = 1.0
        self.kept = KeptLatents()
        self.queue = Queue(places, lambda: self.last_seconds)
        self._pipe: Flux2Pipeline | None = None
        self._opened: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="MLX", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End all orders, and the thread after the step that it is at.

        Returns:
            whether it ended within these seconds.
        """
        self.queue.close()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._open_first()
            idle = self.keep_alive
            while True:
                order = self.queue.take(idle)
                if order is not None:
                    idle = self.keep_alive if order.keep_alive is None else order.keep_alive
                    self._draw(order)
                elif self.queue.is_closed:
                    return
                else:
                    self._unload()
                    idle = None
        finally:
            self._pipe = None
            mx.clear_streams()  # or the process aborts when it ends

    def _open_first(self) -> None:
        """Open the server's own model before anybody asks for it; a fault is told, and again with each order."""
        try:
            self._open(self._first)
        except Failure as failure:
            tell(f"warning: {failure}")

    def _draw(self, order: Order) -> None:
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            try:
                pipe = self._open(order)
                if order.suit is not None:
                    options, left_out = order.suit(order.task.options, pipe.checkpoint.is_distilled)
                    order.task = replace(order.task, options=options)
                    order.warnings = (*left_out, *order.warnings)
                use_loras(pipe, order.task)
                steps = pipe.stream(**vars(order.task.inputs), **vars(order.task.options), **vars(order.task.batch))
                self._follow(order, steps, started, told)
            except BaseException as error:  # whatever it is, it is this order's alone
                order.emit(self._failure(error))
        self.last_seconds = time.perf_counter() - started

    def _follow(self, order: Order, steps: Iterator[Step], started: float, told: list[Any]) -> None:
        """Tell every step and image; stop where nobody waits for them any more."""
        count = order.task.batch.num_images
        begun = each = 0.0
        for done, step in enumerate(steps):
            if order.is_cancelled:
                steps.close()  # type: ignore[attr-defined]  # a generator
                return
            now, own = time.perf_counter(), step.steps
            if done == 0:
                begun, each = now, now - started
                total = count * (own - step.index + 1)
            else:
                each = (now - begun) / done
            preview = step.preview() if _shows(step.index, own, order.previews) else None
            order.last_step = StepDone(step.image, step.index, own, step.sigma, each * (total - done - 1), None)
            order.emit(replace(order.last_step, preview=preview))
            if step.is_last:
                order.emit(self._picture(order, step, started, told))

    def _picture(self, order: Order, step: Step, started: float, told: list[Any]) -> Picture:
        picture, settings = step.picture(), self.catalogue.public(step.settings, order.model)
        is_whole = order.task.inpaint is None
        return Picture(
            step.image,
            picture,
            self.kept.keep(order.client, order.model, step.unpacked()) if is_whole else None,
            settings.metadata(),
            settings.parameters(),
            time.perf_counter() - started,
            (*order.warnings, *(self.catalogue.tell(str(one.message)) for one in told)),
            is_last=step.image == order.task.batch.num_images - 1,
        )

    def _open(self, order: Order) -> Flux2Pipeline:
        """The pipeline of an order's model, opened where another one is.

        Raises:
            Failure: why it cannot be.
        """
        wanted = identity(order.task)
        if self._pipe is None or self._opened != wanted:
            self._pipe = None  # give its memory back first
            self.kept.forget()
            mx.clear_cache()
            try:
                self._pipe, self._opened = open_pipeline(order.task), wanted
            except BaseException as error:
                reason = self.catalogue.tell(error)
                self.state = State(fault=reason)
                raise Failure(f"the model cannot be opened: {reason}", 503) from error
        checkpoint, length = self._pipe.checkpoint, self._pipe.tokenizer.default_length
        self.state = State(
            model=order.model,
            is_loaded=True,
            is_distilled=checkpoint.is_distilled,
            side=checkpoint.autoencoder.sample_size,
            steps=default_steps(checkpoint.is_distilled),
            guidance=default_guidance(checkpoint.is_distilled),
            length=length,
        )
        return self._pipe

    def _unload(self) -> None:
        if self._pipe is not None:
            self._pipe.unload()
            self.kept.forget()
            mx.clear_cache()
            self.state = replace(self.state, is_loaded=False)

    def _failure(self, error: BaseException) -> Failure:
        """What a client is told of a fault; of one that nobody expects, the server's owner too."""
        if isinstance(error, Failure):
            return error
        message = self.catalogue.tell(error)
        if isinstance(error, CheckpointError):
            return Failure(message, 503)
        if isinstance(error, InputError):
            return Failure(message, 400)
        if isinstance(error, DeviceError):
            return Failure(message, 503)
        if isinstance(error, (FloatingPointError, OSError)):
            return Failure(message, 500)
        with contextlib.suppress(KeyboardInterrupt, SystemExit, GeneratorExit):  # nor do these end this thread
            tell_fault(error)
        return Failure(f"{type(error).__name__}: {message}", 500)


def _shows(index: int, steps: int, previews: int | None) -> bool:
    """Whether a step shows a preview, where there are to be so many, evenly spread; the last one is the image."""
    if index == steps or previews == 0:
        return False
    return (
        previews is None
        or previews >= steps
        or index in {round(k * steps / (previews + 1)) for k in range(1, previews + 1)}
    )
