"""Every metric, in one table. A process records into its own `Metrics`; samples of all processes are merged into
the text that GET /metrics answers, so each ingress replica gives the same cluster-wide numbers.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.messages.actors import Sample

PREFIX = "outcrop_"
Kind = Literal["counter", "gauge", "histogram"]

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
DISPATCH = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
START = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)

FINISHED = ("stop", "length", "abort")
FAILED = ("engine", "overloaded", "unavailable", "internal")
FAILOVER = ("unreachable", "timeout", "disconnected", "corrupt", "not_held")


@dataclass(frozen=True, slots=True)
class Definition:
    """`merge` says how gauges of several processes become one. `values` of a single label exist from the start, at 0:
    else the first event would be the first sample of its series, which Prometheus' rate() can't see.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Literal["sum", "max"] = "sum"
    values: tuple[str, ...] = ()


TABLE: tuple[Definition, ...] = (
    Definition("time_to_first_token_seconds", "histogram", "From request to first token, at the ingress.", (), LATENCY),
    Definition("inter_token_latency_seconds", "histogram", "Between tokens of a request, at the ingress.", (), LATENCY),
    Definition("e2e_request_latency_seconds", "histogram", "From request to last token.", (), LATENCY),
    Definition("request_queue_time_seconds", "histogram", "From arrival at a front to its first step.", (), LATENCY),
    Definition("prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Definition("generation_tokens_total", "counter", "Generated tokens."),
    Definition("request_success_total", "counter", "Finished sequences.", ("finished_reason",), values=FINISHED),
    Definition("requests_failed_total", "counter", "Requests that ended with an error.", ("reason",), values=FAILED),
    Definition("num_requests_running", "gauge", "Sequences being computed."),
    Definition("num_requests_waiting", "gauge", "Sequences that wait for a front."),
    Definition("kv_cache_usage_ratio", "gauge", "Used share of the KV cache, fullest front.", merge="max"),
    Definition("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache."),
    Definition("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
    Definition("num_preemptions_total", "counter", "Sequences preempted to be computed again."),
    Definition("step_tokens", "histogram", "Tokens of an engine step.", (), TOKENS),
    Definition("step_seconds", "histogram", "Duration of an engine step.", (), STEP),
    Definition("dispatch_seconds", "histogram", "From dispatch to combined result, per layer.", ("lane",), DISPATCH),
    Definition("expert_compute_seconds", "histogram", "Expert computation of one message.", ("group",), DISPATCH),
    Definition("expert_tokens_total", "counter", "Tokens computed by a replica, per layer.", ("group", "replica")),
    Definition("lane_bytes_total", "counter", "Bytes sent and received by fronts.", ("lane", "direction")),
    Definition("lane_dropped_messages_total", "counter", "Messages that replicas dropped as garbage."),
    Definition("expert_balancedness", "gauge", "Mean/max load over groups, mean of layers.", merge="max"),
    Definition("expert_replicas", "gauge", "Expert replicas by state.", ("group", "state")),
    Definition("expert_replicas_wanted", "gauge", "Expert replicas that a group should have.", ("group",)),
    Definition("fronts", "gauge", "Fronts by state.", ("state",)),
    Definition(
        "actor_restarts_total", "counter", "Lost actors that are replaced.", ("kind",), values=("front", "expert")
    ),
    Definition(
        "failovers_total",
        "counter",
        "Replicas given up by fronts; not_held: messages sent anew by a newer map.",
        ("reason",),
        values=FAILOVER,
    ),
    Definition("local_fallback_tokens_total", "counter", "Tokens whose experts a front computed itself."),
    Definition("rebalances_total", "counter", "Changes of the expert placement."),
    Definition("rebalance_seconds", "histogram", "Duration of a rebalance.", (), START),
    Definition("last_rebalance_timestamp_seconds", "gauge", "Unix time of the last rebalance.", merge="max"),
    Definition("replica_start_seconds", "histogram", "From start to ready of an expert replica.", (), START),
    Definition("expert_map_version", "gauge", "Version of the expert map.", merge="max"),
    Definition("front_replays_total", "counter", "Requests resumed on another front."),
)
BY_NAME = {definition.name: definition for definition in TABLE}


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {d.name: _create(d, self._registry) for d in TABLE}
        self._raising = threading.Lock()

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        self._child(name, labels).inc(amount)  # type: ignore[attr-defined]

    def set(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).set(value)  # type: ignore[attr-defined]

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).observe(value)  # type: ignore[attr-defined]

    def observe_all(self, name: str, counts: Sequence[int], total: float, **labels: str) -> None:
        """Many observations at once: how many lie in each bucket (the last one is open), and their sum."""
        child = self._child(name, labels)
        for bucket, count in zip(child._buckets, counts, strict=True):  # type: ignore[attr-defined]
            bucket.inc(count)
        child._sum.inc(total)  # type: ignore[attr-defined]

    def raise_to(self, name: str, value: float, **labels: str) -> None:
        """Bring a counter to a total that is counted elsewhere."""
        child = self._child(name, labels)
        with self._raising:  # two reports at a time must not add the same twice
            child.inc(max(0.0, value - child._value.get()))  # type: ignore[attr-defined]

    def _child(self, name: str, labels: dict[str, str]) -> MetricWrapperBase:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def samples(self) -> tuple[Sample, ...]:
        return tuple(
            (sample.name, tuple(sorted(sample.labels.items())), sample.value)
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        )

    def recorded(self) -> tuple[Sample, ...]:
        """samples() without the zeros that every process has from the start: of a replica a tenth is left."""
        return tuple(sample for sample in self.samples() if sample[2] or sample[:2] not in _from_the_start())


@cache
def _from_the_start() -> frozenset[tuple[str, tuple[tuple[str, str], ...]]]:
    return frozenset(sample[:2] for sample in Metrics().samples())


def _create(definition: Definition, registry: CollectorRegistry) -> MetricWrapperBase:
    name, labels = PREFIX + definition.name, definition.labels
    if definition.kind == "histogram":
        return Histogram(name, definition.help, labels, buckets=definition.buckets, registry=registry)
    if definition.kind == "gauge":
        return Gauge(name, definition.help, labels, registry=registry)
    counter = Counter(name, definition.help, labels, registry=registry)
    for value in definition.values:
        counter.labels(value)
    return counter


def merge(sources: Iterable[Iterable[Sample]]) -> tuple[Sample, ...]:
    """Samples of several processes as one: counters and histograms add up, gauges as their definition says."""
    merged: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for samples in sources:
        for name, labels, value in samples:
            key = (name, labels)
            definition = BY_NAME.get(name.removeprefix(PREFIX))
            if key in merged and definition and definition.merge == "max":
                merged[key] = max(merged[key], value)
            else:
                merged[key] = merged.get(key, 0.0) + value
    return tuple((name, labels, value) for (name, labels), value in merged.items())


def cumulative(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """What stays of a process that is gone: its counters and histograms, not its gauges."""
    gauges = {PREFIX + d.name for d in TABLE if d.kind == "gauge"}
    return tuple(sample for sample in samples if sample[0] not in gauges)


def exposition(samples: Iterable[Sample]) -> bytes:
    """Prometheus' text format, in the order of the table."""
    return generate_latest(_Merged(tuple(samples)))


class _Merged(Collector):
    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        by_name: dict[str, list[Sample]] = {}
        for sample in self._samples:
            by_name.setdefault(sample[0], []).append(sample)
        for definition in TABLE:
            name = PREFIX + definition.name
            family = Metric(name.removesuffix("_total"), definition.help, definition.kind)
            for suffix in ("_bucket", "_count", "_sum") if definition.kind == "histogram" else ("",):
                for sample_name, labels, value in by_name.get(name + suffix, ()):
                    family.add_sample(sample_name, dict(labels), value)
            yield family
