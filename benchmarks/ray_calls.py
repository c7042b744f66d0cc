"""CPU that a call of Ray costs its caller, in microseconds, as JSON: `python -m benchmarks.ray_calls`.

Without an answer, with the report of an expert replica, and with eight of them.
"""

import asyncio
import json
import time
from typing import Any

from deploy.cli.local_ray import own_ray

CALLS = 1000


def measure() -> dict[str, float]:
    import ray

    from benchmarks.control import Served
    from cluster.control.ray_actors import RayActors
    from cluster.messages.actors import ReplicaSpec

    @ray.remote(num_cpus=0)
    class Answering:
        def answer(self, given: Any) -> Any:
            return given

    actor, actors = Answering.remote(), RayActors("benchmark")
    report = Served(ReplicaSpec("expert-g0-r0", 0, "/m", "cpu", "float32", (), 1))._report()

    async def spent(given: Any) -> float:
        handed = ray.put(given)
        for calls in (CALLS // 10, CALLS):  # the first ones cost more
            started = time.process_time()
            await asyncio.gather(*(actors.call(actor, "answer", handed, timeout=60.0) for _ in range(calls)))
        return 1e6 * (time.process_time() - started) / CALLS

    asked = {"nothing": None, "a report": report, "eight reports": (report,) * 8}
    return {what: asyncio.run(spent(given)) for what, given in asked.items()}


if __name__ == "__main__":
    with own_ray(num_cpus=1):
        print(json.dumps(measure()))
