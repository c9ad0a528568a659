"""Writers of the formats that klein comes in, each from the tensors of a diffusers checkpoint."""

import heapq
import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file, save_file

BFL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def bfl_transformer(tensors, norm="scale", prefix=""):
    """BFL's and ComfyUI's single file: fused q, k, v; final modulation as (shift, scale)."""
    written = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in BFL:
            swapped = torch.cat(tensor.chunk(2)[::-1]) if module == "norm_out.linear" else tensor
            written[f"{BFL[module]}.weight"] = swapped
            continue
        kind, number, inner = module.split(".", 2)
        blocks, names = ("double_blocks", DOUBLE) if kind == "transformer_blocks" else ("single_blocks", SINGLE)
        if inner in names:
            suffix = norm if "norm" in inner else "weight"
            written[f"{blocks}.{number}.{names[inner]}.{suffix}"] = tensor
        for fused, (q, k, v) in QKV.items():
            if inner == q:
                parts = [tensors[f"{kind}.{number}.{part}.weight"] for part in (q, k, v)]
                written[f"{blocks}.{number}.{fused}.weight"] = torch.cat(parts)
    return {prefix + name: tensor.contiguous() for name, tensor in written.items()}


def bfl_vae(tensors, prefix=""):
    """ae.safetensors: up stages counted from the picture's side, attention as 1x1 convolutions."""
    stages = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    written = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] in ("quant_conv", "post_quant_conv"):
            parts.insert(0, "encoder" if parts[0] == "quant_conv" else "decoder")
        if parts[1] == "down_blocks":
            rest = ["block", parts[4]] if parts[3] == "resnets" else ["downsample"]
            parts = [parts[0], "down", parts[2], *rest, *parts[5:]]
        elif parts[1] == "up_blocks":
            rest = ["block", parts[4]] if parts[3] == "resnets" else ["upsample"]
            parts = [parts[0], "up", str(stages - 1 - int(parts[2])), *rest, *parts[5:]]
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
        elif parts[1] == "mid_block":
            inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
            parts = [parts[0], "mid", "attn_1", inner, parts[-1]]
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        parts = [{"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}.get(part, part) for part in parts]
        written[prefix + ".".join(parts)] = tensor.contiguous()
    return written


def is_quantized(name):
    return "norm" not in name and any(part in name for part in ("attn", "mlp", "linear1", "linear2"))


LIMITS = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344, torch.int8: 127}


def scaled(tensors, convention, dtype):
    """(tensors, header, what they stand for) with the block's matrices in FP8 or int8.

    Args:
        convention: "bfl" (weight_scale, input_scale), "old" (scale_weight, a mark of the whole file), "mark" or
            "header" (which say the format a layer), "plain" (no scales at all), "rows" (a scale for each row),
            "marked rows" (as "rows", of two dimensions, and as "mark").
    """
    written, expected, header = {}, {}, {}
    format = "int8_tensorwise" if dtype == torch.int8 else str(dtype).removeprefix("torch.")
    by_rows = convention in ("rows", "marked rows")
    if convention == "old":
        written["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    for name, tensor in tensors.items():
        if not is_quantized(name):
            written[name] = expected[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.abs().amax(dim=1, keepdim=True) if by_rows else tensor.abs().amax()
        scale = torch.ones(()) if convention == "plain" else scale / LIMITS[dtype]
        codes = tensor / scale
        codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        written[name] = codes
        expected[name] = codes.float() * scale
        if convention == "old":
            written[f"{layer}.scale_weight"], written[f"{layer}.scale_input"] = scale.reshape(1), torch.ones(1)
        elif convention != "plain":
            written[f"{layer}.weight_scale"] = scale.flatten() if convention == "rows" else scale
        if convention == "bfl":
            written[f"{layer}.input_scale"] = torch.ones(())
        if convention in ("mark", "marked rows"):
            written[f"{layer}.comfy_quant"] = mark(format)
        header[layer] = {"format": format}
    metadata = {"_quantization_metadata": json.dumps({"layers": header})} if convention == "header" else {}
    return written, metadata, expected


def rotated(tensors, size, where="mark"):
    """(tensors, header, what they stand for) with the block's matrices in int8, a scale a row, rotated in groups of
    ``size`` inputs where these divide them, as a dense matrix in float64 rotates them.
    """
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    rotation = four
    while len(rotation) < size:
        rotation = np.kron(rotation, four)
    written, expected, header = {}, {}, {}
    for name, tensor in tensors.items():
        if not is_quantized(name):
            written[name] = expected[name] = tensor
            continue
        layer, fits = name.removesuffix(".weight"), tensor.shape[1] % size == 0
        blocks = torch.from_numpy(
            np.kron(np.eye(tensor.shape[1] // size), rotation) if fits else np.eye(tensor.shape[1])
        )
        product = tensor.double() @ blocks
        scale = product.abs().amax(dim=1, keepdim=True).float() / 127
        written[name] = (product / scale).round().to(torch.int8)
        written[f"{layer}.weight_scale"] = scale
        expected[name] = (written[name].double() * scale.double()) @ blocks.T
        settings = {"convrot": True, "convrot_groupsize": size} if fits else {}
        header[layer] = {"format": "int8_tensorwise", **settings}
        if where == "mark":
            written[f"{layer}.comfy_quant"] = mark(**header[layer])
    return written, {} if where == "mark" else {"_quantization_metadata": json.dumps({"layers": header})}, expected


def mark(format, **settings):
    return torch.frombuffer(bytearray(json.dumps({"format": format, **settings}).encode()), dtype=torch.uint8)


def tiled(scales):
    """Scales of blocks in the tiles of 128 rows x 4 blocks that NVIDIA's matrix units read."""
    rows, blocks = scales.shape
    padded_rows, padded_blocks = -(-rows // 128) * 128, -(-blocks // 4) * 4
    flat = torch.zeros(padded_rows * padded_blocks, dtype=torch.uint8)
    for row in range(rows):
        for block in range(blocks):
            tile = row // 128 * (padded_blocks // 4) + block // 4
            flat[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales[row, block].view(torch.uint8)
    return flat.reshape(padded_rows, padded_blocks)


def mxfp8(tensor):
    """(weight, weight_scale in tiles, what they stand for): FP8 and a power of two of every 32."""
    rows, columns = tensor.shape
    groups = tensor.reshape(rows, columns // 32, 32)
    scales = (groups.abs().amax(-1) / 448).log2().ceil().exp2().to(torch.float8_e8m0fnu)
    codes = (groups / scales.float()[..., None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scales.float()[..., None]).reshape(rows, columns)
    return codes.reshape(rows, columns), tiled(scales).view(torch.float8_e8m0fnu), values


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nvfp4(tensor, layout):
    """(weight, weight_scale, weight_scale_2, what they stand for) in "comfy"'s or "modelopt"'s layout."""
    rows, columns = tensor.shape
    scale_2 = tensor.abs().max() / (6 * 448)
    groups = tensor.reshape(rows, columns // 16, 16)
    scales = (groups.abs().amax(-1) / 6 / scale_2).to(torch.float8_e4m3fn)
    whole = (scales.float() * scale_2)[..., None]
    codes = (groups.abs() / whole.clamp(min=1e-12))[..., None].sub(E2M1).abs().argmin(-1)
    values = (E2M1[codes] * groups.sign() * whole).reshape(rows, columns)
    codes = (codes + 8 * (groups < 0)).reshape(rows, columns).to(torch.uint8)
    even, odd = codes[:, ::2], codes[:, 1::2]
    if layout == "modelopt":
        return even | odd << 4, scales, scale_2, values
    return even << 4 | odd, tiled(scales).view(torch.float8_e4m3fn), scale_2, values


LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_names(tensors):
    """llama.cpp's names of a text encoder."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    written = {}
    for name, tensor in tensors.items():
        if name in top:
            written[top[name]] = tensor
        elif name.startswith("model.layers."):
            _, _, number, inner = name.removesuffix(".weight").split(".", 3)
            written[f"blk.{number}.{LLAMA[inner]}.weight"] = tensor
    return written


def write_gguf(path, tensors, type_name, architecture="flux", numbers=None):
    """A GGUF file with matrices of one type and numbers in its header; returns what they stand for."""
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, number in (numbers or {}).items():
        writer.add_float32(name, number)
    expected = {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if array.ndim == 2:
            raw = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind).reshape(array.shape).copy())
        else:
            writer.add_tensor(name, array)
            expected[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def packed(tensors, bits, group_size, skip=(), mode="affine"):
    """(tensors, what they stand for): every matrix packed by MLX, as mlx-lm and mflux save it."""
    written, expected = {}, {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        array = mx.array(tensor.float().numpy())
        if array.ndim != 2 or layer in skip:
            written[name] = expected[name] = array
            continue
        parts = mx.quantize(array, group_size=group_size, bits=bits, mode=mode)
        for kind, part in zip(("weight", "scales", "biases"), parts, strict=False):
            written[f"{layer}.{kind}"] = part
        expected[name] = mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode)
    return written, expected


def affine_in_numpy(matrix, bits, group_size=128):
    """({kind: tensor}, what they stand for) of a matrix (out, in) that was trained to one bit, the values -s and s, or
    to two, -s, 0 and s: codes of a word one after another, lowest first, and each code times the scale, plus the bias.
    """
    groups = matrix.float().numpy().reshape(len(matrix), -1, group_size)
    sizes = torch.from_numpy(np.abs(groups).mean(-1))
    levels = np.sign(groups) if bits == 2 else np.where(groups < 0, -1, 1)
    levels = np.where(np.abs(groups) < 0.5 * sizes.numpy()[..., None], 0, levels) if bits == 2 else levels
    codes = (levels + 1 if bits == 2 else (levels + 1) // 2).astype(np.uint32).reshape(len(matrix), -1, 32 // bits)
    words = (codes << (bits * np.arange(32 // bits, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    scales, biases = (sizes if bits == 2 else 2 * sizes).bfloat16(), -sizes.bfloat16()
    stored = {"weight": torch.from_numpy(words), "scales": scales, "biases": biases}
    codes = codes.reshape(groups.shape).astype(np.float64)
    values = codes * scales.double().numpy()[..., None] + biases.double().numpy()[..., None]
    return stored, torch.from_numpy(values.reshape(matrix.shape))


def bonsai(source, target, bits):
    """A folder in the diffusers layout as PrismML publishes Bonsai Image for MLX; what its transformer stands for."""
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    shutil.copytree(source / "vae", target / "vae")
    expected, written = {}, {}
    for name, tensor in load_file(source / "transformer" / "diffusion_pytorch_model.safetensors").items():
        expected[name] = written[name] = tensor.bfloat16()
        if "transformer_blocks." in name and tensor.ndim == 2:  # ends and modulations stay dense
            stored, expected[name] = affine_in_numpy(tensor, bits)
            del written[name]
            written |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in stored.items()}
    folder = target / "transformer-packed-mflux"
    save(written, folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(source / "transformer" / "config.json", folder)
    packing = {"format": "mlx-packed-affine", "bits": bits, "group_size": 128}
    (folder / "quantization_config.json").write_text(json.dumps(packing))
    folder = target / "text_encoder-mlx-4bit"
    tensors, _ = packed(load_file(source / "text_encoder" / "model.safetensors"), 4, 64)
    save(tensors, folder / "model.safetensors", {"format": "mlx"})
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "text_encoder" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    (target / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (target / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    (target / "NOTICE.md").write_text("Apache-2.0")
    return expected


def huffman(symbols):
    """{symbol: (bits, code)} by Huffman's algorithm, with an end that is met once (256)."""
    values, counts = np.unique(symbols, return_counts=True)
    heap = [(int(count), k, [int(value)]) for k, (value, count) in enumerate(zip(values, counts, strict=True))]
    heap = [*heap, (1, len(heap), [256])]
    heapq.heapify(heap)
    codes = {symbol: (0, 0) for _, _, symbols in heap for symbol in symbols}
    while len(heap) > 1:
        (few, k, left), (many, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for bit, side in enumerate((left, right)):
            codes |= {symbol: (codes[symbol][0] + 1, codes[symbol][1] | bit << codes[symbol][0]) for symbol in side}
        heapq.heappush(heap, (few + many, k, left + right))
    return codes


def dfloat11(matrices):
    """The arrays of a group of matrices, as DFloat11's paper describes them."""
    flat = torch.cat([matrix.flatten() for matrix in matrices]).view(torch.int16).numpy().view(np.uint16)
    exponents = (flat >> 7 & 255).astype(np.int64)
    codes = huffman(exponents)
    bits, words = (np.zeros(257, np.int64) for _ in range(2))
    for symbol, (length, code) in codes.items():
        bits[symbol], words[symbol] = length, code
    ended = np.append(exponents, 256)
    starts = np.cumsum(bits[ended]) - bits[ended]
    offsets = np.arange(bits[ended].sum()) - np.repeat(starts, bits[ended])
    stream = np.repeat(words[ended], bits[ended]) >> np.repeat(bits[ended], bits[ended]) - 1 - offsets & 1
    encoded = np.packbits(stream.astype(np.uint8))
    blocks = -(-len(encoded) // 4096)

    def first_in(size, count):
        """The first weight whose code begins in each part of so many bits."""
        return np.searchsorted(starts[:-1], np.arange(count) * size)

    firsts = first_in(64, 512 * blocks)
    gaps = np.where(firsts < len(flat), starts[np.minimum(firsts, len(flat))] - np.arange(512 * blocks) * 64, 0)
    fives = (gaps[:, None] >> np.arange(4, -1, -1) & 1).astype(np.uint8)
    positions = first_in(4096 * 8, blocks)
    positions = np.append(positions[positions < len(flat)], len(flat)).astype("<u4")
    texts = {symbol: f"{code:0{length}b}" for symbol, (length, code) in codes.items() if symbol < 256}
    prefixes = {text[: 8 * k] for text in texts.values() for k in range((len(text) - 1) // 8 + 1)}
    prefixes = sorted(prefixes, key=len)
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    for symbol, text in texts.items():
        luts[-1, symbol] = len(text)
        for row, prefix in enumerate(prefixes):
            rest = text[len(prefix) :]
            if text.startswith(prefix) and 0 < len(rest) <= 8:
                luts[row, int(rest.ljust(8, "0"), 2) : int(rest.ljust(8, "1"), 2) + 1] = symbol
            elif text.startswith(prefix) and len(rest) > 8:
                luts[row, int(rest[:8], 2)] = 256 - prefixes.index(text[: len(prefix) + 8])
    arrays = {
        "encoded_exponent": encoded,
        "sign_mantissa": (flat >> 8 & 0x80 | flat & 0x7F).astype(np.uint8),
        "luts": luts,
        "gaps": np.packbits(fives),
        "output_positions": positions.view(np.uint8),
        "split_positions": np.cumsum([matrix.numel() for matrix in matrices])[:-1],
    }
    return {kind: torch.from_numpy(array.copy()) for kind, array in arrays.items()}


def swift_names(tensors):
    """The names of flux-2-swift-mlx's exports: properties of its Swift classes."""
    inner = {
        "attn.to_q": "attn.toQ",
        "attn.to_k": "attn.toK",
        "attn.to_v": "attn.toV",
        "attn.add_q_proj": "attn.addQProj",
        "attn.add_k_proj": "attn.addKProj",
        "attn.add_v_proj": "attn.addVProj",
        "attn.norm_q": "attn.normQ",
        "attn.norm_k": "attn.normK",
        "attn.norm_added_q": "attn.normAddedQ",
        "attn.norm_added_k": "attn.normAddedK",
        "attn.to_out.0": "attn.toOut",
        "attn.to_out": "attn.toOut",
        "attn.to_add_out": "attn.toAddOut",
        "attn.to_qkv_mlp_proj": "attn.toQkvMlp",
        "ff.linear_in": "ff.activation.proj",
        "ff.linear_out": "ff.linearOut",
        "ff_context.linear_in": "ffContext.activation.proj",
        "ff_context.linear_out": "ffContext.linearOut",
    }
    top = {
        "x_embedder": "xEmbedder",
        "context_embedder": "contextEmbedder",
        "time_guidance_embed.timestep_embedder.linear_1": "timeGuidanceEmbed.timestepEmbedder.linear1",
        "time_guidance_embed.timestep_embedder.linear_2": "timeGuidanceEmbed.timestepEmbedder.linear2",
        "double_stream_modulation_img.linear": "doubleStreamModulationImg.linear",
        "double_stream_modulation_txt.linear": "doubleStreamModulationTxt.linear",
        "single_stream_modulation.linear": "singleStreamModulation.linear",
        "norm_out.linear": "normOut.linear",
        "proj_out": "projOut",
    }
    blocks = {"transformer_blocks": "transformerBlocks", "single_transformer_blocks": "singleTransformerBlocks"}
    written = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in top:
            written[f"{top[module]}.weight"] = tensor
        else:
            kind, number, rest = module.split(".", 2)
            written[f"{blocks[kind]}.{number}.{inner[rest]}.weight"] = tensor
    return written


def mflux_names(tensors):
    """mflux's names of a transformer, a text encoder or an autoencoder."""
    written = {}
    for name, tensor in tensors.items():
        name = name.replace("time_guidance_embed.timestep_embedder.", "time_guidance_embed.")
        name = name.replace(".to_out.0.", ".to_out.").removeprefix("model.")
        written[name] = tensor
    if "time_guidance_embed.linear_1.weight" in written:  # made up by some versions, and never trained
        written["norm_out.linear.bias"] = torch.ones(written["norm_out.linear.weight"].shape[0])
    if "embed_tokens.weight" in written:
        written["rotary_emb.inv_freq"] = torch.ones(16)
    return written


def save(tensors, path, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if all(isinstance(tensor, mx.array) for tensor in tensors.values()):
        mx.save_safetensors(str(path), tensors, metadata)
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def as_numpy(tensor):
    return tensor.float().numpy() if isinstance(tensor, torch.Tensor) else np.array(tensor.astype(mx.float32))
