"""An attack that reads a row back from an open update finds nothing in a masked one; what it finds in a sum, and when."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmarks train")

from benchmarks.inversion import Decoder, Found, hidden, opened


@pytest.fixture(scope="module")
def decoder(data: Path) -> Decoder:
    return Decoder(data, 16)


def at_chance(difference: Found) -> bool:
    """Whether no advantage is left: three standard errors, so that one run in a thousand fails by chance."""
    return difference.mean <= 3 / 1.96 * difference.error


def test_an_open_update_of_one_row_gives_away_nine_tenths_of_its_tokens_in_their_order(decoder: Decoder) -> None:
    """The victims' rows are the oracle. One step of SGD; the attacker knows the base, the adapter sent and the length."""
    found = opened(decoder, 3, "sgd", 1, order=True)
    assert found["tokens"].mean >= 0.9
    assert found["in place"].mean >= 0.9
    assert found["noise"].mean <= 0.3


def test_more_local_steps_do_not_hide_the_tokens(decoder: Decoder) -> None:
    assert opened(decoder, 5, "sgd", 8, order=False)["tokens"].mean >= 0.9
    adam = opened(decoder, 5, "adamw", 8, order=False)
    assert adam["tokens"].mean >= adam["noise"].mean + 0.4


def test_under_a_secure_sum_the_attack_is_at_chance_on_the_masked_vector_and_on_the_sum_of_nodes_with_many_rows(
    decoder: Decoder,
) -> None:
    found = hidden(decoder, 12, 3, 32, "sgd", 1)
    assert at_chance(found["masked over chance"])
    assert at_chance(found["sum over chance"])


def test_a_sum_of_three_nodes_with_one_row_each_gives_tokens_away_and_noise_takes_them_back(decoder: Decoder) -> None:
    """What is not promised: a sum is not anonymous. With client-level noise of multiplier 1 the attack is at chance."""
    found = hidden(decoder, 12, 3, 1, "sgd", 1)
    assert at_chance(found["masked over chance"])
    assert not at_chance(found["sum over chance"])
    assert at_chance(found["sum with noise over chance"])
