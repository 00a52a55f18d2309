"""``resolve``: a loaded configuration, TrainingArguments and the model -> ``ResolvedConfig``.

::

    loaded   = load_config("ds_config.json")
    resolved = resolve(loaded, TrainingFacts.of(training_args), ModelFacts.of(model.config))
    engine   = ZeroEngine(model, resolved.settings, ...)

Resolve what the user wrote, not the dict that accelerate has been over: by then, absent keys have turned into
numbers that nobody chose (``gradient_accumulation_steps: 1``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from hf_zero_plugin.config.batch import batch_problem, derive_batch
from hf_zero_plugin.config.build import build_settings
from hf_zero_plugin.config.checks import (
    cross_problems,
    cross_warnings,
    mismatches,
    unknown_totals,
)
from hf_zero_plugin.config.entries import list_entries
from hf_zero_plugin.config.facts import ModelFacts, TrainingFacts
from hf_zero_plugin.config.fields import AUTO
from hf_zero_plugin.config.fill import Fill, all_fills, remaining_autos
from hf_zero_plugin.config.load import LoadedConfig, load_config
from hf_zero_plugin.config.paths import is_present, lookup, put
from hf_zero_plugin.config.problems import Problem, raise_problems
from hf_zero_plugin.config.resolved import Entry, ResolvedConfig, drop_own_autos
from hf_zero_plugin.config.schema import DsConfig
from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.config.validate import refusals, schema_problems

__all__ = [
    "Entry",
    "Examination",
    "ModelFacts",
    "ResolvedConfig",
    "TrainingFacts",
    "dict_for_trainer",
    "examine",
    "resolve",
    "resolve_dict",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What resolving would give, mistakes included; ``resolved`` raises them."""

    loaded: LoadedConfig
    entries: list[Entry]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    filled: dict[str, Any]

    def resolved(self) -> ResolvedConfig:
        """Raises ConfigError if there are problems, all of them at once."""
        raise_problems(self.loaded.origin, self.problems, self.loaded.positions)
        return ResolvedConfig(
            settings=build_settings(DsConfig.model_validate(self.filled)),
            entries=self.entries,
            warnings=self.warnings,
            origin=self.loaded.origin,
            filled=self.filled,
        )


def resolve(
    loaded: LoadedConfig,
    args: TrainingFacts | None = None,
    model: ModelFacts | None = None,
    *,
    world_size: int | None = None,
) -> ResolvedConfig:
    """Replace every "auto", inherit absent keys, check what has to agree.

    Args:
        loaded: the user's configuration.
        args: None when there is no Trainer; then "auto" is an error, and absent keys take DeepSpeed's defaults.
        model: None while the model is unknown; sizes that depend on it then take their defaults.
        world_size: ranks, to derive batch sizes by; only needed without ``args``.

    Raises:
        ConfigError: with every mistake found, in the order of the file.
    """
    return examine(loaded, args, model, world_size=world_size).resolved()


def resolve_dict(config: dict[str, Any], *, world_size: int | None = None) -> EngineSettings:
    """Settings from a dict that somebody else has filled in already.

    Raises:
        ConfigError: a mistake, or an "auto" that is left; every one of them is named.
    """
    return resolve(load_config(config), world_size=world_size).settings


def examine(
    loaded: LoadedConfig,
    args: TrainingFacts | None,
    model: ModelFacts | None,
    *,
    world_size: int | None = None,
) -> Examination:
    """As ``resolve``, but mistakes are returned beside the entries, to be shown together."""
    filled = copy.deepcopy(loaded.config)
    sources: dict[str, str] = {}
    problems: list[Problem] = []
    warnings = [*loaded.warnings]
    fills: dict[str, Fill] = {}

    batch = batch_problem(loaded.config, args.world_size if args else world_size)
    if batch is not None:
        problems.append(batch)
    if args is None:
        problems += [_left_over(path) for path in remaining_autos(filled)]
        problems += unknown_totals(filled)
        sources, underivable = derive_batch(filled, world_size)
        problems += underivable
    else:
        fills = all_fills(_with_stage(loaded.config), args, model)
        differing, hints = mismatches(loaded.config, fills, args)
        problems += [problem for problem in differing if batch is None or problem.path != batch.path]
        warnings += hints
        sources = _fill_in(filled, fills)
    problems += refusals(filled)
    warnings += cross_warnings(filled, args)

    for path in list(remaining_autos(filled)):
        put(filled, path, None)
    broken = [problem for problem in schema_problems(filled) if problem.path not in {p.path for p in problems}]
    problems += [_from_arguments(problem, fills.get(problem.path)) for problem in broken]
    try:
        validated: DsConfig | None = DsConfig.model_validate(filled)
    except ValidationError:
        validated = None
    if validated is not None:
        problems += cross_problems(validated, sources)
    entries = list_entries(loaded, filled, fills, sources, validated, args)
    return Examination(
        loaded=loaded, entries=entries, warnings=tuple(warnings), problems=tuple(problems), filled=filled
    )


def dict_for_trainer(loaded: LoadedConfig) -> dict[str, Any]:
    """The user's configuration as the Trainer should be given it, before TrainingArguments fills in its "auto".

    Closes what the Trainer and accelerate leave open: keys that TrainingArguments knows are present as "auto"
    (clipping, accumulation, batch sizes, fp16 and bf16), a stage is always there, devices and the stage-3 save
    are decided, and an offloaded optimizer is not swapped for another.
    """
    config = copy.deepcopy(loaded.config)
    for path, fill in all_fills(_with_stage(config), TrainingFacts(), None).items():
        fixed = not fill.arguments and path.startswith(("$.zero_optimization.", "$.amp."))
        by_model = path.endswith(("_bucket_size", "_persistence_threshold"))
        if lookup(config, path) == AUTO and fixed and not by_model:
            put(config, path, fill.value)
        elif fill.inherited and fill.arguments and not is_present(config, path):
            put(config, path, AUTO)
    if lookup(config, "$.scheduler.params.warmup_num_steps") == 0:
        put(config, "$.scheduler.params.warmup_num_steps", AUTO)
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    config["zero_force_ds_cpu_optimizer"] = False
    drop_own_autos(config)
    return config


def _with_stage(config: dict[str, Any]) -> dict[str, Any]:
    """A view in which a stage "auto" already is the stage it stands for."""
    if lookup(config, "$.zero_optimization.stage") != AUTO:
        return config
    return {**config, "zero_optimization": {**config["zero_optimization"], "stage": 2}}


def _fill_in(filled: dict[str, Any], fills: dict[str, Fill]) -> dict[str, str]:
    """Write fills into the configuration; return where each written value came from."""
    sources = {}
    for path, fill in fills.items():
        is_auto = lookup(filled, path) == AUTO
        if is_auto or (fill.inherited and not is_present(filled, path)):
            if fill.value is not None or is_auto:
                put(filled, path, fill.value)
            sources[path] = fill.source
    return sources


def _left_over(path: str) -> Problem:
    return Problem(
        path=path,
        what='"auto" is left, and nothing here fills it in',
        why='"auto" is filled in by the Trainer from its arguments, and there is no Trainer.',
        fix="Write a value, or pass the configuration to the Trainer.",
    )


def _from_arguments(problem: Problem, fill: Fill | None) -> Problem:
    if fill is None or not fill.arguments:
        return problem
    return Problem(
        path=problem.path,
        what=problem.what,
        why=f"The value comes from {' and '.join(f'--{name}' for name in fill.arguments)}.",
        fix=problem.fix.replace("Write", "Pass"),
    )
