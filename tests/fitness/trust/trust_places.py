"""Variations: fitness functions whose calls share a thing with a state, such as a simulator or a generator.

Three tables are combined: what the thing is (``THINGS``), how the function gets hold of it (``PLACES``), and whether
the function resets it first. A function that resets it scores each member for itself; one that doesn't goes on where
the one before has stopped.
"""

from __future__ import annotations

import contextvars
import functools
import operator
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trust_oracle import Build, Fitness, Kind, Variation
from trust_things import THINGS, ArraySimulator, BatchesOfAWorker, Thing, go_on, play

# How the function gets hold of it

Make = Callable[[], Thing]
Place = Callable[[Make, nn.Module], Fitness]
SHARED: Any = None
MODULE: Any = types.ModuleType("simulators")
VARIABLE: contextvars.ContextVar[Thing] = contextvars.ContextVar("VARIABLE")


def closure(make: Make, model: nn.Module) -> Fitness:
    thing = make()
    return lambda model: play(model, thing)


def global_variable(make: Make, model: nn.Module) -> Fitness:
    def fitness(model: Any) -> float:
        return play(model, SHARED)

    global SHARED
    SHARED = make()
    return fitness


def made_at_first_use(make: Make, model: nn.Module) -> Fitness:
    def get() -> Thing:
        global SHARED
        if SHARED is None:
            SHARED = make()
        return SHARED

    global SHARED
    SHARED = None
    return lambda model: play(model, get())


def cached_getter(make: Make, model: nn.Module) -> Fitness:
    @functools.cache
    def get(name: str) -> Thing:
        return make()

    return lambda model: play(model, get("simulator"))


def decorated(make: Make, model: nn.Module) -> Fitness:
    def with_thing(function: Callable[..., float]) -> Fitness:
        thing = make()

        @functools.wraps(function)
        def wrapper(model: Any) -> float:
            return function(model, thing)

        return wrapper

    @torch.no_grad()
    @with_thing
    def fitness(model: Any, thing: Thing) -> float:
        return play(model, thing)

    return fitness


def partial(make: Make, model: nn.Module) -> Fitness:
    return functools.partial(play, thing=make())


def default_argument(make: Make, model: nn.Module) -> Fitness:
    def fitness(model: Any, thing: Thing = make()) -> float:  # noqa: B008
        return play(model, thing)

    return fitness


def attribute_of_the_function(make: Make, model: nn.Module) -> Fitness:
    def fitness(model: Any) -> float:
        return play(model, fitness.thing)  # type: ignore[attr-defined]

    fitness.thing = make()  # type: ignore[attr-defined]
    return fitness


class Task:
    """An object that is called."""

    shared: Thing

    def __init__(self, thing: Thing) -> None:
        self.thing = thing

    def __call__(self, model: Any) -> float:
        return play(model, self.thing)

    def method(self, model: Any) -> float:
        return play(model, self.thing)

    @classmethod
    def of_the_class(cls, model: Any) -> float:
        return play(model, cls.shared)


def callable_object(make: Make, model: nn.Module) -> Fitness:
    return Task(make())


def bound_method(make: Make, model: nn.Module) -> Fitness:
    return Task(make()).method


def class_attribute(make: Make, model: nn.Module) -> Fitness:
    Task.shared = make()
    return Task.of_the_class


def entry_of_a_dict(make: Make, model: nn.Module) -> Fitness:
    things = {"train": make(), "test": make()}
    return lambda model: play(model, things["train"])


def item_of_a_tuple_in_a_list(make: Make, model: nn.Module) -> Fitness:
    things = [("first", make())]
    return lambda model: play(model, things[0][1])


def attribute_of_a_module(make: Make, model: nn.Module) -> Fitness:
    MODULE.thing = make()
    return lambda model: play(model, MODULE.thing)


def by_name(make: Make, model: nn.Module) -> Fitness:
    MODULE.inner = types.SimpleNamespace(thing=make())
    get = operator.attrgetter("inner.thing")
    return lambda model: play(model, get(MODULE))


def nonlocal_variable(make: Make, model: nn.Module) -> Fitness:
    thing: Thing | None = None

    def fitness(model: Any) -> float:
        nonlocal thing
        thing = thing or make()
        return play(model, thing)

    return fitness


def context_variable(make: Make, model: nn.Module) -> Fitness:
    thing = make()

    def fitness(model: Any) -> float:
        token = VARIABLE.set(thing)
        try:
            return play(model, VARIABLE.get())
        finally:
            VARIABLE.reset(token)

    return fitness


def thread_local(make: Make, model: nn.Module) -> Fitness:
    local = threading.local()

    def fitness(model: Any) -> float:
        if not hasattr(local, "thing"):
            local.thing = make()
        return play(model, local.thing)

    return fitness


def attribute_of_the_model(make: Make, model: nn.Module) -> Fitness:
    model.thing = make()  # type: ignore[assignment]
    return lambda model: play(model, model.thing)


def register_of_models(make: Make, model: nn.Module) -> Fitness:
    things = {id(model): make()}
    return lambda model: play(model, things[id(model)])


def weak_register_of_models(make: Make, model: nn.Module) -> Fitness:
    things: Any = weakref.WeakKeyDictionary({model: make()})
    return lambda model: play(model, things[model])


def borrowed_from_a_pool(make: Make, model: nn.Module) -> Fitness:
    """Whoever comes takes the first of many, more than there are members, and puts it back at the end."""
    pool = [make() for _ in range(20)]

    def fitness(model: Any) -> float:
        thing = pool.pop()
        try:
            return play(model, thing)
        finally:
            pool.append(thing)

    return fitness


PLACES: list[Place] = [
    closure, global_variable, made_at_first_use, cached_getter, decorated, partial, default_argument,
    attribute_of_the_function, callable_object, bound_method, class_attribute, entry_of_a_dict,
    item_of_a_tuple_in_a_list, attribute_of_a_module, by_name, nonlocal_variable, context_variable, thread_local,
    attribute_of_the_model, register_of_models, weak_register_of_models, borrowed_from_a_pool,
]  # fmt: skip


def build(place: Place, thing: Make) -> Build:
    return functools.partial(place, thing)


def carried_on(thing: Make) -> Build:
    """The thing goes on from call to call: it is never reset."""
    return lambda model: functools.partial(go_on, thing=thing())


VARIATIONS = {
    # Each thing in a closure, and in the places in turns; a simulator in every place.
    **{f"{thing.__name__}-closure": Variation(build(closure, thing)) for thing in THINGS},
    **{
        f"{thing.__name__}-{place.__name__}": Variation(build(place, thing))
        for thing, place in zip(THINGS, PLACES[1:], strict=False)
    },
    **{f"ArraySimulator-{place.__name__}": Variation(build(place, ArraySimulator)) for place in PLACES},
    "BatchesOfAWorker-closure": Variation(build(closure, BatchesOfAWorker)),
    **{f"{thing.__name__}-chunks": Variation(build(closure, thing), chunk_size=3) for thing in THINGS[::3]},
    **{f"{thing.__name__}-carried_on": Variation(carried_on(thing), Kind.HISTORY) for thing in THINGS},
}
