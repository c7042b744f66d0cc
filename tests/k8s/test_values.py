"""The chart's values: what Helm refuses, and what follows from them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig
from k8s.values import NOT_IN_VALUES, Values, schema
from tests.k8s.manifests import K8S, Object, chart, containers, needs_helm, one, overlay, ray_groups, title

VALUES = yaml.safe_load((K8S / "chart/values.yaml").read_text())
pytestmark = needs_helm
Render = Callable[[dict[str, Any]], list[Object]]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """The chart with values on top of gpu-multi-node's and production's."""

    def run(values: dict[str, Any]) -> list[Object]:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"  # a name for each: what was rendered is kept
        file.write_text(yaml.safe_dump(values))
        return chart("gpu-multi-node", "production", str(file))

    return run


def refusal(tmp_path: Path, values: dict[str, Any]) -> str:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, K8S / "render.py", tmp_path / "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stderr


def test_the_defaults_are_those_that_the_schema_is_made_of() -> None:
    assert Values.model_validate(VALUES).model_dump(exclude_unset=True) == VALUES
    unsaid = Values.model_validate(VALUES).model_fields_set ^ set(Values.model_fields)
    assert not unsaid
    settings = schema()["$defs"]["Settings"]["properties"]
    assert set(settings) == set(ClusterConfig.model_fields) - set(NOT_IN_VALUES)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"imagee": {}}, "'imagee' not allowed"),
        ({"settings": {"frontz": 2}}, "'frontz' not allowed"),
        ({"settings": {"fronts": "two"}}, "got string, want integer"),
        ({"settings": {"api_key": "secret"}}, "'api_key' not allowed"),
        ({"pools": {"x": {"rol": "front"}}}, "'rol' not allowed"),
        ({"pools": {"x": {"role": "gpu"}}}, "must be one of"),
        ({"image": {"cpu": {"digest": "latest"}}}, "does not match pattern"),
        ({"fullnameOverride": "x" * 48}, "maxLength"),
        ({"ingress": {"enabled": True, "tlsSecret": "x"}}, "ingress.host is missing"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
        ({"models": {"fetch": {"by": "job"}}}, "models.fetch.hubId is missing"),
    ],
    ids=str,
)
def test_helm_refuses(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, values)


def test_two_releases_share_nothing_in_a_namespace(render: Render) -> None:
    ours, theirs = overlay("production"), render({"fullnameOverride": "granite"})
    shared = {title(each) for each in ours} & {title(each) for each in theirs}
    assert shared == {"PriorityClass/outcrop-serving"}
    assert "outcrop-instance: outcrop" not in yaml.safe_dump_all(theirs)


def test_every_pod_may_pull_and_is_where_it_should_be(render: Render) -> None:
    found = render(
        {
            "imagePullSecrets": ["registry"],
            "serviceAccount": {"head": "ray", "workers": "reader"},
            "head": {"nodeSelector": {"a": "b"}},
            "pools": {"front": {"env": [{"name": "X", "value": "1"}], "spread": "DoNotSchedule"}},
        }
    )
    for name, group in ray_groups(one(found, "RayService")):
        pod = group["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["serviceAccountName"] == ("ray" if name == "head" else "reader")
        assert pod.get("nodeSelector") == ({"a": "b"} if name == "head" else None)
        assert ({"name": "X", "value": "1"} in pod["containers"][0]["env"]) is (name == "front")
    redis = one(found, "StatefulSet")["spec"]["template"]["spec"]
    assert redis["imagePullSecrets"] == [{"name": "registry"}]


def test_only_pods_with_gpus_have_cudas_libraries(render: Render) -> None:
    digest = "sha256:" + "a" * 64
    found = render({"image": {"repository": "r.example/outcrop", "cuda": {"tag": "x", "digest": digest}}})
    images = {
        name: {each["image"] for each in containers(group["template"])}
        for name, group in ray_groups(one(found, "RayService"))
    }
    cpu, cuda = {"r.example/outcrop:0.1.0-cpu"}, {f"r.example/outcrop:x@{digest}"}
    assert images == {"head": cpu, "ingress": cpu, "front": cuda, "experts": cuda}


def test_other_settings_are_another_cluster_unless_in_place(render: Render) -> None:
    def head(values: dict[str, Any]) -> Any:
        spec = one(render(values), "RayService")["spec"]
        return spec["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]

    assert head({}) != head({"settings": {"max_num_seqs": 8}})
    assert head({}) != head({"pools": {"experts": {"maxReplicas": 20}}})
    in_place = {"upgrade": {"inPlace": True}}
    assert head(in_place) == head({"settings": {"max_num_seqs": 8}} | in_place)


def test_a_drain_is_as_long_as_the_grace_allows(render: Render) -> None:
    """Of spot nodes: the notice is all there is."""
    for _, group in list(ray_groups(one(render({"drainSeconds": 60}), "RayService")))[1:]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_every_ray_process_knows_which_proxy_it_is(render: Render) -> None:
    """Proxies and ingresses, on whatever node, must agree."""
    for wanted in (True, False):
        for _, group in ray_groups(one(render({"haProxy": wanted}), "RayService")):
            (ray,) = (c for c in group["template"]["spec"]["containers"] if c["name"].startswith("ray"))
            assert ({"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in ray["env"]) == wanted


def test_budgets_count_pods_not_actors(render: Render) -> None:
    def least(values: dict[str, Any]) -> dict[str, int]:
        budgets = [each for each in render(values) if each["kind"] == "PodDisruptionBudget"]
        return {each["metadata"]["name"].removeprefix("outcrop-"): each["spec"]["minAvailable"] for each in budgets}

    assert least({}) == {"ingress": 1, "front": 1, "expert": 3, "redis": 1}
    assert least({"pools": {"experts": {"actors": 2, "gpus": 2}}})["expert"] == 1
    assert "front" not in least({"settings": {"min_fronts": 1}}), "load may leave one, whose node would never drain"
    assert least({"settings": {"min_replicas": 1}})["expert"] == 1


def test_a_job_of_another_template_has_another_name(render: Render) -> None:
    """The API server refuses to change one, and Helm would end there."""

    def job(values: dict[str, Any]) -> tuple[str, Any]:
        found = one(render(values), "Job")
        return found["metadata"]["name"], found["spec"]["template"]

    jobs = [job({}), job({}), job({"image": {"cpu": {"tag": "x"}}}), job({"models": {"fetch": {"revision": "abc"}}})]
    jobs += [
        job({"imagePullSecrets": ["x"]}),
        job({"priorityClass": {"name": ""}}),
        job({"securityContext": {"fsGroup": 1}}),
    ]
    assert jobs[0] == jobs[1]
    assert len({name for name, _ in jobs}) == len(jobs) - 1


def test_pods_wait_for_the_revision_that_is_wanted(render: Render) -> None:
    found = render({"models": {"fetch": {"revision": "abc"}}})
    for _, group in list(ray_groups(one(found, "RayService")))[1:]:
        (waiting,) = group["template"]["spec"]["initContainers"]
        assert waiting["command"][2] == "ibm-granite/granite-3.1-3b-a800m-instruct@abc"


def test_pods_that_download_may_and_have_the_token(render: Render) -> None:
    values = {"settings": {"model": "owner/name"}, "models": {"volume": {"enabled": False}, "fetch": {"by": None}}}
    found = render(values)
    for name, group in ray_groups(one(found, "RayService")):
        has_token = "HF_TOKEN" in {each["name"] for each in group["template"]["spec"]["containers"][0]["env"]}
        assert has_token is (name != "head")
    (policy,) = (each["spec"] for each in found if title(each) == "NetworkPolicy/outcrop-hub")
    assert policy["podSelector"]["matchExpressions"][0]["values"] == ["redis"]


def test_users_load_balancers_and_pools_may_be_others(render: Render) -> None:
    """OpenShift gives users by namespace; load balancers have no labels; not everybody wants an example's pool."""
    nobody = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    found = render(
        {
            "securityContext": nobody,
            "redis": {"securityContext": nobody},
            "networkPolicies": {"clients": {"cidrs": ["10.0.0.0/8"]}},
            "pools": {"experts": None, "others": {"role": "expert", "gpus": 1}},
        }
    )
    assert "runAsUser" not in yaml.safe_dump_all(found)
    (clients,) = (each["spec"] for each in found if title(each) == "NetworkPolicy/outcrop-clients")
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in clients["ingress"][0]["from"]
    assert [name for name, _ in ray_groups(one(found, "RayService"))] == ["head", "front", "ingress", "others"]
