"""What `get_ipython()` gives in a cell: the part of IPython's shell that notebooks use."""

from __future__ import annotations
import __future__

import ast
import asyncio
import builtins
import contextlib
import inspect
import io
import keyword
import linecache
import os
import re
import string
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ..names import did_you_mean
from . import children
from .source import to_python

LineMagic = Callable[["Shell", str], Any]
CellMagic = Callable[["Shell", str, str], Any]


class UsageError(Exception):
    """A command of a cell that cannot be run; the message names it."""


class SList(list[str]):
    """Lines of a command's output: `.l` the list, `.n` and `.s` joined by newlines or spaces, `.p`
    those that are paths."""

    @property
    def l(self) -> list[str]:  # noqa: E743
        return self

    @property
    def n(self) -> str:
        return "\n".join(self)

    @property
    def s(self) -> str:
        return " ".join(self)

    @property
    def p(self) -> list[Path]:
        return [Path(line) for line in self if os.path.exists(line)]

    list, nlstr, spstr, paths = l, n, s, p

    def grep(self, pattern: str | Callable[[str], Any], prune: bool = False) -> SList:
        """The lines in which the pattern is found; with `prune`, the others."""
        found = pattern if callable(pattern) else re.compile(pattern, re.IGNORECASE).search
        return SList(line for line in self if bool(found(line)) != prune)

    def fields(self, *numbers: int) -> Any:
        """Words of each line: all as a list, or those numbered, joined by spaces."""
        words = [line.split() for line in self]
        if not numbers:
            return words
        return SList(" ".join(w[i] for i in numbers if -len(w) <= i < len(w)) for w in words if w)


class _Expander(string.Formatter):
    """`{expression}` and `$name` in commands; `$$name` is the command's own `$name`."""

    dollar = re.compile(r"(.*?)\$(\$?[\w\.]+)(?=([^']*'[^']*')*[^']*$)")

    def parse(self, text: str) -> Iterator[Any]:
        for literal, field, spec, conversion in super().parse(text):
            kept, end = "", 0
            for match in self.dollar.finditer(literal):
                kept, end = kept + match[1], match.end()
                if match[2].startswith("$"):
                    kept += match[2]
                else:
                    yield kept, match[2], "", None
                    kept = ""
            yield kept + literal[end:], field, spec, conversion

    def expand(self, text: str, names: Mapping[str, Any]) -> str:
        done = []
        for literal, field, spec, conversion in self.parse(text):
            done.append(literal)
            if field is not None:
                expression = f"{field}:{spec}" if spec else field  # a slice
                value = self.convert_field(eval(expression, dict(names)), conversion)
                done.append(format(value))
        return "".join(done)


class Events:
    """Functions that a cell asked to be called before or after each cell."""

    names = ("pre_execute", "pre_run_cell", "post_execute", "post_run_cell")

    def __init__(self) -> None:
        self.functions: dict[str, list[Callable[..., Any]]] = {n: [] for n in self.names}

    def register(self, event: str, function: Callable[..., Any]) -> None:
        if event not in self.functions:
            raise UsageError(f"events: {event!r} does not happen here; {', '.join(self.names)} do")
        self.functions[event].append(function)

    def unregister(self, event: str, function: Callable[..., Any]) -> None:
        self.functions[event].remove(function)

    def trigger(self, event: str) -> None:
        for function in list(self.functions[event]):
            function(*[None] * len(inspect.signature(function).parameters))


class Shell:
    """Runs source in the namespace of a notebook (or of a script, where nothing but the methods is
    used)."""

    def __init__(
        self,
        name: str,
        namespace: dict[str, Any],
        line_magics: Mapping[str, LineMagic],
        cell_magics: Mapping[str, CellMagic],
    ):
        self.name, self.user_ns = name, namespace
        self.line_magics, self.cell_magics = dict(line_magics), dict(cell_magics)
        self.config: dict[str, Any] = {}
        self.events = Events()
        self.ast_node_interactivity = "last_expr"
        self.execution_count = 0
        self.source = ""  # of the cell that runs
        self.failed: list[str] = []  # commands that ended with a status other than 0
        self.captured: list[Any] | None = None  # values that %%capture keeps from being shown
        self._places: dict[str, str] = {}  # name of a code's file -> what messages call it
        self._flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last: Any = ""

    # -- what runs ------------------------------------------------------------------------------

    def run_notebook_cell(self, number: int, source: str) -> None:
        """One cell of the notebook: shows the value of its last expression."""
        self.execution_count, self.source = number, source
        self.user_ns.setdefault("In", [""]).append(source)
        for event in ("pre_execute", "pre_run_cell"):
            self.events.trigger(event)
        self.execute(source)
        for event in ("post_execute", "post_run_cell"):
            self.events.trigger(event)

    def execute(self, source: str, show: bool = True, where: str | None = None) -> Any:
        """Run source; show values as a cell does, or return the last expression's. `where` names
        source that is no part of the cell that runs.
        """
        where, offset = self._place(source, where)
        if "asyncio" in source:
            self.loop  # noqa: B018  (cells expect that there is one)
        text = "\n" * offset + self.python(source)
        tree: ast.Module = compile(text, where, "exec", self._flags | ast.PyCF_ONLY_AST, True)
        shown = self._shown(tree)
        value, start = None, 0
        for i, node in enumerate(tree.body):
            if node not in shown:
                continue
            self._run(ast.Module(tree.body[start:i], []), where)
            value, start = self._run(ast.Expression(node.value), where), i + 1
            if show and not _ends_silent(source):
                self.show(value)
        if start < len(tree.body):
            self._run(ast.Module(tree.body[start:], []), where)
            value = None
        return value

    def python(self, source: str) -> str:
        """Source as Python."""
        return to_python(self._automagic(source))

    def _shown(self, tree: ast.Module) -> list[ast.Expr]:
        """Statements whose values are shown."""
        found = [node for node in tree.body if isinstance(node, ast.Expr)]
        how = self.ast_node_interactivity
        if module := sys.modules.get("IPython.core.interactiveshell"):
            for word in ("all", "last_expr_or_assign", "none"):
                if module.InteractiveShell.ast_node_interactivity == word:
                    how = word
        last = tree.body[-1] if tree.body else None
        if how == "last_expr_or_assign" and isinstance(last, ast.Assign | ast.AnnAssign):
            target = last.targets[-1] if isinstance(last, ast.Assign) else last.target
            if isinstance(target, ast.Name):
                name = ast.copy_location(ast.Name(target.id, ast.Load()), last)
                last = ast.copy_location(ast.Expr(name), last)
                tree.body.append(last)
                found.append(last)
        return found if how == "all" else [n for n in found if n is last and how != "none"]

    def _run(self, tree: ast.Module | ast.Expression, where: str) -> Any:
        mode = "eval" if isinstance(tree, ast.Expression) else "exec"
        code = compile(tree, where, mode, self._flags, True)
        self._flags |= code.co_flags & __future__.annotations.compiler_flag
        value = eval(code, self.user_ns)
        if code.co_flags & inspect.CO_COROUTINE:
            return self.loop.run_until_complete(value)
        return value

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all cells."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        return self._loop

    def close(self) -> None:
        """Forget the code of the cells, end what still runs in the event loop."""
        for where in self._places:
            linecache.cache.pop(where, None)
        if self._loop is not None and not self._loop.is_closed():
            asyncio.set_event_loop(self._loop)  # a cell's asyncio.run leaves none
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()
            asyncio.set_event_loop(None)

    def _automagic(self, source: str) -> str:
        """A cell of one line such as `pip install x` is a magic unless the name means something."""
        match = re.fullmatch(r"([a-z_]\w*)(?:\s+[^\s=].*)?", source.strip())
        name = match[1] if match else ""
        known = name in self.user_ns or hasattr(builtins, name) or keyword.iskeyword(name)
        return "%" + source.strip() if name in self.line_magics and not known else source

    def _place(self, source: str, where: str | None) -> tuple[str, int]:
        """The name of the code's file, where tracebacks find its lines, and the lines above it."""
        cell = f"{self.name}[cell {self.execution_count}]"
        body = source.strip("\n")
        at = -1 if where else self.source.rfind(body)
        whole, offset = source, 0
        if at >= 0:
            where, whole = cell, self.source
            offset = whole[:at].count("\n") - (len(source) - len(source.lstrip("\n")))
        elif where is None:
            where = f"{cell}, text {len(self._places)}"
        self._places[where] = where if at < 0 else f"cell {self.execution_count}"
        lines = [line + "\n" for line in whole.split("\n")]
        linecache.cache[where] = (len(whole), None, lines, where)
        return where, max(offset, 0)

    def place_of(self, name: str) -> str | None:
        """ "cell 3" for the name of a code's file."""
        return self._places.get(name)

    def tell(self, text: str) -> None:
        """A line on stderr about the cell's line that runs."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename not in self._places:
            frame = frame.f_back
        where = f"cell {self.execution_count}"
        if frame is not None:
            where = f"{self._places[frame.f_code.co_filename]}, line {frame.f_lineno}"
        start = f"{self.name}: {where}: " if self.execution_count else f"{self.name}: "
        print(start + text, file=sys.stderr)

    # -- values ---------------------------------------------------------------------------------

    def show(self, value: Any) -> None:
        """Show a value and keep it as `_`, `_3` and `Out[3]`."""
        if value is None:
            return
        names, number = self.user_ns, self.execution_count
        if names.get("_", self._last) is self._last:  # else the user has a `_`
            names["__"], names["_"] = self._last, value
            self._last = value
        names.setdefault("Out", {})[number] = value
        names[f"_{number}"] = value
        self.display(value)

    def display(self, *objects: Any, **_: Any) -> None:
        """`display(a, b)`: as text."""
        for value in objects:
            if self.captured is None:
                print(repr(value))
            else:
                self.captured.append(value)

    # -- commands -------------------------------------------------------------------------------

    def system(self, command: str) -> None:
        """`!command`: its status is `_exit_code` afterwards."""
        command = self._expand(command, sys._getframe(1))
        self._ended(command, children.run(children.shell(command)))

    system_raw = system_piped = system

    def getoutput(self, command: str, split: bool = True) -> Any:
        """`x = !command`: lines of its output, errors among them."""
        command = self._expand(command, sys._getframe(1))
        done = children.run(children.shell(command), keep_out=True, merge=True)
        self._ended(command, done)
        return SList(done.out.splitlines()) if split else done.out

    getoutput_pexpect = getoutput

    def _ended(self, command: str, done: children.Done) -> None:
        self.user_ns["_exit_code"] = done.status
        if done.status:
            first = " ".join(command.split())
            text = f"`{first if len(first) < 80 else first[:76] + ' ...'}` ended with {done.status}"
            self.failed.append(text)
            self.tell(text)

    def var_expand(self, text: str, depth: int = 0) -> str:
        """`{expression}` and `$name` replaced by their values; unchanged where one has none."""
        return self._expand(text, sys._getframe(depth + 1))

    def _expand(self, text: str, frame: FrameType) -> str:
        try:
            return _Expander().expand(text, self.user_ns | frame.f_locals)
        except (
            Exception
        ) as error:  # a `$name` or `{}` of the command's own: all stays, as in IPython
            why = error
        if meant := re.search(r"(?<!\$)\{[A-Za-z_]\w*\}", text):
            hint = ""
            if isinstance(why, NameError) and re.search(rf"\$\{{?{why.name}\b", text):
                hint = f"; for the shell's own, write $${why.name} or $${{{{{why.name}}}}}"
            self.tell(f"{meant[0]} is not replaced ({why}){hint}")
        return text

    # -- magics ---------------------------------------------------------------------------------

    def run_line_magic(self, name: str, line: str = "", _stack_depth: int = 1) -> Any:
        """`%name line`."""
        magic = self.line_magics.get(name)
        if magic is None:
            raise UsageError(self._unknown(name))
        if not getattr(magic, "takes_code", False):
            line = self._expand(line, sys._getframe(_stack_depth))
        return magic(self, line.strip())

    def run_cell_magic(self, name: str, line: str = "", cell: str = "") -> Any:
        """`%%name line` above a cell."""
        magic = self.cell_magics.get(name)
        if magic is None:
            raise UsageError(self._unknown("%" + name))
        return magic(self, self._expand(line, sys._getframe(1)).strip(), cell)

    def _unknown(self, name: str) -> str:
        known = sorted(self.line_magics) + [f"%{n}" for n in sorted(self.cell_magics)]
        if name.lstrip("%") in self.cell_magics:
            return f"the magic %{name} is one for a whole cell: it must be its first line"
        words = [f"%{n}" for n in known]
        meant = did_you_mean(f"%{name}", words)
        return f"the magic %{name} is not supported{meant}; these are: {' '.join(words)}"

    def unknown_magics(self, source: str) -> Iterator[tuple[int, str]]:
        """Line and message of the magics of a cell that are not known, or not yet."""
        for number, line in enumerate(to_python(source).split("\n"), 1):
            for kind, name in re.findall(r"get_ipython\(\)\.run_(line|cell)_magic\('(.+?)'", line):
                if name not in (self.line_magics if kind == "line" else self.cell_magics):
                    yield number, self._unknown(name if kind == "line" else "%" + name)

    def magic(self, text: str) -> Any:
        """`%name line` as one text."""
        name, _, line = text.strip().lstrip("%").partition(" ")
        return self.run_line_magic(name, line, _stack_depth=2)

    def register_magic_function(
        self, function: Callable[..., Any], magic_kind: str = "line", magic_name: str | None = None
    ) -> None:
        """A magic of the notebook's own: function(line), or function(line, cell)."""
        name = magic_name or function.__name__
        if magic_kind in ("line", "line_cell"):
            self.line_magics[name] = lambda _, line: function(line)
        if magic_kind in ("cell", "line_cell"):
            self.cell_magics[name] = lambda _, line, cell: function(line, cell)

    def register_magics(self, *classes: Any) -> None:
        """The magics of classes as IPython's `magics_class` makes them, or of objects of such."""
        for given in classes:
            owner = given() if isinstance(given, type) else given
            owner.shell = self
            for kind, functions in owner.magics.items():
                for name, function in functions.items():
                    self.register_magic_function(function, kind, name)

    def find_line_magic(self, name: str) -> Any:
        return self.line_magics.get(name)

    def find_cell_magic(self, name: str) -> Any:
        return self.cell_magics.get(name)

    # -- the rest that notebooks and libraries ask of IPython's shell ------------------------------

    def run_cell(self, source: str, *_: Any, **__: Any) -> None:
        """Run source as a cell does."""
        self.execute(source)

    def ev(self, expression: str) -> Any:
        """The value of an expression."""
        return eval(expression, self.user_ns)

    def ex(self, source: str) -> None:
        """Run statements."""
        exec(source, self.user_ns)

    def push(self, variables: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Put names into the notebook."""
        self.user_ns.update(variables)

    @property
    def user_global_ns(self) -> dict[str, Any]:
        return self.user_ns

    def enable_gui(self, gui: str | None = None) -> None:
        """There is no window to enable."""

    def enable_matplotlib(self, gui: str | None = None) -> None:
        """There is no window to enable."""

    def set_next_input(self, text: str, replace: bool = False) -> None:
        """There is no next input."""

    def show_usage(self) -> None:
        print("The magics here: " + " ".join(f"%{n}" for n in sorted(self.line_magics)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"get_ipython().{name} is not supported: the notebook runs under glmlora, not IPython"
        )


def _ends_silent(source: str) -> bool:
    """Whether the cell's last token is a semicolon."""
    if ";" not in source:
        return False
    last = ""
    skipped = (tokenize.COMMENT, tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in (*skipped, tokenize.INDENT, tokenize.DEDENT):
                last = token.string
    return last == ";"
