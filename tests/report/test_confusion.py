import pytest

from geolora_pl.report.classes import classes
from geolora_pl.report.confusion import NAME, Confusion, read_confusion, write_confusion

NAMES = ["a,b", 'say "no"', "<c>"]
FOUND = Confusion(19, NAMES, [[3, 1, 0], [0, 4, 0], [0, 0, 0]])


def test_it_is_read_as_it_was_written(tmp_path):
    write_confusion(tmp_path, FOUND)
    assert read_confusion(tmp_path) == FOUND


def test_there_is_none_where_nothing_was_written(tmp_path):
    assert read_confusion(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x\n",
        "step 1,a,b\na,1\nb,0,1\n",
        "step 1,a\na,x\n",
        "step,a\na,1\n",
        "step 1,a\na,-1\n",
        "1,a\na," + "9" * 5000,
    ],
)
def test_a_broken_one_is_none(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    assert read_confusion(tmp_path) is None


def test_scores_of_a_class_are_those_of_its_row_and_column():
    assert [FOUND.recall(i) for i in range(3)] == [0.75, 1, None]
    assert [FOUND.precision(i) for i in range(3)] == [1, 0.8, None]


def test_few_classes_are_one_table_with_their_scores():
    text = classes(FOUND)
    assert "validation at step 19" in text
    assert text.count("<table") == 1
    assert (
        '<th scope="row">a,b</th><td class="r6">3</td><td class="r2">1</td><td></td><td>0.750</td><td>1.000</td>'
        in text
    )
    assert "&lt;c&gt;" in text
    assert "<c>" not in text


def test_of_many_classes_the_scores_come_first_and_the_matrix_is_in_a_fold():
    counts = [[5 * (i == j) + (j == 0) for j in range(30)] for i in range(30)]
    text = classes(Confusion(0, list(map(str, range(30))), counts))
    scores, _, matrix = text.partition("<details>")
    assert '<th scope="row">7</th><td>6</td><td>0.833</td><td>1.000</td><td>0 (1)</td>' in scores
    assert matrix.count("<tr>") == 31
