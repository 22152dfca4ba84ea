"""Columns outside the row's format: a system prompt is read, others are unread or refused.

An unread column is reported. A column of media, preferences or loss masks refuses the row, because
training without it would be another training.
"""

import pytest

from pipeline.rows.examples import Message, RowError
from pipeline.rows.formats import read_example
from tests.messages import refused
from tests.rows.read import row_of

pytestmark = pytest.mark.unit

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FORMATS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
    "pre-tokenised": {"input_ids": [1], "labels": [1]},
}
EMPTY_TEXTS = [None, "", " \n", []]
EMPTY = [*EMPTY_TEXTS, {}, [None], [""], {"bytes": None, "path": None}]
MEDIA_AND_PREFERENCES = [
    "image", "images", "Pictures", "audio", "videos", "image_path", "documents", "sound",
    "chosen", "rejected", "rejected_response", "chosen_messages",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", MEDIA_AND_PREFERENCES)
def test_only_a_filled_column_of_media_or_preferences_refuses_the_row(name, column):
    row = FORMATS[name]
    without_column = read_example(row_of(row))
    assert without_column.data_format == name
    for empty in EMPTY:
        assert read_example(row_of(row | {column: empty})) == without_column
    for value in ("x.png", ["x.png"], [{"path": "x.png"}], {"role": "assistant", "content": "b"}):
        with refused(f"`{column}`", error=RowError):
            read_example(row_of(row | {column: value}))


@pytest.mark.parametrize("name", FORMATS)
def test_other_columns_with_a_value_are_reported_as_unread(name):
    row = FORMATS[name]
    others = {"label": True, "score": 0, "meta": {"a": [None, "x"]}, "note": "n"}
    empty = {"a": None, "b": None, "c": None, "d": "", "e": [[]]}
    result = read_example(row_of(row | others | empty))
    assert result.unread == ("label", "meta", "note", "score")
    assert result.example == read_example(row_of(row)).example


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt-completion"])
def test_a_row_labelled_undesirable_is_refused(name):
    row = FORMATS[name]
    for column, value in [
        ("label", False), ("label", "False"), ("kto_tag", False), ("desirable", "false"),
        ("undesirable", True), ("is_undesirable", "true"),
    ]:  # fmt: skip
        with refused(f"`{column}`", "undesirable", error=RowError):
            read_example(row_of(row | {column: value}))
    for column, value in [("label", True), ("label", 0), ("label", "no"), ("undesirable", False)]:
        result = read_example(row_of(row | {column: value}))
        assert result.unread == (column,)


def test_a_false_label_of_a_text_row_does_not_refuse_it():
    assert read_example(row_of({"text": "t", "label": False})).unread == ("label",)


def test_a_preference_pair_is_read_only_if_the_user_maps_one_answer():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_score": 1}
    result = read_example(row_of(row), "auto", {"completion": "chosen"})
    assert result.example == read_example(row_of({"prompt": "q", "completion": "a"})).example
    assert result.unread == ("rejected", "rejected_score")
    with refused("`chosen`", "columns", error=RowError):
        read_example(row_of(row))


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca"])
def test_a_system_prompt_column_becomes_the_first_message(name, column):
    row = FORMATS[name]
    result = read_example(row_of(row | {column: "be brief"}))
    assert result.example.messages[0] == Message("system", "be brief")
    assert not result.unread
    for empty in EMPTY_TEXTS:
        assert read_example(row_of(row | {column: empty})) == read_example(row_of(row))


def test_a_column_is_reported_as_unread_if_another_is_mapped_to_its_name():
    row = {"question": "q", "answer": "a", "prompt": "not this", "completion": ""}
    columns = {"prompt": "question", "completion": "answer"}
    assert read_example(row_of(row), "auto", columns).unread == ("prompt",)


def test_an_unread_mapped_column_is_reported_by_its_name_in_the_data():
    row = FORMATS["messages"] | {"context": "c"}
    assert read_example(row_of(row), "auto", {"input": "context"}).unread == ("context",)


def test_unprintable_characters_of_column_names_are_escaped():
    row = FORMATS["messages"] | {"half\ud83d": 1, "red\x1b[31m": 1}
    assert read_example(row_of(row)).unread == ("half\\ud83d", "red\\x1b[31m")
    with pytest.raises(RowError) as refusal:
        read_example(row_of({"half\ud83d": 1}))
    assert "half\\ud83d" in str(refusal.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "column",
    [
        "response_rejected", "answer_chosen", "image_base64", "img", "image_0", "image2",
        "context_images", "page_screenshots", "ref_audio_path", "multi_modal_data", "mm_data",
        "media",
    ],
)  # fmt: skip
def test_other_names_of_preference_and_media_columns_refuse_the_row(name, column):
    with refused(f"`{column}`", error=RowError):
        read_example(row_of(FORMATS[name] | {column: "x"}))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "value",
    [
        {"bytes": None, "path": "cat.png"},
        [{"path": "cat.png", "bytes": None}],
        {"array": [0.1, 0.2], "path": "a.wav", "sampling_rate": 16000},
        "data:image/png;base64,iVBORw0KGgo=",
        ["data:audio/wav;base64,UklGRg=="],
    ],
)
def test_images_and_sound_under_any_name_refuse_the_row(name, value):
    """Values as `datasets` writes its features Image and Audio, and data URIs."""
    with refused("`cover`", error=RowError):
        read_example(row_of(FORMATS[name] | {"cover": value}))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("extra.image", {"id": 7, "image": "cat.png"}),
        ("extra.view.screenshots", {"view": {"screenshots": ["1.png"]}}),
        ("extra.cover", {"cover": {"bytes": None, "path": "cat.png"}}),
        ("extra.voice", [{"voice": {"array": [0.1], "sampling_rate": 16000}}]),
        ("extra.first.url", {"first": {"url": "data:image/png;base64,iVBORw0KGgo="}}),
    ],
)
def test_media_within_the_object_of_another_column_refuse_the_row(name, column, value):
    with refused(f"`{column}`", "has a value", error=RowError):
        read_example(row_of(FORMATS[name] | {"extra": value}))


def test_empty_media_within_an_object_and_container_images_are_only_reported_as_unread():
    extra = {"image": "", "images": [], "audio": None, "n_images": 2, "docker_image": "a/b:1"}
    others = {"extra": extra, "docker_image": "a/b:1"}
    assert read_example(row_of(FORMATS["messages"] | others)).unread == ("docker_image", "extra")


def test_counts_flags_and_descriptions_of_media_are_only_reported_as_unread():
    others = {"has_image": True, "image": False, "num_images": 2, "image_id": "7", "photo": 0}
    others |= {"n_images": "0", "num_photos": "3", "has_audio": "False", "is_video": "no"}
    others |= {"audio_duration": 1.5, "image_caption": "a cat", "path": "a/b.png", "bytes": 12}
    others |= {"file": {"path": "notes.txt", "bytes": 3}, "source": "https://example.org/cat.png"}
    result = read_example(row_of(FORMATS["messages"] | others))
    assert result.unread == tuple(sorted(others))


CONTAINER_IMAGES = ["python:3.11", "ghcr.io/org/env-1:latest", "localhost:5000/a/b:v1.2"]


@pytest.mark.parametrize("value", CONTAINER_IMAGES)
def test_the_name_of_a_container_image_is_not_an_image(value):
    others = {"image": value, "environment": {"image": value}}
    row = row_of(FORMATS["messages"] | others)
    assert read_example(row).unread == ("environment", "image")


IMAGES = ["a.png", "https://h/a.png", "data:image/png;base64,AA", "a:b/c", "a/b.tar:1.JPG"]


@pytest.mark.parametrize("value", IMAGES)
def test_other_texts_in_a_column_of_images_refuse_the_row(value):
    for others in ({"image": value}, {"environment": {"image": value}}):
        with refused("image", error=RowError):
            read_example(row_of(FORMATS["messages"] | others))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", ["loss_mask", "assistant_masks", "completion_mask"])
def test_a_loss_mask_that_is_not_read_refuses_the_row(name, column):
    with refused(f"`{column}`", "weight: 0", "labels", error=RowError):
        read_example(row_of(FORMATS[name] | {column: [0, 1]}))
    assert read_example(row_of(FORMATS[name] | {column: []})).unread == ()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", ["weight", "Weights", "Sample_weight", "importance_weight"])
def test_a_weight_of_the_row_that_is_not_read_refuses_the_row(name, column):
    """With it, a row of weight 0 would be trained as if it had weight 1."""
    is_fact = "_" not in column  # such as kilograms, unless it is 0
    for value in (0, "0", False, *(() if is_fact else (0.5, 2.0, " 0.5"))):
        with refused(f"`{column}`", "weight 0", "train_data", error=RowError):
            read_example(row_of(FORMATS[name] | {column: value}))
    for value in (1, 1.0, "1", True, [1, 1], "70 kg", {"kg": 70}, *((0.5, "3") if is_fact else ())):
        assert read_example(row_of(FORMATS[name] | {column: value})).unread == (column,)
    for value in ([1, 0], ["1", "0"]):  # of messages or tokens
        with refused(f"`{column}`", "weight: 0", "labels", error=RowError):
            read_example(row_of(FORMATS[name] | {column: value}))
    nan = float("nan")  # a missing value in a table
    assert read_example(row_of(FORMATS[name] | {column: nan})).unread == (column,)
    for empty in EMPTY_TEXTS:
        assert read_example(row_of(FORMATS[name] | {column: empty})).unread == ()


def test_a_weight_of_something_else_is_not_that_of_the_row():
    row = FORMATS["messages"]
    for value in (80.5, [0.1, 0.5]):
        assert read_example(row_of(row | {"edge_weights": value})).unread == ("edge_weights",)
    with refused("`my_weight`", "weight 0", error=RowError):
        read_example(row_of(row | {"my_weight": 0}))


@pytest.mark.parametrize(
    ("column", "of_two", "of_one"),
    [
        *((name, [2, 2], [4]) for name in ("seq_lengths", "sub_seq_lens", "lengths")),
        ("seq_start_id", [0, 2], [0]),
        *((name, [0, 2, 4], 4) for name in ("cu_seqlens", "cu_seq_lens_q")),
        *(
            (name, [1, 1, 2, 2], [1, 1, 1, 1])
            for name in ("segment_ids", "seq_idx", "document_ids")
        ),
    ],
)
def test_a_pre_tokenised_row_of_several_documents_is_refused(column, of_two, of_one):
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    with refused(f"`{column}`", "several documents", error=RowError):
        read_example(row_of(row | {column: of_two}))
    assert read_example(row_of(row | {column: of_one})).unread == (column,)
    # In other formats it describes something else, such as documents that were retrieved.
    assert read_example(row_of(FORMATS["messages"] | {column: of_two})).unread == (column,)


def test_a_system_prompt_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    result = read_example(row_of(FORMATS["messages"] | {"system": parts}))
    assert result.example.messages[0] == Message("system", "be brief")
