"""The time that control goes by: its event loop's, as do asyncio's own sleep and timeouts. A test's loop may run on a
time of its own (tests/unit/control/virtual_time.py).
"""

import asyncio


def now() -> float:
    """In seconds. It does not jump when somebody sets the clock of the machine."""
    return asyncio.get_running_loop().time()
