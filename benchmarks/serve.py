"""flux2-serve: what HTTP costs an image, how soon a draft is there, and how it bears many clients.

    python -m benchmarks.serve                                      # nano; klein-4b: --model klein-4b --size 512
    python -m benchmarks.serve --soak 600                           # ten minutes of everything at once, too

The server runs in a process of its own, the library's own calls in this one, in turns.

- overhead: an image asked for over HTTP against the same image by a call of the library.
- draft: from the request to the first preview, and to the image, at half the size.
- page: in a browser, from a key's event to the first preview that is seen, to the draft where the size has one, and to
  the image. Left out, and said so, without chromium or Chrome and Playwright.
- clients: many at once. One that finds no place comes back; nothing else may fail, and memory stays flat.
- hang-up: a client goes in the middle of an image, while another one waits. Its turn comes within a step.
- soak: images, edits, hang-ups and bad requests of several clients, for as long as is asked.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from string import ascii_lowercase
from typing import Any

from PIL import Image

from flux2_mlx import Flux2Pipeline

from .common import figures_of, print_json, print_row, ratio

PROMPT = "a large red circle on the left, white background"
WARM_UP = 5  # images before memory is compared
READY = 600  # seconds that opening a model may take


class Server:
    """A server in a process of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, model: str):
        command = [sys.executable, "-m", "flux2_mlx.serve", "--model", model, "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        address = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
        if address is None:
            raise SystemExit(f"the server did not start: {line}{self._process.stderr.read()}")
        self.port = int(address[1])
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # or the pipe would fill

    def megabytes(self) -> float:
        """Memory that the system counts as the server's."""
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self._process.pid)], stdout=subprocess.PIPE, check=True)
        return int(found.stdout) / 1000

    def end(self) -> tuple[int, float]:
        """(exit status, seconds) of Ctrl-C."""
        start = time.perf_counter()
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(30), time.perf_counter() - start

    @contextlib.contextmanager
    def events(self, client: str, values: dict[str, Any]) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """A request's events, (name, data); what is refused is an event of its status. Leaving the body hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY)
        try:
            headers = {"Content-Type": "application/json", "User-Agent": client}
            connection.request("POST", "/api/images", json.dumps(values), headers)
            answer = connection.getresponse()
            yield _events(answer) if answer.status == 200 else iter([(str(answer.status), json.load(answer))])
        finally:
            connection.close()

    def ask(self, client: str, values: dict[str, Any]) -> list[tuple[str, float, dict[str, Any]]]:
        """All events of a request: name, seconds since it was sent, data."""
        start = time.perf_counter()
        with self.events(client, values) as events:
            return [(name, time.perf_counter() - start, data) for name, data in events]


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in answer:
        if line.startswith(b"event: "):
            name = line[7:].decode().strip()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])


def seconds_until(events: Sequence[tuple[str, float, dict[str, Any]]], name: str) -> float:
    for found, seconds, data in events:
        if found == name:
            return seconds
        if found not in ("queued", "step", "image"):
            raise SystemExit(f"the server answered {found}: {data}")
    raise SystemExit(f"the server's stream ended without {name}")


def overhead(server: Server, model: str, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The same image by both, in turns; and what is around the server's own work: HTTP, the queue, the image's file."""
    pipe = Flux2Pipeline.from_pretrained(model, cache=False)
    call = {"width": values["width"], "height": values["height"], "seed": values["seed"]}
    seconds: dict[str, list[float]] = {"library": [], "server": []}
    around = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pipe(values["prompt"], **call)
        seconds["library"].append(time.perf_counter() - start)
        events = server.ask("overhead", values | {"preview": "none"})
        seconds["server"].append(seconds_until(events, "image"))
        around.append(seconds["server"][-1] - events[-1][2]["seconds"])
    figures = {name: figures_of(own) for name, own in seconds.items()}
    more = [over - own for over, own in zip(seconds["server"][1:], seconds["library"][1:], strict=True)]
    return {
        "figures": figures,
        "ratios": ratio(figures["server"], figures["library"]),
        "more_s": _spread(more),
        "around_s": _spread(around[1:]),
    }


def draft(server: Server, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """What a page shows first; each time of another prompt, as it is typed."""
    half = {name: max(64, values[name] // 2 // 16 * 16) for name in ("width", "height")}
    first, whole = [], []
    for turn in range(repeats + 1):
        prompt = values["prompt"] + "!" * turn
        events = server.ask("draft", values | half | {"prompt": prompt})
        first.append(seconds_until(events, "step"))
        whole.append(seconds_until(events, "image"))
    return {**half, "first_preview_s": _spread(first[1:]), "image_s": _spread(whole[1:])}


# Notes when a key's event came, and when a picture of each kind after it was decoded and the next frame begun.
WATCH = """() => {
  const stage = document.getElementById("stage"), picture = document.getElementById("picture");
  addEventListener("keydown", (event) => (window.turn = { key: event.timeStamp, seen: {} }), true);
  new MutationObserver(async () => {
    const { turn } = window, kind = stage.dataset.shows;
    if (!turn || turn.seen[kind] || stage.classList.contains("is-old")) return;
    turn.seen[kind] = NaN; // the first one counts
    await picture.decode().catch(() => {});
    requestAnimationFrame((now) => (turn.seen[kind] = (now - turn.key) / 1000));
  }).observe(stage, { attributes: true, subtree: true, attributeFilter: ["src", "data-shows"] });
}"""
SEEN = """async () => {
  const { seen } = window.turn;
  while (Object.values(seen).some(Number.isNaN)) await new Promise(requestAnimationFrame);
  return seen;
}"""
DRAWN = "#stage[aria-busy=false][data-shows=image]:not(.is-old)"


def page(server: Server, side: int, repeats: int) -> dict[str, Any] | None:
    """Keys pressed one by one, each when the image of the one before is there; None without a browser."""
    from tests.browser import find_browser

    program = find_browser()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if program is None:
        return None
    seen: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        own: dict[str, str | float | bool] = dict(os.environ)
        own.pop("LD_PRELOAD", None)  # OpenBLAS is for MLX
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], env=own)
        opened = browser.new_page(viewport={"width": 900, "height": 700})
        opened.goto(f"http://127.0.0.1:{server.port}/")
        opened.evaluate(WATCH)
        opened.get_by_role("button", name="More").click()
        for name in ("Width", "Height"):
            opened.get_by_role("spinbutton", name=name).fill(str(side))
            opened.get_by_role("spinbutton", name=name).press("Tab")
        opened.get_by_role("textbox", name="Prompt", exact=True).focus()
        for turn in range(repeats + 1):
            with opened.expect_request("**/api/images"):
                opened.keyboard.press(ascii_lowercase[turn % len(ascii_lowercase)])
            opened.wait_for_selector(DRAWN, timeout=1000 * READY)
            kinds = opened.evaluate(SEEN)
            if turn:
                for kind, seconds in kinds.items():
                    seen.setdefault(kind, []).append(seconds)
        browser.close()
    return {kind: _spread(seconds) for kind, seconds in seen.items()}


def clients(server: Server, values: dict[str, Any], count: int, requests: int) -> dict[str, Any]:
    """So many clients, and so many requests of all together."""
    small = values | {"width": 64, "height": 64, "steps": 1, "preview": "none"}
    for turn in range(WARM_UP):
        server.ask("warm", small | {"seed": turn})
    ends: Counter[str] = Counter()
    before = server.megabytes()

    def work(number: int) -> None:
        for turn in range(requests // count):
            while True:
                name = server.ask(f"client {number}", small | {"seed": 1000 * number + turn})[-1][0]
                ends[name] += 1
                if name != "429":
                    break
                time.sleep(0.2)

    start = time.perf_counter()
    _in_threads([threading.Thread(target=work, args=(number,)) for number in range(count)])
    after = server.megabytes()
    return {"seconds": time.perf_counter() - start, "ends": dict(ends), "before_mb": before, "after_mb": after}


def hang_up(server: Server, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds until the next one's turn, and a step's."""
    waits, steps = [], []
    for _ in range(repeats):
        turn: list[float] = []
        queued = threading.Event()

        def wait(turn: list[float] = turn, queued: threading.Event = queued) -> None:
            with server.events("next", values | {"steps": 1, "preview": "none"}) as events:
                for name, data in events:
                    queued.set()
                    if name == "queued" and data["position"] == 0:
                        turn.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        with server.events("gone", values | {"steps": 200, "preview": "none"}) as events:
            times = []
            for name, data in events:
                times += [time.perf_counter()] if name == "step" else []
                if name == "step" and data["index"] == 2:
                    thread.start()
                if len(times) > 4 and queued.is_set():
                    break
            steps.append((times[-1] - times[0]) / (len(times) - 1))
        gone = time.perf_counter()
        thread.join()
        waits.append(max(0.0, turn[0] - gone))
    shares = [wait / step for wait, step in zip(waits, steps, strict=True)]
    return {"wait_s": _spread(waits), "step_s": _spread(steps), "steps_waited": _spread(shares)}


def soak(server: Server, values: dict[str, Any], seconds: float, count: int = 6) -> dict[str, Any]:
    """Everything at once."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, format="PNG")
    reference = base64.b64encode(buffer.getvalue()).decode()
    small = values | {"width": 64, "height": 64}
    kinds = {
        "image": values,
        "small": small | {"steps": 1},
        "edit": small | {"image": reference},
        "hang-up": values | {"steps": 100},
        "bad": {"prompt": "a fox", "width": 17, "height": -4},
        "no picture": small | {"image": "bm90IGEgcGljdHVyZQ=="},
    }
    ends: Counter[str] = Counter()
    memory = []
    start = time.perf_counter()

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() - start < seconds:
            kind = draw.choice(list(kinds))
            request = kinds[kind] | {"seed": draw.randrange(2**32)}
            with server.events(f"client {number}", request) as events:
                name = "nothing"
                for name, data in events:
                    if kind == "hang-up" and name == "step" and data["index"] >= 2:
                        break
            ends[f"{kind}: {name}"] += 1
            if name == "429":
                time.sleep(0.2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(server.megabytes())
        time.sleep(min(5.0, seconds / 10))
    settled = memory[len(memory) // 5 :]
    return {
        "seconds": time.perf_counter() - start,
        "ends": dict(sorted(ends.items())),
        "settled_mb": settled[0],
        "most_mb": max(settled),
        "last_mb": settled[-1],
    }


def _in_threads(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a released name, a folder or a Hub id (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="width and height (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--page", type=int, nargs="*", default=[128, 368], metavar="SIZE", help="sizes that are typed for (%(default)s)"
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of all clients together (%(default)s)")
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="of everything at once")
    arguments = parser.parse_args(argv)
    values = {"prompt": PROMPT, "width": arguments.size, "height": arguments.size, "seed": 3}
    server = Server(arguments.model)
    try:
        report: dict[str, Any] = {
            "overhead": overhead(server, arguments.model, values, arguments.repeats),
            "draft": draft(server, values, arguments.repeats),
            "page": {side: page(server, side, arguments.repeats) for side in arguments.page},
            "hang_up": hang_up(server, values, arguments.repeats),
            "clients": clients(server, values, arguments.clients, arguments.requests),
        }
        if arguments.soak:
            report["soak"] = soak(server, values, arguments.soak)
    finally:
        status, seconds = server.end()
    report["end"] = {"status": status, "seconds": seconds}
    print_row("seconds", ("median", "min", "max"))
    for name, figures in report["overhead"]["figures"].items():
        print_row(f"image, {name}", (figures["median_s"], figures["min_s"], figures["max_s"]))
    rows = {
        "over the library's call": report["overhead"]["more_s"],
        "around the server's work": report["overhead"]["around_s"],
        "first preview of a draft": report["draft"]["first_preview_s"],
        "draft": report["draft"]["image_s"],
        "turn after a hang-up": report["hang_up"]["wait_s"],
        "the same in steps": report["hang_up"]["steps_waited"],
    }
    for side, found in report["page"].items():
        if found is None:
            print("page: left out, there is no chromium or Chrome with Playwright")
        else:
            rows |= {f"{side}: key to {kind} seen": spread for kind, spread in found.items()}
    for name, spread in rows.items():
        print_row(name, spread.values())
    for name in ("clients", "soak"):
        if name in report:
            print(f"{name}: {report[name]}")
    print(f"Ctrl-C: exit status {status} after {seconds:.2f} s")
    print_json("serve", arguments, report)


if __name__ == "__main__":
    main()
