"""The parsers of strangers' files and words: what each is given when all is well, and how it is called.

A target's ``seeds`` are inputs, each a folder's files by name; ``run`` reads such a folder. What stays the same for all
inputs, ``run`` finds in ``common``, a folder with the checkpoint. Command lines, sessions and prompts are files too.
"""

import contextlib
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, features

from flux2_mlx import convert, doctor, fuse
from flux2_mlx import disk_cache as disk
from flux2_mlx.adapters.lora import open_lora
from flux2_mlx.checkpoints.checkpoint import open_checkpoint
from flux2_mlx.checkpoints.files import load_files, load_safetensors
from flux2_mlx.checkpoints.folder import Source
from flux2_mlx.checkpoints.formats.dfloat11 import decode_groups
from flux2_mlx.checkpoints.load import (
    load_all,
    load_autoencoder,
    load_preview_decoder,
    load_text_encoder,
    load_transformer,
)
from flux2_mlx.checkpoints.publish import check
from flux2_mlx.checkpoints.reading import read_json
from flux2_mlx.cli import training
from flux2_mlx.cli.arguments import build_parser, complete
from flux2_mlx.cli.arguments import check as check_task
from flux2_mlx.cli.jobs import Jobs, read_jobs
from flux2_mlx.cli.session import Session, SessionImage, complete_word
from flux2_mlx.conditioning.tokenizer import Qwen3Tokenizer
from flux2_mlx.families import PARTS, TEXT_ENCODER, TRANSFORMER
from flux2_mlx.imaging.files import open_image
from flux2_mlx.imaging.inpaint import inpaint_from
from flux2_mlx.imaging.preprocess import init_array, reference_array
from flux2_mlx.inputs import open_mask, open_reference
from flux2_mlx.lazy import read
from flux2_mlx.models.autoencoder import AutoEncoder
from flux2_mlx.models.config import AutoEncoderConfig
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.taef2 import TinyDecoder
from flux2_mlx.training.dataset import read_captions, read_dataset
from flux2_mlx.training.latent_cache import LatentCache
from flux2_mlx.training.log import Log
from flux2_mlx.training.options import TrainingOptions
from flux2_mlx.training.run import open_pipeline
from flux2_mlx.training.trainer import Trainer
from tests.campaign import material
from tests.campaign.material import CONFIGS, NANO, WEIGHTS

Input = dict[str, bytes]  # files by their names in a folder


@dataclass(frozen=True)
class Target:
    """A parser: valid inputs of it, and the call that reads a folder with a mutated one.

    Attributes:
        seeds: inputs that are accepted.
        run: (folder of an input, folder of the checkpoint).
        mutated: a file's name begins with one of these, or it is left as it is.
    """

    seeds: Callable[[Path], list[Input]]
    run: Callable[[Path, Path], object]
    mutated: tuple[str, ...] = ("",)


TARGETS: dict[str, Target] = {}


def target(seeds: Callable[[Path], list[Input]], mutated: tuple[str, ...] = ("",)):
    def add(run: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        TARGETS[run.__name__] = Target(seeds, run, mutated)
        return run

    return add


# ---------------------------------------------------------------------------------------------------- weights


def evaluate(weights: dict[str, object]) -> None:
    for name in sorted(weights):
        mx.eval(read(weights.pop(name)))


def every_dtype(_: Path) -> list[Input]:
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "U32": 4}
    plain = {f"layer.{k}.weight": (dtype, [4, 2], bytes(8 * size)) for k, (dtype, size) in enumerate(sizes.items())}
    mapped = plain | {
        f"layer.{k}.weight": (dtype, [8], bytes(range(8))) for k, dtype in ((8, "F8_E5M2"), (9, "F8_E8M0"))
    }
    marks = {"layer.0": {"format": "float8_e4m3fn"}}
    metadata = {"format": "pt", "_quantization_metadata": json.dumps({"layers": marks})}
    return [
        {"w.safetensors": material.safetensors(plain, {"format": "pt"})},
        {"w.safetensors": material.safetensors(mapped)},
        {"w.safetensors": material.safetensors(plain, metadata)},
    ]


@target(every_dtype)
def safetensors(folder: Path, _: Path) -> None:
    evaluate(load_files([folder / "w.safetensors"]))


def grouped(_: Path) -> list[Input]:
    """A matrix of zeros and ones in DFloat11: exponents 0 and 127, of one bit each."""
    codes = np.arange(64) % 3 == 0
    luts = np.repeat(np.array([[0, 127], [0, 0]], np.uint8), 128, axis=1)
    luts[1, [0, 127]] = 1
    positions = np.array([0, 64], "<u4").view(np.uint8)
    arrays = {
        "encoded_exponent": np.packbits(codes),
        "sign_mantissa": np.zeros(64, np.uint8),
        "luts": luts,
        "gaps": np.zeros(320, np.uint8),
        "output_positions": positions,
    }
    tensors = {f"g.{kind}": ("U8", list(array.shape), array.tobytes()) for kind, array in arrays.items()}
    tensors["g.split_positions"] = ("I64", [1], (32).to_bytes(8, "little"))
    config = {"pattern_dict": {r"g|h\.\d+": ["a", "b"]}}
    return [{"w.safetensors": material.safetensors(tensors), "config.json": json.dumps(config).encode()}]


@target(grouped)
def dfloat11(folder: Path, _: Path) -> None:
    shapes = {f"g.{name}.weight": (4, 8) for name in "ab"}
    weights = load_files([folder / "w.safetensors"])
    evaluate(decode_groups(weights, read_json(folder / "config.json"), shapes, lambda _: True))


def sharded(_: Path) -> list[Input]:
    shards = {f"model-0000{k}-of-00002.safetensors": {f"w{k}": ("F32", [2], bytes(8))} for k in (1, 2)}
    files = {name: material.safetensors(tensors) for name, tensors in shards.items()}
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    return [{**files, "model.safetensors.index.json": json.dumps(index).encode()}]


@target(sharded, ("model.safetensors.index",))
def index(folder: Path, _: Path) -> None:
    mx.eval(load_safetensors(folder / "model.safetensors.index.json"))


def ggufs(common: Path) -> list[Input]:
    arrays = arrays_of("transformer")
    path = common / "seed.gguf"
    kinds = (("F16", "Q8_0"), ("Q4_0", "BF16", "Q5_1"))
    return [{"w.gguf": material.gguf_file(path, arrays, "flux", kind)} for kind in kinds]


def arrays_of(key: str) -> dict[str, np.ndarray]:
    part = PARTS[key]
    return material.named(
        material.random_arrays(part.module(CONFIGS[key]), np.random.default_rng(4)), part.names.to_diffusers
    )


@target(ggufs)
def gguf(folder: Path, _: Path) -> None:
    evaluate(load_files([folder / "w.gguf"]))
    Source(TRANSFORMER, "w.gguf", (folder / "w.gguf",)).shape()


def text_ggufs(common: Path) -> list[Input]:
    layers = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm"}
    layers |= {"self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output"}
    layers |= {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}
    layers |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    arrays = {"token_embd.weight": arrays_of("text_encoder")["model.embed_tokens.weight"]}
    for name, array in arrays_of("text_encoder").items():
        if name.startswith("model.layers."):
            _, _, number, inner = name.split(".", 3)
            arrays[f"blk.{number}.{layers[inner.removesuffix('.weight')]}.weight"] = array
    return [{"w.gguf": material.gguf_file(common / "seed.gguf", arrays, "qwen3", ("Q8_0",))}]


@target(text_ggufs)
def gguf_text_encoder(folder: Path, _: Path) -> None:
    Source(TEXT_ENCODER, "w.gguf", (folder / "w.gguf",)).shape()


def checkpoints(common: Path) -> list[Input]:
    return [{name: (common / name).read_bytes() for name in WEIGHTS.values()}]


@target(checkpoints)
def checkpoint(folder: Path, common: Path) -> None:
    """Weights beside the configs that they had."""
    for key, load in LOADERS.items():
        source = Source(
            PARTS[key], key, (folder / WEIGHTS[key],), json.loads((common / key / "config.json").read_text())
        )
        opened = open_checkpoint(common)
        load(type(opened)(**{**vars(opened), "sources": {**opened.sources, key: source}}))


LOADERS = {
    "transformer": lambda opened: load_all(load_transformer(opened, mx.bfloat16)),
    "text_encoder": lambda opened: load_all(load_text_encoder(opened, mx.bfloat16)),
    "vae": lambda opened: load_all(load_autoencoder(opened, mx.bfloat16)),
}


def single_files(common: Path) -> list[Input]:
    """Each part alone, under diffusers' names and BFL's."""
    from safetensors.numpy import save

    inputs = [{"w.safetensors": (common / name).read_bytes()} for name in WEIGHTS.values()]
    wide = AutoEncoderConfig(block_out_channels=(32,) * 4, layers_per_block=1)  # whose groups are those of no config
    vae = material.random_arrays(AutoEncoder(wide), np.random.default_rng(6))
    inputs[2] = {"w.safetensors": save(material.named(vae, PARTS["vae"].names.to_diffusers))}
    for key, arrays in (("transformer", arrays_of("transformer")), ("vae", vae)):
        inputs.append({"w.safetensors": save(material.named(arrays, PARTS[key].names.to_bfl))})
    return inputs


@target(single_files)
def single_file(folder: Path, common: Path) -> None:
    """A file whose names decide which part it is; of it everything is inferred."""
    path = folder / "w.safetensors"
    names = load_files([path]).keys()
    keys = [key for key, part in PARTS.items() if part.names.are_in(names)]
    for key in keys:
        Source(PARTS[key], "w", (path,)).shape()
    options = {"distilled": True} if "transformer" in keys else {}
    for key in keys:
        opened = open_checkpoint(common, **{key: str(path)}, **options)
        LOADERS[key](opened)


def taef2s(_: Path) -> list[Input]:
    from safetensors.numpy import save

    names = {
        f"decoder.{name}": array
        for name, array in material.random_arrays(TinyDecoder(), np.random.default_rng(5)).items()
    }
    arrays = {
        name.replace(".layers", ""): np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array
        for name, array in names.items()
    }
    return [{"taef2.safetensors": save(arrays)}]


@target(taef2s)
def taef2(folder: Path, _: Path) -> None:
    load_all(load_preview_decoder(folder / "taef2.safetensors", mx.float32))


def loras(_: Path) -> list[Input]:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "use_dora": False,
        "alpha_pattern": {"to_q": 8},
        "rank_pattern": {"x_embedder": 2},
        "target_modules": ["to_q", "x_embedder"],
        "bias": "none",
    }
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.r": 2})}
    swift = {"rank": "2", "alpha": "4", "software": "flux-2-swift-mlx"}
    peft = material.lora(alpha=False, prefix="base_model.model.")
    return [
        {"adapter_model.safetensors": peft, "adapter_config.json": json.dumps(config).encode()},
        {"l.safetensors": material.lora(header, alpha=False)},
        {"l.safetensors": material.lora(swift, alpha=False)},
        {"l.safetensors": material.lora(prefix="diffusion_model.")},
        {"l.safetensors": material.lokr()},
    ]


@cache
def transformer(common: Path) -> tuple[FluxKlein, Callable[[], dict[str, object]]]:
    source = open_checkpoint(common).sources["transformer"]
    return FluxKlein(CONFIGS["transformer"]), source.weights


@target(loras)
def adapters(folder: Path, common: Path) -> None:
    model, weights = transformer(common)
    for partial in (False, True):
        lora_file = open_lora(str(folder), model, weights, partial=partial)
        evaluate(lora_file.apply(dict(weights())))


# ---------------------------------------------------------------------------------------------------- configs


def configs(common: Path) -> list[Input]:
    names = ["model_index.json", "scheduler/scheduler_config.json", *(f"{key}/config.json" for key in PARTS)]
    small = {name: (common / name).read_bytes() for name in names}
    nano = {name: (NANO / name).read_bytes() for name in names}
    whole = {
        path.relative_to(common).as_posix(): path.read_bytes()
        for path in common.rglob("*")
        if path.is_file() and path.suffix != ".gguf"
    }
    return [whole, whole | {name: nano[name] for name in names[:2]}, whole | small]


@target(configs, ("model_index", "scheduler", *(f"{key}/config" for key in PARTS)))
def config(folder: Path, _: Path) -> None:
    opened = open_checkpoint(folder)
    for load in (load_transformer, load_text_encoder, load_autoencoder):
        load(opened, mx.bfloat16)


def tokenizers(common: Path) -> list[Input]:
    return [{name: (common / "tokenizer" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}]


@target(tokenizers)
def tokenizer(folder: Path, _: Path) -> None:
    ids, _mask = Qwen3Tokenizer(folder)(
        ["a red fox", "", "<|im_end|> 狐 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
    )
    mx.eval(ids)


@target(sharded)
def shards(folder: Path, _: Path) -> None:
    """Shards with and without their index."""
    mx.eval(load_safetensors(folder / "model.safetensors.index.json"))


# ---------------------------------------------------------------------------------------------------- images


def pictures(_: Path) -> list[Input]:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    kinds = [
        ("png", "PNG", "RGB"),
        ("png", "PNG", "RGBA"),
        ("png", "PNG", "P"),
        ("png", "PNG", "I;16"),
        ("png", "PNG", "1"),
    ]
    kinds += [("jpg", "JPEG", "RGB"), ("jpg", "JPEG", "CMYK"), ("jpg", "JPEG", "L"), ("webp", "WEBP", "RGBA")]
    kinds += [("tif", "TIFF", "RGB"), ("tif", "TIFF", "I;16"), ("gif", "GIF", "P"), ("bmp", "BMP", "RGB")]
    kinds += [("ppm", "PPM", "RGB"), ("jp2", "JPEG2000", "RGB"), ("mpo", "MPO", "RGB")]
    kinds += [("avif", "AVIF", "RGBA")] if features.check("avif") else []
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    inputs = [{f"a.{suffix}": material.image(kind, mode)} for suffix, kind, mode in kinds]
    inputs.append({"a.jpg": material.image("JPEG", exif=exif.tobytes(), icc_profile=profile)})
    inputs.append({"a.png": material.image("PNG", icc_profile=profile)})
    inputs.append({"a.tif": material.image("TIFF", compression="tiff_lzw")})
    return inputs


@target(pictures)
def picture(folder: Path, _: Path) -> None:
    (path,) = folder.iterdir()
    opened = open_image(path, alpha=True)
    assert opened.mode in ("RGB", "RGBA")
    if opened.width * opened.height <= 10**6:
        mx.eval(reference_array(open_reference(path)), init_array(open_image(path), (64, 64)))


@target(pictures)
def mask(folder: Path, _: Path) -> None:
    (path,) = folder.iterdir()
    inpaint_from(Image.new("RGB", (64, 64)), open_mask(path), 4, 16, None)


SETTINGS = {
    "negative_prompt": "", "strength": None, "mask_blur": 0.0, "mask_padding": None, "expand": None,
    "color_match": False, "edit_composite": None, "hires": None, "hires_strength": None, "hires_tile": None,
    "width": 64, "height": 64, "num_steps": 1, "guidance": 1.0, "guidance_interval": None, "guidance_rescale": 0.0,
    "force_guidance": False, "seed": 3, "schedule": "flux2", "sigmas": None, "noise": "torch",
    "max_sequence_length": 48, "step_cache": None, "reuse": None, "model": "nano", "revision": None,
    "transformer": None, "text_encoder": None, "vae": None, "tokenizer": None, "distilled": None, "kv_cache": None,
    "dtype": "float32", "vae_dtype": "float32", "quantize": None, "quantize_text_encoder": None, "group_size": None,
    "lora": [], "lora_merge": False, "lora_partial": False, "prompt": "a red circle", "inputs": [],
    "version": "0.1.0",
}  # fmt: skip


def replayable(common: Path) -> list[Input]:
    """Settings as an image carries them; ``replay`` puts them into one."""
    (common / "l.safetensors").write_bytes(material.lora())
    more = {"lora": [f"{common}/l.safetensors:0.5"], "sigmas": [1.0, 0.5], "num_steps": 2, "quantize": 4}
    more |= {"model": str(common), "tokenizer": f"{common}/tokenizer", "step_cache": 0.1, "guidance_interval": [0, 0.5]}
    return [{"settings.json": json.dumps(SETTINGS | own).encode()} for own in ({}, more)]


@target(replayable)
def replay(folder: Path, _: Path) -> None:
    """--from-image, of a PNG and of a JPEG."""
    text = (folder / "settings.json").read_bytes().decode("utf-8", "replace")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2_mlx", text.replace("\0", ""))
    path = folder / "a.png"
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    check_task(
        complete(build_parser().parse_args(["--from-image", str(path), "--output", str(folder / "b.png")]), None)
    )


def images_with_settings(_: Path) -> list[Input]:
    settings = json.dumps(SETTINGS)
    info = PngImagePlugin.PngInfo()
    info.add_text("flux2_mlx", settings)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = settings
    return [
        {"a.png": material.image("PNG", pnginfo=info)},
        {"a.jpg": material.image("JPEG", exif=exif)},
        {"a.webp": material.image("WEBP", exif=exif)},
    ]


@target(images_with_settings)
def replayed_file(folder: Path, _: Path) -> None:
    """The bytes of such an image."""
    (path,) = folder.iterdir()
    complete(build_parser().parse_args(["--from-image", str(path)]), None)


# ---------------------------------------------------------------------------------------------------- words


def job_files(common: Path) -> list[Input]:
    lines = [
        {"prompt": "a red fox", "seed": 1, "width": 64, "height": 64, "output": "{seed}.png", "steps": 2},
        {"prompt": "b", "image": [f"{common}/a.png"], "guidance": 3.5, "negative_prompt": "x", "num_images": 2},
        {"prompt": "c", "sigmas": [1, 0.5], "init_image": f"{common}/a.png", "strength": 0.5, "expand": {"left": 16}},
        {"prompt": "d", "quantize": 4, "lora": ["l.safetensors:0.5"], "guidance_interval": [0, 0.5], "kv_cache": True},
    ]
    (common / "a.png").write_bytes(material.image())
    return [{"jobs.jsonl": "\n".join(map(json.dumps, lines)).encode()}]


@target(job_files)
def jobs(folder: Path, common: Path) -> None:
    given = build_parser().parse_args(["--jobs", str(folder / "jobs.jsonl"), "--model", str(common)])
    runner = Jobs(given)
    for job in read_jobs(folder / "jobs.jsonl"):
        each(lambda job=job: check_task(runner._task(job)))


def sessions(_: Path) -> list[Input]:
    lines = [
        "a red fox",
        "seed 5",
        "size 64 x 64",
        "steps 3",
        "make $1 blue, and $$",
        "again",
        "set guidance 3.5",
        "set",
    ]
    lines += [
        "set schedule comfy",
        "lora a.safetensors:0.5",
        "lora",
        "set expand left=16",
        "load a.png",
        "save 1 b.png",
        "?",
    ]
    return [{"lines.txt": "\n".join(lines).encode(), "a.png": material.image()}]


@target(sessions, ("lines",))
def session(folder: Path, _: Path) -> None:
    def generate_nothing(prompt, images, options, add) -> None:
        assert isinstance(prompt, str)
        add(SessionImage(Image.new("RGB", (8, 8)), None))

    opened = Session(generate_nothing)
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else contextlib.nullcontext():
        for line in (folder / "lines.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n"):
            each(lambda line=line: opened.handle(line))
            each(lambda line=line: complete_word(line.split(" ")[-1][:100], 0))


def prompts(_: Path) -> list[Input]:
    return [{"prompt.txt": b"a red fox\nin the snow\r\n"}, {"prompt.txt": "\ufeffein Fuchs im Schnee, 狐".encode()}]


@target(prompts)
def prompt(folder: Path, _: Path) -> None:
    arguments = build_parser().parse_args(["--prompt-file", str(folder / "prompt.txt")])
    check_task(complete(arguments, None))


COMMANDS = {
    "generate": (
        'generate "a red fox" --seed 42 --width 64 --height 64 --steps 4 --guidance 3 --output fox-{{seed}}.png',
        'generate "a fox" --image {0}/a.png --size 64x64 --quantize 4 --memory-limit 5.3 --lora x.safetensors:0.5 -n 2',
        'generate "a" --init-image {0}/a.png --strength 0.5 --expand left=16 --guidance-interval 0.2,0.8',
        'generate "a" --init-image {0}/a.png --mask {0}/a.png --mask-blur 3 --mask-padding 16 --dtype float16',
    ),
    "convert": ("convert {0} {0}-new --quantize 4 --group-size 32 --layout bfl", "convert --check {0}/nowhere"),
    "fuse": ("fuse {0} {0}-new --lora x.safetensors:0.5 --quantize 8 --lora-partial",),
    "lora": (
        "lora --data {0}/nowhere --output {0}-run --steps 3 --rank 4 --lr 1e-4 --targets to_q to_k --trigger sks",
    ),
    "doctor": ("doctor --full --report report.md",),
}


def command_lines(common: Path) -> list[Input]:
    """A word a line."""
    (common / "a.png").write_bytes(material.image())
    lines = [line.format(common) for lines in COMMANDS.values() for line in lines]
    return [{"words.txt": "\n".join(shlex.split(line)).encode()} for line in lines]


@target(command_lines)
def command_line(folder: Path, _: Path) -> None:
    """What a parser takes is checked as far as that goes without a model."""
    content = (folder / "words.txt").read_bytes().decode("utf-8", "surrogateescape")
    name, *words = [word.replace("\0", "") for word in content.split("\n")]
    parsers = {"convert": convert.build_parser, "fuse": fuse.build_parser, "doctor": doctor.build_parser}
    if name == "lora":
        options, own = training.parse(words)
        training.check(options, own.resume is not None)
        return
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = parsers.get(name, build_parser)().parse_args(words)
    if name == "generate":
        check_task(complete(arguments, io.StringIO("a prompt")))


# ---------------------------------------------------------------------------------------------------- training


def datasets(_: Path) -> list[Input]:
    images = {f"{k}.png": material.image() for k in range(3)}
    lines = [{"file_name": f"{k}.png", "text": f"caption {k}", "reference": ["0.png"]} for k in range(3)]
    captions = {f"{k}.txt": b"a red fox" for k in range(3)}
    return [
        images | captions,
        images | {"metadata.jsonl": "\n".join(map(json.dumps, lines)).encode()},
        images | {"0.txt": b"a", "1.caption": b"b", "2.txt": "ü\r\n".encode(), "keep.txt": b"a man\na woman"},
    ]


@target(datasets, ("metadata", "0.txt", "1.caption", "2.txt", "keep", "0.png"))
def dataset(folder: Path, _: Path) -> None:
    keep = folder / "keep.txt"
    preserved = keep.is_file()
    if preserved:
        keep = keep.rename(folder.parent / "keep.txt")
    try:
        examples = read_dataset(folder, 64, "sks")
        if preserved:
            read_captions(keep, examples)
    finally:
        if preserved:
            keep.rename(folder / "keep.txt")


def training_configs(_: Path) -> list[Input]:
    values = {"data": "photos", "output": "run", "steps": 100, "rank": 8, "learning_rate": 1e-4, "targets": ["to_q"]}
    values |= {"ema": 0.9, "quantize": 4, "timesteps": "uniform", "validation_prompt": "a fox", "grad_checkpoint": True}
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    return [{"c.json": json.dumps(values).encode()}, {"c.toml": lines.encode()}]


@target(training_configs)
def training_config(folder: Path, _: Path) -> None:
    (path,) = folder.iterdir()
    options, own = training.parse(["--config", str(path)])
    training.check(options, own.resume is not None)


@cache
def trainer(common: Path) -> Trainer:
    data = material.write_dataset(common / "data")
    options = TrainingOptions(
        data=str(data), output=str(common / "run"), model=str(common), steps=4, rank=2, resolution=64, dtype="float32"
    )
    pipe = open_pipeline(options, allow_distilled=True, limit=None, progress=False)
    examples = read_dataset(data, 64)
    return Trainer(pipe.transformer, options, examples, LatentCache(pipe, common / "run" / "cache"), [], None)


def runs(common: Path) -> list[Input]:
    state = common / "state.safetensors"
    trainer(common).save(state, "data")
    line = {"step": 1, "loss": 0.5, "learning_rate": 1e-4, "norm": 1.0, "change": 0.0, "pictures_per_second": 1.0}
    log = "".join(json.dumps(line | {"step": k}) + "\n" for k in (1, 2, 3))
    return [{"state.safetensors": state.read_bytes(), "log.jsonl": log.encode()}]


@target(runs)
def resume(folder: Path, common: Path) -> None:
    """The log stops no run; the state is refused or loaded."""
    log = Log(folder / "log.jsonl")
    log.truncate(3)
    log.plot(folder / "loss.png")
    trainer(common).load(folder / "state.safetensors", "data")


# ---------------------------------------------------------------------------------------------------- caches, sums


def caches(common: Path) -> list[Input]:
    path = common / "a.safetensors"
    disk.write_array(path, mx.arange(64, dtype=mx.float32).reshape(1, 4, 16))
    table = {"rows": 8, "b": [1.5, 2]}
    written = {"sha256": disk._table_digest("table", table), "table": table}
    return [{"a.safetensors": path.read_bytes(), "table.json": json.dumps(written, indent=1).encode()}]


@target(caches)
def kept(folder: Path, _: Path) -> None:
    """What is not what was written counts as absent; nothing here may raise."""
    expected = mx.arange(64, dtype=mx.float32).reshape(1, 4, 16)
    array = disk.read_array(folder / "a.safetensors")
    assert array is None or (array.dtype == mx.float32 and mx.array_equal(array, expected)), "another array"
    with patched_cache(folder):
        assert disk.read_table("table") in ({}, {"rows": 8, "b": [1.5, 2]}), "another table"


@contextlib.contextmanager
def patched_cache(folder: Path) -> Iterator[None]:
    before = disk.cache_folder
    disk.cache_folder = lambda: folder
    try:
        yield
    finally:
        disk.cache_folder = before


def checked(common: Path) -> list[Input]:
    content = every_dtype(common)[1]["w.safetensors"]
    return [
        {"w.safetensors": content, "SHA256SUMS": f"{hashlib.sha256(content).hexdigest()}  w.safetensors\n".encode()}
    ]


@target(checked)
def checksums(folder: Path, _: Path) -> None:
    list(check(folder))


def each(call: Callable[[], object]) -> None:
    """One of several lines: an error of the project's costs its line alone."""
    from tests.campaign.fuzz import EXPECTED

    with contextlib.suppress(*EXPECTED, SystemExit):
        call()
