"""The gateway's figures in Prometheus' form, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TIMES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one gateway. Labels are routes, statuses and names of keys, so they are few."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("edgetool_requests", "Requests answered", ["route", "status", "key"], registry=own)
        self.prompt_tokens = Counter("edgetool_prompt_tokens", "Tokens of prompts", registry=own)
        self.completion_tokens = Counter("edgetool_completion_tokens", "Tokens of answers", registry=own)
        self.cancelled = Counter("edgetool_cancelled", "Requests whose client went away", registry=own)
        self.latency_s = Histogram(
            "edgetool_request_seconds", "From request to end of answer", ["route"], buckets=_TIMES_S, registry=own
        )
        self.first_token_s = Histogram(
            "edgetool_first_token_seconds", "From request to first token", ["route"], buckets=_TIMES_S, registry=own
        )
        self.admitted = Gauge("edgetool_requests_admitted", "Requests that are served or wait", registry=own)
        self.host_up = Gauge("edgetool_host_up", "1 while the host of the board is connected", registry=own)
        self.host_connections = Gauge("edgetool_host_connections", "Connections made to the host", registry=own)

    def text(self) -> bytes:
        """All of them as /metrics answers."""
        return generate_latest(self.registry)
