"""A tokenizer made from the corpus itself, with T5's conventions, so that the demo downloads nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
NUM_SENTINELS = 100
VOCAB_SIZE = 2048
"""Word pieces and T5's sentinels <extra_id_0> to <extra_id_99> together; that of the preset t5-demo."""


def build_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-pair pieces of ``texts``: <pad> 0, </s> 1, <unk> 2, sentinels last, </s> after every sentence.

    Byte pairs rather than T5's unigrams: their training gives the same pieces on every machine.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    # NFC: a letter and its comma below are one character, however they were typed.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SENTINELS, special_tokens=[PAD, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    # T5 counts them down from the end of the vocabulary.
    tokenizer.add_special_tokens(sentinels[::-1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=sentinels,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(texts: Iterable[str], directory: Path) -> PreTrainedTokenizerFast:
    """Build and save where AutoTokenizer finds it."""
    tokenizer = build_tokenizer(texts)
    tokenizer.save_pretrained(directory)
    return tokenizer
