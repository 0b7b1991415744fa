"""The page of the server in a real browser: both tabs, both languages, by mouse and by keyboard,
against a server without a model. No test may leave a complaint of the browser behind: an error, a
thrown exception, something that the Content Security Policy forbids."""

import csv
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from browser import SHIFT, Browser
from fake_server import ANSWER, PAGE, POLICY, Server

import glmlora
from glmlora.files.rows import read_rows
from glmlora.templates import fill_template
from glmlora.tools.project import tiny_directory

IDLE = "document.querySelector('.assistant') && !document.querySelector('.busy')"
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.hold.set()
    server.close()


@pytest.fixture
def page(window, server):
    """The page, opened; each server has a port and so a store of its own."""
    visit(window, server)
    yield window
    assert window.complaints == []


def leave(window):
    """Ends the page before, which may have asked a server that has gone since."""
    window.open("about:blank")
    window.complaints.clear()


def visit(window, server, language="en-US", tab=""):
    leave(window)
    window.open(server.address + tab, language)
    window.until("document.querySelector('#model').options.length")


def text(page, selector):
    return page.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText")


def fill(page, selector, value):
    """Types into a field as a user does: in place of what is there."""
    page.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
    page.type(value)


def ask(page, question):
    page.evaluate("document.querySelector('#question').focus()")
    page.type(question)
    page.press("Enter")


def focused(page):
    return page.evaluate(
        "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
        " || document.activeElement.innerText"
    )


def tab_to(page, name, most=40):
    for _ in range(most):
        if focused(page) == name:
            return
        page.press("Tab")
    raise AssertionError(f"{name} is not reached by Tab; the last was {focused(page)}")


def choose(page, model):
    """As the browser does after a choice in the list, which is a window of its own."""
    page.evaluate(f"document.querySelector('#model').value = '{model}'")
    for event in ("input", "change"):
        page.evaluate(f"document.querySelector('#model').dispatchEvent(new Event('{event}'))")


# Chat


@pytest.mark.parametrize(
    "language, send, thoughts", [("en-US", "Send", "Thoughts"), ("zh-CN", "发送", "思考过程")]
)
def test_chat(window, server, language, send, thoughts):
    visit(window, server, language)
    assert text(window, "#send") == send
    assert window.evaluate("document.documentElement.lang").startswith(language[:2])
    ask(window, "think in markdown")
    window.until(IDLE)
    assert text(window, ".thought summary") == thoughts
    assert not window.evaluate("document.querySelector('.thought').open")
    window.click(".thought summary")
    assert "First this, then that." in text(window, ".thought")
    [(path, body)] = server.asked
    assert path == "/v1/chat/completions" and body["stream"] and body["model"] == "base"
    assert body["messages"] == [{"role": "user", "content": "think in markdown"}]
    assert not {"temperature", "top_p", "max_tokens", "tools"} & set(body)  # the model's own
    assert "12" in text(window, ".foot")  # tokens, which came at once: no speed is told
    assert not re.search("second|每秒", text(window, ".foot"))
    window.click("#language")
    assert text(window, "#send") != send and text(window, ".thought summary") != thoughts
    window.open(server.address, language)  # what was chosen holds
    window.until(IDLE)
    assert text(window, "#send") != send
    assert window.complaints == []


def test_speed_is_told_of_answers_that_take_time(page):
    ask(page, "steady " + "x" * 100)
    page.until(IDLE)
    told = re.search(r"12 tokens, ([\d.]+) a second", text(page, ".foot"))
    assert told and 2 < float(told[1]) < 11 / 0.5  # 11 tokens behind the first


def test_markdown_is_only_ever_text(page):
    ask(page, "markdown")
    page.until(IDLE)
    tags = page.evaluate("[...document.querySelectorAll('.body *')].map((node) => node.localName)")
    assert {"h3", "strong", "em", "code", "a", "ol", "ul", "blockquote", "table", "pre"} <= set(
        tags
    )
    assert not {"b", "script", "img", "iframe"} & set(tags)
    shown = text(page, ".assistant .body")
    assert "<b>no markup</b> &" in shown and "[no link](javascript:void)" in shown
    assert 'print("<script>alert(1)</script>")' in shown
    links = page.evaluate("[...document.querySelectorAll('.body a')].map((a) => [a.href, a.rel])")
    assert links == [["https://example.org/a", "noopener noreferrer"]]
    nested = page.evaluate("document.querySelector('.body ol > li:nth-child(2) > ul').innerText")
    assert nested == "inside"


ODD = [  # (a text, what is shown of it where that is not what was meant by its marks)
    ("a_b_c 2*3*4 ** x", "a_b_c 2*3*4 ** x"),
    ("**bold *both* **", None),
    ("> " * 500 + "deep", None),
    ("- " * 500 + "deep", None),
    ("`" * 3000, None),
    ("[" * 3000, None),
    ("*" * 3000 + "a", None),
    ("```\nnever closed", "never closed"),
    ("| a |\nno table", "| a |\nno table"),
    ("1) one\n2) two\n\n3) three", "one\ntwo\nthree"),
    ("https://example.org/x。后文", "https://example.org/x。后文"),
]


def test_markdown_of_odd_text(page):
    """It ends soon, and shows what it does not know as it came."""
    for source, shown in ODD:
        code = f"""import("./page/markdown.js").then(({{ markdown }}) => {{
          const box = document.createElement("div");
          document.body.append(box);
          box.append(...markdown({json.dumps(source)}));
          for (const button of box.querySelectorAll("button")) button.remove();
          const text = box.innerText;
          box.remove();
          return text;
        }})"""
        found = page.evaluate(code)
        if shown is not None:
            assert re.sub(r"\s*\n\s*", "\n", found).strip() == shown
        letters = "[a-z]"
        assert set(re.findall(letters, source)) <= set(re.findall(letters, found))


def test_keyboard(page, server):
    """The whole of a chat without a mouse."""
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "tab-chat")
    page.press("ArrowRight")
    assert focused(page) == "tab-table" and page.evaluate("document.querySelector('#chat').hidden")
    page.press("ArrowLeft")
    assert focused(page) == "tab-chat"
    tab_to(page, "question")
    page.type("slow one")
    page.press("Enter", SHIFT)
    page.type("two")
    assert page.evaluate("document.querySelector('#question').value") == "slow one\ntwo"
    page.press("Enter")
    page.until(f"{LAST}?.innerText.includes('word word')")
    assert text(page, "#spoken") == "The model is answering."
    mark = "getComputedStyle(document.querySelector({}), '::after').width"
    assert page.evaluate(mark.format("'.busy .body > p:last-child'")) == "8px"  # behind the words
    assert page.evaluate(mark.format("'.busy .body'")) != "8px"
    assert page.evaluate("document.querySelector('#send').hidden")
    page.press("Escape")
    page.until(IDLE)
    assert server.gone.wait(10)  # the server is told, and computes no more
    assert "Stopped." in text(page, ".foot") and text(page, "#spoken") == "Stopped."
    assert focused(page) == "question"
    page.type("hello")
    page.press("Enter")
    page.until(f"{LAST}.innerText.includes('You said: hello')")
    page.until(IDLE)
    assert text(page, "#spoken") == "You said: hello"  # once, when it is whole
    roles = [m["role"] for m in server.asked[-1][1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    tab_to(page, "Delete slow one two")
    page.press("Enter")
    page.until("document.querySelector('#sure-dialog').open")
    tab_to(page, "Delete")
    page.press("Enter")
    page.until("!document.querySelector('#chat-list li')")
    assert not page.evaluate("Object.keys(localStorage).some((name) => name.includes('.chat.'))")


@pytest.mark.parametrize("tab", ["#chat", "#table"])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_every_control_has_a_name(window, server, language, tab):
    visit(window, server, language, tab)
    controls = window.controls()
    assert len(controls) > 10
    assert [role for role, name in controls if not name.strip()] == []
    if language == "zh-CN":
        own = {"English", "Top p", "base", "papers"}
        english = [name for _, name in controls if not re.search("[一-鿿]", name)]
        assert set(english) <= own, english
    live = window.evaluate("[...document.querySelectorAll('[aria-live=polite]')].length")
    assert live == 1
    assert window.complaints == []


def test_words_of_an_input_method_are_not_sent(page, server):
    """Enter that picks a Chinese word is none that sends."""
    page.evaluate("document.querySelector('#question').focus()")
    page.type("你")
    event = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.querySelector('#question').dispatchEvent({event})")
    assert page.evaluate("document.querySelector('#question').value") == "你"
    page.press("Enter")
    page.until(IDLE)
    assert server.asked[0][1]["messages"][0]["content"] == "你"


def test_settings_are_sent_and_kept(page, server):
    choose(page, "papers")
    values = {"system": "Be short.", "temperature": "0", "top_p": "0.5", "max_tokens": "7"}
    for name, value in values.items():
        fill(page, f"#{name}", value)
    ask(page, "hi")
    page.until(IDLE)
    page.open(server.address)
    page.until("document.querySelector('#model').value === 'papers'")
    ask(page, "again")
    page.until("document.querySelectorAll('.assistant').length === 2 && " + IDLE)
    for _, body in server.asked:
        assert body["model"] == "papers"
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.5, 7)
        assert body["messages"][0] == {"role": "system", "content": "Be short."}
    fill(page, "#temperature", "9")
    ask(page, "refused")
    time.sleep(0.1)
    assert len(server.asked) == 2 and focused(page) == "temperature"


def test_conversations_stay_and_go(page, server):
    for question in ("first", "second"):
        page.click("#new-chat")
        ask(page, question)
        page.until(IDLE)
    page.open(server.address)
    page.until("document.querySelectorAll('#chat-list li').length === 2")
    assert text(page, "#chat-list li .title") == "second"
    page.click("#chat-list li:nth-child(2) .title")
    assert text(page, ".user .body") == "first"
    ask(page, "third")
    page.until("document.querySelectorAll('.assistant').length === 2 && " + IDLE)
    said = [m["content"] for m in server.asked[-1][1]["messages"]]
    assert said == ["first", "You said: first", "third"]
    page.click("#delete-all")
    page.until("document.querySelector('dialog[open]')")
    page.press("Escape")  # not sure
    page.until("!document.querySelector('dialog[open]')")
    assert page.evaluate("document.querySelectorAll('#chat-list li').length") == 2
    page.click("#delete-all")
    page.until("document.querySelector('dialog[open]')")
    page.click("#sure-dialog .danger")
    page.until("!document.querySelector('#chat-list li') && document.querySelector('.welcome')")
    page.open(server.address)
    page.until("document.querySelector('.welcome')")


def test_an_answer_that_fails_is_asked_again(page, server):
    ask(page, "error")
    page.until(IDLE)
    assert text(page, ".foot .wrong") == "the model fell over"
    assert text(page, ".assistant .body") == "half an"
    page.click(".foot button")
    page.until("document.querySelectorAll('.assistant').length === 1 && " + IDLE)
    assert [len(body["messages"]) for _, body in server.asked] == [1, 1]


def test_tools(page, server):
    before = page.evaluate("document.querySelector('#system').clientHeight")
    page.evaluate("document.querySelector('#settings details').open = true")
    page.size(1200, 600)  # the side is scrolled, not squeezed
    assert page.evaluate("document.querySelector('#system').clientHeight") == before > 60
    fill(page, "#tools", "{}")
    ask(page, "tool")
    page.until("document.querySelector('#tools-wrong').innerText.includes('list')")
    assert not server.asked
    tools = [{"type": "function", "function": {"name": "weather"}}]
    fill(page, "#tools", json.dumps(tools))
    page.evaluate("document.querySelector('#question').focus()")
    page.press("Enter")
    page.until("document.querySelector('.call form')")
    assert "Calls weather" in text(page, ".call") and '"city": "Paris"' in text(page, ".call pre")
    page.evaluate("document.querySelector('.call textarea').focus()")
    page.type("rain")
    page.press("Tab")
    page.press("Enter")
    page.until("document.querySelectorAll('.assistant').length === 2 && " + IDLE)
    assert server.asked[0][1]["tools"] == tools
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert server.asked[1][1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]


def test_key(window):
    server = Server(key="secret")
    leave(window)
    window.open(server.address)
    window.until("document.querySelector('#key-dialog').open")
    window.type("wrong")
    window.press("Enter")
    while server.refused < 2:
        time.sleep(0.01)
    window.until("document.querySelector('#key-dialog').open")
    fill(window, "#key-input", "secret")
    window.press("Enter")
    window.until("document.querySelector('#model').options.length")
    ask(window, "hi")
    window.until(IDLE)
    assert not window.evaluate("JSON.stringify(localStorage).includes('secret')")
    server.close()
    assert all("401" in told for told in window.complaints)  # the browser's own line of each


def test_a_server_that_is_away(window, server):
    visit(window, server)
    server.close()
    ask(window, "hi")
    window.until(IDLE)
    assert text(window, ".foot .wrong") == "The server cannot be reached."
    assert all("net::ERR_" in told for told in window.complaints)


def test_narrow(page):
    """On a phone nothing is wider than the screen, and the sides open and close."""
    page.size(320, 640, mobile=True)
    ask(page, "think in markdown")
    page.until(IDLE)
    for tab in ("chat", "table"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.click("#show-settings")
        assert focused(page) == "model"
        page.press("Escape")
        assert focused(page) == "show-settings"
        assert page.evaluate("getComputedStyle(document.querySelector('aside')).display") == "none"


def test_narrow_table(page, tmp_path):
    """Words of a table stay whole: it is scrolled, not squeezed."""
    page.size(400, 800, mobile=True)
    path = tmp_path / "a.csv"
    cells = ["Randomised examination of sleep", "胰岛素与睡眠的关系：一项随机对照试验研究"] * 3
    path.write_text(f"{','.join('abcdef')}\n{','.join(cells)}\n", encoding="utf-8")
    page.click("#tab-table")
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview table')")
    widths = "[...document.querySelectorAll('#preview td .short')].map((cell) => cell.clientWidth)"
    assert min(page.evaluate(widths)) >= 9 * 16
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    box = "document.querySelector('#template')"
    assert page.evaluate(f"{box}.clientHeight >= {box}.scrollHeight")  # six lines, all seen


def test_colours(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    page.dark(False)
    light = page.evaluate(ground)
    page.dark(True)
    dark = page.evaluate(ground)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.dark(False)
    page.click("#theme")
    assert page.evaluate(ground) == dark
    page.click("#theme")
    assert page.evaluate(ground) == light


# Table


def start(page, path, template="Medical? {title}", labels="1, 0"):
    page.click("#tab-table")
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview table')")
    fill(page, "#template", template)
    fill(page, "#labels", labels)
    page.click("#run")


FINISHED = (
    "document.querySelector('#cancel').hidden && !document.querySelector('#download').disabled"
)


def saved(page):
    """The bytes of the csv that the page saves."""
    folder = page.downloads()
    page.click("#download")
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = [path for path in folder.iterdir() if path.suffix == ".csv"]
        if found:
            data = found[0].read_bytes()
            found[0].unlink()
            return found[0].name, data
        time.sleep(0.02)
    raise AssertionError("nothing was saved")


TITLES = ["Insulin and sleep", 'A "GPU",\nsorted', " spaces ", "胰岛素 insulin", ""]


@pytest.mark.parametrize("language, rows", [("en-US", "5 of 5 rows"), ("zh-CN", "5 / 5 行")])
def test_table(window, server, tmp_path, language, rows):
    visit(window, server, language)
    path = tmp_path / "papers.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        writer = csv.writer(f)
        writer.writerows([["id", "title"], *enumerate(TITLES)])
    start(window, path)
    window.until(FINISHED)
    assert text(window, "#progress-told") == rows
    name, data = saved(window)
    assert name == "papers-answers.csv" and data.startswith(b"\xef\xbb\xbf") and b"\r\n" in data
    found = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    assert found[0] == ["id", "title", "label", "proba_1", "proba_0"]
    assert [row[1] for row in found[1:]] == TITLES
    assert [row[2:] for row in found[1:]] == [
        ["1", "0.9", "0.1"] if "insulin" in title.lower() else ["0", "0.1", "0.9"]
        for title in TITLES
    ]
    [(path, body)] = server.asked
    assert path == "/v1/classify" and body["labels"] == ["1", "0"]
    assert body["input"] == [f"Medical? {title}" for title in TITLES]
    assert set(text(window, "#counts").split("\n")) == {"1: 2", "0: 3"}
    assert window.complaints == []


def test_table_in_words_of_the_model(page, server, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title;n\nx;1\ny;2\n")
    page.click("#tab-table")
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview table')")
    page.click("#columns button:nth-child(2)")  # puts {n} behind what is there
    assert text(page, "#example") == "title: x\nn: 11"
    page.click("[name=kind][value=text]")
    fill(page, "#system", "Be short.")
    fill(page, "#template", "{{Say}} {title}")
    page.click("#run")
    page.until(FINISHED)
    assert saved(page)[1] == b"title;n;answer\nx;1;said {Say} x\ny;2;said {Say} y\n"
    assert all(b["messages"][0]["content"] == "Be short." for _, b in server.asked)


def test_what_a_model_was_trained_with_is_suggested(page, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,n\nx,1\n")
    page.click("#tab-table")
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview table')")
    fields = "[document.querySelector('#template').value, document.querySelector('#labels').value]"
    assert page.evaluate(fields) == ["title: {title}\nn: {n}", ""]
    choose(page, "papers")
    assert page.evaluate(fields) == ["Medical? {title}", "1, 0"]
    choose(page, "base")
    assert page.evaluate(fields) == ["title: {title}\nn: {n}", ""]
    fill(page, "#labels", "my, own")
    choose(page, "papers")
    assert page.evaluate(fields) == ["Medical? {title}", "my, own"] and not text(page, "#trained")
    path.write_text("titel,n\nx,1\n")  # other columns: what was asked is told at least
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview').innerText.includes('titel')")
    assert page.evaluate(fields)[0] == "titel: {titel}\nn: {n}"
    assert "trained with this question: Medical? {title}" in text(page, "#trained")


def test_table_goes_on_where_it_was_cancelled(page, server, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title\n" + "".join(f"paper {i}\n" for i in range(100)))
    start(page, path)
    page.until("document.querySelector('#progress').value === 100")
    first = len(server.asked)
    fill(page, "#labels", "yes, no")  # another question: all anew
    server.hold.clear()
    page.click("#run")
    page.until("!document.querySelector('#cancel').hidden")
    while len(server.asked) < first + 2:
        time.sleep(0.01)
    page.click("#cancel")
    page.until("document.querySelector('#cancel').hidden")
    assert text(page, "#progress-told") == "0 of 100 rows, stopped"
    server.hold.set()
    page.click("#run")
    page.until(FINISHED)
    assert text(page, "#progress-told") == "100 of 100 rows"
    sent = [row for _, body in server.asked[first + 2 :] for row in body["input"]]
    assert sorted(sent) == sorted(f"Medical? paper {i}" for i in range(100))


def test_table_rows_that_are_refused_and_a_server_that_is_busy(page, server, tmp_path):
    path = tmp_path / "a.csv"
    titles = ["one", "too long", "three", "busy"]
    path.write_text("title\n" + "\n".join(titles) + "\n")
    start(page, path)
    page.until(FINISHED)
    assert text(page, "#progress-told") == "4 of 4 rows; 1 could not be answered"
    wrong = page.evaluate(
        "[...document.querySelectorAll('#results .wrong')].map((td) => [td.innerText, td.colSpan])"
    )
    assert wrong == [["input: too long", 3]]  # in the place of label and both probabilities
    rows = [line.split(",")[1] for line in saved(page)[1].decode().splitlines()]
    assert rows == ["label", "0", "", "0", "0"]
    before = len(server.asked)
    page.click("#run")  # only what could not be answered is asked again
    page.until("document.querySelector('#cancel').hidden")
    assert [body["input"] for _, body in server.asked[before:]] == [["Medical? too long"]]
    # the browser's own lines of the refusals
    assert len(page.complaints) == 4
    assert all(re.search(r"status of (400|503)", told) for told in page.complaints)
    page.complaints.clear()


def test_what_is_missing_is_told(page, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,n\nx,1\n")
    page.click("#tab-table")
    page.click("#run")
    assert text(page, "#wrong") == "There is no table with rows yet."
    page.choose_file("#file", path)
    page.until("document.querySelector('#preview table')")
    for template, told in (
        ("about {titel}", "“titel” is no column; there are: title, n."),
        ("about {title", "A brace stands alone"),
        ("about nothing", "The question names no column"),
        ("{title}", "Labels: expected at least two"),
    ):
        fill(page, "#template", template)
        beside = text(page, "#template-wrong")
        broken = "titel" in template or "{" in template and "}" not in template
        assert beside.startswith(told) if broken else beside == ""
        invalid = page.evaluate("document.querySelector('#template').ariaInvalid")
        assert invalid == str(broken).lower()
        page.click("#run")
        assert text(page, "#wrong").startswith(told)
    fill(page, "#labels", "a, a")
    page.click("#run")
    assert text(page, "#wrong") == "Labels: one stands there twice."


def test_table_by_keyboard(page, server, tmp_path):
    """A file that is dropped or chosen, and the rest without a mouse."""
    page.click("#tab-table")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "file")  # where Space opens the browser's own window of files
    went = page.evaluate(
        """(() => {
          const moved = new DataTransfer();
          moved.items.add(new File(["title,n\\ninsulin,1\\nGPU,2\\n"], "b.csv"));
          const how = { dataTransfer: moved, bubbles: true, cancelable: true };
          const node = document.querySelector("#drop strong");
          const events = ["dragover", "drop"].map((name) => new DragEvent(name, how));
          return events.map((event) => node.dispatchEvent(event));
        })()"""
    )
    assert went == [False, False]  # the browser does not open the file in place of the page
    page.until("document.querySelector('#preview table')")
    assert text(page, "#file-told") == "b.csv: 2 rows, 2 columns."
    tab_to(page, "n")  # the column's button
    page.press("Space")
    assert focused(page) == "template"
    tab_to(page, "labels")
    page.type("1, 0")
    tab_to(page, "run")
    page.press("Enter")
    page.until(FINISHED)
    assert focused(page) == "download" and text(page, "#progress-told") == "2 of 2 rows"
    assert [row["label"] for row in csv.DictReader(io.StringIO(saved(page)[1].decode()))] == [
        "1",
        "0",
    ]
    page.evaluate("document.querySelector('[name=kind]').focus()")
    page.press("ArrowDown")
    assert page.evaluate("document.querySelector('#labels-row').hidden")
    assert len(server.asked) == 1


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!(own || node.placeholder) || !node.checkVisibility({ opacityProperty: true })) continue;
    if (node.closest(":disabled, .hidden")) continue;
    let under = node;
    while (rgba(getComputedStyle(under).backgroundColor)[3] < 255) under = under.parentElement;
    const colour = getComputedStyle(node, node.value === "" ? "::placeholder" : null).color;
    const two = [colour, getComputedStyle(under).backgroundColor].map((c) => light(rgba(c)));
    const ratio = (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
    const name = node.id || node.className || node.localName;
    found.push([ratio, name, node.textContent.slice(0, 30)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(page, tmp_path, dark):
    """Contrast of 4.5 or more (WCAG AA) of all that is seen, in both tabs."""
    page.dark(dark)
    ask(page, "think in markdown")
    page.until(IDLE)
    page.click(".thought summary")
    ask(page, "error")
    page.until("document.querySelector('.foot .wrong')")
    seen = page.evaluate(CONTRAST)
    path = tmp_path / "a.csv"
    path.write_text("title\ninsulin\n")
    start(page, path)
    page.until(FINISHED)
    fill(page, "#template", "{titel}")
    seen += page.evaluate(CONTRAST)
    page.dark(False)
    names = {name for _, name, _ in seen}
    assert {"send", "wrong", "template-wrong", "hint", "th", "system", "keys"} <= names
    assert [row for row in seen if row[0] < 4.5] == []


# With a model


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """The address of `glmlora serve` with glm-tiny."""
    for name in ("fastapi", "uvicorn", "pydantic"):
        pytest.importorskip(name, reason='needs pip install "glmlora[serve]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(tiny_directory()), "--name", "tiny", "--port", str(port)]
    words += ["--rows", "2", "--context", "512", "--compute_dtype", "float32"]
    with open(tmp_path_factory.mktemp("serving") / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "glmlora", *words], stderr=log)
    address = f"http://127.0.0.1:{port}/"
    while process.poll() is None:
        try:
            urllib.request.urlopen(address + "health")
            break
        except OSError:
            time.sleep(0.05)
    yield address
    process.terminate()
    assert process.wait(30) == 0


def test_page_of_the_real_server(window, serving, tmp_path):
    """What the page shows is what `chat` and `classify` say."""
    assert urllib.request.urlopen(serving).headers["Content-Security-Policy"] == POLICY
    model = glmlora.AutoModel.from_pretrained(tiny_directory(), compute_dtype="float32").eval()
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_directory())
    leave(window)
    window.open(serving)
    window.until("document.querySelector('#model').value === 'tiny'")
    for name, value in (("temperature", "0"), ("max_tokens", "12")):
        fill(window, f"#{name}", value)
    ask(window, "What is insulin?")
    window.until(IDLE)
    ids = tokenizer.build_prompt("What is insulin?")
    limit = len(tokenizer(ids)["input_ids"]) + 12
    said, _ = model.chat(tokenizer, "What is insulin?", do_sample=False, max_length=limit)
    assert said and text(window, ".assistant .body").split() == said.split()
    titles = ["Insulin and sleep", "Sorting on a GPU", "胰岛素"]
    path = tmp_path / "a.csv"
    path.write_text("title\n" + "\n".join(titles) + "\n", encoding="utf-8")
    start(window, path)
    window.until(FINISHED)
    found = list(csv.DictReader(io.StringIO(saved(window)[1].decode())))
    rows = [{"title": title} for title in titles]
    weighed = model.classify(tokenizer, rows, labels=[1, 0], template="Medical? {title}")
    assert [row["label"] for row in found] == weighed.label
    proba = [[float(row["proba_1"]), float(row["proba_0"])] for row in found]
    assert np.allclose(proba, weighed.proba, atol=1e-5)
    assert window.complaints == []


# The reader of tables against the package's own


def read(page, data: bytes):
    """{columns, rows, separator, newline} as the page reads a file, or its error in words."""
    return page.evaluate(
        f"""import("./page/csv.js").then((csv) => {{
          try {{
            return csv.parse(csv.decode(new Uint8Array({list(data)})).text);
          }} catch (error) {{ return error.message; }}
        }})"""
    )


@pytest.mark.filterwarnings("ignore")
def test_tables_are_read_as_by_the_package(page, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.csv"
    marks = [*("a,b", ",c\n", "\n", "\r\n", "d,", '"a,b"', '"\n"', '"'), *',;\t "你', '""']
    agreed = 0
    for _ in range(300):
        body = "".join(rng.choice(marks, rng.integers(0, 9)))
        data = f"x,y\n{body}".encode()
        path.write_bytes(data)
        found = read(page, data)
        try:
            rows = read_rows(str(path))
        except ValueError:
            assert isinstance(found, str), (data, found)
            continue
        assert [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]] == rows, (
            data
        )
        agreed += bool(rows)
    assert agreed > 60


def test_encodings(page):
    table = "标题,标签\n胰岛素与睡眠,医学\n显卡排序,计算机\n"
    for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
        found = read(page, table.encode(encoding))
        assert found["columns"] == ["标题", "标签"] and found["rows"][1] == ["显卡排序", "计算机"]


def test_what_is_no_table(page):
    for data, told in (
        (b"PK\x03\x04 and so on", "Excel"),
        (b"a,b\n\xff\xff\xff", "no text"),
        (b"a\0b", "no text"),
        (b"", "empty"),
        (b"a,a\n1,2\n", "twice"),
        (b"a,b\n1,2\n\n1,2,3\n", "Line 4: expected 2 cells"),
        (b'a,b\n1,"2\n3,4\n', "Line 2: a quote"),
    ):
        assert told in read(page, data)


def test_tables_are_written_so_that_python_reads_them(page):
    cells = ["a", "", 'q"q', "l\nl", "l\rl", "c,c", " s ", "s;s", "t\tt"]
    for separator in ",;\t":
        for width in (1, 3):
            rows = [cells[i : i + width] for i in range(0, len(cells), width)]
            words = f"{json.dumps(['x'] * width)}, {json.dumps(rows)}, {json.dumps(separator)}"
            written = page.evaluate(f"import('./page/csv.js').then((c) => c.write({words}, '\\n'))")
            found = list(csv.reader(io.StringIO(written, newline=""), delimiter=separator))
            assert found[1:] == rows
            assert len(found[0]) == width


def test_questions_are_made_as_by_the_package(page):
    row = {"a b": "1", "题": "{x}", "c": ""}
    for template in ("{a b}{题}", "{{{c}}}", "x", "{题} }} {{ {a b}"):
        words = f"{json.dumps(template)}, {json.dumps(list(row))}"
        code = f"c.fill(c.pieces({words}), {json.dumps(list(row.values()))})"
        found = page.evaluate(f"import('./page/csv.js').then((c) => {code})")
        assert found == fill_template(template, [row])[0]


# The files as they are


def test_every_sentence_is_there_in_chinese():
    texts = (PAGE / "texts.js").read_text(encoding="utf-8")
    table = texts[texts.index("const ZH = {") : texts.index("\n};")]
    pairs = re.findall(r'^  (?:"([^"]+)"|(\w+)): "([^"]+)",$', table, re.MULTILINE)
    chinese = {quoted or word: translated for quoted, word, translated in pairs}
    assert len(chinese) == table.count("\n  ")
    used = set()
    for path in PAGE.glob("*.js"):
        used |= set(re.findall(r'\bt\("([^"]+)"', path.read_text(encoding="utf-8")))
    used |= set(re.findall(r'^  \["[^"]+", "([^"]+)"\],$', (PAGE / "csv.js").read_text(), re.M))
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    used |= set(re.findall(r"data-text(?: \w+)?>([^<]+)<", html))
    used |= set(re.findall(r'data-(?:label|hint)="([^"]+)"', html))
    assert used == set(chinese)
    for sentence, translated in chinese.items():
        places = set(re.findall(r"\{\w+\}", sentence)) - {"{column}", "{title}"}
        assert places <= set(re.findall(r"\{\w+\}", translated)), sentence


def test_nothing_from_outside_and_no_markup_from_text():
    for path in PAGE.iterdir():
        source = path.read_text(encoding="utf-8")
        assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval\\(", source), (
            path
        )
        assert not re.search(r"""(src|href|url|import|from)[\s=("']+(https?:)?//""", source), path
        if path.suffix == ".html":
            assert not re.search(r"<style|<script>|\sstyle=|\son\w+=", source)
    assert ANSWER.count("<script>") == 1  # what test_markdown_is_only_ever_text shows as text
