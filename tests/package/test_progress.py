"""Progress: who shows it, what is said, and how often."""

import time

import pytest

from mxlab.progress import LineReporter, Steps, clock, line_of, shown_by, track


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def begin(self, steps: Steps) -> None:
        self.events.append(("begin", steps.description, steps.total))

    def advance(self, steps: Steps) -> None:
        self.events.append(("advance", steps.description, steps.done))

    def end(self, steps: Steps) -> None:
        self.events.append(("end", steps.description))


def test_items_are_steps_and_inner_ones_are_shown_too():
    recorder = Recorder()
    with shown_by(recorder):
        for _ in track(["a", "b"], "outer"):
            with Steps("inner", 3) as steps:
                steps.advance(2)
                steps.advance(2)  # a batch larger than what is left
    assert recorder.events[:4] == [
        ("begin", "outer", 2),
        ("begin", "inner", 3),
        ("advance", "inner", 2),
        ("advance", "inner", 3),
    ]
    assert recorder.events[4:6] == [("end", "inner"), ("advance", "outer", 1)]
    assert recorder.events[-1] == ("end", "outer")


def test_nobody_has_to_look():
    assert list(track([1, 2], "quiet")) == [1, 2]
    recorder = Recorder()
    with shown_by(recorder), shown_by(None):
        assert list(track(iter([1, 2]), "quiet")) == [1, 2]
    assert recorder.events == []


def test_an_error_ends_the_steps():
    recorder = Recorder()

    def fail() -> None:
        with Steps("failing", 1):
            raise ZeroDivisionError

    with shown_by(recorder), pytest.raises(ZeroDivisionError):
        fail()
    assert recorder.events[-1] == ("end", "failing")


def test_lines_come_at_the_beginning_and_regularly():
    lines: list[str] = []
    with shown_by(LineReporter(lines.append, interval=0.05)), Steps("sweep", 4) as outer, Steps("rows") as inner:
        outer.advance()
        inner.advance(5)
        deadline = time.monotonic() + 20
        while len(lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines[0] == "sweep (4) ..."
    assert "sweep: 1 of 4" in lines[1]
    assert "left" in lines[1]
    assert "rows: 5 done" in lines[1]
    said = len(lines)
    time.sleep(0.2)
    assert len(lines) <= said + 1  # nothing is written once the work is over


def test_what_a_line_says():
    steps = Steps("ex1", 4)
    assert line_of(steps).startswith("ex1: 0 of 4, 0:0")
    assert "left" not in line_of(steps)
    steps.advance()
    assert line_of(steps).endswith("left")
    assert (clock(5), clock(65), clock(3723)) == ("0:05", "1:05", "1:02:03")
