"""A user's own files: what is read, what is refused with which words, a whole run on each."""

import gzip
import hashlib
import shutil
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import quick, refusal, table
from test_pipeline import PNGS

GOOD, BAD = "fine warm clever lovely".split(), "poor cold clumsy dreary".split()


def reviews_csv(n=60, labels=("neg", "pos")):
    rng = np.random.default_rng(0)
    rows = [
        f'"It was {rng.choice((BAD, GOOD)[i % 2])}, number {i}.",{labels[i % 2]}' for i in range(n)
    ]
    return "text,label\n" + "\n".join(rows) + "\n"


def corpus_txt(n=400):
    rng = np.random.default_rng(0)
    return " ".join(f"The {rng.choice(GOOD)} film won. Nobody left!" for _ in range(n // 8))


def series_csv(n=500):
    values = np.sin(np.arange(n) / 5) * 3 + 20
    return "day,temperature\n" + "\n".join(
        f"1981-{i},{value:.3f}" for i, value in enumerate(values)
    )


DAYS = pd.date_range("2022-01-01", periods=60)
PANEL = "entity,year,x\n" + "\n".join(f"{e},{1960 + i},{i}.5" for e in "AB" for i in range(10))


def dated(times, instead=()):
    """A series of one row a time, its values from 0 to 12 but for those given instead by row."""
    times = np.ravel(list(times))
    values = dict(enumerate(np.arange(len(times)) % 13)) | dict(instead)
    rows = [f"{str(time)[:19]},{value}" for time, value in zip(times, values.values())]
    return "time,value\n" + "\n".join(rows)


TASK_OF = {"reviews": "classifier", "corpus": "predictor", "series": "forecaster"}
WRITERS = {"reviews": reviews_csv, "corpus": corpus_txt, "series": series_csv}


def build(kind, path, column="", **changes):
    """The task data of a user's file in the quick configuration."""
    task = TASK_OF[kind]
    config = replace(rnn.QUICK[task], file=rnn.user_data(kind, str(path), column), **changes)
    return rnn.load_data(task, config, 0, rnn.CPU)


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(content, name="file.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return write


# --- what is read ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_plain_gzipped_and_marked_files_give_the_same_data(kind, written):
    content = WRITERS[kind]().encode()
    paths = [written(content, "a.csv"), written(b"\xef\xbb\xbf" + content, "b.csv")]
    paths.append(written(gzip.compress(content), "c.csv.gz"))
    first, *others = (build(kind, path) for path in paths)
    for other in others:
        assert torch.equal(first.train.inputs, other.train.inputs)
        assert torch.equal(first.test.targets, other.test.targets)


@pytest.mark.parametrize(
    ("labels", "names"), [(("neg", "pos"), ["neg", "pos"]), (("1", "0"), ["0", "1"])]
)
def test_labels_keep_their_case_and_the_second_in_order_is_positive(labels, names, written):
    data = build("reviews", written(reviews_csv(labels=labels)))
    assert data.preprocessing["labels"] == names
    data = build("reviews", written(reviews_csv(labels=("Bad", "GOOD"))))
    assert data.preprocessing["labels"] == ["Bad", "GOOD"]
    words = data.preprocessing["vocabulary"]
    for review, target in zip(data.train.inputs.tolist(), data.train.targets[:, 0].tolist()):
        assert bool({words[i] for i in review} & set(GOOD)) == (target == 1)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_reviews_with_quotes_line_breaks_other_columns_and_another_separator(separator):
    text = 'id,label,text\n1,yes,"one\t two; three,\n\nand ""four"""\n\n2,no,five\n\n'
    text = text.translate({ord(","): separator}) if separator != "," else text
    reviews, _ = rnn.read_reviews(text)
    assert reviews.texts == [f'one\t two; three{separator}\n\nand "four"', "five"]
    assert reviews.labels.tolist() == [1, 0] and reviews.names == ["no", "yes"]


def test_a_review_of_any_length_and_words_that_look_like_gaps_are_read():
    reviews, _ = rnn.read_reviews(f"text,label\n{'word ' * 100_000},1\nNA,0\nnan,0\n")
    assert len(reviews.texts[0]) == 499_999 and reviews.texts[1:] == ["NA", "nan"]


def test_repeated_and_empty_reviews_are_left_out_and_counted(written):
    extra = 'IT WAS FINE number 1,pos\n"It was, fine: number 1!",pos\n...,neg\n'
    data = build("reviews", written(reviews_csv() + extra))
    assert data.facts["left out as empty or repeated"] in (2, 3)
    assert data.facts["reviews"] + data.facts["left out as empty or repeated"] == 63


def test_own_reviews_are_shuffled_by_the_seed(written):
    rows = sorted(reviews_csv().splitlines()[1:], key=lambda row: row[-3:])  # all neg first
    file = rnn.user_data("reviews", str(written("text,label\n" + "\n".join(rows))))
    config = replace(rnn.QUICK["classifier"], file=file)
    splits = [rnn.build_reviews(config, seed) for seed in (0, 0, 1)]
    assert 0.2 < splits[0].test.targets.mean() < 0.8
    assert torch.equal(splits[0].test.inputs, splits[1].test.inputs)
    assert not torch.equal(splits[0].test.targets, splits[2].test.targets)


def test_of_a_long_review_the_end_is_kept(written):
    rows = [
        f"{'start ' * 30}{word} end{i},{label}"
        for i in range(20)
        for word, label in (("good", 1), ("bad", 0))
    ]
    data = build("reviews", written("text,label\n" + "\n".join(rows)), max_words=4)
    assert data.train.inputs.shape[1] == 4
    vocabulary = data.preprocessing["vocabulary"]
    assert {vocabulary[i] for i in data.train.inputs[:, 2].tolist()} == {"good", "bad"}


def test_corpus_keeps_words_of_any_script_sentence_ends_and_unknown_marks():
    text = 'Don’t stop! <unk> weighs 3.5 kg, naïve Ærø… (Yes?) it @.@ ends. "Now."'
    expected = "don't stop ! <unk> weighs 3 5 kg naïve ærø yes ? it ends . now .".split()
    assert rnn.tokenize(text, rnn.WORDS_AND_ENDS) == expected


def test_unknown_words_are_counted_and_never_a_hit(written):
    data = build(
        "corpus", written(corpus_txt(800) + " rare1 <unk> rare2 film <unk>" * 30), vocab_size=6
    )
    assert (
        len(data.preprocessing["vocabulary"]) == 6
        and data.preprocessing["vocabulary"].count("<unk>") == 1
    )
    unknown = (data.test.targets == 1).numpy()
    assert (
        data.facts["unknown words in the test split"] == pytest.approx(unknown.mean())
        and unknown.any()
    )
    output = torch.zeros(len(data.test), 6)
    output[:, 1] = 9.0  # sure of <unk>
    assert not rnn.PREDICTOR.score(output, data.test.targets)[unknown].any()
    baselines = data.baselines()
    assert not data.ceilings() and len(baselines) == 4
    for answers in baselines.values():
        assert not answers["score"][unknown].any()


def test_many_test_windows_are_thinned_evenly_and_stay_views(written, monkeypatch):
    monkeypatch.setattr(rnn, "MOST_WINDOWS", 20)
    data = build("corpus", written(corpus_txt(4000)))
    assert 10 < len(data.test) <= 20 < len(data.train)
    step = data.test.inputs.stride(0)
    assert step == data.test.stride > 1
    assert (
        data.test.inputs.untyped_storage().data_ptr()
        == data.test.targets.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize(
    ("text", "column", "values"),
    [
        ("1\n2\n3\n", "", [1, 2, 3]),
        ("value\n1\n2e3\n", "", [1, 2000]),
        ("day,t\nmon,1.5\ntue,-2\n", "", [1.5, -2]),
        ("mon,1.5\ntue,-2\n", "", [1.5, -2]),
        ("a,b\n1,3\n2,4\n", "b", [3, 4]),
        ("1,3\n2,4\n", "2", [3, 4]),
        ("2,10\n3,11\n", "2", [10, 11]),
        ("a,1990\nmon,3\ntue,4\n", "1990", [3, 4]),
        ("day;t\r\nmon;3\r\ntue;4\r\n", "", [3, 4]),
        ("day\tt\nmon\t3\n", "", [3]),
        ("\n\n1\n2\n\n\n", "", [1, 2]),
    ],
)
def test_series_with_and_without_header_and_blank_lines_around(text, column, values):
    assert rnn.read_series(text, column)[0].tolist() == values


# --- files as the world writes them ---------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "values"),
    [
        ('t,x\na,"1,029.5"\nb,758.25\n', "", [1029.5, 758.25]),
        ("t;x\na;1.029,5\nb;758,25\n", "", [1029.5, 758.25]),
        ("t;x\na;1 029,5\nb;758,25\n", "", [1029.5, 758.25]),
        ("t;x\na;12.029.001\nb;758\n", "", [12029001, 758]),
        ("t;x\na;-0.125\nb;0.250\n", "", [-0.125, 0.25]),
        ("t,x\na,1.029\nb,2.345\n", "", [1.029, 2.345]),
        ('t,x\na,"5,9"\nb,"2,8"\n', "", [5.9, 2.8]),
        ("t,x\na,$758.05\nb,-$8\n", "", [758.05, -8]),
        ("t,x\na,3.1 %\nb,\u22124%\n", "", [3.1, -4]),
        ("t,x\na,1e-3\nb,.5\n", "", [0.001, 0.5]),
        ("t,x,x\na,1,2\nb,3,4\n", "3", [2, 4]),
        ("time,price,high\n,usd,usd\na,1,2\nb,3,4\n", "price", [1, 3]),
        ('t,x\n"a",1\n"b,c",2\n', "", [1, 2]),
        ("time,x\n1656633600,1\n1656637200,2\n", "", [1, 2]),
        ("date,x\n20220131,1\n20220201,2\n", "", [1, 2]),
        ("1749,5.0\n1750,7.0\n1751,6.0\n", "2", [5, 7, 6]),
        ('t,x\na,"12,34,567.00"\nb,"1,200"\n', "", [1234567, 1200]),
        ("#d,x,y\n2020-01-01,1,2\n2020-01-02,3,4\n", "y", [2, 4]),
        ('"x","y"\n"1",5,6\n"2",7,8\n', "y", [6, 8]),
        ("year,month,x\n2020,11,1\n2020,12,2\n2021,1,3\n", "x", [1, 2, 3]),
        ("year,month,day,hour,x\n2020,1,2,0,1\n2020,1,1,23,2\n2020,1,1,9,3\n", "x", [3, 2, 1]),
        ("a,1990\n1,3\n2,4\n", "1990", [3, 4]),
        (",0,1\n0,3,5\n1,4,6\n", "1", [5, 6]),
        (
            "d,x\n29/02/20,1\n28/02/20,2\n",
            "",
            [2, 1],
        ),
        ("d,x\n02-Mar-20,1\n29-Feb-20,2\n28-Feb-20,3\n", "", [3, 2, 1]),
    ],
)
def test_numbers_in_one_notation_and_columns_by_place(text, column, values):
    assert rnn.read_series(text, column)[0].tolist() == values


@pytest.mark.parametrize(
    ("above", "said"),
    [
        ("# station\n# licence, of 2020\n", "left out: # station, # licence  of 2020"),
        ("Category: All\n\n", "left out: Category: All"),
        ("Report,,\n,,\n", "left out: Report"),
    ],
)
def test_what_stands_above_the_table_is_left_out_and_said(above, said):
    table = "\n".join(["day,n,x", *(f"d{i},n,{i % 7}" for i in range(60))])
    values, [note] = rnn.read_series(above + table, "x")
    assert values.tolist() == [i % 7 for i in range(60)] and said in note


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("sep=;\ntext;label\ngood, really;1\nbad, bad;0\nbad;0\n", ()),
        ("1,good\n2,bad\n2,worse\n1,fine\n", ()),
        ("1,good,x\n2,bad,x\n2,worse,y\n1,fine,y\n", ("2", "1")),
        ('label\ttext\n1\t"good\n2\tbad"\n2\tworse\n', ()),
    ],
)
def test_reviews_without_header_with_stray_quotes_or_a_separator_in_the_first_line(text, columns):
    reviews, _ = rnn.read_reviews(text, *columns)
    assert [text.strip('"').partition(",")[0] for text in reviews.texts[:2]] == ["good", "bad"]
    assert len(reviews.texts) == text.count("\n") - ("label" in text) - ("sep" in text)
    assert reviews.labels[1] == reviews.labels[2]


@pytest.mark.parametrize(
    ("encoding", "notes"), [("utf-8", 0), ("utf-8-sig", 0), ("utf-16", 0), ("cp1252", 1)]
)
def test_encodings(encoding, notes, written):
    text, said = rnn.read_text(written("naïve café, 5 €".encode(encoding)))
    assert text == "naïve café, 5 €" and len(said) == notes


def test_integer_labels_of_many_digits_stay_apart():
    digits = "1234567890123456"
    reviews, _ = rnn.read_reviews(f"text,label\na,{digits}7\nb,{digits}8\n")
    assert reviews.names == [f"{digits}7", f"{digits}8"]


@pytest.mark.parametrize("content", ["t,x\n" + "\n" * 30_000 + "a,1\n", "t,x\n" + ",\n" * 60_000])
def test_rows_of_nothing_take_no_time(content):
    begin = time.monotonic()
    rnn.read_table(content, [])
    assert time.monotonic() - begin < 5


def test_a_long_text_is_not_unpacked_beyond_the_limit(written, monkeypatch):
    monkeypatch.setattr(rnn, "MOST_BYTES", 1000)
    with pytest.raises(rnn.InputError, match="more than 1,000 bytes"):
        rnn.read_text(written(gzip.compress(b"a " * 10**6), "a.csv.gz"))


@pytest.mark.parametrize(
    ("times", "notes"),
    [
        (DAYS, 0),
        (DAYS[DAYS.day_of_week < 5], 0),
        (pd.date_range("2000-01-31", periods=60, freq="ME"), 0),
        (pd.date_range("2000-01-31", periods=60, freq="YE"), 0),
        (DAYS[::-1], 1),
        ([*DAYS[:9], *DAYS[12:]], 1),
    ],
)
def test_times_are_even_or_it_is_said(times, notes):
    values, said = rnn.read_series(dated(times))
    assert len(said) == notes
    assert values[0] == (0 if times[0] < times[1] else (len(times) - 1) % 13)
    if notes and times[0] < times[1]:
        assert "the first of 4 days" in said[0] and "row 11" in said[0]


@pytest.mark.parametrize("order", ["%d/%m/%Y", "%m/%d/%Y", "%d.%m.%y"])
def test_of_two_readings_of_a_date_the_one_with_even_steps_is_right(order):
    months = pd.date_range("2000-01-01", periods=60, freq="MS")
    assert rnn.read_series(dated(months.strftime(order)))[1] == []


def test_steps_that_are_usual_are_no_gaps():
    hours = pd.date_range("2022-01-03", periods=960, freq="h")
    hours = hours[(hours.hour > 8) & (hours.hour < 18)]
    assert rnn.read_series(dated(hours))[1] == []
    weeks = DAYS[DAYS.day_of_week < 5]
    [said] = rnn.read_series(dated([*weeks[:9], *weeks[14:]]))[1]
    assert "gaps in time (1)" in said and "before row 11" in said


def test_an_hour_twice_in_autumn_and_times_that_cannot_be_read_are_said():
    hours = pd.date_range("2022-10-29", periods=60, freq="h", tz="Europe/Berlin").tz_localize(None)
    assert "row 29" in rnn.read_series(dated(hours))[1][0]
    text = dated(DAYS) + "\nTotal,12"
    assert "row 62 holds no time that can be read ('Total')" in rnn.read_series(text)[1]


def test_an_extreme_value_is_no_code_if_it_is_rare_or_near_the_others():
    rng = np.random.default_rng(0)
    for values in (
        rng.normal(size=500),
        np.where(rng.random(500) < 0.5, 0, rng.normal(5, 1, 500)),  # rain
        rng.integers(0, 2, 500),
        rng.integers(-1, 60, 500),
    ):
        rnn.check_codes(values.astype(float))
    with pytest.raises(rnn.InputError, match="-200 stands there 50 times"):
        rnn.check_codes(np.append(rng.integers(2, 1480, 500), [-200.0] * 50))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("很好，太吵", "很 好 太 吵"),
        ("किताब बहुत बुरी थी।", "किताब बहुत बुरी थी ।"),
        ("cafe\u0301 می\u200cخواهم", "café می\u200cخواهم"),
        ("great:) 😡!", "great :) 😡 !"),
        ("A<br /><b>b</b> &amp;\\nc", "a b c"),
    ],
)
def test_words_of_other_scripts_faces_and_markup(text, words):
    assert rnn.tokenize(text, rnn.WORDS_AND_ENDS) == words.split()


def test_mostly_unknown_words_are_said(written):
    half = " ".join(f"w{i}" for i in range(200))
    for content, notes in ((half + " a b c" * 100, 0), ("a b c " * 100 + half, 1)):
        data = build("corpus", written(content))
        assert sum("do not occur in training" in doubt for doubt in data.doubts) == notes


# --- data from Python -----------------------------------------------------------------

TEXTS = [f"It was {(BAD, GOOD)[i % 2][i % 4]}, number {i}" for i in range(60)]
LABELS = [i % 2 for i in range(60)]
WAVE = np.sin(np.arange(300) / 5)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("reviews", (TEXTS, LABELS)),
        ("reviews", (np.array(TEXTS), pd.Series(LABELS, index=range(5, 65)))),
        ("reviews", pd.DataFrame({"text": TEXTS, "label": LABELS})),
        ("corpus", corpus_txt()),
        ("corpus", corpus_txt().split()),
        ("series", WAVE),
        ("series", WAVE.tolist()),
        ("series", pd.Series(WAVE, name="2020")),
        ("series", pd.Series(WAVE, pd.date_range("2022-01-01", periods=300))),
        ("series", pd.DataFrame({"day": pd.date_range("2022-01-01", periods=300), "y": WAVE})),
    ],
)
def test_data_from_python_are_as_those_of_a_file(kind, given, written):
    contents = {
        "reviews": pd.DataFrame({"text": TEXTS, "label": LABELS}).to_csv(index=False),
        "corpus": corpus_txt(),
        "series": "\n".join(map(str, WAVE)),
    }
    config = replace(rnn.QUICK[TASK_OF[kind]], file=rnn.user_data(kind, given))
    data = rnn.load_data(TASK_OF[kind], config, 0, rnn.CPU)
    expected = build(kind, written(contents[kind]))
    assert torch.equal(data.train.inputs, expected.train.inputs)
    assert torch.equal(data.test.targets, expected.test.targets)


def test_run_takes_data_from_python(tmp_path, no_figures):
    options = {"quick": True, "models": ["GRU"], "epochs": 1, "output_dir": tmp_path}
    table = pd.DataFrame({"day": pd.date_range("2022-01-01", periods=300), "price": WAVE})
    results = rnn.run(tasks=["forecaster"], series=table["price"], **options)
    assert results.failed == 0 and set(results.scores["kind"]) == {"model", "baseline"}
    text = (tmp_path / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert "## Time-series forecasting: series\n\nOn series, by MSE" in text


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("reviews", (TEXTS, LABELS[1:])),
        ("reviews", 5),
        ("series", {1: [2], 3: [4, 5]}),
        ("corpus", [1, 2]),
    ],
)
def test_data_from_python_that_cannot_be_used_are_refused(kind, given):
    with pytest.raises(rnn.InputError, match=kind):
        rnn.user_data(kind, given)


# --- what is refused ------------------------------------------------------------------

NAME_ONE = "name one with --series-column"
THIRTY_LABELS = "text,label\n" + "\n".join(f"a{i},l{i}" for i in range(30))
SINE = series_csv().splitlines()


def sine_with(row):
    """The series with another row in the tenth place."""
    return "\n".join([*SINE[:9], row, *SINE[9:]])


@pytest.mark.filterwarnings("error")  # a warning would be more than the one line
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("reviews", None, "cannot be read"),
        ("reviews", "", "the file is empty"),
        ("corpus", " \n ", "the file is empty"),
        ("corpus", b"abc \xff \0 def", "not a text file"),
        ("series", b"\x89PNG\r\n\x1a\n\x81\x8d", "not a text file"),
        (
            "reviews",
            "text,mark\na,1\n",
            "no column 'label'; its columns are text, mark; name one",
        ),
        (
            "reviews",
            "text,review,label\na,b,1\n",
            "2 columns, text (column 1), review (column 2), may be meant",
        ),
        ("reviews", ",".join(f"c{i}" for i in range(30)), "c8, c9, ... (30 in all)"),
        ("reviews", THIRTY_LABELS, "... (30 in all)); two to 20 labels are needed"),
        (
            "reviews",
            "essay;label\na;1\n",
            "there is no column 'text'; its columns are essay, label",
        ),
        (
            "reviews",
            "text,label\na,1\nb,1\n",
            "holds 1 different values ('1'); two to 20 labels are needed",
        ),
        ("reviews", "text,label\na,1\nb,\n", "row 3 holds no label"),
        (
            "reviews",
            "text,label\na,1\nb,0,x\n",
            "not a table of commas: row 3 has 3 cells, most have 2",
        ),
        ("reviews", "text,label\na,1\nb,nan\n", "row 3 holds no label"),
        (
            "reviews",
            "text,label\na,1\nb,0\n",
            "2 different reviews that hold a word; three splits need 20 or more",
        ),
        ("corpus", "far too short", "3 words; three splits need 88 or more"),
        ("series", "x\n1\n2\n", "2 values; three splits need 48 or more"),
        ("series", "x\n" + "7\n" * 500, "constant over its first 70%, the training part"),
        ("series", "x\n1e200\n-1e200\n" + "7\n" * 500, "or too large"),
        ("series", "x\n" + "7\n8\n" * 250 + "1e300\n", "too large for single precision"),
        (
            "series",
            "x\n" + "a\n" * 500,
            f"no numeric columns among x (separated by semicolons); {NAME_ONE}",
        ),
        ("series", "a,b\n1,2\n", f"2 numeric columns among a, b (separated by commas); {NAME_ONE}"),
        ("series", sine_with("1981,"), "row 10 holds no value in the column 'temperature'"),
        ("series", sine_with("1981,NA"), "row 10 holds no value in the column 'temperature'"),
        ("series", sine_with(""), "row 10 holds no value in the column 'temperature'"),
        ("series", "\n\n" + sine_with(""), "row 12 holds no value in the column 'temperature'"),
        ("series", sine_with("1981,inf"), "row 10 holds 'inf', which is not a finite number"),
        ("series", sine_with("1981,o.5"), "row 10 holds 'o.5', which is not a finite number"),
        ("series", "t,x,x\na,1,2\nb,3,4\n", "2 numeric columns among t, x, x"),
        ("series", "t;x\na;1.029\nb;1.345\n", "'1.029' may be 1029 or 1.029"),
        ("series", 't,x\na,"1,029"\nb,"1,345"\n', "'1,029' may be 1029 or 1.029"),
        ("series", dated(2 * [day] for day in DAYS), "row 3: 2022-01-01 00:00:00 is not later"),
        ("series", dated([*DAYS[:9], *DAYS[:9]]), "row 11: 2022-01-01 00:00:00 is not later"),
        (
            "series",
            "\n".join(f"{i} {i}23" for i in range(1, 60)),
            "one column of cells with blanks",
        ),
        ("series", PANEL, "row 12: 1960-01-01 00:00:00 is not later"),
        (
            "series",
            dated([*DAYS.strftime("%Y-%m-%d"), "-020-01-30"]),
            "row 62: -020-01-30 00:00:00 is",
        ),
        ("series", dated([[day] for day in DAYS], {9: -9999}), "-9999 stands there 1 times"),
        ("series", dated([[day] for day in DAYS], {7: -999, 9: -999, 20: -999}), "-999 stands"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(
    kind, content, message, written, tmp_path, capsys
):
    path = tmp_path / "none.csv" if content is None else written(content)
    out = tmp_path / "out"
    arguments = [
        "--quick",
        "--tasks",
        TASK_OF[kind],
        f"--{kind}",
        str(path),
        "--output-dir",
        str(out),
    ]
    error = refusal(arguments, capsys)
    assert error.startswith(f"pytorch_rnn_models.py: {path}: ") and message in error
    assert not out.exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_random_bytes_are_read_or_refused(kind, written):
    """Random bytes and damaged files never raise anything but the documented error."""
    rng, content = np.random.default_rng(0), WRITERS[kind]().encode()
    refused = 0
    for case in range(120):
        damaged = bytearray(content if case % 2 else rng.bytes(int(rng.integers(1, 3000))))
        for place in rng.integers(len(damaged), size=int(rng.integers(0, 5))):
            damaged[place] = rng.choice([0, 10, 34, 44, 255, 46, 45, int(rng.integers(256))])
        damaged = damaged[: int(rng.integers(1, len(damaged) + 1))] if case % 3 == 0 else damaged
        try:
            build(kind, written(bytes(damaged), "case.gz" if case % 10 == 9 else "case.csv"))
        except rnn.InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 60 < refused < 120


# --- a whole run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The output folder of a run of all three tasks on a user's files."""
    folder = tmp_path_factory.mktemp("own")
    arguments = ["--models", "GRU"]
    for kind, writer in WRITERS.items():
        (folder / f"my.{kind}").write_text(writer(), encoding="utf-8")
        arguments += [f"--{kind}", folder / f"my.{kind}"]
    assert quick(folder / "out", *arguments) == 0
    return folder / "out"


def test_a_run_on_own_data_says_what_they_are_and_claims_no_ceiling(own_run):
    text = (own_run / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    for said in (
        "## Text classification: my.reviews",
        "## Next-word prediction: my.corpus",
        "## Time-series forecasting: my.series",
        "reviews 60, ",
        "share pos 0.500",
        "unknown words in the test split",
    ):
        assert said in text
    for task in rnn.TASKS.values():
        assert task.question not in text
    assert "Accuracy, " not in text
    config = rnn.read_config(own_run)
    digest = hashlib.sha256(corpus_txt().encode()).hexdigest()
    assert config["predictor"]["digest"] == digest, "which data they are"
    scores = table(own_run, "summary")
    assert set(scores["kind"]) == {"model", "baseline"} and set(scores["task"]) == set(rnn.TASKS)
    assert {path.name for path in own_run.glob("*.png")} == PNGS


def test_the_runs_belong_to_the_content_of_the_file_not_to_its_place(
    own_run, tmp_path, no_figures, capsys
):
    def resume(content):
        (tmp_path / "my.corpus").write_text(content, encoding="utf-8")
        options = ["--resume", "--tasks", "predictor", "--models", "GRU"]
        return quick(tmp_path, *options, "--corpus", tmp_path / "my.corpus")

    shutil.copytree(own_run, tmp_path, dirs_exist_ok=True)
    assert resume(corpus_txt()) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().err
    assert resume(corpus_txt() + " more") == 2
    assert "predictor: digest" in capsys.readouterr().err


def test_default_folder_is_named_after_the_files(tmp_path):
    files = [rnn.UserData("a/films.csv.gz", ""), rnn.UserData("b.2024.csv", "")]
    config = {name: replace(rnn.QUICK[name], file=file) for name, file in zip(rnn.TASKS, files)}
    assert rnn.default_folder(config, quick=False).as_posix() == "outputs/own_films_b.2024"
