"""Wrap rules.yaml as a PrometheusRule for the operator, so that there is one source of rules.

python k8s/prometheus/generate.py            write prometheusrule.yaml
python k8s/prometheus/generate.py --check    fail if it is not what this script would write
"""

import sys
from pathlib import Path
from textwrap import indent

HERE = Path(__file__).parent
HEADER = """\
# Written by generate.py from rules.yaml: edit that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: outcrop
  labels:
    app.kubernetes.io/name: outcrop
spec:
"""


def wrapped(rules: str) -> str:
    """As text, so that comments stay."""
    return HEADER + indent(rules, "  ")


def main(arguments: list[str]) -> int:
    """The exit code: 1 when --check finds a difference."""
    target = HERE / "prometheusrule.yaml"
    text = wrapped((HERE / "rules.yaml").read_text())
    if arguments == ["--check"]:
        is_same = target.exists() and target.read_text() == text
        print(f"{target.name} is {'up to date' if is_same else 'stale: run k8s/prometheus/generate.py'}")
        return 0 if is_same else 1
    target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
