"""Pin what Outcrop and its extra `otel` need to the versions of this environment.

python k8s/pin.py > k8s/requirements.txt
"""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def closure(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Every distribution that `name` needs here, and with which extras."""
    key = canonicalize_name(name)
    if key in seen and extras <= seen[key]:
        return seen
    seen[key] = seen.get(key, frozenset()) | extras
    for text in metadata.requires(name) or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            closure(needed.name, frozenset(needed.extras), seen)
    return seen


if __name__ == "__main__":
    print("# Written by pin.py. CUDA libraries are not listed: torch's own wheel pins them.")
    for name in sorted(set(closure("outcrop", frozenset({"otel"}), {})) - {"outcrop"}):
        print(f"{name}=={Version(metadata.version(name)).public}")
