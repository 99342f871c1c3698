"""The ledger of the reading benchmark: rows lost and repeated by kills, compared with one epoch."""

from tests.benchmarks.peers.processes import count_ledger


def test_an_epoch_without_a_kill_counts_nothing() -> None:
    assert count_ledger("resume 0\n0 3 1\n1 0 2\nend\n", 4) == {"lost": 0, "repeated": 0, "steps_redone": 0}


def test_rolled_back_steps_are_no_repetition() -> None:
    ledger = "resume 0\n0 3 1\n1 0 2\nresume 1\n1 0 2\nend\n"
    assert count_ledger(ledger, 4) == {"lost": 0, "repeated": 0, "steps_redone": 1}


def test_rows_that_come_again_or_never_are_counted() -> None:
    ledger = "resume 0\n0 3 1\n1 0 2\nresume 1\n1 3 4\n2 4 3\nend\n"
    assert count_ledger(ledger, 6) == {"lost": 3, "repeated": 3, "steps_redone": 1}


def test_a_line_cut_by_the_kill_is_nothing() -> None:
    assert count_ledger("resume 0\n0 1\n1 0 2", 1) == {"lost": 0, "repeated": 0, "steps_redone": 0}
