"""The engine for an OpenAI-compatible server: one chat completion request per answer.

A request that a healthy server refuses or fails makes its row an error. If the server answers no
request at all, rows wait, and after `engine.endpoint.patience_s` the run ends with exit code 75.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_async_session

from batchvlm.config import EndpointConfig, Guided, JobConfig, TaskName
from batchvlm.engine.answers import expand, join
from batchvlm.engine.chat_api import (
    SENT_KINDS,
    MalformedReplyError,
    read_reply,
    reason_of,
    refusal,
    request_body,
    without_images,
)
from batchvlm.engine.protocol import Outcome, SampleStream
from batchvlm.errors import ConfigError, EndpointError, ErrorType, ModelError
from batchvlm.forms.forms import run_form
from batchvlm.records import Completion, EngineStats, Failure, Form, FormKind, Sample

log = logging.getLogger(__name__)

_MIN_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 60.0
_POLL_S = 0.05
"""Seconds between polls for a new sample while requests are in flight and more may be sent."""
_MAX_CONNECTIONS = 100
"""Maximum number of connections of one client."""
_REFUSED_STATUS = (401, 403, 404, 405)
"""Wrong token, URL or model, if a probe is refused too."""
_BUSY_STATUS = (408, 409, 425, 429)

_FORM_FIELDS = ("response_format", "structured_outputs", "guided_")

_sleep = asyncio.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """Why one attempt of a request failed."""

    reason: str
    error_type: ErrorType = ErrorType.ENGINE
    is_busy: bool = False
    """Whether the server asks for a later retry."""
    wait_s: float | None = None
    """Seconds until the retry, by the server's Retry-After; None if it gave none."""
    refusal: ModelError | None = None
    """Raised if the server has not answered any request yet."""


class EndpointEngine:
    """Sends each row to a server as a chat completion request.

    Args:
        cfg: the server's URL, timeouts and limits.
        model: the model's name on the server.
        form: form of the answers, for rows without their own.
        is_guided: whether requests ask the server to constrain answers to their form.
    """

    def __init__(
        self,
        cfg: EndpointConfig,
        *,
        model: str,
        form: Form | None = None,
        is_guided: bool = True,
    ) -> None:
        assert cfg.url is not None, "settings/checks.py asks for it"
        self.stats = EngineStats()
        self._cfg = cfg
        self._model = model
        self._form = form
        self._is_guided = is_guided
        self._url = _base_url(cfg.url)
        self._token = os.environ.get(cfg.token_env, "").strip()
        self._down_since_s: float | None = None
        self._has_answered = False
        self._clients: list[Any] = []
        self._probed_s = float("-inf")
        self._is_up = False

    @classmethod
    def open(cls, cfg: JobConfig) -> EndpointEngine:
        """Create the engine, once the server responds.

        Raises:
            EndpointError: it does not respond for `engine.endpoint.patience_s`.
            ModelError: it refuses the token.
            ConfigError: the response format cannot express the form of the answers.
        """
        output = cfg.task.output
        form = run_form(output) if cfg.task.name is TaskName.extract else None
        is_guided = output.guided is not Guided.off
        if is_guided:
            kinds = {form.kind} if form is not None else set()
            kinds |= {FormKind.CHOICE} if output.choice_column else set()
            _check_sent(kinds, cfg.engine.endpoint)
        engine = cls(cfg.engine.endpoint, model=cfg.model.path, form=form, is_guided=is_guided)
        with _loop() as loop:
            asyncio.run_coroutine_threadsafe(engine._await_server(), loop).result()
        return engine

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample exactly once; see `Engine.run`.

        Raises:
            EndpointError: the server has answered no request for `engine.endpoint.patience_s`.
            ModelError: it refuses the token, the URL, the model or the form field.
        """
        # Several answers are several requests with different seeds: not every server supports `n`,
        # and the first answer must equal that of a row with one answer.
        yield from join(self._answer(expand(samples)))

    def _answer(self, samples: SampleStream) -> Iterator[Outcome]:
        done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        stream = iter(samples)
        num_in_flight, is_over = 0, False
        self._probe_lock = asyncio.Lock()

        async def answer(sample: Sample) -> None:
            try:
                done.put((sample, await self._ask(sample)))
            except Exception as error:
                done.put(error)

        with _loop() as loop:
            try:
                while True:
                    while not is_over and num_in_flight < self._cfg.max_concurrency:
                        if num_in_flight and not samples.is_ready():
                            break
                        sample = next(stream, None)
                        if sample is None:
                            is_over = True
                            break
                        asyncio.run_coroutine_threadsafe(answer(sample), loop)
                        num_in_flight += 1
                    if not num_in_flight:
                        return
                    has_room = not is_over and num_in_flight < self._cfg.max_concurrency
                    try:
                        outcome = done.get(timeout=_POLL_S if has_room else None)
                    except queue.Empty:
                        continue
                    if isinstance(outcome, BaseException):
                        raise outcome
                    num_in_flight -= 1
                    yield outcome
            finally:
                _finish(self._close(), loop)

    async def _ask(self, sample: Sample) -> Completion | Failure:
        """Send a row's request, with retries, until it is answered or given up.

        Raises:
            EndpointError, ModelError: see `run`.
        """
        form = (sample.form or self._form) if self._is_guided else None
        body = request_body(sample, self._cfg, model=self._model, form=form)
        start = time.perf_counter()
        num_faults, wait_s = 0, _MIN_BACKOFF_S
        busy_since_s: float | None = None
        while True:
            outcome = await self._post(body, sample, start)
            if not isinstance(outcome, _Fault):
                self._has_answered |= isinstance(outcome, Completion)
                self._mark_up()
                return outcome
            # The request is at fault only if the server answers another one.
            if outcome.is_busy:
                now_s = time.monotonic()
                busy_since_s = now_s if busy_since_s is None else busy_since_s
                is_busy_too_long = now_s - busy_since_s >= self._cfg.patience_s
                if (is_busy_too_long or self._is_down_too_long()) and await self._answers_probe():
                    if is_busy_too_long:
                        return _failure_after(
                            outcome, f"for engine.endpoint.patience_s={self._cfg.patience_s:g}"
                        )
                else:
                    self._mark_down(outcome)
            elif await self._answers_probe():
                num_faults += 1
                if num_faults >= self._cfg.max_attempts:
                    tries = f"{num_faults} times in a row" if num_faults > 1 else "once"
                    return _failure_after(outcome, tries)
            elif outcome.refusal is not None and not self._has_answered:
                raise outcome.refusal
            else:
                self._mark_down(outcome)
            await _sleep(
                outcome.wait_s if outcome.wait_s is not None else wait_s * random.uniform(0.5, 1.0)
            )
            wait_s = min(2 * wait_s, _MAX_BACKOFF_S)

    async def _post(
        self, body: bytes, sample: Sample, start: float
    ) -> Completion | Failure | _Fault:
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                status, headers, text = await self._call("POST", "/chat/completions", body)
        except TimeoutError:
            return _Fault(
                reason=f"no answer within engine.endpoint.timeout_s={self._cfg.timeout_s:g}",
                error_type=ErrorType.TIMEOUT,
            )
        # The HTTP library raises many types.
        except Exception as error:
            return _Fault(reason=self._describe(error))
        self.stats.num_batches += 1
        if status == 200:
            try:
                outcome = read_reply(text, sample, time.perf_counter() - start)
            except MalformedReplyError:
                return _Fault(reason="the server's reply is no chat completion")
            if isinstance(outcome, Completion) and outcome.usage is not None:
                self.stats.prompt_tokens += outcome.usage.prompt_tokens or 0
                self.stats.prompt_cells += outcome.usage.prompt_tokens or 0
            return outcome
        reason = reason_of(text, secrets=[self._token] if self._token else [])
        if status in _REFUSED_STATUS or 300 <= status < 400:
            return _Fault(
                reason=f"the server answered {status}: {reason}",
                refusal=self._refused(status, reason),
            )
        if 400 <= status < 500 and status not in _BUSY_STATUS:
            if any(name in reason for name in _FORM_FIELDS) and not self._has_answered:
                raise ModelError(
                    f"the server answered {status}: {reason}",
                    hint="engine.endpoint.response_format=none sends no form, other values send "
                    "it in another way",
                )
            return refusal(status, reason)
        return _Fault(
            reason=f"the server answered {status}: {reason}",
            is_busy=status in _BUSY_STATUS,
            wait_s=_retry_after_s(headers, at_most=self._cfg.patience_s),
        )

    async def _answers_probe(self) -> bool:
        """Whether the server answers a short text request; concurrent calls share one."""
        failed_s = time.monotonic()
        async with self._probe_lock:
            if self._probed_s < failed_s:
                self._probed_s = time.monotonic()
                self._is_up = await self._probe()
        if self._is_up:
            self._mark_up()
        return self._is_up

    async def _probe(self) -> bool:
        question = {"role": "user", "content": "Hello"}
        body = {"model": self._model, "messages": [question], "max_tokens": 1, "temperature": 0}
        try:
            async with asyncio.timeout(min(_PROBE_TIMEOUT_S, self._cfg.timeout_s)):
                status, _, _ = await self._call(
                    "POST", "/chat/completions", json.dumps(body).encode()
                )
        except Exception:
            return False
        # A model that needs an image answers the probe with a 4xx, which also shows it is up.
        is_refused = 300 <= status < 400 or status in _REFUSED_STATUS
        return status < 500 and not is_refused and status not in _BUSY_STATUS

    def _mark_up(self) -> None:
        if self._down_since_s is not None:
            log.info("the server at %s answers again", self._url)
        self._down_since_s = None

    def _is_down_too_long(self) -> bool:
        since_s = self._down_since_s
        return since_s is not None and time.monotonic() - since_s >= self._cfg.patience_s

    def _mark_down(self, fault: _Fault) -> None:
        """Record that the server does not answer, and warn once.

        Raises:
            EndpointError: it has not answered for `engine.endpoint.patience_s`.
        """
        if self._down_since_s is None:
            self._down_since_s = time.monotonic()
            log.warning("the server at %s does not answer (%s); waiting", self._url, fault.reason)
        if self._is_down_too_long():
            raise EndpointError(
                f"the server at {self._url} has answered nothing for "
                f"engine.endpoint.patience_s={self._cfg.patience_s:g}: {fault.reason}",
                hint="finished rows are on disk; check the server and run the same command again",
            )

    async def _await_server(self) -> None:
        try:
            wait_s = _MIN_BACKOFF_S
            while True:
                try:
                    async with asyncio.timeout(_PROBE_TIMEOUT_S):
                        status, _, text = await self._call("GET", "/models")
                    fault = _Fault(reason=f"the server answered {status}")
                # A 404 counts as up: not every server lists its models.
                except Exception as error:
                    status, text, fault = 503, b"", _Fault(reason=self._describe(error))
                if status in (401, 403):
                    secrets = [self._token] if self._token else []
                    raise self._refused(status, reason_of(text, secrets=secrets))
                if status not in (429, 502, 503, 504):
                    self._mark_up()
                    return
                self._mark_down(fault)
                await _sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, _MAX_BACKOFF_S)
        finally:
            await self._close()

    async def _call(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, Any, bytes]:
        if not self._clients:
            count = -(-self._cfg.max_concurrency // _MAX_CONNECTIONS)
            self._clients = [_open_client() for _ in range(count)]
        headers = {"content-type": "application/json"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        client = random.choice(self._clients)
        reply = await client.request(
            method,
            f"{self._url}{path}",
            content=body,
            headers=headers,
            timeout=(_CONNECT_TIMEOUT_S, None, None, None),
        )
        return reply.status_code, reply.headers, reply.content

    async def _close(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            await client.aclose()

    def _refused(self, status: int, reason: str) -> ModelError:
        if status in (401, 403):
            hint = (
                f"{self._cfg.token_env} holds the wrong token"
                if self._token
                else f"put a token into the environment variable {self._cfg.token_env}"
            )
        elif status == 404:
            hint = f"check engine.endpoint.url, and engine.endpoint.model={self._model}"
        else:
            hint = "check engine.endpoint.url, which ends in /v1 as a rule"
        message = f"the server at {self._url} answered {status}: {reason}"
        return ModelError(message, hint=hint)

    def _describe(self, error: Exception) -> str:
        text = without_images(str(error))
        if self._token:
            text = text.replace(self._token, "***")
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _failure_after(fault: _Fault, tries: str) -> Failure:
    message = f"{fault.reason}, {tries}, while the server answered others"
    return Failure(error_type=fault.error_type, message=message)


def _check_sent(kinds: Set[FormKind], cfg: EndpointConfig) -> None:
    for kind in sorted(kinds - SENT_KINDS[cfg.response_format]):
        others = [f.value for f, sent in SENT_KINDS.items() if kind in sent]
        raise ConfigError(
            f"engine.endpoint.response_format={cfg.response_format.value} cannot express a form "
            f"of kind {kind.value}",
            hint=f"{', '.join(others[:-1])} can; none only validates answers",
        )


def _base_url(url: str) -> str:
    url = url.rstrip("/").removesuffix("/chat/completions")
    return url if urlsplit(url).path else f"{url}/v1"


def _retry_after_s(headers: Any, *, at_most: float) -> float | None:
    text = str(headers.get("retry-after", "")).strip()
    # The date form of Retry-After is rare; the usual backoff is used for it.
    return min(float(text), at_most) if text.isdecimal() and len(text) < 9 else None


def _open_client() -> Any:
    """Return huggingface_hub's HTTP client, without hooks and redirects.

    The hooks refuse every request if HF_HUB_OFFLINE is set. A redirect would leak the token.
    """
    client = get_async_session()
    client.event_hooks = {"request": [], "response": []}
    client.follow_redirects = False
    return client


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Yield an event loop that runs in a thread; on exit, stop and close it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _finish(last: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    """Cancel all tasks of a loop that runs in another thread, then run `last` in it."""

    async def cancel() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last

    asyncio.run_coroutine_threadsafe(cancel(), loop).result()
