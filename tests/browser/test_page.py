"""The page: what a person does with it, and sees and hears of it. The model is nano."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.server import PROMPT, opened, pixels, png

pytestmark = pytest.mark.browser

BLUE = "a small blue star on a yellow background"
RED = Image.new("RGB", (128, 128), "red")


def contents(download):
    with Image.open(download.path()) as image:
        return np.asarray(image.convert("RGB"))


def test_a_prompt_is_drawn_as_it_is_typed(studio):
    """Keys one by one; nothing else is pressed. Previews come before the image, which is that of its settings."""
    assert studio.page.title() == "flux2_mlx"
    studio.set_steps(2)
    studio.prompt.press_sequentially(PROMPT)
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    kinds = [kind for kind, *_ in studio.seen()]
    assert "preview" in kinds
    assert kinds[-1] == "image"
    assert re.match(r"Done in .* s: 128 × 128, seed \d+$", studio.status.inner_text())
    download = studio.download()
    seed = int(studio.page.get_by_role("spinbutton", name="Seed").input_value())
    assert download.suggested_filename == f"a-large-red-circle-on-the-left-white-background-{seed}.png"
    expected = studio.server.image(prompt=PROMPT, seed=seed, steps=2, width=128, height=128)
    np.testing.assert_array_equal(contents(download), pixels(expected["data"]))
    settings = studio.server.client.post("/api/settings", content=download.path().read_bytes()).json()["settings"]
    assert (settings["prompt"], settings["seed"]) == (PROMPT, seed)


def test_the_newest_prompt_wins(studio):
    """A word changes in mid-flight: the request that runs is hung up, its image never comes, the old one is dimmed
    until the first preview of the new one.
    """
    studio.set_steps(500)
    studio.prompt.fill("a large red circle")
    studio.page.wait_for_selector("#stage[data-shows=preview]")
    studio.page.get_by_text(re.compile(r"^Image: step \d+ of 500, \d+(\.\d)? (s|min) left$")).first.wait_for()
    assert studio.page.get_by_role("progressbar", name="Progress").get_attribute("max") == "500"
    before = studio.seen()
    studio.page.get_by_role("spinbutton", name="Steps").fill("3")
    studio.prompt.fill("a large green circle")
    studio.picture("a large green circle").wait_for()
    studio.wait_drawn()
    after = studio.seen()
    assert {alt for kind, alt, *_ in before if kind == "preview"} == {"a large red circle (preview)"}
    assert ("preview", "a large red circle (preview)", True) in {one[:3] for one in after}
    assert "a large red circle" not in {alt for _, alt, *_ in before + after}
    assert after[-1][:3] == ("image", "a large green circle", False)
    assert studio.hung_up[0] == studio.bodies[0]
    assert studio.page.get_by_role("listitem").count() == 1
    studio.server.settle()


def test_a_draft_comes_before_a_large_image(studio):
    """Which begins from its latents once typing rests, and is the one that is kept."""
    studio.set_steps(1)
    set_size(studio, 368)
    studio.prompt.fill(PROMPT)
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    draft, image = studio.bodies
    assert [(body["width"], body["height"], body["preview"]) for body in studio.bodies] == [
        (256, 256, "webp"),
        (368, 368, "none"),
    ]
    assert "init_latents" not in draft
    assert (image["strength"], image["seed"], "init_image" in image) == (0.5, draft["seed"], False)
    assert studio.server.worker.kept.find(image["init_latents"], "nano").shape == (1, 32, 32, 32)
    shown = [(kind, alt) for kind, alt, *_ in studio.seen() if alt]
    assert shown.index(("draft", f"{PROMPT} (draft)")) < shown.index(("image", PROMPT))
    assert studio.page.get_by_role("listitem").count() == 1
    download = studio.download()
    assert contents(download).shape == (368, 368, 3)
    studio.drop("#drop-settings", "large.png", download.path().read_bytes())
    studio.page.get_by_text("of large.png. It was made with more than its file holds: init latents.").wait_for()


def test_a_draft_that_the_server_has_forgotten_is_done_without(studio, monkeypatch):
    """The chosen size is then drawn from noise."""
    monkeypatch.setattr(studio.server.worker.kept, "keep", lambda *_: "forgotten")
    studio.expected = "status of 410"
    studio.set_steps(1)
    set_size(studio, 368)
    studio.prompt.fill(PROMPT)
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    draft, refused, image = studio.bodies
    assert (draft["width"], refused["init_latents"]) == (256, "forgotten")
    assert image == {name: value for name, value in refused.items() if name not in ("init_latents", "strength")}
    expected = studio.server.image(prompt=PROMPT, seed=draft["seed"], steps=1, width=368, height=368)
    np.testing.assert_array_equal(contents(studio.download()), pixels(expected["data"]))


def set_size(studio, side):
    for name in ("Width", "Height"):
        field = studio.page.get_by_role("spinbutton", name=name)
        field.fill(str(side))
        field.press("Tab")


def test_an_edit_keeps_what_is_not_masked(studio):
    """A picked reference, a mask by mouse: black comes back pixel for pixel."""
    reference = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    studio.add_reference(("noise.png", png(Image.fromarray(reference))))
    studio.set_steps(2)
    studio.page.get_by_role("img", name="reference 1, noise.png").wait_for()
    studio.button("Draw mask").click()
    box = studio.page.get_by_role("application", name="Mask").bounding_box()
    studio.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    studio.page.mouse.down()
    studio.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"], steps=3)
    studio.page.mouse.up()
    studio.prompt.fill(BLUE)
    studio.picture(BLUE).wait_for()
    studio.wait_drawn()
    body = studio.bodies[-1]
    assert "image" not in body  # the model sees what it starts from anyway
    mask = np.asarray(opened(body["mask"]).convert("L"))
    assert mask.shape == (128, 128)
    assert 0.03 < (mask == 255).mean() < 0.2
    drawn = contents(studio.download())
    np.testing.assert_array_equal(drawn[mask == 0], reference[mask == 0])
    assert np.abs(drawn[mask == 255].astype(int) - reference[mask == 255]).mean() > 10


def brushed(studio):
    """How much of each of the mask's pixels is marked, 0 to 255."""
    uri = studio.page.evaluate("() => document.getElementById('mask').toDataURL()")
    return np.asarray(opened(uri).getchannel("A"))


def test_a_pen_brushes_a_mask_with_a_soft_edge(studio):
    """Its line is as wide as it is pressed, its other end erases, as the other button and Alt do. Beside the mask, but
    no further than the edge is soft, the picture changes.
    """
    grey = Image.new("RGB", (128, 128), "grey")
    studio.add_reference(("grey.png", png(grey)))
    studio.page.get_by_role("img", name="reference 1, grey.png").wait_for()
    studio.set_steps(1)
    studio.button("Draw mask").click()
    canvas = studio.page.get_by_role("application", name="Mask")
    box = canvas.bounding_box()
    pen = studio.page.context.new_cdp_session(studio.page)

    def line(y, force):
        """Across the middle half, at this height."""
        for kind, x in (("mousePressed", 0.25), ("mouseMoved", 0.5), ("mouseMoved", 0.75), ("mouseReleased", 0.75)):
            place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            how = {"button": "left", "buttons": 1, "clickCount": 1, "pointerType": "pen", "force": force}
            pen.send("Input.dispatchMouseEvent", {"type": kind, **place, **how})

    line(0.25, 1.0)
    line(0.75, 0.2)
    heights = [(brushed(studio)[rows, 64] > 127).sum() for rows in (slice(0, 64), slice(64, 128))]
    assert heights[0] == pytest.approx(0.14 * 128, abs=1.5)
    assert heights[1] == pytest.approx(0.44 * heights[0], abs=1.5)  # a light line has at least 0.3 of the width
    middle = {"position": {"x": box["width"] / 2, "y": box["height"] * 0.75}}
    for how in ({"button": "right"}, {"modifiers": ["Alt"]}):
        assert brushed(studio)[96, 64] == 255
        canvas.click(**middle, **how)
        assert brushed(studio)[96, 64] == 0
        studio.button("Undo").click()
    place = {"clientX": box["x"] + box["width"] / 2, "clientY": box["y"] + box["height"] * 0.75}
    for event in ("pointerdown", "pointerup"):  # no browser can be told to turn a pen round
        canvas.dispatch_event(event, {"pointerId": 1, "pointerType": "pen", "button": 5, "pressure": 1, **place})
    assert brushed(studio)[96, 64] == 0
    studio.page.get_by_role("slider", name="Soft edge").fill("4")
    studio.button("Done").click()
    studio.draw(BLUE)
    assert studio.bodies[-1]["mask_blur"] == 4
    mask = np.asarray(opened(studio.bodies[-1]["mask"]).convert("L"))
    assert (mask[30:34, 40:88] == 255).all()
    assert (mask[42:84, 40:88] == 0).all()  # the first line ends at 41
    drawn = contents(studio.download())[:, 40:88]
    assert np.abs(drawn[42:45].astype(int) - 128).mean() > 1  # a Gaussian of radius 4: beyond it there is a third yet
    assert (drawn[60:72] == 128).all()


def test_a_mask_is_inverted_undone_and_cleared(studio):
    studio.add_reference(("red.png", png(RED)))
    studio.page.get_by_role("img", name="reference 1, red.png").wait_for()

    def share():
        return (brushed(studio) > 127).mean()

    studio.button("Draw mask").click()
    assert share() == 0
    studio.page.get_by_role("application", name="Mask").click()
    dot = share()
    assert 0.005 < dot < 0.05
    studio.button("Invert").click()
    assert share() == pytest.approx(1 - dot, abs=0.01)
    studio.button("Erase").click()
    studio.page.get_by_role("slider", name="Brush").fill("60")
    studio.page.get_by_role("application", name="Mask").click(position={"x": 20, "y": 20})
    erased = share()
    assert erased < 1 - dot
    studio.button("Undo").click()
    assert share() == pytest.approx(1 - dot, abs=0.01)
    studio.button("Clear").click()
    assert share() == 0


def test_edges_are_dragged_outward(studio):
    """Outpainting: what was there comes back, and the new edge is drawn."""
    studio.add_reference(("red.png", png(RED)))
    studio.set_steps(1)
    studio.page.get_by_role("img", name="reference 1, red.png").wait_for()
    studio.button("Draw mask").click()
    handle = studio.page.get_by_role("slider", name="Extend right")
    box, base = handle.bounding_box(), studio.page.locator("#base").bounding_box()
    studio.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    studio.page.mouse.down()
    studio.page.mouse.move(box["x"] + box["width"] / 2 + base["width"] / 2, box["y"] + 5, steps=4)
    studio.page.mouse.up()
    assert handle.get_attribute("aria-valuenow") == "64"
    studio.page.get_by_role("slider", name="Extend top").press("ArrowUp")
    studio.prompt.fill(BLUE)
    studio.picture(BLUE).wait_for()
    studio.wait_drawn()
    assert studio.bodies[-1]["expand"] == {"right": 64, "top": 16}
    drawn = contents(studio.download())
    assert drawn.shape == (144, 192, 3)
    assert (drawn[16:, :128] == (255, 0, 0)).all()
    assert (drawn[:, 128:] != (255, 0, 0)).any()


def test_settings_come_back_from_a_dropped_image(studio):
    """And with them the same image, pixel by pixel."""
    regions = ["a red circle, blue ground@0,0,0.5,1", "a cross@0.5,0,1,1"]
    made = studio.server.image(prompt=BLUE, seed=77, steps=2, width=96, height=64, region=regions)
    studio.expected = "status of 400"
    studio.drop("#drop-settings", "plain.png", png(RED))  # without settings
    studio.page.wait_for_selector("#status.is-fault")
    assert studio.prompt.input_value() == ""
    studio.drop("#drop-settings", "star.png", base64.b64decode(made["data"].partition(",")[2]))
    studio.picture(BLUE).wait_for()
    studio.wait_drawn()
    assert studio.prompt.input_value() == BLUE
    studio.open_more()
    values = {
        name: studio.page.get_by_role("spinbutton", name=name).input_value()
        for name in ("Seed", "Steps", "Width", "Height")
    }
    assert values == {"Seed": "77", "Steps": "2", "Width": "96", "Height": "64"}
    assert studio.page.get_by_role("textbox", name="Regions").input_value() == "\n".join(regions)
    np.testing.assert_array_equal(contents(studio.download()), pixels(made["data"]))


def test_references_are_picked_dropped_pasted_and_removed(studio):
    """Larger ones than the server takes, and moving ones, are sent as they are seen."""
    moving = io.BytesIO()
    RED.save(moving, format="PNG", save_all=True, append_images=[Image.new("RGB", (128, 128), "blue")])
    tiles = studio.page.get_by_role("list", name="Pictures of this request").get_by_role("listitem")
    studio.add_reference(("one.png", png(RED)), ("two.png", png(Image.new("1", (13_100, 1000)))))
    large = studio.page.get_by_role("img", name="reference 2, two.png")
    large.wait_for()
    assert large.evaluate("async (picture) => (await picture.decode(), picture.naturalWidth)") == 2048
    studio.drop("#drop-reference", "three.png", moving.getvalue())
    studio.page.get_by_role("img", name="reference 3, three.png").wait_for()
    studio.page.evaluate(
        """(bytes) => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([new Uint8Array(bytes)], "four.png", { type: "image/png" }));
          document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }""",
        list(png(RED)),
    )
    studio.page.get_by_role("img", name="reference 4, four.png").wait_for()
    studio.add_reference(("five.png", png(RED)))
    studio.page.wait_for_selector("#status.is-fault")
    assert studio.status.inner_text() == "At most 4 references; remove one first."
    assert tiles.count() == 4
    studio.button("Remove reference 2, two.png").click()
    studio.button("Start from three.png").click()
    studio.page.get_by_role("slider", name="Strength", exact=True).press("ArrowLeft")
    studio.draw("make it green")
    body = studio.bodies[-1]
    assert len(body["image"]) == 2
    assert (opened(body["init_image"]).size, body["strength"]) == ((128, 128), 1)  # one step cannot be divided
    studio.add_reference(("no.png", b"no picture"))
    studio.page.wait_for_selector("#status.is-fault")
    assert studio.status.inner_text() == "no.png is no picture that this browser can open."


EDIT = {"reference_strength": [1, 0.5], "color_match": True, "edit_composite": 0.2}


def test_an_edit_leaves_the_rest_alone_and_weighs_its_references(studio):
    """What is not the default is sent, drawn as by the options, and comes back from history and file."""
    page = studio.page
    pictures = [png(Image.new("RGB", (64, 64), color)) for color in ("red", "grey")]
    match, composite = (page.get_by_role("checkbox", name=name) for name in ("Color match", "Edit composite"))
    threshold = page.get_by_role("spinbutton", name="Threshold")
    strengths = [page.get_by_role("slider", name=f"Strength of reference {k}, {k}.png") for k in (1, 2)]

    def told():
        return [match.is_checked(), composite.is_checked(), *(slider.input_value() for slider in strengths)]

    assert not match.is_visible()
    studio.add_reference(("1.png", pictures[0]), ("2.png", pictures[1]))
    strengths[1].wait_for()
    assert told() == [False, False, "1", "1"]
    studio.draw(BLUE)
    assert not EDIT.keys() & studio.bodies[-1].keys()
    assert not threshold.is_visible()
    match.check()
    with page.expect_request(lambda request: '"edit_composite":true' in (request.post_data or "")):
        composite.check()  # with the library's own threshold
    threshold.fill("0.2")
    strengths[1].fill("0.5")
    studio.wait_drawn()
    body = studio.bodies[-1]
    assert {name: body[name] for name in EDIT} == EDIT
    download = studio.download()
    expected = studio.server.image(prompt=BLUE, seed=body["seed"], steps=1, image=body["image"], **EDIT)
    np.testing.assert_array_equal(contents(download), pixels(expected["data"]))
    studio.button(f"Show {BLUE}").last.click()
    assert told() == [False, False, "1", "1"]
    studio.drop("#drop-settings", "edit.png", download.path().read_bytes())
    page.get_by_text("These are the settings of edit.png").wait_for()
    assert not match.is_visible()  # nor asked for, before there are references
    studio.add_reference(("1.png", pictures[0]), ("2.png", pictures[1]))
    strengths[1].wait_for()
    assert (told(), threshold.input_value()) == ([True, True, "1", "0.5"], "0.2")
    studio.button("Start from 1.png").click()
    assert match.is_visible()
    studio.button("Draw mask").click()
    page.get_by_role("application", name="Mask").click()
    with page.expect_request(lambda request: '"mask":' in (request.post_data or "")):
        studio.button("Done").click()
    assert not match.is_visible()  # inpainting keeps the rest
    body = studio.bodies[-1]
    assert (body["reference_strength"], "color_match" in body) == ([0.5], False)
    assert all("image" in body for body in studio.bodies if EDIT.keys() & body.keys())


def test_the_session_is_kept(studio):
    """History: an image of before is shown with its settings, compared with, and used as reference."""
    studio.draw(PROMPT, steps=1)
    studio.draw(BLUE, steps=1)
    studio.page.keyboard.press("Tab")  # out of the text
    studio.page.keyboard.down("c")
    assert studio.picture(f"Before: {PROMPT}").is_visible()
    studio.page.keyboard.up("c")
    assert not studio.picture(f"Before: {PROMPT}").is_visible()
    studio.button(f"Show {PROMPT}").click()
    assert studio.picture(PROMPT).is_visible()
    assert studio.prompt.input_value() == PROMPT
    count = len(studio.bodies)
    studio.button(f"Use as reference: {BLUE}").click()
    studio.page.get_by_role("img", name=f"reference 1, {BLUE}").wait_for()
    studio.wait_drawn()
    assert len(studio.bodies) > count
    assert len(studio.bodies[-1]["image"]) == 1


# The name of what has the focus, and whether that is seen: an outline, or the prompt's box.
FOCUSED = """() => {
  const focused = document.activeElement;
  const outlined = [getComputedStyle(focused), getComputedStyle(focused, "::before")].some(
    (style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
  const lines = getComputedStyle(document.querySelector(".box")).borderTopColor;
  const accent = getComputedStyle(document.body).accentColor;
  return [focused.ariaLabel ?? focused.labels?.[0]?.innerText.trim() ?? focused.innerText.trim(),
    outlined || (focused.id === "prompt" && lines === accent)];
}"""
STOPS = [
    "Add reference image",
    "Seed",
    "New seed",
    "More",
    "Draw as I type",
    "Aspect",
    "Size",
    "Width",
    "Height",
    "Steps",
]


def test_it_works_by_keyboard_alone(studio):
    """From the prompt to a masked edit, with Tab, Enter, arrows and Space; every stop has a name and is seen, and they
    come in the order in which they are seen.
    """
    page = studio.page
    names = []

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            focused, is_seen = page.evaluate(FOCUSED)
            assert is_seen, focused
            names.append(focused)
            if focused.startswith(name):
                return
        raise AssertionError(f"Tab does not reach {name}, but {names}")

    assert page.evaluate(FOCUSED) == ["Prompt", True]
    tab_to("More")
    page.keyboard.press("Enter")
    tab_to("Steps")
    assert names == STOPS
    page.keyboard.type("1")
    page.keyboard.press("Shift+Tab")
    studio.prompt.focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    tab_to("Draw mask")
    page.keyboard.press("Enter")
    page.get_by_role("application", name="Mask").wait_for()
    for key in ("Space", "ArrowLeft", "ArrowLeft", "Shift+ArrowUp", "Space"):
        page.keyboard.press(key)
    tab_to("Extend left")
    page.keyboard.press("ArrowLeft")
    tab_to("Done")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE_WIDE)
    assert studio.bodies[-1]["expand"] == {"left": 16}
    mask = np.asarray(opened(studio.bodies[-1]["mask"]).convert("L"))
    assert 0.01 < (mask == 255).mean() < 0.1
    seed = page.get_by_role("spinbutton", name="Seed").input_value()
    page.get_by_role("spinbutton", name="Steps").fill("500")
    studio.prompt.focus()
    tab_to("New seed")
    page.keyboard.press("Space")
    page.wait_for_selector("#stage[aria-busy=true]")
    assert page.get_by_role("spinbutton", name="Seed").input_value() != seed
    page.keyboard.press("Escape")
    page.wait_for_selector("#stage[aria-busy=false]")
    assert studio.status.inner_text() == "Stopped"
    assert all(names)


DONE_WIDE = "#stage[aria-busy=false][data-shows=image]:not(.is-old):has(#frame[style*='1.125'])"


def test_faults_are_told_in_words(studio):
    """Of a value, of a full queue, which is asked again, and of a server that is gone, which may come back."""
    studio.expected = "Failed to load resource"
    studio.set_steps(5000)
    studio.prompt.fill(PROMPT)
    studio.page.wait_for_selector("#status.is-fault")
    assert studio.status.inner_text() == "num_steps must be a whole number from 1 to 1000, got 5000"
    queue = studio.server.worker.queue
    places, queue.places = queue.places, 0
    studio.page.get_by_role("spinbutton", name="Steps").fill("1")
    studio.page.get_by_text("requests wait already").wait_for()
    assert re.search(r"Trying again in \d+ s\.$", studio.status.inner_text())
    queue.places = places
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    studio.page.route("**/api/images", lambda route: route.abort())
    studio.prompt.fill(BLUE)
    studio.page.wait_for_selector("#status.is-fault")
    assert studio.status.inner_text() == "The server does not answer. Is flux2-serve still running?"
    assert studio.picture(PROMPT).is_visible()
    with studio.page.expect_response("**/api/info"):  # it may come back with another model
        studio.page.unroute("**/api/images")
        studio.picture(BLUE).wait_for()
    studio.wait_drawn()


def test_the_place_in_the_queue_is_told(studio):
    studio.set_steps(1)
    with studio.server.busy():
        studio.prompt.fill(PROMPT)
        studio.page.get_by_text("Waiting: 1 image comes before this one").wait_for()
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()


def test_without_drawing_as_you_type(studio):
    studio.set_steps(1)
    studio.page.get_by_role("checkbox", name="Draw as I type").uncheck()
    studio.prompt.fill(PROMPT)
    assert studio.bodies == []
    studio.button("Draw", exact=True).click()
    studio.picture(PROMPT).wait_for()
    studio.wait_drawn()
    assert len(studio.bodies) == 1


def test_what_a_base_model_and_loras_add(studio):
    """Guidance and negative prompt, and a slider for each LoRA; what is sent, by a server that tells of them."""
    info = studio.server.client.get("/api/info").json()
    studio.expected = "status of 400"
    info["model"] |= {"is_distilled": False, "steps": 50, "guidance": 4.0}
    info |= {"loras": ["watercolour", "ink", "fox"], "lora": {"fox": 0.6}, "models": ["nano", "klein-base-4b"]}
    studio.page.route("**/api/info", lambda route: route.fulfill(json=info))
    studio.page.route("**/api/images", lambda route: route.fulfill(status=400, json={"error": {"message": "seen"}}))
    studio.page.reload()
    studio.open_more()
    page = studio.page
    page.get_by_role("textbox", name="Negative prompt").fill("blue")
    page.get_by_role("textbox", name="Regions").fill("a fox@0,0,0.5,1\n\na hat@0.5,0,1,1\n")
    page.get_by_role("spinbutton", name="Guidance").fill("3.5")
    page.get_by_role("combobox", name="Model").select_option("klein-base-4b")
    page.get_by_role("combobox", name="Aspect").select_option("3:2")
    page.get_by_role("slider", name="ink").fill("0.8")
    studio.prompt.fill(PROMPT)
    page.get_by_text("seen").wait_for()
    body = studio.bodies[-1]
    assert {
        name: body[name] for name in ("negative_prompt", "region", "guidance", "model", "lora", "width", "height")
    } == {
        "negative_prompt": "blue",
        "region": ["a fox@0,0,0.5,1", "a hat@0.5,0,1,1"],
        "guidance": 3.5,
        "model": "klein-base-4b",
        "lora": {"ink": 0.8, "fox": 0.6},
        "width": 160,
        "height": 112,
    }


def test_the_key_is_asked_for(studio):
    """And kept for the tab."""

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.continue_()
        return route.fulfill(status=401, json={"error": {"message": "the API key is missing or wrong"}})

    studio.expected = "status of 401"
    studio.page.route("**/api/*", guard)
    studio.page.reload()
    studio.page.get_by_label("API key", exact=True).fill("secret")
    studio.page.keyboard.press("Enter")
    studio.draw(PROMPT)
    studio.page.reload()
    studio.draw(BLUE)


def test_on_a_phone(phone):
    """Nothing is wider than the screen; a finger brushes the mask; dark."""
    studio = phone
    studio.draw(PROMPT)
    studio.button("Draw mask").tap()
    studio.page.get_by_role("slider", name="Extend right").press("ArrowRight")
    assert studio.page.evaluate("() => document.documentElement.scrollWidth") == 375
    box = studio.page.get_by_role("application", name="Mask").bounding_box()
    finger = studio.page.context.new_cdp_session(studio.page)
    scrolled = studio.page.evaluate("() => scrollY")
    for kind, y in (("touchStart", 0.3), ("touchMove", 0.4), ("touchMove", 0.5), ("touchEnd", None)):
        places = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + y * box["height"]}] if y else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
    assert studio.page.evaluate("() => scrollY") == scrolled
    with studio.page.expect_request("**/api/images"):
        studio.button("Done").click()
    studio.wait_drawn()
    mask = np.asarray(opened(studio.bodies[-1]["mask"]).convert("L"))
    assert (mask[38:65, 64] == 255).all()
    assert (
        studio.page.locator("#picture").evaluate("(picture) => getComputedStyle(picture).transitionProperty") == "none"
    )
    assert studio.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 22)"
