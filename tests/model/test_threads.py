"""What runs side by side, and what begins while other work leaves threads idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import current_thread, main_thread

import pytest
import torch

from assay.model.threads import ahead, background, in_turn, meanwhile, spare


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("together", [True, False])
def test_results_come_in_turn_and_few_are_made_ahead(together: bool) -> None:
    made: list[int] = []

    def make(item: int) -> tuple[int, int, bool]:
        made.append(item)
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        results = in_turn(make, range(20), together)
        assert next(results)[0] == 0
        assert len(made) <= (4 if together else 1)
        assert list(results) == [(item, 1 if together else 3, False) for item in range(1, 20)]
    assert sorted(made) == list(range(20)) and torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_what_fails_side_by_side_fails_in_its_turn() -> None:
    results = in_turn(lambda item: 1 // (item - 1), range(5), True)
    assert next(results) == -1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("says", [True, False])
def test_what_may_begin_meanwhile_begins_once_when_threads_are_spare_or_at_the_end(says: bool) -> None:
    heard: list[str] = []
    spare()
    with meanwhile(lambda: heard.append("begun")):
        heard.append("first part")
        for _ in range(2 * says):
            spare()
        heard.append("second part")
    spare()
    assert heard == (["first part", "begun", "second part"] if says else ["first part", "second part", "begun"])


def test_nothing_begins_after_work_that_failed() -> None:
    heard: list[str] = []
    with pytest.raises(ValueError, match="no"), meanwhile(lambda: heard.append("begun")):
        raise ValueError("no")
    assert not heard


def test_so_many_begin_before_the_first_is_waited_for() -> None:
    heard: list[str] = []

    def begin(item: int) -> Callable[[], int]:
        heard.append(f"begun {item}")
        return lambda: heard.append(f"waited for {item}") or item

    assert list(ahead(map(begin, range(3)), 1)) == [0, 1, 2]
    assert heard == ["begun 0", "begun 1", "waited for 0", "begun 2", "waited for 1", "waited for 2"]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_runs_in_the_background_is_waited_for_and_uses_one_thread(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with background() as begin:
        waiting = [begin(lambda item=item: (item, torch.get_num_threads(), current_thread())) for item in range(9)]
        found = [wait() for wait in waiting]
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert [item for item, _, _ in found] == list(range(9)) and {used for _, used, _ in found} == {1}
    assert all((thread is main_thread()) == (threads == 1) for _, _, thread in found)
