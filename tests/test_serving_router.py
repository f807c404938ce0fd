"""What the endpoint makes of replicas that are slow or die, with replicas that do so on purpose."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from ftray.config import ServingConfig
from ftray.serving.api.requests import APIError
from ftray.serving.generation_request import OutputDelta, OutputDeltas
from ftray.serving.router import ATTEMPTS, Router

WHOLE = [
    OutputDeltas(prompt_tokens=3),
    OutputDeltas([OutputDelta(0, "ab", count=2)]),
    OutputDeltas([OutputDelta(0, "c", count=1, finish="stop")]),
]


class Answer:
    """What a handle gives: parts, numbers of seconds to wait, errors."""

    def __init__(self, script):
        self.script, self.cancelled = iter(script), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for what in self.script:
            if isinstance(what, OutputDeltas):
                return what
            if isinstance(what, Exception):
                raise what
            await asyncio.sleep(what)
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


class Replicas:
    """A handle whose answers follow `scripts`, one after another."""

    def __init__(self, scripts):
        self.answers = [Answer(script) for script in scripts]
        self.asked, self.answer = 0, self

    def options(self, **kwargs):
        return self

    def remote(self, job):
        self.asked += 1
        return self.answers[self.asked - 1]


def ask(*scripts, seconds=5.0):
    """The parts, the error if there is one, and the replicas."""
    replicas = Replicas(scripts)
    dispatch = Router(ServingConfig(request_seconds=seconds), replicas)
    parts = []

    async def collect():
        async for got in dispatch.parts("m", SimpleNamespace(adapter=None)):
            parts.append(got)

    try:
        asyncio.run(collect())
        error = None
    except APIError as refused:
        error = refused
    assert dispatch.under_way == 0
    return parts, error, replicas


def test_a_replica_that_dies_before_it_gives_anything_is_replaced():
    parts, error, replicas = ask([WHOLE[0], ActorDiedError()], [ActorDiedError()], WHOLE)
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)


def test_what_was_given_is_not_given_twice():
    parts, error, replicas = ask([*WHOLE[:2], ActorDiedError()], WHOLE)
    assert (parts, error.status, error.code, replicas.asked) == (WHOLE[:2], 500, "replica_died", 1)


def test_replicas_that_keep_dying_are_told():
    _, error, replicas = ask(*([ActorDiedError()] for _ in range(ATTEMPTS)))
    assert (error.status, replicas.asked) == (503, ATTEMPTS)


@pytest.mark.parametrize("script", [[60], [WHOLE[0], 60], [*WHOLE[:2], 60]])
def test_a_request_that_takes_too_long_is_given_up_and_cancelled(script):
    _, error, replicas = ask(script, seconds=0.2)
    assert (error.status, error.code) == (504, "timeout")
    assert replicas.answers[0].cancelled


def test_what_a_replica_refuses_names_the_field():
    _, error, _ = ask([OutputDeltas(refused=(400, "too long", "prompt"))])
    assert (error.status, error.param, error.message) == (400, "prompt", "too long")
