"""flux2-serve: its queue, its native API, who may ask, how it starts and ends. The model is nano."""

import asyncio
import base64
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from flux2_mlx import InputError
from flux2_mlx.generate import main as generate
from flux2_mlx.imaging.files import read_metadata
from flux2_mlx.options import BatchOptions, GenerationOptions, ModelOptions
from flux2_mlx.serve import mcp, security
from flux2_mlx.serve.__main__ import main
from flux2_mlx.serve.app import build_app
from flux2_mlx.serve.arguments import build_parser, duration, rules_of, studio_of
from flux2_mlx.serve.catalogue import Catalogue
from flux2_mlx.serve.events import Failure, Queued
from flux2_mlx.serve.orders import MAX_IMAGES, OPTIONS
from flux2_mlx.serve.queue import Order, Queue
from flux2_mlx.serve.security import Rules
from tests import loras
from tests.server import FAST, PROMPT, Server, nano_server, opened, pixels, png, uri

RED = Image.new("RGB", (128, 128), "red")


@pytest.fixture(scope="module")
def server():
    with nano_server() as running:
        yield running


# ------------------------------------------------------------------------------------------------ the native API


@pytest.mark.parametrize(("words", "cached"), [([], False), (["--cache"], True)])
def test_half_typed_prompts_are_not_kept_on_disk_unless_asked(words, cached):
    arguments = build_parser().parse_args(["--model", "nano", *words])
    assert studio_of(arguments).reader.task("nano", {"prompt": "a fo"}).runtime.cache is cached


def test_a_prompt_is_drawn_step_by_step(server):
    told = server.draw(steps=3, preview="webp")
    assert [name for name, _ in told] == ["queued", "step", "step", "step", "image"]
    assert told[0][1] == {"position": 0}
    steps = [data for name, data in told if name == "step"]
    assert [(step["index"], step["steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[0]["sigma"] > steps[1]["sigma"] > steps[2]["sigma"] == 0
    assert opened(steps[0]["preview"]).size == (64, 64)
    assert opened(steps[0]["preview"]).format == "WEBP"
    assert steps[2]["preview"] is None
    assert steps[2]["seconds_left"] == 0
    image = told[-1][1]
    assert (image["seed"], image["width"], image["settings"]["num_steps"]) == (3, 64, 3)
    assert opened(image["data"]).format == "PNG"
    assert image["warnings"] == []


def test_seconds_left_are_those_of_the_steps_so_far(server, monkeypatch):
    """By a clock that goes on by a second whenever it is asked, which it is once at the start and once a step."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("flux2_mlx.serve.worker.time", clock)
    assert [data["seconds_left"] for name, data in server.draw(steps=4) if name == "step"] == [3, 2, 1, 0]


SAME = [
    ({"steps": 2, "seed": 5, "width": None, "height": None}, ["--steps", "2", "--seed", "5"]),
    ({"num_steps": 1, "width": 96, "noise": "mlx"}, ["--steps", "1", "--size", "96x64", "--noise", "mlx"]),
    ({"sigmas": [1.0, 0.5], "steps": None}, ["--sigmas", "1.0,0.5", "--size", "64x64"]),
]


@pytest.mark.parametrize(("options", "words"), SAME)
def test_the_image_is_the_commands(server, tmp_path, options, words):
    """Pixel by pixel, whatever the options."""
    file = tmp_path / "fox.png"
    assert generate([PROMPT, "--model", "nano", "--quiet", "--seed", "3", "--output", str(file), *words]) == 0
    with Image.open(file) as expected:
        assert np.array_equal(pixels(server.image(**options)["data"]), np.asarray(expected))


def test_an_edit_is_the_commands(server, tmp_path):
    """References, an init image and a mask come as bytes, in JSON and multipart."""
    files = {name: tmp_path / f"{name}.png" for name in ("image", "init_image", "mask")}
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    for file, picture in zip(files.values(), (Image.new("RGB", (64, 64), "blue"), RED, mask), strict=True):
        picture.save(file)
    words = [f"--{name.replace('_', '-')}={file}" for name, file in files.items()]
    output = tmp_path / "fox.png"
    small = ["--steps", "1", "--seed", "3", "--size", "64x64", "--mask-blur", "2"]
    assert generate([PROMPT, "--model", "nano", "--quiet", "--output", str(output), *small, *words]) == 0
    with Image.open(output) as picture:
        expected = np.asarray(picture)
    assert np.array_equal(expected[:, :48], np.asarray(RED)[:, :48])
    uris = {name: uri(Image.open(file)) for name, file in files.items()}
    assert np.array_equal(pixels(server.image(**uris, mask_blur=2)["data"]), expected)
    parts = {name: file.read_bytes() for name, file in files.items()}
    texts = {name: str(value) for name, value in FAST.items()} | {"mask_blur": "2", "force_guidance": "false"}
    answer = server.client.post("/api/images", data=texts, files=parts)
    data = json.loads(answer.text.split("event: image\ndata: ")[1])["data"]
    assert np.array_equal(pixels(data), expected)


def test_several_images_and_formats(server):
    images = [data for name, data in server.draw(num_images=2, format="jpeg", quality=50) if name == "image"]
    assert [(image["image"], image["seed"]) for image in images] == [(0, 3), (1, 4)]
    assert opened(images[0]["data"]).format == "JPEG"
    assert images[0]["data"].startswith("data:image/jpeg;base64,")
    assert opened(server.image(format="webp")["data"]).format == "WEBP"
    few = [data["preview"] for name, data in server.draw(steps=4, preview="jpeg", previews=1) if name == "step"]
    assert [preview is not None for preview in few] == [False, True, False, False]
    assert opened(few[1]).format == "JPEG"


REFUSED = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "a prompt must be a string, got 7"),
    ({"width": 100}, "width must be a multiple of 16, got 100; the nearest are 96 and 112"),
    ({"steps": "many"}, "invalid int value: 'many'"),
    ({"stepz": 3}, "unknown option 'stepz'; did you mean steps?"),
    ({"output": "x.png"}, "unknown option 'output'"),
    ({"num_images": MAX_IMAGES + 1}, f"at most {MAX_IMAGES} images"),
    ({"strength": 0.5}, "strength belongs to init_image"),
    ({"image": "fox.png"}, "image 1 must be a picture as base64 or a data URI"),
    ({"image": [7]}, "image 1 must be a picture"),
    ({"init_image": "https://example.com/fox.png"}, "no file or address is read"),
    ({"init_image": base64.b64encode(b"no image").decode()}, "init_image: cannot be read: it is no image"),
    ({"image": ["aaaa"] * 17}, "at most 16 pictures"),
    ({"lora": "fox"}, "there is no LoRA 'fox' here"),
    ({"format": "bmp"}, "format must be one of"),
    ({"quality": 101}, "quality must be a whole number from 0 to 100"),
    ({"previews": "x"}, "previews must be a whole number"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_a_bad_value_is_refused_before_it_waits(server, values, message):
    ((name, answer),) = server.draw(**values)
    assert (name, answer.status_code) == ("refused", 400)
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_what_is_no_json_is_refused(server, body):
    answer = server.client.post("/api/images", content=body.encode("latin-1"))
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_info_names_every_option(server):
    server.wait(lambda: server.worker.state.model)
    info = server.client.get("/api/info").json()
    assert set(info["options"]) == {f.name for cls in (GenerationOptions, BatchOptions) for f in fields(cls)}
    assert info["options"]["guidance"] | {"description": ""} == {
        "type": "number",
        "default": None,
        "description": "",
        "minimum": 0,
        "maximum": 100,
    }
    assert info["model"] == {"name": "nano", "is_distilled": True, "side": 128, "steps": 4, "guidance": 1.0}
    assert (info["models"], info["queue"]["places"]) == (["nano"], 4)


def test_every_option_has_a_name_in_requests():
    for cls in (GenerationOptions, BatchOptions):
        for f in fields(cls):
            assert f.name in OPTIONS
            assert not f.metadata.get("is_path")
    assert {"steps", "num_inference_steps", "guidance_scale", "cfg_scale", "negative_prompt", "seed"} <= OPTIONS.keys()


def test_settings_come_back_from_an_image(server):
    drawn = server.image(steps=2, height=80)
    file = base64.b64decode(drawn["data"].partition(",")[2])
    found = server.client.post("/api/settings", content=file).json()
    assert found["settings"]["prompt"] == PROMPT
    assert found["parameters"] == drawn["parameters"]
    values = {name: found["settings"][name] for name in ("prompt", "seed", "num_steps", "width", "height")}
    again = server.image(steps=None, **values)
    assert np.array_equal(pixels(again["data"]), pixels(drawn["data"]))
    assert server.client.post("/api/settings", content=png(RED)).status_code == 400


def test_another_model_is_answered_by_this_one(server):
    drawn = server.image(model="gpt-image-1")
    assert drawn["settings"]["model"] == "nano"
    assert drawn["warnings"] == ["there is no model 'gpt-image-1' here; nano drew this"]


def test_warnings_of_the_library_are_told(server):
    drawn = server.image(guidance=4)
    assert "is distilled and generates without CFG" in drawn["warnings"][0]


# ------------------------------------------------------------------------------------------------ the queue


def order(client):
    told = []
    return Order(client, "nano", None, told.append), told


def test_clients_take_turns():
    queue = Queue(16)
    orders = {name: order(name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    for one, _ in orders.values():
        queue.put(one)
    names = {id(one): name for name, (one, _) in orders.items()}
    assert [names[id(queue.take(0))] for _ in orders] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [event.position for event in orders["a3"][1]] == [2, 3, 4, 5, 4, 3, 2, 1, 0]
    assert queue.take(0) is None


def test_no_client_takes_the_last_places():
    queue = Queue(8)
    for _ in range(6):
        queue.put(order("a")[0])
    with pytest.raises(Failure, match="6 requests wait already") as failure:
        queue.put(order("a")[0])
    assert (failure.value.status, failure.value.retry_after) == (429, 7)
    queue.put(order("b")[0])
    queue.put(order("c")[0])
    with pytest.raises(Failure):
        queue.put(order("d")[0])


def test_a_cancelled_order_frees_its_place():
    queue = Queue(1)
    first, _ = order("a")
    queue.put(first)
    queue.cancel(first)
    assert len(queue) == 0
    second, told = order("b")
    queue.put(second)
    assert queue.take(0) is second
    queue.cancel(second)
    assert second.is_cancelled
    assert told == [Queued(0)]


def test_a_queue_that_closes_tells_everybody():
    queue = Queue(4)
    running, told_running = order("a")
    waiting, told_waiting = order("a")
    queue.put(running)
    queue.take(0)
    queue.put(waiting)
    queue.close()
    assert isinstance(told_running[-1], Failure)
    assert isinstance(told_waiting[-1], Failure)
    assert running.is_cancelled
    assert queue.take(None) is None
    with pytest.raises(Failure, match="ending"):
        queue.put(order("a")[0])


def test_hanging_up_stops_at_the_next_step(server):
    with server.busy():
        assert server.worker.queue.running is not None
    started = server.worker.queue
    server.wait(lambda: started.running is None)
    assert server.image()["seed"] == 3


def test_hanging_up_frees_a_place_in_the_queue(server):
    with server.busy(), httpx.Client(base_url=server.address, timeout=60) as client:
        with client.stream("POST", "/api/images", json=FAST) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: queued"
            server.wait(lambda: len(server.worker.queue) == 1)
        server.wait(lambda: len(server.worker.queue) == 0)
    server.settle()


def test_a_full_queue_says_when_to_come_back(server):
    with server.busy():
        clients = [httpx.Client(base_url=server.address, timeout=60, headers={"User-Agent": str(k)}) for k in range(6)]
        statuses = []
        threads = [
            threading.Thread(target=lambda c=client: statuses.append(c.post("/api/images", json=FAST)))
            for client in clients
        ]
        for thread in threads:
            thread.start()
        server.wait(lambda: len(statuses) == 2)
        assert [answer.status_code for answer in statuses] == [429, 429]
        assert int(statuses[0].headers["Retry-After"]) >= 1
        assert statuses[0].json()["error"]["type"] == "rate_limit_error"
        health = server.client.get("/health").json()
        assert health == {"status": "ok", "waiting": 4, "running": True}
    for thread in threads:
        thread.join(60)
    for client in clients:
        client.close()
    assert sorted(answer.status_code for answer in statuses) == [200] * 4 + [429] * 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("[metal] /home/me/secret/x failed"), 500, "RuntimeError: [metal] x failed"),
        (MemoryError(), 500, "MemoryError: MemoryError"),
        (SystemExit("told to end"), 500, "SystemExit: told to end"),
        (FloatingPointError("not finite"), 500, "not finite"),
        (InputError("no such thing"), 400, "no such thing"),
    ],
)
def test_a_fault_is_its_requests_alone(server, monkeypatch, capsys, error, status, message):
    """And tells nothing of this machine's folders."""

    def stream(*_, **__):
        raise error

    server.image()
    with monkeypatch.context() as patch:
        patch.setattr(server.worker._pipe, "stream", stream, raising=False)
        assert server.draw()[-1] == ("error", {"message": message, "status": status})
    assert server.image()["seed"] == 3


def test_an_idle_model_is_unloaded_and_comes_back():
    with Server("--model", "nano", "--keep-alive", "0.05s") as server:
        first = server.image()
        server.wait(lambda: server.client.get("/api/info").json()["status"] == "unloaded")
        assert server.worker._pipe.stages.loaded() == set()
        assert pixels(server.image()["data"]).tobytes() == pixels(first["data"]).tobytes()


def test_a_model_that_cannot_be_opened_is_told_each_time(tmp_path, capsys):
    (tmp_path / "hidden" / "model").mkdir(parents=True)
    with Server("--model", str(tmp_path / "hidden" / "model")) as server:
        for _ in range(2):
            (queued, (name, data)) = server.draw()
            assert (queued[0], name, data["status"]) == ("queued", "error", 503)
            assert data["message"].startswith("the model cannot be opened: ")
            assert str(tmp_path) not in data["message"]
        info = server.client.get("/api/info").json()
        assert info["status"] == "failed"
        assert str(tmp_path) not in json.dumps(info)
    assert capsys.readouterr().err.startswith("warning: the model cannot be opened: ")


# ------------------------------------------------------------------------------------------------ who may ask


def ask(server, rules, method, path, **more):
    """A request to the server's application under other rules, without a network."""

    async def send():
        transport = httpx.ASGITransport(build_app(server.studio, rules), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7870", timeout=60) as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7870", 200),
        ("127.0.0.1", 200),
        ("[::1]:99", 200),
        ("host.docker.internal:7870", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("", 403),
    ],
)
def test_other_names_are_refused(server, host, status):
    """DNS rebinding: a page's own name that resolves to this machine."""
    assert ask(server, Rules(), "GET", "/api/info", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:7870"}, 200),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(server, headers, status):
    answer = ask(server, Rules(), "POST", "/api/settings", headers=headers, content=b"no image")
    assert answer.status_code == (400 if status == 200 else status)
    assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_site_may_ask(server):
    site = "https://app.example"
    rules = Rules(origins=(site,))
    answer = ask(server, rules, "GET", "/api/info", headers={"Origin": site})
    assert answer.headers["access-control-allow-origin"] == site
    preflight = ask(server, rules, "OPTIONS", "/api/images", headers={"Origin": site})
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert ask(server, rules, "GET", "/api/info", headers={"Origin": "https://b.example"}).status_code == 403
    assert ask(server, rules, "GET", "/api/info", headers={"Host": "app.example"}).status_code == 200


def basic(password):
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer schlüssel".encode()}, 200),
        ({"Authorization": basic("schlüssel")}, 200),
        ({"Authorization": basic("")}, 401),
        ({"Authorization": "Basic %%"}, 401),
        ({"X-Api-Key": "schlüssel".encode()}, 200),
        ({"Authorization": "Bearer"}, 401),
    ],
)
def test_a_key_is_demanded(server, headers, status):
    for path in ("/api/info", "/v1/models"):
        answer = ask(server, Rules(api_key="schlüssel"), "GET", path, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    own = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda *both: compared.append(both) or own(*both))
    assert not Rules(api_key="key").allows_key("Bearer kez", "")
    assert compared == [(b"kez", b"key")]


def test_the_page_and_health_need_no_key(server):
    rules = Rules(api_key="key")
    assert ask(server, rules, "GET", "/health").status_code == 200
    page = ask(server, rules, "GET", "/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_others_are_let_in_with_a_key_alone(capsys, monkeypatch):
    monkeypatch.delenv("FLUX2_MLX_API_KEY", raising=False)

    def rules(*words):
        return rules_of(build_parser().parse_args(list(words)))

    assert rules().api_key is None
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(InputError, match="demand a key"):
            rules("--host", host)
        assert rules("--host", host, "--api-key", "key").api_key == "key"
        assert rules("--host", host, "--no-api-key").api_key is None
    monkeypatch.setenv("FLUX2_MLX_API_KEY", "secret")
    open_rules = rules("--host", "0.0.0.0")
    assert open_rules.api_key == "secret"
    assert open_rules.allows_host("192.168.1.5:7870")
    assert open_rules.allows_host(socket.gethostname())
    assert not open_rules.allows_host("evil.example")


def test_bodies_are_bounded(server, monkeypatch):
    monkeypatch.setattr(security, "MAX_BODY", 1000)
    answer = ask(server, Rules(), "POST", "/api/images", content=b"x" * 1001)
    assert answer.status_code == 413

    async def chunks():
        for _ in range(5):
            yield b"x" * 400

    answer = ask(server, Rules(), "POST", "/api/images", content=chunks())
    assert answer.status_code == 413
    assert "MB" in answer.json()["error"]["message"]


def test_pixels_are_bounded_before_they_are_decoded(server, monkeypatch):
    monkeypatch.setattr("flux2_mlx.serve.orders.open_image", lambda *_, **__: pytest.fail("decoded"))
    large = Image.new("1", (8192, 4097))
    ((_, answer),) = server.draw(image=[uri(large), uri(large)])
    assert answer.status_code == 400
    assert "67,108,864 pixels together" in answer.json()["error"]["message"]


def test_frames_are_bounded(server, tmp_path):
    file = tmp_path / "moving.gif"
    RED.save(file, save_all=True, append_images=[Image.new("RGB", (128, 128), "blue")])
    ((_, answer),) = server.draw(image=base64.b64encode(file.read_bytes()).decode())
    assert "image 1: has several frames" in answer.json()["error"]["message"]


def test_parts_of_a_form_are_bounded(server):
    parts = [("image", ("image.png", png(RED)))] * 30
    answer = server.client.post("/api/images", data=FAST, files=parts)
    assert answer.status_code == 400


def test_no_request_names_a_file_or_a_repository(server, tmp_path):
    secret = tmp_path / "secret.png"
    RED.save(secret)
    for values in ({"image": str(secret)}, {"mask": str(secret)}, {"lora": str(secret)}, {"lora": "owner/name"}):
        ((_, answer),) = server.draw(**values)
        assert answer.status_code == 400
    for name in (
        "transformer",
        "text_encoder",
        "vae",
        "tokenizer",
        "revision",
        "preview_decoder",
        "from_image",
        "jobs",
    ):
        ((_, answer),) = server.draw(**{name: str(secret)})
        assert answer.json()["error"]["message"].startswith(f"unknown option {name!r}")
    assert server.image(model=str(secret))["settings"]["model"] == "nano"
    form = server.client.post("/api/images", data=FAST | {"mask": str(secret)})
    assert form.status_code == 400


def test_an_images_settings_fill_nothing_in_from_this_machine(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    file = tmp_path / "image.png"
    assert generate([PROMPT, "--model", "nano", "--quiet", "--steps", "1", "--output", str(file)]) == 0
    info = PngImagePlugin.PngInfo()
    changed = {"model": "$SECRET", "vae": "${SECRET}/x", "lora": ["~/fox:1"]}
    info.add_text("flux2_mlx", json.dumps(read_metadata(file) | changed))
    with Image.open(file) as image:
        image.save(file, pnginfo=info)
    answer = server.client.post("/api/settings", content=file.read_bytes())
    assert answer.status_code == 200
    assert "token" not in answer.text
    assert "/home" not in answer.text


def test_images_carry_names_in_the_place_of_paths(checkpoint, tmp_path):
    """A model in a folder, a LoRA in a folder: named by the owner, and in answers and images too."""
    folder = tmp_path / "styles"
    folder.mkdir()
    loras.write(
        folder / "fox.safetensors", load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    )
    small = {"max_sequence_length": 16}
    words = ["--model", "nano", "--models", f"house={checkpoint}", "--lora-dir", str(folder)]
    with Server(*words) as server:
        info = server.client.get("/api/info")
        assert info.json()["models"] == ["nano", "house"]
        assert info.json()["loras"] == ["fox"]
        plain = server.image(model="house", **small)
        assert server.image(model="gpt-image-1", **small)["settings"]["model"] == "house"  # which is loaded
        styled = server.image(model="house", lora={"fox": 0.5}, **small)
        assert styled["settings"]["model"] == "house"
        assert styled["settings"]["lora"] == ["fox:0.5"]
        assert not np.array_equal(pixels(plain["data"]), pixels(styled["data"]))
        same = server.image(model="house", lora="fox:0.5", **small)
        assert np.array_equal(pixels(same["data"]), pixels(styled["data"]))
        body = {"model": "house", "prompt": PROMPT, "size": "64x64", "steps": 1, "seed": 3, **small}
        same = server.client.post("/v1/images/generations", json=body | {"lora": {"fox": 0.5}}).json()
        assert np.array_equal(pixels(same["data"][0]["b64_json"]), pixels(styled["data"]))
        file = tmp_path / "image.png"
        file.write_bytes(base64.b64decode(styled["data"].partition(",")[2]))
        for text in (info.text, json.dumps(styled), json.dumps(read_metadata(file))):
            assert str(tmp_path) not in text
            assert str(checkpoint) not in text
        ((_, answer),) = server.draw(lora="foks")
        assert answer.json()["error"]["message"] == "there is no LoRA 'foks' here; did you mean fox?"


def test_the_servers_own_loras_are_told():
    """The page's sliders begin there."""
    server = Catalogue(ModelOptions(model="nano", lora=("~/styles/fox.safetensors:0.5", "ink")), ["klein-4b"])
    assert server.own_loras("nano") == {"fox": 0.5, "ink": 1.0}
    assert server.own_loras("klein-4b") == {}


# ------------------------------------------------------------------------------------------------ the page's colours


STYLE = (Path(security.__file__).parent / "page" / "style.css").read_text()
COLOURS = {
    name: (light, dark or light)
    for name, light, dark in re.findall(r"--([\w-]+): (?:light-dark\()?(#\w+)(?:, (#\w+)\))?;", STYLE)
}
GROUNDS = ("ground", "surface", "sunk")
# WCAG 2.2, 1.4.3: text 4.5; 1.4.11: what shows a control, its state or the focus 3.
CONTRASTS = [
    *((text, ground, 4.5) for text in ("text", "faint") for ground in GROUNDS),
    ("fault", "ground", 4.5),
    ("on-accent", "accent", 4.5),
    *(("accent", ground, 3) for ground in GROUNDS),
    *(("edge", ground, 3) for ground in ("ground", "surface")),
]


def luminance(colour):
    """Of sRGB, as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_wcags():
    """#767676 is the lightest grey that WCAG lets be read on white."""
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize(("colour", "ground", "least"), CONTRASTS)
def test_colours_are_told_apart(colour, ground, least):
    for one, other, scheme in zip(COLOURS[colour], COLOURS[ground], ("light", "dark"), strict=True):
        assert contrast(one, other) >= least, scheme


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("-1", -1)])
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_a_taken_port_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "nano", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told == f"error: port {port} of 127.0.0.1 is taken; --port {port + 1} takes another, --port 0 a free one\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "others reach 0.0.0.0"),
        (["--keep-alive", "soon"], "invalid duration 'soon'"),
        (["--queue", "0"], "must be at least 1"),
        (["--port", "70000"], "a port is a number"),
        (["--lora-dir", "nowhere"], "--lora-dir nowhere is no folder"),
        (["--models", "nano"], "two models are called 'nano'"),
        (["--host", "not.an.address.invalid", "--no-api-key"], "cannot listen at"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, message, capsys):
    assert main(["--model", "nano", "--port", "0", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([]) == 2
    assert capsys.readouterr().err == 'error: flux2-serve needs uvicorn: pip install "flux2_mlx[serve]"\n'


def test_without_the_extra_assistants_have_no_tools_either(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "flux2_mlx.serve.tools", raising=False)
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    assert mcp.main([]) == 2
    assert capsys.readouterr().err == 'error: flux2-mcp needs mcp, version 2: pip install "flux2_mlx[mcp]"\n'


def test_the_page_is_opened_in_the_browser(monkeypatch, capsys):
    pages = []

    def open_page(address):
        pages.append(httpx.get(address).text)
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", open_page)
    assert main(["--model", "nano", "--port", "0", "--open"]) == 130
    assert ">flux2_mlx</title>" in pages[0]
    assert capsys.readouterr().err.endswith("Ctrl-C ends it\ninterrupted\n")


def test_connections_are_bounded(monkeypatch):
    """Each may bring a large body: what comes beside the queue's places and CONNECTIONS is refused."""
    statuses = []

    def open_page(address):
        where = ("127.0.0.1", int(address.rpartition(":")[2].strip("/")))
        statuses.append(httpx.get(f"{address}health").status_code)
        with socket.create_connection(where), socket.create_connection(where):
            statuses.append(httpx.get(f"{address}health").status_code)
        while httpx.get(f"{address}health").status_code != 200:  # until the server has seen that they are closed
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", open_page)
    monkeypatch.setattr("flux2_mlx.serve.__main__.CONNECTIONS", 1)
    assert main(["--model", "nano", "--port", "0", "--queue", "1", "--open"]) == 130
    assert statuses == [200, 503]


def test_ctrl_c_ends_it_in_the_middle_of_an_image():
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from flux2_mlx.serve.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--model", "nano", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = process.stderr.readline().split()[0]
    with httpx.stream("POST", f"{address}api/images", json=FAST | {"steps": 1000}, timeout=60) as answer:
        lines = answer.iter_lines()
        assert "event: step" in lines
        process.send_signal(signal.SIGINT)
        rest = "\n".join(lines)
    assert '"message": "the server is ending"' in rest
    assert process.wait(30) == 130
    assert process.stderr.read() == "interrupted\n"
    process.stderr.close()
