"""Which group is hot, what a layer's time is spent on, and what the cluster does about it."""

from panels import (
    GREEN,
    ORANGE,
    RED,
    dashboard,
    graph,
    latency,
    missing,
    now,
    quantile_ever,
    rate,
    ratio,
    ready,
    tile,
    total,
)

DISPATCH = ratio(total(rate("dispatch_seconds_sum"), "lane"), total(rate("dispatch_seconds_count"), "lane"))
COMPUTE = ratio(
    total(rate("expert_compute_seconds_sum"), "group"), total(rate("expert_compute_seconds_count"), "group")
)

TILES = [
    tile(
        "Balancedness",
        "Mean/max load over groups: 1 is perfect.",
        now("expert_balancedness"),
        "percentunit",
        {0: RED, 0.6: ORANGE, 0.8: GREEN},
    ),
    tile("Replicas", "Expert replicas that are ready.", ready()),
    tile("Replicas missing", "Wanted, but not ready.", missing(), steps={1: ORANGE}),
    tile("Map version", "Grows with every change of the expert map.", now("expert_map_version")),
    tile(
        "Last rebalance",
        "Since the last change of the placement; nothing if there was none.",
        f"time() - ({now('last_rebalance_timestamp_seconds')} > 0)",
        "s",
    ),
    tile("Failovers", "Since the start.", total(now("failovers_total"), "reason")),
]
EXPERTS = dashboard(
    "outcrop-experts",
    "Outcrop / Experts",
    __doc__ or "",
    {
        "At a glance": TILES,
        "Load": [
            graph(
                "Tokens by replica",
                "Per second, all layers added up.",
                {"group {{group}} replica {{replica}}": rate("expert_tokens_total")},
                width=12,
                stacked=True,
            ),
            graph(
                "Busy replicas by group",
                "Seconds of expert computation per second: compare it with the number of the group's replicas.",
                {"group {{group}}": rate("expert_compute_seconds_sum")},
                width=12,
            ),
            graph("Balancedness", "Mean/max load over groups.", {"balancedness": now("expert_balancedness")}, width=12),
            graph(
                "Lane traffic",
                "Bytes per second, as fronts see it.",
                {"{{lane}} {{direction}}": rate("lane_bytes_total")},
                "Bps",
                width=12,
            ),
        ],
        "Time of a layer": [
            latency("Dispatch to combine", "dispatch_seconds", "A layer's round trip at the front.", "{{lane}}"),
            latency("Expert computation", "expert_compute_seconds", "Of one message.", "group {{group}}"),
            graph(
                "Where the time goes",
                "Means. `travel` is the rest of the round trip, and holds the wait for the slowest message.",
                {"compute": COMPUTE, "travel": f"clamp_min({DISPATCH} - {COMPUTE}, 0)"},
                "s",
                stacked=True,
            ),
        ],
        "Faults": [
            graph(
                "Failovers",
                "Replicas given up by a front, per second. `not_held`: the experts have moved.",
                {"{{reason}}": rate("failovers_total")},
                "cps",
                stacked=True,
            ),
            graph(
                "Local fallback",
                "Tokens per second whose experts a front computed itself.",
                {"tokens": rate("local_fallback_tokens_total")},
            ),
            graph(
                "Lost replicas and dropped messages",
                "Per second.",
                {
                    "replicas": rate("actor_restarts_total", 'kind="expert"'),
                    "messages": rate("lane_dropped_messages_total"),
                },
                "cps",
            ),
        ],
        "Placement": [
            graph(
                "Replicas by group",
                "By state.",
                {"group {{group}} {{state}}": f"{now('expert_replicas')} > 0"},
                stacked=True,
            ),
            graph("Expert map", "Its version.", {"version": now("expert_map_version")}),
            graph("Rebalances", "Since the start.", {"rebalances": now("rebalances_total")}),
            graph(
                "Duration of a rebalance",
                "Of all so far.",
                {"p50": quantile_ever(0.5, "rebalance_seconds"), "p95": quantile_ever(0.95, "rebalance_seconds")},
                "s",
                width=12,
            ),
            graph(
                "Start of a replica",
                "Of all so far, from start to ready.",
                {
                    "p50": quantile_ever(0.5, "replica_start_seconds"),
                    "p95": quantile_ever(0.95, "replica_start_seconds"),
                },
                "s",
                width=12,
            ),
        ],
    },
)
