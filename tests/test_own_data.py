"""A user's own data: what comes out of a file or of data from Python, what is noted and refused."""

import gzip

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn

VALUES = [round(5 + np.sin(i / 3) + i / 100, 3) for i in range(40)]
DAYS = pd.date_range("2020-01-01", periods=40).strftime("%Y-%m-%d").tolist()


LATER = pd.date_range("2021-01-01", periods=20).strftime("%Y-%m-%d").tolist()


def read(option, content, tmp_path, *columns, suffix=".csv"):
    """What `read_user_data` makes of a file with that content."""
    path = tmp_path / f"my{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return rnn.read_user_data(option, path, columns or ("",) * {"reviews": 2, "series": 1}[option])


def csv(rows, header="date,y", separator=","):
    return "\n".join([header, *(separator.join(map(str, row)) for row in rows)]) + "\n"


def german(day):
    return f"{day[8:]}.{day[5:7]}.{day[:4]}"


PAIRS = list(zip(DAYS, VALUES))
HOURLY = [(DAYS[i // 24], i % 24, v) for i, v in enumerate(VALUES)]
SERIES = {  # kind: (content, note or "")
    "plain": (csv(PAIRS), ""),
    "windows line ends and the mark of UTF-8": ("\ufeff" + csv(PAIRS).replace("\n", "\r\n"), ""),
    "comments above": ("# a station\n# in degrees\n" + csv(PAIRS), ""),
    "semicolons and decimal commas": (csv(PAIRS).replace(",", ";").replace(".", ","), ""),
    "semicolons and points": (csv(PAIRS).replace(",", ";"), ""),
    "tabs": (csv(PAIRS).replace(",", "\t"), ""),
    "newest first": (csv(PAIRS[::-1]), "turned round"),
    "newest first, German dates": (csv([(german(d), v) for d, v in PAIRS[::-1]]), "turned round"),
    "newest first, by a year": (csv(zip(range(140, 100, -1), VALUES[::-1]), "year,y"), "turned"),
    "separators at the ends of rows": (csv([(d, f"{v};") for d, v in PAIRS], "date;y", ";"), ""),
    "a column without a name": (csv([(d, v, "") for d, v in PAIRS], "date,y,"), ""),
    "a column that counts the rows": (csv(enumerate(VALUES), "n,y"), ""),
    "one column without a header": ("\n".join(map(str, VALUES)), ""),
    "units below the header": (csv([("", "degrees"), *PAIRS]), "above row 3"),
    "rows of nothing at the end": (csv([*PAIRS, ("", ""), ("", "")]), ""),
    "times that repeat": (csv([(DAYS[i // 2], v) for i, v in enumerate(VALUES)]), "row 3"),
    "times that cannot be read": (csv([(f"2020-W{i}x", v) for i, v in enumerate(VALUES)]), "row 3"),
    "a gap": (csv([*PAIRS[:20], *zip(LATER, VALUES[20:])]), "gaps"),
    "date and hour in two columns": (csv(HOURLY, "date,hour,y"), "row 3"),
}


@pytest.mark.parametrize("kind", SERIES)
def test_a_plain_table_is_read_and_what_may_mislead_is_noted(kind, tmp_path):
    content, note = SERIES[kind]
    found = read("series", content, tmp_path)
    assert found.table["value"].tolist() == pytest.approx(VALUES)
    assert note in " ".join(found.notes) and bool(found.notes) == bool(note)


REFUSED = {  # kind: (content, what the one line says)
    "a word among the numbers": (csv([*PAIRS, ("2020-02-10", "?")]), "row 42 holds '?'"),
    "a missing value": (csv([*PAIRS, ("2020-02-10", ""), *PAIRS]), "row 42 holds ''"),
    "thousands": (csv([*PAIRS, ("2020-02-10", '"1,029.4"')]), "row 42 holds '1,029.4'"),
    "currency": (csv([(d, f"${v}") for d, v in PAIRS]), "0 columns"),
    "two meanings of a point": (
        csv([*((i, 900 + i * i) for i in range(9)), (9, "1.029")], "n;y", ";"),
        "'1.029'",
    ),
    "more cells than the header": (csv([*PAIRS, ("2020-02-10", 5, 6)]), "row 42"),
    "a title above the header": (
        "Our prices, 2020\n" + csv([(d, v, 1) for d, v in PAIRS], "date,y,z"),
        "row 2",
    ),
    "no header": (csv(PAIRS[1:], f"{DAYS[0]},{VALUES[0]}"), "row 1"),
    "two series": (
        csv([(d, v, v) for d, v in PAIRS], "date,y,z"),
        "2 columns for series (y, z)",
    ),
    "two columns of one name": (csv([(d, v, v) for d, v in PAIRS], "date,y,y"), "2 columns"),
    "a stray quotation mark": (csv([*PAIRS, ("2020-02-10", '"1')]), "row 42"),
    "no text": (b"PK\x03\x04\x00\x00", "no text"),
    "nothing": ("\n \n", "no rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_in_a_line_that_says_where(kind, tmp_path):
    content, message = REFUSED[kind]
    with pytest.raises(rnn.InputError) as refused:
        read("series", content, tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


FROM_PYTHON = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "array": np.array(VALUES),
    "column": np.array(VALUES)[:, None].astype(np.float32),
    "tensor": torch.tensor(VALUES),
    "series": pd.Series(VALUES, index=range(40, 0, -1)),
    "named": pd.Series(VALUES, name="price"),
    "differences": pd.Series([np.nan, *VALUES]),
    "times": pd.Series(VALUES, index=pd.to_datetime(DAYS)),
    "newest first": pd.Series(VALUES, index=pd.to_datetime(DAYS))[::-1],
    "nullable": pd.Series(VALUES, dtype="Float64"),
    "frame": pd.DataFrame({"day": DAYS, "y": VALUES}),
}


@pytest.mark.parametrize("kind", FROM_PYTHON)
def test_data_from_python_are_those_of_the_file(kind, tmp_path):
    found = rnn.read_user_data("series", FROM_PYTHON[kind], ("",))
    assert found.table["value"].tolist() == pytest.approx(VALUES)
    named = rnn.read_user_data("series", pd.DataFrame({2020: VALUES, 0: VALUES}), (2020,))
    assert named.table["value"].tolist() == VALUES
    assert named.digest == read("series", csv(PAIRS), tmp_path).digest, "the same data"


REVIEWS = [(f"film {i} was {'good' if i % 2 else 'bad'}", i % 2) for i in range(30)]
LABELS = {
    "numbers": ([label for _, label in REVIEWS], ["0", "1"]),
    "floats": ([float(label) for _, label in REVIEWS], ["0", "1"]),
    "booleans": ([bool(label) for _, label in REVIEWS], ["False", "True"]),
    "column": (np.array([[label] for _, label in REVIEWS]), ["0", "1"]),
    "tensor": (torch.tensor([label for _, label in REVIEWS]), ["0", "1"]),
    "words": (pd.Categorical([("no", "yes")[label] for _, label in REVIEWS]), ["no", "yes"]),
    "stars": ([(2, 10)[label] for _, label in REVIEWS], ["2", "10"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind(kind):
    labels, names = LABELS[kind]
    texts = [text for text, _ in REVIEWS]
    for given in ((texts, labels), {"text": texts, "label": np.ravel(labels)}):
        found = rnn.read_user_data("reviews", given, ("", ""))
        assert found.table["label"].tolist() == [names[label] for _, label in REVIEWS]


def test_reviews_from_files(tmp_path):
    rows = [(f'"{text}, ""so"" to say"', label) for text, label in REVIEWS]
    found = read("reviews", csv(rows, "Review,Stars"), tmp_path).table
    assert found["text"][0] == 'film 0 was bad, "so" to say' and found["label"][1] == "1"
    content = csv(REVIEWS, "a,b").replace(",", "\t").replace("was", '"was') + "caf\xe9 \t1"
    content = content.encode("cp1252")
    found = read("reviews", content, tmp_path, "a", "b", suffix=".tsv")
    assert len(found.table) == 31 and "Windows-1252" in found.notes[0]
    with pytest.raises(rnn.InputError, match="row 3"):
        read("reviews", "text,label\nfine,1\nnice, really,\n", tmp_path)
    packed = gzip.compress(csv(REVIEWS, "text,label").encode())
    assert len(read("reviews", packed, tmp_path, suffix=".csv.gz").table) == 30


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("reviews", ([b"good", b"bad"], [1, 0]), "row 0 holds b'good'"),
        ("reviews", (["good", None], [1, 0]), "row 1 holds "),
        ("reviews", (["good", "bad"], [1, None]), "row 1 holds no label"),
        ("reviews", (["good", "bad"], [1, 1]), "1 labels"),
        ("reviews", (["good"], [1, 0]), "length"),
        ("reviews", [1, 2, 3], "reviews: "),
        ("corpus", [b"a line"], "row 0 holds b'a line'"),
        ("corpus", 7, "corpus: "),
        ("series", [], "no rows"),
        ("series", [1.0, np.nan, 2.0, 5.0, 1.0], "row 1 holds 'nan'"),
        ("series", np.arange(10).reshape(5, 2) ** 2, "columns for series"),
        ("series", ["a", "b"], "0 columns"),
        ("series", "no/such.csv", "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_an_input_error(option, given, message):
    columns = {"reviews": ("", ""), "corpus": (), "series": ("",)}[option]
    with pytest.raises(rnn.InputError) as refused:
        rnn.read_user_data(option, given, columns)
    assert message in str(refused.value)


def test_repeated_reviews_are_left_out_and_those_with_two_labels_are_counted():
    texts = [f"word{i} film" for i in range(60)]
    given = ([*texts, "WORD1, film!", "word2 film"], [*[i % 2 for i in range(60)], 1, 1])
    own = rnn.read_user_data("reviews", given, ("", ""))
    data = rnn.build_reviews(rnn.ClassifierConfig(own=own), 0)
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    assert data.notes[0].startswith("1 texts stand there with two labels")
    shares = [split.targets.mean().item() for split in (data.train, data.validation, data.test)]
    assert shares == pytest.approx([0.5] * 3, abs=0.1), "each split has its share of every label"


def test_a_run_on_own_data_tunes_names_the_data_and_begins_with_the_answer(
    tmp_path, monkeypatch, no_figures
):
    monkeypatch.chdir(tmp_path)
    settings = {"tasks": ["forecaster"], "models": ["RNN"], "seeds": [1], "workers": 1, "epochs": 1}
    results = rnn.run(series=pd.Series(VALUES * 4), updates=1, **settings)
    assert set(results.tuning["learning_rate"]) == set(rnn.RATES)
    assert results.runs["title"][0] == "Time-series forecasting: series"
    text = (tmp_path / "outputs" / "series" / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert text.index("## Notes on the data") < text.index("## Time-series forecasting: series")
    assert "exact filter" not in text
