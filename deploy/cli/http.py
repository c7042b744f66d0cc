"""How commands talk to a running server, and how they end with an error."""

import json
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

Url = Annotated[str, typer.Option(help="Address of the server.", envvar="OUTCROP_URL")]
Key = Annotated[str | None, typer.Option(help="API key.", envvar="OUTCROP_API_KEY")]
DEFAULT_URL = "http://127.0.0.1:8000"

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def fail(message: str) -> typer.Exit:
    errors.print("error:", style="bold red", end=" ")
    errors.print(message, soft_wrap=True, markup=False)
    return typer.Exit(1)


def connect(url: str, api_key: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10.0, read=600.0), trust_env=False)


def call(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST if there is a body. Ends the command with the server's message if it refuses."""
    try:
        response = client.get(path) if body is None else client.post(path, json=body)
    except httpx.HTTPError as error:
        raise fail(f"{client.base_url} does not answer: {error}") from None
    if response.status_code != 200:
        raise fail(message_of(response.content))
    return response.json()


def message_of(body: bytes) -> str:
    """The message of an error in OpenAI's shape."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
