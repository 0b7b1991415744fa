"""A cell's text as Python: `!command`, `%magic`, `%%magic`, `name?` become calls of the shell.

What is Python already stays as it is. IPython's own transformer reads the rest where IPython is
installed; elsewhere tokens do, with the same result. Every line keeps its number, for tracebacks.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tokenize
import warnings
from typing import Any

_CELL_MAGIC = re.compile(r"%%([\w!]+)[ \t]*(.*)")
_HELP = re.compile(r"(\s*)(%{0,2}[A-Za-z_*][\w*]*(?:\.[A-Za-z_*][\w*]*|\[-?\d+\])*)(\?\??)\s*")


def to_python(cell: str) -> str:
    """The cell's Python, with as many lines or fewer; a cell that is no valid Python comes back
    with its error in it.
    """
    if _is_python(cell):
        return cell
    lines = textwrap.dedent(cell).rstrip("\n").split("\n")
    first = next((i for i, s in enumerate(lines) if s.strip() and not s.startswith("#")), 0)
    magic = _CELL_MAGIC.match(lines[first])
    if magic and not lines[first].endswith("?"):
        body = "".join(line + "\n" for line in lines[first + 1 :])
        words = (magic[1], magic[2].rstrip(), body)
        return "\n" * first + "get_ipython().run_cell_magic({!r}, {!r}, {!r})\n".format(*words)
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        return by_tokens(cell)
    return by_ipython(TransformerManager(), cell)


def _is_python(cell: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the cell is compiled to run
        try:
            compile(cell, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)
        except (SyntaxError, ValueError):
            return False
    return True


def by_ipython(manager: Any, cell: str) -> str:
    """As `manager.transform_cell(cell)`, but a command of several lines leaves as many behind."""
    lines = (cell.rstrip("\n") + "\n").splitlines(keepends=True)
    whole = len(lines)
    for transform in manager.cleanup_transforms + manager.line_transforms:
        lines = transform(lines)
    above = whole - len(lines)
    changed = True
    while changed:
        before = lines
        changed, lines = manager.do_one_token_transform(before)
        if gone := len(before) - len(lines):
            at = next(i for i, line in enumerate(lines) if line != before[i])
            lines = [*lines[: at + 1], *["\n"] * gone, *lines[at + 1 :]]
    return "\n" * above + "".join(lines)


def by_tokens(cell: str) -> str:
    """What `by_ipython` makes of commands, magics, assignments of them, and `name?`."""
    text = textwrap.dedent(cell).rstrip("\n") + "\n"
    lines = text.splitlines(keepends=True)
    done, at = "", 0
    while at < len(lines):
        statement, end = _statement(lines, at)
        done += statement + "\n" * (end - at - statement.count("\n"))
        at = end
    return done


def _statement(lines: list[str], at: int) -> tuple[str, int]:
    """The logical line that begins at line `at`, as Python, and the line behind it."""
    line = lines[at]
    start = len(line) - len(line.lstrip())
    if help_call := _HELP.fullmatch(line):
        return f"{help_call[1]}{_help(help_call[2], help_call[3])}\n", at + 1
    if line[start : start + 1] in ("!", "%", "?"):
        return _command(lines, at, start)
    depth, assigned, end = 0, False, len(lines)
    try:
        for token in tokenize.generate_tokens(iter(lines[at:]).__next__):
            row, column = token.end
            if token.type == tokenize.NEWLINE or token.type == tokenize.NL and depth <= 0:
                end = at + row if token.type == tokenize.NL else at + token.start[0]
                break
            if token.type != tokenize.OP and token.type != tokenize.ERRORTOKEN:
                continue
            if token.string in ("(", "[", "{"):
                depth += 1
            elif token.string in (")", "]", "}"):
                depth = max(depth - 1, 0)
            elif token.string == "=" and depth == 0 and not assigned:
                assigned = True
                here = at + row - 1
                behind = lines[here][column:]
                if re.match(r"\s*(!|%\s*[A-Za-z_])", behind):
                    column += len(behind) - len(behind.lstrip())
                    call, end = _command(lines, here, column, capture=True)
                    return "".join(lines[at:here]) + call, end
    except (tokenize.TokenError, SyntaxError, StopIteration):
        pass  # the error is Python's to tell
    return "".join(lines[at:end]), end


def _command(lines: list[str], at: int, start: int, capture: bool = False) -> tuple[str, int]:
    """The call for a command that begins in column `start` and goes on over lines that end in a
    backslash, and the line behind it.
    """
    end = at
    while lines[end].endswith("\\\n") and end + 1 < len(lines):
        end += 1
    parts = [lines[at][start:], *lines[at + 1 : end + 1]]
    text = " ".join([p.rstrip()[:-1] for p in parts[:-1]] + [parts[-1].rstrip()])
    if text[0] == "%":
        name, _, rest = text[1:].partition(" ")
        call = f"get_ipython().run_line_magic({name!r}, {rest!r})"
    elif text[0] == "?":
        mark = "??" if text.startswith("??") else "?"
        call = _help(text[len(mark) :], mark)
    elif capture:
        call = f"get_ipython().getoutput({text[1:]!r})"
    elif text.startswith("!!"):
        call = f"get_ipython().getoutput({text[2:]!r})"
    else:
        call = f"get_ipython().system({text[1:]!r})"
    return lines[at][:start] + call + "\n", end + 1


def _help(name: str, mark: str) -> str:
    if not name:
        return "get_ipython().show_usage()"
    magic = "pinfo2" if mark == "??" else "psearch" if "*" in name else "pinfo"
    return f"get_ipython().run_line_magic({magic!r}, {name!r})"
