"""`glmlora serve`: flags to a server that runs until a signal ends it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..generation.cache import ModelConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_ROWS, DEFAULT_CONTEXT = 8, 4096


def adapters_of(given: Sequence[str]) -> dict[str, str]:
    """Names and directories of NAME=DIR. ValueError for anything else, and a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not equals or not name or not directory:
            raise ValueError(f"--adapter: expected NAME=DIR, got {text!r}")
        if name in found:
            raise ValueError(f"--adapter: {name!r} is there twice")
        if not os.path.isdir(directory):
            raise FileNotFoundError(f"--adapter: {directory} is no directory")
        found[name] = directory
    return found


def read_keys(file: str | None, host: str, no_key: bool) -> list[str]:
    """The API keys of a file, one a line. ValueError where others could reach a server without
    one, or the file has none.
    """
    if file is None:
        if host not in LOOPBACK and not no_key:
            raise ValueError(
                f"--host: {host} lets others in: give --api-key-file, or --no-key to let everybody "
                "ask"
            )
        return []
    if no_key:
        raise ValueError("--no-key: beside --api-key-file")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file: {file} has no key, expected one a line")
    if not all(key.isascii() and len(key) >= 8 for key in keys):
        raise ValueError(f"--api-key-file: {file}: expected keys of 8 or more ASCII characters")
    return keys


def row_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the keys and values of a row of so many tokens."""
    return 8 * config.num_layers * config.multi_query_group_num * config.kv_channels * context


def fitting_limits(
    config: ModelConfig, rows: int | None, context: int | None, memory: int, asked: bool
) -> tuple[int, int]:
    """(rows, context) of a cache that takes at most so many bytes: where the caller left one to us,
    less than the default. ValueError, with the numbers, where both are given and do not fit.
    asked: whether the caller has said how much memory.
    """
    length = min(context or DEFAULT_CONTEXT, config.seq_length)
    if context is not None and context > config.seq_length:
        raise ValueError(
            f"--context: {context} exceeds the model's {config.seq_length} positions (seq_length)"
        )
    places = rows or DEFAULT_ROWS
    if rows is None:
        places = max(1, min(places, memory // row_bytes(config, length)))
    if context is None:
        while length > 256 and places * row_bytes(config, length) > memory:
            length //= 2
    needed = places * row_bytes(config, length)
    if needed > memory:
        what = "--cache-memory" if asked else "half of what is free"
        raise ValueError(
            f"--rows, --context: {places} rows of {length} tokens take {needed / 1e9:.2f} GB, "
            f"{what} is {memory / 1e9:.2f} GB: ask for fewer or shorter rows"
        )
    return places, length


def check_extra() -> None:
    """ImportError where what serves is not installed."""
    try:
        import fastapi  # noqa: F401
        import pydantic  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f'glmlora serve needs {error.name}: pip install "glmlora[serve]"'
        ) from None


def run(
    base: Any,
    tokenizer: Any,
    name: str,
    adapters: Mapping[str, str],
    *,
    host: str,
    port: int,
    keys: Sequence[str],
    rows: int | None,
    context: int | None,
    cache_memory: int | None,
    waiting: int,
    timeout: float,
    body_bytes: int,
    log_prompts: bool,
) -> int:
    """Serve until SIGINT or SIGTERM: the first drains (nothing is taken, what runs is finished),
    the second ends at once. Returns the exit status.
    """
    import uvicorn

    from ..model.device import memory_available
    from ..model.kept import keep_adapters
    from .app import create_app
    from .drained import Drained
    from .engine import Engine, Limits
    from .requests import Server

    models = keep_adapters(base, name, adapters)
    memory = cache_memory or memory_available(base.device) // 2
    places, length = fitting_limits(base.config, rows, context, memory, cache_memory is not None)
    engine = Engine(models, Limits(places, length, waiting, timeout))
    app = create_app(Server(engine, tokenizer), keys, body_bytes, log_prompts)
    _log_to_stderr()
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False
    )
    # What waits for the interpreter beside a thread that computes waits for less.
    sys.setswitchinterval(0.001)
    megabytes = places * row_bytes(base.config, length) / 1e6
    about = f"{places} rows of {length} tokens, {megabytes:.0f} MB"
    server = Drained(config, engine, f"{', '.join(models)} on http://{host}:{{port}} ({about})")
    engine.start()
    server.run()
    engine.drain()
    engine.join(5)
    if engine.failed:
        raise RuntimeError(f"the engine failed: {engine.failed}")
    return 0 if server.started else 1


def _log_to_stderr() -> None:
    """One line of JSON for a request, and uvicorn's own warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("glmlora.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # tells everyone who went away
