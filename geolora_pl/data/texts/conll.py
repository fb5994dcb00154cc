"""Read the columns of CoNLL: a word per line, its tag last, and an empty line after each sentence."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from geolora_pl.data.texts.tables import read_text

SUFFIXES = (".conll", ".txt")


def read_conll(path: str | Path, tokens: str, tags: str | None) -> pa.Table:
    r"""Read sentences: the first field of a line is the word, the last one its tag.

    Fields are separated by tabs, or in a line without tabs by spaces. Lines of ``-DOCSTART-``, which begin a document,
    are no words.

    Args:
        path: The file.
        tokens: The name that the column of words gets.
        tags: The name that the column of tags gets; ``None`` to read the words alone.

    Raises:
        ValueError: The file is missing, empty or not in UTF-8, a word has no tag, or a sentence has lines with
            different numbers of fields.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "train.conll")
        >>> _ = file.write_text("Ada NNP B-PER\nsang VBD O\n\nHi UH O\n")
        >>> read_conll(file, "tokens", "tags").to_pylist()
        [{'tokens': ['Ada', 'sang'], 'tags': ['B-PER', 'O']}, {'tokens': ['Hi'], 'tags': ['O']}]
    """
    path = Path(path)
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(read_text(path).split("\n"), 1):
        fields = _fields(line)
        if not fields or fields[0] == "-DOCSTART-":
            sentences.append([])
            continue
        if tags is not None and len(fields) < 2:
            raise ValueError(
                f"{path}: line {number} is {line.strip()!r}, a word without a tag: put the tag after it, with a space "
                "or a tab between them"
            )
        if len(fields) != len((sentences[-1] or [fields])[0]):
            raise ValueError(
                f"{path}: line {number} is {line.strip()!r:.80}, which has not as many fields as the line before it: "
                "give every word a line of its own, and the words of a sentence equally many fields"
            )
        sentences[-1].append(fields)
    whole = [sentence for sentence in sentences if sentence]
    if not whole:
        raise ValueError(f"{path} holds no words")
    columns = {tokens: [[fields[0] for fields in sentence] for sentence in whole]}
    if tags is not None:
        columns[tags] = [[fields[-1] for fields in sentence] for sentence in whole]
    return pa.table(columns)


def _fields(line: str) -> list[str]:
    """The fields of a line; any other white space, such as a no-break space, belongs to a word."""
    line = line.strip(" \t\r")
    return [field for part in line.split("\t" if "\t" in line else " ") if (field := part.strip(" "))]
