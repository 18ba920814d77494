"""The schedule is a pure function of the step."""

import pytest

from sigma_lite.balance.schedule import SIGMA_HEAD, k_per_layer


def test_before_at_and_after_the_switch():
    def at(step):
        return k_per_layer(step, switch_step=100, n_layers=56, head=SIGMA_HEAD)

    assert at(0) == at(99) == (8, 8, 6, 6, 4, 4, 2, 2, *(1,) * 48)
    assert at(100) == at(10**9) == (1,) * 56
    assert sum(at(0)) - sum(at(100)) == 32, "32 more experts a token before the switch"


def test_a_head_longer_than_the_model_is_cut():
    assert k_per_layer(0, switch_step=1, n_layers=2, head=(8, 4, 2)) == (8, 4)
    assert k_per_layer(0, switch_step=1, n_layers=3, head=(), target=2) == (2, 2, 2)


def test_no_switch_means_target_from_the_start():
    assert k_per_layer(0, switch_step=0, n_layers=3, head=(8, 4)) == (1, 1, 1)


def test_impossible_arguments():
    with pytest.raises(ValueError, match="step=-1"):
        k_per_layer(-1, switch_step=0, n_layers=1, head=())
