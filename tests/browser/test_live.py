"""What is drawn when: the page's logic alone, with a clock of the tests' own."""

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", autouse=True)
def modules(page, server):
    """An address of the server, whose page's modules can be imported."""
    page.goto(f"{server.address}/health")


# Runs a script of [ms, action]: "want NAME", "now NAME", "stop", "hurry", "done", "full", "fault"; tells what was
# begun, and when.
RUN = """async ([script, quick, sizes]) => {
  const { Live } = await import("/live.js");
  let time = 0, timers = [], told = [];
  const settle = async () => { for (let k = 0; k < 30; k++) await null; };
  const running = new Map();
  const live = new Live({
    now: () => time,
    later: (run, ms) => { const timer = { at: time + ms, run }; timers.push(timer); return timer; },
    forget: (timer) => { timers = timers.filter((one) => one !== timer); },
    quick: () => quick,
    rungs: () => sizes.map((size, k) => ({ size, waits: sizes.length > 1 && k === sizes.length - 1 })),
    fail: (error) => { told.push([time, error.message]); return error.retry ?? null; },
    draw: (order, rung, before, signal) => new Promise((resolve, reject) => {
      told.push([time, `${order} ${rung.size}` + (before ? ` from ${before}` : "")]);
      const key = {};
      running.set(key, { resolve: () => resolve(rung.size), reject });
      signal.addEventListener("abort", () => {
        if (running.delete(key)) told.push([time, `${order} ${rung.size} hung up`]);
        reject(signal.reason);
      });
      if (running.size > 1) told.push([time, "two in flight"]);
    }),
  });
  for (const [at, action] of [...script, [1e6, "end"]]) {
    for (;;) {
      await settle();
      timers.sort((a, b) => a.at - b.at);
      if (!timers.length || timers[0].at > at) break;
      const timer = timers.shift();
      time = timer.at;
      timer.run();
    }
    time = at;
    const [name, order] = action.split(" ");
    const ends = [...running.entries()];
    if (name === "want") live.want(order);
    if (name === "now") live.want(order, true);
    if (name === "stop") live.stop();
    if (name === "hurry") live.hurry();
    for (const [key, { resolve, reject }] of ends) {
      if (name === "done") { running.delete(key); resolve(); }
      if (name === "full") { running.delete(key); reject(Object.assign(new Error("full"), { retry: 2000 })); }
      if (name === "fault") { running.delete(key); reject(new Error("fault")); }
    }
    await settle();
  }
  return told.map(([at, what]) => `${at} ${what}`);
}"""

CASES = [
    # A slow machine waits for a pause of 200 ms; each key ends what runs.
    (
        [(0, "want a"), (150, "want ab"), (1000, "want abc"), (2000, "done")],
        None,
        [512],
        ["350 ab 512", "1000 ab 512 hung up", "1200 abc 512"],
    ),
    # A fast one begins at once, and again when a draft's time (and a fifth) has passed; the newest wins.
    (
        [(0, "want a"), (50, "want ab"), (100, "want abc"), (300, "want abcd")],
        200,
        [512],
        ["0 a 512", "240 a 512 hung up", "240 abc 512", "480 abc 512 hung up", "480 abcd 512"],
    ),
    # The ladder: each size begins from the one before; the last when nothing has changed for a second.
    (
        [(0, "want a"), (400, "done"), (700, "done"), (1500, "done")],
        300,
        [256, 512, 1024],
        ["0 a 256", "400 a 512 from 256", "1000 a 1024 from 512"],
    ),
    # A change while it rests ends the ladder: the chosen size of an old prompt is not begun.
    (
        [(0, "want a"), (400, "done"), (900, "want b"), (1500, "done"), (2500, "done")],
        300,
        [256, 1024],
        ["0 a 256", "900 b 256", "1900 b 1024 from 256"],
    ),
    # Enter: no pause and no rest.
    ([(0, "now a"), (100, "done"), (200, "done")], None, [256, 1024], ["0 a 256", "100 a 1024 from 256"]),
    (
        [(0, "want a"), (300, "done"), (400, "hurry"), (500, "done")],
        None,
        [256, 1024],
        ["200 a 256", "400 a 1024 from 256"],
    ),
    # Escape.
    ([(0, "want a"), (100, "stop")], None, [256], []),
    ([(0, "now a"), (100, "stop")], None, [256], ["0 a 256", "100 a 256 hung up"]),
    # A full queue is asked again, another fault is not.
    ([(0, "now a"), (100, "full")], None, [256], ["0 a 256", "100 full", "2100 a 256"]),
    ([(0, "now a"), (100, "full"), (150, "want b")], None, [256], ["0 a 256", "100 full", "350 b 256"]),
    ([(0, "now a"), (100, "fault")], None, [256], ["0 a 256", "100 fault"]),
]


@pytest.mark.parametrize(("script", "quick", "sizes", "expected"), CASES)
def test_one_request_in_flight_and_the_newest_wins(page, script, quick, sizes, expected):
    assert page.evaluate(RUN, [script, quick, sizes]) == expected


LADDERS = [
    # (chosen, side of a quick draft, side that the model was made for) -> sizes
    ((1024, 1024), 256, 1024, [(256, 256), (512, 512), (1024, 1024)]),
    ((1024, 1024), 448, 1024, [(512, 512), (1024, 1024)]),  # a draft of hardly less than 512 is left out
    ((1024, 1024), 640, 1024, [(640, 640), (1024, 1024)]),  # a machine that draws more than 512 quickly
    ((1536, 640), 320, 1024, [(496, 208), (800, 336), (1536, 640)]),  # the aspect stays, sides are multiples of 16
    ((512, 512), 256, 1024, [(256, 256), (512, 512)]),
    ((128, 128), 256, 128, [(128, 128)]),  # nano: made for 128, and no good below
    ((192, 192), 256, 128, [(192, 192)]),
    ((256, 256), 1024, 1024, [(256, 256)]),
]


@pytest.mark.parametrize(("chosen", "quick", "native", "expected"), LADDERS)
def test_sizes_grow_to_the_chosen_one(page, chosen, quick, native, expected):
    rungs = page.evaluate(
        """async ([width, height, quick, native]) =>
          (await import("/ladder.js")).rungsTo({ width, height }, quick, native)""",
        [*chosen, quick, native],
    )
    assert [(rung["width"], rung["height"]) for rung in rungs] == expected
    assert [rung["isDraft"] for rung in rungs] == [True] * (len(rungs) - 1) + [False]
    assert [rung["waits"] for rung in rungs] == [False] * (len(rungs) - 1) + [len(rungs) > 1]


def test_a_draft_has_the_largest_size_that_is_quick(page):
    """Of this machine's own times, the least of each size: 0.2 s at 256 x 256 is 0.45 s at 384 x 384."""
    sides = page.evaluate(
        """async () => {
          const { Times } = await import("/ladder.js");
          const times = new Times();
          const sides = [times.quickSide("a")];
          times.learn("a", 256 ** 2, 9);
          sides.push(times.quickSide("a"));
          times.learn("a", 256 ** 2, 0.2);
          sides.push(times.quickSide("a"), times.quickSide("b"));
          times.learn("a", 384 ** 2, 0.6);
          sides.push(times.quickSide("a"));
          return sides;
        }"""
    )
    assert sides == [256, 256, 384, 256, 320]
