"""Vanilla RNN, LSTM and GRU compared on three tasks, each with its baselines and its ceiling.

    python pytorch_rnn_models.py                 the whole experiment, into outputs/
    python pytorch_rnn_models.py --quick         all of it on tiny data, into outputs/quick/
    python pytorch_rnn_models.py --help          all options: your own data, trained models
    python -m pytest tests                       the tests

Tasks       classifier   positive or negative film reviews    (accuracy, binary cross-entropy)
            predictor    the next word of a corpus            (accuracy, cross-entropy, perplexity)
            forecaster   the next value of noisy sine waves   (MSE, MAE)
Sections    configuration (settings, learning rates), datasets (batches, vocabulary), generated data
            (and the ceiling of the series), your own data (reading files), baselines, models (use,
            saving, loading), tasks (preparation of the data), training, evidence (effect of a
            change, gradients, costs), experiment (runs, folders, tuning), results (statistics,
            tables, text), figures, command line: each uses only what stands above it
Data flow   options -> configuration -> runs -> records of test examples -> tables -> figures
Files       pytorch_rnn_*.png, pytorch_rnn_{runs,history,summary,comparisons,costs,tuning}.csv,
            pytorch_rnn_summary.md
            config.json                     the configuration: one folder holds one
            runs/TASK_MODEL_seedN.json      the record of a run; "baselines": what needs no training
            models/TASK_MODEL_seedN.pt      its model: load_checkpoint(path).predict(...) uses it
            predictions/TASK_seedN.csv      the answers of all models to each test example
            all in the output directory, each written whole or not at all

Shapes in comments: N examples, B batch, T time steps, E embedding, F input features, H hidden
units, V vocabulary, K labels, O origins of forecasts.
"""

from __future__ import annotations

import argparse
import codecs
import copy
import csv
import gzip
import hashlib
import html
import io
import json
import math
import multiprocessing
import os
import pickletools
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import timeit
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import combinations, cycle, pairwise, product
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from pandas import DataFrame, Series
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

# cuBLAS repeats its numbers only with this, and reads it when it is first used
if torch.cuda.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
    warnings.warn("CUDA was used before: for equal numbers import this first", stacklevel=2)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# ======================================================================================
# Configuration
# ======================================================================================


class InputError(ValueError):
    """What was given cannot be used; the message says what was found and what would be right."""


@dataclass(frozen=True)
class Cell:
    """A recurrent cell; one more is a record here, three classes, and their names in the tasks."""

    layer: Callable  # a class of PyTorch's recurrent layers, or one with a setting
    colour: str  # in all figures; these are safe for colour-blind readers (Okabe & Ito 2008)
    learning_rates: Mapping  # Adam's at the start, by task: what `--tune` chose
    start: Callable | None = None  # fills the recurrent weights; else the models do, by task


# The rates are those of `--tune --models RNN LSTM GRU IRNN --seeds 0 1 2 3 4 --output-dir
# outputs/tuning` with the settings below: if these change, they have to be chosen again.
CELLS = {
    "RNN": Cell(
        layer=nn.RNN,
        colour="#D55E00",
        learning_rates={"classifier": 1e-3, "predictor": 3e-3, "forecaster": 3e-3},
    ),
    "LSTM": Cell(
        layer=nn.LSTM,
        colour="#0072B2",
        learning_rates={"classifier": 1e-2, "predictor": 3e-3, "forecaster": 1e-2},
    ),
    "GRU": Cell(
        layer=nn.GRU,
        colour="#009E73",
        learning_rates={"classifier": 1e-2, "predictor": 1e-3, "forecaster": 1e-2},
    ),
    # the control: no gates, but units and a start that keep what is there (Le et al. 2015)
    "IRNN": Cell(
        layer=partial(nn.RNN, nonlinearity="relu"),
        colour="#CC79A7",
        learning_rates={"classifier": 1e-3, "predictor": 3e-3, "forecaster": 1e-2},
        start=nn.init.eye_,
    ),
}
DEFAULT_MODELS = ("RNN", "LSTM", "GRU")


@dataclass(frozen=True)
class Training:
    """How a model is trained; all but the learning rate is the same for all cells of a task."""

    epochs: int = 30  # upper bound; early stopping may end sooner
    batch_size: int = 64  # examples per update; of few data fewer: `batch_size_for`
    # of an epoch, at least: it passes several times over few data, so that patience and schedule
    # mean the same for them
    updates: int = 50
    accumulate_steps: int = 1  # micro-batches of a batch, to save memory; the gradient is equal
    lr_factor: float = 0.5  # the rate is multiplied by this on a plateau of the validation loss
    lr_patience: int = 1  # epochs without improvement by 0.01 % or more before the rate falls
    patience: int = 4  # epochs without improvement after which training ends
    weight_decay: float = 0.0  # pulls back embeddings of rare words, which memorise
    clip_norm: float = 1.0  # larger gradients are scaled down to this norm

    def __post_init__(self):
        least = self.lr_patience + 2
        if self.patience < least:
            raise InputError(
                f"patience {self.patience} ends training before the learning rate has fallen; "
                f"with lr_patience {self.lr_patience} it must be {least} or more"
            )

    def batch_size_for(self, n_examples):
        """A twentieth of few examples, but 16.

        Of two monthly series of 108 and 118 values it lowered the MSE of one by 31 (RNN), 36 (LSTM)
        and 11 % (GRU), and left the other's within 4 %.
        """
        return min(self.batch_size, max(16, n_examples // 20))


@dataclass(frozen=True)
class UserData:
    """A user's own data, which take the place of the generated."""

    path: str  # of the file that they were read from; else which data they are
    text: str = field(repr=False)  # the content of a text or CSV file, or what would stand in one
    columns: tuple[str, ...] = ()  # as the user named them: text and label, or the values
    notes: tuple[str, ...] = ()  # on how the file was read

    @cached_property
    def digest(self):
        """SHA-256 of the text: a run belongs to the content, wherever the file lies."""
        return hashlib.sha256(self.text.encode(errors="backslashreplace")).hexdigest()


@dataclass(frozen=True)
class TaskConfig:
    """What the configurations of the three tasks share."""

    file: UserData | None = None  # takes the place of the generated data
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    training: Training = Training()


@dataclass(frozen=True)
class ClassifierConfig(TaskConfig):
    """Text classification. What each number of the reviews does: `generate_reviews`."""

    n_reviews: int = 5000
    phrases: tuple[int, int] = (6, 57)  # of three or four words: 131 words on average, at most 200
    reliability: float = 0.8  # how often the writer's last opinion agrees with the label
    concluding_rate: float = 0.1  # share of the reviews that end with that opinion
    own_rate: float = 0.06  # share of the phrases before it that are opinions of the writer
    others_rate: float = 0.1  # share of the other phrases that are opinions of others
    name_rate: float = 0.25  # share of the asides that hold a surname, most of them rare
    vocab_size: int = 5000  # most frequent words of the training split, with <pad> and <unk>
    max_words: int = 200  # of a longer review the end is kept
    embed_dim: int = 50
    training: Training = Training(epochs=40, batch_size=32, weight_decay=1e-4)


@dataclass(frozen=True)
class PredictorConfig(TaskConfig):
    """Next-word prediction. What each number of the corpus does: `generate_corpus`."""

    n_words: int = 20_000
    favourite_rate: float = 0.7  # how often a subject takes its favourite verb, or object
    vocab_size: int = 5000  # as the classifier's
    window: int = 10  # words that the model sees before the one it predicts
    embed_dim: int = 50
    training: Training = Training(epochs=150, batch_size=256, lr_factor=0.3)


@dataclass(frozen=True)
class ForecasterConfig(TaskConfig):
    """Time-series forecasting. What each number of the series does: `generate_series`."""

    n_steps: int = 24_000
    # steps, of the fast and of the slow wave
    periods: tuple[tuple[int, ...], tuple[int, ...]] = ((4, 10), (16, 32))
    switch_rate: float = 0.01  # how often each wave's period changes: every 100 steps on average
    noise: float = 0.25  # standard deviation of the white noise; both waves have amplitude 1
    # steps that the model sees before the one it predicts; of a short series a tenth
    window: int = 50
    # every third window is trained on, which saves time and costs accuracy; a stride that shares a
    # factor with a period would never see some phases
    stride: int = 3
    hidden_dim: int = 32
    n_layers: int = 2
    dropout: float = 0.0
    training: Training = Training(epochs=100, batch_size=128, updates=40, lr_factor=0.4)


# every number that the results depend on but seed and rate, by task
Config = Mapping[str, TaskConfig]
DEFAULT: Config = {
    "classifier": ClassifierConfig(),
    "predictor": PredictorConfig(),
    "forecaster": ForecasterConfig(),
}
BRIEF = Training(epochs=2, updates=1)
QUICK: Config = {
    "classifier": ClassifierConfig(n_reviews=200, phrases=(5, 15), training=BRIEF),
    "predictor": PredictorConfig(n_words=1500, training=BRIEF),
    "forecaster": ForecasterConfig(n_steps=1100, hidden_dim=16, training=BRIEF),
}
DEFAULT_SEEDS = (42, 43, 44)
# the middle three are the grid of --tune, the others are tried where the best is at its edge
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

# ======================================================================================
# Datasets
# ======================================================================================

PAD = "<pad>"  # the word of id 0
UNK = "<unk>"  # the word of id 1
# within words, beside letters and digits: accents, vowel signs of Hebrew, Arabic and Indic, joiners
MARKS = (
    r"\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    r"\u0900-\u0963\u0966-\u0dff\u200c\u200d"
)
# characters that are words by themselves: of scripts without spaces (Thai to Tibetan, Burmese,
# Khmer, Kana, Han), and emoji
ALONE = (
    r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u3096\u30a1-\u30fa\u30fc\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u2600-\u27bf\U0001f000-\U0001faff]"
)
FACE = r"[:;=]-?[()]|(?<!\w)[:;]-?[dp]\b"
# a face, letters of any script and digits, apostrophes between them
WORDS = re.compile(rf"{FACE}|{ALONE}|[\w{MARKS}]+(?:'[\w{MARKS}]+)*")
# a word of its own in a corpus
SENTENCE_END = r"[.!?](?=[\s\"')\]”’»]|$)|[।॥。！？؟۔]"
WORDS_AND_ENDS = re.compile(rf"{UNK}|{WORDS.pattern}|{SENTENCE_END}")
MARKUP = rf"<(?!{UNK[1:]})/?[a-z][^<>]*>|\\[nrt]"  # HTML tags; line ends and tabs as escapes
TRAIN_SHARE = 0.70
VALIDATION_SHARE = 0.15  # the rest is the test split
MOST_WINDOWS = 50_000  # beyond these, what is evaluated and what baselines learn from is thinned
CPU = torch.device("cpu")


def random_generator(seed, purpose):
    """A stream of random numbers that depends on (seed, purpose) and on nothing else."""
    return np.random.default_rng([seed, *purpose.encode()])


def seed_torch(seed, purpose):
    """The same for what PyTorch draws by itself: weights and dropout."""
    torch.manual_seed(random_generator(seed, purpose).integers(2**63))


class SequenceDataset(Dataset):
    """Inputs and targets on one device; `lengths` (N,): how many leading steps hold data, if not
    all.
    """

    def __init__(self, inputs, targets, lengths=None):
        self.inputs = inputs
        self.targets = targets
        if lengths is None:
            lengths = torch.tensor(inputs.shape[1]).expand(len(inputs))
        self.lengths = lengths

    def __len__(self):
        return len(self.inputs)

    def batch(self, rows):
        """Inputs and targets of these examples, cut to the longest of them."""
        rows = torch.as_tensor(rows)
        longest = int(self.lengths[rows].max())
        device = self.inputs.device  # not waited for; MPS was reported to corrupt data then
        rows = rows.to(device, non_blocking=device.type != "mps")
        return self.inputs[rows, :longest], self.targets[rows]

    def __getitems__(self, rows):  # what a DataLoader calls
        return self.batch(rows)

    def __getitem__(self, row):
        inputs, targets = self.batch([row])
        return inputs[0], targets[0]


class ReviewDataset(SequenceDataset):
    """Reviews as word ids padded on the right with 0: (N, T) long; labels (N, 1) float."""

    def __init__(self, reviews, labels, device=CPU):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in reviews], batch_first=True)
        targets = torch.tensor(labels, dtype=torch.float32, device=device).unsqueeze(1)
        super().__init__(ids.to(device), targets, torch.tensor(list(map(len, reviews))))


class CorpusDataset(SequenceDataset):
    """Windows of a text, or about `most` evenly spaced ones, and the word after each.

    Inputs (N, T) and targets (N,) are long, and views of the text.
    """

    def __init__(self, ids, window, most=sys.maxsize, device=CPU):
        self.stride = math.ceil((len(ids) - window) / most)
        text = torch.as_tensor(ids, dtype=torch.long, device=device)
        rows = text.unfold(0, window + 1, self.stride)  # (N, T + 1)
        super().__init__(rows[:, :-1], rows[:, -1])


def centred(windows):
    """Windows (B, T, 1) without their means."""
    return windows - windows.mean(dim=1, keepdim=True)


class SeriesDataset(SequenceDataset):
    """Every `stride`-th window of a series and the value after it: (N, T, 1) and (N, 1), float
    views.

    What a model is given is relative: a batch holds the windows without their means, and how far
    the next value lies from the last. So a level that training never saw does no harm, and a model
    that answers 0 is persistence (after NLinear, Zeng et al. 2023).
    """

    def __init__(self, values, window, stride=1, device=CPU):
        series = torch.as_tensor(values, dtype=torch.float32, device=device)
        rows = series.unfold(0, window + 1, stride)  # (N, T + 1)
        super().__init__(rows[:, :-1, None], rows[:, -1:])

    def batch(self, rows):
        windows, targets = super().batch(rows)
        return centred(windows), targets - windows[:, -1]


class LengthBuckets(Sampler):
    """Shuffled batches of examples of similar length, so that little time goes into padding.

    In every pass the examples are shuffled, sorted by length within pools of 32 batches, and
    cut into batches, which are shuffled again. With equal lengths this is plain shuffling. There
    are as many passes as give `least` batches or more.
    """

    def __init__(self, lengths, batch_size, rng, least=1):
        self.lengths = lengths.numpy()
        self.batch_size = batch_size
        self.rng = rng
        self.batches_a_pass = math.ceil(len(lengths) / batch_size)
        self.passes = math.ceil(least / self.batches_a_pass)

    def __len__(self):
        return self.passes * self.batches_a_pass

    def __iter__(self):
        pools = np.arange(len(self.lengths)) // (32 * self.batch_size)
        for _ in range(self.passes):
            order = self.rng.permutation(len(self.lengths))
            order = order[np.lexsort((self.lengths[order], pools))]  # by pool, then by length
            batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
            for i in self.rng.permutation(len(batches)):
                yield batches[i]


def fit_vocabulary(words, size):
    """The id of each word: 0 padding, 1 any unknown word, then by frequency and alphabet."""
    counts = Counter(words)
    del counts[UNK]  # some corpora come with it
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate([PAD, UNK, *ranked[: size - 2]])}


def encode(words, vocabulary):
    """The ids of `words`."""
    return [vocabulary.get(word, 1) for word in words]


def tokenize(text, pattern):
    """Lower-case words, those that `pattern` finds; interned, so that each is held once."""
    text = html.unescape(unicodedata.normalize("NFC", text)).lower().replace("’", "'")
    text = re.sub(MARKUP, " ", text)
    if not text.isascii():  # saves time
        text = re.sub(ALONE, r" \g<0> ", text)
    return [sys.intern(word) for word in pattern.findall(text)]


def three_parts(n, least, what):
    """Contiguous train, validation and test slices of n items; InputError below `least`."""
    if n < least:
        raise InputError(f"{n:,} {what}; three splits need {least:,} or more")
    first = int(n * TRAIN_SHARE)
    second = int(n * (TRAIN_SHARE + VALIDATION_SHARE))
    return slice(0, first), slice(first, second), slice(second, n)


# ======================================================================================
# Generated data
# ======================================================================================

# --- reviews --------------------------------------------------------------------------

POSITIVE = """good great moving brilliant charming funny clever gripping tender superb fresh honest
    elegant thrilling warm vivid""".split()
NEGATIVE = """bad dull wooden clumsy boring awful shallow lazy tedious bland noisy stale cheap silly
    weak cold""".split()
ASPECTS = """plot acting script music camera pacing ending dialogue cast score editing humour story
    drama lighting costume""".split()
OTHERS = "critics friends viewers neighbours".split()
JUDGED = "called found thought considered".split()
OTHERS_FOLLOW = "opinions of others follow"
ASIDES_FOLLOW = "asides alone follow"
CONJUNCTIONS = "while as when because and then but until where after".split()
VERBS = """waits returns sings leaves dreams runs hides wins falls listens smiles drives fights
    dances writes travels""".split()
CHARACTERS = """hero heroine villain detective stranger doctor soldier widow orphan priest thief
    reporter queen butler cousin everyone nobody somebody he she""".split()
NAME_HEADS = """ald alder ash barn beck birch black bright brook buck burn carl chart clay cold crow
    dart deer dun east eld elm fair farn fern fox glen gold grey hal ham hart hawk hazel heath high
    holly hunt iron kel king kirk lang lark lind lock long mal marsh mead mill moor nether new north
    oak old oxen pem pine quill rad raven red ridge rock rose rush sand sel shaw silver south stan
    stone storm sun swan thorn tun ul wake wal west white wil wind winter wolf wood wyn yar
    york""".title().split()
NAME_MIDDLES = """a al an ar bel ber col den der el en er et ey for hal hel ing ken ker lan lea len
    ley lin man mar mel mer ner o ol on or ra ren ri ros ter ton""".split()
NAME_TAILS = """acre bank beck berg bourne bridge brook burn bury by church cliff combe cote crest
    croft dale dean den down ely fell field fold ford garth gate gill glade grange grave grove ham
    hay head hill holt house hurst keld land leigh lock low mere mond more mouth ness park pool port
    ridge road rick row scott shaw shire side son stead stoke stone stow thorpe thwaite toft ton
    tree vale view ville wall ward water way well wick wold worth yard""".split()


@dataclass(frozen=True)
class Reviews:
    """Labelled texts and, where they were generated, what decides in each."""

    texts: Sequence[str]
    labels: np.ndarray  # (N,): 0 to K - 1
    names: Sequence[str] = ("negative", "positive")  # of the K labels
    # a row per text: `favourable`, whether the opinion that counts is; `other_word`, which in place
    # of its last word turns it round; `distance`, the words after it; `role`, who speaks after it
    known: DataFrame | None = None


def generate_reviews(config, rng):
    """Synthetic reviews by writers who change their minds: only the writer's own last opinion
    counts.

    A review is a sequence of phrases: opinions of the writer ("I found plot moving") and of others
    ("critics found plot dull"), among asides ("while nobody waits"), a `name_rate` of which hold
    one of 300,000 Zipf-distributed surnames. A quarter of the reviews are short. The writer's last
    opinion agrees with the label `reliability` of the time; every other opinion is random. A
    `concluding_rate` of the reviews end with it. In the rest its distance from the end is
    log-uniform: about as often 1 or 2 phrases as 4 to 7 or 16 to 31.

    What the task asks for: one fact decides. It has to be kept for up to 170 words, not to be
    mistaken for the opinions of others, and to be replaced when the writer speaks again. Which
    words occur says little, for every other opinion looks the same.
    """
    n_reviews = config.n_reviews
    least, most = config.phrases
    labels = rng.permutation(np.arange(n_reviews) % 2)
    n_phrases = np.where(
        rng.random(n_reviews) < 0.25,
        rng.integers(least, least + 9, n_reviews),  # short reviews
        rng.integers(most - 10, most + 1, n_reviews),
    )
    n = n_phrases.sum()
    owner = np.repeat(np.arange(n_reviews), n_phrases)  # (n,): the review of each phrase
    ends = n_phrases.cumsum()

    def draw(words):  # one for each phrase; as objects they can be joined by +
        return rng.choice(words, n).astype(object)

    # the place of the opinion that counts; counted from the end, 1 is the last phrase
    back = (n_phrases ** rng.random(n_reviews)).astype(int)
    last = ends - np.where(rng.random(n_reviews) < config.concluding_rate, 1, back)
    is_own = (rng.random(n) < config.own_rate) & (np.arange(n) < last[owner])
    is_own[last] = True
    is_opinion = is_own | (rng.random(n) < config.others_rate)

    # an opinion for each phrase: random, but for those that count
    favourable = rng.random(n) < 0.5
    favourable[last] = (rng.random(n_reviews) < config.reliability) == (labels == 1)
    speakers = np.where(is_own, "I", draw(OTHERS))
    opinions = speakers + " " + draw(JUDGED) + " " + draw(ASPECTS) + " "
    praise = draw(POSITIVE)
    blame = draw(NEGATIVE)
    opinions = opinions + np.where(favourable, praise, blame)

    # an aside for each phrase
    is_named = rng.random(n) < config.name_rate
    shape = (len(NAME_TAILS), len(NAME_MIDDLES), len(NAME_HEADS))
    # a log-uniform rank is Zipf-distributed
    rank = (math.prod(shape) ** rng.random(n)).astype(int) - 1
    # a prime: neighbours in rank do not look alike
    parts = np.unravel_index(rank * 7919 % math.prod(shape), shape)
    surnames = [
        NAME_HEADS[head] + NAME_MIDDLES[middle] + NAME_TAILS[tail]
        for tail, middle, head in zip(*parts)
    ]
    characters = np.where(is_named, surnames, draw(CHARACTERS))
    asides = draw(CONJUNCTIONS) + " " + characters + " " + draw(VERBS)

    # sentences of a few phrases: the tokenizer takes their ends out again
    marks = np.where(rng.random(n) < 0.4, ". ", ", ")
    marks[ends - 1] = ".\n"

    text = "".join(np.where(is_opinion, opinions, asides) + marks)
    text = re.sub(r"(?m)(^|\. )\w", lambda start: start[0].upper(), text)

    # what is known: the last word of the opinion that counts decides
    words = np.where(is_opinion, 4, 3).cumsum()
    opinions_before = is_opinion.cumsum()
    others_follow = opinions_before[ends - 1] > opinions_before[last]
    known = DataFrame(
        {
            "favourable": favourable[last],
            "other_word": np.where(favourable, blame, praise)[last],
            "distance": words[ends - 1] - words[last],
            "role": np.where(others_follow, OTHERS_FOLLOW, ASIDES_FOLLOW),
        }
    )
    return Reviews(text.splitlines(), labels, known=known)


# --- corpus ---------------------------------------------------------------------------


AREAS = {  # subjects, verbs and objects, in the singular
    "sea": (
        "sailor captain diver fisher pilot",
        "steers anchors boards paints",
        "boat ship net harbour sail",
    ),
    "kitchen": (
        "cook baker waiter guest grocer",
        "tastes stirs serves burns",
        "soup bread sauce cake roast",
    ),
    "farm": (
        "farmer shepherd miller gardener groom",
        "feeds ploughs mows fences",
        "field barn cow orchard meadow",
    ),
    "music": (
        "singer drummer pianist composer dancer",
        "rehearses hums records plays",
        "song waltz march ballad tune",
    ),
    "court": (
        "judge lawyer clerk bailiff juror",
        "signs reads disputes settles",
        "case law letter claim verdict",
    ),
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


class Subject(NamedTuple):
    """A noun, with what it goes with."""

    area: str
    verbs: list  # that agree with it in number, its favourite first
    objects: list  # its favourite first
    other: str  # a noun of the same area and number, which has other favourites


def favourite_first(words, rank):
    """`words` with the one at place `rank`, counted round and round, in front."""
    favourite = words[rank % len(words)]
    return [favourite, *(word for word in words if word != favourite)]


def corpus_subjects():
    """The subjects of all areas by noun, in the singular and in the plural."""
    subjects = {}
    for area, words in AREAS.items():
        nouns, verbs, objects = (part.split() for part in words)
        plural_verbs = [verb.removesuffix("s") for verb in verbs]
        for ending, forms in (("", verbs), ("s", plural_verbs)):
            for rank, noun in enumerate(nouns):
                subjects[noun + ending] = Subject(
                    area,
                    favourite_first(forms, rank),
                    favourite_first(objects, rank),
                    other=nouns[(rank + 2) % len(nouns)] + ending,
                )
    return subjects


def even(words, share=1.0):
    """`share` spread evenly over `words`."""
    return dict.fromkeys(words, share / len(words))


def peaked(words, rate, share=1.0):
    """`share` spread over `words`: `rate` of it to the first, the rest evenly."""
    return {words[0]: share * rate, **even(words[1:], share * (1 - rate))}


def generate_corpus(config, rng):
    """Sentences of a small grammar in which verb and object depend on a subject some words back.

    "the bakers behind the singer often burn the bread outside ." Subjects belong to six areas. The
    verb is one of its subject's area, agrees with it in number, and is the subject's favourite
    `favourite_rate` of the time; the object likewise. Between subject and verb stand up to two
    phrases, each with a noun of another area, so that verbs come up to seven and objects up to nine
    words after their cue. Whoever keeps the subject across the intruding nouns predicts verb and
    object; whoever goes by the last few words, as n-grams must, takes the intruder for the subject.

    A row per word: `word`; given the full state of the grammar, the `likeliest` word, its
    `probability` and the `entropy` (nats); and of an object, or of a verb where no phrase could
    have come instead, `role` and `distance`, the words back to its subject. With `other_subject`
    in its place `other_word` would be the favourite, more probable by `effect`.
    """
    rate = config.favourite_rate
    subjects = corpus_subjects()
    rows = []

    def draw(options):
        words = [word for word, probability in options.items() if probability > 0]
        probabilities = np.array([options[word] for word in words])
        word = words[rng.choice(len(words), p=probabilities)]
        rows.append(
            {
                "word": word,
                "likeliest": words[probabilities.argmax()],
                "probability": probabilities.max(),
                "entropy": -(probabilities * np.log(probabilities)).sum(),
            }
        )
        return word

    # the word last drawn follows a subject, in place of which another could stand
    def mark(role, subject_at, other, other_words):
        rows[-1].update(
            role=role,
            distance=len(rows) - 1 - subject_at,
            other_subject=other,
            other_word=other_words[0],
            effect=rate - (1 - rate) / (len(other_words) - 1),
        )

    while len(rows) < config.n_words:
        draw({"the": 1.0})
        subject = subjects[draw(even(subjects))]
        subject_at = len(rows) - 1
        intruders = [noun for noun, other in subjects.items() if other.area != subject.area]
        # up to two phrases, or one adverb, come between subject and verb
        word = ""
        phrases = 0
        while word not in subject.verbs:
            verb_share = 1.0 if word in ADVERBS else VERB_SHARES[phrases]
            word = draw(
                {
                    **peaked(subject.verbs, rate, verb_share),
                    **even(PREPOSITIONS, 0.85 * (1 - verb_share)),
                    **even(ADVERBS, 0.15 * (1 - verb_share)),
                }
            )
            if word in PREPOSITIONS:
                draw({"the": 1.0})
                draw(even(intruders))
                phrases += 1
        if verb_share == 1:  # else the likeliest word may be a preposition, whatever is remembered
            mark("verb", subject_at, subject.other, subjects[subject.other].verbs)
        draw({"the": 1.0})
        draw(peaked(subject.objects, rate))
        mark("object", subject_at, subject.other, subjects[subject.other].objects)
        if draw({".": 0.6, **even(TAILS, 0.4)}) != ".":
            draw({".": 1.0})
    return DataFrame(rows)


# --- series ---------------------------------------------------------------------------


def generate_wave(periods, switch_rate, n_steps, rng):
    """A sine whose period switches at random, its phase continuous, and where it switches.

    The phase moves on a grid of lcm(periods) positions. Both (n_steps,).
    """
    positions = math.lcm(*periods)
    switches = rng.random(n_steps) < switch_rate
    moves = np.where(switches, rng.integers(1, len(periods), n_steps), 0)
    which = (rng.integers(len(periods)) + moves.cumsum()) % len(periods)
    speed = positions // np.array(periods)
    phase = (rng.integers(positions) + speed[which].cumsum()) % positions
    return np.sin(2 * np.pi * phase / positions), switches


def generate_series(config, rng):
    """A fast and a slow wave, whose periods switch at random, plus white noise.

    A row per step: `value`, and `distance`, the steps since a period switched.

    What the task asks for: the window has to tell which of the periods hold now, and at which
    phase. A linear autoregression has one set of weights for all periods; the slow wave takes more
    steps to be seen than the fast one. The grid of phases lets the best forecast be computed
    exactly: `best_forecasts`.
    """
    n = config.n_steps
    (fast, fast_switches), (slow, slow_switches) = (
        generate_wave(periods, config.switch_rate, n, rng) for periods in config.periods
    )
    values = fast + slow + rng.normal(0, config.noise, n)
    steps = np.arange(n)
    last_switch = np.maximum.accumulate(np.where(fast_switches | slow_switches, steps, 0))
    return DataFrame({"value": values, "distance": steps - last_switch})


@torch.no_grad()
def best_forecasts(windows, config):
    """The mean of the next value given each window (N, T) of a generated series: (N,).

    The forward filter of a hidden Markov model (Rabiner 1989) over period and phase of both waves,
    uniform at the window's start. No forecast from the same window has a lower expected squared
    error (of the absolute one, the median has the least).
    """
    waves = []
    moves = []  # of each wave, whose states are its periods and phases: P(next state | state)
    for periods in config.periods:
        n = math.lcm(*periods)
        waves.append(torch.sin(2 * math.pi * torch.arange(n) / n).repeat(len(periods)))
        # the period may switch, and the phase goes on
        stays = torch.eye(len(periods)) == 1
        switch = torch.where(stays, 1 - config.switch_rate, config.switch_rate / (len(periods) - 1))
        shifts = [torch.eye(n).roll(n // period, dims=1) for period in periods]
        moves.append(torch.kron(switch, torch.eye(n)) @ torch.block_diag(*shifts))
    value = waves[0][:, None] + waves[1]  # (P, Q): of each fast and each slow state
    forecasts = []
    for batch in torch.as_tensor(windows, dtype=torch.float32).split(64):
        belief = 1.0  # the same for all states
        for values in batch.T:
            likelihood = torch.exp(-0.5 * ((values[:, None, None] - value) / config.noise) ** 2)
            belief = belief * likelihood  # (B, P, Q)
            belief /= belief.sum(dim=(1, 2), keepdim=True)
            belief = moves[0].T @ belief @ moves[1]
        forecasts.append((belief * value).sum(dim=(1, 2)))
    return torch.cat(forecasts).numpy()


# ======================================================================================
# Your own data
# ======================================================================================

TEXT_COLUMNS = ("text", "review", "sentence", "comment")  # the usual names, in lower case
LABEL_COLUMNS = ("label", "sentiment", "class", "rating", "stars")
MISSING = ("", "na", "nan", "null", "none")  # cells without a value, in lower case
SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas"}
MOST_BYTES = 500_000_000  # of a text, unpacked
CALENDAR = {"year": "", "month": "-", "day": "-", "hour": " ", "minute": ":"}  # with what is ahead
NUMBER_AHEAD = r"\W*\d++(?![^\W\d_e])"  # a cell that begins with a number


def read_text(path):
    """The text of a file, or of standard input for "-", and notes on it; raises InputError.

    It is unpacked if the name ends in .gz. It is UTF-8, or UTF-16 with its mark; what is neither is
    taken for Windows-1252.
    """
    try:
        if Path(path).is_char_device():
            raise InputError(f"{path}: a device, not a file")
        with open(os.dup(0) if path == "-" else path, "rb") as file:  # noqa: PTH123
            packed = str(path).lower().endswith(".gz")
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({why})") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"{path}: more than {MOST_BYTES:,} bytes of text; take a part of it")
    notes = []
    try:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = content.decode("cp1252", errors="replace")
        notes.append(
            f"not UTF-8 (byte {error.start:,}), so it was read as Windows-1252; if words look "
            "wrong, save it as UTF-8"
        )
    if "\0" in text or "\ufffd" in text[:100_000]:
        raise InputError(f"{path}: not a text file; save it as plain text or CSV, in UTF-8")
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text, notes


def some(values):
    """At most ten of the values, for a message."""
    shown = [str(value) for value in values]
    more = f", ... ({len(shown)} in all)" if len(shown) > 10 else ""
    return ", ".join(shown[:10]) + more


def split_rows(text, separator, quoting=csv.QUOTE_MINIMAL, strict=False):
    """The rows of a CSV text as lists of cells, how many cells most rows have, what share they are.

    Empty rows are not counted.
    """
    csv.field_size_limit(MOST_BYTES)  # a review may be long
    lines = io.StringIO(text, newline="")
    rows = list(csv.reader(lines, delimiter=separator, quoting=quoting, strict=strict))
    widths = Counter(len(row) for row in rows if row)
    width, count = widths.most_common(1)[0]
    return rows, width, count / widths.total()


def find_separator(text):
    """The separator that gives most of the first rows the same number of cells, two or more."""
    sample = text[:100_000]
    # "1,5" may be one number
    sample = re.sub(r"(?m)^ ?[-+]?\d+,\d+\r?$", "", sample).strip() or sample

    def evenness(separator):
        _, width, share = split_rows(sample, separator)
        return width > 1, share

    return max(SEPARATORS, key=evenness)


def split_header(table, names):
    """Header and rows of a table; without a header the columns are called 1, 2, 3.

    The first row is the header if no cell of it begins with a number or stands below it again, as
    labels do. If some cells do, it still is one if another is among `names`, or the first is empty.
    """
    header = table.iloc[0]
    rows = table.iloc[1:]
    recurs = (rows == header).any() & (header != "")
    is_data = recurs | header.str.match(NUMBER_AHEAD)
    named = header.str.lower().isin([name.lower() for name in names if name]) & ~recurs
    is_named = named.any() or header[0] == ""
    if is_data.all() or (is_data.any() and not is_named):
        return [str(i) for i in range(1, len(header) + 1)], table
    return header.tolist(), rows


def read_table(text, names):
    """Header and rows of a CSV text, all strings; its separator; notes. Raises InputError.

    Rows are numbered as in a spreadsheet. Comments and titles above the table are left out.
    `names`: see `split_header`.
    """
    separator = find_separator(text)
    readings = [split_rows(text, separator, csv.QUOTE_NONE)]
    if '"' in text:  # quotation marks are text if rows are as even without them, and more
        with suppress(csv.Error):
            readings.insert(0, split_rows(text, separator, strict=True))
    rows, width, _ = max(readings, key=lambda reading: (reading[2], len(reading[0])))

    def is_title(row):
        is_alone = width > 1 and not any(row[1:]) and len(row) != 2  # "date," is a header
        return not row or row[0].startswith(("#", "sep=")) or is_alone

    first = next((i for i, row in enumerate(rows) if not is_title(row)), 0)
    while len(rows) > 1 and not "".join(rows[-1]).strip():  # spreadsheets add rows of nothing
        rows.pop()
    above = rows[first - 1] if first else []
    if len(above) == width > 1 and re.match(r"\W*\d", rows[first][0]):
        first -= 1  # a header behind a comment sign
        rows[first][0] = above[0].lstrip("# ")
    if len(rows[first]) == width - 1 > 0:
        rows[first].insert(0, "")  # R gives the names of the rows no header
    titles = [" ".join(row)[:60].strip() for row in rows[:first] if row]
    notes = [f"above the table, left out: {some(titles)}"] if titles else []
    cells = []
    for number, row in enumerate(rows[first:], start=first + 1):
        if any(row[width:]):
            raise InputError(
                f"not a table of {SEPARATORS[separator]}: row {number} has {len(row)} cells, most "
                f"have {width}; a cell that holds a separator goes into quotation marks"
            )
        filled = row[:width] + [""] * (width - len(row))
        cells.append([cell.strip() for cell in filled])
    table = DataFrame(cells, index=range(first + 1, len(rows) + 1), dtype=object)
    return *split_header(table, names), separator, notes


def find_column(header, named, usual, option):
    """The place of the column that the user named, or of the one with a usual name; InputError.

    It may be named by its place, from 1, where no column is called so.
    """
    if named:
        found = [i for i, name in enumerate(header) if name == named]
        if not found and named.isdecimal() and 0 < int(named) <= len(header):
            return int(named) - 1
    else:
        found = [i for i, name in enumerate(header) if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    problem = f"there is no column {named or usual[0]!r}"
    if found:
        places = [f"{header[i]} (column {i + 1})" for i in found]
        problem = f"{len(found)} columns, {some(places)}, may be meant"
    raise InputError(
        f"{problem}; its columns are {some(header)}; name one, or its place, with --{option}-column"
    )


def read_reviews(text, text_column="", label_column=""):
    """The reviews of a CSV text with a column of texts and one of two or more labels, and notes;
    raises InputError.

    Of two labels the second counts as positive, in alphabetical or numerical order.
    """
    names = (*TEXT_COLUMNS, *LABEL_COLUMNS, text_column, label_column)
    header, rows, _, notes = read_table(text, names)
    rows = rows[(rows != "").any(axis=1)]
    if header == ["1", "2"] and not text_column:  # the labels are those that recur
        label_column = header[int(rows.nunique().idxmin())]
        text_column = header[2 - int(label_column)]
        notes.append(f"no header: column {label_column} was taken for the labels")
    texts = rows[find_column(header, text_column, TEXT_COLUMNS, "text")]
    label_place = find_column(header, label_column, LABEL_COLUMNS, "label")
    labels = rows[label_place]
    empty = labels.index[labels.str.lower().isin(MISSING)]
    if len(empty):
        raise InputError(f"row {empty[0]} holds no label")
    numbers = pd.to_numeric(labels, errors="coerce")
    if (numbers.abs() < 1e15).all():
        labels = numbers.map("{:.15g}".format)  # 1.0 is 1
        names = sorted(set(labels), key=float)
    else:
        if labels.str.lower().nunique() < labels.nunique():
            labels = labels.str.lower()  # Positive is positive
        names = sorted(set(labels))
    if not 2 <= len(names) <= 20:
        raise InputError(
            f"the column {header[label_place]!r} holds {len(names)} different values "
            f"({some(map(repr, names))}); two to 20 labels are needed"
        )
    rare = labels.value_counts().loc[lambda counts: counts < 8]
    if len(rare):
        notes.append(f"labels with fewer than 8 reviews, too few to be tested: {some(rare.index)}")
    return Reviews(texts.tolist(), labels.map(names.index).to_numpy(dtype=int), names), notes


def read_numbers(cells, separator):
    """The numbers in a column of strings, nan where there is none, and notes; raises InputError.

    They are written as 1,234.5 or as 1.234,5 or as 1 234.5, with a currency or per cent sign or
    without: in the way in which most cells can be read.
    """
    around = r"^([-+]?)[$€£¥₹]\s*|\s*[$€£¥₹%]$|(?<=\d)[\s'’](?=\d{3}(?!\d))"
    plain = cells.str.replace("\u2212", "-").str.replace(around, r"\1", regex=True)
    # the last group has three digits, in India the others have two
    grouped = r"[-+]?[1-9]\d{0,2}(?:,\d\d\d?)*,\d{3}(?:\.\d*)?"
    readings = []
    for written in (plain, plain.str.translate(str.maketrans(",.", ".,"))):
        ungrouped = written.mask(written.str.fullmatch(grouped), written.str.replace(",", ""))
        readings.append(pd.to_numeric(ungrouped, errors="coerce"))
    decimal = "."
    if separator == ";":
        decimal = ","
        readings.reverse()
    usual, other = readings
    differs = usual.notna() & (usual != other)
    if usual.count() != other.count() or not differs.any():
        return max(readings, key=Series.count), []
    # all that has a sign has three digits behind it: groups, or decimals?
    cell = plain[differs].iloc[0]
    if decimal in cell:
        return usual, []
    number = f"{usual[differs].iloc[0]:.15g}"
    whole = usual[usual.notna() & ~differs]
    if whole.empty or whole.abs().max() >= 1000:
        raise InputError(
            f"{cell!r} may be {number} or {other[differs].iloc[0]:.15g}; "
            "write it without a sign between thousands, and with a point before decimals"
        )
    return usual, [f"{cell!r} and the like were read as {number}"]


def time_columns(table, header):
    """The columns that hold the times of the rows, in the order in which a time is written.

    These are the first column of dates, or those that are called as in `CALENDAR`, or years,
    20240131 or Unix seconds in the first column; and one of clock times.
    """
    sample = table.head(1000)

    def those_of(pattern):
        return [i for i in table if sample[i].str.contains(pattern).mean() > 0.9]

    year = r"(?<!\d)(?:19|20)\d\d(?!\d)"
    day = r"\d[-/.]\d+[-/.]\d|\d[-/. ][A-Za-z]{3}[-/. ]\d\d$"
    dates = those_of(rf"^(?!-?\d+[.,]?\d*$).*(?:{year}|{day})")[:1]
    clocks = [i for i in those_of(r"^\d\d?:\d\d|^\d\d\.\d\d\.\d\d$") if i not in dates]
    places = {header[i].lower(): i for i in table}
    if not dates and "year" in places:
        dates = [places[part] for part in CALENDAR if part in places]
    if not dates:  # elsewhere plain numbers are values
        numbers = those_of(r"^(?:1[5-9]|20)\d\d(?:\d{4})?$|^1\d{9}(?:\d{3})?$")
        dates = [i for i in table.columns[:1] if i in numbers]
    return dates + clocks[:1]


def read_times(cells):
    """The times in a column of strings, without those that cannot be read."""
    if cells.str.fullmatch(r"\d{10,13}").all():
        seconds = cells.astype(float)
        return pd.to_datetime(seconds, unit="s" if seconds.max() < 1e11 else "ms")
    readings = []
    for day_first in (False, True):  # 13/02 is what it must be
        with warnings.catch_warnings(action="ignore"):
            times = pd.to_datetime(cells, errors="coerce", utc=True, dayfirst=day_first)
        readings.append(times.dt.tz_localize(None).dropna())
    # right is the one in which most can be read; of two, the one with the more even steps
    return min(readings, key=lambda times: (len(times) < 0.9 * len(cells), times.diff().std()))


def check_times(times):
    """Notes on the times of a series, its gaps; raises InputError unless all rise."""
    steps = times.diff().dt.total_seconds().iloc[1:]
    back = steps.index[steps <= 0]
    notes = []
    if len(back):
        row = back[0]
        # the same hour twice in autumn is no fault
        is_hour = steps.min() > -3601 and steps.median() <= 3600
        if not is_hour or len(back) > times.dt.year.nunique():
            raise InputError(
                f"row {row}: {times[row]} is not later than the row before it. If there are "
                "several series in the column, keep one; else put the rows in order of time"
            )
        notes.append(f"the times go back at row {row}, by an hour or less: a change of the clock?")
    gaps = steps.index[steps > 1.5 * steps.quantile(0.9)]  # months differ, and weekends are usual
    if len(gaps):
        wait = pd.Timedelta(seconds=steps[gaps[0]])
        notes.append(
            f"gaps in time ({len(gaps)}), the first of {wait} before row {gaps[0]}: a model does "
            "not see them, for it counts rows"
        )
    return notes


def check_codes(values):
    """Raise InputError where an extreme value looks like a code for a missing one, as -999."""
    if len(set(values)) < 10:
        return
    for code in (values.min(), values.max()):
        others = values[values != code]
        low = others.min()
        high = others.max()
        distance = np.abs(others - code).min()
        count = len(values) - len(others)
        is_only_negative = code < 0 <= low and distance > 0.1 * (high - low)
        is_usual = set(f"{code:g}") <= set("-9.")  # once is enough of -9999
        is_far = is_only_negative or distance > 3 * others.std()
        if is_far and (is_usual or count >= 3):
            raise InputError(
                f"{code:g} stands there {count:,} times, far from all other values "
                f"({low:g} to {high:g}): if it means that a value is missing, put values in"
            )


def read_series(text, column=""):
    """The values (N,) of a column of a CSV text, in order of time, and notes; raises InputError.

    Without a name it is the only column of which most cells are numbers, but for that of the
    times. Rows of words below the header are left out.
    """
    header, table, separator, notes = read_table(text, [column])
    if table.empty:
        raise InputError("no row below the header")
    # units may stand below the header
    is_data = table.head(20).apply(lambda cells: cells.str.match(NUMBER_AHEAD)).any(axis=1)
    first = is_data.idxmax()
    if first > table.index[0]:
        notes.append(f"what stands between the header and row {first} was left out")
        table = table.loc[first:]
    if len(header) == 1 and table[0].str.contains(r"\S\s+\S").mean() > 0.5:
        raise InputError("one column of cells with blanks in them; save it with commas")

    # the column of the values
    number = r"(?!\d\d?\.\d\d?\.)\W*\d[\d.,\s'’]*(?:e[-+]?\d+)?\s*[%$€£¥₹]?"
    numeric = [i for i in table if table[i].head(1000).str.fullmatch(number).mean() > 0.5]
    if len(numeric) > 1:
        of_time = time_columns(table, header)
        numeric = [i for i in numeric if i not in of_time and header[i].lower() not in CALENDAR]
    if column:
        place = find_column(header, column, (), "series")
    elif len(numeric) == 1:
        place = numeric[0]
    else:
        raise InputError(
            f"{len(numeric) or 'no'} numeric columns among {some(header)} (separated by "
            f"{SEPARATORS[separator]}); name one with --series-column"
        )

    # the values
    numbers, more = read_numbers(table[place], separator)
    notes.extend(more)
    unread = table[place][~np.isfinite(numbers)]
    if len(unread):
        cell = unread.iloc[0]
        found = f"{cell[:40]!r}, which is not a finite number"
        if cell.lower() in MISSING:
            found = "no value"
        raise InputError(f"row {unread.index[0]} holds {found} in the column {header[place]!r}")
    values = numbers.to_numpy(dtype=float)

    # the times: one text a row, of the columns that tell them
    others = table.drop(columns=place)
    columns = time_columns(others, header)
    if columns:
        cells = others[columns[0]]
        for i in columns[1:]:
            part = others[i].str.zfill(2).str.replace(".", ":")
            cells = cells + CALENDAR.get(header[i].lower(), " ") + part
        times = read_times(cells)
        unread = cells.drop(times.index)
        if len(unread):
            row = unread.index[-1]
            notes.append(f"row {row} holds no time that can be read ({unread[row]!r})")
        if times.diff().max() < pd.Timedelta(0):
            times = times[::-1]
            values = values[::-1]
            notes.append("the newest values came first; they were turned round")
        notes.extend(check_times(times))
    check_codes(values)
    return values.copy(), notes


# ======================================================================================
# Baselines
# ======================================================================================

# What baselines, ceilings and models give: a table with a row per test example, and the columns
# `answer` (an id, or a value in the unit of the targets), `probability` of the answer if there is
# one, `loss` and `score`, as the task defines them; of a ceiling also `effect`, how far its answer
# follows a change of what decides.
Answers = DataFrame
MAJORITY = "majority class"
MOST_WEIGHTS = 2_000_000  # of the log-linear model
MOST_PAIRS = 1_000_000_000  # of windows that nearest neighbours compare


def label_answers(logits, labels, first=0):
    """Who answers with `logits` (N, K) where `labels` (N,) are right: cross-entropy and hits.

    Ids below `first` are no answers.
    """
    log_probabilities = torch.as_tensor(logits).log_softmax(dim=1).numpy()
    answer = log_probabilities[:, first:].argmax(axis=1) + first
    rows = np.arange(len(labels))
    return Answers(
        {
            "answer": answer,
            "probability": np.exp(log_probabilities[rows, answer]),
            "loss": -log_probabilities[rows, labels],
            "score": (answer == labels).astype(float),
        }
    )


@torch.no_grad()
def word_answers(predict, dataset):
    """Who answers with `predict(inputs)`, logits (B, V), to the windows of `dataset`."""
    parts = []
    for rows in torch.arange(len(dataset)).split(2048):  # all at once would fill the memory
        inputs, targets = dataset.batch(rows)
        parts.append(label_answers(predict(inputs), targets.numpy(), first=2))
    return pd.concat(parts, ignore_index=True)


def value_answers(forecasts, test):
    """Who forecasts (N,) the targets of `test`; the answers count from the windows' last values."""
    errors = forecasts - test.targets[:, 0].cpu().numpy()
    relative = forecasts - test.inputs[:, -1, 0].cpu().numpy()
    return Answers({"answer": relative, "loss": errors**2, "score": np.abs(errors)})


def on_cpu(dataset, most=sys.maxsize):
    """All examples, or about `most` evenly spaced ones, on the CPU."""
    step = math.ceil(len(dataset) / most)
    inputs = dataset.inputs[::step].cpu()
    return SequenceDataset(inputs, dataset.targets[::step].cpu(), dataset.lengths[::step])


def word_groups(dataset, n, last, vocab_size):
    """The groups of `n` neighbouring words among the `last` of each text: their rows, and a number
    for each.
    """
    ids = dataset.inputs.cpu().numpy()
    width = ids.shape[1] - n + 1
    groups = sum(ids[:, i : i + width] * vocab_size**i for i in range(n))
    back = dataset.lengths.numpy()[:, None] - np.arange(n, n + width)  # words after each group
    rows, places = np.nonzero((back >= 0) & (back < last))
    return rows, groups[rows, places]


def review_baselines(train, validation, test, vocab_size, n_labels):
    """The majority class; multinomial naive Bayes on words and on pairs of neighbouring words
    (Manning, Raghavan & Schuetze 2008, ch. 13).

    How many words at the end of a text count, and the temperature by which the log odds are
    divided (Guo et al. 2017), are those of the lowest loss on `validation`.
    """
    labels, known, truth = (
        part.targets[:, 0].long().cpu().numpy() for part in (train, validation, test)
    )
    prior = np.log(np.bincount(labels, minlength=n_labels) + 1)  # (K,)
    baselines = {MAJORITY: label_answers(np.tile(prior, (len(truth), 1)), truth)}
    for n, name in ((1, "naive Bayes, words"), (2, "naive Bayes, word pairs")):
        lowest = math.inf
        for last in (5, 10, 20, 50, sys.maxsize):
            rows, groups = word_groups(train, n, last, vocab_size)
            # one and how often each group occurs under each label
            counts = 1 + DataFrame(np.eye(n_labels)[labels[rows]]).groupby(groups).sum()
            weights = np.log(counts / counts.sum())
            log_odds = []
            for dataset in (validation, test):
                rows, groups = word_groups(dataset, n, last, vocab_size)
                evidence = weights.reindex(groups, fill_value=0.0).groupby(rows).sum()
                evidence = evidence.reindex(range(len(dataset)), fill_value=0.0).to_numpy()
                log_odds.append(prior + evidence)
            for temperature in np.geomspace(0.1, 100, 61):
                loss = label_answers(log_odds[0] / temperature, known)["loss"].mean()
                if loss < lowest:
                    lowest = loss
                    baselines[name] = label_answers(log_odds[1] / temperature, truth)
    return baselines


def ngram_model(ids, contexts, vocab_size):
    """Interpolated trigrams that back off by Witten-Bell smoothing (Chen & Goodman 1999, eq. 15).

    Returns a function: context -> P(word | context) of each word (V,). Contexts are tuples of up
    to two words. Only `contexts` and the shorter ones in them are counted: all those of a long
    text would fill the memory.
    """
    followers = {context[i:]: Counter() for context in contexts for i in range(len(context) + 1)}
    for n in range(3):
        for *context, word in zip(*(ids[i:] for i in range(n + 1))):
            if tuple(context) in followers:
                followers[tuple(context)][word] += 1

    @lru_cache(maxsize=1000)
    def probabilities(context):
        # every order is mixed with the lower ones, down to the uniform distribution
        lower = probabilities(context[1:]) if context else np.full(vocab_size, 1 / vocab_size)
        seen = followers[context]
        if not seen:
            return lower
        counts = np.bincount(list(seen), list(seen.values()), vocab_size)
        return (counts + len(seen) * lower) / (seen.total() + len(seen))

    return probabilities


def log_linear(train, validation, test, vocab_size):
    """Softmax regression of the next word on the words of the window by position; no hidden layer.

    Ridge penalty and number of epochs are chosen by the loss on `validation`. Rarer words than the
    weights suffice for count as unknown.
    """
    window = train.inputs.shape[1]
    n_words = max(2, min(vocab_size, MOST_WEIGHTS // (window * vocab_size)))

    def logits(model, inputs):
        known = torch.where(inputs < n_words, inputs, 1)
        return model(known + n_words * torch.arange(window))  # which word, at which place

    lowest = math.inf
    for penalty in (3e-5, 1e-4, 3e-4):
        model = nn.EmbeddingBag(window * n_words, vocab_size, mode="sum")
        nn.init.zeros_(model.weight)
        optimizer = optim.Adam(model.parameters(), lr=0.01, weight_decay=penalty, fused=True)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(60):
            order = torch.randperm(len(train), generator=generator)[:MOST_WINDOWS]
            inputs, targets = train.batch(order)
            for words, following in zip(inputs.split(256), targets.split(256)):
                optimizer.zero_grad()
                F.cross_entropy(logits(model, words), following).backward()
                optimizer.step()
            losses.append(word_answers(partial(logits, model), validation)["loss"].mean())
            if losses[-1] < lowest:
                lowest = losses[-1]
                best = copy.deepcopy(model)
            if min(losses) < min(losses[-3:]):  # three epochs were no better
                break
    return word_answers(partial(logits, best), test)


def corpus_baselines(train, validation, test, vocab_size):
    """Unigram, bigram and trigram on the windows of `test`, and the log-linear model."""
    train, validation, test = (on_cpu(part) for part in (train, validation, test))
    ids = [*train.inputs[0].tolist(), *train.targets.tolist()]  # the text
    last_two = {tuple(words) for words in test.inputs[:, -2:].tolist()}
    probabilities = ngram_model(ids, last_two, vocab_size)

    def ngram(inputs, n):
        contexts = [tuple(words[len(words) - n :]) for words in inputs.tolist()]
        return np.log([probabilities(context) for context in contexts])

    baselines = {
        name: word_answers(partial(ngram, n=n), test)
        for n, name in enumerate(("unigram", "bigram", "trigram"))
    }
    baselines["log-linear"] = log_linear(train, validation, test, vocab_size)
    return baselines


def season_of(windows):
    """The shortest lag within the window at which values differ by the most even amount, on about
    `MOST_WINDOWS` windows; 1 unless the variance is less than half of that from step to step.
    """
    windows = on_cpu(windows, MOST_WINDOWS)
    differences = windows.inputs[:, :, 0] - windows.targets  # (N, T) - (N, 1)
    variances = differences.var(dim=0).flip(0)  # (T,): by lag, from 1; a trend adds nothing
    is_least = variances <= 1.1 * variances.min() + 1e-6
    season = int(is_least.int().argmax()) + 1
    return season if variances[season - 1] < variances[0] / 2 else 1


def nearest_neighbours(train, windows, length, most):
    """What followed the training windows whose last `length` values are nearest to those given.

    Levels are taken out of all windows (N, T, 1). Returns forecasts (most, N): row n - 1 is the
    mean of n neighbours.
    """
    ends = train.inputs[:, -length:, 0]
    rises = train.targets[:, 0] - ends.mean(dim=1)
    shapes = centred(ends)
    forecasts = []
    for batch in windows[:, -length:, 0].split(256):
        distances = torch.cdist(centred(batch), shapes)
        nearest = distances.topk(most, largest=False).indices  # (B, most)
        means = rises[nearest].cumsum(dim=1) / torch.arange(1, most + 1)
        forecasts.append(batch.mean(dim=1) + means.T)
    return torch.cat(forecasts, dim=1)


def best_neighbours(train, validation, test):
    """Nearest neighbours on windows, their length and number chosen on 500 windows of
    `validation`.
    """
    train = on_cpu(train, MOST_PAIRS / len(test))
    validation = on_cpu(validation, 500)
    most = min(64, len(train))
    lowest = math.inf
    for length in (2, 4, 6, 8, 12, 16, 24, 32, train.inputs.shape[1]):  # no window is longer
        forecasts = nearest_neighbours(train, validation.inputs, length, most)
        errors = (forecasts - validation.targets[:, 0]).square().mean(dim=1)  # (most,)
        if errors.min() < lowest:
            lowest = errors.min()
            chosen = length, int(errors.argmin()) + 1
    return nearest_neighbours(train, test.inputs.cpu(), *chosen)[-1]


def series_baselines(train, validation, test):
    """Persistence, the value a season ago, least squares on about `MOST_WINDOWS` windows, and
    nearest neighbours.
    """
    windows = test.inputs[:, :, 0].cpu()
    forecasts = {"persistence": windows[:, -1]}
    season = season_of(train)
    if season > 1:
        forecasts["seasonal naive"] = windows[:, -season]
    # in torch, on one thread: NumPy's last digits depend on the number of threads; gelsd takes any
    # rank
    known = on_cpu(train, MOST_WINDOWS)
    design = F.pad(known.inputs[:, :, 0].double(), (0, 1), value=1.0)  # (N, T + 1)
    weights = torch.linalg.lstsq(design, known.targets.double(), driver="gelsd").solution[:, 0]
    forecasts["linear autoregression"] = windows.double() @ weights[:-1] + weights[-1]
    forecasts["nearest neighbours"] = best_neighbours(train, validation, test)
    return {name: value_answers(forecast.numpy(), test) for name, forecast in forecasts.items()}


# ======================================================================================
# Models
# ======================================================================================


def near_identity_(weight):
    """0.9 times the identity: the state fades slowly (after Le et al. 2015).

    Beside an orthogonal matrix (Saxe et al. 2014) it was measured to be better for the next word,
    above all for a vanilla RNN, as good for reviews, and for a vanilla RNN worse on series.
    """
    return nn.init.eye_(weight).mul_(0.9)


class Recurrent(nn.Module):
    """A stock recurrent layer that returns the state of its top layer after the last real step.

    `start` fills the recurrent weights, one block per gate, unless the cell has a start of its own.
    Input weights are Glorot-uniform, biases 0. No gate starts open: on the reviews it was measured
    to help neither LSTM nor GRU.
    """

    def __init__(self, cell, input_dim, hidden_dim, n_layers, dropout, start):
        super().__init__()
        between_layers = dropout if n_layers > 1 else 0.0
        self.rnn = cell.layer(
            input_dim, hidden_dim, n_layers, batch_first=True, dropout=between_layers
        )
        for name, weight in self.rnn.named_parameters():
            for gate in weight.detach().split(hidden_dim):  # views: this fills the weight
                if name.startswith("weight_hh"):
                    (cell.start or start)(gate)
                elif name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(gate)
                else:
                    nn.init.zeros_(gate)

    def forward(self, inputs, last=None):
        """`last` (B,): index of each sequence's last real step; without it, the last of all."""
        states, _ = self.rnn(inputs)  # (B, T, F) -> (B, T, H)
        if last is None:
            return states[:, -1]  # (B, H)
        return states[torch.arange(len(states), device=states.device), last]  # (B, H)


class SequenceModel(nn.Module):
    """What all models share; a subclass names its `cell`."""

    cell: Cell
    preprocessing: Mapping = {}  # of a trained model: turns words or values into inputs, and back
    metrics: Mapping = {}  # of a trained model, on the test split
    sample = "the"  # that can be predicted from

    def forward(self, inputs, last=None):
        state = self.recurrent(inputs, last)  # (B, T, F) -> (B, H)
        return self.head(self.dropout(state))

    @property
    def device(self):
        """The device that the weights are on."""
        return next(self.parameters()).device

    @cached_property
    def vocabulary(self):
        """The words that a text model knows, with their ids."""
        ids = range(self.embedding.num_embeddings)
        return dict(zip(self.preprocessing["vocabulary"], ids, strict=True))


def new_embedding(vocab_size, embed_dim, padding_idx=None):
    """`nn.Embedding` that starts with the same weights, for its own way is slow on "meta"."""
    weight = torch.empty(vocab_size, embed_dim)
    if not weight.is_meta:  # there it would import the compiler
        weight.normal_()
    return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=padding_idx)


def label_probabilities(output):
    """The probability of each label, from an output (B, 1), of the second of two, or (B, K)."""
    if output.shape[1] > 1:
        return output
    return torch.cat([1 - output, output], dim=1)


class Classifier(SequenceModel):
    """Embedding -> recurrent layer -> dropout -> dense -> sigmoid, or softmax if `output_dim` is
    above 1.

    Ids (B, T) long, padded on the right with 0 -> probabilities (B, output_dim), read after the
    last real word. One output is the probability of the second of two labels; of more labels each
    has its own.
    """

    def __init__(self, vocab_size, embed_dim, hidden_dim, output_dim, n_layers=1, dropout=0.2):
        super().__init__()
        self.embedding = new_embedding(vocab_size, embed_dim, padding_idx=0)
        weight = self.embedding.weight.detach()
        if not weight.is_meta:  # small, so that rare words, which training hardly moves, say little
            weight.normal_(std=0.1)
        weight[0] = 0.0
        self.recurrent = Recurrent(
            self.cell, embed_dim, hidden_dim, n_layers, dropout, start=near_identity_
        )
        self.dropout = nn.Dropout(dropout)
        to_probabilities = nn.Sigmoid() if output_dim == 1 else nn.Softmax(dim=1)
        self.head = nn.Sequential(nn.Linear(hidden_dim, output_dim), to_probabilities)

    def forward(self, ids):
        # padding comes after the last word, so its states are never read
        last = (ids != 0).sum(dim=1) - 1  # (B, T) -> (B,)
        return super().forward(self.embedding(ids), last)  # (B, T) -> (B, T, E) -> (B, output_dim)

    @torch.no_grad()
    def predict(self, texts):
        """The likeliest label of each text and its probability; without any word, None and nan.

        Words that training did not know count as one and the same unknown word. Of a text longer
        than the reviews of training the last `max_words` words are read, as in training.
        """
        self.eval()
        if isinstance(texts, str):
            texts = [texts]
        most = self.preprocessing["max_words"]
        labels = self.preprocessing["labels"]
        reviews = [encode(tokenize(text, WORDS)[-most:], self.vocabulary) for text in texts]
        predictions = []
        for start in range(0, len(reviews), 256):
            batch = reviews[start : start + 256]
            ids = ReviewDataset([ids or [0] for ids in batch], [0] * len(batch), self.device).inputs
            for review, probabilities in zip(batch, label_probabilities(self(ids)).tolist()):
                probability, label = max(zip(probabilities, labels, strict=True))
                predictions.append((label, probability) if review else (None, math.nan))
        return predictions


class Predictor(SequenceModel):
    """Embedding -> recurrent layer -> dropout -> dense: ids (B, T) long -> logits (B, V)."""

    def __init__(self, vocab_size, embed_dim, hidden_dim, n_layers=1, dropout=0.2):
        super().__init__()
        self.embedding = new_embedding(vocab_size, embed_dim)
        self.recurrent = Recurrent(
            self.cell, embed_dim, hidden_dim, n_layers, dropout, start=near_identity_
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, ids):
        return super().forward(self.embedding(ids))  # (B, T) -> (B, T, E) -> (B, V)

    @torch.no_grad()
    def next_logits(self, words):
        """Logits (V,) of the word after the last `window` of `words`; without any, of a sentence's
        first.
        """
        self.eval()
        window = self.preprocessing["window"]
        ids = encode(words[-window:] or ["."], self.vocabulary)
        logits = self(torch.tensor([ids], device=self.device))[0].cpu()
        logits[:2] = -math.inf  # <pad> and <unk> are no words
        return logits

    def predict(self, text, n=5):
        """The `n` likeliest next words with their probabilities among all known words."""
        words = self.preprocessing["vocabulary"]
        probabilities = self.next_logits(tokenize(text, WORDS_AND_ENDS)).softmax(dim=0)
        values, ids = probabilities.topk(min(n, len(words) - 2))
        return [(words[i], probability) for i, probability in zip(ids, values.tolist())]

    def continue_text(self, text, length=20, temperature=1.0, seed=42):
        """The next `length` words, drawn from the model's probabilities to the power 1 /
        `temperature`.
        """
        known = self.preprocessing["vocabulary"]
        given = tokenize(text, WORDS_AND_ENDS)
        drawn = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self.next_logits(given + drawn)
            # at temperature 0 all but the likeliest vanish
            probabilities = ((logits - logits.max()) / max(temperature, 1e-30)).softmax(dim=0)
            drawn.append(known[torch.multinomial(probabilities, 1, generator=generator)])
        return re.sub(rf" ({SENTENCE_END})", r"\1", " ".join(drawn))


class Forecaster(SequenceModel):
    """Recurrent layers -> dropout -> dense -> ReLU -> dense: (B, T, input_dim) -> (B, output_dim).

    The inputs are scaled windows without their means; the output counts from the window's last
    value. `roll_forward` takes scaled windows, `predict` a series as it is.
    """

    sample = (0.0, 0.0)

    def __init__(self, input_dim, hidden_dim, output_dim, n_layers=2, dropout=0.2):
        super().__init__()
        self.recurrent = Recurrent(
            self.cell, input_dim, hidden_dim, n_layers, dropout, start=nn.init.orthogonal_
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim)
        )

    @torch.no_grad()
    def roll_forward(self, windows, steps):
        """Forecasts (B, steps) from windows (B, T, 1): each is fed back as the next value."""
        self.eval()
        forecasts = []
        for _ in range(steps):
            forecast = windows[:, -1] + self(centred(windows))  # (B, 1)
            forecasts.append(forecast)
            windows = torch.cat([windows[:, 1:], forecast[:, None]], dim=1)
        return torch.cat(forecasts, dim=1)

    def predict(self, values, length=1):
        """The next `length` values of a series (N,), in its own units; each is fed back for the
        next.

        Of the series the last `window` values are read; a shorter one is read whole, which is less
        than the model was trained on. Raises ValueError if there is no value, one that is no
        number, or one or a forecast that is not finite.
        """
        values = np.array(values, dtype=float)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise InputError("a series must hold one or more finite values, in one dimension")
        scaler = self.preprocessing["scaler"]
        scaled = (values[-self.preprocessing["window"] :] - scaler["mean"]) / scaler["std"]
        window = torch.as_tensor(scaled, dtype=torch.float32)[None, :, None]  # (1, T, 1)
        forecasts = self.roll_forward(window.to(self.device), length)[0].cpu().double().numpy()
        forecasts = forecasts * scaler["std"] + scaler["mean"]
        if not np.isfinite(forecasts).all():
            raise InputError(
                "a forecast is not finite: the values lie too far from those of training"
            )
        return forecasts


class RNNClassifier(Classifier):
    """Text classifier on a vanilla RNN with tanh units (Elman 1990)."""

    cell = CELLS["RNN"]


class LSTMClassifier(Classifier):
    """Text classifier on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = CELLS["LSTM"]


class GRUClassifier(Classifier):
    """Text classifier on gated recurrent units (Cho et al. 2014)."""

    cell = CELLS["GRU"]


class IRNNClassifier(Classifier):
    """Text classifier on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = CELLS["IRNN"]


class RNNPredictor(Predictor):
    """Next-word predictor on a vanilla RNN with tanh units (Elman 1990)."""

    cell = CELLS["RNN"]


class LSTMPredictor(Predictor):
    """Next-word predictor on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = CELLS["LSTM"]


class GRUPredictor(Predictor):
    """Next-word predictor on gated recurrent units (Cho et al. 2014)."""

    cell = CELLS["GRU"]


class IRNNPredictor(Predictor):
    """Next-word predictor on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = CELLS["IRNN"]


class RNNForecaster(Forecaster):
    """Forecaster on a vanilla RNN with tanh units (Elman 1990)."""

    cell = CELLS["RNN"]


class LSTMForecaster(Forecaster):
    """Forecaster on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = CELLS["LSTM"]


class GRUForecaster(Forecaster):
    """Forecaster on gated recurrent units (Cho et al. 2014)."""

    cell = CELLS["GRU"]


class IRNNForecaster(Forecaster):
    """Forecaster on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = CELLS["IRNN"]


# --- saving and loading ---------------------------------------------------------------


def checkpoint_bytes(model, arguments):
    """A trained model and its constructor arguments as a file: tensors, numbers, text, no code."""
    checkpoint = {
        "class": type(model).__name__,
        "arguments": arguments,
        "weights": {name: weight.cpu() for name, weight in model.state_dict().items()},
        "preprocessing": model.preprocessing,
        "metrics": model.metrics,
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)
    return content.getvalue()


def load_checkpoint(path):
    """The model saved at `path`, on the CPU and ready to `predict`; no code in the file is run.

    Raises InputError.
    """
    if not os.path.isfile(path):  # noqa: PTH113 (Path's raises if a name is too long)
        raise InputError(
            f"{path}: no such file; trained models are in the folder 'models' of an output folder"
        )
    try:
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # on what is refused in one line
            return restore(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a foreign or damaged file can make torch stumble over anything
        raise InputError(
            f"{path}: not a model that this script can use ({first_line(error)[:120]})"
        ) from error


# all that `checkpoint_bytes` makes torch.save write
PICKLED = {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}


def check_archive(path):
    """Raise an error unless the file is whole, needs no more memory than its size, and holds
    nothing but weights, numbers and text.
    """
    size = Path(path).stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(each.file_size for each in entries) > size:
            raise InputError("it would need more memory than its size")
        if archive.testzip():
            raise InputError("damaged: a checksum is wrong")
        [pickled] = [each for each in entries if each.filename.endswith("/data.pkl")]
        content = archive.read(pickled)
    # torch.load refuses code by itself, but not a call that makes an array of any size
    for operation, argument, _ in pickletools.genops(content):
        if "GLOBAL" in operation.name and argument not in PICKLED:
            raise InputError(f"it holds {argument}")
        if isinstance(argument, int) and argument > size:
            raise InputError("it would need more memory than its size")


def is_sensible(name, value):
    """Whether a model can work with this entry of its preprocessing."""
    match name, value:
        case "vocabulary" | "labels", list():
            return len(set(value)) == len(value) and all(isinstance(word, str) for word in value)
        case "max_words" | "window", int():
            return value >= 1
        case "scaler", {"mean": float(), "std": float(std), "range": [float(low), float(high)]}:
            return std > 0 and low <= high
    return False


def restore(checkpoint):
    """The model in a checkpoint; raises an error where something in it makes no sense."""
    arguments = checkpoint["arguments"]
    if arguments["n_layers"] > 100:
        raise InputError("it has more than 100 layers")
    heads = SequenceModel.__subclasses__()
    classes = {each.__name__: each for head in heads for each in head.__subclasses__()}
    with torch.device("meta"):  # takes no memory, whatever the sizes
        model = classes[checkpoint["class"]](**arguments)
    model.load_state_dict(checkpoint["weights"], assign=True)
    for weight in model.parameters():
        # else one number may stand for millions
        if not weight.is_contiguous() or not weight.isfinite().all():
            raise InputError("weights that are not there, or not finite")
    model.metrics = checkpoint["metrics"]
    model.preprocessing = checkpoint["preprocessing"]
    for name, value in model.preprocessing.items():
        if not is_sensible(name, value):
            raise InputError(f"its {name} makes no sense")
    model.predict(model.sample)  # raises an error if anything is missing or does not fit
    return model


def first_line(error):
    """An error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


# --- what a model consists of ---------------------------------------------------------


def count_parameters(model):
    """Trainable parameters of each part of the model that has any: embedding, recurrent, head."""
    counts = Counter()
    for name, weight in model.named_parameters():
        counts[name.partition(".")[0]] += weight.numel()
    return counts


@torch.no_grad()
def describe_layers(model, inputs):
    """The layers in the order in which `inputs` pass them: kind, settings, shape without B."""
    layers = []

    def describe(module, _inputs, output):
        if isinstance(module, Recurrent) or not list(module.children()):
            tensor = output[0] if isinstance(output, tuple) else output
            layers.append(
                {
                    "kind": type(module).__name__,
                    "settings": module.extra_repr(),
                    "shape": list(tensor.shape[1:]),
                    "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
                }
            )

    model.eval()
    with nn.modules.module.register_module_forward_hook(describe):  # hears of all modules
        model(inputs)
    return layers


# ======================================================================================
# Tasks
# ======================================================================================

SHIFT = 0.25  # of one value of a window, in units of the targets: the change of a series
LAGS = (2, 4, 8, 12, 16, 24, 32, 48)  # steps back at which a value is shifted, in turn


class Change(NamedTuple):
    """Test examples in which the one thing that decides was changed.

    The targets are what the changed examples call for.
    """

    rows: Sequence  # of the test examples
    before: SequenceDataset
    after: SequenceDataset


UNKNOWN_SHARE = "unknown words in the test split"  # among the facts


@dataclass(frozen=True)
class TaskData:
    """The data of one seed: three disjoint splits and what is known about them."""

    train: SequenceDataset
    validation: SequenceDataset
    test: SequenceDataset | None  # not there while a model is trained
    sizes: Mapping  # constructor keywords of the models that the data decide
    preprocessing: Mapping  # turns words or values into inputs, and back
    facts: Mapping  # for the reader
    examples: DataFrame  # a row per test example: `truth`, what it is, what the generator knows
    change: Change | None  # None for a user's texts
    spell: Callable  # answers (N,) to the test examples as labels, words, values
    # called once per seed, not once per model; there are no ceilings for a user's data
    baselines: Callable
    ceilings: Callable = dict
    doubts: Sequence = ()  # sentences on what may mislead
    unit: float = 1.0  # one unit of the targets, in the user's units
    offset: float = 0.0  # a target of zero, in the user's units

    def spelled(self, kind, answers):
        """Answers to the test examples as a record holds them: lists, the answers spelled out."""
        return {"kind": kind, **as_lists(answers.assign(answer=self.spell(answers["answer"])))}


def as_lists(table):
    """The columns of a table as lists for JSON, which knows no nan."""
    return table.astype(object).where(table.notna(), None).to_dict("list")


def dealt_by_label(labels, rng):
    """The index of `labels` in a random order, in which each stretch has its share of every one."""
    shuffled = labels.iloc[rng.permutation(len(labels))]
    by_label = shuffled.groupby(shuffled)
    # the i-th of n examples of a label comes at (i + 0.5) / n of the way
    places = (by_label.cumcount() + 0.5) / by_label.transform("size")
    return places.sort_values(kind="stable").index


def build_reviews(config, seed, device=CPU):
    """Reviews without repetitions, split, encoded with the training split's vocabulary; InputError.

    Of a review longer than `max_words` the end is kept: that is where reviewers conclude. A file's
    reviews are dealt out so that each split has its share of every label; generated ones come in
    random order.
    """
    rng = random_generator(seed, "reviews")
    doubts = []
    if config.file:
        reviews, doubts = read_reviews(config.file.text, *config.file.columns)
    else:
        reviews = generate_reviews(config, rng)
    tokens = Series([tuple(tokenize(text, WORDS)) for text in reviews.texts])
    tokens = tokens[tokens.map(len) > 0].drop_duplicates()  # repetitions would cross the splits
    kept = tokens.index
    if config.file:
        kept = dealt_by_label(Series(reviews.labels)[kept], rng)
    words = [review[-config.max_words :] for review in tokens[kept]]
    labels = reviews.labels[kept]
    names = np.array(reviews.names)

    parts = three_parts(len(words), 20, "different reviews that hold a word")
    train_words = (word for review in words[parts[0]] for word in review)
    vocabulary = fit_vocabulary(train_words, config.vocab_size)
    ids = [encode(review, vocabulary) for review in words]
    train, validation, test = (ReviewDataset(ids[part], labels[part], device) for part in parts)

    tested = kept[parts[2]]
    truth = labels[parts[2]]
    examples = DataFrame({"truth": names[truth], "text": [reviews.texts[i] for i in tested]})
    ceilings = {}
    change = None
    if not config.file:
        known = reviews.known.iloc[tested].reset_index(drop=True)
        examples = examples.join(known[["distance", "role"]])
        # nothing else depends on the label: these are Bayes' odds
        odds = math.log(config.reliability / (1 - config.reliability))
        logits = np.outer(np.where(known["favourable"], odds, -odds), [0, 1])  # (N, 2)
        effect = 2 * config.reliability - 1
        ceilings["Bayes decision"] = label_answers(logits, truth).assign(effect=effect)
        turned = [list(review) for review in ids[parts[2]]]
        other_words = encode(known["other_word"], vocabulary)
        for review, distance, word in zip(turned, known["distance"], other_words):
            review[-1 - distance] = word
        called_for = 1 - known["favourable"].to_numpy()
        change = Change(
            range(len(tested)),
            ReviewDataset(ids[parts[2]], called_for, device),
            ReviewDataset(turned, called_for, device),
        )
    return TaskData(
        train=train,
        validation=validation,
        test=test,
        sizes={"vocab_size": len(vocabulary), "output_dim": len(names) if len(names) > 2 else 1},
        preprocessing={
            "vocabulary": list(vocabulary),
            "labels": list(reviews.names),
            "max_words": config.max_words,
        },
        facts={
            "reviews": len(words),
            "left out as empty or repeated": len(reviews.texts) - len(words),
            **{f"share {name}": np.mean(labels == i) for i, name in enumerate(reviews.names)},
            "mean length (words)": np.mean([len(review) for review in words]),
            "distinct words": len(set().union(*words)),
            "vocabulary": len(vocabulary),
            UNKNOWN_SHARE: (test.inputs == 1).sum().item() / test.lengths.sum().item(),
        },
        examples=examples,
        spell=partial(np.take, names),
        change=change,
        baselines=partial(review_baselines, train, validation, test, len(vocabulary), len(names)),
        ceilings=lambda: ceilings,
        doubts=doubts,
    )


def build_corpus(config, seed, device=CPU):
    """A corpus, cut in three, encoded with the training part's vocabulary; raises InputError."""
    window = config.window
    if config.file:
        lines = config.file.text.splitlines()  # one at a time, which saves memory
        words = [word for line in lines for word in tokenize(line, WORDS_AND_ENDS)]
    else:
        corpus = generate_corpus(config, random_generator(seed, "corpus"))
        words = corpus["word"].tolist()

    # before windows: none straddles a cut
    parts = three_parts(len(words), 8 * (window + 1), "words")
    vocabulary = fit_vocabulary(words[parts[0]], config.vocab_size)
    ids = encode(words, vocabulary)
    train_ids = ids[parts[0]]
    train = CorpusDataset(train_ids, window, device=device)
    validation = CorpusDataset(ids[parts[1]], window, MOST_WINDOWS, device)
    test = CorpusDataset(ids[parts[2]], window, MOST_WINDOWS, device)

    targets = range(parts[2].start + window, len(words), test.stride)  # of the test windows
    examples = DataFrame(
        {
            "truth": [words[i] for i in targets],
            "text": [" ".join(words[i - window : i]) for i in targets],
        }
    )
    ceilings = {}
    change = None
    if not config.file:
        known = corpus.iloc[targets].reset_index(drop=True)
        examples = examples.join(known[["role", "distance"]])
        changed = known[known["distance"] <= window]  # the subject stands in the window
        rows = changed.index.tolist()
        before = test.inputs[rows]
        after = before.clone()
        places = window - changed["distance"].to_numpy(dtype=int)
        others = encode(changed["other_subject"], vocabulary)
        after[range(len(rows)), places] = after.new_tensor(others)
        called_for = after.new_tensor(encode(changed["other_word"], vocabulary))
        change = Change(
            rows, SequenceDataset(before, called_for), SequenceDataset(after, called_for)
        )
        ceilings["full state"] = Answers(
            {
                "answer": encode(known["likeliest"], vocabulary),
                "probability": known["probability"],
                "loss": known["entropy"],
                "score": (known["likeliest"] == known["word"]).astype(float),
                "effect": known["effect"],
            }
        )
    trained_on = set(zip(*(train_ids[i:] for i in range(window))))
    return TaskData(
        train=train,
        validation=validation,
        test=test,
        sizes={"vocab_size": len(vocabulary)},
        preprocessing={"vocabulary": list(vocabulary), "window": window},
        facts={
            "words": len(ids),
            "distinct words": len(set(words)),
            "vocabulary": len(vocabulary),
            "test windows": len(test),
            UNKNOWN_SHARE: (test.targets == 1).float().mean().item(),
            "test windows that also occur in training": np.mean(
                [tuple(ids) in trained_on for ids in test.inputs.tolist()]
            ),
        },
        examples=examples,
        spell=partial(np.take, list(vocabulary)),
        change=change,
        baselines=partial(corpus_baselines, train, validation, test, len(vocabulary)),
        ceilings=lambda: ceilings,
    )


def build_series(config, seed, device=CPU):
    """A series, cut in three, in units of how far training values lie from their windows' means.

    Of a short series the windows are a tenth at most, so that each part holds some; raises
    InputError.
    """
    doubts = []
    if config.file:
        values, doubts = read_series(config.file.text, *config.file.columns)
    else:
        series = generate_series(config, random_generator(seed, "series"))
        values = series["value"].to_numpy(copy=True)
    window = min(config.window, max(4, len(values) // 10))
    if window < config.window:
        doubts.append(
            f"{len(values):,} values are few: windows of {window} steps in place of {config.window}"
        )

    parts = three_parts(len(values), 48, "values")  # before windows: none straddles a cut
    train_values = values[parts[0]]
    test_values = values[parts[2]]
    step = math.ceil(len(values) / MOST_WINDOWS)
    rows = torch.as_tensor(train_values).unfold(0, window + 1, step)  # (N, T + 1)
    from_mean = rows - rows[:, :-1].mean(dim=1, keepdim=True)
    unit = from_mean.square().mean().sqrt().item()
    if not 0 < unit < math.inf:
        raise InputError(
            f"constant over its first {TRAIN_SHARE:.0%}, the training part, or too large"
        )
    offset = float(train_values.mean())
    scaled = (values - offset) / unit
    if np.abs(scaled).max() > 1e15:
        raise InputError("a value beyond its training part is too large for single precision")
    every, validation, test = (SeriesDataset(scaled[part], window, device=device) for part in parts)
    stride = min(config.stride, math.ceil(len(every) / 1000))  # a short series can spare no window
    train = SeriesDataset(scaled[parts[0]], window, stride, device)

    # one value of each window is shifted, at another lag from window to window
    lags = np.resize([lag for lag in LAGS if lag <= window], len(test))
    shift = torch.zeros_like(test.inputs)
    shift[range(len(test)), window - lags] = SHIFT
    # as a batch is, but the mean stays: else every value would be shifted a little
    shifted = SequenceDataset(centred(test.inputs) + shift, test.targets - test.inputs[:, -1])
    change = Change(range(len(test)), test, shifted)
    examples = DataFrame(
        {
            "truth": test_values[window:],
            "step": range(parts[2].start + window + 1, len(values) + 1),  # from 1
            "lag": lags,
        }
    )
    if not config.file:
        examples["distance"] = series["distance"].iloc[parts[2]].to_numpy()[window:]

    def ceilings():
        before, after = (
            (best_forecasts(part[:, :, 0].cpu() * unit + offset, config) - offset) / unit
            for part in (test.inputs, test.inputs + shift)
        )
        effect = np.abs(after - before) / SHIFT
        return {"exact filter": value_answers(before, test).assign(effect=effect)}

    low = float(train_values.min())
    high = float(train_values.max())
    beyond = np.mean((test_values < low) | (test_values > high))
    if beyond > 0.1:
        doubts.append(
            f"{beyond:.0%} of the test part's values lie outside those of the training part "
            f"({low:g} to {high:g}): what was learnt may not hold there; look at the baselines, "
            "try its differences"
        )
    season = season_of(every)
    return TaskData(
        train=train,
        validation=validation,
        test=test,
        sizes={"input_dim": 1, "output_dim": 1},
        preprocessing={
            "scaler": {"mean": offset, "std": unit, "range": [low, high]},
            "window": window,
        },
        facts={
            "steps": len(values),
            "least": values.min(),
            "largest": values.max(),
            "window (steps)": window,
            **({"season (steps)": season} if season > 1 else {}),
        },
        examples=examples,
        change=change,
        spell=lambda answers: test_values[window - 1 : -1] + unit * answers,
        baselines=partial(series_baselines, every, validation, test),
        ceilings=dict if config.file else ceilings,
        doubts=doubts,
        unit=unit,
        offset=offset,
    )


@dataclass(frozen=True)
class Metric:
    """A number to report: the mean of a per-example quantity, put into the user's units."""

    name: str
    label: str  # for axes
    source: str  # "loss" or "score"
    unit_power: int = 0  # the mean is multiplied by (one unit of the targets) ** unit_power
    transform: Callable = float  # of the mean
    higher_is_better: bool = False
    is_share: bool = False  # shown in per cent


@dataclass(frozen=True)
class Task:
    """All that differs between the three tasks."""

    name: str
    title: str
    question: str  # what the generated data ask, in a sentence or two
    models: Mapping  # by cell
    build_data: Callable  # (configuration, seed, device)
    loss: Callable  # (output, target) -> (B,); its mean is minimised
    score: Callable  # (output, target) -> (B,); reported beside the loss
    metrics: Sequence  # the first is the one that the models are judged by
    answers: Mapping  # (output, target) -> (B,), for the reader
    file_option: str  # the option that names a user's file
    distance: str  # what `distance` of a test example is
    edges: Sequence  # by which examples are sorted by distance: each from one to the next
    # (evaluation before, after a change) -> (N,): how far the output follows the change
    effect: Callable
    effect_label: str  # for axes
    change_place: str  # how far back the change was, for axes
    effect_by: str = "distance"  # the column of the examples that says it

    def measure(self, loss, score, unit):
        """Mean loss and the task's metrics by name, in the user's units.

        `loss` and `score` are those of each example (N,), or their means.
        """
        # np.mean of a Series would leave out what is not a number
        means = {"loss": float(np.average(loss)), "score": float(np.average(score))}
        metrics = {
            metric.name: metric.transform(means[metric.source]) * unit**metric.unit_power
            for metric in self.metrics
        }
        return {**metrics, "loss": means["loss"]}


def label_loss(output, target):
    """Cross-entropy of a classifier's output (B, 1) or (B, K) with labels (B, 1): (B,)."""
    if output.shape[1] == 1:
        # at the nan of a model that diverges CUDA would end the process: it is put in afterwards
        loss = F.binary_cross_entropy(output.nan_to_num(nan=0.5), target, reduction="none")
        return loss.masked_fill(output.isnan(), math.nan)[:, 0]
    log_probabilities = output.clamp_min(1e-30).log()
    return F.nll_loss(log_probabilities, target[:, 0].long(), reduction="none")


def label_score(output, target):
    """Hits (B,) of a classifier."""
    return (label_probabilities(output).argmax(dim=1) == target[:, 0]).float()


def called_for(before, after):
    """By how much the probability of the targets rises where the examples call for them: (N,)."""
    return np.exp(-after["loss"]) - np.exp(-before["loss"])


def likeliest_word(output, _target=None):
    """The id (B,) of the word with the highest logit; <pad> and <unk> are no words."""
    return output[:, 2:].argmax(dim=1) + 2


def perplexity(loss):
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
    question="Is a film review positive? Only the writer's own last opinion counts: it may stand "
    "far before the end, and the opinions of others may follow.",
    models={
        "RNN": RNNClassifier,
        "LSTM": LSTMClassifier,
        "GRU": GRUClassifier,
        "IRNN": IRNNClassifier,
    },
    build_data=build_reviews,
    loss=label_loss,
    score=label_score,
    metrics=(ACCURACY, CROSS_ENTROPY),
    answers={
        "answer": lambda output, _: label_probabilities(output).argmax(dim=1),
        "probability": lambda output, _: label_probabilities(output).amax(dim=1),
    },
    file_option="reviews",
    distance="words after the opinion that counts",
    edges=(0, 10, 25, 50, 100, math.inf),
    effect=called_for,
    effect_label="rise in probability of the new label\nif that opinion is reversed",
    change_place="words after the opinion that counts",
)
PREDICTOR = Task(
    name="predictor",
    title="Next-word prediction",
    question="Which word comes next? Verbs and objects depend on a subject up to nine words back, "
    "past other nouns.",
    models={
        "RNN": RNNPredictor,
        "LSTM": LSTMPredictor,
        "GRU": GRUPredictor,
        "IRNN": IRNNPredictor,
    },
    build_data=build_corpus,
    loss=partial(F.cross_entropy, reduction="none"),
    score=lambda output, target: (likeliest_word(output) == target).float(),
    metrics=(ACCURACY, CROSS_ENTROPY, PERPLEXITY),
    answers={
        "answer": likeliest_word,
        "probability": lambda output, _: output[:, 2:].softmax(dim=1).amax(dim=1),
    },
    file_option="corpus",
    distance="words back to the subject",
    edges=(2, 4, 5, 6, 7, 8, math.inf),
    effect=called_for,
    effect_label="rise in probability of the new favourite\nif the subject is exchanged",
    change_place="words back to the subject",
)
FORECASTER = Task(
    name="forecaster",
    title="Time-series forecasting",
    question="What is the next value of two noisy sine waves whose periods switch at random?",
    models={
        "RNN": RNNForecaster,
        "LSTM": LSTMForecaster,
        "GRU": GRUForecaster,
        "IRNN": IRNNForecaster,
    },
    build_data=build_series,
    loss=lambda output, target: F.mse_loss(output, target, reduction="none").mean(dim=1),
    score=lambda output, target: F.l1_loss(output, target, reduction="none").mean(dim=1),
    metrics=(MSE, MAE),
    answers={"answer": lambda output, _: output[:, 0]},
    file_option="series",
    distance="steps since a period switched",
    edges=(0, 4, 8, 16, 32, 64, math.inf),
    effect=lambda before, after: np.abs(after["answer"] - before["answer"]) / SHIFT,
    effect_label="shift of the forecast, as a share\nof the shift of one value",
    change_place="steps back to the shifted value",
    effect_by="lag",
)
TASKS = {task.name: task for task in (CLASSIFIER, PREDICTOR, FORECASTER)}
MATCHED = "-matched"  # marks a model whose recurrent parameters match the LSTM's


def cell_name(model):
    """RNN, LSTM or GRU, whatever its size."""
    return model.removesuffix(MATCHED)


def sized(cell, match):
    """The name of a cell's model: of equal hidden size or, with "params", recurrent parameters."""
    return cell + MATCHED if match == "params" and cell != "LSTM" else cell


def model_arguments(name, config, data):
    """The constructor arguments of a model: from the configuration and from the data."""
    arguments = dict(data.sizes)
    for size in ("embed_dim", "hidden_dim", "n_layers", "dropout"):
        if hasattr(config, size):
            arguments[size] = getattr(config, size)
    if name.endswith(MATCHED):

        def recurrent_parameters(cell, hidden_dim):
            inputs = arguments.get("embed_dim", 1)
            layer = CELLS[cell].layer(inputs, hidden_dim, config.n_layers, device="meta")
            return sum(weight.numel() for weight in layer.parameters())

        target = recurrent_parameters("LSTM", config.hidden_dim)
        arguments["hidden_dim"] = min(
            range(1, 3 * config.hidden_dim),  # an RNN needs about twice the LSTM's units
            key=lambda size: abs(recurrent_parameters(cell_name(name), size) - target),
        )
    return arguments


def build_model(task, name, config, data, seed):
    """A fresh model, its weights drawn from the seed."""
    seed_torch(seed, "weights")
    return task.models[cell_name(name)](**model_arguments(name, config, data))


# ======================================================================================
# Training
# ======================================================================================


class Diverged(RuntimeError):
    """A loss was not finite: the learning rate is too high."""


def best_of(history):
    """How many epochs there were, the first one with the lowest validation loss, and that loss;
    before the first epoch 0, 0, inf.
    """
    losses = [math.inf]
    losses.extend(row["validation"]["loss"] for row in history)
    best_epoch = losses.index(min(losses))
    return {"epochs": len(history), "best_epoch": best_epoch, "val_loss": losses[best_epoch]}


def prepare_device(device):
    """Settings of this process under which a run gives the same numbers every time."""
    # the layers are too small to share out; several runs use the cores better
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # 38 kernels a step for nothing
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # as the linear layers: no TF32


@contextmanager
def settings_restored():
    """Put back, at the end of the block, what `prepare_device` has changed in this process."""
    threads = torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    fills_memory = torch.utils.deterministic.fill_uninitialized_memory
    precision = torch.backends.cudnn.rnn.fp32_precision
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled():  # the call imports the compiler
            torch.use_deterministic_algorithms(is_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills_memory
        torch.backends.cudnn.rnn.fp32_precision = precision


def is_usable(device):
    """Whether the device is there and can do a small recurrent step: it may be too old, or full."""
    try:
        layer = nn.LSTM(2, 2).to(device)
        layer(torch.ones(1, 1, 2, device=device))[0].sum().backward()
    except (RuntimeError, AssertionError):  # torch's own error where it was built without CUDA
        return False
    return True


def new_optimizer(model, training, learning_rate):
    """Adam (Kingma & Ba 2015)."""
    return optim.Adam(
        model.parameters(), lr=learning_rate, weight_decay=training.weight_decay, fused=True
    )


def train_step(model, task, optimizer, batch, training):
    """One update, in micro-batches; returns (4,): mean loss and score, norm of the gradient, and 1
    if it was clipped.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    scores = []
    for inputs, targets in zip(*(part.chunk(training.accumulate_steps) for part in batch)):
        output = model(inputs)
        loss = task.loss(output, targets)  # (b,), each of which counts one B-th
        loss.backward(torch.full_like(loss, 1 / len(batch[0])))
        losses.append(loss.detach())
        scores.append(task.score(output.detach(), targets))
    norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
    optimizer.step()
    clipped = (norm > training.clip_norm).float()
    return torch.stack([torch.cat(losses).mean(), torch.cat(scores).mean(), norm, clipped])


def train_epoch(model, task, optimizer, loader, training):
    """One pass over the data; returns the means of what `train_step` returns."""
    model.train()
    means = torch.zeros(4, device=model.device)  # one transfer an epoch, not a step
    seen = 0
    for batch in loader:
        seen += len(batch[1])
        step = train_step(model, task, optimizer, batch, training)
        means += (step - means) * (len(batch[1]) / seen)
    return means.tolist()


@torch.no_grad()
def evaluate(model, task, dataset, batch_size=512):
    """`Answers` of a model to the examples of a dataset."""
    model.eval()
    measures = {"loss": task.loss, "score": task.score, **task.answers}
    parts = []
    # batches of similar length: little padding
    for rows in dataset.lengths.argsort(stable=True).split(batch_size):
        inputs, target = dataset.batch(rows)
        output = model(inputs)
        answers = {name: measure(output, target).cpu() for name, measure in measures.items()}
        parts.append(Answers(answers, index=rows.numpy()))
    return pd.concat(parts).sort_index()


def fit(model, task, data, training, learning_rate, seed, on_epoch=lambda row: None):
    """Train until the validation loss stops falling; leaves the best epoch's weights in `model`.

    Model and data must be on the same device. Returns the history, a row per epoch, which
    `on_epoch` is called with as well: `epoch`, `learning_rate`, `gradient_norm` (mean, before
    clipping), `clipped` (share of the steps), `seconds`, and under `train` and `validation` the
    loss and the task's metrics; those of training are running means, with dropout on. Raises
    Diverged when a loss is not finite.
    """
    seed_torch(seed, "dropout")
    optimizer = new_optimizer(model, training, learning_rate)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=training.lr_factor, patience=training.lr_patience
    )
    batches = LengthBuckets(
        data.train.lengths,
        training.batch_size_for(len(data.train)),
        random_generator(seed, "batches"),
        training.updates,
    )
    loader = DataLoader(data.train, batch_sampler=batches, collate_fn=lambda batch: batch)
    history = []
    for epoch in range(1, training.epochs + 1):
        start = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        loss, score, gradient_norm, clipped = train_epoch(model, task, optimizer, loader, training)
        answers = evaluate(model, task, data.validation)
        validation = task.measure(answers["loss"], answers["score"], data.unit)
        if not math.isfinite(loss + validation["loss"]):
            raise Diverged(
                f"{type(model).__name__} ({task.name}), seed {seed}: the loss is not finite in "
                f"epoch {epoch}; try a learning rate below {rate:g} or a clip norm below "
                f"{training.clip_norm:g}"
            )
        row = {
            "epoch": epoch,
            "learning_rate": rate,
            "gradient_norm": gradient_norm,
            "clipped": clipped,
            "seconds": time.perf_counter() - start,
            "train": task.measure(loss, score, data.unit),
            "validation": validation,
        }
        history.append(row)
        on_epoch(row)
        waited = epoch - best_of(history)["best_epoch"]
        if waited == 0:  # a copy: the state's own tensors go on changing
            best_weights = copy.deepcopy(model.state_dict())
        if waited >= training.patience:
            break
        plateau.step(validation["loss"])
    model.load_state_dict(best_weights)
    return history


# ======================================================================================
# Evidence
# ======================================================================================


def activation_bytes(model, task, batch):
    """Bytes that the forward pass on `batch` keeps for the backward pass, the weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model(batch[0]), batch[1])
    return sum(size for storage, size in kept.items() if storage not in weights)


def kernel_name(model, inputs):
    """Which implementation of the recurrent layer runs: a library's, or PyTorch's generic one."""
    # of the nodes of the backward graph, which are called after the operators that ran
    names = ""
    waiting = {model(inputs[:2, :2]).grad_fn}
    while waiting:
        node = waiting.pop()
        names += node.name()
        waiting.update(parent for parent, _ in node.next_functions if parent)
    kernels = {"CudnnRnn": "cuDNN", "MkldnnRnn": "oneDNN", "Miopen": "MIOpen", "Mps": "MPS"}
    for operator, kernel in kernels.items():
        if operator in names:
            return kernel
    return "generic"


def measure_costs(task, models, training, data):
    """What a training step of each model costs, by its name.

    The models take turns on the same two full batches, of shorter and of longer examples: once to
    warm up, then twice, of which the mean counts. Activations are those of a full batch of the
    longest examples that may occur.
    """
    train = data.train
    size = min(training.batch_size_for(len(train)), len(train))
    by_length = train.lengths.argsort(stable=True)
    starts = [(len(train) - size) * quarter // 4 for quarter in (1, 3)]
    batches = [train.batch(by_length[start : start + size]) for start in starts]
    length = data.preprocessing.get("max_words") or data.preprocessing["window"]
    longest = train.inputs.new_ones(size, length, *train.inputs.shape[2:])
    seconds = {name: [] for name in models}
    for _ in range(3):
        for name, model in models.items():
            optimizer = new_optimizer(model, training, learning_rate=1e-3)
            steps = partial(train_epoch, model, task, optimizer, batches, training)
            seconds[name].append(timeit.timeit(steps, number=1) / len(batches))
    costs = {}
    for name, model in models.items():
        step = np.mean(seconds[name][1:])
        costs[name] = {
            "kernel": kernel_name(model, batches[0][0]),
            "activation_bytes": activation_bytes(model, task, (longest, train.targets[:size])),
            "ms_per_step": round(1000 * step, 2),
            "samples_per_second": round(size / step),
            "seconds_per_epoch": step * max(training.updates, math.ceil(len(train) / size)),
        }
    return costs


def gradient_by_step(model, task, data, n=64):
    """Norm of the loss's gradient at each embedded word, from the end: mean of `n` long reviews."""
    rows = data.test.lengths.topk(min(n, len(data.test))).indices
    inputs, targets = data.test.batch(rows)
    last = data.test.lengths[rows, None] - 1  # (n, 1)
    model.train()  # cuDNN goes backward in training mode only
    model.dropout.eval()
    embedded = model.embedding(inputs)  # (n, T, E)
    output = SequenceModel.forward(model, embedded, last[:, 0].to(inputs.device))
    gradient = torch.autograd.grad(task.loss(output, targets).sum(), embedded)[0]  # (n, T, E)
    back = last - torch.arange(int(last.min()) + 1)  # (n, steps): position of each
    return gradient.norm(dim=2).cpu().gather(1, back).mean(dim=0).tolist()


def forecasts(model, data, shown=120, horizon=120, stride=10):
    """Forecasts against the truth, in series units.

    First one step ahead, of the first `shown` test windows. Then free-running, `horizon` steps from
    every `stride`-th window: the forecasts from the first of them, and the mean squared error of
    all by the number of steps.
    """
    horizon = min(horizon, max(len(data.test) // 2, 1))
    windows = data.test.inputs[: len(data.test) - horizon + 1 : stride]  # (O, T, 1)
    truth = data.test.targets[:, 0].unfold(0, horizon, stride)  # (O, horizon)
    free = model.roll_forward(windows, horizon)  # (O, horizon)

    def in_series_units(values):
        return (values * data.unit + data.offset).tolist()

    def by_horizon(values):
        return (((values - truth) ** 2).mean(dim=0) * data.unit**2).tolist()

    return {
        "truth": in_series_units(data.test.targets[:shown, 0]),
        "forecast": in_series_units(model.roll_forward(data.test.inputs[:shown], 1)[:, 0]),
        "free_truth": in_series_units(truth[0]),
        "free_forecast": in_series_units(free[0]),
        "free_mse": by_horizon(free),
        "persistence_mse": by_horizon(windows[:, -1]),
        "variance": data.test.targets.var().item() * data.unit**2,
    }


def effect_of_change(model, task, change):
    """How far the answers follow a change of what decides: a Series, by row of the test examples.

    A model that does not keep what was changed gives 0.
    """
    rows, before, after = change
    effect = task.effect(evaluate(model, task, before), evaluate(model, task, after))
    return effect.set_axis(rows)


# task: (task, trained model, untrained model, data) -> what a record holds beside answers
EVIDENCE = {
    CLASSIFIER.name: lambda task, trained, untrained, data: {
        "gradient": gradient_by_step(trained, task, data),
        "initial_gradient": gradient_by_step(untrained, task, data),
    },
    PREDICTOR.name: lambda *_: {},
    FORECASTER.name: lambda task, trained, untrained, data: forecasts(trained, data),
}

# ======================================================================================
# Experiment
# ======================================================================================
# From here on `run` is a Run, `experiment` an Experiment, `folder` the Path of the output folder.

BASELINES = "baselines"  # stands for a model where there is nothing to train
# exit status of a child that would begin everything again: the user's script has no guard
NO_GUARD = 64


class Run(NamedTuple):
    """A model of a task, or its baselines, on the data of a seed."""

    task: str
    model: str
    seed: int
    learning_rate: float | None = None  # the baselines have none
    is_tuning: bool = False  # only to choose the learning rate: the test part stays shut

    def __str__(self):  # the name of its files as well
        name = f"{self.task}_{self.model}_seed{self.seed}"
        return f"{name}_rate{self.learning_rate:g}" if self.is_tuning else name

    def record_path(self, folder):
        """Where its record is written, last of all."""
        subfolder = "runs/tuning" if self.is_tuning else "runs"
        return folder / subfolder / f"{self}.json"

    def model_path(self, folder):
        """Where its checkpoint is written."""
        return folder / "models" / f"{self}.pt"


@dataclass(frozen=True)
class Experiment:
    """What is asked for, and what all its runs share."""

    config: Config
    tasks: Sequence
    models: Sequence
    seeds: Sequence
    folder: Path
    device: torch.device = CPU
    workers: int = 1
    resume: bool = False

    @cached_property
    def costs(self):
        """What a training step costs, by task and model; measured when it is first asked for."""
        costs = {}
        for name in self.tasks:
            task = TASKS[name]
            config = self.config[name]
            data = load_data(name, config, self.seeds[0], self.device)
            models = {
                model: build_model(task, model, config, data, 0).to(self.device)
                for model in self.models
            }
            costs[name] = measure_costs(task, models, config.training, data)
        return costs


@lru_cache(maxsize=len(TASKS))
def load_data(task, config, seed, device):
    """A seed's data, kept for the next model; raises InputError, which names the user's file."""
    try:
        data = TASKS[task].build_data(config, seed, device)
    except InputError as error:
        raise InputError(f"{config.file.path}: {error}" if config.file else str(error)) from error
    doubts = [*(config.file.notes if config.file else ()), *data.doubts]
    if data.facts.get(UNKNOWN_SHARE, 0) > 0.5:
        doubts.append("more than half of the words in the test part do not occur in training")
    return replace(data, doubts=doubts)


def printable(text):
    """Text without control characters, which might command a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def tell(text):
    """Print to stderr, above a bar; training does not depend on whether anybody listens."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            tqdm.write(printable(text), file=sys.stderr)


def say(text):
    """Print to stdout; raises OSError where that is closed or full."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    print(printable(text), flush=True)


def for_spreadsheet(table):
    """A table as CSV in which no text is taken for a formula."""

    def as_text(cell):
        return re.sub(r"^(?=[=+@-])", "'", cell) if isinstance(cell, str) else cell

    return table.map(as_text).to_csv(index=False)


def write_whole(path, content):
    """Write text or bytes so that the file is whole or absent: temporary name, flush, rename.

    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


# --- one run --------------------------------------------------------------------------


def measure_baselines(data):
    """What the record of a seed's baselines holds: the test examples, and who needs no training."""
    answers = {name: data.spelled("baseline", each) for name, each in data.baselines().items()}
    for name, each in data.ceilings().items():
        answers[name] = data.spelled("ceiling", each)
    return {
        "facts": data.facts,
        "doubts": data.doubts,
        "examples": as_lists(data.examples),
        "answers": answers,
    }


def trained_model(run, experiment, data, on_epoch):
    """The model of a run and its history; what a tuning run has trained is not trained again."""
    tried = run._replace(is_tuning=True)
    record = read_records(experiment.folder, "runs/tuning").get(tried)
    if record and has_model(tried, record, experiment.folder):
        model = load_checkpoint(tried.model_path(experiment.folder))
        return model.to(experiment.device), record["history"]
    task = TASKS[run.task]
    config = experiment.config[run.task]
    model = build_model(task, run.model, config, data, run.seed).to(experiment.device)
    without_test = replace(data, test=None)
    history = fit(model, task, without_test, config.training, run.learning_rate, run.seed, on_epoch)
    return model, history


def measure_model(model, run, experiment, data):
    """What the record of a run holds of its trained model, which gets its test metrics."""
    task = TASKS[run.task]
    config = experiment.config[run.task]
    answers = evaluate(model, task, data.test)
    if data.change:
        answers["effect"] = effect_of_change(model, task, data.change)
    model.metrics = task.measure(answers["loss"], answers["score"], data.unit)
    untrained = build_model(task, run.model, config, data, run.seed).to(experiment.device)
    longest, _ = data.train.batch(data.train.lengths.topk(2).indices)
    return {
        "answers": {run.model: data.spelled("model", answers)},
        "evidence": EVIDENCE[run.task](task, model, untrained, data),
        "parts": count_parameters(model),
        "layers": describe_layers(model, longest),
        "cost": experiment.costs[run.task][run.model],
    }


def with_digest(record):
    """A record as JSON, its last entry the SHA-256 of the others, by which damage is seen."""
    text = json.dumps(record, default=np.generic.item)  # settings may be NumPy's
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]}, "digest": "{digest}"}}'


def complete_run(run, experiment, on_epoch):
    """Do a run; its record, from which tables and figures are made, is written last.

    Raises what training raises, InputError and OSError.
    """
    device = experiment.device
    prepare_device(device)
    config = experiment.config[run.task]
    data = load_data(run.task, config, run.seed, device)
    path = run.record_path(experiment.folder)
    path.unlink(missing_ok=True)  # an older one must not stand beside a newer model
    record = {**run._asdict(), "unit": data.unit, "labels": data.preprocessing.get("labels")}
    if run.model == BASELINES:
        record.update(measure_baselines(data))
    else:
        model, record["history"] = trained_model(run, experiment, data, on_epoch)
        if not run.is_tuning:
            # the best validation weights are back: nothing is chosen by the test part, opened now
            record.update(measure_model(model, run, experiment, data))
        model.preprocessing = data.preprocessing
        checkpoint = checkpoint_bytes(model, model_arguments(run.model, config, data))
        write_whole(run.model_path(experiment.folder), checkpoint)
        record["checkpoint"] = hashlib.sha256(checkpoint).hexdigest()
    environment = {  # what the numbers may depend on beside the configuration and the seed
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
    }
    if device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(device)
        environment["CUDA"] = torch.version.cuda
        environment["cuDNN"] = torch.backends.cudnn.version()
    record["environment"] = environment
    write_whole(path, with_digest(record))
    if run.learning_rate and not run.is_tuning:  # what was tried is not needed any more
        run._replace(is_tuning=True).model_path(experiment.folder).unlink(missing_ok=True)


# --- many runs ------------------------------------------------------------------------


def serve_run(pipe, run, experiment):
    """In a process of its own: send the row of each epoch, and at last None, or the error."""
    server = os.getppid()  # the process that starts all others

    def end_with_parents():
        parent = multiprocessing.parent_process()
        while parent.is_alive() and os.getppid() == server:
            parent.join(timeout=1)
        os._exit(1)

    threading.Thread(target=end_with_parents, daemon=True).start()
    ended = None
    try:
        complete_run(run, experiment, pipe.send)
    except Exception as error:
        ended = error
        if isinstance(error, RuntimeError) and not isinstance(error, Diverged):
            ended = RuntimeError(first_line(error))  # torch's own may not pass through a pipe
    with suppress(ConnectionError):
        pipe.send(ended)


def complete_in_child(run, experiment, on_epoch, context):
    """`complete_run` in a process of its own, whose crash costs this run alone."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve_run, args=(sender, run, experiment), daemon=True)
    try:
        process.start()
        sender.close()
        for message in iter(receiver.recv, None):
            if isinstance(message, Exception):
                raise message
            on_epoch(message)
    except (EOFError, ConnectionError) as error:  # it was killed, or the process that starts it
        if process.pid:
            process.join()
        else:
            time.sleep(1)  # the next run starts another
        if process.exitcode == NO_GUARD:  # `run` says so in a child
            raise InputError(
                'call main() or run() under `if __name__ == "__main__":`, or with one worker'
            ) from error
        raise RuntimeError(
            f"its process ended with status {process.exitcode}; killed, or out of memory?"
        ) from error


def block_signals():
    """Leave Ctrl-C and SIGTERM to the main thread; processes started in this one inherit that."""
    if hasattr(signal, "pthread_sigmask"):
        # else the first process starts it, which takes the mask away
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])


def start_server():
    """Start the process that starts those of the runs, which takes seconds, in the background."""
    # for glibc, at the start of a process: freed memory is kept; a tenth of an LSTM's step was
    # page faults
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    modules = ["torch._dynamo", "pandas", "matplotlib.figure", "tqdm.auto"]
    multiprocessing.set_forkserver_preload(modules)
    if os.name == "posix":
        with ThreadPoolExecutor(1, initializer=block_signals) as pool:
            pool.submit(forkserver.ensure_running)


def started_runs(runs, experiment, workers, on_epoch):
    """Start the runs, `workers` at a time; yields each with a function that finishes it, or raises
    what ended it.
    """
    if workers == 1:
        for run in runs:
            yield run, partial(complete_run, run, experiment, partial(on_epoch, run))
        return
    load_data.cache_clear()  # from here on the processes hold the data
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    pool = ThreadPoolExecutor(workers, initializer=block_signals)
    futures = {}
    try:
        for run in runs:
            future = pool.submit(
                complete_in_child, run, experiment, partial(on_epoch, run), context
            )
            futures[future] = run
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:  # after an error or an interruption some are left
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            with suppress(KeyboardInterrupt):  # a second Ctrl-C must leave nobody behind
                for process in multiprocessing.active_children():
                    process.kill()
                time.sleep(0.02)


def expected_seconds(run, experiment):
    """How long a run takes with 20 epochs, or fewer if its cap is lower."""
    if run.model == BASELINES:
        return 2.0  # no cost is measured
    epochs = min(20, experiment.config[run.task].training.epochs)
    return epochs * experiment.costs[run.task][run.model]["seconds_per_epoch"]


def complete_runs(runs, experiment):
    """Do the `runs`, when resuming what is not finished of them, and show how far it is.

    Returns the errors of those that failed, by run; raises any other error.
    """
    if experiment.resume:
        runs = unfinished(runs, experiment.folder)
    if not runs:
        return {}
    workers = min(experiment.workers, len(runs))
    left = {run: expected_seconds(run, experiment) for run in runs}
    # of each task and seed the baselines first, which hold the test examples, then the longest run
    runs = sorted(runs, key=lambda r: (r.task, r.seed, r.model != BASELINES, -left[r]))
    total = sum(left.values())
    tell(
        f"{len(runs)} runs on {experiment.device}, {workers} at a time with a thread each: about "
        f"{tqdm.format_interval(total / workers)} if a run takes 20 epochs"
    )
    bar = tqdm(
        total=total,
        disable=None if sys.stderr else True,  # without a terminal there are the lines alone
        leave=False,
        dynamic_ncols=True,
        bar_format="all runs {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
    )
    start = time.monotonic()

    def on_epoch(run, row):  # called in many threads, for a run always in the same one
        left[run] *= 0.95  # of about 20 epochs one has passed; nobody knows how many follow
        bar.n = total - sum(left.values())
        metric = TASKS[run.task].metrics[0].name
        tell(
            f"{run}  epoch {row['epoch']:2d}  train/val "
            f"loss {row['train']['loss']:.4g}/{row['validation']['loss']:.4g}, "
            f"{metric} {row['train'][metric]:.4g}/{row['validation'][metric]:.4g}"
        )

    failures = {}
    started = started_runs(runs, experiment, workers, on_epoch)
    with bar, closing(started):
        for n, (run, finish) in enumerate(started, start=1):
            line = f"{run}  done"
            try:
                finish()
            except (RuntimeError, MemoryError) as error:  # of this run alone
                failures[run] = error
                line = f"failed: {run}: {first_line(error)}"
            left[run] = 0
            bar.n = total - sum(left.values())
            seconds = (time.monotonic() - start) * (total / bar.n - 1)
            tell(f"{line} ({n} of {len(runs)}, {tqdm.format_interval(seconds)} left)")
    return failures


# --- what is in a folder --------------------------------------------------------------


def read_records(folder, subfolder="runs"):
    """The records in a folder, by run; files that are none are named.

    In the order of tasks, models (baselines last), seeds and learning rates.
    """
    tasks = list(TASKS)
    models = [*CELLS, *(name + MATCHED for name in CELLS), BASELINES]
    found = {}
    for path in (folder / subfolder).glob("*.json"):
        try:
            if not path.is_file():
                raise ValueError("a pipe or a folder")
            text = path.read_text()
            record = json.loads(text)
            del record["digest"]
            run = Run(*(record[name] for name in Run._fields))
            if text != with_digest(record) or path != run.record_path(folder):
                raise ValueError("cut, changed, or of another run")
            place = tasks.index(run.task), models.index(run.model), run.seed, run.learning_rate
            found[place] = run, record
        except Exception:  # a foreign or damaged file can be anything
            tell(f"{path} is not the whole record of a run; it is left out")
    return dict(found[place] for place in sorted(found))


def has_model(run, record, folder):
    """Whether the model that the record of a run names is there, and whole."""
    path = run.model_path(folder)
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == record["checkpoint"]


def unfinished(runs, folder):
    """Those of the runs that are not finished; where something of one is there, it is named."""
    records = read_records(folder, "runs/tuning" if runs[0].is_tuning else "runs")
    rest = []
    for run in runs:
        needs_model = run.model != BASELINES and not run.is_tuning
        if run not in records or (needs_model and not has_model(run, records[run], folder)):
            rest.append(run)
            path = run.record_path(folder)
            if path.exists():
                tell(f"{path}, or its model, is damaged or of another rate; it is done again")
    tell(f"resuming: {len(runs) - len(rest)} of {len(runs)} runs are finished")
    return rest


def plain_config(config):
    """A configuration as `config.json` holds it; of a user's file the name, not the place."""
    values = {**asdict(config), **asdict(config.training)}
    del values["training"]
    if config.file:
        values["file"] = printable(Path(config.file.path).name)  # it may be no UTF-8
        values["digest"] = config.file.digest
        values["columns"] = config.file.columns
    # tuples become lists, NumPy's numbers Python's
    return json.loads(json.dumps(values, default=np.generic.item))


def read_config(folder):
    """The configuration of the runs in a folder, by task; raises InputError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        return {name: dict(config[name]) for name in TASKS}
    except Exception as error:  # a foreign or damaged file can be anything
        raise InputError(
            f"{path}: not there, or damaged; train first, or choose another --output-dir"
        ) from error


def make_folder(folder, tasks, config):
    """The output directory of a configuration.

    Raises OSError if files cannot be written to it, and InputError if it holds another
    configuration.
    """
    try:
        for name in ("", "runs", "runs/tuning", "models", "predictions"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for left in (folder / name).glob(".*.tmp"):  # by a writer that was killed
                if time.time() - left.stat().st_mtime > 60:
                    left.unlink(missing_ok=True)
            tempfile.TemporaryFile(dir=folder / name).close()
    except OSError as error:
        raise OSError(
            f"--output-dir {folder}: cannot be written ({error.strerror}); choose another"
        ) from error
    wanted = {name: plain_config(of_task) for name, of_task in config.items()}
    path = folder / "config.json"
    if not path.exists():
        write_whole(path, json.dumps(wanted, indent=1))
    present = read_config(folder)
    for name in tasks:
        for key, value in wanted[name].items():
            other = present[name].get(key)
            if other != value:
                raise InputError(
                    f"{folder} holds another configuration ({name}: {key} {other}, not {value}); "
                    "choose another --output-dir"
                )


# --- the choice of learning rates -----------------------------------------------------


def rates_beyond(losses):
    """The rate to try next, in a list, if the best of those tried is at their edge.

    `losses`: mean validation losses by rate, in rising order. Downwards the loss must have fallen
    by 1 % with the last step, for low rates need many epochs.
    """
    place = RATES.index(losses.idxmin())
    if losses.idxmin() == losses.index[-1]:
        return RATES[place + 1 : place + 2]
    if place and losses.idxmin() == losses.index[0] and losses.iloc[1] > 1.01 * losses.iloc[0]:
        return RATES[place - 1 : place]
    return []


def better_half(losses):
    """The rates with the lower half of the losses; of those within 1 % of the best the larger,
    which need fewer epochs.
    """
    large_first = losses.clip(lower=1.01 * losses.min()).sort_index(ascending=False)
    return large_first.nsmallest(math.ceil(np.isfinite(losses).sum() / 2)).index


def tune_rates(experiment, tasks, grid):
    """Each model's learning rate, by (task, model), and the table of the runs that it comes from.

    Successive halving (Jamieson & Talwalkar 2016): the first seed tries the grid, the better half
    of the rates goes on to the other seeds, and the lowest mean validation loss wins. A best rate
    at the edge is followed outwards. A model's rate is None if a run failed other than by
    divergence, for its rate may be the best, or if all diverged.
    """
    pairs = list(product(tasks, experiment.models))
    seeds = experiment.seeds
    of_each = len(grid) + math.ceil(len(grid) / 2) * (len(seeds) - 1)
    seconds = of_each * sum(expected_seconds(Run(*pair, 0), experiment) for pair in pairs)
    tell(
        f"learning rates are chosen first, by about {of_each * len(pairs)} runs: "
        f"{tqdm.format_interval(seconds / experiment.workers)}, if a run takes 20 epochs"
    )
    steps = (  # which rates are tried, given the losses of those before, and on which seeds
        (lambda _: grid, seeds[:1]),
        (rates_beyond, seeds[:1]),
        (better_half, seeds),
        (rates_beyond, seeds),
    )
    losses = dict.fromkeys(pairs)  # mean validation losses by rate
    tried = {}  # what the history of each run says
    failures = {}
    for choose, seeds_of_step in steps:
        while True:
            new = []
            for pair, of_pair in losses.items():
                for rate, seed in product(choose(of_pair), seeds_of_step):
                    run = Run(*pair, seed, rate, is_tuning=True)
                    if run not in tried:
                        new.append(run)
            if not new:
                break
            failures.update(complete_runs(new, experiment))
            records = read_records(experiment.folder, "runs/tuning")
            for run in new:
                tried[run] = best_of(records[run]["history"] if run in records else [])
            table = DataFrame(tried.keys()).join(DataFrame(tried.values()))
            for pair, rows in table.groupby(["task", "model"]):
                by_seed = rows.pivot(index="learning_rate", columns="seed", values="val_loss")
                # infinite where a rate diverged on a seed, or was not tried on all
                losses[pair] = by_seed.mean(axis=1, skipna=False).fillna(math.inf)

    incomplete = {
        (run.task, run.model) for run, error in failures.items() if not isinstance(error, Diverged)
    }
    rates = dict.fromkeys(pairs)
    for pair, of_pair in losses.items():
        if pair not in incomplete and of_pair.min() < math.inf:
            rates[pair] = of_pair.idxmin()
    is_chosen = [rates[run.task, run.model] == run.learning_rate for run in tried]
    for run, chosen in zip(tried, is_chosen):
        if rates[run.task, run.model] and not chosen:  # its model is not needed any more
            run.model_path(experiment.folder).unlink(missing_ok=True)
    return rates, table.drop(columns="is_tuning").assign(chosen=is_chosen)


# ======================================================================================
# Results
# ======================================================================================
# Tables are DataFrames. `examples`: `examples_table`; `scores`: `score_table`; `runs`: `run_table`.

RUN_COLUMNS = [
    "task",
    "model",
    "seed",
    "learning_rate",
    "parameters",
    "recurrent_parameters",
    "epochs",
    "best_epoch",
    "seconds",
    "val_loss",
    "test_loss",
    "test_accuracy",
    "test_mse",
    "test_mae",
]
COST_COLUMNS = [
    "task",
    "model",
    "parameters",
    "recurrent_parameters",
    "ms_per_step",
    "samples_per_second",
    "activation_bytes",
    "kernel",
]
EXAMPLE_COLUMNS = ["truth", "text", "step", "role", "distance", "lag"]


def examples_table(records):
    """A row per test example and per model, baseline or ceiling; every score is a view of it.

    Columns: task, seed, name, kind, example, its answer, probability, loss and score; `unit`, one
    unit of the targets; and of the example what `EXAMPLE_COLUMNS` names, as far as it is known.
    """
    known = {(r["task"], r["seed"]): r["examples"] for r in records if "examples" in r}
    parts = []
    for record in records:
        of_seed = {key: record[key] for key in ("task", "seed", "unit")}
        examples = known.get((record["task"], record["seed"]), {})
        for name, answers in record["answers"].items():
            parts.append(DataFrame({**of_seed, "name": name, **answers, **examples}))
    table = pd.concat(parts).rename_axis("example").reset_index()
    columns = table.columns.union(["probability", "effect", *EXAMPLE_COLUMNS], sort=False)
    numbers = dict.fromkeys(["loss", "score", "effect", "distance", "lag"], "float32")
    return table.reindex(columns=columns).astype(numbers)


def score_table(examples):
    """What each model, baseline and ceiling scores: task, name, kind, seed, metric, value."""
    key = ["task", "name", "kind", "seed"]
    rows = []
    for (*group, unit), answers in examples.groupby([*key, "unit"], sort=False):
        # contiguous, for a mean of float32 depends on the order in which NumPy adds
        measured = np.array([answers["loss"], answers["score"]])
        for metric, value in TASKS[group[0]].measure(*measured, unit).items():
            rows.append((*group, metric, value))
    return DataFrame(rows, columns=[*key, "metric", "value"])


def run_table(records, scores, config):
    """A row per trained model: its task's settings, its record, and what is counted from both.

    Losses are those that training minimised: of scaled values in the forecaster. `capped`: training
    was ended by the cap on epochs. `near_best`: epochs to within 1 % of the lowest validation loss.
    """
    tested = scores.pivot_table("value", ["task", "name", "seed"], "metric").add_prefix("test_")
    rows = []
    for record in records:
        of_task = config[record["task"]]
        title = TASKS[record["task"]].title
        history = DataFrame(record["history"])
        best = best_of(record["history"])
        is_near = history["validation"].str["loss"] <= 1.01 * best["val_loss"]
        near_best = is_near.argmax() + 1
        rows.append(
            {
                **of_task,
                **record,
                **record["cost"],
                **record["evidence"],
                **best,
                "title": f"{title}: {of_task['file']}" if of_task["file"] else title,
                "parameters": sum(record["parts"].values()),
                "recurrent_parameters": record["parts"]["recurrent"],
                "clipped": history["clipped"].mean(),
                "capped": best["epochs"] - best["best_epoch"] < of_task["patience"],
                "seconds": round(history["seconds"].sum(), 1),
                "near_best": near_best,
                "seconds_to_near_best": history["seconds"][:near_best].sum(),
                "activation_mib": record["cost"]["activation_bytes"] / 2**20,
            }
        )
    return DataFrame(rows).join(tested, ["task", "model", "seed"])


def history_table(runs):
    """A row per run, epoch, split and metric."""
    rows = []
    for run in runs.itertuples():
        for row, split in product(run.history, ("train", "validation")):
            for metric, value in row[split].items():
                rows.append((run.task, run.model, run.seed, row["epoch"], split, metric, value))
    return DataFrame(rows, columns=["task", "model", "seed", "epoch", "split", "metric", "value"])


def summarise(scores):
    """Mean and standard deviation over seeds: task, name, kind, metric, mean, std, n."""
    groups = scores.groupby(["task", "name", "kind", "metric"], sort=False)["value"]
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def predictions_table(examples):
    """A row per test example of a task and seed: the truth and the answers of all, side by side."""
    known = examples.drop_duplicates("example").set_index("example")[EXAMPLE_COLUMNS]
    wide = examples.pivot(index="example", columns="name", values=["answer", "probability"])
    wide.columns = [name if kind == "answer" else f"{name} {kind}" for kind, name in wide]
    return known.join(wide).dropna(axis="columns", how="all")


def confusion(answers, labels, normalize=False):
    """How often each label (K rows) was taken for each (K columns); or as `pd.crosstab` says."""
    counts = pd.crosstab(answers["truth"], answers["answer"], normalize=normalize)
    return counts.reindex(index=labels, columns=labels, fill_value=0)


def label_scores(examples, labels):
    """Precision, recall and F1 of each model by label, over the test splits of all seeds."""
    tables = {}
    for model, answers in examples.groupby("name", sort=False):
        counts = confusion(answers, labels)
        tested = counts.sum(axis=1).replace(0, math.nan)  # of a label never tested nothing is known
        right = np.diag(counts)
        table = DataFrame(
            {
                "precision": right / counts.sum().clip(lower=1),
                "recall": right / tested,
                "F1": 2 * right / (counts.sum() + tested),
            }
        )
        table.loc["mean of the labels"] = table.dropna().mean()
        tables[model] = table
    return pd.concat(tables, names=["model", "label"]).map("{:.3f}".format).reset_index()


# --- differences ----------------------------------------------------------------------


@lru_cache
def student_t(degrees):
    """Angles from 0 to pi / 2, and the share of Student's t within +- sqrt(degrees) * tan(angle).

    In these angles the density is cos(angle) ** (degrees - 1); by the trapezoidal rule.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = torch.tensor(np.cos(angles) ** (degrees - 1))
    mass = torch.cumulative_trapezoid(density).numpy()  # up to the second angle, and so on
    return angles, np.append(0, mass / mass[-1])


def paired_difference(a, b):
    """Mean of a - b, the ends of its 95 % interval, and its p value; of one seed the latter nan.

    `a` and `b`: a quantity of each test example, by (seed, example). Data, weights and order of the
    batches are drawn anew with each seed, so the spread between seeds says how far other seeds
    would move the difference; it counts as no smaller than that between examples within a seed,
    for two or three seeds may agree by chance.
    """
    by_seed = (a - b).dropna().groupby("seed")
    means = by_seed.mean()
    mean = means.mean()
    n = len(means)
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    of_examples = math.sqrt((by_seed.var() / by_seed.size()).sum()) / n
    error = max(means.sem(), of_examples, 1e-12)
    angles, shares = student_t(n - 1)
    scale = math.sqrt(n - 1)
    half = scale * math.tan(np.interp(0.95, shares, angles)) * error
    p = 1 - np.interp(math.atan(abs(mean / error) / scale), angles, shares)
    return mean, mean - half, mean + half, p


def holm(p):
    """p values (a Series), the lowest first, adjusted for how many they are (Holm 1979)."""
    ranked = p.dropna().sort_values()
    return (ranked * np.arange(len(ranked), 0, -1)).cummax()


def verdict(row):
    """A row of `compare` in words; where neither is clearly better, the difference is a minus b."""
    metric = next(m for m in TASKS[row.task].metrics if m.name == row.metric)
    found = np.array([row.low, row.difference, row.high])
    if metric.is_share:
        found = 100 * found
        places = 1
        unit = "points"
    else:
        places = decimals(row.difference, (row.high - row.low) / 2)
        unit = f"in {metric.label.partition(' (')[0]}"
    words = f"{row.a} and {row.b}: no clear difference,"
    if row.is_clear:
        better, worse = row.a, row.b
        if (row.difference > 0) != metric.higher_is_better:
            better, worse = worse, better
        words = f"{better} better than {worse} by"
        if row.difference < 0:
            found = -found[::-1]
    low, mean, high = [f"{value:z.{places}f}" for value in found]
    ends = "on one seed" if math.isnan(row.low) else f"[{low}, {high}]"
    return f"{words} {mean} {unit} {ends}"


def in_units(examples, metric):
    """The test examples with `value`: what a metric is the mean of, in the user's units."""
    value = examples[metric.source] * examples["unit"] ** metric.unit_power
    return examples.assign(value=value)


def compare(examples):
    """Paired differences of each two models, and of each with the best baseline.

    Of every metric that is a mean over test examples. For the first metric of the tasks, by which
    the models are judged, `p` is adjusted by Holm's method over all these differences.
    """
    rows = []
    for name, of_task in examples.groupby("task", sort=False):
        models = of_task.query("kind == 'model'")["name"].unique()
        baselines = of_task.query("kind == 'baseline'")["name"].unique()
        metrics = TASKS[name].metrics
        for metric in metrics:
            if metric.transform is not float:
                continue
            values = in_units(of_task, metric)
            values = values.pivot(index=["seed", "example"], columns="name", values="value")
            ranked = values[baselines].mean().sort_values(ascending=not metric.higher_is_better)
            for a, b in [*combinations(models, 2), *product(models, ranked.index[:1])]:
                found = paired_difference(values[a], values[b])
                rows.append((name, metric.name, a, b, *found, metric is metrics[0]))
    columns = ["task", "metric", "a", "b", "difference", "low", "high", "p", "is_primary"]
    table = DataFrame(rows, columns=columns)
    table = table.dropna(subset="difference")  # there is none without a common seed
    table.update(holm(table.query("is_primary")["p"]))
    table["is_clear"] = table["p"] < 0.05
    table["verdict"] = [verdict(row) for row in table.itertuples()]
    return table


# --- for people -----------------------------------------------------------------------

NOTES = """\
The same training for all cells, each at its own learning rate. Each seed draws its own data, or
the splits of a user's reviews; a user's text or series is always cut at the same places. Test
results are means ± standard deviations over the seeds. A ceiling is the best that is possible on
generated data. Brackets hold 95 % intervals of the paired difference over seeds (Student's t, no
narrower than the test examples alone leave it), where none is better the first minus the second.
In a task's first metric a difference is called clear if it survives Holm's correction over all
that are listed. Seconds are those of a run's training, with other runs beside it."""
COSTS_NOTE = """Time of a step, the models taking turns on the same batches if one command
trained them; activations: what the forward pass on a full batch of the longest possible examples
keeps for the backward pass. The kernel is the implementation of the recurrent layer that ran:
times compare kernels as much as cells."""


def decimals(value, spread=math.nan):
    """The decimal places that a value's spread deserves; without a spread, three digits.

    A spread deserves two digits if it begins with 1 to 3.54, else one (Particle Data Group 2024,
    section 5.3).
    """
    has_spread = spread > 1e-9 * abs(value)
    shown = spread if has_spread else abs(value)
    if not 0 < shown < math.inf:
        return 0
    exponent = math.floor(math.log10(shown))
    digits = 3
    if has_spread:
        digits = 2 if shown / 10**exponent < 3.55 else 1
    return max(0, digits - 1 - exponent)


def show(mean, std=math.nan, is_share=False):
    """'0.039 ± 0.005', '76.1 % ± 1.2', '110': a number with the digits that its spread supports."""
    if is_share:
        number = f"{100 * mean:z.1f} %"
        spread = f"{100 * std:.1f}"
    else:
        places = decimals(mean, std)
        number = f"{mean:z.{places}f}"
        spread = f"{std:.{places}f}"
    return f"{number} ± {spread}" if float(spread) > 0 else number


def by_distance(task, examples):
    """Means by distance, of the task's first metric and of the effect of a change: two tables.

    A row per interval of the task's edges, a column per name and kind of who answers.
    """
    examples = in_units(examples, task.metrics[0])
    labels = []
    for low, high in pairwise(task.edges):
        several = f"{low}-{high - 1}".replace("-inf", "+")
        labels.append(f"{low}" if high == low + 1 else several)
    tables = []
    for value, distance in (("value", "distance"), ("effect", task.effect_by)):
        intervals = pd.cut(examples[distance], task.edges, right=False, labels=labels)
        table = examples.pivot_table(value, intervals, ["name", "kind"], observed=True, sort=False)
        tables.append(table.sort_index())
    return tables


def distance_text(task, examples):
    """Tables by distance: score, effect of a change, and the latter by who speaks or what comes."""
    scores, effects = by_distance(task, examples)
    tables = {
        f"By {task.distance}, {task.metrics[0].label}": scores,
        f"By {task.change_place}, {' '.join(task.effect_label.split())}": effects,
    }
    for role, of_role in examples.groupby("role"):
        tables[f"The same, {role}"] = by_distance(task, of_role)[1]
    parts = []
    for title, table in tables.items():
        if len(table):  # else it is not known
            cells = table.T.map(show, na_action="ignore").fillna("").rename(columns=str)
            parts.append(f"{title}:\n\n{markdown(cells.reset_index())}")
    return "\n\n".join(parts)


def markdown(table):
    """A table in Markdown, its columns aligned."""
    columns = []
    for name, cells in table.astype(str).replace({r"\|": r"\\|", r"\s+": " "}, regex=True).items():
        width = max(map(len, [name, *cells]))
        columns.append([cell.ljust(width) for cell in (name, "-" * width, *cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns))


def facts_text(facts):
    """What is known of the data, in a line."""
    shown = [
        f"{name} {value:,.0f}" if value == int(value) else f"{name} {show(value)}"
        for name, value in facts.items()
    ]
    return ", ".join(shown)


def answer(task, runs, scores, comparisons):
    """What a user asked of their own data: which model is best, and whether it is worth it."""
    metric = task.metrics[0]
    ranked = summarise(scores.query("metric == @metric.name"))
    ranked = ranked.sort_values("mean", ascending=not metric.higher_is_better)
    shown = {}
    for row in ranked.itertuples():
        shown[row.name] = f"{row.name} ({show(row.mean, row.std, metric.is_share)})"
    names = ranked.groupby("kind")["name"].agg(list)
    best = names["model"][0]
    baseline = names["baseline"][0]
    found = comparisons.query("is_clear and metric == @metric.name")
    clear = [set(pair) for pair in found[["a", "b"]].to_numpy()]
    alike = [name for name in names["model"] if {name, best} not in clear]
    said = f"the {shown[best]} is best"
    if len(alike) > 1:
        best = runs[runs["model"].isin(alike)].groupby("model")["seconds"].mean().idxmin()
        models = ", ".join(shown[name] for name in alike)
        said = f"{models} do not differ clearly, and the {best} takes least time"
    relation = "not clearly better"
    if {best, baseline} in clear:
        order = list(shown)
        relation = "better" if order.index(best) < order.index(baseline) else "worse"
    advice = "" if relation == "better" else ": use the latter, or more data"
    said = f"{said}; it is {relation} than {shown[baseline]}{advice}"
    return f"On {runs['file'].iloc[0]}, by {metric.label}: {said}."


def task_text(task, baselines, runs, examples, scores, comparisons):
    """One task's results in Markdown; all arguments are of this task.

    `baselines`: their records, which also say what is known of the data.
    """
    question = task.question
    if runs["file"].notna().any():
        question = answer(task, runs, scores, comparisons) if baselines else ""

    # scores, and how the models came to them
    summary = summarise(scores)
    cells = summary.drop_duplicates("name")[["name", "kind"]]
    for metric in task.metrics:
        rows = summary.query("metric == @metric.name")[["mean", "std"]]
        cells[metric.name] = [show(*row, metric.is_share) for row in rows.to_numpy()]
    models = runs.groupby("model", sort=False)
    training = models[["best_epoch", "epochs", "seconds"]].mean().map("{:.1f}".format)
    training["clipped steps"] = models["clipped"].mean().map("{:.0%}".format)
    for name in ("learning_rate", "seed"):
        training[name] = models[name].agg(lambda values: ", ".join(map(str, values.unique())))

    # verdicts, and what may mislead
    sentences = list(comparisons["verdict"])
    if comparisons["low"].isna().any():
        sentences.append("One seed supports no ranking")
    score = examples.groupby("name")["score"].mean()
    for model, rates in models["learning_rate"]:
        if score[model] <= score.get(MAJORITY, -math.inf) + 0.01:
            sentences.append(f"{model} knows little more than how frequent the labels are")
        if rates.nunique() > 1:
            sentences.append(f"The means of {model} mix runs at different learning rates")
    if runs["capped"].any():
        sentences.append(
            f"{runs['capped'].sum()} of {len(runs)} runs ended at the cap on epochs, perhaps too "
            "soon: see --epochs"
        )
    for record in baselines:
        sentences.extend(f"Note: {doubt}" for doubt in record["doubts"])

    parts = [
        f"## {runs['title'].iloc[0]}",
        question,
        markdown(cells),
        markdown(training.reset_index()),
        "\n".join(f"- {sentence}." for sentence in dict.fromkeys(sentences)),
        distance_text(task, examples),
    ]
    labels = runs["labels"].iloc[0]
    if labels:
        table = label_scores(examples.query("kind == 'model'"), labels)
        parts.append(f"{markdown(table)}\n\nThe mean recall is the balanced accuracy.")
    for record in baselines[:1]:
        parts.append(f"The data of seed {record['seed']}: {facts_text(record['facts'])}.")
    return "\n\n".join(part for part in parts if part)


# --- what is commonly said ------------------------------------------------------------


def mean_curves(runs, name):
    """The mean over seeds of a list in the evidence, its elements counted from 1.

    A column per model, a row per element.
    """
    lists = runs.set_index("model")[name].apply(Series)  # they may differ in length
    return lists.groupby("model", sort=False).mean().T.rename(lambda i: i + 1)


def common_claims(runs):
    """What textbooks say of the three cells, and what was measured on generated data.

    A row per claim; none for a user's data, nor unless all three cells did all three tasks on two
    seeds or more.
    """
    cells = list(DEFAULT_MODELS)
    runs = runs[runs["model"].isin(cells)]
    groups = runs.groupby(["task", "model"])
    counts = groups.size()
    if len(counts) < len(TASKS) * len(cells) or counts.min() < 2 or runs["file"].notna().any():
        return DataFrame()
    rows = []

    def add(said, measured, holds):
        rows.append({"said": said, "measured": measured, "holds": "yes" if holds else "no"})

    sizes = groups["recurrent_parameters"].first()["classifier"][cells]
    add(
        "recurrent parameters: about 15K (RNN), 45K (GRU), 60K (LSTM)",
        ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        np.allclose(sizes, [15_000, 60_000, 45_000], rtol=0.03),
    )
    convergence = "convergence: LSTM before GRU before RNN"
    by_size = ["RNN", "GRU", "LSTM"]
    for said, column, order in (
        ("memory: RNN < GRU < LSTM (MiB a batch)", "activation_mib", by_size),
        ("time a step: RNN < GRU < LSTM (ms)", "ms_per_step", by_size),
        (f"{convergence} (epochs to within 1 % of the lowest loss)", "near_best", by_size[::-1]),
        (f"{convergence} (seconds to the same)", "seconds_to_near_best", by_size[::-1]),
    ):
        table = runs.pivot_table(column, "task", "model")[order]
        measured = []
        for task, values in table.iterrows():
            ranked = [f"{name} {value:.3g}" for name, value in values.sort_values().items()]
            measured.append(f"{task} {', '.join(ranked)}")
        rises = table.diff(axis="columns")[order[1:]] > 0
        add(said, "; ".join(measured), rises.all(axis=None))
    accuracy = 100 * groups["test_accuracy"].mean()
    for task, cell, low, high in (
        ("classifier", "LSTM", 75, 85),
        ("classifier", "GRU", 70, 80),
        ("classifier", "RNN", 60, 70),
        ("predictor", "LSTM", 40, 60),
    ):
        value = accuracy[task, cell]
        add(f"{task}: {cell} {low} to {high} % right", f"{value:.1f} %", low <= value <= high)
    shares = []
    for name in ("initial_gradient", "gradient"):
        curve = mean_curves(runs.query("task == 'classifier'"), name)["RNN"]
        shares.append(curve.iloc[:101].iloc[-1] / curve.iloc[0])
    add(
        "the RNN's gradient vanishes over 100 words (share of the gradient at the last word)",
        f"before training {shares[0]:.2g}, after it {shares[1]:.2g}",
        max(shares) < 0.01,
    )
    return DataFrame(rows)


# ======================================================================================
# Figures
# ======================================================================================
# Each is made from the tables alone; `models` are the first run of each model and task.

GREY = "#777777"
PARTS = {"embedding": "", "recurrent": "////", "head": "...."}  # of a model, with their hatches
STYLE = {
    "font.size": 9,
    "lines.markersize": 5,
    "figure.dpi": 120,
    "legend.frameon": False,
    "text.parse_math": False,  # names of labels and files may hold dollars
    "grid.color": "#E4E4E4",
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def colour(name):
    """The colour of a model, the same in every figure; a matched one's is paler. Else grey."""
    cell = CELLS.get(cell_name(name))
    return to_rgba(cell.colour if cell else GREY, 0.5 if name.endswith(MATCHED) else 1.0)


def new_figure(width, height, rows, columns=1, **options):
    """A figure, its size in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(max(width, 7.2), height), layout="constrained")  # titles need room
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(figure, title, models=()):
    """The figure with its title and, below it, the colours of the models."""
    figure.suptitle(title)
    if len(models):
        lines = [Line2D([], [], color=colour(name), label=name) for name in models]
        figure.legend(handles=lines, loc="outside lower center", ncols=7)
    return figure


def plain_ticks(axis):
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.axes.minorticks_off()


def draw_lines(axes, table, style="-", **look):
    """A line per column of a table, in the colour of the model of that name."""
    for name, values in table.items():
        axes.plot(values, style, color=colour(name), label=name, **look)


def bar_panel(axes, table, labels=None, **settings):
    """A bar per model (row), stacked of its parts (columns), with a label or its size behind it."""
    left = 0
    for part, sizes in table.items():
        bars = axes.barh(
            table.index,
            sizes,
            left=left,
            color=table.index.map(colour),
            hatch=PARTS.get(part),
            edgecolor="white",
        )
        left = left + sizes
    axes.bar_label(bars, labels, fmt="%.3g", padding=3)
    axes.set_ylim(len(table) - 0.25, -0.75)  # a bar alone is no wider than among others
    axes.grid(visible=False)
    axes.margins(x=1.1)  # room for the labels
    axes.set(**settings)


def training_history_figure(runs, history, task):
    """Loss and metric by epoch: a column per model, a line per seed."""
    models = runs["model"].unique()
    width = 3.2 * len(models) + 0.8
    figure, grid = new_figure(width, 5.8, 2, len(models), sharex=True, sharey="row")
    history = history.merge(runs)  # by task, model and seed
    for row, metric in zip(grid, task.metrics):  # the first two
        curves = history.query("metric == @metric.name")
        values = curves["value"]
        usual = values.quantile(0.98)
        if values.max() > 5 * usual:  # a cell that explodes at first would flatten all others
            row[0].set_ylim(0.9 * values.min(), 1.1 * usual)
        for axes, model in zip(row, models):
            shade = colour(model)
            own = curves.query("model == @model")
            by_seed = own.pivot_table("value", "epoch", ["split", "seed"])
            axes.plot(by_seed["train"], ".:", color=shade, markersize=2)
            axes.plot(by_seed["validation"], ".-", color=shade, markersize=2)
            kept = own.query("split == 'validation' and epoch == best_epoch")
            axes.plot(kept["epoch"], kept["value"], "o", color=shade)
            axes.set_title(model, color=shade)
            axes.set(xlabel="epoch", ylabel=metric.label)
            axes.label_outer()
            axes.locator_params("x", integer=True, min_n_ticks=1)
    marks = "dotted: training, running mean over the epoch; solid: validation; dot: weights kept"
    return finish(figure, f"{runs['title'].iloc[0]}: a line per seed\n({marks})")


def forecasts_figure(runs, _examples):
    """Forecasts and truth, one step ahead and free-running, and the latter's error by horizon."""
    models = runs.drop_duplicates("model")
    figure, grid = new_figure(11, 2.1 * len(models) + 3, len(models) + 1, 2)
    kinds = {
        "": "test example, in order of time (forecast one step ahead)",
        "free_": "steps after the last observed value (free-running: forecasts fed back)",
    }
    for axes, (run, kind) in zip(grid.flat, product(models.itertuples(), kinds)):
        shade = colour(run.model)
        truth = getattr(run, f"{kind}truth")
        steps = range(1, len(truth) + 1)
        axes.plot(steps, truth, ".", color=GREY)
        axes.plot(steps, getattr(run, f"{kind}forecast"), color=shade)
        axes.set_title(f"{run.model}, seed {run.seed}", color=shade)
        axes.set(xlabel=kinds[kind], ylabel="value (series units)")

    errors, place = grid[-1]
    draw_lines(errors, mean_curves(runs, "free_mse"))
    draw_lines(errors, mean_curves(runs.assign(model="persistence"), "persistence_mse"))
    variance = runs["variance"].mean()
    errors.axhline(variance, color=GREY, linestyle="--", label="variance of the test part")
    errors.set(
        title="Free-running error, mean over seeds",
        xlabel="steps ahead",
        ylabel="MSE (series units²)",
        ylim=(0, None),
    )
    place.legend(handles=errors.lines, loc="center left")
    place.axis("off")
    return finish(figure, f"{runs['title'].iloc[0]}: forecasts (lines) against the truth (dots)")


def parameters_figure(models):
    """Parameters by part, each model of each task."""
    tasks = models.groupby(["title", "seed"], sort=False)  # vocabularies differ from seed to seed
    figure, grid = new_figure(9, 1.9 * len(tasks) + 0.8, len(tasks))
    for axes, ((title, seed), table) in zip(grid.flat, tasks):
        bar_panel(
            axes,
            DataFrame(list(table["parts"]), table["model"]),
            [
                f"{run.parameters:,} (recurrent {run.recurrent_parameters:,})"
                for run in table.itertuples()
            ],
            title=f"{title}, seed {seed}",
            xlabel="trainable parameters",
            xmargin=0.35,
        )
        axes.xaxis.set_major_formatter("{x:,.0f}")
    title = "Parameters of the embedding (plain), the recurrent layer (striped), the head (dotted)"
    return finish(figure, title)


def architectures_figure(models):
    """A strip of boxes per model: its layers in order, with settings, output shape and weights."""
    width = models["layers"].map(len).max()
    figure, grid = new_figure(1.75 * width, len(models) + 0.6, len(models))
    left_out = r", (batch_first|inplace|bias|padding_idx)=\w+|\w+_features="
    for axes, run in zip(grid.flat, models.itertuples()):
        shade = colour(run.model)
        axes.set_title(f"{run.model} {run.task}, seed {run.seed}", color=shade)
        axes.set_xlim(-1, width - 0.5)
        axes.axis("off")
        for x, layer in enumerate(run.layers):
            settings = re.sub(left_out, "", layer["settings"])
            call = f"{layer['kind']}({settings})".replace("Recurrent()", "last state")
            shape = ", ".join(map(str, layer["shape"]))
            axes.annotate(
                f"{call}\n→ (B, {shape})\n{layer['parameters']:,} weights",
                xy=(x - 1, 0.5),  # the arrow begins behind the box before
                xytext=(x, 0.5),
                zorder=-x,
                ha="center",
                va="center",
                fontsize=7.5,
                bbox={"boxstyle": "round,pad=0.4", "edgecolor": shade, "facecolor": "white"},
                arrowprops={"arrowstyle": "<-", "color": GREY},
            )
    return finish(figure, "Architectures, drawn from the live models (B: batch)")


def performance_figure(scores, runs):
    """A row per task: test metric with baselines and ceiling, training time, cost of a step."""
    markers = {"model": "o", "baseline": "D", "ceiling": "|"}
    tasks = runs.groupby("task", sort=False)
    height = 2.5 * len(tasks) + 0.6
    figure, grid = new_figure(14, height, len(tasks), 4, width_ratios=[2.2, 1, 1, 1])
    for (test, training, step, memory), (task, of_task) in zip(grid, tasks):
        metric = TASKS[task].metrics[0]
        summary = summarise(scores.query("task == @task and metric == @metric.name"))
        for row in summary.itertuples():
            test.errorbar(
                row.mean,
                row.name,
                xerr=row.std,
                fmt=markers[row.kind],
                color=colour(row.name),
                capsize=3,
            )
        test.invert_yaxis()
        test.set(title=of_task["title"].iloc[0], xlabel=f"test {metric.label}")
        if not metric.higher_is_better:  # errors differ by factors
            test.set_xscale("log")
            plain_ticks(test.xaxis)

        costs = of_task.drop_duplicates("model").set_index("model")
        steps = [f"{run.ms_per_step:.3g} {run.kernel}" for run in costs.itertuples()]
        activations = "activations of the\nlongest batch (MiB)"
        seconds = of_task.groupby("model", sort=False)[["seconds"]].mean()
        bar_panel(training, seconds, xlabel="training (s per run)")
        bar_panel(step, costs[["ms_per_step"]], steps, xlabel="step (ms), kernel")
        bar_panel(memory, costs[["activation_mib"]], xlabel=activations)
    title = "Test: mean ± standard deviation over seeds (diamonds: baselines, bar: ceiling), costs"
    return finish(figure, title)


def learning_rates_figure(table):
    """Validation loss by learning rate, a line per model through the means over seeds."""
    tasks = table.groupby("task", sort=False)
    figure, grid = new_figure(4.2 * len(tasks), 4, 1, len(tasks))
    for axes, (task, runs) in zip(grid.flat, tasks):
        losses = runs.pivot_table("val_loss", "learning_rate", "model")
        chosen = runs.query("chosen").pivot_table("val_loss", "learning_rate", "model")
        draw_lines(axes, losses, "o-")
        draw_lines(axes, chosen, "o", markersize=11, fillstyle="none")
        axes.scatter(runs["learning_rate"], runs["val_loss"], 9, runs["model"].map(colour))
        axes.set(
            title=TASKS[task].title,
            xlabel="learning rate",
            ylabel="validation loss",
            xscale="log",
        )
        axes.set_xticks(losses.index, losses.index)
        axes.minorticks_off()
    title = "Learning rates by validation loss: each seed (dots), their mean, the chosen (circles)"
    return finish(figure, title, table["model"].unique())


def errors_figure(runs, examples):
    """The confusion matrix of each classifier, in per cent of each true label, over all seeds."""
    labels = runs["labels"].iloc[0]
    n = len(labels)
    models = examples.query("kind == 'model'").groupby("name", sort=False)
    width = (0.6 * n + 1.2) * len(models) + 1.6
    figure, grid = new_figure(width, 0.5 * n + 2.2, 1, len(models), sharey=True)
    for axes, (name, answers) in zip(grid.flat, models):
        shares = confusion(answers, labels, normalize="index")
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=2, aspect="auto")  # text stays readable
        for (truth, answer), share in np.ndenumerate(shares):
            axes.text(answer, truth, f"{share:.0%}", ha="center", va="center")
        axes.set_title(name, color=colour(name))
        axes.set_xticks(range(n), labels, rotation=30)
        axes.set_yticks(range(n), labels)
        axes.set(xlabel="predicted label", ylabel="true label")
        axes.label_outer()
        axes.grid(visible=False)
    title = f"{runs['title'].iloc[0]}: predicted label, in % of each true label"
    return finish(figure, title)


def distance_panel(axes, table):
    """One of the tables by distance, a line per model, baseline and ceiling."""
    if table.empty:
        axes.axis("off")
        axes.text(0, 0.5, "not known of these data")
    styles = cycle(["s:", "^:", "D:", "v:", "x:"])
    for (name, kind), values in table.items():
        if kind == "model":
            axes.plot(values, "o-", color=colour(name))
        elif kind == "baseline":
            axes.plot(values, next(styles), color=GREY, label=name, markersize=4)
        else:
            axes.plot(values, color="black", label=name)
    if axes.get_legend_handles_labels()[0]:  # below, where it hides no line
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def long_range_figure(runs, examples):
    """What is kept over distance, a column per task: score, effect of a change, gradient."""
    tasks = runs.groupby("task", sort=False)
    figure, grid = new_figure(4.4 * len(tasks), 11, 3, len(tasks))
    for (name, of_task), (top, middle, bottom) in zip(tasks, grid.T):
        task = TASKS[name]
        metric = task.metrics[0]
        scores, effects = by_distance(task, examples.query("task == @name"))
        top.set(title=of_task["title"].iloc[0], xlabel=task.distance, ylabel=metric.label)
        distance_panel(top, scores)
        if not metric.higher_is_better:  # errors differ by factors
            top.set_yscale("log")
            plain_ticks(top.yaxis)
        middle.set(xlabel=task.change_place, ylabel=task.effect_label)
        distance_panel(middle, effects)

        # the gradient before clipping: the median of the seeds still training
        for model, histories in of_task.groupby("model", sort=False)["history"]:
            epochs = DataFrame(list(histories.explode())).groupby("epoch")
            bottom.plot(epochs["gradient_norm"].median(), color=colour(model))
        clip_norm = of_task["clip_norm"].iloc[0]
        bottom.axhline(clip_norm, color=GREY, linestyle=":")
        bottom.set(xlabel="epoch", ylabel="norm of the gradient (median)", yscale="log")
        # a cell that explodes in its first steps would flatten all others
        bottom.set_ylim(top=50 * clip_norm)
        plain_ticks(bottom.yaxis)
        bottom.locator_params("x", integer=True, min_n_ticks=1)
    title = (
        "By distance: score, effect of a change; gradient in training, clipped at the dotted line"
    )
    return finish(figure, title, runs["model"].unique())


TASK_FIGURES = {  # task: name of a figure: (runs, examples of the task) -> the figure
    CLASSIFIER.name: {"classifier_errors": errors_figure},
    PREDICTOR.name: {},
    FORECASTER.name: {"time_series_predictions": forecasts_figure},
}

# --- the report -----------------------------------------------------------------------


class Results(NamedTuple):
    """What `run` returns."""

    scores: DataFrame  # a row per task, name, kind, seed and metric
    examples: DataFrame  # a row per test example and per model, baseline or ceiling
    figures: Mapping  # by the names of their files, without what all begin with
    failed: int = 0  # how many runs and figures failed; each was named


def draw_figures(folder, figures):
    """Draw and write figures; returns them, and how many failed: one must not cost the others."""
    drawn = {}
    failed = 0
    for name, draw in figures.items():
        path = folder / f"pytorch_rnn_{name}.png"
        content = io.BytesIO()
        try:
            with rc_context(STYLE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # no font has the letters of all scripts
                figure = draw()
                figure.savefig(content, format="png")
        except Exception as error:
            failed += 1
            tell(f"failed: {path.name} could not be drawn: {first_line(error)}")
            continue
        drawn[name] = figure
        write_whole(path, content.getvalue())
    return drawn, failed


def write_table(folder, name, table):
    """Write one of the tables as CSV."""
    write_whole(folder / f"pytorch_rnn_{name}.csv", table.to_csv(index=False))


def make_report(folder, failed=0):
    """Tables and figures from the records in `folder`; `failed` more runs were named before.

    Returns Results. Raises InputError or RuntimeError where no run is finished.
    """
    config = read_config(folder)
    records = list(read_records(folder).values())
    trained = [record for record in records if "history" in record]
    if not trained:
        if failed:
            raise RuntimeError("no run came to its end")
        raise InputError(f"no runs in {folder}; train first")

    # tables
    examples = examples_table(records)
    scores = score_table(examples)
    runs = run_table(trained, scores, config)
    history = history_table(runs)
    comparisons = compare(examples)
    models = runs.drop_duplicates(["task", "model"])
    costs = models[COST_COLUMNS]
    write_table(folder, "runs", runs.reindex(columns=RUN_COLUMNS))
    write_table(folder, "history", history)
    write_table(folder, "summary", summarise(scores.query("metric != 'perplexity'")))
    write_table(folder, "comparisons", comparisons.drop(columns=["p", "is_primary", "is_clear"]))
    write_table(folder, "costs", costs)
    (folder / "predictions").mkdir(exist_ok=True)
    for (task, seed), answers in examples.groupby(["task", "seed"]):
        table = for_spreadsheet(predictions_table(answers))
        # Excel takes a file without the mark for one that is not UTF-8
        write_whole(folder / "predictions" / f"{task}_seed{seed}.csv", "\ufeff" + table)

    # texts and figures
    texts = ["# RNN, LSTM and GRU: results"]
    figures = {
        "long_range": partial(long_range_figure, runs, examples),
        "parameter_counts": partial(parameters_figure, models),
        "architectures": partial(architectures_figure, models),
        "performance_summary": partial(performance_figure, scores, runs),
    }
    for name in models.sort_values("file", kind="stable")["task"].unique():  # a user's data first
        task = TASKS[name]
        baselines = [each for each in records if each["task"] == name and "facts" in each]
        tables = [table[table["task"] == name] for table in (runs, examples, scores, comparisons)]
        texts.append(task_text(task, baselines, *tables))
        draw = partial(training_history_figure, tables[0], history, task)
        figures[f"{name}_training_history"] = draw
        for figure, make in TASK_FIGURES[name].items():
            figures[figure] = partial(make, *tables[:2])
    environments = DataFrame(record["environment"] for record in records).map(str)
    lines = [f"- {name}: {', '.join(values.unique())}" for name, values in environments.items()]
    claims = common_claims(runs)
    if len(claims):
        texts.append(f"## What is commonly said, and what was measured\n\n{markdown(claims)}")
    texts += [
        f"## Parameters, and cost of a training step\n\n{markdown(costs)}\n\n{COSTS_NOTE}",
        f"## How the results were made\n\n{NOTES}",
        "## Environment\n\n" + "\n".join(lines),
    ]
    write_whole(folder / "pytorch_rnn_summary.md", printable("\n\n".join(texts) + "\n"))
    drawn, broken = draw_figures(folder, figures)
    say("\n\n".join([*texts, f"Tables, figures, records and models are in {folder.resolve()}"]))
    return Results(scores, examples, drawn, failed + broken)


# ======================================================================================
# Command line
# ======================================================================================

SEEDS = (0, 9e18)
COUNTS = (1, 1e6)
RANGES = {  # least and most of the options that are numbers; all are of the type of the least
    "seeds": SEEDS,
    "epochs": COUNTS,
    "learning_rate": (1e-6, 1),
    "hidden_dim": COUNTS,
    "window": COUNTS,
    "workers": COUNTS,
    "length": COUNTS,
    "temperature": (0.0, 100),
    "seed": SEEDS,
}
CHOICES = {
    "tasks": TASKS,
    "models": CELLS,
    "match": ("hidden", "params"),
    "device": ("auto", "cpu", "cuda", "mps"),
}
COLUMNS = {"reviews": ("text_column", "label_column"), "corpus": (), "series": ("series_column",)}


def check_options(options):
    """Raise InputError where a choice or a number is none that can be used."""
    for name, choices in CHOICES.items():
        for choice in np.atleast_1d(options.get(name, [])):  # some options are lists
            if choice not in choices:
                raise InputError(f"--{name} {str(choice)!r}: choose from {', '.join(choices)}")
    for name, (least, most) in RANGES.items():
        for number in np.atleast_1d(options.get(name, [])):
            if number is not None and not least <= number <= most:
                raise InputError(
                    f"--{name.replace('_', '-')} {number}: it must be from {least:g} to {most:g}"
                )


def choose_device(name):
    """The device of that name, if it is usable; "auto" is CUDA, or else the CPU; InputError."""
    if name != "auto":
        if is_usable(name):
            return torch.device(name)
        raise InputError(f"--device {name}: there is none here that works; choose another, or auto")
    if is_usable("cuda"):
        return torch.device("cuda")
    if torch.cuda.is_available():
        tell("note: CUDA is there, but a small step on it fails; the CPU is used")
    return CPU


def usable_cores():
    """The processor cores that this process may use; a container may grant less than there are."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # it may hold "max"
        # microseconds of all cores in a period of so many
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = max(1, min(cores, quota // period))
    return cores


def user_data(option, given, columns=()):
    """What a user gave for `reviews`, `corpus` or `series`: a path, or the data; InputError."""
    columns = tuple(map(str, columns))
    is_name = isinstance(given, str) and (len(given) < 256 or " " not in given)
    if is_name or isinstance(given, os.PathLike):
        text, notes = read_text(given)
        return UserData(str(given), text, columns, tuple(notes))
    try:
        if option == "corpus":
            return UserData(option, given if isinstance(given, str) else "\n".join(given), columns)
        if option == "reviews" and not isinstance(given, DataFrame):
            given = DataFrame(zip(*given, strict=True), columns=["text", "label"])
        table = DataFrame(given)  # names that are numbers would be taken for values
        table.columns = [re.sub(r"^(?=\d)", "x", str(name)) for name in table]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{option}: {first_line(error)}; a path is needed, or (texts, labels), a text, values"
        ) from error
    is_named = not isinstance(table.index, pd.RangeIndex)
    missing = "nan" if option == "series" else ""  # a blank line would be no row
    text = table.to_csv(index=is_named, na_rep=missing, lineterminator="\r\n")
    return UserData(option, text, columns)


def configure(options):
    """The configuration of each task; InputError where an option is for a task that is left out."""
    config = {}
    for name, default in (QUICK if options["quick"] else DEFAULT).items():
        changes = {}
        for size in ("hidden_dim", "window"):
            if options[size] and hasattr(default, size):
                changes[size] = options[size]
        if options["epochs"]:
            changes["training"] = replace(default.training, epochs=options["epochs"])
        option = TASKS[name].file_option
        given = options[option]
        columns = [options[column] for column in COLUMNS[option]]
        if given is not None:
            if name not in options["tasks"]:
                raise InputError(f"--{option} is for the {name}, which --tasks leaves out")
            changes["file"] = user_data(option, given, columns)
        elif any(columns):
            raise InputError(f"the name of a column goes with --{option} or --predict")
        config[name] = replace(default, **changes)
    return config


def default_folder(config, quick):
    """Where files go if nothing else is said: named after the user's files."""
    if quick:
        return Path("outputs", "quick")
    files = [of_task.file for of_task in config.values() if of_task.file]
    stems = [Path(file.path.removesuffix(".gz")).stem for file in files]
    return Path("outputs", "_".join(["own", *stems]) if stems else "")


@settings_restored()
def run(
    *,
    tasks=tuple(TASKS),
    models=DEFAULT_MODELS,
    seeds=None,
    quick=False,
    match="hidden",
    tune=None,
    learning_rate=None,
    epochs=None,
    hidden_dim=None,
    window=None,
    reviews=None,
    corpus=None,
    series=None,
    text_column="",
    label_column="",
    series_column="",
    device="auto",
    workers=None,
    output_dir=None,
    resume=False,
    report=False,
):
    """The experiment: train and compare; with `report` only tables and figures of what is there.

    The settings are the options of the command line; `--help` says what each does, and what None
    stands for. Tasks, models and seeds are sequences; files and `output_dir`, into which all is
    written, are paths or their names. In place of a file there may be data: `reviews` (texts,
    labels) or a data frame; `corpus` a text of 256 characters or more, or lines; `series` values
    (N,), or columns of pandas, also with times as their index. Returns `Results`. Raises
    InputError, RuntimeError (no run came to its end), OSError.
    """
    options = dict(locals())
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(NO_GUARD)  # this is a child that imports the user's script

    # what cannot be used is said before anything else
    check_options(options)
    if tune and (report or learning_rate):
        raise InputError("--tune cannot go together with --report or --learning-rate")
    if window and set(tasks) == {"classifier"}:
        raise InputError("--window is for predictor and forecaster, which --tasks leaves out")
    config = configure(options)
    folder = Path(output_dir or default_folder(config, quick))
    if report:
        return make_report(folder)
    if seeds is None:
        seeds = DEFAULT_SEEDS[:1] if quick else DEFAULT_SEEDS
    torch_device = choose_device(device)
    if workers is None:
        workers = 1 if quick or torch_device.type != "cpu" else usable_cores()
    experiment = Experiment(
        config=config,
        tasks=[name for name in TASKS if name in tasks],
        models=[sized(name, match) for name in CELLS if name in models],
        seeds=list(dict.fromkeys(seeds)),
        folder=folder,
        device=torch_device,
        workers=workers,
        resume=resume,
    )
    prepare_device(torch_device)
    if workers > 1:
        start_server()
    looks = []
    for name in experiment.tasks:
        data = load_data(name, config[name], experiment.seeds[0], torch_device)
        looks.append(f"{TASKS[name].title}, first seed: {facts_text(data.facts)}")
        looks.append(data.examples.head(3).to_string(index=False, max_colwidth=60))
        looks.extend(f"note: {doubt}" for doubt in data.doubts)
    del data  # it would outlive the cache
    make_folder(folder, experiment.tasks, config)
    tell("\n".join(looks))

    # learning rates, then the runs
    failed = 0
    rates = {}
    for task, model in product(experiment.tasks, experiment.models):
        rates[task, model] = learning_rate or CELLS[cell_name(model)].learning_rates[task]
    tuned = []
    if tune:
        tuned = experiment.tasks
    elif tune is None and not learning_rate and not quick:
        tuned = [name for name in experiment.tasks if config[name].file]
    if tuned:
        chosen, table = tune_rates(experiment, tuned, RATES[4:6] if quick else RATES[4:7])
        write_table(folder, "tuning", table)
        draw = partial(learning_rates_figure, table)
        failed = draw_figures(folder, {"learning_rates": draw})[1]
        for pair, rate in chosen.items():
            tell(f"learning rate of {' '.join(pair)}: {rate or 'none, because of failures above'}")
        rates.update(chosen)
    runs = []
    for seed in experiment.seeds:
        # first the baselines, which hold the test examples
        runs.extend(Run(task, BASELINES, seed) for task in experiment.tasks)
        runs.extend(Run(*pair, seed, rate) for pair, rate in rates.items() if rate)
    failed += len(complete_runs(runs, experiment)) + list(rates.values()).count(None)
    return make_report(folder, failed)


# --- trained models in use ------------------------------------------------------------


def tell_notes(notes):
    """What may mislead in an input."""
    for note in notes:
        tell(f"note: {note}")


def read_source(source):
    """The input of --predict: what `read_text` reads, or the words themselves."""
    is_file = source == "-" or os.path.exists(source)  # noqa: PTH110 (Path's raises if too long)
    if is_file or re.search(r"(?i)\.(txt|[ct]sv|gz)$", source):  # else a typo would be words
        text, notes = read_text(source)
        tell_notes(notes)
        return text
    return source


def print_labels(model, source, options):
    """Label and probability of each line; of a CSV file, a CSV with them beside each text."""
    text = read_source(source)
    if re.search(r"(?i)\.[ct]sv(\.gz)?$", source):
        text_column = options.get("text_column", "")
        header, rows, _, notes = read_table(text, [*TEXT_COLUMNS, text_column])
        tell_notes(notes)
        texts = rows[find_column(header, text_column, TEXT_COLUMNS, "text")].tolist()
        answers = DataFrame(model.predict(texts), columns=["label", "probability"]).round(4)
        say(for_spreadsheet(answers.assign(text=texts)).rstrip("\n"))
    else:
        for label, probability in model.predict(text.splitlines() or [""]):
            say(f"{label or '-'}\t{probability:.4f}")


def print_words(model, source, options):
    """The likeliest next words with their probabilities, and a continuation."""
    text = read_source(source)
    for word, probability in model.predict(text):
        say(f"{word}\t{probability:.4f}")
    drawn = model.continue_text(text, options["length"], options["temperature"], options["seed"])
    say(f"\n{drawn}")


def print_values(model, source, options):
    """The next values of a series, as CSV; on stderr, what may mislead."""
    values, notes = read_series(read_source(source), options.get("series_column", ""))
    low, high = model.preprocessing["scaler"]["range"]
    read = values[-model.preprocessing["window"] :]
    if np.abs(read - (low + high) / 2).max() > high - low:  # from the middle, twice as far
        notes.append(
            f"the last values lie between {read.min():g} and {read.max():g}, far from those of "
            f"training ({low:g} to {high:g}): is it a series of that kind?"
        )
    tell_notes(notes)
    say("step,value")
    for step, value in enumerate(model.predict(values, options["length"]), start=1):
        say(f"{step},{value}")


CONTINUATION = {"length": 20, "temperature": 1.0, "seed": 42}  # options of --predict alone
PREDICTIONS = {Classifier: print_labels, Predictor: print_words, Forecaster: print_values}


def predict(options):
    """Print what a trained model says of an input; raises InputError."""
    check_options(options)
    if "report" in options or "tune" in options:
        raise InputError("--predict cannot go together with --report or --tune")
    path, source = options["predict"]
    model = load_checkpoint(path)
    show = PREDICTIONS[type(model).__base__]
    show(model, source, {**CONTINUATION, **options})


# --- the program ----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors are raised: argparse's own would print the usage and end the interpreter."""

    def error(self, message):
        raise InputError(message)


HELP = {
    "tasks": f"any of {' '.join(TASKS)}",
    "models": f"any of {' '.join(CELLS)}; default: {' '.join(DEFAULT_MODELS)}",
    "seeds": "default: 42 43 44; with --quick: 42",
    "quick": "the whole pipeline on tiny data, two epochs",
    "match": "hidden or params: equal hidden sizes (default) or recurrent parameters",
    "tune": "choose learning rates first, by validation loss; default: for your own data alone",
    "learning_rate": "of all models; default: each model's own",
    "epochs": "cap on epochs; default: by task",
    "hidden_dim": "hidden units; default: 100, of the forecaster 32",
    "window": "words or steps that are seen; default: 10, 50",
    "reviews": "your own CSV file: a column of texts and one of labels (.gz works too)",
    "corpus": "your own text file, UTF-8",
    "series": "your own CSV file: a column of numbers, in order of time",
    "text_column": "default: text, review, sentence or comment",
    "label_column": "default: label, sentiment, class, rating or stars",
    "series_column": "default: the only column of numbers",
    "device": "auto (default: CUDA if there is one, else CPU), cpu, cuda or mps",
    "workers": "runs at a time; default: as many as cores",
    "output_dir": "default: outputs, or a folder below it",
    "resume": "skip the runs that are finished in the output directory",
    "report": "no training: tables and figures of the runs in the output directory",
    "length": "with --predict: words or values to continue by; default: 20",
    "temperature": "with --predict: of words; 0 takes the likeliest; default: 1",
    "seed": "with --predict: of the words that are drawn; default: 42",
}


def parse_args(argv=None):
    """The options, as they were given: those that were not are absent; raises InputError."""
    parser = Parser(
        "pytorch_rnn_models.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=__doc__.partition("Shapes")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in HELP.items():
        flag = f"--{name.replace('_', '-')}"
        kind = type(RANGES[name][0]) if name in RANGES else str
        if name in ("quick", "tune", "resume", "report"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            number = "+" if name in ("tasks", "models", "seeds") else None
            parser.add_argument(flag, type=kind, nargs=number, help=text)
    parser.add_argument(
        "--predict",
        nargs=2,
        metavar=("CHECKPOINT", "INPUT"),
        help="no training: what a trained model says of a text, a file, or - (standard input)",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    words = []
    if "--predict" in argv:  # the two words behind it are taken as they are: "-1,5" is no option
        place = argv.index("--predict") + 1
        words = argv[place : place + 2]
        argv[place : place + 2] = ["" for _ in words]
    options = parser.parse_args(argv)
    if words:
        options.predict = words
    for name in CONTINUATION:
        if name in options and "predict" not in options:
            parser.error(f"--{name} goes with --predict; the seeds of training are --seeds")
    return options


def main(argv=None):
    """Run the command line `argv` (default: the program's own); returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # where "±" cannot be written stands "\\xb1"
        sys.stdout.reconfigure(errors="backslashreplace")

    def interrupt(number, _frame):
        for each in before:  # a second signal must not disturb the tidying up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    before = {}
    with suppress(ValueError):  # threads but the first cannot set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt)
    try:
        options = vars(parse_args(argv))
        if "predict" in options:
            predict(options)
            return 0
        return 1 if run(**options).failed else 0
    except SystemExit:  # --help
        return 0
    except InputError as error:
        status = 2
        message = str(error)
    except (RuntimeError, MemoryError, OSError) as error:
        status = 1
        message = first_line(error)
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args or [signal.SIGINT])[0]
        message = "interrupted; finished runs are kept: --resume does the rest, --report shows them"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # one line, whatever the name of a file holds
    text = printable(message).replace("\n", "\\n")
    if len(text) > 300:
        text = text[:297] + "..."
    tell(f"pytorch_rnn_models.py: {text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
