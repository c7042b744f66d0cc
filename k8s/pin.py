"""Pin what Outcrop and its extra `otel` need to the versions of this environment, and to the files that pip takes here.

python k8s/pin.py > k8s/requirements.txt

Run it on Linux and x86-64 with the Python of the image: another machine takes other files. torch has no hash, because
it comes from different indexes for CPUs and GPUs.
"""

import json
import subprocess
import sys
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


def hashes(pins: list[str]) -> dict[str, str]:
    """SHA-256 of the file that pip would install for each, by its name."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    told = subprocess.run([*pip, "--report", "-", *pins], check=True, stdout=subprocess.PIPE).stdout
    return {
        canonicalize_name(found["metadata"]["name"]): found["download_info"]["archive_info"]["hashes"]["sha256"]
        for found in json.loads(told)["install"]
    }


if __name__ == "__main__":
    names = sorted(set(closure("outcrop", frozenset({"otel"}), {})) - {"outcrop"})
    pins = {name: f"{name}=={Version(metadata.version(name)).public}" for name in names}
    files = hashes([pin for name, pin in pins.items() if name != "torch"])
    print("# Written by pin.py. CUDA libraries are not listed: torch's own wheel pins them.")
    for name, pin in pins.items():
        print(pin if name == "torch" else f"{pin} --hash=sha256:{files[name]}")
