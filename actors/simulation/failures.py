"""What goes wrong in a simulation, and when: `kill 3 replicas at 600 s; node at 1200 s; hot expert from 1800 s`."""

import re
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError

FailureKind = Literal["replicas", "fronts", "node", "hot expert"]
GRAMMAR = "kill N replicas at T s; kill N fronts at T s; node at T s; hot expert from T s"
_SECONDS = r"(?P<at>\d+(?:\.\d+)?)\s*s"
_CLAUSES = (
    re.compile(rf"kill\s+(?P<count>\d+)\s+(?P<kind>replicas|fronts|replica|front)\s+at\s+{_SECONDS}"),
    re.compile(rf"(?P<kind>node)\s+at\s+{_SECONDS}"),
    re.compile(rf"(?P<kind>hot\s+expert)\s+from\s+{_SECONDS}"),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """`at` are seconds from the start. A killed process closes its connections; a lost node falls silent."""

    at: float
    kind: FailureKind
    count: int = 1


def parse_failures(text: str) -> tuple[Failure, ...]:
    """In the order of time. Raises ConfigError that names the clause and where it begins."""
    found, place = [], 0
    for clause in text.split(";"):
        begin = place + len(clause) - len(clause.lstrip()) + 1
        place += len(clause) + 1
        if not clause.strip() and (text.strip() == "" or place > len(text)):
            continue  # nothing at all, or a semicolon at the end
        found.append(_parse(clause.strip(), begin))
    return tuple(sorted(found, key=lambda failure: failure.at))


def _parse(clause: str, begin: int) -> Failure:
    match = next((m for pattern in _CLAUSES if (m := pattern.fullmatch(clause))), None)
    if match is None:
        raise ConfigError(f"fail={clause!r}, at character {begin}, is no failure: write {GRAMMAR}")
    kind = re.sub(r"\s+", " ", match["kind"])
    count = int(match.groupdict().get("count") or 1)
    if count < 1:
        raise ConfigError(f"fail={clause!r}, at character {begin}: choose a number of 1 or more")
    kinds: dict[str, FailureKind] = {"replica": "replicas", "front": "fronts"}
    return Failure(float(match["at"]), kinds.get(kind, kind), count)  # type: ignore[arg-type]
