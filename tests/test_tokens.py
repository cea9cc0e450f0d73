"""CLIP's byte-pair encoding, whole and cut: the same ids, and nothing lost in silence."""
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from hierprompt.clip.tokens import NUM_BYTES, CutTokenizer, FullTokenizer, tokens_of

CLIP = SimpleTokenizer()
TEXTS = [
    "zebra",
    "a photo of a {}.",
    "A photo of a ZEBRA.",
    "Côte d'Ivoire",
    "piñata",
    "it's 7 o'clock!",
    "X X X X jack-o-lantern, a type of thing.",
    "fire  engine\n",
    "",
]


@pytest.fixture(scope="module")
def cut(): return CutTokenizer(tokens_of(TEXTS), context_length=24)


@pytest.mark.parametrize("text", TEXTS)
def test_the_whole_tokenizer_is_open_clips(text):
    assert torch.equal(FullTokenizer()(text), CLIP(text))


@pytest.mark.parametrize("text", TEXTS)
def test_cut_ids_stand_for_clips_ids(cut, text):
    kept = cut.tokens
    assert [kept[i - 1] for i in cut.encode(text)] == CLIP.encode(text)


def test_rows_start_end_and_pad(cut):
    ids = cut(TEXTS)
    assert ids.dtype == torch.int64 and ids.shape == (len(TEXTS), 24) and (ids[:, 0] == cut.sot).all()
    for row, text in zip(ids, TEXTS):
        end = len(cut.encode(text)) + 1
        assert row[end] == cut.eot == row.max() and row.argmax() == end and not row[end + 1:].any() and row[1:end].all()


def test_the_end_is_the_highest_id_and_zero_only_pads(cut):
    assert cut.eot == cut.vocab_size - 1 == cut.sot + 1 == len(cut.tokens) + 2
    assert min(cut.ids.values()) == 1 and sorted(cut.ids.values()) == list(range(1, len(cut.tokens) + 1))


def test_all_byte_tokens_are_kept():
    assert tokens_of([]) == list(range(NUM_BYTES))
    cut = CutTokenizer(tokens_of([]))
    assert len(cut.encode("q")) == len(cut.encode("!")) == 1


@pytest.mark.parametrize(
    "make", [lambda length: FullTokenizer(context_length=length), lambda length: CutTokenizer(tokens_of(["zebra"]), length)]
)
def test_a_text_fits_exactly_or_is_refused(make):
    text = " ".join(["zebra"] * 4)
    assert int((make(6)(text) != 0).sum()) == 6
    with pytest.raises(ValueError, match="'zebra zebra zebra zebra' has 6 tokens with start and end, the context holds 5: shorten"):
        make(5)(["zebra", text])


def test_open_clip_would_have_lost_the_end():
    long = " ".join(["very"] * 80 + ["zebra"])
    assert "zebra" not in CLIP.decode(CLIP(long)[0].tolist())
    with pytest.raises(ValueError, match="83 tokens"): FullTokenizer()(long)


def test_an_unknown_word_is_named(cut):
    with pytest.raises(ValueError, match="the word 'okapi' of 'a photo of a okapi.' is not in the cut vocabulary of"):
        cut(["zebra", "a photo of a okapi."])


def test_the_written_end_token_is_no_word(cut):
    with pytest.raises(ValueError, match="<end_of_text>"): cut("zebra <end_of_text>")


@pytest.mark.parametrize("tokens", [[], [3, 2], [2, 2], [-1, 4], [49406], [5, 49407]])
def test_a_bad_list_of_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="strictly ascending CLIP ids below 49406"): CutTokenizer(tokens)


@pytest.mark.parametrize("bad", [3, [3], ["zebra", None]])
def test_only_texts_are_read(cut, bad):
    with pytest.raises(TypeError): cut(bad)


def test_both_have_one_interface(cut):
    for tokenizer in (cut, FullTokenizer()):
        assert tokenizer("zebra").shape == (1, tokenizer.context_length)
        assert tokenizer.encode("zebra") and tokenizer.sot < tokenizer.eot == tokenizer.vocab_size - 1
