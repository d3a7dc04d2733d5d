import errno

import pytest

from meshmax.net.mdns_problem import problem_of


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EADDRINUSE, "held by another program"),
        (errno.EPERM, "firewall"),
        (errno.EACCES, "firewall"),
        (errno.ENETUNREACH, "is the interface up"),
        (errno.ENODEV, "is gone"),
        (errno.EMFILE, "ulimit"),
    ],
)
def test_a_failure_is_told_with_what_to_do(code: int, words: str) -> None:
    assert words in problem_of(OSError(code, "whatever"))


def test_the_interface_is_named() -> None:
    assert problem_of(OSError(errno.ENODEV, "x"), "eth0 (10.0.0.1)").startswith("eth0 (10.0.0.1): ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("no interface is up"), "no interface is up"),
        (RuntimeError("No adapter found"), "No adapter found"),
        (RuntimeError(), "it failed and did not say why"),
        (RuntimeError("x" * 1000), "x" * 200),
    ],
)
def test_any_other_failure_is_told_as_it_is(error: Exception, words: str) -> None:
    assert problem_of(error) == words
