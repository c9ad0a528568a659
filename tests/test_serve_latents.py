"""Requests of flux2-serve that start from an image of before, by the id of its latents. The model is nano."""

import httpx
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.serve import kept
from flux2_mlx.serve.events import Failure
from flux2_mlx.serve.kept import KeptLatents
from tests.server import PROMPT, Server, nano_server, pixels, png, uri

LATENTS = mx.zeros((1, 8, 8, 32))
PICTURE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def server():
    with nano_server() as running:
        yield running


def test_a_larger_image_is_begun_from_the_smaller_ones_latents(server):
    """As by hand, pixel by pixel; no picture is encoded, and its file says that it cannot be repeated from it alone."""
    draft = server.image(steps=2)
    assert "init_latents" not in draft["settings"]["inputs"]
    large = server.image(steps=4, width=128, height=96, init_latents=draft["id"], strength=0.5)
    pipe = Flux2Pipeline.from_pretrained("nano", cache=False)
    latents = pipe(PROMPT, seed=3, width=64, height=64, num_steps=2, output_type="latent").images
    options = {"seed": 3, "width": 128, "height": 96, "num_steps": 4, "strength": 0.5}
    expected = pipe(PROMPT, init_latents=latents, **options)
    assert "references" not in expected.seconds
    np.testing.assert_array_equal(pixels(large["data"]), np.asarray(expected.images[0]))
    assert large["settings"]["inputs"] == ["init_latents"]
    assert large["id"] not in (draft["id"], None)
    # Its own size where none is asked for, and in a form.
    answer = server.client.post(
        "/api/images",
        data={"prompt": PROMPT, "steps": "1", "preview": "none", "init_latents": draft["id"], "strength": "1"},
        files={"image": png(PICTURE)},
    )
    assert '"width": 64, "height": 64' in answer.text.split("event: image")[1]


def test_every_image_of_a_request_has_an_id(server):
    ids = [data["id"] for name, data in server.draw(num_images=3) if name == "image"]
    assert len(set(ids)) == 3
    assert all(len(one) >= 20 for one in ids)
    mask = Image.new("L", (64, 64), 255)
    assert server.image(init_image=uri(PICTURE), mask=uri(mask))["id"] is None  # it is pasted into another image


@pytest.mark.parametrize(
    ("values", "status", "message"),
    [
        ({"init_latents": "of-nobody"}, 410, "not kept here any more"),
        ({"init_latents": ["a"]}, 410, "not kept here any more"),
        ({"init_latents": None, "strength": 0.5}, 400, "strength belongs to init_image"),
    ],
)
def test_latents_that_are_not_there_are_told(server, values, status, message):
    ((kind, answer),) = server.draw(**values)
    assert (kind, answer.status_code) == ("refused", status)
    assert message in answer.json()["error"]["message"]


def test_a_picture_beside_latents_is_refused(server):
    ((_, answer),) = server.draw(init_latents=server.image()["id"], init_image=uri(PICTURE))
    assert answer.status_code == 400
    assert "give one of them" in answer.json()["error"]["message"]


def test_they_are_forgotten_with_the_model():
    with Server("--model", "nano", "--keep-alive", "0.2s") as server:
        draft = server.image()
        server.wait(lambda: server.client.get("/api/info").json()["status"] == "unloaded")
        ((_, answer),) = server.draw(init_latents=draft["id"])
        assert answer.status_code == 410
        assert "data" in server.image()


def test_other_apis_take_none(server):
    """An unknown option there, as any."""
    body = {"prompt": PROMPT, "size": "64x64", "steps": 1, "init_latents": server.image()["id"]}
    with httpx.Client(base_url=server.address, timeout=60) as client:
        assert client.post("/v1/images/generations", json=body).status_code == 200


def test_how_many_are_kept(monkeypatch):
    """Of each client the last ones, and of all no more bytes than there is room for; another model's are none."""
    latents = KeptLatents()
    first = latents.keep("a", "nano", LATENTS)
    others = [latents.keep("b", "nano", LATENTS + k) for k in range(kept.PER_CLIENT + 2)]
    assert latents.find(first, "nano").shape == (1, 8, 8, 32)
    assert latents.find(others[2], "nano")[0, 0, 0, 0] == 2
    for name, model in ((others[1], "nano"), (first, "klein-4b"), ("", "nano"), (None, "nano"), ({}, "nano")):
        with pytest.raises(Failure, match="are not kept here any more") as failure:
            latents.find(name, model)
        assert failure.value.status == 410
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * 8 * 8 * 32 * 4)
    last = latents.keep("c", "nano", LATENTS)
    assert [name for name in (first, *others, last) if name in latents._kept] == [*others[-2:], last]
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    last = latents.keep("c", "nano", LATENTS)
    assert list(latents._kept) == [last]  # the newest, whatever its size
    latents.forget()
    with pytest.raises(Failure):
        latents.find(last, "nano")
