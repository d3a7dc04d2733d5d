"""Means of what a model's loads and answers took."""

import pytest

from meshmax.base.inference import Finish
from meshmax.base.status import Speed
from meshmax.core.speed import speed_after_answer, speed_after_load


def test_speed_is_an_ewma_of_uncached_prompt_and_output() -> None:
    first = speed_after_answer(
        Speed(), Finish(prompt_tokens=30, cached_tokens=20, prompt_s=0.1, output_tokens=100, output_s=2.0)
    )
    assert (first.prefill_per_s, first.decode_per_s) == (100.0, 50.0)
    second = speed_after_answer(first, Finish(output_tokens=100, output_s=1.0))
    assert second.prefill_per_s == 100.0
    assert second.decode_per_s == pytest.approx(65.0)
    assert speed_after_answer(second, Finish(output_tokens=2, output_s=9.0)) == second
    assert speed_after_load(second, 2.0).load_s == 2.0
