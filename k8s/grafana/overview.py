"""What clients feel, and how close the cluster is to its limits."""

from panels import (
    GREEN,
    ORANGE,
    RED,
    dashboard,
    graph,
    latency,
    mean,
    missing,
    now,
    quantile,
    rate,
    ratio,
    ready,
    tile,
    total,
)

FAILED = total(rate("requests_failed_total"), "reason")
FINISHED = total(rate("request_success_total"), "finished_reason")
PREFIX_HITS = ratio(rate("prefix_cache_hits_total"), rate("prefix_cache_queries_total"))

TILES = [
    tile("Requests", "Finished sequences per second.", FINISHED, "reqps"),
    tile("Output tokens", "Generated tokens per second.", rate("generation_tokens_total"), "short"),
    tile("TTFT p95", "Time to the first token: 95 % are faster.", quantile(0.95, "time_to_first_token_seconds"), "s"),
    tile("ITL p95", "Time between tokens: 95 % are faster.", quantile(0.95, "inter_token_latency_seconds"), "s"),
    tile(
        "Errors",
        "Share of requests that failed or were refused.",
        ratio(FAILED, f"({FINISHED} + {FAILED})"),
        "percentunit",
        {0.01: ORANGE, 0.05: RED},
    ),
    tile("KV cache", "Of the fullest front.", now("kv_cache_usage_ratio"), "percentunit", {0.8: ORANGE, 0.95: RED}),
    tile("Running", "Sequences being computed.", now("num_requests_running")),
    tile("Waiting", "Sequences that wait for a front.", now("num_requests_waiting")),
    tile("Fronts", "Fronts that are ready.", total(now("fronts", 'state="ready"'), "state"), steps={0: RED, 1: GREEN}),
    tile("Replicas", "Expert replicas that are ready.", ready()),
    tile("Replicas missing", "Wanted, but not ready.", missing(), steps={1: ORANGE}),
    tile("Prefix hits", "Share of prompt tokens found in the prefix cache.", PREFIX_HITS, "percentunit"),
]
OVERVIEW = dashboard(
    "outcrop-overview",
    "Outcrop / Overview",
    __doc__ or "",
    {
        "At a glance": TILES,
        "Latency": [
            latency("Time to first token", "time_to_first_token_seconds", "At the ingress.", width=12),
            latency("Inter-token latency", "inter_token_latency_seconds", "At the ingress.", width=12),
            latency("End to end", "e2e_request_latency_seconds", "From request to last token.", width=12),
            latency("Queue", "request_queue_time_seconds", "From arrival at a front to its first step.", width=12),
        ],
        "Throughput": [
            graph(
                "Tokens",
                "Per second.",
                {"prompt": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
            ),
            graph(
                "Finished sequences",
                "Per second, by reason.",
                {"{{finished_reason}}": rate("request_success_total")},
                "reqps",
                stacked=True,
            ),
            graph("Tokens of an engine step", "Mean: how well steps are filled.", {"tokens": mean("step_tokens")}),
        ],
        "Errors": [
            graph(
                "Failed requests",
                "Per second. `overloaded` is a refusal with 429.",
                {"{{reason}}": rate("requests_failed_total")},
                "reqps",
                stacked=True,
            ),
            graph("Replays", "Requests resumed on another front.", {"replays": rate("front_replays_total")}, "reqps"),
            graph("Lost actors", "Per second, by kind.", {"{{kind}}": rate("actor_restarts_total")}, "cps"),
        ],
        "Saturation": [
            graph(
                "Sequences",
                "Being computed, and waiting for a front.",
                {"running": now("num_requests_running"), "waiting": now("num_requests_waiting")},
            ),
            graph("KV cache", "Of the fullest front.", {"used": now("kv_cache_usage_ratio")}, "percentunit"),
            graph("Preemptions", "Sequences computed again.", {"preemptions": rate("num_preemptions_total")}, "cps"),
            latency("Engine step", "step_seconds", "Attention, router, experts, head and sampling.", width=12),
            graph("Prefix cache", "Share of prompt tokens found.", {"hits": PREFIX_HITS}, "percentunit", width=12),
        ],
    },
)
