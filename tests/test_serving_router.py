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


BEGUN = OutputDeltas(begun=True)


@pytest.mark.parametrize("before", [[BEGUN], [OutputDeltas(), BEGUN], [BEGUN, WHOLE[0]], [BEGUN, OutputDeltas()]])
def test_a_request_that_may_have_killed_a_replica_is_not_tried_on_another(before):
    parts, error, replicas = ask([*before, ActorDiedError()], WHOLE)
    assert (error.status, error.code, replicas.asked) == (500, "replica_died", 1)
    assert error.headers == {"x-should-retry": "false"}
    assert parts == [part for part in before if part.prompt_tokens]


def test_a_request_that_waited_has_not_killed_anything():
    waited = [OutputDeltas(), ActorDiedError()]
    parts, error, replicas = ask(waited, waited, [BEGUN, *WHOLE])
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)


def test_a_request_whose_adapter_was_loaded_waits_like_all_others():
    waits = OutputDeltas(begun=False)
    parts, error, replicas = ask([BEGUN, waits, ActorDiedError()], [BEGUN, waits, BEGUN, *WHOLE])
    assert (parts, error, replicas.asked) == (WHOLE, None, 2)
    _, error, replicas = ask([BEGUN, waits, BEGUN, ActorDiedError()], WHOLE)
    assert (error.status, error.code, replicas.asked) == (500, "replica_died", 1)


class Mortal:
    """A handle of one replica, which begins one request after another; a deadly one ends all that it has."""

    def __init__(self):
        self.died, self.deaths, self.begins, self.generate, self.pool = asyncio.Event(), 0, asyncio.Lock(), self, self

    def options(self, stream, **kwargs):
        return self

    def remote(self, request):
        return Answering(self, request)


class Answering:
    """What a mortal replica answers."""

    def __init__(self, replica, request):
        self.replica, self.request, self.died = replica, request, replica.died
        self.messages = self.answer()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self.messages)

    async def answer(self):
        async with self.replica.begins:
            if self.died.is_set():
                raise ActorDiedError
            yield True if self.request.reads else BEGUN
            if self.request.deadly:
                self.died.set()
                self.replica.died, self.replica.deaths = asyncio.Event(), self.replica.deaths + 1
                raise ActorDiedError
            await asyncio.sleep(0.001)
            if not self.request.reads:
                yield WHOLE[0]
        if self.request.reads:
            yield PoolingResponse([], (), 1)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.died.wait(), 0.05)
        if self.died.is_set():
            raise ActorDiedError
        yield WHOLE[2]

    def cancel(self):
        pass


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("deadly", [{4}, {0}, {8}])
def test_a_killer_costs_one_replica_and_all_that_waited_are_answered(reads, deadly):
    replicas = Mortal()
    router = Router(ServingConfig(), replicas)

    async def one(number):
        request = SimpleNamespace(adapter=None, deadly=number in deadly, reads=reads)
        if reads:
            return await router.pool("m", request)
        return [got async for got in router.generate("m", request)]

    async def crowd():
        return await asyncio.gather(*(one(number) for number in range(9)), return_exceptions=True)

    got = asyncio.run(crowd())
    # a reader answers one after another; what generates is still at those that it has begun before
    given_up = deadly if reads else {*range(max(deadly) + 1)}
    wanted = [500 if number in given_up else 200 for number in range(9)]
    assert [getattr(result, "status", 200) for result in got] == wanted, got
    assert replicas.deaths == len(deadly)
    assert router.under_way == 0


class Preempted(ActorDiedError):
    preempted = True


def test_a_request_has_not_killed_a_replica_whose_node_was_preempted():
    gone = [BEGUN, WHOLE[0], Preempted()]
    parts, error, replicas = ask(gone, gone, [BEGUN, *WHOLE])
    assert (parts, error, replicas.asked) == (WHOLE, None, 3)
    _, error, replicas = ask(gone, gone, gone)
    assert (error.status, replicas.asked) == (503, ATTEMPTS)


def test_replicas_that_keep_dying_are_told():
    _, error, replicas = ask(*([ActorDiedError()] for _ in range(ATTEMPTS)))
    assert (error.status, replicas.asked) == (503, ATTEMPTS)
    assert int(error.headers["Retry-After"]) > 0


@pytest.mark.parametrize("script", [[60], [WHOLE[0], 60], [*WHOLE[:2], 60]])
def test_a_request_that_takes_too_long_is_given_up_and_cancelled(script):
    _, error, replicas = ask(script, seconds=0.2)
    assert (error.status, error.code) == (504, "timeout")
    assert replicas.answers[0].cancelled


def test_what_a_replica_refuses_names_the_field():
    _, error, _ = ask([OutputDeltas(refused=invalid("too long", "prompt"))])
    assert (error.status, error.param, error.message) == (400, "prompt", "too long")
