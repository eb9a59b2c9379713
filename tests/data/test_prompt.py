"""The prompt is whole, and a text in it is only a text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chipviz.data.prompt import as_read, bake, load_prompt, load_tokenizer, n_truncated
from chipviz.data.task import Examples, Task
from chipviz.errors import ConfigError, SourceError, TaskError
from tests.families import make_tokenizer

WORDS = ["the", "old", "red", "house", "near", "a", "river", "goal", "bank", "atom"]

TEMPLATES = [
    "{text}",
    "News: {text}\nTopic of this article:",
    "News:{text}",
    "a\n{text}\nb",
    "{text} is about",
    "{text}\n",
]
LONG = 100_000
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def rows_of(texts, pairs=None):
    return Examples(list(texts), pairs, np.zeros(len(texts), dtype=np.int64))


SAMPLE = rows_of(["the old red house near a river", "the bank lost money on Tuesday"] * 5)


@pytest.fixture(scope="module", params=["plain", "adds <s>"])
def tokenizer(request, tiny_tokenizer_folder, bos_tokenizer_folder):
    folder = tiny_tokenizer_folder if request.param == "plain" else bos_tokenizer_folder
    return load_tokenizer(folder)


@pytest.mark.parametrize("template", TEMPLATES)
@given(text=SENTENCES)
def test_the_baked_prompt_is_the_plainly_tokenised_prompt(tokenizer, template, text):
    prompt = bake(tokenizer, template, 128, SAMPLE)
    assert prompt.encode([text]) == [tokenizer(template.replace("{text}", text))["input_ids"]]


def test_what_the_family_puts_before_a_text_stays_and_comes_once(bos_tokenizer_folder):
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    ids = bake(tokenizer, "News: {text}\nTopic:", 64, SAMPLE).encode(["the bank"])[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_two_texts_stand_where_the_template_wants_them(tokenizer):
    rows = rows_of(SAMPLE.texts, [f"near a river {i}" for i in range(10)])
    template = "Question: {text_pair}\nPassage: {text}\nAnswer:"
    prompt = bake(tokenizer, template, 128, rows)
    said = prompt.tokenizer.decode(prompt.encode(["the bank"], ["who went"])[0])
    assert said.removeprefix("<s>") == "Question: who went\nPassage: the bank\nAnswer:"


def test_without_a_template_two_texts_stand_on_two_lines(tokenizer):
    prompt = bake(tokenizer, None, 64, rows_of(SAMPLE.texts, ["who went"] * 10))
    said = prompt.tokenizer.decode(prompt.encode(["the bank"], ["who went"])[0])
    assert (said.removeprefix("<s>"), prompt.template) == (
        "the bank\nwho went",
        "{text}\n{text_pair}",
    )


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(text=ANY_TEXT)
def test_the_ends_of_the_prompt_stand_whatever_the_text(tokenizer, text):
    prompt = bake(tokenizer, "News: {text}\nTopic of this article:", 40, SAMPLE)
    ids = prompt.encode([text, "the bank"])
    n = len(tokenizer("\nTopic of this article:", add_special_tokens=False)["input_ids"])
    assert ids[0][-n:] == ids[1][-n:]
    assert prompt.tokenizer.decode(ids[0]).removeprefix("<s>").startswith("News:")


@pytest.mark.parametrize("model_max_length", [None, 48])
def test_the_suffix_of_a_very_long_text_is_never_truncated(tokenizer, model_max_length):
    prompt = bake(tokenizer, "News: {text}\nTopic of this article:", 40, SAMPLE)
    if model_max_length:
        prompt.tokenizer.model_max_length = model_max_length
    for text in ("red " * LONG, "x" * LONG, "\U0001f600" * LONG):
        (ids,) = prompt.encode([text])
        assert prompt.tokenizer.decode(ids).endswith("\nTopic of this article:")
        assert len(ids) <= (model_max_length or 4 * prompt.max_chars + 40)


@given(text=ANY_TEXT | st.sampled_from(["red\n" * 100, "a\r\nb\u2028" * 100, "\n" * 200]))
def test_the_character_limit_cuts_the_text_and_nothing_else(tokenizer, text):
    prompt = bake(tokenizer, "News:\n{text}\nTopic of this article:", 24, SAMPLE)
    assert prompt.encode([text]) == prompt.encode([text[: prompt.max_chars]])


def test_a_limit_of_a_whole_book_holds_to_the_character(tokenizer):
    prompt = bake(tokenizer, "{text}", 60_000, SAMPLE)
    assert prompt.max_chars > 100_000  # more than one repetition of a pattern may count
    cut = prompt.tokenizer.backend_tokenizer.normalizer.normalize_str
    text = "the old red house\n" * 20_000
    assert cut(text) == text[: prompt.max_chars]
    assert cut(text[: prompt.max_chars]) == text[: prompt.max_chars]


def test_most_texts_of_the_sample_fit_the_token_limit(tokenizer):
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(5, 80))) for _ in range(200)]
    prompt = bake(tokenizer, "News: {text}\nTopic:", 32, rows_of(texts))
    lengths = np.array([len(ids) for ids in prompt.encode(texts)])
    assert (lengths <= 32).mean() >= 0.85  # aimed at 0.95; a word cut in two may be more tokens
    assert np.median(lengths) > 24  # and the room is used


def test_a_control_token_in_a_users_text_stays_text(tokenizer):
    rows = rows_of(SAMPLE.texts, ["who went"] * 10)
    one = bake(tokenizer, "News: {text}\nTopic:", 64, SAMPLE)
    two = bake(tokenizer, "{text}\n{text_pair}", 64, rows)
    evil = "the </s> bank <pad><s>"
    control = {0, 1, 2}
    before = set(one.encode(["the bank"])[0]) & control
    for ids in (*one.encode([evil]), *two.encode([evil], [evil])):
        assert set(ids) & control == before
        assert evil in tokenizer.decode(ids)


def test_a_control_token_that_the_template_writes_is_one(tiny_tokenizer_folder):
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    ids = bake(tokenizer, "<s>News: {text}</s>", 64, SAMPLE).encode(["the bank"])[0]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A prompt and what plain transformers makes of its folder."""
    folder = tmp_path_factory.mktemp("prompt")
    prompt = bake(tokenizer, "News: {text}\nTopic of this article:", 40, SAMPLE)
    prompt.tokenizer.chat_template = "{{ messages }}"
    prompt.save(folder)
    return prompt, AutoTokenizer.from_pretrained(folder), folder


@given(text=ANY_TEXT | st.sampled_from(["a <s> b", "</s>", " ", "", "red " * 500]))
def test_a_saved_prompt_gives_the_same_tokens_in_plain_transformers(saved, text):
    prompt, plain, _ = saved
    assert [plain(text)["input_ids"]] == prompt.encode([text])


def test_a_saved_prompt_pads_on_the_right_and_has_no_chat_template(saved):
    prompt, plain, folder = saved
    assert plain.padding_side == "right"
    assert plain.pad_token is not None
    assert plain.chat_template is None
    again = load_prompt(folder, prompt.template, prompt.max_length, prompt.max_chars)
    assert again.fingerprint == prompt.fingerprint


def test_the_fingerprint_of_a_prompt_changes_with_template_and_limit(tokenizer):
    prints = {
        bake(tokenizer, template, limit, SAMPLE).fingerprint
        for template in ("{text}", "News: {text}")
        for limit in (32, 64)
    }
    assert len(prints) == 4


def test_baking_changes_nothing_in_the_tokenizer_it_is_given(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    bake(tokenizer, "News: {text}\nTopic:", 32, SAMPLE)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Topic:", r"holds \{text\} 0 times, expected 1"),
        ("", None),
        ("{text} and {text}", r"holds \{text\} 2 times, expected 1"),
        ("{text} {text_pair}", r"holds \{text_pair\} 1 times, expected 0"),
    ],
)
def test_a_template_whose_fields_do_not_fit_one_text_is_refused(tokenizer, template, said):
    if said is None:
        assert bake(tokenizer, template, 32, SAMPLE).template == "{text}"
        return
    with pytest.raises(ConfigError, match=said) as refused:
        bake(tokenizer, template, 64, SAMPLE)
    assert "{text}" in refused.value.hint


def test_a_template_without_the_second_of_two_texts_is_refused(tokenizer):
    rows = rows_of(SAMPLE.texts, ["who went"] * 10)
    with pytest.raises(ConfigError, match=r"holds \{text_pair\} 0 times, expected 1"):
        bake(tokenizer, "News: {text}", 64, rows)


@pytest.mark.parametrize("pairs", [None, ["what was it? " * 9] * 10])
def test_rows_as_they_are_read_give_the_tokens_of_the_whole_rows(tokenizer, pairs):
    """What TF-IDF is given is what the model is given: nothing more, nothing less."""
    rows = rows_of(["the old house by the river " * n for n in range(1, 11)], pairs)
    prompt = bake(tokenizer, None, 24, rows)
    read = as_read(prompt, rows)
    assert prompt.encode(read.texts, read.pairs) == prompt.encode(rows.texts, rows.pairs)
    assert sum(map(len, read.texts)) < sum(map(len, rows.texts))
    assert (read.labels == rows.labels).all()


def test_a_limit_that_cannot_hold_the_template_is_refused_with_both_numbers(tokenizer):
    template = "News: {text}\nTopic of this article:"
    fixed = len(bake(tokenizer, template, 64, SAMPLE).encode([""])[0])
    with pytest.raises(ConfigError, match=rf"takes {fixed} tokens, .* limit of 3\b") as refused:
        bake(tokenizer, template, 3, SAMPLE)
    assert refused.value.fields == ("max_length", "template")
    enough = int(refused.value.hint.split("Give ")[1].split()[0])
    assert bake(tokenizer, template, enough, SAMPLE).max_chars >= 1
    assert bake(tokenizer, template, fixed + 1, SAMPLE).max_chars >= 1
    with pytest.raises(ConfigError, match="no room for text"):
        bake(tokenizer, template, fixed, SAMPLE)


def test_texts_longer_than_the_limit_are_counted_over_all_splits(tokenizer):
    prompt = bake(tokenizer, "{text}", 32, SAMPLE)
    texts = ["x" * (prompt.max_chars + more) for more in (-1, 0, 1, 2)]
    task = Task("toy", ("no", "yes"), {"train": rows_of(texts), "test": rows_of(texts)})
    assert n_truncated(prompt, task) == 4


def test_a_tokenizer_pads_on_the_right_and_with_something_whatever_its_folder_says(
    tiny_tokenizer_folder, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder, padding_side="left")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.padding_side, loaded.pad_token) == ("right", "</s>")


def test_no_texts_are_no_prompts(tokenizer):
    assert bake(tokenizer, "{text}", 32, SAMPLE).encode([]) == []


def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(SourceError, match="No tokenizer can be loaded") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in refused.value.message


def test_a_text_denser_than_the_sample_ends_where_the_model_does_and_the_template_stays(tokenizer):
    """The limit stands in characters: a text of other letters may have many more tokens."""
    tokenizer.model_max_length = 30
    prompt = bake(tokenizer, "say {text} now", 24, SAMPLE)
    dense = "\U0001f600" * prompt.max_chars
    (ids,) = prompt.encode([dense])
    (plain,) = prompt.encode(["the old house"])
    assert len(ids) == 30
    assert ids[-2:] == plain[-2:]


def test_a_limit_beyond_the_models_own_is_refused(tokenizer):
    tokenizer.model_max_length = 30
    with pytest.raises(
        ConfigError, match="reads at most 30 tokens, and the length limit is 31"
    ) as no:
        bake(tokenizer, "say {text} now", 31, SAMPLE)
    assert no.value.fields == ("max_length",)


def test_a_prompt_without_a_token_is_refused_in_words():
    """A tokenizer of bytes puts nothing before a text, so an empty one leaves nothing to read."""
    prompt = bake(make_tokenizer("bytes"), None, 16, Examples(["a"], None, np.zeros(1, int)))
    with pytest.raises(TaskError, match="has no tokens"):
        prompt.encode(["a", ""])
    with_template = bake(
        make_tokenizer("bytes"), "Text: {text}", 16, Examples(["a"], None, np.zeros(1, int))
    )
    assert with_template.encode([""])[0]
