"""Errors of the API in OpenAI's shape: one exception, its JSON body, and what other errors become.

Not here: where they are caught (``app.py``).
"""

from __future__ import annotations

from typing import Any

from twofold.base.records import InputError

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
        code: str | None = None,
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


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the request itself: status 400."""
    return ApiError(400, message, code, param)


def from_input_error(error: InputError, param: str | None = None) -> ApiError:
    """An ``InputError`` of a lower layer as an error of the request; the field is read from its message if it can be.

    Messages of the renderer begin with the place, such as ``messages[2].content``.
    """
    text = str(error)
    place = text.split(" ", 1)[0].rstrip(":;,")
    if param is None and place.startswith(("messages", "tools", "thinking_budget", "temperature", "top_p")):
        param = place
    code = "context_length_exceeded" if "the model's context" in text else None
    return ApiError(400, text, code, param)
