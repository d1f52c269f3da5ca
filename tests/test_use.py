"""Trained models in use: from Python, from the command line, from files that mean no good."""

import os
import pickle
import re
import threading
import zipfile

import numpy as np
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT, refusal


@pytest.fixture
def checkpoint(quick_run):
    """The path of a task's GRU."""
    return lambda task: quick_run / "models" / f"{task}_GRU_seed42.pt"


# --- from Python ----------------------------------------------------------------------


def test_classifier_labels_texts_as_in_training(checkpoint):
    model = rnn.load_checkpoint(checkpoint("classifier"))
    texts = [
        "I found plot moving.",
        "i FOUND plot moving!",
        "critics called plot dull " * 9,
        "xyzzy",
        "",
        "...",
    ]
    answers = model.predict(texts)
    assert answers[0] == answers[1] and answers[0][0] in ("negative", "positive")
    assert all(0.5 <= probability <= 1 for _, probability in answers[:4])
    assert all(label is None and np.isnan(probability) for label, probability in answers[4:])
    (label, probability), ids = (
        answers[2],
        [model.preprocessing["vocabulary"].index(w) for w in texts[2].split()],
    )
    with torch.no_grad():
        positive = model(torch.tensor([ids])).item()
    assert probability == pytest.approx(max(positive, 1 - positive), abs=1e-5)
    assert label == ("positive" if positive > 0.5 else "negative")
    assert model.predict(texts[0]) == answers[:1], "one text need not be in a list"


def test_of_a_text_of_10000_words_the_end_is_read(checkpoint, capsys):
    model = rnn.load_checkpoint(checkpoint("classifier"))
    end = "plot was superb while nobody waits " * 40  # 240 words
    assert (
        model.predict("boring " * 10_000 + end)
        == model.predict(end)
        == model.predict(" ".join(end.split()[-200:]))
    )
    assert len(predict(capsys, checkpoint("classifier"), "boring " * 10_000)) == 1, (
        "too long for a file's name"
    )


def test_predictor_gives_known_words_and_repeats_itself(checkpoint):
    model = rnn.load_checkpoint(checkpoint("predictor"))
    likeliest = model.predict("The sailor near the", n=5)
    probabilities = [probability for _, probability in likeliest]
    assert (
        len(likeliest) == 5
        and probabilities == sorted(probabilities, reverse=True)
        and sum(probabilities) <= 1
    )
    assert not {rnn.PAD, rnn.UNK} & {word for word, _ in model.predict("the", n=10**6)}
    assert model.predict("") == model.predict("."), "without words, a sentence begins"
    assert model.predict("xyzzy") == model.predict("plugh"), "unknown words are one and the same"
    one, same, other = (model.continue_text("the", length=30, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(rnn.tokenize(one, rnn.WORDS_AND_ENDS)) == 30


def test_continuation_at_temperature_0_takes_the_likeliest_word(checkpoint):
    model, text = rnn.load_checkpoint(checkpoint("predictor")), "the sailor"
    for word in rnn.tokenize(
        model.continue_text(text, length=8, temperature=0), rnn.WORDS_AND_ENDS
    ):
        assert word == model.predict(text)[0][0]
        text += f" {word}"


def test_forecaster_feeds_back_and_speaks_the_units_of_the_series(checkpoint):
    model = rnn.load_checkpoint(checkpoint("forecaster"))
    values = 100 + np.sin(np.arange(80) / 3)
    forecast = model.predict(values, length=3)
    assert forecast.shape == (3,)
    again = [model.predict([*values, *forecast[:i]])[0] for i in range(3)]
    assert forecast == pytest.approx(again, rel=1e-5)
    assert model.predict(values[-50:]) == pytest.approx(model.predict(values)), (
        "the last window is read"
    )
    assert np.isfinite(model.predict([1.0, 2.0])).all(), "a shorter series is read whole"
    for wrong in ([], [1.0, np.nan], [[1.0]], np.ones((5, 1))):
        with pytest.raises(rnn.InputError, match="one or more finite values"):
            model.predict(wrong)
    for wrong in (["a"], [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError):
            model.predict(wrong)
    with pytest.raises(rnn.InputError, match="a forecast is not finite"):
        model.predict([1e300, 1e300])


def test_the_readmes_lines_work(tmp_path, monkeypatch, no_figures):
    readme = (ROOT / "README_pytorch.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        if "load_checkpoint" in block
    ]
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {"__name__": "__main__"})


# --- from the command line ------------------------------------------------------------


def predict(capsys, *arguments):
    assert rnn.main(["--predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_predict_labels_each_line_of_text_file_or_standard_input(
    checkpoint, capsys, tmp_path, monkeypatch
):
    path, lines = tmp_path / "lines.txt", "plot was moving\n\nplot was dull\n"
    path.write_text(lines)
    # what stands in for standard input
    monkeypatch.setattr(os, "dup", lambda _: os.open(path, os.O_RDONLY))
    outputs = [predict(capsys, checkpoint("classifier"), source) for source in (lines, path, "-")]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == 3
    assert (
        re.fullmatch(r"(negative|positive)\t0\.\d{4}", outputs[0][0]) and outputs[0][1] == "-\tnan"
    )


def test_predict_continues_a_text(checkpoint, capsys):
    options = ["--length", 7, "--temperature", 0, "--seed", 3]
    *likeliest, blank, continuation = predict(
        capsys, checkpoint("predictor"), "the sailor", *options
    )
    assert len(likeliest) == 5 and all(re.fullmatch(r"\S+\t0\.\d{4}", line) for line in likeliest)
    assert blank == "" and len(rnn.tokenize(continuation, rnn.WORDS_AND_ENDS)) == 7


def test_predict_continues_a_series(checkpoint, capsys, tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("day,t,u\n" + "\n".join(f"d{i},{i % 7},0" for i in range(60)))
    header, *rows = predict(
        capsys, checkpoint("forecaster"), path, "--length", 3, "--series-column", "t"
    )
    assert header == "step,value" and [row.split(",")[0] for row in rows] == ["1", "2", "3"]


def test_an_input_that_begins_with_a_minus_is_no_option(checkpoint, capsys):
    source = "-1\n-2.5\n-3"
    assert predict(capsys, checkpoint("forecaster"), source, "--length", 1)[0] == "step,value"
    assert rnn.main(["--length", "1", "--predict", str(checkpoint("forecaster")), source]) == 0
    capsys.readouterr()
    assert "--predict" in refusal(["--predict", str(checkpoint("forecaster"))], capsys)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="devices")  # noqa: PTH110
def test_only_files_and_pipes_are_read(checkpoint, capsys):
    refusal(["--predict", str(checkpoint("classifier")), "/dev/zero"], capsys)
    refusal(["--predict", "/dev/zero", "text"], capsys)
    refusal(["--corpus", "/dev/zero"], capsys)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names")
def test_predict_reads_a_pipe_once(checkpoint, capsys, tmp_path):
    pipe, lines = tmp_path / "pipe", "plot was moving\nplot was dull\n"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[lines], daemon=True)
    writer.start()
    expected = predict(capsys, checkpoint("classifier"), lines)
    assert predict(capsys, checkpoint("classifier"), pipe) == expected
    writer = threading.Thread(target=pipe.write_text, args=[lines], daemon=True)
    writer.start()
    assert rnn.user_data("corpus", pipe).text == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "text"], "none.pt: no such file; trained models are in the folder 'models'"),
        (["CLASSIFIER", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["FORECASTER", "my own series.csv"], "my own series.csv: cannot be read (No such file"),
        (["CLASSIFIER", "."], ".: cannot be read (Is a directory)"),
        (["FORECASTER", "abc"], "no row below the header"),
        (["FORECASTER", " "], "no row below the header"),
        (["CLASSIFIER", "BINARY"], "not a text file"),
        (["none\x1b[31m\n.pt", "text"], "none\\x1b[31m\\n.pt: no such file"),
        (["CLASSIFIER", f"{'x' * 999}.txt"], "..."),
        (["CLASSIFIER", "text", "--length", "0"], "--length 0"),
        (["PREDICTOR", "text", "--temperature", "-1"], "--temperature -1"),
        (["PREDICTOR", "text", "--temperature", "1e39"], "--temperature 1e+39"),
        (["PREDICTOR", "text", "--temperature", "nan"], "--temperature nan"),
    ],
)
def test_predict_refuses_in_one_line(arguments, message, checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\0\0")
    names = {task.upper(): str(checkpoint(task)) for task in rnn.TASKS}
    assert message in refusal(["--predict", *(names.get(a, a) for a in arguments)], capsys)


# --- files that mean no good ----------------------------------------------------------


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_checkpoint_runs_no_code(checkpoint, tmp_path, capsys):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = torch.load(checkpoint("classifier"), weights_only=True)
    for hostile in (
        Hostile(marker),
        content | {"weights": Hostile(marker)},
        content | {"more": Hostile(marker)},
    ):
        for save in (torch.save, lambda value, to: to.write_bytes(pickle.dumps(value))):
            save(hostile, path)
            with pytest.raises(rnn.InputError, match="not a model that this script can use"):
                rnn.load_checkpoint(path)
            refusal(["--predict", str(path), "text"], capsys)
            assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), "the file would have run code if it had been let"


def change(content, *path, to):
    """`content` with the value at `path` replaced."""
    content = content.copy()
    content[path[0]] = change(content[path[0]], *path[1:], to=to) if len(path) > 1 else to
    return content


@pytest.mark.parametrize(
    ("task", "path", "to", "message"),
    [
        ("classifier", ["class"], "Transformer", "'Transformer'"),
        ("classifier", ["arguments", "n_layers"], 101, "more than 100 layers"),
        ("classifier", ["arguments", "n_layers"], 0, "must be greater than zero"),
        ("classifier", ["arguments", "hidden_dim"], 100.0, ""),
        ("classifier", ["arguments", "dropout"], 2.0, "between 0 and 1"),
        ("classifier", ["arguments", "vocab_size"], 1000, "loading state_dict"),
        ("classifier", ["arguments", "vocab_size"], 10**12, "more memory than its size"),
        ("classifier", ["arguments", "hidden_dim"], 5, "loading state_dict"),
        ("classifier", ["arguments", "colour"], 5, ""),
        ("classifier", ["weights"], {}, "loading state_dict"),
        ("classifier", ["preprocessing", "labels"], ["a"], ""),
        ("classifier", ["preprocessing", "labels"], 7, ""),
        ("classifier", ["preprocessing", "labels"], "ab", ""),
        ("classifier", ["preprocessing", "max_words"], 0, ""),
        ("predictor", ["preprocessing", "vocabulary"], ["<pad>", "<unk>", "a"], ""),
        ("predictor", ["preprocessing", "vocabulary", 3], 7, "vocabulary"),
        ("predictor", ["preprocessing", "vocabulary", 3], "the", ""),
        ("predictor", ["preprocessing", "window"], 0, ""),
        ("predictor", ["preprocessing", "window"], 5.5, ""),
        ("forecaster", ["preprocessing", "scaler", "std"], 0.0, ""),
        ("forecaster", ["preprocessing", "scaler", "std"], "1", "scaler"),
        ("forecaster", ["preprocessing", "scaler", "mean"], torch.ones(1), "scaler"),
        ("forecaster", ["preprocessing", "scaler", "range"], [2.0, 1.0], "scaler"),
        ("forecaster", ["preprocessing", "more"], 1, ""),
        ("forecaster", ["preprocessing"], {}, ""),
    ],
)
def test_the_content_of_a_checkpoint_is_checked(
    task, path, to, message, checkpoint, tmp_path, recwarn
):
    content, changed = torch.load(checkpoint(task), weights_only=True), tmp_path / "changed.pt"
    torch.save(change(content, *path, to=to), changed)
    with pytest.raises(rnn.InputError) as refusal:
        rnn.load_checkpoint(changed)
    assert str(refusal.value).startswith(f"{changed}: not a model that this script can use (")
    assert message in str(refusal.value) and "\n" not in str(refusal.value) and not recwarn.list


def test_a_small_checkpoint_that_asks_for_gigabytes_is_refused_without_using_them(
    checkpoint, tmp_path
):
    resource = pytest.importorskip("resource")  # not on Windows
    content, words, path = (
        torch.load(checkpoint("predictor"), weights_only=True),
        10_000_000,
        tmp_path / "huge.pt",
    )
    content["arguments"]["vocab_size"] = words
    for name, shape in (
        ("embedding.weight", (words, 50)),
        ("head.weight", (words, 100)),
        ("head.bias", (words,)),
    ):
        content["weights"][name] = torch.zeros(1).expand(shape)  # 6 GB
    torch.save(content, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(rnn.InputError, match="not a model that this script can use"):
        rnn.load_checkpoint(path)
    assert path.stat().st_size < 1e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_noticed(place, checkpoint, tmp_path, capsys):
    content = bytearray(checkpoint("forecaster").read_bytes())
    content[int(place * len(content))] ^= 4
    (tmp_path / "flipped.pt").write_bytes(content)
    refusal(["--predict", str(tmp_path / "flipped.pt"), "1"], capsys)


def test_what_would_fill_the_memory_is_refused_before(checkpoint, tmp_path):
    content = torch.load(checkpoint("forecaster"), weights_only=True)
    torch.save(content, tmp_path / "plain.pt")
    weights = {name: torch.zeros(50, 50) for name in content["weights"]}
    torch.save(content | {"weights": weights}, tmp_path / "zeros.pt")
    pack(tmp_path / "zeros.pt", tmp_path / "packed.pt", zipfile.ZIP_DEFLATED)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    torch.save({"a": bytearray(10)}, tmp_path / "array.pt")
    size = int.from_bytes(b"\x7f\xff\xff\xff", "big")
    hostile = b"\x80\x02cbuiltins\nbytearray\nJ" + size.to_bytes(4, "little") + b"\x85R."
    pack(tmp_path / "plain.pt", tmp_path / "pickled.pt", zipfile.ZIP_STORED, hostile)
    for name in ("packed", "old", "array", "pickled"):
        with pytest.raises(rnn.InputError, match="not a model that this script can use"):
            rnn.load_checkpoint(tmp_path / f"{name}.pt")
    pack(tmp_path / "plain.pt", tmp_path / "same.pt", zipfile.ZIP_STORED)
    rnn.check_archive(tmp_path / "same.pt")
    with pytest.raises(rnn.InputError, match="more memory than its size"):
        rnn.check_archive(tmp_path / "packed.pt")


def pack(source, target, compression, pickled=None):
    """The archive of a checkpoint written anew, with another pickle if one is given."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", compression) as other:
        for entry in archive.infolist():
            is_pickle = pickled and entry.filename.endswith("/data.pkl")
            other.writestr(entry.filename, pickled if is_pickle else archive.read(entry))


def test_damaged_checkpoints_and_random_bytes_are_loaded_or_refused(checkpoint, tmp_path):
    rng, content, path = (
        np.random.default_rng(0),
        checkpoint("forecaster").read_bytes(),
        tmp_path / "damaged.pt",
    )
    refused = 0
    for case in range(150):
        damaged = bytearray(content if case % 3 else rng.bytes(int(rng.integers(0, 2000))))
        for _ in range(int(rng.integers(0, 9)) if damaged else 0):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        path.write_bytes(
            damaged[: int(rng.integers(len(damaged) + 1))] if case % 3 == 1 else damaged
        )
        try:
            rnn.load_checkpoint(path)
        except rnn.InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 90
