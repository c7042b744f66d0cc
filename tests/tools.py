"""Programs that some tests need. `python3 tests/tools.py` installs the Debian packages of those that are missing.

Where that can't be done (no apt-get, not root and no sudo without a password, no package index) it says so; the tests
that need them are skipped then, see conftest.py.
"""

import os
import shutil
import subprocess

PACKAGES = {
    "chromium": "chromium",
    "g++": "g++",
    "prometheus": "prometheus",
    "redis-server": "redis-server",
    "promtool": "prometheus",
    "wget": "wget",
}


def missing() -> set[str]:
    return {package for program, package in PACKAGES.items() if not shutil.which(program)}


def _apt_get(*arguments: str) -> bool:
    # RUNLEVEL=1: packages don't start their daemons.
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-qq", *arguments]
    return subprocess.run([*([] if os.geteuid() == 0 else ["sudo", "-n"]), *command], check=False).returncode == 0


def _may_install() -> bool:
    if not shutil.which("apt-get"):
        return False
    return os.geteuid() == 0 or subprocess.run("sudo -n true 2>/dev/null", shell=True, check=False).returncode == 0


def install() -> None:
    if missing() and _may_install():
        _apt_get("update")
        for package in sorted(missing()):  # one by one: a distribution may lack one
            _apt_get("install", "--yes", "--no-install-recommends", package)
    if left := sorted(missing()):
        print(f"could not install {', '.join(left)}: tests that need it are skipped", flush=True)


if __name__ == "__main__":
    install()
