"""In which language a text is: py3langid (Lui and Baldwin 2012, "langid.py"), whose model comes with it and needs no network.

Sums, code and single words have no language that could be told. Of what is short or in doubt nothing is said.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

_LEAST_LETTERS = 12
_LEAST_SURE = 0.5
_READ_CHARACTERS = 1000
_OF = {"wuu": "zh", "yue": "zh"}  # languages of a macrolanguage (ISO 639-3), which lists of names and places are taken for


def language(text: str) -> str | None:
    """ISO 639-1 code; None where it cannot be told."""
    text = text[:_READ_CHARACTERS]
    letters = accumulate(2 if letter > "\u2e7f" else 1 for letter in text if letter.isalpha())
    if not any(count >= _LEAST_LETTERS for count in letters):
        return None
    found, sure = _identifier().classify(text)
    return _OF.get(found, str(found)) if sure >= _LEAST_SURE else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
