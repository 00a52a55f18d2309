"""One function per kind of sentence; ``KINDS`` says how often each is drawn."""

from __future__ import annotations

from corpus import phrases
from corpus.clauses import (
    ME,
    OBJECT_OF_AGREEMENT,
    US,
    YOU,
    Clitic,
    Tense,
    doubling,
    english_be,
    english_question,
    english_verb,
    romanian_be,
    romanian_verb,
    sentence,
    to_whom,
)
from corpus.draw import CHILDREN, NOTHING, Both, Draw, Maker, suiting
from corpus.lexicon import (
    ADJECTIVES,
    ANTONYMS,
    FEELING_VERBS,
    GENITIVE_PLACES,
    GENITIVE_PREPOSITIONS,
    GIVING_VERBS,
    LIVE,
    MOVING_VERBS,
    NOUN_BY_NAME,
    NUMERALS,
    PERSON_VERBS,
    PLACE_VERBS,
    THING_VERBS,
    Verb,
)
from corpus.phrases import FIRST, NAMES, OF_WHOM, PRONOUNS, SECOND, THEY, THIRD, WE, Phrase

_MODALS = ("want", "can", "must")


def _statement(subject: Phrase, verb_en: str, verb_ro: str, *rest: Both, time: Both = NOTHING, first: bool) -> Both:
    """Subject, verb, rest; the time at the end, or first of all."""
    english = [subject.en, verb_en, *(part.en for part in rest)]
    romanian = [subject.ro, verb_ro, *(part.ro for part in rest)]
    if first and time.en:
        return Both(sentence(time.en, *english), sentence(time.ro, *romanian))
    return Both(sentence(*english, time.en), sentence(*romanian, time.ro))


def _is_definite(phrase: Phrase) -> bool:
    return not phrase.en.startswith(("a ", "an ", "some ")) and phrase.en.split()[0] not in {n[0] for n in NUMERALS}


def acting_on_things(draw: Draw) -> Both | None:
    """The girl is reading a new book. -> Fata citește o carte nouă."""
    verb = draw.pick(THING_VERBS)
    subject = draw.subject(verb)
    thing = draw.thing(verb.objects, without=subject.nouns)
    tense = draw.tense(verb)
    negated = tense != "habit" and _is_definite(thing) and draw.chance(0.2)
    time = draw.time(tense, 1.0 if tense == "habit" else 0.35)
    place = NOTHING
    if verb.en in ("read", "write", "draw", "eat", "drink") and "person" in verb.subjects and draw.chance(0.25):
        place = draw.place({"rest"})
    return _statement(
        subject,
        english_verb(verb, subject.person, tense, negated=negated),
        romanian_verb(verb, subject.person, tense, negated=negated),
        Both(thing.en, thing.ro),
        place,
        time=time if not verb.is_stative or tense != "present" else NOTHING,
        first=draw.chance(0.3),
    )


def asking_whether(draw: Draw) -> Both | None:
    """Did the boy close the window? -> Băiatul a închis fereastra?"""
    verb = draw.pick(THING_VERBS)
    subject = draw.subject(verb, not_us=True)
    thing = draw.thing(verb.objects, without=subject.nouns)
    tense = draw.tense(verb)
    time = draw.time(tense, 1.0 if tense == "habit" else 0.3)
    if verb.is_stative and tense == "present":
        time = NOTHING
    return Both(
        sentence(english_question(verb, subject, tense), thing.en, time.en, end="?"),
        sentence(subject.ro, romanian_verb(verb, subject.person, tense), thing.ro, time.ro, end="?"),
    )


def acting_on_persons(draw: Draw) -> Both | None:
    """The teacher sees the tall girl. -> Profesorul o vede pe fata înaltă."""
    verb = draw.pick(PERSON_VERBS)
    is_question = draw.chance(0.2)
    subject, other = draw.subject(verb, not_us=is_question), draw.person()
    if subject.nouns & other.nouns:
        return None
    tense = draw.tense(verb)
    clitic = doubling(other)
    negated = not is_question and tense != "habit" and draw.chance(0.2)
    romanian = romanian_verb(verb, subject.person, tense, negated=negated, clitic=clitic)
    receiver = Both(other.en, f"pe {other.ro_pe}")
    time = draw.time(tense, 1.0 if tense == "habit" else 0.3)
    if verb.is_stative and tense == "present":
        time = NOTHING
    if is_question:
        return Both(
            sentence(english_question(verb, subject, tense), receiver.en, time.en, end="?"),
            sentence(subject.ro, romanian, receiver.ro, time.ro, end="?"),
        )
    english = english_verb(verb, subject.person, tense, negated=negated)
    return _statement(subject, english, romanian, receiver, time=time, first=draw.chance(0.2))


_OBJECT_PRONOUNS: tuple[tuple[str, Clitic, int], ...] = (
    ("me", ME, FIRST),
    ("you", YOU, SECOND),
    ("him", OBJECT_OF_AGREEMENT["ms"], THIRD),
    ("her", OBJECT_OF_AGREEMENT["fs"], THIRD),
    ("us", US, WE),
    ("them", OBJECT_OF_AGREEMENT["mp"], THEY),
)
_SAME_SIDE = ({FIRST, WE}, {SECOND})


def acting_on_pronouns(draw: Draw) -> Both | None:
    """My sister saw him. -> Sora mea l-a văzut."""
    verb = draw.pick(PERSON_VERBS)
    subject = draw.subject(verb)
    en_object, clitic, person = draw.pick(_OBJECT_PRONOUNS)
    if any({subject.person, person} <= side for side in _SAME_SIDE):
        return None
    if "pronoun" in subject.tags and subject.person == person:
        return None
    tense = draw.tense(verb)
    if tense == "habit":
        tense = "past"
    negated = draw.chance(0.2)
    return _statement(
        subject,
        english_verb(verb, subject.person, tense, negated=negated),
        romanian_verb(verb, subject.person, tense, negated=negated, clitic=clitic),
        Both(en_object, ""),
        time=NOTHING if verb.is_stative and tense == "present" else draw.time(tense, 0.35),
        first=draw.chance(0.3),
    )


_RECEIVER_PRONOUNS = (
    ("me", Clitic("îmi", "mi-"), FIRST),
    ("you", Clitic("îți", "ți-"), SECOND),
    ("us", Clitic("ne", "ne-"), WE),
    ("them", Clitic("le", "le-"), THEY),
)


def giving(draw: Draw) -> Both | None:
    """The nurse gave the children some apples. -> Asistenta le-a dat copiilor niște mere."""
    verb = draw.pick(GIVING_VERBS)
    subject = draw.subject(verb)
    tense = draw.tense(verb)
    thing = draw.thing(verb.objects)
    negated = tense != "habit" and _is_definite(thing) and draw.chance(0.15)
    if draw.chance(0.25):
        english, clitic, person = draw.pick(_RECEIVER_PRONOUNS)
        if any({subject.person, person} <= side for side in _SAME_SIDE) or subject.person == person:
            return None
        receiver = Both(english, "")
    else:
        other = draw.person()
        if subject.nouns & other.nouns or thing.nouns & other.nouns:
            return None
        receiver, clitic = Both(other.en, other.ro_of), to_whom(other)
    return _statement(
        subject,
        english_verb(verb, subject.person, tense, negated=negated),
        romanian_verb(verb, subject.person, tense, negated=negated, clitic=clitic),
        receiver,
        Both(thing.en, thing.ro),
        time=draw.time(tense, 1.0 if tense == "habit" else 0.25),
        first=draw.chance(0.3),
    )


def doing_somewhere(draw: Draw) -> Both | None:
    """The children played in the big garden. -> Copiii s-au jucat în grădina mare."""
    verb = draw.pick(PLACE_VERBS)
    is_question = draw.chance(0.15)
    subject = draw.subject(verb, not_us=is_question)
    place = draw.place(verb.objects, subject)
    tense = draw.tense(verb)
    negated = not is_question and tense != "habit" and draw.chance(0.15)
    time = draw.time(tense, 1.0 if tense == "habit" else 0.4)
    romanian = romanian_verb(verb, subject.person, tense, negated=negated)
    if is_question:
        return Both(
            sentence(english_question(verb, subject, tense), place.en, time.en, end="?"),
            sentence(subject.ro, romanian, place.ro, time.ro, end="?"),
        )
    english = english_verb(verb, subject.person, tense, negated=negated)
    return _statement(subject, english, romanian, place, time=time, first=draw.chance(0.3))


def going_somewhere(draw: Draw) -> Both | None:
    """My sister is going to the old church. -> Sora mea merge la biserica veche."""
    verb = draw.pick(MOVING_VERBS)
    subject = draw.subject(verb)
    destination = draw.destination()
    tense = draw.tense(verb)
    negated = tense != "habit" and draw.chance(0.2)
    return _statement(
        subject,
        english_verb(verb, subject.person, tense, negated=negated),
        romanian_verb(verb, subject.person, tense, negated=negated),
        destination,
        time=draw.time(tense, 1.0 if tense == "habit" else 0.4),
        first=draw.chance(0.3),
    )


def living_somewhere(draw: Draw) -> Both | None:
    """The doctor lives in a quiet village. -> Medicul locuiește într-un sat liniștit."""
    subject = draw.subject(LIVE)
    noun = NOUN_BY_NAME[draw.pick(("city", "village", "house"))]
    phrase = phrases.a(noun, draw.adjective(noun))
    negated = draw.chance(0.15)
    return Both(
        sentence(subject.en, english_verb(LIVE, subject.person, "present", negated=negated), "in", phrase.en),
        sentence(subject.ro, romanian_verb(LIVE, subject.person, "present", negated=negated), f"într-{phrase.ro}"),
    )


def _described(draw: Draw) -> tuple[Phrase, str, dict[str, str]] | None:
    """Something definite, and an adjective that can be said of it; None if all are taken ("the cheap gift")."""
    kind = draw.weighted([(4, "person"), (2, "animal"), (6, "thing")])
    if kind == "person":
        subject = draw.subject()
        groups = {"person"}
        if subject.person in (FIRST, SECOND):
            subject = draw.pick([pronoun for pronoun in PRONOUNS if pronoun.person not in (FIRST, SECOND)])
    elif kind == "animal":
        subject, groups = draw.animal(), {"animal"}
    else:
        noun = draw.noun({"goods", "portable", "built", "visited", "area", "opened", "learned", "food", "drink"})
        subject, groups = draw.definite(noun), set(noun.adjective_groups)
    said = set(subject.en.split())
    taken = said.union(*(words for words in ANTONYMS if words & said))
    if subject.nouns & CHILDREN:
        taken = taken | {"old"}
    adjectives = [word for word in ADJECTIVES if word.groups & groups and word.en not in taken]
    if not adjectives:
        return None
    adjective = draw.pick(adjectives)
    return subject, adjective.en, adjective.forms


def describing(draw: Draw) -> Both | None:
    """The houses were very old. -> Casele erau foarte vechi."""
    described = _described(draw)
    if described is None:
        return None
    subject, english, forms = described
    past = draw.chance(0.3)
    be_en, be_ro = english_be(subject.person, past=past), romanian_be(subject.person, past=past)
    very = Both("very", "foarte") if draw.chance(0.3) else NOTHING
    if draw.chance(0.2):
        return Both(
            sentence(be_en, subject.en, very.en, english, end="?"),
            sentence(subject.ro, be_ro, very.ro, forms[subject.agreement], end="?"),
        )
    negation = Both("not", "nu") if draw.chance(0.2) else NOTHING
    return Both(
        sentence(subject.en, be_en, negation.en, very.en, english),
        sentence(subject.ro, negation.ro, be_ro, very.ro, forms[subject.agreement]),
    )


_COMPARED = {
    "tall": ("taller", "tallest"), "young": ("younger", "youngest"), "old": ("older", "oldest"),
    "big": ("bigger", "biggest"), "small": ("smaller", "smallest"), "strong": ("stronger", "strongest"),
    "fast": ("faster", "fastest"), "new": ("newer", "newest"), "cheap": ("cheaper", "cheapest"),
    "long": ("longer", "longest"), "short": ("shorter", "shortest"), "sweet": ("sweeter", "sweetest"),
    "heavy": ("heavier", "heaviest"), "rich": ("richer", "richest"), "happy": ("happier", "happiest"),
    "quiet": ("quieter", "quietest"), "lazy": ("lazier", "laziest"), "good": ("better", "best"),
    "clean": ("cleaner", "cleanest"), "kind": ("kinder", "kindest"), "brave": ("braver", "bravest"),
    "beautiful": ("more beautiful", "most beautiful"), "expensive": ("more expensive", "most expensive"),
    "interesting": ("more interesting", "most interesting"), "famous": ("more famous", "most famous"),
    "difficult": ("more difficult", "most difficult"),
}  # fmt: skip


def comparing(draw: Draw) -> Both | None:
    """The horse is faster than the cow. -> Calul este mai rapid decât vaca."""
    noun = draw.noun({"person", "animal", "goods", "built", "visited", "learned"})
    other = draw.noun(noun.tags, without=frozenset({noun.en}))
    adjectives = [
        adjective
        for adjective in suiting(noun)
        if adjective.groups & other.adjective_groups and adjective.en in _COMPARED
    ]
    if noun.is_mass or other.is_mass or not adjectives:
        return None
    plural = draw.chance(0.25)
    if "person" in noun.tags and draw.chance(0.4):
        subject = draw.pick(NAMES)
    elif draw.chance(0.3):
        subject = phrases.owned(draw.pick(("my", "our", "your", "their")), noun, plural=plural)
    else:
        subject = phrases.the(noun, plural=plural)
    than = phrases.the(other, plural=plural)
    adjective = draw.pick(adjectives)
    return Both(
        sentence(subject.en, english_be(subject.person), _COMPARED[adjective.en][0], "than", than.en),
        sentence(
            subject.ro, romanian_be(subject.person), "mai", adjective.forms[subject.agreement], "decât", than.ro
        ),
    )  # fmt: skip


_MOST = {"ms": "cel mai", "fs": "cea mai"}


def superlative(draw: Draw) -> Both | None:
    """Maria is the youngest girl in the village. -> Maria este cea mai tânără fată din sat."""
    where = draw.pick((Both("in the city", "din oraș"), Both("in the village", "din sat")))
    if draw.chance(0.5):
        name = draw.pick(NAMES)
        women = ("girl", "woman", "nurse", "actress")
        men = ("boy", "man", "teacher", "doctor", "baker", "driver", "farmer", "painter", "student")
        noun = NOUN_BY_NAME[draw.pick(women if name.agreement == "fs" else men)]
        subject = Both(name.en, name.ro)
    else:
        noun = draw.noun({"built", "visited"}, without=frozenset({"city", "village"}))
        subject = Both("this", "aceasta" if phrases.agreement_of(noun, plural=False) == "fs" else "acesta")
    adjectives = [word for word in suiting(noun) if word.en in _COMPARED]
    adjective = draw.pick(adjectives)
    agreement = phrases.agreement_of(noun, plural=False)
    return Both(
        sentence(subject.en, "is the", _COMPARED[adjective.en][1], noun.en, where.en),
        sentence(subject.ro, "este", _MOST[agreement], adjective.forms[agreement], noun.ro, where.ro),
    )


def being_somewhere(draw: Draw) -> Both | None:
    """Where are my keys? The keys are on the table. -> Unde sunt cheile mele? Cheile sunt pe masă."""
    is_person = draw.chance(0.35)
    if is_person:
        subject = draw.subject()
        place = draw.place({"meet", "job", "rest"})
    else:
        subject = draw.definite(draw.noun({"portable", "pet"}))
        place = draw.spot(without=subject.nouns)
    past = draw.chance(0.3)
    be_en, be_ro = english_be(subject.person, past=past), romanian_be(subject.person, past=past)
    if draw.chance(0.25):
        return Both(sentence("where", be_en, subject.en, end="?"), sentence("unde", be_ro, subject.ro, end="?"))
    negation = Both("not", "nu") if draw.chance(0.2) else NOTHING
    return Both(
        sentence(subject.en, be_en, negation.en, place.en),
        sentence(subject.ro, negation.ro, be_ro, place.ro),
    )


def there_is(draw: Draw) -> Both | None:
    """There are two cats under the table. -> Sub masă sunt două pisici."""
    if draw.chance(0.4):
        noun = NOUN_BY_NAME[draw.pick(("car", "bicycle", "tree", "dog", "cat", "horse", "bird", "chair", "table"))]
        place_noun = NOUN_BY_NAME[draw.pick(GENITIVE_PLACES)]
        preposition_en, preposition_ro = draw.pick(GENITIVE_PREPOSITIONS)
        landmark = phrases.the(place_noun, draw.adjective(place_noun, 0.4))
        place = Both(f"{preposition_en} {landmark.en}", f"{preposition_ro} {landmark.ro_of}")
    else:
        noun = draw.noun({"portable", "pet"})
        place = draw.spot(without=frozenset({noun.en}))
    if draw.chance(0.5):
        what = phrases.a(noun, draw.adjective(noun, 0.5))
    else:
        what = phrases.number(min(draw.number(), 8), noun, draw.adjective(noun, 0.3))
    past = draw.chance(0.25)
    return Both(
        sentence("there", english_be(what.person, past=past), what.en, place.en),
        sentence(place.ro, romanian_be(what.person, past=past), what.ro),
    )


_LIKE_PRONOUNS = (("I", "îmi"), ("you", "îți"), ("we", "ne"), ("he", "lui îi"), ("she", "ei îi"), ("they", "lor le"))


def liking(draw: Draw) -> Both | None:
    """The girl does not like the soup. -> Fetei nu îi place supa."""
    if draw.chance(0.45):
        pronoun = draw.pick(PRONOUNS)
        words = dict(_LIKE_PRONOUNS)[pronoun.en].split()
        person, dative, clitic = pronoun, " ".join(words[:-1]), words[-1]
    else:
        person = draw.person()
        dative, clitic = person.ro_of, to_whom(person).alone
    negated = draw.chance(0.25)
    does = "does" if person.person == THIRD else "do"
    like_en = f"{does} not like" if negated else ("likes" if person.person == THIRD else "like")
    no = "nu" if negated else ""
    if draw.chance(0.3):
        verb = draw.pick(PLACE_VERBS)
        place = draw.place(verb.objects)
        action = romanian_verb(verb, person.person, "want").split(" să ", 1)[1]
        return Both(
            sentence(person.en, like_en, "to", verb.en, place.en),
            sentence(dative, no, clitic, "place să", action, place.ro),
        )
    thing = draw.definite(draw.noun({"goods", "text", "heard", "watched", "food", "drink", "visited"}))
    if thing.nouns & person.nouns:
        return None
    verb_ro = "plac" if thing.is_plural else "place"
    if not negated and draw.chance(0.3):
        return Both(
            sentence(does, person.en, "like", thing.en, end="?"), sentence(dative, clitic, verb_ro, thing.ro, end="?")
        )
    return Both(sentence(person.en, like_en, thing.en), sentence(dative, no, clitic, verb_ro, thing.ro))


_MINE = {"mine": "my", "yours": "your", "ours": "our", "his": "his", "hers": "her", "theirs": "their"}


def belonging(draw: Draw) -> Both | None:
    """Whose is this hat? These shoes are Maria's. -> A cui este această pălărie? Acești pantofi sunt ai Mariei."""
    noun = draw.noun({"portable", "worn", "pet", "goods"})
    if noun.is_mass:
        return None
    plural = draw.chance(0.4)
    far = draw.chance(0.3)
    thing = phrases.this(noun, draw.adjective(noun, 0.3), plural=plural, far=far)
    if draw.chance(0.2):
        thing = phrases.the(noun, draw.adjective(noun), plural=plural)
    be_en, be_ro = english_be(thing.person), romanian_be(thing.person)
    article = OF_WHOM[thing.agreement]
    kind = draw.weighted([(2, "whose"), (3, "pronoun"), (3, "owner")])
    if kind == "whose":
        return Both(
            sentence("whose", be_en, thing.en, end="?"), sentence(article, "cui", be_ro, thing.ro, end="?")
        )  # fmt: skip
    negation = Both("not", "nu") if draw.chance(0.25) else NOTHING
    if kind == "pronoun":
        english = draw.pick(tuple(_MINE))
        # "This book is mine" repeats the possessive of "my book".
        romanian = phrases.owned(_MINE[english], noun, plural=plural).ro.split()[-1]
    else:
        owner = draw.person()
        english, romanian = owner.en_owner, owner.ro_of
    return Both(
        sentence(thing.en, be_en, negation.en, english),
        sentence(thing.ro, negation.ro, be_ro, article, romanian),
    )


def _asked_tense(draw: Draw, verb: Verb) -> Tense:
    tense = draw.tense(verb)
    return "past" if tense in ("habit", *_MODALS) and not verb.is_stative else tense


def asking_who(draw: Draw) -> Both | None:
    """Who opened the gate? -> Cine a deschis poarta?"""
    verb = draw.pick([verb for verb in THING_VERBS if "person" in verb.subjects])
    thing = draw.thing(verb.objects)
    tense = draw.tense(verb)
    time = draw.time(tense, 1.0 if tense == "habit" else 0.2)
    if verb.is_stative and tense == "present":
        time = NOTHING
    return Both(
        sentence("who", english_verb(verb, THIRD, tense), thing.en, time.en, end="?"),
        sentence("cine", romanian_verb(verb, THIRD, tense), thing.ro, time.ro, end="?"),
    )


def asking_what(draw: Draw) -> Both | None:
    """What did the boys eat? Who is she waiting for? Where is he going? -> Ce au mâncat băieții? ..."""
    kind = draw.weighted([(3, "what"), (3, "whom"), (2, "where"), (1, "why"), (2, "when")])
    place = NOTHING
    if kind == "what":
        verbs = [verb for verb in THING_VERBS if "person" in verb.subjects and verb.en != "visit"]
        question = Both("what", "ce")
    elif kind == "whom":
        verbs, question = list(PERSON_VERBS), Both("who", "pe cine")
    elif kind == "where":
        verbs = [*PLACE_VERBS, LIVE, *(verb for verb in MOVING_VERBS if verb.en == "go")]
        question = Both("where", "unde")
    elif kind == "why":
        verbs, question = list(FEELING_VERBS), Both("why", "de ce")
    else:
        verbs, question, place = list(MOVING_VERBS), Both("when", "când"), draw.destination()
    verb = draw.pick(verbs)
    subject = draw.subject(verb, not_us=True)
    tense: Tense = "present" if verb is LIVE else "future" if kind == "when" else _asked_tense(draw, verb)
    if tense in _MODALS:
        return None
    time = draw.time(tense, 0.3) if kind in ("what", "whom") and not verb.is_stative else NOTHING
    return Both(
        sentence(question.en, english_question(verb, subject, tense), place.en, time.en, end="?"),
        sentence(question.ro, romanian_verb(verb, subject.person, tense), subject.ro, place.ro, time.ro, end="?"),
    )


def asking_how_many(draw: Draw) -> Both | None:
    """How many apples did Maria buy? -> Câte mere a cumpărat Maria?"""
    verb = draw.pick(
        [verb for verb in THING_VERBS if verb.en in ("have", "buy", "sell", "find", "see", "draw", "wash")]
    )
    noun = draw.noun(verb.objects)
    if noun.is_mass:
        return None
    subject = draw.subject(verb, not_us=True)
    tense: Tense = "present" if verb.en == "have" else draw.weighted([(3, "past"), (2, "future")])
    how_many = "câți" if phrases.agreement_of(noun, plural=True) == "mp" else "câte"
    return Both(
        sentence("how many", noun.en_plural, english_question(verb, subject, tense), end="?"),
        sentence(how_many, noun.ro_plural, romanian_verb(verb, subject.person, tense), subject.ro, end="?"),
    )


_YEARS_TO_HAVE = ("am", "ai", "are", "avem", "aveți", "au")


def being_of_age(draw: Draw) -> Both | None:
    """The boy is ten years old. -> Băiatul are zece ani."""
    subject = draw.subject()
    have = _YEARS_TO_HAVE[subject.person]
    if draw.chance(0.25):
        return Both(
            sentence("how old", english_be(subject.person), subject.en, end="?"),
            sentence("câți ani", have, subject.ro, end="?"),
        )
    english, masculine, _ = NUMERALS[draw.years(subject)]
    return Both(
        sentence(subject.en, english_be(subject.person), english, "years old"),
        sentence(subject.ro, have, masculine, "ani"),
    )


def _short_clause(draw: Draw, subject: Phrase, tense: Tense) -> Both:
    if draw.chance(0.5):
        verb = draw.pick([verb for verb in (*PLACE_VERBS, *FEELING_VERBS) if "person" in verb.subjects])
        rest = draw.place(verb.objects) if verb in PLACE_VERBS else NOTHING
    else:
        verb = draw.pick([verb for verb in THING_VERBS if "person" in verb.subjects and not verb.is_stative])
        thing = draw.thing(verb.objects, without=subject.nouns)
        rest = Both(thing.en, thing.ro)
    english = f"{subject.en} {english_verb(verb, subject.person, tense)} {rest.en}"
    romanian = f"{subject.ro} {romanian_verb(verb, subject.person, tense)} {rest.ro}"
    return Both(english.strip(), romanian.strip())


def two_clauses(draw: Draw) -> Both | None:
    """The boy is reading, and the girl is singing. -> Băiatul citește, iar fata cântă."""
    if draw.chance(0.4):
        one, other = _described(draw), _described(draw)
        if one is None or other is None:
            return None
        (first, en_first, forms_first), (second, en_second, forms_second) = one, other
        if first.nouns & second.nouns or en_first == en_second or "pronoun" in first.tags | second.tags:
            return None
        if ("person" in first.tags) != ("person" in second.tags):
            return None
        return Both(
            sentence(first.en, english_be(first.person), en_first, ", but", second.en,
                     english_be(second.person), en_second),
            sentence(first.ro, romanian_be(first.person), forms_first[first.agreement], ", dar", second.ro,
                     romanian_be(second.person), forms_second[second.agreement]),
        )  # fmt: skip
    left_who, right_who = draw.person(), draw.person()
    if left_who.nouns & right_who.nouns:
        return None
    tense: Tense = draw.pick(("present", "past", "future"))
    left, right = _short_clause(draw, left_who, tense), _short_clause(draw, right_who, tense)
    return Both(sentence(left.en, ", and", right.en), sentence(left.ro, ", iar", right.ro))


_HE_SHE_THEY = {"ms": "he", "fs": "she", "mp": "they", "fp": "they"}


def giving_reasons(draw: Draw) -> Both | None:
    """The girl is tired because she worked in the garden. -> Fata este obosită pentru că a lucrat în grădină."""
    subject = draw.person()
    feeling = draw.pick(("happy", "sad", "tired"))
    adjective = next(word for word in ADJECTIVES if word.en == feeling)
    negated = feeling == "sad"
    tense: Tense = "past"
    if feeling == "tired":
        verb = draw.pick([verb for verb in PLACE_VERBS if verb.en in ("work", "run", "swim", "dance", "play")])
        rest = draw.place(verb.objects)
    else:
        verb = draw.pick([verb for verb in THING_VERBS if verb.en in ("find", "buy", "see", "visit", "understand")])
        thing = draw.definite(draw.noun(verb.objects)) if negated else draw.thing(verb.objects)
        rest = Both(thing.en, thing.ro)
        if thing.nouns & subject.nouns:
            return None
    pronoun = _HE_SHE_THEY[subject.agreement]
    return Both(
        sentence(subject.en, english_be(subject.person), feeling, "because", pronoun,
                 english_verb(verb, subject.person, tense, negated=negated), rest.en),
        sentence(subject.ro, romanian_be(subject.person), adjective.forms[subject.agreement], "pentru că",
                 romanian_verb(verb, subject.person, tense, negated=negated), rest.ro),
    )  # fmt: skip


def who_does(draw: Draw) -> Both | None:
    """The woman who is reading a letter is sad. -> Femeia care citește o scrisoare este tristă."""
    subject = phrases.the(draw.noun({"person"}), plural=draw.chance(0.3))
    verb = draw.pick([verb for verb in THING_VERBS if "person" in verb.subjects])
    thing = draw.thing(verb.objects)
    tense = draw.tense(verb)
    if tense not in ("present", "past"):
        return None
    adjective = draw.pick([word for word in ADJECTIVES if "person" in word.groups])
    return Both(
        sentence(subject.en, "who", english_verb(verb, subject.person, tense), thing.en,
                 english_be(subject.person), adjective.en),
        sentence(subject.ro, "care", romanian_verb(verb, subject.person, tense), thing.ro,
                 romanian_be(subject.person), adjective.forms[subject.agreement]),
    )  # fmt: skip


def which_somebody_did(draw: Draw) -> Both | None:
    """The book that Maria bought is new. -> Cartea pe care a cumpărat-o Maria este nouă."""
    verbs = ("read", "write", "buy", "open", "wash", "repair", "draw", "bring", "find", "build", "visit", "sell")
    verb = draw.pick([verb for verb in THING_VERBS if verb.en in verbs])
    noun = draw.noun(verb.objects)
    if noun.is_mass:
        return None
    thing = phrases.the(noun, plural=draw.chance(0.4))
    subject = draw.subject(verb)
    adjective = draw.adjective(noun)
    assert adjective is not None
    romanian = romanian_verb(verb, subject.person, "past", clitic=OBJECT_OF_AGREEMENT[thing.agreement])
    return Both(
        sentence(thing.en, "that", subject.en, english_verb(verb, subject.person, "past"),
                 english_be(thing.person), adjective.en),
        sentence(thing.ro, "pe care", romanian, subject.ro, romanian_be(thing.person),
                 adjective.forms[thing.agreement]),
    )  # fmt: skip


def commanding(draw: Draw) -> Both | None:
    """Please open the window! Do not eat my cake! -> Te rog, deschide fereastra! Nu mânca prăjitura mea!"""
    verb = draw.pick([verb for verb in THING_VERBS if verb.command and "person" in verb.subjects])
    noun = draw.noun(verb.objects)
    thing = phrases.the(noun, draw.adjective(noun, 0.35), plural=not noun.is_mass and draw.chance(0.3))
    if draw.chance(0.25) and not noun.is_mass:
        thing = phrases.owned(draw.pick(("my", "our", "his", "her")), noun)
    if draw.chance(0.3):
        # The command not to do it is the infinitive.
        return Both(sentence("do not", verb.en, thing.en, end="!"), sentence("nu", verb.infinitive, thing.ro, end="!"))
    please = Both("please", "te rog,") if draw.chance(0.4) else NOTHING
    return Both(
        sentence(please.en, verb.en, thing.en, end="!"), sentence(please.ro, verb.command, thing.ro, end="!")
    )  # fmt: skip


def proposing(draw: Draw) -> Both | None:
    """Let us go to the park! -> Să mergem în parc!"""
    if draw.chance(0.5):
        verb, rest = draw.pick(MOVING_VERBS), draw.destination()
    else:
        verb = draw.pick(PLACE_VERBS)
        rest = draw.place(verb.objects)
    if verb.en == "come":
        return None
    action = romanian_verb(verb, WE, "want").split(" ", 1)[1]
    return Both(sentence("let us", verb.en, rest.en, end="!"), sentence(action, rest.ro, end="!"))


_HOW_OFTEN = (("never", "niciodată"), ("always", "mereu"), ("often", "adesea"))


def how_often(draw: Draw) -> Both | None:
    """The cat never drinks water. -> Pisica nu bea niciodată apă."""
    verb = draw.pick([verb for verb in THING_VERBS if not verb.is_stative])
    subject = draw.subject(verb)
    noun = draw.noun(verb.objects)
    thing = phrases.mass(noun) if noun.is_mass else draw.definite(noun)
    if thing.nouns & subject.nouns:
        return None
    english, romanian = draw.pick(_HOW_OFTEN)
    negated = english == "never"
    return Both(
        sentence(subject.en, english_verb(verb, subject.person, "habit", adverb=english), thing.en),
        sentence(subject.ro, romanian_verb(verb, subject.person, "habit", negated=negated), romanian, thing.ro),
    )


KINDS: tuple[tuple[float, Maker], ...] = (
    (20, acting_on_things),
    (6, asking_whether),
    (10, acting_on_persons),
    (4, acting_on_pronouns),
    (9, giving),
    (8, doing_somewhere),
    (6, going_somewhere),
    (2, living_somewhere),
    (9, describing),
    (3, comparing),
    (1.5, superlative),
    (5, being_somewhere),
    (5, there_is),
    (6, liking),
    (4, belonging),
    (3, asking_who),
    (4, asking_what),
    (1.5, asking_how_many),
    (1.5, being_of_age),
    (4, two_clauses),
    (3, giving_reasons),
    (3, who_does),
    (3, which_somebody_did),
    (3, commanding),
    (1, proposing),
    (3, how_often),
)
"""How often each kind of sentence is drawn, relative to the others."""
