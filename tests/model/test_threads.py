"""What begins while other work leaves threads idle."""

from __future__ import annotations

import pytest

from assay.model.threads import meanwhile, spare


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
