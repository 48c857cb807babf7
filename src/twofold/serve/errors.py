"""Errors of the API in OpenAI's shape: one exception, its JSON body, and what other errors become.

Not here: where they are caught (``app.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from twofold.base.records import InputError

INVALID = "invalid_value"  # code of what has none of its own
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: HTTP status. message: one line that says what is wrong and how to mend it.
        code: a word for programs. param: the field of the request. retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients expect."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = INVALID) -> ApiError:
    """An error of the request itself: status 400."""
    return ApiError(400, message, code, param)


def from_input_error(
    error: InputError, param: str | None = None, names: Mapping[str, str] = MappingProxyType({})
) -> ApiError:
    """An ``InputError`` of a lower layer as an error of the request.

    Args:
        param: the request's field that was being read, where the error names none.
        names: fields of lower layers -> what the request calls them, where that is something else.
    """
    field = param if error.field is None else names.get(error.field, error.field)
    return bad_request(str(error), field, error.code or INVALID)
