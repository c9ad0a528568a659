"""What the campaign damages: the smallest checkpoint that opens, LoRAs, GGUF, images, data sets.

Whatever asks MLX for anything runs in a forked child (see forked.py), so nothing here is made when it is imported.
"""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from safetensors.numpy import save

from flux2_mlx.device import weights_of
from flux2_mlx.families import PARTS
from flux2_mlx.lazy import read
from flux2_mlx.models.config import AutoEncoderConfig, FluxKleinParams, Qwen3Config

NANO = Path(__file__).parents[2] / "flux2_mlx" / "nano"
CONFIGS = {
    "transformer": FluxKleinParams(
        hidden_size=32, txt_embed_dim=96, num_heads=1, depth=1, depth_single=1, head_dim=32, axes_dims_rope=(8, 8, 8, 8)
    ),
    "text_encoder": Qwen3Config(640, 32, 32, 1, 1, 32),
    "vae": AutoEncoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64),
}
WEIGHTS = {key: f"{key}/{part.stem}.safetensors" for key, part in PARTS.items()}


def random_arrays(module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights of a module, small and positive where they must be."""
    return {
        name: np.abs(0.2 * rng.standard_normal(array.shape).astype(np.float32)) * (1 if array.ndim == 1 else 0.5)
        for name, array in weights_of(module).items()
    }


def named(
    arrays: dict[str, np.ndarray], names: Callable[[dict[str, mx.array]], dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Arrays under the names, and in the layout, of files."""
    weights = names({name: mx.array(array) for name, array in arrays.items()})
    return {name: np.array(read(weight)) for name, weight in weights.items()}


def write_checkpoint(folder: Path, *, distilled: bool = True) -> Path:
    """The smallest checkpoint that this library opens, in the diffusers layout; its images are noise."""
    rng = np.random.default_rng(0)
    for key, part in PARTS.items():
        arrays = named(random_arrays(part.module(CONFIGS[key]), rng), part.names.to_diffusers)
        write(folder / WEIGHTS[key], save(arrays, {"format": "pt"}))
        write(folder / key / "config.json", json.dumps(CONFIGS[key].to_config()).encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write(folder / "tokenizer" / name, (NANO / "tokenizer" / name).read_bytes())
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 16}))
    write(folder / "scheduler" / "scheduler_config.json", (NANO / "scheduler" / "scheduler_config.json").read_bytes())
    index = json.loads((NANO / "model_index.json").read_text()) | {"is_distilled": distilled}
    write(folder / "model_index.json", json.dumps(index).encode())
    return folder


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """A file of tensors in dtypes that NumPy does not know."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def lora(metadata: dict[str, str] | None = None, alpha: bool = True, prefix: str = "transformer.") -> bytes:
    """A LoRA of rank 2 of two layers of the checkpoint's transformer."""
    rng = np.random.default_rng(1)
    arrays = {}
    for name, outputs, inputs in (("transformer_blocks.0.attn.to_q", 32, 32), ("x_embedder", 32, 128)):
        arrays[f"{prefix}{name}.lora_A.weight"] = rng.standard_normal((2, inputs)).astype(np.float32)
        arrays[f"{prefix}{name}.lora_B.weight"] = rng.standard_normal((outputs, 2)).astype(np.float32)
        if alpha:
            arrays[f"{prefix}{name}.alpha"] = np.array(2.0, np.float32)
    return save(arrays, metadata)


def lokr() -> bytes:
    """LoKr, LoHa and DoRA of the same transformer."""
    rng = np.random.default_rng(2)

    def array(*shape: int) -> np.ndarray:
        return 0.1 * rng.standard_normal(shape).astype(np.float32)

    name = "lycoris_transformer_blocks_0_attn_to_"
    return save(
        {
            f"{name}q.lokr_w1": array(4, 4),
            f"{name}q.lokr_w2_a": array(8, 2),
            f"{name}q.lokr_w2_b": array(2, 8),
            f"{name}q.alpha": np.full((), 2, np.float32),
            f"{name}k.hada_w1_a": array(32, 2),
            f"{name}k.hada_w1_b": array(2, 32),
            f"{name}k.hada_w2_a": array(32, 2),
            f"{name}k.hada_w2_b": array(2, 32),
            f"{name}v.lora_down.weight": array(2, 32),
            f"{name}v.lora_up.weight": array(32, 2),
            f"{name}v.dora_scale": np.abs(array(32, 1)),
        }
    )


def gguf_file(path: Path, arrays: dict[str, np.ndarray], architecture: str, kinds: tuple[str, ...]) -> bytes:
    """A GGUF whose matrices have these types in turn."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_float32(f"{architecture}.rope.freq_base", 1e6)
    for k, (name, array) in enumerate(arrays.items()):
        kind = gguf.GGMLQuantizationType[kinds[k % len(kinds)]]
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if array.ndim == 2 and array.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def image(kind: str = "PNG", mode: str = "RGB", side: int = 64, **options) -> bytes:
    """An image of random blocks in a format."""
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side))
    stream = io.BytesIO()
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (side, side), np.uint16))
    else:
        picture = picture.convert(mode)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def write_dataset(folder: Path, count: int = 3) -> Path:
    for k in range(count):
        write(folder / f"{k}.png", image())
        write(folder / f"{k}.txt", f"a red circle, number {k}".encode())
    return folder
