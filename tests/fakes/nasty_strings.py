"""Text that tokenizers get wrong."""

from __future__ import annotations

import random

PLAIN = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  two before,  two between,   three, trailing  ",
    "tabs\tand\t\tmore\t \t mixed",
    "lines\nand\n\nblank\n\n\nlines\r\nwindows\r\rmac\n",
    " \n \n\n  \n",
    "\u00a0no-break\u2003em\u2028line\u3000wide",
    "can't won't I'll they've we're I'd he's I'm CAN'T WON'T 'tis rock'n'roll ''s",
    "def f(x, *args, **kw):\n    return {k: v for k, v in kw.items()}  # done\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c[i]; } /* … */",
    '<html><body class="x">&amp;</body></html>',
    "SELECT * FROM t WHERE a IS NOT NULL;",
    "naïve café résumé Straße Ærø Łódź",
    "e\u0301 cafe\u0301 decomposed, \u212b\u2126 compatibility, ﬁ ligature",
    "中文字符和日本語のテキストと한국어 텍스트",
    "Привет, мир! Γειά σου Κόσμε! שלום עולם مرحبا بالعالم",
    "हिन्दी में पाठ ภาษาไทย",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️",
    "∑∫√∞ ≤≥≠ αβγ → ⇒",
    "zero\u200bwidth\u200djoiner\ufeffbom",
    "control\x00\x01\x1b[31mred\x7f",
    "\ufffd replacement",
    "!!!???...---___===###@@@$$$%%%^^^&&&***",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|>text<|im_end|>text",
    "a<|im_start|> b <|im_end|>c <|im_start|",
    "<file_sep><repo_name>x/y<gh_stars>",
    "< |im_start|> <|IM_START|>",
]
"""Without a single numeric character."""

NUMERIC = [
    "⅓ ² ³ Ⅳ",
    "1",
    "1234567890",
    " 12 345  678   9",
    "a1b22c333 4d",
    "3.14159 1,000,000 1e-5 0xFF 1_000",
    "2024-01-31 12:34:56 +49 (0)30 123456",
    "x = 10\ny  = 20\n\n  30",
    "①②③ ½ Ⅻ x² H₂O ४५६ ٣٤ 五",
    "\t1\n2\r\n3",
    "v1.2.3-rc4 IPv6 2001:db8::1",
    "It's 5 o'clock, 100% sure, #1, $9.99",
]


def random_strings(count: int, seed: int = 0, digits: bool = True) -> list[str]:
    """Random mixtures of letters of many scripts, white space, punctuation, emoji and (if wanted) digits."""
    alphabet = list("abcdefgeeettAZ'\"_-.,!?(){}<>|/\\") + [" "] * 12 + ["\n", "\t", "\r\n", "\u00a0", "\u3000"]
    alphabet += [
        "'s",
        "'ll",
        "<|im_start|>",
        "é",
        "e\u0301",
        "ß",
        "中",
        "の",
        "한",
        "ш",
        "ع",
        "😀",
        "👩‍💻",
        "\u200d",
        "\x00",
    ]
    alphabet += [" the", " and", "ing", "tion", "return", "    "]
    if digits:
        alphabet += [*"0123456789", "①", "½", "²", "४", " 12", "  3"]
    source = random.Random(seed)
    return ["".join(source.choices(alphabet, k=source.randint(1, 60))) for _ in range(count)]
