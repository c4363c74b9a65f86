import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.evaluation.tasks import CAPTION, TASKS, normalize, score, states

SHORT = [task for task in TASKS if task != CAPTION]
TEXT = st.text(max_size=40)


def test_the_tasks_are_those_of_the_sage_benchmark() -> None:
    assert list(TASKS) == [
        "caption_brief",
        "objects_and_counts",
        "spatial_relationships",
        "scene_context",
        "attributes",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Two dogs!", "2 dogs"),
        ("  a\tred\nball. ", "red ball"),
        ("None", "0"),
        ("zero, three; ten", "0 3 10"),
        ("Don’t", "dont"),
        ("left-hand side", "left hand side"),
        ("1,000 people", "1000 people"),
        ("2,3", "2 3"),
        ("1.5 m.", "1.5 m"),
        ("snow_man", "snow man"),
        ("ＬＥＦＴ", "left"),
        ("Straße", "strasse"),
        ("another theme", "another theme"),  # only whole words are articles
        ("someone", "someone"),  # … or numbers
        ("The", ""),
        ("", ""),
    ],
)
def test_normalisation(text: str, words: str) -> None:
    assert normalize(text) == words


@pytest.mark.parametrize("task", [*SHORT, "a task of one's own"])
def test_short_answers_and_unknown_tasks_are_right_or_wrong(task: str) -> None:
    assert score(task, "Three.", "3") == 1
    assert score(task, "the left", "left") == 1
    assert score(task, "left side", "left") == 0
    assert score(task, "", "left") == 0


def test_facts_matter_only_for_captions() -> None:
    assert score("attributes", "red", "red", facts=["blue"]) == 1


def test_a_caption_gets_the_share_of_the_facts_it_states() -> None:
    facts = ["two red balls", "one blue car", "urban", "night"]
    caption = "An urban scene at night with 2 red balls and a blue car."
    assert score(CAPTION, caption, "", facts) == 1
    assert score(CAPTION, "An urban scene with three red balls and a blue car.", "", facts) == 0.5
    assert score(CAPTION, "", "", facts) == 0


def test_a_caption_without_known_facts_is_compared_as_a_whole() -> None:
    assert score(CAPTION, "A red ball.", "The red ball") == 1
    assert score(CAPTION, "A red ball on grass.", "The red ball") == 0


@pytest.mark.parametrize(
    ("caption", "fact", "stated"),
    [
        ("a blue car", "one blue car", True),
        ("the dog sleeps", "a dog", True),
        ("the dog sleeps", "one dog", False),
        ("two dogs", "one dog", False),
        ("12 red balls", "2 red balls", False),
        ("red and blue balls", "red balls", False),  # the words must stand together
        ("carpet", "car", False),
        ("anything", "", False),
    ],
)
def test_a_fact_is_stated(caption: str, fact: str, stated: bool) -> None:
    assert states(caption, fact) is stated


@given(st.sampled_from([*TASKS, "other"]), TEXT, TEXT, st.lists(TEXT, max_size=4))
def test_every_score_lies_between_0_and_1(task: str, answer: str, gold: str, facts: list[str]) -> None:
    assert 0 <= score(task, answer, gold, facts) <= 1


@given(st.sampled_from(SHORT), TEXT)
def test_gold_itself_is_right(task: str, gold: str) -> None:
    assert score(task, gold, gold) == 1


ASCII = st.text(string.ascii_letters + string.digits + " ", max_size=40)


@given(ASCII, st.sampled_from(["{}.", "{}!", "  {} ", '"{}"', "({})", "the {}", "{}?!"]))
def test_case_punctuation_and_articles_change_nothing(answer: str, form: str) -> None:
    assert score("attributes", form.format(answer.upper()), answer) == 1


@given(st.lists(st.sampled_from(["urban", "night", "two red balls", "one fish", "indoor"]), min_size=1, max_size=6))
def test_saying_more_never_lowers_a_captions_score(facts: list[str]) -> None:
    scores = [score(CAPTION, " and ".join(facts[:said]), "", facts) for said in range(len(facts) + 1)]
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (0, 1)
