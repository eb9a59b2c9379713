"""Splits are fair and never share a text; the prompt is whole, and a text in it is only a text."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chipviz.config import RunConfig
from chipviz.errors import ConfigError, SourceError, TaskError
from chipviz.sources import Table, read_table
from chipviz.task import (
    Examples,
    Task,
    bake,
    load_prompt,
    load_tokenizer,
    make_task,
    n_truncated,
    stratified_order,
)

WORDS = ["the", "old", "red", "house", "near", "a", "river", "goal", "bank", "atom"]


def task_of(frames, *, names=None, **settings):
    frames = frames if isinstance(frames, dict) else {"all": frames}
    config = RunConfig.checked(backbone="tiny", data="toy", **settings)
    return make_task(Table("toy", frames, names or {}), config)


def frame_of(n=60, classes=("no", "yes", "maybe")):
    labels = [classes[i % len(classes)] for i in range(n)]
    return pd.DataFrame({"text": [f"text {i}" for i in range(n)], "label": labels})


def all_texts(task):
    return {split: list(rows.texts) for split, rows in task.splits.items()}


# --- order and splits ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(0, 1000))
def test_every_prefix_of_the_order_is_stratified(labels, seed):
    """By arithmetic: a class is off by one row of its own, and by its share of the others' rows."""
    labels = np.array(labels)
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    classes, counts = np.unique(labels, return_counts=True)
    for label, count in zip(classes, counts, strict=True):
        share = count / len(labels)
        found = np.cumsum(labels[order] == label)
        expected = share * np.arange(1, len(labels) + 1)
        bound = (1 - share) + share * (len(classes) - 1)
        assert np.abs(found - expected).max() <= bound + 1e-9


def test_of_two_classes_each_is_within_one_row_of_its_share_in_every_prefix():
    labels = np.array([0] * 90 + [1] * 10)
    for seed in range(20):
        order = stratified_order(labels, np.random.default_rng(seed))
        rare = np.cumsum(labels[order])
        assert np.abs(rare - 0.1 * np.arange(1, 101)).max() <= 1.0


def test_rows_of_one_class_are_shuffled_and_evenly_so():
    """The first row of ten must come first about once in ten orders."""
    labels = np.repeat([0, 1], 10)
    orders = [stratified_order(labels, np.random.default_rng(seed)) for seed in range(300)]
    firsts = [next(row for row in order if row < 10) for order in orders]
    assert all(10 <= count <= 60 for count in Counter(firsts).values())
    assert len(set(firsts)) == 10


def test_made_splits_share_no_text_and_lose_none():
    task = task_of(frame_of(100, ("no", "yes")))
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sizes == {"train": 70, "validation": 10, "test": 20}
    every = [text for texts in all_texts(task).values() for text in texts]
    assert sorted(every) == sorted(frame_of(100)["text"])
    for rows in task.splits.values():
        assert abs(rows.labels.mean() - 0.5) <= 0.1


@given(st.lists(st.sampled_from(["a b", "A  B", "a\nb ", "c", "C", "d", "e"]), min_size=30))
def test_repeated_texts_never_straddle_two_made_splits(repeated):
    texts = [*repeated, *(f"text {i}" for i in range(30))]
    frame = pd.DataFrame(
        {"text": texts, "label": [("no", "yes")[i % 2] for i in range(len(texts))]}
    )
    task = task_of(frame)
    same = [{" ".join(t.lower().split()) for t in texts} for texts in all_texts(task).values()]
    assert sum(map(len, same)) == len(set.union(*same))


def test_a_text_counts_as_repeated_only_with_its_second_text():
    frame = frame_of().assign(text="one passage", question=[f"question {i}" for i in range(60)])
    task = task_of(frame, text_pair="question")
    assert sum(len(rows) for rows in task.splits.values()) == 60


def test_the_same_seed_gives_the_same_task_and_another_seed_another():
    first, again, other = (task_of(frame_of(), seed=seed) for seed in (7, 7, 8))
    assert all_texts(first) == all_texts(again) != all_texts(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_splits_that_a_source_gives_are_kept_repeated_texts_and_all():
    frames = {"train": frame_of(30), "validation": frame_of(9), "test": frame_of(12)}
    frames["train"].loc[1, "text"] = frames["train"].loc[0, "text"]
    task = task_of(frames)
    for split, frame in frames.items():
        assert Counter(task.splits[split].texts) == Counter(frame["text"])


def test_a_missing_validation_split_is_carved_from_the_training_rows_alone():
    held_out = frame_of(12).assign(text=[f"held out {i}" for i in range(12)])
    task = task_of({"train": frame_of(50), "test": held_out})
    assert set(task.splits["test"].texts) == set(held_out["text"])
    assert len(task.splits["validation"]) == 5
    assert not set(task.splits["validation"].texts) & set(task.splits["train"].texts)


def test_limits_take_the_first_rows_of_each_split():
    whole = task_of(frame_of())
    few = task_of(frame_of(), max_train=6, max_validation=3, max_test=4)
    for split, n in (("train", 6), ("validation", 3), ("test", 4)):
        assert few.splits[split].texts == whole.splits[split].texts[:n]


def test_labels_stay_with_their_texts():
    frame = frame_of()
    task = task_of(frame)
    truth = dict(zip(frame["text"], frame["label"], strict=True))
    for rows in task.splits.values():
        said = [task.label_names[label] for label in rows.labels]
        assert said == [truth[text] for text in rows.texts]


def test_labels_that_look_like_numbers_keep_their_spelling(tmp_path, home):
    path = tmp_path / "a.csv"
    lines = [f"text {i},{('007', '1.50', '7')[i % 3]}" for i in range(60)]
    path.write_text("text,label\n" + "\n".join(lines))
    table = read_table(str(path), home)
    assert make_task(table, RunConfig(backbone="x", data="y")).label_names == ("007", "1.50", "7")


def test_integers_are_class_numbers_where_the_source_declares_names_even_if_names_are_digits():
    """Names 1 to 3 with numbers 0 to 2: a split without number 0 must not be read as names."""
    text = [f"text {i}" for i in range(20)]
    train, test = ({"text": text, "label": labels * 10} for labels in ([1, 2], [0, 1]))
    frames = {"train": pd.DataFrame(train), "test": pd.DataFrame(test)}
    task = task_of(frames, names={"label": ["1", "2", "3"]})
    assert set(task.splits["train"].labels.tolist()) == {1, 2}
    assert set(task.splits["test"].labels.tolist()) == {0, 1}


def test_declared_names_are_found_by_name_where_the_labels_are_names():
    task = task_of(frame_of(), names={"label": ["yes", "no", "maybe", "never"]})
    assert task.label_names == ("yes", "no", "maybe", "never")
    assert task.n_classes == 4


def test_a_fingerprint_changes_with_any_text_label_or_name():
    frames = {split: frame_of(12) for split in ("train", "validation", "test")}
    before = task_of(frames).fingerprint
    for split, column, value in [("test", "text", "other"), ("validation", "label", "yes")]:
        changed = {**frames, split: frames[split].copy()}
        changed[split].loc[0, column] = value
        assert task_of(changed).fingerprint != before
    renamed = {split: frame.replace({"label": {"no": "nein"}}) for split, frame in frames.items()}
    assert task_of(renamed).fingerprint != before
    splits: list[dict] = [
        {"test": Examples(["a", "b"], None, np.array(y))} for y in ([0, 1], [1, 0])
    ]
    one, other = (Task("toy", ("no", "yes"), rows) for rows in splits)
    assert one.fingerprint != other.fingerprint


# --- columns ------------------------------------------------------------------------------------


def test_columns_are_guessed_by_their_usual_names_then_by_length():
    usual = pd.DataFrame({"Category": ["a", "b"] * 20, "Title": [f"t{i}" for i in range(40)]})
    assert task_of(usual).splits["train"].texts[0].startswith("t")
    odd = usual.rename(columns={"Title": "words"}).assign(note="x")
    assert task_of(odd).splits["train"].texts[0].startswith("t")


def test_named_columns_are_taken_before_guessed_ones():
    frame = frame_of().assign(other=[f"other {i}" for i in range(60)], topic=["a", "b"] * 30)
    task = task_of(frame, text="other", label="topic")
    assert task.splits["train"].texts[0].startswith("other")
    assert task.label_names == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"text": "zz"}, "text"), ({"label": "zz"}, "label"), ({"text_pair": "zz"}, "text-pair")],
)
def test_a_column_that_does_not_exist_is_refused_with_those_that_do(settings, option):
    with pytest.raises(TaskError, match=r"no column 'zz'; columns are 'text', 'label'") as no:
        task_of(frame_of(), **settings)
    assert f"--{option}" in no.value.hint


def test_a_table_without_a_label_column_is_refused_with_its_columns():
    with pytest.raises(TaskError, match=r"No label column was found; columns are 'text', 'y'"):
        task_of(frame_of().rename(columns={"label": "y"}))


def test_a_table_without_a_text_column_is_refused_with_its_columns():
    with pytest.raises(TaskError, match=r"No text column was found; columns are 'n', 'label'"):
        task_of(pd.DataFrame({"n": range(6), "label": ["a", "b"] * 3}))


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_value_is_refused_by_row_and_column(column):
    frame = frame_of()
    frame.loc[[4, 9], column] = None
    with pytest.raises(TaskError, match=rf"Row 5 has no value in column '{column}' \(2 rows"):
        task_of(frame)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("label", ["a"], "a list"),
        ("label", {"a": 1}, "a dict"),
        ("text", ["a", "b"], "a list"),
        ("text", "half \ud800", "half of a surrogate pair"),
    ],
)
def test_a_value_that_is_no_text_or_label_is_refused_by_row_and_column(column, value, said):
    frame = frame_of().astype(object)
    frame.at[2, column] = value
    with pytest.raises(TaskError, match=rf"Row 3 of test has {said} in column '{column}'"):
        task_of({"train": frame_of(), "test": frame})


def test_a_label_that_is_no_class_is_refused_by_row_and_split():
    frames = {"train": frame_of(20, (0, 1)), "test": frame_of(20, (0, -1))}
    with pytest.raises(TaskError, match=r"Row 2 of test has label '-1'.* 2 classes"):
        task_of(frames, names={"label": ["no", "yes"]})


def test_one_class_is_refused_by_its_own_name():
    with pytest.raises(TaskError, match="one class only, 'yes'"):
        task_of(frame_of(60, (1,)), names={"label": ["no", "yes"]})


@pytest.mark.parametrize("frame", [frame_of(2), frame_of(60).assign(text="always the same")])
def test_too_few_different_texts_are_refused_by_the_split_that_stays_empty(frame):
    with pytest.raises(TaskError, match="No text is left for the train split"):
        task_of(frame)


# --- the prompt ---------------------------------------------------------------------------------

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


def test_a_limit_that_cannot_hold_the_template_is_refused_with_both_numbers(tokenizer):
    template = "News: {text}\nTopic of this article:"
    fixed = len(bake(tokenizer, template, 64, SAMPLE).encode([""])[0])
    with pytest.raises(ConfigError, match=rf"takes {fixed} tokens, .* --max-length 3\b") as refused:
        bake(tokenizer, template, 3, SAMPLE)
    enough = int(refused.value.hint.split("--max-length ")[1].split()[0])
    assert bake(tokenizer, template, enough, SAMPLE).max_chars >= 1
    assert bake(tokenizer, template, fixed + 1, SAMPLE).max_chars >= 1
    with pytest.raises(ConfigError):
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
