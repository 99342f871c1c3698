"""Leakage checks of a split."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recsys.arrays import Integers

State = Literal["pass", "note", "fail"]


@dataclass(frozen=True)
class Check:
    """One question to the split: how many targets it counts (validation, test), of how many, and whether there is a fault."""

    title: str
    meaning: str
    found: tuple[int, int]
    targets: tuple[int, int]
    state: State

    @property
    def share(self) -> float:
        """The share of all targets that are counted."""
        return sum(self.found) / max(1, sum(self.targets))


def check_split(counts: dict[str, Integers], data_config: Mapping[str, Any], has_time: bool) -> list[Check]:
    """Judge the merged counts of all partitions; `data_config` is the manifest's."""
    validation, test = counts["targets"].tolist()
    split = data_config.get("split", "")

    def check(name: str, title: str, meaning: str, otherwise: State) -> Check:
        found = counts[name].tolist()
        return Check(title, meaning, (found[0], found[1]), (validation, test), otherwise if any(found) else "pass")

    order = "time" if has_time else "position"
    by_chance = "; data.split = 'random' draws from all of a user's interactions" if split == "random" else ""
    out_of_order: State = "note" if by_chance else "fail"
    last = f"its {order} is before the user's last"
    checks = [
        check("in_samples", "Targets in training samples", "the same user, item, time and kind is in a training sample", "fail"),
        check("before_training", "Targets before training ends", f"{last} training interaction{by_chance}", out_of_order),
        check("before_validation", "Test before validation", f"{last} validation target{by_chance}", out_of_order),
        check("in_history", "Targets seen before", "the user had the item already; evaluation passes over it", "note"),
    ]
    if has_time:
        meaning = f"training data of other users reaches past it{by_chance}"
        if split == "leave_one_out":
            meaning += "; leave-one-out cuts user by user, data.split = 'time' cuts at one moment"
        checks.append(
            check("before_training_of_others", "Targets before the last of all training", meaning, "fail" if split == "time" else "note")
        )
    if data_config.get("withheld_items"):
        in_samples = int(counts["withheld_in_samples"].sum())
        meaning = f"data.withheld_items keeps their items out of training; training samples have {in_samples:,} interactions with them"
        checks.append(check("withheld", "Cold targets", meaning, "fail" if in_samples else "pass"))
    return checks
