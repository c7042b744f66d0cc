"""The Debian package `chromium`, driven by playwright; nothing is downloaded."""

import shutil

# The tests may run as root, and in containers with a small /dev/shm.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


def chromium() -> str:
    path = shutil.which("chromium")
    assert path, "no chromium: apt-get install chromium"
    return path
