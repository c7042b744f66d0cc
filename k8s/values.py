"""What values the chart takes: values.schema.json, with which Helm refuses what is misspelt, is made of this
table. The file is long because every value stands in it.

Defaults stand in chart/values.yaml, which is for people; a test holds both against each other.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.config import ClusterConfig

Json = dict[str, Any]
Labels = dict[str, str]
Count = Annotated[int, Field(ge=0)]
# Set by the chart, or a Secret.
NOT_IN_VALUES = ("api_key", "host", "port", "name")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Version(Strict):
    tag: str
    digest: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")]


class Image(Strict):
    repository: str
    cpu: Version
    cuda: Version
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class Cpus(Strict):
    cpus: float = Field(gt=0)


class Deployments(Strict):
    supervisor: Cpus
    gate: Cpus
    ingress: Cpus


class Resources(Strict):
    cpu: str | float
    cpuLimit: str | float | None = None
    memory: str


class Placement(Strict):
    nodeSelector: dict[str, str | None]
    tolerations: list[Json]
    affinity: Json
    annotations: Labels
    labels: Labels


class Head(Placement):
    resources: Resources


class PoolDefaults(Placement):
    role: Literal["all", "ingress", "front", "expert"]
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    actors: Annotated[int, Field(ge=1)]
    resources: Resources
    gpus: Count
    objectStoreMemory: Annotated[int, Field(ge=75 * 2**20)]  # Ray refuses less
    priority: int | None
    idleTimeoutSeconds: Count | None
    spread: Literal["ScheduleAnyway", "DoNotSchedule"]
    env: list[Json]


class Autoscaler(Strict):
    enabled: bool
    idleTimeoutSeconds: Count
    resources: Resources


class Upgrade(Strict):
    strategy: Literal["NewCluster", "None"]
    inPlace: bool
    initializingTimeout: Annotated[str, Field(pattern=r"^([1-9]\d*(h|m|s))+$")]


class SecretKey(Strict):
    name: str
    key: str


class ApiKey(Strict):
    secretName: str | None
    key: str


class RayToken(Strict):
    secretName: str | None


class Volume(Strict):
    enabled: bool
    existingClaim: str
    size: str
    accessMode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]
    storageClassName: str | None
    hostPath: str


class Fetch(Strict):
    by: Literal["job", "initContainer"] | None
    hubId: str
    revision: str
    tokenSecret: SecretKey


class Models(Strict):
    volume: Volume
    fetch: Fetch


class RedisImage(Strict):
    repository: str
    tag: str
    digest: str


class SecurityContext(Strict):
    runAsUser: int | None
    runAsGroup: int | None
    fsGroup: int | None


class Redis(Strict):
    securityContext: SecurityContext
    enabled: bool
    address: str
    image: RedisImage
    passwordSecret: SecretKey
    storage: str
    storageClassName: str | None


class PriorityClass(Strict):
    name: str
    create: bool
    value: int


class ServiceAccount(Strict):
    head: str
    workers: str


class Clients(Strict):
    namespaceLabel: str
    podLabel: str
    cidrs: list[str]


class Caller(Strict):
    namespaceLabel: str
    podName: str


class Dns(Strict):
    namespace: str
    ports: list[int]
    addresses: list[str]


class Outside(Strict):
    cidr: str
    ports: list[int]


class Hub(Outside):
    allPods: bool


class Otlp(Strict):
    namespaceLabel: str
    ports: list[int]


class NetworkPolicies(Strict):
    enabled: bool
    clients: Clients
    operator: Caller
    prometheus: Caller
    dns: Dns
    apiServer: Outside
    hub: Hub
    otlp: Otlp


class Service(Strict):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    port: Annotated[int, Field(ge=1, le=65535)]
    annotations: Labels


class Ingress(Strict):
    enabled: bool
    className: str
    host: str
    path: str
    tlsSecret: str
    annotations: Labels


class HttpRoute(Strict):
    enabled: bool
    parentRefs: list[Json]
    hostnames: list[str]
    path: str
    modelHeader: str
    timeout: str


class Monitoring(Strict):
    enabled: bool
    labels: Labels
    ray: bool
    interval: str


class Values(Strict):
    fullnameOverride: Annotated[str, Field(max_length=47)]
    image: Image
    imagePullSecrets: list[str]
    settings: Json  # see schema()
    deployments: Deployments
    pools: dict[str, Json]  # see schema()
    poolDefaults: PoolDefaults
    head: Head
    autoscaler: Autoscaler
    drainSeconds: Annotated[int, Field(ge=1)]
    upgrade: Upgrade
    apiKey: ApiKey
    rayToken: RayToken
    models: Models
    redis: Redis
    securityContext: SecurityContext
    disruptionBudgets: bool
    priorityClass: PriorityClass
    serviceAccount: ServiceAccount
    networkPolicies: NetworkPolicies
    service: Service
    haProxy: bool
    ingress: Ingress
    httpRoute: HttpRoute
    monitoring: Monitoring


def schema() -> Json:
    """As Helm checks values with it: settings are those of ClusterConfig; a pool says what differs from the default."""
    found = Values.model_json_schema()
    settings = ClusterConfig.model_json_schema()
    definitions = found["$defs"] | settings.pop("$defs", {})
    for name in NOT_IN_VALUES:
        del settings["properties"][name]
    settings["required"] = ["model"]
    for one in (found, *definitions.values()):
        one.pop("required", None)  # null takes a value away, as Helm has it
    definitions["Settings"] = settings | {"title": "Settings"}
    properties = found["properties"]
    properties["settings"] = {"$ref": "#/$defs/Settings"}
    pool = {"anyOf": [{"$ref": "#/$defs/PoolDefaults"}, {"type": "null"}]}  # null takes an example's pool away
    properties["pools"] = {"type": "object", "additionalProperties": pool}
    properties["global"] = {"type": "object"}  # Helm gives it to a chart that is part of another one
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found | {"$defs": definitions}
