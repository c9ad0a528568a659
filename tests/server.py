"""A server of nano in a thread of the tests' process, at a free port."""

import base64
import contextlib
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from flux2_mlx.serve.__main__ import listen
from flux2_mlx.serve.app import build_app
from flux2_mlx.serve.arguments import build_parser, rules_of, studio_of

PROMPT = "a large red circle on the left, white background"
FAST = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 1, "seed": 3, "preview": "none"}


class Server:
    """A running server.

    Attributes:
        studio: its parts.
        address: http://127.0.0.1:PORT
        client: a client of its own.
    """

    def __init__(self, *words):
        arguments = build_parser().parse_args(["--port", "0", *words])
        self.studio = studio_of(arguments)
        self.worker = self.studio.worker
        self.listener = listen(arguments.host, 0)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(build_app(self.studio, rules_of(arguments)), log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.client = httpx.Client(base_url=self.address, timeout=60)

    def __enter__(self):
        self.worker.start()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.client.close()
        self.worker.queue.close()
        self.server.should_exit = True
        self.thread.join(10)
        assert self.worker.stop(20)
        self.listener.close()

    def draw(self, **values):
        """The events of a native request, as (name, data)."""
        with self.client.stream("POST", "/api/images", json=FAST | values) as answer:
            if answer.status_code != 200:
                answer.read()
                return [("refused", answer)]
            return list(events(answer.iter_lines()))

    def image(self, **values):
        """The data of the first image of a native request."""
        return next(data for name, data in self.draw(**values) if name == "image")

    @contextlib.contextmanager
    def busy(self, steps=400):
        """The queue at work on an order of many steps, which ends with the body."""
        with self.client.stream("POST", "/api/images", json=FAST | {"steps": steps}) as answer:
            lines = events(answer.iter_lines())
            for name, _ in lines:
                if name == "step":
                    break
            yield lines

    def wait(self, condition, seconds=20):
        """Until something holds, which it must within these seconds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)

    def settle(self):
        """Until nothing runs or waits."""
        queue = self.worker.queue
        self.wait(lambda: queue.running is None and not len(queue))


@contextlib.contextmanager
def nano_server():
    """nano, with previews that cost nothing: of what they show, other tests speak."""
    with pytest.MonkeyPatch.context() as patch, Server("--model", "nano", "--queue", "4") as server:
        patch.setattr("flux2_mlx.decoding.preview_map", lambda *_: np.full((129, 12), 0.01, np.float32))
        yield server


def events(lines):
    """Server-sent events as (name, data)."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def opened(text):
    """The image of base64 or a data URI."""
    image = Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2])))
    image.load()
    return image


def pixels(text):
    return np.asarray(opened(text).convert("RGB"))


def png(image):
    """An image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def uri(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
