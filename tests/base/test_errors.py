"""The tree of errors: codes are unique, every class says something, and an error survives the way to a peer."""

import pytest

from meshmax.base import errors
from meshmax.base.errors import Busy, ConnectError, MeshmaxError, error_for

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MeshmaxError)]


def test_every_code_is_unique() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_shows_its_sentence_and_exits_with_a_code_that_is_not_success(cls: type[MeshmaxError]) -> None:
    assert cls().message == cls.sentence()
    assert cls.sentence().endswith(".")
    assert cls.exit_code > 0
    assert 400 <= cls.http_status < 600


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_made_again_from_its_code(cls: type[MeshmaxError]) -> None:
    again = error_for(cls.code, "why")
    assert type(again) is cls
    assert again.message.startswith("why")


def test_a_code_of_a_newer_version_becomes_a_plain_error() -> None:
    assert type(error_for("never_heard_of", "why")) is MeshmaxError


def test_busy_carries_when_to_come_back() -> None:
    again = error_for("busy", "full", 7.0)
    assert isinstance(again, Busy)
    assert again.retry_after_s == 7.0


def test_a_failed_connection_names_every_attempt() -> None:
    error = ConnectError(
        "No way.", [("/ip4/10.0.0.1/tcp/1", "tcp", "refused"), ("/ip4/10.0.0.2/tcp/1", "noise", "no answer")]
    )
    assert "/ip4/10.0.0.1/tcp/1 (tcp: refused)" in error.message
    assert len(error.attempts) == 2
