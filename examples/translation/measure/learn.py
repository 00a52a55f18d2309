"""The process that learns to translate under one engine; ``learning.py`` starts it.

    python -m measure.learn '{"engine": "plain", ...}' OUT.json

Writes loss and BLEU over steps and example translations. BLEU is sacrebleu's, of greedy translations, on text that the
model was not trained on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

from measure.spec import CONFIG, PLAIN, ZERO

if TYPE_CHECKING:
    from data import Pair
    from transformers import Seq2SeqTrainer, TrainerControl, TrainerState

NUM_EXAMPLES = 3
TRANSLATE_BATCH = 512
REFUSED = 2
"""Exit code: what was given cannot be learned from."""
SCHEDULE_STEPS = 1000
"""Steps after which the learning rate is down by a third; the schedule's own default would end it sooner."""


@dataclass(frozen=True, kw_only=True)
class LearnSpec:
    """What one process learns; travels as JSON. The same for every engine but ``engine``."""

    engine: str
    train_file: str
    test_files: dict[str, str]
    """Name of a held-out set -> its file."""
    tokenizer: str
    hold_out: int = 300
    """Pairs of the training file that are kept from training: a test set of its own kind of text."""
    max_test_pairs: int = 500
    preset: str = "t5-small"
    overrides: dict[str, Any] = field(default_factory=dict)
    steps: int = 2000
    batch_size: int = 256
    eval_steps: int = 250
    log_steps: int = 20
    learning_rate: float = 1e-3
    num_warmup: int = 200
    max_length: int = 96
    max_seconds: float = 0.0
    """Stop after this time, translations included; 0 means never."""
    precision: str = "bf16"
    seed: int = 42


def main() -> None:
    spec, out = LearnSpec(**json.loads(sys.argv[1])), Path(sys.argv[2])
    if spec.engine == ZERO:
        import hf_zero_plugin

        hf_zero_plugin.activate()
    try:
        result = learn(spec)
    except UserError as error:
        print(f"learning.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(REFUSED)
    draft = out.with_suffix(".new")
    draft.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, out)
    sys.stdout.flush()
    os._exit(0)  # no waiting for threads and process groups of libraries


def learn(spec: LearnSpec) -> dict[str, Any]:
    import torch
    from presets import PRESETS
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    from measure import texts
    from measure.cell import describe_machine

    tokenizer = texts.load_tokenizer(spec.tokenizer)
    texts.check_vocabulary(tokenizer, PRESETS[spec.preset], spec.preset)
    train, tests = read_splits(spec)
    set_seed(spec.seed)
    model = T5ForConditionalGeneration(T5Config(**{**PRESETS[spec.preset], **spec.overrides}))
    num_parameters = sum(p.numel() for p in model.parameters())
    watcher = make_watcher(spec, tests, tokenizer)
    trainer = build_trainer(spec, model, tokenizer, train, watcher)
    watcher.trainer = trainer
    started = time.perf_counter()
    trainer.train()
    examples = tests[next(iter(tests))][:: max(1, len(tests[next(iter(tests))]) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    shown = translate(model, tokenizer, [pair.source for pair in examples], spec.max_length)
    return {
        "engine": spec.engine,
        "machine": describe_machine(),
        "precision": spec.precision if torch.cuda.is_available() else "fp32",
        "num_parameters": num_parameters,
        "num_train_pairs": len(train),
        "test_pairs": {name: len(pairs) for name, pairs in tests.items()},
        "steps": trainer.state.global_step,
        "batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "seconds": time.perf_counter() - started,
        "loss": [[h["step"], h["loss"]] for h in trainer.state.log_history if "loss" in h],
        "bleu": watcher.scores,
        "examples": [
            {"source": pair.source, "translation": text, "reference": pair.target}
            for pair, text in zip(examples, shown)
        ],
    }


def read_splits(spec: LearnSpec) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """Training pairs and held-out sets; no English sentence of a held-out set is trained on."""
    import random

    from measure.texts import read_pairs

    pairs = read_pairs(Path(spec.train_file), comma_below=True)
    tests = {
        name: read_pairs(Path(path), spec.max_test_pairs, comma_below=True) for name, path in spec.test_files.items()
    }
    random.Random(spec.seed).shuffle(pairs)
    held_out = {pair.source for pair in pairs[: spec.hold_out]}
    if spec.hold_out:
        # First: it is the one that shows most, and examples are taken from the first.
        own = list({pair.source: pair for pair in pairs[: spec.hold_out]}.values())
        tests = {"held out of the training text": own, **tests}
    if len(held_out) == len({pair.source for pair in pairs}):
        raise UserError(f"{spec.train_file}: all of its {len(pairs)} pairs are held out; lower --hold-out.")
    unseen = held_out | {pair.source for test in tests.values() for pair in test}
    return [pair for pair in pairs if pair.source not in unseen], tests


def build_trainer(spec: LearnSpec, model: Any, tokenizer: Any, train: list[Pair], watcher: Any) -> Seq2SeqTrainer:
    import torch
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    from measure import texts

    cuda = torch.cuda.is_available()
    config = None
    if spec.engine != PLAIN:
        config = json.loads(CONFIG.read_text(encoding="utf-8"))
        # Without it both runs follow the Trainer's own schedule, so that nothing but the engine differs.
        del config["scheduler"]
    arguments = Seq2SeqTrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), f"translation_learning_{os.getpid()}"),
        per_device_train_batch_size=spec.batch_size,
        max_steps=spec.steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="inverse_sqrt",  # depends on no number of steps: a run cut short is a shorter run
        lr_scheduler_kwargs={"timescale": max(SCHEDULE_STEPS, spec.num_warmup)},
        warmup_steps=spec.num_warmup,
        weight_decay=0.01,
        fp16=cuda and spec.precision == "fp16",
        bf16=cuda and spec.precision == "bf16",
        seed=spec.seed,
        logging_steps=spec.log_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        deepspeed=config,
        use_cpu=not cuda and config is None,
    )
    return Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=texts.tokenised(train, tokenizer, spec.max_length),
        data_collator=texts.collator(tokenizer),
        callbacks=[watcher],
    )


def make_watcher(spec: LearnSpec, tests: dict[str, list[Pair]], tokenizer: Any) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """BLEU every ``eval_steps`` and at the end; the end comes when time is up."""

        def __init__(self) -> None:
            self.trainer: Seq2SeqTrainer | None = None
            self.scores: dict[str, list[list[float]]] = {name: [] for name in tests}
            self.started = time.perf_counter()

        def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            late = 0 < spec.max_seconds < time.perf_counter() - self.started
            last = late or state.global_step >= state.max_steps
            if last or state.global_step % spec.eval_steps == 0:
                self.score(state)
            if late:
                control.should_log = control.should_training_stop = True

        def score(self, state: TrainerState) -> None:
            assert self.trainer is not None
            for name, pairs in tests.items():
                texts = translate(self.trainer.model, tokenizer, [pair.source for pair in pairs], spec.max_length)
                self.scores[name].append([state.global_step, bleu(texts, [pair.target for pair in pairs])])
            found = ", ".join(f"{name} {curve[-1][1]:.1f}" for name, curve in self.scores.items())
            print(f"{spec.engine} step {state.global_step}: BLEU {found}", flush=True)

    return Watcher()


def bleu(translations: list[str], references: list[str]) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(translations, [references]).score)


def translate(model: Any, tokenizer: Any, sources: list[str], max_length: int) -> list[str]:
    """Greedy translations, diacritics normalised; the model is left in training mode if it was."""
    import torch
    from data import to_comma_below

    from measure.texts import PREFIX

    was_training = model.training
    model.eval()
    out: list[str] = []
    # Together what is equally long: a batch takes as many steps as its longest translation.
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    for start in range(0, len(order), TRANSLATE_BATCH):
        batch = [PREFIX + sources[index] for index in order[start : start + TRANSLATE_BATCH]]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        device = next(model.parameters()).device
        with torch.no_grad():
            ids = model.generate(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=inputs["attention_mask"].to(device),
                max_length=max_length,
                num_beams=1,
                do_sample=False,
            )
        out.extend(to_comma_below(text.strip()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True))
    model.train(was_training)
    by_source = dict(zip(order, out))
    return [by_source[index] for index in range(len(sources))]


if __name__ == "__main__":
    main()
