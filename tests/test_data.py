"""The data: disjoint splits, nothing fitted on what is tested, references that are right."""

import itertools
import os
import re
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import SCRIPT, new_model

SPLITS = ("train", "validation", "test")


def test_reviews_are_what_was_ordered():
    config = rnn.ClassifierConfig()
    data = rnn.build_reviews(config, 7)
    assert sum(len(getattr(data, split)) for split in SPLITS) == config.n_reviews == 5000
    assert data.facts["share positive"] == 0.5
    assert data.facts["distinct words"] > 5000 == data.facts["vocabulary"], (
        "the vocabulary must really cut"
    )
    lengths = torch.cat([getattr(data, split).lengths for split in SPLITS])
    assert 180 < lengths.max() <= 200 and 125 < lengths.float().mean() < 135
    assert 0 < data.facts["unknown words in the test split"] < 0.05


def test_no_review_is_in_two_splits(data):
    texts = [
        {tuple(filter(None, row)) for row in getattr(data["classifier"], s).inputs.tolist()}
        for s in SPLITS
    ]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_duplicate_reviews_are_dropped(monkeypatch):
    original = rnn.generate_reviews(rnn.QUICK["classifier"], rnn.random_generator(0, "reviews"))
    doubled = rnn.Reviews(
        [*original.texts, *(text.upper() for text in original.texts)],
        np.tile(original.labels, 2),
        known=pd.concat([original.known] * 2),
    )
    monkeypatch.setattr(rnn, "generate_reviews", lambda config, rng: doubled)
    found = rnn.build_reviews(rnn.QUICK["classifier"], 0)
    assert found.facts["reviews"] == len(set(original.texts))


def test_vocabularies_hold_the_words_of_the_training_part_only(data):
    corpus = rnn.generate_corpus(rnn.QUICK["predictor"], rnn.random_generator(0, "corpus"))
    words = corpus["word"].tolist()
    texts = rnn.generate_reviews(rnn.QUICK["classifier"], rnn.random_generator(0, "reviews")).texts
    reviews = rnn.tokenize(" ".join(texts[: int(0.7 * len(texts))]), rnn.WORDS)
    for task, known in (("predictor", words[: int(0.7 * len(words))]), ("classifier", reviews)):
        assert set(data[task].preprocessing["vocabulary"]) == {rnn.PAD, rnn.UNK, *known}


def test_contiguous_parts_do_not_overlap_and_lose_nothing(data):
    series = rnn.generate_series(rnn.QUICK["forecaster"], rnn.random_generator(0, "series"))
    series = series["value"].to_numpy()
    scaler = data["forecaster"].preprocessing["scaler"]
    parts = []
    for split in SPLITS:
        dataset = getattr(data["forecaster"], split)
        parts.append(torch.cat([dataset.inputs[0, :, 0], dataset.targets[:, 0]]).numpy())
    np.testing.assert_allclose(
        np.concatenate(parts) * scaler["std"] + scaler["mean"], series, atol=1e-5
    )
    windows = np.lib.stride_tricks.sliding_window_view(series[: int(0.7 * len(series))], 51)
    spread = np.sqrt(np.mean((windows - windows[:, :-1].mean(axis=1, keepdims=True)) ** 2))
    assert scaler["std"] == pytest.approx(spread), "the unit is the training part's"
    corpus = rnn.generate_corpus(rnn.QUICK["predictor"], rnn.random_generator(0, "corpus"))
    text = corpus["word"].tolist()
    vocabulary = data["predictor"].preprocessing["vocabulary"]
    known = set(vocabulary)
    spelled = []
    for split in SPLITS:
        dataset = getattr(data["predictor"], split)
        spelled += [vocabulary[i] for i in (*dataset.inputs[0].tolist(), *dataset.targets.tolist())]
    assert spelled == [word if word in known else rnn.UNK for word in text]


def test_the_corpus_does_not_repeat_itself():
    data = rnn.build_corpus(rnn.PredictorConfig(), 3)
    assert data.facts["test windows that also occur in training"] < 0.01
    assert 20_000 <= data.facts["words"] < 20_100


def test_windows_are_views(data):
    for name in ("predictor", "forecaster"):
        split = data[name].train
        storage = split.inputs.untyped_storage()
        assert storage.data_ptr() == split.targets.untyped_storage().data_ptr()
        assert storage.nbytes() < 8 * (len(split) + 100)


def test_verbs_agree_with_a_subject_up_to_seven_words_back():
    text = rnn.generate_corpus(rnn.PredictorConfig(), rnn.random_generator(5, "corpus"))
    distances = Counter()
    subjects = rnn.corpus_subjects()
    for i, word, role, distance in text[["word", "role", "distance"]].dropna().itertuples():
        subject = text["word"][i - distance]
        if role == "verb":
            distances[distance] += 1
            assert word in subjects[subject].verbs
            area = rnn.AREAS[subjects[subject].area]
            is_plural = subject not in area[0].split()
            assert (word + "s" if is_plural else word) in area[1].split()
    assert set(distances) == {2, 5, 7}, "where a verb must come: after an adverb or two phrases"


def test_batches_are_whole_shuffled_and_cover_every_example_once_an_epoch():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    buckets = rnn.LengthBuckets(lengths, 32, np.random.default_rng(0))
    epochs = [np.concatenate(list(buckets)) for _ in range(2)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert not np.array_equal(*epochs), "drawn anew every epoch"
    padding = np.mean([lengths[batch].max() - lengths[batch].float().mean() for batch in buckets])
    assert padding < 10, "examples of a batch are of similar length"
    assert len(list(buckets)) == len(buckets) == 32


def test_a_batch_equals_its_examples(data):
    for split in (d.train for d in data.values()):
        inputs, targets = split.batch([3, 0])
        for row, i in enumerate((3, 0)):
            one, target = split[i]
            assert torch.equal(inputs[row, : len(one)], one) and not inputs[row, len(one) :].any()
            assert torch.equal(targets[row], target)


def test_the_same_seed_gives_the_same_numbers_whatever_the_hash_seed_and_the_threads(
    tmp_path, no_figures
):
    series = tmp_path / "series.csv"  # long enough for many threads
    values = np.random.default_rng(0).normal(size=6000)
    series.write_text("\n".join(map(repr, values.tolist())))
    here = tmp_path / "here"  # strings are hashed in a way drawn at random, sums use all cores
    there = tmp_path / "there"
    arguments = ["--quick", "--models", "GRU", "--series", str(series), "--output-dir"]
    process = subprocess.Popen(
        [*SCRIPT, *arguments, str(there)],
        env={**os.environ, "PYTHONHASHSEED": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert rnn.main([*arguments, str(here)]) == 0
    assert process.wait() == 0
    scores = (here / "pytorch_rnn_summary.csv").read_text()
    assert "linear autoregression" in scores
    assert scores == (there / "pytorch_rnn_summary.csv").read_text()
    paths = list((here / "models").iterdir())
    assert len(paths) == 3
    for path in paths:
        one = torch.load(path, weights_only=True)
        other = torch.load(there / "models" / path.name, weights_only=True)
        assert one["preprocessing"] == other["preprocessing"]
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name])


def test_another_seed_gives_other_data():
    for name, task in rnn.TASKS.items():
        first, second = (task.build_data(rnn.QUICK[name], seed).train.inputs for seed in (0, 1))
        assert first.shape != second.shape or not torch.equal(first, second)


# --- baselines and ceilings -----------------------------------------------------------


def test_ngram_probabilities_sum_to_one():
    ids = rnn.random_generator(0, "test").integers(1, 8, 200).tolist()
    asked = [(1, 2), (7, 7), (9, 9)]
    probabilities = rnn.ngram_model(ids, asked, 10)
    for context in (*asked, (2,), (), (9,)):  # 9 was never seen
        assert probabilities(context).shape == (10,)
        assert probabilities(context).sum() == pytest.approx(1)


def test_no_ngram_answers_with_an_unknown_word():
    ids = [1, 1, 1, 2, 1, 1, 3] * 20
    baselines = rnn.corpus_baselines(*[rnn.CorpusDataset(ids, 4)] * 3, vocab_size=4)
    assert list(baselines) == ["unigram", "bigram", "trigram", "log-linear"]
    for answers in baselines.values():
        assert set(answers["answer"]) <= {2, 3}


def test_ngram_probabilities_are_witten_bells():
    probabilities = rnn.ngram_model([2, 3, 2, 4, 2, 3], [(2,)], 5)
    unigram = (2 + 3 / 5) / (6 + 3)  # of word 3: twice among 6, 3 different words
    assert probabilities(())[3] == pytest.approx(unigram)
    bigram = (2 + 2 * unigram) / (3 + 2)  # after word 2: twice among 3, 2 different words
    assert probabilities((2,))[3] == pytest.approx(bigram)


def test_the_trigram_goes_by_the_last_two_words():
    ids = [2, 3, 4, 5, 3, 6] * 50  # after 3 comes 4 or 6, and the word before tells which
    baselines = rnn.corpus_baselines(*[rnn.CorpusDataset(ids, 5)] * 3, vocab_size=7)
    scores = {name: answers["score"].mean() for name, answers in baselines.items()}
    assert scores["trigram"] == 1 and scores["unigram"] < scores["bigram"] < 0.9


def test_the_log_linear_model_finds_a_cue_that_no_trigram_sees():
    rng = np.random.default_rng(0)
    cues = rng.integers(2, 4, 500)
    ids = np.stack([cues, *rng.integers(6, 9, (3, 500)), cues + 2], axis=1).ravel()
    windows = rnn.CorpusDataset(ids, 4)
    parts = []
    for rows in (range(0, 1800), range(1800, 2100), range(2100, 2490)):
        part = [part[rows] for part in (windows.inputs, windows.targets, windows.lengths)]
        parts.append(rnn.SequenceDataset(*part))
    baselines = rnn.corpus_baselines(*parts, vocab_size=9)
    is_answer = (parts[2].targets >= 4) & (parts[2].targets < 6)  # tells which cue stood first
    scores = {
        name: answers["score"][is_answer.numpy()].mean() for name, answers in baselines.items()
    }
    assert scores["log-linear"] == 1 and scores["trigram"] < 0.8
    assert (baselines["log-linear"]["answer"] >= 2).all()


def test_naive_bayes_learns_words_and_majority_does_not():
    train = rnn.ReviewDataset([[2, 3], [2, 4], [5, 3], [5, 4]] * 5, [1, 1, 0, 0] * 5)
    test = rnn.ReviewDataset([[2, 3, 4], [5]], [1, 0])
    baselines = rnn.review_baselines(train, train, test, 6, 2)
    assert list(baselines) == ["majority class", "naive Bayes, words", "naive Bayes, word pairs"]
    assert baselines["naive Bayes, words"]["answer"].tolist() == [1, 0]
    assert baselines["naive Bayes, words"]["score"].tolist() == [1, 1]
    assert baselines["majority class"]["loss"].tolist() == pytest.approx([np.log(2)] * 2)


def test_a_label_may_be_in_the_test_part_alone():
    train = rnn.ReviewDataset([[2], [3]] * 5, [0, 1] * 5)
    test = rnn.ReviewDataset([[2], [4]], [0, 2])
    for answers in rnn.review_baselines(train, train, test, 5, n_labels=3).values():
        assert answers["score"][1] == 0 and np.isfinite(answers["loss"]).all()


def test_naive_bayes_on_pairs_sees_the_order_of_words():
    reviews = [[2, 3, 4], [3, 2, 5], [2, 3], [3, 2]] * 5
    parts = [rnn.ReviewDataset(reviews, [1, 0, 1, 0] * 5)] * 2
    test = rnn.ReviewDataset([[5, 2, 3], [4, 3, 2], [2]], [1, 0, 1])
    pairs = rnn.review_baselines(*parts, test, vocab_size=6, n_labels=2)["naive Bayes, word pairs"]
    assert pairs["answer"].tolist()[:2] == [1, 0]
    assert pairs["loss"][2] == pytest.approx(np.log(2)), "a single word is no pair"


def test_the_temperature_of_naive_bayes_is_fitted_on_validation():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 900)
    # ten copies of one weak hint: taken for ten, they would make it far too sure
    hints = np.where(rng.random(900) < 0.6, labels, 1 - labels)
    reviews = [[2 + hint] * 10 for hint in hints]
    parts = [rnn.ReviewDataset(reviews[i : i + 300], labels[i : i + 300]) for i in (0, 300, 600)]
    found = rnn.review_baselines(*parts, vocab_size=4, n_labels=2)["naive Bayes, words"]
    assert found["probability"].mean() == pytest.approx(0.6, abs=0.06)


def test_nearest_neighbours_continue_what_they_have_seen_at_any_level():
    values = np.tile([0.0, 3.0, 1.0, 2.0, 5.0], 60)
    train, validation = (rnn.SeriesDataset(values + level, 8) for level in (0, 10))
    test = rnn.SeriesDataset(values + 500, 8)
    assert rnn.series_baselines(train, validation, test)["nearest neighbours"]["loss"].max() < 1e-6
    noisy = values + np.random.default_rng(0).normal(size=len(values))
    one = rnn.nearest_neighbours(rnn.SeriesDataset(noisy, 8), test.inputs, 8, 20)
    assert one.shape == (20, len(test))
    errors = (one - test.targets[:, 0]).square().mean(dim=1)
    assert errors[9] < errors[0], "the mean of ten is less noisy than one"


def test_linear_autoregression_is_exact_on_a_noise_free_sum_of_sines():
    steps = np.arange(2000)
    values = sum(np.sin(2 * np.pi * steps / period) for period in (9.1, 16.3, 35.7))  # Prony 1795
    train, test = (rnn.SeriesDataset(part, 50) for part in (values[:1500], values[1500:]))
    baselines = rnn.series_baselines(train, train, test)
    loss = {name: answers["loss"].mean() for name, answers in baselines.items()}
    assert loss["linear autoregression"] < 1e-8
    assert loss["persistence"] > 0.01


def test_what_a_forecaster_is_given_is_relative_to_its_window():
    values = np.random.default_rng(0).normal(size=60).astype(np.float32)
    datasets = [rnn.SeriesDataset(values + level, 10, stride=3) for level in (0, 50)]
    (inputs, targets), (raised, same) = (dataset.batch(range(len(dataset))) for dataset in datasets)
    torch.testing.assert_close(inputs, raised, atol=1e-4, rtol=0)
    torch.testing.assert_close(targets, same, atol=1e-4, rtol=0)
    assert targets[1].item() == pytest.approx(values[13] - values[12], abs=1e-6), (
        "counted from the last value"
    )
    assert inputs[1, :, 0].numpy() == pytest.approx(values[3:13] - values[3:13].mean(), abs=1e-6)


def test_the_exact_filter_is_bayes_rule_summed_over_every_path():
    config = rnn.ForecasterConfig(periods=((2, 4), (3, 6)), switch_rate=0.3, noise=0.7)
    windows = np.random.default_rng(0).normal(size=(3, 3))
    paths = []  # of each wave: the probability of a path, and its values
    for periods in config.periods:
        n = periods[1]  # positions
        wave = np.sin(2 * np.pi * np.arange(n) / n)
        paths.append([])
        for which, phase, *switches in itertools.product(range(2), range(n), *[range(2)] * 3):
            weight = 1.0
            values = [wave[phase]]
            for switch in switches:
                weight *= 0.3 if switch else 0.7
                which = (which + switch) % 2
                phase = (phase + (2, 1)[which]) % n
                values.append(wave[phase])
            paths[-1].append((weight, np.array(values)))
    for window, forecast in zip(windows, rnn.best_forecasts(windows, config)):
        total = weighted = 0.0
        for (weight, fast), (other_weight, slow) in itertools.product(*paths):
            values = fast + slow
            weight *= other_weight * np.exp(-0.5 * np.sum(((window - values[:3]) / 0.7) ** 2))
            total, weighted = total + weight, weighted + weight * values[3]
        assert forecast == pytest.approx(weighted / total, abs=1e-5)


def test_the_window_matters_and_nobody_beats_the_exact_filter():
    config = rnn.ForecasterConfig(n_steps=12_000)
    data = rnn.build_series(config, 3)
    errors = {name: each["loss"] * data.unit**2 for name, each in data.baselines().items()}
    best = data.ceilings()["exact filter"]["loss"] * data.unit**2
    assert config.noise**2 < best.mean() < 2 * config.noise**2
    assert best.mean() < 0.6 * min(error.mean() for error in errors.values())
    windows = data.test.inputs[::2, :, 0].double().numpy() * data.unit + data.offset
    truth = data.test.targets[::2, 0].double().numpy() * data.unit + data.offset

    def error(windows, config):
        return np.mean((rnn.best_forecasts(windows, config) - truth) ** 2)

    assert error(windows[:, -8:], config) > 1.1 * error(windows[:, -16:], config)
    assert error(windows[:, -16:], config) > 1.02 * error(windows[:, -32:], config)
    for wrong in ({"switch_rate": 0.002}, {"switch_rate": 0.05}, {"noise": 0.1}, {"noise": 0.6}):
        assert error(windows, replace(config, **wrong)) > error(windows, config), wrong


def test_the_distance_of_a_step_counts_from_the_last_switch():
    config = rnn.ForecasterConfig(noise=0.0, n_steps=3000)
    series = rnn.generate_series(config, rnn.random_generator(0, "series"))
    quiet = series.index[series["distance"] > 40]
    assert len(quiet) > 300
    # 160 steps hold whole cycles of all periods
    for i in quiet[quiet > 200]:
        first = i - int(series["distance"][i])
        lags = [lag for lag in (80, 160) if i - lag >= first]
        for lag in lags:  # both fast periods repeat after 20 steps, both slow ones after 32
            assert (
                series["value"][i] == pytest.approx(series["value"][i - 160], abs=1e-9) or lag < 160
            )


def parse_review(text):
    """Of each phrase who speaks (or None: an aside), its last word, and how many words it has."""
    phrases = []
    for phrase in re.split(r"[.,] ?", text.lower().rstrip(".")):
        first, *_, last = phrase.split()
        speaker = first if first in ("i", *rnn.OTHERS) else None
        phrases.append((speaker, last, len(phrase.split())))
    return phrases


def test_only_the_writers_last_opinion_depends_on_the_label():
    config = rnn.ClassifierConfig(n_reviews=4000)
    reviews = rnn.generate_reviews(config, rnn.random_generator(1, "test"))
    rows = zip(reviews.texts, reviews.labels, reviews.known.itertuples())
    agreements = []
    others = []
    for text, label, known in rows:
        phrases = parse_review(text)
        *before, last = [i for i, (speaker, *_) in enumerate(phrases) if speaker == "i"]
        assert known.favourable == (phrases[last][1] in rnn.POSITIVE)
        assert known.distance == sum(n for *_, n in phrases[last + 1 :])
        follows = any(speaker for speaker, *_ in phrases[last + 1 :])
        assert known.role == (rnn.OTHERS_FOLLOW if follows else rnn.ASIDES_FOLLOW)
        assert known.favourable != (known.other_word in rnn.POSITIVE)
        agreements.append(known.favourable == label)
        others.extend(
            (word in rnn.POSITIVE) == label
            for i, (speaker, word, _) in enumerate(phrases)
            if speaker and i != last
        )
    assert np.mean(agreements) == pytest.approx(config.reliability, abs=0.02)
    assert np.mean(others) == pytest.approx(0.5, abs=0.02), "all others are random"
    far = reviews.known["distance"] >= 50
    assert 0.1 < far.mean() < 0.25


def test_a_changed_example_calls_for_another_answer(data):
    own = data["predictor"]
    words = own.preprocessing["vocabulary"]
    subjects = rnn.corpus_subjects()
    rows, before, after = own.change
    assert len(rows) > 20
    for i, row in enumerate(rows):
        known = own.examples.iloc[row]
        place = rnn.QUICK["predictor"].window - int(known["distance"])
        changed = (before.inputs[i] != after.inputs[i]).nonzero()[:, 0].tolist()
        assert changed == [place]
        nouns = [words[part.inputs[i, place]] for part in (before, after)]
        if rnn.UNK in nouns:  # so few sentences may not hold every noun
            continue
        old, new = (subjects[noun] for noun in nouns)
        assert old.area == new.area and set(old.verbs) == set(new.verbs)
        favourites = [
            subject.verbs[0] if known["role"] == "verb" else subject.objects[0]
            for subject in (old, new)
        ]
        assert favourites[0] != favourites[1]
        assert words[after.targets[i]] in (favourites[1], rnn.UNK)
    for name in ("classifier", "forecaster"):
        rows, before, after = data[name].change
        assert len(rows) == len(before) == len(after) == len(data[name].test)
        differs = before.batch(range(len(rows)))[0] - after.batch(range(len(rows)))[0]
        assert ((differs.abs() > 1e-5).flatten(1).sum(dim=1) == 1).all()


def test_the_effect_of_a_change_is_what_the_output_makes_of_it(data):
    for name, task in rnn.TASKS.items():
        own = data[name]
        model = new_model(name, "GRU", data).eval()
        effect = rnn.effect_of_change(model, task, own.change)
        assert list(effect.index) == list(own.change.rows)
        row = own.change.rows[1]
        (old, target), (new, _) = (part.batch([1]) for part in own.change[1:])
        if name == "forecaster":  # as the model was trained: without the mean, shifted in one place
            assert old.mean().item() == pytest.approx(0, abs=1e-6)
            moved = (new - old).flatten()
            assert moved[moved.abs() > 1e-5].tolist() == pytest.approx([rnn.SHIFT])
        with torch.no_grad():
            old, new = model(old)[0], model(new)[0]
        if name == "classifier":
            expected = (new - old).item() * (1 if target.item() else -1)
        elif name == "predictor":
            expected = (new.softmax(0) - old.softmax(0))[target.item()].item()
        else:
            expected = abs((new - old).item()) / rnn.SHIFT
        assert effect[row] == pytest.approx(expected, abs=1e-5)


def test_no_ceiling_is_beaten_on_simulated_data():
    for name, task in rnn.TASKS.items():
        config = rnn.DEFAULT[name]
        if name == "forecaster":
            config = replace(config, n_steps=8000)
        data = task.build_data(config, 11)
        (ceiling,) = data.ceilings().values()
        for baseline, answers in data.baselines().items():
            gain = ceiling["loss"] - answers["loss"]
            assert gain.mean() < 3 * gain.std() / np.sqrt(len(gain)), (
                f"{baseline} beats the ceiling"
            )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rnn.Training(patience=2, lr_patience=2), "before the learning rate has fallen"),
        (lambda: rnn.build_reviews(rnn.ClassifierConfig(n_reviews=3), 0), "need 20 or more"),
        (lambda: rnn.build_corpus(rnn.PredictorConfig(n_words=50), 0), "need 88 or more"),
        (lambda: rnn.build_series(rnn.ForecasterConfig(n_steps=40), 0), "need 48 or more"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
