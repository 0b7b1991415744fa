"""Progress bars: nothing waits for a process that is gone."""

import os
import signal
import threading

from glmlora.progress import bar


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
