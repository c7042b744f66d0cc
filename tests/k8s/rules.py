"""Rules that a schema can't express. Each is a function whose docstring is its reason; `broken` names what breaks one.

kuberay_rules: what KubeRay's own validation (ray-operator/controllers/ray/utils/validation.go, v1.7) would refuse, or
accept and then fail on. pod_rules and cluster_rules: what this project wants of pods, and of objects that go together.
"""

from collections.abc import Callable, Iterable

from tests.k8s import cluster_rules, kuberay_rules, pod_rules
from tests.k8s.manifests import Object

Rule = Callable[[list[Object]], Iterable[str]]
RULES: tuple[Rule, ...] = (*kuberay_rules.RULES, *pod_rules.RULES, *cluster_rules.RULES)


def broken(found: list[Object]) -> list[str]:
    """`rule: what is wrong`, for the objects of one overlay."""
    return [f"{rule.__name__}: {wrong}" for rule in RULES for wrong in rule(found)]
