"""Tiny random FLUX.2 [klein] checkpoints, written by diffusers itself.

python -m tests.tiny FOLDER        # one to try commands on; its pictures are noise
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

TOKENIZER = Path(__file__).parent / "data" / "qwen3-tokenizer"

# The head layouts of the released models in small: in 4B the text encoder's heads are wider than its hidden size.
LAYOUTS = {
    "4b": {"heads": 3, "depth": 2, "depth_single": 3, "text_hidden": 80, "text_heads": 4, "text_kv_heads": 1},
    "9b": {"heads": 4, "depth": 3, "depth_single": 2, "text_hidden": 128, "text_heads": 4, "text_kv_heads": 2},
}


def randomize_norms(module: torch.nn.Module) -> None:
    """Norms start at one and zero, which would hide a norm that is skipped or swapped."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))


def transformer(
    heads: int = 2, depth: int = 2, depth_single: int = 3, text_hidden: int = 64, head_dim: int = 32
) -> Flux2Transformer2DModel:
    model = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=depth,
        num_single_layers=depth_single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=3 * text_hidden,
        axes_dims_rope=[head_dim // 4] * 4,
        rope_theta=2000,
        guidance_embeds=False,
    )
    randomize_norms(model)
    return model.eval()


def text_encoder(
    text_hidden: int = 64,
    text_heads: int = 4,
    text_kv_heads: int = 2,
    layers: int = 28,
    vocab: int = 151936,
    *,
    tied: bool = True,
) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=text_hidden,
            intermediate_size=2 * text_hidden,
            num_hidden_layers=layers,
            num_attention_heads=text_heads,
            num_key_value_heads=text_kv_heads,
            head_dim=32,
            vocab_size=vocab,
            max_position_embeddings=40960,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
    )
    randomize_norms(model)
    return model.eval()


def autoencoder(
    channels: tuple[int, ...] = (8, 16, 16, 16), norm_num_groups: int = 4, **config: object
) -> AutoencoderKLFlux2:
    model = AutoencoderKLFlux2(block_out_channels=channels, norm_num_groups=norm_num_groups, **config)
    randomize_norms(model)
    model.bn.running_mean.copy_(0.1 * torch.randn_like(model.bn.running_mean))
    model.bn.running_var.copy_(torch.rand_like(model.bn.running_var) + 0.5)
    return model.eval()


def pipeline(
    *,
    heads: int = 2,
    depth: int = 2,
    depth_single: int = 3,
    text_hidden: int = 64,
    text_heads: int = 4,
    text_kv_heads: int = 2,
    head_dim: int = 32,
    distilled: bool = True,
    sample_size: int = 1024,
    seed: int = 0,
) -> Flux2KleinPipeline:
    torch.manual_seed(seed)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256
        ),
        vae=autoencoder(sample_size=sample_size),
        text_encoder=text_encoder(text_hidden, text_heads, text_kv_heads),
        transformer=transformer(heads, depth, depth_single, text_hidden, head_dim),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        is_distilled=distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copy(checkpoint: Path, target: Path) -> Path:
    """A checkpoint to damage: its files are links, so replace one rather than write into it."""
    shutil.copytree(checkpoint, target, copy_function=os.link)
    return target


def rewrite(path: Path, content: bytes | str | None) -> Path:
    """Replace one file of a copy; None takes it away."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def edit_weights(path: Path, change) -> None:
    """Replace a safetensors file by one whose tensors ``change`` has worked on."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


if __name__ == "__main__":
    pipeline().save_pretrained(sys.argv[1])
