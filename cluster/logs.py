"""Logs of all processes: one line per event on standard error, as text for people or as JSON for collectors.

What belongs to an event travels in `extra`, such as `extra={"request_id": ...}`, and becomes a key of the JSON object.
"""

import json
import logging
import sys
import time
from typing import Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

# Ours alone: Ray, Serve and libraries keep their own.
PACKAGES = ("cluster", "actors", "deploy")
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logs(process: str, style: Format = "text", level: Level = "info") -> None:
    """Called once by each process; `process` names it, for example by its actor id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSON(process) if style == "json" else _Text(process))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def _extra(record: logging.LogRecord) -> dict[str, object]:
    # Ray adds fields of its own, with an underscore.
    return {key: value for key, value in vars(record).items() if key not in STANDARD and not key.startswith("_")}


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        return super().formatMessage(record) + extra


class _JSON(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | _extra(record), default=str)
