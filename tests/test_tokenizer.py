import pytest
from transformers import CLIPTokenizer

from t2i_align.playground.grammar import vocabulary
from t2i_align.playground.tokenizer import CONTEXT, END, START, build_tokenizer
from t2i_align.playground.world import SPLITS, sample_scenes

ODD = [
    "",
    "zebra crossing 42!",
    "größe 東京 🙂",
    "a\ttab,\nline",
    "red" * 40,
    "<|startoftext|> a <|endoftext|>",
    "REDCIRCLE",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_is_one_token(tokenizer):
    ids = [tokenizer(word).input_ids for word in vocabulary()]
    assert {len(i) for i in ids} == {3}
    assert {(i[0], i[-1]) for i in ids} == {(0, 1)}
    assert len({i[1] for i in ids}) == len(vocabulary())


def test_every_word_is_one_token_within_a_caption(tokenizer):
    for split in SPLITS:
        for scene in sample_scenes(200, 1, split):
            words = str(scene.caption).split()
            tokens = tokenizer.tokenize(str(scene.caption))
            assert tokens == [word + "</w>" for word in words]
            assert len(tokens) + 2 <= CONTEXT


def test_case_does_not_matter(tokenizer):
    assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids([START, END]) == [0, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.model_max_length == CONTEXT == 32


def test_captions_are_padded_to_the_context(tokenizer):
    batch = tokenizer(["a red circle", "two green stars"], padding="max_length", truncation=True)
    assert [len(ids) for ids in batch.input_ids] == [CONTEXT] * 2
    assert batch.input_ids[0][5:] == [1] * (CONTEXT - 5)
    assert batch.attention_mask[0] == [1] * 5 + [0] * (CONTEXT - 5)


def test_captions_can_be_read_back(tokenizer):
    text = "a red circle left of an orange star on a gray background"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("text", ODD)
def test_unknown_words_do_not_fail(tokenizer, text):
    ids = tokenizer(text, truncation=True).input_ids
    assert ids[0] == 0
    assert ids[-1] == 1
    assert len(ids) <= CONTEXT
    assert max(ids) < len(tokenizer)


def test_unknown_words_differ_from_each_other(tokenizer):
    ids = [tuple(tokenizer(word).input_ids) for word in ("zebra", "crossing", "rd", "redd", "42")]
    assert len(set(ids)) == 5
    assert all(1 not in one[1:-1] for one in ids)  # spelt, not unknown


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    captions = [str(scene.caption) for scene in sample_scenes(50, 2, "heldout")]
    for texts in (captions, vocabulary(), ODD):
        assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
    assert loaded.model_max_length == CONTEXT
    assert len(loaded) == len(tokenizer)


def test_building_is_deterministic(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
