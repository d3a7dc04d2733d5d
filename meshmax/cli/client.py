"""The HTTP client of the command line: find the running peer, ask it, turn what it answers into values or errors.

The peer is, in this order: the one at ``--api``, the one whose ``run.json`` lies in ``--home``, the one at ``MESHMAX_API``,
the one of ``MESHMAX_HOME``, else of ``~/.meshmax``. Errors become those of base.errors, by the ``code`` that the answer
carries, else by its status, so that a command ends with the exit code that belongs to the cause. Proxies of the
environment are not used: a peer is on this machine or on the LAN. Not here: what a command prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, Self

import msgspec
from cyclopts import Parameter

from meshmax.base.config import DEFAULT_API_PORT
from meshmax.base.errors import (
    Busy,
    ConfigError,
    ConnectError,
    EngineError,
    InvalidRequest,
    MeshmaxError,
    NotFound,
    NotOffered,
    ProtocolError,
    QuotaExceeded,
    Refused,
    RemoteProtocolError,
    StoreFull,
    Unauthorized,
    error_for,
)

if TYPE_CHECKING:
    import httpx

PROBE_TIMEOUT_S: Final = 5.0  # a peer says its version in milliseconds, also one that works hard
CONNECT_TIMEOUT_S: Final = 5.0  # the peer is on this machine or on the LAN
ANSWER_TIMEOUT_S: Final = 60.0  # for answers that do no long work; streams have no limit
MAX_LINE_BYTES: Final = 8 << 20  # of a streamed answer; Ollama's own clients read no longer ones
NO_HEADERS: Final[Mapping[str, str]] = {}
MAX_BODY_BYTES: Final = 64 << 20  # of a whole answer: /api/show verbose of a model with a large vocabulary fits

_BY_STATUS: Final[dict[int, type[MeshmaxError]]] = {
    400: InvalidRequest, 401: Unauthorized, 403: Refused, 404: NotFound, 405: NotOffered, 429: QuotaExceeded, 501: NotOffered,
    502: ProtocolError, 503: Busy, 504: EngineError, 507: StoreFull,
}  # fmt: skip


class NoPeerRunning(ConnectError):
    """No meshmax peer is running here: start one with `meshmax peer`."""

    code = "no_peer_running"


class PeerStarting(ConnectError):
    """A peer with this home is starting or ending: try again in a few seconds."""

    code = "peer_starting"


class PeerSilent(ConnectError):
    """The peer takes connections and does not answer."""

    code = "peer_silent"


@Parameter(name="*")
@dataclass(frozen=True)
class Target:
    """Which peer a command talks to."""

    api: Annotated[
        str | None, Parameter(help="The peer's API, HOST:PORT or URL; else $MESHMAX_API, else the peer running here.")
    ] = None
    home: Annotated[Path | None, Parameter(help="Home folder of the peer; else $MESHMAX_HOME, else ~/.meshmax.")] = None


class PeerClient:
    """One peer's HTTP interface. A context manager; the connection is made at the first request."""

    def __init__(self, url: str, token: str = "", transport: httpx.BaseTransport | None = None) -> None:
        """``url`` without a path. ``transport`` replaces the network."""
        import httpx  # takes 0.1 s: not for `--help`

        self.url = url
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
            verify=url.startswith("https"),  # else no certificates are read, which takes longer than most answers
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; no error if there is none."""
        self._http.close()

    def send_always(self, headers: Mapping[str, str]) -> None:
        """Send ``headers`` with each request from now on."""
        self._http.headers.update(headers)

    def probe(self) -> None:
        """See that somebody answers at all, whatever. Raises NoPeerRunning, PeerSilent."""
        import httpx

        try:
            self._http.get("/api/v1/version", timeout=PROBE_TIMEOUT_S)
        except httpx.ConnectError:
            raise _nobody(self.url) from None
        except httpx.TimeoutException:
            raise PeerSilent(
                f"the peer at {self.url} does not answer: it hangs or is stopped; `kill` its process and start it again"
            ) from None
        except httpx.HTTPError as error:
            raise ConnectError(f"what listens at {self.url} is no meshmax peer: {error}") from None

    def get(self, path: str) -> Any:
        """The JSON at ``path``. Raises what `error_of_answer` gives, NoPeerRunning, RemoteProtocolError."""
        return self.call("GET", path)

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = NO_HEADERS) -> Any:
        """The JSON that a request answers with, None for an empty answer."""
        with self.open_answer(method, path, body, headers, timed=True) as answer:
            text = answer.read()
            return _decode(text) if text.strip() else None

    def call_slowly(self, method: str, path: str, body: Any = None) -> Any:
        """As `call`, for work that may take minutes (loading a model): waits as long as it takes."""
        with self.open_answer(method, path, body) as answer:
            text = answer.read()
            return _decode(text) if text.strip() else None

    @contextmanager
    def open_answer(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = NO_HEADERS, *, timed: bool = False
    ) -> Iterator[StreamedAnswer]:
        """A request's answer, read as it comes; leaving the block hangs up, which ends the work at the peer."""
        import httpx

        timeout = httpx.USE_CLIENT_DEFAULT if timed else httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        content = None if body is None else _encode(body)
        headers = {**headers} if body is None else {"content-type": "application/json", **headers}
        try:
            with self._http.stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                answer = StreamedAnswer(response)
                if response.is_error:
                    raise error_of_answer(response.status_code, answer.read())
                yield answer
        except httpx.ConnectError:
            raise _nobody(self.url) from None
        except httpx.TimeoutException:
            raise ConnectError(f"the peer at {self.url} did not answer in {ANSWER_TIMEOUT_S:.0f} s") from None
        except httpx.HTTPError as error:
            raise ConnectError(f"the peer at {self.url} hung up: {error}") from None


def _nobody(url: str) -> NoPeerRunning:
    return NoPeerRunning(f"no meshmax peer is running here ({url} does not answer): start one with `meshmax peer`")


class StreamedAnswer:
    """The answer to one request: headers, and a body read whole or line by line."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.headers: Mapping[str, str] = response.headers

    def read(self) -> bytes:
        """The whole body. Raises RemoteProtocolError beyond MAX_BODY_BYTES."""
        body = bytearray()
        for piece in self._response.iter_bytes():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise RemoteProtocolError(f"the peer's answer is longer than {MAX_BODY_BYTES >> 20} MiB")
        return bytes(body)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The JSON objects of an NDJSON body. A line with ``error`` is raised. Raises RemoteProtocolError."""
        rest = b""
        for piece in self._response.iter_bytes():
            *whole, rest = (rest + piece).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise RemoteProtocolError(f"the peer sent a line longer than {MAX_LINE_BYTES >> 20} MiB")
            yield from (_checked(line) for line in whole if line.strip())
        if rest.strip():
            yield _checked(rest)


def _encode(body: Any) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # bytes of the command line or of standard input that are no text
        raise InvalidRequest("what was given is not UTF-8 text") from None


def _decode(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise RemoteProtocolError("what answers there is not a meshmax peer: its answer is not JSON") from None


def _checked(line: bytes) -> dict[str, Any]:
    value = _decode(line)
    if not isinstance(value, dict):
        raise RemoteProtocolError("the peer sent a line that is not a JSON object")
    if "error" in value:
        _raise_error(value)
    return value


def _raise_error(value: Mapping[str, Any]) -> NoReturn:
    raise error_for(str(value.get("code", "")), str(value["error"]))


def error_of_answer(status: int, body: bytes) -> MeshmaxError:
    """The error that an HTTP answer stands for: by its ``code``, else by its status. Never raises."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        value = None
    text = str(value["error"]) if isinstance(value, dict) and "error" in value else f"the peer answered {status}"
    code = value.get("code") if isinstance(value, dict) else None
    if isinstance(code, str) and code:
        return error_for(code, text)
    return _BY_STATUS.get(status, MeshmaxError)(text)


def open_client(target: Target) -> PeerClient:
    """A client of the peer that ``target`` and the environment name.

    Raises NoPeerRunning, PeerStarting, PeerSilent, ConfigError.
    """
    given = target.api or ("" if target.home else os.environ.get("MESHMAX_API", ""))
    home = home_folder(target.home)
    url = api_url(given) if given else running_api(home)
    token = os.environ.get("MESHMAX_TOKEN") or (_token_of(home) if not given or _here(url) else "")
    client = PeerClient(url, token)
    try:
        client.probe()
    except MeshmaxError:
        client.close()
        raise
    return client


def home_folder(given: Path | None) -> Path:
    """``given``, else $MESHMAX_HOME, else ~/.meshmax."""
    return (given or Path(os.environ.get("MESHMAX_HOME") or "~/.meshmax")).expanduser()


def api_url(text: str) -> str:
    """``text`` (HOST, HOST:PORT or a URL) as a URL without a path; a wildcard address is reached on loopback.

    Raises ConfigError that says what is accepted.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else DEFAULT_API_PORT)
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/"):
        raise ConfigError(f"'{text[:100]}' is not an API address: write HOST:PORT or http://HOST:PORT")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (where to connect, not to listen)
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def running_api(home: Path) -> str:
    """The API address of the peer that runs on ``home``. Raises NoPeerRunning, PeerStarting."""
    from meshmax.store.home import is_held, read_run

    run = read_run(home)
    if run is None and is_held(home):
        run = read_run(home)  # it may have come up between the two looks
        if run is None:
            raise PeerStarting("a peer with this home is starting or ending: try again in a few seconds")
    if run is None:
        raise NoPeerRunning(f"no meshmax peer is running here (home {home}): start one with `meshmax peer`")
    return api_url(run.api)


def _here(url: str) -> bool:
    """Whether ``url`` is on this machine, so that the token of our own peer may be shown to it."""
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _token_of(home: Path) -> str:
    if not (home / "meshmax.yaml").exists():
        return ""
    from meshmax.cli.settings import load_config

    return load_config({"home": str(home)}, {}).token
