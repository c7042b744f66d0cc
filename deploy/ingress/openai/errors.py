"""The one error of the HTTP API and its OpenAI shape. Every refusal names the field, the value and the way out."""

from collections.abc import Iterable
from typing import Any

# A field of a request may be as long as the request.
MAX_MESSAGE = 1000
INVALID_REQUEST = "invalid_request_error"


class APIError(Exception):
    """Ends a request with an HTTP status. `code` is for programs, `message` for people."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> APIError:
    return APIError(400, message, param=param, code=code)


def context_length_exceeded(max_model_len: int, prompt_len: int, max_tokens: int, param: str) -> APIError:
    """Words as OpenAI's: evaluation harnesses read the numbers from them."""
    where = "messages" if param == "messages" else "prompt"
    way_out = f"shorten the {where}" if param == where else f"shorten the {where} or lower {param}"
    return invalid_request(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{prompt_len + max_tokens} tokens ({prompt_len} in the {where}, {max_tokens} in the completion). "
        f"Please {way_out}.",
        param=param,
        code="context_length_exceeded",
    )


def model_not_found(model: str, served: str) -> APIError:
    message = f"model={model!r} is not served here: use {served!r}"
    return APIError(404, message, param="model", code="model_not_found")


def route_not_found(method: str, path: str) -> APIError:
    return APIError(404, f"Unknown request URL: {method} {path}", code="unknown_url")


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> APIError:
    methods = ", ".join(sorted(allowed))
    message = f"{method} is not allowed on {path}: use {methods}"
    return APIError(405, message, code="method_not_allowed", headers={"Allow": methods})


def unauthorized(is_missing: bool = False) -> APIError:
    problem = "The API key is missing" if is_missing else "The API key is not valid"
    return APIError(
        401,
        f"{problem}: send the header `Authorization: Bearer KEY` with the key that the server was started with",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def misdirected(host: str) -> APIError:
    message = (
        f"Host {host!r:.200} is not known as a name of this server, and a web page may have given it our address: use "
        "the IP address, or add the name to the setting allowed_hosts"
    )
    return APIError(421, message, code="misdirected_request")


def foreign_origin(origin: str) -> APIError:
    message = f"A web page of {origin!r:.200} may not use this server: add its origin to the setting allowed_origins"
    return APIError(403, message, code="origin_not_allowed")


def too_large(max_body_mib: float) -> APIError:
    message = f"The request body is larger than {max_body_mib:g} MiB; the server's limit is max_body_mib"
    return APIError(413, message, code="request_too_large")


def unsupported_media_type(media_type: str) -> APIError:
    message = f"Content-Type {media_type!r:.200} is not supported: send the header `Content-Type: application/json`"
    return APIError(415, message, code="unsupported_media_type")


def overloaded(retry_after_s: int = 1) -> APIError:
    return APIError(
        429,
        f"The server is overloaded: try again in {retry_after_s} s",
        type="overloaded_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(reason: str, retry_after_s: int = 5) -> APIError:
    return APIError(
        503, reason, type="unavailable_error", code="unavailable", headers={"Retry-After": str(retry_after_s)}
    )


def conflict(reason: str) -> APIError:
    return APIError(409, reason, type="conflict_error", code="conflict")


def internal(request_id: str) -> APIError:
    message = f"The server failed on request {request_id}; its log says why"
    return APIError(500, message, type="server_error", code="internal_error")
