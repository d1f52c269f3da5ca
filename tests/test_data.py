"""The data: disjoint splits, nothing fitted on what is tested, references that are right."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT

SPLITS = ("train", "validation", "test")


def words_of(reviews, vocabulary):
    return [tuple(vocabulary[i] for i in row if i) for row in reviews.inputs.tolist()]


def test_reviews_are_what_was_ordered():
    config = rnn.ClassifierConfig()
    data = rnn.build_reviews(config, 7)
    assert sum(len(getattr(data, split)) for split in SPLITS) == config.n_reviews == 5000
    assert data.facts["share positive"] == 0.5
    assert data.facts["distinct words"] > 5000 == data.facts["vocabulary"], "the vocabulary must really cut"
    lengths = torch.cat([getattr(data, split).lengths for split in SPLITS])
    assert lengths.max() <= 200 and len(lengths.unique()) > 20
    assert 0 < data.facts["unknown words in the test split"] < 0.05


def test_no_review_is_in_two_splits(data):
    vocabulary = data["classifier"].decoding["vocabulary"]
    texts = [set(words_of(getattr(data["classifier"], split), vocabulary)) for split in SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_duplicate_reviews_are_dropped(monkeypatch):
    original = rnn.generate_reviews(rnn.QUICK.classifier, rnn.random_generator(0, "reviews"))
    twice = {name: np.tile(getattr(original, name), 2) for name in ("labels", "log_odds", "praised")}
    doubled = rnn.Reviews([*original.texts, *(text.upper() for text in original.texts)], **twice)
    monkeypatch.setattr(rnn, "generate_reviews", lambda config, rng: doubled)
    assert rnn.build_reviews(rnn.QUICK.classifier, 0).facts["reviews"] == len(set(original.texts))


def test_vocabularies_hold_the_words_of_the_training_part_only(data):
    text = rnn.generate_corpus(rnn.QUICK.predictor, rnn.random_generator(0, "corpus")).words
    known = set(data["predictor"].decoding["vocabulary"])
    assert known == {rnn.PAD, rnn.UNK, *text[: int(0.7 * len(text))]}
    reviews = rnn.generate_reviews(rnn.QUICK.classifier, rnn.random_generator(0, "reviews")).texts
    known = set(data["classifier"].decoding["vocabulary"])
    assert known == {rnn.PAD, rnn.UNK} | {
        w for text in reviews[: int(0.7 * len(reviews))] for w in rnn.tokenize(text, rnn.WORDS)
    }


def test_contiguous_parts_do_not_overlap_and_lose_nothing(data):
    series = rnn.generate_series(rnn.QUICK.forecaster, rnn.random_generator(0, "series"))
    scaler = data["forecaster"].decoding["scaler"]
    parts = []
    for split in SPLITS:
        dataset = getattr(data["forecaster"], split)
        parts.append(torch.cat([dataset.inputs[0, :, 0], dataset.targets[:, 0]]).numpy())
    np.testing.assert_allclose(np.concatenate(parts) * scaler["std"] + scaler["mean"], series, atol=1e-5)
    assert abs(parts[0].mean()) < 1e-6 and abs(parts[0].std() - 1) < 1e-6, "the scaler is the training part's"
    text = rnn.generate_corpus(rnn.QUICK.predictor, rnn.random_generator(0, "corpus")).words
    vocabulary = data["predictor"].decoding["vocabulary"]
    ids = [torch.cat([(d := getattr(data["predictor"], split)).inputs[0], d.targets]).tolist() for split in SPLITS]
    unknown = set(text) - set(vocabulary)
    assert [vocabulary[i] for part in ids for i in part] == [rnn.UNK if w in unknown else w for w in text]


def test_the_corpus_does_not_repeat_itself():
    data = rnn.build_corpus(rnn.PredictorConfig(), 3)
    assert data.facts["test windows that also occur in training"] < 0.01
    assert 18_000 <= data.facts["words"] < 18_100


def test_windows_are_views(data):
    for name in ("predictor", "forecaster"):
        split = data[name].train
        assert split.inputs.untyped_storage().data_ptr() == split.targets.untyped_storage().data_ptr()
        assert split.inputs.untyped_storage().nbytes() < 8 * (len(split) + 100)


def test_verbs_agree_with_a_subject_up_to_seven_words_back():
    text = rnn.generate_corpus(rnn.PredictorConfig(), rnn.random_generator(5, "corpus"))
    grammar = rnn.Grammar()
    verbs = {verb: kind for kind, group in grammar.verbs.items() for verb in group}
    distances = Counter()
    for i, (word, distance) in enumerate(zip(text.words, text.distance)):
        if word in verbs and distance:
            assert grammar.subjects[text.words[i - distance]][:2] == verbs[word]
            distances[distance] += 1
    assert max(distances) == 7 and min(distances) == 1


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
        inputs, targets = split.__getitems__([3, 0])
        for row, i in enumerate((3, 0)):
            one, target = split[i]
            assert torch.equal(inputs[row], one[: inputs.shape[1]]) and not one[inputs.shape[1] :].any()
            assert torch.equal(targets[row], target)


SCRIPT = """
import sys, pytorch_rnn_models as rnn
rnn.write_report = lambda *_: []
arguments = "--quick --tasks classifier predictor --models GRU --seeds 0 --output-dir".split()
sys.exit(rnn.main([*arguments, sys.argv[1]]))
"""


def test_the_same_seed_gives_the_same_numbers_whatever_the_hash_seed(tmp_path):
    processes, weights = [], []
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / hash_seed)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    for hash_seed, process in zip(("1", "2"), processes):
        assert process.wait() == 0
        paths = sorted((tmp_path / hash_seed / "models").glob("*.pt"))
        weights.append([torch.load(path, weights_only=True) for path in paths])
    for one, other in zip(*weights):
        assert one["decoding"] == other["decoding"] and one["metrics"] == other["metrics"]
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


def test_another_seed_gives_other_data():
    for name, task in rnn.TASKS.items():
        first, second = (task.build_data(getattr(rnn.QUICK, name), seed).train.inputs for seed in (0, 1))
        assert first.shape != second.shape or not torch.equal(first, second)


# --- baselines and ceilings -----------------------------------------------------------


def reference(data, name):
    return next(r for r in data.references if r.name.startswith(name))


def test_ngram_probabilities_sum_to_one_and_the_likeliest_is_the_likeliest():
    ids = rnn.random_generator(0, "test").integers(1, 8, 200)
    model = rnn.NGram(ids, order=3, vocab_size=10)
    for context in ((1, 2), (7, 7), (9, 9)):  # the last one was never seen
        contexts = np.tile(context, (10, 1))
        probabilities = model.probability(contexts, np.arange(10))
        assert probabilities.sum() == pytest.approx(1)
        probabilities[1] = 0  # <unk> is no answer
        assert probabilities[model.likeliest(contexts[:1])[0]] == probabilities.max()


def test_ngram_probabilities_are_witten_bells():
    model = rnn.NGram(np.array([2, 3, 2, 4, 2, 3]), order=2, vocab_size=5)
    unigram = (2 + 3 / 5) / (6 + 3)  # of word 3: twice among 6, 3 different words
    assert model.probability(np.zeros((1, 0), int), np.array([3]))[0] == pytest.approx(unigram)
    bigram = (2 + 2 * unigram) / (3 + 2)  # after word 2: twice among 3, 2 different words
    assert model.probability(np.array([[2]]), np.array([3]))[0] == pytest.approx(bigram)


def test_naive_bayes_learns_words_and_majority_does_not(data):
    train = rnn.ReviewDataset([[2, 3], [2, 4], [5, 3], [5, 4]] * 5, [1, 1, 0, 0] * 5)
    test = rnn.ReviewDataset([[2, 3, 4], [5]], [1, 0])
    assert rnn.naive_bayes(train, test, 6).score.tolist() == [1, 1]
    assert rnn.majority_class(train, test).loss == pytest.approx(np.log(2))


def test_linear_autoregression_is_exact_on_a_noise_free_sum_of_sines():
    data = rnn.build_series(replace(rnn.ForecasterConfig(), noise=1e-6), 0)
    assert reference(data, "linear").loss.mean() < 1e-8
    assert reference(data, "persistence").loss.mean() > 0.01


def test_seasonal_naive_finds_the_season():
    config = replace(rnn.ForecasterConfig(), periods=(20.0,), amplitudes=(1.0,), noise=0.01)
    assert rnn.build_series(config, 0).facts["season (steps)"] in (20, 40)


def test_the_bayes_decision_is_calibrated_and_beats_every_count_of_words():
    config = replace(rnn.ClassifierConfig(), n_reviews=20_000, phrases=(20, 40))
    reviews = rnn.generate_reviews(config, rnn.random_generator(1, "test"))
    claimed = 1 / (1 + np.exp(-np.abs(reviews.log_odds)))
    hits = (reviews.log_odds > 0) == (reviews.labels == 1)
    assert hits.mean() == pytest.approx(claimed.mean(), abs=3 * hits.std() / np.sqrt(len(hits)))


def test_no_ceiling_is_beaten_on_simulated_data():
    for name, task in rnn.TASKS.items():
        data = task.build_data(getattr(rnn.Config(), name), 11)
        ceiling = next(r for r in data.references if r.kind == "ceiling")
        for baseline in (r for r in data.references if r.kind == "baseline"):
            gain = ceiling.loss - baseline.loss
            assert gain.mean() < 3 * gain.std() / np.sqrt(len(gain)), f"{baseline.name} beats {ceiling.name}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: rnn.Training(epochs=0), "epochs is 0"),
        (lambda: rnn.Training(patience=2, lr_patience=2), "before the learning rate has fallen"),
        (lambda: rnn.ClassifierConfig(n_reviews=3), "need 20 or more"),
        (lambda: rnn.PredictorConfig(n_words=50), "need 88 or more"),
        (lambda: rnn.ForecasterConfig(n_steps=50), "need 408 or more"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()
