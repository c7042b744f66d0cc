"""An id for each request: its X-Request-Id, in the answer's id, in our logs and traces.

Serve's proxy gives requests without that header one, and puts it on the answer. Only an id that can't be used is
replaced by a new one.
"""

import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "x-request-id"
USABLE = re.compile(r"[\w.:+/=-]{1,128}")


class RequestId:
    """ASGI middleware; the id is in `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if USABLE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        await self.app(scope, receive, send)
