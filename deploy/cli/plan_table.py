"""Plans as `outcrop plan` prints them: a table, and what follows from it in words."""

from rich.console import Console
from rich.table import Table

from cluster.planning.search import Plan
from cluster.planning.workload import Goals
from deploy.cli.http import console


def shown(plans: list[Plan], top: int) -> list[Plan]:
    """The best ones, and the best one of the other kind beside them: with replicas, or without."""
    others = (each for each in plans[top:] if each.layout.is_local != plans[0].layout.is_local)
    is_alone = all(each.layout.is_local == plans[0].layout.is_local for each in plans[:top])
    return plans[:top] + [each for each in [next(others, None)] if each and is_alone]


def show(plans: list[Plan]) -> None:
    table = Table("fronts + groups x replicas", "on", "holds", "TTFT", "TPOT", "busy", "most", "limit", "lost", "cost")
    for each in plans:
        table.add_row(*_row(each))
    Console(width=max(132, console.width), highlight=False).print(table)
    console.print(
        "TTFT, TPOT (ms) and busy (front, experts, KV cache): at this traffic. most: new tokens/s within the goals, "
        "and what limits them. lost: of these, without any one actor / node. cost: of a million new tokens",
        soft_wrap=True,
    )


def _row(plan: Plan) -> tuple[str, ...]:
    layout, now, each = plan.layout, plan.now, plan.traffic.output_len
    shape = (
        f"{layout.fronts} + {layout.groups} x {layout.replicas}" if layout.num_replicas else f"{layout.fronts} local"
    )
    devices = " ".join(f"{count} {name}" for name, count in layout.num_devices.items())
    cost = plan.cost_per_million_tokens
    lost = f"{plan.left_without_actor * each:,.0f} / {plan.left_without_node * each:,.0f}"
    if now.limit and now.limit not in ("TPOT", "TTFT"):
        seen = ("-", "-", now.limit)
    else:
        seen = (f"{1e3 * now.ttft_s:,.0f}", f"{1e3 * now.tpot_s:,.1f}", _busy(plan))
    return (
        f"{shape}, {layout.lane}" if layout.num_replicas else shape, devices, "yes" if plan.holds else "no", *seen,
        f"{plan.tokens_per_second:,.0f}", f"{plan.most.limit}: {_slowest(plan)}", lost,
        "-" if cost is None else f"{cost:,.2f}",
    )  # fmt: skip


def _busy(plan: Plan) -> str:
    shares = plan.busy
    return ", ".join(f"{100 * share:.0f} %" for share in (shares.front, shares.experts, shares.kv_cache))


def _slowest(plan: Plan) -> str:
    step = plan.most.step
    parts = {"front": step.front + step.head, "experts": step.experts, "lane": step.lane, "waiting": step.waiting}
    return max(parts, key=parts.__getitem__)


def verdicts(plans: list[Plan], goals: Goals) -> list[str]:
    """What follows from the table, in words."""
    best = plans[0]
    if not best.holds:
        why = best.now.limit or f"what is left after {goals.survive} lost actors"
        return [
            f"no layout holds the goals at this traffic (the first one fails by {why}): relax them, or add hardware"
        ]
    said = []
    apart = next((each for each in plans if each.holds and each.layout.num_replicas), None)
    if best.layout.is_local:
        against = "no layout with replicas holds" if apart is None else f"with replicas {_compared(best, apart)}"
        said.append(f"do not disaggregate: fronts that have all experts serve this traffic; {against}")
    else:
        local = next((each for each in plans if each.layout.is_local), None)
        fits = "does not fit one device" if local is None else "would not hold, or costs more"
        said.append(f"disaggregate: a front with all experts {fits}")
    if best.layout.num_nodes == 1:
        said.append("one machine is enough" + ("" if best.left_without_node else "; nothing is left if it is lost"))
    kinds = {node.name for node in (best.layout.front_node, best.layout.replica_node) if node.source == "data sheet"}
    if kinds:
        said.append(f"{', '.join(sorted(kinds))}: figures of a data sheet, never measured: run `outcrop probe` there")
    return said


def _compared(best: Plan, apart: Plan) -> str:
    mine, theirs = (sum(each.layout.num_devices.values()) for each in (best, apart))
    return f"it takes {theirs} devices instead of {mine}" if theirs != mine else "it bears less on as many devices"
