"""Text that every machine has, as numbers: Python's own reference, and what its standard library says of itself."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rlsched.envs.stored import SOURCE_MODULES

PART = 10  # every tenth paragraph validates
UNKNOWN = "<unk>"
MIN_WORDS = 8  # in a docstring that is text


@cache
def reference() -> tuple[str, str]:
    """The Python reference as its `help` shows it, each paragraph once: to train on, and to validate."""
    from pydoc_data.topics import topics

    return _split("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"))


@cache
def docstrings() -> tuple[str, str]:
    """The docstrings of the standard library's modules, each paragraph once: to train on, and to validate.

    Without the modules whose source code policies train on.
    """
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem not in SOURCE_MODULES:
            found += _documented(ast.parse(path.read_bytes()))
    return _split(p for text in found for p in text.split("\n\n") if p.isascii() and len(p.split()) >= MIN_WORDS)


def characters(training: str, validation: str) -> tuple[Tensor, Tensor, int]:
    """Characters as numbers: to train on, and to validate; and how many there are."""
    number = {character: i for i, character in enumerate(sorted({*training, *validation}))}
    return torch.tensor([number[c] for c in training]), torch.tensor([number[c] for c in validation]), len(number)


def words(training: str, validation: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Words and signs as numbers below `vocabulary`, rarer ones being `UNKNOWN`: to train on, and to validate."""
    training_words, validation_words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in (training, validation)]
    known = [UNKNOWN, *(word for word, _ in Counter(training_words).most_common(vocabulary - 1))]
    number = {word: i for i, word in enumerate(known)}
    numbers = [torch.tensor([number.get(w, 0) for w in words]) for words in (training_words, validation_words)]
    return numbers[0], numbers[1]


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _documented(child)


def _split(paragraphs: Iterable[str]) -> tuple[str, str]:
    once = list(dict.fromkeys(paragraphs))
    validation = once[::PART]
    del once[::PART]
    return "\n\n".join(once), "\n\n".join(validation)
