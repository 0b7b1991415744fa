"""From checked requests to jobs of the engine, and from their tokens to OpenAI's responses."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from ..generation.chat import answer_settings
from ..generation.labels import Classification, answer_ids, check_labels
from ..model.kept import Kept, chosen
from .engine import Choice, Engine, Job, Weighing, draws
from .guided import Choices, Grammar, Guide, json_grammar, vocabulary_of
from .prompts import Answer, Writer
from .schema import (
    ChatRequest,
    Classified,
    ClassifyRequest,
    ClassifyResponse,
    CompletionRequest,
    Sampling,
    SchemaFormat,
    TextFormat,
    Usage,
    UserMessage,
)


class Refused(Exception):
    """A request that cannot be answered, in OpenAI's words."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(error: Exception) -> Refused:
    """A ValueError or the like, whose sentence begins with the field, as a response."""
    text = str(error)
    field = text.partition(":")[0]
    param = field if field.replace("_", "").replace("[", "").replace("]", "").isalnum() else None
    return Refused(400, text, param)


class Asked:
    """The answers to one prompt, as many as `n` says: made in any thread, `begin` in the loop's.

    chat: messages, else a text that goes on.
    """

    def __init__(
        self,
        server: Server,
        request: ChatRequest | CompletionRequest,
        ids: list[int],
        writer: Writer,
        caller: str,
        chat: bool,
    ):
        self.server, self.request, self.ids, self.writer = server, request, ids, writer
        self.chat, model = chat, writer.model
        room = server.engine.limits.context - len(ids)
        limit = request.limit
        field = "messages" if chat else "prompt"
        if room < 1 or (limit is not None and limit > room):
            more = f" and {limit} new ones" if room >= 1 else ""
            raise Refused(
                400,
                f"{field}: {len(ids)} tokens{more}: this server has room for "
                f"{server.engine.limits.context} of prompt and answer",
                field if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        tools = getattr(request, "tools", None) or ()
        tools = () if getattr(request, "tool_choice", None) == "none" else tools
        given = settings_of(request, limit, field)
        self.answers: list[Answer] = []
        self.jobs: list[Job] = []
        self.news: asyncio.Queue[tuple[int, dict[str, Any]]] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        streams = draws(request.seed, request.n, lambda: secrets.randbits(63))
        for index, draw in enumerate(streams):
            settings = answer_settings(model, server.tokenizer, dict(given))
            guide = server.guide(request, model, settings.eos)
            plain = guide is not None
            answer = Answer(writer, tools, request.stops, plain, chat)
            choice = Choice(settings, guide, _top(request))
            longest = room if limit is None else limit
            token, end = self._token(index, answer, choice), self._end(index)
            self.answers.append(answer)
            self.jobs.append(Job(ids, longest, choice, model, draw, caller, token, end))

    def _post(self, index: int, what: dict[str, Any]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.news.put_nowait, (index, what))

    def _token(self, index: int, answer: Answer, choice: Choice) -> Callable[[int, bool], bool]:
        def token(new: int, is_end: bool) -> bool:
            if not is_end:
                answer.feed(new)
            what: dict[str, Any] = dict(answer.news()) if self.request.stream else {}
            if choice.seen:
                what["logprobs"] = (new, *choice.seen.popleft())
            if what and not (is_end and set(what) <= {"logprobs"}):
                self._post(index, what)
            return is_end or answer.stopped

        return token

    def _end(self, index: int) -> Callable[[str | Exception], None]:
        def end(reason: str | Exception) -> None:
            answer = self.answers[index]
            if isinstance(reason, str) and reason != "cancelled":
                answer.close()
                reason = "stop" if answer.stopped else reason
                reason = "tool_calls" if answer.call else reason
            self._post(index, {**answer.news(last=True), "end": reason})

        return end

    def begin(self) -> None:
        """Let the engine have it. Refused where it is busy."""
        self._loop = asyncio.get_running_loop()
        for number, job in enumerate(self.jobs):
            try:
                self.server.engine.submit(job)
            except RuntimeError as error:
                for other in self.jobs[:number]:
                    self.server.engine.cancel(other)
                draining = self.server.engine.draining or self.server.engine.failed
                status, code = (503, "unavailable") if draining else (429, "queue_full")
                raise Refused(status, str(error), None, code, "server_error") from None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for job in self.jobs:
            self.server.engine.cancel(job)

    async def events(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """What comes, until all answers have ended; Refused for an error of one."""
        left = len(self.jobs)
        try:
            while left:
                index, what = await self.news.get()
                reason = what.get("end")
                if isinstance(reason, Exception):
                    raise failed(reason)
                left -= reason is not None
                yield index, what
        finally:
            if left:
                self.cancel()

    @property
    def usage(self) -> Usage:
        """Tokens of all answers; the prompt counts once."""
        new = sum(job.request.index for job in self.jobs if job.request is not None)
        cached = max((job.reused for job in self.jobs), default=0)
        return Usage(
            prompt_tokens=len(self.ids),
            completion_tokens=new,
            total_tokens=len(self.ids) + new,
            prompt_tokens_details={"cached_tokens": cached},
        )


def failed(error: Exception) -> Refused:
    """An answer's error, as a response."""
    if isinstance(error, TimeoutError):
        return Refused(408, str(error), None, "timeout", "server_error")
    if isinstance(error, ValueError):
        return refused(error)
    return Refused(500, f"{type(error).__name__}: {error}", None, None, "server_error")


def settings_of(request: Sampling, limit: int | None, field: str) -> dict[str, Any]:
    """Fields of GenerationConfig that a request has."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {n: getattr(request, n) for n in names if getattr(request, n) is not None}
    if field == "prompt":  # a text goes on as the model has it
        given = {"top_p": 1.0, "temperature": 1.0, "top_k": 0, **given}
    if limit is not None:
        given["max_new_tokens"] = limit
    return given


def _top(request: ChatRequest | CompletionRequest) -> int | None:
    """How many log-probabilities are asked for beside the chosen token's; None: none at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if not request.logprobs:
        if request.top_logprobs:
            raise Refused(400, "top_logprobs: needs logprobs: true", "top_logprobs")
        return None
    return request.top_logprobs or 0


class Server:
    """What the endpoints need: models, tokenizer, engine."""

    def __init__(self, engine: Engine, tokenizer: Any):
        self.engine, self.tokenizer = engine, tokenizer
        self.created = int(time.time())
        self.writers = {name: Writer(kept, tokenizer) for name, kept in engine.models.items()}

    def model(self, name: str) -> Kept:
        """Refused (404) for one that there is not."""
        try:
            return chosen(self.engine.models, name)
        except LookupError as error:
            raise Refused(404, str(error.args[0]), "model", "model_not_found") from None

    def guide(self, request: Sampling, model: Kept, ends: Sequence[int]) -> Guide | None:
        """What the answer is restricted to, a new one for each answer."""
        wanted = request.response_format
        if isinstance(wanted, TextFormat):
            wanted = None
        if request.guided_choice is not None:
            if wanted is not None:
                raise Refused(400, "guided_choice: beside response_format", "guided_choice")
            return Choices(model, self.tokenizer, request.guided_choice)
        if wanted is None:
            return None
        schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else None
        size = min(model.config.padded_vocab_size, max(self.tokenizer.vocab_size, *ends) + 1)
        try:
            return Grammar(vocabulary_of(self.tokenizer, size, tuple(ends)), json_grammar(schema))
        except ImportError as error:
            raise Refused(400, str(error), "response_format") from None

    def chat(self, request: ChatRequest, caller: str) -> Asked:
        """A conversation's answers, not begun."""
        model = self.model(request.model)
        writer = self.writers[model.name]
        tools = [] if request.tool_choice == "none" else request.tools or []
        try:
            ids = writer.ids(request.messages, tools)
            return Asked(self, request, ids, writer, caller, True)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise refused(error) from None

    def complete(self, request: CompletionRequest, caller: str) -> list[Asked]:
        """The answers to each prompt, not begun."""
        model = self.model(request.model)
        writer, prompt = self.writers[model.name], request.prompt
        vocabulary = model.config.padded_vocab_size
        try:
            if isinstance(prompt, list) and isinstance(prompt[0], int):
                wrong = next((i for i in prompt if not 0 <= int(i) < vocabulary), None)
                if wrong is not None:
                    raise ValueError(f"prompt: {wrong} is outside the vocabulary of {vocabulary}")
                rows = [[int(i) for i in prompt]]
            else:
                texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
                rows = [list(self.tokenizer(text)["input_ids"]) for text in texts]
            if not all(rows):
                raise ValueError("prompt: has no tokens")
            return [Asked(self, request, ids, writer, caller, False) for ids in rows]
        except (ValueError, TypeError, LookupError) as error:
            raise refused(error) from None

    def weigh(
        self, request: ClassifyRequest, caller: str, end: Callable[[np.ndarray | Exception], None]
    ) -> tuple[list[str], Weighing]:
        """(labels, what the engine is to weigh)."""
        model = self.model(request.model)
        writer, task = self.writers[model.name], model.task
        given = request.labels
        if given is None and task is not None and task.labels:
            given = list(task.answers)
        if given is None:
            raise Refused(400, f"labels: {model.name} was trained for none: say which", "labels")
        try:
            labels = check_labels(given)
            answers = answer_ids(model, self.tokenizer, labels)  # type: ignore[arg-type]
            longest, most = max(map(len, answers)), self.engine.limits.context
            prompts = []
            for number, said in enumerate(request.input):
                asked = [UserMessage(role="user", content=said)] if isinstance(said, str) else said
                prompts.append(writer.ids(asked, []))
                if len(prompts[-1]) + longest > most:
                    raise ValueError(
                        f"input[{number}]: {len(prompts[-1])} tokens and a label of {longest}: "
                        f"this server has room for {most}"
                    )
        except (ValueError, TypeError) as error:
            raise refused(error) from None
        return labels, Weighing(prompts, answers, model, caller, end)

    def classified(
        self, request: ClassifyRequest, labels: list[str], item: Weighing, found: np.ndarray
    ) -> ClassifyResponse:
        """The response."""
        weighed = Classification(labels, found)
        rows = zip(weighed.label, weighed.proba.tolist(), found.tolist(), strict=True)
        data = [
            Classified(
                index=number,
                label=label,
                probabilities=dict(zip(labels, proba, strict=True)),
                log_probs=dict(zip(labels, map(_finite, row), strict=True)),
            )
            for number, (label, proba, row) in enumerate(rows)
        ]
        tokens = sum(map(len, item.prompts))
        usage = Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
        return ClassifyResponse(model=request.model, labels=labels, data=data, usage=usage)


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return value if math.isfinite(value) else -1e30
