"""Vectors that are missing are asked elsewhere, and each comes once, under its own number."""

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.inference import EmbedRequest, Finish, Vector
from meshmax.core.missing_vectors import VectorJoint, VectorsSoFar


@given(st.sets(st.integers(0, 9)))
def test_the_rest_is_what_was_not_given(given_: set[int]) -> None:
    request = EmbedRequest(tuple(f"text {n}" for n in range(10)), dimensions=3)
    so_far = VectorsSoFar(request)
    for n in given_:
        so_far.on_event(Vector(n, b"...."))
    so_far.on_event(Finish())
    rest = so_far.rest()
    assert rest.dimensions == 3
    joint = VectorJoint(so_far)
    missing = [n for n in range(10) if n not in given_]
    assert list(rest.inputs) == [f"text {n}" for n in missing]
    for index, number in enumerate(missing):
        assert joint.on_event(Vector(index, b"....")) == [Vector(number, b"....")]


def test_the_tokens_of_the_whole_are_reckoned_by_length() -> None:
    so_far = VectorsSoFar(EmbedRequest(("a" * 30, "b" * 10)))
    so_far.on_event(Vector(0, b"...."))
    joint = VectorJoint(so_far, spent_s=1.5)
    assert joint.on_event(Finish(prompt_tokens=5, total_s=2.0)) == [Finish(prompt_tokens=20, total_s=3.5)]
