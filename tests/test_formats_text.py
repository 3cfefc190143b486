"""Ids to text: never half a character, never a stop string, deltas that join to the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from serve.engine.face import TokenScore
from serve.formats.text import StopFilter, TextParser, detokenizer
from serve.formats.vocabulary import Vocabulary
from serve.values import TextDelta
from tests.parsing import read_every_way
from tests.small_tokenizers import byte_level, sentencepiece, wordpiece

MAKERS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}
TEXT = "naïve 日本語 👩‍👩‍👧, 🦆 and 龘!\n\tdone"
few = settings(max_examples=60, deadline=None)


def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(MAKERS[name]())


def deltas(words: Vocabulary, ids: list[int]) -> list[str]:
    reader = detokenizer(words)
    return [*(reader.push(token) for token in ids), reader.flush()]


@pytest.mark.parametrize("name", MAKERS)
@given(text=st.text(max_size=40))
@few
def test_deltas_join_to_the_whole_decoded_text(name: str, text: str) -> None:
    words = vocabulary(name)
    ids = words.encode_plain(text)
    assert "".join(deltas(words, ids)) == MAKERS[name]().decode(ids)


@pytest.mark.parametrize("name", MAKERS)
@given(seeds=st.lists(st.integers(0, 10**6), max_size=30))
@few
def test_any_ids_at_all_give_the_text_that_decoding_them_together_gives(
    name: str, seeds: list[int]
) -> None:
    words = vocabulary(name)
    ids = [seed % words.size for seed in seeds]
    ids = [token for token in ids if token not in words.control_ids]
    said = "".join(deltas(words, ids))
    assert said == words.decode(ids)
    whole = MAKERS[name]().decode(ids)
    if "\ufffd" not in whole:  # on broken bytes the libraries disagree how many marks to put
        assert said == whole


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_no_delta_holds_half_a_character(name: str) -> None:
    words = vocabulary(name)
    ids = words.encode_plain(TEXT)
    assert any(len(words.bytes_of(token).decode("utf-8", "ignore")) == 0 for token in ids)
    assert all("\ufffd" not in delta for delta in deltas(words, ids))
    assert "".join(deltas(words, ids)) == TEXT


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_a_truncated_character_shows_as_a_replacement_mark_at_the_end_only(name: str) -> None:
    words = vocabulary(name)
    ids = words.encode_plain("ok 🦆")[:-1]
    told = deltas(words, ids)
    assert all("\ufffd" not in delta for delta in told[:-1])
    assert "".join(told).startswith("ok ") and told[-1].endswith("\ufffd")


def test_ids_outside_the_vocabulary_say_nothing() -> None:
    for name in MAKERS:
        words = vocabulary(name)
        assert "".join(deltas(words, [words.size, -1, 10**9])) == ""
        assert words.bytes_of(10**9) == b"" == words.bytes_of(-1)


def test_padded_ids_of_the_output_layer_say_nothing() -> None:
    words = Vocabulary(byte_level(), 1000)
    assert words.size == 1000
    assert "".join(deltas(words, [999])) == ""


def test_a_text_that_continues_another_keeps_its_first_space() -> None:
    words = vocabulary("sentencepiece")
    ids = words.encode_plain("world")
    reader = detokenizer(words, is_start=False)
    assert "".join(map(reader.push, ids)) + reader.flush() == " world"
    assert "".join(deltas(words, ids)) == "world"


def test_token_bytes_join_to_the_text() -> None:
    words = vocabulary("byte-level")
    ids = words.encode_plain(TEXT)
    assert b"".join(map(words.bytes_of, ids)).decode() == TEXT


def naive_stop(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first, by trying every length."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_wherever_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = naive_stop(text, stops)
    stop_filter = StopFilter(stops)
    said = ""
    for a, b in zip(edges, edges[1:], strict=False):
        said += stop_filter.push(text[a:b])
        assert whole.startswith(said)  # nothing is said that would have to be taken back
    if not stop_filter.is_stopped:
        said += stop_filter.flush()
    assert said == whole
    assert stop_filter.is_stopped == any(stop in text for stop in stops)


def parser(name: str = "byte-level", **options: object) -> Callable[[], TextParser]:
    words = vocabulary(name)
    return lambda: TextParser(words, hidden=words.control_ids, **options)  # type: ignore[arg-type]


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    return list((tokenizer or byte_level()).encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stops", [(), ("fox ju", "dog"), ("!!!",)])
def test_the_text_parser_tells_the_same_however_ids_arrive(
    name: str, stops: tuple[str, ...]
) -> None:
    ids = ids_of("The quick brown fox jumps over the lazy dog !", MAKERS[name]())
    told, reason, thought = read_every_way(parser(name, stops=stops), ids)
    whole = MAKERS[name]().decode(ids)
    assert told == [("text", 0, naive_stop(whole, list(stops)))]
    assert (reason, thought) == ("stop", 0)


def test_control_tokens_never_show() -> None:
    ids = ids_of("<|im_start|>hello<|im_end|><s> world")
    assert read_every_way(parser(), ids)[0] == [("text", 0, "hello world")]


def test_after_a_stop_string_nothing_more_is_said() -> None:
    reading = parser(stops=("fox",))()
    said = reading.feed(ids_of("a fox"))
    assert reading.is_stopped
    assert "".join(e.text for e in said if isinstance(e, TextDelta)) == "a "
    assert reading.feed(ids_of(" and more")) == [] == reading.finish()


def test_length_stays_length() -> None:
    assert parser()().reason("length") == "length"


def test_logprobs_ride_with_the_text_and_cover_its_bytes() -> None:
    ids = ids_of("hé 🦆 end")
    reading = parser()()
    scores = [TokenScore(-0.5, ((token, -0.5), (5, -2.0))) for token in ids]
    found = [
        event
        for token, score in zip(ids, scores, strict=True)
        for event in reading.feed((token,), (score,))
    ]
    told = [event for event in [*found, *reading.finish()] if isinstance(event, TextDelta)]
    data = b""
    text = ""
    for event in told:
        data += b"".join(logprob.data for logprob in event.logprobs)
        text += event.text
        assert data.startswith(text.encode())  # ahead by half a character at most
        assert all(len(logprob.top) == 2 for logprob in event.logprobs)
    assert data.decode() == text == "hé 🦆 end"
    assert sum(len(event.logprobs) for event in told) == len(ids)


def test_a_held_stop_string_takes_its_logprobs_with_it() -> None:
    reading = parser(stops=("END",))()
    ids = ids_of("ok END")
    found = reading.feed(ids, [TokenScore(-1.0)] * len(ids))
    told = [event for event in found if isinstance(event, TextDelta)]
    assert "".join(event.text for event in told) == "ok "
    assert b"N" not in b"".join(p.data for event in told for p in event.logprobs)
