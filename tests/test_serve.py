"""`glmlora serve` by the real openai client: every answer is what the model gives alone."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import glmlora

pytest.importorskip("fastapi", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the openai client")
httpx = pytest.importorskip("httpx", reason="needs httpx")

from glmlora.model.kept import keep_adapters  # noqa: E402
from glmlora.serving import command  # noqa: E402
from glmlora.serving.app import create_app  # noqa: E402
from glmlora.serving.engine import Engine, Limits, Turns  # noqa: E402
from glmlora.serving.requests import Server  # noqa: E402

TINY = Path(glmlora.__file__).parent / "tiny"
QUESTIONS = [
    "What is insulin?",
    "Who are you?",
    "title: Sorting on a GPU. Is it medical?",
    "你好",
]
LONG = "Tell me a long story. "
FOR_LONG = {"guided_choice": ["ab " * 120]}  # an answer of hundreds of tokens


def load():
    return glmlora.AutoModel.from_pretrained(TINY, compute_dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return glmlora.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters, whose numbers are random."""
    found = {}
    for seed, name in enumerate(("red", "blue"), 1):
        config = glmlora.LoraConfig(r=4 * seed, target_modules=["query_key_value", "dense"])
        model = glmlora.get_peft_model(load(), config, seed=seed)
        rng = np.random.default_rng(seed)
        for weight in model.adapter_names:
            values = rng.normal(0, 0.1, model.core.shape(weight)).astype(np.float32)
            model.core.write(weight, values)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def models(folders):
    """What answers alone."""
    found = {"tiny": load()}
    for name, folder in folders.items():
        found[name] = glmlora.PeftModel.from_pretrained(load(), folder).eval()
    return found


class Running:
    """A server on a free port, in threads of this process."""

    def __init__(self, folders, tokenizer, keys=(), body_bytes=1 << 20, **limits):
        kept = keep_adapters(load(), "tiny", folders)
        limits = {"rows": 3, "context": 512, "waiting": 64, "seconds": 60, **limits}
        self.engine = Engine(kept, Limits(**limits))
        self.app = create_app(Server(self.engine, tokenizer), keys, body_bytes)
        config = uvicorn.Config(self.app, port=0, log_config=None, lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.engine.start()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        [socket] = self.server.servers[0].sockets
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.engine.drain()
        assert self.engine.join(60)
        self.thread.join(60)

    def chat(self, question, model="tiny", **options):
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "max_tokens": 24, **options}
        return self.client.chat.completions.create(model=model, messages=messages, **options)

    def idle(self):
        """Wait until no answer runs."""
        for _ in range(1000):
            if not self.engine.running and not self.engine.waiting:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def server(folders, tokenizer):
    with Running(folders, tokenizer) as running:
        yield running


def alone(models, tokenizer, question, model="tiny", history=(), **settings):
    settings = {"do_sample": False, "max_new_tokens": 24, **settings}
    return models[model].chat(tokenizer, question, history=list(history), **settings)[0]


def test_answers_are_those_of_chat(server, models, tokenizer):
    for model in models:
        found = server.chat(QUESTIONS[0], model)
        assert found.choices[0].message.content == alone(models, tokenizer, QUESTIONS[0], model)
        assert found.model == model and found.choices[0].message.role == "assistant"
        usage = found.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens == len(tokenizer.build_chat_input(QUESTIONS[0])["input_ids"][0])
    assert len({server.chat(QUESTIONS[0], m).choices[0].message.content for m in models}) == 3


def test_history_and_system(server, models, tokenizer):
    history = [("Hello", "Hi! Who are you?")]
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": "Hi! Who are you?"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    ask = {"model": "tiny", "temperature": 0, "max_completion_tokens": 24}
    found = server.client.chat.completions.create(messages=messages, **ask)
    expected = alone(models, tokenizer, QUESTIONS[1], history=history)
    assert found.choices[0].message.content == expected
    told = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hello"}]
    found = server.client.chat.completions.create(messages=told, **ask)
    assert found.choices[0].message.content == alone(models, tokenizer, "Be brief. Hello")


def test_a_stream_is_the_same_text_in_parts(server, models, tokenizer):
    chunks = list(server.chat(QUESTIONS[3], stream=True, stream_options={"include_usage": True}))
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == alone(models, tokenizer, QUESTIONS[3])
    assert len([p for p in parts if p]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    whole = server.chat(QUESTIONS[3])
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_many_callers_at_once_with_both_adapters(server, models, tokenizer):
    """36 requests on 3 rows, streamed and whole, short and long: each is as alone."""
    names = list(models)
    asked = [
        (QUESTIONS[n % 4] + " Please." * (n % 3), names[n % 5 % 3], bool(n % 2)) for n in range(36)
    ]
    expected = {one: alone(models, tokenizer, one[0], one[1]) for one in set(asked)}

    def ask(one):
        question, model, stream = one
        found = server.chat(question, model, stream=stream)
        if stream:
            return "".join(c.choices[0].delta.content or "" for c in found)
        return found.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asked)) == [expected[one] for one in asked]
    assert server.idle()


def test_seeds_draw_as_chat_does(server, models, tokenizer):
    settings = {"temperature": 0.9, "top_p": 0.7, "seed": 11}
    found = server.chat(QUESTIONS[0], "red", **settings)
    expected = alone(models, tokenizer, QUESTIONS[0], "red", do_sample=True, **settings)
    assert found.choices[0].message.content == expected
    several = server.chat(QUESTIONS[0], "red", n=3, **settings)
    assert several.choices[0].message.content == expected
    assert len({c.message.content for c in several.choices}) > 1
    again = server.chat(QUESTIONS[0], "red", n=3, stream=True, **settings)
    texts = {0: "", 1: "", 2: ""}
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [c.message.content for c in several.choices]
    usual = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], seed=5, max_tokens=9
    )
    expected = models["tiny"].chat(tokenizer, "Hello", history=[], seed=5, max_new_tokens=9)[0]
    assert usual.choices[0].message.content == expected  # what is not given is chat's


@pytest.mark.parametrize("stream", [False, True])
def test_stops_are_left_out(server, stream):
    whole = server.chat(QUESTIONS[1]).choices[0].message.content
    stop = whole[9:13]
    found = server.chat(QUESTIONS[1], stop=["~~~~", stop], stream=stream)
    if stream:
        chunks = list(found)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = found.choices[0].message.content
        assert found.choices[0].finish_reason == "stop"
    assert text == whole[: whole.index(stop)].strip()
    assert server.idle()


def test_logprobs_are_those_of_the_scores(server, models, tokenizer):
    found = server.chat(QUESTIONS[0], "blue", logprobs=True, top_logprobs=3, max_tokens=6)
    content = found.choices[0].logprobs.content
    ids = tokenizer.build_chat_input(QUESTIONS[0])["input_ids"][0].tolist()
    out = models["blue"].generate(
        [ids],
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for place, one in enumerate(content):
        scores = out.logits[place][0].astype(np.float64)
        expected = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
        best = np.argsort(-scores)[:3]
        assert one.logprob == pytest.approx(expected[out.sequences[0, len(ids) + place]], abs=1e-6)
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(expected[best].tolist())
        assert one.top_logprobs[0].token == one.token == tokenizer.decode([int(best[0])])
    streamed = server.chat(
        QUESTIONS[0], "blue", logprobs=True, top_logprobs=3, max_tokens=6, stream=True
    )
    parts = [c.choices[0].logprobs.content[0] for c in streamed if c.choices[0].logprobs]
    assert [p.logprob for p in parts] == [c.logprob for c in content]
    asked = {"model": "tiny", "prompt": "Hello", "logprobs": 2, "max_tokens": 3, "temperature": 0}
    text = server.client.completions.create(**asked)
    found = text.choices[0].logprobs
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    starts = [len("".join(found.tokens[:i])) for i in range(3)]
    assert found.text_offset == starts and starts[2] > 0
    streamed = server.client.completions.create(**asked, stream=True)
    offsets = [c.choices[0].logprobs.text_offset for c in streamed if c.choices[0].logprobs]
    assert sum(offsets, []) == starts


def test_completions_go_on_with_texts_and_ids(server, models, tokenizer):
    ask = {"model": "red", "temperature": 0, "max_tokens": 8}
    expected = []
    for prompt in ("Insulin is", "The"):
        ids = list(tokenizer(prompt)["input_ids"])
        new = models["red"].generate([ids], max_new_tokens=8, do_sample=False)[0, len(ids) :]
        expected.append(tokenizer.decode([i for i in new.tolist() if i != 2]))
    found = server.client.completions.create(prompt=["Insulin is", "The"], **ask)
    assert [c.text for c in found.choices] == expected
    assert [c.index for c in found.choices] == [0, 1]
    by_ids = server.client.completions.create(
        prompt=list(tokenizer("Insulin is")["input_ids"]), stream=True, **ask
    )
    assert "".join(chunk.choices[0].text for chunk in by_ids) == expected[0]


def test_answers_that_the_caller_allows(server, models, tokenizer):
    choices = ["medical", "something else", "medicine"]
    weighed = models["blue"].classify(tokenizer, [QUESTIONS[0]], labels=choices)
    found = server.chat(QUESTIONS[0], "blue", extra_body={"guided_choice": choices})
    assert found.choices[0].message.content in choices and len(weighed.label) == 1
    many = {
        server.chat("Hi", seed=s, temperature=2, extra_body={"guided_choice": choices})
        .choices[0]
        .message.content
        for s in range(12)
    }
    assert many <= set(choices) and len(many) > 1


def test_json_follows_its_schema(server):
    pytest.importorskip("llguidance", reason="needs the extra serve")
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["红", "blue"]},
            "also": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["n", "kind", "also"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(6):
        found = server.chat(
            "Give me JSON", response_format=form, temperature=1.5, seed=seed, max_tokens=200
        )
        value = json.loads(found.choices[0].message.content)
        assert list(value) == ["n", "kind", "also"] and 0 <= value["n"] <= 99
        assert value["kind"] in ("红", "blue") and len(value["also"]) <= 2
        assert found.choices[0].finish_reason == "stop"
    found = server.chat("Hi", response_format={"type": "json_object"}, max_tokens=9, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in found)
    assert text.startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="response_format: json_schema"):
        server.chat("Hi", response_format=wrong)


def test_a_conversation_is_not_computed_again(server):
    said = "Here is a long system text that all share. " * 6
    first = server.chat(said + "One?", "red")
    assert first.usage.prompt_tokens_details.cached_tokens < 30
    second = server.chat(said + "Two?", "red")
    assert second.usage.prompt_tokens_details.cached_tokens > 60
    other = server.chat(said + "Two?", "blue")  # whose keys and values are others
    assert other.usage.prompt_tokens_details.cached_tokens < 30


def test_classify_is_that_of_the_model(server, models, tokenizer):
    inputs = [*QUESTIONS, [{"role": "user", "content": QUESTIONS[0]}]]
    for model in models:
        body = {"model": model, "input": inputs, "labels": ["0", 1, "maybe"]}
        found = server.http.post("/v1/classify", json=body).json()
        expected = models[model].classify(
            tokenizer, [*QUESTIONS, QUESTIONS[0]], labels=["0", "1", "maybe"]
        )
        assert [row["label"] for row in found["data"]] == expected.label
        got = [list(row["probabilities"].values()) for row in found["data"]]
        np.testing.assert_array_equal(got, expected.proba)
        logs = [list(row["log_probs"].values()) for row in found["data"]]
        np.testing.assert_array_equal(logs, expected.log_likelihood)
        assert found["labels"] == ["0", "1", "maybe"]


def test_models_are_listed(server):
    base, *adapters = server.client.models.list().data
    assert (base.id, base.adapters, base.parent) == ("tiny", ["red", "blue"], None)
    assert [(m.id, m.parent, m.adapters) for m in adapters] == [
        ("red", "tiny", []),
        ("blue", "tiny", []),
    ]
    assert server.client.models.retrieve("red").owned_by == "glmlora"
    assert base.max_model_len == 512


HI = [{"role": "user", "content": "hi"}]
WRONG = [
    ({"model": "rde", "messages": HI}, 404, "model", "did you mean 'red'"),
    ({"messages": HI}, 400, "model", "is missing"),
    ({"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
    ({"model": "tiny", "messages": [{"role": "user"}]}, 400, "messages[0].content", "missing"),
    (
        {"model": "tiny", "messages": [{"role": "robot", "content": ""}]},
        400,
        "messages[0]",
        "robot",
    ),
    (
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].type",
        "'text'",
    ),
    (
        {"model": "tiny", "messages": [*HI, {"role": "assistant", "content": "x"}]},
        400,
        "messages",
        "last",
    ),
    ({"model": "tiny", "messages": HI, "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"model": "tiny", "messages": HI, "frequency_penalty": 1}, 400, "frequency_penalty", "0"),
    ({"model": "tiny", "messages": HI, "temperature": 3}, 400, "temperature", "2"),
    ({"model": "tiny", "messages": HI, "temperature": "hot"}, 400, "temperature", "number"),
    ({"model": "tiny", "messages": HI, "max_tokens": 600}, 400, "max_tokens", "512"),
    ({"model": "tiny", "messages": HI, "top_logprobs": 3}, 400, "top_logprobs", "logprobs: true"),
    ({"model": "tiny", "messages": HI, "n": 99}, 400, "n", "8"),
    ({"model": "tiny", "messages": HI, "guided_choice": ["a", "a"]}, 400, "guided_choice", "'a'"),
    (
        {
            "model": "tiny",
            "messages": HI,
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        400,
        "tools",
        "calls none",
    ),
    (
        {"model": "tiny", "messages": [{"role": "user", "content": LONG * 99}]},
        400,
        "messages",
        "512",
    ),
    ({"model": "tiny", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", "tool"),
]


@pytest.mark.parametrize("body, status, param, text", WRONG)
def test_what_is_wrong_is_named(server, body, status, param, text):
    answer = server.http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert text in error["message"] and error["type"] == "invalid_request_error"


def test_bodies_that_are_none(server):
    post = server.http.post
    for content in (b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b"{" * 3000):
        answer = post("/v1/chat/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content
    large = post("/v1/classify", content=b"x" * (1 << 20) + b"x")
    assert large.status_code == 413 and "1048576" in large.json()["error"]["message"]

    def parts():
        for _ in range(20):
            yield b" " * (1 << 16)

    assert post("/v1/classify", content=parts()).status_code == 413
    assert server.http.get("/v1/nothing").json()["error"]["message"] == "/v1/nothing: Not Found"
    assert server.http.get("/page/..%2fapp.py").status_code == 404
    assert server.chat("still there").choices


def test_one_who_goes_away_leaves_at_once(server):
    """A stream that is closed, and a request without one whose connection is."""
    answer = server.chat(LONG, stream=True, max_tokens=400, extra_body=FOR_LONG)
    while not next(answer).choices[0].delta.content:  # its role is told before it has a row
        pass
    assert server.engine.running == 1
    answer.close()
    assert server.idle()

    async def leave():
        async with httpx.AsyncClient(base_url=server.url) as http:
            body = {"model": "tiny", "messages": HI, "max_tokens": 400, **FOR_LONG}
            with contextlib.suppress(httpx.ReadTimeout):
                await http.post("/v1/chat/completions", json=body, timeout=0.05)

    asyncio.run(leave())
    assert server.idle()
    text = server.http.get("/metrics").text
    cancelled = [line for line in text.splitlines() if line.startswith("glmlora_cancelled_total")]
    assert int(cancelled[0].split()[1]) >= 1


def test_metrics_and_health(server):
    assert server.http.get("/health").json()["status"] == "ok"
    text = server.http.get("/metrics").text
    assert 'glmlora_requests_total{path="/v1/chat/completions",status="200"}' in text
    counts = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            counts[name] = float(value)
    assert (
        counts['glmlora_queue_seconds_bucket{le="+Inf"}'] == counts["glmlora_queue_seconds_count"]
    )
    assert counts["glmlora_completion_tokens_total"] > 0 and counts["glmlora_rows"] == 3


def test_the_log_has_no_prompts(server, caplog):
    with caplog.at_level(logging.INFO, "glmlora.serving"):
        logging.getLogger("glmlora.serving").propagate = True
        server.chat("a secret question", max_tokens=3)
        for _ in range(500):  # requests of earlier tests may end meanwhile
            told = [json.loads(record.message) for record in caplog.records]
            if own := [line for line in told if line.get("new_tokens") == 3]:
                break
            time.sleep(0.01)
    (line,) = own
    assert (line["path"], line["status"]) == ("/v1/chat/completions", 200)
    assert line["model"] == "tiny" and line["first_token_ms"] >= line["queue_ms"] >= 0
    assert "secret" not in caplog.text


def test_keys_and_limits(tokenizer):
    """A key is asked for; too many wait: 429; too long: 408; while it drains: 503."""
    keys = ["first-key", "second-key"]
    with Running({}, tokenizer, keys, rows=1, waiting=1, seconds=0.6) as running:
        post = running.http.post
        body = {"model": "tiny", "messages": HI, "max_tokens": 400, **FOR_LONG}
        for headers in ({}, {"Authorization": "Bearer first-ke"}, {"Authorization": "first-key"}):
            answer = post("/v1/chat/completions", json=body, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert running.http.get("/v1/models").status_code == 401
        assert running.http.get("/health").status_code == 200
        headers = {"Authorization": "Bearer second-key"}

        def ask(_):
            time.sleep(0.02 * _)
            return post("/v1/chat/completions", json=body, headers=headers, timeout=60).status_code

        real, running.engine._step = running.engine._step, lambda: (time.sleep(0.02), real())
        with ThreadPoolExecutor(3) as pool:
            found = sorted(pool.map(ask, range(3)))
        assert found == [408, 408, 429]
        running.engine._step = real
        running.engine.drain()
        assert post("/v1/chat/completions", json=body, headers=headers).status_code == 503
        assert running.http.get("/health").status_code == 503


def test_callers_take_turns():
    turns = Turns()
    for n in range(3):
        turns.put("many", f"many {n}")
    turns.put("one", "one 0")
    assert [turns.next() for _ in range(len(turns))] == ["many 0", "one 0", "many 1", "many 2"]


def test_the_cache_is_no_larger_than_allowed():
    config = load().config
    row = command.row_bytes(config, 512)
    assert command.fitting_limits(config, None, None, 10**9, False) == (8, config.seq_length)
    assert command.fitting_limits(config, None, 512, 3 * row, True) == (3, 512)
    assert command.fitting_limits(config, 6, None, 3 * row, True) == (6, 256)
    with pytest.raises(ValueError, match="4 rows of 512 tokens take .* --cache-memory is"):
        command.fitting_limits(config, 4, 512, 3 * row, True)
    with pytest.raises(ValueError, match="--context: 99999 exceeds"):
        command.fitting_limits(config, 4, 99999, 10**9, True)
    engine = Engine(keep_adapters(load(), "tiny", {}), Limits(3, 512))
    assert engine.rows.cache.nbytes == 3 * row


def test_flags_are_checked_before_anything_is_loaded(tmp_path, folders):
    assert command.adapters_of([f"a={tmp_path}"]) == {"a": str(tmp_path)}
    for given in (["a"], ["=x"], [f"a={tmp_path}"] * 2):
        with pytest.raises(ValueError, match="--adapter"):
            command.adapters_of(given)
    with pytest.raises(ValueError, match="--host: 0.0.0.0 lets others in"):
        command.read_keys(None, "0.0.0.0", False)
    assert command.read_keys(None, "0.0.0.0", True) == []
    assert command.read_keys(None, "127.0.0.1", False) == []
    file = tmp_path / "keys"
    file.write_text("# of the team\nabcdefgh\n\n")
    assert command.read_keys(str(file), "0.0.0.0", False) == ["abcdefgh"]
    file.write_text("short\n")
    with pytest.raises(ValueError, match="8 or more"):
        command.read_keys(str(file), "0.0.0.0", False)
    with pytest.raises(ValueError, match="'tiny': the name is the base model's"):
        keep_adapters(load(), "tiny", {"tiny": folders["red"]})


def started(*flags):
    """A server as a process of its own, and its address."""
    words = [sys.executable, "-m", "glmlora", "serve", "--model", str(TINY), "--port", "0"]
    words += ["--rows", "2", "--context", "512", "--compute-dtype", "float32", *flags]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("glmlora serve:"):
            return process, line.split(" on ")[1].split()[0]
    raise AssertionError(process.wait())


def test_a_signal_drains_and_a_second_one_ends():
    process, url = started()
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = {"model": "tiny", "messages": HI, "stream": True}
        answer = client.chat.completions.create(max_tokens=400, extra_body=FOR_LONG, **ask)
        next(answer)
        process.send_signal(signal.SIGTERM)
        assert list(answer)[-1].choices[0].finish_reason == "stop"  # what runs is finished
        assert process.wait(20) == 0
    finally:
        process.kill()
    process, url = started()
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(max_tokens=400, extra_body=FOR_LONG, **ask)
        next(answer)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) in (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        process.kill()


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from glmlora.cli import main\n"
        f"sys.exit(main(['serve', '--model', {str(TINY)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "glmlora[serve]"' in done.stderr
    assert os.linesep not in done.stderr.strip()
