"""Which items of a catalogue satisfy a condition on their attributes, written as JSON. Pure functions of the catalogue.

{"genre": "Drama"}                                one column, one value
{"genre": ["Drama", "Comedy"], "year": {"gte": 1990, "lt": 2000}}    both columns
{"or": [{"genre": {"all": ["Drama", "War"]}}, {"not": {"price": {"exists": true}}}]}
"""

from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.arrays import Floats, Integers, Mask
from recsys.errors import UserError

if TYPE_CHECKING:  # whoever only checks the form of an expression does not wait for PyTorch
    from recsys.data.items import ItemFeatures
    from recsys.data.manifest import DatasetManifest

MAX_DEPTH = 32
MAX_CONDITIONS = 200
"""Limits of an expression: nesting, and columns and values in total."""

NUMBER_DIGITS = 6
"""Numbers are stored standardized in float32; they are compared to this many significant digits of the column's scale."""

COMPARISONS: dict[str, Callable[[Floats, float], Mask]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "gt": np.greater,
    "gte": np.greater_equal,
    "lt": np.less,
    "lte": np.less_equal,
}
_VALUE = {"type": ["string", "number", "boolean"]}
_VALUES = {"type": "array", "items": _VALUE, "minItems": 1, "maxItems": 50}
_NUMBER = {"type": "number"}
_SELF = {"$ref": "#/components/schemas/Filter"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "Conditions on attributes, all of which must hold.",
    "maxProperties": 20,
    "properties": {
        "and": {"type": "array", "items": _SELF, "minItems": 1, "maxItems": 3},
        "or": {"type": "array", "items": _SELF, "minItems": 1, "maxItems": 3},
        "not": _SELF,
    },
    "additionalProperties": {
        "anyOf": [
            _VALUE,
            _VALUES,
            {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": {
                    **dict.fromkeys(("eq", "ne"), _VALUE),
                    **dict.fromkeys(("gt", "gte", "lt", "lte"), _NUMBER),
                    **dict.fromkeys(("in", "not_in", "all"), _VALUES),
                    "exists": {"type": "boolean"},
                },
            },
        ]
    },
}
"""JSON schema of an expression, as a component `Filter` of an OpenAPI document; its depth and size are limited further."""

ONLY_ON_NUMBERS = ("gt", "gte", "lt", "lte")
LISTS = ("in", "not_in", "all")
ON_VALUES = ("eq", "ne", "in", "not_in", "all", "exists")
ON_NUMBERS = (*COMPARISONS, "in", "not_in", "exists")


class UnknownAttributeError(UserError):
    """A filter is well formed, but this catalogue has no such attribute, or one of another type."""


class ItemFilters:
    """Evaluates expressions on a catalogue's categories and numbers. A missing value satisfies only `ne`, `not_in` and `exists: false`."""

    def __init__(self, catalogue: "ItemFeatures", manifest: "DatasetManifest") -> None:
        self._catalogue = catalogue
        self._values: dict[str, dict[str, int]] = {}
        for index, name in enumerate(manifest.category_vocabulary, start=1):
            column, _, value = name.partition("=")
            self._values.setdefault(column, {})[value] = index
        moments = manifest.number_moments
        columns = zip(manifest.number_columns, moments, strict=True) if moments else ()
        self._moments = {name: (number, *pair) for number, (name, pair) in enumerate(columns)}
        self._numbers: dict[str, Floats] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that expressions may use."""
        return tuple({**self._values, **self._moments})

    def mask(self, expression: Any) -> Mask:
        """Return which items satisfy an expression, (I + 1,) by catalogue index.

        Raises:
            UnknownAttributeError: the catalogue has no such attribute.
            UserError: the expression is not well formed.
        """
        check_form(expression)
        found = self._evaluate(expression, "filter").copy()
        found[0] = False
        return found

    def fields(self, item: int) -> dict[str, Any]:
        """Return an item's attributes by column: lists of categories, and numbers; without those that are missing."""
        own = set(self._catalogue.categories[item].tolist()) - {0}
        fields: dict[str, Any] = {
            column: found
            for column, values in self._values.items()
            if (found := [value for value, index in values.items() if index in own])
        }
        numbers = {column: float(self._column(column)[item]) for column in self._moments}
        return fields | {column: value for column, value in numbers.items() if not np.isnan(value)}

    def _evaluate(self, expression: Mapping[str, Any], where: str) -> Mask:
        masks = []
        for key, value in expression.items():
            if key in ("and", "or"):
                parts = [self._evaluate(part, f"{where}.{key}.{number}") for number, part in enumerate(value)]
                masks.append(reduce(np.logical_and if key == "and" else np.logical_or, parts))
            elif key == "not":
                masks.append(~self._evaluate(value, f"{where}.not"))
            else:
                masks.append(self._condition(key, _comparisons(value), f"{where}.{key}"))
        return reduce(np.logical_and, masks, np.ones(self._catalogue.num_items + 1, np.bool_))

    def _condition(self, column: str, comparisons: Mapping[str, Any], where: str) -> Mask:
        if column not in self._values and column not in self._moments:
            raise UnknownAttributeError(f"{where}: is not an attribute of the items; known: {', '.join(self.columns) or 'none'}")
        masks = []
        for operator, operand in comparisons.items():
            is_number = column in self._moments and (operator in ONLY_ON_NUMBERS or column not in self._values)
            compare = self._compare_numbers if is_number else self._compare_categories
            masks.append(compare(column, operator, operand, f"{where}.{operator}"))
        return reduce(np.logical_and, masks)

    def _compare_categories(self, column: str, operator: str, operand: Any, where: str) -> Mask:
        _check_operator(operator, ON_VALUES, where)
        values = self._values[column]
        if operator == "exists":
            return self._having(list(values.values())) == operand
        wanted = [values.get(_category(value), 0) for value in _listed(operand)]
        if operator == "all":
            return reduce(np.logical_and, [self._having([index]) for index in wanted])
        found = self._having(wanted)
        return ~found if operator in ("ne", "not_in") else found

    def _compare_numbers(self, column: str, operator: str, operand: Any, where: str) -> Mask:
        _check_operator(operator, ON_NUMBERS, where)
        numbers = self._column(column)
        if operator == "exists":
            return ~np.isnan(numbers) == operand
        wanted = [_number(value, where) for value in _listed(operand)]
        if operator in ("in", "not_in"):
            found: Mask = np.isin(numbers, wanted)
            return ~found if operator == "not_in" else found
        with np.errstate(invalid="ignore"):
            return COMPARISONS[operator](numbers, wanted[0])

    def _having(self, indices: list[int]) -> Mask:
        """Return which items have one of the categories; index 0 is no category."""
        items, offsets = self._postings
        found = np.zeros(self._catalogue.num_items + 1, np.bool_)
        for index in filter(None, indices):
            found[items[offsets[index] : offsets[index + 1]]] = True
        return found

    @cached_property
    def _postings(self) -> tuple[Integers, Integers]:
        """Return the items of all categories, those of a category together, and where each category's begin."""
        categories = self._catalogue.categories.numpy()
        items, places = np.nonzero(categories)
        found = categories[items, places]
        order = np.argsort(found, kind="stable")
        return items[order], np.searchsorted(found[order], np.arange(self._catalogue.num_categories + 2))

    def _column(self, column: str) -> Floats:
        """Return a column's numbers as they were in the catalogue (I + 1,), NaN where missing."""
        if column not in self._numbers:
            number, mean, deviation = self._moments[column]
            standardized = self._catalogue.numbers[:, number].numpy().astype(np.float64)
            scale = abs(mean) + 4 * deviation
            digits = NUMBER_DIGITS - int(np.floor(np.log10(scale))) - 1 if scale > 0 else NUMBER_DIGITS
            numbers = np.round(standardized * deviation + mean, digits)
            self._numbers[column] = np.where(self._catalogue.has_number[:, number].numpy(), numbers, np.nan)
        return self._numbers[column]


def check_form(expression: Any) -> None:
    """Check an expression as far as that needs no catalogue.

    Raises:
        UserError: it is not well formed.
    """
    _check(expression, "filter", 1, [MAX_CONDITIONS])


def _check(expression: Any, where: str, depth: int, budget: list[int]) -> None:
    if not isinstance(expression, Mapping):
        raise UserError(f'{where}: must be an object such as {{"genre": "Drama"}}')
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: is nested more than {MAX_DEPTH} levels deep")
    for key, value in expression.items():
        _spend(budget, 1, where)
        if key in ("and", "or"):
            if not isinstance(value, list) or not value:
                raise UserError(f"{where}.{key}: must be a list of expressions")
            for number, part in enumerate(value):
                _check(part, f"{where}.{key}.{number}", depth + 1, budget)
        elif key == "not":
            _check(value, f"{where}.not", depth + 1, budget)
        elif not (comparisons := _comparisons(value)):
            raise UserError(f"{where}.{key}: has no condition")
        else:
            for operator, operand in comparisons.items():
                _spend(budget, len(operand) if isinstance(operand, list) else 1, where)
                _check_operand(operator, operand, f"{where}.{key}.{operator}")


def _check_operand(operator: str, operand: Any, where: str) -> None:
    if operator not in {*ON_VALUES, *ON_NUMBERS}:
        raise UserError(f"{where}: is not a comparison; known: {', '.join(dict.fromkeys((*ON_VALUES, *ON_NUMBERS)))}")
    if operator == "exists" and not isinstance(operand, bool):
        raise UserError(f"{where}: must be true or false")
    if operator in LISTS and (not isinstance(operand, list) or not operand):
        raise UserError(f"{where}: must be a list of values")
    is_number = operator in ONLY_ON_NUMBERS
    for value in operand if operator in LISTS else [operand]:
        if is_number and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{where}: must be a number")
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: must be a text or a number")


def _comparisons(value: Any) -> Mapping[str, Any]:
    """Return the comparisons of a column: a value stands for `eq`, a list for `in`."""
    return value if isinstance(value, Mapping) else {"in": value} if isinstance(value, list) else {"eq": value}


def _listed(operand: Any) -> list[Any]:
    return operand if isinstance(operand, list) else [operand]


def _spend(budget: list[int], number: int, where: str) -> None:
    budget[0] -= number
    if budget[0] < 0:
        raise UserError(f"{where}: the filter has more than {MAX_CONDITIONS} conditions")


def _check_operator(operator: str, known: tuple[str, ...], where: str) -> None:
    if operator not in known:
        raise UnknownAttributeError(f"{where}: is not a comparison of this attribute; known: {', '.join(known)}")


def _category(value: Any) -> str:
    """Spell a value as data preparation does."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())


def _number(value: Any, where: str) -> float:
    if isinstance(value, (bool, str)):
        raise UnknownAttributeError(f"{where}: must be a number, as the attribute is")
    return float(value)
