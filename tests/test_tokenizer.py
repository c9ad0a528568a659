"""Prompt to token ids."""

import shutil
import warnings

import pytest

from flux2_mlx import CheckpointError, Qwen3Tokenizer
from tests import tiny
from tests.prompts import FOX, LONG

TABLE = {
    FOX: [144, 872, 198, 64, 2518, 38835, 145, 198, 144, 77091, 198, 167, 271, 168, 271],
    "": [144, 872, 198, 145, 198, 144, 77091, 198, 167, 271, 168, 271],
    " ": [144, 872, 198, 220, 145, 198, 144, 77091, 198, 167, 271, 168, 271],
}
SPECIAL = {144: 151644, 145: 151645, 167: 151667, 168: 151668}


@pytest.fixture(scope="module")
def tokenizer():
    return Qwen3Tokenizer(tiny.TOKENIZER)


@pytest.mark.parametrize("prompt", TABLE)
def test_ids_of_the_genuine_vocabulary(tokenizer, prompt):
    expected = [SPECIAL.get(i, i) for i in TABLE[prompt]]
    ids, mask = tokenizer([prompt])
    assert ids.shape == mask.shape == (1, 512)
    assert ids[0].tolist() == expected + [151643] * (512 - len(expected))
    assert mask[0].tolist() == [1] * len(expected) + [0] * (512 - len(expected))


@pytest.fixture
def folder(tmp_path):
    shutil.copyfile(tiny.TOKENIZER / "tokenizer.json", tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "length"),
    [(None, 512), ("{}", 512), ('{"model_max_length": 64}', 64), ('{"model_max_length": 1e30}', 512)],
)
def test_a_tokenizer_may_take_less_than_512_tokens(folder, config, length):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    tokenizer = Qwen3Tokenizer(folder)
    assert tokenizer.default_length == length
    assert tokenizer([FOX])[0].shape == (1, length)


@pytest.mark.parametrize("config", ["no JSON", '{"model_max_length": "64"}', '{"model_max_length": 0}'])
def test_a_broken_tokenizer_config_is_refused(folder, config):
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Qwen3Tokenizer(folder)


def test_prompts_are_padded_each_on_its_own(tokenizer):
    ids, mask = tokenizer([FOX, ""], 20)
    assert ids.shape == (2, 20)
    assert mask.sum(axis=1).tolist() == [15, 12]


def test_a_long_prompt_warns_with_what_was_cut(tokenizer):
    with pytest.warns(UserWarning, match=r"has 684 tokens and max_sequence_length is 512; cut off: ' \w+.*ridge'"):
        _, mask = tokenizer([LONG])
    assert mask.sum().item() == 512


def test_cutting_the_suffix_alone_warns_too(tokenizer):
    with pytest.warns(UserWarning, match="has 15 tokens and max_sequence_length is 10; the end-of-turn tokens"):
        tokenizer([FOX], 10)


def test_a_prompt_that_fits_does_not_warn(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([FOX], 15)


def test_a_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used as a tokenizer"):
        Qwen3Tokenizer(tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"not Qwen3's tokenizer: it has no <\|endoftext\|>"):
        Qwen3Tokenizer(tmp_path)
