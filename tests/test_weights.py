"""Finding, checking and assigning weights; each fault is refused in one line that names it."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from flux2_mlx import (
    CheckpointError,
    Flux2Pipeline,
    FluxKlein,
    FluxKleinParams,
    InputError,
    load_safetensors,
    open_checkpoint,
    sanitize_flux2_klein_weights,
    sanitize_qwen3_weights,
)
from flux2_mlx.checkpoints.load import assign, load_text_encoder, load_transformer
from tests import tiny

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def refused(folder, *expected: str) -> str:
    """The one-line error of opening a folder, after checking what it says."""
    with pytest.raises(CheckpointError) as caught:
        Flux2Pipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message, message
    return message


def edit_config(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    tiny.rewrite(path, json.dumps({name: value for name, value in config.items() if value is not ...}))


# ------------------------------------------------------------------------------------------------ sound checkpoints


def test_opening_reads_no_weight(checkpoint, memory):
    before = memory()
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    assert memory() - before < 2**20
    pipe("a red fox", height=64, width=64, num_steps=1, max_sequence_length=16)
    text_encoder = sum(array.nbytes for _, array in tree_flatten(pipe.text_encoder.parameters()))
    assert memory() - before > text_encoder


def test_encoder_of_the_autoencoder_and_later_text_layers_are_not_built(checkpoint):
    encoder = load_text_encoder(open_checkpoint(checkpoint), mx.float32)
    names = [name for name, _ in tree_flatten(encoder.parameters())]
    assert not [name for name in names if "layers.27" in name or "lm_head" in name or name == "model.norm.weight"]
    assert any("layers.26" in name for name in names)


def split(folder, shards, stem, index=True):
    """Split one component's weights over shards, with or without an index."""
    single = folder / f"{stem}.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for k in range(shards):
        file = f"{stem}-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[k::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_an_index(damaged, checkpoint, index):
    split(damaged / "transformer", 3, "diffusion_pytorch_model", index=index)
    whole = load_transformer(open_checkpoint(checkpoint), mx.float32)
    sharded = load_transformer(open_checkpoint(damaged), mx.float32)
    expected = dict(tree_flatten(whole.parameters()))
    found = dict(tree_flatten(sharded.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_a_shard_of_unread_layers_is_not_needed(damaged):
    """Layers after the last tapped one are not even looked for on disk."""
    folder = damaged / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    late = {name: value for name, value in tensors.items() if "layers.27." in name or name == "model.norm.weight"}
    early = {name: value for name, value in tensors.items() if name not in late}
    (folder / "model.safetensors").unlink()
    save_file(early, folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(early, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(late, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    load_text_encoder(open_checkpoint(damaged), mx.float32)


def test_load_safetensors_takes_a_file_a_list_and_an_index(tmp_path):
    tensors = {f"w{k}": torch.full((2, k + 1), float(k), dtype=torch.bfloat16) for k in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    whole = load_safetensors(tmp_path / "m.safetensors")
    split(tmp_path, 2, "m")
    shards = sorted(tmp_path.glob("m-*.safetensors"))
    for loaded in (
        whole,
        load_safetensors([str(s) for s in shards]),
        load_safetensors(tmp_path / "m.safetensors.index.json"),
    ):
        assert {name: array.shape for name, array in loaded.items()} == {f"w{k}": (2, k + 1) for k in range(4)}
        assert loaded["w3"].dtype == mx.bfloat16
        assert loaded["w3"].astype(mx.float32).tolist() == [[3.0] * 4] * 2


def test_sanitizing_twice_changes_nothing(checkpoint):
    for sanitize, file in ((sanitize_flux2_klein_weights, TRANSFORMER), (sanitize_qwen3_weights, TEXT_ENCODER)):
        once = sanitize(load_safetensors(checkpoint / file))
        twice = sanitize(once)
        assert once.keys() == twice.keys()
        assert all(once[name] is twice[name] for name in once)


# ------------------------------------------------------------------------------------------------ bad files


def test_a_missing_file_lists_what_was_looked_for(damaged):
    tiny.rewrite(damaged / TRANSFORMER, None)
    refused(damaged, "diffusion_pytorch_model.safetensors.index.json", "00001-of-0000N", "found no weights")


def test_a_pickle_is_never_loaded(damaged):
    tiny.rewrite(damaged / TRANSFORMER, None)
    (damaged / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(damaged, "found only diffusion_pytorch_model.bin; pickles are never loaded")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_safetensors(damaged / "transformer" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE])
def test_a_truncated_file(damaged, file):
    content = (damaged / file).read_bytes()
    tiny.rewrite(damaged / file, content[:-10])
    refused(damaged, file, "is cut short or damaged", f"({len(content) - 10:,} bytes)", "fetch")


def test_an_empty_file(damaged):
    tiny.rewrite(damaged / TRANSFORMER, b"")
    refused(damaged, TRANSFORMER, "is empty; fetch or copy it again")


def test_a_web_page_in_place_of_a_file(damaged):
    tiny.rewrite(damaged / TRANSFORMER, "<!doctype html><title>Log in</title>" + " " * 100)
    refused(damaged, TRANSFORMER, "is cut short or damaged")


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(b"{not json"),
        safetensors_bytes([1, 2]),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_bytes({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, bytes(12)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)),
        safetensors_bytes(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            bytes(4),
        ),
        struct.pack("<Q", 2**62) + b"{}",
    ],
    ids=["json", "list", "offsets", "dtype", "shape", "hole", "tail", "overlap", "huge"],
)
def test_corrupt_headers(damaged, content):
    tiny.rewrite(damaged / TRANSFORMER, content)
    refused(damaged, TRANSFORMER, "fetch or copy it again")


def test_a_file_from_the_cache_names_the_command_that_fetches_it_again(tmp_path):
    path = tmp_path / "models--black-forest-labs--FLUX.2-klein-4B" / "snapshots" / "abc" / "vae" / "x.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match=r"hf download black-forest-labs/FLUX\.2-klein-4B vae/x\.safetensors --force"
    ):
        load_safetensors(path)


def test_a_format_that_is_not_read(tmp_path):
    save_file({"w": torch.zeros(4, dtype=torch.float64)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"only F32, .*, U32: w \(F64\)"):
        load_safetensors(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------------------ bad shards


def test_a_missing_shard_is_named(damaged):
    split(damaged / "transformer", 3, "diffusion_pytorch_model")
    (damaged / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    refused(damaged, "1 of 3 shards missing: diffusion_pytorch_model-00002-of-00003.safetensors")
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(damaged, "1 of 3 shards missing: diffusion_pytorch_model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    "path", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", "a\\b.safetensors"]
)
def test_an_index_cannot_leave_its_folder(damaged, path):
    weight_map = split(damaged / "transformer", 2, "diffusion_pytorch_model")
    weight_map[next(iter(weight_map))] = path
    index = damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(damaged, repr(path), "outside its folder")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "nonsense"])
def test_a_bad_index(damaged, content):
    index = damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(content)
    refused(damaged, index.name)


def test_an_index_that_names_more_than_its_shards_have(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "m.safetensors", "gone": "m.safetensors"}}))
    with pytest.raises(CheckpointError, match="do not have: gone"):
        load_safetensors(index)


def test_a_weight_in_two_shards(tmp_path):
    for k in range(2):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{k}.safetensors")
    with pytest.raises(CheckpointError, match=r"1\.safetensors repeats weights of another shard: w"):
        load_safetensors([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])


# ------------------------------------------------------------------------------------------------ bad weights


def test_missing_unknown_and_misshaped_weights_are_all_named_at_once(damaged):
    def change(tensors):
        del tensors["proj_out.weight"], tensors["x_embedder.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["transformer_blocks.0.attn.norm_q.weight"] = torch.zeros(5)

    tiny.edit_weights(damaged / TRANSFORMER, change)
    refused(
        damaged,
        "2 missing: proj_out.weight, x_embedder.weight",
        "1 unknown: extra.weight",
        "1 mis-shaped: transformer_blocks.0.attn.norm_q.weight is (5,), not (32,)",
    )


def test_a_missing_layer_of_the_text_encoder(damaged):
    tiny.edit_weights(damaged / TEXT_ENCODER, lambda tensors: tensors.pop("model.layers.26.mlp.up_proj.weight"))
    refused(damaged, "text_encoder", "1 missing: model.layers.26.mlp.up_proj.weight")


def test_assigning_casts_lazily():
    params = FluxKleinParams.from_config(tiny.transformer().config)
    weights = dict(tree_flatten(FluxKlein(params).parameters()))
    model = assign(FluxKlein(params), weights, mx.bfloat16, "test")
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}


# ------------------------------------------------------------------------------------------------ other checkpoints


def test_a_folder_that_is_no_checkpoint(tmp_path):
    refused(
        tmp_path,
        "no FLUX.2 [klein] checkpoint in the diffusers layout",
        "no model_index.json, and no folder transformer, text_encoder or vae",
    )


def test_a_folder_of_single_files_names_them(checkpoint, tmp_path):
    (tmp_path / "klein.safetensors").symlink_to(checkpoint / TRANSFORMER)
    refused(tmp_path, "to use a file of it, name the file: klein.safetensors")


def test_a_file_in_place_of_a_folder(checkpoint):
    refused(checkpoint / TRANSFORMER, "of no released model", "give its text encoder, autoencoder, tokenizer as well")


@pytest.mark.parametrize(
    ("name", "near"), [("klein-4", "klein-4b"), ("flux2-klein-9b", "klein-9b"), ("zzz", "klein-base-4b")]
)
def test_an_unknown_name_offers_the_nearest(name, near):
    refused(name, repr(name), "did you mean", near)


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path):
    refused(tmp_path / "nowhere", "there is no such folder")
    refused("./models/klein/deeper", "there is no such folder")


def test_a_revision_of_a_local_folder(checkpoint):
    with pytest.raises(InputError, match="revision 'v1' has no meaning for the local folder"):
        open_checkpoint(checkpoint, revision="v1")


@pytest.mark.parametrize(
    ("kind", "named"),
    [("FluxPipeline", "FLUX.1"), ("FluxKontextPipeline", "FLUX.1"), ("Flux2Pipeline", "FLUX.2-dev"), (None, "None")],
)
def test_another_pipeline(damaged, kind, named):
    edit_config(damaged / "model_index.json", _class_name=kind)
    refused(damaged, named, "not a Flux2KleinPipeline")


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "a FluxTransformer2DModel (FLUX.1)"),
        ("transformer", {"guidance_embeds": True}, "this is FLUX.2-dev"),
        ("transformer", {"num_layers": ...}, "has no num_layers"),
        ("transformer", {"num_layers": "many"}, "depth cannot be 'many' in a FluxKleinParams"),
        ("transformer", {"axes_dims_rope": 32}, "a value that cannot be"),
        ("transformer", {"eps": 0}, "eps cannot be 0"),
        ("vae", {"block_out_channels": [16, 32, 32, "x"]}, "block_out_channels cannot be (16, 32, 32, 'x')"),
        ("transformer", {"patch_size": 2}, "{'patch_size': 2}"),
        ("transformer", {"axes_dims_rope": [16, 8, 8]}, "axes_dims_rope must be four even sizes"),
        ("text_encoder", {"model_type": "t5"}, "a 't5' model; FLUX.2 [klein] needs a Qwen3"),
        ("text_encoder", {"num_hidden_layers": 24}, "has 24 layers"),
        (
            "text_encoder",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "FLUX.2 [klein] has {'rope_type': 'default'}",
        ),
        ("text_encoder", {"hidden_size": 4096}, "takes prompt embeddings of 192 (3 x 64)"),
        ("transformer", {"axes_dims_rope": [7, 9, 8, 8]}, "four even sizes that sum to head_dim 32, got (7, 9, 8, 8)"),
        ("transformer", {"num_layers": 300000}, "300000 double and 3 single blocks"),
        ("transformer", {"mlp_ratio": 1e308}, "mlp_ratio 1e+308 are no FLUX.2 [klein]"),
        ("transformer", {"mlp_ratio": 1e-9}, "mlp_ratio 1e-09 are no FLUX.2 [klein]"),
        ("transformer", {"eps": True}, "eps cannot be True"),
        ("text_encoder", {"rope_parameters": ..., "rope_scaling": {"type": "yarn"}}, "{'rope_type': 'yarn'}"),
        ("text_encoder", {"rope_parameters": ["x"]}, "rope parameters ['x']; an object is expected"),
        ("text_encoder", {"hidden_act": "gelu"}, "{'hidden_act': 'gelu'}"),
        ("text_encoder", {"vocab_size": 10**30}, "vocab_size cannot be 1000000000000000000000000000000"),
        ("text_encoder", {"num_attention_heads": 0, "head_dim": None}, "a value that cannot be"),
        ("text_encoder", {"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple"),
        ("vae", {"norm_num_groups": 7}, "four multiples of norm_num_groups 7"),
        ("vae", {"decoder_block_out_channels": [8]}, "block_out_channels must be four multiples"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKL (FLUX.1 or Stable Diffusion)"),
        ("vae", {"use_quant_conv": False}, "{'use_quant_conv': False}"),
        ("vae", {"latent_channels": 16}, "takes 128 latent channels, but the autoencoder packs 64"),
    ],
)
def test_another_architecture(damaged, file, changes, expected):
    edit_config(damaged / file / "config.json", **changes)
    refused(damaged, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dynamic_shifting": False},
        {"shift_terminal": 0.3},
        {"time_shift_type": "linear"},
        {"invert_sigmas": True},
        {"use_karras_sigmas": True},
    ],
)
def test_another_scheduler(damaged, changes):
    edit_config(damaged / "scheduler" / "scheduler_config.json", **changes)
    refused(damaged, f"the scheduler config has {changes}")


def test_inert_scheduler_settings_do_not_matter(damaged):
    edit_config(damaged / "scheduler" / "scheduler_config.json", shift=1.0, base_shift=0.1, max_image_seq_len=64)
    open_checkpoint(damaged)


def test_a_whole_number_as_rope_theta_and_a_fractional_one(damaged):
    edit_config(damaged / "transformer" / "config.json", rope_theta=2500.5)
    assert open_checkpoint(damaged).transformer.rope_theta == 2500.5


def test_an_unreadable_file_is_not_called_missing(damaged, monkeypatch):
    original = Path.open

    def forbidden(self, *arguments, **options):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    refused(damaged, "model.safetensors cannot be read: Permission denied")


def test_an_unreadable_folder(monkeypatch, damaged):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", forbidden)
    refused(damaged, f"{damaged} cannot be read: Permission denied")


def test_names_that_cannot_be_paths():
    refused("a" * 5000, "a" * 5000)
    refused("~nobody-of-that-name/klein", "no model '~nobody-of-that-name/klein'")
    refused("", "no model ''")


def test_integers_are_no_weights(damaged):
    integers = {"proj_out.weight": torch.zeros(128, 64).long()}
    tiny.edit_weights(damaged / TRANSFORMER, lambda tensors: tensors.update(integers))
    refused(damaged, "proj_out.weight (I64)")


def test_no_files_at_all():
    with pytest.raises(CheckpointError, match="no files to load weights from"):
        load_safetensors([])


def test_deeply_nested_json(damaged):
    tiny.rewrite(damaged / "vae" / "config.json", "[" * 200_000)
    refused(damaged, "vae/config.json is not JSON")


def test_a_4b_transformer_with_an_8b_text_encoder(damaged):
    edit_config(damaged / "transformer" / "config.json", joint_attention_dim=7680)
    edit_config(damaged / "text_encoder" / "config.json", hidden_size=4096)
    refused(damaged, "embeddings of 7680 (3 x 2560)", "gives 12288 (3 x 4096, Qwen3-8B)", "klein-4b goes with Qwen3-4B")


def test_old_and_new_spelling_of_rope_theta(damaged):
    edit_config(damaged / "text_encoder" / "config.json", rope_parameters=..., rope_theta=5e5)
    assert open_checkpoint(damaged).text_encoder.rope_theta == 5e5
    edit_config(damaged / "text_encoder" / "config.json", rope_parameters={"rope_theta": 7e5, "rope_type": "default"})
    assert open_checkpoint(damaged).text_encoder.rope_theta == 7e5


def test_a_config_that_is_not_json(damaged):
    tiny.rewrite(damaged / "vae" / "config.json", "{oops")
    refused(damaged, "vae/config.json is not JSON")


def test_is_distilled_absent_means_base(damaged, checkpoint):
    assert open_checkpoint(checkpoint).is_distilled
    edit_config(damaged / "model_index.json", is_distilled=...)
    assert not open_checkpoint(damaged).is_distilled
    edit_config(damaged / "model_index.json", _class_name="Flux2KleinKVPipeline")
    opened = open_checkpoint(damaged)
    assert opened.is_distilled
    assert opened.has_kv_cache


def test_float16_weights_load_into_float32(damaged, checkpoint):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].half()

    tiny.edit_weights(damaged / TRANSFORMER, change)
    ours = load_transformer(open_checkpoint(damaged), mx.float32)
    expected = load_file(checkpoint / TRANSFORMER)["proj_out.weight"].half().float().numpy()
    assert np.array_equal(np.array(ours.proj_out.weight), expected)
