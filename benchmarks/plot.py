"""Draw docs/scaling.svg and docs/roofline.svg from benchmarks/results: `python -m benchmarks.plot` (extra `bench`)."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "outcrop", "svg.fonttype": "none"}  # the same numbers give the same file
from matplotlib import pyplot  # noqa: E402 - after use()

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs"
TITLES = {
    "batch": "sequences in a step",
    "context": "context, tokens (one sequence)",
    "groups": "expert groups (batch 8)",
    "replicas": "replicas per group (batch 8)",
}
Json = dict[str, Any]


def main() -> None:
    draw_scaling(_read("scaling.json"), PICTURES / "scaling.svg")
    draw_roofline(_read("kernels.json"), _read("offline.json"), PICTURES / "roofline.svg")


def _read(name: str) -> Json:
    content: Json = json.loads((RESULTS / name).read_text())
    return content


def draw_scaling(content: Json, picture: Path) -> None:
    """One panel for each thing that was varied."""
    axes = [axis for axis in TITLES if any(f["axis"] == axis for f in content["figures"])]
    size = (max(4.2, 3.2 * len(axes)), 3)
    figure, panels = pyplot.subplots(1, len(axes), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes, panels[0], strict=True):
        figures = sorted((f for f in content["figures"] if f["axis"] == axis), key=lambda f: f["value"])
        _draw_growth(panel, TITLES[axis], figures)
    figure.suptitle(
        f"Decode step over zmq, {content['dtype']}, {content['environment']['cores']} cores", fontsize="medium"
    )
    figure.savefig(picture, metadata={"Date": None})


def _draw_growth(panel: Any, title: str, figures: list[Json]) -> None:
    values = [f["value"] for f in figures]
    panel.plot(values, [f["milliseconds"] for f in figures], marker="o")
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values], fontsize=8)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(title)
    panel.set_ylabel("milliseconds a step")
    panel.grid(alpha=0.3)


def draw_roofline(kernels: Json, offline: Json, picture: Path) -> None:
    """Experts of a layer, by tokens; whole steps, by lane. Each beside the limits of its own run."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    points = [
        (f["kernels"], f["gflops"] / f["gb_per_second"], f["gflops"], str(f["tokens"])) for f in kernels["figures"]
    ]
    _draw_roof(left, "experts of one layer, by tokens", kernels["limits"], points)
    points = [
        (f["lane"], f["flops_per_byte"], f["gflops"], f["case"])
        for f in offline["figures"]
        if f["lane"] in ("local", "zmq")
    ]
    _draw_roof(right, "whole step", offline["limits"], points)
    environment = offline["environment"]
    kernels_used = environment["bfloat16"].partition(":")[0]
    figure.suptitle(f"1b-a400m, bfloat16, {environment['cores']} cores; {kernels_used}", fontsize="medium")
    figure.savefig(picture, metadata={"Date": None})


def _draw_roof(panel: Any, title: str, limits: Json, points: list[tuple[str, float, float, str]]) -> None:
    """`points`: (series, operations per byte, GFLOP/s, label)."""
    read, product = limits["bytes_per_second"] / 1e9, limits["flops_per_second"] / 1e9
    low, high = min(p[1] for p in points) / 2, max(p[1] for p in points) * 2
    corner = product / read
    roof = sorted({low, min(max(corner, low), high), high})
    panel.plot(
        roof, [min(product, read * x) for x in roof], color="black", label=f"{read:.0f} GB/s, {product:.0f} GFLOP/s"
    )
    for series in dict.fromkeys(p[0] for p in points):
        mine = [p for p in points if p[0] == series]
        panel.plot([p[1] for p in mine], [p[2] for p in mine], marker="o", linestyle=":", label=series)
    for _, x, y, label in {p[3]: p for p in points}.values():
        panel.annotate(label, (x, y), textcoords="offset points", xytext=(4, -11), fontsize=7)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations per byte that must be read")
    panel.set_ylabel("GFLOP/s")
    panel.set_title(title, fontsize="medium")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
