"""A server as the engine: every row once, whatever the server does."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from batchvlm.config import EndpointConfig, EngineConfig, EngineName, JobConfig, ModelConfig
from batchvlm.engine import endpoint, open_engine
from batchvlm.engine.endpoint import EndpointEngine
from batchvlm.errors import EndpointError, ErrorType, ExitCode, ModelError
from batchvlm.records import ChatRequest, Completion, Failure, Form, FormKind, Generation, Sample

from .outcomes import run
from .stand_in import Reply, Request, StandIn, chat, echo


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is waited for."""
    asked: list[float] = []
    yield_once = asyncio.sleep

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        await yield_once(0)

    monkeypatch.setattr(endpoint, "_sleep", sleep)
    return asked


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def engine_of(url: str, **cfg: Any) -> EndpointEngine:
    return EndpointEngine(EndpointConfig(url=url, **cfg), model="m")


def sample_of(row_index: int, **generation: Any) -> Sample:
    part = {"type": "text", "text": f"row {row_index}"}
    return Sample(
        row_index=row_index,
        features={},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(**({"max_new_tokens": 8} | generation)),
        request=ChatRequest(messages=[{"role": "user", "content": [part]}], images=()),
    )


def samples_of(num_rows: int) -> list[Sample]:
    return [sample_of(i) for i in range(num_rows)]


def texts(outcomes: Sequence[Completion | Failure]) -> list[str]:
    return [o.text if isinstance(o, Completion) else o.message for o in outcomes]


class Seldom:
    """Replies in turn to each row's requests, then with an echo."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = replies
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        with self._lock:
            turn = self._seen[request.text]
            self._seen[request.text] += 1
        return self._replies[turn] if turn < len(self._replies) else echo(request)


def test_every_row_is_answered_once(server: StandIn) -> None:
    engine = engine_of(server.url)
    assert texts(run(engine, samples_of(40))) == [f"row {i} [0]" for i in range(40)]
    assert len(server.requests) == 40
    assert engine.stats.num_batches == 40 and engine.stats.prompt_tokens == 40 * 11


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://127.0.0.1:{}/v1/"])
def test_an_address_with_and_without_its_path(server: StandIn, address: str) -> None:
    (outcome,) = run(engine_of(address.format(server.port)), samples_of(1))
    assert isinstance(outcome, Completion)


def test_so_many_requests_are_under_way_and_no_more(server: StandIn) -> None:
    together = threading.Barrier(3, timeout=30)
    under_way: list[int] = []
    lock = threading.Lock()
    now = 0

    def reply(request: Request) -> Reply:
        nonlocal now
        with lock:
            now += 1
            under_way.append(now)
        together.wait()  # nobody leaves before three are here
        with lock:
            now -= 1
        return echo(request)

    server.reply = reply
    run(engine_of(server.url, max_concurrency=3), samples_of(9))
    assert max(under_way) == 3


def test_a_stream_that_is_slow_does_not_hold_back_answers(server: StandIn) -> None:
    """The second sample comes only once the first is answered."""
    answered = threading.Event()

    class Stream:
        def __iter__(self) -> Iterator[Sample]:
            yield sample_of(0)
            assert answered.is_set()
            yield sample_of(1)

        def is_ready(self) -> bool:
            return answered.is_set()

    rows = []
    for row, _ in engine_of(server.url).run(Stream()):
        rows.append(row)
        answered.set()
    assert rows == [0, 1]


def test_several_answers_to_a_row_have_seeds_of_their_own(server: StandIn) -> None:
    (outcome,) = run(
        engine_of(server.url), [sample_of(0, temperature=1.0, seed=5, num_return_sequences=3)]
    )
    assert isinstance(outcome, Completion) and len(outcome.alternatives) == 2
    seeds = {request.body["seed"] for request in server.requests}
    assert len(seeds) == 3 and 5 in seeds


FAULTS = {
    "500": Reply(status=500, body={"error": "worker died"}),
    "503": Reply(status=503, body=b"busy"),
    "429": Reply(status=429, body={"error": "slow down"}),
    "a page": Reply(body=b"<html>Welcome</html>"),
    "half a reply": Reply(body=b'{"choices"', headers={"Content-Length": "99"}),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_that_passes_costs_no_row(name: str, server: StandIn, waits: list[float]) -> None:
    server.reply = Seldom(FAULTS[name], FAULTS[name])
    assert texts(run(engine_of(server.url), samples_of(5))) == [f"row {i} [0]" for i in range(5)]
    assert len(server.rows) == 15
    assert len(waits) == 10 and all(0.5 <= wait <= 2 for wait in waits)


def test_waits_grow_up_to_a_limit(server: StandIn, waits: list[float]) -> None:
    server.reply = Seldom(*[FAULTS["429"]] * 12)
    run(engine_of(server.url), samples_of(1))
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits[:5]))
    assert all(15 <= wait <= 30 for wait in waits[5:])


def test_the_server_may_say_when_to_come_back(server: StandIn, waits: list[float]) -> None:
    later = [Reply(status=429, headers={"Retry-After": text}) for text in ("7", "9999999")]
    server.reply = Seldom(*later, Reply(status=503, headers={"Retry-After": "Fri, 1 Jan 2027"}))
    run(engine_of(server.url, patience_s=50), samples_of(1))
    assert waits[:2] == [7, 50] and waits[2] <= 4


def test_a_row_on_which_the_server_always_fails_is_its_error(server: StandIn) -> None:
    def reply(request: Request) -> Reply:
        return FAULTS["500"] if request.text == "row 3" else echo(request)

    server.reply = reply
    outcomes = run(engine_of(server.url, max_attempts=3), samples_of(6))
    failure = outcomes.pop(3)
    assert isinstance(failure, Failure) and failure.error_type is ErrorType.ENGINE
    assert "500: worker died, 3 times in a row, while the server answered others" in failure.message
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert sum(request.text == "row 3" for request in server.rows) == 3


def test_a_row_that_takes_too_long_is_its_error(server: StandIn) -> None:
    is_over = threading.Event()

    def reply(request: Request) -> Reply:
        if request.text == "row 1":
            is_over.wait(30)
        return echo(request)

    server.reply = reply
    try:
        outcomes = run(engine_of(server.url, max_attempts=1, timeout_s=0.5), samples_of(3))
    finally:
        is_over.set()
    assert isinstance(outcomes[1], Failure) and outcomes[1].error_type is ErrorType.TIMEOUT
    assert "engine.endpoint.timeout_s=0.5, once" in outcomes[1].message


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_is_refused_is_its_error_at_once(server: StandIn, status: int) -> None:
    def reply(request: Request) -> Reply:
        return Reply(status=status, body={"error": {"message": f"no, {request.text}"}})

    server.reply = reply
    outcomes = run(engine_of(server.url), samples_of(3))
    assert texts(outcomes) == [f"the server answered {status}: no, row {i}" for i in range(3)]
    assert len(server.requests) == 3


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("status", [307, 401, 403, 404, 408, 409, 425, 429])
def test_a_row_that_is_refused_for_good_is_its_error(
    server: StandIn, status: int, row: int
) -> None:
    """A server that answers others, were it only a short question, is there."""

    def reply(request: Request) -> Reply:
        if request.text == f"row {row}":
            return Reply(status=status, body={"error": "too large: at most 30000 tokens a minute"})
        return echo(request)

    server.reply = reply
    outcomes = run(engine_of(server.url, max_concurrency=2, patience_s=0.2), samples_of(6))
    failure = outcomes.pop(row)
    assert isinstance(failure, Failure) and failure.error_type is ErrorType.ENGINE
    assert f"{status}: too large" in failure.message and "answered others" in failure.message
    assert all(isinstance(outcome, Completion) for outcome in outcomes)


class TestAServerThatAnswersNobody:
    def test_ends_the_run_and_no_row_is_charged(self, server: StandIn) -> None:
        is_down = threading.Event()

        def reply(request: Request) -> Reply:
            if is_down.is_set():
                return FAULTS["503"]
            if request.text == "row 2":
                is_down.set()
            return echo(request)

        server.reply = reply
        server.probe = lambda request: FAULTS["503"] if is_down.is_set() else chat("Hi")
        engine = engine_of(server.url, max_concurrency=1, patience_s=0)
        answered = []
        with pytest.raises(EndpointError) as caught:
            for row, outcome in engine.run(samples_of(1000)):
                assert isinstance(outcome, Completion)
                answered.append(row)
        assert answered == [0, 1, 2]
        assert caught.value.exit_code is ExitCode.INTERRUPTED
        assert "patience_s=0: the server answered 503: busy" in caught.value.message
        assert not any(thread.name == "endpoint" for thread in threading.enumerate())

    def test_is_waited_for(self) -> None:
        with StandIn() as first:
            port = first.port
            engine = engine_of(first.url, max_concurrency=2)
            outcomes = engine.run(samples_of(9))
            done = dict([next(outcomes)])
        # The next requests find nobody; the server comes back with the third wait.
        with StandIn(port=port):
            done |= dict(outcomes)
        assert sorted(done) == list(range(9))
        assert all(isinstance(outcome, Completion) for outcome in done.values())

    def test_has_moved_away(self, server: StandIn) -> None:
        """A gateway answers 404 while what is behind it starts again."""
        server.reply = Seldom()
        engine = engine_of(server.url, max_concurrency=1, patience_s=0)
        outcomes = engine.run(samples_of(2))
        next(outcomes)
        server.reply = server.probe = lambda request: Reply(
            status=404, body={"error": "no upstream"}
        )
        with pytest.raises(EndpointError, match="404: no upstream"):
            next(outcomes)


def job(url: str, **cfg: Any) -> JobConfig:
    return JobConfig(
        model=ModelConfig(path="m"),
        engine=EngineConfig(name=EngineName.endpoint, endpoint=EndpointConfig(url=url, **cfg)),
    )


class TestOpening:
    def test_waits_for_a_server_that_is_loading(self, server: StandIn, waits: list[float]) -> None:
        ready = server.models
        server.models = Reply(status=503, body=b"loading")
        real = endpoint._sleep

        async def sleep(seconds: float) -> None:
            await real(seconds)
            if len(waits) == 3:
                server.models = ready

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(endpoint, "_sleep", sleep)
            engine = open_engine(job(server.url), device="cpu")
        assert len(waits) == 3
        assert texts(run(engine, samples_of(1))) == ["row 0 [0]"]

    def test_a_server_that_does_not_list_its_models(self, server: StandIn) -> None:
        server.models = Reply(status=404)
        engine = open_engine(job(server.url), device="cpu")
        assert texts(run(engine, samples_of(1))) == ["row 0 [0]"]

    def test_nobody_there(self) -> None:
        with StandIn() as server:
            url = server.url
        with pytest.raises(EndpointError, match=r"answered nothing .*patience_s=0: Connect") as e:
            open_engine(job(url, patience_s=0), device="cpu")
        assert e.value.exit_code is ExitCode.INTERRUPTED


class TestTokens:
    def test_are_sent_and_never_said(
        self, server: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MY_TOKEN", "sk-secret")
        wrong = Reply(status=401, body={"error": "Incorrect API key sk-secret"})
        server.models = wrong
        with pytest.raises(ModelError) as caught:
            open_engine(job(server.url, token_env="MY_TOKEN"), device="cpu")
        assert caught.value.exit_code is ExitCode.USAGE
        assert "Incorrect API key ***; MY_TOKEN holds the wrong token" in str(caught.value)
        server.reply = server.probe = lambda request: wrong
        with pytest.raises(ModelError) as caught:
            run(engine_of(server.url, token_env="MY_TOKEN"), samples_of(3))
        assert "sk-secret" not in str(caught.value) and "sk-secret" not in caplog.text
        assert server.requests[0].headers["authorization"] == "Bearer sk-secret"

    def test_of_the_hub_go_nowhere_else(
        self, server: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        run(engine_of(server.url), samples_of(1))
        assert "authorization" not in server.requests[0].headers

    def test_follow_no_redirect(self, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BATCHVLM_ENDPOINT_TOKEN", "sk-secret")
        with StandIn() as elsewhere:
            target = f"{elsewhere.url}/chat/completions"
            away = Reply(status=307, headers={"Location": target})
            server.reply = server.probe = lambda request: away
            with pytest.raises(ModelError, match=r"answered 307.*check engine\.endpoint\.url"):
                run(engine_of(server.url), samples_of(1))
            assert elsewhere.requests == []


def test_a_model_that_is_not_there(server: StandIn) -> None:
    nobody = Reply(status=404, body={"error": {"message": "no model m"}})
    server.reply = server.probe = lambda request: nobody
    with pytest.raises(ModelError, match=r"404: no model m; .*engine\.endpoint\.model=m"):
        run(engine_of(server.url), samples_of(3))


def test_a_server_that_takes_no_schema(server: StandIn) -> None:
    server.reply = lambda request: Reply(status=400, body={"error": "unknown response_format"})
    engine = EndpointEngine(
        EndpointConfig(url=server.url), model="m", form=Form(FormKind.JSON_SCHEMA, "{}")
    )
    with pytest.raises(ModelError, match=r"engine\.endpoint\.response_format=none sends no form"):
        run(engine, samples_of(3))


def test_whoever_leaves_early_leaves_nothing_behind(server: StandIn) -> None:
    is_over = threading.Event()

    def reply(request: Request) -> Reply:
        if request.text != "row 0":
            is_over.wait(30)
        return echo(request)

    server.reply = reply
    outcomes = engine_of(server.url, max_concurrency=4).run(samples_of(10))
    assert next(outcomes)[0] == 0
    outcomes.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "endpoint" for thread in threading.enumerate())
    is_over.set()
