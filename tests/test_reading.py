"""What MLX is given to evaluate: reading files, and talking to processes, on their own, never beside a computation."""

import io
import re

import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image

from flux2_mlx import Flux2Pipeline, Quantization
from flux2_mlx.checkpoints.checkpoint import open_checkpoint
from flux2_mlx.checkpoints.load import load_all, load_transformer
from flux2_mlx.checkpoints.publish import check
from flux2_mlx.checkpoints.write import convert
from flux2_mlx.collectives import sum_tree
from flux2_mlx.imaging import preview
from flux2_mlx.models.first_block_cache import FirstBlockCache
from flux2_mlx.runtime import distributed
from flux2_mlx.sampling import guidance
from tests import formats, loras, tiny

SMALL = {"height": 64, "width": 64, "num_steps": 1, "max_sequence_length": 16, "seed": 0}


def primitives(arrays) -> set[str]:
    """What MLX would compute if it evaluated these arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return set(re.findall(r'label ="(\w+)"', text.getvalue()))


@pytest.fixture
def mixed(monkeypatch) -> list[set[str]]:
    """Graphs that are evaluated from here on with a file's part and a computation's."""
    found = []

    def watch(owner, name):
        evaluate = getattr(owner, name)

        def watched(*given):
            arrays = [array for _, array in tree_flatten(list(given)) if isinstance(array, mx.array)]
            kinds = primitives(arrays) if arrays else set()
            if kinds & {"Load"} and len(kinds) > 1:
                found.append(kinds)
            return evaluate(*given)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((mx, "eval"), (mx, "async_eval"), (mx.array, "item")):
        watch(owner, name)
    return found


def test_a_graph_that_reads_and_computes_is_seen(tmp_path, mixed):
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"a": mx.ones(3), "b": mx.ones(3)})
    read = mx.load(str(tmp_path / "w.safetensors"))
    mx.eval(read)
    assert mixed == []
    read = mx.load(str(tmp_path / "w.safetensors"))
    assert (read["a"] + read["b"]).sum().item() == 6
    assert [kinds >= {"Load", "Add"} for kinds in mixed] == [True]


def write_transformer(folder, stored):
    """A tiny transformer's file in a format, with BFL's fused layers."""
    tensors = {name: t.detach() for name, t in tiny.transformer().state_dict().items()}
    written, metadata = formats.bfl_transformer(tensors), None
    if stored == "bfloat16":
        written = {name: t.bfloat16() for name, t in written.items()}
    elif stored == "packed":
        written, _ = formats.packed(tensors, 4, 32)
    elif stored == "mxfp8":
        for name in filter(formats.is_quantized, list(written)):
            layer = name.removesuffix(".weight")
            written[name], scale, _ = formats.mxfp8(written[name])
            written |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": formats.mark("mxfp8")}
    elif stored == "nvfp4":
        for name in filter(formats.is_quantized, list(written)):
            layer = name.removesuffix(".weight")
            written[name], scale, scale_2, _ = formats.nvfp4(written[name], "comfy")
            written |= {f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": scale_2}
            written[f"{layer}.comfy_quant"] = formats.mark("nvfp4")
    elif stored != "Q4_0":
        dtype = {"fp8": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}[stored]
        written, metadata, _ = formats.scaled(written, "marked rows", dtype)
    if stored == "Q4_0":
        formats.write_gguf(folder / "w", written, stored)
        return folder / "w"
    return formats.save(written, folder / "w.safetensors", metadata)


@pytest.mark.parametrize("spec", [None, Quantization(4, 32)], ids=["as it is", "packed"])
@pytest.mark.parametrize("stored", ["bfloat16", "fp8", "e5m2", "int8", "mxfp8", "nvfp4", "packed", "Q4_0"])
def test_weights_are_read_before_they_are_computed_with(checkpoint, tmp_path, mixed, stored, spec):
    """Cast, decoded, split, swapped, packed."""
    file = write_transformer(tmp_path, stored)
    load_all(load_transformer(open_checkpoint(checkpoint, transformer=file, distilled=True), mx.float16, spec))
    assert mixed == []


@pytest.mark.parametrize(("memory", "fused"), [("resident", False), ("streamed", False), ("resident", True)])
def test_images_are_generated_from_what_was_read(checkpoint, tmp_path, mixed, memory, fused):
    """With adapters, an image to begin from and latents."""
    file = tmp_path / "lora.safetensors"
    loras.write(file, tiny.transformer().state_dict(), alpha=2, dora=True, layers=loras.LAYERS[:4])
    transformer = write_transformer(tmp_path, "bfloat16")
    pipe = Flux2Pipeline.from_pretrained(checkpoint, transformer=transformer, distilled=True, memory=memory)
    for name in ("one", "two"):
        pipe.load_lora(str(file), name=name, merge=fused)
    image = Image.new("RGB", (64, 64), "red")
    (step,) = pipe.stream("a red fox", image=image, **SMALL)
    pipe.unload()
    assert step.picture().size == (64, 64)
    pipe.set_lora("two", 0.5)
    (step,) = pipe.stream("a red fox", **SMALL)
    pipe.unload()
    mx.eval(step.latents)
    pipe("a red fox", output_type="latent", **SMALL)
    assert mixed == []


def test_a_preview_is_fitted_from_what_was_read(checkpoint, mixed, monkeypatch):
    monkeypatch.setattr(preview, "IMAGES", 1)
    preview.preview_map(open_checkpoint(checkpoint), mx.float32)
    assert mixed == []


def test_checkpoints_are_written_from_what_was_read(checkpoint, tmp_path, mixed):
    opened = open_checkpoint(checkpoint, transformer=write_transformer(tmp_path, "fp8"), distilled=True)
    convert(opened, tmp_path / "folder", quantization={"transformer": Quantization(4, 32)})
    list(check(tmp_path / "folder"))
    assert mixed == []


# ------------------------------------------------------------------------------------------------ processes


class Group:
    def rank(self):
        return 0

    def size(self):
        return 2


@pytest.fixture
def messages(monkeypatch) -> list[mx.array]:
    """What is sent from here on, each computed before, by the CPU; the other process sends the same."""
    sent = []

    def collective(together):
        def send(array, *, group, stream):
            assert primitives([array]) == set()
            assert stream == mx.cpu
            sent.append(together([array, array]))
            return sent[-1]

        return send

    monkeypatch.setattr(mx.distributed, "all_gather", collective(mx.concatenate))
    monkeypatch.setattr(mx.distributed, "all_sum", collective(sum))
    return sent


@pytest.mark.parametrize(
    "talk",
    [
        distributed.shared_seed,
        lambda group: distributed.check_agreement("c0ffee", group),
        lambda group: distributed.any_process(True, group),
        lambda group: sum_tree({"a": [mx.ones(3) * 2], "b": mx.zeros((2, 2)) + 1}, group),
        lambda group: guidance.distributed(lambda x, txt, step: x + txt, group)(*[mx.ones((1, 3, 4))] * 3, None),
    ],
    ids=["seed", "agreement", "flag", "gradients", "CFG"],
)
def test_messages_are_on_their_own(messages, talk):
    talk(Group())
    assert [primitives([message]) for message in messages] == [set()]


def test_first_block_caches_decide_on_what_was_computed(messages):
    cache = FirstBlockCache(0.5, group=Group())
    for _ in range(2):
        cache.start(mx.ones((1, 4, 8)), mx.ones(1))
        if cache.predict(2 * mx.ones((1, 4, 8))) is None:
            cache.update(3 * mx.ones((1, 4, 8)))
    assert [primitives([message]) for message in messages] == [set()]
    assert cache.is_used


def test_sums_of_trees():
    tree = {"a": [mx.arange(6.0).reshape(2, 3)], "b": mx.ones(())}
    found = sum_tree(tree, mx.distributed.init())  # of one process
    assert found["a"][0].tolist() == tree["a"][0].tolist()
    assert found["b"].item() == 1
