"""Many texts on one decoder: each is what it would be alone, none is lost, none stalls the others."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import pytest

from bitfold.engine import Sampling
from bitfold.errors import BitfoldError
from bitfold.serving.guessing import Guessing
from bitfold.serving.metrics import Metrics
from bitfold.serving.scheduler import _ALONE, Closed, QueueFull, Scheduler
from serving.fakes import END, FakeDecoder, Text, next_token, until


@pytest.fixture
def run() -> Iterator[list[Scheduler]]:
    """Schedulers to close."""
    made: list[Scheduler] = []
    yield made
    for scheduler in made:
        scheduler.close()


def start(
    run: list[Scheduler], decoder: FakeDecoder, waiting: int = 100, guessing: Guessing | None = None
) -> Scheduler:
    run.append(Scheduler(decoder, Metrics(), waiting, guessing))
    return run[-1]


@pytest.mark.parametrize("guesses", [0, None, 7], ids=["plain", "auto", "guessed"])
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_every_text_is_what_it_would_be_alone(run, sequences, guesses):
    """Sixty texts of random lengths, from several threads, some with beginnings in common."""
    draw = random.Random(sequences)
    decoder = FakeDecoder(sequences)
    scheduler = start(run, decoder, guessing=Guessing(guesses))
    shared = [draw.randrange(256) for _ in range(50)]
    texts = [
        Text(shared[: draw.randrange(50)] + [draw.randrange(256) for _ in range(draw.randrange(1, 400))], limit)
        for limit in (1, 2, 30) * 20
    ]
    threads = [
        threading.Thread(target=lambda part=part: [scheduler.submit(text.job) for text in part])
        for part in (texts[:20], texts[20:40], texts[40:])
    ]
    for thread in threads:
        thread.start()
    for text in texts:
        assert text.wait() == text.expected()
        assert text.pieces[-1].finish == "length"
    assert all(sum(tokens for _, tokens in work) <= _ALONE + sequences for work in decoder.passes)


def repeats(text: Sequence[int]) -> int:
    """A text that goes round, but for a place that depends on where it is."""
    return 65 + len(text) % (5 if len(text) % 40 else 3)


@pytest.mark.parametrize("sequences", [1, 2, 4, 8, 9])
def test_texts_that_repeat_themselves_are_guessed_where_rows_are_to_spare(run, sequences):
    decoder = FakeDecoder(sequences, following=repeats)
    decoder.gate.clear()
    scheduler = start(run, decoder, guessing=Guessing(7))
    texts = [Text([65 + i, 66, 67], 100) for i in range(sequences)]
    scheduler.submit(*(text.job for text in texts))
    decoder.gate.set()
    for text in texts:
        assert text.wait() == text.expected(repeats)
        assert text.job.made == 100
    rows = [sum(tokens for _, tokens in work) for work in decoder.passes[1:]]
    assert max(rows) <= max(8, sequences)
    few = {1: 30, 2: 40, 4: 70}.get(sequences)
    assert len(rows) < few if few is not None else len(rows) == 99


def test_a_text_may_end_among_guesses(run):
    decoder = FakeDecoder(1, following=lambda text: END if len(text) == 33 else 65 + len(text) % 4)
    scheduler = start(run, decoder, guessing=Guessing(7))
    for limit in (20, 21, 22, 100):
        text = Text([65, 66], limit)
        scheduler.submit(text.job)
        text.wait()
        assert text.job.made == min(limit, 32)
        assert text.pieces[-1].finish == ("stop" if limit == 100 else "length")
        until(scheduler.idle)
        assert decoder.texts[0] == [65, 66, *text.job.ids[:-1]]


def test_texts_are_written_side_by_side(run):
    decoder = FakeDecoder(3)
    decoder.gate.clear()
    scheduler = start(run, decoder)
    texts = [Text([i, 2, 3], 20) for i in range(3)]
    for text in texts:
        scheduler.submit(text.job)
    decoder.gate.set()
    for text in texts:
        text.wait()
    assert len(decoder.passes) <= 22


def test_a_long_prompt_does_not_stall_who_is_writing(run):
    """While another text is read, every pass brings the first one a token, and reads a part."""
    decoder = FakeDecoder(2, positions=10000)
    scheduler = start(run, decoder)
    writing, reading = Text([1], 400), Text(list(range(256)) * 10, 5)
    scheduler.submit(writing.job)
    until(lambda: len(writing.pieces) > 3)
    scheduler.submit(reading.job)
    reading.wait()
    writing.wait()
    parts = [work for work in decoder.passes if any(tokens > 1 for _, tokens in work)]
    assert all((0, 1) in work for work in parts)
    assert len(parts) >= 2560 / _ALONE
    assert reading.wait() == reading.expected()


def test_what_a_sequence_holds_is_not_read_again(run):
    decoder = FakeDecoder(3)
    scheduler = start(run, decoder)
    first, other = Text([1, 2, 3, 4, 5], 3), Text([9, 9], 3)
    for text in (first, other):
        scheduler.submit(text.job)
        text.wait()
    said = [1, 2, 3, 4, 5, *(next_token([1, 2, 3, 4, 5]),)]
    again = Text([*said, 77, 78], 3)
    scheduler.submit(again.job)
    assert again.wait() == again.expected()
    assert again.job.reused == len(said)
    assert decoder.copies == []  # the conversation went on where it was


def test_a_common_beginning_is_copied_and_nobody_s_text_is_lost(run):
    """A system prompt that another conversation holds, idle or being written."""
    decoder = FakeDecoder(3)
    scheduler = start(run, decoder)
    system = list(range(50))
    first = Text([*system, *range(100, 200)], 30)
    scheduler.submit(first.job)
    first.wait()
    second = Text([*system, 7], 3)
    scheduler.submit(second.job)
    assert second.wait() == second.expected()
    assert second.job.reused == 50
    assert decoder.copies == [(0, 1, 50)]
    again = Text([*first.ids, 1], 3)
    scheduler.submit(again.job)
    again.wait()
    assert again.job.reused == 150


def test_ends(run):
    """An end token ends a text and is not part of it; so does a stop text."""
    decoder = FakeDecoder(1, following=lambda text: END if len(text) >= 6 else 64 + len(text))
    scheduler = start(run, decoder)
    text = Text([1, 2], 20)
    scheduler.submit(text.job)
    assert text.wait() == "cdef"
    assert text.pieces[-1].finish == "stop"
    assert text.job.made == 5
    stopped = Text([3, 2], 20, Sampling(stop=("de",)))
    scheduler.submit(stopped.job)
    assert stopped.wait() == "c"
    assert stopped.pieces[-1].finish == "stop"


def test_who_goes_away_frees_the_place(run):
    decoder = FakeDecoder(1, positions=10**6)
    scheduler = start(run, decoder)
    endless, waiting, next_one = Text([1], 10**5), Text([2], 5), Text([3], 5)
    for text in (endless, waiting, next_one):
        scheduler.submit(text.job)
    until(lambda: len(endless.pieces) > 3)
    scheduler.cancel(waiting.job)
    scheduler.cancel(endless.job)
    assert next_one.wait() == next_one.expected()
    assert not waiting.pieces
    assert not endless.ended.is_set()
    until(scheduler.idle)
    scheduler.cancel(endless.job)  # twice, or too late: nothing happens


def test_the_queue_has_an_end(run):
    decoder = FakeDecoder(1)
    decoder.gate.clear()
    scheduler = start(run, decoder, waiting=2)
    texts = [Text([i], 2) for i in range(3)]
    scheduler.submit(texts[0].job)
    until(lambda: not scheduler._queue)
    scheduler.submit(texts[1].job, texts[2].job)
    with pytest.raises(QueueFull):
        scheduler.submit(Text([9], 2).job)
    decoder.gate.set()
    for text in texts:
        assert text.wait() == text.expected()
    scheduler.submit(Text([9], 2).job)


def test_a_pass_that_fails_ends_its_texts_and_no_others(run, caplog):
    decoder = FakeDecoder(2)
    scheduler = start(run, decoder)
    decoder.broken = RuntimeError("no memory")
    text = Text([1, 2, 3], 5)
    scheduler.submit(text.job)
    text.wait()
    assert isinstance(text.pieces[-1].error, RuntimeError)
    assert "no memory" in caplog.text
    again = Text([1, 2, 3], 5)
    scheduler.submit(again.job)
    assert again.wait() == again.expected()
    assert again.job.reused == 0


def test_a_text_that_fails_alone(run):
    """Here its bias names a token that there is not; the text beside it goes on."""
    decoder = FakeDecoder(2)
    scheduler = start(run, decoder)
    bad, good = Text([1], 50, Sampling(logit_bias={9999: 1.0})), Text([2], 50)
    scheduler.submit(good.job, bad.job)
    assert good.wait() == good.expected()
    bad.wait()
    assert isinstance(bad.pieces[-1].error, BitfoldError)


def test_closing():
    decoder = FakeDecoder(1, positions=10**6)
    scheduler = Scheduler(decoder, Metrics(), 10)
    running, waiting = Text([1], 10**5), Text([2], 5)
    scheduler.submit(running.job, waiting.job)
    until(lambda: running.pieces)
    scheduler.close()
    for text in (running, waiting):
        text.wait()
        assert isinstance(text.pieces[-1].error, Closed)
    with pytest.raises(Closed):
        scheduler.submit(Text([1]).job)


def test_a_text_that_cannot_be_begun(run, caplog):
    decoder = FakeDecoder(1)
    scheduler = start(run, decoder)
    keep, decoder.keep = decoder.keep, None  # type: ignore[method-assign, assignment]
    bad = Text([1], 3)
    scheduler.submit(bad.job)
    bad.wait()
    assert isinstance(bad.pieces[-1].error, TypeError)
    decoder.keep = keep  # type: ignore[method-assign]
    good = Text([1], 3)
    scheduler.submit(good.job)
    assert good.wait() == good.expected()
