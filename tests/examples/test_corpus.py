"""The corpus we wrote: the same everywhere, no sentence shared between splits, and correct Romanian."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from corpus import phrases
from corpus.build import MAX_WORDS, Corpus, build_corpus, write_corpus
from corpus.clauses import HER, HIM, THEM_FEMININE, romanian_verb
from corpus.lexicon import (
    ADJECTIVES,
    FEELING_VERBS,
    GIVING_VERBS,
    MOVING_VERBS,
    NOUN_BY_NAME,
    NOUNS,
    NUMERALS,
    PERSON_VERBS,
    PLACE_VERBS,
    THING_VERBS,
    Adjective,
    Verb,
)
from corpus.sentences import KINDS
from corpus.tokenizer import NUM_SENTINELS, VOCAB_SIZE, build_tokenizer
from transformers import AutoTokenizer

ALL_VERBS = (*THING_VERBS, *PERSON_VERBS, *GIVING_VERBS, *PLACE_VERBS, *FEELING_VERBS, *MOVING_VERBS)
ROMANIAN_LETTERS = set("abcdefghijklmnopqrstuvwxyzăâîșț")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(num_train=4000)


def adjective(english: str, romanian: str = "") -> Adjective:
    return next(word for word in ADJECTIVES if word.en == english and word.forms["ms"].startswith(romanian))


def verb(english: str) -> Verb:
    return next(word for word in ALL_VERBS if word.en == english)


def test_same_arguments_give_the_same_corpus(corpus: Corpus) -> None:
    assert build_corpus(num_train=4000) == corpus
    assert build_corpus(num_train=50, seed=1) != build_corpus(num_train=50, seed=2)


def test_held_out_split_does_not_depend_on_how_much_is_trained_on(corpus: Corpus) -> None:
    assert build_corpus(num_train=10).test == corpus.test


def test_splits_share_no_sentence_in_either_language(corpus: Corpus) -> None:
    every = [*corpus.train, *corpus.validation, *corpus.test]
    assert len(every) == 4000 + 160 + 160
    for side in zip(*every):
        folded = [re.sub(r"\W+$", "", text) + text[-1] for text in side]
        assert len(set(folded)) == len(every)


def test_sentences_are_clean_text(corpus: Corpus) -> None:
    for english, romanian in corpus.train:
        for text in (english, romanian):
            assert unicodedata.is_normalized("NFC", text)
            assert not re.search(r"\s\s|^\s|\s$|\s[.,?!]", text), text
            assert text[0].isupper(), text
            assert text[-1] in ".?!", text
        assert english[-1] == romanian[-1], (english, romanian)
        assert english.isascii(), english
        assert set(re.sub(r"[-.,?!\s]", "", romanian).lower()) <= ROMANIAN_LETTERS, romanian
        assert not set("şţŞŢãÃ") & set(romanian), romanian
        assert len(english.split()) <= MAX_WORDS


def test_every_kind_of_sentence_occurs() -> None:
    from corpus.draw import Draw

    for _, kind in KINDS:
        draw = Draw(3)
        assert any(kind(draw) is not None for _ in range(50)), kind.__name__


def test_no_seed_runs_into_an_empty_choice() -> None:
    for seed in range(20):
        build_corpus(num_train=1000, seed=seed)


# Rules of Romanian that every sentence must keep


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"\bpe (un|o|niște)\b(?! )", "pe is for definite persons"),
        (r"\bîn (un|o) ", "în + un is într-un"),
        (r"\b(îl|îi|mă|se) (am|ai|a|ați|au)\b", "before a avea the pronoun is joined: l-am"),
        (r"\bo (am|ai|a|ați|au) \w+(t|s)\b", "feminine o goes behind the participle: am văzut-o"),
        (r"\b(douăzeci|treizeci|patruzeci|cincizeci) (?!de )", "from twenty on: de"),
        (r"\b(doi|trei|patru|cinci|șase|șapte|opt|zece) de ", "below twenty: no de"),
        (r"\b(\w+) \1\b", "a word twice"),
        (r"niciodată", "niciodată needs nu"),
    ],
)
def test_no_sentence_breaks_a_rule(corpus: Corpus, pattern: str, why: str) -> None:
    for _, romanian in corpus.train:
        if re.search(pattern, romanian.lower()):
            assert why == "niciodată needs nu", (why, romanian)
            assert re.search(r"\bnu\b", romanian.lower()), (why, romanian)


def test_counted_nouns_agree_in_gender(corpus: Corpus) -> None:
    """doi băieți, două fete, două scaune: neuters count as feminine in the plural."""
    genders = {noun.ro_plural: noun.gender for noun in NOUNS if not noun.is_mass}
    seen = 0
    for _, romanian in corpus.train:
        for number, noun in re.findall(r"\b(doi|două|doisprezece|douăsprezece) (\w+)", romanian.lower()):
            if noun in genders:
                assert (genders[noun] == "m") == (number in ("doi", "doisprezece")), romanian
                seen += 1
    assert seen > 20


def test_articles_and_demonstratives_agree_in_gender(corpus: Corpus) -> None:
    genders = {noun.ro: noun.gender for noun in NOUNS}
    seen = 0
    for _, romanian in corpus.train:
        for word, noun in re.findall(r"\b(un|acest|această|acel|acea) (\w+)", romanian.lower()):
            if noun in genders:
                assert (genders[noun] == "f") == (word in ("această", "acea")), romanian
                seen += 1
    assert seen > 100


def test_definite_persons_are_doubled_by_a_pronoun(corpus: Corpus) -> None:
    """îl vede pe băiat, a văzut-o pe fată: pe never stands without its pronoun (but for the question pe cine)."""
    places = {place.ro for place in NOUNS} | {place.ro_the for place in NOUNS}
    seen = 0
    for _, romanian in corpus.train:
        found = re.search(r"(.*)\bpe (\w+)", romanian, re.IGNORECASE)
        persons = {noun.ro for noun in NOUNS if noun.tags & {"person", "kin"}} | {"Maria", "Andrei", "Radu", "Ana"}
        if found and found[2] in persons and found[2] not in places - persons:
            assert re.search(r"\b(îl|o|îi|le|l-|i-|le-)|-o\b", found[1].lower()), romanian
            seen += 1
    assert seen > 50


# Known translations, written by hand


def test_noun_phrases() -> None:
    book, girl, egg, dog = (NOUN_BY_NAME[name] for name in ("book", "girl", "egg", "dog"))
    new, fresh, old = adjective("new"), adjective("fresh"), adjective("old", "vechi")
    assert phrases.the(book, new).ro == "cartea nouă"
    assert phrases.the(book, new, plural=True).ro == "cărțile noi"
    assert phrases.the(book, old).ro_of == "cărții vechi"
    assert phrases.the(girl, adjective("tall")).ro_of == "fetei înalte"
    assert phrases.the(girl).ro_pe == "fată"
    assert phrases.the(girl, adjective("tall")).ro_pe == "fata înaltă"
    assert phrases.a(egg, fresh).ro == "un ou proaspăt"
    assert phrases.a(egg).en == "an egg"
    assert phrases.number(0, egg, fresh).ro == "două ouă proaspete"
    assert phrases.number(0, dog).ro == "doi câini"
    twenty = [english for english, _, _ in NUMERALS].index("twenty")
    assert phrases.number(twenty, book).ro == "douăzeci de cărți"
    assert phrases.this(dog, plural=True).ro == "acești câini"
    assert phrases.owned("my", NOUN_BY_NAME["sister"]).ro == "sora mea"
    assert phrases.owned("my", NOUN_BY_NAME["sister"]).ro_of == "surorii mele"
    assert phrases.owned_by(phrases.the(girl), book).ro == "cartea fetei"
    assert phrases.owned_by(phrases.the(girl), book, new, plural=True).ro == "cărțile noi ale fetei"
    assert phrases.owned_by(phrases.the(girl, plural=True), dog).en == "the girls' dog"
    maria, andrei = phrases.NAMES[0], phrases.NAMES[5]
    assert (maria.ro_of, andrei.ro_of) == ("Mariei", "lui Andrei")
    assert phrases.both(maria, andrei).agreement == "mp"
    assert phrases.both(maria, phrases.NAMES[1]).agreement == "fp"


def test_verbs() -> None:
    see, play = verb("see"), verb("play")
    third, they = phrases.THIRD, phrases.THEY
    assert romanian_verb(see, third, "present", clitic=HIM) == "îl vede"
    assert romanian_verb(see, third, "past", clitic=HIM) == "l-a văzut"
    assert romanian_verb(see, third, "past", clitic=HER, negated=True) == "nu a văzut-o"
    assert romanian_verb(see, phrases.FIRST, "past", clitic=THEM_FEMININE) == "le-am văzut"
    assert romanian_verb(see, they, "future", clitic=HER) == "o vor vedea"
    assert romanian_verb(see, third, "want", clitic=HER) == "vrea să o vadă"
    assert romanian_verb(see, phrases.FIRST, "can") == "pot să văd"
    assert romanian_verb(play, they, "past", negated=True) == "nu s-au jucat"
    assert romanian_verb(play, phrases.WE, "future") == "ne vom juca"
    assert romanian_verb(play, phrases.FIRST, "must") == "trebuie să mă joc"
    assert romanian_verb(play, they, "want") == "vor să se joace"


def test_lexicon_is_complete_and_clean() -> None:
    for noun in NOUNS:
        forms = [noun.ro, noun.ro_the, noun.ro_of]
        forms += [] if noun.is_mass else [noun.ro_plural, noun.ro_the_plural, noun.ro_of_plural]
        assert all(set(form) <= ROMANIAN_LETTERS for form in forms), noun
        ending = {"m": ("ul", "le"), "n": ("ul", "le"), "f": ("a",)}[noun.gender]
        assert noun.ro_the.endswith(ending), noun
        assert noun.is_mass or noun.ro_of_plural == noun.ro_the_plural[: -1 if noun.gender == "m" else -2] + "lor", noun
    for word in ALL_VERBS:
        assert all(set(form) <= ROMANIAN_LETTERS for form in (*word.present, word.subjunctive, word.participle))
        # In every conjugation "they" equals "I" or "he".
        assert word.present[5] in (word.present[0], word.present[2]) or word.en in ("want", "have"), word


# Tokenizer


def test_tokenizer_keeps_t5s_conventions_and_loses_nothing(corpus: Corpus, tmp_path: Path) -> None:
    build_tokenizer(text for pair in corpus.train for text in pair).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == VOCAB_SIZE - 1
    assert tokenizer.convert_tokens_to_ids(f"<extra_id_{NUM_SENTINELS - 1}>") == VOCAB_SIZE - NUM_SENTINELS
    for pair in corpus.test:
        for text in pair:
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    decomposed = unicodedata.normalize("NFD", "Fata știe.")
    assert tokenizer(decomposed)["input_ids"] == tokenizer("Fata știe.")["input_ids"]


def test_tokenizer_is_the_same_each_time(corpus: Corpus) -> None:
    texts = [text for pair in corpus.train[:500] for text in pair]
    first, second = (build_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_files_are_what_run_translation_reads(corpus: Corpus, tmp_path: Path) -> None:
    from data import iter_json_lines

    paths = write_corpus(corpus, tmp_path)
    assert [tuple(row.values()) for row in iter_json_lines(paths["test"])] == [tuple(pair) for pair in corpus.test]
    assert json.loads(paths["train"].read_text(encoding="utf-8").splitlines()[0]).keys() == {"translation"}
