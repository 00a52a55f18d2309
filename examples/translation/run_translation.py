"""Fine-tune a sequence-to-sequence model for translation with the Hugging Face Trainer.

An ordinary Trainer script: it knows nothing of hf_zero_plugin, and runs with and without it::

    python run_translation.py --model_name_or_path t5-small --source_lang en --target_lang ro --do_train ...
    hf-zero run run_translation.py --deepspeed configs/zero2_offload.json ... (the same arguments)

Read ``main`` from top to bottom. Bad input ends with one message and exit code 2.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from arguments import Arguments, checkpoint_to_resume, parse_arguments
from data import (
    Pair,
    PairCollator,
    TokenisedPairs,
    iter_hub_rows,
    iter_json_lines,
    read_pairs,
    tokenise,
)
from errors import exit_code_of
from metrics import IGNORED_LABEL, decode, scorer
from models import load_model, load_tokenizer, source_prefix
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

logger = logging.getLogger("translation")

Splits = dict[str, TokenisedPairs]


def main(argv: Sequence[str] | None = None) -> None:
    """Read, train, evaluate, predict, as the arguments ask."""
    arguments = parse_arguments(argv)
    model_args, data_args, training_args = arguments
    set_up_logging(training_args)
    if data_args.preprocessing_num_workers is not None:
        # Read once by the tokenizer's thread pool, so before its first use.
        os.environ["RAYON_NUM_THREADS"] = str(data_args.preprocessing_num_workers)
    checkpoint = checkpoint_to_resume(data_args, training_args)
    pairs = read_splits(arguments)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args, data_args)
    model = load_model(model_args, data_args, tokenizer)
    splits = tokenise_splits(pairs, arguments, tokenizer, source_prefix(model.config, data_args))
    trainer = build_trainer(arguments, model, tokenizer, splits)

    if data_args.predict_before_training:
        score_before_training(trainer, splits.get("test", splits.get("validation")))
    if training_args.do_train:
        train(trainer, checkpoint, len(splits["train"]))
    if training_args.do_eval:
        evaluate(trainer, splits["validation"])
    if training_args.do_predict:
        predict(trainer, splits["test"], tokenizer, data_args.normalize_diacritics)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_up_logging(training_args: Seq2SeqTrainingArguments) -> None:
    """Our own messages once, from the first process; those of transformers as --log_level says."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stdout)
    logger.setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())


def read_splits(arguments: Arguments) -> dict[str, list[Pair]]:
    """The sentence pairs of each split that the arguments need, by split name."""
    model_args, data_args, training_args = arguments
    wanted = {
        "train": (training_args.do_train, data_args.train_file, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.validation_file, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.test_file, data_args.max_predict_samples),
    }
    pairs: dict[str, list[Pair]] = {}
    for split, (is_needed, path, max_pairs) in wanted.items():
        if is_needed:
            rows = iter_json_lines(path) if path is not None else iter_hub_rows(split, data_args, model_args)
            origin = path if path is not None else f"{data_args.dataset_name} {split}"
            pairs[split] = read_pairs(rows, data_args, max_pairs, origin)
    return pairs


def tokenise_splits(
    pairs: dict[str, list[Pair]], arguments: Arguments, tokenizer: PreTrainedTokenizerBase, prefix: str
) -> Splits:
    data_args = arguments.data
    return {
        split: tokenise(
            rows,
            tokenizer,
            prefix=prefix,
            max_source_length=data_args.max_source_length,
            max_target_length=data_args.max_target_length if split == "train" else data_args.val_max_target_length,
        )
        for split, rows in pairs.items()
    }


class TranslationTrainer(Seq2SeqTrainer):
    """Scores every row once: the rows that fill up the last batch when several ranks share it are dropped.

    ``Seq2SeqTrainer`` keeps those repeats, so that BLEU would depend on the number of ranks.
    """

    @property
    def gather_function(self) -> Callable[..., Any]:
        return self.accelerator.gather_for_metrics

    @gather_function.setter
    def gather_function(self, function: Callable[..., Any]) -> None:
        """``evaluate`` and ``predict`` would set the gathering that keeps the repeats."""


def build_trainer(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> TranslationTrainer:
    _, data_args, training_args = arguments
    will_score = training_args.predict_with_generate and ("validation" in splits or "test" in splits)
    if data_args.predict_before_training:
        will_score = training_args.predict_with_generate = True
    collator = PairCollator(
        pad_id=tokenizer.pad_token_id,
        label_pad_id=IGNORED_LABEL if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        source_length=data_args.max_source_length if data_args.pad_to_max_length else None,
        target_length=data_args.max_target_length if data_args.pad_to_max_length else None,
        multiple_of=8 if training_args.fp16 or training_args.bf16 else 1,
        decoder_inputs_of=(
            model.prepare_decoder_input_ids_from_labels if training_args.label_smoothing_factor > 0 else None
        ),
    )
    return TranslationTrainer(
        model=model,
        args=training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=(
            scorer(tokenizer, normalize_diacritics=data_args.normalize_diacritics) if will_score else None
        ),
    )


def train(trainer: Seq2SeqTrainer, checkpoint: str | None, num_pairs: int) -> None:
    result = trainer.train(resume_from_checkpoint=checkpoint)
    write_memory_report(trainer)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": num_pairs}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Seq2SeqTrainer, split: TokenisedPairs) -> None:
    metrics = trainer.evaluate(split, metric_key_prefix="eval")
    metrics["eval_samples"] = len(split)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(
    trainer: Seq2SeqTrainer, split: TokenisedPairs, tokenizer: PreTrainedTokenizerBase, normalize_diacritics: bool
) -> None:
    """Score the test split; with --predict_with_generate also write one translation a line."""
    result = trainer.predict(split, metric_key_prefix="predict")
    metrics = {**(result.metrics or {}), "predict_samples": len(split)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero() and trainer.args.predict_with_generate:
        translations = decode(result.predictions, tokenizer, normalize_diacritics=normalize_diacritics)
        path = Path(trainer.args.output_dir) / "generated_predictions.txt"
        path.write_text("".join(" ".join(line.split()) + "\n" for line in translations), encoding="utf-8")


def score_before_training(trainer: Seq2SeqTrainer, split: TokenisedPairs) -> None:
    """Save the scores of the untrained model as ``before_bleu``, ...

    Not by ``trainer.predict``: before ``train()`` HF refuses it under --deepspeed at stages 0 to 2. Every rank
    translates the whole split, so that no rank waits for another.
    """
    if is_deepspeed_zero3_enabled():
        # At stage 3 HF allows it, and only the engine can gather the weights.
        metrics: dict[str, Any] = dict(trainer.predict(split, metric_key_prefix="before").metrics or {})
    else:
        predictions, labels = translate_with_bare_model(trainer, split)
        scores = trainer.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        metrics = {f"before_{name}": value for name, value in scores.items()}
    metrics["before_samples"] = len(split)
    trainer.log_metrics("before", metrics)
    trainer.save_metrics("before", metrics)


@torch.no_grad()
def translate_with_bare_model(trainer: Seq2SeqTrainer, split: TokenisedPairs) -> tuple[Any, Any]:
    """Token ids of translations and of references, each (number of pairs, longest row), padded with -100."""
    args = trainer.args
    model = trainer.model.to(args.device).eval()
    loader = DataLoader(split, batch_size=args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    predictions: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for batch in loader:
        generated = model.generate(
            input_ids=batch["input_ids"].to(args.device),
            attention_mask=batch["attention_mask"].to(args.device),
            max_length=args.generation_max_length,
            num_beams=args.generation_num_beams or 1,
        )
        predictions.extend(generated.cpu())
        labels.extend(batch["labels"])
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(predictions, batch_first=True, padding_value=IGNORED_LABEL).numpy(),
        pad(labels, batch_first=True, padding_value=IGNORED_LABEL).numpy(),
    )


def write_memory_report(trainer: Seq2SeqTrainer) -> None:
    """Write memory.json if the wrapped model can say what it holds where: place -> kind -> bytes."""
    memory_report = getattr(trainer.model_wrapped, "memory_report", None)
    if callable(memory_report) and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "memory.json"
        path.write_text(json.dumps(memory_report(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "run_translation.py"))
