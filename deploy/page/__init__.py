"""The page at `/`: chat, the load of every expert, the cluster. One static file that asks this API and nobody else."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("index.html").read_text(encoding="utf-8")


def content_security_policy(html: str) -> str:
    """Allows the inline style and script of this very file, requests to its own origin, and nothing else."""
    style, script = (_hashes(html, tag) for tag in ("style", "script"))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
HEADERS = SAFE_HEADERS | {"Content-Security-Policy": content_security_policy(PAGE)}
