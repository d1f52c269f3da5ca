"""The data: disjoint splits, nothing fitted on what is tested, references that are right."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import new_model

SPLITS = ("train", "validation", "test")


def test_reviews_are_what_was_ordered():
    config = rnn.ClassifierConfig()
    data = rnn.build_reviews(config, 7)
    splits = [getattr(data, split) for split in SPLITS]
    assert sum(map(len, splits)) == config.n_reviews == 5000
    labels = torch.cat([split.targets for split in splits])
    assert labels.mean() == 0.5
    assert data.sizes["vocab_size"] == 5000
    lengths = torch.cat([split.lengths for split in splits])
    assert 180 < lengths.max() <= 200 and 125 < lengths.float().mean() < 135
    words = splits[2].inputs[splits[2].inputs > 0]
    assert 0 < (words == 1).float().mean() < 0.05, "some words are unknown: the vocabulary cuts"


def test_no_review_is_in_two_splits(data):
    texts = []
    for split in SPLITS:
        rows = getattr(data["classifier"], split).inputs.tolist()
        texts.append({tuple(filter(None, row)) for row in rows})
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_vocabularies_hold_the_words_of_the_training_part_only(data):
    corpus = rnn.generate_corpus(rnn.QUICK["predictor"], rnn.random_generator(0, "corpus"))
    words = corpus["word"].tolist()
    reviews = rnn.generate_reviews(rnn.QUICK["classifier"], rnn.random_generator(0, "reviews"))
    texts = reviews["text"].tolist()
    heard = rnn.tokenize(" ".join(texts[: int(0.7 * len(texts))]), rnn.WORDS)
    for task, known in (("predictor", words[: int(0.7 * len(words))]), ("classifier", heard)):
        assert set(data[task].preprocessing["vocabulary"]) == {rnn.PAD, rnn.UNK, *known}


def test_contiguous_parts_look_back_share_no_target_and_lose_nothing(data):
    series = rnn.generate_series(rnn.QUICK["forecaster"], rnn.random_generator(0, "series"))
    series = series["value"].to_numpy()
    scaler = data["forecaster"].preprocessing
    values = data["forecaster"].train.inputs[0, :, 0]
    for split in SPLITS:
        dataset = getattr(data["forecaster"], split)
        assert torch.equal(dataset.inputs[0, :, 0], values[-50:]), "the window before the cut"
        values = torch.cat([values, dataset.targets[:, 0]])
    values = values.numpy() * scaler["std"] + scaler["mean"]
    np.testing.assert_allclose(values, series, atol=1e-5)
    windows = np.lib.stride_tricks.sliding_window_view(series[: int(0.7 * len(series))], 51)
    spread = np.sqrt(np.mean((windows - windows[:, :-1].mean(axis=1, keepdims=True)) ** 2))
    assert scaler["std"] == pytest.approx(spread), "the unit is the training part's"

    corpus = rnn.generate_corpus(rnn.QUICK["predictor"], rnn.random_generator(0, "corpus"))
    vocabulary = list(data["predictor"].preprocessing["vocabulary"])
    ids = data["predictor"].train.inputs[0].tolist()
    for split in SPLITS:
        dataset = getattr(data["predictor"], split)
        assert dataset.inputs[0].tolist() == ids[-10:]
        ids += dataset.targets.tolist()
    known = set(vocabulary)
    spelled = [word if word in known else rnn.UNK for word in corpus["word"]]
    assert [vocabulary[i] for i in ids] == spelled


def test_verbs_agree_with_a_subject_up_to_seven_words_back():
    text = rnn.generate_corpus(rnn.PredictorConfig(), rnn.random_generator(5, "corpus"))
    distances = Counter()
    subjects = rnn.corpus_subjects()
    for i, word, distance in text[["word", "distance"]].dropna().itertuples():
        subject = subjects[text["word"][i - distance]]
        if word in subject.verbs:
            distances[distance] += 1
            area = rnn.AREAS[subject.area]
            is_plural = text["word"][i - distance] not in area[0].split()
            assert (word + "s" if is_plural else word) in area[1].split()
        else:
            assert word in subject.objects
    assert set(distances) == {2, 5, 7}, "where a verb must come: after an adverb or two phrases"


def test_batches_are_whole_shuffled_and_cover_every_example_once_an_epoch():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    epochs = [rnn.length_buckets(lengths, 32, rng) for _ in range(2)]
    rows = [np.concatenate(epoch) for epoch in epochs]
    assert all(sorted(epoch) == list(range(1000)) for epoch in rows)
    assert not np.array_equal(*rows), "drawn anew every epoch"
    padding = np.mean([lengths[b].max() - lengths[b].float().mean() for b in epochs[0]])
    assert padding < 10, "examples of a batch are of similar length"
    assert len(epochs[0]) == 32


def test_a_batch_equals_its_examples(data):
    for split in (own.train for own in data.values()):
        inputs, targets = split[[3, 0]]
        for row, i in enumerate((3, 0)):
            one, target = split[i]
            assert torch.equal(inputs[row, : len(one)], one) and not inputs[row, len(one) :].any()
            assert torch.equal(targets[row], target)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rnn.build_reviews(rnn.ClassifierConfig(n_reviews=3), 0), "need 20 or more"),
        (lambda: rnn.build_corpus(rnn.PredictorConfig(n_words=50), 0), "need 88 or more"),
        (lambda: rnn.build_series(rnn.ForecasterConfig(n_steps=35), 0), "need 36 or more"),
    ],
)
def test_too_few_data_are_refused(build, message):
    with pytest.raises(rnn.InputError, match=message):
        build()


# --- baselines ------------------------------------------------------------------------


def data_of(*splits, **preprocessing):
    """The data that baselines are given: three splits."""
    sizes = {"vocab_size": len(preprocessing.get("vocabulary", "")), "output_dim": 1}
    return rnn.TaskData(*splits, sizes, preprocessing, None, None)


def baselines_of(task, data, **changes):
    """The answers of a task's baselines with the quick configuration."""
    config = replace(rnn.QUICK[task], **changes)
    return rnn.TASKS[task].baselines(rnn.TASKS[task], data, config, 0)


def test_ngram_probabilities_are_witten_bells():
    probabilities = rnn.ngram_model([2, 3, 2, 4, 2, 3], 5)
    unigram = (2 + 3 / 5) / (6 + 3)  # of word 3: twice among 6, 3 different words
    assert probabilities(())[3] == pytest.approx(unigram)
    bigram = (2 + 2 * unigram) / (3 + 2)  # after word 2: twice among 3, 2 different words
    assert probabilities((2,))[3] == pytest.approx(bigram)


def test_the_trigram_goes_by_the_last_two_words_and_nobody_answers_with_an_unknown_word():
    ids = [2, 3, 4, 5, 3, 6, 1, 1] * 50  # after 3 comes 4 or 6, and the word before tells which
    corpus = rnn.CorpusDataset(ids, 5)
    data = data_of(corpus, corpus, corpus, vocabulary=range(7))
    answers = baselines_of("predictor", data, window=5)
    assert all((each["answer"] >= 2).all() for each in answers.values())
    targets = corpus.targets.numpy()
    scores = {name: np.mean((a["answer"] == targets)[targets > 1]) for name, a in answers.items()}
    assert scores["trigram"] == 1 and scores["unigram"] < scores["bigram"] < 0.9


def test_the_network_without_recurrence_finds_a_cue_that_no_trigram_sees():
    rng = np.random.default_rng(0)
    cues = rng.integers(2, 4, 600)
    ids = np.stack([cues, *rng.integers(6, 9, (3, 600)), cues + 2], axis=1).ravel()
    corpus = rnn.CorpusDataset(ids, 4)
    data = data_of(corpus, corpus, corpus, vocabulary=range(9))
    answers = baselines_of("predictor", data, window=4, epochs=20)
    targets = corpus.targets.numpy()
    is_answer = (targets >= 4) & (targets < 6)  # tells which cue stood first
    scores = {name: np.mean((a["answer"] == targets)[is_answer]) for name, a in answers.items()}
    assert scores["log-bilinear"] > 0.99 and scores["trigram"] < 0.8


def test_naive_bayes_is_what_the_textbook_computes():
    train = rnn.ReviewDataset([[2, 3], [2, 4], [5, 3], [5, 4, 4]], [1, 1, 0, 0])
    test = rnn.ReviewDataset([[2, 3, 4], [5]], [1, 0])
    data = data_of(train, train, test, vocabulary=range(6), labels=["no", "yes"])
    answers = baselines_of("classifier", data)
    assert answers["majority class"]["loss"].tolist() == pytest.approx([np.log(2)] * 2)
    found = answers["naive Bayes"]
    assert found["answer"].tolist() == [1, 0]
    # words 2, 3, 4 under "yes" 2, 1, 1 of 4, under "no" 0, 1, 2 of 5; one is added for each of 6
    # words (unknown, 2 to 5: five words and none for padding)
    odds = np.log([3 / 9 * 2 / 9 * 2 / 9, 1 / 10 * 2 / 10 * 3 / 10])
    log_odds = odds[0] - odds[1]
    temperatures = np.geomspace(0.1, 100, 61)
    losses = np.log1p(np.exp(-log_odds / temperatures))
    assert np.abs(losses - found["loss"][0]).min() < 1e-5


def test_the_recency_network_goes_by_the_later_of_two_pairs_and_the_order_of_their_words():
    rng = np.random.default_rng(0)
    orders = rng.integers(0, 2, (400, 2))
    labels = orders[:, 1]
    reviews = rng.integers(4, 9, (400, 20))
    for review, order, places in zip(reviews, orders, rng.integers((0, 10), (9, 19), (400, 2))):
        for is_up, place in zip(order, places):
            review[place : place + 2] = (2, 3) if is_up else (3, 2)
    dataset = rnn.ReviewDataset(reviews.tolist(), labels)
    data = data_of(dataset, dataset, dataset, vocabulary=range(9), labels=["no", "yes"])
    answers = baselines_of("classifier", data, epochs=30)
    scores = {name: (each["answer"] == labels).mean() for name, each in answers.items()}
    assert scores["recency network"] > 0.99 and scores["naive Bayes"] < 0.65


def test_linear_autoregression_is_exact_on_a_noise_free_sum_of_sines():
    steps = np.arange(2000)
    values = sum(np.sin(2 * np.pi * steps / period) for period in (9.1, 16.3, 35.7))  # Prony 1795
    train, test = (rnn.SeriesDataset(part, 50) for part in (values[:1500], values[1500:]))
    answers = baselines_of("forecaster", data_of(train, train, test))
    assert answers["linear autoregression"]["loss"].mean() < 1e-8
    assert answers["persistence"]["loss"].mean() > 0.01


# --- ceilings -------------------------------------------------------------------------


def test_what_a_forecaster_is_given_is_relative_to_its_window():
    values = np.random.default_rng(0).normal(size=60).astype(np.float32)
    datasets = [rnn.SeriesDataset(values + level, 10, stride=3) for level in (0, 50)]
    (inputs, targets), (raised, same) = (dataset[range(len(dataset))] for dataset in datasets)
    torch.testing.assert_close(inputs, raised, atol=1e-4, rtol=0)
    torch.testing.assert_close(targets, same, atol=1e-4, rtol=0)
    from_last = pytest.approx(values[13] - values[12], abs=1e-6)
    assert targets[1].item() == from_last, "counted from the last value"
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


def test_no_ceiling_is_beaten_by_a_baseline():
    for name, task in rnn.TASKS.items():
        config = replace(rnn.DEFAULT[name], epochs=3)
        if name == "forecaster":
            config = replace(config, n_steps=5000)
        data = task.build_data(config, 11)
        (ceiling,) = data.ceilings().values()
        for baseline, answers in task.baselines(task, data, config, 11).items():
            gain = ceiling["loss"] - answers["loss"]
            assert gain.mean() < 3 * gain.std() / np.sqrt(len(gain)), f"{baseline} beats it"


def test_the_distance_of_a_step_counts_from_the_last_switch():
    config = rnn.ForecasterConfig(noise=0.0, n_steps=3000)
    series = rnn.generate_series(config, rnn.random_generator(0, "series"))
    values = series["value"].to_numpy()
    quiet = series.index[series["distance"] >= 160]  # 160 steps hold whole cycles of all periods
    assert len(quiet) > 30
    np.testing.assert_allclose(values[quiet], values[quiet - 160], atol=1e-9)


# --- what decides ---------------------------------------------------------------------


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
    agreements = []
    others = []
    for review in reviews.itertuples():
        phrases = parse_review(review.text)
        is_positive = review.label == "positive"
        last = max(i for i, (speaker, *_) in enumerate(phrases) if speaker == "i")
        assert review.favourable == (phrases[last][1] in rnn.POSITIVE)
        assert review.distance == sum(n for *_, n in phrases[last + 1 :])
        assert review.favourable != (review.other_word in rnn.POSITIVE)
        agreements.append(review.favourable == is_positive)
        for i, (speaker, word, _) in enumerate(phrases):
            if speaker and i != last:
                others.append((word in rnn.POSITIVE) == is_positive)
    assert np.mean(agreements) == pytest.approx(config.reliability, abs=0.02)
    assert np.mean(others) == pytest.approx(0.5, abs=0.02), "all others are random"
    assert 0.1 < (reviews["distance"] >= 50).mean() < 0.25


def test_a_changed_example_calls_for_another_answer(data):
    own = data["predictor"]
    words = list(own.preprocessing["vocabulary"])
    subjects = rnn.corpus_subjects()
    rows, before, after = own.change
    assert len(rows) > 20
    for i, row in enumerate(rows):
        place = rnn.QUICK["predictor"].window - int(own.examples["distance"][row])
        changed = (before.inputs[i] != after.inputs[i]).nonzero()[:, 0].tolist()
        assert changed == [place]
        nouns = [words[part.inputs[i, place]] for part in (before, after)]
        if rnn.UNK in nouns:  # so few sentences may not hold every noun
            continue
        old, new = (subjects[noun] for noun in nouns)
        assert old.area == new.area and set(old.verbs) == set(new.verbs)
        assert old.verbs[0] != new.verbs[0] and old.objects[0] != new.objects[0]
        assert words[after.targets[i]] in (new.verbs[0], new.objects[0], rnn.UNK)
    for name in ("classifier", "forecaster"):
        rows, before, after = data[name].change
        assert len(rows) == len(before) == len(after) == len(data[name].test)
        differs = before[range(len(rows))][0] - after[range(len(rows))][0]
        assert ((differs.abs() > 1e-5).flatten(1).sum(dim=1) == 1).all()


def test_the_effect_of_a_change_is_what_the_output_makes_of_it(data):
    for name, task in rnn.TASKS.items():
        own = data[name]
        model = new_model(name, "GRU", data).eval()
        effect = rnn.effect_of_change(model, task, own.change)
        assert list(effect.index) == list(own.change.rows)
        (old, target), (new, _) = (part[[1]] for part in own.change[1:])
        with torch.no_grad():
            old, new = model(old)[0], model(new)[0]
        if name == "classifier":
            expected = (new - old).item() * (1 if target.item() else -1)
        elif name == "predictor":
            expected = (new.softmax(0) - old.softmax(0))[target.item()].item()
        else:
            expected = abs((new - old).item()) / rnn.SHIFT
        assert effect[own.change.rows[1]] == pytest.approx(expected, abs=1e-5)
