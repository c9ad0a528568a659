"""The language model against transformers' Qwen3ForCausalLM: token by token, its samplers, its chat template."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flux2_mlx import Quantization, Qwen3Config, Qwen3Tokenizer
from flux2_mlx.checkpoints.load import assign
from flux2_mlx.checkpoints.sanitize import sanitize
from flux2_mlx.conditioning.enhance import EDIT, GENERATE
from flux2_mlx.families import LANGUAGE_MODEL
from flux2_mlx.models.language_model import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Qwen3LanguageModel,
    generate,
    most_likely,
    sampled,
    sampling_probabilities,
)
from flux2_mlx.models.qwen3 import TokenCache
from tests import tiny
from tests.parity.compare import EXACT, relative_error, to_mlx
from tests.prompts import PROMPTS

VOCAB, LAYERS = 600, 6


def ported(model, dtype=mx.float32, spec=None) -> Qwen3LanguageModel:
    weights = sanitize(LANGUAGE_MODEL, {name: to_mlx(value) for name, value in model.state_dict().items()})
    is_tied = model.config.tie_word_embeddings
    if is_tied:
        del weights["lm_head.weight"]  # which torch has twice
    config = Qwen3Config.from_config(model.config.to_dict() | {"num_hidden_layers": 36})  # as an image needs
    return assign(Qwen3LanguageModel(config, LAYERS, is_tied=is_tied), weights, dtype, "test", spec)


def written(model, ids, stop=(), most=12, choose=most_likely):
    return list(generate(model, ids, stop, most, choose))


@pytest.fixture(scope="module", params=[(96, 4, 1, True), (128, 4, 2, False)], ids=["4b", "9b"])
def model(request):
    """As 4B, whose heads are wider than the hidden size and whose head is the embedding's table, and as 9B, which has a
    head of its own.
    """
    torch.manual_seed(5)
    *sizes, is_tied = request.param
    made = tiny.text_encoder(*sizes, layers=LAYERS, vocab=VOCAB, tied=is_tied)
    with torch.no_grad():  # so that what is likely depends on more than the token before
        made.model.embed_tokens.weight.mul_(0.3)
    return made


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_tokens_are_those_of_transformers(model, length):
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([ids]), eos_token_id=None, **options)[0, length:].tolist()
    ours = ported(model)
    assert written(ours, ids) == expected
    assert len(set(expected)) > 1
    # It ends before the first token of those that end it, as transformers after it.
    ends = [expected[5], VOCAB - 1]
    ended = model.generate(torch.tensor([ids]), eos_token_id=ends, **options)[0, length:].tolist()
    assert written(ours, ids, ends) == ended[: next(k for k, token in enumerate(ended) if token in ends)]


def test_logits_are_those_of_transformers_however_tokens_come(model):
    ids = np.random.default_rng(9).integers(0, VOCAB, 9).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    ours = ported(model)
    caches = [TokenCache(len(ids)) for _ in range(LAYERS)]
    assert relative_error(ours(mx.array([ids[:5]]), caches)[0], expected[4]) <= EXACT
    for k in range(5, len(ids)):
        assert relative_error(ours(mx.array([ids[k : k + 1]]), caches)[0], expected[k]) <= EXACT


def test_half_precision_stays_close(model):
    ids = list(range(20))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    logits = ported(model, mx.bfloat16)(mx.array([ids]), [TokenCache(20) for _ in range(LAYERS)])[0]
    assert logits.dtype == mx.bfloat16
    assert relative_error(logits, expected) <= 8e-2


def test_a_packed_head_is_its_unpacked_table(model):
    """The head of a packed model, the table's or its own, against MLX's dequantize."""
    packed = ported(model, spec=Quantization(8, 32))
    layer = packed.model.embed_tokens if "lm_head" not in packed else packed.lm_head
    head = layer.as_linear if "lm_head" not in packed else layer
    spec, x = layer.spec, mx.random.normal((1, model.config.hidden_size))
    how = {"group_size": spec.group_size, "bits": spec.bits}
    dense = mx.dequantize(layer.weight, layer.scales, layer.biases, **how)
    assert relative_error(head(x), torch.from_numpy(np.array(x) @ np.array(dense).T)) <= EXACT
    ids = list(range(20))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    assert relative_error(packed(mx.array([ids]), [TokenCache(20) for _ in range(LAYERS)])[0], expected) <= 8e-2


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_sampling_is_that_of_transformers(scale):
    """Its warpers of temperature, top-k and top-p, in the order of its generate."""
    logits = np.random.default_rng(3).normal(0, scale, VOCAB).astype(np.float32)
    scores = torch.tensor(logits)[None]
    for warper in (TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)):
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    tokens, probabilities = sampling_probabilities(logits.astype(np.float64))
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())
    assert np.allclose(probabilities, expected[tokens], atol=1e-6)


def test_a_seed_draws_the_same_tokens(model):
    ours, ids = ported(model), list(range(9))
    first = written(ours, ids, most=5, choose=sampled(7))
    assert written(ours, ids, most=5, choose=sampled(7)) == first
    assert any(written(ours, ids, most=5, choose=sampled(seed)) != first for seed in (8, 9, 10))
    logits = mx.array(np.random.default_rng(1).normal(0, 3, VOCAB))
    tokens, probabilities = sampling_probabilities(np.array(logits, np.float64))
    draw = sampled(0)
    drawn = [draw(logits) for _ in range(2000)]
    shares = np.array([drawn.count(token) / 2000 for token in tokens])
    assert set(drawn) <= set(tokens.tolist())
    assert np.abs(shares - probabilities).max() < 4 * np.sqrt(0.25 / 2000)


@pytest.mark.parametrize("system", [GENERATE, EDIT], ids=["generate", "edit"])
@pytest.mark.parametrize("name", PROMPTS)
def test_chats_are_those_of_the_template(name, system):
    reference = AutoTokenizer.from_pretrained(tiny.TOKENIZER)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": PROMPTS[name]}]
    text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert Qwen3Tokenizer(tiny.TOKENIZER).chat_ids(system, PROMPTS[name]) == reference(text)["input_ids"]


def test_text_is_that_of_transformers():
    reference, ours = AutoTokenizer.from_pretrained(tiny.TOKENIZER), Qwen3Tokenizer(tiny.TOKENIZER)
    ids = reference(" ".join([PROMPTS["fox"], PROMPTS["accents"], PROMPTS["emoji"]]))["input_ids"]
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ours.decode([*ids, *ours.ends]) == ours.decode(ids)
    assert set(ours.ends) == {151645, 151643}  # of Qwen3's generation_config.json
