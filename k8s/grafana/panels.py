"""Queries and panels, and how they flow into a dashboard. What the dashboards show is in overview.py and experts.py.

A dashboard is plain JSON, as Grafana 10.4 and later import it.
"""

from typing import Any

Json = dict[str, Any]

WIDTH = 24
FILTER = 'namespace=~"$namespace", ray_io_cluster=~"$cluster"'
WINDOW = "[$__rate_interval]"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RED, ORANGE, GREEN = "red", "orange", "green"


# -- queries ---------------------------------------------------------------------------------------------------------


def once(expr: str) -> str:
    """Every pod reports the numbers of the whole cluster: take them once, not once for each pod."""
    return f"max without (pod, instance, container, endpoint) ({expr})"


def now(metric: str, match: str = "") -> str:
    """A gauge, or the sum of all that a counter has seen. `match` is a further condition on labels."""
    return once(f"outcrop_{metric}{{{', '.join(filter(None, (FILTER, match)))}}}")


def rate(metric: str, match: str = "") -> str:
    """How fast a counter grows, per second."""
    return once(f"rate(outcrop_{metric}{{{', '.join(filter(None, (FILTER, match)))}}}{WINDOW})")


def total(expr: str, *labels: str) -> str:
    """Added up over these labels."""
    return f"sum without ({', '.join(labels)}) ({expr})"


def ratio(part: str, whole: str) -> str:
    """Nothing, not NaN, where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, metric: str) -> str:
    """Of a histogram, within the window; nothing while it sees no events."""
    return f"histogram_quantile({q}, {rate(metric + '_bucket')}) >= 0"


def quantile_ever(q: float, metric: str) -> str:
    """Of all events so far: for what happens too seldom for a window."""
    return f"histogram_quantile({q}, {now(metric + '_bucket')}) >= 0"


def mean(metric: str) -> str:
    return ratio(rate(metric + "_sum"), rate(metric + "_count"))


def ready() -> str:
    """Expert replicas that are ready, over all groups."""
    return total(now("expert_replicas", 'state="ready"'), "group", "state")


def missing() -> str:
    """Expert replicas that are wanted but not ready."""
    return f"{total(now('expert_replicas_wanted'), 'group')} - {ready()}"


# -- panels ----------------------------------------------------------------------------------------------------------


def _panel(kind: str, title: str, about: str, queries: dict[str, str], unit: str, size: tuple[int, int]) -> Json:
    targets = [
        {"refId": chr(ord("A") + at), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
        for at, (legend, expr) in enumerate(queries.items())
    ]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "noValue": "no traffic"}, "overrides": []},
        "gridPos": {"w": size[0], "h": size[1]},
    }


def tile(title: str, about: str, expr: str, unit: str = "short", steps: dict[float, str] | None = None) -> Json:
    """One number. `steps` (from value -> colour) only where the number is a judgement."""
    panel = _panel("stat", title, about, {title: expr}, unit, (4, 4))
    panel["targets"][0]["instant"] = True
    colours = [{"value": None, "color": GREEN if steps else "text"}]
    colours += [{"value": value, "color": colour} for value, colour in (steps or {}).items()]
    panel["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": colours}
    panel["options"] = {"colorMode": "value", "graphMode": "none", "reduceOptions": {"calcs": ["lastNotNull"]}}
    return panel


def graph(
    title: str, about: str, queries: dict[str, str], unit: str = "short", *, width: int = 8, stacked: bool = False
) -> Json:
    """Lines over time; `queries` are legend -> expression."""
    panel = _panel("timeseries", title, about, queries, unit, (width, 8))
    stacking = {"mode": "normal" if stacked else "none"}
    custom = {"lineWidth": 1, "fillOpacity": 30 if stacked else 8, "showPoints": "never", "stacking": stacking}
    panel["fieldConfig"]["defaults"] |= {"custom": custom, "min": 0}
    panel["options"] = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def latency(title: str, metric: str, about: str, legend: str = "", width: int = 8) -> Json:
    """Three quantiles of a histogram of seconds."""
    queries = {f"p{round(q * 100)} {legend}".strip(): quantile(q, metric) for q in (0.5, 0.95, 0.99)}
    return graph(title, f"{about} Metric: outcrop_{metric}.", queries, "s", width=width)


# -- dashboards ------------------------------------------------------------------------------------------------------


def flow(rows: dict[str, list[Json]]) -> list[Json]:
    """Number the panels and lay them out: from left to right, each row of the dashboard under a title of its own."""
    placed: list[Json] = []
    x = y = height = 0
    for title, panels in rows.items():
        y, x = y + height, 0
        placed.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": []})
        y, height = y + 1, 0
        for panel in panels:
            width = panel["gridPos"]["w"]
            if x + width > WIDTH:
                x, y, height = 0, y + height, 0
            placed.append(panel | {"gridPos": panel["gridPos"] | {"x": x, "y": y}})
            x, height = x + width, max(height, panel["gridPos"]["h"])
    return [panel | {"id": number} for number, panel in enumerate(placed, 1)]


def dashboard(uid: str, title: str, about: str, rows: dict[str, list[Json]]) -> Json:
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["outcrop"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [_DATASOURCE_VARIABLE, _variable("namespace", ""), _variable("cluster", "ray_io_cluster")]
        },
        "links": _LINKS,
        "panels": flow(rows),
    }


_DATASOURCE_VARIABLE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, label: str) -> Json:
    """All values of a label, and `.*` for all: it matches where the label is missing, as outside Kubernetes."""
    chosen = "" if name == "namespace" else '{namespace=~"$namespace"}'
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": f"label_values(outcrop_expert_map_version{chosen}, {label or name})",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": False,
        "current": {"text": "All", "value": "$__all"},
    }


# Ray's dashboards have fixed uids and no tags.
_LINKS: list[Json] = [
    {"title": "Outcrop", "type": "dashboards", "tags": ["outcrop"], "keepTime": True, "includeVars": True},
    {"title": "Ray: nodes and GPUs", "type": "link", "url": "/d/rayDefaultDashboard", "keepTime": True},
    {"title": "Ray Serve: HTTP", "type": "link", "url": "/d/rayServeDashboard", "keepTime": True},
]
