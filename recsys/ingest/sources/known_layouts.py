"""Known layouts of input tables: file names, column names and kinds of features."""

import re
from collections.abc import Iterable
from urllib.parse import unquote

from recsys.config.data import ColumnsConfig, ItemFeaturesConfig
from recsys.schema import ITEM_ID, TIMESTAMP, USER_ID, VALUE, FeatureKind

ATOMIC_SUFFIXES = {"events": ".inter", "items": ".item", "users": ".user"}
COMMON_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
_ALIASES = {
    USER_ID: ("userId", "UserID"),
    ITEM_ID: ("parent_asin", "movieId", "MovieID", "asin"),
    TIMESTAMP: ("Timestamp",),
    VALUE: ("rating", "Rating"),
}
_MOVIELENS_COLUMNS = {
    "ratings": ("UserID", "MovieID", "Rating", "Timestamp"),
    "movies": ("MovieID", "Title", "Genres"),
    "users": ("UserID", "Gender", "Age", "Occupation", "Zip-code"),
}
"""Column names from MovieLens's README; its `.dat` files have no header line."""

_MIND_COLUMNS = {
    "behaviors.tsv": ("impression_id", "user_id", "time", "history", "impressions"),
    "news.tsv": ("item_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"),
}
"""Columns of MIND's files (Wu et al. 2020), which have no header line."""

_FILE_NAMES = {
    "events": ("events", "ratings", "reviews", "behaviors.tsv"),
    "items": ("items", "movies", "meta_", "news.tsv"),
    "users": ("users",),
}
"""How the file names of a role begin; only the first beginning that occurs in a folder counts."""

_AMAZON_REVIEW = {USER_ID, "parent_asin", "rating", TIMESTAMP}
_CATALOGUES: tuple[tuple[set[str], dict[str, FeatureKind]], ...] = (
    (
        {"parent_asin", "main_category", "title"},
        {
            "title": "text",
            "features": "text",
            "description": "text",
            "main_category": "categories",
            "store": "categories",
            "categories": "categories",
            "price": "numbers",
        },
    ),
    ({"MovieID", "Title", "Genres"}, {"Title": "text", "Genres": "categories"}),
    ({"movieId", "title", "genres"}, {"title": "text", "genres": "categories"}),
    (set(_MIND_COLUMNS["news.tsv"]), {"title": "text", "abstract": "text", "category": "categories", "subcategory": "categories"}),
)
"""Catalogue layouts by their columns. Average ratings and rating counts are left out: they leak data from after the split."""

_PATH_COLUMN = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)=(.*)")
_PATH_NULL = "__HIVE_DEFAULT_PARTITION__"


def find_column(canonical_name: str, columns: ColumnsConfig, names: Iterable[str]) -> str:
    """Return a column's name in the file: the configured one, or a known layout's if the config has the default and it is absent."""
    name: str = getattr(columns, canonical_name)
    if name != canonical_name or name in names:
        return name
    return next((alias for alias in _ALIASES.get(canonical_name, ()) if alias in names), name)


def is_amazon_review(names: Iterable[str]) -> bool:
    """Return whether the columns are those of Amazon Reviews 2023."""
    return _AMAZON_REVIEW.issubset(names) and ITEM_ID not in names


def catalogue_kinds(features: ItemFeaturesConfig, names: Iterable[str]) -> dict[str, FeatureKind]:
    """Return the kinds of a catalogue's columns: the configured ones, else a known layout's; empty if they are to be inferred."""
    configured: dict[str, FeatureKind] = {}
    configured |= dict.fromkeys(features.text, "text")
    configured |= dict.fromkeys(features.categories, "categories")
    configured |= dict.fromkeys(features.numbers, "numbers")
    configured |= dict.fromkeys(features.vectors, "vectors")
    if configured:
        return configured
    for signature, kinds in _CATALOGUES:
        if signature.issubset(names):
            return {name: kind for name, kind in kinds.items() if name in names}
    return {}


def movielens_columns(uri: str) -> tuple[str, ...]:
    """Return the columns of a MovieLens `.dat` file, by the file's name; empty for every other file."""
    name = _file_name(uri)
    return next((names for stem, names in _MOVIELENS_COLUMNS.items() if name.startswith(stem) and name.endswith(".dat")), ())


def mind_columns(uri: str) -> tuple[str, ...]:
    """Return the columns of a file of MIND, by the file's name; empty for every other file."""
    return _MIND_COLUMNS.get(_file_name(uri), ())


def slate_columns(uri: str, columns: ColumnsConfig) -> dict[str, str]:
    """Return the columns of a file's slates, as {`slate`, `flags`, `history`: name}; empty if its rows are single events."""
    is_mind = bool(mind_columns(uri)) and not columns.slate
    named = {"slate": "impressions", "history": "history"} if is_mind else {"slate": columns.slate, "flags": columns.slate_flags}
    return {name: column for name, column in named.items() if column and named["slate"]}


def is_table(uri: str, role: str) -> bool:
    """Return whether a file, by its name, can be a table of this role: events, items or users."""
    name = _file_name(uri)
    if movielens_columns(uri):
        return name.startswith(_FILE_NAMES[role])
    return name.endswith((ATOMIC_SUFFIXES[role], *COMMON_SUFFIXES))


def choose_by_name(paths: Iterable[str], role: str) -> set[str]:
    """Choose a role's files from a folder that holds several tables; `paths` are relative to it.

    A file has RecBole's suffix, begins with one of the role's names, or is in a folder of such a name. Amazon's reviews are named after
    their category; they are recognized by the `meta_` file next to them.
    """
    tables = {path for path in paths if is_table(path, role)}
    for beginning in _FILE_NAMES[role]:
        chosen = {
            path for path in tables if _begins(path, beginning) or (beginning == role and _file_name(path).endswith(ATOMIC_SUFFIXES[role]))
        }
        if chosen:
            return chosen
    described = {_stem(path).replace("meta_", "", 1) for path in tables if _begins(path, "meta_")}
    return {path for path in tables if role == "events" and _stem(path) in described}


def path_columns(uri: str) -> dict[str, str | None]:
    """Return the columns that a path gives: folders named `key=value`, as Hive, Spark and Athena write them."""
    found: dict[str, str | None] = {}
    for segment in uri.split("/")[:-1]:
        match = _PATH_COLUMN.fullmatch(segment)
        if match:
            found[match[1]] = None if match[2] == _PATH_NULL else unquote(match[2])
    return found


def _begins(path: str, beginning: str) -> bool:
    return _file_name(path).startswith(beginning) or path.partition("/")[0] == beginning


def _stem(path: str) -> str:
    name = _file_name(path)
    return next((name.removesuffix(suffix) for suffix in (*COMMON_SUFFIXES, ".dat") if name.endswith(suffix)), name)


def _file_name(uri: str) -> str:
    return uri.rpartition("/")[2].lower()
