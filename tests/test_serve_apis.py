"""The server's APIs, asked by OpenAI's own client and by what other clients send, read from their sources."""

import asyncio
import base64
import json
import os
import sys
import threading

import mcp
import numpy as np
import openai
import pytest
from PIL import Image

from flux2_mlx.conditioning.enhance import Enhancer
from flux2_mlx.generate import main as generate
from tests.server import FAST, PROMPT, Server, nano_server, opened, pixels, png, uri

SMALL = {"steps": 1, "seed": 3}
RED = Image.new("RGB", (128, 128), "red")


@pytest.fixture(scope="module")
def server():
    with nano_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as running:
        yield running


def command(tmp_path, *words, steps=1):
    """What the command draws of the same options."""
    file = tmp_path / "expected.png"
    file.unlink(missing_ok=True)
    own = ["--model", "nano", "--quiet", "--seed", "3", "--steps", str(steps), "--output", str(file)]
    assert generate([PROMPT, *own, *words]) == 0
    with Image.open(file) as image:
        return np.asarray(image)


# ------------------------------------------------------------------------------------------------ OpenAI


def test_openais_client_generates(client, tmp_path):
    answer = client.images.generate(prompt=PROMPT, model="nano", n=2, size="64x64", extra_body=SMALL)
    assert np.array_equal(pixels(answer.data[0].b64_json), command(tmp_path, "--size", "64x64"))
    assert [image.seed for image in answer.data] == [3, 4]
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (48, 2 * 16, 48 + 32)


def test_a_prompt_is_written_out_and_told(client, server, monkeypatch):
    name, told = server.draw(enhance=True)[-1]
    assert (name, told["status"]) == ("error", 400)
    assert "nano's text encoder knows the words of its scenes alone" in told["message"]
    monkeypatch.setattr("flux2_mlx.refusals.find_language_model", lambda checkpoint: None)
    monkeypatch.setattr(Enhancer, "write", lambda self, prompts, **how: {prompts[0]: "a blue square"})
    settings = server.image(enhance=True)["settings"]
    assert (settings["prompt"], settings["original_prompt"]) == ("a blue square", PROMPT)
    answer = client.images.generate(prompt=PROMPT, size="64x64", extra_body={**SMALL, "enhance": True})
    assert answer.data[0].revised_prompt == "a blue square"
    plain = client.images.generate(prompt=PROMPT, size="64x64", extra_body=SMALL)
    assert plain.data[0].revised_prompt is None


@pytest.mark.parametrize(
    "more",
    [
        {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3},
        {"steps": 2, "cfg_scale": 1, "seed": "3", "negative_prompt": "blue", "safety_checker": True, "foo": {"a": [1]}},
        {"step": 9, "num_steps": 2, "guidance": 1, "seed": 3, "scheduler": "DPM++ 2M"},
    ],
)
def test_other_vendors_fields_are_known_or_ignored(client, tmp_path, more):
    answer = client.images.generate(
        prompt=PROMPT, size="64x64", quality="hd", style="vivid", user="me", extra_body=more
    )
    assert np.array_equal(pixels(answer.data[0].b64_json), command(tmp_path, "--size", "64x64", steps=2))


def test_formats_and_urls(client):
    own = {"prompt": PROMPT, "size": "64x64", "extra_body": SMALL}
    answer = client.images.generate(output_format="jpeg", output_compression=20, **own)
    assert opened(answer.data[0].b64_json).format == "JPEG"
    answer = client.images.generate(output_format="webp", response_format="url", background="transparent", **own)
    assert answer.data[0].url.startswith("data:image/webp;base64,")
    assert answer.warnings == ["background is left out: images are opaque"]


def test_openais_client_streams(client):
    own = {"prompt": PROMPT, "size": "64x64", "stream": True, "partial_images": 2}
    told = list(client.images.generate(**own, extra_body={"steps": 4, "seed": 3}))
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in told] == kinds
    assert [event.partial_image_index for event in told[:2]] == [0, 1]
    for event in told:
        assert opened(event.b64_json).size == (64, 64)
        assert (event.size, event.output_format, event.background, event.quality) == ("64x64", "png", "opaque", "auto")
        assert event.created_at > 0
    assert told[2].usage.total_tokens == 48 + 16


def mask_right():
    """Opaque, and transparent in the right half, which is to be edited."""
    mask = Image.new("RGBA", (128, 128), (9, 9, 9, 255))
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    return mask


def test_openais_client_gives_each_reference_its_strength(client, tmp_path):
    """A list among a form's fields is ``reference_strength[]`` there."""
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for k, picture in enumerate(pictures):
        picture.save(tmp_path / f"{k}.png")
    words = [word for k in range(2) for word in ("--image", str(tmp_path / f"{k}.png"))]
    answer = client.images.edit(
        image=[(f"{k}.png", png(picture)) for k, picture in enumerate(pictures)],
        prompt=PROMPT,
        size="64x64",
        extra_body={**SMALL, "reference_strength": [1, 0.25]},
    )
    expected = command(tmp_path, *words, "--size", "64x64", "--reference-strength", "1,0.25")
    assert np.array_equal(pixels(answer.data[0].b64_json), expected)
    assert not np.array_equal(expected, command(tmp_path, *words, "--size", "64x64"))


def test_openais_client_edits_with_a_mask(client, tmp_path):
    answer = client.images.edit(
        image=("a.png", png(RED)), mask=("m.png", png(mask_right())), prompt=PROMPT, size="1024x1024", extra_body=SMALL
    )
    edited = pixels(answer.data[0].b64_json)
    assert np.array_equal(edited[:, :64], np.asarray(RED)[:, :64])
    assert not np.array_equal(edited[:, 64:], np.asarray(RED)[:, 64:])
    RED.save(tmp_path / "red.png")
    white = Image.new("L", (128, 128))
    white.paste(255, (64, 0, 128, 128))
    white.save(tmp_path / "mask.png")
    words = ["--init-image", str(tmp_path / "red.png"), "--mask", str(tmp_path / "mask.png")]
    assert np.array_equal(edited, command(tmp_path, *words))


def test_openais_client_edits_several_pictures(client, tmp_path):
    pictures = [RED.resize((64, 64)), Image.new("RGB", (64, 64), "blue")]
    files = [(f"{k}.png", png(picture)) for k, picture in enumerate(pictures)]
    told = list(
        client.images.edit(
            image=files, prompt=PROMPT, size="64x64", stream=True, partial_images=1, extra_body={"steps": 2, "seed": 3}
        )
    )
    assert [event.type for event in told] == ["image_edit.partial_image", "image_edit.completed"]
    words = []
    for k, picture in enumerate(pictures):
        picture.save(tmp_path / f"{k}.png")
        words += ["--image", str(tmp_path / f"{k}.png")]
    expected = command(tmp_path, "--size", "64x64", *words, steps=2)
    assert np.array_equal(pixels(told[1].b64_json), expected)
    uris = [uri(picture) for picture in pictures]
    for given in ({"image": uris}, {"images": [{"image_url": one} for one in uris]}):
        body = {"prompt": PROMPT, "size": "64x64", "steps": 2, "seed": 3, **given}
        answer = server_post(client, "/images/edits", body)
        assert np.array_equal(pixels(answer["data"][0]["b64_json"]), expected)
    assert answer["usage"]["input_tokens_details"] == {"text_tokens": 48, "image_tokens": 32}


def server_post(client, path, body):
    return client.post(path, body=body, cast_to=object)


def test_faults_have_openais_form(client, server):
    with pytest.raises(openai.BadRequestError, match="the nearest are 96 and 112") as fault:
        client.images.generate(prompt=PROMPT, size="100x64")
    assert fault.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="no image: an edit needs one"):
        server_post(client, "/images/edits", {"prompt": PROMPT})
    with pytest.raises(openai.BadRequestError, match="no file or address"):
        server_post(client, "/images/edits", {"prompt": PROMPT, "image": "file:///etc/passwd"})
    with pytest.raises(openai.BadRequestError, match="transparent is drawn anew"):
        client.images.edit(image=("a.png", png(RED)), mask=("m.png", png(RED)), prompt=PROMPT)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")
    with pytest.raises(openai.NotFoundError):
        server_post(client, "/images/variations", {})


def test_a_fault_in_a_stream_is_raised_by_the_client(client, server, monkeypatch):
    def stream(*_, **__):
        raise FloatingPointError("not finite")

    client.images.generate(prompt=PROMPT, size="64x64", extra_body=SMALL)
    monkeypatch.setattr(server.worker._pipe, "stream", stream, raising=False)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.images.generate(prompt=PROMPT, size="64x64", stream=True, extra_body=SMALL))
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.images.generate(prompt=PROMPT, size="64x64", extra_body=SMALL)


def test_hanging_up_cancels_an_answer_in_one_piece(server):
    """The client waits for no stream, but for JSON."""
    impatient = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError), impatient:
        impatient.images.generate(prompt=PROMPT, size="64x64", extra_body={"steps": 1000})
    server.settle()


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"


# ------------------------------------------------------------------------------------------------ other clients


def test_open_webuis_openai_engine(server):
    """backend/open_webui/routers/images.py: generation as JSON, edits as multipart, whatever model its list has."""
    body = {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "512x512", "response_format": "b64_json"}
    parameters = {"steps": 1, "seed": 3, "size": "64x64"}  # of the admin's IMAGES_OPENAI_API_PARAMS
    url = "/v1/images/generations?api-version=1"
    headers = {"Authorization": "Bearer sk-any"}
    answer = server.client.post(url, json=body | parameters, headers=headers).json()
    assert "url" not in answer["data"][0]
    assert opened(answer["data"][0]["b64_json"]).size == (64, 64)
    assert answer["model"] == "nano"
    assert answer["warnings"] == ["there is no model 'dall-e-2' here; nano drew this"]
    data = {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "size": "64x64", "background": "auto"}
    one = [("image", ("image.png", png(RED), "image/png"))]
    several = [("image[]", (f"{k}.png", png(RED), "image/png")) for k in range(2)]
    for files in (one, several):
        answer = server.client.post("/v1/images/edits", data=data | {"response_format": "b64_json"}, files=files)
        assert opened(answer.json()["data"][0]["b64_json"]).size == (64, 64)


def test_open_webuis_automatic1111_engine(server):
    auth = ("user", "password")
    assert server.client.get("/sdapi/v1/options", auth=auth).json()["sd_model_checkpoint"] == "nano"
    assert server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nano"}, auth=auth).status_code == 200
    models = server.client.get("/sdapi/v1/sd-models").json()
    assert [(model["title"], model["model_name"]) for model in models] == [("nano", "nano")]
    body = {"prompt": PROMPT, "batch_size": 1, "width": 64, "height": 64, "steps": 50, "negative_prompt": "blue"}
    body |= {"cfg_scale": 7.0, "sampler_name": "DPM++ 2M", "scheduler": "Karras", "seed": 3}
    answer = server.client.post("/sdapi/v1/txt2img", json=body, auth=auth).json()
    info = json.loads(answer["info"])
    assert opened(answer["images"][0]).size == (64, 64)
    assert (info["steps"], info["seed"], info["all_seeds"]) == (4, 3, [3])
    for word in ("50 steps", "cfg_scale 7.0", "DPM++ 2M", "Karras"):
        assert any(word in told for told in info["warnings"]), word
    read = server.client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    assert read["info"] == info["infotexts"][0]
    assert read["parameters"]["seed"] == 3


def test_steps_and_cfg_are_judged_by_the_model_that_draws():
    """A base model takes what clients send, a distilled one does not, whichever was open before."""
    body = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 13, "cfg_scale": 2, "seed": 3}
    with Server("--model", "nano", "--no-distilled", "--models", "quick=nano") as server:
        server.wait(lambda: server.worker.state.model)
        for model, steps, guidance, told in (("quick", 4, 1.0, 2), ("nano", 13, 2.0, 0)):
            override = {"override_settings": {"sd_model_checkpoint": model}}
            answer = server.client.post("/sdapi/v1/txt2img", json=body | override).json()
            info = json.loads(answer["info"])
            found = (info["sd_model_name"], info["steps"], info["cfg_scale"], len(info["warnings"]))
            assert found == (model, steps, guidance, told)


def test_hires_fix_of_automatic1111(server, tmp_path):
    """As SillyTavern's auto source asks for it: the size is that of the image to begin with."""
    body = {"prompt": PROMPT, "width": 64, "height": 80, "steps": 4, "seed": 3, "enable_hr": True, "hr_scale": 1.5}
    body |= {"hr_upscaler": "Latent", "hr_additional_modules": [], "hr_second_pass_steps": 0, "denoising_strength": 0.6}
    answer = server.client.post("/sdapi/v1/txt2img", json=body).json()
    words = ["--width", "96", "--height", "128", "--hires", "1.5", "--hires-strength", "0.6"]
    assert np.array_equal(pixels(answer["images"][0]), command(tmp_path, *words, steps=4))
    assert json.loads(answer["info"])["warnings"] == ["hr_upscaler is left out", "height 120 is drawn as 128"]
    for scale, told in ((1, "hr_scale 1 is none"), ("2", "hr_scale 2 is none")):
        answer = server.client.post("/sdapi/v1/txt2img", json=body | {"hr_scale": scale}).json()
        assert opened(answer["images"][0]).size == (64, 80)
        assert told in json.loads(answer["info"])["warnings"][0]


def test_img2img_of_automatic1111(server, tmp_path):
    RED.save(tmp_path / "red.png")
    body = {"prompt": f"{PROMPT} <lora:none:0.5>", "init_images": [uri(RED)], "denoising_strength": 0.5, "steps": 4}
    body |= {"seed": 3, "width": 512, "height": 512}
    answer = server.client.post("/sdapi/v1/img2img", json=body).json()
    words = ["--init-image", str(tmp_path / "red.png"), "--strength", "0.5"]
    assert np.array_equal(pixels(answer["images"][0]), command(tmp_path, *words, steps=4))
    assert "<lora:none>" in json.loads(answer["info"])["warnings"][0]
    white = Image.new("L", (128, 128))
    white.paste(255, (64, 0, 128, 128))
    masked = body | {"mask": base64.b64encode(png(white)).decode(), "denoising_strength": 1, "steps": 1}
    edited = pixels(server.client.post("/sdapi/v1/img2img", json=masked).json()["images"][0])
    assert np.array_equal(edited[:, :64], np.asarray(RED)[:, :64])
    fault = server.client.post("/sdapi/v1/img2img", json={"prompt": PROMPT})
    assert (fault.status_code, fault.json()["error"]) == (400, "img2img needs a picture in init_images")


def test_librechat(server):
    """api/app/clients/tools/structured/OpenAIImageTools.js: a model that is not here, everything "auto"."""
    auto = {"n": 1, "background": "auto", "quality": "auto", "size": "auto", "output_format": "png"}
    body = {"model": "gpt-image-1", "prompt": PROMPT, **auto, "steps": 1}
    answer = server.client.post("/v1/images/generations", json=body).json()
    assert opened(answer["data"][0]["b64_json"]).size == (128, 128)
    assert answer["size"] == "128x128"
    data = {"model": "gpt-image-1", "prompt": PROMPT, "quality": "auto", "size": "auto", "steps": "1"}
    files = [("image[]", ("a.png", png(RED.resize((64, 96))), "image/png"))]
    answer = server.client.post("/v1/images/edits", data=data, files=files).json()
    assert opened(answer["data"][0]["b64_json"]).size == (64, 96)


def test_sillytaverns_sdcpp_source(server):
    assert server.client.options("/v1/images/generations").is_success
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["nano"]
    body = {"prompt": PROMPT, "negative_prompt": "", "width": 70, "height": 64, "steps": 20, "cfg_scale": 7}
    body |= {"seed": -1, "sampler_name": "euler_a", "scheduler": "discrete", "batch_size": 1}
    answer = server.client.post("/sdapi/v1/txt2img", json=body).json()
    assert opened(answer["images"][0]).size == (64, 64)
    warnings = json.loads(answer["info"])["warnings"]
    assert "width 70 is drawn as 64" in warnings
    assert not any("scheduler" in told for told in warnings)


def test_stable_diffusion_cpps_clients(server, tmp_path):
    """examples/server: what OpenAI has no field for stands in the prompt."""
    extra = {"seed": 3, "sample_params": {"sample_steps": 2, "scheduler": "simple", "guidance": {"txt_cfg": 1.0}}}
    prompt = f"{PROMPT} <sd_cpp_extra_args>{json.dumps(extra)}</sd_cpp_extra_args>"
    expected = command(tmp_path, "--size", "64x64", steps=2)
    body = {"model": "flux-2-klein-4b", "prompt": prompt, "size": "64x64", "response_format": "b64_json"}
    drawn = server.client.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    assert np.array_equal(pixels(drawn), expected)
    drawn = server.client.post("/sdapi/v1/txt2img", json={"prompt": prompt, "width": 64, "height": 64, "steps": 20})
    assert np.array_equal(pixels(drawn.json()["images"][0]), expected)
    for bad in ("{", "[]", '{"sample_params": [1]}'):
        body = {"prompt": f"{PROMPT} <sd_cpp_extra_args>{bad}</sd_cpp_extra_args>"}
        fault = server.client.post("/v1/images/generations", json=body)
        assert (fault.status_code, "must be a JSON object" in fault.text) == (400, True)


def test_localais_and_ollamas_edits_as_json(server, tmp_path):
    """References of a generation, one picture as bare base64, and a strength under each of its names."""
    RED.save(tmp_path / "red.png")
    body = {"model": "flux.2-klein-4b", "prompt": PROMPT, "size": "64x64", "seed": 3, "steps": 1}
    edited = command(tmp_path, "--size", "64x64", "--image", str(tmp_path / "red.png"))
    text = base64.b64encode(png(RED)).decode()
    for path, more in (("generations", {"ref_images": [text]}), ("edits", {"image": text})):
        answer = server.client.post(f"/v1/images/{path}", json=body | more).json()
        assert np.array_equal(pixels(answer["data"][0]["b64_json"]), edited)
        assert answer["data"][0]["seed"] == 3
    begun = command(tmp_path, "--size", "64x64", "--init-image", str(tmp_path / "red.png"), "--strength=0.5", steps=2)
    for name in ("strength", "denoising_strength", "image_strength"):  # mflux's is that of the picture: 1 - strength
        answer = server.client.post("/v1/images/edits", json=body | {"image": text, "steps": 2, name: 0.5}).json()
        assert np.array_equal(pixels(answer["data"][0]["b64_json"]), begun), name


def test_sillytaverns_auto_source(server):
    lists = ("samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-vae", "loras", "sd-models")
    for name in lists:
        assert isinstance(server.client.get(f"/sdapi/v1/{name}").json(), list), name
    with server.busy() as lines:
        told = server.client.get("/sdapi/v1/progress").json()
        assert 0 < told["progress"] < 1
        assert told["state"]["job_count"] == 1
        assert server.client.post("/sdapi/v1/interrupt").status_code == 200
        assert list(lines)[-1] == ("error", {"message": "interrupted", "status": 409})
    server.settle()
    assert server.client.get("/sdapi/v1/progress").json()["progress"] == 0


def test_nobody_interrupts_another_client(server):
    with server.busy():
        server.client.post("/sdapi/v1/interrupt", headers={"User-Agent": "another"})
        assert not server.worker.queue.running.is_cancelled
    server.settle()


def test_ollamas_clients(server, tmp_path):
    """oterm and n8n, as they drew before Ollama removed it: lines of JSON, or one object."""
    assert [model["name"] for model in server.client.get("/api/tags").json()["models"]] == ["nano"]
    assert server.client.post("/api/show", json={"model": "nano:latest"}).json()["capabilities"] == ["image"]
    body = {"model": "x/flux2-klein", "prompt": PROMPT, "width": 64, "height": 64, "steps": 2, "options": {"seed": 3}}
    answer = server.client.post("/api/generate", json=body)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    first, second, last = map(json.loads, answer.text.splitlines())
    assert [(one["completed"], one["total"], one["done"]) for one in (first, second)] == [(1, 2, False), (2, 2, False)]
    assert (last["done"], last["done_reason"], last["model"]) == (True, "stop", "nano")
    assert last["total_duration"] > last["load_duration"] >= 0
    assert np.array_equal(pixels(last["image"]), command(tmp_path, "--size", "64x64", steps=2))
    edit = body | {"images": [base64.b64encode(png(RED)).decode()], "steps": 1, "stream": False, "keep_alive": "5m"}
    RED.save(tmp_path / "red.png")
    expected = command(tmp_path, "--size", "64x64", "--image", str(tmp_path / "red.png"))
    assert np.array_equal(pixels(server.client.post("/api/generate", json=edit).json()["image"]), expected)
    assert server.client.post("/api/generate", json={"model": "nano"}).json()["done_reason"] == "load"
    fault = server.client.post("/api/generate", json=body | {"width": 100})
    assert (fault.status_code, list(fault.json())) == (400, ["error"])
    assert "keep_alive" in server.client.post("/api/generate", json=body | {"keep_alive": "soon"}).json()["error"]


def test_keep_alive_of_a_request(server):
    server.client.post("/api/generate", json={"prompt": PROMPT, "width": 64, "height": 64, "steps": 1, "keep_alive": 0})
    server.wait(lambda: not server.worker.state.is_loaded)
    assert server.image()["seed"] == 3


def test_clients_of_all_apis_at_once(server):
    """Each gets its own image."""
    body = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 1}
    found = {}

    def ask(k, path, read, **more):
        found[k] = read(server.client.post(path, json=body | {"seed": k} | more).json())

    asked = [
        (1, "/v1/images/generations", lambda told: told["data"][0]["b64_json"]),
        (2, "/sdapi/v1/txt2img", lambda told: told["images"][0]),
        (3, "/api/generate", lambda told: told["image"]),
    ]
    threads = [threading.Thread(target=ask, args=one, kwargs={"stream": False}) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for k, text in found.items():
        assert np.array_equal(pixels(text), pixels(server.image(**FAST | {"seed": k})["data"])), k
    assert len(found) == 3


def test_the_document_has_every_path_and_option(server):
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/images/edits"]) == {"post"}
    assert set(document["paths"]["/sdapi/v1/options"]) == {"get", "post"}
    schema = document["paths"]["/api/images"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "mask", "guidance_rescale"} <= set(schema["properties"])
    page = server.client.get("/docs")
    assert "/v1/images/edits" in page.text
    assert "http" not in page.text.replace("http-", "")


# ------------------------------------------------------------------------------------------------ MCP


def test_an_assistant_generates_and_edits(tmp_path):
    """Over standard input and output, with MCP's own client."""
    outside = tmp_path / "outside.png"
    RED.save(outside)
    folder = tmp_path / "images"
    words = ["-m", "flux2_mlx.serve.mcp", "--model", "nano", "--output", str(folder)]
    small = {"prompt": PROMPT, "seed": 3, "steps": 1}

    async def talk():
        parameters = mcp.StdioServerParameters(command=sys.executable, args=words, env=dict(os.environ))
        async with mcp.Client(parameters) as client:
            tools = (await client.list_tools()).tools
            drawn = await client.call_tool("generate_image", {**small, "width": 64, "options": {"height": 64}})
            first = str(folder / "flux2-3.png")
            edited = await client.call_tool("edit_image", {**small, "images": [first], "options": {"size": "64x64"}})
            refused = [
                await client.call_tool("edit_image", {**small, "images": [str(outside)]}),
                await client.call_tool("generate_image", {**small, "width": 100}),
                await client.call_tool("generate_image", {**small, "options": {"output": "x.png"}}),
            ]
            return tools, drawn, edited, refused

    tools, drawn, edited, refused = asyncio.run(talk())
    assert [tool.name for tool in tools] == ["generate_image", "edit_image"]
    assert "guidance_rescale" in tools[0].description
    image, text = drawn.content
    assert opened(image.data).size == (64, 64)
    assert image.mime_type == "image/jpeg"
    assert text.text == f"{folder / 'flux2-3.png'}  seed 3"
    with Image.open(folder / "flux2-3.png") as written:
        assert np.array_equal(np.asarray(written), command(tmp_path, "--size", "64x64"))
    assert edited.content[1].text == f"{folder / 'flux2-3-2.png'}  seed 3"
    words = ["--size", "64x64", "--image", str(folder / "flux2-3.png")]
    with Image.open(folder / "flux2-3-2.png") as written:
        assert np.array_equal(np.asarray(written), command(tmp_path, *words))
    for answer, message in zip(refused, ["is in none of the folders", "multiple of 16", "unknown option"], strict=True):
        assert answer.is_error
        assert message in answer.content[0].text
