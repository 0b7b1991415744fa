"""A headless Chromium for tests, driven over its own protocol (CDP) by a pipe, without a package.

Whatever the page writes to the console as an error, throws, or does against its Content Security
Policy is kept in `Browser.complaints`."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking"),
    *("--no-default-browser-check", "--hide-scrollbars", "--force-color-profile=srgb"),
)
# Violations as the page itself is told of them, each with its rule and what broke it.
WATCH = """
addEventListener("securitypolicyviolation", (event) => {
  console.error(`CSP: ${event.violatedDirective}: ${event.blockedURI}`);
});
"""
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "Space": ("Space", 32, " "),
}
SHIFT = 8


class Browser:
    """One window. `evaluate` runs JavaScript in the page; `press` and `type` are a user's keys."""

    def __init__(self, folder: Path) -> None:
        """folder: where its profile and downloads are. Skips where there is no Chromium."""
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("needs Chromium (apt-get install chromium), and it is not installed")
        self.folder, self.complaints = folder, []
        self.counter, self.left, self.answers = itertools.count(1), b"", {}
        theirs_in, self.out = os.pipe()
        self.inp, theirs_out = os.pipe()
        words = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
        if os.geteuid() == 0:
            words.append("--no-sandbox")

        def pipes() -> None:  # Chromium reads its commands from 3 and writes answers to 4
            inp, out = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(inp, 3)
            os.dup2(out, 4)

        with open(folder / "stderr", "wb") as told:
            self.process = subprocess.Popen(
                [*words, "about:blank"],
                preexec_fn=pipes,
                close_fds=False,
                stdout=told,
                stderr=told,
                env=os.environ | {"HOME": str(folder)},
                start_new_session=True,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session = None
        found = self.call("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in found if info["type"] == "page")
        words = {"targetId": target, "flatten": True}
        self.session = self.call("Target.attachToTarget", **words)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.agent = self.evaluate("navigator.userAgent")

    def close(self) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.inp)
        os.close(self.out)

    def call(self, method: str, **words: Any) -> Any:
        """A command of the protocol, and its answer; RuntimeError where it is refused."""
        number = next(self.counter)
        message = {"id": number, "method": method, "params": words}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while number not in self.answers:
            self._read(until)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self, until: float) -> None:
        """Takes what Chromium says next."""
        while b"\0" not in self.left:
            if not select.select([self.inp], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer")
            part = os.read(self.inp, 1 << 20)
            if not part:
                raise EOFError((self.folder / "stderr").read_text(errors="replace")[-2000:])
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        message = json.loads(text)
        if "id" in message:
            self.answers[message["id"]] = message
            return
        told = message["params"]
        if message["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(a.get("value")) for a in told["args"]))
        elif message["method"] == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", str(details)))
        elif message["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, address: str, language: str = "en-US") -> None:
        """Another page, in a window of 1200 x 800. language: what navigator.language says."""
        words = {"userAgent": self.agent, "acceptLanguage": language}
        self.call("Emulation.setUserAgentOverride", **words)
        self.size(1200, 800)
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def evaluate(self, code: str) -> Any:
        """The value of an expression, of a promise its outcome. RuntimeError for what it throws."""
        words = {"expression": code, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", **words)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = 30) -> None:
        """Waits until an expression is true; AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                page = self.evaluate("document.body.innerText")
                raise AssertionError(f"{condition} is not so after {seconds} s: {page}")
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, number, text = KEYS[key]
        words = {"key": " " if key == "Space" else key, "code": code, "modifiers": modifiers}
        words |= {"windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **words)
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A mouse press in the middle of an element, which must be in view and not covered."""
        found = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'nearest'});"
            "const box = node.getBoundingClientRect();"
            "const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];"
            "return [x, y, node.contains(document.elementFromPoint(x, y))]; })()"
        )
        assert found[2], f"{selector} is covered or out of view"
        words = {"x": found[0], "y": found[1], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **words)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **words)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def downloads(self) -> Path:
        """The folder into which files are saved from now on."""
        folder = self.folder / "downloads"
        folder.mkdir(exist_ok=True)
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        return folder

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        words = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **words)

    def dark(self, on: bool) -> None:
        """What the system's colours are."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path) -> None:
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def controls(self) -> list[tuple[str, str]]:
        """(role, name) of what can be reached by the keyboard, as screen readers are told."""
        found = []
        for node in self.call("Accessibility.getFullAXTree")["nodes"]:
            facts = {
                fact["name"]: fact["value"].get("value") for fact in node.get("properties", [])
            }
            role = node.get("role", {}).get("value")
            if facts.get("focusable") and role != "RootWebArea" and not node.get("ignored"):
                found.append((role, node.get("name", {}).get("value", "")))
        return found
