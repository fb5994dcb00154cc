"""Small files as those of GLUE, and where the real ones are."""

from pathlib import Path

REAL = Path(__file__).parents[3] / "shared" / "data" / "glue"


# Two lines of each file: fields of train and dev, fields of test, and how the first of train must come out. Quotes are
# data; a comma separates nothing.
PARSE = ["0", "p", "1n", "slate", "( a )", "( b )", "(ROOT a)", "(ROOT b)"]


MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse"]
MNLI += ["sentence2_parse", "sentence1", "sentence2"]


LAYOUTS = {
    "cola": (
        "CoLA",
        None,
        [["gj04", "1", "", 'He said "no, it is'], ["gj04", "0", "*", "b"]],
        ['He said "no, it is'],
        1,
    ),
    "sst2": ("SST-2", ["sentence", "label"], [['"a , b ', "0"], ["c ", "1"]], ['"a , b '], 0),
    "mrpc": (
        "MRPC",
        ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [["1", "11", "12", '" a , " said he', 'the "b'], ["0", "21", "22", "c", "d"]],
        ['" a , " said he', 'the "b'],
        1,
    ),
    "qqp": (
        "QQP",
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        [["1", "2", "3", 'what is "a?', "b?", "1"], ["4", "5", "6", "c?", "d?", "0"]],
        ['what is "a?', "b?"],
        1,
    ),
    "stsb": (
        "STS-B",
        ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
        [["0", "g", "f", "2012", "1", "none", "none", "a.", 'b "c.', "3.800"], ["1"] * 9 + ["0.000"]],
        ["a.", 'b "c.'],
        3.8,
    ),
    "mnli": (
        "MNLI",
        [*MNLI, "label1", "gold_label"],
        [[*PARSE, "a .", 'b "', "x", "contradiction"], [*PARSE, "c", "d", "x", "entailment"]],
        ["a .", 'b "'],
        2,
    ),
    "qnli": (
        "QNLI",
        ["index", "question", "sentence", "label"],
        [["0", "a?", '"b', "not_entailment"], ["1", "c?", "d", "entailment"]],
        ["a?", '"b'],
        1,
    ),
    "rte": (
        "RTE",
        ["index", "sentence1", "sentence2", "label"],
        [["0", 'a "', "b", "not_entailment"], ["1", "c", "d", "entailment"]],
        ['a "', "b"],
        1,
    ),
    "wnli": (
        "WNLI",
        ["index", "sentence1", "sentence2", "label"],
        [["0", "a", "b", "1"], ["1", "c", "d", "0"]],
        ["a", "b"],
        1,
    ),
}


TEST_HEADER = {
    "cola": ["index", "sentence"],
    "sst2": ["index", "sentence"],
    "mrpc": ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "qqp": ["id", "question1", "question2"],
    "stsb": ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"],
    "mnli": MNLI,
    "qnli": ["index", "question", "sentence"],
    "rte": ["index", "sentence1", "sentence2"],
    "wnli": ["index", "sentence1", "sentence2"],
}


def write_tsv(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows if row), encoding="utf-8")


def write_glue(folder: Path, task: str, times: int = 1) -> str:
    """The files of a task in the official layout."""
    name, header, rows, _, _ = LAYOUTS[task]
    kinds = ["_matched", "_mismatched"] if task == "mnli" else [""]
    write_tsv(folder / name / "train.tsv", [header, *rows * times])
    for kind in kinds:
        more = ["label2", "label3", "label4", "label5"] if task == "mnli" else []  # five annotators, in dev alone
        wide = [[*row[:11], *more, row[-1]] for row in rows] if more else rows
        dev_header = [*header[:11], *more, header[-1]] if more else header
        write_tsv(folder / name / f"dev{kind}.tsv", [dev_header, *wide[::-1]])
        columns = TEST_HEADER[task]
        write_tsv(folder / name / f"test{kind}.tsv", [columns, [f'"{column}' for column in columns]])
    return str(folder)
