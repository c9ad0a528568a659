"""Cut the genuine Qwen3 tokenizer down to what the tests' prompts need, every id unchanged.

    python tests/data/prune_tokenizer.py FULL_TOKENIZER_FOLDER

Byte-pair encoding applies, again and again, the known merge of lowest rank. Leaving out merges that a text never
uses cannot change which one is lowest at any moment, so that text's ids stay those of the full tokenizer; the script
checks it. Other texts fall apart into shorter pieces.
"""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.prompts import PROMPTS

TARGET = Path(__file__).parent / "qwen3-tokenizer"
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def used_merges(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    parts, used = list(word), set()
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(pairs)
        used.add((parts[i], parts[i + 1]))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return used


def main(source: Path) -> None:
    full = Tokenizer.from_file(str(source / "tokenizer.json"))
    content = json.loads((source / "tokenizer.json").read_text())
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in content["model"]["merges"]
    ]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    texts = [TEMPLATE.format(prompt) for prompt in PROMPTS.values()]
    words = set()
    for text in texts:
        words |= {word for word, _ in full.pre_tokenizer.pre_tokenize_str(full.normalizer.normalize_str(text))}
        for special in content["added_tokens"]:
            text = text.replace(special["content"], "\0")
        for piece in text.split("\0"):
            words |= {word for word, _ in full.pre_tokenizer.pre_tokenize_str(full.normalizer.normalize_str(piece))}
    used = set().union(*(used_merges(word, ranks) for word in words))
    kept = sorted(used, key=ranks.__getitem__)
    vocab = content["model"]["vocab"]
    tokens = {token for token in vocab if len(token) == 1} | {a + b for a, b in kept}
    pruned = {token: vocab[token] for token in sorted(tokens, key=vocab.__getitem__)}
    # Added tokens get the ids of the vocabulary, if they are there, and the next free ones otherwise.
    pruned |= {special["content"]: special["id"] for special in content["added_tokens"]}
    content["model"]["vocab"] = pruned
    content["model"]["merges"] = [list(merge) for merge in kept]
    TARGET.mkdir(exist_ok=True)
    (TARGET / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, TARGET / name)
    small = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    for text in texts:
        assert small.encode(text).ids == full.encode(text).ids, text
    print(f"{len(pruned)} of {len(vocab) + len(content['added_tokens'])} tokens, {len(kept)} of {len(merges)} merges")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
