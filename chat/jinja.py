"""A Jinja environment that renders chat templates as transformers does."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Unicode reserves noncharacters for use inside programs. These mark places in a rendered text; messages with them are
# refused. BREAK: the special token that follows is text; BEGIN, FINISH: around an answer.
BREAK, BEGIN, FINISH = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{BREAK}{BEGIN}{FINISH}]")


class Generation(jinja2.ext.Extension):
    """Render {% generation %} ... {% endgeneration %}, the text that a model generates, between BEGIN and FINISH."""

    tags = {"generation"}  # noqa: RUF012  (the form that jinja2 requires)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(lineno)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{BEGIN}{caller()}{FINISH}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """Return a value as JSON; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


ENVIRONMENT = _environment()
