"""Vanilla RNN, LSTM and GRU compared on three tasks, each with baselines and a ceiling.

    python pytorch_rnn_models.py                 the whole experiment, into outputs/
    python pytorch_rnn_models.py --quick         all of it on tiny data, into outputs/quick/
    python pytorch_rnn_models.py --help          all options: your own data, trained models
    python -m pytest tests                       the tests

Tasks       classifier   positive or negative film reviews    (accuracy, binary cross-entropy)
            predictor    the next word of a corpus            (accuracy, cross-entropy)
            forecaster   the next value of noisy sine waves   (MSE, MAE)

Where to begin: to see how a model is trained read `SequenceModel`, `Classifier`, `train_step`
and `fit`, 175 lines. Then `generate_reviews` for what a task asks, and `compare` for what is
called better.

Sections (each uses only what stands above it; search for the name between two ruled lines)
    Configuration     the settings of tasks and training, the cells and their learning rates
    Datasets          batches, words and vocabulary, the cut into three parts
    Generated data    reviews, corpus, series; the best possible forecast of the series
    Your own data     a file or data from Python -> a table of reviews, lines or values
    Models            recurrent layer, three heads, the named classes, saving and loading
    Training          device, one step, evaluation, early stopping
    Baselines         majority, naive Bayes, n-grams, persistence, season, least squares,
                      and networks without recurrence, with their learning rates
    Tasks             each task's data prepared (split, cut, encoded), its loss and metrics, a
                      model built from the configuration
    Evidence          effect of a change, forecasts fed back, memory, what a model consists of
    Experiment        a run and its files, runs in several processes, choice of learning rates
    Results           scores, differences with intervals, by distance, what is commonly said
    Figures           each made from the tables; the report and all its files
    Command line      options, `run`, `--predict`, `main`

Shapes in comments: N examples, B batch, T time steps, E embedding, F input features, H hidden
units, V vocabulary, K labels, O origins of forecasts.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import html
import io
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import combinations, cycle, product
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from pandas import DataFrame, Series
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# cuBLAS repeats its numbers only with this, and reads it when it is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# ======================================================================================
# Configuration
# ======================================================================================


class InputError(ValueError):
    """What was given cannot be used; the message says what was found and what would be right."""


class Cell(NamedTuple):
    """A recurrent cell; one more is a record here and a class per task that names it."""

    layer: Callable  # a class of PyTorch's recurrent layers, or one that is called like them
    colour: str  # in all figures; these are safe for colour-blind readers (Okabe & Ito 2008)
    learning_rates: Mapping  # Adam's at the start, by task
    # by task, else 0: pulls back embeddings of rare words, which memorise
    weight_decays: Mapping = {"classifier": 1e-4}
    start: Callable | None = None  # fills the recurrent weights; else each task has its own


# Rates and weight decays were chosen on seeds 0 to 4 (outputs/tuning/what_else_was_tried.md), with
# the settings below: if these change, choose again.
CELLS = {
    "RNN": Cell(
        nn.RNN,
        "#D55E00",
        {"classifier": 3e-3, "predictor": 3e-3, "forecaster": 3e-3},
    ),
    "LSTM": Cell(
        nn.LSTM,
        "#0072B2",
        {"classifier": 1e-2, "predictor": 3e-3, "forecaster": 1e-2},
    ),
    "GRU": Cell(
        nn.GRU,
        "#009E73",
        {"classifier": 1e-2, "predictor": 1e-3, "forecaster": 1e-2},
    ),
    # the control: no gates, but units and a start that keep what is there (Le et al. 2015)
    "IRNN": Cell(
        partial(nn.RNN, nonlinearity="relu"),
        "#CC79A7",
        {"classifier": 1e-3, "predictor": 3e-3, "forecaster": 1e-2},
        {"classifier": 1e-3},
        start=nn.init.eye_,
    ),
}
DEFAULT_MODELS = ("RNN", "LSTM", "GRU")
DEFAULT_SEEDS = (42, 43, 44)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # the grid of --tune


def check_number(name, value, default):
    """Raise InputError unless `value` is a number of the kind of `default`, and in its range.

    Whole numbers: from 1, or from 0 if the default is 0. Others: from 0, to 0.999 if the default
    is below 1.
    """
    is_whole = isinstance(default, int)
    kind = Integral if is_whole else Real
    least = 1 if is_whole and default else 0
    most = 1e15 if is_whole or default >= 1 else 0.999
    if not isinstance(value, kind) or not least <= value <= most:
        what = "a whole number" if is_whole else "a number"
        raise InputError(f"{name} {value!r}: it must be {what} from {least} to {most:g}")


@dataclass(frozen=True)
class UserData:
    """A user's own data, which take the place of the generated."""

    name: str  # of the file, or of the option that they were given for
    digest: str  # a hash of the data: a run is one of these data, wherever the file lies
    table: DataFrame = field(compare=False)
    notes: tuple = ()  # sentences on what may mislead


@dataclass(frozen=True)
class TaskConfig:
    """What the configurations of the three tasks share. Each number is also an option."""

    own: UserData | None = None  # takes the place of the generated data
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    # how a model is trained; all but the learning rate is the same for all cells of a task
    epochs: int = 100  # upper bound; early stopping may end sooner
    batch_size: int = 128  # examples per update; fewer if there are few: `batch_size_for`
    # fewest updates of an epoch: with few data it passes over them several times, so that patience
    # and schedule mean the same for them
    updates: int = 50
    accumulate_steps: int = 1  # micro-batches of a batch, to save memory; the gradient is equal
    lr_factor: float = 0.5  # the rate is multiplied by this on a plateau of the validation loss
    # so many epochs without improvement by 0.01 % pass; after the next one the rate falls
    lr_patience: int = 1
    # epochs without improvement after which training ends; lr_patience + 2 or more, for training
    # that ends earlier never sees the lower rate
    patience: int = 4
    min_epochs: int = 0  # patience and lr_patience count from this epoch on
    clip_norm: float = 1.0  # larger gradients are scaled down to this norm

    def numbers(self):
        """The settings that are numbers, by name."""
        settings = vars(self).items()
        return {name: value for name, value in settings if isinstance(value, (int, float))}

    def batch_size_for(self, n_examples):
        """A twentieth of the examples, at least 16, at most `batch_size`: few data, too, make many
        updates.
        """
        return min(self.batch_size, max(16, n_examples // 20))


@dataclass(frozen=True)
class ClassifierConfig(TaskConfig):
    """Text classification. What each number of the reviews does: `generate_reviews`."""

    n_reviews: int = 5000
    # fewest and most, of three or four words each: 131 words on average, below 200
    phrases: tuple = (6, 57)
    reliability: float = 0.78  # how often the writer's last opinion agrees with the label
    # share of the reviews that are made to end with it; with those by chance it is 29 %
    concluding_rate: float = 0.1
    own_rate: float = 0.06  # share of the phrases before it that are opinions of the writer
    others_rate: float = 0.1  # share of the other phrases that are opinions of others
    name_rate: float = 0.25  # share of the asides that hold a surname, most of them rare
    vocab_size: int = 5000  # most frequent words of the training split, with <pad> and <unk>
    max_words: int = 200  # of a longer review the end is kept
    embed_dim: int = 50
    epochs: int = 40
    batch_size: int = 32
    min_epochs: int = 5  # a gated cell may take as long to begin to learn


@dataclass(frozen=True)
class PredictorConfig(TaskConfig):
    """Next-word prediction. What each number of the corpus does: `generate_corpus`."""

    n_words: int = 20_000
    favourite_rate: float = 0.7  # how often a subject takes its favourite verb, or object
    vocab_size: int = 5000  # as the classifier's
    window: int = 10  # words that the model sees before the one it predicts
    embed_dim: int = 50
    epochs: int = 150
    batch_size: int = 256
    lr_factor: float = 0.3


@dataclass(frozen=True)
class ForecasterConfig(TaskConfig):
    """Time-series forecasting. What each number of the series does: `generate_series`."""

    n_steps: int = 24_000
    periods: tuple = ((4, 10), (16, 32))  # steps, of the fast and of the slow wave
    switch_rate: float = 0.01  # how often each wave's period changes: every 100 steps on average
    noise: float = 0.25  # standard deviation of the white noise; both waves have amplitude 1
    # steps that the model sees before the one it predicts; of a short series a tenth
    window: int = 50
    # every third window is trained on, which saves time and costs accuracy; with a stride of 4 a
    # wave of period 4 would show one phase alone until its period switches
    stride: int = 3
    hidden_dim: int = 32
    n_layers: int = 2
    dropout: float = 0.0
    updates: int = 40
    lr_factor: float = 0.4


# every number that the results depend on but seed and rate, by task
DEFAULT = {
    "classifier": ClassifierConfig(),
    "predictor": PredictorConfig(),
    "forecaster": ForecasterConfig(),
}
BRIEF = {"epochs": 2, "updates": 1}
QUICK = {
    "classifier": ClassifierConfig(n_reviews=200, phrases=(5, 15), **BRIEF),
    "predictor": PredictorConfig(n_words=1500, **BRIEF),
    "forecaster": ForecasterConfig(n_steps=1100, hidden_dim=16, **BRIEF),
}

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
WORDS = rf"{FACE}|{ALONE}|[\w{MARKS}]+(?:'[\w{MARKS}]+)*"
# a word of its own in a corpus
SENTENCE_END = r"[.!?](?=[\s\"')\]”’»]|$)|[।॥。！？؟۔]"
WORDS_AND_ENDS = rf"{UNK}|{WORDS}|{SENTENCE_END}"
MARKUP = rf"<(?!{UNK[1:]})/?[a-z][^<>]*>|\\[nrt]"  # HTML tags; line ends and tabs as escapes
# that are validated and tested on, that least squares learns from, and that the unit of a series is
# made of
MOST_WINDOWS = 50_000
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
            lengths = torch.full([len(inputs)], inputs.shape[1])
        self.lengths = lengths

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, rows):
        """Inputs and targets of these examples, or of one, cut to the longest of them."""
        longest = self.lengths[rows].max()
        # the copy is not waited for, but on MPS, where that was reported to corrupt data
        device = self.inputs.device
        rows = torch.as_tensor(rows).to(device, non_blocking=device.type != "mps")
        return self.inputs[rows, :longest], self.targets[rows]


class ReviewDataset(SequenceDataset):
    """Reviews as word ids padded on the right with 0: (N, T) long; labels (N, 1) float."""

    def __init__(self, reviews, labels, device=CPU):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in reviews], batch_first=True)
        targets = torch.tensor(labels, dtype=torch.float32, device=device).unsqueeze(1)
        super().__init__(ids.to(device), targets, ids.count_nonzero(dim=1))


class CorpusDataset(SequenceDataset):
    """Every `stride`-th window of a text and the word after it: (N, T) and (N,), long views."""

    def __init__(self, ids, window, stride=1, device=CPU):
        text = torch.as_tensor(ids, device=device)
        rows = text.unfold(0, window + 1, stride)  # (N, T + 1)
        super().__init__(rows[:, :-1], rows[:, -1])


def centred(windows):
    """Windows (B, T, 1), or one (T, 1), without their means."""
    return windows - windows.mean(dim=-2, keepdim=True)


class SeriesDataset(SequenceDataset):
    """Every `stride`-th window of a series and the value after it: (N, T, 1) and (N, 1), float
    views.

    What a model is given is relative: a batch holds the windows without their means, and how far
    the next value lies from the last. So a level that training never saw does no harm, and a model
    that answers 0 is persistence (after NLinear, Zeng et al. 2023).
    """

    def __init__(self, values, window, stride=1, device=CPU):
        self.series = torch.as_tensor(values, dtype=torch.float32, device=device)
        rows = self.series.unfold(0, window + 1, stride)  # (N, T + 1)
        super().__init__(rows[:, :-1, None], rows[:, -1:])

    def __getitem__(self, rows):
        windows, targets = super().__getitem__(rows)
        return centred(windows), targets - windows[..., -1, :]


def length_buckets(lengths, batch_size, rng, least=1):
    """An epoch: shuffled batches of examples of similar length, so that little time goes into
    padding.

    In every pass the examples are shuffled, sorted by length within pools of 32 batches, and
    cut into batches, which are shuffled again. With equal lengths this is plain shuffling. Passes
    are repeated until there are `least` batches. Returns a list of arrays of rows.
    """
    pools = np.arange(len(lengths)) // (32 * batch_size)
    epoch = []
    while len(epoch) < least:
        order = rng.permutation(len(lengths))
        # by pool, then by length: the last key counts most
        order = order[np.lexsort((lengths[order], pools))]
        batches = np.split(order, range(batch_size, len(order), batch_size))
        epoch += [batches[i] for i in rng.permutation(len(batches))]
    return epoch


def fit_vocabulary(words, size):
    """The id of each word: 0 padding, 1 any unknown word, then by frequency and alphabet."""
    counts = Counter(words)
    del counts[UNK]  # some corpora come with it
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate([PAD, UNK, *ranked[: size - 2]])}


def encode(words, vocabulary):
    """The ids of `words`, 1 for those that the vocabulary lacks."""
    return [vocabulary.get(word, 1) for word in words]


def tokenize(text, pattern):
    """Lower-case words, those that `pattern` finds; interned, so that each is held once."""
    text = html.unescape(unicodedata.normalize("NFC", text)).lower().replace("’", "'")
    text = re.sub(MARKUP, " ", text)
    text = re.sub(ALONE, r" \g<0> ", text)
    return [sys.intern(word) for word in re.findall(pattern, text)]


def three_parts(n, least, what, window=0):
    """Contiguous train (70 %), validation and test slices (15 %) of n items.

    Those of validation and test begin a `window` earlier: their first target has a past, which is
    no target of theirs. Raises InputError if there are fewer items than `least`.
    """
    if n < least:
        raise InputError(f"{n:,} {what}; three splits need {least:,} or more")
    first = int(0.70 * n)
    second = int(0.85 * n)
    return slice(0, first), slice(first - window, second), slice(second - window, n)


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


def generate_reviews(config, rng):
    """Synthetic reviews by writers who change their minds: only the writer's own last opinion
    counts.

    A review is a sequence of phrases: opinions of the writer ("I found plot moving") and of others
    ("critics found plot dull"), among asides ("while nobody waits"), a `name_rate` of which hold
    one of 300,000 Zipf-distributed surnames. A quarter of the reviews are short. The writer's last
    opinion agrees with the label `reliability` of the time; every other opinion is random. A
    `concluding_rate` of the reviews end with it. In the rest its place,
    counted from the end, is log-uniform: about as often the last as the 2nd or 3rd, the 4th to 7th
    or, in long reviews, the 16th to 31st.

    What the task asks for: one fact decides. It has to be kept for about 170 words, not to be
    mistaken for the opinions of others, and to be replaced when the writer speaks again. Which
    words occur says little, for every other opinion looks the same.
    """
    n_reviews = config.n_reviews
    least, most = config.phrases
    is_positive = rng.permutation(n_reviews) % 2 == 1
    n_phrases = np.where(
        rng.random(n_reviews) < 0.25,
        rng.integers(least, least + 9, n_reviews),  # short reviews
        rng.integers(most - 10, most + 1, n_reviews),
    )
    ends = n_phrases.cumsum()
    n = ends[-1]  # phrases of all reviews

    def draw(words):  # one for each phrase; as objects they can be joined by +
        return rng.choice(words, n).astype(object)

    # the place of the opinion that counts; counted from the end, 1 is the last phrase
    back = (n_phrases ** rng.random(n_reviews)).astype(int)
    last = ends - np.where(rng.random(n_reviews) < config.concluding_rate, 1, back)
    is_own = (rng.random(n) < config.own_rate) & (np.arange(n) < np.repeat(last, n_phrases))
    is_own[last] = True
    is_opinion = is_own | (rng.random(n) < config.others_rate)

    # an opinion for each phrase: random, but for those that count
    favourable = rng.random(n) < 0.5
    favourable[last] = (rng.random(n_reviews) < config.reliability) == is_positive
    speakers = np.where(is_own, "I", draw(OTHERS))
    opinions = speakers + " " + draw(JUDGED) + " " + draw(ASPECTS) + " "
    praise = draw(POSITIVE)
    blame = draw(NEGATIVE)
    opinions += np.where(favourable, praise, blame)

    # an aside for each phrase
    is_named = rng.random(n) < config.name_rate
    parts = product(NAME_TAILS, NAME_MIDDLES, NAME_HEADS)
    names = [head + middle + tail for tail, middle, head in parts]
    # a log-uniform rank is Zipf-distributed
    rank = (len(names) ** rng.random(n)).astype(int) - 1
    # by a prime: neighbours in rank do not look alike
    surnames = np.take(names, rank * 7919 % len(names))
    characters = np.where(is_named, surnames, draw(CHARACTERS))
    asides = draw(CONJUNCTIONS) + " " + characters + " " + draw(VERBS)

    # sentences of a few phrases: the tokenizer takes their ends out again
    marks = np.where(rng.random(n) < 0.4, ". ", ", ")
    marks[ends - 1] = ".\n"

    text = "".join(np.where(is_opinion, opinions, asides) + marks)
    text = re.sub(r"(?m)(^|\. )\w", lambda start: start[0].upper(), text)

    # the last word of the opinion that counts decides
    words = np.where(is_opinion, 4, 3).cumsum()
    return DataFrame(
        {
            "text": text.splitlines(),
            "label": np.where(is_positive, "positive", "negative"),
            "favourable": favourable[last],
            "other_word": np.where(favourable, blame, praise)[last],
            "distance": words[ends - 1] - words[last],
        }
    )


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
    return sorted(words, key=lambda word: word != favourite)


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
    return {words[0]: share * rate} | even(words[1:], share * (1 - rate))


def generate_corpus(config, rng):
    """Sentences of a small grammar in which verb and object depend on a subject some words back.

    "the bakers behind the singer often burn the bread outside ." Subjects belong to six areas. The
    verb is one of its subject's area, agrees with it in number, and is the subject's favourite
    `favourite_rate` of the time; the object likewise. Between subject and verb stand up to two
    phrases, each with a noun of another area, so that verbs come up to seven and objects up to nine
    words after their cue. Whoever keeps the subject across the intruding nouns predicts verb and
    object; whoever goes by the last few words, as n-grams must, takes the intruder for the subject.

    A row per word: `word`; given the full state of the grammar, the `likeliest` word and the
    `entropy` (nats); and of an object, or of a verb where no phrase could have come instead,
    `distance`, the words back to its subject. With `other_subject` in its place `other_word` would
    be the favourite, more probable by `effect`.
    """
    rate = config.favourite_rate
    subjects = corpus_subjects()
    rows = []

    def draw(options):
        words = list(options)
        probabilities = np.array(list(options.values()))
        word = words[rng.choice(len(words), p=probabilities)]
        rows.append(
            {
                "word": word,
                "likeliest": words[probabilities.argmax()],
                "entropy": -np.log(probabilities**probabilities).sum(),  # 0**0 is 1
            }
        )
        return word

    # the word last drawn follows a subject, in place of which another could stand
    def mark(subject_at, other, other_words):
        rows[-1].update(
            distance=len(rows) - subject_at,
            other_subject=other,
            other_word=other_words[0],
            effect=rate - (1 - rate) / (len(other_words) - 1),
        )

    while len(rows) < config.n_words:
        draw({"the": 1.0})
        subject = subjects[draw(even(subjects))]
        subject_at = len(rows)
        intruders = [noun for noun, other in subjects.items() if other.area != subject.area]
        # up to two phrases come between subject and verb; an adverb may end them early
        word = ""
        phrases = 0
        while word not in subject.verbs:
            verb_share = 1.0 if word in ADVERBS else VERB_SHARES[phrases]
            word = draw(
                peaked(subject.verbs, rate, verb_share)
                | even(PREPOSITIONS, 0.85 * (1 - verb_share))
                | even(ADVERBS, 0.15 * (1 - verb_share))
            )
            if word in PREPOSITIONS:
                draw({"the": 1.0})
                draw(even(intruders))
                phrases += 1
        if verb_share == 1:  # else the likeliest word may be a preposition, whatever is remembered
            mark(subject_at, subject.other, subjects[subject.other].verbs)
        draw({"the": 1.0})
        draw(peaked(subject.objects, rate))
        mark(subject_at, subject.other, subjects[subject.other].objects)
        if draw({".": 0.6} | even(TAILS, 0.4)) != ".":
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
    series = DataFrame({"value": fast + slow + rng.normal(0, config.noise, n)})
    n_switches = (fast_switches | slow_switches).cumsum()  # up to each step
    series["distance"] = series.groupby(n_switches).cumcount()
    return series


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
        k = len(periods)
        waves.append(torch.sin(2 * math.pi * torch.arange(n) / n).repeat(k))
        # the period may switch, and the phase goes on
        switch = torch.full((k, k), config.switch_rate / (k - 1))
        switch.fill_diagonal_(1 - config.switch_rate)
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
    return torch.cat(forecasts)


# ======================================================================================
# Your own data
# ======================================================================================
# Each way in leads to one table: reviews to `text` and `label`, a corpus to `line`, a series to
# `value`. Rows are numbered as in a spreadsheet; data from Python count from 0. `notes` is a list
# of sentences on what may mislead, to which the functions append.

TEXT_COLUMNS = "text review sentence comment".split()  # the usual names, in lower case
LABEL_COLUMNS = "label sentiment class rating stars".split()
TIME_COLUMNS = "date time datetime timestamp year month week day hour".split()
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
DATE = r"\d[-/:]\d|\d\.\d+\.|^\d{8}$"  # is in what may be a date or a time of day


def read_text(path, notes):
    """The text of a file, unpacked if its name ends in .gz; raises InputError."""
    try:
        content = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        notes.append("not UTF-8: read as Windows-1252; if words look wrong, save it as UTF-8")
    except Exception as error:  # a damaged file can make gzip stumble over this and that
        raise InputError(f"cannot be read: {error}") from error
    if "\0" in text:
        raise InputError("no text; save it as plain text or CSV, in UTF-8")
    return text


def parse_table(text):
    """A CSV text as a table of strings, and its separator; raises InputError."""
    if re.match(r"\s*\[?\s*{", text):
        raise InputError("JSON is no table; save it as CSV")
    text = re.sub(r"\n[\s;,]*\Z", "\n", text + "\n")  # spreadsheets add rows of nothing
    comments, header = re.match(r"((?:#.*\n)*)([^\r\n]*)", text).groups()
    separator = next((mark for mark in "\t;" if mark in header), ",")
    reader = csv.reader(
        # StringIO would take four bytes a character
        io.TextIOWrapper(io.BytesIO(text.removeprefix(comments).encode()), "utf-8", newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
        strict=True,
    )
    # one column may do without a name
    rows = [["value"]] if re.fullmatch(NUMBER, header) else []
    first = comments.count("\n") + 1 - len(rows)
    try:
        rows += reader
    except csv.Error as error:
        raise InputError(
            f"row {first + len(rows)}: {error}; write a quotation mark in a cell twice"
        ) from error
    names, *others = rows
    if all(row[len(names) :] == [""] for row in others):  # each ends with a separator
        names.append("")
    for number, row in enumerate(rows, first):
        row += [""] * (len(names) - len(row))
        if len(row) > len(names):
            raise InputError(
                f"row {number} has {len(row)} cells, row {first} {len(names)}: names must stand "
                "there, with nothing above; a cell that holds a separator needs quotation marks"
            )
    table = DataFrame(others, columns=names).map(str.strip)
    table.index += first + 1
    return table, separator


def find_column(table, named, usual, option):
    """The column that the user named, or that has a usual name; raises InputError."""
    if table.empty:
        raise InputError("no rows below row 1")
    named = str(named)  # from Python it may be a number
    found = [name for name in table if (name == named if named else name.lower() in usual)]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} columns for {option} ({named or ', '.join(usual) or 'plain numbers'}): "
            f"name one with --{option}-column; names stand in row 1: "
            f"{', '.join(f'{name} ({cell!s:.20})' for name, cell in table.iloc[0].items())}"
        )
    return table[found[0]]


def read_reviews(table, text_column, label_column):
    """Reviews: texts, and labels in words; raises InputError."""
    texts = find_column(table, text_column, TEXT_COLUMNS, "text")
    labels = find_column(table, label_column, LABEL_COLUMNS, "label")
    words = labels.astype(str).str.removesuffix(".0")  # 1.0 is 1
    for row in words.index[labels.isna() | (words == "")]:
        raise InputError(f"row {row} holds no label")
    if not 2 <= words.nunique() <= 20:
        raise InputError(f"{words.nunique()} labels in {labels.name!r}; 2 to 20 are needed")
    return DataFrame({"text": texts, "label": words})


def as_numbers(cells, separator):
    """The numbers in a column, nan where a cell holds none: 1234.5; among semicolons 1234,5.

    Among semicolons 1.029 beside 997 may mean two things, and is no number.
    """
    # decimal commas: some cells have no point, and none has a point but before three digits
    if separator == ";" and cells.str.fullmatch(r"[-+\d,]+").any():
        if not cells.str.contains(r"\.(?!\d{3}\b)").any():
            cells = cells.str.translate(str.maketrans(",.", ".,"))
    return pd.to_numeric(cells, errors="coerce")


def time_steps(cells):
    """The seconds from each time in a column to the next, nan where a cell holds none."""
    # 03/02 may be in February or in March: right is what can be read in all rows, and is most even
    with warnings.catch_warnings(action="ignore"):
        readings = [
            pd.to_datetime(cells, errors="coerce", utc=True, dayfirst=day_first)
            .diff()
            .dt.total_seconds()
            for day_first in (False, True)
        ]
    return min(readings, key=lambda steps: (steps.isna().sum(), steps.std()))


def read_series(table, separator, column, notes):
    """The values of a column, in order of time; raises InputError.

    Without a name it is the only one of numbers that is no time and does not go by equal steps.
    If a column beside it falls in every row, the values are turned round. A last row without a
    time, such as a total, is left out.
    """
    numbers = table.apply(as_numbers, separator=separator)
    usual = [
        name.lower()
        for name, values in numbers.items()
        if values.diff().nunique() > 1
        and name.lower() not in TIME_COLUMNS
        and not (separator and re.fullmatch(NUMBER, name))  # of a file without a header
    ]
    cells = find_column(table, column, usual, "series")
    first = cells.str.match(r"\W*\d").idxmax()
    if first != table.index[0]:
        notes.append(f"the rows above row {first} hold no number and were left out")
    values = numbers.loc[first:, cells.name]
    for row in values.index[~np.isfinite(values)]:
        raise InputError(
            f"row {row} holds '{cells[row]}' in the column {cells.name!r}: a number such as "
            "1234.5 is needed, no sign for thousands, currency or per cent; a row without must go"
        )
    for code in values.agg(["min", "max"]):
        count = (values == code).sum()
        distances = abs(values[values != code] - code)
        if count > 2 and distances.min() > 3 * distances.std() > 0:
            notes.append(
                f"{code:g} stands there {count:,} times, far from the rest: is it missing?"
            )

    for name, times in table.loc[first:].drop(columns=cells.name).items():
        is_date = re.search(DATE, str(times.iloc[0]))
        steps = time_steps(times) if is_date else as_numbers(times, separator).diff()
        steps = steps.iloc[1:]
        is_time = times.nunique() > 1 and (is_date or name.lower() in TIME_COLUMNS)
        if is_time and np.isnan(steps.iloc[-1]) and steps.isna().sum() == 1:
            row = steps.index[-1]
            notes.append(f"{name!r} is no time in the last row, {row} ({times[row]!r}): left out")
            values = values[values.index != row]
            steps = steps.iloc[:-1]
        if (steps < 0).all():
            notes.append(f"the newest value came first by {name!r}: the series was turned round")
            return values[::-1]
        if not is_time:
            continue
        for row in steps.index[~(steps > 0)][:1]:
            notes.append(
                f"{name!r} does not rise, or is no time, at row {row} ({times[row]!r}): "
                "is it one series, the oldest value first?"
            )
        if steps.max() > 1.5 * steps.quantile(0.9):  # months differ in length
            notes.append(f"gaps in {name!r}, the longest before row {steps.idxmax()}")
    return values


def read_user_data(option, given, columns):
    """What was given for `reviews`, `corpus` or `series`, a path or data; raises InputError.

    `columns`: the names that the user gave to text and label, or to the series; else "".
    """
    notes = []
    separator = ""
    is_path = isinstance(given, (str, os.PathLike))
    name = Path(given).name if is_path else option
    try:
        if option == "corpus":
            lines = read_text(given, notes).splitlines() if is_path else list(given)
            table = DataFrame({"line": lines})
        elif is_path:
            table, separator = parse_table(read_text(given, notes))
        elif option == "reviews" and isinstance(given, tuple):
            texts, labels = given
            table = DataFrame({"text": list(texts), "label": np.ravel(labels)})
        else:
            table = DataFrame(given).rename(columns=str)
            table = table.reset_index(drop=not hasattr(table.index, "year"))  # times count
        if option == "series":
            table = read_series(table.astype(str), separator, *columns, notes).to_frame("value")
        else:
            if option == "reviews":
                table = read_reviews(table, *columns)
            for row, cell in table.iloc[:, 0].items():
                if not isinstance(cell, str):
                    raise InputError(f"row {row} holds {cell!r}: it must be a text, a str")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error
    table = table.reset_index(drop=True)
    # with the index, so the order counts
    digest = f"{pd.util.hash_pandas_object(table).sum():016x}"
    return UserData(name, digest, table, tuple(notes))


# ======================================================================================
# Models
# ======================================================================================


def near_identity_(weight):
    """0.9 times the identity: the state fades slowly (after Le et al. 2015).

    Beside an orthogonal matrix (Saxe et al. 2014) it was measured to be better for the next word,
    above all for a vanilla RNN, as good for reviews, and for a vanilla RNN worse on series.
    """
    return nn.init.eye_(weight).mul_(0.9)


MODEL_CLASSES = {}  # by name: those below and a user's own


class SequenceModel(nn.Module):
    """What all models share: recurrent layer -> state after the last step -> dropout -> head.

    A subclass names its `cell`, a key of CELLS. `predict` is for a model on the CPU.
    """

    cell: str
    preprocessing = {}  # of a trained model: turns words or values into inputs, and back

    def __init_subclass__(cls):
        MODEL_CLASSES[cls.__name__] = cls

    def add_recurrent(self, input_dim, hidden_dim, n_layers, dropout, start=near_identity_):
        """The layer of the cell, (B, T, input_dim) -> states (B, T, hidden_dim) and the last state,
        and the dropout after it. Weights are drawn here: a subclass calls it after its embedding.

        In PyTorch's own layers `start` fills the recurrent weights, one block per gate, unless the
        cell has a start of its own; input weights are Glorot-uniform, biases 0. No gate starts
        open: on the reviews it was measured to help neither LSTM nor GRU. Any other layer starts as
        it likes.
        """
        cell = CELLS[self.cell]
        self.recurrent = cell.layer(
            input_dim,
            hidden_dim,
            n_layers,
            batch_first=True,
            dropout=dropout if n_layers > 1 else 0.0,  # between the layers
        )
        if isinstance(self.recurrent, nn.RNNBase):
            for name, weight in self.recurrent.named_parameters():
                for gate in weight.detach().split(hidden_dim):  # views: this fills the weight
                    if "weight_hh" in name:
                        (cell.start or start)(gate)
                    elif "weight_ih" in name:
                        nn.init.xavier_uniform_(gate)
                    else:
                        nn.init.zeros_(gate)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        states, _ = self.recurrent(inputs)  # (B, T, F) -> (B, T, H)
        return self.head(self.dropout(states[:, -1]))

    def ids(self, words):
        """The ids (1, T) of words; words that training lacked are 1."""
        return torch.tensor([encode(words, self.preprocessing["vocabulary"])])


def probability_head(hidden_dim, output_dim):
    """The last layer of a classifier: to one probability, or to one of each label."""
    # probabilities are what the task asks for; else logits would be simpler
    return nn.Sequential(
        nn.Linear(hidden_dim, output_dim), nn.Sigmoid() if output_dim == 1 else nn.Softmax(dim=1)
    )


def label_probabilities(output):
    """Of each label (B, K): from an output (B, K), or (B, 1), the probability of the second."""
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
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        weight = self.embedding.weight.detach()
        # small, so that rare words, which training hardly moves, say little; the three of 13 LSTMs
        # that needed five to seven epochs to begin at 0.1 needed two or three at this, and at 1 a
        # vanilla RNN lost
        weight.normal_(std=0.3)
        weight[0] = 0.0
        self.add_recurrent(embed_dim, hidden_dim, n_layers, dropout)
        self.head = probability_head(hidden_dim, output_dim)

    def forward(self, ids):
        states, _ = self.recurrent(self.embedding(ids))  # (B, T) -> (B, T, E) -> (B, T, H)
        # padding comes after the last word, so its states are never read
        last = ids.count_nonzero(dim=1) - 1  # (B, T) -> (B,)
        state = states[torch.arange(len(ids), device=ids.device), last]  # (B, H)
        return self.head(self.dropout(state))

    @torch.no_grad()
    def predict(self, texts):
        """The probability of each label, a row per text, and how many of its words it knows.

        Of a text longer than the reviews of training the last `max_words` words are read, as in
        training. Without any word the probabilities are missing.
        """
        self.eval()
        rows = []
        for text in texts:
            words = tokenize(text, WORDS)[-self.preprocessing["max_words"] :]
            ids = self.ids(words or [PAD])
            probabilities = label_probabilities(self(ids))[0]  # (K,)
            if not words:
                probabilities.fill_(math.nan)
            rows.append([*probabilities.tolist(), f"{int((ids > 1).sum())} of {len(words)} words"])
        return DataFrame(rows, columns=[*self.preprocessing["labels"], "knows"])


class Predictor(SequenceModel):
    """Embedding -> recurrent layer -> dropout -> dense: ids (B, T) long -> logits (B, V)."""

    def __init__(self, vocab_size, embed_dim, hidden_dim, n_layers=1, dropout=0.2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.add_recurrent(embed_dim, hidden_dim, n_layers, dropout)
        self.head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, ids):
        return super().forward(self.embedding(ids))  # (B, T) -> (B, T, E) -> (B, V)

    @torch.no_grad()
    def probabilities(self, words, temperature=1.0):
        """The probability of each known word after the last `window` of `words`: a Series.

        Without any words, of a sentence's first. Each is raised to 1 / `temperature`, then they are
        normalised.
        """
        self.eval()
        ids = self.ids(words[-self.preprocessing["window"] :] or ["."])
        logits = self(ids)[0, 2:].double()  # <pad> and <unk> are no words
        logits /= max(temperature, 1e-30)  # at 0 all but the likeliest vanish
        return Series(logits.softmax(dim=0).numpy(), list(self.preprocessing["vocabulary"])[2:])

    def predict(self, text, n=5):
        """The `n` likeliest next words with their probabilities: a Series."""
        return self.probabilities(tokenize(text, WORDS_AND_ENDS)).nlargest(n)

    def continue_text(self, text, length=20, temperature=1.0, seed=42):
        """The next `length` words, drawn from the model's probabilities."""
        given = tokenize(text, WORDS_AND_ENDS)
        drawn = []
        rng = np.random.default_rng(seed)
        for _ in range(length):
            options = self.probabilities(given + drawn, temperature)
            drawn.append(rng.choice(options.index, p=options))
        return re.sub(rf" ({SENTENCE_END})", r"\1", " ".join(drawn))


class Forecaster(SequenceModel):
    """Recurrent layers -> dropout -> dense -> ReLU -> dense: (B, T, input_dim) -> (B, output_dim).

    The inputs are scaled windows without their means; the output counts from the window's last
    value. `roll_forward` takes scaled windows, `predict` a series as it is.
    """

    def __init__(self, input_dim, hidden_dim, output_dim, n_layers=2, dropout=0.2):
        super().__init__()
        self.add_recurrent(input_dim, hidden_dim, n_layers, dropout, nn.init.orthogonal_)
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
        than the model was trained on. Raises InputError if a value is not finite.
        """
        values = np.array(values, dtype=float)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise InputError("a series must hold one or more finite values, in one dimension")
        mean = self.preprocessing["mean"]
        std = self.preprocessing["std"]
        scaled = (values[-self.preprocessing["window"] :] - mean) / std
        windows = torch.tensor(scaled, dtype=torch.float32)[None, :, None]  # (1, T, 1)
        return self.roll_forward(windows, length)[0].double().numpy() * std + mean


class RNNClassifier(Classifier):
    """Text classifier on a vanilla RNN with tanh units (Elman 1990)."""

    cell = "RNN"


class LSTMClassifier(Classifier):
    """Text classifier on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = "LSTM"


class GRUClassifier(Classifier):
    """Text classifier on gated recurrent units (Cho et al. 2014)."""

    cell = "GRU"


class IRNNClassifier(Classifier):
    """Text classifier on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = "IRNN"


class RNNPredictor(Predictor):
    """Next-word predictor on a vanilla RNN with tanh units (Elman 1990)."""

    cell = "RNN"


class LSTMPredictor(Predictor):
    """Next-word predictor on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = "LSTM"


class GRUPredictor(Predictor):
    """Next-word predictor on gated recurrent units (Cho et al. 2014)."""

    cell = "GRU"


class IRNNPredictor(Predictor):
    """Next-word predictor on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = "IRNN"


class RNNForecaster(Forecaster):
    """Forecaster on a vanilla RNN with tanh units (Elman 1990)."""

    cell = "RNN"


class LSTMForecaster(Forecaster):
    """Forecaster on an LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000)."""

    cell = "LSTM"


class GRUForecaster(Forecaster):
    """Forecaster on gated recurrent units (Cho et al. 2014)."""

    cell = "GRU"


class IRNNForecaster(Forecaster):
    """Forecaster on an RNN of ReLU units that starts as the identity (Le et al. 2015)."""

    cell = "IRNN"


def checkpoint_bytes(model, arguments):
    """A trained model and its constructor arguments as a file: tensors, numbers, text, no code.

    The model is moved to the CPU.
    """
    content = io.BytesIO()
    torch.save(
        {
            "class": type(model).__name__,
            "arguments": arguments,
            "weights": model.cpu().state_dict(),
            "preprocessing": model.preprocessing,
        },
        content,
    )
    return content.getvalue()


def load_checkpoint(path):
    """The model saved at `path`, on the CPU and ready to `predict`; no code in the file is run.

    Raises InputError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load checks no checksum
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = MODEL_CLASSES[checkpoint["class"]](**checkpoint["arguments"])
        model.load_state_dict(checkpoint["weights"])
        model.preprocessing = checkpoint["preprocessing"]
    except Exception as error:  # a foreign or damaged file can make torch stumble over anything
        raise InputError(
            f"{path}: not a trained model of this script ({first_line(error)[:120]})"
        ) from error
    return model.eval()


def first_line(error):
    """An error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


# ======================================================================================
# Training
# ======================================================================================


class RunError(RuntimeError):
    """What ended a run, or the command, and what to do about it."""


class Diverged(RunError):
    """A loss was not finite: the learning rate is too high."""


def prepare_device(device):
    """Settings of this process under which a run gives the same numbers every time."""
    # the layers are too small to share out; several runs use the cores better
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # 38 kernels a step for nothing
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # as the linear layers: no TF32


def is_usable(device):
    """Whether the device is there and can do a small recurrent step: it may be too old, or full."""
    try:
        layer = nn.LSTM(2, 2).to(device)
        layer(torch.ones(1, 1, 2, device=device))[0].sum().backward()
    except (RuntimeError, AssertionError):  # torch's own error where it was built without CUDA
        return False
    return True


def train_step(model, task, optimizer, batch, config):
    """One update, in micro-batches; returns (3,): mean loss and score, norm of the gradient."""
    inputs, targets = batch
    n = config.accumulate_steps
    optimizer.zero_grad(set_to_none=True)
    losses = []
    scores = []
    for x, y in zip(inputs.chunk(n), targets.chunk(n)):
        output = model(x)
        loss = task.loss(output, y)  # (b,)
        # over B, not b: the gradients of the micro-batches add up to that of the batch's mean
        (loss.sum() / len(targets)).backward()
        losses.append(loss.detach())
        scores.append(task.score(task.answer(output.detach()), y))
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return torch.stack([torch.cat(losses).mean(), torch.cat(scores).mean(), norm])


@torch.no_grad()
def evaluate(model, task, dataset, batch_size=128):
    """A row per example of a dataset: the model's `answer`, its `loss` and `score`."""
    model.eval()
    parts = []
    # batches of similar length: little padding
    for rows in dataset.lengths.argsort(stable=True).split(batch_size):
        inputs, target = dataset[rows]
        output = model(inputs)
        answer = task.answer(output)
        measured = {
            "loss": task.loss(output, target).cpu(),
            "score": task.score(answer, target).cpu(),
            "answer": answer.cpu(),
        }
        parts.append(DataFrame(measured, index=rows.numpy()))
    return pd.concat(parts).sort_index()


def fit(
    model, task, data, config, learning_rate, seed, weight_decay=0.0, on_epoch=lambda row: None
):
    """Train until the validation loss stops falling; leaves the best epoch's weights in `model`.

    Adam (Kingma & Ba 2015). Model and data must be on the same device. Returns the history, a row
    per epoch, which `on_epoch` is called with as well: `epoch`, `learning_rate`, `gradient_norm`
    (mean, before clipping), `seconds`, `ms_per_step` (of training alone), and of training and
    validation the loss and the task's score; those of training are running means, with dropout on.
    Raises Diverged when a loss is not finite.
    """
    seed_torch(seed, "dropout")
    optimizer = optim.Adam(
        model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    plateau = optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=config.lr_factor, patience=config.lr_patience
    )
    lengths = data.train.lengths.numpy()
    batch_size = config.batch_size_for(len(lengths))
    rng = random_generator(seed, "batches")
    history = []
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        batches = length_buckets(lengths, batch_size, rng, config.updates)
        model.train()
        means = 0.0  # over the examples so far; on the device: one transfer an epoch, not a step
        seen = 0
        # each item of the "sampler" is a batch; the loader also draws a number of torch's generator
        for batch in DataLoader(data.train, sampler=batches, batch_size=None):
            seen += len(batch[1])
            step = train_step(model, task, optimizer, batch, config)
            means = means + (step - means) * (len(batch[1]) / seen)
        train_loss, train_score, gradient_norm = means.tolist()
        trained = time.perf_counter()
        answers = evaluate(model, task, data.validation)
        val_loss, val_score = answers[["loss", "score"]].mean(skipna=False).tolist()
        if not math.isfinite(train_loss + val_loss):
            raise Diverged(
                f"{type(model).__name__} ({task.name}), seed {seed}: the loss is not finite in "
                f"epoch {epoch}; try a learning rate below {rate:g} or a clip norm below "
                f"{config.clip_norm:g}"
            )
        row = {
            "epoch": epoch,
            "learning_rate": rate,
            "seconds": time.perf_counter() - start,
            "ms_per_step": 1000 * (trained - start) / len(batches),
            "gradient_norm": gradient_norm,
            "train_loss": train_loss,
            "validation_loss": val_loss,
            f"train_{task.score_name}": train_score * data.unit,
            f"validation_{task.score_name}": val_score * data.unit,
        }
        history.append(row)
        on_epoch(row)
        best = best_epoch(history)["epoch"]
        if best == epoch:  # a copy: the state's own tensors go on changing
            best_weights = copy.deepcopy(model.state_dict())
        if epoch - max(best, config.min_epochs) >= config.patience:
            break
        if epoch > config.min_epochs:
            plateau.step(val_loss)
    model.load_state_dict(best_weights)
    return history


def best_epoch(history):
    """The row of the first epoch with the lowest validation loss."""
    return min(history, key=lambda row: row["validation_loss"])


# ======================================================================================
# Baselines
# ======================================================================================
# Each `*_baselines` returns, by name, what `evaluate` returns of a model: a table with a row per
# test example, `answer` (an id, or a value in the unit of the targets) and `loss`.


def label_answers(logits, labels):
    """The table of a baseline that answers with `logits` (N, K) where `labels` (N,) are right."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return DataFrame({"answer": logits.argmax(dim=1), "loss": losses})


def value_answers(forecasts, test):
    """The table of a baseline with `forecasts` (N,); answers count from the window's last value."""
    losses = (forecasts - test.targets[:, 0]).square()
    return DataFrame({"answer": forecasts - test.inputs[:, -1, 0], "loss": losses})


def without_recurrence(network, task, data, config, learning_rate, seed, weight_decay=0.0):
    """The table of a network that is trained as the models are."""
    fit(network, task, replace(data, test=None), config, learning_rate, seed, weight_decay)
    return evaluate(network, task, data.test)


class Recency(nn.Module):
    """A label without recurrence: the mean response of 50 filters over five words. A place in the
    text weighs the more, the higher its score, which is one filter more, and the nearer the end it
    is, by a learned slope.
    """

    def __init__(self, vocab_size, embed_dim, output_dim):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.embedding.weight.detach().mul_(0.3)  # as in `Classifier`
        self.filters = nn.Conv1d(embed_dim, 51, kernel_size=5, padding=2)
        self.slope = nn.Parameter(torch.tensor(0.1))
        self.head = probability_head(50, output_dim)

    def forward(self, ids):
        is_word = ids[:, None] > 0  # (B, 1, T)
        responses = self.filters(self.embedding(ids).transpose(1, 2))  # (B, E, T) -> (B, 51, T)
        # places are counted from the start: a softmax is the same for all origins
        scores = responses[:, :1] + self.slope * is_word.cumsum(dim=2)
        weights = scores.masked_fill(~is_word, -1e9).softmax(dim=2)  # (B, 1, T)
        return self.head((weights * responses[:, 1:].relu()).sum(dim=2))  # -> (B, 50) -> (B, K)


def review_baselines(task, data, config, seed):
    """The majority class, multinomial naive Bayes on words (Manning, Raghavan & Schuetze 2008,
    ch. 13), and a network that goes by recency, trained as the others are.

    How many words at the end of a text naive Bayes counts, and the temperature by which it divides
    the log odds (Guo et al. 2017), are those of the lowest loss on the validation part.
    """
    splits = (data.train, data.validation, data.test)
    learnt, known, truth = (split.targets[:, 0].long() for split in splits)  # (N,)
    prior = (learnt.bincount() + 1.0).log()  # (K,): the training part has every label
    baselines = {"majority class": label_answers(prior.expand(len(truth), -1), truth)}
    lowest = math.inf
    for last in (5, 10, 20, 50, sys.maxsize):
        ends = []  # (N, T): the last words of the reviews, else padding
        for split in splits:
            words_after = split.lengths[:, None] - 1 - torch.arange(split.inputs.shape[1])
            ends.append(split.inputs.where(words_after < last, 0))
        # how often each word occurs under each label, plus one
        counts = torch.ones(data.sizes["vocab_size"], len(prior))
        counts.index_put_((ends[0], learnt[:, None]), torch.tensor(1.0), accumulate=True)
        weights = (counts / counts[1:].sum(dim=0)).log()
        weights[0] = 0.0  # padding
        log_odds, tested = (prior + weights[words].sum(dim=1) for words in ends[1:])
        for temperature in np.geomspace(0.1, 100, 61):
            loss = F.cross_entropy(log_odds / temperature, known)
            if loss < lowest:
                lowest = loss
                baselines["naive Bayes"] = label_answers(tested / temperature, truth)
    seed_torch(seed, "weights")
    network = Recency(embed_dim=config.embed_dim, **data.sizes)
    baselines["recency network"] = without_recurrence(network, task, data, config, 1e-2, seed, 1e-4)
    return baselines


def ngram_model(ids, vocab_size):
    """Interpolated trigrams that back off by Witten-Bell smoothing (Chen & Goodman 1999, eq. 15).

    Returns a function: context -> P(word | context) of each word (V,). Contexts are tuples of up
    to two words.
    """
    followers = defaultdict(Counter)  # by context
    for i, word in enumerate(ids):
        for n in range(min(i, 2) + 1):
            followers[tuple(ids[i - n : i])][word] += 1

    @lru_cache
    def probabilities(context):
        # every order is mixed with the lower ones, down to the uniform distribution
        lower = probabilities(context[1:]) if context else np.full(vocab_size, 1 / vocab_size)
        seen = followers[context]
        if not seen:
            return lower
        counts = np.bincount(list(seen), list(seen.values()), vocab_size)
        return (counts + len(seen) * lower) / (seen.total() + len(seen))

    return probabilities


class LogBilinear(nn.Module):
    """The next word without recurrence: the words of the window vote, each by its place, and the
    sum of their votes is compared with every word (after Mnih & Hinton 2007).
    """

    def __init__(self, vocab_size, embed_dim, window):
        super().__init__()
        self.votes = nn.EmbeddingBag(window * vocab_size, embed_dim, mode="sum")
        nn.init.normal_(self.votes.weight, std=0.01)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.places = vocab_size * torch.arange(window)

    def forward(self, ids):
        return self.head(self.votes(ids + self.places))  # (B, T) -> (B, E) -> (B, V)


def corpus_baselines(task, data, config, seed):
    """Unigram, bigram and trigram, and a log-bilinear model trained as the others are."""
    vocab_size = data.sizes["vocab_size"]
    ids = data.train.inputs[0].tolist() + data.train.targets.tolist()  # the text
    last_two = data.test.inputs[:, -2:].tolist()
    probabilities = ngram_model(ids, vocab_size)
    baselines = {}
    for n, name in enumerate(("unigram", "bigram", "trigram")):
        rows = []
        for words, target in zip(last_two, data.test.targets.tolist()):
            likely = probabilities(tuple(words[2 - n :]))
            # <pad> and <unk> are no words
            rows.append({"answer": likely[2:].argmax() + 2, "loss": -np.log(likely[target])})
        baselines[name] = DataFrame(rows)

    seed_torch(seed, "weights")
    network = LogBilinear(vocab_size, config.embed_dim, config.window)
    baselines["log-bilinear"] = without_recurrence(network, task, data, config, 1e-3, seed)
    return baselines


def series_baselines(task, data, config, seed):
    """Persistence, the value a season ago, least squares, and a feed-forward network trained as the
    others are.
    """
    windows = data.test.inputs[:, :, 0]
    window = windows.shape[1]
    every = math.ceil(len(data.train) / MOST_WINDOWS)
    known = data.train.inputs[::every, :, 0].double()  # (N, T)
    following = data.train.targets[::every].double()  # (N, 1)
    forecasts = {"persistence": windows[:, -1]}
    # the place in the window whose value is on average nearest to the next one
    place = (known - following).square().mean(dim=0).argmin()
    if place < window - 1:
        forecasts["seasonal naive"] = windows[:, place]
    # in torch, on one thread: NumPy's last digits depend on the number of threads; gelsd takes any
    # rank
    design = F.pad(known, (0, 1), value=1.0)  # (N, T + 1)
    weights = torch.linalg.lstsq(design, following, driver="gelsd").solution[:, 0]
    forecasts["linear autoregression"] = windows.double() @ weights[:-1] + weights[-1]
    baselines = {name: value_answers(values, data.test) for name, values in forecasts.items()}
    seed_torch(seed, "weights")
    network = nn.Sequential(
        nn.Flatten(),  # (B, T, 1) -> (B, T)
        nn.Linear(window, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
    )
    baselines["feed-forward"] = without_recurrence(network, task, data, config, 3e-3, seed)
    return baselines


# ======================================================================================
# Tasks
# ======================================================================================

SHIFT = 0.25  # of one value of a window, in units of the targets: the change of a series
LAGS = (2, 4, 8, 12, 16, 24, 32, 48)  # steps back at which a value is shifted, in turn


class Change(NamedTuple):
    """Test examples in which the one thing that decides was changed.

    The targets are what the changed examples call for (of a series they stay: only the answers are
    compared).
    """

    rows: Sequence  # of the test examples
    before: SequenceDataset
    after: SequenceDataset


@dataclass(frozen=True)
class TaskData:
    """The data of one seed: three disjoint splits and what is known about them."""

    train: SequenceDataset
    validation: SequenceDataset
    test: SequenceDataset | None  # not there while a model is trained: `fit` reads the other two
    sizes: Mapping  # constructor keywords of the models that the data decide
    preprocessing: Mapping  # turns words or values into inputs, and back
    examples: DataFrame  # a row per test example: `truth`, what it is, what the generator knows
    spell: Callable  # the answers to the test examples, a Series, as labels, words, values
    change: Change | None = None  # None for a user's texts
    # () -> name: the best possible answers, and `effect`, how far these follow a change
    ceilings: Callable = dict
    notes: Sequence = ()  # on what may mislead
    unit: float = 1.0  # one unit of the targets, in the user's units


def dealt_by_label(labels, rng):
    """The index of `labels` in a random order in which every stretch holds its share of each."""
    shuffled = labels.iloc[rng.permutation(len(labels))]
    by_label = shuffled.groupby(shuffled)
    # the i-th of n examples of a label comes at (i + 0.5) / n of the way
    places = (by_label.cumcount() + 0.5) / by_label.transform("size")
    return places.sort_values(kind="stable").index


def window_splits(dataset, values, parts, window, stride, device):
    """Three datasets of windows, of the training part every `stride`-th, and the places (N,) that
    the targets of the test windows have in `values`.

    Of a long validation or test part not all windows are taken.
    """
    sparse = math.ceil(0.15 * len(values) / MOST_WINDOWS)
    strides = (stride, sparse, sparse)
    splits = [dataset(values[part], window, every, device) for part, every in zip(parts, strides)]
    return splits, np.arange(parts[2].start + window, len(values), sparse)


def exchange_words(test, back, ids, targets):
    """A change of one word of each test example, `back` (N,) words from its end, to `ids` (N,).

    `back` is a Series. `targets`: what the changed examples call for. Examples that hold no such
    word are left out.
    """
    places = test.lengths.numpy() - back  # (N,)
    rows = np.flatnonzero(places >= 0)
    called_for = test.targets.new_tensor(targets)[rows]
    before = SequenceDataset(test.inputs[rows], called_for, test.lengths[rows])
    after = copy.deepcopy(before)
    after.inputs[range(len(rows)), places[rows].tolist()] = test.inputs.new_tensor(ids)[rows]
    return Change(rows, before, after)


def build_reviews(config, seed, device=CPU):
    """Reviews without repetitions, split, encoded with the training split's vocabulary; InputError.

    Of a review longer than `max_words` the end is kept: that is where reviewers conclude. A user's
    reviews are dealt out so that each split has its share of every label; generated ones come in
    random order.
    """
    rng = random_generator(seed, "reviews")
    table = config.own.table if config.own else generate_reviews(config, rng)
    table = table.assign(words=[tuple(tokenize(text, WORDS)) for text in table["text"]])
    table = table[table["words"].map(bool)]
    n_double = (table.groupby("words")["label"].nunique() > 1).sum()
    notes = []
    if n_double:
        notes.append(f"{n_double:,} texts stand there with two labels; the first was taken")
    table = table.drop_duplicates("words")  # the splits would share them
    if config.own:
        table = table.loc[dealt_by_label(table["label"], rng)]

    parts = three_parts(len(table), 20, "different reviews that hold a word")
    words = table["words"].str[-config.max_words :]
    vocabulary = fit_vocabulary(words.iloc[parts[0]].explode(), config.vocab_size)
    ids = [encode(review, vocabulary) for review in words]
    labels, names = pd.factorize(table["label"], sort=True)
    splits = [ReviewDataset(ids[part], labels[part], device) for part in parts]

    tested = table.iloc[parts[2]].reset_index(drop=True).rename(columns={"label": "truth"})
    ceilings = {}
    change = None
    if not config.own:
        # the probability of a positive label, by Bayes' rule: nothing else depends on the label
        positive = np.where(tested["favourable"], config.reliability, 1 - config.reliability)
        ceilings["Bayes decision"] = DataFrame(
            {
                "answer": (positive > 0.5).astype(int),
                "loss": -np.log(np.where(labels[parts[2]], positive, 1 - positive)),
                "effect": 2 * config.reliability - 1,
            }
        )
        change = exchange_words(
            splits[2],
            back=tested["distance"] + 1,
            ids=encode(tested["other_word"], vocabulary),
            targets=1 - tested[["favourable"]].to_numpy(int),
        )
    return TaskData(
        *splits,
        sizes={"vocab_size": len(vocabulary), "output_dim": len(names) if len(names) > 2 else 1},
        preprocessing={
            "vocabulary": vocabulary,
            "labels": list(names),
            "max_words": config.max_words,
        },
        examples=tested.filter(["truth", "text", "distance"]),
        spell=names.take,
        change=change,
        ceilings=ceilings.copy,
        notes=notes,
    )


def build_corpus(config, seed, device=CPU):
    """A corpus, cut in three, encoded with the training part's vocabulary; raises InputError."""
    window = config.window
    if config.own:
        text = "\n".join(config.own.table["line"])
        corpus = DataFrame({"word": tokenize(text, WORDS_AND_ENDS)})
    else:
        corpus = generate_corpus(config, random_generator(seed, "corpus"))
    words = corpus["word"].tolist()

    # before windows: no target is shared
    parts = three_parts(len(words), 8 * (window + 1), "words", window)
    vocabulary = fit_vocabulary(words[parts[0]], config.vocab_size)
    ids = encode(words, vocabulary)
    splits, targets = window_splits(CorpusDataset, ids, parts, window, 1, device)
    test = splits[2]
    unknown = (test.targets == 1).float().mean().item()
    notes = []
    if unknown > 0.3:
        notes.append(f"{unknown:.0%} of the words of the test part are unknown or rare in training")

    tested = corpus.iloc[targets].reset_index(drop=True).rename(columns={"word": "truth"})
    tested["text"] = [" ".join(words[i - window : i]) for i in targets]
    ceilings = {}
    change = None
    if not config.own:
        change = exchange_words(
            test,
            back=tested["distance"],
            ids=encode(tested["other_subject"], vocabulary),
            targets=encode(tested["other_word"], vocabulary),
        )
        ceilings["full state"] = DataFrame(
            {
                "answer": encode(tested["likeliest"], vocabulary),
                "loss": tested["entropy"],
                "effect": tested["effect"],
            }
        )
    return TaskData(
        *splits,
        sizes={"vocab_size": len(vocabulary)},
        preprocessing={"vocabulary": vocabulary, "window": window},
        examples=tested.filter(["truth", "text", "distance"]),
        spell=pd.Index(list(vocabulary)).take,
        change=change,
        ceilings=ceilings.copy,
        notes=notes,
    )


def build_series(config, seed, device=CPU):
    """A series, cut in three, in units of the RMS distance of training values from their windows'
    means.

    Of a short series the windows are a tenth, but hold a year of months; raises InputError.
    """
    rng = random_generator(seed, "series")
    table = config.own.table if config.own else generate_series(config, rng)
    values = np.array(table["value"], float)
    window = min(config.window, max(12, len(values) // 10))
    notes = []
    if window < config.window:
        notes.append(
            f"{len(values):,} values are few: windows of {window} steps in place of {config.window}"
        )

    # before windows: no target is shared
    parts = three_parts(len(values), 36, "values", window)
    train_values = values[parts[0]]
    step = math.ceil(len(values) / MOST_WINDOWS)
    rows = torch.as_tensor(train_values).unfold(0, window + 1, step)  # (N, T + 1)
    from_mean = rows - rows[:, :-1].mean(dim=1, keepdim=True)
    unit = from_mean.square().mean().sqrt().item()
    offset = float(train_values.mean())
    scaled = (values - offset) / (unit or math.nan)  # a unit of 0 is refused below
    if not np.abs(scaled).max() < 1e15:
        raise InputError(
            "constant over its first 70 %, the training part, or too large in the rest"
        )
    # a short series can spare no window
    stride = min(config.stride, math.ceil((len(train_values) - window) / 1000))
    splits, targets = window_splits(SeriesDataset, scaled, parts, window, stride, device)
    test = splits[2]

    # one value of each window is shifted, at another lag from window to window
    lags = np.resize(LAGS, len(test)).clip(max=window)
    shift = torch.zeros_like(test.inputs)
    shift[range(len(test)), window - lags] = SHIFT
    # as a batch of a SeriesDataset, but without the mean of the window as it was: else every value
    # would be shifted a little
    shifted = SequenceDataset(centred(test.inputs) + shift, test.targets - test.inputs[:, -1])
    examples = DataFrame({"truth": values[targets], "step": targets + 1, "lag": lags})
    if not config.own:
        examples["distance"] = table["distance"].to_numpy()[targets]

    def ceilings():
        before, after = (
            (best_forecasts(part[:, :, 0] * unit + offset, config) - offset) / unit
            for part in (test.inputs, test.inputs + shift)
        )
        effect = (after - before).abs() / SHIFT
        return {"exact filter": value_answers(before, test).assign(effect=effect.numpy())}

    return TaskData(
        *splits,
        sizes={"input_dim": 1, "output_dim": 1},
        preprocessing={"mean": offset, "std": unit, "window": window},
        examples=examples,
        change=Change(range(len(test)), test, shifted),
        spell=lambda answers: values[targets - 1] + unit * answers,
        ceilings=dict if config.own else ceilings,
        notes=notes,
        unit=unit,
    )


class Metric(NamedTuple):
    """A number to report: the mean over the test examples of what `of` gives for each."""

    label: str  # for axes and tables
    of: Callable  # a table with truth, answer and loss -> (N,)
    sign: int = -1  # 1 if higher is better
    scale: float = 1.0  # 100 for per cent


def error_of(examples):
    """By how much each answer differs from the truth."""
    return (examples["answer"] - examples["truth"]).astype(float)


METRICS = {
    "accuracy": Metric(
        "accuracy (%)",
        lambda examples: (examples["answer"] == examples["truth"]).astype(float),
        sign=1,
        scale=100,
    ),
    "loss": Metric("cross-entropy (nats)", lambda examples: examples["loss"]),
    "mse": Metric("MSE (series units²)", lambda examples: error_of(examples) ** 2),
    "mae": Metric("MAE (series units)", lambda examples: error_of(examples).abs()),
}


def rise_in_probability(before, after):
    """By how much the probability of the targets rises where the examples call for them: (N,)."""
    return np.exp(-after["loss"]) - np.exp(-before["loss"])


def is_right(answer, target):
    """1 where an answer (B,) is the target, (B,) or (B, 1), else 0."""
    return (answer == target.flatten()).float()


class Task(NamedTuple):
    """All that differs between the three tasks; the defaults are for answers that are ids."""

    name: str
    title: str
    question: str  # what the generated data ask, in a sentence or two
    option: str  # names a user's own data
    build_data: Callable  # (configuration, seed, device)
    baselines: Callable  # (task, data, configuration, seed)
    loss: Callable  # (output, target) -> (B,); its mean is minimised
    answer: Callable  # output -> (B,): ids or values
    metrics: Sequence = ("accuracy", "loss")  # the models are judged by the first
    score: Callable = is_right  # (answer, target) -> (B,); beside the loss in training
    score_name: str = "accuracy"
    # (evaluation before, after a change) -> (N,): how far the output follows the change
    effect: Callable = rise_in_probability


def label_loss(output, target):
    """Cross-entropy of a classifier's output (B, 1) or (B, K) with labels (B, 1): (B,)."""
    if output.shape[1] == 1:
        # at the nan of a model that diverges CUDA would end the process: it is put in afterwards
        loss = F.binary_cross_entropy(output.nan_to_num(0.5), target, reduction="none")
        return loss.masked_fill(output.isnan(), math.nan)[:, 0]
    return F.nll_loss(output.clamp_min(1e-30).log(), target[:, 0].long(), reduction="none")


CLASSIFIER = Task(
    name="classifier",
    title="Text classification",
    question="Is a film review positive? Only the writer's own last opinion counts: it may stand "
    "far before the end, and the opinions of others may follow.",
    option="reviews",
    build_data=build_reviews,
    baselines=review_baselines,
    loss=label_loss,
    answer=lambda output: label_probabilities(output).argmax(dim=1),
)
PREDICTOR = Task(
    name="predictor",
    title="Next-word prediction",
    question="Which word comes next? Verbs and objects depend on a subject up to nine words back, "
    "past other nouns.",
    option="corpus",
    build_data=build_corpus,
    baselines=corpus_baselines,
    loss=partial(F.cross_entropy, reduction="none"),
    answer=lambda output: output[:, 2:].argmax(dim=1) + 2,  # <pad> and <unk> are no words
)
FORECASTER = Task(
    name="forecaster",
    title="Time-series forecasting",
    question="What is the next value of two noisy sine waves whose periods switch at random?",
    option="series",
    build_data=build_series,
    baselines=series_baselines,
    metrics=("mse", "mae"),
    loss=lambda output, target: F.mse_loss(output, target, reduction="none")[:, 0],
    answer=lambda output: output[:, 0],
    score=lambda answer, target: (answer - target[:, 0]).abs(),
    score_name="mae",
    effect=lambda before, after: (after["answer"] - before["answer"]).abs() / SHIFT,
)
TASKS = {task.name: task for task in (CLASSIFIER, PREDICTOR, FORECASTER)}


def model_arguments(config, data):
    """The constructor arguments of a model: from the configuration and from the data."""
    names = ("embed_dim", "hidden_dim", "n_layers", "dropout")
    return data.sizes | {name: value for name, value in vars(config).items() if name in names}


def build_model(task, cell, config, data, seed):
    """A fresh model, such as LSTMClassifier, its weights drawn from the seed."""
    seed_torch(seed, "weights")
    return MODEL_CLASSES[cell + task.name.title()](**model_arguments(config, data))


# ======================================================================================
# Evidence
# ======================================================================================


def activation_bytes(model, task, inputs, targets):
    """Bytes that the forward pass keeps for the backward pass, the weights left out."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model(inputs), targets)
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def longest_batch(data, config):
    """A full batch of the longest examples that may occur: inputs and targets."""
    train = data.train
    targets = train.targets[: config.batch_size_for(len(train))]
    length = data.preprocessing.get("max_words") or data.preprocessing["window"]
    return train.inputs.new_ones(len(targets), length, *train.inputs.shape[2:]), targets


def count_parameters(model):
    """Trainable parameters of each part of the model that has any: embedding, recurrent, head."""
    counts = Counter()
    for name, weight in model.named_parameters():
        counts[name.partition(".")[0]] += weight.numel()
    return counts


def describe_layers(model, inputs):
    """The layers in the order in which `inputs` pass them: kind, settings, shape, weights."""
    layers = []

    def describe(module, _inputs, output):
        if module is model.recurrent or not list(module.children()):
            tensor = output[0] if isinstance(output, tuple) else output
            shape = ", ".join(map(str, tensor.shape[1:]))
            weights = sum(count_parameters(module).values())
            kind = re.sub(r", (b|i|padding)\w+=\w+|\w+_features=", "", repr(module))
            layers.append(f"{kind}\n→ (B, {shape})\n{weights:,} weights")

    with nn.modules.module.register_module_forward_hook(describe):  # hears of all modules
        model(inputs)
    return layers


def forecasts(model, data, shown=120, horizon=120):
    """Forecasts against the truth, in series units.

    First one step ahead, of the first `shown` test windows. Then free-running, `horizon` steps from
    up to 400 places: the forecasts from the first of them, and the mean squared error of all by
    the number of steps, beside that of persistence.
    """
    test = data.test
    window = test.inputs.shape[1]
    n = len(test.series) - window
    horizon = min(horizon, max(n // 2, 1))
    rows = test.series.unfold(0, window + horizon, math.ceil(n / 400))  # (O, T + horizon)
    windows = rows[:, :window, None]  # (O, T, 1)
    truth = rows[:, window:]  # (O, horizon)
    free = model.roll_forward(windows, horizon)  # (O, horizon)
    values = {
        "truth": test.targets[:shown, 0],
        "forecast": model.roll_forward(test.inputs[:shown], 1)[:, 0],
        "free_truth": truth[0],
        "free_forecast": free[0],
    }
    offset = data.preprocessing["mean"]
    found = {name: (each * data.unit + offset).tolist() for name, each in values.items()}
    for name, each in (("free_mse", free), ("persistence_mse", windows[:, -1])):
        found[name] = ((each - truth).square().mean(dim=0) * data.unit**2).tolist()
    return found


def effect_of_change(model, task, change):
    """How far the answers follow a change of what decides: a Series, by row of the test examples.

    A model that does not keep what was changed gives 0.
    """
    rows, before, after = change
    effect = task.effect(evaluate(model, task, before), evaluate(model, task, after))
    return effect.set_axis(rows)


# ======================================================================================
# Experiment
# ======================================================================================
# Here `run` is a Run, `experiment` an Experiment, `folder` the Path of the output folder.

BASELINES = "baselines"  # stands for a model where there is none to compare
# torchrun starts the same command several times, here and on other machines; each is a rank
IS_RANK = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if IS_RANK else 0
N_RANKS = int(os.environ["WORLD_SIZE"]) if IS_RANK else 1


class Run(NamedTuple):
    """A model of a task, or its baselines, on the data of a seed."""

    task: str
    model: str
    seed: int
    learning_rate: float | None = None  # the baselines have several
    weight_decay: float | None = None
    is_tuning: bool = False  # only to choose the learning rate: the test part stays shut

    def __str__(self):
        """What its record, runs/NAME.json, and its checkpoint, models/NAME.pt, are called."""
        name = f"{self.task}_{self.model}_seed{self.seed}"
        if self.is_tuning:
            return f"tuning/{name}_rate{self.learning_rate:g}_decay{self.weight_decay:g}"
        return name


class Experiment(NamedTuple):
    """What is asked for, and what all its runs share."""

    config: Mapping  # by task
    # learning rate, None where this command chooses it first, and weight decay, by (task, model)
    rates: Mapping
    seeds: Sequence
    folder: Path
    device: torch.device
    resume: bool = False
    workers: int = 1  # processes that train; one is this process itself


@lru_cache(maxsize=3)
def load_data(task, config, seed, device):
    """A seed's data, kept for other models; InputError names the user's file."""
    own = config.own
    try:
        data = TASKS[task].build_data(config, seed, device)
    except InputError as error:
        raise InputError(f"{own.name if own else task}: {error}") from error
    return replace(data, notes=[*own.notes, *data.notes]) if own else data


def log(text):
    """Print to stderr, over the bar of the main process; training needs nobody to listen."""
    with suppress(AttributeError, OSError, ValueError):
        over = "\r\x1b[K" if sys.stderr.isatty() else ""
        tqdm.write(f"{over}{text}\n", file=sys.stderr, end="", nolock=True)


def write_whole(path, content):
    """Write text or bytes so that the file is whole or absent; raises OSError."""
    temporary = path.with_name(f".{path.name}.{RANK}.tmp")
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- one run --------------------------------------------------------------------------


def plain_config(config):
    """A configuration as a record holds it: of a user's data the name and the digest."""
    return json.loads(json.dumps(vars(config), default=lambda own: f"{own.name} ({own.digest})"))


def as_lists(table):
    """The columns of a table as lists for JSON, which knows no nan."""
    return table.astype(object).where(table.notna(), None).to_dict("list")


def spelled(data, kind, tables):
    """Answers to the test examples as a record holds them, in the user's words and units.

    By name, as `tables` are.
    """
    found = {}
    for name, table in tables.items():
        answers = as_lists(table.assign(answer=data.spell(table["answer"])))
        found[name] = {"kind": kind, **answers}
    return found


def measure_model(model, run, config, data):
    """What the record of a run holds of its trained model."""
    task = TASKS[run.task]
    answers = evaluate(model, task, data.test)
    if data.change:
        answers["effect"] = effect_of_change(model, task, data.change)
    inputs, targets = longest_batch(data, config)
    return {
        "answers": spelled(data, "model", {run.model: answers}),
        "parts": count_parameters(model),
        "layers": describe_layers(model, inputs[:2]),
        "batch_size": len(inputs),
        "activation_bytes": activation_bytes(model, task, inputs, targets),
        "forecasts": forecasts(model, data) if hasattr(model, "roll_forward") else None,
    }


def trained_model(run, experiment, config, data):
    """The model of a run and its history; what a tuning run has trained is not trained again."""
    if experiment.rates[run[:2]][0] is None:
        # the same seed at the same rate; of a tuning run itself there is no record yet
        tried = run._replace(is_tuning=True)
        record = finished(tried, experiment.folder)
        if record:
            model = load_checkpoint(experiment.folder / f"models/{tried}.pt")
            return model.to(experiment.device), record["history"]
    task = TASKS[run.task]

    def log_epoch(row):
        all_set()  # ends this run if another rank has stopped
        log(
            f"{run}  epoch {row['epoch']:2d}  train/val loss {row['train_loss']:.4g}/"
            f"{row['validation_loss']:.4g} {task.score_name} "
            f"{row[f'train_{task.score_name}']:.4g}/{row[f'validation_{task.score_name}']:.4g}"
        )

    model = build_model(task, run.model, config, data, run.seed).to(experiment.device)
    history = fit(
        model,
        task,
        replace(data, test=None),
        config,
        run.learning_rate,
        run.seed,
        run.weight_decay,
        log_epoch,
    )
    return model, history


def train_run(run, experiment):
    """Do a run; when resuming, only if it is not finished.

    The model is written first, the record last: it says that all is there. A record holds the
    fields of Run, the configuration and the environment; of a model its history, answers, parts,
    layers and costs; of the baselines answers, the test examples and notes.
    Raises what training raises, InputError and OSError.
    """
    if experiment.resume and finished(run, experiment.folder):
        return
    path = experiment.folder / f"runs/{run}.json"
    path.unlink(missing_ok=True)  # an older one must not stand beside a newer model
    config = experiment.config[run.task]
    device = CPU if run.model == BASELINES else experiment.device
    prepare_device(device)
    data = load_data(run.task, config, run.seed, device)
    record = {
        **run._asdict(),
        "config": plain_config(config),
        "environment": {  # what else the numbers may depend on
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }
    if run.model == BASELINES:
        task = TASKS[run.task]
        baselines = spelled(data, "baseline", task.baselines(task, data, config, run.seed))
        record["answers"] = baselines | spelled(data, "ceiling", data.ceilings())
        record["examples"] = as_lists(data.examples)
        record["notes"] = data.notes
    else:
        model, record["history"] = trained_model(run, experiment, config, data)
        if not run.is_tuning:
            # the best validation weights are back: nothing is chosen by the test part, opened now
            record.update(measure_model(model, run, config, data))
        model.preprocessing = data.preprocessing
        content = checkpoint_bytes(model, model_arguments(config, data))
        write_whole(experiment.folder / f"models/{run}.pt", content)
    write_whole(path, json.dumps(record, default=np.generic.item))


# --- what is in a folder --------------------------------------------------------------


def read_record(path):
    """A record; an empty one if there is none that is whole."""
    with suppress(OSError, ValueError, TypeError):
        record = json.loads(path.read_text())
        if "environment" in record:
            return record
    return {}


def finished(run, folder):
    """The record of a run at this rate whose model is there, or None.

    `make_folder` has refused a folder with another configuration.
    """
    record = read_record(folder / f"runs/{run}.json")
    model = folder / f"models/{run}.pt"
    if run._asdict().items() <= record.items() and (run.model == BASELINES or model.exists()):
        return record


def read_records(folder, pattern="runs/*.json"):
    """The records of the runs in a folder, in the order of tasks, models and seeds."""
    order = [*TASKS, *CELLS, BASELINES]
    records = []
    for path in folder.glob(pattern):
        record = read_record(path)
        if record and {record["task"], record["model"]} <= {*order}:
            records.append(record)
        else:
            log(f"left out, not the whole record of a run: {path}")
    return sorted(records, key=lambda r: [*map(order.index, (r["task"], r["model"])), r["seed"]])


def make_folder(experiment):
    """Make the output directory.

    Raises OSError if that cannot be done, and InputError if it holds another configuration.
    """
    folder = experiment.folder
    for name in ("runs/tuning", "models/tuning", "predictions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for task, config in experiment.config.items():
        wanted = plain_config(config)
        for record in read_records(folder, f"runs/**/{task}_*.json"):  # of tuning as well
            for name, value in wanted.items():
                present = record["config"].get(name)
                if value != present:
                    raise InputError(
                        f"{folder} holds runs with another {name} ({present}, not {value}): "
                        "choose another --output-dir"
                    )


# --- several machines -----------------------------------------------------------------


@lru_cache
def rank_store():
    """The keys that torchrun keeps for all ranks."""
    return next(torch.distributed.rendezvous("env://"))[0]


def stop_ranks():
    """Make the other ranks stop; returns whether this one is the first to ask for it."""
    with suppress(RuntimeError):  # the keys have gone with the machine that kept them
        return N_RANKS == 1 or rank_store().add("stopped", 1) == 1


def all_set(*keys):
    """Whether all ranks have set their key; raises KeyboardInterrupt if one asks to stop."""
    if N_RANKS == 1:
        return True
    try:
        if rank_store().check(["stopped"]):
            raise KeyboardInterrupt
        return rank_store().check(keys)
    except RuntimeError as error:
        raise KeyboardInterrupt from error


def wait_for_ranks(step):
    """Wait until all ranks have come to this step."""
    if N_RANKS > 1:
        rank_store().set(f"{step} {RANK}", "")
    while not all_set(*(f"{step} {rank}" for rank in range(N_RANKS))):
        time.sleep(0.1)


# --- many runs ------------------------------------------------------------------------
# Which process does a run, and when, changes no number.


def end_with_parent():
    """In a new process of the pool: end when the main process has ended, whatever ended it."""

    def wait_for_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def started_runs(runs, experiment, bar):
    """Yields each run with a function that does it, or waits for it, and raises what ended it."""
    if experiment.workers == 1:
        for run in runs:
            yield run, partial(train_run, run, experiment)
        return
    pool = ProcessPoolExecutor(
        experiment.workers, multiprocessing.get_context("spawn"), end_with_parent
    )
    try:
        # the processes, which start now, inherit that Ctrl-C is ignored: it is for this one; and
        # large pages, for glibc: else a tenth of an LSTM's step on the reviews is page faults
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        tunables = os.environ.get("GLIBC_TUNABLES")
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        futures = {pool.submit(train_run, run, experiment): run for run in runs}
        if not tunables:
            del os.environ["GLIBC_TUNABLES"]
        signal.signal(signal.SIGINT, interrupt)
        while futures:
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                yield futures.pop(future), future.result
            bar.refresh()  # the workers' lines were written over it
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def train_runs(step, runs, experiment):
    """Do this rank's share of the runs, then wait until the other ranks have done theirs.

    A run that diverges, or needs more memory than the GPU has, costs the others nothing; other
    errors are raised.
    """
    runs = runs[RANK::N_RANKS]
    bar = tqdm(
        desc=step,
        total=len(runs),
        # None: only on a terminal
        disable=N_RANKS > 1 or None,
        leave=False,
        smoothing=0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
    )
    with bar, closing(started_runs(runs, experiment, bar)) as started:
        for n, (run, finish) in enumerate(started, 1):
            try:
                finish()
                log(f"{run}  done ({n} of {len(runs)})")
            except BrokenProcessPool as error:
                raise RunError(
                    "a process was killed, or out of memory: --resume does the rest"
                ) from error
            except (Diverged, MemoryError, torch.OutOfMemoryError) as error:
                log(f"failed: {run}: {first_line(error)}")
            bar.update()
    wait_for_ranks(f"{experiment.folder}: {step}")


def chosen_rates(runs, folder):
    """Rate and weight decay with the lowest mean validation loss, by (task, model).

    A run that failed counts as an infinite loss. The table of the runs is written into the folder.
    """
    losses = []
    for run in runs:
        record = read_record(folder / f"runs/{run}.json")
        losses.append(best_epoch(record["history"])["validation_loss"] if record else math.inf)
    table = DataFrame(runs).drop(columns="is_tuning").assign(val_loss=losses)
    chosen = {}
    for key, tried in table.groupby(["task", "model"]):
        chosen[key] = tried.groupby(["learning_rate", "weight_decay"])["val_loss"].mean().idxmin()
    table["chosen"] = [run.learning_rate == chosen[run[:2]][0] for run in runs]
    write_whole(folder / "pytorch_rnn_tuning.csv", table.to_csv(index=False))
    return chosen


def train_all(experiment):
    """Choose the learning rates where that is asked for, then train; returns how many failed."""
    seeds = experiment.seeds
    folder = experiment.folder
    rates = experiment.rates
    tuning = [
        Run(*key, seed, rate, decay, is_tuning=True)
        for key, (given, decay) in rates.items()
        for seed, rate in product(seeds, RATES)
        if given is None
    ]
    if tuning:
        train_runs("tuning", tuning, experiment)
        rates = rates | chosen_rates(tuning, folder)
    runs = [Run(task, BASELINES, seed) for task, seed in product(experiment.config, seeds)]
    runs += [Run(*key, seed, *pair) for (key, pair), seed in product(rates.items(), seeds)]
    # of each task first the baselines, which hold the test examples, then the models by name:
    # that leaves few cores idle at the end, for the GRU takes longest, and next words least
    runs.sort(key=lambda run: (run.task, run.model != BASELINES, run.model))
    records = [folder / f"runs/{run}.json" for run in runs]
    if RANK == 0 and not experiment.resume and any(record.exists() for record in records):
        log("finished runs are trained again; --resume would keep them")
    wait_for_ranks(f"{folder}: checked")
    train_runs("training", runs, experiment)
    return sum(not record.exists() for record in records)


# ======================================================================================
# Results
# ======================================================================================
# Tables are DataFrames. `examples`: `examples_table`; `scores`: `score_table`; `runs`: `run_table`.

KEYS = ["task", "model", "seed"]
MODEL_KEYS = KEYS[:2]
RUN_COLUMNS = """task model seed learning_rate parameters recurrent_parameters epochs best_epoch
    seconds val_loss test_loss test_accuracy test_mse test_mae""".split()
EXAMPLE_COLUMNS = """task seed name example kind answer loss effect truth text step distance
    lag""".split()
COST_COLUMNS = """task model parameters recurrent_parameters ms_per_step samples_per_second
    activation_bytes""".split()
# the 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def examples_table(records, known):
    """A row per test example and per model, baseline or ceiling; every score is a view of it.

    `known`: what is known of the test examples, by (task, seed); EXAMPLE_COLUMNS names it after
    `effect`.
    """
    tables = {}
    for record in records:
        key = record["task"], record["seed"]
        for name, answers in record["answers"].items():
            tables[*key, name] = DataFrame({**known[key], **answers})
    table = pd.concat(tables, names=EXAMPLE_COLUMNS[:4]).reset_index()
    return table.reindex(columns=EXAMPLE_COLUMNS).astype({"step": "Int64"})


def score_table(examples):
    """What each model, baseline and ceiling scores: task, name, kind, seed, metric, value."""
    parts = []
    for task, table in examples.groupby("task", sort=False):
        for name in dict.fromkeys([*TASKS[task].metrics, "loss"]):
            parts.append(table.assign(metric=name, value=METRICS[name].of(table)))
    keys = "task name kind seed metric".split()
    return pd.concat(parts).groupby(keys, sort=False)["value"].mean().reset_index()


def summarise(scores):
    """Mean and standard deviation over seeds: task, name, kind, metric, mean, std, n."""
    values = scores.groupby("task name kind metric".split(), sort=False)["value"]
    return values.agg(mean="mean", std="std", n="count").reset_index()


def run_table(records, scores):
    """A row per trained model: its record, and what is counted from it.

    Losses are those that training minimised: of scaled values in the forecaster.
    """
    tested = scores.pivot_table("value", ["task", "name", "seed"], "metric")
    tested = tested.reindex(columns=METRICS).add_prefix("test_")
    rows = []
    for record in records:
        history = DataFrame(record["history"])
        best = best_epoch(record["history"])
        ms_per_step = history["ms_per_step"].median()
        own = record["config"]["own"]
        title = TASKS[record["task"]].title
        rows.append(
            {
                **record,
                "title": f"{title}: {own.rpartition(' (')[0]}" if own else title,
                "parameters": sum(record["parts"].values()),
                "recurrent_parameters": record["parts"]["recurrent"],
                "epochs": len(history),
                "best_epoch": best["epoch"],
                "val_loss": best["validation_loss"],
                "seconds": round(history["seconds"].sum(), 1),
                "ms_per_step": round(ms_per_step, 2),
                "samples_per_second": round(record["batch_size"] * 1000 / ms_per_step),
            }
        )
    return DataFrame(rows).join(tested, KEYS)


def predictions_table(examples):
    """A row per test example of a task and seed: the truth and the answers of all, side by side."""
    known = ["example", "truth", "text", "step"]
    table = examples.pivot(index=known, columns="name", values="answer").reset_index(known[1:])
    return table.dropna(axis="columns", how="all")


# --- differences ----------------------------------------------------------------------


def t_quantile(n_seeds):
    """By how many standard errors a 95 % interval reaches; of more than ten seeds a little wide."""
    return T_QUANTILES[min(n_seeds, 10) - 2]


def paired_difference(a, b):
    """Mean of a - b by seed, and the ends of the 95 % interval of its mean, nan for one seed.

    `a` and `b`: a quantity of each test example, by (seed, example). Data, weights and order of the
    batches are drawn anew with each seed, so the spread between seeds says how far other seeds
    would move the difference (Student's t). The interval is no narrower than the test examples
    alone leave it, for two or three seeds may agree by chance.
    """
    differences = (a - b).dropna().unstack("seed")  # a row per example, a column per seed
    by_seed = differences.mean()
    error = np.max([by_seed.sem(), differences.mean(axis=1).sem()])  # nan for one seed
    half = t_quantile(len(by_seed)) * error
    return by_seed, by_seed.mean() - half, by_seed.mean() + half


def compare(examples):
    """Paired differences a - b of each two models, and of each with the best baseline.

    By the first metric of each task. `wins`: the seeds on which a is better; `verdict`: who is, if
    the interval leaves out 0, else undecided; none on one seed.
    """
    rows = []
    for task, table in examples.groupby("task", sort=False):
        name = TASKS[task].metrics[0]
        sign = METRICS[name].sign
        values = METRICS[name].of(table.set_index(["seed", "example", "name"])).unstack()
        names = table.groupby("kind")["name"].unique()
        models = names.get("model", ())  # none if each failed
        best = (sign * values[names["baseline"]].mean()).idxmax()
        for a, b in [*combinations(models, 2), *product(models, [best])]:
            by_seed, low, high = paired_difference(values[a], values[b])
            wins = f"{(sign * by_seed > 0).sum()} of {len(by_seed)}"
            verdict = "undecided" if len(by_seed) > 1 else ""
            if low > 0 or high < 0:
                verdict = f"{a if sign * low > 0 else b} better"
            rows.append((task, name, a, b, by_seed.mean(), low, high, wins, verdict))
    return DataFrame(rows, columns="task metric a b difference low high wins verdict".split())


def unlearnt(runs, scores):
    """The runs of a task whose test loss is nearer to that of a baseline that ignores the input
    than to the median of their model, on three seeds or more.
    """
    blind = scores.query(
        "task in @runs.task and metric == 'loss' and "
        "name in ['majority class', 'unigram', 'persistence']"
    )
    of_model = runs.groupby("model")["test_loss"]
    runs = runs.assign(
        blind=blind["value"].mean(),
        median=of_model.transform("median"),
        seeds=of_model.transform("size"),
    )
    return runs.query("seeds > 2 and abs(test_loss - blind) < abs(test_loss - median)")


# --- by distance ----------------------------------------------------------------------

# by task: what `distance` is for scores; what it, or `lag`, is for effects of a change; the lower
# ends of the intervals; what the effect is
DISTANCES = {
    "classifier": (
        "words after the opinion that counts",
        "words after the opinion that counts",
        (0, 10, 25, 50, 100),
        "rise in probability of the new label\nif that opinion is reversed",
    ),
    "predictor": (
        "words back to the subject",
        "words back to the subject",
        (2, 4, 5, 6, 7, 8),
        "rise in probability of the new favourite\nif the subject is exchanged",
    ),
    "forecaster": (
        "steps since a period switched",
        "steps back to the shifted value",
        (0, *LAGS),
        "shift of the forecast, as a share\nof the shift of one value",
    ),
}


def distance_tables(examples):
    """Scores, then effects of a change, by how far back what decides lies.

    Rows of task, axis labels x and y, and a table with a row per interval and a column per name and
    kind; only tables that hold something.
    """
    tables = []
    for value, (task, table) in product(("score", "effect"), examples.groupby("task", sort=False)):
        score_label, x_label, edges, y_label = DISTANCES[task]
        metric = METRICS[TASKS[task].metrics[0]]
        distance = table["lag"].fillna(table["distance"])
        if value == "score":
            distance = table["distance"]
            x_label = score_label
            y_label = metric.label
        table = table.assign(
            score=metric.scale * metric.of(table),
            start=pd.cut(distance, [*edges, math.inf], right=False, labels=edges),
        )
        means = table.pivot_table(value, "start", ["name", "kind"], observed=True, sort=False)
        if len(means):
            tables.append((task, f"{x_label} (from)", y_label, means.sort_index()))
    return tables


# --- for people -----------------------------------------------------------------------

NOTES = """\
The same training for all cells, each at its own learning rate and weight decay. Each seed draws its
own data, or the splits of a user's reviews; a user's text or series is always cut at the same
places. Results are those on the test part, mean ± standard deviation over the seeds. A ceiling is
the best that is possible on generated data: two models that reach it cannot be told apart by this
task. A difference is the mean over the seeds of a - b, by the first score; low and high are the
ends of its 95 % interval, wins the seeds on which a is better. Of twenty such intervals one is
wrong by chance. Seeds needed is an estimate of how many would decide what is undecided. Seconds are
those of training and validation, times of a step those of training alone, with other runs beside
it."""


# to three digits, without an exponent
digits = partial(np.format_float_positional, precision=3, fractional=False, trim="-")


def show(mean, std):
    """A number with two digits of its spread; without a spread, three digits."""
    if not std > 1e-9 * abs(mean):  # nan on one seed
        return digits(mean)
    places = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{places}f} ± {std:.{places}f}"


def summary_table(task, summary):
    """The results of a task for people: a row per name, a column per metric."""
    table = summary.query("task == @task")[["name", "kind"]].drop_duplicates()
    for metric in TASKS[task].metrics:
        rows = summary.query("task == @task and metric == @metric")
        scaled = METRICS[metric].scale * rows[["mean", "std"]]
        table[METRICS[metric].label] = [show(*row) for row in scaled.to_numpy()]
    return table


def verdict_table(comparisons, n_seeds):
    """The differences of a task for people.

    Where they are undecided, how many seeds it would take: by then two standard errors are less
    than the difference, if that stays as it is.
    """
    metric = METRICS[comparisons["metric"].iloc[0]]
    table = comparisons.drop(columns=["task", "metric"])
    table[["difference", "low", "high"]] *= metric.scale
    two_errors = (table["high"] - table["low"]) / t_quantile(n_seeds)
    needed = n_seeds * (two_errors / table["difference"]) ** 2
    needed = needed.clip(n_seeds + 1, 100).round()
    table["seeds needed"] = needed.where(table["verdict"] == "undecided")
    return table.rename(columns={"difference": f"a - b: {metric.label}"})


# what textbooks say, by column of `run_table`
CLAIMS = {
    "ms_per_step": "GRU < LSTM",
    "best_epoch": "LSTM < GRU < RNN",
    "test_accuracy": "RNN < GRU < LSTM",
    "test_mse": "LSTM < GRU < RNN",
}


def common_claims(runs):
    """What is commonly said of the cells, the means that were measured, and whether it holds.

    Of each two neighbours in an order: it does if the 95 % interval of their paired difference lies
    above 0, it does not if that lies below, over the seeds on which all cells named were trained.
    """
    rows = []
    for column, order in CLAIMS.items():
        values = runs.pivot(index=["task", "seed"], columns="model", values=column)
        values = values.reindex(columns=order.split(" < ")).dropna()
        for task, own in values.groupby("task"):
            gaps = own.diff(axis=1).iloc[:, 1:]  # between neighbours
            half = t_quantile(len(gaps)) * gaps.sem()  # of the interval
            decided = [gaps.mean() > half, gaps.mean() < -half]
            holds = ", ".join(np.select(decided, ["yes", "no"], "not decided"))
            means = ", ".join(own.mean().map(digits))
            rows.append((column, task, order, means, holds))
    return DataFrame(rows, columns=["what", "task", "said", "measured", "holds"])


def findings(results, records):
    """What was found, for page and terminal: heading -> sentences and tables."""
    notes = dict.fromkeys(note for record in records for note in record.get("notes", ()))
    report = {"Notes on the data": list(notes)} if notes else {}
    for (task, title), runs in results.runs.groupby(["task", "title"], sort=False):
        n_tested = results.examples.query("task == @task")["example"].nunique()
        text = f"{n_tested:,} examples were tested on each seed."
        if title == TASKS[task].title:  # the data are the generated
            text = f"{TASKS[task].question} {text}"
        report[title] = [
            text,
            summary_table(task, results.summary),
            verdict_table(results.comparisons.query("task == @task"), runs["seed"].nunique()),
            *[
                f"{run.model}, seed {run.seed}: did not learn what its other seeds did."
                for run in unlearnt(runs, results.scores).itertuples()
            ],
        ]
    return report


def details(results, records):
    """The long tables of the report."""
    training = "learning_rate weight_decay best_epoch epochs seconds ms_per_step".split()
    means = results.runs.groupby(MODEL_KEYS, sort=False)[training].mean()
    parts = [
        "Training, mean over the seeds; on a CPU PyTorch has a fused kernel for the LSTM only",
        means.reset_index(),
    ]
    for task, x_label, y_label, table in distance_tables(results.examples):
        parts += [
            f"{TASKS[task].title}: {' '.join(y_label.split())}, by {x_label}",
            table.T.reset_index(),
        ]
    claims = common_claims(results.runs)
    if len(claims):
        parts += [
            "What is commonly said, the means of the cells in that order, and whether it holds",
            claims,
        ]
    environments = DataFrame(record["environment"] for record in records)
    return [*parts, environments.drop_duplicates(), NOTES]


# ======================================================================================
# Figures
# ======================================================================================


class Results(NamedTuple):
    """What `run` returns, and what the figures are made from."""

    runs: DataFrame  # a row per trained model
    history: DataFrame  # a row per run and epoch
    scores: DataFrame  # a row per task, name, kind, seed and metric
    summary: DataFrame  # a row per task, name, kind and metric: mean and deviation over seeds
    comparisons: DataFrame  # a row per difference
    examples: DataFrame  # a row per test example and per model, baseline or ceiling
    tuning: DataFrame  # a row per run of the choice of learning rates
    figures: Mapping = {}  # by the names of their files, without what all begin with
    failed: int = 0  # how many runs and files failed; each was named


GREY = "#777777"
STYLE = {  # where it differs from matplotlib's defaults
    "figure.constrained_layout.use": True,
    "legend.fontsize": "small",
    "text.parse_math": False,  # names of labels and files may hold dollars
}


def colour(name):
    """The colour of a model, the same in every figure; grey for all else."""
    return CELLS[name].colour if name in CELLS else GREY


def new_figure(rows, columns, width, height, **options):
    """A figure and its axes (rows, columns), each so many inches wide and high."""
    figure = Figure((max(columns * width, 7.6), rows * height + 0.6))  # titles need room
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def use_factors(axes):
    """A logarithmic x axis with plain numbers at 1 and 3 of every decade."""
    axes.set_xscale("log")
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}")
    axes.minorticks_off()


def dot_panel(axes, values, label):
    """A row per name of the index: a dot for each value, and a bar at their mean."""
    for name, own in values.groupby(level=0, sort=False):
        axes.plot(own, own.index, ".", color=colour(name))
        axes.plot(own.mean(), name, "|", color=colour(name), markersize=10)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid()


def history_figure(results, task):
    """Loss and score by epoch: a column per model, a line per seed."""
    history = results.history.query("task == @task").set_index("epoch")
    if history.empty:
        return None
    models = history.groupby("model", sort=False)
    figure, grid = new_figure(2, len(models), 3.5, 2.5, sharex=True, sharey="row")
    panels = product(("loss", TASKS[task].score_name), models)
    for (name, (model, runs)), axes in zip(panels, grid.flat):
        for _, run in runs.groupby("seed"):
            kept = [run["validation_loss"].argmin()]  # the epoch whose weights were kept
            axes.plot(run[f"train_{name}"], ":", color=colour(model))
            axes.plot(run[f"validation_{name}"], "o-", color=colour(model), markevery=kept)
        # by validation: training that begins with an explosion must not flatten the others
        shown = history[f"validation_{name}"]
        axes.set(title=model, xlabel="epoch", ylabel={"mae": "MAE (series units)"}.get(name, name))
        axes.set_ylim(0.9 * shown.min(), 1.1 * shown.max())
    return figure


FORECASTS = (  # the panels of a model: what is drawn in grey and in colour, and the axis labels
    ("truth", "forecast", "test example, forecast one step ahead", "value (series units)"),
    ("free_truth", "free_forecast", "steps ahead, forecasts fed back", "value (series units)"),
    ("persistence_mse", "free_mse", "steps ahead, mean over all starts", "MSE (series units²)"),
)


def forecasts_figure(results):
    """Forecasts and truth, one step ahead and free-running, and the latter's error by steps."""
    runs = results.runs.query("task == 'forecaster'").drop_duplicates("model")
    if runs.empty:
        return None
    figure, grid = new_figure(len(runs), 3, 4.7, 2.3, sharey="col")
    for run, row in zip(runs.itertuples(), grid):
        for (grey, coloured, x_label, y_label), axes in zip(FORECASTS, row):
            steps = range(1, len(run.forecasts[grey]) + 1)
            axes.plot(steps, run.forecasts[grey], ".", color=GREY)
            axes.plot(steps, run.forecasts[coloured], color=colour(run.model))
            axes.set(title=run.model, xlabel=x_label, ylabel=y_label)
    return figure


def parameters_figure(results):
    """Parameters by part, each model of each task."""
    tasks = results.runs.drop_duplicates(MODEL_KEYS).groupby("title", sort=False)
    figure, grid = new_figure(1, len(tasks), 4.6, 3.4)
    for (title, runs), axes in zip(tasks, grid.flat):
        for run in runs.itertuples():
            names = [f"{run.model} {part}" for part in run.parts]
            bars = axes.barh(names, run.parts.values(), color=colour(run.model))
            axes.bar_label(bars, fmt=" {:,.0f}")
        axes.invert_yaxis()
        axes.set(title=title, xlabel="parameters", xticks=[], xmargin=0.3)
    return figure


def architectures_figure(results):
    """A box per model: its layers from input to output, with settings, output shape and weights."""
    runs = results.runs.drop_duplicates(MODEL_KEYS)
    figure, grid = new_figure(runs["task"].nunique(), runs["model"].nunique(), 2.7, 3.6)
    for run, axes in zip(runs.itertuples(), grid.flat):
        axes.text(0.5, 0.5, "\n↓\n".join(run.layers), ha="center", va="center")
        axes.set(title=f"{run.model} {run.task}", xticks=[], yticks=[])
    return figure


def performance_figure(results):
    """A row per task: test metric with baselines and ceiling, training time, step, memory."""
    tasks = results.runs.groupby("task", sort=False)
    figure, grid = new_figure(len(tasks), 4, 4, 2.5)
    costs = {
        "seconds": "training (s per run)",
        "ms_per_step": "step of training (ms)",
        "activation_bytes": "activations of a batch (bytes)",
    }
    for (task, runs), (test, *panels) in zip(tasks, grid):
        first = TASKS[task].metrics[0]
        metric = METRICS[first]
        scores = results.scores.query("task == @task and metric == @first").set_index("name")
        values = metric.scale * scores["value"]
        dot_panel(test, values, f"test {metric.label}")
        ceiling = values[scores["kind"] == "ceiling"].mean()  # nan of a user's own data: no line
        test.axvline(ceiling, color=GREY, linestyle="--")
        test.set_title(runs["title"].iloc[0])
        if metric.sign < 0:  # errors differ by factors
            use_factors(test)
        for (column, label), axes in zip(costs.items(), panels):
            dot_panel(axes, runs.set_index("model")[column], label)
            axes.set_xlim(0)
    return figure


def learning_rates_figure(results):
    """Validation loss by rate: each run, and the mean over the seeds."""
    if results.tuning.empty:
        return None
    tasks = results.tuning.groupby("task", sort=False)
    figure, grid = new_figure(1, len(tasks), 4.2, 3.4)
    for (task, runs), axes in zip(tasks, grid.flat):
        for model, own in runs.groupby("model", sort=False):
            axes.plot(own["learning_rate"], own["val_loss"], ".", color=colour(model))
            means = own.groupby("learning_rate")["val_loss"].mean()
            chosen = [means.argmin()]
            axes.plot(means, "o-", color=colour(model), label=model, markevery=chosen)
        use_factors(axes)
        axes.set(title=TASKS[task].title, xlabel="learning rate", ylabel="validation loss")
        axes.legend()
    return figure


def errors_figure(results):
    """The confusion matrix of each classifier, in per cent of each true label, over all seeds."""
    examples = results.examples.query("task == 'classifier' and kind == 'model'")
    if examples.empty:
        return None
    models = examples.groupby("name", sort=False)
    size = 0.6 * examples["truth"].nunique() + 1.4
    figure, grid = new_figure(1, len(models), size + 0.9, size)
    for (model, own), axes in zip(models, grid.flat):
        shares = 100 * pd.crosstab(own["truth"], own["answer"], normalize="index")
        shares = shares.reindex(columns=shares.index, fill_value=0)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=200)  # text stays readable
        for (truth, answer), share in np.ndenumerate(shares):
            axes.text(answer, truth, f"{share:.0f}", ha="center", va="center")
        ticks = range(len(shares))
        axes.set_xticks(ticks, shares.index, rotation=30)
        axes.set_yticks(ticks, shares.index)
        axes.set(title=model, xlabel="predicted label", ylabel="true label")
    return figure


def long_range_figure(results):
    """What is kept over distance: scores, and effects of a change; only panels with data."""
    tables = distance_tables(results.examples)
    if not tables:
        return None
    columns = len({task for task, *_ in tables})
    rows = math.ceil(len(tables) / columns)
    figure, grid = new_figure(rows, columns, 4.6, 3.8)
    for (task, x_label, y_label, table), axes in zip(tables, grid.flat):
        for ((name, kind), values), marker in zip(table.items(), cycle("osD^vP*X")):
            line = {"model": "-", "ceiling": "--"}.get(kind, ":")
            axes.plot(values, marker + line, color=colour(name), label=name)
        axes.set(title=TASKS[task].title, xlabel=x_label, ylabel=y_label, xticks=table.index)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


FIGURES = {  # in the order of the page: what draws it or nothing, its title, what to look for
    "performance_summary": (
        performance_figure,
        "Test scores and costs (dot: a seed; bar: their mean; dashed: the best that is possible)",
        "How well each model does beside the baselines, and what a run costs. Dots that lie apart "
        "are seeds that disagree: of that no single run tells. Times compare kernels as much as "
        "cells: on a CPU PyTorch has a fused one for the LSTM only.",
    ),
    "long_range": (
        long_range_figure,
        "By distance: test score, and how far the answer follows a change",
        "Which model remembers. Where a line of the effects is near 0 the model ignores what "
        "decides; at the ceiling it makes full use of it.",
    ),
    "time_series_predictions": (
        forecasts_figure,
        "Forecasts (lines) and truth (dots) of the first seed; errors beside persistence (grey)",
        "On the left each forecast is made from true values. In the middle forecasts are fed back, "
        "and errors add up: on the right by how much.",
    ),
    "classifier_errors": (
        errors_figure,
        "Text classification: predicted label, in % of each true label",
        "Which labels are taken for which, over all seeds. What is right is on the diagonal.",
    ),
    **{
        f"{task}_training_history": (
            partial(history_figure, task=task),
            f"{TASKS[task].title}: training (dotted), validation (solid), weights kept (dot)",
            "A line per seed. Where the solid line rises and the dotted one falls on, the model "
            "learns its training data by heart; kept are the weights before that.",
        )
        for task in TASKS
    },
    "learning_rates": (
        learning_rates_figure,
        "Learning rates by validation loss: runs (dots), means (lines), the chosen (large dots)",
        "Where a large dot is at the edge of the grid, the best rate may lie beyond it.",
    ),
    "parameter_counts": (
        parameters_figure,
        "Parameters by part, of the first seed",
        "A GRU's recurrent layer holds three times the weights of an RNN's, an LSTM's four times.",
    ),
    "architectures": (
        architectures_figure,
        "Architectures, drawn from the live models of the first seed (B: batch)",
        "The models of a task differ in their recurrent layer alone.",
    ),
}

# --- the report -----------------------------------------------------------------------

PAGE_HEAD = """<!DOCTYPE html><meta charset="utf-8"><title>RNN, LSTM, GRU</title><style>
body { font: 16px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; text-align: left; border: 0 }
tr { border-bottom: 1px solid #ddd } img { max-width: 100% }
</style>"""


def draw_figures(results):
    """Figures by name, pictures (name, PNG, hint) for the page, and how many could not be drawn:
    one must not cost the others.
    """
    figures = {}
    pictures = []
    failed = 0
    for name, (draw, title, hint) in FIGURES.items():
        content = io.BytesIO()
        try:
            with rc_context(STYLE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # no font has the letters of all scripts
                figure = draw(results)
                if figure:
                    figure.suptitle(title)
                    figure.savefig(content, format="png")
                    figures[name] = figure
                    pictures.append((name, content.getvalue(), hint))
        except Exception as error:
            failed += 1
            log(f"failed: the figure {name} could not be drawn: {first_line(error)}")
    return figures, pictures, failed


def page_and_markdown(report):
    """A report, heading -> texts, tables and pictures (name, PNG, hint), as HTML page and as
    Markdown.
    """
    page = PAGE_HEAD
    markdown = ""
    for heading, parts in report.items():
        page += f"\n<h2>{html.escape(heading)}</h2>"
        markdown += f"\n## {heading}\n"
        for part in parts:
            if isinstance(part, DataFrame):
                page += f"\n{part.to_html(index=False, na_rep='', float_format=digits)}"
                markdown += (
                    f"\n```\n{part.to_string(index=False, na_rep='', float_format=digits)}\n```\n"
                )
            elif isinstance(part, tuple):
                name, png, hint = part
                source = f"data:image/png;base64,{b64encode(png).decode()}"
                page += f"\n<p>{hint}</p>\n<img alt='{name}' src='{source}'>"
                markdown += f"\n{hint}\n\n![{name}](pytorch_rnn_{name}.png)\n"
            else:
                page += f"\n<p>{html.escape(part)}</p>"
                markdown += f"\n{part}\n"
    return page, markdown.lstrip()


def make_report(folder, failed=0):
    """Tables and figures from the records in `folder`; `failed` more runs were named before.

    Returns Results. Raises InputError or RunError where no run is finished.
    """
    records = read_records(folder)
    known = {(r["task"], r["seed"]): r["examples"] for r in records if "examples" in r}
    # a run without the record of its baselines, which holds the test examples, is left out
    records = [r for r in records if (r["task"], r["seed"]) in known]
    trained = [r for r in records if "history" in r]
    if not trained:
        raise (RunError if failed else InputError)(f"no run is finished in {folder}")
    examples = examples_table(records, known)
    scores = score_table(examples)
    tuning = folder / "pytorch_rnn_tuning.csv"
    results = Results(
        runs=run_table(trained, scores),
        history=pd.json_normalize(trained, "history", KEYS).set_index(KEYS).reset_index(),
        scores=scores,
        summary=summarise(scores),
        comparisons=compare(examples),
        examples=examples,
        tuning=pd.read_csv(tuning) if tuning.exists() else DataFrame(),
    )
    figures, pictures, broken = draw_figures(results)
    report = findings(results, records)
    _, found = page_and_markdown(report)
    report["Figures"] = pictures
    report["Details"] = details(results, records)
    page, markdown = page_and_markdown(report)
    files = {
        "pytorch_rnn_report.html": page,
        "pytorch_rnn_summary.md": markdown,
        "pytorch_rnn_runs.csv": results.runs[RUN_COLUMNS],
        "pytorch_rnn_history.csv": results.history,
        "pytorch_rnn_summary.csv": results.summary,
        "pytorch_rnn_comparisons.csv": results.comparisons,
        "pytorch_rnn_costs.csv": results.runs.drop_duplicates(MODEL_KEYS)[COST_COLUMNS],
        **{f"pytorch_rnn_{name}.png": png for name, png, _ in pictures},
    }
    for (task, seed), answers in examples.groupby(["task", "seed"]):
        # Excel takes a file without the mark for one that is not UTF-8
        table = predictions_table(answers).to_csv(index=False)
        files[f"predictions/{task}_seed{seed}.csv"] = f"\ufeff{table}"
    for name, content in files.items():
        if isinstance(content, DataFrame):
            content = content.to_csv(index=False)
        try:
            write_whole(folder / name, content)
        except OSError as error:  # open in a spreadsheet, or the disk is full
            broken += 1
            log(f"failed: {folder / name} could not be written: {error}")
    print(re.sub(r"\n+(```\n)?", "\n", found))
    print(f"The report: {(folder / 'pytorch_rnn_report.html').resolve()}")
    return results._replace(figures=figures, failed=failed + broken)


# ======================================================================================
# Command line
# ======================================================================================

# what each option is for; the numbers of the configuration are options as well
TEXT_OPTIONS = {
    "tasks": f"any of {' '.join(TASKS)}",
    "models": f"any of {' '.join(CELLS)}; default: {' '.join(DEFAULT_MODELS)}",
    "reviews": "your own CSV file: a column of texts and one of labels (.gz works too)",
    "corpus": "your own text file",
    "series": "your own CSV file: a column of numbers, in order of time",
    "text_column": "default: text, review, sentence or comment",
    "label_column": "default: label, sentiment, class, rating or stars",
    "series_column": "default: the only column of numbers",
    "device": "auto (default: CUDA if there is one, else CPU), cpu, cuda or mps",
    "output_dir": "default: outputs, or a folder below it",
}
SWITCHES = {
    "quick": "the whole pipeline on tiny data, two epochs",
    "tune": "choose learning rates first, by validation loss; default: for your own data alone",
    "resume": "keep the runs that are finished in the output directory",
    "report": "no training: tables, figures and page of the runs in the output directory",
}
NUMBER_OPTIONS = {
    "seeds": "default: 42 43 44; with --quick: 42",
    "workers": "runs at a time; default: as many as cores, 1 with --quick, a GPU or torchrun",
    "length": "with --predict: words or values to continue by; default: 20",
    "temperature": "with --predict: of words; 0 takes the likeliest; default: 1",
    "seed": "with --predict: of the words that are drawn; default: 42",
    "learning_rate": "of all models; default, or 0: each model's own",
    "weight_decay": "of all models; default: each model's own on reviews, else 0",
}


def check_list(name, values, choices=()):
    """The values of a list, each once, in the order of `choices`, or else from the lowest.

    Raises InputError if it is no list, is empty, or holds anything but `choices`.
    """
    found = {*values} if isinstance(values, Iterable) else {}
    if not found or (choices and found - {*choices}):
        raise InputError(f"{name} {values!r}: a list is needed, of {[*choices] or 'whole numbers'}")
    return [choice for choice in choices or sorted(found) if choice in found]


def choose_device(name):
    """The device of that name, if it is usable; "auto" is CUDA, or else the CPU; InputError."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun numbers the ranks of a machine
    if name == "auto":
        name = gpu if is_usable(gpu) else "cpu"
    if name == "cuda":
        name = gpu
    if not is_usable(name):
        raise InputError(f"device {name!r}: there is none here that works; choose another, or auto")
    return torch.device(name)


def configure(tasks, defaults, own, settings):
    """The configuration of each task from a user's own data, by option, and settings.

    Raises InputError if one belongs to none of the tasks.
    """
    config = {}
    unused = {*own, *settings}
    for name in tasks:
        option = TASKS[name].option
        numbers = {}
        for key, default in defaults[name].numbers().items():
            if key in settings:
                check_number(key, settings[key], default)
                numbers[key] = type(default)(settings[key])  # NumPy's are Python's from here on
        config[name] = replace(defaults[name], own=own.get(option), **numbers)
        unused -= {option, *numbers}
    if unused:
        raise InputError(f"{', '.join(sorted(unused))}: no setting of {', '.join(tasks)}")
    return config


def run(
    *,
    tasks=tuple(TASKS),
    models=DEFAULT_MODELS,
    seeds=None,
    quick=False,
    tune=None,
    learning_rate=None,
    weight_decay=None,
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
    **settings,
):
    """The experiment: train and compare; with `report` only tables and figures of what is there.

    The settings are the options of the command line, each number of the configuration included;
    `--help` says what each does, and what None stands for. Tasks, models and seeds are lists; files
    and `output_dir`, into which all is written, are paths or their names. In place of a file there
    may be data: `reviews` (texts, labels) or a data frame; `corpus` lines of text; `series` values
    (N,), also with times as their index. Returns `Results`. Raises InputError, RunError (no run
    came to its end, or a process was killed), OSError; SystemExit in the processes of torchrun but
    the first, which makes the report.
    """
    # what cannot be used is said before anything else
    tasks = check_list("tasks", tasks, TASKS)
    models = check_list("models", models, CELLS)
    if seeds is None:
        seeds = DEFAULT_SEEDS[:1] if quick else DEFAULT_SEEDS
    seeds = check_list("seeds", seeds)
    for seed in seeds:
        check_number("seeds", seed, 0)
    check_number("learning_rate", learning_rate or 0.1, 0.1)
    check_number("weight_decay", weight_decay or 0.1, 0.1)
    if tune and learning_rate:
        raise InputError("--tune cannot go together with --learning-rate")
    own = {}
    for option, given, columns in (
        ("reviews", reviews, (text_column, label_column)),
        ("corpus", corpus, ()),
        ("series", series, (series_column,)),
    ):
        if given is not None:
            own[option] = read_user_data(option, given, columns)
        elif any(columns):
            raise InputError(f"the name of a column goes with --{option} or --predict")
    config = configure(tasks, QUICK if quick else DEFAULT, own, settings)
    subfolder = "quick" if quick else "_".join(Path(data.name).stem for data in own.values())
    folder = Path(output_dir or f"outputs/{subfolder}")
    if report:
        return make_report(folder)

    device = choose_device(device)
    if workers is None:
        workers = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            workers = len(os.sched_getaffinity(0))  # of a cluster's cores those that are lent
        if quick or N_RANKS > 1 or device.type != "cpu":
            workers = 1
    check_number("workers", workers, 1)
    rates = {}
    for task, model in product(config, models):
        # chosen on generated data, rates are none for a user's own
        tunes = config[task].own and not quick if tune is None else tune
        cell = CELLS[model]
        rate = learning_rate or (None if tunes else cell.learning_rates[task])
        decay = cell.weight_decays.get(task, 0.0) if weight_decay is None else weight_decay
        rates[task, model] = rate, decay
    experiment = Experiment(config, rates, seeds, folder, device, resume, workers)
    threads = torch.get_num_threads()
    try:
        prepare_device(device)
        for task in config:
            # before any training: what is wrong with the data is said now
            notes = load_data(task, config[task], seeds[0], device).notes
            for note in notes if RANK == 0 else ():
                log(f"note: {note}")
        make_folder(experiment)
        failed = train_all(experiment)
    finally:
        torch.set_num_threads(threads)
    if RANK:
        raise SystemExit  # rank 0 makes the report
    return make_report(folder, failed)


# --- trained models in use ------------------------------------------------------------


def predict(
    checkpoint,
    source,
    length=20,
    temperature=1.0,
    seed=42,
    text_column="",
    series_column="",
    **others,
):
    """Print what a trained model says of a text or a file; raises InputError."""
    if others:
        raise InputError(f"{', '.join(others)}: cannot go together with --predict")
    check_number("length", length, 1)
    check_number("temperature", temperature, 1.0)
    check_number("seed", seed, 0)
    model = load_checkpoint(checkpoint)
    notes = []
    text = source
    kind = re.search(r"\.(csv|tsv|txt)(\.gz)?$", source.lower())  # of a file
    if kind or isinstance(model, Forecaster):
        text = read_text(source, notes)
    if isinstance(model, Forecaster):
        values = read_series(*parse_table(text), series_column, notes)
        forecasts = Series(model.predict(values, length), range(1, length + 1), name="value")
        answer = forecasts.to_csv(index_label="step")
    elif isinstance(model, Predictor):
        words = model.predict(text).round(3).to_string()
        answer = f"{words}\n\n{model.continue_text(text, length, temperature, seed)}"
    else:
        texts = text.splitlines()
        if kind and kind[1] != "txt":
            table, _ = parse_table(text)
            texts = list(find_column(table, text_column, TEXT_COLUMNS, "text"))
        answer = model.predict(texts).round(3).assign(text=texts).to_csv(index=False)
    for note in notes:
        log(f"note: {note}")
    print(answer)


# --- the program ----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors are raised: argparse's own would print the usage and end the interpreter."""

    def error(self, message):
        raise InputError(message)


def number(text):
    """A whole number, or else one with a point or an exponent; raises ValueError."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_args(argv=None):
    """The options, as they were given: those that were not are absent; raises InputError."""
    parser = Parser(
        argument_default=argparse.SUPPRESS,
        description=__doc__.partition("Where to begin")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    helps = TEXT_OPTIONS | SWITCHES | NUMBER_OPTIONS
    for task, config in DEFAULT.items():
        for name, value in config.numbers().items():
            helps[name] = f"{helps.get(name, 'default:')} {task} {value}"
    for name, text in helps.items():
        flag = f"--{name.replace('_', '-')}"
        if name in SWITCHES:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = str if name in TEXT_OPTIONS else number
            several = "+" if name in ("tasks", "models", "seeds") else None
            parser.add_argument(flag, type=kind, nargs=several, help=text)
    parser.add_argument(
        "--predict",
        nargs=2,
        metavar=("CHECKPOINT", "INPUT"),
        help="no training: what a trained model says of a text or a file",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line `argv` (default: the program's own); returns the exit status."""

    def terminate(number, _frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    if argv is None and "kernel_launcher" in sys.argv[0]:
        argv = []  # in a notebook the program's own are those of its kernel
    try:
        options = vars(parse_args(argv))
        if "predict" not in options:
            return 1 if run(**options).failed else 0
        files = options.pop("predict")
        predict(*files, **options)
        return 0
    except SystemExit:  # after --help, and of all ranks but 0
        return 0
    except (InputError, RunError, MemoryError, OSError) as error:
        status = 2 if isinstance(error, InputError) else 1
        message = first_line(error)
    except KeyboardInterrupt as stopped:
        status = 143 if stopped.args else 130  # of SIGTERM, or Ctrl-C
        message = "interrupted; finished runs are kept: --resume does the rest, --report shows them"
    except Exception:
        stop_ranks()
        raise
    # before torchrun starts ranks again, it ends those beside them by SIGTERM
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if (status == 143 and restarts) or stop_ranks():
        log(f"pytorch_rnn_models.py: {message:.300}")
    return status


if __name__ == "__main__":
    sys.exit(main())
