"""A user's own data: what comes out of a file or of data from Python, what is noted and refused."""

import gzip

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn

VALUES = [round(5 + np.sin(i / 3) + i / 100, 3) for i in range(40)]
DAYS = pd.date_range("2020-01-01", periods=60).strftime("%Y-%m-%d").tolist()
GERMAN = pd.date_range("2020-01-01", periods=60).strftime("%d.%m.%Y").tolist()
PAIRS = list(zip(DAYS, VALUES))
HOURLY = [(DAYS[i // 24], i % 24, value) for i, value in enumerate(VALUES)]
REVIEWS = [(f"film {i} was {'good' if i % 2 else 'bad'}", i % 2) for i in range(30)]
TEXTS = [text for text, _ in REVIEWS]
COLUMNS = {"reviews": ("", ""), "corpus": (), "series": ("",)}


def csv(rows, header="date,y", separator=","):
    return "\n".join([header, *(separator.join(map(str, row)) for row in rows)]) + "\n"


def read(option, content, tmp_path, columns=None, suffix=".csv"):
    """What `read_user_data` makes of a file with that content."""
    path = tmp_path / f"my{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return rnn.read_user_data(option, path, columns or COLUMNS[option])


PLAIN = csv(PAIRS)
SERIES = {  # kind: (content, note or "")
    "windows line ends and the mark of UTF-8": ("\ufeff" + PLAIN.replace("\n", "\r\n"), ""),
    "comments above": ("# a station\n# in degrees\n" + PLAIN, ""),
    "semicolons and decimal commas": (PLAIN.replace(",", ";").replace(".", ","), ""),
    "semicolons and three decimals": (csv([(d, f"{v:.3f}") for d, v in PAIRS], "d;y", ";"), ""),
    "newest first": (csv(PAIRS[::-1]), "turned round"),
    "newest first, German": (csv(zip(GERMAN[39::-1], VALUES[::-1])), "turned round"),
    "separators at the ends of rows": (csv([(d, f"{v};") for d, v in PAIRS], "date;y", ";"), ""),
    "columns without a name": (csv([(d, v, "", "") for d, v in PAIRS], "date,y,,"), ""),
    "rows without their empty last cells": (csv([(*PAIRS[0], "x"), *PAIRS[1:]], "date,y,note"), ""),
    "a column that counts the rows": (csv(enumerate(VALUES), "n,y"), ""),
    "one column without a header": ("\n".join(f"{v:.3f}" for v in VALUES), ""),
    "units below the header": (csv([("", "degrees"), *PAIRS]), "above row 3"),
    "rows of nothing at the end": (csv([*PAIRS, ("", ""), ("", "")]), ""),
    "times that repeat": (csv([(DAYS[i // 2], v) for i, v in enumerate(VALUES)]), "row 3"),
    "times that cannot be read": (csv([(f"2020-W{i}x", v) for i, v in enumerate(VALUES)]), "row 3"),
    "a gap": (csv([*PAIRS[:20], *zip(DAYS[30:], VALUES[20:])]), "gaps"),
    "date and hour in two columns": (csv(HOURLY, "date,hour,y"), "row 3"),
    "a date that is constant": (csv([(DAYS[0], d, v) for d, v in PAIRS], "made,date,y"), ""),
    "a total at the end": (csv([*PAIRS[::-1], ("Total", 207.5)]), "the last row, 42 ('Total')"),
}
REFUSED = {  # kind: (content, what the one line says)
    "a missing value": (csv([*PAIRS, ("2020-02-10", ""), *PAIRS]), "row 42 holds ''"),
    "thousands": (csv([(DAYS[0], '"1,029.4"'), *PAIRS[1:]]), "row 2 holds '1,029.4'"),
    "currency": (csv([(d, f"${v}") for d, v in PAIRS]), "y ($5.0)"),
    "two meanings": (csv([*((i, 900 + i * i) for i in range(9)), (9, "1.029")], "n;y", ";"), "029"),
    "more cells than the header": (csv([*PAIRS, ("2020-02-10", 5, 6)]), "row 42 has 3 cells"),
    "a title above": ("Prices, in USD\n" + csv([(d, 1, 1) for d in DAYS], "date,y,z"), "row 1"),
    "no header": (csv(PAIRS[1:], f"{DAYS[0]},{VALUES[0]}"), "row 1"),
    "two columns of one name": (csv([(d, v, v) for d, v in PAIRS], "date,y,y"), "2 columns"),
    "a stray quotation mark": (csv([*PAIRS, ("2020-02-10", '"1')]), "row 42"),
    "JSON": ('{"date": "2020-01-01", "y": 5.0}\n', "JSON"),
    "no text": (b"PK\x03\x04\x00\x00", "no text"),
    "nothing": ("\n \n", "no rows"),
}


@pytest.mark.parametrize("kind", [*SERIES, *REFUSED])
def test_a_plain_table_is_read_what_may_mislead_is_noted_and_all_else_refused(kind, tmp_path):
    if kind in SERIES:
        content, note = SERIES[kind]
        found = read("series", content, tmp_path)
        assert found.table["value"].tolist() == pytest.approx(VALUES)
        assert note in " ".join(found.notes) and bool(found.notes) == bool(note)
    else:
        content, message = REFUSED[kind]
        with pytest.raises(rnn.InputError) as refused:
            read("series", content, tmp_path)
        assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_extreme_that_recurs_is_noted_and_read(tmp_path):
    found = read("series", csv(zip(DAYS, [*VALUES, -999, -999, -999])), tmp_path)
    assert found.table["value"].tolist() == [*VALUES, -999, -999, -999]
    assert "-999 stands there 3 times" in found.notes[0]


TIMES = pd.Series(VALUES, index=pd.to_datetime(DAYS[:40]))
FROM_PYTHON = {
    "column": np.array(VALUES)[:, None].astype(np.float32),
    "tensor": torch.tensor(VALUES),
    "nullable, with a gap first": pd.Series([None, *VALUES], dtype="Float64"),
    "a falling index": pd.Series(VALUES, index=range(40, 0, -1), name="price"),
    "times": TIMES,
    "newest first": TIMES[::-1],
    "frame": pd.DataFrame({"day": DAYS[:40], "y": VALUES}),
}


@pytest.mark.parametrize("kind", FROM_PYTHON)
def test_data_from_python_are_those_of_the_file(kind, tmp_path):
    found = rnn.read_user_data("series", FROM_PYTHON[kind], ("",))
    assert found.table["value"].tolist() == pytest.approx(VALUES)
    named = rnn.read_user_data("series", pd.DataFrame({2020: VALUES, 0: VALUES}), (2020,))
    assert named.digest == read("series", PLAIN, tmp_path).digest, "the same data"


LABELS = np.array([label for _, label in REVIEWS])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (LABELS.tolist(), ["0", "1"]),
        (LABELS[:, None] == 1, ["False", "True"]),
        (torch.tensor(LABELS) / 1, ["0", "1"]),
        (pd.Categorical.from_codes(LABELS, ["no", "yes"]), ["no", "yes"]),
    ],
)
def test_labels_of_every_kind(labels, names):
    for given in ((TEXTS, labels), pd.DataFrame({"text": TEXTS, "label": np.ravel(labels)})):
        found = rnn.read_user_data("reviews", given, ("", ""))
        assert found.table["label"].tolist() == [names[label] for label in LABELS]


def test_reviews_from_files(tmp_path):
    rows = [(f'"{text}, ""so"" to say"', label) for text, label in REVIEWS]
    found = read("reviews", csv(rows, "Review,Stars"), tmp_path).table
    assert found["text"][0] == 'film 0 was bad, "so" to say' and found["label"][1] == "1"
    content = csv(REVIEWS, "a,b").replace(",", "\t").replace("was", '"was') + "caf\xe9 \t1"
    found = read("reviews", content.encode("cp1252"), tmp_path, ("a", "b"))
    assert len(found.table) == 31 and "Windows-1252" in found.notes[0]
    packed = gzip.compress(csv(REVIEWS, "text,label").encode())
    assert len(read("reviews", packed, tmp_path, suffix=".csv.gz").table) == 30
    with pytest.raises(rnn.InputError, match="row 3"):
        read("reviews", "text,label\nfine,1\nnice, really,\n", tmp_path)


UNUSABLE = {  # what the one line says: (option, data)
    "row 0 holds b'good'": ("reviews", ([b"good", b"bad"], [1, 0])),
    "row 1 holds ": ("reviews", (["good", None], [1, 0])),
    "row 1 holds no label": ("reviews", (["good", "bad"], [1, None])),
    "1 labels": ("reviews", (["good", "bad"], [1, 1])),
    "no rows": ("series", []),
    "row 1 holds 'nan'": ("series", [1.0, np.nan, 2.0, 5.0, 1.0]),
    "columns for series": ("series", np.arange(10).reshape(5, 2) ** 2),
    "cannot be read": ("series", "no/such.csv"),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_what_cannot_be_used_is_an_input_error(message):
    option, given = UNUSABLE[message]
    with pytest.raises(rnn.InputError) as refused:
        rnn.read_user_data(option, given, COLUMNS[option])
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
