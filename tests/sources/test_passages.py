"""Checks of the embedded passages (mxlab/tasks/passages.jsonl) and of their data card."""

import collections
import hashlib
import json
import re

import pytest

from support.paths import ROOT

TASKS = ROOT / "mxlab" / "sources"
DATA = TASKS / "passages.jsonl"
CARD = TASKS / "PASSAGES.md"


def split_target(text: str) -> tuple[str, str]:
    """Context and target as lm-eval's LAMBADA tasks cut them: at the last space."""
    context, _, target = text.rpartition(" ")
    return context, target


def occurs_earlier(text: str) -> bool:
    context, target = split_target(text)
    return target.lower() in re.findall(r"[^\W\d_]+", context.lower())


def card_number(card: str, quantity: str) -> int:
    row = re.search(rf"^\| {re.escape(quantity)} \| (\d+)\b", card, re.MULTILINE)
    assert row is not None, f"the card has no row {quantity!r}"
    return int(row.group(1))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    raw = DATA.read_bytes().decode("utf-8")
    assert raw.endswith("\n")
    assert "\r" not in raw
    return [json.loads(line) for line in raw[:-1].split("\n")]


@pytest.fixture(scope="module")
def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


def test_rows_are_objects_with_one_string(rows):
    assert len(rows) >= 200
    assert all(isinstance(row, dict) and set(row) == {"text"} and isinstance(row["text"], str) for row in rows)


def test_texts_are_unique(texts):
    assert len({" ".join(t.lower().split()) for t in texts}) == len(texts)


def test_no_two_texts_share_a_long_run_of_words(texts):
    seen: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        for j in range(len(words) - 6):
            run = tuple(words[j : j + 7])
            assert seen.setdefault(run, i) == i, f"{' '.join(run)!r} in passages {seen[run]} and {i}"


def test_white_space(texts):
    for text in texts:
        assert text == text.strip(), text
        assert not re.search(r"[^\S \n]", text), text  # no tab, no-break space, ...
        assert not re.search(r"\s\s", text), text


def test_target_is_one_word_of_letters_after_a_space(texts):
    for text in texts:
        context, target = split_target(text)
        assert re.fullmatch(r"[A-Za-z]+", target), text
        # the cut at ' ' of lm-eval and the cut at white space name the same word
        assert text.split(" ")[-1] == text.split()[-1] == target
        assert context.strip() == context != "", text


def test_no_target_more_than_twice(texts):
    counts = collections.Counter(split_target(t)[1].lower() for t in texts)
    assert max(counts.values()) <= 2, counts.most_common(5)


def test_length(texts):
    for text in texts:
        assert 25 <= len(text.split()) <= 110, text
        ends = re.findall(r"(?<!Mr)(?<!Mrs)[.!?][\"']?\s+[\"A-Z]", text)
        assert len(ends) <= 4, f"more than five sentences: {text}"


def test_most_targets_occur_earlier(texts):
    assert sum(map(occurs_earlier, texts)) >= 0.7 * len(texts)


def test_card_agrees_with_the_file(texts):
    card = CARD.read_text(encoding="utf-8")
    assert hashlib.sha256(DATA.read_bytes()).hexdigest() in re.findall(r"\b[0-9a-f]{64}\b", card)
    assert card_number(card, "passages") == len(texts)
    assert card_number(card, "distinct target words") == len({split_target(t)[1].lower() for t in texts})
    assert card_number(card, "targets that occur earlier in the passage") == sum(map(occurs_earlier, texts))
