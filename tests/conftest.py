"""Set before anything imports Ray: it reads its variables at import. And what happens where a program is missing."""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Generator

import pytest

from tests.tools import PACKAGES

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_max_direct_call_object_size": str(4 * 2**20),
    "RAY_DEDUP_LOGS": "0",
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

UNTESTED = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-missing-tools", action="store_true", help="fail tests whose programs are missing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNTESTED] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `needs("PROGRAM")` where that is missing, before its fixtures start anything."""
    for program in (name for mark in item.iter_markers("needs") for name in mark.args):
        if not shutil.which(program):
            item.config.stash[UNTESTED][program] += 1
            refuse = pytest.fail if item.config.getoption("no_missing_tools") else pytest.skip
            refuse(f"{program} is missing: apt-get install {PACKAGES[program]}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    yield
    if untested := terminalreporter.config.stash[UNTESTED]:
        told = ", ".join(f"{number} tests that need {program}" for program, number in untested.items())
        packages = " ".join(sorted({PACKAGES[program] for program in untested}))
        terminalreporter.write_line(f"NOT TESTED: {told}: apt-get install {packages}", yellow=True)
