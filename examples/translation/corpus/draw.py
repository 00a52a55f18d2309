"""Draws at random what a sentence is about: subjects, objects, places, times that make sense together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from corpus import phrases
from corpus.clauses import Tense
from corpus.lexicon import (
    ADJECTIVES,
    NOUNS,
    NUMERALS,
    PLACES,
    SPOTS,
    Adjective,
    Noun,
    Place,
    Verb,
)
from corpus.phrases import NAMES, PRONOUNS, Phrase

T = TypeVar("T")


class Both(NamedTuple):
    """The same piece of text in both languages."""

    en: str
    ro: str


NOTHING = Both("", "")

_TIMES: dict[Tense, tuple[Both, ...]] = {
    "present": (Both("now", "acum"), Both("today", "azi")),
    "habit": (
        Both("every day", "în fiecare zi"),
        Both("every morning", "în fiecare dimineață"),
        Both("every evening", "în fiecare seară"),
        Both("every week", "în fiecare săptămână"),
    ),
    "past": (
        Both("yesterday", "ieri"),
        Both("last night", "aseară"),
        Both("last week", "săptămâna trecută"),
        Both("this morning", "azi-dimineață"),
    ),
    "future": (
        Both("tomorrow", "mâine"),
        Both("next week", "săptămâna viitoare"),
        Both("tonight", "diseară"),
    ),
}
CHILDREN = frozenset({"boy", "girl", "child"})
_PRESENT_ONLY = frozenset({"want", "have", "know", "love"})
"""States: Romanian would need the imperfect for their past."""
_UNLIKELY_WISHES = frozenset({"hear", "see"})


def suiting(noun: Noun) -> list[Adjective]:
    """The adjectives that can be said of a noun."""
    # "bătrân" is said of the aged, never of a child that is older than another.
    no = "old" if noun.en in CHILDREN else None
    return [word for word in ADJECTIVES if word.groups & noun.adjective_groups and word.en != no]


class Draw:
    """A source of random but sensible parts; the same seed gives the same parts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self._random.randrange(len(items))]

    def weighted(self, items: Sequence[tuple[float, T]]) -> T:
        return self._random.choices([item for _, item in items], [weight for weight, _ in items])[0]

    # Words

    def noun(self, tags: frozenset[str] | set[str], *, without: frozenset[str] = frozenset()) -> Noun:
        """A noun that has one of the tags."""
        return self.pick([noun for noun in NOUNS if noun.tags & tags and noun.en not in without])

    def adjective(self, noun: Noun, probability: float = 1.0) -> Adjective | None:
        """An adjective that suits the noun, or none."""
        if not self.chance(probability):
            return None
        return self.pick(suiting(noun))

    # Persons and animals

    def person(self) -> Phrase:
        """Somebody definite: a name, the girl, my brother, the boys."""
        kind = self.weighted([(4, "name"), (5, "the"), (2, "plural"), (2, "kin"), (1, "described")])
        if kind == "name":
            return self.pick(NAMES)
        if kind == "kin":
            return self.relative()
        noun = self.noun({"person"})
        return phrases.the(noun, self.adjective(noun) if kind == "described" else None, plural=kind == "plural")

    def relative(self) -> Phrase:
        noun = self.noun({"kin", "owned"})
        whose = self.pick(("my", "my", "our", "your", "his", "her"))
        is_plural = "only_one" not in noun.tags and self.chance(0.2)
        return phrases.owned(whose, noun, plural=is_plural)

    def animal(self, tags: frozenset[str] | set[str] = frozenset({"animal"})) -> Phrase:
        noun = self.noun(tags)
        if "pet" in noun.tags and self.chance(0.4):
            return phrases.owned(self.pick(("my", "our", "your", "his", "her", "their")), noun)
        return phrases.the(noun, self.adjective(noun, 0.3), plural=self.chance(0.3))

    def subject(self, verb: Verb | None = None, *, not_us: bool = False) -> Phrase:
        """Who does it: a person or an animal, as the verb allows; ``not_us`` leaves out "I" and "we"."""
        animals = verb.subjects - {"person"} if verb else frozenset()
        if verb and animals and ("person" not in verb.subjects or self.chance(0.3)):
            return self.animal(animals)
        if self.chance(0.35):
            return self.pick([who for who in PRONOUNS if not (not_us and who.en in ("I", "we"))])
        if self.chance(0.08):
            first, second = self._random.sample(NAMES, 2)
            return phrases.both(first, second)
        return self.person()

    # Things

    def thing(self, tags: frozenset[str] | set[str], *, without: frozenset[str] = frozenset()) -> Phrase:
        """An object, definite or not, one or several, described or not."""
        noun = self.noun(tags, without=without)
        if noun.is_mass:
            return self._mass(noun)
        kind = self.weighted([(5, "the"), (4, "a"), (3, "number"), (3, "definite")])
        if kind == "definite":
            return self.definite(noun)
        if kind == "the":
            return phrases.the(noun, self.adjective(noun, 0.35), plural=self.chance(0.35))
        if kind == "a":
            return phrases.a(noun, self.adjective(noun, 0.5))
        if self.chance(0.3):
            return phrases.some(noun, self.adjective(noun, 0.4))
        return phrases.number(self.number(), noun, self.adjective(noun, 0.25))

    def _mass(self, noun: Noun) -> Phrase:
        if self.chance(0.5):
            return phrases.the(noun, self.adjective(noun, 0.3))
        return phrases.mass(noun, self.adjective(noun, 0.3))

    def definite(self, noun: Noun) -> Phrase:
        """the, this, my, or the girl's thing."""
        kind = self.weighted([(3, "the"), (2, "this"), (3, "owned"), (3, "owner")])
        plural = not noun.is_mass and self.chance(0.35)
        adjective = self.adjective(noun, 0.3)
        if kind == "this":
            return phrases.this(noun, adjective, plural=plural, far=self.chance(0.35))
        if kind == "owned":
            whose = self.pick(("my", "your", "our", "his", "her", "their"))
            return phrases.owned(whose, noun, adjective, plural=plural)
        if kind == "owner" and not noun.is_mass and not noun.tags & {"built", "visited"}:
            owner = self.person()
            if noun.en not in owner.nouns:
                return phrases.owned_by(owner, noun, adjective, plural=plural)
        return phrases.the(noun, adjective, plural=plural)

    def number(self) -> int:
        """Index of a numeral; small ones are more common."""
        return min(self._random.randrange(len(NUMERALS)), self._random.randrange(len(NUMERALS)))

    def years(self, person: Phrase) -> int:
        """Index of an age that suits the person: children are five to twelve, the others twenty to fifty."""
        five, twelve = 3, 9
        is_child = person.nouns & CHILDREN
        is_either = person.tags & {"pronoun", "name"}
        indices = range(five, twelve + 1) if is_child else range(twelve + 1, len(NUMERALS))
        return self.pick(range(five, len(NUMERALS)) if is_either else indices)

    # Places and times

    def place(self, activities: frozenset[str] | set[str], subject: Phrase | None = None) -> Both:
        """Where it happens: in the (big) garden -> în grădină, în grădina mare."""
        places = [place for place in PLACES if place.activities & activities]
        if subject is not None and "wild" in subject.tags:
            places = [place for place in places if place.noun.en == "forest"] or places
        elif subject is not None and "farm" in subject.tags:
            places = [place for place in places if place.noun.en in ("yard", "garden")] or places
        place = self.pick(places)
        return self._preposed(place, place.en_at, place.ro_at)

    def destination(self) -> Both:
        """to the (new) school -> la școală, la școala nouă."""
        place = self.pick([place for place in PLACES if place.noun.en != "street"])
        return self._preposed(place, "to", place.ro_to)

    def _preposed(self, place: Place, english: str, romanian: str) -> Both:
        noun = place.noun
        kind = self.weighted([(6, "bare"), (3, "described"), (1, "owned"), (1, "a")])
        if kind == "bare":
            return Both(f"{english} the {noun.en}", f"{romanian} {noun.ro}")
        if kind == "a":
            phrase = phrases.a(noun, self.adjective(noun))
            # "în" and the indefinite article grow together.
            joined = phrase.ro if romanian != "în" else f"într-{phrase.ro}"
            return Both(f"{english} {phrase.en}", joined if romanian == "în" else f"{romanian} {joined}")
        if kind == "owned" and noun.en in ("garden", "yard", "kitchen", "room", "village", "city", "school"):
            phrase = phrases.owned(self.pick(("our", "their", "my")), noun)
        else:
            phrase = phrases.the(noun, self.adjective(noun))
        return Both(f"{english} {phrase.en}", f"{romanian} {phrase.ro}")

    def spot(self, *, without: frozenset[str] = frozenset()) -> Both:
        """Where a small thing is: under the (old) table -> sub masă, sub masa veche."""
        noun, english, romanian = self.pick([spot for spot in SPOTS if spot[0].en not in without])
        adjective = self.adjective(noun, 0.3)
        phrase = phrases.the(noun, adjective)
        return Both(f"{english} {phrase.en}", f"{romanian} {phrase.ro if adjective else noun.ro}")

    def time(self, tense: Tense, probability: float) -> Both:
        if tense not in _TIMES or not self.chance(probability):
            return NOTHING
        return self.pick(_TIMES[tense])

    def tense(self, verb: Verb) -> Tense:
        """A tense that the verb is used in."""
        if verb.en in _PRESENT_ONLY:
            return "present"
        tense: Tense = self.weighted(
            [(5, "present"), (2, "habit"), (6, "past"), (3, "future"), (2, "want"), (1, "can"), (1, "must")]
        )
        if verb.is_stative and (tense in ("habit", "must") or (tense == "want" and verb.en in _UNLIKELY_WISHES)):
            return "present"
        if verb.en == "find" and tense in ("present", "habit"):
            return "past"
        return tense


Maker = Callable[[Draw], "Both | None"]
"""Makes one sentence, or None where the parts drawn do not fit together."""
