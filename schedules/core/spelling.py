"""Suggest the correct spelling of a misspelled name.

If no known name is similar, nothing is suggested, because a wrong suggestion is worse than none.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

__all__ = ["edit_distance", "find_abbreviation", "find_nearest", "suggest_fraction"]

_WARMUP_FRACTIONS = {"warmup_fraction", "warmup_proportion", "warmup_ratio"}
_MIN_ABBREVIATION = 3
"""Minimum number of letters in an abbreviation of a word."""
_WARMUPS = ("warmup_num_steps", "warmup_steps", "lr_warmup_steps", "t_warmup", "warmup")


def find_nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name with the most similar spelling; None if there is no match.

    If no spelling is similar and ``name`` contains an underscore, look for known names that add one
    word before ``name``, such as ``warmup_num_steps`` for ``num_steps``. If there is exactly one
    such name, return it.

    >>> find_nearest("stge", ["stage", "type"])
    'stage'
    >>> find_nearest("num_steps", ["warmup_num_steps", "warmup_type"])
    'warmup_num_steps'
    """
    folded = {other.lower(): other for other in known}
    low = name.lower()
    if low in folded:
        return folded[low]
    most = 1 if len(low) <= 4 else 2 if len(low) <= 9 else 3
    found = [(edit_distance(low, other, most), other) for other in folded]
    near = [
        (count, [-similarity for similarity in _compare_letters(low, other)], other)
        for count, other in found
        if count <= most
    ]
    if near:
        return folded[min(near)[-1]]
    close = difflib.get_close_matches(low, folded, n=1, cutoff=0.82)
    if close:
        return folded[close[0]]
    longer = [other for other in folded if "_" in low and other.partition("_")[2] == low]
    return folded[longer[0]] if len(longer) == 1 else None


def find_abbreviation(name: str, known: Collection[str]) -> str | None:
    """Return the only known name that abbreviates ``name``, or that ``name`` abbreviates.

    Return None if no known name or more than one known name matches. The words of both names are
    compared in order. In each pair, one word must be the start of the other. A plural "s" is
    ignored.

    >>> find_abbreviation("directory", ["dir", "every"])
    'dir'
    >>> find_abbreviation("max_iter", ["max_iterations", "max_lr"])
    'max_iterations'
    >>> find_abbreviation("fp16_opt_level", ["fp16"])
    """
    words = _split_words(name)
    found = [other for other in known if _abbreviates(words, _split_words(other))]
    return found[0] if len(found) == 1 else None


def _abbreviates(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether, at each position, one of the two words is the start of the other."""
    if len(one) != len(other):
        return False
    pairs = [sorted(pair, key=len) for pair in zip(one, other, strict=True)]
    return all(
        long == short or (long.startswith(short) and len(short) >= _MIN_ABBREVIATION)
        for short, long in pairs
    )


def _split_words(name: str) -> list[str]:
    return [word.removesuffix("s") for word in name.lower().split("_")]


def suggest_fraction(name: str, value: object, known: Collection[str]) -> str | None:
    """Return a hint for an unknown parameter such as ``warmup_ratio``; None if no hint applies.

    In other libraries, such a parameter sets the length of the warmup as a fraction of the run. The
    hint names the parameter in ``known`` that accepts this fraction as a time string.

    >>> suggest_fraction("warmup_ratio", 0.03, ["warmup_num_steps"])
    'For a fraction of the run, set "warmup_num_steps": "0.03dur".'
    """
    target = next((each for each in _WARMUPS if each in known), None)
    if name not in _WARMUP_FRACTIONS or target is None:
        return None
    fraction = value if isinstance(value, int | float) and 0 < value < 1 else 0.1
    return f'For a fraction of the run, set "{target}": "{fraction:g}dur".'


def _compare_letters(one: str, other: str) -> tuple[float, float]:
    """Return two measures of the similarity of two words, each from 0 to 1.

    The first is the fraction of the distinct letters of ``other`` that also occur in ``one``. The
    second is the ratio that `difflib.SequenceMatcher` computes.
    """
    letters = len(set(one) & set(other)) / len(set(other))
    return letters, difflib.SequenceMatcher(None, one, other).ratio()


def edit_distance(one: str, other: str, most: int) -> int:
    """Return the edit distance between two words, or ``most + 1`` if it is greater than ``most``.

    An edit inserts, deletes or replaces a letter, or swaps two adjacent letters.

    >>> edit_distance("wramup", "warmup", 2), edit_distance("warmup", "cooldown", 2)
    (1, 3)
    """
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, wanted in enumerate(other, 1):
            count = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != wanted))
            swapped = column > 1 and row > 1 and letter == other[column - 2]
            if swapped and one[row - 2] == wanted:
                count = min(count, before[column - 2] + 1)
            line.append(count)
        if min(line) > most:
            return most + 1
        before, last = last, line
    return last[-1]
