"""The tree of errors: codes are unique, every class says something, and an error survives the way to a peer."""

import pytest

from meshmax.base import errors
from meshmax.base.errors import Busy, ConnectError, MeshmaxError, PeerGone, error_for, raise_only, without_frames

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


def test_an_error_that_is_kept_holds_nothing_of_the_places_it_came_by() -> None:
    def fail() -> None:
        try:
            raise OSError("no route")
        except OSError as error:
            raise PeerGone("it left") from error

    with pytest.raises(PeerGone) as caught:
        fail()
    kept = without_frames(caught.value)
    assert kept.message == "it left"
    assert str(kept.__cause__) == "no route"
    assert kept.__traceback__ is None
    assert kept.__cause__ is not None
    assert kept.__cause__.__traceback__ is None


def test_errors_that_led_to_each_other_are_kept_without_frames_too() -> None:
    one, other = PeerGone("one"), PeerGone("other")
    one.__context__, other.__context__ = other, one
    group = ExceptionGroup("both", [one, other])
    try:
        raise group
    except ExceptionGroup:
        assert group.__traceback__ is not None
    assert without_frames(group).__traceback__ is None
    assert one.__traceback__ is None


def test_the_only_error_of_a_group_is_raised_as_it_is_and_the_two_do_not_hold_each_other() -> None:
    one = PeerGone("one")

    def fail() -> None:
        try:
            raise ExceptionGroup("a group", [one])
        except ExceptionGroup as group:
            raise_only(group)

    with pytest.raises(PeerGone) as caught:
        fail()
    assert caught.value is one
    assert one.__context__ is None
