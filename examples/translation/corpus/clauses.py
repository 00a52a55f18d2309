"""Verbs and the small words around them: tense, negation, reflexive and doubled pronouns, word order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from corpus.lexicon import Verb
from corpus.phrases import FIRST, THIRD, Phrase

Tense = Literal["present", "habit", "past", "future", "want", "can", "must"]

_HAVE = ("am", "ai", "a", "am", "ați", "au")
_WILL = ("voi", "vei", "va", "vom", "veți", "vor")
_WANT = ("vreau", "vrei", "vrea", "vrem", "vreți", "vor")
_CAN = ("pot", "poți", "poate", "putem", "puteți", "pot")
_IS_EN = ("am", "are", "is", "are", "are", "are")
_WAS_EN = ("was", "were", "was", "were", "were", "were")
BE = ("sunt", "ești", "este", "suntem", "sunteți", "sunt")
WAS = ("eram", "erai", "era", "eram", "erați", "erau")


@dataclass(frozen=True)
class Clitic:
    """An unstressed pronoun that leans on the verb."""

    alone: str
    """Before the verb: "îl văd"."""
    joined: str
    """Before "a avea" in the past: "l-am văzut"."""
    is_after_participle: bool = False
    """Only "o" goes behind: "am văzut-o"."""


_REFLEXIVE = tuple(
    Clitic(alone, joined)
    for alone, joined in (("mă", "m-"), ("te", "te-"), ("se", "s-"), ("ne", "ne-"), ("vă", "v-"), ("se", "s-"))
)
HIM, HER = Clitic("îl", "l-"), Clitic("o", "o", is_after_participle=True)
THEM_MASCULINE, THEM_FEMININE = Clitic("îi", "i-"), Clitic("le", "le-")
ME, YOU, US = Clitic("mă", "m-"), Clitic("te", "te-"), Clitic("ne", "ne-")
TO_ONE, TO_MANY = Clitic("îi", "i-"), Clitic("le", "le-")
OBJECT_OF_AGREEMENT = {"ms": HIM, "fs": HER, "mp": THEM_MASCULINE, "fp": THEM_FEMININE}


def doubling(person_object: Phrase) -> Clitic:
    """The pronoun that announces a definite person: "îl vede pe băiat"."""
    return OBJECT_OF_AGREEMENT[person_object.agreement]


def to_whom(receiver: Phrase) -> Clitic:
    """The pronoun that announces who is given something: "îi dă fetei"."""
    return TO_MANY if receiver.is_plural else TO_ONE


def romanian_verb(verb: Verb, person: int, tense: Tense, *, negated: bool = False, clitic: Clitic | None = None) -> str:
    """The verb with everything that leans on it: "nu l-a văzut", "vrea să se joace".

    Args:
        verb: a reflexive verb brings its own clitic, so ``clitic`` must be None.
        person: index of ``Verb.present``.
        tense: "habit" is the present in Romanian.
    """
    if verb.is_reflexive:
        assert clitic is None, verb.en
        clitic = _REFLEXIVE[person]
    no = "nu " if negated else ""
    before = f"{clitic.alone} " if clitic else ""
    if tense in ("present", "habit"):
        return f"{no}{before}{verb.present[person]}"
    if tense == "past":
        if clitic is None:
            return f"{no}{_HAVE[person]} {verb.participle}"
        if clitic.is_after_participle:
            return f"{no}{_HAVE[person]} {verb.participle}-{clitic.alone}"
        return f"{no}{clitic.joined}{_HAVE[person]} {verb.participle}"
    if tense == "future":
        return f"{no}{before}{_WILL[person]} {verb.infinitive}"
    leading = {"want": _WANT[person], "can": _CAN[person], "must": "trebuie"}[tense]
    # Only the third persons have a subjunctive of their own.
    is_third = person in (THIRD, len(verb.present) - 1)
    return f"{no}{leading} să {before}{verb.subjunctive if is_third else verb.present[person]}"


def english_verb(verb: Verb, person: int, tense: Tense, *, negated: bool = False, adverb: str = "") -> str:
    """The verb group of a statement: "is not reading", "does not see", "will read"."""
    no = " not" if negated else ""
    is_third = person == THIRD
    if tense == "present" and not verb.is_stative:
        return f"{_IS_EN[person]}{no} {verb.en_ing}"
    if tense in ("present", "habit"):
        if negated:
            return f"{'does' if is_third else 'do'} not {verb.en}"
        return f"{adverb} {verb.en_s if is_third else verb.en}".strip()
    if tense == "past":
        return f"did not {verb.en}" if negated else verb.en_past
    if tense == "future":
        return f"will{no} {verb.en}"
    if tense == "can":
        return f"{'cannot' if negated else 'can'} {verb.en}"
    if negated:
        return {
            "want": f"{'does' if is_third else 'do'} not want to {verb.en}",
            "must": f"must not {verb.en}",
        }[tense]
    return {"want": f"{'wants' if is_third else 'want'} to {verb.en}", "must": f"must {verb.en}"}[tense]


def english_question(verb: Verb, subject: Phrase, tense: Tense) -> str:
    """Auxiliary, subject and verb: "is the girl reading", "did the girl read"."""
    person = subject.person
    does = "does" if person == THIRD else "do"
    if tense == "present" and not verb.is_stative:
        return f"{_IS_EN[person]} {subject.en} {verb.en_ing}"
    if tense in ("present", "habit"):
        return f"{does} {subject.en} {verb.en}"
    if tense == "want":
        return f"{does} {subject.en} want to {verb.en}"
    return f"{({'past': 'did', 'future': 'will', 'can': 'can', 'must': 'must'})[tense]} {subject.en} {verb.en}"


def english_be(person: int, *, past: bool = False) -> str:
    return (_WAS_EN if past else _IS_EN)[person]


def romanian_be(person: int, *, past: bool = False) -> str:
    return (WAS if past else BE)[person]


def sentence(*parts: str, end: str = ".") -> str:
    """Join what is not empty, begin with a capital, end with ``end``."""
    text = " ".join(part for part in parts if part).replace(" ,", ",")
    return text[0].upper() + text[1:] + end


__all__ = [
    "FIRST",
    "Clitic",
    "Tense",
    "doubling",
    "english_be",
    "english_question",
    "english_verb",
    "romanian_be",
    "romanian_verb",
    "sentence",
    "to_whom",
]
