"""Nothing is computed that nobody reads: NaN in one row, or one column, of what a linear layer gives must reach the
result.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest

from flux2_mlx import FluxKlein, FluxKleinParams, Qwen3Config, Qwen3TextEncoder
from flux2_mlx.device import parts_of, weights_of
from flux2_mlx.models.kv_cache import FrozenKV, KVReader
from flux2_mlx.models.layers import Linear
from flux2_mlx.sampling.latents import image_ids, text_ids

LENGTH, IMAGE, REFERENCE = 5, (32, 48), (48, 48)  # the text's tokens, and sizes in pixels
TOKENS, OTHERS = 6, 9  # of these
PARAMS = FluxKleinParams(
    in_channels=8, hidden_size=32, num_heads=2, head_dim=16, depth=1, depth_single=2, txt_embed_dim=12,
    axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip
TEXT = Qwen3Config(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    tapped_layers=(1, 2),
)  # fmt: skip
BATCH = 7  # one sample for each place of the NaN


class Probe:
    """Puts NaN into what one call of a layer gives, of each sample in another row or column.

    Attributes:
        target: which call of a run.
        calls: (name of the layer, places of the NaN) of each.
    """

    def __init__(self, monkeypatch, module):
        self.names = {id(part): name for name, part in parts_of(module).items()}
        self.target, self.calls = None, []
        for kind in (Linear, nn.Linear):
            for method in ("__call__", "outputs"):
                if method in vars(kind):
                    monkeypatch.setattr(kind, method, self.poisoned(vars(kind)[method]))

    def poisoned(self, compute):
        def call(layer, *arguments):
            out = compute(layer, *arguments)
            rows, columns = out.size // out.shape[-1] // BATCH, out.shape[-1]
            places = [("row", k) for k in (0, rows // 4, rows // 2, 3 * rows // 4, rows - 1)]
            places += [("column", k) for k in (0, columns - 1)]
            if len(self.calls) == self.target:
                masks = [
                    (mx.arange(rows) == k)[:, None] if axis == "row" else (mx.arange(columns) == k)[None]
                    for axis, k in places
                ]
                bad = mx.stack([mx.broadcast_to(mask, (rows, columns)) for mask in masks])
                out = mx.where(bad.reshape(out.shape), mx.nan, out)
            self.calls.append((self.names[id(layer)], places))
            return out

        return call

    def unread(self, run):
        """What is computed and reaches no result: [(layer, row or column, which)]. A call of which nothing does is not
        among it, for MLX never computes that.
        """
        assert mx.isfinite(run()).all().item()
        count, found = len(self.calls), []
        for self.target in range(count):
            self.calls = []
            finite = mx.isfinite(run()).reshape(BATCH, -1).all(axis=1).tolist()
            name, places = self.calls[self.target]
            if not all(finite):
                found += [(name, *place) for place, is_unread in zip(places, finite, strict=True) if is_unread]
        return count, found


def randomized(module):
    mx.random.seed(0)
    module.load_weights([(name, 0.3 * mx.random.normal(array.shape)) for name, array in weights_of(module).items()])
    return module


@pytest.mark.parametrize("kind", ["text to image", "edit", "text", "references", "keys and values"])
def test_all_of_a_step_is_read(monkeypatch, kind):
    """Of text to image, of an edit, and of edits beside what an earlier step kept, or a model that keeps them."""
    model = randomized(FluxKlein(PARAMS))
    img, txt = mx.random.normal((BATCH, TOKENS + OTHERS, 8)), mx.random.normal((BATCH, LENGTH, 12))
    alone = kind in ("text to image", "keys and values")
    ids = [image_ids(*IMAGE)] if alone else [image_ids(*IMAGE), image_ids(*REFERENCE, reference=0)]
    rope = model.compute_rope(text_ids(LENGTH), mx.concatenate(ids, axis=1), PARAMS.axes_dims_rope)
    sigmas = mx.full((BATCH,), 0.5)

    def step(img, txt, cos, sin, kv=None):
        return model.forward_with_rope(img, txt, sigmas, cos, sin, image_tokens=TOKENS, kv=kv)

    def run():
        if kind == "edit":
            return step(img, txt, *rope)
        if kind == "keys and values":
            kept = [KVReader((mx.ones((1, 2, OTHERS, 16)),) * 2)] * PARAMS.blocks
            return step(img[:, :TOKENS], txt, *rope, kept)
        if kind == "text to image":
            return step(img[:, :TOKENS], txt, *rope)
        frozen = FrozenKV(kind, TOKENS)
        first = step(*frozen.begin_step(img, txt, *rope, PARAMS.blocks))
        return mx.concatenate([first, step(*frozen.begin_step(img, txt, *rope, PARAMS.blocks))], axis=1)

    count, unread = Probe(monkeypatch, model).unread(run)
    assert count >= 25
    assert not unread


def test_all_of_the_text_encoder_is_read(monkeypatch):
    """A prompt of three tokens and two of padding, whose rows the transformer reads."""
    model = randomized(Qwen3TextEncoder(TEXT))
    ids, mask = mx.array([[3, 4, 5, 0, 0]] * BATCH), mx.array([[1, 1, 1, 0, 0]] * BATCH)
    count, unread = Probe(monkeypatch, model).unread(lambda: model(ids, mask))
    assert count == 3 * 7
    assert not unread
