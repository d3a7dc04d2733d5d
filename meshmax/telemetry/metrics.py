"""Prometheus metrics of a node, by name. Labels have few values: never a PeerId, a digest or a text from outside."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# One registry of our own, so that importing a library cannot add to what we publish.
REGISTRY: Final = CollectorRegistry()

FAILURES: Final = Counter(
    "meshmax_failures_total", "Streams, connections and requests that failed", ["what", "code"], registry=REGISTRY
)
CONNECTIONS: Final = Gauge("meshmax_connections", "Peers connected now", registry=REGISTRY)
CHUNKS: Final = Counter(
    "meshmax_chunks_total", "Chunks moved, by direction and outcome", ["direction", "outcome"], registry=REGISTRY
)
DATAGRAMS: Final = Counter(
    "meshmax_datagrams_total", "UDP datagrams, by direction and outcome", ["direction", "outcome"], registry=REGISTRY
)
STUN: Final = Counter("meshmax_stun_total", "STUN messages, by outcome", ["outcome"], registry=REGISTRY)
STUN_ASKED: Final = Counter(
    "meshmax_stun_asked_total", "STUN questions of ours and what came back", ["outcome"], registry=REGISTRY
)
REGISTRATIONS: Final = Gauge("meshmax_registrations", "Peers registered for rendezvous here", registry=REGISTRY)
CIRCUITS: Final = Gauge("meshmax_relay_circuits", "Circuits relayed now", registry=REGISTRY)
RELAYED: Final = Counter("meshmax_relayed_bytes_total", "Bytes relayed for others", registry=REGISTRY)
BYTES: Final = Counter("meshmax_blob_bytes_total", "Bytes of blobs moved", ["direction"], registry=REGISTRY)
SWEPT: Final = Counter("meshmax_swept_bytes_total", "Bytes freed by sweeps", ["what"], registry=REGISTRY)
HTTP_REQUESTS: Final = Counter(
    "meshmax_http_requests_total", "HTTP requests, by interface and status", ["interface", "status"], registry=REGISTRY
)
REQUESTS: Final = Counter(
    "meshmax_requests_total", "Prompts, by where they were answered", ["where", "outcome"], registry=REGISTRY
)
FIRST_TOKEN: Final = Histogram(
    "meshmax_first_token_seconds", "Time to the first event of an answer", ["where"], registry=REGISTRY
)
ATTEMPTS: Final = Counter(
    "meshmax_attempts_total",
    "Peers asked for a prompt: first, retry, hedge or continuation",
    ["kind"],
    registry=REGISTRY,
)
HEDGES: Final = Counter(
    "meshmax_hedges_total", "Second peers asked since the first was late, by outcome", ["outcome"], registry=REGISTRY
)
SUSPECTED: Final = Counter(
    "meshmax_suspected_total",
    "Peers that fell silent in an answer, by sign: frozen or hanging",
    ["sign"],
    registry=REGISTRY,
)
QUEUED: Final = Gauge("meshmax_queue_length", "Prompts that wait for a model here", ["priority"], registry=REGISTRY)
QUEUE_WAIT: Final = Histogram(
    "meshmax_queue_wait_seconds",
    "Time from a prompt's coming here to its start, loading included",
    ["priority"],
    registry=REGISTRY,
    buckets=(0.01, 0.05, 0.25, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
SHED: Final = Counter(
    "meshmax_shed_total",
    "Prompts that were told to come again, by the model's queue (queue) or at our own API (entry)",
    ["where", "priority"],
    registry=REGISTRY,
)
