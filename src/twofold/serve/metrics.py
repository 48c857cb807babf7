"""Prometheus metrics: the names that dashboards for vLLM know, and what only a thinking model has.

Numbers of the engine are read when they are scraped; times of tokens are told by the engine's thread. Not here: logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from twofold.serve.replies import Choice

if TYPE_CHECKING:
    from twofold.serve.engine_loop import EngineLoop

disable_created_metrics()  # one more series for each, of use to nobody
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All metrics of one server.

    Args:
        prefix: begins the names that other engines have too; the others begin with ``twofold:``.
        model: value of the label ``model_name``.
    """

    def __init__(self, prefix: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self.prefix, self.model = prefix, model
        self._ttft = self._histogram(f"{prefix}time_to_first_token_seconds", "Arrival to first token", _WAITS)
        self._queue = self._histogram(f"{prefix}request_queue_time_seconds", "Arrival to start of the prompt", _WAITS)
        self._prefill = self._histogram(f"{prefix}request_prefill_time_seconds", "Prompt to first token", _WAITS)
        self._gap = self._histogram(f"{prefix}inter_token_latency_seconds", "Between tokens of a choice", _GAPS)
        self._whole = self._histogram(f"{prefix}e2e_request_latency_seconds", "Arrival to last token", _WAITS)
        self._decode = self._histogram(f"{prefix}request_decode_time_seconds", "First token to last", _WAITS)
        self._success = self._counter(f"{prefix}request_success", "Choices that ended", "finished_reason")
        self._thinking = self._counter("twofold:thinking_tokens", "Tokens inside think blocks")
        self._forced = self._counter("twofold:forced_stops", "Thoughts ended by the budget or the loop detector")
        self._loops = self._counter("twofold:loops", "Thoughts that went round in circles")
        self._unclosed = self._counter("twofold:unclosed_thoughts", "Replies that ended inside the think block")
        self._recoveries = self._counter("twofold:parser_recoveries", "Faults of replies that the parser dealt with")
        self._aborted = self._counter("twofold:aborted_requests", "Requests whose client went away")
        self._errors = self._counter("twofold:request_errors", "Requests answered with an error", "status")
        for counter in (self._thinking, self._forced, self._loops, self._unclosed, self._recoveries, self._aborted):
            counter.labels(model)  # shown as 0 before the first one

    def watch(self, loop: EngineLoop) -> None:
        """Show the engine's own counters too."""
        self.registry.register(_EngineNumbers(self.prefix, self.model, loop))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def first_token(self, seconds: float, waited: float) -> None:
        """Time from a request's arrival to its first token, and the part of it before its prompt was taken up."""
        self._ttft.labels(self.model).observe(seconds)
        self._queue.labels(self.model).observe(waited)
        self._prefill.labels(self.model).observe(seconds - waited)

    def next_token(self, seconds: float) -> None:
        """Time between two tokens of a choice."""
        self._gap.labels(self.model).observe(seconds)

    def ended(self, choice: Choice, seconds: float, decoding: float) -> None:
        """A choice has ended, ``seconds`` after the request came and ``decoding`` seconds after its first token."""
        done = choice.completion
        assert done is not None and choice.finish_reason is not None
        self._whole.labels(self.model).observe(seconds)
        self._decode.labels(self.model).observe(decoding)
        self._success.labels(self.model, choice.finish_reason).inc()
        self._thinking.labels(self.model).inc(done.thinking_tokens)
        self._forced.labels(self.model).inc(any(done.forced))
        self._loops.labels(self.model).inc(done.looped)
        self._unclosed.labels(self.model).inc("think block not closed" in choice.warnings)
        self._recoveries.labels(self.model).inc(len(choice.warnings))

    def aborted(self) -> None:
        """A client went away before its reply was whole."""
        self._aborted.labels(self.model).inc()

    def error(self, status: int) -> None:
        """A request was answered with an error."""
        self._errors.labels(self.model, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", *labels], registry=self.registry)


class _EngineNumbers:
    """Collector of the engine's counters, read at the moment of a scrape."""

    def __init__(self, prefix: str, model: str, loop: EngineLoop) -> None:
        self.prefix, self.labels, self.loop = prefix, [model], loop

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        now = self.loop.engine.counters
        gauges = {
            "num_requests_running": ("Samples being generated", now.running),
            "num_requests_waiting": ("Samples waiting", now.waiting),
            "kv_cache_usage_perc": ("Share of the cache in use", now.blocks_used / max(now.blocks_total, 1)),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens", now.prompt_tokens),
            "generation_tokens": ("Generated tokens", now.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", now.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found there", now.prefix_hits),
            "num_preemptions": ("Samples that had to give their memory back", now.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(self.prefix + name, text, labels=["model_name"])
            gauge.add_metric(self.labels, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(self.prefix + name, text, labels=["model_name"])
            counter.add_metric(self.labels, value)
            yield counter
