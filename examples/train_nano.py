"""Make the checkpoint of nano again, from a seed: python -m examples.train_nano FOLDER

Four stages, each trained with torch on the world of examples/nano_world.py, and each resumed where it was left when
the command is given again: the tokenizer, the autoencoder, the text encoder (by telling from a caption what stands
where) and the transformer (by rectified flow on the autoencoder's latents). Sheets of samples appear in FOLDER/sheets,
the finished checkpoint, in the diffusers layout, in FOLDER/nano. Needs the extra "dev".
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.nano_world import (
    COLOURS,
    EDITS,
    HOME,
    PLACES,
    SHAPES,
    SIDES,
    SIZES,
    Scene,
    Task,
    coverage,
    judge,
    random_task,
    render,
)
from flux2_mlx.conditioning.tokenizer import Qwen3Tokenizer
from flux2_mlx.sampling.schedules import flux2_sigmas

QWEN3 = Path(__file__).parents[1] / "tests" / "data" / "qwen3-tokenizer"
SAVE_EVERY = 120  # seconds
AUTOENCODER_STEPS = 2400
TEXT_ENCODER_STEPS = 1000
TEXT_ENCODER_BATCH = 40
TRANSFORMER_STEPS = 10500
BATCH_EVERY = 8  # steps
POOL_START, POOL_SIZE = 64, 400  # batches
COPIES = 160  # of the transformer's steps, the first ones, which learn to copy a reference
EARLY = 0.3  # of the transformer's steps, all at home
AWAY = 0.7  # of the batches after those, of any size
CHANGED = 8  # times as much as the rest of an edit's picture weighs what is changed
OWN = 0.82  # of the transformer's steps, before those from where its own steps lead
VOCABULARY = 640  # tokens, the special ones among them
TEXT_LENGTH = 48  # tokens that a prompt is padded to
LONG_TEXT = 512  # diffusers' default, which works too
PADS = 8  # rows of padding that the text encoder is trained on
WIDTH = 128


def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, 1024, dtype=dtype, device=device)
        (a @ a).sum().item()
        start = time.perf_counter()
        for _ in range(5):
            product = a @ a
        product.sum().item()
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def cosine(done: float) -> float:
    """From 1 to 0, slowly at both ends."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """From 1 to 0."""
    return 1 - done


class Training:
    """What the stages share: the folder, the seed, the device, and the loop."""

    def __init__(self, folder: Path, seed: int, speed: float):
        self.folder, self.seed, self.speed = folder, seed, speed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = fastest_dtype(self.device)
        (folder / "sheets").mkdir(parents=True, exist_ok=True)

    def numbers(self, *key: object) -> random.Random:
        """Numbers of their own for each key, so that a resumed stage goes on with the same ones."""
        return random.Random(repr((self.seed, *key)))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def fit(
        self,
        name: str,
        module: nn.Module,
        loss_of: Callable[[int, random.Random], Tensor],
        *,
        steps: int,
        rate: float,
        muon_rate: float = 0.0,
        fall: Callable[[float], float] = cosine,
        sheet: Callable[[Path], None] | None = None,
    ) -> None:
        """Train the module with AdamW, and with a muon_rate the matrices of its blocks with Muon, which orthogonalizes
        each update. The learning rates warm up, then fall to zero.
        """
        steps = max(2, round(steps * self.speed))
        module.to(self.device).train()
        named = dict(module.named_parameters())
        matrices = [
            name for name, p in named.items() if muon_rate and re.search(r"blocks|layers", name) and p.ndim == 2
        ]
        others = [p for name, p in named.items() if name not in matrices]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    [named[name] for name in matrices], lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
                )
            )
        path = self.folder / f"{name}.pt"
        done = 0
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            done = state["step"]
        saved, mean = time.monotonic(), None
        with tqdm(total=steps, initial=done, desc=name, smoothing=0.01) as bar:
            for step in range(done, steps):
                fraction = min(1, (step + 1) / 100) * fall(step / steps)
                for optimizer, peak in zip(optimizers, (rate, muon_rate), strict=False):
                    for group in optimizer.param_groups:
                        group["lr"] = fraction * peak
                rng = self.numbers(name, step)
                torch.manual_seed(rng.randrange(2**63))
                with self.autocast():
                    loss = loss_of(step, rng)
                module.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                value = loss.item()
                mean = value if mean is None else 0.98 * mean + 0.02 * value
                bar.update()
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
                    kept = [optimizer.state_dict() for optimizer in optimizers]
                    torch.save(
                        {"module": module.state_dict(), "optimizers": kept, "step": step + 1}, path.with_suffix(".tmp")
                    )
                    path.with_suffix(".tmp").replace(path)
                    if sheet is not None:
                        module.eval()
                        sheet(self.folder / "sheets" / f"{name}-{step + 1:06}.png")
                        module.train()
                    saved = time.monotonic()
        module.eval().requires_grad_(False)
        for tensor in (*module.parameters(), *module.buffers()):  # as the file will hold them
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) as (B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def array_of(batch: Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in -1..1 as (B, H, W, 3) uint8."""
    return ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(path: Path, batch: Tensor, columns: int) -> None:
    """Pictures (B, 3, H, W) in -1..1 as one picture, row by row."""
    array = array_of(batch)
    rows = [np.concatenate(list(array[i : i + columns]), axis=1) for i in range(0, len(array), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


# ------------------------------------------------------------------------------------------------ autoencoder


def train_autoencoder(training: Training) -> AutoencoderKLFlux2:
    """Pixels to 32 channels at an eighth of the size and back; mean squared error with a little of the KL divergence,
    which keeps the latents smooth enough to be drawn by the transformer.
    """
    torch.manual_seed(training.seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=HOME[0]
    )
    steps = AUTOENCODER_STEPS

    def crop(rng: random.Random, side: int) -> np.ndarray:
        """A part of a scene at its usual scale, around one of its things."""
        scene = random_task(rng).scene
        full = rng.choice((96, 128, 128, 160)) if side < 96 else side
        picture = render(scene, full, full)
        y, x = (c * full - side / 2 + rng.uniform(-0.4, 0.4) * side for c in rng.choice(scene.things).centre)
        top, left = (round(min(max(c, 0), full - side)) for c in (y, x))
        return picture[top : top + side, left : left + side]

    def loss_of(step: int, rng: random.Random) -> Tensor:
        side, count = (64, 32) if step < 0.8 * steps * training.speed else (128, 8)
        batch = pixels([crop(rng, side) for _ in range(count)]).to(training.device)
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        error = functional.mse_loss(vae.decode(latents).sample.float(), batch)
        return error + 3e-4 * posterior.kl().mean() / latents[0].numel()

    def sheet(path: Path) -> None:
        rng = training.numbers("sheet")
        batch = pixels([render(random_task(rng).scene, *HOME) for _ in range(8)]).to(training.device)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample
        error = functional.mse_loss(decoded.clamp(-1, 1), batch).item()
        tqdm.write(f"{path.name}: PSNR {10 * math.log10(4 / error):.1f} dB")
        save_sheet(path, torch.cat([batch, decoded]), 8)

    training.fit("autoencoder", vae, loss_of, steps=steps, rate=2e-3, sheet=sheet)
    return vae


# ------------------------------------------------------------------------------------------------ text


def train_tokenizer(training: Training) -> Qwen3Tokenizer:
    """Byte-level BPE on captions, with the normalization, splitting, special tokens and chat template of Qwen3."""
    folder = training.folder / "nano" / "tokenizer"
    content = json.loads((QWEN3 / "tokenizer.json").read_text())
    specials = content["added_tokens"]
    bpe = Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    bpe.model = BPE()
    rng = training.numbers("captions")
    captions = [random_task(rng, kind).caption for kind in KINDS for _ in range(2000)]
    words = ["user\n", "assistant\n", "\n\n", *captions]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(specials),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    bpe.train_from_iterator([*words[:3] * 1000, *words], trainer)
    model = json.loads(bpe.to_str())["model"]
    content["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}
    for number, special in enumerate(specials, start=len(model["vocab"])):
        special["id"] = number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    config = json.loads((QWEN3 / "tokenizer_config.json").read_text())
    config["model_max_length"] = TEXT_LENGTH
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(QWEN3 / "chat_template.jinja", folder / "chat_template.jinja")
    return Qwen3Tokenizer(folder)


# What a row of padding tells of a caption, as groups of classes; the empty class stands for nothing.
KINDS = ("draw", "combine", *EDITS)
THING = ("shape", "colour", "size", "place")
GROUPS = {
    "kind": KINDS,
    "ground": ("", *COLOURS),
    "order": ("", "first", "second"),
    "shape": ("", *SHAPES),
    "colour": ("", *COLOURS),
    "size": ("", *SIZES),
    "place": ("", *PLACES),
}


def meaning(kind: str, task: Task) -> tuple[dict[str, str], dict[str, str]]:
    """What a caption says, in two halves: one thing and the other (or the same, where there is one); of an edit, the
    thing that it names and what becomes of it. Groups that a half leaves out it may tell as it likes.
    """
    caption = task.caption.lower()
    both = {"kind": kind, "ground": task.scene.ground if kind in ("draw", "ground") else "", "order": ""}
    nothing = dict.fromkeys(THING, "")
    if kind == "draw":
        things = sorted(task.scene.things, key=lambda thing: PLACES.index(thing.place))
        first, second = ({what: getattr(thing, what) for what in THING} for thing in (things[0], things[-1]))
        return both | first, both | second
    if kind == "combine":
        both["order"] = "first" if re.search(r"of the first \w+ on", caption) else "second"
        old, new = [task.scene.things[0]], []
    else:
        before = task.references[0].things
        old = [thing for thing in before if thing not in task.scene.things]
        new = [thing for thing in task.scene.things if thing not in before]
    named = nothing
    for thing in old:
        by_colour = f"the {thing.colour} " in caption.replace("gray", "grey")
        named = nothing | {"shape": thing.shape, "colour": thing.colour if by_colour else ""}
    change = dict(nothing)
    for thing in new:
        change |= {w: getattr(thing, w) for w in THING if not old or getattr(thing, w) != getattr(old[0], w)}
    return both | named, both | change


def half(places: Tensor) -> Tensor:
    """Which half of the meaning the rows at these positions tell, 0 or 1: they take turns of about five rows, at a
    frequency of the text encoder's RoPE (the second of a head of 64), so that a row can know its turn.
    """
    return (torch.cos(places * 1e6 ** (-2 / 64)) < 0).long()


def random_kind(rng: random.Random) -> str:
    return rng.choice(("draw",) * 6 + KINDS[1:])


def train_text_encoder(training: Training, tokenizer: Qwen3Tokenizer) -> Qwen3ForCausalLM:
    """28 layers of Qwen3, of which klein reads the outputs of layers 8, 17 and 26: trained so that those outputs, at
    the padding after a caption, tell what it says, some rows of the one thing in it and some of the other.

    Most of what the transformer reads is padding. With rows that tell of one thing each, an image token finds the
    thing that belongs to it by attention; from rows that all tell everything it learns that many times slower. Padding
    sees the caption and not itself, so a few rows of it, at random positions, stand for any length of it.
    """
    torch.manual_seed(training.seed + 1)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=40960,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )
    head = nn.Linear(3 * WIDTH, sum(map(len, GROUPS.values())))

    def loss_of(step: int, rng: random.Random) -> Tensor:
        kinds = [random_kind(rng) for _ in range(TEXT_ENCODER_BATCH)]
        tasks = [random_task(rng, kind) for kind in kinds]
        ids, mask = (torch.from_numpy(np.array(a)).long() for a in tokenizer([t.caption for t in tasks], LONG_TEXT))
        lengths = mask.sum(1, keepdim=True)
        width = int(lengths.max()) + PADS
        places = torch.arange(width).repeat(len(tasks), 1)
        ends = torch.where(torch.rand(len(tasks), 1) < 0.5, TEXT_LENGTH, LONG_TEXT)
        anywhere = (lengths + torch.rand(places.shape) * (ends - lengths)).long()
        places = torch.where(places < lengths, places, anywhere)
        inputs = (a.to(training.device) for a in (ids[:, :width], mask[:, :width], places))
        features = taps(encoder, *inputs)[:, -PADS:]
        logits = head(features).float()  # (B, PADS, classes)
        turns = half(places[:, -PADS:]).tolist()
        halves = [meaning(kind, task) for kind, task in zip(kinds, tasks, strict=True)]
        told = [halves[row][turn] for row, those in enumerate(turns) for turn in those]  # a row of padding each
        total, start, counted = logits.new_zeros(()), 0, 0
        for name, classes in GROUPS.items():
            part = logits[..., start : start + len(classes)].flatten(0, 1)
            start += len(classes)
            rows = [row for row, words in enumerate(told) if name in words]
            goal = torch.tensor([classes.index(told[row][name]) for row in rows], device=training.device)
            total = total + functional.cross_entropy(part[rows], goal, reduction="sum")
            counted += len(rows)
        return total / counted + 1e-3 * features.square().mean()

    training.fit(
        "text_encoder", nn.ModuleList([encoder, head]), loss_of, steps=TEXT_ENCODER_STEPS, rate=3e-3, muon_rate=1e-2
    )
    return encoder


def taps(encoder: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> Tensor:
    """The prompt embeddings that klein reads: (B, L, 3 * WIDTH)."""
    out = encoder.model(ids, attention_mask=mask, position_ids=places, output_hidden_states=True, use_cache=False)
    states = out.hidden_states
    return torch.cat([states[9], states[18], states[27]], dim=-1)


# ------------------------------------------------------------------------------------------------ transformer


@dataclass(frozen=True)
class Batch:
    """Tasks of one size, encoded: latents (B, S, 128), ids (S, 4); of the references the same; text (B, L, 384)."""

    latents: Tensor
    ids: Tensor
    references: Tensor | None
    reference_ids: Tensor | None
    text: Tensor
    sigmas: list[float]  # of four steps at this size
    scenes: list[Scene]
    shown: Tensor  # (B, S, len(SHOWN)), see there
    references_show: Tensor | None


# What a token of a picture shows, as classes: the ground, and of the thing in it the rest, 0 for none.
SHOWN = {"ground": len(COLOURS), "shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1}
SHOWN["place"] = len(PLACES) + 1
TELLING = 0.5  # weight of the loss of telling it


def shown(scene: Scene, height: int, width: int) -> np.ndarray:
    """(S, len(SHOWN)) classes of each token of a picture."""
    rows, columns = height // 16, width // 16
    covered = np.full((rows, columns), 0.02)
    classes = np.zeros((rows, columns, len(SHOWN)), np.int64)
    classes[..., 0] = list(COLOURS).index(scene.ground)
    for thing in scene.things:
        share = coverage(thing, height // 4, width // 4).reshape(rows, 4, columns, 4).mean((1, 3))
        numbers = (
            SHAPES.index(thing.shape),
            list(COLOURS).index(thing.colour),
            list(SIZES).index(thing.size),
            PLACES.index(thing.place),
        )
        classes[share > covered, 1:] = np.array(numbers) + 1
        covered = np.maximum(covered, share)
    return classes.reshape(-1, len(SHOWN))


class Encoders:
    """The two frozen encoders, and what they make of tasks.

    Attributes:
        weights: (128,) how much an error in each latent channel matters: the channel's variance over the variance that
            the autoencoder itself leaves it, 1 on average. Few of 128 channels say something about a flat scene, and a
            transformer that is hardly wider than its tokens must not spend itself on the others.
    """

    def __init__(self, training: Training, vae: AutoencoderKLFlux2, tokenizer: Qwen3Tokenizer, text: Qwen3ForCausalLM):
        self.training, self.vae, self.tokenizer, self.text = training, vae, tokenizer, text
        rng = training.numbers("statistics")
        means, variances = zip(*(self.posterior(self.scenes(16, *HOME, rng)) for _ in range(32)), strict=True)
        vae.bn.running_mean.copy_(torch.cat(means).mean((0, 1)).bfloat16())
        vae.bn.running_var.copy_(torch.cat(means).var((0, 1)).bfloat16())
        weights = vae.bn.running_var / torch.cat(variances).mean((0, 1))
        self.weights = weights / weights.mean()
        self.nothing = {length: self.embed([""], length) for length in (TEXT_LENGTH, LONG_TEXT)}

    @staticmethod
    def scenes(count: int, height: int, width: int, rng: random.Random) -> list[np.ndarray]:
        return [render(random_task(rng).scene, height, width) for _ in range(count)]

    @torch.no_grad()
    def posterior(self, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latents in 2 x 2 patches, not yet normalized: each (B, S, 128)."""
        with self.training.autocast():
            found = self.vae.encode(pixels(pictures).to(self.training.device)).latent_dist
        b, c, h, w = found.mean.shape
        shape = (b, c, h // 2, 2, w // 2, 2)
        mean, variance = (
            z.float().view(shape).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c) for z in (found.mean, found.var)
        )
        return mean, variance

    def tokens(self, pictures: list[np.ndarray]) -> Tensor:
        """Normalized latents (B, S, 128)."""
        bn = self.vae.bn
        return (self.posterior(pictures)[0] - bn.running_mean) / (bn.running_var + bn.eps).sqrt()

    @torch.no_grad()
    def decode(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens to pictures (B, 3, height, width) in about -1..1."""
        bn = self.vae.bn
        z = tokens * (bn.running_var + bn.eps).sqrt() + bn.running_mean
        z = z.view(len(z), height // 16, width // 16, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return self.vae.decode(z.reshape(len(z), -1, height // 8, width // 8)).sample

    @torch.no_grad()
    def embed(self, captions: list[str], length: int) -> Tensor:
        ids, mask = (torch.from_numpy(np.array(a)).long() for a in self.tokenizer(captions, length))
        with self.training.autocast():
            return taps(self.text, ids.to(self.training.device), mask.to(self.training.device)).bfloat16()

    def batch(self, tasks: list[Task], height: int, width: int, length: int, second: tuple[int, int]) -> Batch:
        """Encode tasks with equally many references; the first has the picture's size, the other the one given."""
        references = [[task.references[k] for task in tasks] for k in range(len(tasks[0].references))]
        sizes = ((height, width), second)[: len(references)]
        encoded = [
            self.tokens([render(scene, *size) for scene in scenes])
            for scenes, size in zip(references, sizes, strict=True)
        ]
        ids = [positions(10 + 10 * k, *size) for k, size in enumerate(sizes)]
        device = self.training.device
        told = [
            torch.from_numpy(np.stack([shown(task.references[k], *size) for task in tasks]))
            for k, size in enumerate(sizes)
        ]
        return Batch(
            self.tokens([render(task.scene, height, width) for task in tasks]),
            positions(0, height, width).to(device),
            torch.cat(encoded, dim=1) if encoded else None,
            torch.cat(ids).to(device) if ids else None,
            self.embed([task.caption for task in tasks], length),
            flux2_sigmas(4, height * width // 256),
            [task.scene for task in tasks],
            torch.from_numpy(np.stack([shown(task.scene, height, width) for task in tasks])).to(device),
            torch.cat(told, dim=1).to(device) if told else None,
        )

    def copying(self, batch: Batch) -> Batch:
        """The same pictures as references of themselves, and no words."""
        ids = batch.ids + batch.ids.new_tensor([10, 0, 0, 0])
        text = self.nothing[batch.text.shape[1]].expand(len(batch.latents), -1, -1)
        return replace(batch, references=batch.latents, reference_ids=ids, text=text, references_show=batch.shown)

    def emphasis(self, batch: Batch) -> Tensor:
        """(B, S) or 1: how much an error in each token matters, 1 on average over a picture; more where an edit changes
        the reference than where it keeps it, which is most of the picture, and soon learned.
        """
        if batch.references is None:
            return torch.ones(1, 1, device=batch.latents.device)
        kept = batch.references[:, : batch.latents.shape[1]]
        changed = ((batch.latents - kept).square() * self.weights).mean(-1) > 0.05
        weights = 1 + (CHANGED - 1) * changed.float()
        return weights / weights.mean(1, keepdim=True)

    def random_batch(self, number: int) -> Batch:
        """The batch of this number. The early ones are of the home size, the others of any."""
        rng = self.training.numbers("batch", number)
        height, width = second = HOME
        count, length = 32, TEXT_LENGTH
        if number >= EARLY * self.training.speed * TRANSFORMER_STEPS / BATCH_EVERY:
            sides = SIDES[0], *SIDES, SIDES[-1]  # the ends twice: what is between them is learned from both sides
            if rng.random() < AWAY:
                height, width = rng.choice(sides), rng.choice(sides)
            second = (height, width) if rng.random() < 0.7 else (rng.choice(sides), rng.choice(sides))
            count, length = (32, TEXT_LENGTH) if rng.random() < 0.96 else (8, LONG_TEXT)
            home, here = (h * w // 256 + TEXT_LENGTH for h, w in (HOME, (height, width)))
            count = count * home // here  # about as many tokens in each batch
        share = rng.random()
        if share < 0.4:
            kinds = ["draw"] * count
        elif share < 0.86:
            kinds = [rng.choice(tuple(EDITS)) for _ in range(count)]
        else:
            kinds = ["combine"] * count
        return self.batch([random_task(rng, kind) for kind in kinds], height, width, length, second)


def positions(time: int, height: int, width: int) -> Tensor:
    """(S, 4) RoPE positions of a picture's tokens."""
    rows, columns = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros + time, rows, columns, zeros], dim=-1).view(-1, 4).float()


def velocity(model: Callable[..., tuple[Tensor]], x: Tensor, t: Tensor, batch: Batch, text: Tensor) -> Tensor:
    """The model's velocity (B, S, 128) at x, for noise levels t (B,)."""
    ids = batch.ids if batch.reference_ids is None else torch.cat([batch.ids, batch.reference_ids])
    tokens = x if batch.references is None else torch.cat([x, batch.references], dim=1)
    text_ids = torch.zeros(text.shape[1], 4, device=x.device)
    text_ids[:, 3] = torch.arange(text.shape[1])
    out = model(tokens, text.to(tokens.dtype), t, ids, text_ids, return_dict=False)[0]
    return out[:, : x.shape[1]].float()


def sample(model: Callable[..., tuple[Tensor]], batch: Batch, noise: Tensor, steps: int) -> Tensor:
    """The first of the four steps from noise; four give the picture's tokens."""
    x = noise
    for sigma, following in pairwise(batch.sigmas[: steps + 1]):
        x = x + (following - sigma) * velocity(model, x, x.new_full((len(x),), sigma), batch, batch.text)
    return x


def train_transformer(training: Training, encoders: Encoders) -> Flux2Transformer2DModel:
    """Rectified flow, with most noise levels those of the official four steps, and most of them the highest: there
    nothing but the text tells the picture, so there the reading is learned, and the last step shows what the first
    have read. Towards the end, half of the steps start from where the model's own first steps lead, and learn to get
    from there to the picture: a caption decides its picture, so there is a right answer.

    The first steps copy a reference, which takes a hundred of them, and thousands once drawing is learned; so do later
    ones now and then, since to change a part means to copy the rest.
    """
    torch.manual_seed(training.seed + 2)
    model = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    if training.device == "cpu":  # where the fused attention's backward takes thrice the time of plain products
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        model.set_attention_backend("_native_math")
    pool: dict[int, Batch] = {}
    heads = nn.ModuleList(nn.Linear(WIDTH, sum(SHOWN.values())) for _ in range(2))
    seen: dict[str, Tensor] = {}  # hidden states of the last call
    double, single = model.transformer_blocks[-1], model.single_transformer_blocks[1]
    double.register_forward_hook(lambda *call: seen.update(double=call[-1][1]))
    single.register_forward_hook(lambda *call: seen.update(single=call[-1]))

    def telling(batch: Batch) -> Tensor:
        """Cross-entropy of what the tokens show: the references' after the double blocks, the picture's, which its own
        noise does not tell, after the second single block.
        """
        text, tokens = batch.text.shape[1], batch.latents.shape[1]
        parts = [(heads[0](seen["single"][:, text : text + tokens]), batch.shown)]
        if batch.references_show is not None:
            parts.append((heads[1](seen["double"][:, tokens:]), batch.references_show))
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), classes[..., k].flatten())
            for told, classes in parts
            for k, logits in enumerate(told.float().split(list(SHOWN.values()), dim=-1))
        ]
        return torch.stack(losses).mean()

    def loss_of(step: int, rng: random.Random) -> Tensor:
        made = POOL_START + step // BATCH_EVERY  # the last POOL_SIZE are in use
        number = rng.randrange(max(0, made - POOL_SIZE), made)
        if number not in pool:
            pool[number] = encoders.random_batch(number)
            pool.pop(min(pool) if min(pool) < made - POOL_SIZE else -1, None)
        batch = pool[number]
        if step < COPIES * training.speed or rng.random() < 0.08:
            batch = encoders.copying(batch)
        noise = torch.randn_like(batch.latents)
        count = len(noise)
        own = step > OWN * training.speed * TRANSFORMER_STEPS and rng.random() < 0.5
        if own:
            taken = rng.choice((1, 2, 3, 3))
            with torch.no_grad():
                x = sample(model, batch, noise, taken)
            t = x.new_full((count,), batch.sigmas[taken])
            goal, text = (x - batch.latents) / batch.sigmas[taken], batch.text
        else:
            u = torch.rand(count, device=noise.device)
            official = torch.tensor(rng.choices(batch.sigmas[:4], (4, 2, 2, 2), k=count), device=noise.device)
            t = torch.where(torch.rand_like(u) < 0.85, official, 2 * u / (1 + u))
            x = torch.lerp(batch.latents, noise, t[:, None, None])
            goal = noise - batch.latents
            text = batch.text
            if batch.references is None:  # with the copies one prompt in ten is empty
                empty = torch.rand_like(u) < 0.125
                text = torch.where(empty[:, None, None], encoders.nothing[text.shape[1]], text)
        error = (velocity(model, x, t, batch, text) - goal).square() * encoders.weights
        return (error.mean(-1) * encoders.emphasis(batch)).mean() + TELLING * telling(batch)

    rng = training.numbers("transformer sheet")
    unseen = [
        encoders.batch([random_task(rng, kind, unseen=True) for kind in kinds], *HOME, TEXT_LENGTH, HOME)
        for kinds in (["draw"] * 32, [kind for kind in EDITS for _ in range(6)], ["combine"] * 8)
    ]
    sizes = (96, 96), (112, 160), (192, 144), (192, 192)
    away = [
        encoders.batch([random_task(rng, unseen=True) for _ in range(16)], *size, TEXT_LENGTH, size) for size in sizes
    ]

    def sheet(path: Path) -> None:
        torch.manual_seed(training.seed)
        with torch.no_grad(), training.autocast():
            drawn, drawn_away = (
                [sample(model, batch, torch.randn_like(batch.latents), 4) for batch in batches]
                for batches in (unseen, away)
            )
        pictures = torch.cat([encoders.decode(tokens, *HOME) for tokens in drawn])
        scenes = [scene for batch in unseen for scene in batch.scenes]
        verdicts = [judge(picture, scene) for picture, scene in zip(array_of(pictures), scenes, strict=True)]
        rates = []
        for part in ("ground", "colour", "place", "shape", "clean"):  # of what is drawn from words alone
            right = [ok for verdict in verdicts[:32] for ok in verdict[part]]
            rates.append(f"{part} {100 * sum(right) / len(right):.0f} %")
        edits = [all(all(right) for right in verdict.values()) for verdict in verdicts[32:]]
        parts = [f"{kind} {sum(edits[6 * k : 6 * k + 6])}" for k, kind in enumerate(EDITS)]
        tqdm.write(f"{path.name}: {', '.join(rates)}; {sum(edits)} of {len(edits)} edits: {', '.join(parts)}, ...")
        for tokens, batch, size in zip(drawn_away, away, sizes, strict=True):
            found = zip(array_of(encoders.decode(tokens, *size)), batch.scenes, strict=True)
            right = [ok for picture, scene in found for ok in judge(picture, scene)["colour"]]
            tqdm.write(f"  {size[1]} x {size[0]}: colour {100 * sum(right) / len(right):.0f} %")
        save_sheet(path, pictures, 8)

    training.fit(
        "transformer",
        nn.ModuleList([model, heads]),
        loss_of,
        steps=TRANSFORMER_STEPS,
        rate=4e-3,
        muon_rate=1e-2,
        fall=linear,
        sheet=sheet,
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for what is on the way, and the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=float, default=1.0, help="fraction of the steps, for a trial")
    arguments = parser.parse_args()
    training = Training(arguments.folder, arguments.seed, arguments.speed)
    tokenizer = train_tokenizer(training)
    vae = train_autoencoder(training)
    text_encoder = train_text_encoder(training, tokenizer)
    transformer = train_transformer(training, Encoders(training, vae, tokenizer, text_encoder))
    folder = training.folder / "nano"
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )
    pipe = Flux2KleinPipeline(
        scheduler=scheduler,
        vae=vae.cpu(),
        text_encoder=text_encoder.cpu(),
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=transformer.cpu(),
        is_distilled=True,
    )
    pipe.to(torch.bfloat16).save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
