"""Vanilla RNN, LSTM and GRU compared on three tasks, each with its baselines and its ceiling.

    python pytorch_rnn_models.py                 the whole experiment, into outputs/
    python pytorch_rnn_models.py --quick         the whole pipeline on tiny data, into outputs/quick/
    python pytorch_rnn_models.py --help          all options: your own data, resuming, trained models in use
    python -m pytest tests                       the tests

Tasks       classifier   positive or negative film reviews    (accuracy, binary cross-entropy)
            predictor    the next word of a corpus            (accuracy, cross-entropy, perplexity)
            forecaster   the next value of noisy sine waves   (MSE, MAE)
Sections    configuration, datasets, generated data, your own data, baselines, models, tasks, training, evidence,
            runs, results, figures, command line: each uses only what stands above it
Data flow   arguments -> configuration -> runs -> records -> results -> figures
Files       pytorch_rnn_*.png, pytorch_rnn_{runs,history,summary,comparisons,costs,tuning,benchmark}.csv, _summary.md
            runs/TASK_MODEL_seedN.json      the record of a run; of MODEL "baselines", what needs no training
            models/TASK_MODEL_seedN.pt      its model: load_checkpoint(path).predict(...) uses it
            predictions/TASK_MODEL_seedN.csv      its answer to each test example
            all in the output directory, each written whole or not at all

Shapes in comments: N examples, B batch, T time steps, E embedding, F input features, H hidden units, V vocabulary,
K labels, O origins of forecasts.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import io
import json
import math
import multiprocessing.connection
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import combinations, product
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

# ======================================================================================
# Configuration
# ======================================================================================


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found and what would be right."""


def require(condition: object, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


# Adam's rate at the start, each model's own: what `--tune --seeds 0 1 2 3 4 --output-dir outputs/tuning` chose for the
# settings below; if they change, it has to choose again
LearningRates = namedtuple("LearningRates", "RNN LSTM GRU")


@dataclass(frozen=True)
class Training:
    """How a model is trained: all but the learning rate the same for RNN, LSTM and GRU within a task."""

    epochs: int = 30  # upper bound; early stopping may end sooner
    batch_size: int = 64  # examples per update
    accumulate_steps: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    learning_rate: float = 1e-3  # Adam's, at the start; in a run, that of its model in `LearningRates`
    lr_factor: float = 0.5  # the rate is multiplied by this on a plateau of the validation loss
    lr_patience: int = 1  # epochs without improvement, by 0.01 % or more, that are allowed; then the rate falls
    patience: int = 4  # epochs without improvement after which training ends
    weight_decay: float = 0.0  # added to the gradient: pulls back embeddings of rare words, which memorise
    clip_norm: float = 1.0  # larger gradients are scaled down to this norm

    def __post_init__(self) -> None:
        least = self.lr_patience + 1
        early = f"patience is {self.patience}; with lr_patience {self.lr_patience} it must be above {least}"
        require(self.patience > least, f"{early}, or training ends before the learning rate has fallen")


@dataclass(frozen=True)
class UserFile:
    """A user's file that takes the place of the generated data; `user_file` makes it."""

    path: str
    digest: str  # SHA-256 of its content: a run belongs to the content, wherever the file lies
    columns: tuple[str, ...] = ()  # that the user named: of reviews text and label, of a series the values


@dataclass(frozen=True)
class TaskConfig:
    """What the configurations of the three tasks share."""

    options: str = ""  # of the command line that lead here, for messages; not compared
    file: UserFile | None = None  # takes the place of the generated data
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    learning_rates: LearningRates = LearningRates(1e-3, 1e-3, 1e-3)
    training: Training = Training()


@dataclass(frozen=True)
class ClassifierConfig(TaskConfig):
    """Text classification: the reviews, the model, its training. What each lever does: `generate_reviews`."""

    n_reviews: int = 5000
    phrases: tuple[int, int] = (6, 65)  # three-word phrases per review, least and most: 22 to 199 words, 134 on average
    opinion_rate: float = 0.6  # share of the phrases that state an opinion
    clarity: tuple[float, float] = (0.44, 0.84)  # range of a review's share of opinions that agree with its label
    negation_rate: float = 0.25  # share of the opinions put as the negation of the opposite
    name_rate: float = 0.25  # share of the other phrases that hold a surname, most of them rare
    verdict_reliability: float = 0.58  # how often the closing verdict agrees with the label
    vocab_size: int = 5000  # most frequent words of the training split, <pad> and <unk> included
    max_words: int = 200  # of a longer review the end is kept
    embed_dim: int = 50
    learning_rates: LearningRates = LearningRates(RNN=1e-4, LSTM=1e-2, GRU=1e-2)
    training: Training = Training(epochs=20, batch_size=32, weight_decay=1e-4, patience=3)


@dataclass(frozen=True)
class PredictorConfig(TaskConfig):
    """Next-word prediction: the corpus, the model, its training. What each lever does: `generate_corpus`."""

    n_words: int = 20_000
    favourite_rate: float = 0.7  # how often a subject takes its favourite verb, and its favourite object
    vocab_size: int = 5000  # as the classifier's
    window: int = 10  # words that the model sees before the one it predicts
    embed_dim: int = 50
    learning_rates: LearningRates = LearningRates(RNN=1e-2, LSTM=3e-3, GRU=3e-3)
    training: Training = Training(epochs=25, batch_size=256, lr_factor=0.3, patience=3)


@dataclass(frozen=True)
class ForecasterConfig(TaskConfig):
    """Time-series forecasting: the series, the model, its training. What each lever does: `generate_series`."""

    n_steps: int = 6000
    periods: tuple[int, ...] = (6, 12, 24)  # steps; a window holds at least two whole cycles of each
    switch_rate: float = 0.02  # how often the period changes: every 50 steps on average
    amplitude: float = 1.0
    noise: float = 0.1  # standard deviation of the white noise
    window: int = 50  # steps that the model sees before the one it predicts; of a short series a tenth
    stride: int = 3  # every third window is trained on: neighbours are nearly the same; of a short series each
    hidden_dim: int = 32
    n_layers: int = 2
    dropout: float = 0.0
    learning_rates: LearningRates = LearningRates(RNN=1e-2, LSTM=3e-2, GRU=3e-2)
    training: Training = Training(batch_size=64, lr_factor=0.4, lr_patience=0, patience=3)


Config = Mapping[str, TaskConfig]  # every hyper-parameter of the experiment, by task
DEFAULT: Config = {"classifier": ClassifierConfig(), "predictor": PredictorConfig(), "forecaster": ForecasterConfig()}
QUICK: Config = {
    "classifier": ClassifierConfig(n_reviews=200, phrases=(5, 15), training=Training(epochs=2)),
    "predictor": PredictorConfig(n_words=1500, training=Training(epochs=2)),
    "forecaster": ForecasterConfig(n_steps=1100, hidden_dim=16, training=Training(epochs=2)),
}
DEFAULT_SEEDS = (42, 43, 44)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of --tune: the middle four are its grid, the ends are tried on demand

# ======================================================================================
# Datasets
# ======================================================================================

PAD, UNK = "<pad>", "<unk>"  # the words of id 0 and id 1
WORDS = re.compile(r"\w+(?:'\w+)*")  # letters of any script, digits, apostrophes between them
WORDS_AND_ENDS = re.compile(rf"{UNK}|{WORDS.pattern}|[.!?](?=[\s\"')\]”’»]|$)")  # a sentence's end is a word
TRAIN_SHARE, VALIDATION_SHARE = 0.70, 0.15  # the rest is the test split
MOST_WINDOWS = 50_000  # beyond these, a corpus's evaluation windows and the rows of least squares are thinned
CPU = torch.device("cpu")


def random_generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream of random numbers that depends on (seed, purpose) and on nothing else."""
    return np.random.default_rng([seed, *purpose.encode()])


class SequenceDataset(Dataset):
    """Inputs and targets as tensors on one device; `lengths` (N,): how many leading time steps of each hold data."""

    def __init__(self, inputs: Tensor, targets: Tensor, lengths: Tensor):
        self.inputs, self.targets, self.lengths = inputs, targets, lengths

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch by one indexing operation, cut to the longest of its examples; torch's DataLoader calls this."""
        rows = torch.as_tensor(indices)
        longest = int(self.lengths[rows].max())
        return self.inputs[rows, :longest], self.targets[rows]


class ReviewDataset(SequenceDataset):
    """Reviews as word ids padded on the right with 0: inputs (N, T) long, targets (N, 1) float, 1 = positive."""

    def __init__(self, reviews: Sequence[Sequence[int]], labels: Sequence[int], device: torch.device = CPU):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(review) for review in reviews], batch_first=True)
        targets = torch.tensor(labels, dtype=torch.float32, device=device).unsqueeze(1)
        super().__init__(ids.to(device), targets, torch.tensor([len(review) for review in reviews]))


class CorpusDataset(SequenceDataset):
    """Windows of a text, or about `most` evenly spaced ones, and the word after each: (N, T) and (N,) long, views."""

    def __init__(self, ids: Sequence[int], window: int, most: int = 2**62, device: torch.device = CPU):
        self.stride = math.ceil((len(ids) - window) / most)
        rows = torch.as_tensor(ids, dtype=torch.long, device=device).unfold(0, window + 1, self.stride)  # (N, T + 1)
        super().__init__(rows[:, :-1], rows[:, -1], torch.tensor(window).expand(len(rows)))


def centred(windows: Tensor) -> Tensor:
    """Windows (B, T, 1) without their means."""
    return windows - windows.mean(dim=1, keepdim=True)


class SeriesDataset(SequenceDataset):
    """Every `stride`-th window of a series and the value after it: inputs (N, T, 1), targets (N, 1), both views, float.

    What a model is given is relative: a batch holds the windows without their means, and how far the next value lies
    from the last. So a level that training never saw does no harm, and a model that gives 0 is persistence (after
    NLinear, Zeng et al. 2023).
    """

    def __init__(self, values: Sequence[float], window: int, stride: int = 1, device: torch.device = CPU):
        rows = torch.as_tensor(values, dtype=torch.float32, device=device).unfold(0, window + 1, stride)  # (N, T + 1)
        super().__init__(rows[:, :-1, None], rows[:, -1:], torch.tensor(window).expand(len(rows)))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        windows, targets = super().__getitems__(indices)
        return centred(windows), targets - windows[:, -1]


class LengthBuckets(Sampler):
    """Shuffled batches of examples of similar length, so that little time goes into padding; drawn anew every epoch.

    Shuffled examples are sorted by length within pools of `pool` batches. With equal lengths this is plain shuffling.
    """

    def __init__(self, lengths: Tensor, batch_size: int, rng: np.random.Generator, pool: int = 32):
        self.lengths, self.batch_size, self.rng, self.pool = lengths.numpy(), batch_size, rng, pool

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.rng.permutation(len(self.lengths))
        pools = np.split(order, range(self.batch_size * self.pool, len(order), self.batch_size * self.pool))
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        yield from (batches[i] for i in self.rng.permutation(len(batches)))


def fit_vocabulary(words: Iterable[str], size: int) -> dict[str, int]:
    """The id of each word: 0 padding, 1 any unknown word, then the training split's by frequency, then alphabet."""
    counts = Counter(words)
    ranked = sorted(counts.keys() - {UNK}, key=lambda word: (-counts[word], word))  # some corpora come with <unk>
    return {word: i for i, word in enumerate([PAD, UNK, *ranked[: size - 2]])}


def encode(words: Iterable[str], vocabulary: Mapping[str, int]) -> list[int]:
    """The ids of `words`."""
    return [vocabulary.get(word, 1) for word in words]


def tokenize(text: str, pattern: re.Pattern) -> list[str]:
    """Lower-case words, those that `pattern` finds; interned, so that a long text holds each of them once."""
    return [sys.intern(word) for word in pattern.findall(text.lower().replace("’", "'"))]


def three_parts(n: int, least: int, what: str) -> tuple[slice, slice, slice]:
    """Contiguous, disjoint train / validation / test slices that cover n items; raises InputError below `least`."""
    require(n >= least, f"{n:,} {what}; three splits need {least:,} or more")
    first, second = int(n * TRAIN_SHARE), int(n * (TRAIN_SHARE + VALIDATION_SHARE))
    return slice(0, first), slice(first, second), slice(second, n)


# ======================================================================================
# Generated data
# ======================================================================================

# --- reviews --------------------------------------------------------------------------

POSITIVE = """good great moving brilliant charming funny clever gripping tender superb fresh honest elegant thrilling
    warm vivid""".split()
NEGATIVE = "bad dull wooden clumsy boring awful shallow lazy tedious bland noisy stale cheap silly weak cold".split()
ASPECTS = """plot acting script music camera pacing ending dialogue cast score editing humour story drama lighting
    costume""".split()
AFFIRMATIONS, NEGATIONS = "was is felt seemed looked stayed".split(), "wasn't isn't never hardly".split()
CONJUNCTIONS = "while as when because and then but until where after".split()
VERBS = """waits returns sings leaves dreams runs hides wins falls listens smiles drives fights dances writes
    travels""".split()
TRIUMPHS, FAILURES = "triumph delight treat".split(), "failure disaster bore".split()
CHARACTERS = """hero heroine villain detective stranger doctor soldier widow orphan priest thief reporter queen butler
    cousin everyone nobody somebody he she""".split()
NAME_HEADS = """ald alder ash barn beck birch black bright brook buck burn carl chart clay cold crow dart deer dun east
    eld elm fair farn fern fox glen gold grey hal ham hart hawk hazel heath high holly hunt iron kel king kirk lang lark
    lind lock long mal marsh mead mill moor nether new north oak old oxen pem pine quill rad raven red ridge rock rose
    rush sand sel shaw silver south stan stone storm sun swan thorn tun ul wake wal west white wil wind winter wolf wood
    wyn yar york""".title().split()
NAME_MIDDLES = """a al an ar bel ber col den der el en er et ey for hal hel ing ken ker lan lea len ley lin man mar mel
    mer ner o ol on or ra ren ri ros ter ton""".split()
NAME_TAILS = """acre bank beck berg bourne bridge brook burn bury by church cliff combe cote crest croft dale dean den
    down ely fell field fold ford garth gate gill glade grange grave grove ham hay head hill holt house hurst keld land
    leigh lock low mere mond more mouth ness park pool port ridge road rick row scott shaw shire side son stead stoke
    stone stow thorpe thwaite toft ton tree vale view ville wall ward water way well wick wold worth yard""".split()


@dataclass(frozen=True)
class Reviews:
    """Labelled texts and, where they were generated, the evidence that the generator put into each."""

    texts: Sequence[str]
    labels: np.ndarray  # (N,): 0 to K - 1
    names: Sequence[str] = ("negative", "positive")  # of the K labels
    log_odds: np.ndarray | None = None  # (N,) of positive against negative, given all that depends on the label
    praised: np.ndarray | None = None  # (N,): the closing verdict is positive


def generate_reviews(config: ClassifierConfig, rng: np.random.Generator) -> Reviews:
    """Synthetic reviews in which the evidence is scattered over the whole text and has to be added up.

    A review is a sequence of three-word phrases and a closing verdict; a third are short, the others long. An
    `opinion_rate` of the phrases are opinions ("plot was moving"), a `negation_rate` of them put as the negation of the
    opposite ("plot wasn't dull"); the rest tell of characters ("while nobody waits"), a `name_rate` of them by one of
    300,000 Zipf-distributed surnames. Each opinion agrees with the label with a probability drawn per review from
    `clarity`; the closing verdict ("in all a triumph") agrees with it `verdict_reliability` of the time.

    Why the models differ: the verdict stands at the end, and reading it takes no memory. The opinions are worth more,
    but have to be told from the asides and added up over as many as 195 words: gated cells can keep a sum while they
    pass over what does not matter (Hochreiter & Schmidhuber 1997); a vanilla RNN rewrites its whole state at every
    word. Negation is invisible to a bag of words.
    """
    n_reviews, (least, most) = config.n_reviews, config.phrases
    labels = rng.permutation(np.arange(n_reviews) % 2)
    is_short = rng.random(n_reviews) < 1 / 3  # without these, an LSTM took many epochs to find what an opinion is
    short, long = rng.integers(least, least + 9, n_reviews), rng.integers(most - 10, most + 1, n_reviews)
    n_phrases = np.where(is_short, short, long)
    owner, n = np.repeat(np.arange(n_reviews), n_phrases), n_phrases.sum()  # (n,): the review of each phrase
    clarity = rng.uniform(*config.clarity, n_reviews)
    favourable = (rng.random(n) < clarity[owner]) == (labels[owner] == 1)
    is_opinion = rng.random(n) < config.opinion_rate
    # an opinion for each phrase, some put as the negation of the opposite
    negated = rng.random(n) < config.negation_rate
    adjectives = np.where(favourable != negated, rng.choice(POSITIVE, n), rng.choice(NEGATIVE, n))
    verbs = np.where(negated, rng.choice(NEGATIONS, n), rng.choice(AFFIRMATIONS, n))
    opinions = rng.choice(ASPECTS, n).astype(object) + " " + verbs + " " + adjectives
    # an aside for each phrase, which says nothing about the film's worth
    named, shape = rng.random(n) < config.name_rate, (len(NAME_TAILS), len(NAME_MIDDLES), len(NAME_HEADS))
    rank = (math.prod(shape) ** rng.random(n)).astype(int) - 1  # a log-uniform rank is Zipf-distributed
    parts = np.unravel_index(rank * 7919 % math.prod(shape), shape)  # a prime: neighbours in rank do not look alike
    surnames = [NAME_HEADS[head] + NAME_MIDDLES[middle] + NAME_TAILS[tail] for tail, middle, head in zip(*parts)]
    who = np.where(named, surnames, rng.choice(CHARACTERS, n))
    asides = rng.choice(CONJUNCTIONS, n).astype(object) + " " + who + " " + rng.choice(VERBS, n)
    # each review's phrases and its verdict, in sentences of a few phrases: the tokenizer takes their ends out again
    praised = (rng.random(n_reviews) < config.verdict_reliability) == (labels == 1)
    verdicts = np.where(praised, rng.choice(TRIUMPHS, n_reviews), rng.choice(FAILURES, n_reviews)).astype(object)
    phrases = np.insert(np.where(is_opinion, opinions, asides), n_phrases.cumsum(), "in all a " + verdicts)
    marks = np.where(rng.random(len(phrases)) < 0.4, ". ", ", ")
    marks[(n_phrases + 1).cumsum() - 1] = ".\n"
    texts = re.sub(r"(?m)(^|\. )\w", lambda start: start[0].upper(), "".join(phrases + marks)).splitlines()
    # Bayes' rule for a reader who gets every opinion right: favourable opinions and the verdict are all that depends
    # on the label, so no classifier can be right more often, on average, than the sign of these log odds
    for_it = np.bincount(owner[is_opinion & favourable], minlength=n_reviews)[:, None]
    against = np.bincount(owner[is_opinion & ~favourable], minlength=n_reviews)[:, None]
    clarity = np.linspace(*config.clarity, 201)  # uniform prior, integrated on a grid
    positive = np.mean(clarity**for_it * (1 - clarity) ** against, axis=1)
    negative = np.mean(clarity**against * (1 - clarity) ** for_it, axis=1)
    verdict = math.log(config.verdict_reliability / (1 - config.verdict_reliability))
    log_odds = np.log(positive / negative) + np.where(praised, verdict, -verdict)
    return Reviews(texts, labels, log_odds=log_odds, praised=praised)


# --- corpus ---------------------------------------------------------------------------

AREAS = {  # area: subjects / verbs / objects
    "sea": "sailor captain diver fisher pilot / steers anchors boards paints / boat ship net harbour sail",
    "kitchen": "cook baker waiter guest grocer / tastes stirs serves burns / soup bread sauce cake roast",
    "farm": "farmer shepherd miller gardener groom / feeds ploughs mows fences / field barn cow orchard meadow",
    "music": "singer drummer pianist composer dancer / rehearses hums records plays / song waltz march ballad tune",
    "court": "judge lawyer clerk bailiff juror / signs reads disputes settles / case law letter claim verdict",
    "school": "teacher pupil tutor librarian scholar / explains recites marks learns / lesson poem map essay riddle",
}
PREPOSITIONS, ADVERBS = "near behind beside with without".split(), "often rarely always quietly gladly".split()
TAILS = "today again twice alone outside".split()
VERB_SHARES = (0.3, 0.4, 1.0)  # probability that the verb comes next, after 0, 1 and 2 phrases


def even(words: Collection[str], share: float = 1.0) -> dict[str, float]:
    """`share` spread evenly over `words`."""
    return dict.fromkeys(words, share / len(words))


def peaked(words: Sequence[str], favourite: int, rate: float, share: float = 1.0) -> dict[str, float]:
    """`share` spread over `words`: `rate` of it to the favourite, the rest evenly."""
    others = even([word for i, word in enumerate(words) if i != favourite], share * (1 - rate))
    return {words[favourite]: share * rate} | others


def generate_corpus(config: PredictorConfig, rng: np.random.Generator) -> pd.DataFrame:
    """Sentences of a small grammar in which verb and object depend on a subject some words back.

    "the bakers behind the singer often burn the bread outside ." Subjects belong to six areas. The verb is one of its
    subject's area, agrees with it in number, and is the subject's favourite `favourite_rate` of the time; the object
    likewise. Between subject and verb stand up to two phrases, each with a noun of another area, so that verbs come up
    to seven and objects up to nine words after their cue. Whoever keeps the subject across the intruding nouns predicts
    verb and object; whoever goes by the last few words, as n-grams must, takes the intruder for the subject.

    A row per word: `words`, `hits` (the likeliest word, given the full state, is the one drawn), `entropy` (nats, given
    the full state), and of an object, or of a verb where no phrase could have come instead, `role` and `distance`, the
    words back to its subject.
    """
    rows, subjects = [], {}
    for area, words in AREAS.items():  # nouns and verbs in singular and plural
        nouns, verbs, objects = (part.split() for part in words.split("/"))
        for ending, own in (("", verbs), ("s", [verb.removesuffix("s") for verb in verbs])):
            subjects |= {noun + ending: (area, own, objects, i) for i, noun in enumerate(nouns)}

    def draw(options: Mapping[str, float]) -> str:
        options = {word: probability for word, probability in options.items() if probability}
        words, probabilities = list(options), np.array([*options.values()])
        word, entropy = words[rng.choice(len(words), p=probabilities)], -(probabilities * np.log(probabilities)).sum()
        hit = word == words[probabilities.argmax()]
        rows.append({"words": word, "hits": hit, "entropy": entropy, "role": "", "distance": 0})
        return word

    while len(rows) < config.n_words:
        draw({"the": 1.0})
        area, verbs, objects, rank = subjects[draw(even(subjects))]
        subject, word, phrases = len(rows) - 1, "", 0
        intruders = even([noun for noun, (other, *_) in subjects.items() if other != area])
        while word not in verbs:  # up to two phrases or one adverb before it come between subject and verb
            verb_share = 1.0 if word in ADVERBS else VERB_SHARES[phrases]
            options = peaked(verbs, rank % len(verbs), config.favourite_rate, verb_share)
            options |= even(PREPOSITIONS, 0.85 * (1 - verb_share)) | even(ADVERBS, 0.15 * (1 - verb_share))
            word = draw(options)
            if word in PREPOSITIONS:
                draw({"the": 1.0})
                draw(intruders)
                phrases += 1
        if verb_share == 1:  # else the likeliest word may be a preposition, whatever is remembered
            rows[-1] |= {"role": "verb", "distance": len(rows) - 1 - subject}
        draw({"the": 1.0})
        draw(peaked(objects, rank, config.favourite_rate))
        rows[-1] |= {"role": "object", "distance": len(rows) - 1 - subject}
        if draw({".": 0.6} | even(TAILS, 0.4)) != ".":
            draw({".": 1.0})
    return pd.DataFrame(rows)


# --- series ---------------------------------------------------------------------------


def generate_series(config: ForecasterConfig, rng: np.random.Generator) -> np.ndarray:
    """A sine whose period switches at random among a few, its phase continuous, plus white noise: (N,).

    Why the task asks for more than a linear filter: a linear autoregression has one set of weights for all periods
    and cannot tell which one holds now. The best forecast weighs the periods by how well they explain the window,
    and that is not linear in the window. The phase moves on a grid of lcm(periods) positions, so that the best
    forecast can be computed exactly: `best_forecasts`.
    """
    k, positions = len(config.periods), math.lcm(*config.periods)
    moves = np.where(rng.random(config.n_steps) < config.switch_rate, rng.integers(1, k, config.n_steps), 0)
    which = (rng.integers(k) + moves.cumsum()) % k
    phase = (rng.integers(positions) + (positions // np.array(config.periods))[which].cumsum()) % positions
    return config.amplitude * np.sin(2 * np.pi * phase / positions) + rng.normal(0, config.noise, config.n_steps)


def best_forecasts(windows: np.ndarray, config: ForecasterConfig) -> np.ndarray:
    """The mean of the next value given each window (N, T) of a generated series, for whoever knows the generator: (N,).

    The forward filter of a hidden Markov model (Rabiner 1989) over (period, phase), uniform at the window's start.
    No forecast from the same window has a lower expected squared error (of the absolute one, the median has the least).
    """
    k, positions = len(config.periods), math.lcm(*config.periods)
    wave = config.amplitude * np.sin(2 * np.pi * np.arange(positions) / positions)
    belief = np.ones((len(windows), k, positions))
    for values in windows.T:
        belief *= np.exp(-0.5 * ((values[:, None] - wave) / config.noise) ** 2)[:, None]  # what is seen
        belief /= belief.sum(axis=(1, 2), keepdims=True)
        others = belief.sum(axis=1, keepdims=True) - belief
        belief = (1 - config.switch_rate) * belief + config.switch_rate * others / (k - 1)  # the period may switch
        for i, period in enumerate(config.periods):
            belief[:, i] = np.roll(belief[:, i], positions // period, axis=1)
    return belief.sum(axis=1) @ wave


# ======================================================================================
# Your own data
# ======================================================================================

TEXT_COLUMNS = ("text", "review", "sentence", "comment")  # the usual names, in lower case
LABEL_COLUMNS = ("label", "sentiment", "class", "rating", "stars")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unpacked if its name ends in .gz; raises InputError."""
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if str(path).lower().endswith(".gz") else content
        if content.startswith(b"PK\3\4"):
            raise InputError(f"{path}: an .xlsx or other packed file, not text; save the sheet as CSV (UTF-8)")
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start:,} of its text); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    require(text.strip(), f"{path}: the file is empty")
    return text


def read_source(source: str) -> str:
    """The input of --predict: standard input for "-", the text of a file, or else the words themselves; InputError."""
    if source == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    is_file = os.path.exists(source)  # noqa: PTH110 (Path's raises if a text is too long for a name)
    require(is_file or not re.search(r"(?i)\.(txt|[ct]sv|xlsx?|gz)$", source), f"{source}: no such file")
    return read_text(source) if is_file else source


def warn(doubts: Iterable[str]) -> None:
    """Say, a line each, what the user should know before relying on the numbers."""
    for doubt in doubts:
        print(f"note: {doubt}", file=sys.stderr)


def user_file(path: str, columns: Sequence[str] = ()) -> UserFile:
    """The file as a configuration names it, with the columns that the user named; raises InputError."""
    absent, regular = not os.path.exists(path or "."), os.path.isfile(path)  # noqa: PTH110, PTH113 (as in `read_source`)
    require(absent or regular, f"{path!r}: not a regular file; a run needs one that can be read again")
    return UserFile(path, hashlib.sha256(read_text(path).encode()).hexdigest(), tuple(columns))


def some(values: Iterable) -> str:
    """At most ten of the values, for a message."""
    values = [*map(str, values)]
    return ", ".join(values[:10]) + f", ... ({len(values)} in all)" * (len(values) > 10)


def read_table(text: str) -> tuple[pd.DataFrame, str]:
    """A CSV text's cells as strings, the header among them, by row of the file; its separator in words; InputError."""
    blank = text[: len(text) - len(text.lstrip("\r\n"))].count("\n")  # lines before the first
    text = re.sub(r"(\r?\n[,;\t ]*)+\Z", "", text.lstrip("\r\n"))  # spreadsheets add rows of nothing
    names = {";": "semicolons", "\t": "tabs", ",": "commas"}  # of a tie the first: a comma may belong to a number
    separator = max(names, key=text.partition("\n")[0].count)  # whichever the first line holds most of
    as_it_stands = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False}  # a gap is blank
    try:
        table = pd.read_csv(io.StringIO(text), sep=separator, **as_it_stands)
    except ValueError as error:
        raise InputError(f"not a table of {names[separator]} ({' '.join(str(error).split())})") from error
    table.index += 1 + blank
    return table.apply(lambda cells: cells.str.strip()), names[separator]


def find_column(header: Sequence[str], named: str, usual: Sequence[str], option: str) -> int:
    """The place of the column that the user named, or else of the one with a usual name; raises InputError."""
    found = [i for i, name in enumerate(header) if (name == named if named else name.lower() in usual)]
    none = f"there is no column {named or usual[0]!r}; its columns are {some(header)}"
    many = f"{len(found)} columns, {some(header[i] for i in found)}, may be meant"
    require(len(found) == 1, f"{many if found else none}; name one with --{option}-column")
    return found[0]


def read_reviews(text: str, text_column: str = "", label_column: str = "") -> Reviews:
    """The reviews of a CSV text with a column of texts and one of two or more labels; raises InputError.

    Of two labels the second counts as positive, in alphabetical or numerical order: 1 after 0, pos after neg.
    """
    table, _ = read_table(text)
    header, rows = table.iloc[0].tolist(), table.iloc[1:]
    rows = rows[(rows != "").any(axis=1)]  # without blank lines
    texts = rows[find_column(header, text_column, TEXT_COLUMNS, "text")]
    labels = rows[place := find_column(header, label_column, LABEL_COLUMNS, "label")]
    for row in labels.index[labels == ""]:  # the first will do
        raise InputError(f"row {row} holds no label")
    numbers = pd.to_numeric(labels, errors="coerce")
    if numbers.notna().all():  # 1.0 is 1
        labels = numbers.map("{:.15g}".format)
    elif labels.str.lower().nunique() < labels.nunique():  # Positive is positive
        labels = labels.str.lower()
    names = sorted(set(labels), key=float if numbers.notna().all() else str)
    found = f"the column {header[place]!r} holds {len(names)} different values ({some(map(repr, names))})"
    require(2 <= len(names) <= 20, f"{found}; two to 20 labels are needed")
    return Reviews(texts.tolist(), labels.map(names.index).to_numpy(dtype=int), names)


def read_series(text: str, column: str = "") -> tuple[np.ndarray, list[str]]:
    """The values (N,) of one column of a CSV text, the only numeric one if none is named, and doubts; InputError.

    The first row is a header if it holds no number, or the column's name and another word. Without a header the
    columns are called 1, 2, 3. A column is numeric if most of its cells are; where semicolons or tabs separate the
    columns, the decimal sign may be a comma. Doubts are sentences about dates that fall and about a row of totals.
    """
    table, separator = read_table(text)
    points = table if separator == "commas" else table.replace(r"^([-+]?\d*),(\d+)$", r"\1.\2", regex=True)
    numbers, first = points.apply(pd.to_numeric, errors="coerce"), table.iloc[0].tolist()
    words = numbers.iloc[0].isna()
    named = words.all() or (words.any() and (not first[0] or column in filter(None, first)))
    header = first if named else [str(i) for i in range(1, len(first) + 1)]
    table, numbers = table.iloc[int(named) :], numbers.iloc[int(named) :]
    numeric = numbers.columns[numbers.notna().mean() > 0.5]
    found = f"{len(numeric) or 'no'} numeric column{'s' * (len(numeric) > 1)} among {some(header)}"
    require(column or len(numeric) == 1, f"{found} (separated by {separator}); name one with --series-column")
    place = find_column(header, column, (), "series") if column else numeric[0]
    require(len(table), "no row below the header")
    doubts, values, cells = [], numbers[place], table[place]
    commas = cells[cells.str.contains(",")]
    if separator != "commas" and len(commas) and commas.str.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}").all():
        doubts.append(f"{commas.iloc[0]!r} is read with a decimal comma; if it marks thousands, take it out")
    for times in (table[i] for i in table if i != place):
        if times.str.contains(r"\b(?:19|20)\d\d\b|\d[-/.]\d+[-/.]\d").mean() < 0.9:  # a year or a whole date
            continue
        with warnings.catch_warnings(action="ignore"):  # 13/02 is what it must be
            both = [pd.to_datetime(times, errors="coerce", utc=True, dayfirst=how) for how in (False, True)]
        falls = [dates.index[dates.diff() < pd.Timedelta(0)] for dates in both if dates.notna().mean() > 0.9]
        if falls and len(fewest := min(falls, key=len)):
            doubts.append(f"the dates fall at row {fewest[0]}; a series must be in order of time")
    last = [cell for cell in table.iloc[-1] if re.match(r"(grand )?(total|sum|mean|average)\b", cell.lower())]
    doubts += [f"the last row says {cell!r}; leave it out if it is no value of the series" for cell in last]
    for row, cell in cells[~np.isfinite(values)].items():  # the first will do
        missing = cell.lower() in ("", "na", "nan", "null", "none")
        found = "no value" if missing else f"{cell[:40]!r}, which is not a finite number"
        raise InputError(f"row {row} holds {found} in the column {header[place]!r}")
    return values.to_numpy(dtype=float, copy=True), doubts


# ======================================================================================
# Baselines
# ======================================================================================

MAJORITY = "majority class"


@dataclass(frozen=True)
class Reference:
    """A baseline or a ceiling: what it scores on each test example (N,), in the units of the task's loss and score."""

    name: str
    kind: str  # "baseline", or "ceiling": the best that is possible, of an error the least
    loss: np.ndarray
    score: np.ndarray


def label_reference(name: str, kind: str, logits: np.ndarray, labels: np.ndarray) -> Reference:
    """The reference that predicts `labels` (N,) with `logits` (N, K): cross-entropy and hits."""
    loss = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return Reference(name, kind, loss, (logits.argmax(axis=1) == labels).astype(float))


def review_baselines(train: ReviewDataset, test: ReviewDataset, vocab_size: int) -> list[Reference]:
    """The majority class, and multinomial add-one naive Bayes (Manning, Raghavan & Schuetze 2008, ch. 13)."""
    ids, tested = train.inputs.cpu().numpy(), test.inputs.cpu().numpy()
    labels, truth = (dataset.targets[:, 0].long().cpu().numpy() for dataset in (train, test))
    prior = np.log(np.bincount(labels, minlength=max(2, truth.max() + 1)) + 1)  # of each label
    counts = [np.bincount(ids[labels == label].ravel(), minlength=vocab_size)[1:] + 1.0 for label in range(len(prior))]
    weights = [np.append(0.0, np.log(count / count.sum())) for count in counts]  # padding weighs nothing
    evidence = np.stack([weight[tested].sum(axis=1) for weight in weights], axis=1)  # (N, K)
    majority = label_reference(MAJORITY, "baseline", np.tile(prior, (len(truth), 1)), truth)
    return [majority, label_reference("naive Bayes", "baseline", prior + evidence, truth)]


class NGram:
    """Interpolated n-gram model that backs off by Witten-Bell smoothing (Chen & Goodman 1999, eq. 15).

    Contexts are tuples of the last n words, n below `order`. Only the `contexts` that will be asked about, and the
    shorter ones in them, are counted: all those of a long text would fill the memory.
    """

    def __init__(self, ids: Sequence[int], order: int, vocab_size: int, contexts: Iterable[tuple]):
        self.vocab_size, self.likeliest = vocab_size, {}
        self.followers = {context[i:]: Counter() for context in contexts for i in range(len(context) + 1)}
        for n in range(order):
            for *context, word in zip(*(ids[i:] for i in range(n + 1))):
                if tuple(context) in self.followers:
                    self.followers[tuple(context)][word] += 1
        for context in sorted(self.followers, key=len):
            # candidates: what was seen after it, and the likeliest after a shorter one
            words = {*self.followers[context], *([self.likeliest[context[1:]]] if context else [])} - {1}  # never <unk>
            self.likeliest[context] = max(words, key=lambda word: (self.probability(context, word), -word))

    def probability(self, context: tuple, word: int) -> float:
        """P(word | context), which mixes every order down to the uniform distribution."""
        lower = self.probability(context[1:], word) if context else 1 / self.vocab_size
        counts = self.followers[context]
        return (counts[word] + len(counts) * lower) / (counts.total() + len(counts)) if counts else lower


def corpus_baselines(train: Sequence[int], test: CorpusDataset, vocab_size: int) -> list[Reference]:
    """Unigram, bigram and trigram on the windows of `test`."""
    windows, words, found = [tuple(w) for w in test.inputs[:, -2:].tolist()], test.targets.tolist(), []
    model = NGram(train, 3, vocab_size, set(windows))
    for n, name in enumerate(("unigram", "bigram", "trigram")):
        asked = [(window[len(window) - n :], word) for window, word in zip(windows, words)]
        loss = np.array([-math.log(model.probability(*each)) for each in asked])
        hits = np.array([float(model.likeliest[context] == word) for context, word in asked])
        found.append(Reference(name, "baseline", loss, hits))
    return found


def season_of(every: SeriesDataset) -> int | None:
    """The first lag within the window at which the training part's autocorrelation has a high peak; None without any.

    Values count from their window's mean, so that a trend hides no season. A peak is higher than both neighbours and
    rises by 0.2 above what came before: a smooth or a random series has none. High: within 0.05 of the highest.
    """
    rows, targets = every.inputs[:, :, 0].cpu().numpy(), every.targets[:, 0].cpu().numpy()
    means = rows.mean(axis=1)
    if np.ptp(targets - means) < 1e-5 * np.abs(targets - means).max():  # a straight line, but for rounding
        return None
    pairs = [(rows[:, -lag] - means, targets - means) for lag in range(1, rows.shape[1] + 1)]
    pairs += [(rows[:-1, 0] - means[1:], targets[1:] - means[1:])]  # one lag more, to compare the last with
    with np.errstate(divide="ignore", invalid="ignore"):  # a stretch may be constant
        r = np.nan_to_num([np.corrcoef(*pair)[0, 1] for pair in pairs], nan=-1.0)
    peaks = [i for i in range(1, len(r) - 1) if r[i] > max(r[i - 1], r[i + 1], r[:i].min() + 0.2)]
    return next((1 + i for i in peaks if r[i] > r[peaks].max() - 0.05), None)


def series_baselines(every: SeriesDataset, test: SeriesDataset) -> list[Reference]:
    """Persistence, the value a season ago, and least squares with an intercept on about `MOST_WINDOWS` windows."""
    season = season_of(every)
    step, windows = math.ceil(len(every) / MOST_WINDOWS), test.inputs[:, :, 0].cpu()
    design = F.pad(every.inputs[:, :, 0].cpu()[::step].double(), (0, 1), value=1.0)  # (N, T) -> (N, T + 1)
    targets = every.targets.cpu()[::step].double()
    # in torch, on one thread: NumPy's last digits depend on the number of its threads; gelsd takes any rank
    weights = torch.linalg.lstsq(design, targets, driver="gelsd").solution[:, 0]
    forecasts = {"persistence": windows[:, -1]} | ({"seasonal naive": windows[:, -season]} if season else {})
    forecasts["linear autoregression"] = windows.double() @ weights[:-1] + weights[-1]
    errors = {name: (forecast - test.targets[:, 0].cpu()).numpy() for name, forecast in forecasts.items()}
    return [Reference(name, "baseline", error**2, np.abs(error)) for name, error in errors.items()]


# ======================================================================================
# Models
# ======================================================================================


class Recurrent(nn.Module):
    """A stock recurrent layer that returns the state of its top layer after the last real step.

    Recurrent weights start orthogonal, one block per gate (Saxe et al. 2014), input weights Glorot-uniform, biases at
    0. With a `keep_bias` the gates start out keeping the state, in both gated cells alike (Tallec & Ollivier 2018):
    an LSTM's forget gate has it and its input gate the negative; a GRU's update gate, which does the work of both,
    has it. A vanilla RNN has no such gate.
    """

    def __init__(self, layer: type, input_dim: int, hidden_dim: int, n_layers: int, dropout: float, keep_bias: float):
        super().__init__()
        self.rnn = layer(input_dim, hidden_dim, n_layers, batch_first=True, dropout=dropout if n_layers > 1 else 0.0)
        initialise = {"weight_hh": nn.init.orthogonal_, "weight_ih": nn.init.xavier_uniform_}
        for name, weight in self.rnn.named_parameters():
            gates = weight.detach().split(hidden_dim)  # one per gate, views: to fill them is to fill the weight
            for gate in gates:
                initialise.get(name[:9], nn.init.zeros_)(gate)
            if layer is not nn.RNN and name.startswith("bias_ih"):
                gates[1].fill_(keep_bias)  # PyTorch's order: LSTM input, forget, cell, output; GRU reset, update, new
                if layer is nn.LSTM:
                    gates[0].fill_(-keep_bias)

    def forward(self, inputs: Tensor, last: Tensor | None = None) -> Tensor:
        """`last` (B,): index of each sequence's last real step; without it, the last step of all."""
        states, _ = self.rnn(inputs)  # (B, T, F) -> (B, T, H)
        if last is None:
            return states[:, -1]  # (B, H)
        return states[torch.arange(len(states), device=states.device), last]  # (B, H)


class SequenceModel(nn.Module):
    """What all models share: a subclass names its recurrent `layer`; its `describe` is what --predict prints."""

    layer: type[nn.RNNBase] | None = None
    sample: str | Sequence[float] = "the"  # that can be predicted from
    preprocessing: Mapping = {}  # of a trained model: turns a user's words or values into its input, its output back
    metrics: Mapping[str, float] = {}  # of a trained model, on the test split

    def __init_subclass__(cls, layer: type[nn.RNNBase] | None = None) -> None:
        cls.layer = layer or cls.layer

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The words that a text model knows, with their ids."""
        words, size = self.preprocessing["vocabulary"], self.embedding.num_embeddings
        require(len(words) == size >= 3, f"{len(words)} words for {size} embeddings")
        require(all(isinstance(word, str) for word in words), "a word that is no text")
        return {word: i for i, word in enumerate(words)}


def label_probabilities(output: Tensor) -> Tensor:
    """The probability of each label, from a classifier's output: (B, 1), that of the second of two, or (B, K)."""
    return torch.cat([1 - output, output], dim=1) if output.shape[1] == 1 else output


class Classifier(SequenceModel):
    """Embedding -> recurrent layer -> dropout -> dense -> sigmoid, or softmax if `output_dim` is above 1.

    Ids (B, T) long, padded on the right with 0 -> probabilities (B, output_dim), read after the last real word. One
    output is the probability of the second of two labels; of more labels each has its own.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, hidden_dim: int, output_dim: int, n_layers: int = 1, dropout: float = 0.2
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        with torch.no_grad():  # small, so that rare words, which training hardly moves, say little
            self.embedding.weight.normal_(std=0.1)[0] = 0.0
        # measured: with 3 both gated cells learn to read 200 words; on the short windows of the other tasks 0 is better
        self.recurrent = Recurrent(self.layer, embed_dim, hidden_dim, n_layers, dropout, keep_bias=3.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(hidden_dim, output_dim), nn.Sigmoid() if output_dim == 1 else nn.Softmax(1))

    def forward(self, ids: Tensor) -> Tensor:
        # padding comes after the last word, so its states are never read
        last = ((ids != 0) * torch.arange(ids.shape[1], device=ids.device)).amax(dim=1)  # (B, T) -> (B,)
        state = self.recurrent(self.embedding(ids), last)  # (B, T) -> (B, T, E) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, output_dim)

    @torch.no_grad()
    def predict(self, texts: str | Sequence[str]) -> list[tuple[str | None, float]]:
        """The likeliest label of each text and its probability; without any word, None and nan.

        Words that training did not know count as one and the same unknown word. Of a text longer than the
        reviews of training the last `max_words` words are read, as in training.
        """
        texts = [texts] if isinstance(texts, str) else texts
        reviews = [tokenize(text, WORDS)[-self.preprocessing["max_words"] :] for text in texts]
        predictions = [(None, math.nan)] * len(reviews)
        with_words = sorted((i for i, review in enumerate(reviews) if review), key=lambda i: len(reviews[i]))
        for start in range(0, len(with_words), 256):
            rows = with_words[start : start + 256]
            ids = ReviewDataset([encode(reviews[i], self.vocabulary) for i in rows], [0] * len(rows)).inputs
            for i, p in zip(rows, label_probabilities(self.eval()(ids)).tolist()):
                predictions[i] = max(zip(self.preprocessing["labels"], p, strict=True), key=lambda pair: pair[1])
        return predictions

    def describe(self, source: str, options: argparse.Namespace) -> str:
        """Label and probability of each line; of a CSV file, a CSV with them beside each text."""
        if re.search(r"(?i)\.[ct]sv(\.gz)?$", source):
            table, _ = read_table(read_source(source))
            texts = table.iloc[1:, find_column(table.iloc[0].tolist(), options.text_column, TEXT_COLUMNS, "text")]
            found = pd.DataFrame(self.predict(texts.tolist()), columns=["label", "probability"]).round(4)
            return found.assign(text=texts.tolist()).to_csv(index=False, na_rep="-").rstrip("\n")
        predictions = self.predict(list(io.StringIO(read_source(source))) or [""])
        return "\n".join(f"{'-' if label is None else label}\t{probability:.4f}" for label, probability in predictions)


class Predictor(SequenceModel):
    """Embedding -> recurrent layer -> dropout -> dense: ids (B, T) long -> logits (B, V), as the loss takes them."""

    def __init__(self, vocab_size: int, embed_dim: int, hidden_dim: int, n_layers: int = 1, dropout: float = 0.2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.recurrent = Recurrent(self.layer, embed_dim, hidden_dim, n_layers, dropout, keep_bias=0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        state = self.recurrent(self.embedding(ids))  # (B, T) -> (B, T, E) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, V)

    @torch.no_grad()
    def next_logits(self, words: Sequence[str]) -> Tensor:
        """Logits (V,) of the word that follows `words`, of which the last `window` are read; without, of a sentence."""
        ids = encode(words[-self.preprocessing["window"] :] or ["."], self.vocabulary)
        logits = self.eval()(torch.tensor([ids]))[0]
        logits[:2] = -math.inf  # <pad> and <unk> are no words
        return logits

    def predict(self, text: str, n: int = 5) -> list[tuple[str, float]]:
        """The `n` likeliest next words with their probabilities among all known words."""
        probabilities = self.next_logits(tokenize(text, WORDS_AND_ENDS)).softmax(dim=0)
        likeliest, known = probabilities.topk(min(n, len(self.vocabulary) - 2)), list(self.vocabulary)
        return [(known[i], p) for p, i in zip(*(values.tolist() for values in likeliest))]

    def continue_text(self, text: str, length: int = 20, temperature: float = 1.0, seed: int = 42) -> str:
        """The next `length` words, each drawn from the model's probabilities to the power 1 / `temperature`."""
        words, known = tokenize(text, WORDS_AND_ENDS), list(self.vocabulary)
        start, generator = len(words), torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self.next_logits(words)
            scaled = (logits - logits.max()) / max(temperature, 1e-30)  # at 0 all but the likeliest vanish
            words.append(known[torch.multinomial(scaled.softmax(dim=0), 1, generator=generator).item()])
        return re.sub(r" ([.!?])", r"\1", " ".join(words[start:]))

    def describe(self, source: str, options: argparse.Namespace) -> str:
        text = read_source(source)
        likeliest = [f"{word}\t{probability:.4f}" for word, probability in self.predict(text)]
        return "\n".join([*likeliest, "", self.continue_text(text, options.length, options.temperature, options.seed)])


class Forecaster(SequenceModel):
    """Recurrent layers -> dropout -> dense -> ReLU -> dense: values (B, T, input_dim) -> (B, output_dim).

    The values are those of a scaled window without its mean, the output counts from the window's last. `roll_forward`
    takes scaled windows, `predict` a series as it is.
    """

    sample = (0.0, 0.0)

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, n_layers: int = 2, dropout: float = 0.2):
        super().__init__()
        self.recurrent = Recurrent(self.layer, input_dim, hidden_dim, n_layers, dropout, keep_bias=0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim))

    def forward(self, values: Tensor) -> Tensor:
        state = self.recurrent(values)  # (B, T, F) -> (B, H)
        return self.head(self.dropout(state))  # (B, H) -> (B, output_dim)

    @torch.no_grad()
    def roll_forward(self, windows: Tensor, steps: int) -> Tensor:
        """Forecasts (B, steps) from windows (B, T, 1) in which each forecast is fed back as the next value."""
        self.eval()
        forecasts = []
        for _ in range(steps):
            forecasts.append(windows[:, -1] + self(centred(windows)))  # (B, 1)
            windows = torch.cat([windows[:, 1:], forecasts[-1][:, None]], dim=1)
        return torch.cat(forecasts, dim=1)

    def predict(self, values: Sequence[float], length: int = 1) -> np.ndarray:
        """The next `length` values of a series (N,), in its own units; each forecast is fed back for the next.

        Of the series the last `window` values are read; a shorter one is read whole, which is less than the
        model was trained on. Raises InputError if there is no value, or one or a forecast that is not finite.
        """
        with suppress(TypeError, ValueError, OverflowError):
            values = np.array(values, dtype=float)
        usable = isinstance(values, np.ndarray) and values.ndim == 1 and len(values) and np.isfinite(values).all()
        require(usable, "a series must hold one or more finite values, in one dimension")
        scaler, window = self.preprocessing["scaler"], self.preprocessing["window"]
        mean, std, (low, high) = (scaler[name] for name in ("mean", "std", "range"))
        require(std > 0 and low <= high, f"a scaler of {scaler}")
        scaled = torch.as_tensor((values[-window:] - mean) / std, dtype=torch.float32)
        forecasts = self.roll_forward(scaled[None, :, None], length)[0].double().numpy() * std + mean
        finite = np.isfinite(forecasts).all()
        require(finite, "a forecast is not finite: the values lie too far from those of training")
        return forecasts

    def describe(self, source: str, options: argparse.Namespace) -> str:
        values, doubts = read_series(read_source(source), options.series_column)
        low, high = self.preprocessing["scaler"]["range"]
        read = values[-self.preprocessing["window"] :]
        if read.min() < low - (high - low) / 2 or read.max() > high + (high - low) / 2:
            beyond = f"the last values lie between {read.min():g} and {read.max():g}"
            doubts.append(f"{beyond}, far from those of training ({low:g} to {high:g}): is it a series of that kind?")
        warn(doubts)
        forecasts = enumerate(self.predict(values, options.length), start=1)
        return "\n".join(["step,value", *(f"{step},{value}" for step, value in forecasts)])


class RNNClassifier(Classifier, layer=nn.RNN):
    """Text classifier on a vanilla RNN with tanh units (Elman 1990)."""


class LSTMClassifier(Classifier, layer=nn.LSTM):
    """Text classifier on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""


class GRUClassifier(Classifier, layer=nn.GRU):
    """Text classifier on gated recurrent units (Cho et al. 2014)."""


class RNNPredictor(Predictor, layer=nn.RNN):
    """Next-word predictor on a vanilla RNN with tanh units (Elman 1990)."""


class LSTMPredictor(Predictor, layer=nn.LSTM):
    """Next-word predictor on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""


class GRUPredictor(Predictor, layer=nn.GRU):
    """Next-word predictor on gated recurrent units (Cho et al. 2014)."""


class RNNForecaster(Forecaster, layer=nn.RNN):
    """Forecaster on a vanilla RNN with tanh units (Elman 1990)."""


class LSTMForecaster(Forecaster, layer=nn.LSTM):
    """Forecaster on long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""


class GRUForecaster(Forecaster, layer=nn.GRU):
    """Forecaster on gated recurrent units (Cho et al. 2014)."""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each part of the model that has any: embedding, recurrent, head."""
    return {name: n for name, part in model.named_children() if (n := sum(p.numel() for p in part.parameters()))}


@torch.no_grad()
def describe_layers(model: nn.Module, inputs: Tensor) -> list[dict]:
    """The layers in the order in which `inputs` pass them: kind, settings, output shape without B, parameters."""
    layers, shown = [], {part for part in model.modules() if isinstance(part, Recurrent) or not list(part.children())}

    def describe(module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        if module in shown:  # the hook hears of all modules of the process
            shape = list((output[0] if isinstance(output, tuple) else output).shape[1:])
            layer = {"kind": type(module).__name__, "settings": module.extra_repr(), "shape": shape}
            layers.append(layer | {"parameters": sum(p.numel() for p in module.parameters(recurse=False))})

    with nn.modules.module.register_module_forward_hook(describe):
        model.eval()(inputs)
    return layers


# ======================================================================================
# Tasks
# ======================================================================================

CONTRADICTS, AGREES = "ending contradicts the label", "ending agrees with the label"  # subsets of the test examples
FAR = "cue 5 or more words back"
FULL_STATE = "full state"  # of the grammar: the ceiling of the next word


@dataclass(frozen=True)
class TaskData:
    """The data of one seed: three disjoint splits and what is known about them."""

    train: SequenceDataset
    validation: SequenceDataset
    test: SequenceDataset | None  # not there in a tuning run
    sizes: Mapping[str, int]  # constructor keywords of the models that the data decide
    preprocessing: Mapping[str, object]  # what turns words or values into inputs and back: goes into the checkpoint
    facts: Mapping[str, int | float]  # for the reader
    baselines: Callable[[], Sequence[Reference]]  # called once per seed, not once per model
    ceiling: Sequence[Reference]  # one, or none for a user's data
    predictions: Callable[[Mapping[str, np.ndarray]], pd.DataFrame]  # a row per test example, from `Task.answers`
    samples: Sequence[str]  # three training examples
    doubts: Sequence[str] = ()  # sentences on what may mislead
    subsets: Mapping[str, np.ndarray] = field(default_factory=dict)  # name: mask (N,) of test examples
    unit: float = 1.0  # one unit of the targets, in the user's units
    offset: float = 0.0  # a target of zero, in the user's units


def build_reviews(config: ClassifierConfig, seed: int, device: torch.device = CPU) -> TaskData:
    """Reviews without repetitions, split, encoded with the training split's vocabulary; raises InputError.

    Of a review longer than `max_words` the end is kept: that is where reviewers conclude, and what a recurrent
    layer, which reads it last, remembers best. A file's reviews are shuffled and then dealt out so that each split
    has its share of every label.
    """
    rng, file = random_generator(seed, "reviews"), config.file
    reviews = read_reviews(read_text(file.path), *file.columns) if file else generate_reviews(config, rng)
    tokens = pd.Series([tuple(tokenize(text, WORDS)) for text in reviews.texts])
    if file:  # generated reviews come in random order
        shuffled = pd.Series(reviews.labels)[rng.permutation(len(tokens))]
        by_label = shuffled.groupby(shuffled)  # the i-th of n examples of a label comes at (i + 0.5) / n of the way
        tokens = tokens[((by_label.cumcount() + 0.5) / by_label.transform("size")).sort_values(kind="stable").index]
    tokens = tokens[tokens.map(bool)].drop_duplicates()  # repetitions would cross the splits
    parts = three_parts(len(tokens), 20, "different reviews that hold a word")
    keep, words = tokens.index, [review[-config.max_words :] for review in tokens]
    labels, tested = reviews.labels[keep], keep[parts[2]]
    vocabulary = fit_vocabulary((word for review in words[parts[0]] for word in review), config.vocab_size)
    ids = [encode(review, vocabulary) for review in words]
    train, validation, test = (ReviewDataset(ids[part], labels[part], device) for part in parts)
    facts = {"reviews": len(words), "left out as empty or repeated": len(reviews.texts) - len(words)}
    facts |= {f"share {name}": np.mean(labels == label) for label, name in enumerate(reviews.names)}
    lengths = [len(review) for review in words]
    facts |= {"mean length (words)": np.mean(lengths), "longest": max(lengths)}
    facts |= {"distinct words": len(set().union(*words)), "vocabulary": len(vocabulary)}
    facts |= {"unknown words in the test split": (test.inputs == 1).sum().item() / test.lengths.sum().item()}
    preprocessing = {"vocabulary": list(vocabulary), "labels": list(reviews.names), "max_words": config.max_words}
    names, truth, subsets, ceiling = np.array(reviews.names), labels[parts[2]], {}, []
    asked = pd.DataFrame({"text": [reviews.texts[i] for i in tested], "truth": names[truth]})
    if not file:
        contradicts = reviews.praised[tested] != (truth == 1)
        subsets = {CONTRADICTS: contradicts, AGREES: ~contradicts}
        log_odds = np.stack([np.zeros(len(tested)), reviews.log_odds[tested]], axis=1)
        ceiling = [label_reference("Bayes decision", "ceiling", log_odds, truth)]
    sizes = {"vocab_size": len(vocabulary), "output_dim": len(names) if len(names) > 2 else 1}
    baselines = partial(review_baselines, train, test, len(vocabulary))
    samples = [f"{names[reviews.labels[i]]}: {reviews.texts[i]}" for i in keep[:3]]
    more = {"predictions": lambda got: asked.assign(answer=names[got["answer"]], probability=got["probability"])}
    more |= {"samples": samples, "subsets": subsets}
    return TaskData(train, validation, test, sizes, preprocessing, facts, baselines, ceiling, **more)


def build_corpus(config: PredictorConfig, seed: int, device: torch.device = CPU) -> TaskData:
    """A corpus, cut in three, encoded with the training part's vocabulary; raises InputError."""
    window = config.window
    if config.file:
        lines = io.StringIO(read_text(config.file.path))  # one at a time, which saves memory
        words = [word for line in lines for word in tokenize(line, WORDS_AND_ENDS)]
    else:
        generated = generate_corpus(config, random_generator(seed, "corpus"))
        words = generated["words"].tolist()
    parts = three_parts(len(words), 8 * (window + 1), "words")  # cut before windowing: none straddles a cut
    vocabulary = fit_vocabulary(words[parts[0]], config.vocab_size)
    require(len(vocabulary) >= 3, f"no known word in its first {TRAIN_SHARE:.0%}, the training part")
    ids, known = encode(words, vocabulary), np.array(list(vocabulary))
    train = CorpusDataset(ids[parts[0]], window, device=device)
    validation, test = (CorpusDataset(ids[part], window, MOST_WINDOWS, device) for part in parts[1:])
    seen = set(zip(*(ids[parts[0]][i:] for i in range(window))))
    facts = {"words": len(ids), "distinct words": len(set(words)), "vocabulary": len(vocabulary)}
    facts |= {"test windows": len(test), "unknown words in the test split": (test.targets == 1).float().mean().item()}
    facts |= {"test windows that also occur in training": np.mean([tuple(w) in seen for w in test.inputs.tolist()])}
    places = range(parts[2].start, len(words) - window, test.stride)  # where the test windows begin
    targets = slice(parts[2].start + window, None, test.stride)  # the words that they ask for
    asked = pd.DataFrame({"text": [" ".join(words[i : i + window]) for i in places], "truth": words[targets]})
    subsets, ceiling = {}, []
    if not config.file:
        told = generated[targets]
        for role, distance in sorted({*zip(told["role"], told["distance"])} - {("", 0)}):
            of_cue = (told["role"] == role) & (told["distance"] == distance)
            subsets[f"{role} {distance} words after its subject"] = of_cue.to_numpy()
        subsets[FAR] = (told["distance"] >= 5).to_numpy()
        ceiling = [Reference(FULL_STATE, "ceiling", told["entropy"].to_numpy(), told["hits"].to_numpy(dtype=float))]
    preprocessing, sizes = {"vocabulary": list(vocabulary), "window": window}, {"vocab_size": len(vocabulary)}
    baselines = partial(corpus_baselines, ids[parts[0]], test, len(vocabulary))
    samples = [f"{' '.join(words[i : i + window])} -> {words[i + window]}" for i in (0, window + 1, 2 * window + 2)]
    more = {"predictions": lambda got: asked.assign(answer=known[got["answer"]], probability=got["probability"])}
    more |= {"samples": samples, "subsets": subsets}
    return TaskData(train, validation, test, sizes, preprocessing, facts, baselines, ceiling, **more)


def build_series(config: ForecasterConfig, seed: int, device: torch.device = CPU) -> TaskData:
    """A series, cut in three, in units of how far the training part's values lie from their windows' means.

    Of a short series the windows are a tenth at most, so that each part holds some; raises InputError.
    """
    if config.file:
        values, doubts = read_series(read_text(config.file.path), *config.file.columns)
    else:
        values, doubts = generate_series(config, random_generator(seed, "series")), []
    window = min(config.window, max(4, len(values) // 10))
    parts = three_parts(len(values), 48, "values")  # cut before windowing: none straddles a cut
    train_values, test_values = values[parts[0]], values[parts[2]]
    # the unit: how far the values of training windows, and the next ones, lie from their windows' means
    windows = torch.as_tensor(train_values).unfold(0, window + 1, 1)[:: math.ceil(len(values) / MOST_WINDOWS)]
    spread = (windows - windows[:, :-1].mean(dim=1, keepdim=True)).square().mean().sqrt()
    with np.errstate(over="ignore", invalid="ignore"):  # said in one line below
        offset, unit = float(train_values.mean()), float(spread)
    require(0 < unit < math.inf, f"constant over its first {TRAIN_SHARE:.0%}, the training part, or too large")
    every, validation, test = (SeriesDataset((values[part] - offset) / unit, window, 1, device) for part in parts)
    stride = min(config.stride, math.ceil(len(every) / 1000))  # a short series has no window to spare
    train = SeriesDataset((train_values - offset) / unit, window, stride, device)
    ceiling = []
    if not config.file:
        best = best_forecasts(test.inputs[:, :, 0].cpu().double().numpy() * unit + offset, config)
        errors = (best - offset) / unit - test.targets[:, 0].cpu().numpy()
        ceiling = [Reference("exact filter", "ceiling", errors**2, np.abs(errors))]
    low, high = float(train_values.min()), float(train_values.max())
    if (beyond := np.mean((test_values < low) | (test_values > high))) > 0.1:
        where = f"{beyond:.0%} of the test part's values lie outside those of the training part ({low:g} to {high:g})"
        doubts.append(f"{where}: what was learnt may not hold there; look at the baselines, try its differences")
    if window < config.window:
        doubts.append(f"{len(values):,} values are few: windows of {window} steps in place of {config.window}")
    facts = {"steps": len(values), "least": values.min(), "largest": values.max(), "window (steps)": window}
    facts |= {"season (steps)": season} if (season := season_of(every)) else {}
    written, last, truth = [f"{value:.5g}" for value in test_values], test_values[window - 1 : -1], test_values[window:]
    asked = pd.DataFrame({"window": [" ".join(written[i : i + window]) for i in range(len(truth))], "truth": truth})
    preprocessing = {"scaler": {"mean": offset, "std": unit, "range": [low, high]}, "window": window}
    baselines = partial(series_baselines, every, test)
    samples = [" ".join(f"{value:.4g}" for value in train_values[i : i + 12]) + " ..." for i in (0, window, 2 * window)]
    more = {"predictions": lambda got: asked.assign(answer=last + unit * got["answer"]).eval("error = answer - truth")}
    more |= {"samples": samples, "doubts": doubts, "unit": unit, "offset": offset}
    sizes = {"input_dim": 1, "output_dim": 1}
    return TaskData(train, validation, test, sizes, preprocessing, facts, baselines, ceiling, **more)


def plain(value: float, digits: int = 3, scale: float | None = None) -> str:
    """A number as people write it, with the places that so many digits of `scale` need: 110, not 1.1e+02."""
    scale = value if scale is None else scale
    places = digits - 1 - math.floor(math.log10(abs(scale))) if scale and math.isfinite(scale) else 0
    return f"{value:z.{max(0, places)}f}"


@dataclass(frozen=True)
class Metric:
    """A number to report: the mean of a per-example quantity, put into the user's units."""

    name: str
    label: str  # for axes
    source: str  # "loss" or "score"
    unit_power: int = 0  # the mean is multiplied by (one unit of the targets) ** unit_power
    transform: Callable[[float], float] = float  # of the mean
    higher_is_better: bool = False
    is_share: bool = False  # shown in per cent

    def show(self, mean: float, std: float = math.nan) -> str:
        """'76.1 % ± 1.2': a mean with its standard deviation, if there is one worth showing."""
        digits = 4 if self.unit_power else 3
        number = f"{100 * mean:.1f} %" if self.is_share else plain(mean, digits)
        spread = f"{100 * std:.1f}" if self.is_share else plain(std, digits, mean)
        return f"{number} ± {spread}" if float(spread) > 0 else number

    def difference(self, value: float, scale: float) -> str:
        """A difference as a person reads it: shares in points of a hundred, the rest with two digits of `scale`."""
        return f"{100 * value:z.1f}" if self.is_share else plain(value, 2, scale)


@dataclass(frozen=True)
class Task:
    """All that differs between the three tasks."""

    name: str
    title: str
    question: str  # what the generated data ask, in a sentence or two
    models: Mapping[str, type[SequenceModel]]
    build_data: Callable[[TaskConfig, int, torch.device], TaskData]  # (configuration, seed, device)
    loss: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); its mean is minimised
    score: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); reported beside the loss
    metrics: Sequence[Metric]  # the first is the one that the models are judged by
    answers: Mapping[str, Callable[[Tensor, Tensor], Tensor]]  # (output, target) -> (B,): what a reader asks for
    file_option: str  # the option that names a user's file
    hard_subset: str = ""  # of the test examples: those that need memory

    def measure(self, loss: np.ndarray | float, score: np.ndarray | float, unit: float) -> dict[str, float]:
        """Mean loss and the task's metrics, from a loss and a score per example (N,) or from their means."""
        means = {"loss": float(np.mean(loss)), "score": float(np.mean(score))}
        metrics = {m.name: m.transform(means[m.source]) * unit**m.unit_power for m in self.metrics}
        return {"loss": means["loss"]} | metrics


def label_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a classifier's output (B, 1) or (B, K) with labels (B, 1): (B,)."""
    if output.shape[1] == 1:
        return F.binary_cross_entropy(output, target, reduction="none")[:, 0]
    return F.nll_loss(output.clamp_min(1e-30).log(), target[:, 0].long(), reduction="none")


def perplexity(loss: float) -> float:
    """The exponential of a cross-entropy in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


ACCURACY = Metric("accuracy", "accuracy", "score", higher_is_better=True, is_share=True)
CROSS_ENTROPY = Metric("loss", "cross-entropy (nats)", "loss")
PERPLEXITY = Metric("perplexity", "perplexity", "loss", transform=perplexity)
MSE = Metric("mse", "MSE (series units²)", "loss", unit_power=2)
MAE = Metric("mae", "MAE (series units)", "score", unit_power=1)

CLASSIFIER = Task(
    name="classifier",
    title="Text classification",
    question="Is a film review positive? Opinions are scattered over its whole length, some of them negated, and the "
    "verdict at its end often misleads.",
    models={"RNN": RNNClassifier, "LSTM": LSTMClassifier, "GRU": GRUClassifier},
    build_data=build_reviews,
    loss=label_loss,
    score=lambda output, target: (label_probabilities(output).argmax(dim=1) == target[:, 0]).float(),
    metrics=(ACCURACY, CROSS_ENTROPY),
    answers={
        "answer": lambda output, _: label_probabilities(output).argmax(dim=1),
        "probability": lambda output, _: label_probabilities(output).amax(dim=1),
    },
    file_option="reviews",
    hard_subset=CONTRADICTS,
)
PREDICTOR = Task(
    name="predictor",
    title="Next-word prediction",
    question="Which word comes next? Verbs and objects depend on a subject up to nine words back, past other nouns.",
    models={"RNN": RNNPredictor, "LSTM": LSTMPredictor, "GRU": GRUPredictor},
    build_data=build_corpus,
    loss=partial(F.cross_entropy, reduction="none"),
    score=lambda output, target: (output[:, 2:].argmax(dim=1) + 2 == target).float(),  # <pad> and <unk> are no words
    metrics=(ACCURACY, CROSS_ENTROPY, PERPLEXITY),
    answers={
        "answer": lambda output, _: output[:, 2:].argmax(dim=1) + 2,
        "probability": lambda output, _: output[:, 2:].softmax(dim=1).amax(dim=1),
    },
    file_option="corpus",
    hard_subset=FAR,
)
FORECASTER = Task(
    name="forecaster",
    title="Time-series forecasting",
    question="What is the next value of a noisy sine whose period switches at random among three?",
    models={"RNN": RNNForecaster, "LSTM": LSTMForecaster, "GRU": GRUForecaster},
    build_data=build_series,
    loss=lambda output, target: F.mse_loss(output, target, reduction="none").mean(dim=1),
    score=lambda output, target: F.l1_loss(output, target, reduction="none").mean(dim=1),
    metrics=(MSE, MAE),
    answers={"answer": lambda output, _: output[:, 0]},
    file_option="series",
)
TASKS = {task.name: task for task in (CLASSIFIER, PREDICTOR, FORECASTER)}
MODEL_NAMES = tuple(CLASSIFIER.models)  # one more needs a rate in LearningRates, a colour, and its gates in Recurrent

# ======================================================================================
# Training
# ======================================================================================

Batch = tuple[Tensor, Tensor]  # inputs and targets
Watch = Callable[[int, Mapping | None], object]  # called with the batches so far and, at its end, an epoch's row


def epochs_since_best(losses: Sequence[float]) -> int:
    """How many epochs have passed since the one of the lowest loss, of equals the first."""
    return len(losses) - 1 - losses.index(min(losses))


def prepare_device(device: torch.device) -> None:
    """Settings of this process under which a run gives the same numbers every time."""
    torch.set_num_threads(1)  # the layers are too small to share out; several runs at a time use the cores better
    if device.type == "cuda":  # without these two, cuBLAS and atomic additions make every run differ
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def new_optimizer(model: nn.Module, training: Training) -> optim.Optimizer:
    """Adam (Kingma & Ba 2015) with the settings of `training`."""
    return optim.Adam(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


def train_step(model: nn.Module, task: Task, optimizer: optim.Optimizer, batch: Batch, training: Training) -> Tensor:
    """One update, in micro-batches; returns mean loss, mean score and gradient norm before clipping: (3,)."""
    optimizer.zero_grad(set_to_none=True)
    losses, scores = [], []
    for inputs, targets in zip(*(part.chunk(training.accumulate_steps) for part in batch)):
        output = model(inputs)
        loss = task.loss(output, targets)  # (b,), each of which counts one B-th
        loss.backward(torch.full_like(loss, 1 / len(batch[0])))
        losses.append(loss.detach())
        scores.append(task.score(output.detach(), targets))
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], training.clip_norm)
    optimizer.step()
    return torch.stack([torch.cat(losses).mean(), torch.cat(scores).mean(), norm])


def train_epoch(model: nn.Module, step: Callable, loader: Iterable[Batch], done: Callable = int) -> list[float]:
    """One pass over the data; returns the means of what `step`, a `train_step`, returns. `done` hears of each batch."""
    model.train()  # the means stay on the device: one transfer an epoch, not three a step
    means, seen = torch.zeros(3, device=next(model.parameters()).device), 0
    for batches, batch in enumerate(loader, start=1):
        seen += len(batch[1])
        means += (step(batch) - means) * (len(batch[1]) / seen)
        done(batches)
    return means.tolist()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, dataset: SequenceDataset, more: Mapping = {}, batch_size: int = 512) -> dict:
    """Loss and score of the model, and what `more` names, on each example of `dataset`, in its order: arrays (N,)."""
    model.eval()
    measures = {"loss": task.loss, "score": task.score, **more}
    parts, order = [], dataset.lengths.argsort(stable=True)  # batches of similar length: little padding
    for rows in order.split(batch_size):
        inputs, target = dataset.__getitems__(rows)
        output = model(inputs)
        parts.append([measure(output, target) for measure in measures.values()])
    places = order.argsort()
    return {name: torch.cat(part).cpu()[places].numpy() for name, part in zip(measures, zip(*parts))}


def fit(
    model: nn.Module, task: Task, data: TaskData, training: Training, seed: int, watch: Watch = lambda *_: None
) -> list[dict]:
    """Train until the validation loss stops falling; leaves the best epoch's weights in `model`.

    Model and data must be on the same device. Returns the history, a row per epoch: `epoch`, `learning_rate`,
    `gradient_norm` (mean, before clipping), `seconds`, and under `train` and `validation` the loss and the task's
    metrics; those of training are running means, with dropout on. Raises RuntimeError when a loss is not finite.
    """
    torch.manual_seed(random_generator(seed, "dropout").integers(2**63))
    optimizer = new_optimizer(model, training)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=training.lr_factor, patience=training.lr_patience)
    batches = LengthBuckets(data.train.lengths, training.batch_size, random_generator(seed, "batches"))
    loader = DataLoader(data.train, batch_sampler=batches, collate_fn=lambda batch: batch)  # batches come whole
    step = partial(train_step, model, task, optimizer, training=training)
    history, losses, best_weights = [], [], {}
    for epoch in range(1, training.epochs + 1):
        start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
        loss, score, norm = train_epoch(model, step, loader, lambda n: watch(len(losses) * len(batches) + n, None))
        validation = task.measure(**evaluate(model, task, data.validation), unit=data.unit)
        row = {"epoch": epoch, "learning_rate": rate, "gradient_norm": norm, "seconds": time.perf_counter() - start}
        row |= {"train": task.measure(loss, score, data.unit), "validation": validation}
        losses.append(validation["loss"])
        if not math.isfinite(loss + losses[-1]):
            who = f"{type(model).__name__} ({task.name}), seed {seed}"
            advice = f"try a learning rate below {rate:g} or a clip norm below {training.clip_norm:g}"
            raise RuntimeError(f"{who}: the loss is not finite in epoch {epoch}; {advice}")
        history.append(row)
        watch(epoch * len(batches), row)
        if epochs_since_best(losses) == 0:
            best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if epochs_since_best(losses) >= training.patience:
            break
        plateau.step(losses[-1])
    model.load_state_dict(best_weights)
    return history


# ======================================================================================
# Evidence
# ======================================================================================


def activation_bytes(model: nn.Module, task: Task, batch: Batch) -> int:
    """Bytes that the forward pass on `batch` keeps for the backward pass, the weights themselves left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model(batch[0]), batch[1]).mean()
    return sum(size for storage, size in kept.items() if storage not in weights)


def kernel_name(model: nn.Module, inputs: Tensor) -> str:
    """Which implementation of the recurrent layer runs: cuDNN, oneDNN, or PyTorch's generic one."""
    nodes = [model(inputs[:2, :2]).grad_fn]  # of the backward graph, named after the operators that ran
    for node in nodes:  # grows on the way
        nodes += [parent for parent, _ in node.next_functions if parent and parent not in nodes]
    names = " ".join(node.name() for node in nodes)
    return "cuDNN" if "CudnnRnn" in names else "oneDNN" if "MkldnnRnn" in names else "generic"


def measure_costs(task: Task, models: Mapping, training: Training, data: TaskData, steps: int, rounds: int) -> dict:
    """What a training step of each model costs, by its name: in the script's own loop and in the barest one possible.

    The models and the two loops take turns on the same `steps` batches, from short to long examples, `rounds` times,
    after a bare loop to warm up, and their order is turned round every time; the medians count. The overhead is a share
    of the bare loop next to it. Activations are those of a full batch of the longest examples that may occur.
    """
    lengths, size = data.train.lengths, min(training.batch_size, len(data.train))
    full = [rows for rows in LengthBuckets(lengths, size, random_generator(0, "costs")) if len(rows) == size]
    full.sort(key=lambda rows: lengths[rows].max())
    batches = [full[int((i + 0.5) / steps * len(full))] for i in range(steps)]
    loader = DataLoader(data.train, batch_sampler=batches, collate_fn=lambda batch: batch)
    ready, loops, times, costs = list(loader), {}, defaultdict(list), {}
    length = data.preprocessing.get("max_words") or data.preprocessing["window"]
    longest = data.train.inputs.new_ones(size, length, *data.train.inputs.shape[2:]), data.train.targets[:size]

    def bare_epoch(model: nn.Module, optimizer: optim.Optimizer) -> None:
        for inputs, targets in ready:  # the least that training is: forward, backward and step
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(model(inputs), targets).mean()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device

    for name, model in models.items():
        optimizer = new_optimizer(model, training)
        loops[name, "bare_"] = partial(bare_epoch, model, optimizer)
        step = partial(train_step, model, task, optimizer, training=training)
        loops[name, ""] = partial(train_epoch, model, step, loader)
        loops[name, "bare_"]()
    for turn in range(rounds):
        for key in list(loops)[:: (-1) ** turn]:
            start = time.perf_counter()
            loops[key]()
            times[key].append((time.perf_counter() - start) / steps)
    for name, model in models.items():
        cost = {"kernel": kernel_name(model, ready[0][0]), "activation_bytes": activation_bytes(model, task, longest)}
        cost |= {"overhead": round(np.median(np.divide(times[name, ""], times[name, "bare_"])) - 1, 4)}
        for prefix in ("", "bare_"):
            seconds = np.median(times[name, prefix])
            cost |= {f"{prefix}ms_per_step": round(1000 * seconds, 2)}
            cost |= {f"{prefix}samples_per_second": round(size / seconds)}
        costs[name] = cost | {"batches_per_epoch": math.ceil(len(data.train) / training.batch_size)}
    return costs


def gradient_by_step(model: nn.Module, task: Task, data: TaskData, n: int = 64) -> list[float]:
    """Norm of the loss's gradient at the embedded input, by steps back from the end: of the `n` longest reviews."""
    rows = data.test.lengths.topk(min(n, len(data.test))).indices
    (inputs, targets), lengths, embedded = data.test.__getitems__(rows), data.test.lengths[rows], []
    model.train()  # cuDNN goes backward in training mode only
    model.dropout.eval()
    with model.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output)):
        loss = task.loss(model(inputs), targets).sum()
    sizes = torch.autograd.grad(loss, embedded[0])[0].norm(dim=2).cpu()  # (n, T, E) -> (n, T)
    back = lengths[:, None] - 1 - torch.arange(int(lengths.min()))  # (n, steps): position of each step back
    return sizes.gather(1, back).mean(dim=0).tolist()


def forecasts(model: Forecaster, data: TaskData, shown: int = 120, horizon: int = 120, stride: int = 10) -> dict:
    """Forecasts against the truth, in series units: of the first `shown` test windows, and free-running.

    The latter `horizon` steps from every `stride`-th window: the first of them, and the mean squared error by horizon.
    """
    horizon = min(horizon, max(len(data.test) // 2, 1))
    windows = data.test.inputs[: len(data.test) - horizon + 1 : stride]  # (O, T, 1)
    truth = data.test.targets[:, 0].unfold(0, horizon, stride)  # (O, horizon)
    free = model.roll_forward(windows, horizon)  # (O, horizon)
    found = {"truth": data.test.targets[:shown, 0], "forecast": model.roll_forward(data.test.inputs[:shown], 1)[:, 0]}
    found |= {"free_truth": truth[0], "free_forecast": free[0]}
    found = {name: (values * data.unit + data.offset).tolist() for name, values in found.items()}
    for name, values in (("free_mse", free), ("persistence_mse", windows[:, -1])):  # (O, horizon), (O, 1)
        found[name] = (((values - truth) ** 2).mean(dim=0) * data.unit**2).tolist()
    return found | {"variance": data.test.targets.var().item() * data.unit**2}


def label_evidence(task: Task, trained: nn.Module, untrained: nn.Module, data: TaskData, found: pd.DataFrame) -> dict:
    """The gradient by time step, after training and before, and the confusion matrix (K, K): truth, answer."""
    labels = data.preprocessing["labels"]
    confusion = pd.crosstab(found["truth"], found["answer"]).reindex(index=labels, columns=labels, fill_value=0)
    after, before = (gradient_by_step(model, task, data) for model in (trained, untrained))
    return {"gradient": after, "initial_gradient": before, "labels": labels, "confusion": confusion.to_numpy().tolist()}


EVIDENCE = {  # task: (task, trained model, untrained model, data, predictions) -> what a record holds beside scores
    CLASSIFIER.name: label_evidence,
    PREDICTOR.name: lambda *_: {},
    FORECASTER.name: lambda _task, trained, _untrained, data, _found: {"forecasts": forecasts(trained, data)},
}

# ======================================================================================
# Runs
# ======================================================================================

BASELINES = "baselines"  # stands for a model where there is nothing to train
NO_GUARD = 64  # exit status of a child that would begin everything again: the user's script has no guard
MATCHED = "-matched"  # marks a model whose recurrent parameters match the LSTM's


class Job(NamedTuple):
    """One run: a model of a task, or its baselines, on the data of a seed."""

    task: str
    model: str
    seed: int
    learning_rate: float | None = None  # the baselines have none
    tuning: bool = False  # only to choose the learning rate: the test split is not there

    def __str__(self) -> str:
        return f"{self.task} {self.model} seed {self.seed}" + (f" rate {self.learning_rate:g}" if self.tuning else "")

    def file(self, output_dir: Path, kind: str = "runs") -> Path:
        """Its record, or, in "models" and "predictions", its checkpoint and its predictions."""
        stem = f"{self.task}_{self.model}_seed{self.seed}"
        if self.tuning:
            return output_dir / kind / "tuning" / f"{stem}_rate{self.learning_rate:g}.json"
        return output_dir / kind / f"{stem}.{ {'runs': 'json', 'models': 'pt', 'predictions': 'csv'}[kind] }"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, whatever happens: temporary name, flush, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def base_name(model: str) -> str:
    """RNN, LSTM or GRU, whatever its size."""
    return model.removesuffix(MATCHED)


def build_model(task: Task, name: str, config: TaskConfig, data: TaskData, seed: int) -> tuple[SequenceModel, dict]:
    """A fresh model, its weights drawn from the seed, and the constructor arguments that made it."""
    model_class, sizes = task.models[base_name(name)], ("embed_dim", "hidden_dim", "n_layers", "dropout")
    arguments = {**data.sizes} | {key: value for key, value in vars(config).items() if key in sizes}
    if name != base_name(name):  # an RNN needs about twice the LSTM's hidden units

        def size(layer: type[nn.RNNBase], hidden_dim: int) -> int:
            inputs = arguments.get("embed_dim", 1)
            return sum(p.numel() for p in layer(inputs, hidden_dim, config.n_layers, device="meta").parameters())

        target, candidates = size(nn.LSTM, config.hidden_dim), range(1, 3 * config.hidden_dim)
        arguments["hidden_dim"] = min(candidates, key=lambda h: abs(size(model_class.layer, h) - target))
    torch.manual_seed(random_generator(seed, "weights").integers(2**63))
    return model_class(**arguments), arguments


def load_checkpoint(path: str | Path) -> SequenceModel:
    """The model saved at `path`, on the CPU and ready to `predict`; raises InputError. No code in the file is run."""
    if not os.path.isfile(path):  # noqa: PTH113 (Path's raises if a name is too long)
        raise InputError(f"{path}: no such file; trained models are in the folder 'models' of an output directory")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        task, name, arguments, weights = (checkpoint[key] for key in ("task", "model", "arguments", "weights"))
        require(task in TASKS, f"it is for a task {task!r}")
        require(base_name(name) in MODEL_NAMES, f"it is a model {name!r}")
        sizes = [value for argument, value in arguments.items() if argument != "dropout"]
        sensible = all(type(size) is int and size >= 1 for size in sizes) and arguments["n_layers"] <= 100
        require(sensible and 0 <= arguments["dropout"] <= 1, "a size or a dropout that makes no sense")
        with torch.device("meta"):  # takes no memory, so that sizes which the weights do not have do no harm
            model = TASKS[task].models[base_name(name)](**arguments)
        expected = {name: (weight.shape, weight.dtype) for name, weight in model.state_dict().items()}
        require(expected == {n: (w.shape, w.dtype) for n, w in weights.items()}, "its weights do not fit its model")
        stored = all(w.untyped_storage().nbytes() >= w.numel() * w.element_size() for w in weights.values())
        require(stored and all(w.isfinite().all() for w in weights.values()), "weights that are not there, or finite")
        model.load_state_dict(weights, assign=True)
        model.preprocessing, model.metrics = checkpoint["preprocessing"], checkpoint["metrics"]
        lengths = [model.preprocessing[name] for name in ("window", "max_words") if name in model.preprocessing]
        require(all(type(n) is int and n >= 1 for n in lengths), "a window or max_words that is not 1 or more")
        labels, outputs = model.preprocessing.get("labels", ["", "1"]), max(arguments.get("output_dim", 1), 2)
        require(isinstance(labels, list) and len({*map(str, labels)}) == outputs, "labels that do not fit")
        model.eval().predict(model.sample)  # shows whether the preprocessing belongs to the model
    except Exception as error:  # a foreign or damaged file can make torch stumble over anything
        why = first_line(error)[:120] if isinstance(error, (ValueError, RuntimeError)) else "damaged, or something else"
        raise InputError(f"{path}: not a model that this script can use ({why})") from error
    return model


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def settings(config: TaskConfig) -> dict:
    """A configuration as its record holds it; of a user's file the name and the content, not the place."""
    values = json.loads(json.dumps(asdict(config)))  # tuples are lists in a record
    del values["options"], values["learning_rates"], values["training"]["learning_rate"]  # a run has its own rate
    if values["file"]:
        values["file"]["path"] = Path(values["file"]["path"]).name
    return values


def read_records(output_dir: Path, config: Config, tuning: bool = False) -> tuple[dict[Job, dict], set[str]]:
    """The records in `output_dir` of runs with this configuration, by task, model and seed, baselines last; and the
    options that lead to the other configurations that are there."""
    records, others, models = {}, set(), [*MODEL_NAMES, *(name + MATCHED for name in MODEL_NAMES), BASELINES]
    for path in (output_dir / "runs").glob("tuning/*.json" if tuning else "*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            job = Job(*(record[name] for name in ("task", "model", "seed", "learning_rate")), tuning)
            require(path == job.file(output_dir), "the record of another run")
            order = list(TASKS).index(job.task), models.index(job.model), job.seed, job.learning_rate
            require("environment" in record and ("history" in record) != ("references" in record), "nothing measured")
            if record["configuration"] == settings(config[job.task]):
                records[order] = job, record
            else:
                others.add(record["options"])
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            print(f"{path} is not the whole record of a run of this version; it is left out", file=sys.stderr)
    return dict(records[order] for order in sorted(records)), others


def unfinished(jobs: Sequence[Job], output_dir: Path, config: Config) -> list[Job]:
    """Those of the runs that lack their record, or the model that belongs to it; what does not count is named."""
    records, rest = read_records(output_dir, config, jobs[0].tuning)[0], []
    for job in jobs:
        finished = job in records
        if finished and job.model != BASELINES and not job.tuning:
            finished = False
            with suppress(InputError):
                finished = load_checkpoint(job.file(output_dir, "models")).metrics == records[job]["test"]
        if not finished:
            rest.append(job)
            if (path := job.file(output_dir)).exists():
                print(f"{path} or its model is damaged or of another configuration; it is done again", file=sys.stderr)
    todo, total = (sum(job.model != BASELINES for job in some) for some in (rest, jobs))
    print(f"resuming: {total - todo} of {total} runs are finished", file=sys.stderr)
    return rest


@lru_cache(maxsize=1)
def cached_data(task_name: str, config: TaskConfig, seed: int, device: torch.device) -> TaskData:
    """A seed's data, kept for the next model of the same seed; raises InputError, which names the user's file."""
    try:
        return TASKS[task_name].build_data(config, seed, device)
    except InputError as error:
        raise InputError(f"{config.file.path}: {error}" if config.file else str(error)) from error


def carry_out(job: Job, watch: Watch, config: Config, device: torch.device, output_dir: Path, costs: Mapping) -> None:
    """Train and test one model, or measure the baselines; leaves the record, and of a model the checkpoint.

    The record holds all that tables and figures are made from; `costs` goes into it. Raises RuntimeError.
    """
    prepare_device(device)
    task, config = TASKS[job.task], config[job.task]
    data = cached_data(job.task, config, job.seed, device)

    def scores(loss: np.ndarray, score: np.ndarray) -> dict[str, dict]:
        masks = {name: mask for name, mask in data.subsets.items() if mask.any()}
        subsets = {name: task.measure(loss[mask], score[mask], data.unit) for name, mask in masks.items()}
        return {"test": task.measure(loss, score, data.unit), "subsets": subsets}

    # what the numbers may depend on beside the configuration and the seed
    environment = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    environment["system"] = f"{platform.system()} {platform.machine()}"
    environment["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    environment["threads"] = torch.get_num_threads()
    record = {name: getattr(job, name) for name in ("task", "model", "seed", "learning_rate")}
    record |= {"configuration": settings(config), "options": config.options, "environment": environment}
    for kind in ("runs", "predictions"):  # those of another configuration must not stand beside this model
        job.file(output_dir, kind).unlink(missing_ok=True)
    if job.model == BASELINES:
        record |= {"facts": {name: float(value) for name, value in data.facts.items()}, "doubts": list(data.doubts)}
        references = [*data.baselines(), *data.ceiling]
        record["references"] = [{"name": r.name, "kind": r.kind} | scores(r.loss, r.score) for r in references]
    else:
        model, arguments = build_model(task, job.model, config, data, job.seed)
        training = replace(config.training, learning_rate=job.learning_rate)
        if job.tuning:
            data = replace(data, test=None)
        record["history"] = fit(model.to(device), task, data, training, job.seed, watch)
        if not job.tuning:
            untrained = build_model(task, job.model, config, data, job.seed)[0].to(device)
            longest, _ = data.train.__getitems__(data.train.lengths.topk(2).indices)
            record |= {"parameters": count_parameters(model), "layers": describe_layers(model, longest)}
            record |= {"input_shape": list(longest.shape[1:])}
            # the test split is opened when the best validation weights are back: nothing is chosen by it
            found = evaluate(model, task, data.test, task.answers)
            predictions = data.predictions(found)
            write_whole(job.file(output_dir, "predictions"), "\ufeff" + predictions.to_csv(index=False))  # for Excel
            record |= scores(found["loss"], found["score"]) | {"cost": costs[job.task][job.model]}
            record["evidence"] = EVIDENCE[job.task](task, model, untrained, data, predictions)
            record["examples"] = predictions.head(3).to_dict("records")
            checkpoint = {"task": job.task, "model": job.model, "arguments": arguments, "metrics": record["test"]}
            checkpoint["weights"] = {name: weight.cpu() for name, weight in model.state_dict().items()}
            checkpoint["preprocessing"] = dict(data.preprocessing)
            torch.save(checkpoint, content := io.BytesIO())
            write_whole(job.file(output_dir, "models"), content.getvalue())
    write_whole(job.file(output_dir), json.dumps(record))


# --- many runs ------------------------------------------------------------------------


class Progress:
    """What the user sees: a bar for everything, with the time left, above one for each run that is being trained.

    Without a terminal or notebook, a line per epoch. `expected`: of each run, in the order of their start, the seconds
    that a batch takes and the batches of all its epochs.
    """

    def __init__(self, expected: Mapping[Job, tuple[float, int]]):
        self.expected, self.bars, self.failures, self.start_time = expected, {}, {}, time.monotonic()
        self.batches = dict.fromkeys(expected, 0)  # that are done
        notebook = any(parent.__module__ == "tqdm.notebook" for parent in tqdm.__mro__)
        self.bar = partial(tqdm, disable=not (notebook or sys.stderr.isatty()), leave=False, dynamic_ncols=True)
        everything = "{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
        self.total = sum(map(math.prod, expected.values())) * (1 + 1e-9)  # rounding must not pass it
        self.overall = self.bar(total=self.total, desc="all runs", bar_format=everything)

    def close(self) -> None:
        """Take the bars away and name the runs that failed."""
        for bar in (*self.bars.values(), self.overall):
            bar.close()
        for job, failure in self.failures.items():
            print(f"failed: {job}: {failure}", file=sys.stderr)

    def update(self, job: Job, batches: int, row: Mapping | None) -> None:
        """Show that a run has come to `batches` batches, 0 at its start, and the row of an epoch that it has ended."""
        if job not in self.bars:
            one_run = "{desc} {percentage:3.0f}%{postfix} |{bar}|"
            self.bars[job] = self.bar(total=self.expected[job][1], desc=str(job), bar_format=one_run)
        bar, new, self.batches[job] = self.bars[job], batches - self.batches[job], batches
        if row and bar.disable:
            names = dict.fromkeys(["loss", TASKS[job.task].metrics[0].name])
            values = ", ".join(f"{name} {row['train'][name]:.4g}/{row['validation'][name]:.4g}" for name in names)
            done = sum(self.batches[each] * seconds for each, (seconds, _) in self.expected.items())
            left = tqdm.format_interval((time.monotonic() - self.start_time) * (self.total / done - 1))
            runs = [each for each in self.expected if each.model != BASELINES]
            place = f"run {runs.index(job) + 1} of {len(runs)}, {left} left"
            print(f"{job}  epoch {row['epoch']:2d}  train/val {values}  ({place})", file=sys.stderr, flush=True)
        elif row:
            bar.set_postfix_str(f"epoch {row['epoch']}, validation loss {row['validation']['loss']:.4f}", refresh=False)
        self.overall.update(self.expected[job][0] * new)
        bar.update(new)  # draws a few times a second at most

    def finish(self, job: Job, error: Exception | None) -> None:
        """Count a run as done, however early it stopped; an error that is no failure of this run alone is raised."""
        if isinstance(error, RuntimeError):
            self.failures[job] = str(error)
        elif error:
            raise error
        self.update(job, self.expected[job][1], None)
        self.bars.pop(job).close()


def attempt(job: Job, watch: Watch, work: Callable) -> Exception | None:
    """Carry out a run; returns the error that ended it, if one did: a RuntimeError if it is one of this run alone."""
    try:
        work(job, watch)
    except (RuntimeError, MemoryError) as error:
        return RuntimeError(first_line(error))  # torch's own may not pass through a pipe
    except Exception as error:
        return error
    return None


def run_in_child(parent: multiprocessing.connection.Connection, job: Job, work: Callable) -> None:
    """Carry out one run in a process of its own; it ends when its parent is gone, for then nobody listens.

    It sends (batches, row or None), as a `Watch` hears them, and at its end (None, error or None).
    """

    def send(batches: int, row: Mapping | None) -> None:
        if row or batches % 10 == 0:  # else the news of many children would keep the parent busy
            parent.send((batches, row))

    with suppress(ConnectionError):
        parent.send((None, attempt(job, send, work)))


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block; processes that are started in it never hear of them."""
    came, numbers, posix = [], (signal.SIGINT, signal.SIGTERM), hasattr(signal, "pthread_sigmask")
    if posix:  # children inherit the mask; other threads of this process do not, hence the handlers
        resource_tracker.ensure_running()  # else the first process starts it, and that takes the mask away
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    main = threading.current_thread() is threading.main_thread()  # only there can a signal be listened to
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers if main}
    try:
        yield
    finally:
        if posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def run_in_children(jobs: Iterable[Job], work: Callable, progress: Progress, workers: int) -> None:
    """Carry out `workers` runs at a time, each in a process of its own; all have ended when this returns or raises."""
    # for glibc, at the start of a process: freed memory is kept; a tenth of an LSTM's step was page faults
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    waiting, running = deque(jobs), {}
    context.set_forkserver_preload(["torch._dynamo", "torch.utils.data", "pandas", "matplotlib.figure", "tqdm.auto"])
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=run_in_child, args=(sender, job, work), daemon=True)
                with signals_held():
                    process.start()
                    running[receiver] = process, job
                sender.close()
                progress.update(job, 0, None)
            for receiver in multiprocessing.connection.wait(list(running)):
                process, job = running[receiver]
                try:
                    batches, news = receiver.recv()
                except (EOFError, OSError):  # it has ended, after its last message or before
                    process.join()
                    del running[receiver]
                    ended = f"its process ended with status {process.exitcode}; killed, or out of memory?"
                    batches, news = None, RuntimeError(ended)
                if process.exitcode == NO_GUARD:  # `execute` says so, when the child imports the user's script
                    raise InputError('call main() or run() under `if __name__ == "__main__":`, or with one worker')
                if batches is not None:
                    progress.update(job, batches, news)
                elif job in progress.bars:
                    progress.finish(job, news)
    finally:
        for process, _ in running.values():
            process.kill()
        for process, _ in running.values():
            process.join()


# ======================================================================================
# Results
# ======================================================================================

ALL = "all"  # the subset of all test examples
PARTS = {"embedding": "", "recurrent": "////", "head": "...."}  # of a model, each with its hatch in figures
CSV_METRICS = ("loss", "accuracy", "mse", "mae")
COST_COLUMNS = ["ms_per_step", "samples_per_second", "activation_bytes", "kernel"]
PARAMETERS = ["parameters", "recurrent_parameters"]
RUN_COLUMNS = ["task", "model", "seed", "learning_rate", *PARAMETERS, "epochs", "best_epoch", "seconds", "val_loss"]
RUN_COLUMNS += [f"test_{name}" for name in CSV_METRICS]
Records = Sequence[Mapping]


def results_table(records: Records) -> pd.DataFrame:
    """What every model, baseline and ceiling scores, in long form: the summary and every verdict are views of this."""
    rows = []
    for record in records:
        for found in record.get("references") or [record | {"name": record["model"], "kind": "model"}]:
            key = record["task"], found["name"], found["kind"], record["seed"]
            for subset, values in {ALL: found["test"], **found["subsets"]}.items():
                rows += [(*key, subset, m.name, values[m.name]) for m in TASKS[record["task"]].metrics]
    return pd.DataFrame(rows, columns=["task", "name", "kind", "seed", "subset", "metric", "value"])


def runs_table(records: Records) -> pd.DataFrame:
    """A row per trained model: its record, `RUN_COLUMNS`, parameters by part, cost of a step; `capped`: by --epochs.

    Losses are those that training minimised: of standardised values in the forecaster.
    """
    rows = []
    for record in records:
        history, parameters, file = record["history"], record.get("parameters", {}), record["configuration"]["file"]
        best = min(history, key=lambda epoch: epoch["validation"]["loss"])  # its weights were kept
        row = record | {"title": TASKS[record["task"]].title + (f": {file['path']}" if file else "")}
        row |= {"parameters": sum(parameters.values()), "recurrent_parameters": parameters.get("recurrent")}
        row |= {"epochs": len(history), "best_epoch": best["epoch"], "val_loss": best["validation"]["loss"]}
        row |= {"seconds": round(sum(epoch["seconds"] for epoch in history), 1)}
        row |= {f"test_{name}": record.get("test", {}).get(name) for name in CSV_METRICS}
        row["capped"] = len(history) - best["epoch"] < record["configuration"]["training"]["patience"]
        rows.append(row | {part: parameters.get(part, 0) for part in PARTS} | record.get("cost", {}))
    return pd.DataFrame(rows)


def history_table(records: Records) -> pd.DataFrame:
    """A row per run, epoch, split and metric."""
    rows = []
    for r, epoch in ((record, epoch) for record in records for epoch in record["history"]):
        for split, metric in product(("train", "validation"), epoch["train"]):
            rows.append((r["task"], r["model"], r["seed"], epoch["epoch"], split, metric, epoch[split][metric]))
    return pd.DataFrame(rows, columns=["task", "model", "seed", "epoch", "split", "metric", "value"])


def label_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Precision, recall and F1 of each classifier by label, over the test splits of all seeds."""
    rows = []
    for model, evidence in runs.groupby("model", sort=False)["evidence"]:
        counts = np.sum([each["confusion"] for each in evidence], axis=0)  # (K, K): truth, answer
        answered, there, right = counts.sum(axis=0), counts.sum(axis=1), counts.diagonal()
        scores = right / np.maximum([answered, there, (answered + there) / 2], 1)  # (3, K)
        scores = np.where(there, scores, math.nan)  # of a label without a test example nothing is known
        names = [*evidence.iloc[0]["labels"], "mean of the labels"]
        rows += [(model, *row) for row in zip(names, *np.column_stack([scores, np.nanmean(scores, axis=1)]))]
    return pd.DataFrame(rows, columns=["model", "label", "precision", "recall", "F1"])


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds: task, name, kind, subset, metric, mean, std, n."""
    groups = results.groupby(["task", "name", "kind", "subset", "metric"], sort=False)["value"]
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def student_t(degrees: int, level: float = 0.95) -> float:
    """The two-sided critical value of Student's t distribution, from its density by the trapezoidal rule."""
    t = np.linspace(0, 14, 140_001)
    log_density = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    density = np.exp(log_density - (degrees + 1) / 2 * np.log1p(t**2 / degrees))
    mass = np.cumsum((density[1:] + density[:-1]) * 1e-4 / 2)  # from 0 on: half of it
    return float(np.interp(level / 2, mass, t[1:]))


def compare(results: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of each two models, and of each with the best baseline, in every metric; with verdicts.

    The 95 % interval is Student's, of the differences on the seeds that both have: data, weights and order of the
    batches are drawn anew with each seed, so it says how far another choice of seeds would move the difference.
    """
    rows = []
    for (task_name, metric_name), cells in results[results["subset"] == ALL].groupby(["task", "metric"], sort=False):
        metric = next(m for m in TASKS[task_name].metrics if m.name == metric_name)
        values = cells.pivot_table(index="seed", columns="name", values="value")
        models, baselines = (list(cells[cells["kind"] == kind]["name"].unique()) for kind in ("model", "baseline"))
        best = values[baselines].mean().sort_values(ascending=not metric.higher_is_better, kind="stable").index[:1]
        for a, b in [*combinations(models, 2), *product(models, best)]:
            differences = (values[a] - values[b]).dropna()
            if not (n := len(differences)):
                continue
            unit = " points" if metric.is_share else f" in {metric.label.partition(' (')[0]}"
            mean = float(differences.mean())
            half = student_t(n - 1) * float(differences.std()) / math.sqrt(n) if n > 1 else math.nan
            low, high = mean - half, mean + half
            better, worse = (a, b) if (mean > 0) == metric.higher_is_better else (b, a)
            if mean == 0 or low <= 0 <= high:
                verdict, ends = f"{a} and {b}: no clear difference, {metric.difference(mean, mean)}{unit}", [low, high]
            else:
                verdict = f"{better} better than {worse} by {metric.difference(abs(mean), mean)}{unit}"
                ends = sorted([abs(low), abs(high)])
            verdict += " on one seed" if n == 1 else " [{}, {}]".format(*(metric.difference(x, mean) for x in ends))
            rows.append((task_name, metric_name, a, b, mean, low, high, verdict))
    return pd.DataFrame(rows, columns=["task", "metric", "a", "b", "difference", "low", "high", "verdict"])


def tuning_table(jobs: Sequence[Job], records: Records) -> pd.DataFrame:
    """A row per tuning run; a run without a record has failed, and its validation loss is infinite.

    Chosen is the rate of the lowest mean validation loss over the seeds.
    """
    key, failed = ["task", "model", "learning_rate", "seed"], {"val_loss": math.inf, "best_epoch": 0, "epochs": 0}
    found = runs_table(records).reindex(columns=[*key, *failed])
    table = pd.DataFrame(jobs)[key].merge(found, how="left").fillna(failed).astype({"best_epoch": int, "epochs": int})
    means = table.groupby(key[:3])["val_loss"].transform("mean")
    lowest = means.groupby([table["task"], table["model"]]).transform("min")
    return table.assign(chosen=(means == lowest) & np.isfinite(means))


def performance_tables(results: pd.DataFrame, runs: pd.DataFrame, task: Task) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One task's results as a person reads them, mean ± deviation over seeds: test scores; how the models got there."""
    summary = summarise(results.query("task == @task.name and subset == @ALL")).set_index("name")
    first = summary[summary["metric"] == task.metrics[0].name]
    scores = first[["kind"]].replace("model", "")
    for metric in task.metrics:
        cells = summary.loc[summary["metric"] == metric.name, ["mean", "std"]]
        scores[metric.name] = [metric.show(*cell) for cell in cells.to_numpy()]
    groups = runs[runs["task"] == task.name].groupby("model", sort=False)
    rates = groups["learning_rate"].agg(lambda each: ", ".join(f"{rate:g}" for rate in sorted({*each})))
    training = pd.DataFrame({"learning rate": rates})
    for name in ("best_epoch", "epochs", "seconds"):
        training[name.replace("_", " ")] = groups[name].mean().map("{:.1f}".format)
    means = first["mean"] if task.metrics[0].higher_is_better else -first["mean"]
    best = means.groupby(first["kind"]).max()
    if best.get("ceiling", -math.inf) > best.get("baseline", math.inf):  # not so on some small test splits
        closed = (means - best["baseline"]) / (best["ceiling"] - best["baseline"])
        training["gap closed"] = closed.map(lambda x: f"{100 * x:.0f} %")
    return scores.reset_index(names=""), training.reset_index(names="")


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, its columns aligned; numbers to the right."""
    right = [pd.api.types.is_numeric_dtype(table[column]) for column in table]
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in table.astype(object).to_numpy()]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(table.columns, *cells)]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right)]
    rows = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)] for row in (table.columns, *cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def task_text(task: Task, records: Records, results: pd.DataFrame, runs: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    """One task's results: what the data are, tables, findings; `verdicts`: `compare`."""
    first, runs = task.metrics[0], runs[runs["task"] == task.name]
    groups, tables = runs.groupby("model", sort=False), map(markdown, performance_tables(results, runs, task))
    # what the results say, in sentences: verdicts on pairs, examples that need memory, what may mislead
    verdicts = verdicts.query("task == @task.name and metric in [@first.name, @PERPLEXITY.name]")
    sentences = [f"{verdict}." for verdict in verdicts["verdict"]]
    sentences += ["One seed supports no ranking."] * bool(verdicts["low"].isna().any())
    means = results.query("task == @task.name and metric == @first.name").pivot_table("value", "name", "subset")
    models = means.loc[runs["model"].unique()]
    if task.hard_subset in models:
        shares = ", ".join(f"{model} {first.show(share)}" for model, share in models[task.hard_subset].items())
        sentences.append(f"Accuracy, {task.hard_subset}: {shares}.")
    for model in models.index[models[ALL] <= means[ALL].get(MAJORITY, -math.inf) + 0.01]:
        sentences.append(f"{model} knows little more than how frequent the labels are: see the recall of each.")
    rates = groups["learning_rate"].nunique()
    sentences += [f"The means of {model} mix runs at different learning rates." for model in rates.index[rates > 1]]
    if capped := runs["capped"].sum():
        sentences.append(f"{capped} of {len(runs)} runs ended at the cap on epochs, perhaps too soon: see --epochs.")
    doubts = [record.get("doubts", []) for record in records if record["task"] == task.name]
    sentences += dict.fromkeys(f"Note: {doubt}." for each in doubts for doubt in each)
    sentences = "\n".join(textwrap.fill(f"- {sentence}", 79, subsequent_indent="  ") for sentence in sentences)
    seeds = groups["seed"].agg(lambda each: ", ".join(map(str, each)))
    shown = seeds.iloc[0] if seeds.nunique() == 1 else "; ".join(f"{each} ({name})" for name, each in seeds.items())
    generated = not runs["configuration"].iloc[0]["file"]
    title = f"## {runs['title'].iloc[0]}" + f"\n\n{textwrap.fill(task.question, 79)}" * generated
    return "\n\n".join([title, *tables, f"Test split, mean ± standard deviation over the seeds {shown}.", sentences])


def details_text(runs: pd.DataFrame, about: Mapping | None) -> str:
    """More on one task, from its runs: scores by label, three test examples with the answers; and `about` the data."""
    parts, same_seed = [""], runs[runs["seed"] == runs["seed"].iloc[0]]
    if "confusion" in runs["evidence"].iloc[0]:
        parts += [markdown(label_scores(runs).map(lambda x: x if isinstance(x, str) else f"{x:.3f}"))]
        parts += ["Test splits of all seeds together. The mean recall is the balanced accuracy."]
    for rows in zip(*same_seed["examples"]):
        text, truth, *_ = rows[0].values()
        answers = [each if isinstance(each, str) else plain(each) for each in (truth, *(row["answer"] for row in rows))]
        sure = [f" ({row['probability']:.2f})" if "probability" in row else "" for row in rows]
        shown = ", ".join(f"{model} {answer}{p}" for model, answer, p in zip(same_seed["model"], answers[1:], sure))
        words = text.split()
        parts += [f"> {'... ' * (len(words) > 16)}{' '.join(words[-16:])}\n>\n> truth: {answers[0]}; {shown}"]
    if about:
        file = about["configuration"]["file"]
        digest = f", SHA-256 {file['digest'][:12]}..." if file else ""
        parts += [f"The data of seed {about['seed']}{digest}: {facts_text(about['facts'])}."]
    return "\n\n".join(parts)


def facts_text(facts: Mapping[str, float]) -> str:
    """What is known of the data, in a line."""
    return ", ".join(f"{name} {format(x, ',.0f') if x == int(x) else plain(x)}" for name, x in facts.items())


def summary_text(records: Records, runs: pd.DataFrame, texts: Mapping[str, str], models: pd.DataFrame) -> str:
    """The texts as a page of Markdown, with what the data were and where it ran; `models`: a run of each."""
    environments = pd.DataFrame([record["environment"] for record in records]).astype(str)
    about = {record["task"]: record for record in reversed(records) if "facts" in record}  # of the first seed
    details = {name: details_text(of_task, about.get(name)) for name, of_task in runs.groupby("task")}
    parts = [
        "# RNN, LSTM and GRU: results",
        "The same training for vanilla RNN, LSTM and GRU, each at its own learning rate. Each seed draws its own data, "
        "or the splits of a user's reviews; a user's text or series is always cut at the same places. A ceiling is the "
        "best that is possible on generated data; gap closed is how much of the way from best baseline to ceiling a "
        "model has come. Brackets hold 95 % intervals of the paired difference over seeds (Student's t), where none is "
        "better the first minus the second. Seconds are those of a run's training, with other runs beside it.",
        *(text + details.get(name, "") for name, text in texts.items()),
        f"## Cost of a training step\n\n{markdown(models[['task', 'model', *COST_COLUMNS]])}",
        "Median time of a step, the models taking turns on the same batches if one command trained them; activations: "
        "what the forward pass on a full batch of the longest possible examples keeps for the backward pass. The "
        "kernel is the implementation of the recurrent layer that ran: times compare kernels as much as cells.",
        "## Environment",
        "\n".join(f"- {name}: {', '.join(sorted(set(environments[name])))}" for name in environments),
    ]
    return "\n\n".join(parts) + "\n"


# ======================================================================================
# Figures
# ======================================================================================

COLOURS = {"RNN": "#D55E00", "LSTM": "#0072B2", "GRU": "#009E73"}  # Okabe & Ito 2008: safe for colour-blind readers
GREY = "#777777"
STYLE = {"font.size": 9, "figure.dpi": 120, "legend.frameon": False, "grid.color": "#E4E4E4", "axes.grid": True}
STYLE |= {"axes.axisbelow": True, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
MARKERS = {"baseline": ("D", GREY), "ceiling": ("|", "black")}  # a model's is a circle of its colour


def colour(model: str) -> tuple[float, ...]:
    """The colour of a model, the same in every figure; a matched model's is paler, a baseline's grey."""
    return to_rgba(COLOURS.get(base_name(model), GREY), 1.0 if model == base_name(model) else 0.5)


def line(label: str, colour: object = GREY, style: str = "-", **more: object) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, linestyle=style, label=label, **more)


def finish(figure: Figure, title: str, handles: Sequence = (), columns: int | None = None) -> Figure:
    """The figure with its title and, below it, a legend."""
    figure.suptitle(title)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns or len(handles))
    return figure


def training_history_figure(runs: pd.DataFrame, task: Task) -> Figure:
    """Loss and metric by epoch: a column per model, a line per seed."""
    models, metrics = list(runs.groupby("model", sort=False)), task.metrics[:2]
    figure = Figure(figsize=(max(3.2 * len(models) + 0.8, 7.2), 5.4), layout="constrained")
    grid = figure.subplots(len(metrics), len(models), sharex=True, sharey="row", squeeze=False)
    for column, (name, of_model) in zip(grid.T, models):
        shade = colour(name)
        column[0].set_title(name, color=shade, fontweight="bold")
        column[-1].set_xlabel("epoch")
        for run, (axes, metric) in product(of_model.itertuples(), zip(column, metrics)):
            history = pd.json_normalize(run.history).set_index("epoch")
            for split, style in (("train", ".:"), ("validation", ".-")):
                axes.plot(history[f"{split}.{metric.name}"], style, color=shade, linewidth=1.2, markersize=2, alpha=0.8)
            axes.plot(history.loc[[run.best_epoch], f"validation.{metric.name}"], "o", color=shade, markersize=5)
    for axes, metric in zip(grid[:, 0], metrics):
        axes.set_ylabel(metric.label)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    lines = [line("training (running mean over the epoch)", style=":"), line("validation")]
    lines += [line("epoch whose weights were kept", style="", marker="o")]
    return finish(figure, f"{runs['title'].iloc[0]}: training, a line per seed", lines)


def forecasts_figure(runs: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Forecasts against the truth, one step ahead and free-running, and the latter's error by horizon."""
    models = runs.drop_duplicates("model")
    figure = Figure(figsize=(11, 1.9 * len(models) + 3.4), layout="constrained")
    grid = figure.add_gridspec(len(models) + 1, 2, height_ratios=[*[1] * len(models), 1.3])
    for row, run in enumerate(models.itertuples()):
        found, shade, who = run.evidence["forecasts"], colour(run.model), f"{run.model}, seed {run.seed}"
        left = figure.add_subplot(grid[row, 0], ylabel="value (series units)")
        right = figure.add_subplot(grid[row, 1], sharey=left)
        left.set_title(f"{who}, one step ahead: MSE {run.test_mse:.4g}", color=shade)
        right.set_title(f"{who}, free-running: each forecast is fed back", color=shade)
        for axes, prefix in ((left, ""), (right, "free_")):
            steps = np.arange(1, len(found[f"{prefix}truth"]) + 1)
            axes.plot(steps, found[f"{prefix}truth"], color=GREY, marker="o", markersize=2.5, linewidth=0)
            axes.plot(steps, found[f"{prefix}forecast"], color=shade)
            axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("test example, in order of time")
    right.set_xlabel("steps ahead of the last observed value")
    errors = figure.add_subplot(grid[-1, :], xlabel="steps ahead", ylabel="MSE (series units²)")
    held = np.mean([each["forecasts"]["persistence_mse"] for each in runs["evidence"]], axis=0)
    steps = np.arange(1, len(held) + 1)
    for name, evidence in runs.groupby("model", sort=False)["evidence"]:
        free = np.mean([each["forecasts"]["free_mse"] for each in evidence], axis=0)
        errors.plot(steps, free, color=colour(name), label=name)
    ceilings = results.query("kind == 'ceiling' and metric == 'mse'").groupby("name")["value"].mean()
    for ceiling, value in ceilings.items():
        errors.axhline(value, color="black", linestyle=":", label=f"{ceiling}, one step ahead")
    errors.plot(steps, held, color=GREY, linewidth=1, label="persistence")
    variance = runs["evidence"].iloc[0]["forecasts"]["variance"]
    errors.axhline(variance, color=GREY, linestyle="--", label="variance of the test part")
    errors.set(title="Free-running error, mean over seeds", ylim=(0, 1.3 * errors.get_ylim()[1]))  # room for the legend
    errors.xaxis.get_major_locator().set_params(integer=True)
    errors.legend(loc="upper center", ncols=6)
    observed = line("observed value", style="", marker="o", markersize=2.5)
    lines = [observed, line("forecast (in the model's colour)", "black")]
    return finish(figure, f"{runs['title'].iloc[0]}: forecasts against the truth", lines)


def parameters_figure(models: pd.DataFrame) -> Figure:
    """Parameters by part, each model of each task."""
    tasks = list(models.groupby("task", sort=False))
    figure = Figure(figsize=(9, 1.6 * len(tasks) + 1.0), layout="constrained")
    for axes, (_, table) in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks):
        table, left = table.iloc[::-1], 0
        look = {"color": [colour(name) for name in table["model"]], "edgecolor": "white", "linewidth": 0.5}
        for part, hatch in PARTS.items():
            axes.barh(table["model"], table[part], left=left, hatch=hatch, **look)
            left = left + table[part]
        for row in table.itertuples():
            axes.text(row.parameters, row.model, f" {row.parameters:,} (recurrent {row.recurrent:,})", va="center")
        first = table.iloc[0]  # vocabularies differ from seed to seed
        axes.set(xlim=(0, 1.35 * table["parameters"].max()), title=f"{first['title']}, seed {first['seed']}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("trainable parameters")
    parts = [Patch(facecolor=GREY, edgecolor="white", hatch=hatch, label=part) for part, hatch in PARTS.items()]
    return finish(figure, "Parameters by part of the model", parts)


def architectures_figure(models: pd.DataFrame) -> Figure:
    """A strip of boxes per model: its layers in order, with settings, output shape and parameters."""
    width = models["layers"].map(len).max() + 1
    figure = Figure(figsize=(1.75 * width + 1.5, 1.0 * len(models) + 0.6), layout="constrained")
    for axes, run in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models.itertuples()):
        shade = colour(run.model)
        axes.set(xlim=(-0.9, width - 0.5), ylim=(-0.5, 0.5))
        axes.axis("off")
        axes.text(-0.85, 0, f"{run.model}\n{run.task}\nseed {run.seed}", color=shade, fontweight="bold", va="center")
        start = {"kind": "input", "settings": "", "shape": run.input_shape, "parameters": 0}
        for x, layer in enumerate([start, *run.layers]):  # a box, with an arrow from the one before it
            settings = re.sub(r", (batch_first|inplace|bias)=\w+|in_features=|out_features=", "", layer["settings"])
            lines = ["last state" if layer["kind"] == "Recurrent" else layer["kind"]]
            lines += [f"({settings})"] * bool(settings)
            lines += [f"→ ({', '.join(['B', *map(str, layer['shape'])])})"]
            lines += [f"{layer['parameters']:,} weights"] * bool(layer["parameters"])
            box = {"boxstyle": "round,pad=0.4", "edgecolor": shade, "facecolor": "white"}
            box["linewidth"] = 2.0 if layer["parameters"] else 0.8
            axes.text(x, 0, "\n".join(lines), ha="center", va="center", fontsize=7.5, bbox=box, zorder=2)
            if x:
                axes.annotate("", (x - 0.4, 0), (x - 0.6, 0), arrowprops={"arrowstyle": "->", "color": GREY}, zorder=3)
    return finish(figure, "Architectures, drawn from the live models (B: batch)")


def performance_figure(results: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """A row per task: test metric with baselines and ceiling, training time, cost of a step."""
    tasks, summary = list(runs.groupby("task", sort=False)), summarise(results[results["subset"] == ALL])
    figure = Figure(figsize=(14, 2.5 * len(tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), 4, squeeze=False, width_ratios=[2.2, 1, 1, 1])
    for (scores, *bars), (task, of_task) in zip(grid, tasks):
        metric = TASKS[task].metrics[0]
        for score in summary.query("task == @task and metric == @metric.name").iloc[::-1].itertuples():
            marker, shade = MARKERS.get(score.kind) or ("o", colour(score.name))
            scores.errorbar(score.mean, score.name, xerr=np.nan_to_num(score.std), fmt=marker, color=shade, capsize=3)
        scores.set(title=of_task["title"].iloc[0], xlabel=f"test {metric.label}")
        if not metric.higher_is_better:  # errors differ by factors
            scores.set(xscale="log", xlabel=f"test {metric.label}, log scale")
            low, high = scores.get_xlim()
            scores.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 6, 8)))
            scores.xaxis.set_major_formatter("{x:.6g}")
            scores.xaxis.set_minor_formatter("")
        costs = of_task.drop_duplicates("model").set_index("model").iloc[::-1]  # barh draws upwards
        seconds = of_task.groupby("model")["seconds"].mean()[costs.index]
        columns = (  # what is measured, the measurements, what is written behind them, room for it
            ("training (s per run)", seconds, "", 1.35),
            ("step (ms), kernel", costs["ms_per_step"], " " + costs["kernel"], 2.0),
            ("activations (MiB, longest batch)", costs["activation_bytes"] / 2**20, "", 1.35),
        )
        for axes, (label, values, notes, room) in zip(bars, columns):
            drawn = axes.barh(values.index, values, color=[colour(name) for name in values.index])
            axes.bar_label(drawn, values.map("{:.3g}".format) + notes, padding=3)
            axes.set(xlabel=label, xlim=(0, max(room * values.max(), 0.1)))
            axes.set_ylim(-0.75, len(values) - 0.25)  # a bar alone is no wider than among others
            axes.grid(axis="y", visible=False)
    return finish(figure, "Test split, mean ± standard deviation over seeds (diamonds: baselines, bar: ceiling), costs")


def learning_rates_figure(table: pd.DataFrame) -> Figure:
    """Validation loss by learning rate, a line per model through the means over seeds; the chosen rate is ringed."""
    tasks = list(table.groupby("task", sort=False))
    figure = Figure(figsize=(4.2 * len(tasks), 4.0), layout="constrained")
    for axes, (task, runs) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for model, of_model in runs.groupby("model", sort=False):  # a rate that failed is not drawn
            means = of_model.groupby("learning_rate")["val_loss"].mean()
            chosen = of_model[of_model["chosen"]]["learning_rate"].unique()
            axes.plot(means[np.isfinite(means)], "o-", color=colour(model), markersize=4)
            axes.plot("learning_rate", "val_loss", ".", data=of_model, color=colour(model), markersize=3, alpha=0.5)
            axes.plot(means[chosen], "o", color=colour(model), markersize=11, fillstyle="none")
        rates = sorted(runs["learning_rate"].unique())
        axes.set(title=TASKS[task].title, xscale="log", xlabel="learning rate", ylabel="validation loss")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    lines = [line(model, colour(model), linewidth=3) for model in table["model"].unique()]
    ring = {"marker": "o", "markersize": 11, "fillstyle": "none"}
    lines += [line("one seed", style="", marker="."), line("chosen", style="", **ring)]
    return finish(figure, "Each model's learning rate, by the validation loss: mean over seeds", lines)


def errors_figure(runs: pd.DataFrame) -> Figure:
    """The confusion matrix of each classifier, in per cent of each true label, over the test splits of all seeds."""
    models, labels = runs.groupby("model", sort=False)["evidence"], runs["evidence"].iloc[0]["labels"]
    size = max(2.0, 0.6 * len(labels) + 1.2) * len(models) + 1.6, 0.5 * len(labels) + 2.4
    figure = Figure(figsize=size, layout="constrained")
    for axes, (name, evidence) in zip(figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models):
        counts = np.sum([each["confusion"] for each in evidence], axis=0)
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=130, aspect="auto")  # text stays readable on the darkest
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 60 else "black")
        axes.set_title(name, color=colour(name), fontweight="bold")
        axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 2 else 0)
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(visible=False)
    figure.supxlabel("predicted label", fontsize=9)
    figure.supylabel("true label", fontsize=9)
    return finish(figure, f"{runs['title'].iloc[0]}: true and predicted label, in % of each true label")


def long_range_figure(runs: pd.DataFrame, results: pd.DataFrame) -> Figure | None:
    """Why memory matters: gradient by time step, accuracy by distance and by ending; None without any."""
    accuracy = results.query("metric == @ACCURACY.name").groupby(["task", "subset", "name"], sort=False)["value"].mean()
    classifiers = runs[runs["task"] == CLASSIFIER.name].groupby("model", sort=False)["evidence"]
    known = {*results["name"], *results["subset"]}  # the last two panels need what only a generator knows
    there = {"gradient": len(classifiers), "distance": FULL_STATE in known, "ending": CONTRADICTS in known}
    shown = [panel for panel in there if there[panel]]
    if not shown:
        return None
    figure = Figure(figsize=(4.6 * len(shown), 4.4), layout="constrained")
    panels = figure.subplot_mosaic([shown])
    lines = [line(name, colour(name), linewidth=3) for name in runs["model"].unique()]
    if axes := panels.get("gradient"):  # that reaches each word
        for (name, evidence), what in product(classifiers, ("initial_gradient", "gradient")):
            mean = [np.mean(word) for word in zip(*(each[what] for each in evidence))]  # as far back as all runs reach
            axes.semilogy(mean, "-" if what == "gradient" else ":", color=colour(name), linewidth=1.3)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-12))  # a gradient below that is as good as none
        axes.set(title="Gradient of the loss at each word", xlabel="words back from the end of the review")
        axes.set_ylabel("norm of the gradient")
        axes.legend(handles=[line("before training", style=":"), line("after")], loc="lower left")
    if axes := panels.get("distance"):  # accuracy on verbs and objects by that from the subject that determines them
        found = accuracy[PREDICTOR.name].reset_index()
        found[["role", "distance"]] = found["subset"].str.extract(r"(\w+) (\d+) words after")
        found = found.dropna().astype({"distance": int}).pivot_table("value", ["role", "distance"], "name", sort=False)
        found = 100 * found.div(found[FULL_STATE], axis=0)  # verbs and objects have different ceilings
        names = [name for name in found if base_name(name) in MODEL_NAMES or name == "trigram"]
        for name, (role, style) in product(names, (("verb", "o-"), ("object", "s:"))):
            axes.plot(found.loc[role][name].dropna().sort_index(), style, color=colour(name), markersize=4)
        axes.axhline(100, color="black", linewidth=1)
        axes.set(title="Next word, by distance from its subject", xlabel="words back to the subject", ylim=(0, 105))
        axes.set_ylabel("accuracy (% of the ceiling's)")
        roles = [line("verb, where one must come", marker="o"), line("object", style=":", marker="s")]
        axes.legend(handles=roles, loc="lower right", bbox_to_anchor=(1, 0.18))
        lines.append(line("trigram", linewidth=3))
    if axes := panels.get("ending"):  # accuracy on reviews whose closing verdict agrees with their label, or does not
        found = accuracy[CLASSIFIER.name].unstack("name").reindex([AGREES, CONTRADICTS])
        models = [name for name in found if base_name(name) in MODEL_NAMES]
        for i, name in enumerate(models):
            middle = np.arange(2) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
            bars = axes.bar(middle, 100 * found[name], 0.75 / len(models), color=colour(name))
            axes.bar_label(bars, fmt="%.0f")
        axes.axhline(50, color=GREY, linestyle="--", linewidth=1)
        axes.set(title="Reviews, by what their last word says", ylim=(0, 105), ylabel="accuracy (%); dashed: guessing")
        axes.set_xticks([0, 1], [subset.replace(" the", "\nthe") for subset in found.index])
        axes.grid(axis="x", visible=False)
    return finish(figure, "Long-range memory, mean over seeds", lines, 1 if len(shown) == 1 else None)


# ======================================================================================
# Command line
# ======================================================================================

COLUMNS = {"text": "reviews", "label": "reviews", "series": "series"}  # that can be named, each with the file it is of


def number(text: str, least: float, most: float = math.inf, kind: type = float) -> float:
    """An argument type: a number of a kind, from `least` to `most`."""
    value = math.nan
    with suppress(ValueError):
        value = kind(text)
    if not least <= value <= most:
        span = f"from {least:g} to {most:g}" if most < math.inf else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole number' if kind is int else 'number'} {span}")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises InputError when they cannot be followed."""
    require(not isinstance(argv, str), f"main({argv!r}): the options are a list, as in main([{argv!r}])")
    about = {"description": __doc__.partition("Shapes")[0], "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("pytorch_rnn_models.py", allow_abbrev=False, **about)
    parser.error = partial(require, False)  # argparse's would print the usage and end the interpreter
    whole, positive = (partial(number, least=least, kind=int) for least in (0, 1))
    rate, warmth = partial(number, least=1e-6, most=1), partial(number, least=0, most=100)
    add = parser.add_argument_group("what is trained").add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="any of %(choices)s")
    add("--models", nargs="+", choices=MODEL_NAMES, default=MODEL_NAMES, metavar="MODEL", help="any of %(choices)s")
    add("--seeds", nargs="+", type=whole, metavar="N", help="default: 42 43 44; with --quick: 42")
    add("--quick", action="store_true", help="the whole pipeline on tiny data, two epochs, in under 30 s")
    add("--match", choices=("hidden", "params"), default="hidden", help="equal hidden sizes or recurrent parameters")
    add("--tune", action="store_true", help="choose learning rates first, by validation loss")
    add("--learning-rate", type=rate, metavar="X", help="of all models; default: each model's own, as --tune chose it")
    add("--epochs", type=positive, metavar="N", help="cap on epochs; default: by task")
    add("--hidden-dim", type=positive, metavar="N", help="hidden units; default: 100, of the forecaster 32")
    add("--window", type=positive, metavar="N", help="words or steps that are seen; default: 10, 50")
    add = parser.add_argument_group("your own data, in place of the generated (.gz works too)").add_argument
    add("--reviews", metavar="FILE.csv", help="for the classifier: a column of texts and one of labels")
    add("--corpus", metavar="FILE.txt", help="for the predictor: plain text, UTF-8")
    add("--series", metavar="FILE.csv", help="for the forecaster: a column of numbers, in order of time")
    for column, usual in zip(COLUMNS, ("text, review", "label, sentiment", "the only numeric one")):
        add(f"--{column}-column", metavar="NAME", help=f"default: {usual}")
    add = parser.add_argument_group("how and where").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: CUDA if there is one")
    add("--workers", type=positive, metavar="N", help="runs at a time; default: as many as cores")
    add("--output-dir", type=Path, metavar="DIR", help="default: outputs, or a folder below it")
    add("--resume", action="store_true", help="skip the runs that are finished in DIR")
    add = parser.add_argument_group("instead of training").add_argument
    add("--report", action="store_true", help="tables and figures again, from the records in DIR")
    add("--benchmark", action="store_true", help="what a training step costs, beside a loop with nothing but the step")
    add("--predict", nargs=2, metavar=("CHECKPOINT", "INPUT"), help="INPUT: a text, a file, or -")
    add("--length", type=positive, metavar="N", help="words or values to continue by; default: 20")
    add("--temperature", type=warmth, metavar="X", help="of the words: 0 takes the likeliest; default: 1")
    add("--seed", type=whole, metavar="N", help="of the words that --predict draws; default: 42")
    options = parser.parse_args(argv)

    # what goes with what
    for name, default in (("length", 20), ("temperature", 1.0), ("seed", 42)):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not options.predict:
            raise InputError(f"--{name} goes with --predict" + "; for training there is --seeds" * (name == "seed"))
    modes = [f"--{name}" for name in ("report", "benchmark", "predict", "tune") if getattr(options, name)]
    modes += ["--learning-rate"] * (options.tune and options.learning_rate is not None)
    require(len(modes) < 2, f"{' and '.join(modes)} cannot go together")
    for column, file in COLUMNS.items():
        used = options.predict or getattr(options, file) is not None or not getattr(options, f"{column}_column")
        require(used, f"--{column}-column goes with --{file} or --predict")
    options.seeds = list(dict.fromkeys(options.seeds or (DEFAULT_SEEDS[:1] if options.quick else DEFAULT_SEEDS)))
    options.tasks = [name for name in TASKS if name in options.tasks]
    names = [name for name in MODEL_NAMES if name in options.models]
    options.models = [name + MATCHED * (options.match == "params" and name != "LSTM") for name in names]
    used = not options.window or any(hasattr(DEFAULT[name], "window") for name in options.tasks)
    require(used, "--window is for predictor and forecaster, which --tasks leaves out")
    stems = []
    for task in TASKS.values():
        if (path := getattr(options, task.file_option)) is not None:
            stems.append(re.sub(r"(?i)(\.csv|\.txt)?(\.gz)?$", "", Path(path).name))
            without = f"--{task.file_option} is for the task {task.name}, which --tasks leaves out"
            require(task.name in options.tasks, without)
    default = "quick" if options.quick else "_".join(["own", *stems]) if stems else ""
    options.output_dir = options.output_dir or Path("outputs", default)
    here = ["cuda"] * torch.cuda.is_available() + ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    name = here[0] if options.device == "auto" else options.device
    require(name in here, f"--device {name}: there is none here; choose from {', '.join(sorted(here))}, or auto")
    options.device = torch.device(name)
    return options


def configure(options: argparse.Namespace) -> Config:
    """The configuration of each task that the options ask for; raises InputError."""
    config = dict(QUICK if options.quick else DEFAULT)
    for name, task in config.items():
        file = TASKS[name].file_option
        columns = [f"{column}_column" for column, its_file in COLUMNS.items() if its_file == file]
        knobs = [knob for knob in ("hidden_dim", "window") if hasattr(task, knob)]
        given = {key: value for key in (file, "epochs", *columns, *knobs) if (value := getattr(options, key))}
        changes = {knob: given[knob] for knob in knobs if knob in given}
        changes["training"] = replace(task.training, epochs=options.epochs or task.training.epochs)
        if (path := getattr(options, file)) is not None:
            changes["file"] = user_file(path, [given.get(column, "") for column in columns])
        if options.learning_rate:
            changes["learning_rates"] = LearningRates(*[options.learning_rate] * len(LearningRates._fields))
        spelled = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items()]
        spelled = " ".join(["--quick"] * options.quick + spelled) or "no options"
        config[name] = replace(task, options=spelled, **changes)
    return config


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The processor cores that this process may use; a container may grant less than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = map(int, quota_file.read_text().split())  # microseconds of all cores; or "max"
        cores = max(1, min(cores, quota // period))
    return cores


def make_folders(directory: Path, *more: str) -> None:
    """Make the output directory; raise OSError, before any training, if files cannot be written to it."""
    try:
        for folder in (directory, *(directory / name for name in ("runs", "models", "predictions", *more))):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--output-dir {directory}: cannot be written ({error.strerror}); choose another") from error


def step_costs(task: Task, data: TaskData, options: argparse.Namespace, config: TaskConfig, **repeats: int) -> dict:
    """What a training step of each model asked for costs on `data`; `repeats`: steps and rounds."""
    models = {model: build_model(task, model, config, data, 0)[0].to(options.device) for model in options.models}
    return measure_costs(task, models, config.training, data, **repeats)


def run_jobs(jobs: Sequence[Job], options: argparse.Namespace, config: Config, measure: Callable) -> dict[Job, str]:
    """Carry out what is not finished of `jobs`, several at a time; returns the runs that failed, and why.

    `measure` gives the costs of a step, and is called only if there is a run to carry out.
    """
    if options.resume:
        jobs = unfinished(jobs, options.output_dir, config)
    if not jobs:
        return {}
    costs, device = measure(), options.device
    workers = min(options.workers or (1 if options.quick or device.type != "cpu" else usable_cores()), len(jobs))
    expected = dict.fromkeys(jobs, (1.0, 1))  # seconds of a batch, and batches; of the baselines a guess
    for job in jobs:
        if job.model != BASELINES:
            cost, epochs = costs[job.task][job.model], config[job.task].training.epochs
            expected[job] = cost["ms_per_step"] / 1000, cost["batches_per_epoch"] * epochs
    estimate = tqdm.format_interval(sum(map(math.prod, expected.values())) / workers)
    runs = f"{sum(job.model != BASELINES for job in jobs)} {'tuning ' * jobs[0].tuning}runs on {device}"
    print(f"{runs}, {workers} at a time with a thread each: about {estimate} if all epochs are used", file=sys.stderr)
    turns = list(product(options.tasks, options.seeds))  # of each the longest run first
    jobs = sorted(jobs, key=lambda job: (turns.index((job.task, job.seed)), -math.prod(expected[job])))
    work = partial(carry_out, config=config, device=device, output_dir=options.output_dir, costs=costs)
    with closing(Progress({job: expected[job] for job in jobs})) as progress:
        if workers > 1:
            cached_data.cache_clear()
            run_in_children(jobs, work, progress, workers)
        else:
            for job in jobs:
                progress.update(job, 0, None)
                progress.finish(job, attempt(job, partial(progress.update, job), work))
                gc.collect()
                torch.cuda.empty_cache()
        return progress.failures


def tune(options: argparse.Namespace, config: Config, measure: Callable) -> tuple[dict, int]:
    """Each model's learning rate, by task and model: that of the lowest mean validation loss over the seeds.

    All models try one grid; a rate at its edge is followed one step outwards. A model of which no rate converged on
    all seeds is left out. Writes the table and the figure; returns also how many runs failed but by divergence. The
    runs have no test part: `carry_out` takes it away.
    """
    grid = RATES[2:4] if options.quick else RATES[1:-1]
    models = list(product(options.tasks, options.models))
    outwards = {grid[0]: RATES[RATES.index(grid[0]) - 1], grid[-1]: RATES[RATES.index(grid[-1]) + 1]}
    jobs, untried, failures = [], [(*model, rate) for model in models for rate in grid], []
    while untried:
        new = [Job(task, model, seed, rate, True) for task, model, rate in untried for seed in options.seeds]
        failures += run_jobs(new, options, config, measure).values()
        jobs += new
        table = tuning_table(jobs, read_records(options.output_dir, config, tuning=True)[0].values())
        best = table[table["chosen"]].drop_duplicates(["task", "model"]).set_index(["task", "model"])
        rates = best["learning_rate"].to_dict()
        untried = [(*model, outwards[rate]) for model, rate in rates.items() if rate in outwards]
        outwards = {}  # one step only
    write_whole(options.output_dir / "pytorch_rnn_tuning.csv", table.to_csv(index=False))
    draw(options.output_dir, {"learning_rates": partial(learning_rates_figure, table)})
    for task, model in models:
        found = f"{rates[task, model]:g}" if (task, model) in rates else "none: training failed at every rate"
        print(f"learning rate of {task} {model}: {found}", file=sys.stderr)
    return rates, sum("the loss is not finite" not in failure for failure in failures)


def train(options: argparse.Namespace, config: Config) -> int:
    """Every run that the options ask for; returns how many failed."""
    # what cannot be used is to be said before anything else
    found = {name: cached_data(name, config[name], options.seeds[0], options.device) for name in options.tasks}
    make_folders(options.output_dir, *["runs/tuning"] * options.tune)
    for name, data in found.items():
        about = f"{TASKS[name].title}, the data of seed {options.seeds[0]}: {facts_text(data.facts)}"
        look = textwrap.wrap(about, 79) + [f"    {' '.join(sample.split())}"[:76] for sample in data.samples]
        print(*look, sep="\n", file=sys.stderr)
        warn(data.doubts)

    @cache
    def measure() -> dict[str, dict]:  # only if there is a run to carry out, and once for tuning and comparison
        repeats = {"steps": 2, "rounds": 2}
        costs = {name: step_costs(TASKS[name], found[name], options, config[name], **repeats) for name in options.tasks}
        found.clear()  # from here on the runs hold the data
        return costs

    del data  # it would outlive `found`
    models = list(product(options.tasks, options.models))
    rates = {(task, model): getattr(config[task].learning_rates, base_name(model)) for task, model in models}
    failed = 0
    if options.tune:
        rates, failed = tune(options, config, measure)
    jobs = [Job(*model, seed, rate) for model, rate in rates.items() for seed in options.seeds]
    jobs += [Job(task, BASELINES, seed) for task in options.tasks for seed in options.seeds]
    return failed + len(run_jobs(jobs, options, config, measure)) + len(models) - len(rates)


def draw(output_dir: Path, figures: Mapping[str, Callable[[], Figure | None]]) -> tuple[dict[str, Figure], int]:
    """Draw and write what there is to draw; returns the figures, and how many failed: one must not cost the others."""
    drawn, failed = {}, 0
    for name, make in figures.items():
        try:
            with rc_context(STYLE):
                if figure := make():
                    figure.savefig(content := io.BytesIO(), format="png")
                    drawn[name] = figure
        except Exception as error:
            failed += 1
            print(f"failed: pytorch_rnn_{name}.png could not be drawn: {first_line(error)}", file=sys.stderr)
        if name in drawn:
            write_whole(output_dir / f"pytorch_rnn_{name}.png", content.getvalue())
    return drawn, failed


class Results(NamedTuple):
    """What `run` returns."""

    table: pd.DataFrame  # every score in long form: task, name, kind, seed, subset, metric, value
    figures: Mapping[str, Figure]  # by the names of their files, without what all begin with
    failed: int = 0  # how many runs and figures failed; each was named


def report(config: Config, output_dir: Path, failed: int) -> Results:
    """Tables and figures from the records in `output_dir`; `failed` runs are not there."""
    by_run, others = read_records(output_dir, config)
    records = list(by_run.values())
    trained = [record for record in records if "history" in record]
    if not trained:
        if failed:  # each was named
            raise RuntimeError("no run came to its end")
        where = f"no records in {output_dir / 'runs'} of trained models with the configuration asked for; train first"
        raise InputError(where + f" (the folder holds runs of: {'; '.join(sorted(others))})" * bool(others))
    warn(f"the folder also holds runs of: {each}" for each in sorted(others))
    results, runs = results_table(records), runs_table(trained)
    models, verdicts = runs.drop_duplicates(["task", "model"], ignore_index=True), compare(results)
    summary = summarise(results[results["subset"] == ALL])
    tables = {"runs": runs[RUN_COLUMNS], "comparisons": verdicts, "history": history_table(trained)}
    tables["summary"] = summary[summary["metric"].isin(CSV_METRICS)].drop(columns="subset")
    tables["costs"] = models[["task", "model", *PARAMETERS, *COST_COLUMNS]]
    for name, table in tables.items():
        write_whole(output_dir / f"pytorch_rnn_{name}.csv", table.to_csv(index=False))
    figures = {
        "long_range": partial(long_range_figure, runs, results),
        "parameter_counts": partial(parameters_figure, models),
        "architectures": partial(architectures_figure, models),
        "performance_summary": partial(performance_figure, results, runs),
    }
    texts = {}
    for task in (TASKS[name] for name in models["task"].unique()):
        of_task = runs[runs["task"] == task.name]
        texts[task.name] = task_text(task, records, results, runs, verdicts)
        figures[f"{task.name}_training_history"] = partial(training_history_figure, of_task, task)
        if "forecasts" in of_task["evidence"].iloc[0]:
            figures["time_series_predictions"] = partial(forecasts_figure, of_task, results)
        if "confusion" in of_task["evidence"].iloc[0]:
            figures[f"{task.name}_errors"] = partial(errors_figure, of_task)
    texts["parameters"] = f"## Parameters\n\n{markdown(models[['task', 'model', *PARTS, 'parameters']])}"
    write_whole(output_dir / "pytorch_rnn_summary.md", summary_text(records, runs, texts, models))
    drawn, broken = draw(output_dir, figures)
    print(*texts.values(), sep="\n\n")
    print(f"\nTables, figures, records and models are in {output_dir.resolve()}")
    return Results(results, drawn, failed + broken)


def benchmark(options: argparse.Namespace, config: Config) -> None:
    """Measure what a step costs, print it and write it to a file."""
    make_folders(options.output_dir)
    print("measuring; this takes about a minute on an idle machine", file=sys.stderr)
    rows, repeats = [], {"steps": 2, "rounds": 2} if options.quick else {"steps": 5, "rounds": 30}
    for name in options.tasks:
        data = cached_data(name, config[name], options.seeds[0], options.device)
        costs = step_costs(TASKS[name], data, options, config[name], **repeats)
        rows += [{"task": name, "model": model} | cost for model, cost in costs.items()]
    columns = [f"{prefix}{unit}" for prefix in ("", "bare_") for unit in ("ms_per_step", "samples_per_second")]
    table = pd.DataFrame(rows)[["task", "model", *columns, "overhead", "kernel"]]
    write_whole(options.output_dir / "pytorch_rnn_benchmark.csv", table.to_csv(index=False))
    print(table.assign(overhead=table["overhead"].map("{:+.1%}".format)).to_string(index=False))


def execute(options: argparse.Namespace) -> Results | None:
    """Do what the options ask for; returns what came out, or None where there is nothing to show."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a child that imports the user's script
        os._exit(NO_GUARD)
    prepare_device(options.device)
    if options.predict:
        path, source = options.predict
        print(load_checkpoint(path).describe(source, options))
    elif options.benchmark:
        benchmark(options, configure(options))
    else:
        config = configure(options)
        return report(config, options.output_dir, 0 if options.report else train(options, config))
    return None


def run(**options: object) -> Results | None:
    """The experiment from Python: run(tasks=["classifier"], seeds=[1, 2], quick=True) takes the options of the command
    line, with underscores, and returns the scores and the figures. Raises InputError, RuntimeError, OSError."""
    argv = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple, range)) else [value] * (value is not True)
        if value is not None and value is not False:
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return execute(parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's own); returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a file that cannot hold "±" gets "\\xb1"
        sys.stdout.reconfigure(errors="backslashreplace")
    listens = threading.current_thread() is threading.main_thread()  # only there can a signal be listened to

    def interrupt(number: int, _frame: object) -> None:  # the same as Ctrl-C, but for the exit status
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt) if listens else None
    try:
        results = execute(parse_args(argv))
        return 1 if results and results.failed else 0
    except SystemExit:  # --help
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except (RuntimeError, MemoryError, OSError) as error:
        status, message = 1, first_line(error)
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        message = "interrupted; finished runs are kept: --resume does the rest, --report makes their tables and figures"
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)  # one line, whatever a file's name holds
    print(f"pytorch_rnn_models.py: {text if len(text) <= 300 else text[:297] + '...'}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
