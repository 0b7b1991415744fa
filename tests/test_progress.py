"""Progress bars: nothing waits for a process that is gone."""

import io
import os
import signal
import sys
import threading

from glmlora.progress import bar, say


def test_a_killed_child_that_was_drawing_holds_up_nobody(capsys):
    """It has the lock at that moment; the locks of tqdm itself are shared by processes."""
    for _ in bar(range(2), desc="before"):
        pass
    child = os.fork()
    if child == 0:
        shown = bar(range(2))
        shown.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    done = threading.Thread(target=lambda: list(bar(range(3), desc="after")), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()
    assert "after: 100%" in capsys.readouterr().err


def test_a_child_of_a_process_that_is_drawing_draws():
    """The parent's lock is held by a thread that the child does not have."""
    shown = bar(range(2))
    held, go = threading.Event(), threading.Event()

    def hold():
        with shown.get_lock():
            held.set()
            go.wait(20)

    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        list(bar(range(3)))
        os._exit(7)
    _, status = os.waitpid(child, 0)
    go.set()
    assert os.waitstatus_to_exitcode(status) == 7


def test_no_thread_watches():
    with bar(total=3) as shown:
        shown.update()
        assert not [t for t in threading.enumerate() if "tqdm" in t.name.lower()]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_stands_above_the_bar(monkeypatch):
    """Both streams are one terminal: what a bar has drawn is cleared first."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with bar(range(2), mininterval=0) as shown:
        shown.update()
        say("half")
    lines = screen.getvalue().split("half\n")
    assert len(lines) == 2 and lines[0].rpartition("\r")[2] == "" and "1/2" in lines[1]


def test_notices_are_not_red_in_jupyter(monkeypatch, capsys):
    from glmlora import progress
    from glmlora.model import device

    for inside, out, err in ((True, "products in int8", ""), (False, "", "products in int8")):
        monkeypatch.setattr(progress, "in_notebook", lambda inside=inside: inside)
        monkeypatch.setattr(device, "compute_dtype", lambda *_: "int8")
        monkeypatch.setattr(device, "_announced", {"kernels"})
        device.backend_of("cpu", None, [])
        shown = capsys.readouterr()
        assert (shown.out[: len(out)], shown.err[: len(err)]) == (out, err)
        assert bool(shown.out) == inside
