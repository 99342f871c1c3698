"""The settings that each verb reads. A verb warns about settings that it does not read and refuses contradicting ones."""

import logging
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

from recsys.config.base import ANY, Fact, fields_of, leaves
from recsys.config.data import DataConfig
from recsys.config.root import Config
from recsys.errors import UserError

logger = logging.getLogger(__name__)

TRIALS = "-trials/"
"""Separator between the search's run name and the trial's name in the run name of a trial."""

_FACTS = {key: facts for key, _, facts in fields_of(Config)}

_TABLES = tuple(key.removesuffix(f".{ANY}") for key in _FACTS if key.endswith(f".{ANY}"))
"""Tables of sections, which are compared as a whole."""

SEARCHED = tuple(key for key, facts in _FACTS.items() if Fact.SEARCHED in facts)
"""Keys that a search varies; each trial has its own values."""


class VerbSettings(NamedTuple):
    """Sections and keys that a verb reads, those below them that it ignores, and those that its input was made with."""

    read: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


_STORE = ("storage", "run.scratch")
_RUN = (*_STORE, "run.name", "run.resume", "run.lease_seconds", "run.trackers", "run.project")
_TARGETS = ("evaluation.target_events", "evaluation.repeats")
_VALIDATION = ("evaluation.metric", "evaluation.guards", "evaluation.cutoffs", "evaluation.batch_size", *_TARGETS)
_DATASET = ("data.dataset", "data.max_history")
_TRAIN = (*_RUN, *_DATASET, *_VALIDATION, "model", "optimizer", "training", "fairness", "ranking", "checkpoint")
_PRETRAIN = (*_RUN, "data.dataset", "model.text", "optimizer", "training", "pretraining", "checkpoint")
_LABELLED = ("model.text.mode", "model.text.lora_rank", "model.text.lora_targets", "model.text.refresh_steps")
_START = ("training.start_from", "training.keep_optimizer")

_IN_DATASET = ("data",)
_IN_CHECKPOINT = ("data", "model", "optimizer", "training", "fairness", "pretraining")

VERBS = {
    "jobs.prepare_data": VerbSettings((*_STORE, "data"), ignored=("data.dataset",)),
    "jobs.pretrain": VerbSettings(_PRETRAIN, ignored=(*_LABELLED, *_START, "training.replay"), carried=_IN_DATASET),
    "jobs.train": VerbSettings(_TRAIN, carried=_IN_DATASET),
    "jobs.plan_memory": VerbSettings((*_STORE, *_DATASET, *_VALIDATION, "model", "training", "fairness"), _START, carried=_IN_DATASET),
    "jobs.evaluate": VerbSettings((*_STORE, "ranking", "evaluation"), carried=_IN_CHECKPOINT),
    "jobs.export": VerbSettings((*_STORE, *_VALIDATION, "run.name", "ranking", "export"), carried=_IN_CHECKPOINT),
    "jobs.pipeline": VerbSettings(("run.stages", "service.token_env")),
    "tune.search": VerbSettings((*_TRAIN, "search"), ignored=SEARCHED, carried=_IN_DATASET),
    "serve.deploy": VerbSettings((*_STORE, "run.name", "export.name", "service"), carried=_IN_CHECKPOINT),
    "serve.rollback": VerbSettings((*_STORE, "run.name", "export.name", "service")),
    "serve.load": VerbSettings((*_STORE, "run.name", "export.name", "service", "load")),
    "serve.stop": VerbSettings(("run.scratch",)),
}
"""`jobs.pipeline` also reads what its stages read; `serve run` reads what `serve.deploy` reads."""

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

_ONLY_WITH = {
    ("source", "files"): ("data.folder", "data.events", "data.items", "data.users", "data.columns", "data.csv", "data.time_unit"),
    ("source", "synthetic"): ("data.synthetic",),
    ("split", "time"): ("data.validation_from", "data.test_from"),
    ("split", "random"): ("data.test_fraction", "data.validation_fraction"),
}
"""Keys of `data` that are used only if another key has this value."""


def facts_of(key: str) -> frozenset[Fact]:
    """Return the facts of a key or section; for an unknown key, those of the section around it."""
    while key and key not in _FACTS:
        key = key.rpartition(".")[0]
    return _FACTS.get(key, frozenset())


def reads(verb: str, key: str, stages: Iterable[str] = tuple(STAGES)) -> bool:
    """Return whether a verb reads a key; the pipeline also reads what `stages` read."""
    settings = VERBS[verb]
    by_stage = verb == "jobs.pipeline" and any(reads(STAGES[stage], key) for stage in stages)
    return by_stage or (_is_under(key, settings.read) and not _is_under(key, settings.ignored))


def unread(verb: str, config: Config) -> list[str]:
    """Return the given keys that the verb does not read; a section without any read key is returned as `section.*`.

    Keys that the verb's dataset, checkpoint or export carries are left to `refuse_contradictions`.
    """
    settings, inactive = VERBS[verb], _inactive_keys(config.data) if verb == "jobs.prepare_data" else ()
    used = {key for key in config.given if reads(verb, key, config.run.stages) and not _is_under(key, inactive)}
    used |= {key for key in config.given if _is_under(key, settings.carried) and _affects_result(key)}
    used_sections = {key.partition(".")[0] for key in used}
    missed = {key: key.partition(".")[0] for key in sorted(config.given - used)}
    return list(dict.fromkeys(key if section in used_sections else f"{section}.*" for key, section in missed.items()))


def _inactive_keys(data: DataConfig) -> list[str]:
    return [key for (name, value), keys in _ONLY_WITH.items() if getattr(data, name) != value for key in keys]


def contradictions(config: Config, carried: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, given value, carried value) for the given keys that affect the result and differ in `carried`."""
    own, theirs = _by_key(config.model_dump(mode="json")), _by_key(carried)
    return [
        (key, own[key], theirs[key])
        for key in sorted({_table_of(key) for key in config.given})
        if _is_under(key, _IN_CHECKPOINT) and _affects_result(key) and key in theirs and own[key] != theirs[key]
    ]


def _by_key(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by key; a table of sections is one value."""
    values = dict(leaves(tree))
    for table in _TABLES:
        section, _, name = table.rpartition(".")
        within = reduce(lambda node, part: node.get(part, {}), section.split("."), tree)
        values |= {table: within[name]} if name in within else {}
    return values


def _table_of(key: str) -> str:
    return next((table for table in _TABLES if _is_under(key, (table,))), key)


def refuse_contradictions(config: Config, carried: Mapping[str, Any], carrier: str, advice: str, run: str = "") -> None:
    """Raise if a given key contradicts what a dataset, or a checkpoint or export of a run, was made with.

    For keys that a search varies, the trial's own value is used, and a warning is logged.

    Raises:
        UserError: a key contradicts; the message has the key, both values and `carrier`.
    """
    for key, given, made_with in contradictions(config, carried):
        if TRIALS not in run or key not in SEARCHED:
            raise UserError(f"{key} = {given}: {carrier} was made with {made_with}; {advice}, or leave the key out")
        logger.warning("%s = %s is not used: the trial %s was made with %s", key, given, run, made_with)


def _affects_result(key: str) -> bool:
    return facts_of(key).isdisjoint((Fact.INPUT, Fact.MACHINE, Fact.MAY_CHANGE))


def _is_under(key: str, prefixes: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)
