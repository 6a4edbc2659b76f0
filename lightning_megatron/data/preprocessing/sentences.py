"""Cutting documents into sentences, for BERT's sentence order."""

import re
from collections.abc import Callable
from typing import Literal

from lightning_megatron.errors import DataError

Splitter = Literal["auto", "nltk", "simple"]
Split = Callable[[str], list[str]]

# After . ! or ?, closing quotes or brackets included, and before something that can begin a sentence.
_BOUNDARY = re.compile(r"""(?<=[.!?])(["'\u2019\u201d)\]]*)\s+(?=["'\u2018\u201c(\[]*[A-Z0-9\u00c0-\u00de])|\n\s*\n""")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|Fig|fig|No|approx|Jr|Sr|Inc|Ltd)\.$")


def simple_sentences(text: str) -> list[str]:
    """Split at sentence ends and blank lines, but not after initials and common English abbreviations."""
    sentences: list[str] = []
    begin = 0
    for match in _BOUNDARY.finditer(text):
        sentence = text[begin : match.start()] + (match.group(1) or "")
        if match.group(1) is not None and _ABBREVIATION.search(sentence):
            continue
        sentences.append(sentence.strip())
        begin = match.end()
    sentences.append(text[begin:].strip())
    return [sentence for sentence in sentences if sentence]


def sentence_splitter(kind: Splitter = "auto", language: str = "english") -> Split:
    """A function from a text to its sentences.

    ``"nltk"`` is the punkt model of nltk, ``"simple"`` :func:`simple_sentences`, and ``"auto"`` the first where it is
    installed with its data, else the second.

    Raises:
        DataError: ``"nltk"`` without nltk or without the data of this language.
    """
    if kind == "simple":
        return simple_sentences
    try:
        from nltk.tokenize import PunktTokenizer

        split: Split = PunktTokenizer(language).tokenize
        return split
    except (ImportError, LookupError) as error:
        if kind == "auto":
            return simple_sentences
        raise DataError(
            f"sentence splitter 'nltk' needs nltk and its data punkt_tab/{language} ({type(error).__name__}): "
            "pip install nltk, python -m nltk.downloader punkt_tab; or use the splitter 'simple'."
        ) from error
