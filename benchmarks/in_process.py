"""Actors in the process of who asks: what control does is seen, or measured, without Ray and without a model."""

import asyncio
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.control.actors import ActorError, DeadActorError
from cluster.expert_map import ExpertMap, MapChange, newest
from cluster.messages.actors import (
    ActorReport,
    FrontSpec,
    Identity,
    Legacy,
    LoadProgress,
    Machine,
    ReadyReport,
    ReplicaSpec,
    ResourcePlan,
)

Spec = FrontSpec | ReplicaSpec


def ready(name: str) -> ReadyReport:
    return ReadyReport(name, "n", 1, "", 5, 0.1)


class Actor:
    """Answers a call with what it was given for it, or with what that returns; is silent where it was given nothing."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name = name
        self.answers = {"set_expert_map": None, "stop": None, "settle": None, "set_experts": 0} | answers
        self.calls: list[tuple[Any, ...]] = []
        self._death = asyncio.Event()

    async def answer(self, method: str, *given: Any) -> Any:
        self.calls.append((method, *given))
        if method not in self.answers:
            await self._death.wait()
            raise DeadActorError("killed")
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            try:
                answer = answer(*given)
            except ValueError as error:  # what happens in another process comes here in the terms of the seam
                raise ActorError(str(error)) from None
        return await answer if inspect.isawaitable(answer) else answer

    def was_asked(self, method: str) -> int:
        return sum(call[0] == method for call in self.calls)

    def die(self) -> None:
        self._death.set()
        methods = (
            "load",
            "progress",
            "start",
            "set_experts",
            "set_expert_map",
            "settle",
            "report",
            "reports",
            "identity",
            "drain",
        )
        self.answers = dict.fromkeys((*methods, "stop"), DeadActorError("killed"))


class WorkingActor(Actor):
    """As far as a supervisor sees it, a front or a replica that does what it is told."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec.actor_id)
        self.spec = spec
        self.ready = ready(spec.actor_id)
        self.expert_map: ExpertMap | None = None
        self.legacy: Legacy | None = None
        self.is_draining = False
        self.peers: Mapping[str, Actor] = {}
        self.expert_counts: tuple[tuple[int, ...], ...] = ()
        self.answers |= {
            "load": self.ready,
            "progress": LoadProgress(5, 5),
            "start": lambda news, legacy, _: self._take(news, legacy) and self.ready,
            "set_expert_map": self._take,
            "set_experts": self._hold,
            "drain": self._drain,
            "report": self._report,
            "reports": self._ask_peers,
            "identity": lambda: Identity(self.spec, self.ready, self.expert_map, self.legacy, self.is_draining),
        }

    def _take(self, news: ExpertMap | MapChange, legacy: Legacy | None) -> int:
        self.expert_map, self.legacy = newest(self.expert_map, news), legacy or self.legacy
        return self.expert_map.version

    def _hold(self, layer: int, experts: tuple[int, ...]) -> int:
        assert isinstance(self.spec, ReplicaSpec)
        held = self.spec.experts
        self.spec = replace(self.spec, experts=(*held[:layer], experts, *held[layer + 1 :]))
        return len(experts)

    def _report(self) -> ActorReport:
        version = self.expert_map.version if self.expert_map else 0
        return ActorReport(self.name, version, 0, expert_counts=self.expert_counts)

    async def _ask_peers(self, names: tuple[str, ...]) -> tuple[ActorReport | None, ...]:
        """Waits for nobody: who is silent or dead is known by having no answer to give."""
        known = [self.peers.get(name) for name in names]
        can_answer = [actor is not None and callable(actor.answers.get("report")) for actor in known]
        return tuple(
            [await a.answer("report") if a and can else None for a, can in zip(known, can_answer, strict=True)]
        )

    def _drain(self) -> None:
        self.is_draining = True


class ActorsHere:
    """An `Actors` (cluster/control/actors.py). What is made of a spec is the business of who inherits."""

    namespace = "test"

    def __init__(self, machine: Machine) -> None:
        self.there = machine
        self.actors: dict[str, Actor] = {}
        self.ended: list[str] = []
        self.created: list[str] = []

    def __getitem__(self, name: str) -> Actor:
        return self.actors[name]

    def make(self, spec: Spec) -> Actor:
        return WorkingActor(spec)

    def machine(self) -> Machine:
        return self.there

    def create(self, spec: Spec, resources: ResourcePlan) -> Actor:
        self.created.append(spec.actor_id)
        actor = self.actors[spec.actor_id] = self.make(spec)
        if isinstance(actor, WorkingActor):
            actor.peers = self.actors
        return actor

    async def call(self, handle: Actor, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await asyncio.wait_for(handle.answer(method, *args), timeout)

    def named(self) -> dict[str, Actor]:
        return dict(sorted(self.actors.items()))

    def end(self, handle: Actor) -> None:
        if self.actors.pop(handle.name, None):
            self.ended.append(handle.name)
        handle.die()
