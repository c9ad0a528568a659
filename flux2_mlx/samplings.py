"""How images are sampled: their sizes, the steps of each pass, the defaults of both; hires' passes and tiles.

GenerationOptions, sizes of the inputs -> image_sizes, resolve_samplings -> Sampling of each pass
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .checks import MAX_PIXELS, MIN_SIDE, check_size
from .errors import InputError
from .families import BASE, DISTILLED
from .imaging.inpaint import Inpaint
from .imaging.preprocess import reference_size
from .inputs import Inputs, Size
from .options import HIRES_STRENGTH, STRENGTH, GenerationOptions
from .runtime.activations import Workload
from .sampling.latents import PIXELS_PER_TOKEN
from .sampling.schedules import StepPlan, custom_sigmas, plan_steps, schedule_sigmas
from .sampling.tiles import Tiling, divide

TENS_OF_STEPS = 10  # with fewer steps, each differs too much from the one before to reuse it


def warn(message: str) -> None:
    """A UserWarning at the code that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


# ------------------------------------------------------------------------------------------------ defaults and sizes


def default_steps(distilled: bool) -> int:
    return (DISTILLED if distilled else BASE).num_steps


def default_guidance(distilled: bool) -> float:
    return (DISTILLED if distilled else BASE).guidance


def default_strength(steps: int, *, inpaints: bool) -> float:
    return 1.0 if inpaints else min(STRENGTH, max_partial_strength(steps))


def max_partial_strength(steps: int) -> float:
    """The greatest strength, in hundredths, that still leaves out a step; 1 for a single step."""
    return math.floor(100 * (steps - 1) / steps) / 100 if steps > 1 else 1.0


def start_step(strength: float, steps: int) -> int:
    """How many steps a strength leaves out at the beginning (img2img), by diffusers' rounding; the last is always
    done.
    """
    start = min(int(steps - steps * strength), steps - 1)
    if start == 0 and strength < 1 < steps:
        warn(
            f"strength {strength:g} of {steps} steps is rounded to all of them and keeps next to nothing of the init "
            f"image; {max_partial_strength(steps):g} is the most that keeps some"
        )
    return start


def output_size(
    height: int | None, width: int | None, references: Sequence[Size], side: int, hires: float | None = None
) -> Size:
    """The size (height, width) of an image: what is given, else the first reference's, by its aspect where one side is
    given, else ``side``.

    Raises:
        InputError: see check_size.
    """
    check_size(height, width, hires)
    if references:
        tall, wide = references[0]
        if height is None:
            height = tall if width is None else _multiple(width * tall / wide)
        if width is None:
            width = _multiple(height * wide / tall)
    height, width = height or side, width or side
    check_size(height, width, hires)
    return height, width


def _multiple(side: float) -> int:
    """The nearest side that can be generated."""
    return max(MIN_SIDE, round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)


def image_sizes(
    options: GenerationOptions, inputs: Inputs, inpaint: Inpaint | None, side: int
) -> tuple[Size, list[Size]]:
    """The size to generate at, where ``side`` is what the model is for, and the sizes of what the transformer sees:
    what is inpainted is its first reference, and a reference of strength 0 is none.

    Raises:
        InputError: for a size that cannot be.
    """
    references = [reference_size(image) for image in inputs.images]
    init_image = inputs.init_image if inpaint is None else inpaint.image
    init_size = inputs.init_size if init_image is None else reference_size(init_image)
    if init_size is not None and options.hires is not None:
        height, width = init_size if init_image is None else (init_image.height, init_image.width)
        init_size = _multiple(options.hires * height), _multiple(options.hires * width)
    models = references if init_size is None else [init_size, *references]
    size = output_size(options.height, options.width, models, side, options.hires)
    strengths = inputs.strengths(options.reference_strength)
    references = [own for own, strength in zip(references, strengths, strict=True) if strength]
    if inpaint is None:
        return size, references
    inpaint.check_aspect(*size)
    return size, [size, *references]


# ------------------------------------------------------------------------------------------------ steps


def image_sigmas(options: GenerationOptions, distilled: bool, size: Size) -> list[float]:
    """The noise levels of an image of this size (height, width): the custom ones, else the schedule's."""
    tokens = (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)
    if options.sigmas is not None:
        return custom_sigmas(options.sigmas, tokens)
    return schedule_sigmas(options.schedule, options.num_steps or default_steps(distilled), tokens)


@dataclass(frozen=True)
class Sampling:
    """The sampling of an image, every default filled in.

    Attributes:
        size: (height, width) in pixels.
        guidance: CFG's scale; 1 is no CFG.
        strength: denoising strength of img2img, inpainting and hires; None where nothing is started from.
        num_steps: the schedule's steps, those that the strength leaves out among them.
        steps: the steps that are done.
        tiling: the tiles in which each step is computed; None for the undivided image.
        small: (height, width) of the image that tiles follow.
    """

    size: Size
    guidance: float
    strength: float | None
    num_steps: int
    steps: list[StepPlan]
    tiling: Tiling | None = None
    small: Size = (0, 0)

    @property
    def passes(self) -> int:
        """Passes of the image through the transformer, all of its tiles together one."""
        return sum(step.passes for step in self.steps)


def resolve_samplings(
    options: GenerationOptions, distilled: bool, size: Size, side: int, *, has_init: bool, inpaints: bool
) -> list[Sampling]:
    """The sampling of an image of this size, where ``side`` is what the model is for; with hires before it that of the
    small image, unless what is started from takes its place. Steps are numbered through.

    Raises:
        InputError: for a size or an option that hires cannot do.
    """
    if options.hires is None:
        return [resolve_sampling(options, distilled, size, has_init=has_init, inpaints=inpaints)]
    begun = small_size(size, options.hires)
    if min(size) < options.hires * MIN_SIDE:
        raise InputError(
            f"hires {options.hires:g} would begin {size[1]} x {size[0]} with a side below {MIN_SIDE} pixels; give a "
            "larger image, or less of it"
        )
    tiling = tiles_of(options, size, side)
    if tiling is not None and options.reuse is not None:
        raise InputError(
            f"reuse has the keys and values of one pass, and hires computes {size[1]} x {size[0]} in {len(tiling)} "
            "tiles; leave reuse out"
        )
    strength = HIRES_STRENGTH if options.hires_strength is None else options.hires_strength
    again = replace(options, strength=strength)
    # A tile has the noise levels of its own size: those of many tokens leave next to nothing of what is begun from.
    seen = size if tiling is None else tiling.size
    large = resolve_sampling(again, distilled, seen, has_init=True, inpaints=False)
    large = replace(large, size=size, tiling=tiling, small=begun)
    if has_init:
        return [large]
    if math.prod(begun) > MAX_PIXELS:
        raise InputError(
            f"hires {options.hires:g} would begin {size[1]} x {size[0]} with {math.prod(begun) / 2**20:.2f} "
            f"megapixels, and at most {MAX_PIXELS // 2**20} are generated in one; give more of it, as --hires 2"
        )
    small = resolve_sampling(options, distilled, begun, has_init=False, inpaints=False)
    steps = [replace(step, index=k) for k, step in enumerate(large.steps, small.num_steps + 1)]
    return [small, replace(large, steps=steps)]


def small_size(size: Size, scale: float) -> Size:
    """The size (height, width) that hires begins an image with."""
    return _multiple(size[0] / scale), _multiple(size[1] / scale)


def tiles_of(options: GenerationOptions, size: Size, side: int) -> Tiling | None:
    """The tiles in which hires computes an image of this size, where ``side`` is what the model is for; None for the
    undivided image. Beyond the size of which FLUX.2 is meant to generate images there is no other way.
    """
    if options.hires is None or (options.hires_tile is None and math.prod(size) <= MAX_PIXELS):
        return None
    return divide(size, options.hires_tile or side)


def workload_of(
    options: GenerationOptions, size: Size, length: int, references: Sequence[Size], side: int, *, has_kv_cache: bool
) -> Workload:
    """What memory and time of an image of this size depend on, where ``side`` is what the model is for.

    Args:
        length: tokens of the prompt.
        references: (height, width) of what the transformer sees.
    """
    tiling = tiles_of(options, size, side)
    small = None if tiling is None or options.hires is None else small_size(size, options.hires)
    caches_steps, regions = options.step_cache is not None, len(options.region)
    return Workload(*size, length, references, has_kv_cache, caches_steps, options.reuse, tiling, small, regions)


def resolve_sampling(
    options: GenerationOptions, distilled: bool, size: Size, *, has_init: bool, inpaints: bool
) -> Sampling:
    """The one place that knows how many steps there are, where they start, and in which of them CFG applies."""
    guidance = default_guidance(distilled) if options.guidance is None else options.guidance
    if distilled and not options.force_guidance:
        guidance = min(guidance, 1.0)
    sigmas = image_sigmas(options, distilled, size)
    num_steps, start, strength = len(sigmas) - 1, 0, options.strength
    if has_init:
        strength = default_strength(num_steps, inpaints=inpaints) if strength is None else strength
        start = start_step(strength, num_steps)
    steps = plan_steps(sigmas, start, uses_cfg=guidance > 1, interval=options.guidance_interval)
    return Sampling(size, guidance, strength, num_steps, steps)


def warn_of_sampling(options: GenerationOptions, guidance: float, steps: Sequence[StepPlan], name: str) -> None:
    """Warn of options that have no effect, or hardly the one that is hoped for."""
    if options.guidance is not None and options.guidance > max(guidance, 1):
        warn(
            f"{name} is distilled and generates without CFG; guidance {options.guidance:g} is ignored "
            "(force_guidance, --force-guidance apply it)"
        )
    elif options.negative_prompt and guidance <= 1:
        warn(f"{name} generates without CFG here, which a negative prompt needs; negative_prompt is ignored")
    if guidance > 1 and not any(step.is_guided for step in steps):
        sigmas = ", ".join(f"{step.sigma:.3g}" for step in steps[:8])
        warn(f"no step's noise level (sigma) is in guidance_interval: {sigmas}; CFG is not applied")
    if options.step_cache and len(steps) < TENS_OF_STEPS:
        warn(
            f"step_cache is for tens of steps: of {len(steps)}, each differs much from the one before, so that few are "
            "reused, or the image becomes another"
        )
