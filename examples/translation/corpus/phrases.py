"""Noun phrases that agree: determiner, noun, adjective, owner, in both languages at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from corpus.lexicon import MEN, NUMERALS, POSSESSIVES, WOMEN, Adjective, Noun

FIRST, SECOND, THIRD, WE, YOU_ALL, THEY = range(6)
"""Grammatical persons, as indices of a verb's present forms."""


@dataclass(frozen=True)
class Phrase:
    """Somebody or something, as the sentence needs it."""

    en: str
    ro: str
    """As subject, or as an object that is a thing."""
    agreement: str
    """Gender and number that adjectives take: ms, fs, mp or fp."""
    person: int = THIRD
    ro_of: str = ""
    """Genitive and dative: "of the girl", "to the girl"."""
    ro_pe: str = ""
    """What follows "pe" when a definite person is the object."""
    tags: frozenset[str] = field(default_factory=frozenset)
    nouns: frozenset[str] = field(default_factory=frozenset)
    """The English nouns inside, so that a sentence does not say one twice."""

    @property
    def is_plural(self) -> bool:
        return self.person in (WE, YOU_ALL, THEY)

    @property
    def en_owner(self) -> str:
        """With the English possessive ending."""
        return self.en + ("'" if self.en.endswith("s") and self.is_plural else "'s")


def agreement_of(noun: Noun, *, plural: bool) -> str:
    """ms, fs, mp or fp: a neuter is masculine in the singular and feminine in the plural."""
    if noun.gender == "n":
        return "fp" if plural else "ms"
    return noun.gender + ("p" if plural else "s")


def with_article(en: str) -> str:
    return ("an " if en[0] in "aeiou" else "a ") + en


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def _genitive(agreement: str) -> str:
    """The form of an adjective in the genitive: a feminine singular takes the shape of its plural."""
    return "fp" if agreement == "fs" else agreement


def _english(noun: Noun, adjective: Adjective | None, *, plural: bool) -> str:
    return _joined(adjective.en if adjective else "", noun.en_plural if plural else noun.en)


def the(noun: Noun, adjective: Adjective | None = None, *, plural: bool = False) -> Phrase:
    """the (new) book -> cartea (nouă)."""
    agreement = agreement_of(noun, plural=plural)
    ending = adjective.forms[agreement] if adjective else ""
    genitive_ending = adjective.forms[_genitive(agreement)] if adjective else ""
    definite = noun.ro_the_plural if plural else noun.ro_the
    bare = noun.ro_plural if plural else noun.ro
    return Phrase(
        en=f"the {_english(noun, adjective, plural=plural)}",
        ro=_joined(definite, ending),
        agreement=agreement,
        person=THEY if plural else THIRD,
        ro_of=_joined(noun.ro_of_plural if plural else noun.ro_of, genitive_ending),
        # After "pe" the article goes when nothing follows the noun: "pe băiat", but "pe băiatul înalt".
        ro_pe=_joined(definite, ending) if adjective else bare,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


def a(noun: Noun, adjective: Adjective | None = None) -> Phrase:
    """a (new) book -> o carte (nouă)."""
    agreement = agreement_of(noun, plural=False)
    article = "o" if agreement == "fs" else "un"
    return Phrase(
        en=with_article(_english(noun, adjective, plural=False)),
        ro=_joined(article, noun.ro, adjective.forms[agreement] if adjective else ""),
        agreement=agreement,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


def some(noun: Noun, adjective: Adjective | None = None) -> Phrase:
    """some (new) books -> niște cărți (noi)."""
    return _counted("some", "niște", noun, adjective)


def number(index: int, noun: Noun, adjective: Adjective | None = None) -> Phrase:
    """two (new) books -> două cărți (noi); ``index`` points into NUMERALS."""
    english, masculine, feminine = NUMERALS[index]
    agreement = agreement_of(noun, plural=True)
    return _counted(english, masculine if agreement == "mp" else feminine, noun, adjective)


def _counted(english: str, romanian: str, noun: Noun, adjective: Adjective | None) -> Phrase:
    agreement = agreement_of(noun, plural=True)
    return Phrase(
        en=f"{english} {_english(noun, adjective, plural=True)}",
        ro=_joined(romanian, noun.ro_plural, adjective.forms[agreement] if adjective else ""),
        agreement=agreement,
        person=THEY,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


def mass(noun: Noun, adjective: Adjective | None = None) -> Phrase:
    """(warm) milk -> lapte (cald)."""
    agreement = agreement_of(noun, plural=False)
    return Phrase(
        en=_english(noun, adjective, plural=False),
        ro=_joined(noun.ro, adjective.forms[agreement] if adjective else ""),
        agreement=agreement,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


_THIS = {"ms": "acest", "fs": "această", "mp": "acești", "fp": "aceste"}
_THAT = {"ms": "acel", "fs": "acea", "mp": "acei", "fp": "acele"}


def this(noun: Noun, adjective: Adjective | None = None, *, plural: bool = False, far: bool = False) -> Phrase:
    """this/that (new) book -> această/acea carte (nouă)."""
    agreement = agreement_of(noun, plural=plural)
    word = {(False, False): "this", (False, True): "these", (True, False): "that", (True, True): "those"}[far, plural]
    romanian = _joined(
        (_THAT if far else _THIS)[agreement],
        noun.ro_plural if plural else noun.ro,
        adjective.forms[agreement] if adjective else "",
    )
    return Phrase(
        en=f"{word} {_english(noun, adjective, plural=plural)}",
        ro=romanian,
        agreement=agreement,
        person=THEY if plural else THIRD,
        ro_pe=romanian,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


_POSSESSIVE_COLUMN = {"ms": 0, "fs": 1, "mp": 2, "fp": 3}


def owned(whose: str, noun: Noun, adjective: Adjective | None = None, *, plural: bool = False) -> Phrase:
    """my (new) book -> cartea mea (nouă); ``whose`` is a key of POSSESSIVES."""
    agreement = agreement_of(noun, plural=plural)
    forms = POSSESSIVES[whose]
    ending = adjective.forms[agreement] if adjective else ""
    genitive_ending = adjective.forms[_genitive(agreement)] if adjective else ""
    romanian = _joined(noun.ro_the_plural if plural else noun.ro_the, forms[_POSSESSIVE_COLUMN[agreement]], ending)
    genitive = forms[_POSSESSIVE_COLUMN[_genitive(agreement)]]
    return Phrase(
        en=f"{whose} {_english(noun, adjective, plural=plural)}",
        ro=romanian,
        agreement=agreement,
        person=THEY if plural else THIRD,
        ro_of=_joined(noun.ro_of_plural if plural else noun.ro_of, genitive, genitive_ending),
        ro_pe=romanian,
        tags=noun.tags,
        nouns=frozenset({noun.en}),
    )


OF_WHOM = {"ms": "al", "fs": "a", "mp": "ai", "fp": "ale"}
"""The article before an owner that does not directly follow the noun with its article."""


def owned_by(owner: Phrase, noun: Noun, adjective: Adjective | None = None, *, plural: bool = False) -> Phrase:
    """the girl's (new) book -> cartea (nouă a) fetei."""
    agreement = agreement_of(noun, plural=plural)
    definite = noun.ro_the_plural if plural else noun.ro_the
    between = f"{adjective.forms[agreement]} {OF_WHOM[agreement]}" if adjective else ""
    romanian = _joined(definite, between, owner.ro_of)
    between_genitive = f"{adjective.forms[_genitive(agreement)]} {OF_WHOM[agreement]}" if adjective else ""
    return Phrase(
        en=f"{owner.en_owner} {_english(noun, adjective, plural=plural)}",
        ro=romanian,
        agreement=agreement,
        person=THEY if plural else THIRD,
        ro_of=_joined(noun.ro_of_plural if plural else noun.ro_of, between_genitive, owner.ro_of),
        ro_pe=romanian,
        tags=noun.tags,
        nouns=owner.nouns | {noun.en},
    )


def _name(name: str, genitive: str, agreement: str) -> Phrase:
    return Phrase(
        en=name,
        ro=name,
        agreement=agreement,
        ro_of=genitive,
        ro_pe=name,
        tags=frozenset({"person", "name"}),
        nouns=frozenset({name}),
    )


NAMES = tuple(_name(name, genitive, "fs") for name, genitive in WOMEN) + tuple(
    _name(name, f"lui {name}", "ms") for name in MEN
)


def both(first: Phrase, second: Phrase) -> Phrase:
    """Maria and Andrei -> Maria și Andrei; feminine only if both are."""
    agreement = "fp" if first.agreement == second.agreement == "fs" else "mp"
    return Phrase(
        en=f"{first.en} and {second.en}",
        ro=f"{first.ro} și {second.ro}",
        agreement=agreement,
        person=THEY,
        tags=first.tags & second.tags,
        nouns=first.nouns | second.nouns,
    )


def _pronoun(en: str, ro: str, agreement: str, person: int) -> Phrase:
    return Phrase(en, ro, agreement, person, tags=frozenset({"person", "pronoun"}), nouns=frozenset({en}))


# Romanian leaves out the pronoun where the verb's ending tells the person.
PRONOUNS = (
    _pronoun("I", "", "ms", FIRST),
    _pronoun("you", "", "ms", SECOND),
    _pronoun("he", "el", "ms", THIRD),
    _pronoun("she", "ea", "fs", THIRD),
    _pronoun("we", "", "mp", WE),
    _pronoun("they", "ei", "mp", THEY),
)
