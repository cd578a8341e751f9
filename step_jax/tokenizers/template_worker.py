"""Runs chat templates, in a process of its own: ``template_worker.py BYTES CHARACTERS``.

Reads requests and writes replies, one JSON object a line:

  {"source": template, "context": its variables, "mark": whether spans are wanted}
  {"text": ..., "spans": [[start, end], ...], "marked": whether it has generation blocks}
  {"error": why there is no text}

Started by `chat.py`, which kills it when a reply takes too long. It imports Jinja and the standard
library only. The environment is the one that chat templates are written for: trimmed blocks, loop
controls, ``raise_exception``, ``strftime_now``, a ``tojson`` that keeps characters, and
``{% generation %}``.
"""

import contextlib
import datetime
import functools
import json
import resource
import secrets
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: what the assistant says.

    A block's text is put between two marks when spans are wanted. The marks are random, so that no
    message can hold them.
    """

    tags = {"generation"}
    marks: tuple[str, str] | None = None

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_wrap", lineno=line)
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, caller):
        text = caller()
        return (
            text if Generation.marks is None else Generation.marks[0] + text + Generation.marks[1]
        )


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, where what is not allowed is an error at once instead of an empty text."""

    def unsafe_undefined(self, obj, attribute):
        kind = type(obj).__name__
        raise jinja2.exceptions.SecurityError(f"to reach for {attribute!r} of a {kind}")


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's, whose attributes may not begin with an underscore."""

    def __init__(*args, **kwargs):  # as Jinja's: `self` is a name like any other
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        check_name(name)
        super().__setitem__(name, value)


def check_name(name):
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"to name something {name!r}")


class Dict:
    """The ``dict`` of templates: what makes dictionaries, and not their class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(pattern):
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=8)
def compiled(source):
    """(template, whether it has generation blocks)."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": TemplateNamespace,
        "dict": Dict(),
    }
    calls = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
    return environment.from_string(source), any(
        c.identifier == Generation.identifier for c in calls
    )


def run(request, limit):
    """The reply to a request."""
    template, marked = compiled(request["source"])
    if not (marked and request["mark"]):
        Generation.marks = None
        return {"text": text_of(template, request["context"], limit), "spans": [], "marked": marked}
    plain = run(request | {"mark": False}, limit)["text"]
    nonce = secrets.token_hex(8)
    Generation.marks = marks = (f"\0{nonce}<", f"\0{nonce}>")
    pieces = text_of(template, request["context"], limit).split(marks[0])
    text, spans = pieces[0], []
    for piece in pieces[1:]:
        said, found, rest = piece.partition(marks[1])
        spans.append([len(text), len(text) + len(said)])
        text += said + rest
        if not found or marks[1] in rest:
            return {"error": "generation blocks are cut, or lie in each other"}
    if text != plain:
        return {"error": "it looks at the text of a generation block, whose place is unclear then"}
    return {"text": text, "spans": spans, "marked": True}


def text_of(template, context, limit):
    pieces, size = [], 0
    for piece in template.generate(**context):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise ValueError(f"it writes more than {limit:,} characters")
    return "".join(pieces)


def describe(error):
    if isinstance(error, MemoryError):
        return "it needs more memory than is allowed"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"it does what is not allowed: {error}"
    if isinstance(error, jinja2.exceptions.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def main():
    most_bytes, most_characters = map(int, sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for line in sys.stdin.buffer:
        try:
            reply = json.dumps(run(json.loads(line), most_characters))
        except Exception as error:
            reply = json.dumps({"error": describe(error)})
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
