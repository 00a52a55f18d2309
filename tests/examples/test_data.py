"""Reading, cleaning, tokenising and batching of sentence pairs."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from arguments import DataArguments, ModelArguments
from data import Pair, PairCollator, iter_hub_rows, iter_json_lines, read_pairs, to_comma_below, tokenise
from errors import UserError
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from tests.examples.conftest import Workspace, pair, write_lines

EN_RO = DataArguments(source_lang="en", target_lang="ro")


def read(path: Path, data: DataArguments = EN_RO, max_pairs: int | None = None) -> list[Pair]:
    return read_pairs(iter_json_lines(path), data, max_pairs, str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"translation": {"en": "a", "ro": "b"}', "line 2, column"),
        ("plain text", "line 2, column 1: not JSON"),
        ('["a", "b"]', "line 2: no object 'translation'"),
        ('{"en": "a", "ro": "b"}', "line 2: no object 'translation'"),
        ('{"translation": "a"}', "line 2: no object 'translation'"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "bad.json", [pair("a", "b"), line])
    with pytest.raises(UserError, match=message) as caught:
        list(iter_json_lines(path))
    assert str(path) in str(caught.value)


def test_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin2.json"
    path.write_bytes('{"translation": {"en": "a", "ro": "ş"}}\n'.encode("iso-8859-2"))
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(iter_json_lines(path))


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_text('\ufeff{"translation": {"en": "a", "ro": "b"}}\n\n  \n', encoding="utf-8")
    assert read(path) == [Pair("a", "b")]


def test_rows_that_are_empty_or_lack_a_language_are_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(
        tmp_path / "holes.json",
        [
            pair(" a ", "b"),
            pair("", "b"),
            pair("a", "  "),
            {"translation": {"en": "a"}},
            pair("a", None),
            pair("c", "d"),
        ],
    )
    with caplog.at_level(logging.WARNING, logger="translation"):
        assert read(path) == [Pair("a", "b"), Pair("c", "d")]
    assert "2 pairs used, 4 rows skipped (2 lack 'en' or 'ro', 2 are empty)" in caplog.text


def test_no_usable_row_names_the_languages_seen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "german.json", [{"translation": {"de": "a", "en": "b"}}])
    with pytest.raises(UserError, match="Languages seen: de, en"):
        read(path)


def test_limit_counts_usable_pairs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "some.json", [pair("", "x"), pair("a", "b"), pair("c", "d"), pair("e", "f")])
    assert read(path, max_pairs=2) == [Pair("a", "b"), Pair("c", "d")]


def test_diacritics_are_normalised_on_request_and_on_the_romanian_side_only(tmp_path: Path) -> None:
    cedilla = "Şi ţară, s\u0326i t\u0327ară"
    path = write_lines(tmp_path / "cedilla.json", [pair("a Şehir", cedilla)])
    assert read(path)[0].target == cedilla
    normalised = DataArguments(source_lang="en", target_lang="ro", normalize_diacritics=True)
    assert read(path, normalised) == [Pair("a Şehir", "Și țară, și țară")]
    assert unicodedata.is_normalized("NFC", to_comma_below(cedilla))


def test_hub_without_network_is_one_clear_error(tmp_path: Path) -> None:
    data = DataArguments(source_lang="en", target_lang="ro", dataset_name="wmt16", dataset_config_name="ro-en")
    with pytest.raises(UserError, match=r"wmt16 \(ro-en\), split 'train'(.|\n)*--train_file"):
        list(iter_hub_rows("train", data, ModelArguments(cache_dir=str(tmp_path))))


def test_hub_dataset_may_be_a_local_folder(tmp_path: Path) -> None:
    """The same road as wmt16's, without its download."""
    write_lines(tmp_path / "train.jsonl", [pair("a", "b"), pair("c", "d")])
    data = DataArguments(source_lang="en", target_lang="ro", dataset_name=str(tmp_path))
    rows = iter_hub_rows("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert read_pairs(rows, data, None, "local") == [Pair("a", "b"), Pair("c", "d")]


def test_tokenised_rows_equal_the_tokenizers_own(workspace: Workspace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace.tokenizer)
    pairs = read(workspace.files["test"])
    dataset = tokenise(pairs, tokenizer, prefix="x: ", max_source_length=9, max_target_length=5)
    assert len(dataset) == len(pairs)
    for index, (source, target) in enumerate(pairs):
        row = dataset[index]
        assert row["input_ids"] == tokenizer("x: " + source, max_length=9, truncation=True)["input_ids"]
        assert row["labels"] == tokenizer(target, max_length=5, truncation=True)["input_ids"]
        assert row["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_unknown_characters_are_reported(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace.tokenizer)
    with caplog.at_level(logging.WARNING, logger="translation"):
        tokenise([Pair("a", "猫")], tokenizer, prefix="", max_source_length=9, max_target_length=9)
    assert "unknown to the tokenizer" in caplog.text


ROWS = [{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [8, 1], "labels": [9, 10, 11, 1]}]


def test_batches_are_padded_to_their_longest_row() -> None:
    batch = PairCollator(pad_id=0, label_pad_id=-100)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100, -100], [9, 10, 11, 1]]


def test_batches_can_be_padded_to_the_limits_and_to_multiples() -> None:
    to_limits = PairCollator(pad_id=0, label_pad_id=0, source_length=6, target_length=5)(ROWS)
    assert (to_limits["input_ids"].shape, to_limits["labels"].shape) == ((2, 6), (2, 5))
    to_multiples = PairCollator(pad_id=0, label_pad_id=-100, multiple_of=8)(ROWS)
    assert (to_multiples["input_ids"].shape, to_multiples["labels"].shape) == ((2, 8), (2, 8))


def test_decoder_inputs_are_the_models_own_shift() -> None:
    config = T5Config(
        vocab_size=16, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    batch = PairCollator(0, -100, decoder_inputs_of=model.prepare_decoder_input_ids_from_labels)(ROWS)
    assert torch.equal(batch["decoder_input_ids"], torch.tensor([[0, 7, 1, 0], [0, 9, 10, 11]]))
