"""Set before anything imports Ray: it reads its variables at import. What happens where a program is missing. Which
tests keep to one worker of pytest-xdist.
"""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Generator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

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

# Groups of tests that stay on one worker of pytest-xdist, in the order of their files, so that session fixtures are
# made once. Other files are groups of their own. Servers with clients whose patience is tested never run beside each
# other, but beside actors without HTTP.
GROUPS = {
    "tests/e2e/test_start_errors.py": "start errors",
    "tests/e2e/": "servers",
    "tests/chaos/": "servers",
    "tests/cluster/": "clusters",
    "tests/k8s/test_on_ray.py": "clusters",
    "tests/k8s/test_image.py": "clusters",
}
# What takes long comes first, so that no worker waits for another at the end: servers on one, then on the other what
# has no time limits of its own, beside the faults that servers begin with, which take all that processors have left.
FIRST = ("servers", "tests/unit/test_native_checked.py", "tests/unit/test_gpu_check.py", "tests/unit/test_zmq_lane.py")
FIRST += ("tests/unit/test_sandbox.py", "tests/unit/test_sampler.py", "tests/k8s/test_values.py", "clusters")


def group_of(nodeid: str) -> str:
    return next((group for path, group in GROUPS.items() if nodeid.startswith(path)), nodeid.partition("::")[0])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-missing-tools", action="store_true", help="fail tests whose programs are missing")


class Groups(LoadScopeScheduling):
    """Not the mark xdist_group: pytest-xdist 3.8 puts it into the id of a test, and pytest 9.2 does not take it."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # in a worker of pytest-xdist
        places = {group: place for place, group in enumerate(FIRST)}
        items.sort(key=lambda item: places.get(group_of(item.nodeid), len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `needs("PROGRAM")` where that is missing, before its fixtures start anything."""
    for program in (name for mark in item.iter_markers("needs") for name in mark.args):
        if not shutil.which(program):
            item.user_properties.append(("missing", program))  # goes with the report, also to another process
            refuse = pytest.fail if item.config.getoption("no_missing_tools") else pytest.skip
            refuse(f"{program} is missing: apt-get install {PACKAGES[program]}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    yield
    reports = (report for found in terminalreporter.stats.values() for report in found)
    setups = [report for report in reports if getattr(report, "when", None) == "setup"]
    if untested := Counter(value for setup in setups for name, value in setup.user_properties if name == "missing"):
        told = ", ".join(f"{number} tests that need {program}" for program, number in untested.items())
        packages = " ".join(sorted({PACKAGES[program] for program in untested}))
        terminalreporter.write_line(f"NOT TESTED: {told}: apt-get install {packages}", yellow=True)
