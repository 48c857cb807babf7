"""Values as one line of JSON and text that UTF-8 can hold: checks that name the place of a fault.

Everything that is rendered has passed here. Not here: the JSON of calls that a model writes (``calls.py``).
"""

from __future__ import annotations

import json
from typing import Any

from twofold.base.records import InputError


def dump_json(value: Any, where: str) -> str:
    """One-line JSON as the chat template writes it; InputError names ``where`` if the value is not JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        message = f"{where} is not JSON ({error}); use only objects, lists, strings and numbers"
        raise InputError(message, field=where) from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; flatten it", field=where) from None
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise InputError, naming ``where``, for a string that UTF-8 cannot hold."""
    if (place := surrogate_in(text)) is not None:
        message = f"{where} is not valid Unicode at character {place}; remove lone surrogates"
        raise InputError(message, field=where)


def surrogate_in(text: str) -> int | None:
    """Place of the first character that UTF-8 cannot hold, half a surrogate pair; None where there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
