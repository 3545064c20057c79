"""JSON on which all readers agree: UTF-8, no key twice, no NaN, bounded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FormatError
from .impostors import refuse_impostor


def read_object(path: Path, max_nbytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `max_nbytes`. Raises FormatError; whoever calls attaches the path."""
    with open(path, "rb") as file:
        text = file.read(max_nbytes + 1)
    if len(text) > max_nbytes:
        raise FormatError(f"over {max_nbytes} bytes, more than a file of its kind needs")
    refuse_impostor(text[:512], len(text))
    value = parse(text)
    if not isinstance(value, dict):
        raise FormatError("a JSON object is required")
    return value


def parse(text: bytes, where: str | None = None) -> Any:
    """The value that `text` spells. Raises FormatError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError(f"the key {name!r} stands twice in one object", where=where)
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_constant=_no_constant)
    except RecursionError:
        raise FormatError("it is nested too deeply", where=where) from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise FormatError(f"it is no JSON ({error})", where=where, todo="The file is damaged") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} stands in it")
