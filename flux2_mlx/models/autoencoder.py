"""The FLUX.2 autoencoder: 32 latent channels at an eighth of the image's size, NHWC throughout.

Features: residual blocks of GroupNorm, SiLU and 3x3 convolutions; one attention layer in the middle, its queries
taken in chunks so that the scores stay small; quantization convolutions on both sides; the statistics that normalize
the packed latents. The small decoder is the same code with fewer channels.

Large images are computed in tiles, some rows of full width each, with a halo: the rows above and below that a
convolution needs. A norm's statistics are those of all tiles together, so the result is that of the undivided image.
Each layer gives its input's tiles up one by one as it makes its own, so that about one activation is in memory at a
time.

Reference: diffusers' AutoencoderKLFlux2. Attribute names are its checkpoint keys, with ``quant_conv`` inside Encoder
and ``post_quant_conv`` inside Decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .config import AutoEncoderConfig
from .layers import random_state_kept

# Attention scores that exist at one time, in elements: 256 MB in float32.
SCORES_AT_ONCE = 2**26
# Largest tile, in bytes, of the wider of a layer's input and output. A smaller image is one tile.
TILE_BYTES = 2**25
# The same where a GPU has memory to spare: a convolution of it is 155 GFLOP, beside which handing it over is nothing.
MOST_TILE_BYTES = 2**27
TILE_ROWS = 16  # heights of tiles are multiples of it, so that they can be halved three times
# Parts of a tile that one kernel adds up, so that an eighth of it is written in float32 and not all of it. MLX fuses to
# a depth of 11, which 16 parts would pass.
PARTS = 8

# (B, rows, W, C) each, from top to bottom. A function that is given tiles empties the list: held by the caller's frame,
# they would all stay in memory until it returns.
Tiles = list[mx.array]


def tile(tiles: Tiles, most: int, channels: int, scale: int = 1) -> Tiles:
    """Divide tiles that with a layer's output, of so many channels and ``scale`` times the height and width, have more
    than ``most`` bytes.
    """
    batch, _, width, channels_in = tiles[0].shape
    row = batch * width * max(channels_in, scale * scale * channels) * tiles[0].itemsize
    rows = max(1, most // row // TILE_ROWS) * TILE_ROWS
    divided = [part[:, top : top + rows] for part in tiles for top in range(0, part.shape[1], rows)]
    tiles.clear()
    return divided


def concat(tiles: Tiles) -> mx.array:
    x = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
    tiles.clear()
    return x


class Turns:
    """Has tiles computed one after another, so that what each was computed from can be freed. Each is begun before the
    one before it is waited for: MLX always has work, and two tiles at most are at work.

    Args:
        many: whether there are several tiles; a single one is left lazy.
    """

    def __init__(self, many: bool):
        self.many = many
        self._before: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.many:
            mx.async_eval(x)
            if self._before is not None:
                mx.eval(self._before)
            self._before = x
        return x


def with_halo(
    tiles: Tiles, prepare: Callable[[mx.array], mx.array], above: int = 1
) -> Iterator[tuple[mx.array, mx.array]]:
    """For each tile (B, R, W, C) its prepared form with one row more below and ``above`` (0 or 1) rows more above,
    (B, above + R + 1, W, C), and the tile itself. Rows beyond the image are zero, as a convolution's padding is.
    """
    edge = mx.zeros_like(tiles[0][:, :1])
    before = [edge] * above
    while tiles:
        x = tiles.pop(0)
        ready = prepare(x)
        below = prepare(tiles[0][:, :1]) if tiles else edge
        yield mx.concatenate([*before, ready, below], axis=1), x
        before = [ready[:, -1:]] * above


# Each of the compiled functions is one kernel; uncompiled, its intermediates would be written out in float32.


@partial(mx.compile, shapeless=True)
def add(*parts: mx.array) -> mx.array:
    """The sum in float32 of parts of one shape."""
    return in_pairs([part.astype(mx.float32) for part in parts])


@partial(mx.compile, shapeless=True)
def add_squared_deviations(mean: mx.array, *parts: mx.array) -> mx.array:
    """The sum in float32 of (part - mean)^2."""
    return in_pairs([mx.square(part.astype(mx.float32) - mean) for part in parts])


def in_pairs(terms: list[mx.array]) -> mx.array:
    """The sum of 1, 2, 4 or 8 terms."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


@partial(mx.compile, shapeless=True)
def add_residual(x: mx.array, residual: mx.array, bias: mx.array) -> mx.array:
    return (x.astype(mx.float32) + residual.astype(mx.float32) + bias.astype(mx.float32)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


class GroupNorm(nn.Module):
    """GroupNorm over an image that is in tiles, computed in float32, followed by SiLU unless ``silu`` is false."""

    def __init__(self, config: AutoEncoderConfig, channels: int, silu: bool = True):
        super().__init__()
        self.groups, self.eps = config.norm_num_groups, config.norm_eps
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self._apply = scale_shift_silu if silu else scale_shift

    def over(self, tiles: Sequence[mx.array], bias: mx.array | None = None) -> Callable[[mx.array], mx.array]:
        """The norm with the statistics of these tiles, a function that is applied to each, or to rows of one.

        Args:
            bias: (C,), what is still to be added to the tiles; the norm of the sum is given.
        """
        pixels = mx.array([x.shape[1] * x.shape[2] for x in tiles], mx.float32).reshape(1, -1, 1, 1)
        means: list[mx.array] = []  # per tile, (B, 1, 1, C)
        squares: list[mx.array] = []
        for x in tiles:
            if squares:  # side by side, the sums of all tiles would be in memory together
                x = mx.depends(x, squares[-1])
            parts = in_parts(x)
            means.append(add(*parts).sum((1, 2), keepdims=True) / (x.shape[1] * x.shape[2]))
            squares.append(add_squared_deviations(means[-1], *parts).sum((1, 2), keepdims=True))

        def pooled(values: mx.array) -> mx.array:
            """The mean of (B, tiles, 1, C) over tiles and over the channels of a group, (B, 1, 1, C)."""
            whole = (values * (pixels / pixels.sum())).sum(1, keepdims=True)
            grouped = whole.reshape(len(whole), 1, 1, self.groups, -1)
            return mx.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(whole.shape)

        own = mx.concatenate(means, axis=1)
        if bias is not None:
            own = own + bias
        mean = pooled(own)
        # Chan, Golub and LeVeque: the variance within tiles and channels, and that of their means.
        variance = pooled(mx.concatenate(squares, axis=1) / pixels + (own - mean) ** 2)
        scale = mx.rsqrt(variance + self.eps) * self.weight
        shift = self.bias - (mean if bias is None else mean - bias) * scale
        return lambda x: self._apply(x, scale, shift)


def in_parts(x: mx.array) -> list[mx.array]:
    """(B, R, W, C) in PARTS parts (B, 1, R * W / PARTS, C), or in fewer that are alike."""
    batch, rows, width, channels = x.shape
    parts = math.gcd(PARTS, rows * width)
    whole = x.reshape(batch, parts, -1, channels)
    return [whole[:, k : k + 1] for k in range(parts)]


def conv3x3(conv: nn.Conv2d, rows: mx.array) -> mx.array:
    """A 3x3 convolution of rows with their halo, without its bias: (B, R + 2, W, C) to (B, R, W, channels_out)."""
    return mx.conv2d(rows, conv.weight, stride=1, padding=(0, 1))


def conv3x3_tiles(tiles: Tiles, conv: nn.Conv2d, prepare: Callable[[mx.array], mx.array] = lambda x: x) -> Tiles:
    """prepare, then a 3x3 convolution with a padding of 1, of all tiles."""
    turn = Turns(len(tiles) > 1)
    return [turn(conv3x3(conv, rows) + conv.bias) for rows, _ in with_halo(tiles, prepare)]


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, beside a shortcut: tiles of channels_in to tiles of channels_out."""

    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = GroupNorm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(config, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        tiles = tile(tiles, most, self.conv1.weight.shape[0])
        turn = Turns(len(tiles) > 1)
        norm1 = self.norm1.over(tiles)
        inner, shortcut, bias = [], [], self.conv2.bias
        for rows, x in with_halo(tiles, norm1):
            inner.append(turn(conv3x3(self.conv1, rows)))
            shortcut.append(turn(mx.conv2d(x, self.conv_shortcut.weight)) if "conv_shortcut" in self else x)
        if "conv_shortcut" in self:
            bias = bias.astype(mx.float32) + self.conv_shortcut.bias
        norm2 = self.norm2.over(inner, self.conv1.bias)
        return [
            turn(add_residual(conv3x3(self.conv2, rows), shortcut.pop(0), bias)) for rows, _ in with_halo(inner, norm2)
        ]


class Attention(nn.Module):
    """One head over all positions, which are few at this depth: tiles to a single tile of the same channels."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.group_norm = GroupNorm(config, channels, silu=False)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, tiles: Tiles) -> Tiles:
        x = concat(tiles)
        batch, height, width, channels = x.shape
        h = self.group_norm.over([x])(x).reshape(batch, 1, height * width, channels)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        rows = max(1, SCORES_AT_ONCE // (batch * height * width))
        turn = Turns(rows < height * width)
        chunks = [
            turn(mx.fast.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, scale=channels**-0.5))
            for i in range(0, height * width, rows)
        ]
        return [x + self.to_out[0](mx.concatenate(chunks, axis=2)).reshape(x.shape)]


class MidBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.resnets = [ResnetBlock(config, channels, channels) for _ in range(2)]
        self.attentions = [Attention(config, channels)]

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        return self.resnets[1](self.attentions[0](self.resnets[0](tiles, most)), most)


class Downsample(nn.Module):
    """Halve height and width by a convolution with zeros below and at the right only, as diffusers pads."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        tiles = tile(tiles, most, self.conv.weight.shape[0])
        turn = Turns(len(tiles) > 1)
        return [
            turn(self.conv(mx.pad(rows, [(0, 0), (0, 0), (0, 1), (0, 0)])))
            for rows, _ in with_halo(tiles, lambda x: x, above=0)
        ]


class Upsample(nn.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        tiles = tile(tiles, most, self.conv.weight.shape[0], scale=2)
        turn = Turns(len(tiles) > 1)
        doubled = (nearest_2x(rows)[:, 1:-1] for rows, _ in with_halo(tiles, lambda x: x))
        return [turn(conv3x3(self.conv, rows) + self.conv.bias) for rows in doubled]


def nearest_2x(x: mx.array) -> mx.array:
    """Nearest-neighbour upsampling: (B, R, W, C) to (B, 2R, 2W, C)."""
    batch, rows, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, width, 2, channels))
    return x.reshape(batch, 2 * rows, 2 * width, channels)


class DownBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int, last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out)
            for i in range(config.layers_per_block)
        ]
        if not last:
            self.downsamplers = [Downsample(channels_out)]

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        for resnet in self.resnets:
            tiles = resnet(tiles, most)
        return self.downsamplers[0](tiles, most) if "downsamplers" in self else tiles


class UpBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int, last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out)
            for i in range(config.layers_per_block + 1)
        ]
        if not last:
            self.upsamplers = [Upsample(channels_out)]

    def __call__(self, tiles: Tiles, most: int) -> Tiles:
        for resnet in self.resnets:
            tiles = resnet(tiles, most)
        return self.upsamplers[0](tiles, most) if "upsamplers" in self else tiles


class Half(nn.Module):
    """The encoder or the decoder. Its ``load_weights`` takes the whole autoencoder's too, as sanitize_vae_weights gives
    them, and of these its own.
    """

    def load_weights(
        self, file_or_weights: str | Mapping[str, mx.array] | Sequence[tuple[str, mx.array]], strict: bool = True
    ) -> nn.Module:
        if isinstance(file_or_weights, str):
            return super().load_weights(file_or_weights, strict)
        weights = dict(file_or_weights)
        prefix = f"{type(self).__name__.lower()}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        return super().load_weights(list((own or weights).items()), strict)


class Encoder(Half):
    """Image to latent: (B, H, W, 3) in -1..1 to the mean of the posterior, (B, H/8, W/8, latent_channels). Tiles have
    at most ``tile_bytes``, TILE_BYTES unless given.
    """

    @random_state_kept()
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        channels = config.block_out_channels
        moments = 2 * config.latent_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = [
            DownBlock(config, channels[max(i - 1, 0)], channels[i], last=i == len(channels) - 1)
            for i in range(len(channels))
        ]
        self.mid_block = MidBlock(config, channels[-1])
        self.conv_norm_out = GroupNorm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], moments, 3, padding=1)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def __call__(self, image: mx.array, tile_bytes: int | None = None) -> mx.array:
        most, image = tile_bytes or TILE_BYTES, image.astype(self.conv_in.weight.dtype)
        tiles = conv3x3_tiles(tile([image], most, self.conv_in.weight.shape[0]), self.conv_in)
        for block in self.down_blocks:
            tiles = block(tiles, most)
        tiles = self.mid_block(tiles, most)
        norm = self.conv_norm_out.over(tiles)
        x = concat(conv3x3_tiles(tiles, self.conv_out, norm))
        mean, _log_variance = mx.split(self.quant_conv(x), 2, axis=-1)
        return mean


class Decoder(Half):
    """Latent to image: z (B, h, w, latent_channels) to (B, 8h, 8w, 3), about -1..1.

    z is what the encoder gives; latents of the sampler are brought there by LatentStatistics.denormalize first. Tiles
    have at most ``tile_bytes``, TILE_BYTES unless given.
    """

    @random_state_kept()
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        channels = config.decoder_channels[::-1]
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(config, channels[0])
        self.up_blocks = [
            UpBlock(config, channels[max(i - 1, 0)], channels[i], last=i == len(channels) - 1)
            for i in range(len(channels))
        ]
        self.conv_norm_out = GroupNorm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array, tile_bytes: int | None = None) -> mx.array:
        most, z = tile_bytes or TILE_BYTES, self.post_quant_conv(z.astype(self.conv_in.weight.dtype))
        tiles = conv3x3_tiles(tile([z], most, self.conv_in.weight.shape[0]), self.conv_in)
        tiles = self.mid_block(tiles, most)
        for block in self.up_blocks:
            tiles = block(tiles, most)
        norm = self.conv_norm_out.over(tiles)
        return concat(conv3x3_tiles(tiles, self.conv_out, norm))


class LatentStatistics(nn.Module):
    """Mean and variance of the packed latents (a BatchNorm without weights), in float32.

    The transformer works on normalized packed latents: encoded images are normalized before it, and its result is
    denormalized after the last step. Noise is neither.
    """

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.eps = config.batch_norm_eps
        self.running_mean = mx.zeros((config.packed_channels,))
        self.running_var = mx.ones((config.packed_channels,))

    def normalize(self, x: mx.array) -> mx.array:
        """(x - mean) / sqrt(var + eps) over the last axis: (..., packed_channels), in float32."""
        return (x.astype(mx.float32) - self.running_mean) * mx.rsqrt(self.running_var + self.eps)

    def denormalize(self, x: mx.array) -> mx.array:
        """The inverse: x * sqrt(var + eps) + mean, in float32."""
        return x.astype(mx.float32) * mx.sqrt(self.running_var + self.eps) + self.running_mean


class AutoEncoder(nn.Module):
    """Encoder, decoder and latent statistics of one checkpoint."""

    @random_state_kept()
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.bn = LatentStatistics(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that encoder and decoder compute in."""
        return self.decoder.conv_in.weight.dtype
