"""A process that renders chat templates: requests and answers are JSON, one a line. It imports
nothing of the package. Before it sees a template it gives up opening files and taking more than its
memory; a rendering that takes too long ends it.
"""

import json
import signal
import sys
import time

FIRST = "jinja2 {} has known holes in its sandbox: pip install -U jinja2, to 3.1.6 or newer"


def environment():
    """As transformers has it: plain JSON, and the few functions that published templates use."""
    import jinja2
    from jinja2 import ext, sandbox

    class Namespace(jinja2.utils.Namespace):
        """Without names that reach for Python's own."""

        def __init__(*args, **given):
            self, *args = args
            self.__attrs = {}
            for name, value in dict(*args, **given).items():
                self[name] = value

        def __getattribute__(self, name):
            if name.startswith("_"):
                return object.__getattribute__(self, name)
            try:
                return self.__attrs[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace: {name!r} begins with _")
            self.__attrs[name] = value

    class Generation(ext.Extension):
        """{% generation %}: what the model wrote, which is text like the rest here."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["namespace"] = Namespace
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: time.strftime(form, time.localtime())
    return found


def bounded(limits):
    """From here on. What jinja2 and Python load when they first need it is loaded before."""
    import encodings.unicode_escape  # noqa: F401
    import pprint  # noqa: F401
    import resource
    import textwrap  # noqa: F401
    import unicodedata  # noqa: F401

    import jinja2.debug  # noqa: F401

    time.localtime()
    memory = limits["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Renderer:
    """Templates that were compiled, and what they make of variables."""

    def __init__(self, limits):
        import jinja2
        from jinja2 import meta

        self.limits, self.meta = limits, meta
        self.environment = environment()
        self.compiled = {}
        self.errors = jinja2.exceptions

    def answer(self, request):
        """{"result"} or {"error"}, a sentence."""
        limits = self.limits
        try:
            template = request["template"]
            if "variables" not in request:
                tree = self.environment.parse(template)
                return {"result": sorted(self.meta.find_undeclared_variables(tree))}
            return {"result": self.text(template, request["variables"])}
        except self.errors.TemplateSyntaxError as error:
            return {"error": f"line {error.lineno}: {error.message}"}
        except MemoryError:
            return {"error": f"takes more than {limits['memory'] >> 20} MiB of memory"}
        except RecursionError:
            return {"error": "calls itself without end"}
        except Exception as error:  # whatever a stranger's template does
            kind = "" if isinstance(error, self.errors.TemplateError) else type(error).__name__
            return {"error": f"{kind}{': ' if kind else ''}{error}"[:2000]}

    def text(self, source, variables):
        template = self.compiled.get(source)
        if template is None:
            if len(self.compiled) >= 16:
                self.compiled.clear()
            template = self.compiled[source] = self.environment.from_string(source)
        parts, size = [], 0
        for part in template.generate(**variables):
            size += len(part)
            if size > self.limits["characters"]:
                raise self.errors.TemplateError(
                    f"writes more than {self.limits['characters']} characters"
                )
            parts.append(part)
        return "".join(parts)


def main():
    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    def say(answer):
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    first = json.loads(requests.readline())
    sys.path[:] = first["path"]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        import jinja2

        numbers = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
        if numbers < (3, 1, 6):
            raise ImportError(FIRST.format(jinja2.__version__))
        renderer = Renderer(first["limits"])
        bounded(first["limits"])
    except Exception as error:
        say({"error": str(error)})
        return
    say({"result": True})
    for line in requests:
        signal.alarm(first["limits"]["seconds"])
        answer = renderer.answer(json.loads(line))
        signal.alarm(0)
        say(answer)


if __name__ == "__main__":
    main()
