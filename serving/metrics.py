"""Counts of what a server has done, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PREFIX = "little_llama"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Histogram:
    """Counts of seconds up to each of `SECONDS`."""

    def __init__(self) -> None:
        self.counts, self.sum, self.n = [0] * len(SECONDS), 0.0, 0

    def add(self, seconds: float) -> None:
        self.sum, self.n = self.sum + seconds, self.n + 1
        for i, limit in enumerate(SECONDS):
            self.counts[i] += seconds <= limit

    def lines(self, name: str) -> Iterable[str]:
        for limit, n in zip((*SECONDS, "+Inf"), (*self.counts, self.n)):
            yield f'{name}_bucket{{le="{limit}"}} {n}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.n}"


class Metrics:
    """What is counted; only the thread of the event loop writes."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[str] = Counter()  # prompt, cached, generated
        self.cancelled = 0
        self.first_token, self.total = Histogram(), Histogram()

    def text(self, **gauges: float) -> str:
        """Return everything; gauges: values of this moment by name."""
        lines = []

        def family(name: str, kind: str, what: str) -> str:
            lines.extend((f"# HELP {PREFIX}_{name} {what}", f"# TYPE {PREFIX}_{name} {kind}"))
            return f"{PREFIX}_{name}"

        name = family("requests_total", "counter", "Answered requests by path and status.")
        lines += [f'{name}{{path="{path}",status="{n}"}} {c}' for (path, n), c in sorted(self.requests.items())]
        name = family("tokens_total", "counter", "Tokens of prompts (cached: not read again) and of answers.")
        lines += [f'{name}{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("prompt", "cached", "generated")]
        lines.append(f"{family('cancelled_total', 'counter', 'Requests whose client went away.')} {self.cancelled}")
        lines += self.first_token.lines(family("first_token_seconds", "histogram", "From request to first token."))
        lines += self.total.lines(family("request_seconds", "histogram", "From request to the end of its answer."))
        for gauge, value in gauges.items():
            lines.append(f"{family(gauge, 'gauge', 'Now: ' + gauge.replace('_', ' ') + '.')} {value}")
        return "\n".join(lines) + "\n"
