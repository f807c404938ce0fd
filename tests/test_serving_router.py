"""What the endpoint makes of replicas that are slow or die, with replicas that do so on purpose."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from ftray.config import ServingConfig
from ftray.serving.errors import APIError, invalid
from ftray.serving.generation_request import OutputDelta, OutputDeltas
from ftray.serving.pooling import PoolingResponse
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
        self.asked, self.generate = 0, self

    def options(self, **kwargs):
        return self

    def remote(self, request):
        self.asked += 1
        return self.answers[self.asked - 1]


def ask(*scripts, seconds=5.0):
    """The parts, the error if there is one, and the replicas."""
    replicas = Replicas(scripts)
    router = Router(ServingConfig(request_seconds=seconds), replicas)
    parts = []

    async def collect():
        async for got in router.generate("m", SimpleNamespace(adapter=None)):
            parts.append(got)

    try:
        asyncio.run(collect())
        error = None
    except APIError as refused:
        error = refused
    assert router.under_way == 0
    return parts, error, replicas


def test_a_replica_that_dies_before_it_gives_anything_is_replaced():
    parts, error, replicas = ask([WHOLE[0], ActorDiedError()], [ActorDiedError()], WHOLE)
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)


def test_what_was_given_is_not_given_twice():
    parts, error, replicas = ask([*WHOLE[:2], ActorDiedError()], WHOLE)
    assert (parts, error.status, error.code, replicas.asked) == (WHOLE[:2], 500, "replica_died", 1)


def test_a_request_that_killed_two_replicas_is_not_tried_on_a_third():
    for before in ([OutputDeltas()], [OutputDeltas(), WHOLE[0]]):
        parts, error, replicas = ask(*([*before, ActorDiedError()] for _ in range(3)))
        assert (error.status, error.code, replicas.asked) == (500, "replica_died", 2)
        assert error.headers == {"x-should-retry": "false"}
        assert parts == before[1:]


def test_a_request_that_was_being_answered_has_not_killed_anything():
    standing_by = [OutputDeltas(), WHOLE[0], OutputDeltas(answering=True), ActorDiedError()]
    parts, error, replicas = ask(standing_by, standing_by, [OutputDeltas(), *WHOLE])
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)


class Mortal:
    """A handle of one replica, whose requests are begun after one another; a deadly one ends all that it has."""

    def __init__(self):
        self.died, self.deaths, self.generate, self.pool = asyncio.Event(), 0, self, self

    def options(self, stream=False, **kwargs):
        self.stream = stream
        return self

    def remote(self, request):
        return Answering(self, request) if self.stream else self.whole(request)

    async def whole(self, request):
        async for _ in Answering(self, request):
            pass
        return PoolingResponse([], (), 1)


class Answering:
    """What a mortal replica answers: it takes some time to begin, and as long to end."""

    def __init__(self, replica, request):
        self.replica, self.request = replica, request
        self.parts = iter([OutputDeltas(), WHOLE[0], OutputDeltas(answering=True), WHOLE[2]])
        self.died = replica.died

    def __aiter__(self):
        return self

    async def __anext__(self):
        what = next(self.parts, None)
        if what is None:
            raise StopAsyncIteration
        await asyncio.sleep(0.01)  # let the others begin too
        if what is not WHOLE[0] and what != OutputDeltas():
            if self.request.deadly and not self.died.is_set():
                self.died.set()
                self.replica.died, self.replica.deaths = asyncio.Event(), self.replica.deaths + 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.died.wait(), 0.05)
        if self.died.is_set():
            raise ActorDiedError
        return what

    def cancel(self):
        pass


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("deadly", [1, 3])
def test_who_stands_by_is_answered_and_a_killer_costs_two_replicas(reads, deadly):
    replicas = Mortal()
    router = Router(ServingConfig(), replicas)

    async def one(number):
        request = SimpleNamespace(adapter=None, deadly=number < deadly)
        if reads:
            return await router.pool("m", request)
        return [got async for got in router.generate("m", request)]

    async def crowd():
        return await asyncio.gather(*(one(number) for number in range(9)), return_exceptions=True)

    got = asyncio.run(crowd())
    assert [getattr(result, "status", 200) for result in got] == [500] * deadly + [200] * (9 - deadly)
    assert replicas.deaths == 1 + deadly
    assert router.under_way == 0


class Preempted(ActorDiedError):
    preempted = True


def test_a_request_has_not_killed_a_replica_whose_node_was_preempted():
    gone = [OutputDeltas(), WHOLE[0], Preempted()]
    parts, error, replicas = ask(gone, gone, [OutputDeltas(), *WHOLE])
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)
    _, error, replicas = ask(gone, gone, gone)
    assert (error.status, replicas.asked) == (503, ATTEMPTS)


def test_replicas_that_keep_dying_are_told():
    _, error, replicas = ask(*([ActorDiedError()] for _ in range(ATTEMPTS)))
    assert (error.status, replicas.asked) == (503, ATTEMPTS)


@pytest.mark.parametrize("script", [[60], [WHOLE[0], 60], [*WHOLE[:2], 60]])
def test_a_request_that_takes_too_long_is_given_up_and_cancelled(script):
    _, error, replicas = ask(script, seconds=0.2)
    assert (error.status, error.code) == (504, "timeout")
    assert replicas.answers[0].cancelled


def test_what_a_replica_refuses_names_the_field():
    _, error, _ = ask([OutputDeltas(refused=invalid("too long", "prompt"))])
    assert (error.status, error.param, error.message) == (400, "prompt", "too long")
