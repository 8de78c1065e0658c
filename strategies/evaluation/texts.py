"""How near written answers come to those that were given: exact match, F1, BLEU and ROUGE, for Latin and Chinese writing.

Chinese puts no space between words. BLEU is taken with sacrebleu's ``zh`` tokenizer as soon as one given answer holds a Chinese
character; for F1 and ROUGE each Chinese or Japanese character is a token of its own, and so is each run of other letters
and digits, in lower case. On plain English these are the tokens of rouge-score itself.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from strategies.evaluation.figures import Array, Figure, mean

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ALONE = f"{_HAN}\u3040-\u30ff"  # and kana
_TOKEN = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_CHINESE = re.compile(f"[{_HAN}]")
_ORDER = 4
FIGURES = ("exact-match", "f1", "bleu", "rouge-1", "rouge-2", "rouge-l")


def figures(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, Figure]:
    """Figures of answers beside those that were given.

    Args:
        answers: As written.
        wanted: One for each.

    Returns:
        - ``exact-match``: share of the same text, spaces at both ends aside.
        - ``f1``: mean over rows of the F1 of the two bags of tokens (as in SQuAD, arXiv:1606.05250, section 6.1, which leaves
          articles out).
        - ``bleu``: 0 to 100, of the whole corpus as sacrebleu has it (n-grams up to 4, brevity penalty, exponential
          smoothing).
        - ``rouge-1``, ``rouge-2``, ``rouge-l``: mean over rows of rouge-score's F-measure.
    """
    pairs = list(zip(answers, wanted, strict=True))
    return {
        "exact-match": mean(float(answer.strip() == other.strip()) for answer, other in pairs),
        "f1": mean(_f1(tokens(answer), tokens(other)) for answer, other in pairs),
        "bleu": _bleu(answers, wanted),
        **_rouge(pairs),
    }


def tokens(text: str) -> list[str]:
    """What F1 and ROUGE compare."""
    return _TOKEN.findall(text.lower())


def bleu_tokenizer(wanted: Sequence[str]) -> str:
    """The tokenizer that sacrebleu takes for these answers: ``zh`` or ``13a``."""
    return "zh" if any(_CHINESE.search(text) for text in wanted) else "13a"


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else float(not found and not wanted)


def _bleu(answers: Sequence[str], wanted: Sequence[str]) -> Figure:
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize=bleu_tokenizer(wanted), effective_order=True)  # else each sentence would warn; counts are the same
    told = [bleu.sentence_score(answer, [other]) for answer, other in zip(answers, wanted, strict=True)]

    def one(sums: Array) -> float:
        found, given, *rest = (round(number) for number in sums)
        settings: dict[str, Any] = {"smooth_method": "exp", "effective_order": False, "max_ngram_order": _ORDER}
        return float(BLEU.compute_bleu(rest[:_ORDER], rest[_ORDER:], found, given, **settings).score)

    rows = np.array([[each.sys_len, each.ref_len, *each.counts, *each.totals] for each in told], np.float64)
    return Figure(rows, lambda sums: np.apply_along_axis(one, -1, sums))


def _rouge(pairs: Sequence[tuple[str, str]]) -> Mapping[str, Figure]:
    from rouge_score.rouge_scorer import RougeScorer

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    names = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
    scorer = RougeScorer(list(names.values()), tokenizer=Tokenizer())
    told = [scorer.score(other, answer) for answer, other in pairs]
    return {name: mean(each[theirs].fmeasure for each in told) for name, theirs in names.items()}
