"""The FLUX.2 autoencoder: 32 latent channels at an eighth of the picture's size, NHWC throughout.

Features: residual blocks of GroupNorm, SiLU and 3x3 convolutions; one attention layer in the middle, its queries
taken in chunks so that the scores stay small; quantization convolutions on both sides; the statistics that normalize
the packed latents. The small decoder is the same code with fewer channels.

Reference: diffusers' AutoencoderKLFlux2. Attribute names are its checkpoint keys, with ``quant_conv`` inside Encoder
and ``post_quant_conv`` inside Decoder.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import AutoEncoderConfig

# Attention scores that exist at one time, in elements: 256 MB in float32.
SCORES_AT_ONCE = 2**26


def group_norm(config: AutoEncoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps, pytorch_compatible=True)


class ResnetBlock(nn.Module):
    """(B, H, W, channels_in) to (B, H, W, channels_out)."""

    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(config, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class Attention(nn.Module):
    """One head over all positions: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.group_norm = group_norm(config, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        h = self.group_norm(x).reshape(batch, 1, height * width, channels)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        rows = max(1, SCORES_AT_ONCE // (batch * height * width))
        chunks = [
            mx.fast.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, scale=channels**-0.5)
            for i in range(0, height * width, rows)
        ]
        return x + self.to_out[0](mx.concatenate(chunks, axis=2)).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.resnets = [ResnetBlock(config, channels, channels) for _ in range(2)]
        self.attentions = [Attention(config, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve height and width; one row and one column of zeros are added below and at the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return self.conv(x.reshape(batch, 2 * height, 2 * width, channels))


class DownBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int, last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out)
            for i in range(config.layers_per_block)
        ]
        if not last:
            self.downsamplers = [Downsample(channels_out)]

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    def __init__(self, config: AutoEncoderConfig, channels_in: int, channels_out: int, last: bool):
        super().__init__()
        self.resnets = [
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out)
            for i in range(config.layers_per_block + 1)
        ]
        if not last:
            self.upsamplers = [Upsample(channels_out)]

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


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
        self.conv_norm_out = group_norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], moments, 3, padding=1)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def __call__(self, image: mx.array) -> mx.array:
        x = self.conv_in(image.astype(self.conv_in.weight.dtype))
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(nn.silu(self.conv_norm_out(self.mid_block(x))))
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
        self.conv_norm_out = group_norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.conv_in(self.post_quant_conv(z.astype(self.conv_in.weight.dtype)))
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


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
