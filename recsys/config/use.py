"""Which verb reads which settings; unread settings are warned about, contradicting ones refused."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from recsys.config.base import Fact, fields_of
from recsys.config.tree import Config
from recsys.errors import UserError

logger = logging.getLogger(__name__)

TRIALS = "-trials/"
"""Separates the search's run name from the trial's in the run name of a trial."""

_FACTS = {key: facts for key, _, facts in fields_of(Config)}

SEARCHED = tuple(key for key, facts in _FACTS.items() if Fact.SEARCHED in facts)
"""Keys that a search varies: its trials have values of their own."""

_STORE = ("storage", "run.scratch")
_RUN = (*_STORE, "run.name", "run.resume", "run.lease_seconds", "run.trackers", "run.project")
_VALIDATION = ("evaluation.metric", "evaluation.cutoffs", "evaluation.batch_size")
_DATASET = ("data.dataset", "data.max_history")
_TRAIN = (*_RUN, *_DATASET, *_VALIDATION, "model", "optimizer", "training", "fairness", "checkpoint")

READS: dict[str, tuple[str, ...]] = {
    "jobs.prepare_data": (*_STORE, "data"),
    "jobs.pretrain": (*_RUN, "data.dataset", "model.text", "optimizer", "training", "pretraining", "checkpoint"),
    "jobs.train": _TRAIN,
    "jobs.plan_memory": (*_STORE, *_DATASET, *_VALIDATION, "model", "training", "fairness"),
    "jobs.evaluate": (*_STORE, "evaluation"),
    "jobs.export": (*_STORE, *_VALIDATION, "run.name", "export"),
    "tune.search": (*_TRAIN, "search"),
    "serve.deploy": (*_STORE, "run.name", "export.name", "service"),
    "serve.stop": ("run.scratch",),
}
"""Sections and keys that a verb reads from its config; `jobs.pipeline` reads what its stages read, and `serve run` what deploying reads."""

_NOT_READ = {
    "jobs.prepare_data": ("data.dataset",),
    "jobs.pretrain": ("model.text.mode", "model.text.lora_rank", "model.text.lora_targets", "model.text.refresh_steps"),
    "tune.search": SEARCHED,
}
"""Keys below those of READS that a verb does not read."""

STAGES = {
    "prepare_data": "jobs.prepare_data",
    "train": "jobs.train",
    "train_id_only": "jobs.train",
    "search": "tune.search",
    "evaluate": "jobs.evaluate",
    "export": "jobs.export",
    "serve": "serve.deploy",
}
"""The verb of each stage of the pipeline."""

_OF_DATASET = ("data.",)
_OF_CHECKPOINT = ("data.", "model.", "optimizer.", "training.", "fairness.", "pretraining.")

CARRIED: dict[str, tuple[str, ...]] = {
    "jobs.pretrain": _OF_DATASET,
    "jobs.train": _OF_DATASET,
    "jobs.plan_memory": _OF_DATASET,
    "jobs.evaluate": _OF_CHECKPOINT,
    "jobs.export": _OF_CHECKPOINT,
    "tune.search": _OF_DATASET,
    "serve.deploy": _OF_CHECKPOINT,
}
"""Keys that the dataset, checkpoint or export a verb works on was made with."""


def facts_of(key: str) -> frozenset[Fact]:
    """Return the facts of a key or section; for one that this release does not know, those of the section around it."""
    while key and key not in _FACTS:
        key = key.rpartition(".")[0]
    return _FACTS.get(key, frozenset())


def reads(verb: str, key: str, stages: Iterable[str] = ()) -> bool:
    """Return whether a verb reads a key; the pipeline reads what its stages read."""
    if verb == "jobs.pipeline":
        return key == "run.stages" or key.startswith("service.token_env") or any(reads(STAGES[stage], key) for stage in stages)
    return _is_under(key, READS[verb]) and not _is_under(key, _NOT_READ.get(verb, ()))


def unread(verb: str, config: Config) -> list[str]:
    """List the given keys that the verb never reads; a section with no key that is read is listed as `section.*`.

    Keys that the verb's dataset, checkpoint or export carries are left to `refuse_contradictions`.
    """
    carried, inactive = CARRIED.get(verb, ()), _inactive(config) if verb == "jobs.prepare_data" else ()
    missed = [
        key
        for key in sorted(config.given)
        if _is_under(key, inactive)
        or not (
            reads(verb, key, config.run.stages)
            or (_is_under(key, carried) and _matters(key) and not _is_under(key, _NOT_READ.get(verb, ())))
        )
    ]
    whole = {key.partition(".")[0] for key in missed} - {key.partition(".")[0] for key in config.given if key not in missed}
    return list(dict.fromkeys(f"{key.partition('.')[0]}.*" if key.partition(".")[0] in whole else key for key in missed))


def _inactive(config: Config) -> tuple[str, ...]:
    """Return the keys of `data` that its other keys make meaningless."""
    data = config.data
    by_split = {"time": ("data.validation_from", "data.test_from"), "random": ("data.test_fraction", "data.validation_fraction")}
    unused = [key for split, keys in by_split.items() if split != data.split for key in keys]
    input_keys = ("data.folder", "data.events", "data.items", "data.users", "data.columns", "data.csv", "data.time_unit")
    return (*unused, *(input_keys if data.source == "synthetic" else ("data.synthetic",)))


def _matters(key: str) -> bool:
    """Return whether a key affects the result, not only where, how and for how long it is computed."""
    return not facts_of(key) & {Fact.INPUT, Fact.MACHINE, Fact.MAY_CHANGE}


def contradictions(config: Config, carried: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the given keys with another value in what is carried, whose sections count alone: (key, given, carried)."""
    own, theirs = dict(leaves(config.model_dump(mode="json"))), dict(leaves(carried))
    return [
        (key, own[key], theirs[key])
        for key in sorted(config.given)
        if _is_under(key, _OF_CHECKPOINT) and _matters(key) and key in theirs and own[key] != theirs[key]
    ]


def refuse_contradictions(config: Config, carried: Mapping[str, Any], carrier: str, advice: str, run: str = "") -> None:
    """Refuse keys that contradict what a dataset, or a checkpoint or export of a run, was made with.

    A trial of a search has values of its own for what the search varies: these count, and a warning says so.

    Raises:
        UserError: there is one; the line has key, both values and `carrier`.
    """
    for key, given, made_with in contradictions(config, carried):
        if TRIALS not in run or key not in SEARCHED:
            raise UserError(f"{key} = {given}: {carrier} was made with {made_with}; {advice}, or leave the key out")
        logger.warning("%s = %s is not used: the trial %s was made with %s", key, given, run, made_with)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections as `section.key` and value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(prefix if prefix.endswith(".") else f"{prefix}.") for prefix in prefixes)
