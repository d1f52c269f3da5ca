"""Vanilla RNN, LSTM and GRU compared on three tasks, each with its baselines and its ceiling.

    python pytorch_rnn_models.py                       the whole experiment, into outputs/
    python pytorch_rnn_models.py --quick               the same on tiny data, into outputs/quick/
    python pytorch_rnn_models.py --tasks predictor --models RNN GRU --seeds 7 8
    python pytorch_rnn_models.py --report              tables and figures again, no training
    python -m pytest tests                             the tests

Tasks       classifier   positive or negative film reviews    (accuracy, binary cross-entropy)
            predictor    the next word of a corpus            (accuracy, cross-entropy, perplexity)
            forecaster   the next value of noisy sine waves   (MSE, MAE)
Sections    2 configuration   3 data       4 models   5 tasks    6 training
            7 runs            8 evidence   9 report    10 command line
Data flow   arguments -> configuration -> runs -> records -> report

Files, all in the output directory and all written whole or not at all:
    pytorch_rnn_{classifier,predictor,forecaster}_training_history.png
    pytorch_rnn_time_series_predictions.png      pytorch_rnn_parameter_counts.png
    pytorch_rnn_architectures.png                pytorch_rnn_performance_summary.png
    pytorch_rnn_long_range.png
    pytorch_rnn_{runs,summary,comparisons,costs}.csv     pytorch_rnn_summary.md
    runs/TASK_MODEL_seedN.json      the record of a run: all that the report is made from
    models/TASK_MODEL_seedN.pt      its model: load_checkpoint(path) returns it

Shapes in comments: B batch, T time steps, E embedding, F input features, H hidden units, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

# ======================================================================================
# 2. Configuration
# ======================================================================================

DEFAULT_SEEDS = (42, 43, 44)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_at_least_one(config: object, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is 1 or more."""
    for name in names:
        require(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it must be 1 or more")


@dataclass(frozen=True)
class Training:
    """How a model is trained: the same for RNN, LSTM and GRU within a task."""

    epochs: int = 30  # upper bound; early stopping may end sooner
    batch_size: int = 64  # examples per update
    accumulate_steps: int = 1  # micro-batches that a batch is cut into, to save memory; the update is the same
    learning_rate: float = 1e-3  # Adam's, at the start
    lr_factor: float = 0.5  # the rate is multiplied by this on a plateau of the validation loss
    lr_patience: int = 1  # epochs without improvement that are put up with; after one more the rate falls
    patience: int = 5  # epochs without improvement after which training ends
    weight_decay: float = 0.0  # added to the gradient: pulls back embeddings of rare words, which memorise
    clip_norm: float = 1.0  # larger gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require_at_least_one(self, "epochs", "batch_size", "accumulate_steps", "patience")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0")
        require(self.clip_norm > 0, f"clip_norm is {self.clip_norm}; it must be above 0")
        require(0 < self.lr_factor < 1, f"lr_factor is {self.lr_factor}; it must lie between 0 and 1")
        require(
            self.lr_patience + 1 < self.patience,
            f"patience is {self.patience}; with lr_patience {self.lr_patience} it must be above "
            f"{self.lr_patience + 1}, or training ends before the learning rate has fallen",
        )


@dataclass(frozen=True)
class ClassifierConfig:
    """Text classification: the reviews, the model, its training. What each lever does: `generate_reviews`."""

    n_reviews: int = 5000
    vocab_size: int = 5000  # most frequent words of the training split, <pad> and <unk> included
    phrases: tuple[int, int] = (10, 62)  # three-word phrases per review, least and most: 34 to 190 words
    opinion_rate: float = 0.33  # share of the phrases that state an opinion
    clarity: tuple[float, float] = (0.5, 0.84)  # range of a review's share of opinions that agree with its label
    negation_rate: float = 0.2  # share of the opinions put as the negation of the opposite
    name_rate: float = 0.15  # share of the other phrases that hold a surname, most of them rare
    verdict_reliability: float = 0.64  # how often the closing verdict agrees with the label
    embed_dim: int = 50
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    training: Training = Training(learning_rate=2e-3, weight_decay=1e-4, lr_patience=2, patience=6)

    def __post_init__(self) -> None:
        require_at_least_one(self, "embed_dim", "hidden_dim", "n_layers")
        require(self.n_reviews >= 20, f"n_reviews is {self.n_reviews}; three splits need 20 or more")
        require(self.vocab_size >= 3, f"vocab_size is {self.vocab_size}; with <pad> and <unk> it must be 3 or more")


@dataclass(frozen=True)
class PredictorConfig:
    """Next-word prediction: the corpus, the model, its training. What each lever does: `generate_corpus`."""

    n_words: int = 24_000
    vocab_size: int = 5000
    window: int = 10  # words that the model sees before the one it predicts
    favourite_rate: float = 0.7  # how often a subject takes its favourite verb, and its favourite object
    embed_dim: int = 50
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    training: Training = Training(batch_size=256, learning_rate=5e-3)

    def __post_init__(self) -> None:
        require_at_least_one(self, "window", "embed_dim", "hidden_dim", "n_layers")
        needed = 20 * (self.window + 1)
        require(self.n_words >= needed, f"n_words is {self.n_words}; windows of {self.window} need {needed} or more")


@dataclass(frozen=True)
class ForecasterConfig:
    """Time-series forecasting: the series, the model, its training."""

    n_steps: int = 4000
    window: int = 50  # steps that the model sees before the one it predicts
    periods: tuple[float, ...] = (9.1, 16.3, 35.7)  # steps; a window holds at least one whole cycle of each
    amplitudes: tuple[float, ...] = (0.5, 0.8, 1.0)
    noise: float = 0.3  # standard deviation of the white noise
    hidden_dim: int = 64
    n_layers: int = 2
    dropout: float = 0.0
    training: Training = Training(epochs=20, batch_size=128, learning_rate=5e-3)  # 30 epochs gained under 1 %

    def __post_init__(self) -> None:
        require_at_least_one(self, "hidden_dim", "n_layers")
        require(len(self.periods) == len(self.amplitudes), "periods and amplitudes must be of the same number")
        require(self.window >= 2, f"window is {self.window}; it must be 2 or more")
        needed = 20 * (self.window + 1)
        require(self.n_steps >= needed, f"n_steps is {self.n_steps}; windows of {self.window} need {needed} or more")


@dataclass(frozen=True)
class Config:
    """Every hyper-parameter of the experiment; a variant is `dataclasses.replace` of it."""

    classifier: ClassifierConfig = ClassifierConfig()
    predictor: PredictorConfig = PredictorConfig()
    forecaster: ForecasterConfig = ForecasterConfig()

    def with_epochs(self, epochs: int) -> Config:
        """The same experiment with another cap on the number of epochs."""
        parts = {name: getattr(self, name) for name in ("classifier", "predictor", "forecaster")}
        return Config(**{k: replace(v, training=replace(v.training, epochs=epochs)) for k, v in parts.items()})


QUICK = Config(
    ClassifierConfig(n_reviews=200, phrases=(5, 15), training=Training(epochs=2)),
    PredictorConfig(n_words=1500, training=Training(epochs=2)),
    ForecasterConfig(n_steps=1100, hidden_dim=16, training=Training(epochs=2)),
)

# ======================================================================================
# 3. Data
# ======================================================================================

PAD, UNK = "<pad>", "<unk>"
TRAIN_SHARE, VALIDATION_SHARE = 0.70, 0.15  # the rest is the test split


def random_generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream of random numbers that depends on (seed, purpose) and on nothing else."""
    return np.random.default_rng([seed, *purpose.encode()])


def torch_seed(seed: int, purpose: str) -> int:
    """A seed for torch's generators that depends on (seed, purpose) and on nothing else."""
    return int(random_generator(seed, purpose).integers(2**63))


@dataclass(frozen=True)
class Reference:
    """A baseline or a ceiling: what it scores on each test example, in the units of the task's loss and score."""

    name: str
    kind: str  # "baseline" or "ceiling"
    loss: np.ndarray  # (N,)
    score: np.ndarray  # (N,)


@dataclass(frozen=True)
class TaskData:
    """What one seed's data come to: three disjoint splits and what is known about them."""

    train: BatchDataset
    validation: BatchDataset
    test: BatchDataset
    arguments: Mapping[str, int | float]  # constructor keywords of the models
    decoding: Mapping[str, object]  # what turns words or values into inputs and back: goes into the checkpoint
    references: Sequence[Reference]
    facts: Mapping[str, int | float]  # for the summary
    notes: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) each: known about every test example
    unit: float = 1.0  # one unit of the targets, in the user's units


class BatchDataset(Dataset):
    """Inputs and targets as tensors; a batch is fetched by one indexing operation, not item by item.

    `lengths` (N,) says how many leading time steps of each example hold data.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, lengths: Tensor) -> None:
        self.inputs, self.targets, self.lengths = inputs, targets, lengths

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, cut to the longest of its examples; torch's DataLoader calls this when it is there."""
        rows = torch.as_tensor(indices)
        longest = int(self.lengths[rows].max())
        return self.inputs[rows, :longest], self.targets[rows]


class ReviewDataset(BatchDataset):
    """Reviews as word ids padded on the right with 0: inputs (N, T) long, targets (N, 1) float, 1 = positive."""

    def __init__(self, reviews: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(review) for review in reviews], batch_first=True)
        targets = torch.tensor(labels, dtype=torch.float32).unsqueeze(1)
        super().__init__(ids, targets, torch.tensor([len(review) for review in reviews]))


class CorpusDataset(BatchDataset):
    """Every window of a running text and the word after it: inputs (N, T) long, targets (N,) long, both views."""

    def __init__(self, ids: Sequence[int], window: int) -> None:
        rows = torch.as_tensor(ids, dtype=torch.long).unfold(0, window + 1, 1)  # (N, T + 1), no copy
        super().__init__(rows[:, :-1], rows[:, -1], torch.full((len(rows),), window))


class SeriesDataset(BatchDataset):
    """Every window of a series and the value after it: inputs (N, T, 1) float, targets (N, 1) float, both views."""

    def __init__(self, values: Sequence[float], window: int) -> None:
        rows = torch.as_tensor(values, dtype=torch.float32).unfold(0, window + 1, 1)  # (N, T + 1), no copy
        super().__init__(rows[:, :-1, None], rows[:, -1:], torch.full((len(rows),), window))


class LengthBuckets(Sampler):
    """Shuffled batches of examples of similar length, so that little time goes into padding.

    Examples are shuffled, cut into pools of `pool` batches, sorted by length within each pool, cut into
    batches, and the batches shuffled: all drawn anew every epoch. With equal lengths this is plain shuffling.
    """

    def __init__(self, lengths: Tensor, batch_size: int, rng: np.random.Generator, pool: int = 16) -> None:
        self.lengths, self.batch_size, self.rng, self.pool = lengths.numpy(), batch_size, rng, pool

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.rng.permutation(len(self.lengths))
        pools = np.split(order, range(self.batch_size * self.pool, len(order), self.batch_size * self.pool))
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        yield from (batches[i] for i in self.rng.permutation(len(batches)))


class Vocabulary:
    """Words and their ids: 0 is padding, 1 any unknown word, then words by falling frequency, then alphabet."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def fit(cls, words: Iterable[str], size: int) -> Vocabulary:
        """The `size` - 2 most frequent of `words` (pass the training split's alone)."""
        counts = Counter(words)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([PAD, UNK, *ranked[: size - 2]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of `words`."""
        return [self.ids.get(word, 1) for word in words]


def tokenize(text: str) -> list[str]:
    """Lower-case words, digits and apostrophes included, punctuation left out."""
    return re.findall(r"[a-z0-9']+", text.lower())


def three_parts(n: int) -> tuple[slice, slice, slice]:
    """Contiguous, disjoint train / validation / test slices that cover n items."""
    first, second = int(n * TRAIN_SHARE), int(n * (TRAIN_SHARE + VALIDATION_SHARE))
    assert 0 < first < second < n
    return slice(0, first), slice(first, second), slice(second, n)


def model_arguments(config: object, **from_data: int) -> dict[str, int | float]:
    """The models' constructor keywords: those that the data decide and those that the configuration names."""
    names = ("embed_dim", "hidden_dim", "n_layers", "dropout")
    return from_data | {name: getattr(config, name) for name in names if hasattr(config, name)}


# --- reviews --------------------------------------------------------------------------

POSITIVE = """good great moving brilliant charming funny clever gripping tender superb fresh honest elegant thrilling
    warm vivid""".split()
NEGATIVE = """bad dull wooden clumsy boring awful shallow lazy tedious bland noisy stale cheap silly weak
    cold""".split()
ASPECTS = """plot acting script music camera pacing ending dialogue cast score editing humour story drama lighting
    costume""".split()
AFFIRMATIONS = "was is felt seemed looked stayed".split()
NEGATIONS = "wasn't isn't never hardly".split()
CONJUNCTIONS = "while as when because and then but until where after".split()
VERBS = (
    "waits returns sings leaves dreams runs hides wins falls listens smiles drives fights dances writes travels".split()
)
TRIUMPHS, FAILURES = "triumph delight treat".split(), "failure disaster bore".split()
CHARACTERS = """hero heroine villain detective stranger doctor soldier widow orphan priest thief reporter queen butler
    cousin everyone nobody somebody he she""".split()
NAME_HEADS = """ald alder ash barn beck birch black bright brook buck burn carl chart clay cold crow dart deer dun east
    eld elm fair farn fern fox glen gold grey hal ham hart hawk hazel heath high holly hunt iron kel king kirk lang lark
    lind lock long mal marsh mead mill moor nether new north oak old oxen pem pine quill rad raven red ridge rock rose
    rush sand sel shaw silver south stan stone storm sun swan thorn tun ul wake wal west white wil wind winter wolf wood
    wyn yar york""".split()
NAME_MIDDLES = """a al an ar bel ber col den der el en er et ey for hal hel ing ken ker lan lea len ley lin man mar mel
    mer ner o ol on or ra ren ri ros ter ton""".split()
NAME_TAILS = """acre bank beck berg bourne bridge brook burn bury by church cliff combe cote crest croft dale dean den
    down ely fell field fold ford garth gate gill glade grange grave grove ham hay head hill holt house hurst keld land
    leigh lock low mere mond more mouth ness park pool port ridge road rick row scott shaw shire side son stead stoke
    stone stow thorpe thwaite toft ton tree vale view ville wall ward water way well wick wold worth yard""".split()


def draw_surnames(n: int, rng: np.random.Generator) -> list[str]:
    """Invented surnames, Zipf-distributed: the r-th most famous has a probability in proportion to 1 / r."""
    heads, middles, tails = len(NAME_HEADS), len(NAME_MIDDLES), len(NAME_TAILS)
    size = heads * middles * tails
    fame = (size ** rng.random(n)).astype(int) - 1  # a log-uniform rank is Zipf-distributed
    order = fame * 7919 % size  # a prime: neighbours in fame do not look alike
    return [
        (NAME_HEADS[i % heads] + NAME_MIDDLES[i // heads % middles] + NAME_TAILS[i // heads // middles]).title()
        for i in order.tolist()
    ]


@dataclass(frozen=True)
class Reviews:
    """Film reviews, 1 = positive, and, where they were generated, the evidence that the generator put into each."""

    texts: Sequence[str]
    labels: np.ndarray  # (N,)
    log_odds: np.ndarray | None = None  # (N,) of positive against negative, given all that bears on the label
    praised: np.ndarray | None = None  # (N,): the closing verdict is positive


def generate_reviews(config: ClassifierConfig, rng: np.random.Generator) -> Reviews:
    """Synthetic reviews in which the evidence is scattered over the whole text and has to be added up.

    A review is a sequence of three-word phrases and a closing verdict. An `opinion_rate` of the phrases are
    opinions ("plot was moving"); the rest tell of characters ("while nobody waits"), a `name_rate` of them by
    one of 300,000 Zipf-distributed surnames. Each opinion agrees with the label with a probability drawn per
    review from `clarity`, and a `negation_rate` of them is put as the negation of the opposite ("plot wasn't
    dull"). The closing verdict ("in all a triumph") agrees with the label `verdict_reliability` of the time.

    Why the models differ: the verdict stands at the end, and reading it takes no memory. The opinions are worth
    more, but have to be told from the asides and added up over as many as 190 words: gated cells can keep a
    sum while they pass over what does not matter (Hochreiter & Schmidhuber 1997); a vanilla RNN rewrites its
    whole state at every word. Negation is invisible to a bag of words.
    """
    n_reviews = config.n_reviews
    labels = rng.permutation(np.arange(n_reviews) % 2)
    n_phrases = rng.integers(*config.phrases, size=n_reviews, endpoint=True)
    owner = np.repeat(np.arange(n_reviews), n_phrases)  # (P,): the review that each phrase belongs to
    clarity = rng.uniform(*config.clarity, n_reviews)
    favourable = (rng.random(len(owner)) < clarity[owner]) == (labels[owner] == 1)
    is_opinion = rng.random(len(owner)) < config.opinion_rate
    opinions = draw_opinions(favourable, config.negation_rate, rng)
    phrases = np.where(is_opinion[:, None], opinions, draw_asides(len(owner), config.name_rate, rng))  # (P, 3)
    praised = (rng.random(n_reviews) < config.verdict_reliability) == (labels == 1)
    verdicts = np.where(praised, rng.choice(TRIUMPHS, n_reviews), rng.choice(FAILURES, n_reviews))
    bodies = np.split([" ".join(phrase) for phrase in phrases.tolist()], np.cumsum(n_phrases)[:-1])
    texts = [punctuate([*body, f"in all a {verdict}"], rng) for body, verdict in zip(bodies, verdicts)]
    n_opinions = np.bincount(owner[is_opinion], minlength=n_reviews)
    n_favourable = np.bincount(owner[is_opinion & favourable], minlength=n_reviews)
    return Reviews(texts, labels, review_log_odds(n_favourable, n_opinions, praised, config), praised)


def draw_opinions(favourable: np.ndarray, negation_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Opinions (n, 3) of the polarity given by `favourable` (n,), some put as the negation of the opposite."""
    n = len(favourable)
    negated = rng.random(n) < negation_rate
    adjectives = np.where(favourable != negated, rng.choice(POSITIVE, n), rng.choice(NEGATIVE, n))
    verbs = np.where(negated, rng.choice(NEGATIONS, n), rng.choice(AFFIRMATIONS, n))
    return np.stack([rng.choice(ASPECTS, n), verbs, adjectives], axis=1)


def draw_asides(n: int, name_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Phrases (n, 3) that say nothing about the film's worth."""
    who = np.where(rng.random(n) < name_rate, draw_surnames(n, rng), rng.choice(CHARACTERS, n))
    return np.stack([rng.choice(CONJUNCTIONS, n), who, rng.choice(VERBS, n)], axis=1)


def punctuate(phrases: Sequence[str], rng: np.random.Generator) -> str:
    """Phrases joined into sentences of one to four; the tokenizer takes the punctuation out again."""
    ends = rng.random(len(phrases)) < 0.4
    text, start = "", True
    for phrase, end in zip(phrases, [*ends[:-1], True]):
        text += (phrase[0].upper() + phrase[1:] if start else phrase) + (". " if end else ", ")
        start = end
    return text.strip()


def review_log_odds(
    n_favourable: np.ndarray, n_opinions: np.ndarray, praised: np.ndarray, config: ClassifierConfig
) -> np.ndarray:
    """Log odds (N,) of positive against negative for an observer who reads every opinion right (Bayes' rule).

    The number of favourable opinions and the verdict are all of a review that depends on its label, so no
    classifier can be right more often, on average, than the sign of this.
    """
    clarity = np.linspace(*config.clarity, 201)  # uniform prior, integrated on a grid
    k, n = n_favourable[:, None], n_opinions[:, None]
    positive = np.mean(clarity**k * (1 - clarity) ** (n - k), axis=1)
    negative = np.mean(clarity ** (n - k) * (1 - clarity) ** k, axis=1)
    verdict = math.log(config.verdict_reliability / (1 - config.verdict_reliability))
    return np.log(positive / negative) + np.where(praised, verdict, -verdict)


def build_reviews(config: ClassifierConfig, seed: int) -> TaskData:
    """Generated reviews, split, encoded with the training split's vocabulary, with their references."""
    reviews = generate_reviews(config, random_generator(seed, "reviews"))
    keep = np.sort(np.unique(reviews.texts, return_index=True)[1])  # duplicates would cross the splits
    texts, labels = [reviews.texts[i] for i in keep], reviews.labels[keep]
    log_odds, praised = reviews.log_odds[keep], reviews.praised[keep]
    words = [tokenize(text) for text in texts]
    parts = three_parts(len(texts))
    assert sum(len(set(texts[part])) for part in parts) == len(set(texts)), "a review is in two splits"
    vocabulary = Vocabulary.fit((word for review in words[parts[0]] for word in review), config.vocab_size)
    ids = [vocabulary.encode(review) for review in words]
    train, validation, test = (ReviewDataset(ids[part], labels[part]) for part in parts)
    return TaskData(
        train,
        validation,
        test,
        arguments=model_arguments(config, vocab_size=len(vocabulary), output_dim=1),
        decoding={"vocabulary": vocabulary.words},
        references=[
            majority_class(train, test),
            naive_bayes(train, test, len(vocabulary)),
            binary_outcome("Bayes decision", "ceiling", log_odds[parts[2]], labels[parts[2]]),
        ],
        facts={
            "reviews": len(texts),
            "share positive": float(labels.mean()),
            "mean length (words)": float(np.mean([len(review) for review in words])),
            "distinct words": len({word for review in words for word in review}),
            "vocabulary": len(vocabulary),
            "unknown words in the test split": float((test.inputs == 1).sum() / (test.inputs > 0).sum()),
        },
        notes={"verdict_contradicts": (praised != (labels == 1))[parts[2]].astype(int)},
    )


def binary_outcome(name: str, kind: str, log_odds: np.ndarray, labels: np.ndarray) -> Reference:
    """The reference that predicts `labels` (N,) with `log_odds` (N,): cross-entropy and hits."""
    loss = np.logaddexp(0, np.where(labels > 0.5, -log_odds, log_odds))
    return Reference(name, kind, loss, ((log_odds > 0) == (labels > 0.5)).astype(float))


def majority_class(train: ReviewDataset, test: ReviewDataset) -> Reference:
    """Always the class that is more frequent in training, with its frequency there."""
    share = train.targets.mean().item()
    log_odds = np.full(len(test), math.log(share / (1 - share)))
    return binary_outcome("majority class", "baseline", log_odds, test.targets[:, 0].numpy())


def naive_bayes(train: ReviewDataset, test: ReviewDataset, vocab_size: int) -> Reference:
    """Multinomial naive Bayes on single words with add-one smoothing (Manning, Raghavan & Schuetze 2008, ch. 13)."""
    ids, labels = train.inputs.numpy(), train.targets[:, 0].numpy()
    counts = np.stack([np.bincount(ids[labels == y].ravel(), minlength=vocab_size) for y in (0, 1)])[:, 1:] + 1.0
    weights = np.diff(np.log(counts / counts.sum(axis=1, keepdims=True)), axis=0)[0]
    prior = math.log(labels.mean() / (1 - labels.mean()))
    log_odds = prior + np.concatenate([[0.0], weights])[test.inputs.numpy()].sum(axis=1)  # padding weighs nothing
    return binary_outcome("naive Bayes", "baseline", log_odds, test.targets[:, 0].numpy())


# --- corpus ---------------------------------------------------------------------------

AREAS = {  # area: subjects, verbs, objects
    "sea": ("sailor captain diver fisher pilot", "steers anchors boards paints", "boat ship net harbour sail"),
    "kitchen": ("cook baker waiter guest grocer", "tastes stirs serves burns", "soup bread sauce cake roast"),
    "farm": ("farmer shepherd miller gardener groom", "feeds ploughs mows fences", "field barn cow orchard meadow"),
    "music": ("singer drummer pianist composer dancer", "rehearses hums records plays", "song waltz march ballad tune"),
    "court": ("judge lawyer clerk bailiff juror", "signs reads disputes settles", "case law letter claim verdict"),
    "school": (
        "teacher pupil tutor librarian scholar",
        "explains recites marks learns",
        "lesson poem map essay riddle",
    ),
}
PREPOSITIONS = "near behind beside with without".split()
ADVERBS = "often rarely always quietly gladly".split()
TAILS = "today again twice alone outside".split()
VERB_SHARES = (0.3, 0.4, 1.0)  # probability that the verb comes next, after 0, 1 and 2 phrases


@dataclass
class Transcript:
    """A text as it is spoken, and what its speaker knew at each word."""

    rng: np.random.Generator
    words: list[str] = field(default_factory=list)
    best: list[float] = field(default_factory=list)  # probability of the likeliest word, given the full state
    best_is_said: list[bool] = field(default_factory=list)  # whether that word is the one that came
    entropy: list[float] = field(default_factory=list)  # nats, given the full state
    distance: list[int] = field(default_factory=list)  # words back to the cue that determines it; 0: no cue

    def say(self, options: Mapping[str, float]) -> str:
        """Draw the next word from `options`, a probability per word, and note how predictable it was."""
        words = [word for word, probability in options.items() if probability]
        probabilities = np.array([options[word] for word in words])
        self.words.append(words[self.rng.choice(len(words), p=probabilities)])
        self.best.append(probabilities.max())
        self.best_is_said.append(self.words[-1] == words[probabilities.argmax()])
        self.entropy.append(-(probabilities * np.log(probabilities)).sum())
        self.distance.append(0)
        return self.words[-1]

    def mark(self, cue: int) -> None:
        """Note that word number `cue` determined the last word."""
        self.distance[-1] = len(self.words) - 1 - cue


def even(words: Sequence[str], share: float = 1.0) -> dict[str, float]:
    """`share` spread evenly over `words`."""
    return {word: share / len(words) for word in words}


def peaked(words: Sequence[str], favourite: int, rate: float, share: float = 1.0) -> dict[str, float]:
    """`share` spread over `words`: `rate` of it to the favourite, the rest evenly."""
    others = even([word for i, word in enumerate(words) if i != favourite], share * (1 - rate))
    return {words[favourite]: share * rate} | others


class Grammar:
    """Nouns and verbs of every area in singular and plural; what `generate_corpus` speaks."""

    def __init__(self) -> None:
        self.subjects, self.verbs, self.objects = {}, {}, {}
        for area, (subjects, verbs, objects) in AREAS.items():
            self.objects[area] = objects.split()
            for number, noun_end, verb_end in (("singular", "", "s"), ("plural", "s", "")):
                self.verbs[area, number] = [verb.removesuffix("s") + verb_end for verb in verbs.split()]
                self.subjects |= {noun + noun_end: (area, number, i) for i, noun in enumerate(subjects.split())}

    def speak_sentence(self, text: Transcript, favourite_rate: float) -> None:
        """Add one sentence to `text`."""
        text.say({"the": 1.0})
        area, number, rank = self.subjects[text.say(even(list(self.subjects)))]
        cue = len(text.words) - 1
        verbs = self.verbs[area, number]
        intruders = even([noun for noun, (other, _, _) in self.subjects.items() if other != area])
        word, phrases = "", 0
        while word not in verbs:  # up to two phrases or one adverb before it come between subject and verb
            verb_share = 1.0 if word in ADVERBS else VERB_SHARES[phrases]
            options = peaked(verbs, rank % len(verbs), favourite_rate, verb_share)
            options |= even(PREPOSITIONS, 0.85 * (1 - verb_share)) | even(ADVERBS, 0.15 * (1 - verb_share))
            word = text.say(options)
            if word in PREPOSITIONS:
                text.say({"the": 1.0})
                text.say(intruders)
                phrases += 1
        text.mark(cue)
        text.say({"the": 1.0})
        text.say(peaked(self.objects[area], rank, favourite_rate))
        text.mark(cue)
        if text.say({".": 0.6} | even(TAILS, 0.4)) != ".":
            text.say({".": 1.0})


def generate_corpus(config: PredictorConfig, rng: np.random.Generator) -> Transcript:
    """Sentences of a small grammar in which verb and object depend on a subject some words back.

    "the bakers behind the singer often burn the bread outside ." Subjects belong to six areas. The verb is
    one of its subject's area, agrees with it in number, and is the subject's favourite `favourite_rate` of
    the time; the object likewise. Between subject and verb stand up to two phrases, each with a noun of
    another area, so that verbs come up to seven and objects up to nine words after their cue.

    Why the models differ: whoever keeps the subject across the intruding nouns predicts verb and object;
    whoever goes by the last few words, as n-grams must, takes the intruder for the subject.
    """
    grammar, text = Grammar(), Transcript(rng)
    while len(text.words) < config.n_words:
        grammar.speak_sentence(text, config.favourite_rate)
    return text


def build_corpus(config: PredictorConfig, seed: int) -> TaskData:
    """A generated corpus, cut in three, encoded with the training part's vocabulary, with its references."""
    text = generate_corpus(config, random_generator(seed, "corpus"))
    parts = three_parts(len(text.words))  # cut before windowing: no window straddles a cut
    vocabulary = Vocabulary.fit(text.words[parts[0]], config.vocab_size)
    ids = vocabulary.encode(text.words)
    train, validation, test = (CorpusDataset(ids[part], config.window) for part in parts)
    assert sum(len(split) + config.window for split in (train, validation, test)) == len(ids)
    targets = slice(parts[2].start + config.window, None)  # the words that the test windows ask for
    seen = {tuple(row) for row in train.inputs.tolist()}
    ngrams = [NGram(ids[parts[0]], order, len(vocabulary)).reference(test) for order in (1, 2, 3)]
    ceiling = Reference(
        "grammar's full state", "ceiling", np.array(text.entropy[targets]), np.array(text.best[targets])
    )
    return TaskData(
        train,
        validation,
        test,
        arguments=model_arguments(config, vocab_size=len(vocabulary)),
        decoding={"vocabulary": vocabulary.words},
        references=[*ngrams, ceiling],
        facts={
            "words": len(ids),
            "vocabulary": len(vocabulary),
            "unknown words in the test split": float((test.targets == 1).float().mean()),
            "test windows that also occur in training": float(
                np.mean([tuple(row) in seen for row in test.inputs.tolist()])
            ),
        },
        notes={
            "cue_distance": np.array(text.distance[targets]),
            "trigram_score": ngrams[-1].score,
            "best_score": np.array(text.best_is_said[targets], dtype=float),
        },
    )


class NGram:
    """Interpolated n-gram model that backs off by Witten-Bell smoothing (Chen & Goodman 1999, eq. 15)."""

    def __init__(self, ids: Sequence[int], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.followers = defaultdict(Counter)  # context, up to order - 1 words -> the words seen after it
        for n in range(order):
            for i in range(n, len(ids)):
                self.followers[tuple(ids[i - n : i])][ids[i]] += 1
        self.totals = {context: (sum(words.values()), len(words)) for context, words in self.followers.items()}
        self.memory = {}

    def probability(self, context: tuple[int, ...], word: int) -> float:
        """P(word | context), mixing every order down to the uniform distribution."""
        lower = self.probability(context[1:], word) if context else 1 / self.vocab_size
        if context not in self.totals:
            return lower
        total, distinct = self.totals[context]
        return (self.followers[context][word] + distinct * lower) / (total + distinct)

    def likeliest(self, context: tuple[int, ...]) -> int:
        """The word of highest probability: one seen after the context, or the likeliest of a shorter one."""
        if context not in self.memory:
            candidates = set(self.followers.get(context, ()))
            candidates |= {self.likeliest(context[1:])} if context else set()
            self.memory[context] = max(sorted(candidates), key=lambda word: self.probability(context, word))
        return self.memory[context]

    def reference(self, test: CorpusDataset) -> Reference:
        """How the model does on the windows of `test`."""
        last = test.inputs[:, test.inputs.shape[1] - self.order + 1 :].tolist()
        cases = [(tuple(context), word) for context, word in zip(last, test.targets.tolist())]
        loss = np.array([-math.log(self.probability(context, word)) for context, word in cases])
        score = np.array([float(self.likeliest(context) == word) for context, word in cases])
        return Reference({1: "unigram", 2: "bigram", 3: "trigram"}[self.order], "baseline", loss, score)


# --- series ---------------------------------------------------------------------------


def generate_series(config: ForecasterConfig, rng: np.random.Generator) -> np.ndarray:
    """A sum of sines with random phases, plus white noise: (N,).

    The noise cannot be predicted, so its variance is the floor of the mean squared error. A sum of K sines
    obeys a linear recurrence of order 2 K (Prony 1795): a linear model on the same window is a strong baseline.
    A window holds whole cycles of every sine, so there is little here that a short memory would miss: this is
    the task on which the cells should come close to each other.
    """
    steps = np.arange(config.n_steps)
    phases = rng.uniform(0, 2 * np.pi, len(config.periods))
    waves = zip(config.amplitudes, config.periods, phases)
    signal = sum(amplitude * np.sin(2 * np.pi * steps / period + phase) for amplitude, period, phase in waves)
    return signal + rng.normal(0, config.noise, config.n_steps)


def build_series(config: ForecasterConfig, seed: int) -> TaskData:
    """A generated series, cut in three, standardised with the training part's mean and deviation."""
    values = generate_series(config, random_generator(seed, "series"))
    parts = three_parts(len(values))  # cut before windowing: no window straddles a cut
    mean, std = values[parts[0]].mean(), values[parts[0]].std()
    scaled = (values - mean) / std
    train, validation, test = (SeriesDataset(scaled[part], config.window) for part in parts)
    assert sum(len(split) + config.window for split in (train, validation, test)) == len(values)
    season, floor = season_of(train), np.full(len(test), config.noise / std)
    return TaskData(
        train,
        validation,
        test,
        arguments=model_arguments(config, input_dim=1, output_dim=1),
        decoding={"scaler": {"mean": float(mean), "std": float(std)}},
        references=[
            forecast_reference("persistence", test.inputs[:, -1, 0].numpy(), test),
            forecast_reference("seasonal naive", test.inputs[:, -season, 0].numpy(), test),
            linear_autoregression(train, test),
            Reference("noise", "ceiling", floor**2, floor * math.sqrt(2 / math.pi)),  # E|e| of a normal variable
        ],
        facts={"steps": len(values), "noise variance": config.noise**2, "season (steps)": season},
        notes={"truth": test.targets[:, 0].numpy()},
        unit=float(std),
    )


def forecast_reference(name: str, forecast: np.ndarray, test: SeriesDataset) -> Reference:
    """The baseline that makes `forecast` (N,) of the targets of `test`: squared and absolute errors."""
    errors = forecast - test.targets[:, 0].numpy()
    return Reference(name, "baseline", errors**2, np.abs(errors))


def season_of(train: SeriesDataset) -> int:
    """The lag within the window, from two steps on, of the best autocorrelation in the training part."""
    rows, targets = train.inputs[:, :, 0].numpy(), train.targets[:, 0].numpy()
    lags = range(2, rows.shape[1] + 1)
    return max(lags, key=lambda lag: np.corrcoef(rows[:, -lag], targets)[0, 1])


def linear_autoregression(train: SeriesDataset, test: SeriesDataset) -> Reference:
    """Least squares on the same window, with an intercept."""
    design = [np.column_stack([split.inputs[:, :, 0].numpy(), np.ones(len(split))]) for split in (train, test)]
    weights = np.linalg.lstsq(design[0], train.targets[:, 0].numpy(), rcond=None)[0]
    return forecast_reference("linear autoregression", design[1] @ weights, test)


# ======================================================================================
# 4. Models
# ======================================================================================


class Recurrent(nn.Module):
    """A stock recurrent layer that returns the state of its top layer after the last real step.

    Recurrent weights start orthogonal, one block per gate (Saxe et al. 2014), input weights Glorot-uniform,
    biases at 0 and an LSTM's forget bias at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, layer: type[nn.RNNBase], input_dim: int, hidden_dim: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        between_layers = dropout if n_layers > 1 else 0.0
        self.rnn = layer(input_dim, hidden_dim, n_layers, batch_first=True, dropout=between_layers)
        for name, weight in self.rnn.named_parameters():
            gates = weight.detach().split(hidden_dim)  # one per gate
            if name.startswith("bias"):
                nn.init.zeros_(weight)
                if layer is nn.LSTM and name.startswith("bias_ih"):
                    gates[1].fill_(1.0)  # the forget gate's; PyTorch's order is input, forget, cell, output
            else:
                initialise = nn.init.orthogonal_ if name.startswith("weight_hh") else nn.init.xavier_uniform_
                for gate in gates:
                    initialise(gate)

    def forward(self, inputs: Tensor, last: Tensor | None = None) -> Tensor:
        """`last` (B,): index of each sequence's last real step; without it, the last step of all."""
        states, _ = self.rnn(inputs)  # (B, T, F) -> (B, T, H)
        if last is None:
            return states[:, -1]  # (B, H)
        return states[torch.arange(len(states), device=states.device), last]  # (B, H)


class Classifier(nn.Module):
    """Embedding -> recurrent layer -> dropout -> dense -> sigmoid; a subclass names the recurrent layer.

    Input: word ids (B, T) long, padded on the right with 0. Output: probabilities (B, output_dim). The state
    that is read is the one after the last real word, so padding changes nothing.
    """

    layer: type[nn.RNNBase]

    def __init__(
        self, vocab_size: int, embed_dim: int, hidden_dim: int, output_dim: int, n_layers: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        with torch.no_grad():  # small, so that rare words, which training hardly moves, say little
            self.embedding.weight.normal_(std=0.1)[0] = 0.0
        self.recurrent = Recurrent(self.layer, embed_dim, hidden_dim, n_layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(hidden_dim, output_dim), nn.Sigmoid())

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != 0) * positions).amax(dim=1)  # (B, T) -> (B,)
        state = self.recurrent(self.embedding(ids), last)  # (B, T) -> (B, T, E) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, output_dim)


class Predictor(nn.Module):
    """Embedding -> recurrent layer -> dropout -> dense; a subclass names the recurrent layer.

    Input: word ids (B, T) long. Output: logits (B, vocab_size); the softmax is in the loss.
    """

    layer: type[nn.RNNBase]

    def __init__(
        self, vocab_size: int, embed_dim: int, hidden_dim: int, n_layers: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.recurrent = Recurrent(self.layer, embed_dim, hidden_dim, n_layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        state = self.recurrent(self.embedding(ids))  # (B, T) -> (B, T, E) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, V)


class Forecaster(nn.Module):
    """Recurrent layers -> dense -> ReLU -> dense; a subclass names the recurrent layer.

    Input: values (B, T, input_dim) float. Output: the next values (B, output_dim).
    """

    layer: type[nn.RNNBase]

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, n_layers: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.recurrent = Recurrent(self.layer, input_dim, hidden_dim, n_layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim))

    def forward(self, values: Tensor) -> Tensor:
        state = self.recurrent(values)  # (B, T, F) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, output_dim)


class RNNClassifier(Classifier):
    """Text classifier on a vanilla RNN with tanh units (Elman 1990)."""

    layer = nn.RNN


class LSTMClassifier(Classifier):
    """Text classifier on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    layer = nn.LSTM


class GRUClassifier(Classifier):
    """Text classifier on gated recurrent units (Cho et al. 2014)."""

    layer = nn.GRU


class RNNPredictor(Predictor):
    """Next-word predictor on a vanilla RNN with tanh units (Elman 1990)."""

    layer = nn.RNN


class LSTMPredictor(Predictor):
    """Next-word predictor on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    layer = nn.LSTM


class GRUPredictor(Predictor):
    """Next-word predictor on gated recurrent units (Cho et al. 2014)."""

    layer = nn.GRU


class RNNForecaster(Forecaster):
    """Forecaster on a vanilla RNN with tanh units (Elman 1990)."""

    layer = nn.RNN


class LSTMForecaster(Forecaster):
    """Forecaster on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    layer = nn.LSTM


class GRUForecaster(Forecaster):
    """Forecaster on gated recurrent units (Cho et al. 2014)."""

    layer = nn.GRU


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each part of the model that has any: embedding, recurrent, head."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {name: count for name, count in counts.items() if count}


def describe(model: nn.Module, inputs: Tensor) -> list[dict]:
    """The layers in the order in which `inputs` (B, ...) pass them, read off the live model.

    Each has its `name`, `kind` (class), `settings`, `shape` of the output without the batch dimension, and
    number of `parameters`.
    """
    layers = []

    def note(name: str, module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        layers.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "settings": module.extra_repr(),
                "shape": list(states.shape[1:]),
                "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
            }
        )

    watched = {n: m for n, m in model.named_modules() if isinstance(m, Recurrent) or not list(m.children())}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in watched.items()]
    with evaluating(model):
        model(inputs)
    for hook in hooks:
        hook.remove()
    return layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the model's mode as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


# ======================================================================================
# 5. Tasks
# ======================================================================================


@dataclass(frozen=True)
class Metric:
    """A number to report: the mean of a per-example quantity, put into the user's units."""

    name: str
    label: str  # for axes
    source: str  # "loss" or "score"
    form: str = ".3f"  # how its values are printed
    unit_power: int = 0  # the mean is multiplied by (one unit of the targets) ** unit_power
    transform: Callable[[float], float] = float  # of the mean
    higher_is_better: bool = False

    def better(self, a: float, b: float) -> bool:
        """Whether a value of `a` is better than one of `b`."""
        return a > b if self.higher_is_better else a < b

    def amounts(self, *values: float) -> list[str]:
        """Differences as a person reads them: shares in points of a hundred, the rest as they are."""
        return [f"{100 * value:.1f}" if self.form.endswith("%") else format(value, self.form) for value in values]


@dataclass(frozen=True)
class Task:
    """All that differs between the three tasks."""

    name: str
    title: str
    question: str  # what is asked, in a sentence
    models: Mapping[str, type[nn.Module]]
    build_data: Callable[[object, int], TaskData]  # (the task's configuration, seed)
    loss: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); its mean is minimised
    score: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); reported beside the loss
    answer: Callable[[Tensor], Tensor]  # output -> (B,): what the model says, for the record
    metrics: Sequence[Metric]  # the first is the one that the models are judged by
    hard_cases: tuple[str, str, int] | None = None  # (what they are, the note that tells, from which value on)
    remarks: Mapping[str, str] = field(default_factory=dict)  # why a baseline can win, to follow its name

    def measure(self, loss: float, score: float, unit: float = 1.0) -> dict[str, float]:
        """The task's metrics from the means of its loss and its score."""
        means = {"loss": loss, "score": score}
        return {m.name: m.transform(means[m.source]) * unit**m.unit_power for m in self.metrics}


def per_example(loss: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
    """Any of torch's losses, one value per example: (B,) or (B, K) -> (B,)."""
    return loss(output, target, reduction="none").reshape(len(target), -1).mean(dim=1)


def binary_hits(output: Tensor, target: Tensor) -> Tensor:
    """1 where probability and label (B, 1) are on the same side of one half: (B,)."""
    return ((output > 0.5) == (target > 0.5)).float().mean(dim=1)


def likeliest_hits(output: Tensor, target: Tensor) -> Tensor:
    """1 where the likeliest class of logits (B, V) is the target (B,): (B,)."""
    return (output.argmax(dim=1) == target).float()


def perplexity(loss: float) -> float:
    """The exponential of a cross-entropy in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


ACCURACY = Metric("accuracy", "accuracy", "score", ".1%", higher_is_better=True)

CLASSIFIER = Task(
    name="classifier",
    title="Text classification",
    question=(
        "Is a film review positive? Opinions are scattered over its whole length, some of them negated, and the "
        "verdict at its end often misleads."
    ),
    models={"RNN": RNNClassifier, "LSTM": LSTMClassifier, "GRU": GRUClassifier},
    build_data=build_reviews,
    loss=partial(per_example, F.binary_cross_entropy),
    score=binary_hits,
    answer=lambda output: output[:, 0],  # probability of positive
    metrics=(ACCURACY, Metric("loss", "binary cross-entropy (nats)", "loss")),
    hard_cases=("reviews whose closing verdict contradicts their label", "verdict_contradicts", 1),
)
PREDICTOR = Task(
    name="predictor",
    title="Next-word prediction",
    question="Which word comes next? Verbs and objects depend on a subject up to nine words back, past other nouns.",
    models={"RNN": RNNPredictor, "LSTM": LSTMPredictor, "GRU": GRUPredictor},
    build_data=build_corpus,
    loss=partial(per_example, F.cross_entropy),
    score=likeliest_hits,
    answer=lambda output: output.argmax(dim=1),  # id of the likeliest word
    metrics=(
        ACCURACY,
        Metric("loss", "cross-entropy (nats)", "loss"),
        Metric("perplexity", "perplexity", "loss", ".2f", transform=perplexity),
    ),
    hard_cases=("words whose cue lies 5 or more words back", "cue_distance", 5),
)
FORECASTER = Task(
    name="forecaster",
    title="Time-series forecasting",
    question="What is the next value of a sum of sines with noise? The noise cannot be predicted.",
    models={"RNN": RNNForecaster, "LSTM": LSTMForecaster, "GRU": GRUForecaster},
    build_data=build_series,
    loss=partial(per_example, F.mse_loss),
    score=partial(per_example, F.l1_loss),
    answer=lambda output: output[:, 0],  # next value, standardised
    metrics=(
        Metric("mse", "MSE (series units²)", "loss", ".4f", unit_power=2),
        Metric("mae", "MAE (series units)", "score", ".4f", unit_power=1),
    ),
    remarks={
        "linear autoregression": ": a sum of K sines obeys a linear recurrence of order 2 K (Prony 1795), so here a "
        "linear model is of the right form and least squares finds its best weights"
    },
)
TASKS = {task.name: task for task in (CLASSIFIER, PREDICTOR, FORECASTER)}
MODEL_NAMES = ("RNN", "LSTM", "GRU")

# ======================================================================================
# 6. Training
# ======================================================================================


def prepare_device(device: torch.device) -> None:
    """Settings of this process under which a run gives the same numbers every time.

    One thread: the layers are too small to share out, and several runs at a time use the cores better.
    """
    torch.set_num_threads(1)
    if device.type == "cuda":  # without these two, cuBLAS and atomic additions make every run differ
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class EarlyStopping:
    """Tells the best epoch so far and when `patience` epochs have passed without a new one."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.bad_epochs = patience, math.inf, 0

    def update(self, loss: float) -> bool:
        """Take in an epoch's validation loss; True if it is the lowest so far."""
        improved = loss < self.best
        self.best, self.bad_epochs = (loss, 0) if improved else (self.best, self.bad_epochs + 1)
        return improved

    @property
    def stop(self) -> bool:
        """Whether training should end."""
        return self.bad_epochs >= self.patience


def as_fetched(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The DataLoader's collate function: `BatchDataset` fetches batches that are whole already."""
    return batch


def new_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015) with the settings of `training`."""
    return torch.optim.Adam(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )


def train_step(
    model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], training: Training
) -> tuple[Tensor, Tensor]:
    """One update; returns the sums of the batch's losses and scores (2,) and the gradient's norm before clipping.

    The batch is worked through in `accumulate_steps` micro-batches. Each adds its share of the batch's mean
    loss to the gradient, so the update is that of the whole batch.
    """
    inputs, targets = batch
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, device=inputs.device)
    for x, y in zip(inputs.chunk(training.accumulate_steps), targets.chunk(training.accumulate_steps)):
        output = model(x)
        losses = task.loss(output, y)
        (losses.sum() / len(inputs)).backward()
        with torch.no_grad():
            sums += torch.stack([losses.sum(), task.score(output, y).sum()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
    optimizer.step()
    return sums, norm


def train_epoch(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    training: Training,
    device: torch.device,
    after_batch: Callable[[], object],
) -> tuple[float, float, float]:
    """One pass over the training data; returns mean loss, mean score and mean gradient norm before clipping.

    Sums stay on the device until the epoch ends: one transfer an epoch, not three a step.
    """
    model.train()
    sums, norms = torch.zeros(2, device=device), torch.zeros((), device=device)
    for inputs, targets in loader:
        step_sums, norm = train_step(model, task, optimizer, (inputs.to(device), targets.to(device)), training)
        sums += step_sums
        norms += norm
        after_batch()
    loss, score = (sums / len(loader.dataset)).tolist()
    return loss, score, norms.item() / len(loader)


def evaluate(
    model: nn.Module, task: Task, dataset: BatchDataset, device: torch.device, batch_size: int = 512
) -> dict[str, np.ndarray]:
    """Loss, score and answer of the model on each example of `dataset`, in its order: three arrays (N,)."""
    parts = []
    with evaluating(model):
        for inputs, targets in DataLoader(dataset, batch_size, collate_fn=as_fetched):
            output, target = model(inputs.to(device)), targets.to(device)
            parts.append((task.loss(output, target), task.score(output, target), task.answer(output)))
    return {name: torch.cat(part).cpu().numpy() for name, part in zip(("loss", "score", "answer"), zip(*parts))}


def train_and_validate(
    model: nn.Module,
    task: Task,
    data: TaskData,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    training: Training,
    device: torch.device,
    after_batch: Callable[[], object],
) -> dict:
    """One epoch and what there is to say of it: the row of the history that `fit` describes, less its number."""
    start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
    loss, score, norm = train_epoch(model, task, optimizer, loader, training, device, after_batch)
    validation = evaluate(model, task, data.validation, device)
    val_loss, val_score = float(validation["loss"].mean()), float(validation["score"].mean())
    return {
        "learning_rate": rate,
        "gradient_norm": norm,
        "seconds": time.perf_counter() - start,
        "train": {"loss": loss} | task.measure(loss, score, data.unit),
        "validation": {"loss": val_loss} | task.measure(val_loss, val_score, data.unit),
    }


def fit(
    model: nn.Module,
    task: Task,
    data: TaskData,
    training: Training,
    seed: int,
    device: torch.device,
    after_epoch: Callable[[dict], object] = lambda row: None,
    after_batch: Callable[[], object] = lambda: None,
) -> list[dict]:
    """Train until the validation loss stops falling; leaves the best epoch's weights in `model`.

    Returns the history, a row per epoch: `epoch`, `learning_rate`, `gradient_norm` (mean, before clipping),
    `seconds`, and under `train` and `validation` the loss and the task's metrics. Training metrics are running
    means over the epoch, with dropout on. Raises TrainingDiverged when a loss is not finite.
    """
    torch.manual_seed(torch_seed(seed, "dropout"))
    optimizer = new_optimizer(model, training)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=training.lr_factor, patience=training.lr_patience
    )
    batches = LengthBuckets(data.train.lengths, training.batch_size, random_generator(seed, "batches"))
    loader = DataLoader(data.train, batch_sampler=batches, collate_fn=as_fetched)
    stopper, history, best_weights = EarlyStopping(training.patience), [], {}
    for epoch in range(1, training.epochs + 1):
        row = train_and_validate(model, task, data, optimizer, loader, training, device, after_batch)
        val_loss = row["validation"]["loss"]
        if not math.isfinite(row["train"]["loss"] + val_loss):
            raise TrainingDiverged(
                f"{type(model).__name__} ({task.name}), seed {seed}: the loss is not finite in epoch {epoch}; try a "
                f"learning rate below {row['learning_rate']:g} or a clip norm below {training.clip_norm:g}"
            )
        history.append({"epoch": epoch} | row)
        after_epoch(history[-1])
        if stopper.update(val_loss):
            best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if stopper.stop:
            break
        plateau.step(val_loss)
    model.load_state_dict(best_weights)
    return history


# ======================================================================================
# 7. Runs
# ======================================================================================

RECORD_FORMAT = 1  # of records and checkpoints
MATCHED = "-matched"  # marks a model whose recurrent parameters match the LSTM's


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` if the block succeeds and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """What the user sees of a run: a bar in a terminal, one plain line per epoch elsewhere."""

    position = 0  # the terminal line of this process's bar; worker processes have one each

    def __init__(self, label: str, task: Task, epochs: int, batches: int) -> None:
        self.label, self.task, self.epochs = label, task, epochs
        self.bar = tqdm(
            total=epochs * batches, desc=label, unit="batch", position=self.position, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.close()

    def after_batch(self) -> None:
        """Move the bar."""
        self.bar.update()

    def after_epoch(self, row: Mapping) -> None:
        """Show the epoch's losses and the task's first metric, on the training and the validation split."""
        names = dict.fromkeys(["loss", self.task.metrics[0].name])
        values = ", ".join(f"{name} {row['train'][name]:.4f}/{row['validation'][name]:.4f}" for name in names)
        if not self.bar.disable:
            self.bar.set_postfix_str(f"train/val {values}")
            return
        epoch = f"{self.label}  epoch {row['epoch']:2d}/{self.epochs}"
        end = f"rate {row['learning_rate']:.2g}  {row['seconds']:.1f} s"
        print(f"{epoch}  train/val {values}  {end}", file=sys.stderr, flush=True)


def run_name(task: str, model: str, seed: int) -> str:
    """The stem of a run's files."""
    return f"{task}_{model}_seed{seed}"


def base_name(model: str) -> str:
    """RNN, LSTM or GRU, whatever its size."""
    return model.removesuffix(MATCHED)


def recurrent_size(layer: type[nn.RNNBase], arguments: Mapping, hidden_dim: int) -> int:
    """Parameters of a recurrent layer of that many hidden units, in a model with these constructor arguments."""
    inputs = arguments.get("embed_dim") or arguments["input_dim"]
    return sum(p.numel() for p in layer(inputs, hidden_dim, arguments["n_layers"], device="meta").parameters())


def build_model(task: Task, name: str, arguments: Mapping, seed: int) -> tuple[nn.Module, dict]:
    """A fresh model, its weights drawn from the seed, and the constructor arguments that made it.

    "RNN-matched" and "GRU-matched" have the hidden size that brings their recurrent parameters closest to the
    LSTM's.
    """
    model_class = task.models[base_name(name)]
    if name != base_name(name):
        target = recurrent_size(nn.LSTM, arguments, arguments["hidden_dim"])
        sizes = range(1, 3 * arguments["hidden_dim"])  # an RNN needs about twice the LSTM's hidden units
        hidden_dim = min(sizes, key=lambda h: abs(recurrent_size(model_class.layer, arguments, h) - target))
        arguments = {**arguments, "hidden_dim": hidden_dim}
    torch.manual_seed(torch_seed(seed, "weights"))
    return model_class(**arguments), dict(arguments)


def train_run(
    task: Task, model_name: str, seed: int, config: object, data: TaskData, device: torch.device, output_dir: Path
) -> None:
    """Train and test one model on one seed's data; leaves its record and its checkpoint in `output_dir`.

    The test split is opened when the best validation weights are back: nothing is chosen by it. Raises
    TrainingDiverged.
    """
    model, arguments = build_model(task, model_name, data.arguments, seed)
    model.to(device)
    batches = math.ceil(len(data.train) / config.training.batch_size)
    with Progress(f"{task.name} {model_name} seed {seed}", task, config.training.epochs, batches) as progress:
        history = fit(model, task, data, config.training, seed, device, progress.after_epoch, progress.after_batch)
    examples = evaluate(model, task, data.test, device)
    loss, score = float(examples["loss"].mean()), float(examples["score"].mean())
    sample = data.train.inputs[:2].to(device)
    record = {
        "format": RECORD_FORMAT,
        "task": task.name,
        "model": model_name,
        "seed": seed,
        "configuration": asdict(config),
        "environment": environment(device),
        "parameters": count_parameters(model),
        "layers": describe(model, sample),
        "input_shape": list(sample.shape[1:]),
        "history": history,
        "test": {"loss": loss} | task.measure(loss, score, data.unit),
        "references": [
            {"name": r.name, "kind": r.kind} | task.measure(float(r.loss.mean()), float(r.score.mean()), data.unit)
            for r in data.references
        ],
        "facts": dict(data.facts),
        "decoding": {name: value for name, value in data.decoding.items() if name == "scaler"},
        "unit": data.unit,
        "examples": {name: np.round(values, 6).tolist() for name, values in {**examples, **data.notes}.items()},
    }
    name = run_name(task.name, model_name, seed)
    save_checkpoint(output_dir / "models" / f"{name}.pt", model, arguments, record, data)
    write_record(output_dir, record)


def write_record(output_dir: Path, record: Mapping) -> None:
    """Put a run's record on disk."""
    name = run_name(record["task"], record["model"], record["seed"])
    with whole_file(output_dir / "runs" / f"{name}.json") as path:
        path.write_text(json.dumps(record), encoding="utf-8")


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers of a run may depend on beside its configuration and its seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def save_checkpoint(path: Path, model: nn.Module, arguments: Mapping, record: Mapping, data: TaskData) -> None:
    """Write all that is needed to use the model again, in types that torch loads with weights_only=True."""
    checkpoint = {
        "format": RECORD_FORMAT,
        "task": record["task"],
        "model": record["model"],
        "arguments": dict(arguments),
        "weights": {name: weight.cpu() for name, weight in model.state_dict().items()},
        "decoding": dict(data.decoding),
        "metrics": record["test"],
    }
    with whole_file(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict]:
    """The model saved at `path`, on the CPU and in evaluation mode, and the checkpoint it came in."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model_class = TASKS[checkpoint["task"]].models[base_name(checkpoint["model"])]
    model = model_class(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval(), checkpoint


@lru_cache(maxsize=1)
def cached_data(task_name: str, config: object, seed: int) -> TaskData:
    """A seed's data, kept for the next model of the same seed."""
    return TASKS[task_name].build_data(config, seed)


def train_job(job: tuple[str, str, int], config: Config, device: torch.device, output_dir: Path) -> None:
    """One run, (task, model, seed), in whichever process this is; gives back what it held."""
    task_name, model_name, seed = job
    task_config = getattr(config, task_name)
    data = cached_data(task_name, task_config, seed)
    train_run(TASKS[task_name], model_name, seed, task_config, data, device, output_dir)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def start_worker(lock: object, count: object, device: torch.device) -> None:
    """Set up a worker process: one thread, a line of its own for its bar, Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_device(device)
    tqdm.set_lock(lock)
    with count.get_lock():
        Progress.position = count.value
        count.value += 1


def run_all(
    tasks: Sequence[str],
    models: Sequence[str],
    seeds: Sequence[int],
    config: Config,
    device: torch.device,
    output_dir: Path,
    workers: int = 1,
) -> None:
    """Every run of tasks x seeds x models, task by task, `workers` at a time; each is on disk when it ends.

    A run does not depend on the number of workers. If one fails the others are ended, and its error raised.
    """
    train_one = partial(train_job, config=config, device=device, output_dir=output_dir)
    longest_first = sorted(models, key=lambda model: base_name(model) == "RNN")  # so that no core idles at the end
    jobs = [(task, model, seed) for task in tasks for seed in seeds for model in longest_first]
    if workers == 1:
        for job in jobs:
            train_one(job)
        return
    spawn = multiprocessing.get_context("spawn")
    setup = (spawn.RLock(), spawn.Value("i", 0), device)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), spawn, start_worker, setup)
    try:
        for done in as_completed([pool.submit(train_one, job) for job in jobs]):
            done.result()
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def read_records(output_dir: Path, config: Config) -> list[dict]:
    """The records in `output_dir` of runs with this configuration, by task, model and seed."""
    records = []
    for path in (output_dir / "runs").glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            wanted = json.loads(json.dumps(asdict(getattr(config, record["task"]))))  # tuples are lists in a record
            if record["format"] == RECORD_FORMAT and record["configuration"] == wanted:
                records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"{path} is not the record of a run; it is left out", file=sys.stderr)
    order = {name: i for i, name in enumerate([*TASKS, *MODEL_NAMES])}
    return sorted(
        records, key=lambda r: (order[r["task"]], r["model"].endswith(MATCHED), order[base_name(r["model"])], r["seed"])
    )


# ======================================================================================
# 8. Evidence
# ======================================================================================

CSV_METRICS = ("accuracy", "loss", "mse", "mae")


def of_task(records: Sequence[Mapping], task: Task, model: str | None = None) -> list[Mapping]:
    """The records of one task, and of one of its models if that is named."""
    return [r for r in records if r["task"] == task.name and model in (None, r["model"])]


def tasks_in(records: Sequence[Mapping]) -> list[Task]:
    """The tasks that have records, in their order."""
    return [task for task in TASKS.values() if of_task(records, task)]


def models_in(records: Sequence[Mapping]) -> list[str]:
    """The models that have records, in their order."""
    return list(dict.fromkeys(r["model"] for r in records))


def one_per_model(records: Sequence[Mapping]) -> list[Mapping]:
    """A record of each model of each task, for what does not depend on the seed."""
    return list({(r["task"], r["model"]): r for r in records}.values())


# --- statistics over seeds ------------------------------------------------------------


def compare_models(records: Sequence[Mapping]) -> pd.DataFrame:
    """Each two models of a task, on the seeds that both have: difference, 95 % interval, verdict in words."""
    rows = []
    for task in tasks_in(records):
        for a, b in combinations(models_in(of_task(records, task)), 2):
            first, second = ({r["seed"]: r for r in of_task(records, task, name)} for name in (a, b))
            pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
            for metric in task.metrics:
                if pairs and metric.name in CSV_METRICS:
                    rows.append(compare_pair(pairs, task, metric))
    columns = ["task", "metric", "a", "b", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def compare_pair(pairs: Sequence[tuple[Mapping, Mapping]], task: Task, metric: Metric) -> tuple:
    """One row of `compare_models` from the two models' records, paired by seed."""
    a, b = pairs[0][0]["model"], pairs[0][1]["model"]
    values = [
        (np.array(one["examples"][metric.source]) - np.array(other["examples"][metric.source]))
        * one["unit"] ** metric.unit_power
        for one, other in pairs
    ]
    means = bootstrap_means(values, random_generator(0, f"bootstrap {task.name} {a} {b} {metric.name}"))
    low, high = np.quantile(means, [0.025, 0.975])
    difference = float(np.mean([v.mean() for v in values]))
    if low <= 0 <= high:
        verdict = "{} and {}: no clear difference [{}, {}]".format(a, b, *metric.amounts(low, high))
    else:
        first, second = (a, b) if metric.better(difference, 0) else (b, a)
        amount, *interval = metric.amounts(abs(difference), *sorted([abs(low), abs(high)]))
        verdict = f"{first} {'above' if metric.higher_is_better else 'below'} {second} by {amount}"
        verdict += f"{' points' * (metric is ACCURACY)} [{interval[0]}, {interval[1]}]"
    return task.name, metric.name, a, b, difference, low, high, verdict


def bootstrap_means(values: Sequence[np.ndarray], rng: np.random.Generator, resamples: int = 1000) -> np.ndarray:
    """Means under a hierarchical bootstrap: seeds are drawn first, then test examples within each (Davison &
    Hinkley 1997, section 3.8). `values` has an array (N,) per seed; returns (resamples,)."""
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = [values[k] for k in rng.integers(len(values), size=len(values))]
        means[i] = np.mean([v[rng.integers(len(v), size=len(v))].mean() for v in drawn])
    return means


# --- cost measurements ----------------------------------------------------------------


def measure_costs(
    task: Task, models: Sequence[str], config: object, device: torch.device, steps: int = 7
) -> dict[str, dict]:
    """What a training step of each model costs; the models take turns on the same batches.

    The time is the median over the steps after a warm-up of two; the activations are those of a full batch.
    """
    data = task.build_data(config, 0)
    batches = LengthBuckets(data.train.lengths, config.training.batch_size, random_generator(0, "costs"))
    batches = [tuple(t.to(device) for t in data.train.__getitems__(rows)) for rows in cycled(batches, steps + 2)]
    contenders = {}
    for name in models:
        model = build_model(task, name, data.arguments, 0)[0].to(device)
        contenders[name] = model, new_optimizer(model, config.training)
    seconds = defaultdict(list)
    for batch in batches:
        for name, (model, optimizer) in contenders.items():
            start = time.perf_counter()
            train_step(model, task, optimizer, batch, config.training)[0].tolist()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    costs = {}
    for name, (model, _) in contenders.items():
        median = float(np.median(seconds[name][2:]))
        costs[name] = {
            "ms_per_step": round(1000 * median, 2),
            "samples_per_second": round(len(batches[0][0]) / median),
            "activation_bytes": activation_bytes(model, task, batches[0]),
            "kernel": kernel_name(model, batches[0][0]),
        }
    return costs


def add_costs(records: Sequence[dict], config: Config, device: torch.device, output_dir: Path) -> None:
    """Measure the costs of all models of a task together, where a record does not hold them yet."""
    for task in tasks_in(records):
        own = of_task(records, task)
        if any("cost" not in record for record in own):
            costs = measure_costs(task, models_in(own), getattr(config, task.name), device)
            for record in own:
                record["cost"] = costs[record["model"]]
                write_record(output_dir, record)


def cycled(batches: LengthBuckets, count: int) -> list[np.ndarray]:
    """`count` full batches, over as many epochs as that takes."""
    full = [rows for rows in batches if len(rows) == batches.batch_size] or list(batches)
    return [full[i % len(full)] for i in range(count)]


def activation_bytes(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes that the forward pass on `batch` keeps for the backward pass, the weights themselves left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task.loss(model(batch[0]), batch[1]).mean()
    del loss
    return sum(size for storage, size in kept.items() if storage not in weights)


def kernel_name(model: nn.Module, inputs: Tensor) -> str:
    """Which implementation of the recurrent layer runs: cuDNN, oneDNN, or PyTorch's generic one."""
    nodes, frontier = set(), [model(inputs[:2]).grad_fn]
    while frontier:  # the backward graph, whose nodes are named after the operators that ran
        node = frontier.pop()
        nodes.add(node)
        frontier += [parent for parent, _ in node.next_functions if parent and parent not in nodes]
    names = " ".join(node.name() for node in nodes)
    known = {"CudnnRnn": "cuDNN", "MkldnnRnn": "oneDNN"}
    return next((kernel for operator, kernel in known.items() if operator in names), "generic")


# --- gradient flow and free-running forecasts ------------------------------------------


def gradient_by_step(model: nn.Module, task: Task, data: TaskData, device: torch.device, n: int = 64) -> list[float]:
    """Size of the loss's gradient with respect to the embedded input, by steps back from the last word.

    Mean over the `n` longest test reviews of the Euclidean norm; as many steps as the shortest of them has.
    """
    rows = data.test.lengths.topk(min(n, len(data.test))).indices
    inputs, targets = (part.to(device) for part in data.test.__getitems__(rows))
    embedded = []
    hook = model.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    model.train()  # cuDNN goes backward in training mode only
    model.dropout.eval()
    loss = task.loss(model(inputs), targets).sum()
    hook.remove()
    sizes = torch.autograd.grad(loss, embedded[0])[0].norm(dim=2).cpu()  # (n, T, E) -> (n, T)
    lengths = data.test.lengths[rows]
    back = lengths[:, None] - 1 - torch.arange(int(lengths.min()))  # (n, steps): position of each step back
    return sizes.gather(1, back).mean(dim=0).tolist()


def free_running(
    model: nn.Module, task: Task, data: TaskData, device: torch.device, horizon: int = 120, stride: int = 10
) -> dict:
    """Forecasts of `horizon` steps in which each prediction is fed back, from every `stride`-th test window.

    Returns the first of them and its truth, standardised, and the mean squared error by horizon, in the
    units of the series squared.
    """
    horizon = min(horizon, len(data.test) // 2)
    windows = data.test.inputs[: len(data.test) - horizon + 1 : stride].to(device)  # (O, T, 1)
    truth = data.test.targets[:, 0].unfold(0, horizon, stride)  # (O, horizon)
    steps = []
    with evaluating(model):
        for _ in range(horizon):
            steps.append(model(windows))  # (O, 1)
            windows = torch.cat([windows[:, 1:], steps[-1][:, None]], dim=1)
    forecasts = torch.cat(steps, dim=1).cpu()  # (O, horizon)
    errors = ((forecasts - truth) ** 2).mean(dim=0) * data.unit**2
    return {"forecast": forecasts[0].tolist(), "truth": truth[0].tolist(), "mse": errors.tolist()}


EVIDENCE = {  # task: name of a measurement -> the measurement, and the model it is made on
    CLASSIFIER.name: {"gradient": (gradient_by_step, "trained"), "initial_gradient": (gradient_by_step, "initial")},
    PREDICTOR.name: {},
    FORECASTER.name: {"free_running": (free_running, "trained")},
}


def add_evidence(records: Sequence[dict], config: Config, device: torch.device, output_dir: Path) -> None:
    """Measure what the records do not yet hold, on the saved models, and write it into them."""
    missing = [record for record in records if EVIDENCE[record["task"]].keys() - record.get("evidence", {}).keys()]
    for record in sorted(missing, key=lambda r: (r["task"], r["seed"])):
        task, name, seed = TASKS[record["task"]], record["model"], record["seed"]
        data = cached_data(task.name, getattr(config, task.name), seed)
        models = {
            "trained": load_checkpoint(output_dir / "models" / f"{run_name(task.name, name, seed)}.pt")[0],
            "initial": build_model(task, name, data.arguments, seed)[0],
        }
        record["evidence"] = {
            what: measure(models[which].to(device), task, data, device)
            for what, (measure, which) in EVIDENCE[task.name].items()
        }
        write_record(output_dir, record)


# ======================================================================================
# 9. Report
# ======================================================================================

COLOURS = {"RNN": "#D55E00", "LSTM": "#0072B2", "GRU": "#009E73"}  # Okabe & Ito 2008: safe for colour-blind readers
GREY = "#777777"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.dpi": 120,
}
PARTS = {"embedding": "", "recurrent": "////", "head": "...."}  # hatch of each part of a model


def colour(model: str) -> tuple[float, ...]:
    """The colour of a model, the same in every figure; a matched model's is paler."""
    return to_rgba(COLOURS[base_name(model)], 1.0 if model == base_name(model) else 0.5)


def best_epoch(record: Mapping) -> Mapping:
    """The epoch of lowest validation loss, whose weights were kept."""
    return min(record["history"], key=lambda row: row["validation"]["loss"])


# --- tables ---------------------------------------------------------------------------


def runs_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """A row per run. Losses are those that training minimised: of standardised values in the forecaster."""
    return pd.DataFrame(
        {
            "task": record["task"],
            "model": record["model"],
            "seed": record["seed"],
            "parameters": sum(record["parameters"].values()),
            "recurrent_parameters": record["parameters"]["recurrent"],
            "epochs": len(record["history"]),
            "best_epoch": best_epoch(record)["epoch"],
            "seconds": round(sum(row["seconds"] for row in record["history"]), 1),
            "val_loss": best_epoch(record)["validation"]["loss"],
            "test_loss": record["test"]["loss"],
            **{f"test_{name}": record["test"].get(name) for name in ("accuracy", "mse", "mae")},
        }
        for record in records
    )


def scores_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """Long form: task, name, kind, metric, mean and standard deviation over seeds, number of seeds."""
    rows = []
    for record in records:
        own = {"name": record["model"], "kind": "model"} | record["test"]
        for scores in (own, *record["references"]):
            head = {"task": record["task"], "name": scores["name"], "kind": scores["kind"], "seed": record["seed"]}
            rows += [{**head, "metric": m.name, "value": scores[m.name]} for m in TASKS[record["task"]].metrics]
    table = pd.DataFrame(rows).drop_duplicates(["task", "name", "metric", "seed"])  # all models hold the references
    for column, order in (("task", TASKS), ("kind", ("model", "baseline", "ceiling"))):
        table[column] = pd.Categorical(table[column], list(order))
    table = table.sort_values(["task", "kind"], kind="stable")
    groups = table.groupby(["task", "name", "kind", "metric"], sort=False, observed=True)["value"]
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def plus_minus(mean: float, std: float, form: str) -> str:
    """'76.1 % ± 1.2': a mean with its standard deviation, if there is one."""
    number = format(mean, form).replace("%", " %")
    return number if math.isnan(std) else f"{number} ± {format(std, form).rstrip('%')}"


def performance_table(records: Sequence[Mapping], task: Task) -> pd.DataFrame:
    """One task's results as a person reads them: models, baselines and ceiling, mean ± deviation over seeds."""
    runs, scores = runs_table(of_task(records, task)).groupby("model"), scores_table(of_task(records, task))
    first = scores[scores["metric"] == task.metrics[0].name].set_index("name")
    ceiling = first[first["kind"] == "ceiling"]["mean"]
    baselines = first[first["kind"] == "baseline"]["mean"]
    rows = []
    for name, cells in scores.groupby("name", sort=False):
        cells = cells.set_index("metric")
        row = {"": name, "kind": str(cells["kind"].iloc[0])}
        row |= {m.name: plus_minus(cells.loc[m.name, "mean"], cells.loc[m.name, "std"], m.form) for m in task.metrics}
        if name in runs.groups:
            run, row["gap closed"] = runs.get_group(name), gap_closed(first.loc[name, "mean"], baselines, ceiling)
            row |= {"best epoch": f"{run['best_epoch'].mean():.1f}", "seconds": f"{run['seconds'].mean():.1f}"}
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def gap_closed(value: float, baselines: pd.Series, ceiling: pd.Series) -> str:
    """How much of the way from the best of the baselines to the ceiling a model's score has come."""
    if ceiling.empty:
        return "unknown"
    gaps = ceiling.iloc[0] - baselines
    return f"{100 * (1 - (ceiling.iloc[0] - value) / gaps[gaps.abs().idxmin()]):.0f} %"


def parameters_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """Parameters of each model by part."""
    rows = []
    for record in one_per_model(records):
        counts = {part: record["parameters"].get(part, 0) for part in PARTS}
        rows.append({"task": record["task"], "model": record["model"]} | counts | {"total": sum(counts.values())})
    return pd.DataFrame(rows)


def costs_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """What a training step of each model costs."""
    return pd.DataFrame(
        {
            "task": record["task"],
            "model": record["model"],
            "parameters": sum(record["parameters"].values()),
            "recurrent_parameters": record["parameters"]["recurrent"],
            **record["cost"],
        }
        for record in one_per_model(records)
    )


def accuracy_by(records: Sequence[Mapping], note: str, score: str = "score") -> pd.Series:
    """Mean of `score` for each value of a note on the test examples: within a seed, then over the seeds."""
    by_seed = {}
    for record in records:
        examples = pd.DataFrame({name: record["examples"][name] for name in (note, score)})
        by_seed[record["seed"]] = examples.groupby(note)[score].mean()
    return pd.DataFrame(by_seed).mean(axis=1).sort_index()


def findings(records: Sequence[Mapping], task: Task, comparisons: pd.DataFrame) -> list[str]:
    """What one task's results say, in sentences: verdicts on pairs, baselines that win, who learns fastest."""
    metric, own = task.metrics[0], of_task(records, task)
    chosen = (comparisons["task"] == task.name) & (comparisons["metric"] == metric.name)
    sentences = [f"{verdict}." for verdict in comparisons[chosen]["verdict"]]
    shared = set.intersection(*({r["seed"] for r in runs} for _, runs in by_model(own)))
    if len(shared) == 1 and sentences:
        sentences.append("One seed supports no ranking: the intervals are over test examples only.")
    scores = scores_table(own)
    scores = scores[scores["metric"] == metric.name].set_index("name")
    models, baselines = (scores[scores["kind"] == kind]["mean"] for kind in ("model", "baseline"))
    for name, value in baselines.items():
        beaten = [model for model, own_value in models.items() if metric.better(value, own_value)]
        if beaten:
            sentences.append(f"The baseline {name} does better than {', '.join(beaten)}{task.remarks.get(name, '')}.")
    if task.hard_cases:
        what, note, least = task.hard_cases
        marked = [{**r, "examples": r["examples"] | {"hard": np.array(r["examples"][note]) >= least}} for r in own]
        shares = {name: accuracy_by(runs, "hard").get(True, math.nan) for name, runs in by_model(marked)}
        sentences.append(f"Accuracy on {what}: {listed(shares, '.1%')}.")
    ceiling = scores[scores["kind"] == "ceiling"]["mean"]
    if len(ceiling) and not metric.higher_is_better:
        sentences.append(
            f"{metric.name.upper()} over that of the {ceiling.index[0]}: {listed(models / ceiling.iloc[0], '.2f')}."
        )
    epochs = runs_table(own).groupby("model", sort=False)["best_epoch"].mean()
    sentences.append(f"Best epoch, mean over seeds: {listed(epochs, '.1f')}.")
    return sentences


def by_model(records: Sequence[Mapping]) -> Iterator[tuple[str, list[Mapping]]]:
    """Each model's name with its records."""
    for name in models_in(records):
        yield name, [r for r in records if r["model"] == name]


def listed(values: Mapping[str, float] | pd.Series, form: str) -> str:
    """'RNN 31.9 %, LSTM 64.8 %': a named value after the other."""
    return ", ".join(f"{name} {format(value, form).replace('%', ' %')}" for name, value in values.items())


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; columns of numbers are aligned right."""
    align = [" ---: " if pd.api.types.is_numeric_dtype(table[column]) else " --- " for column in table]
    rows = [
        [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in table.astype(object).to_numpy()
    ]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "| " + " | ".join(table.columns) + " |\n|" + "|".join(align) + "|\n" + body


def task_text(records: Sequence[Mapping], task: Task, comparisons: pd.DataFrame) -> str:
    """One task's section of the summary."""
    own = of_task(records, task)
    seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in own}))
    facts = [
        f"{name} {f'{value:,}' if value == int(value) else f'{value:.3g}'}" for name, value in own[0]["facts"].items()
    ]
    sentences = "\n".join(f"- {sentence}" for sentence in findings(records, task, comparisons))
    return (
        f"## {task.title}\n\n{task.question}\n\n{markdown(performance_table(records, task))}\n\n"
        f"Test split, mean ± standard deviation over the seeds {seeds}.\n\n{sentences}\n\n"
        f"Data of seed {own[0]['seed']}: {', '.join(facts)}.\n"
    )


def summary_text(records: Sequence[Mapping], comparisons: pd.DataFrame) -> str:
    """The tables as a page of Markdown, with what the data were and where it ran."""
    environments = [record["environment"] for record in records]
    values = {name: sorted({str(environment[name]) for environment in environments}) for name in environments[0]}
    parts = [
        "# RNN, LSTM and GRU: results\n",
        "The same training for a vanilla RNN, an LSTM and a GRU, on data generated from each seed. A ceiling is the "
        "best that is possible on such data; gap closed is how much of the way from the best baseline to the ceiling "
        "a model has come, negative if it does worse than that baseline. Brackets hold 95 % intervals of the paired "
        "difference of two models, from a hierarchical bootstrap over seeds and test examples; of three seeds they "
        "are rough, and rather too narrow. Seconds are those of a run's training, with other runs beside it.\n",
        *(task_text(records, task, comparisons) for task in tasks_in(records)),
        f"## Parameters\n\n{markdown(parameters_table(records))}\n",
        f"## Cost of a training step\n\n{markdown(costs_table(records))}\n\nMedian time of a step, the models taking "
        "turns on the same batches; activations: what the forward pass keeps for the backward pass. The kernel is the "
        "implementation of the recurrent layer that ran: times compare kernels as much as cells.\n",
        "## Environment\n\n" + "\n".join(f"- {name}: {', '.join(value)}" for name, value in values.items()) + "\n",
    ]
    return "\n".join(parts)


# --- figures --------------------------------------------------------------------------


def training_history_figure(records: Sequence[Mapping], task: Task) -> Figure:
    """Loss and metric by epoch: a column per model, a line per seed."""
    names, metrics = models_in(of_task(records, task)), task.metrics[:2]
    figure = Figure(figsize=(max(3.2 * len(names) + 0.8, 6.5), 5.4), layout="constrained")
    grid = figure.subplots(len(metrics), len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in zip(grid.T, names):
        column[0].set_title(name, color=colour(name), fontweight="bold")
        column[-1].set_xlabel("epoch")
        for record in of_task(records, task, name):
            epochs, kept = [row["epoch"] for row in record["history"]], best_epoch(record)
            for axes, metric in zip(column, metrics):
                for split, dashes in (("train", ":"), ("validation", "-")):
                    values = [row[split][metric.name] for row in record["history"]]
                    axes.plot(epochs, values, dashes, color=colour(name), linewidth=1.2, alpha=0.8)
                axes.plot(kept["epoch"], kept["validation"][metric.name], "o", color=colour(name), markersize=5)
    for axes, metric in zip(grid[:, 0], metrics):
        axes.set_ylabel(metric.label)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    lines = [
        Line2D([], [], color=GREY, linestyle=":", label="training (running mean over the epoch)"),
        Line2D([], [], color=GREY, label="validation"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="epoch whose weights were kept"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    figure.suptitle(f"{task.title}: training, a line per seed")
    return figure


def forecasts_figure(records: Sequence[Mapping], task: Task, steps: int = 120) -> Figure:
    """Forecasts against the truth, one step ahead and free-running, and the latter's error by horizon."""
    own = of_task(records, task)
    first = [next(r for r in own if r["model"] == name) for name in models_in(own)]
    figure = Figure(figsize=(11, 1.9 * len(first) + 3.4), layout="constrained")
    grid = figure.add_gridspec(len(first) + 1, 2, height_ratios=[*[1] * len(first), 1.3])
    for row, record in enumerate(first):
        left = figure.add_subplot(grid[row, 0])
        right = figure.add_subplot(grid[row, 1], sharey=left)
        scaler, shade = record["decoding"]["scaler"], colour(record["model"])
        examples, free = record["examples"], record["evidence"]["free_running"]
        draw_forecast(left, examples["truth"][:steps], examples["answer"][:steps], scaler, shade)
        draw_forecast(right, free["truth"][:steps], free["forecast"][:steps], scaler, shade)
        name = f"{record['model']}, seed {record['seed']}"
        left.set_title(f"{name}, one step ahead: MSE {record['test']['mse']:.4f}", color=shade)
        right.set_title(f"{name}, free-running: each forecast is fed back", color=shade)
        left.set_ylabel("value (series units)")
    left.set_xlabel("test example, in order of time")
    right.set_xlabel("steps ahead of the last observed value")
    free_running_errors(figure.add_subplot(grid[-1, :]), own, task)
    observed = Line2D([], [], color=GREY, marker="o", markersize=2.5, linewidth=0, label="observed value")
    forecast = Line2D([], [], color="black", label="forecast (in the model's colour)")
    figure.legend(handles=[observed, forecast], loc="outside lower center", ncols=2)
    figure.suptitle(f"{task.title}: forecasts against the truth")
    return figure


def draw_forecast(
    axes: Axes, truth: Sequence[float], forecast: Sequence[float], scaler: Mapping, shade: tuple[float, ...]
) -> None:
    """Observed values as points and a forecast as a line, both brought from standardised to series units."""
    steps = np.arange(1, len(truth) + 1)
    observed, forecast = (np.array(values) * scaler["std"] + scaler["mean"] for values in (truth, forecast))
    axes.plot(steps, observed, color=GREY, marker="o", markersize=2.5, linewidth=0)
    axes.plot(steps, forecast, color=shade)


def free_running_errors(axes: Axes, records: Sequence[Mapping], task: Task) -> None:
    """Mean squared error of free-running forecasts by horizon, each model, mean over seeds."""
    for name in models_in(records):
        runs = [r["evidence"]["free_running"]["mse"] for r in of_task(records, task, name)]
        axes.plot(np.arange(1, len(runs[0]) + 1), np.mean(runs, axis=0), color=colour(name), label=name)
    for reference in records[0]["references"]:
        if reference["kind"] == "ceiling":
            axes.axhline(reference["mse"], color="black", linestyle=":", label=f"{reference['name']} (the floor)")
    axes.axhline(records[0]["unit"] ** 2, color=GREY, linestyle="--", label="variance of the series: no skill")
    axes.set(title="Free-running error, mean over seeds", xlabel="steps ahead", ylabel="MSE (series units²)")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper center", ncols=5)


def parameters_figure(records: Sequence[Mapping]) -> Figure:
    """Parameters by part, each model of each task."""
    tasks = tasks_in(records)
    figure = Figure(figsize=(9, 1.6 * len(tasks) + 1.0), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks):
        table = parameters_table(of_task(records, task)).set_index("model").iloc[::-1]
        left = np.zeros(len(table))
        for part, hatch in PARTS.items():
            colours = [colour(name) for name in table.index]
            axes.barh(table.index, table[part], left=left, color=colours, hatch=hatch, edgecolor="white", linewidth=0.5)
            left += table[part]
        for name, row in table.iterrows():
            text = f" {row['total']:,} (recurrent {row['recurrent']:,})"
            axes.text(row["total"], name, text, va="center")
        axes.set(xlim=(0, 1.35 * table["total"].max()), title=task.title)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("trainable parameters")
    parts = [Patch(facecolor=GREY, edgecolor="white", hatch=hatch, label=part) for part, hatch in PARTS.items()]
    figure.legend(handles=parts, loc="outside lower center", ncols=len(PARTS))
    figure.suptitle("Parameters by part of the model")
    return figure


def architectures_figure(records: Sequence[Mapping]) -> Figure:
    """A strip of boxes per model: its layers in order, with settings, output shape and parameters."""
    first = one_per_model(records)
    width = max(len(record["layers"]) for record in first) + 1
    figure = Figure(figsize=(1.75 * width + 1.5, 1.0 * len(first) + 0.6), layout="constrained")
    for axes, record in zip(figure.subplots(len(first), 1, squeeze=False)[:, 0], first):
        axes.set(xlim=(-0.9, width - 0.5), ylim=(-0.5, 0.5))
        axes.axis("off")
        label = f"{record['model']}\n{record['task']}"
        axes.text(-0.85, 0, label, color=colour(record["model"]), fontweight="bold", va="center")
        start = {"kind": "input", "settings": "", "shape": record["input_shape"], "parameters": 0}
        for x, layer in enumerate([start, *record["layers"]]):
            draw_layer(axes, x, layer, colour(record["model"]))
    figure.suptitle("Architectures, drawn from the live models (B: batch)")
    return figure


def draw_layer(axes: Axes, x: int, layer: Mapping, edge: str) -> None:
    """A box at position `x`, with an arrow from the one before it."""
    settings = re.sub(r"(batch_first|inplace|bias)=\w+|in_features=|out_features=", "", layer["settings"])
    settings = ", ".join(part for part in re.split(r",\s*", settings) if part)
    shape = ", ".join(["B", *map(str, layer["shape"])])
    lines = ["last state" if layer["kind"] == "Recurrent" else layer["kind"]]
    lines += [f"({settings})"] * bool(settings) + [f"→ ({shape})"]
    lines += [f"{layer['parameters']:,} weights"] * bool(layer["parameters"])
    width = 2.0 if layer["parameters"] else 0.8
    box = {"boxstyle": "round,pad=0.4", "edgecolor": edge, "facecolor": "white", "linewidth": width}
    axes.text(x, 0, "\n".join(lines), ha="center", va="center", fontsize=7.5, bbox=box, zorder=2)
    if x:
        axes.annotate("", (x - 0.4, 0), (x - 0.6, 0), arrowprops={"arrowstyle": "->", "color": GREY}, zorder=3)


def performance_figure(records: Sequence[Mapping]) -> Figure:
    """A row per task: test metric with baselines and ceiling, training time, cost of a step."""
    tasks, scores, costs = tasks_in(records), scores_table(records), costs_table(records)
    figure = Figure(figsize=(14, 2.5 * len(tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), 4, squeeze=False, width_ratios=[2.2, 1, 1, 1])
    for row, task in zip(grid, tasks):
        metric = task.metrics[0]
        own = scores[(scores["task"] == task.name) & (scores["metric"] == metric.name)].iloc[::-1]
        for line in own.itertuples():
            shade = colour(line.name) if line.kind == "model" else {"ceiling": "black"}.get(line.kind, GREY)
            marker = {"model": "o", "baseline": "D", "ceiling": "|"}[line.kind]
            row[0].errorbar(line.mean, line.name, xerr=np.nan_to_num(line.std), fmt=marker, color=shade, capsize=3)
        row[0].set(title=task.title, xlabel=f"test {metric.label}")
        if not metric.higher_is_better:  # errors differ by factors
            row[0].set(xscale="log", xlabel=f"test {metric.label}, log scale")
            row[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[0].xaxis.set_major_formatter("{x:.2g}")
            row[0].xaxis.set_minor_formatter("")
        seconds = runs_table(of_task(records, task)).groupby("model", sort=False)["seconds"].mean()
        cost_bars(row[1], seconds, "training (s per run)")
        steps = costs[costs["task"] == task.name].set_index("model")
        cost_bars(row[2], steps["ms_per_step"], "step (ms), kernel", steps["kernel"])
        cost_bars(row[3], steps["activation_bytes"] / 2**20, "activations (MiB per step)")
    figure.suptitle("Test split, mean ± standard deviation over seeds (diamonds: baselines, bar: ceiling), and costs")
    return figure


def cost_bars(axes: Axes, values: pd.Series, label: str, notes: pd.Series | None = None) -> None:
    """A bar per model, from the top, with its value and a note behind it."""
    values = values.iloc[::-1]
    bars = axes.barh(values.index, values, color=[colour(name) for name in values.index])
    texts = [f"{value:.3g}" + (f" {notes[name]}" if notes is not None else "") for name, value in values.items()]
    axes.bar_label(bars, texts, padding=3)
    axes.set(xlabel=label, xlim=(0, (1.35 if notes is None else 2.0) * values.max() if len(values) else 1))
    axes.grid(axis="y", visible=False)


def long_range_figure(records: Sequence[Mapping]) -> Figure:
    """Why memory matters: gradient by time step, next-word accuracy by distance, reviews with a false ending."""
    panels = [(gradient_panel, CLASSIFIER), (distance_panel, PREDICTOR), (ending_panel, CLASSIFIER)]
    panels = [(draw, of_task(records, task)) for draw, task in panels if of_task(records, task)]
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, (draw, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, own)
    lines = [Line2D([], [], color=colour(name), label=name, linewidth=3) for name in models_in(records)]
    if of_task(records, PREDICTOR):
        lines.append(Line2D([], [], color=GREY, marker="D", linestyle="--", label="trigram"))
        lines.append(Line2D([], [], color="black", linestyle=":", label="best guess from the grammar's full state"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    figure.suptitle("Long-range memory, mean over seeds")
    return figure


def gradient_panel(axes: Axes, records: Sequence[Mapping]) -> None:
    """Size of the gradient that reaches each word, before and after training."""
    for name, runs in by_model(records):
        for what, dashes in (("initial_gradient", ":"), ("gradient", "-")):
            length = min(len(r["evidence"][what]) for r in runs)
            mean = np.mean([r["evidence"][what][:length] for r in runs], axis=0)
            axes.semilogy(np.arange(length), mean, dashes, color=colour(name), linewidth=1.3)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-12))  # a gradient below that is as good as none
    axes.set(title="Gradient of the loss at each word", xlabel="words back from the end of the review")
    axes.set_ylabel("norm of the gradient")
    styles = (("before training", ":"), ("after", "-"))
    lines = [Line2D([], [], color=GREY, linestyle=dashes, label=when) for when, dashes in styles]
    axes.legend(handles=lines, loc="lower left")


def distance_panel(axes: Axes, records: Sequence[Mapping]) -> None:
    """Accuracy on verbs and objects by their distance from the subject that determines them."""
    for name, runs in by_model(records):
        axes.plot(
            100 * accuracy_by(runs, "cue_distance").drop(0, errors="ignore"), "o-", color=colour(name), markersize=4
        )
    one_per_seed = list({r["seed"]: r for r in records}.values())
    for score, style in (
        ("trigram_score", {"fmt": "D--", "color": GREY}),
        ("best_score", {"fmt": ":", "color": "black"}),
    ):
        values = 100 * accuracy_by(one_per_seed, "cue_distance", score).drop(0, errors="ignore")
        axes.plot(values.index, values, style.pop("fmt"), markersize=4, **style)
    axes.set(title="Next word, by distance of its cue", xlabel="distance of the cue (words back)", ylim=(0, 100))
    axes.set_ylabel("accuracy (%)")


def ending_panel(axes: Axes, records: Sequence[Mapping]) -> None:
    """Accuracy on reviews whose closing verdict agrees with their label, and on those where it does not."""
    names = models_in(records)
    for i, (name, runs) in enumerate(by_model(records)):
        accuracy = 100 * accuracy_by(runs, "verdict_contradicts").reindex([0, 1])
        middle = np.arange(2) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.bar_label(axes.bar(middle, accuracy, 0.75 / len(names), color=colour(name)), fmt="%.0f")
    axes.axhline(50, color=GREY, linestyle="--", linewidth=1)
    axes.set(title="Reviews, by what their last word says", ylim=(0, 105), xticks=[0, 1])
    axes.set_xticklabels(["ending agrees\nwith the label", "ending contradicts\nthe label"])
    axes.set_ylabel("accuracy (%); dashed: guessing")
    axes.grid(axis="x", visible=False)


def write_report(records: Sequence[Mapping], comparisons: pd.DataFrame, output_dir: Path) -> None:
    """All tables, then all figures, from the records alone."""
    scores = scores_table(records)
    tables = {
        "runs": runs_table(records),
        "summary": scores[scores["metric"].isin(CSV_METRICS)],
        "comparisons": comparisons,
        "costs": costs_table(records),
    }
    for name, table in tables.items():
        with whole_file(output_dir / f"pytorch_rnn_{name}.csv") as path:
            table.to_csv(path, index=False)
    with whole_file(output_dir / "pytorch_rnn_summary.md") as path:
        path.write_text(summary_text(records, comparisons), encoding="utf-8")
    figures = {
        f"{task.name}_training_history": partial(training_history_figure, records, task) for task in tasks_in(records)
    }
    if of_task(records, FORECASTER):
        figures["time_series_predictions"] = partial(forecasts_figure, records, FORECASTER)
    if of_task(records, CLASSIFIER) or of_task(records, PREDICTOR):
        figures["long_range"] = partial(long_range_figure, records)
    figures["parameter_counts"] = partial(parameters_figure, records)
    figures["architectures"] = partial(architectures_figure, records)
    figures["performance_summary"] = partial(performance_figure, records)
    for name, draw in figures.items():
        with rc_context(STYLE), whole_file(output_dir / f"pytorch_rnn_{name}.png") as path:
            draw().savefig(path, format="png")


# ======================================================================================
# 10. Command line
# ======================================================================================


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of printing the usage and ending the interpreter."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def integer(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises UsageError when they cannot be followed."""
    parser = Parser(
        prog="pytorch_rnn_models.py",
        description="Trains RNN, LSTM and GRU on three tasks and writes tables and figures.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all three")
    parser.add_argument(
        "--models", nargs="+", choices=MODEL_NAMES, default=list(MODEL_NAMES), help="default: all three"
    )
    parser.add_argument("--seeds", nargs="+", type=integer(0), metavar="N", help="default: 42 43 44; with --quick: 42")
    parser.add_argument("--quick", action="store_true", help="the whole pipeline on tiny data, in under 30 s")
    parser.add_argument(
        "--epochs", type=integer(1), metavar="N", help="cap on epochs; default: as in the configuration"
    )
    parser.add_argument(
        "--match",
        choices=["hidden", "params"],
        default="hidden",
        help="compare at equal hidden size (default), or at the LSTM's number of recurrent parameters",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: CUDA where there is one, else CPU",
    )
    parser.add_argument(
        "--workers",
        type=integer(1),
        metavar="N",
        help="runs trained at the same time, one thread each; default: as many as cores; on a GPU and with --quick: 1",
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: outputs; with --quick: outputs/quick")
    parser.add_argument("--report", action="store_true", help="no training: tables and figures from the records in DIR")
    options = parser.parse_args(argv)
    options.seeds = list(dict.fromkeys(options.seeds or (DEFAULT_SEEDS[:1] if options.quick else DEFAULT_SEEDS)))
    options.tasks = [name for name in TASKS if name in options.tasks]
    options.models = [name for name in MODEL_NAMES if name in options.models]
    options.output_dir = options.output_dir or Path("outputs", "quick" if options.quick else "")
    return options


def choose_device(name: str) -> torch.device:
    """The device called `name`, made deterministic; raises UsageError if it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        here = ", ".join(device for device, there in available.items() if there)
        raise UsageError(f"--device {name}: there is none here; choose from {here}, or auto")
    device = torch.device(name)
    prepare_device(device)
    return device


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_writable(directory: Path) -> None:
    """Raise UsageError, before any training, if files cannot be written to `directory`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UsageError(f"--output-dir {directory}: cannot be written ({error.strerror}); choose another") from error


def print_summary(records: Sequence[Mapping], comparisons: pd.DataFrame, output_dir: Path) -> None:
    """The tables and where the files are, on the terminal."""
    for task in tasks_in(records):
        print(f"\n{task.title} (test split)\n")
        print(performance_table(records, task).to_string(index=False))
        print("", *findings(records, task, comparisons), sep="\n")
    print("\nParameters\n")
    print(parameters_table(records).to_string(index=False))
    print(f"\nTables, figures, records and models are in {output_dir.resolve()}")


def train(options: argparse.Namespace, config: Config, device: torch.device) -> None:
    """Every run that the options ask for."""
    names = [name + MATCHED * (options.match == "params" and name != "LSTM") for name in options.models]
    workers = options.workers or (1 if options.quick or device.type != "cpu" else usable_cores())
    print(
        f"{len(options.tasks) * len(names) * len(options.seeds)} runs: {', '.join(options.tasks)} x {', '.join(names)} "
        f"x seeds {', '.join(map(str, options.seeds))}, on {device}, {workers} at a time",
        file=sys.stderr,
    )
    run_all(options.tasks, names, options.seeds, config, device, options.output_dir, workers)


def run(options: argparse.Namespace) -> None:
    """Do what the options say; raises UsageError if they cannot be followed."""
    config = QUICK if options.quick else Config()
    config = config.with_epochs(options.epochs) if options.epochs else config
    device = choose_device(options.device)
    if not options.report:
        check_writable(options.output_dir)
        train(options, config, device)
    records = read_records(options.output_dir, config)
    if not records:
        raise UsageError(
            f"--report: no records in {options.output_dir / 'runs'} of the configuration asked for; "
            "train first, and give the same --quick and --epochs"
        )
    print("measuring gradients, free-running forecasts and the cost of a step where that is not done", file=sys.stderr)
    add_evidence(records, config, device, options.output_dir)
    add_costs(records, config, device, options.output_dir)
    comparisons = compare_models(records)
    write_report(records, comparisons, options.output_dir)
    print_summary(records, comparisons, options.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's own); returns the exit status."""
    try:
        run(parse_args(argv))
    except SystemExit as finished:  # --help
        return int(finished.code or 0)
    except UsageError as error:
        print(f"pytorch_rnn_models.py: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, BrokenExecutor, OSError) as error:
        print(f"pytorch_rnn_models.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pytorch_rnn_models.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
