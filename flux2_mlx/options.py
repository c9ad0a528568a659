"""The options of generating, each defined once: a field is the flag, the key in jobs and image files, and the check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import (
    MIN_SIDE,
    check_interval,
    check_limit,
    check_prompt,
    check_side,
    check_size,
    check_strengths,
    gigabytes,
)
from .dtypes import DTYPES, VAE_DTYPES, dtype_name
from .errors import InputError
from .families import SMALL, Release, find_release, with_small_encoder
from .fields import Options, option
from .imaging.edits import THRESHOLD
from .imaging.inpaint import MAX_MARGIN, SIDES, check_expand
from .quantization.spec import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, Quantization, options_of, parse_options
from .regions import check_regions
from .runtime.plan import MODES
from .runtime.residency import Stages
from .sampling.latents import NOISES
from .sampling.schedules import SCHEDULES, check_sigmas

OUTPUT_TYPES = ("pil", "np", "latent")
MAX_TILE = 2048  # pixels a side; a square of it has MAX_PIXELS
MAX_STEPS = 1000  # noise levels that the models were trained on
MAX_POSITIONS = 40960  # positions that Qwen3 was trained on
MAX_IMAGES = 10_000
MAX_GUIDANCE = 100
STRENGTH = 0.75  # img2img's default; less where the steps are fewer than four
HIRES_STRENGTH = 0.5
MAX_HIRES = 4
FROZEN = ("text", "references")

_LORA = "LoRA and its strength: a safetensors file, a folder, a Hub id or owner/name/file; repeat it for several"
_PART = "from a file, a folder or the Hub, in place of the model's own"
PROMPT, MODEL, ADAPTERS, SAMPLING = "prompt and images", "model", "adapters", "sampling"
OUTPUT, MEMORY, BATCH = "output", "memory and speed", "batch and session"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(Options):
    """The options of sampling, which an image depends on beside prompt, model and inputs; see Flux2Pipeline.stream."""

    negative_prompt: str = option(
        "", "what CFG steers away from (base models)", group=PROMPT, check=check_prompt, metavar="TEXT",
        also=("--negative",),
    )  # fmt: skip
    region: tuple[str, ...] = option(
        (), "a prompt for a part of the image, whose sides are shares of the image's; repeat it for several",
        group=PROMPT, check=check_regions, metavar="PROMPT@LEFT,TOP,RIGHT,BOTTOM", planned=True,
    )  # fmt: skip
    reference_strength: tuple[float, ...] = option(
        (), "strength of each --image in turn: from 0, which leaves it out, to 2; repeat it for several", group=PROMPT,
        check=check_strengths, metavar="STRENGTH", shown="1", repeated=True,
    )  # fmt: skip
    strength: float | None = option(
        None, "denoising strength of img2img and inpainting: 1 keeps nothing of --init-image", group=PROMPT, gt=0, le=1,
        shown=f"{STRENGTH}; inpainting 1", also=("--denoise", "--denoising-strength"),
    )  # fmt: skip
    mask_blur: float = option(
        0.0, "feather the mask's edge: radius of a Gaussian blur", group=PROMPT, ge=0, le=MAX_MARGIN, metavar="PIXELS"
    )
    mask_padding: int | None = option(
        None, "inpaint a crop around the mask with this margin, at full resolution, and paste it back", group=PROMPT,
        ge=0, le=MAX_MARGIN, metavar="PIXELS",
    )  # fmt: skip
    expand: Mapping[str, int] | None = option(
        None, f"outpainting: extend --init-image beyond its edges ({', '.join(SIDES)})", group=PROMPT,
        check=check_expand, hash=False, metavar="SIDE=PIXELS,...", also=("--outpaint",),
    )  # fmt: skip
    color_match: bool = option(
        False, "editing: where nothing changed, colours follow those of the first --image", group=PROMPT,
    )  # fmt: skip
    edit_composite: float | None = option(
        None, "editing: where nothing changed, pixels of the first --image come back; a difference above this share of "
        f"a channel's range is the edit's, {THRESHOLD} unless given", group=PROMPT, gt=0, le=1, metavar="THRESHOLD",
        shown="off", nargs="?", const=THRESHOLD,
    )  # fmt: skip
    width: int | None = option(
        None, "width in pixels, a multiple of 16", group=SAMPLING, ge=MIN_SIDE, also=("-W",), planned=True,
        shown="the init or reference image's, else 1024; nano 128",
    )  # fmt: skip
    height: int | None = option(
        None, "height in pixels, a multiple of 16", group=SAMPLING, ge=MIN_SIDE, also=("-H",), planned=True,
        shown="the init or reference image's, else 1024; nano 128",
    )  # fmt: skip
    hires: float | None = option(
        None, "hires fix: generate the image this much smaller first (1 to 4), or take --init-image, enlarge its "
        "latents and denoise them at the full size, so that large images keep one composition", group=SAMPLING, gt=1,
        le=MAX_HIRES, metavar="SCALE", shown="off", planned=True,
    )  # fmt: skip
    hires_strength: float | None = option(
        None, "denoising strength of the second pass of --hires", group=SAMPLING, gt=0, le=1, metavar="STRENGTH",
        shown=str(HIRES_STRENGTH),
    )  # fmt: skip
    hires_tile: int | None = option(
        None, "side of the tiles that the second pass of --hires is computed in", group=SAMPLING, ge=MIN_SIDE,
        le=MAX_TILE, check=lambda value: check_side("hires_tile", value), metavar="PIXELS", planned=True,
        shown="undivided up to 4 megapixels; beyond 1024, nano 128",
    )  # fmt: skip
    num_steps: int | None = option(
        None, "denoising steps", group=SAMPLING, ge=1, le=MAX_STEPS, flag="steps", metavar="N",
        shown="distilled models 4, base models 50", also=("--num-steps", "--num-inference-steps", "-s"),
        alias="num_inference_steps",
    )  # fmt: skip
    guidance: float | None = option(
        None, "CFG scale (classifier-free guidance); 1 is none", group=SAMPLING, ge=0, le=MAX_GUIDANCE, metavar="SCALE",
        shown="distilled models 1.0, base models 4.0", also=("--guidance-scale", "--cfg-scale", "--cfg"),
        alias="guidance_scale",
    )  # fmt: skip
    guidance_interval: tuple[float, ...] | None = option(
        None, "apply CFG only in steps whose noise level (sigma) is in this range", group=SAMPLING,
        check=check_interval, metavar="LOW,HIGH", shown="0,1",
    )  # fmt: skip
    guidance_rescale: float = option(
        0.0,
        "CFG rescale against oversaturation, from 0 (none) to 1 (full)",
        group=SAMPLING,
        ge=0,
        le=1,
        metavar="SHARE",
    )
    force_guidance: bool = option(False, "apply CFG to a distilled model, too", group=SAMPLING)
    seed: int | None = option(
        None, "seed of the first image; the next ones have seed + 1, ...", group=SAMPLING, ge=0, shown="random",
        metavar="N", hint="; leave it out for a random one", alias="generator",
    )  # fmt: skip
    schedule: str = option(
        "flux2",
        "noise schedule (scheduler): flux2 (official), linear (not shifted), comfy (ComfyUI's), power (flux2.c's)",
        group=SAMPLING,
        choices=SCHEDULES,
        also=("--scheduler",),
        either="sigmas",
    )
    sigmas: tuple[float, ...] | None = option(
        None, "custom sigmas, falling, without the final 0; they are shifted as in diffusers", group=SAMPLING,
        check=check_sigmas, metavar="S,S,...", either="sigmas",
    )  # fmt: skip
    noise: str = option(
        "torch", "noise source: torch's CPU generator, as in diffusers, or mx.random", group=SAMPLING, choices=NOISES
    )
    max_sequence_length: int | None = option(
        None, "tokens that a prompt is padded or truncated to", group=SAMPLING, ge=1, le=MAX_POSITIONS, metavar="N",
        shown="512; nano 48", planned=True,
    )  # fmt: skip
    step_cache: float | None = option(
        None, "First Block Cache, for tens of steps: skip the other blocks in steps where the first one's residual "
        "changes by less than this, as 0.1", group=MEMORY, ge=0, metavar="THRESHOLD", shown="off", planned=True,
    )  # fmt: skip
    reuse: str | None = option(
        None, "freeze the keys and values of the prompt, or of the reference images, after the first step (distilled "
        "models)",
        group=MEMORY, choices=FROZEN, shown="off", planned=True,
    )  # fmt: skip

    @property
    def planned(self) -> dict[str, Any]:
        """The arguments of Flux2Pipeline.plan: what memory depends on."""
        return self.marked("planned")

    @property
    def edit_option(self) -> str | None:
        """The option that brings an edit back to its reference, if one is given."""
        return "edit_composite" if self.edit_composite is not None else "color_match" if self.color_match else None

    def check_together(self) -> None:
        check_size(self.height, self.width, self.hires)
        if self.sigmas is not None and self.num_steps not in (None, len(self.sigmas)):
            raise InputError(f"num_steps is {self.num_steps}, but {len(self.sigmas)} sigmas are given")
        for name in ("hires_strength", "hires_tile"):
            if getattr(self, name) is not None and self.hires is None:
                raise InputError(f"{name} belongs to hires (--hires SCALE), and none is given")
        texts, length = 1 + len(self.region), self.max_sequence_length or 0
        if self.region and texts * length > MAX_POSITIONS:
            raise InputError(
                f"{texts} prompts of {length} tokens each, the regions' among them, are more than {MAX_POSITIONS}; "
                "give fewer regions, or a smaller max_sequence_length"
            )
        if self.step_cache is not None and self.reuse is not None:
            raise InputError("step_cache is for tens of steps and reuse for a few; give one of them")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """What a call does that the settings of its images do not depend on: prompts written out, which these have as they
    were drawn with; how many images, and how many of them in one pass.
    """

    enhance: bool = option(
        False, "write a short prompt out before, with the language model that the text encoder is the beginning of; of "
        "an edit the instruction", group=PROMPT,
    )  # fmt: skip
    enhance_seed: int | None = option(
        None, "seed of --enhance: another text for each, instead of the likeliest", group=PROMPT, ge=0, metavar="N",
        shown="none",
    )  # fmt: skip
    num_images: int = option(
        1, "images per prompt", group=SAMPLING, ge=1, le=MAX_IMAGES, metavar="N",
        also=("-n", "--num-images-per-prompt"), alias="num_images_per_prompt",
    )  # fmt: skip
    batch_size: int | None = option(
        None, "images per pass through the transformer, as far as memory allows", group=MEMORY, ge=1, le=MAX_IMAGES,
        metavar="N", shown="1; streamed: what fits",
    )  # fmt: skip

    def check_together(self) -> None:
        if self.enhance_seed is not None and not self.enhance:
            raise InputError("enhance_seed belongs to enhance (--enhance), and it is not given")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """The model and how it is opened: from_pretrained takes all of them, open_checkpoint those marked ``source``."""

    model: str = option(
        "klein-4b", "released model, nano, folder, file, Hub id or owner/name/file", group=MODEL, also=("-m",),
        source=True, is_path=True,
    )  # fmt: skip
    revision: str | None = option(None, "branch, tag or commit on the Hub", group=MODEL, source=True)
    transformer: str | None = option(
        None, f"the transformer {_PART}", group=MODEL, metavar="FILE", source=True, is_path=True
    )
    text_encoder: str | None = option(
        None,
        f"the text encoder {_PART}; small: Qwen3-0.6B with its adapter, for the 4B models",
        group=MODEL,
        metavar="FILE",
        source=True,
        is_path=True,
    )
    vae: str | None = option(
        None, f"the autoencoder (VAE) {_PART}", group=MODEL, metavar="FILE", source=True, is_path=True
    )
    tokenizer: str | None = option(
        None, "another folder with tokenizer.json", group=MODEL, metavar="DIR", source=True, is_path=True
    )
    distilled: bool | None = option(
        None, "whether the transformer is step-distilled (few steps, no CFG), where its file does not say", group=MODEL,
        source=True,
    )  # fmt: skip
    kv_cache: bool | None = option(
        None, "whether the transformer caches the keys and values of reference images, as klein-9b-kv does, where its "
        "file does not say", group=MODEL, source=True,
    )  # fmt: skip
    dtype: str | None = option(
        None, "dtype of the transformer", group=MODEL, choices=tuple(DTYPES),
        shown="bfloat16; float16 on M1 and M2; float32 on a CPU", alias="torch_dtype",
    )  # fmt: skip
    vae_dtype: str | None = option(
        None, "dtype of the autoencoder (VAE)", group=MODEL, choices=VAE_DTYPES,
        shown="float32; on a CPU that of --dtype, bfloat16 for float16",
    )  # fmt: skip
    quantize: int | str | None = option(
        None, f"quantize weights: {', '.join(map(str, AFFINE_BITS))} bits, {', '.join(FLOAT_MODES)}; below 8 bits "
        "the most sensitive layers get more bits", group=MODEL, metavar="BITS", also=("-q",),
    )  # fmt: skip
    quantize_text_encoder: int | str | None = option(
        None,
        "bits or format of the text encoder alone; none leaves it",
        group=MODEL,
        metavar="BITS",
        shown="as --quantize",
    )
    group_size: int | None = option(
        None, f"weights that share a quantization scale: {', '.join(map(str, AFFINE_GROUPS))}", group=MODEL, shown="64"
    )

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of open_checkpoint."""
        return self.marked("source")

    @property
    def release(self) -> Release | None:
        """The released model that this is and no more, which needs no file to be known; with the small text encoder,
        where that is asked for.

        Raises:
            InputError: for the small text encoder of a 9B model.
        """
        is_small = self.text_encoder == SMALL and not Path(SMALL).exists()
        known = ("model", "distilled", "kv_cache", *(["text_encoder"] if is_small else []))
        parts = {name: value for name, value in self.source.items() if name not in known}
        if any(parts.values()) or Path(self.model).exists():
            return None
        release = find_release(self.model)
        return with_small_encoder(release) if release is not None and is_small else release

    def quantization(self) -> dict[str, Quantization]:
        """The quantization of each part that is quantized."""
        return parse_options(self.quantize, self.quantize_text_encoder, self.group_size)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckpointOptions):
    """A model and its adapters."""

    lora: tuple[str, ...] = option((), _LORA, group=ADAPTERS, metavar="FILE[:STRENGTH]", is_path=True)
    lora_merge: bool = option(
        False,
        "fuse LoRAs into weights that are not quantized: steps are a little faster, loading is slower",
        group=ADAPTERS,
    )
    lora_partial: bool = option(
        False, "load a LoRA that fits the model only in part, without its other layers", group=ADAPTERS
    )

    @classmethod
    def of(cls, stages: Stages) -> ModelOptions:
        """The options of a model that is open."""
        loras = stages.loras.values()
        return cls(
            model=stages.checkpoint.name,
            revision=stages.checkpoint.revision,
            dtype=dtype_name(stages.dtype),
            vae_dtype=dtype_name(stages.vae_dtype),
            lora=tuple(map(str, loras)),
            lora_merge=any(lora.merge for lora in loras),
            lora_partial=any(lora.partial for lora in loras),
            **stages.checkpoint.options,
            **options_of(stages.quantize),
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """The options of computing, on which no image depends."""

    memory: str = option(
        "auto", "offloading: keep everything loaded (resident), one stage at a time (staged), one block at a time "
        "(streamed), or what fits (auto)", group=MEMORY, choices=MODES,
    )  # fmt: skip
    memory_limit: float | None = option(
        None, "memory limit of weights and activations together", group=MEMORY, check=check_limit, parse=gigabytes,
        metavar="GB", shown="what the machine has now",
    )  # fmt: skip
    cache: bool = option(True, "cache prompt embeddings, and what --enhance wrote, on disk", group=MEMORY, shown="on")
    preview_decoder: str | None = option(
        None,
        "TAEF2's weights for finer previews: a file, or owner/name/file on the Hub",
        group=OUTPUT,
        metavar="FILE",
        is_path=True,
    )
    progress: bool = option(False, "bars on standard error while weights are read and steps are done", flag=None)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """The options of writing images."""

    write_metadata: bool = option(
        True, "write the settings into the image's file, for --from-image and other tools", group=OUTPUT,
        flag="metadata", shown="on",
    )  # fmt: skip


def seed_of(generator: Any) -> int | None:
    """The seed of diffusers' ``generator``: torch's, or the number itself.

    Raises:
        InputError: for several, or something else.
    """
    if hasattr(generator, "initial_seed"):
        return int(generator.initial_seed())
    if generator is None or (isinstance(generator, int) and not isinstance(generator, bool)):
        return generator
    if isinstance(generator, (list, tuple)):
        raise InputError(
            "generator must be one: the k-th image has its seed + k; call once for each of several other seeds"
        )
    raise InputError(f"generator must be a torch.Generator or a seed, got {generator!r}")
