"""Profiles: the columns of users as inputs of the model, in training, evaluation and for posted profiles alike."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from recsys.arrays import Floats
from recsys.config.data import UserFeaturesConfig
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.schema import normalize_value

MAX_VALUES = 20_000
"""Maximum number of values of a column that are told apart; the rarest of more count as missing."""

MAX_WORDS = 64
"""Words of a text that are read."""

_FEW_NUMBERS = 64
"""Numbers with at most this many different values are categories, too: codes and age groups are."""

_LARGEST = 10.0
"""Standardized numbers are cut at this many standard deviations."""

_MISSING = ("", "none", "null", "nan", "na", "n/a", "-", "\u2014")
_SPREAD = re.compile(r"[\s,;|\[\]()]+")
_WORD = re.compile(r"\w+")


class ProfileSpace(BaseModel):
    """How a user's columns become numbers. A category is `column=value`; `column=` stands for a missing or unknown value.

    `categories` are columns with a value, or several with a separator; `words` are columns of text, whose words are categories. Numbers
    are standardized by their `moments`; the entries of a vector are numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    categories: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: dict[str, int] = {}  # length by column
    moments: tuple[tuple[float, float], ...] = ()  # (mean, standard deviation) of each number, then of each entry of the vectors
    separator: str = "|"
    vocabulary: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.vocabulary or self.moments)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys([*self.categories, *self.words, *self.numbers, *self.vectors]))

    @property
    def number_names(self) -> list[str]:
        """The names of the numbers, in their order; the entries of a vector are numbered."""
        return [*self.numbers, *(f"{name}[{entry}]" for name, size in self.vectors.items() for entry in range(size))]

    @property
    def missing(self) -> list[int]:
        """For each category from 0, the entry of a missing value of its column; 0 for padding."""
        columns = sorted([*self.categories, *self.words], key=len, reverse=True)
        entries = {name: self._index[f"{name}="] for name in columns}
        return [0, *(next(entries[name] for name in columns if text.startswith(f"{name}=")) for text in self.vocabulary)]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.vocabulary, start=1)}

    def encode(self, users: Sequence[Mapping[str, str]]) -> Sequences:
        """Convert the columns of R users, as text by name, to the column `categories`, from 1, and the scalar `numbers` (R, F)."""
        users = [{name: value for name, value in user.items() if value.strip().lower() not in _MISSING} for user in users]
        found = [self._categories(user) for user in users]
        offsets = np.cumsum([0, *map(len, found)])
        categories = np.array([category for own in found for category in own], np.int32)
        numbers = np.full((len(users), len(self.moments)), np.nan, np.float32)
        for row, user in enumerate(users):
            numbers[row] = self._numbers(user)
        return Sequences.of_offsets({"categories": categories}, offsets, numbers=numbers)

    def merge(self, known: Sequences, posted: Mapping[str, str]) -> Sequences:
        """Return the known profile of one user (R = 1) with the columns that are posted in place of its own."""
        own = self.encode([posted])

        def is_posted_category(index: int) -> bool:
            return self.vocabulary[index - 1].partition("=")[0] in posted

        kept = known.flat("categories")[np.array([not is_posted_category(index) for index in known.flat("categories").tolist()], bool)]
        new = [index for index in own.flat("categories").tolist() if is_posted_category(index)]
        columns = [*self.numbers, *(name for name, size in self.vectors.items() for _ in range(size))]
        is_posted = np.array([name in posted for name in columns], bool)
        numbers = np.where(is_posted, own.scalars["numbers"], known.scalars["numbers"])
        categories = np.append(kept, np.array(new, kept.dtype))
        return Sequences.of_offsets({"categories": categories}, np.array([0, len(categories)]), numbers=numbers)

    def extended(self, values: Mapping[str, Counter[str]]) -> "ProfileSpace":
        """Return the space with the categories of new values at the end; columns and moments stay."""
        known = set(self.vocabulary)
        found = [name for column in self.categories for name in _names(column, _split(values.get(column, Counter()), self.separator))]
        found += [name for column in self.words for name in _names(column, _words(values.get(column, Counter())))]
        vocabulary = (*self.vocabulary, *(name for name in found if name not in known))
        return ProfileSpace.model_validate(self.model_dump() | {"vocabulary": vocabulary})  # a copy would share the cached index

    def _categories(self, user: Mapping[str, str]) -> list[int]:
        index, found = self._index, []
        parts = [(name, _parts(user.get(name, ""), self.separator)) for name in self.categories]
        parts += [(name, words_of(user.get(name, ""))) for name in self.words]
        for name, values in parts:
            own = [index[key] for value in values if (key := f"{name}={value}") in index]
            found += sorted(set(own)) or [index[f"{name}="]]
        return found

    def _numbers(self, user: Mapping[str, str]) -> list[float]:
        raw = [_number(user.get(name, "")) for name in self.numbers]
        for name, size in self.vectors.items():
            entries = numbers_of(user.get(name, ""))
            raw += entries if len(entries) == size else [float("nan")] * size
        standardized = ((value - mean) / deviation for value, (mean, deviation) in zip(raw, self.moments, strict=True))
        return [value if math.isnan(value) else min(max(value, -_LARGEST), _LARGEST) for value in standardized]


def fit_profiles(values: Mapping[str, Counter[str]], config: UserFeaturesConfig) -> ProfileSpace:
    """Choose how columns are read, given the number of users by value of each column.

    Columns that the config does not name are read by their values: numbers, vectors of equal length, text if most values differ, otherwise
    categories. Numbers of few different values are categories, too.

    Raises:
        UserError: a column that is given as vectors has none.
    """
    values = {name: Counter({text: n for text, n in own.items() if text.strip().lower() not in _MISSING}) for name, own in values.items()}
    kinds: dict[str, list[str]] = {"categories": [], "text": [], "numbers": [], "vectors": []}
    for name, counts in values.items():
        own = [kind for kind in kinds if name in getattr(config, kind)]
        for kind in own or ([] if config.names_columns else infer_kinds(counts)):
            kinds[kind].append(name)
    samples = [_samples(values[name], lambda text: [_number(text)]) for name in kinds["numbers"]]
    sizes = {name: _usual_size(values[name]) for name in kinds["vectors"]}
    if odd := [name for name, size in sizes.items() if not size]:
        raise UserError(f"data.user_features.vectors: column '{odd[0]}' has no list of numbers in any row")
    samples += [_samples(values[name], numbers_of, size) for name, size in sizes.items()]
    space = ProfileSpace(
        categories=tuple(kinds["categories"]),
        words=tuple(kinds["text"]),
        numbers=tuple(kinds["numbers"]),
        vectors=sizes,
        moments=tuple(moments for sample in samples for moments in _moments(*sample)),
        separator=config.separator,
        vocabulary=tuple(f"{name}=" for name in (*kinds["categories"], *kinds["text"])),
    )
    return space.extended(values)


def infer_kinds(counts: Counter[str]) -> list[str]:
    """Return the kinds that a column's values have, given the number of users by value; none without a value."""
    texts = list(counts)
    if not texts:
        return []
    if all(np.isfinite(_number(text)) for text in texts):
        is_code = len(texts) <= _FEW_NUMBERS and counts.total() > 2 * len(texts)
        return ["numbers", "categories"] if is_code else ["numbers"]
    sizes = {len(numbers_of(text)) for text in texts}
    if len(sizes) == 1 and min(sizes) > 2:  # "1,234" is no vector
        return ["vectors"]
    return ["text"] if len(texts) > counts.total() / 2 else ["categories"]


def common_values(counts: Counter[str], limit: int) -> Counter[str]:
    """Return the `limit` most frequent values; of equally frequent ones a sample, the same on every machine."""
    if len(counts) <= limit:
        return counts
    return Counter(dict(sorted(counts.items(), key=lambda pair: (-pair[1], zlib.crc32(pair[0].encode()), pair[0]))[:limit]))


def words_of(text: str) -> list[str]:
    """Return the first words of a text in lower case."""
    return _WORD.findall(text.lower())[:MAX_WORDS]


def numbers_of(text: str) -> list[float]:
    """Return the numbers of a vector written as text; empty if it is none."""
    found = [_number(part) for part in _SPREAD.split(text) if part]
    return found if np.isfinite(found).all() else []


def _number(text: str) -> float:
    """Return the finite number that a text is, otherwise NaN."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _parts(text: str, separator: str) -> list[str]:
    parts = map(normalize_value, text.split(separator) if separator else [text])
    return [part for part in parts if part]


def _split(counts: Counter[str], separator: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for text, count in counts.items():
        for part in _parts(text, separator):
            found[part] += count
    return found


def _words(counts: Counter[str]) -> Counter[str]:
    """Count the users by word; words of one user teach nothing."""
    found: Counter[str] = Counter()
    for text, count in counts.items():
        for word in set(words_of(text)):
            found[word] += count
    return Counter({word: count for word, count in found.items() if count > 1})


def _names(column: str, counts: Counter[str]) -> list[str]:
    return [f"{column}={value}" for value in sorted(common_values(counts, MAX_VALUES))]


def _usual_size(counts: Counter[str]) -> int:
    sizes: Counter[int] = Counter()
    for text, count in counts.items():
        sizes[len(numbers_of(text))] += count
    del sizes[0]
    return sizes.most_common(1)[0][0] if sizes else 0


def _samples(counts: Counter[str], read: Callable[[str], list[float]], size: int = 1) -> tuple[Floats, NDArray[np.int64]]:
    rows = [(entries, count) for text, count in counts.items() if len(entries := read(text)) == size]
    return np.array([entries for entries, _ in rows]).reshape(-1, size), np.array([count for _, count in rows], np.int64)


def _moments(rows: Floats, counts: NDArray[np.int64]) -> list[tuple[float, float]]:
    """Return mean and standard deviation of each column, weighted by the counts of the rows; 0 and 1 without any."""
    found = []
    for column in rows.T:
        is_known = np.isfinite(column)
        own, weights = column[is_known], counts[is_known]
        mean = float(np.average(own, weights=weights)) if len(own) else 0.0
        deviation = float(np.sqrt(np.average((own - mean) ** 2, weights=weights))) if len(own) else 1.0
        found.append((mean, deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 1.0))
    return found
