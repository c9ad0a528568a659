"""The FLUX.2 autoencoder: 32 latent channels at an eighth of the picture's size, NHWC throughout.

Features: residual blocks of GroupNorm, SiLU and 3x3 convolutions; one attention layer in the middle, its queries
taken in chunks so that the scores stay small; quantization convolutions on both sides; the statistics that normalize
the packed latents. The small decoder is the same code with fewer channels.

Large pictures are computed in strips of rows, which come from above and below with the row that a convolution needs
beyond them; a norm's statistics are those of all strips together, so the result is that of the undivided picture. Each
layer gives its input's strips up one by one as it makes its own, so that about one activation is in memory at a time.

Reference: diffusers' AutoencoderKLFlux2. Attribute names are its checkpoint keys, with ``quant_conv`` inside Encoder
and ``post_quant_conv`` inside Decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .config import AutoEncoderConfig

# Attention scores that exist at one time, in elements: 256 MB in float32.
SCORES_AT_ONCE = 2**26
# Of a strip, in a layer's wider side. A picture with no more than that is one strip.
STRIP_BYTES = 2**25
STRIP_ROWS = 16  # or a multiple of it: so many can be halved three times

Strips = list[mx.array]  # of (B, rows, W, C), from top to bottom; whoever is given them empties the list


def in_strips(strips: Strips, channels: int, scale: int = 1) -> Strips:
    """The same picture, strips divided that are too large for a layer with so many channels, whose output is ``scale``
    times as high and wide.
    """
    batch, _, width, own = strips[0].shape
    row = batch * width * max(own, scale * scale * channels) * strips[0].itemsize
    rows = max(1, STRIP_BYTES // row // STRIP_ROWS) * STRIP_ROWS
    divided = [strip[:, top : top + rows] for strip in strips for top in range(0, strip.shape[1], rows)]
    strips.clear()
    return divided


def joined(strips: Strips) -> mx.array:
    x = strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)
    strips.clear()
    return x


def computed(strip: mx.array, now: bool) -> mx.array:
    """The strip itself, in memory if it is one of several, so that what it was made of can go."""
    if now:
        mx.eval(strip)
    return strip


def with_neighbours(
    strips: Strips, prepare: Callable[[mx.array], mx.array], above: int = 1
) -> Iterator[tuple[mx.array, mx.array]]:
    """Of each strip, (it prepared, with the row below and, unless ``above`` is 0, the row above; itself). Beyond the
    picture rows are zero.
    """
    edge = mx.zeros_like(strips[0][:, :1])
    before = [edge] * above
    while strips:
        x = strips.pop(0)
        ready = prepare(x)
        below = prepare(strips[0][:, :1]) if strips else edge
        yield mx.concatenate([*before, ready, below], axis=1), x
        before = [ready[:, -1:]] * above


# Compiled functions are one kernel each, or what lies between would be written out in float32.


@partial(mx.compile, shapeless=True)
def squares(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32) - mean)


@partial(mx.compile, shapeless=True)
def scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


class GroupNorm(nn.Module):
    """GroupNorm over a whole picture that is in strips, computed in float32, and SiLU after it unless that is left."""

    def __init__(self, config: AutoEncoderConfig, channels: int, silu: bool = True):
        super().__init__()
        self.groups, self.eps = config.norm_num_groups, config.norm_eps
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self._apply = scaled_silu if silu else scaled

    def over(self, strips: Sequence[mx.array]) -> Callable[[mx.array], mx.array]:
        """The norm with the statistics of these strips, as a function of a strip or of rows of one."""
        rows = sum(strip.shape[1] for strip in strips)
        shares, means, variances = [], [], []  # of each strip and channel
        for x in strips:
            shares.append(x.shape[1] / rows)
            means.append(x.astype(mx.float32).mean((1, 2), keepdims=True))
            variances.append(squares(x, means[-1]).mean((1, 2), keepdims=True))
            if len(strips) > 1:  # or each would keep its strip in float32
                mx.eval(means[-1], variances[-1])

        def pooled(values: Sequence[mx.array]) -> mx.array:
            """The mean over strips and the channels of a group, (B, 1, 1, C)."""
            whole = sum((share * value for share, value in zip(shares, values, strict=True)), mx.array(0.0))
            grouped = whole.reshape(len(whole), 1, 1, self.groups, -1)
            return mx.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(whole.shape)

        mean = pooled(means)
        # Chan, Golub and LeVeque: within strips and channels, and between them.
        variance = pooled([v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)])
        scale = mx.rsqrt(variance + self.eps) * self.weight
        shift = self.bias - mean * scale
        return lambda x: self._apply(x, scale, shift)


def convolve(conv: nn.Conv2d, rows: mx.array) -> mx.array:
    """A 3x3 convolution of rows that have their neighbours above and below: (B, R + 2, W, C) to (B, R, W, C)."""
    return mx.conv2d(rows, conv.weight, stride=1, padding=(0, 1)) + conv.bias


def convolved(strips: Strips, conv: nn.Conv2d, prepare: Callable[[mx.array], mx.array] = lambda x: x) -> Strips:
    """prepare, then a 3x3 convolution with a padding of 1."""
    many = len(strips) > 1
    return [computed(convolve(conv, rows), many) for rows, _ in with_neighbours(strips, prepare)]


class ResnetBlock(nn.Module):
    """Strips with channels_in to strips with channels_out."""

    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = GroupNorm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(config, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def __call__(self, strips: Strips) -> Strips:
        strips = in_strips(strips, self.conv1.weight.shape[0])
        many = len(strips) > 1
        norm1 = self.norm1.over(strips)
        inner, beside = [], []
        for rows, x in with_neighbours(strips, norm1):
            inner.append(computed(convolve(self.conv1, rows), many))
            beside.append(computed(self.conv_shortcut(x), many) if "conv_shortcut" in self else x)
        norm2 = self.norm2.over(inner)
        return [computed(convolve(self.conv2, rows) + beside.pop(0), many) for rows, _ in with_neighbours(inner, norm2)]


class Attention(nn.Module):
    """One head over all positions, which are few here: strips to a single strip of the same channels."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.group_norm = GroupNorm(config, channels, silu=False)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, strips: Strips) -> Strips:
        x = joined(strips)
        batch, height, width, channels = x.shape
        h = self.group_norm.over([x])(x).reshape(batch, 1, height * width, channels)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        rows = max(1, SCORES_AT_ONCE // (batch * height * width))
        many = rows < height * width
        chunks = [
            computed(mx.fast.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, scale=channels**-0.5), many)
            for i in range(0, height * width, rows)
        ]
        return [x + self.to_out[0](mx.concatenate(chunks, axis=2)).reshape(x.shape)]


class MidBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.resnets = [ResnetBlock(config, channels, channels) for _ in range(2)]
        self.attentions = [Attention(config, channels)]

    def __call__(self, strips: Strips) -> Strips:
        return self.resnets[1](self.attentions[0](self.resnets[0](strips)))


class Downsample(nn.Module):
    """Halve height and width; one row and one column of zeros are added below and at the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, strips: Strips) -> Strips:
        strips = in_strips(strips, self.conv.weight.shape[0])
        many = len(strips) > 1
        return [
            computed(self.conv(mx.pad(rows, [(0, 0), (0, 0), (0, 1), (0, 0)])), many)
            for rows, _ in with_neighbours(strips, lambda x: x, above=0)
        ]


class Upsample(nn.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, strips: Strips) -> Strips:
        strips = in_strips(strips, self.conv.weight.shape[0], scale=2)
        many = len(strips) > 1
        doubled = (doubled_rows(rows)[:, 1:-1] for rows, _ in with_neighbours(strips, lambda x: x))
        return [computed(convolve(self.conv, rows), many) for rows in doubled]


def doubled_rows(x: mx.array) -> mx.array:
    """Each pixel of (B, R, W, C) as 2 x 2: (B, 2R, 2W, C)."""
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

    def __call__(self, strips: Strips) -> Strips:
        for resnet in self.resnets:
            strips = resnet(strips)
        return self.downsamplers[0](strips) if "downsamplers" in self else strips


class UpBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int, last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out)
            for i in range(config.layers_per_block + 1)
        ]
        if not last:
            self.upsamplers = [Upsample(channels_out)]

    def __call__(self, strips: Strips) -> Strips:
        for resnet in self.resnets:
            strips = resnet(strips)
        return self.upsamplers[0](strips) if "upsamplers" in self else strips


class Encoder(nn.Module):
    """Picture to latent: (B, H, W, 3) in -1..1 to the mean of the posterior, (B, H/8, W/8, latent_channels)."""

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

    def __call__(self, image: mx.array) -> mx.array:
        image = image.astype(self.conv_in.weight.dtype)
        strips = convolved(in_strips([image], self.conv_in.weight.shape[0]), self.conv_in)
        for block in self.down_blocks:
            strips = block(strips)
        strips = self.mid_block(strips)
        norm = self.conv_norm_out.over(strips)
        x = joined(convolved(strips, self.conv_out, norm))
        mean, _log_variance = mx.split(self.quant_conv(x), 2, axis=-1)
        return mean


class Decoder(nn.Module):
    """Latent to picture: z (B, h, w, latent_channels) to (B, 8h, 8w, 3), about -1..1.

    z is what the encoder gives; latents of the sampler are brought there by LatentStatistics.denormalize first.
    """

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

    def __call__(self, z: mx.array) -> mx.array:
        z = self.post_quant_conv(z.astype(self.conv_in.weight.dtype))
        strips = self.mid_block(convolved(in_strips([z], self.conv_in.weight.shape[0]), self.conv_in))
        for block in self.up_blocks:
            strips = block(strips)
        norm = self.conv_norm_out.over(strips)
        return joined(convolved(strips, self.conv_out, norm))


class LatentStatistics(nn.Module):
    """Mean and variance of the packed latents (a BatchNorm without weights), in float32.

    The transformer works on normalized packed latents: encoded pictures are normalized before it, and its result is
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

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.bn = LatentStatistics(config)
