"""Fills HTML templates; all values are escaped."""

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("recsys.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format, "json": json.dumps}
    return environment


def render(template: str, **values: Any) -> str:
    """Fill a template of the folder `templates`; a missing value is an error."""
    return _environment().get_template(template).render(values)
