"""The one type of a refused or failed request, from where it is found out to the HTTP response."""

from typing import Any


class APIError(Exception):
    """A request that gets an error for an answer. Replicas send it to the endpoint as plain data.

    Args:
        status: HTTP status.
        message: for people.
        param: the field at fault.
        code: for programs.
        headers: of the HTTP response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, param, code, headers)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None) -> APIError:
    """400: the value of a field can't be had."""
    return APIError(400, message, param, "invalid_value")


def replica_died() -> APIError:
    """500: a replica died with this request, which may be why: neither the router nor OpenAI's clients try it again."""
    message = "the replica died while it answered this request, and may have died of it: it is not tried again"
    return APIError(500, message, None, "replica_died", {"x-should-retry": "false"})


def model_error(reason: str) -> APIError:
    """500: the model failed on this request, and on no other."""
    return APIError(500, f"the model failed: {reason}", code="model_error")
