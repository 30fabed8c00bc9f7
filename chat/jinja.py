"""A Jinja environment that renders chat templates as transformers does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
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


class Compiler(jinja2.compiler.CodeGenerator):
    """Computes nothing while it compiles, because no bound holds there."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with a bound on the time and on the length of a rendered text.

    Every pass of a loop and every call of a macro looks at the clock; the length is counted as the text is written.
    """

    intercepted_binops = frozenset(["+", "*", "**"])
    code_generator_class = Compiler
    seconds = 10.0  # of computing; a usual template takes less than a thousandth of a second
    length = 2**26  # characters; a million tokens are about 2**22

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._of_thread = threading.local()  # .deadline: CPU time at which the rendering of this thread is given up

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro))):
            clock = jinja2.nodes.EnvironmentAttribute("clock")
            node.body.insert(0, jinja2.nodes.ExprStmt(clock).set_lineno(node.lineno))
        for node in list(tree.find_all(jinja2.nodes.Concat)):  # a ~ b
            joined = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("join"), node.nodes, [], None, None)
            node.nodes = [joined.set_lineno(node.lineno)]
        return tree

    @property
    def clock(self) -> None:
        """Raise TemplateError when the template has run for too long. (Jinja takes far longer to call a function.)"""
        if time.thread_time() > self._of_thread.deadline:
            raise jinja2.TemplateError(f"it runs for more than {self.seconds:g} seconds")

    def join(self, *values: Any) -> str:
        """Return the texts of all values as one text, which is what the operator ~ does."""
        texts = [str(value) for value in values]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, a product or a power, unless the result would be enormous."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            if len(left) + len(right) > self.length:  # the most frequent operation, so without another call
                self._check_size(len(left) + len(right))
        elif operator == "*":
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            if hasattr(repeated, "__len__") and isinstance(times, int):
                self._check_size(len(repeated) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_size(left.bit_length() * right)
        return self.binop_table[operator](left, right)

    def _check_size(self, size: int) -> None:
        if size > self.length:
            raise jinja2.TemplateError(f"it makes a value of more than {self.length:,} characters")

    def fill(self, template: jinja2.Template, **variables: Any) -> str:
        """Return the text of a template. Raises ValueError with the reason, whatever goes wrong in the template."""
        self._of_thread.deadline = time.thread_time() + self.seconds
        try:
            return "".join(self._bounded(template.generate(**variables)))
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def _bounded(self, pieces: Iterable[str]) -> Iterable[str]:
        length = 0
        for piece in pieces:
            length += len(piece)
            if length > self.length:
                raise jinja2.TemplateError(f"it writes more than {self.length:,} characters")
            yield piece


ENVIRONMENT = Environment()
