"""The text encoder against transformers' Qwen3ForCausalLM, and the tokenizer against Qwen2Tokenizer."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from flux2_mlx import Qwen3Config, Qwen3TextEncoder, Qwen3Tokenizer, sanitize_qwen3_weights
from flux2_mlx.checkpoints.load import assign
from tests import tiny
from tests.parity.compare import EXACT, relative_error, to_mlx, to_torch
from tests.prompts import PROMPTS


def ported(model, dtype=mx.float32) -> Qwen3TextEncoder:
    weights = sanitize_qwen3_weights({name: to_mlx(value) for name, value in model.state_dict().items()})
    return assign(Qwen3TextEncoder(Qwen3Config.from_config(model.config.to_dict())), weights, dtype, "test")


def theirs(model, ids, mask) -> torch.Tensor:
    with torch.no_grad():
        states = model(to_torch(ids).long(), attention_mask=to_torch(mask), output_hidden_states=True).hidden_states
    return torch.cat([states[k] for k in (9, 18, 27)], dim=-1)


@pytest.fixture(scope="module", params=["4b", "9b"])
def model(request):
    torch.manual_seed(4)
    layout = tiny.LAYOUTS[request.param]
    return tiny.text_encoder(layout["text_hidden"], layout["text_heads"], layout["text_kv_heads"], vocab=1000)


@pytest.fixture(scope="module")
def padded():
    """Two prompts of 15 and 33 tokens in 40: real rows and padding rows."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 1000, (2, 40)), np.zeros((2, 40), np.int32)
    mask[0, :15], mask[1, :33] = 1, 1
    ids[mask == 0] = 643
    return mx.array(ids.astype(np.int32)), mx.array(mask)


def test_embeddings_equal_transformers(model, padded):
    ours, expected = ported(model)(*padded), theirs(model, *padded)
    assert relative_error(ours, expected) <= EXACT
    for row in (0, 14, 15, 39):  # the last real row and padding rows of the first prompt, each on its own
        assert relative_error(ours[0, row], expected[0, row]) <= EXACT


def test_a_prompt_alone_is_its_row(model, padded):
    """Though it has fewer keys: its own, and not those of the longest."""
    ids, mask = padded
    for row in (0, 1):
        alone = ported(model)(ids[row : row + 1], mask[row : row + 1])
        assert relative_error(alone, theirs(model, ids, mask)[row : row + 1]) <= EXACT


def test_a_mask_without_a_prompt_gives_numbers(model, padded):
    ids, mask = padded
    assert mx.isfinite(ported(model)(ids, mx.zeros_like(mask))).all().item()


def test_no_mask_means_no_padding(model, padded):
    ids, _ = padded
    assert relative_error(ported(model)(ids), theirs(model, ids, mx.ones_like(ids))) <= EXACT


def test_bfloat16_stays_close_to_float32(model, padded):
    ours = ported(model, mx.bfloat16)(*padded)
    assert ours.dtype == mx.bfloat16
    assert relative_error(ours, theirs(model, *padded)) <= 5e-2


@pytest.mark.parametrize("length", [512, 64, 13])
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_token_ids_equal_transformers(name, length):
    reference = AutoTokenizer.from_pretrained(tiny.TOKENIZER)
    text = reference.apply_chat_template(
        [{"role": "user", "content": PROMPTS[name]}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    expected = reference(text, padding="max_length", truncation=True, max_length=length)
    ids, mask = Qwen3Tokenizer(tiny.TOKENIZER)([PROMPTS[name]], length)
    assert ids[0].tolist() == expected["input_ids"]
    assert mask[0].tolist() == expected["attention_mask"]
