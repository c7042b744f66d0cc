"""Render the chart: for kustomize, or to be looked at. helm-python-sdk (`pip install 'outcrop[test]'`) is Helm.

python k8s/render.py            write overlays/ (what each is made of: OVERLAYS) and chart/values.schema.json
python k8s/render.py --check    fail if they are not what this script would write
python k8s/render.py gpu-multi-node gke mine.yaml     print the chart with these values, the later ones on top
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from values import schema

HERE = Path(__file__).parent
CHART, EXAMPLES = HERE / "chart", HERE / "chart/examples"
OVERLAYS = {
    "cpu-demo": ("cpu-demo",),
    "cpu-demo-open": ("cpu-demo-open",),
    "gpu-single-node": ("gpu-single-node",),
    "gpu-multi-node": ("gpu-multi-node",),
    "production": ("gpu-multi-node", "production"),
}
NAME = "outcrop"
KUSTOMIZATION = """\
# Written by k8s/render.py from k8s/chart with examples/{examples}. Patch it in an overlay of your own.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - outcrop.yaml
"""


def rendered(*examples: str) -> str:
    """All objects as YAML; an example is a name in examples/, or a file. Raises what Helm says of it."""
    from helm_python.chart import Chart

    paths = (Path(each) if each.endswith(".yaml") else EXAMPLES / f"{each}.yaml" for each in examples)
    given = [yaml.safe_load(path.read_text()) or {} for path in paths]
    values: dict[str, Any] = functools.reduce(_merge, given, {})
    with Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values=values, name=NAME)
    found = [text.strip("\n") for path, text in sorted(files.items()) if path.endswith(".yaml") and text.strip()]
    return "\n---\n".join(text.removeprefix("---\n") for text in found) + "\n"


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm does it with several files of values."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged


def written() -> dict[Path, str]:
    """Every file that is written here, and its text."""
    files = {}
    for name, examples in OVERLAYS.items():
        directory = HERE / "overlays" / name
        files[directory / "outcrop.yaml"] = rendered(*examples)
        told = ".yaml, ".join(examples) + ".yaml"
        files[directory / "kustomization.yaml"] = KUSTOMIZATION.format(examples=told)
    return files


def main(arguments: list[str]) -> int:
    """The exit code: 1 when --check finds a difference."""
    if arguments not in ([], ["--check"]):
        print(rendered(*arguments), end="")
        return 0
    schema_file, schema_text = CHART / "values.schema.json", json.dumps(schema(), indent=1) + "\n"
    if not arguments:
        schema_file.write_text(schema_text)  # first: Helm checks the values of the overlays with it
    wanted = {schema_file: schema_text} | written()
    if arguments:
        stale = [file for file, text in wanted.items() if not file.exists() or file.read_text() != text]
        stale += sorted(set((HERE / "overlays").rglob("*.yaml")) - set(wanted))
        print("\n".join(f"{file.relative_to(HERE)} is stale: run k8s/render.py" for file in stale) or "up to date")
        return 1 if stale else 0
    for file, text in wanted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
