"""A server that speaks as `glmlora serve` does and has no model: the question says what it answers.

"slow" is answered without end until the client goes, "think" has thoughts, "tool" a call of a tool,
"markdown" all that the page draws, "error" breaks off, "steady" takes its time; any other question
comes back."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import glmlora

PAGE = Path(glmlora.__file__).parent / "serving" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
TYPES |= {".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ANSWER = """# A title

Some **bold** and *slanted* text with `code`, <b>no markup</b> & [a link](https://example.org/a).
[no link](javascript:void)

1. first
2. second
   - inside

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
print("<script>alert(1)</script>")
```
"""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def reply(self, status, body, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, **headers):
        self.reply(status, {"error": {"message": message, "type": "x", "code": None}}, **headers)

    def allowed(self):
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.server.refused += 1
        self.refuse(401, "a key is needed")
        return False

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            if self.allowed():
                trained = {"template": "Medical? {title}", "labels": ["1", "0"]}
                entries = [{"id": "base"}, {"id": "papers", "parent": "base", **trained}]
                self.reply(200, {"object": "list", "data": entries})
            return
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if file.is_file():
            self.reply(200, file.read_bytes(), TYPES[file.suffix])
        else:
            self.refuse(404, f"{path} is not here")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.asked.append((self.path, body))
        if self.path == "/v1/classify":
            self.classify(body)
        elif body.get("stream"):
            try:
                self.stream(body)
            except OSError:
                self.server.gone.set()
        else:
            text = body["messages"][-1]["content"]
            message = {"role": "assistant", "content": f"said {text}"}
            self.reply(
                200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            )

    def classify(self, body):
        texts = [i if isinstance(i, str) else i[-1]["content"] for i in body["input"]]
        if any("busy" in text for text in texts) and not self.server.busy.is_set():
            self.server.busy.set()
            self.refuse(503, "busy", Retry_After="0")
            return
        if any("too long" in text for text in texts):
            self.refuse(400, "input: too long")
            return
        self.server.hold.wait(30)
        first, *others = body["labels"]
        rows = []
        for number, text in enumerate(texts):
            label = first if "insulin" in text.lower() else others[0]
            probabilities = {name: 0.9 if name == label else 0.1 for name in body["labels"]}
            rows.append({"index": number, "label": label, "probabilities": probabilities})
        self.reply(200, {"object": "list", "data": rows})

    def stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        text = body["messages"][-1]["content"]

        def send(data):
            self.wfile.write(
                f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
            )
            self.wfile.flush()

        def delta(finish=None, **what):
            send({"choices": [{"index": 0, "delta": what, "finish_reason": finish}]})

        delta(role="assistant", content="")
        if "think" in text:
            delta(reasoning_content="First **this**, ")
            delta(reasoning_content="then that.")
        if "slow" in text:
            while True:
                delta(content="word ")
                time.sleep(0.01)
        if "error" in text:
            delta(content="half an")
            send({"error": {"message": "the model fell over"}})
            return
        if "tool" in text and body.get("tools"):
            call = {"name": "weather", "arguments": '{"city": '}
            delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": call}])
            delta(tool_calls=[{"index": 0, "function": {"arguments": '"Paris"}'}}])
            delta(finish="tool_calls")
        else:
            answer = ANSWER if "markdown" in text else f"You said: {text}"
            for i in range(0, len(answer), 7):
                delta(content=answer[i : i + 7])
                time.sleep(0.05 * ("steady" in text))
            delta(finish="stop")
        send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 12}})
        send("[DONE]")


class Server(ThreadingHTTPServer):
    """asked: (path, body) of each request. gone: a client went while it was answered. hold: what
    classify waits for. busy: the one refusal of "busy" has been given. refused: requests that had
    not the key."""

    daemon_threads = True

    def __init__(self, key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.asked, self.refused = key, [], 0
        self.gone, self.hold, self.busy = (threading.Event() for _ in range(3))
        self.hold.set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"

    def close(self):
        self.shutdown()
        self.server_close()
