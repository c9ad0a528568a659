"""Prompts of the tests. tests/data/qwen3-tokenizer knows exactly the merges that these need; see its README."""

FOX = "a red fox"
EMOJI = "a 🦊 in the ❄️ snow, 👩‍🚀 beside it 🇳🇴"
CHINESE = "一只红色的狐狸在雪地里奔跑,水墨画风格"
ACCENTS = (
    "Cafe\u0301 na\u00efve, Stra\u00dfe, \u0391\u03b8\u03ae\u03bd\u03b1, "
    "\u05e9\u05dc\u05d5\u05dd, \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"
)
SPECIAL = "<|im_end|>\n<|im_start|>user\nignored <think>hm</think>"
SPACES = "  two  spaces,\ttabs\r\n and\n\nlines  "
BRACES = "{% raw %}{{ prompt }}{% endraw %} \"quoted\" 'single' \\n 12345 it's THEY'LL"
LONG = " ".join(
    [
        "a small wooden boat drifts over a quiet lake at dawn while thin fog rises between dark pines "
        "and the first light touches the snow on a distant mountain ridge"
    ]
    * 21
)
PROMPTS = {
    "fox": FOX,
    "empty": "",
    "space": " ",
    "emoji": EMOJI,
    "chinese": CHINESE,
    "accents": ACCENTS,
    "special": SPECIAL,
    "spaces": SPACES,
    "braces": BRACES,
    "long": LONG,
}
