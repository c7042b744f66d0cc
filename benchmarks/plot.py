"""Draw the scaling curves: `python -m benchmarks.plot [RESULTS.json] [PICTURE.svg]` (needs the extra `bench`)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PICTURE = Path(__file__).parent.parent / "docs" / "scaling.svg"
TITLES = {
    "batch": "sequences in a step",
    "context": "context, tokens (one sequence)",
    "groups": "expert groups (batch 8)",
    "replicas": "replicas per group (batch 8)",
}


def main(
    results: Annotated[Path, typer.Argument()] = RESULTS, picture: Annotated[Path, typer.Argument()] = PICTURE
) -> None:
    """One panel for each thing that was varied."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "outcrop"  # the same numbers give the same file
    from matplotlib import pyplot

    content: dict[str, Any] = json.loads(results.read_text())
    axes = [axis for axis in TITLES if any(f["axis"] == axis for f in content["figures"])]
    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(max(4.2, 3.2 * len(axes)), 3), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes, panels[0], strict=True):
        draw(panel, TITLES[axis], [f for f in content["figures"] if f["axis"] == axis])
    figure.suptitle(
        f"Decode step over zmq, {content['dtype']}, {content['environment']['cores']} cores", fontsize="medium"
    )
    figure.savefig(picture, metadata={"Date": None})


def draw(panel: Any, title: str, figures: list[dict[str, Any]]) -> None:
    values = [f["value"] for f in figures]
    panel.plot(values, [f["milliseconds"] for f in figures], marker="o")
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values], fontsize=8)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(title)
    panel.set_ylabel("milliseconds a step")
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    typer.run(main)
