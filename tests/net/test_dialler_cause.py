"""Why a dial failed, in the words of the operating system."""

import errno

from meshmax.net.dialler import _cause


def test_the_first_reason_of_a_group_is_told_in_the_systems_words() -> None:
    error = OSError("all attempts to connect to 127.0.0.1:9 failed")
    error.__cause__ = ExceptionGroup(
        str(error), [ConnectionRefusedError(errno.ECONNREFUSED, "Error connecting to ...")]
    )
    assert _cause(error) == "Connection refused"


def test_an_error_without_a_number_keeps_its_words() -> None:
    assert _cause(OSError("the name has no address")) == "the name has no address"
