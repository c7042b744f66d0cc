"""What every route needs: the service, the API key, the body."""

import hmac
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from deploy.ingress.openai import errors
from deploy.ingress.service import Service

T = TypeVar("T", bound=BaseModel)

MIB = 2**20


def service_of(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def require_key(request: Request) -> None:
    """Compare the bearer key in constant time. Raises APIError (401)."""
    key = service_of(request).config.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not given or scheme.lower() != "bearer":
        raise errors.unauthorized(is_missing=True)
    # Starlette reads headers as Latin-1; clients send the bytes of their UTF-8.
    if not hmac.compare_digest(given.strip().encode("latin-1"), key.get_secret_value().encode()):
        raise errors.unauthorized()


async def read_request(request: Request, model: type[T]) -> T:
    """The checked body. Raises APIError."""
    return await service_of(request).work.parse(await read_body(request), model)


async def read_body(request: Request) -> bytes:
    """The JSON body, read no further than the limit. Raises APIError (413, 415)."""
    limit_mib = service_of(request).config.max_body_mib
    limit = int(limit_mib * MIB)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise errors.too_large(limit_mib)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise errors.too_large(limit_mib)
    # A browser sends other types, or none, for any web page; JSON only after it has asked the server (CORS).
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and media_type != "application/json":
        raise errors.unsupported_media_type(media_type)
    return bytes(body)
