"""Whether the split leaks: what is counted against it, and when that fails; the counting is `counts.py`."""

from dataclasses import dataclass
from typing import Literal

from recsys.data.preparing.sequences import Integers

State = Literal["pass", "note", "fail"]


@dataclass(frozen=True)
class Check:
    """One question to the split: how many targets break it (validation, test), of how many, and whether that is a fault."""

    title: str
    meaning: str
    found: tuple[int, int]
    targets: tuple[int, int]
    state: State

    @property
    def share(self) -> float:
        """The share of all targets that are counted."""
        return sum(self.found) / max(1, sum(self.targets))


def check_split(counts: dict[str, Integers], split: str, has_time: bool) -> list[Check]:
    """Judge the merged counts of all partitions."""
    validation, test = counts["targets"].tolist()

    def check(name: str, title: str, meaning: str, otherwise: State) -> Check:
        found = counts[name].tolist()
        return Check(title, meaning, (found[0], found[1]), (validation, test), otherwise if any(found) else "pass")

    order = "time" if has_time else "position"
    checks = [
        check("in_samples", "Targets in training samples", "the same user, item, time and kind is in a training sample", "fail"),
        check("before_training", "Targets before training ends", f"its {order} is before the user's last training interaction", "fail"),
        check("before_validation", "Test before validation", f"its {order} is before the user's last validation target", "fail"),
        check("in_history", "Targets seen before", "the user had the item already; evaluation passes over it", "note"),
    ]
    if has_time:
        meaning = "training data of other users reaches past it"
        if split == "leave_one_out":
            meaning += "; leave-one-out cuts user by user, data.split = 'time' cuts at one moment"
        checks.append(
            check("before_training_of_others", "Targets before the last of all training", meaning, "fail" if split == "time" else "note")
        )
    return checks
