"""Vanilla RNN, LSTM and GRU compared on three tasks, each with its baselines and its ceiling.

    python pytorch_rnn_models.py                       the whole experiment, into outputs/
    python pytorch_rnn_models.py --quick               the same on tiny data, into outputs/quick/
    python pytorch_rnn_models.py --tasks predictor --models RNN GRU --seeds 7 8
    python pytorch_rnn_models.py --tasks classifier --reviews FILE.csv     on your own data
    python pytorch_rnn_models.py --resume              only the runs that are not finished
    python pytorch_rnn_models.py --report              tables and figures again, no training
    python pytorch_rnn_models.py --benchmark           what a training step costs
    python pytorch_rnn_models.py --predict outputs/models/predictor_GRU_seed42.pt "the sailor near the"
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
    models/TASK_MODEL_seedN.pt      its model: load_checkpoint(path).predict(...) uses it
    pytorch_rnn_benchmark.csv       with --benchmark only

Shapes in comments: B batch, T time steps, E embedding, F input features, H hidden units, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import gc
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import combinations
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
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
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

# ======================================================================================
# 2. Configuration
# ======================================================================================

DEFAULT_SEEDS = (42, 43, 44)


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found and what would be right."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_at_least_one(config: object, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is 1 or more."""
    for name in names:
        require(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it must be 1 or more")


LEAST_REVIEWS = 20  # that make three splits


def least_length(window: int) -> int:
    """How many words or values make three splits of which each has a window and what follows it."""
    return 8 * (window + 1)


@dataclass(frozen=True)
class Training:
    """How a model is trained: the same for RNN, LSTM and GRU within a task."""

    epochs: int = 30  # upper bound; early stopping may end sooner
    batch_size: int = 64  # examples per update
    accumulate_steps: int = 1  # micro-batches that a batch is cut into, to save memory; the update is the same
    learning_rate: float = 1e-3  # Adam's, at the start
    lr_factor: float = 0.5  # the rate is multiplied by this on a plateau of the validation loss
    lr_patience: int = 1  # epochs without improvement that are put up with; after one more the rate falls
    patience: int = 4  # epochs without improvement after which training ends
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
class OwnFile:
    """A user's file that takes the place of the generated data; `own_file` makes it."""

    path: str
    digest: str  # SHA-256 of its content: a run belongs to the content, wherever the file lies
    column: str = ""  # of a series; without it, the only numeric one


@dataclass(frozen=True)
class ClassifierConfig:
    """Text classification: the reviews, the model, its training. What each lever does: `generate_reviews`."""

    own: OwnFile | None = None  # takes the place of the generated reviews, which the next seven fields describe
    n_reviews: int = 5000
    phrases: tuple[int, int] = (10, 62)  # three-word phrases per review, least and most: 34 to 190 words, 86 on average
    opinion_rate: float = 0.33  # share of the phrases that state an opinion
    clarity: tuple[float, float] = (0.5, 0.86)  # range of a review's share of opinions that agree with its label
    negation_rate: float = 0.2  # share of the opinions put as the negation of the opposite
    name_rate: float = 0.16  # share of the other phrases that hold a surname, most of them rare
    verdict_reliability: float = 0.64  # how often the closing verdict agrees with the label
    vocab_size: int = 5000  # most frequent words of the training split, <pad> and <unk> included
    max_words: int = 200  # of a longer review the end is kept
    embed_dim: int = 50
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    training: Training = Training(learning_rate=3e-3, weight_decay=1e-4, lr_patience=2)

    def __post_init__(self) -> None:
        require_at_least_one(self, "max_words", "embed_dim", "hidden_dim", "n_layers")
        require(
            self.n_reviews >= LEAST_REVIEWS, f"n_reviews is {self.n_reviews}; three splits need {LEAST_REVIEWS} or more"
        )
        require(self.vocab_size >= 3, f"vocab_size is {self.vocab_size}; with <pad> and <unk> it must be 3 or more")


@dataclass(frozen=True)
class PredictorConfig:
    """Next-word prediction: the corpus, the model, its training. What each lever does: `generate_corpus`."""

    own: OwnFile | None = None  # takes the place of the generated corpus, which the next two fields describe
    n_words: int = 18_000
    favourite_rate: float = 0.7  # how often a subject takes its favourite verb, and its favourite object
    vocab_size: int = 5000  # as the classifier's
    window: int = 10  # words that the model sees before the one it predicts
    embed_dim: int = 50
    hidden_dim: int = 100
    n_layers: int = 1
    dropout: float = 0.2
    training: Training = Training(batch_size=256, learning_rate=8e-3, patience=3)

    def __post_init__(self) -> None:
        require_at_least_one(self, "window", "embed_dim", "hidden_dim", "n_layers")
        needed = least_length(self.window)
        require(self.n_words >= needed, f"n_words is {self.n_words}; windows of {self.window} need {needed} or more")
        require(self.vocab_size >= 3, f"vocab_size is {self.vocab_size}; with <pad> and <unk> it must be 3 or more")


@dataclass(frozen=True)
class ForecasterConfig:
    """Time-series forecasting: the series, the model, its training."""

    own: OwnFile | None = None  # takes the place of the generated series, which the next four fields describe
    n_steps: int = 4000
    periods: tuple[float, ...] = (9.1, 16.3, 35.7)  # steps; a window holds at least one whole cycle of each
    amplitudes: tuple[float, ...] = (0.5, 0.8, 1.0)
    noise: float = 0.3  # standard deviation of the white noise
    window: int = 50  # steps that the model sees before the one it predicts
    hidden_dim: int = 64
    n_layers: int = 2
    dropout: float = 0.0
    training: Training = Training(epochs=18, batch_size=128, learning_rate=5e-3, patience=5)

    def __post_init__(self) -> None:
        require_at_least_one(self, "hidden_dim", "n_layers")
        require(len(self.periods) == len(self.amplitudes), "periods and amplitudes must be of the same number")
        require(self.window >= 2, f"window is {self.window}; it must be 2 or more")
        needed = least_length(self.window)
        require(self.n_steps >= needed, f"n_steps is {self.n_steps}; windows of {self.window} need {needed} or more")


@dataclass(frozen=True)
class Config:
    """Every hyper-parameter of the experiment; a variant is `dataclasses.replace` of it."""

    classifier: ClassifierConfig = ClassifierConfig()
    predictor: PredictorConfig = PredictorConfig()
    forecaster: ForecasterConfig = ForecasterConfig()

    def with_epochs(self, epochs: int) -> Config:
        """The same experiment with another cap on the number of epochs."""
        return Config(**{k: replace(v, training=replace(v.training, epochs=epochs)) for k, v in vars(self).items()})


QUICK = Config(
    ClassifierConfig(n_reviews=200, phrases=(5, 15), training=Training(epochs=2)),
    PredictorConfig(n_words=1500, training=Training(epochs=2)),
    ForecasterConfig(n_steps=1100, hidden_dim=16, training=Training(epochs=2)),
)

# ======================================================================================
# 3. Data
# ======================================================================================

PAD, UNK = "<pad>", "<unk>"  # the words of id 0 and id 1
WORDS = re.compile(r"\w+(?:'\w+)*")  # letters of any script, digits, apostrophes between them
WORDS_AND_ENDS = re.compile(rf"{UNK}|{WORDS.pattern}|[.!?](?=[\s\"')\]”’»]|$)")  # a sentence's end is a word
TRAIN_SHARE, VALIDATION_SHARE = 0.70, 0.15  # the rest is the test split
MOST_WINDOWS = 50_000  # beyond these, a corpus's evaluation windows and the rows of least squares are thinned


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
    remark: str = ""  # why it can do well here


@dataclass(frozen=True)
class TaskData:
    """What one seed's data come to: three disjoint splits and what is known about them."""

    question: str  # what is asked of these data, in a sentence or two
    train: BatchDataset
    validation: BatchDataset
    test: BatchDataset
    arguments: Mapping[str, int | float]  # constructor keywords of the models
    decoding: Mapping[str, object]  # what turns words or values into inputs and back: goes into the checkpoint
    references: Sequence[Reference]
    facts: Mapping[str, int | float]  # for the summary
    notes: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) each: known about every test example
    unit: float = 1.0  # one unit of the targets, in the user's units
    offset: float = 0.0  # a target of zero, in the user's units

    def to(self, device: torch.device) -> TaskData:
        """The same data with the splits on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("train", "validation", "test")})


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

    def to(self, device: torch.device) -> BatchDataset:
        """The same examples on `device`; views stay views of one tensor."""
        moved = copy(self)
        moved.inputs, moved.targets = (on_device(tensor, device) for tensor in (self.inputs, self.targets))
        return moved


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, with its whole storage, so that a view is moved without being written out."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((size,), (1,), 0).to(device)
    return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class ReviewDataset(BatchDataset):
    """Reviews as word ids padded on the right with 0: inputs (N, T), targets (N, 1) float, 1 = positive.

    Kept as 32-bit numbers, which halves the memory; batches are long.
    """

    def __init__(self, reviews: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        lengths = np.array([len(review) for review in reviews])
        ids = np.zeros((len(reviews), lengths.max()), dtype=np.int32)
        for row, review in zip(ids, reviews):
            row[: len(review)] = review
        targets = torch.tensor(labels, dtype=torch.float32).unsqueeze(1)
        super().__init__(torch.from_numpy(ids), targets, torch.from_numpy(lengths))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index].long(), self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids, targets = super().__getitems__(indices)
        return ids.long(), targets


class CorpusDataset(BatchDataset):
    """Windows of a running text and the word after each: inputs (N, T) long, targets (N,) long, both views.

    Every window, or, if there are more, about `most` that are evenly spaced.
    """

    def __init__(self, ids: Sequence[int], window: int, most: int | None = None) -> None:
        self.stride = math.ceil((len(ids) - window) / most) if most else 1
        rows = torch.as_tensor(ids, dtype=torch.long).unfold(0, window + 1, self.stride)  # (N, T + 1), no copy
        super().__init__(rows[:, :-1], rows[:, -1], torch.tensor(window).expand(len(rows)))


class SeriesDataset(BatchDataset):
    """Every window of a series and the value after it: inputs (N, T, 1) float, targets (N, 1) float, both views."""

    def __init__(self, values: Sequence[float], window: int) -> None:
        rows = torch.as_tensor(values, dtype=torch.float32).unfold(0, window + 1, 1)  # (N, T + 1), no copy
        super().__init__(rows[:, :-1, None], rows[:, -1:], torch.tensor(window).expand(len(rows)))


class LengthBuckets(Sampler):
    """Shuffled batches of examples of similar length, so that little time goes into padding.

    Examples are shuffled, cut into pools of `pool` batches, sorted by length within each pool, cut into
    batches, and the batches shuffled: all drawn anew every epoch. With equal lengths this is plain shuffling.
    """

    def __init__(self, lengths: Tensor, batch_size: int, rng: np.random.Generator, pool: int = 32) -> None:
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
        counts.pop(UNK, None)  # some corpora come with it
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([PAD, UNK, *ranked[: size - 2]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of `words`."""
        return [self.ids.get(word, 1) for word in words]


def tokenize(text: str, pattern: re.Pattern) -> list[str]:
    """Lower-case words, those that `pattern` finds; interned, so that a long text holds each of them once."""
    return [sys.intern(word) for word in pattern.findall(text.lower().replace("’", "'"))]


def three_parts(n: int) -> tuple[slice, slice, slice]:
    """Contiguous, disjoint train / validation / test slices that cover n items."""
    first, second = int(n * TRAIN_SHARE), int(n * (TRAIN_SHARE + VALIDATION_SHARE))
    assert 0 < first < second < n
    return slice(0, first), slice(first, second), slice(second, n)


def model_arguments(config: object, **from_data: int) -> dict[str, int | float]:
    """The models' constructor keywords: those that the data decide and those that the configuration names."""
    names = ("embed_dim", "hidden_dim", "n_layers", "dropout")
    return from_data | {name: getattr(config, name) for name in names if hasattr(config, name)}


# --- a user's own files ---------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, unpacked if its name ends in .gz; raises InputError."""
    try:
        content = gzip.decompress(Path(path).read_bytes()) if str(path).endswith(".gz") else Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not content.strip():
        raise InputError(f"{path}: the file is empty")
    return content


def decode(content: bytes, source: str | Path) -> str:
    """UTF-8 text, with or without a byte order mark; raises InputError."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {error.start:,} is 0x{content[error.start]:02x}"
        raise InputError(f"{source}: not UTF-8 ({found}); save it as UTF-8") from error


def own_file(path: str | Path, column: str = "") -> OwnFile:
    """The file as a configuration names it; raises InputError."""
    return OwnFile(str(path), hashlib.sha256(read_bytes(path)).hexdigest(), column)


def own_text(own: OwnFile) -> str:
    """What is in a user's file; raises InputError, also when the content is no longer what the configuration names."""
    content = read_bytes(own.path)
    if hashlib.sha256(content).hexdigest() != own.digest:
        raise InputError(f"{own.path}: changed since the run began; start again")
    return decode(content, own.path)


def parse_table(text: str, source: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV text, numbered from 1 as a spreadsheet does; raises InputError.

    Blank lines are left out, but not within a single column: there each is a cell without a value.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own limit would refuse a text of 130,000 letters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(number, [cell.strip() for cell in row] or [""]) for number, row in enumerate(reader, start=1)]
    except csv.Error as error:
        raise InputError(f"{source}: line {reader.line_num} is not CSV ({error})") from error
    filled = [i for i, (_, row) in enumerate(rows) if any(row)]
    if not filled:
        raise InputError(f"{source}: there is no row in it")
    rows = rows[filled[0] : filled[-1] + 1]
    width = len(rows[0][1])
    rows = [(number, row) for number, row in rows if width == 1 or row != [""]]
    for number, row in rows:
        if len(row) != width:
            raise InputError(f"{source}: row {number} has {len(row)} fields, the first has {width}")
    return rows


def parse_reviews(text: str, source: str) -> Reviews:
    """The reviews of a CSV text with the columns `text` and `label`; raises InputError.

    The label that comes second in alphabetical order counts as positive: 1 after 0, pos after neg.
    """
    (_, header), *rows = parse_table(text, source)
    for column in ("text", "label"):
        if column not in header:
            raise InputError(f"{source}: there is no column '{column}'; its columns are {', '.join(header)}")
    texts, labels = ([row[header.index(column)] for _, row in rows] for column in ("text", "label"))
    names = sorted(set(labels))
    if len(names) != 2:
        some = ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)
        raise InputError(f"{source}: the column 'label' holds {len(names)} different values ({some}); two are needed")
    return Reviews(texts, np.array([names.index(label) for label in labels]), tuple(names))


def as_number(text: str) -> float | None:
    """The number that a cell of a table holds, if it holds one."""
    try:
        return float(text)
    except ValueError:
        return None


def parse_series(text: str, source: str, column: str = "") -> np.ndarray:
    """The values (N,) of one column of a CSV text, the only numeric one if none is named; raises InputError.

    The first row is a header if it holds no number, or the column's name and another word. Without a header the
    columns are called 1, 2, 3. A column is numeric if most of its cells are.
    """
    rows = parse_table(text, source)
    first = rows[0][1]
    words = [cell for cell in first if as_number(cell) is None]
    named = len(words) == len(first) or (column in first and words)
    header = rows.pop(0)[1] if named else [str(i) for i in range(1, len(first) + 1)]
    if column and column not in header:
        raise InputError(f"{source}: there is no column '{column}'; its columns are {', '.join(header)}")
    shares = np.array([[as_number(cell) is not None for cell in row] for _, row in rows]).mean(axis=0) if rows else []
    numeric = [name for name, share in zip(header, shares) if share > 0.5]
    if not column and len(numeric) != 1:
        found = f"{len(numeric)} numeric columns" if numeric else "no numeric column"
        raise InputError(f"{source}: {found} among {', '.join(header)}; name one with --series-column")
    column = column or numeric[0]
    cells = [(number, row[header.index(column)]) for number, row in rows]
    for number, cell in cells:
        value = as_number(cell)
        if value is None or not math.isfinite(value):
            missing = cell.lower() in ("", "na", "nan", "null", "none")
            found = "holds no value" if missing else f"holds {cell[:40]!r}, which is not a finite number"
            raise InputError(f"{source}: row {number} {found} in the column '{column}'")
    return np.array([float(cell) for _, cell in cells])


def require_enough(count: int, what: str, needed: int, source: str) -> None:
    """Raise InputError if a user's file holds too little for three splits."""
    if count < needed:
        raise InputError(f"{source}: {count:,} {what}; three splits need {needed:,} or more")


# --- reviews --------------------------------------------------------------------------

REVIEWS_QUESTION = (
    "Is a film review positive? Opinions are scattered over its whole length, some of them negated, and the verdict at "
    "its end often misleads."
)
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
    shape = len(NAME_TAILS), len(NAME_MIDDLES), len(NAME_HEADS)
    size = math.prod(shape)
    fame = (size ** rng.random(n)).astype(int) - 1  # a log-uniform rank is Zipf-distributed
    parts = np.unravel_index(fame * 7919 % size, shape)  # a prime: neighbours in fame do not look alike
    return [(NAME_HEADS[i] + NAME_MIDDLES[j] + NAME_TAILS[k]).title() for k, j, i in zip(*parts)]


@dataclass(frozen=True)
class Reviews:
    """Labelled texts and, where they were generated, the evidence that the generator put into each."""

    texts: Sequence[str]
    labels: np.ndarray  # (N,): 0 or 1
    names: tuple[str, str] = ("negative", "positive")  # of the labels 0 and 1
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
    least, most = config.phrases
    n_phrases = (least + (most + 1 - least) * rng.random(n_reviews) ** 2).astype(int)  # few reviews are long
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
    log_odds = review_log_odds(n_favourable, n_opinions, praised, config)
    return Reviews(texts, labels, log_odds=log_odds, praised=praised)


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


def own_reviews(own: OwnFile, rng: np.random.Generator) -> Reviews:
    """A user's reviews, shuffled, for the file may be sorted; raises InputError."""
    reviews = parse_reviews(own_text(own), own.path)
    order = rng.permutation(len(reviews.texts))
    return Reviews([reviews.texts[i] for i in order], reviews.labels[order], reviews.names)


def build_reviews(config: ClassifierConfig, seed: int) -> TaskData:
    """Reviews without repetitions, split, encoded with the training split's vocabulary, with their references.

    Of a review longer than `max_words` the end is kept: that is where reviewers conclude, and what a recurrent
    layer, which reads it last, remembers best. Raises InputError if a user's file cannot be used.
    """
    rng, own = random_generator(seed, "reviews"), config.own
    reviews = own_reviews(own, rng) if own else generate_reviews(config, rng)
    words = [tokenize(text, WORDS) for text in reviews.texts]
    first = {}  # the first review of each wording: repetitions would cross the splits
    for i, review in enumerate(words):
        first.setdefault(tuple(review), i)
    keep = [i for review, i in first.items() if review]
    if own:
        require_enough(len(keep), "different reviews that hold a word", LEAST_REVIEWS, own.path)
    words, labels, names = [words[i][-config.max_words :] for i in keep], reviews.labels[keep], reviews.names
    parts = three_parts(len(words))
    vocabulary = Vocabulary.fit((word for review in words[parts[0]] for word in review), config.vocab_size)
    ids = [vocabulary.encode(review) for review in words]
    train, validation, test = (ReviewDataset(ids[part], labels[part]) for part in parts)
    references, notes = [majority_class(train, test), naive_bayes(train, test, len(vocabulary))], {}
    question = (
        f"Which label does a text of {Path(own.path).name} bear, {names[0]} or {names[1]}?" if own else REVIEWS_QUESTION
    )
    if reviews.log_odds is not None:
        log_odds, praised = reviews.log_odds[keep][parts[2]], reviews.praised[keep][parts[2]]
        references.append(binary_outcome("Bayes decision", "ceiling", log_odds, labels[parts[2]]))
        notes["verdict_contradicts"] = (praised != (labels[parts[2]] == 1)).astype(int)
    return TaskData(
        question,
        train,
        validation,
        test,
        arguments=model_arguments(config, vocab_size=len(vocabulary), output_dim=1),
        decoding={"vocabulary": vocabulary.words, "labels": list(names), "max_words": config.max_words},
        references=references,
        facts={
            "reviews": len(words),
            "left out as empty or repeated": len(reviews.texts) - len(words),
            f"share {names[1]}": float(labels.mean()),
            "mean length (words)": float(np.mean([len(review) for review in words])),
            "distinct words": len({word for review in words for word in review}),
            "vocabulary": len(vocabulary),
            "unknown words in the test split": float((test.inputs == 1).sum() / (test.inputs > 0).sum()),
        },
        notes=notes,
    )


def binary_outcome(name: str, kind: str, log_odds: np.ndarray, labels: np.ndarray) -> Reference:
    """The reference that predicts `labels` (N,) with `log_odds` (N,): cross-entropy and hits."""
    loss = np.logaddexp(0, np.where(labels > 0.5, -log_odds, log_odds))
    return Reference(name, kind, loss, ((log_odds > 0) == (labels > 0.5)).astype(float))


def prior_log_odds(labels: np.ndarray) -> float:
    """Log odds of label 1 from how often it occurs, with add-one smoothing: one label may not occur at all."""
    return math.log((labels.sum() + 1) / (len(labels) - labels.sum() + 1))


def majority_class(train: ReviewDataset, test: ReviewDataset) -> Reference:
    """Always the class that is more frequent in training, with its frequency there."""
    log_odds = np.full(len(test), prior_log_odds(train.targets[:, 0].numpy()))
    return binary_outcome("majority class", "baseline", log_odds, test.targets[:, 0].numpy())


def naive_bayes(train: ReviewDataset, test: ReviewDataset, vocab_size: int) -> Reference:
    """Multinomial naive Bayes on single words with add-one smoothing (Manning, Raghavan & Schuetze 2008, ch. 13)."""
    ids, labels = train.inputs.numpy(), train.targets[:, 0].numpy()
    counts = np.stack([np.bincount(ids[labels == y].ravel(), minlength=vocab_size) for y in (0, 1)])[:, 1:] + 1.0
    weights = np.diff(np.log(counts / counts.sum(axis=1, keepdims=True)), axis=0)[0]
    evidence = np.concatenate([[0.0], weights])[test.inputs.numpy()].sum(axis=1)  # padding weighs nothing
    log_odds = prior_log_odds(labels) + evidence
    return binary_outcome("naive Bayes", "baseline", log_odds, test.targets[:, 0].numpy())


# --- corpus ---------------------------------------------------------------------------

CORPUS_QUESTION = (
    "Which word comes next? Verbs and objects depend on a subject up to nine words back, past other nouns."
)
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


def own_corpus(own: OwnFile, window: int) -> list[str]:
    """The words and sentence ends of a user's text; raises InputError."""
    lines = io.StringIO(own_text(own))  # line by line: a lower-case copy of 100 MB at once would fill the memory
    words = [word for line in lines for word in tokenize(line, WORDS_AND_ENDS)]
    require_enough(len(words), "words", least_length(window), own.path)
    return words


def build_corpus(config: PredictorConfig, seed: int) -> TaskData:
    """A corpus, cut in three, encoded with the training part's vocabulary, with its references.

    Validation and test windows are evenly spaced if there are more than `MOST_WINDOWS`. Raises InputError if a
    user's file cannot be used.
    """
    own = config.own
    text = None if own else generate_corpus(config, random_generator(seed, "corpus"))
    words = own_corpus(own, config.window) if own else text.words
    parts = three_parts(len(words))  # cut before windowing: no window straddles a cut
    vocabulary = Vocabulary.fit(words[parts[0]], config.vocab_size)
    if len(vocabulary) < 3:
        raise InputError(f"{own.path}: no known word in its first {TRAIN_SHARE:.0%}, the training part")
    ids = np.array(vocabulary.encode(words))
    train = CorpusDataset(ids[parts[0]], config.window)
    validation, test = (CorpusDataset(ids[part], config.window, MOST_WINDOWS) for part in parts[1:])
    ngram = NGram(ids[parts[0]], 3, len(vocabulary))
    ngrams = [ngram.reference(name, n, test) for n, name in enumerate(("unigram", "bigram", "trigram"))]
    references, notes = ngrams, {}
    question = f"Which word of {Path(own.path).name} comes next?" if own else CORPUS_QUESTION
    if text:
        targets = slice(parts[2].start + config.window, None, test.stride)  # the words that the test windows ask for
        entropy, best = np.array(text.entropy[targets]), np.array(text.best[targets])
        references = [*ngrams, Reference("grammar's full state", "ceiling", entropy, best)]
        notes = {
            "cue_distance": np.array(text.distance[targets]),
            "best_score": np.array(text.best_is_said[targets], dtype=float),
        }
    seen = np.isin(*(window_codes(split.inputs.numpy(), len(vocabulary) | 1) for split in (test, train)))
    return TaskData(
        question,
        train,
        validation,
        test,
        arguments=model_arguments(config, vocab_size=len(vocabulary)),
        decoding={"vocabulary": vocabulary.words, "window": config.window},
        references=references,
        facts={
            "words": len(ids),
            "distinct words": len(set(words)),
            "vocabulary": len(vocabulary),
            "test windows": len(test),
            "unknown words in the test split": float((test.targets == 1).float().mean()),
            "test windows that also occur in training": float(seen.mean()),
        },
        notes=notes,
    )


def window_codes(windows: np.ndarray, base: int) -> np.ndarray:
    """Each row of ids (N, T) below `base` as one number (N,): exact below 2**63, beyond that a hash by overflow."""
    codes = np.zeros(len(windows), dtype=np.int64)
    for column in windows.T:
        codes = codes * base + column
    return codes


class NGram:
    """Interpolated n-gram model that backs off by Witten-Bell smoothing (Chen & Goodman 1999, eq. 15).

    Contexts are arrays (N, n) of the last n words, n below `order`. What was counted is kept in sorted arrays, which
    are searched: a table of Python objects would take 100 times the memory of the text.
    """

    def __init__(self, ids: np.ndarray, order: int, vocab_size: int) -> None:
        self.vocab_size, self.levels = vocab_size, []
        for n in range(order):
            grams = np.lib.stride_tricks.sliding_window_view(ids, n + 1)
            grams, counts = np.unique(window_codes(grams, vocab_size), return_counts=True)
            contexts, starts = np.unique(grams // vocab_size, return_index=True)
            totals, distinct = np.add.reduceat(counts, starts), np.diff(starts, append=len(grams))
            level = {"grams": grams, "counts": counts, "contexts": contexts, "totals": totals, "distinct": distinct}
            self.levels.append(level)
            followed, words = np.divmod(grams, vocab_size)
            columns = [followed // vocab_size**i % vocab_size for i in reversed(range(n))]
            histories = np.stack(columns, axis=1) if n else np.zeros((len(words), 0), dtype=int)
            likeliest_first = np.lexsort((words, -self.rank(histories, words), followed))  # within each context
            level["best"] = words[likeliest_first[starts]]

    def probability(self, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """P(word | context) for each row (N,), mixing every order down to the uniform distribution."""
        lower = (
            self.probability(contexts[:, 1:], words) if contexts.shape[1] else np.full(len(words), 1 / self.vocab_size)
        )
        level, codes = self.levels[contexts.shape[1]], window_codes(contexts, self.vocab_size)
        row, known = find(codes, level["contexts"])
        gram, seen = find(codes * self.vocab_size + words, level["grams"])
        count, distinct = np.where(seen, level["counts"][gram], 0), level["distinct"][row]
        return np.where(known, (count + distinct * lower) / (level["totals"][row] + distinct), lower)

    def likeliest(self, contexts: np.ndarray) -> np.ndarray:
        """The known word (N,) of highest probability: one seen after the context, or the likeliest of a shorter one."""
        n, level = contexts.shape[1], self.levels[contexts.shape[1]]
        row, known = find(window_codes(contexts, self.vocab_size), level["contexts"])
        best = level["best"][row]
        if not n:
            return best
        shorter = self.likeliest(contexts[:, 1:])
        first, second = self.rank(contexts, best), self.rank(contexts, shorter)
        return np.where(known & ((first > second) | ((first == second) & (best < shorter))), best, shorter)

    def rank(self, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """P(word | context) for each row (N,), or -1 for <unk>, which is no answer."""
        return np.where(words == 1, -1.0, self.probability(contexts, words))

    def reference(self, name: str, n: int, test: CorpusDataset) -> Reference:
        """How the model does on the windows of `test` by the last `n` words of each."""
        window, words = test.inputs.numpy(), test.targets.numpy()
        contexts = window[:, max(window.shape[1] - n, 0) :]
        hits = self.likeliest(contexts) == words
        return Reference(name, "baseline", -np.log(self.probability(contexts, words)), hits.astype(float))


def find(values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `values` (N,) stands in a sorted `table`, and whether it is there: two arrays (N,)."""
    rows = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return rows, table[rows] == values


# --- series ---------------------------------------------------------------------------

SERIES_QUESTION = "What is the next value of a sum of sines with noise? The noise cannot be predicted."
PRONY = (
    "a sum of K sines obeys a linear recurrence of order 2 K (Prony 1795), so here a linear model is of the right form "
    "and least squares finds its best weights"
)


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


def own_series(own: OwnFile, window: int) -> np.ndarray:
    """The values (N,) of a user's series, in the order of its rows; raises InputError."""
    values = parse_series(own_text(own), own.path, own.column)
    require_enough(len(values), "values", least_length(window), own.path)
    training = values[three_parts(len(values))[0]]
    if training.min() == training.max():
        raise InputError(f"{own.path}: constant over its first {TRAIN_SHARE:.0%}, the training part")
    if not (np.abs(values).max() < 1e30 and training.std() > 1e-30):
        raise InputError(f"{own.path}: its values or their differences are beyond 1e30 or 1e-30; choose another unit")
    return values


def build_series(config: ForecasterConfig, seed: int) -> TaskData:
    """A series, cut in three, standardised with the training part's mean and deviation.

    Raises InputError if a user's file cannot be used.
    """
    own = config.own
    values = own_series(own, config.window) if own else generate_series(config, random_generator(seed, "series"))
    parts = three_parts(len(values))  # cut before windowing: no window straddles a cut
    mean, std = values[parts[0]].mean(), values[parts[0]].std()
    scaled = (values - mean) / std
    train, validation, test = (SeriesDataset(scaled[part], config.window) for part in parts)
    season = season_of(train)
    references = [
        forecast_reference("persistence", test.inputs[:, -1, 0].numpy(), test),
        forecast_reference("seasonal naive", test.inputs[:, -season, 0].numpy(), test),
        linear_autoregression(train, test),
    ]
    facts = {"steps": len(values), "season (steps)": season}
    question = f"What is the next value of {Path(own.path).name}?" if own else SERIES_QUESTION
    if not own:
        floor = np.full(len(test), config.noise / std)
        references[-1] = replace(references[-1], remark=PRONY)
        references.append(Reference("noise", "ceiling", floor**2, floor * math.sqrt(2 / math.pi)))  # E|e|, e normal
        facts["noise variance"] = config.noise**2
    return TaskData(
        question,
        train,
        validation,
        test,
        arguments=model_arguments(config, input_dim=1, output_dim=1),
        decoding={"scaler": {"mean": float(mean), "std": float(std)}, "window": config.window},
        references=references,
        facts=facts,
        notes={"truth": test.targets[:, 0].numpy()},
        unit=float(std),
        offset=float(mean),
    )


def forecast_reference(name: str, forecast: np.ndarray, test: SeriesDataset) -> Reference:
    """The baseline that makes `forecast` (N,) of the targets of `test`: squared and absolute errors."""
    errors = forecast - test.targets[:, 0].numpy()
    return Reference(name, "baseline", errors**2, np.abs(errors))


def season_of(train: SeriesDataset) -> int:
    """The lag within the window, from two steps on, of the best autocorrelation in the training part."""
    rows, targets = train.inputs[:, :, 0].numpy(), train.targets[:, 0].numpy()
    lags = range(2, rows.shape[1] + 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a stretch may be constant
        correlations = [np.corrcoef(rows[:, -lag], targets)[0, 1] for lag in lags]
    return lags[int(np.argmax(np.nan_to_num(correlations, nan=-1.0)))]


def linear_autoregression(train: SeriesDataset, test: SeriesDataset) -> Reference:
    """Least squares on the same window, with an intercept; of a long series about `MOST_WINDOWS` windows are used."""
    step = math.ceil(len(train) / MOST_WINDOWS)
    rows, targets = train.inputs[::step, :, 0].double().numpy(), train.targets[::step, 0].double().numpy()
    weights = np.linalg.lstsq(np.column_stack([rows, np.ones(len(rows))]), targets, rcond=None)[0]
    chunks = test.inputs[:, :, 0].split(MOST_WINDOWS)  # in pieces: windows are views, their products are not
    forecast = np.concatenate([chunk.double().numpy() @ weights[:-1] + weights[-1] for chunk in chunks])
    return forecast_reference("linear autoregression", forecast, test)


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


# --- trained models in use ------------------------------------------------------------


def roll_forward(model: nn.Module, windows: Tensor, steps: int) -> Tensor:
    """Forecasts (B, steps) from windows (B, T, 1) in which each forecast is fed back as the next value."""
    forecasts = []
    with evaluating(model):
        for _ in range(steps):
            forecasts.append(model(windows))  # (B, 1)
            windows = torch.cat([windows[:, 1:], forecasts[-1][:, None]], dim=1)
    return torch.cat(forecasts, dim=1)


def is_size(value: object) -> bool:
    """Whether a value from a file is a whole number of 1 or more."""
    return type(value) is int and value >= 1


class Trained:
    """A trained model and what turns a user's words or values into its input and back; `load_checkpoint` makes it.

    Raises ValueError if model and `decoding` do not belong together. `metrics` are those of the test split.
    """

    def __init__(self, model: nn.Module, decoding: Mapping, metrics: Mapping[str, float]) -> None:
        self.model, self.decoding, self.metrics = model.eval(), decoding, metrics
        if "vocabulary" in decoding:
            self.vocabulary = Vocabulary(decoding["vocabulary"])
            size = model.embedding.num_embeddings
            require(len(self.vocabulary) == size >= 3, f"{len(self.vocabulary)} words for {size} embeddings")
            require(all(isinstance(word, str) for word in self.vocabulary.words), "a word that is no text")


class TrainedClassifier(Trained):
    """Labels texts."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self.labels, self.max_words = self.decoding["labels"], self.decoding["max_words"]
        two = len(self.labels) == 2 and all(isinstance(label, str) for label in self.labels)
        require(two and self.model.head[0].out_features == 1, "not two labels")
        require(is_size(self.max_words), f"max_words is {self.max_words}")

    def predict(self, texts: str | Sequence[str]) -> list[tuple[str | None, float]]:
        """The likelier label of each text and its probability.

        Words that training did not know count as one and the same unknown word. Of a text longer than the
        reviews of training the last `max_words` words are read, as in training. A text without any word has
        no label: None, and a probability of nan.
        """
        reviews = [tokenize(text, WORDS)[-self.max_words :] for text in ([texts] if isinstance(texts, str) else texts)]
        answers = [(None, math.nan)] * len(reviews)
        read = sorted((i for i, review in enumerate(reviews) if review), key=lambda i: len(reviews[i]))
        for start in range(0, len(read), 256):
            rows = read[start : start + 256]
            ids = ReviewDataset([self.vocabulary.encode(reviews[i]) for i in rows], [0] * len(rows)).inputs
            with evaluating(self.model):
                probabilities = self.model(ids)[:, 0].tolist()
            for i, p in zip(rows, probabilities):
                answers[i] = (self.labels[1], p) if p > 0.5 else (self.labels[0], 1 - p)
        return answers

    def answer(self, text: str, _options: argparse.Namespace) -> str:
        """What the command line prints: label and probability of each line of `text`."""
        answers = self.predict(list(io.StringIO(text)) or [""])
        return "\n".join(f"{'-' if label is None else label}\t{probability:.4f}" for label, probability in answers)


class TrainedPredictor(Trained):
    """Continues texts."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self.window = self.decoding["window"]
        require(is_size(self.window), f"window is {self.window}")

    def logits(self, words: Sequence[str]) -> Tensor:
        """Logits (V,) of the word that follows `words`, of which the last `window` are read.

        Without any word the beginning of a sentence is assumed. Unknown words count as one and the same.
        """
        ids = self.vocabulary.encode(words[-self.window :] or ["."])
        with evaluating(self.model):
            logits = self.model(torch.tensor([ids]))[0]
        logits[:2] = -math.inf  # <pad> and <unk> are no answer
        return logits

    def predict(self, text: str, n: int = 5) -> list[tuple[str, float]]:
        """The `n` likeliest next words of the vocabulary with their probabilities among all that it holds."""
        probabilities, ids = (
            self.logits(tokenize(text, WORDS_AND_ENDS)).softmax(dim=0).topk(min(n, len(self.vocabulary) - 2))
        )
        return [(self.vocabulary.words[i], p) for i, p in zip(ids.tolist(), probabilities.tolist())]

    def continue_text(self, text: str, length: int = 20, temperature: float = 1.0, seed: int = 42) -> str:
        """The next `length` words, each drawn from the model's probabilities to the power 1 / `temperature`.

        At temperature 0 the likeliest word is taken each time. The same seed gives the same words.
        """
        words, generator = tokenize(text, WORDS_AND_ENDS), torch.Generator().manual_seed(seed)
        start = len(words)
        for _ in range(length):
            logits = self.logits(words)
            scaled = (logits - logits.max()) / max(temperature, 1e-30)  # at 0 all but the likeliest vanish
            words.append(self.vocabulary.words[torch.multinomial(scaled.softmax(dim=0), 1, generator=generator).item()])
        return re.sub(r" ([.!?])", r"\1", " ".join(words[start:]))

    def answer(self, text: str, options: argparse.Namespace) -> str:
        """What the command line prints: the five likeliest next words and a continuation."""
        likeliest = [f"{word}\t{probability:.4f}" for word, probability in self.predict(text)]
        continuation = self.continue_text(text, options.length, options.temperature, options.seed)
        return "\n".join([*likeliest, "", continuation])


class TrainedForecaster(Trained):
    """Continues series."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self.window, scaler = self.decoding["window"], self.decoding["scaler"]
        self.mean, self.std = float(scaler["mean"]), float(scaler["std"])
        require(is_size(self.window), f"window is {self.window}")
        require(math.isfinite(self.mean) and 0 < self.std < math.inf, "a scaler that is not finite and positive")
        sizes = self.model.recurrent.rnn.input_size, self.model.head[-1].out_features
        require(sizes == (1, 1), "not a series of one value a step")

    def predict(self, values: Sequence[float], length: int = 1) -> np.ndarray:
        """The next `length` values of a series (N,), in its own units; each forecast is fed back for the next.

        Of the series the last `window` values are read; a shorter one is read whole, which is less than the
        model was trained on. Raises InputError if there is no value or one that is not finite.
        """
        wrong = InputError("a series must hold one or more finite values, in one dimension")
        try:
            values = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise wrong from error
        if not (values.ndim == 1 and len(values) and np.isfinite(values).all()):
            raise wrong
        scaled = torch.as_tensor((values[-self.window :] - self.mean) / self.std, dtype=torch.float32)
        return roll_forward(self.model, scaled[None, :, None], length)[0].double().numpy() * self.std + self.mean

    def answer(self, text: str, options: argparse.Namespace) -> str:
        """What the command line prints: the next values of the series in a CSV text, as CSV."""
        forecasts = self.predict(parse_series(text, "the series", options.series_column or ""), options.length)
        return (
            pd.DataFrame({"step": range(1, len(forecasts) + 1), "value": forecasts})
            .to_csv(index=False, lineterminator="\n")
            .rstrip()
        )


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
        """Differences as a person reads them: shares in points of a hundred, the rest to two or three digits."""
        forms = {"%": "{:.1f}", "g": "{:.2g}", "f": "{:.3f}"}
        scale = 100 if self.form.endswith("%") else 1
        return [forms[self.form[-1]].format(scale * value) for value in values]


@dataclass(frozen=True)
class Task:
    """All that differs between the three tasks."""

    name: str
    title: str
    models: Mapping[str, type[nn.Module]]
    in_use: type[Trained]
    build_data: Callable[[object, int], TaskData]  # (the task's configuration, seed)
    loss: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); its mean is minimised
    score: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> (B,); reported beside the loss
    answer: Callable[[Tensor], Tensor]  # output -> (B,): what the model says, for the record
    metrics: Sequence[Metric]  # the first is the one that the models are judged by
    hard_cases: tuple[str, str, int] = ("", "", 0)  # (what they are, the note that tells, from which value on)

    def measure(self, loss: np.ndarray | float, score: np.ndarray | float, unit: float) -> dict[str, float]:
        """Mean loss and the task's metrics, from a loss and a score per example (N,) or from their means."""
        means = {"loss": float(np.mean(loss)), "score": float(np.mean(score))}
        metrics = {m.name: m.transform(means[m.source]) * unit**m.unit_power for m in self.metrics}
        return {"loss": means["loss"]} | metrics


def per_example(loss: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
    """Any of torch's losses, one value per example: (B,) or (B, K) -> (B,)."""
    return loss(output, target, reduction="none").reshape(len(target), -1).mean(dim=1)


def binary_hits(output: Tensor, target: Tensor) -> Tensor:
    """1 where probability and label (B, 1) are on the same side of one half: (B,)."""
    return ((output > 0.5) == (target > 0.5)).float().mean(dim=1)


def likeliest_word(output: Tensor) -> Tensor:
    """The id of the likeliest word of logits (B, V) that is a word: not <pad> and not <unk>: (B,)."""
    return output[:, 2:].argmax(dim=1) + 2


def likeliest_hits(output: Tensor, target: Tensor) -> Tensor:
    """1 where the likeliest word of logits (B, V) is the target (B,); never where that is <unk>: (B,)."""
    return (likeliest_word(output) == target).float()


def perplexity(loss: float) -> float:
    """The exponential of a cross-entropy in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


ACCURACY = Metric("accuracy", "accuracy", "score", ".1%", higher_is_better=True)

CLASSIFIER = Task(
    name="classifier",
    title="Text classification",
    models={"RNN": RNNClassifier, "LSTM": LSTMClassifier, "GRU": GRUClassifier},
    in_use=TrainedClassifier,
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
    models={"RNN": RNNPredictor, "LSTM": LSTMPredictor, "GRU": GRUPredictor},
    in_use=TrainedPredictor,
    build_data=build_corpus,
    loss=partial(per_example, F.cross_entropy),
    score=likeliest_hits,
    answer=likeliest_word,
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
    models={"RNN": RNNForecaster, "LSTM": LSTMForecaster, "GRU": GRUForecaster},
    in_use=TrainedForecaster,
    build_data=build_series,
    loss=partial(per_example, F.mse_loss),
    score=partial(per_example, F.l1_loss),
    answer=lambda output: output[:, 0],  # next value, standardised
    metrics=(
        Metric("mse", "MSE (series units²)", "loss", "#.4g", unit_power=2),
        Metric("mae", "MAE (series units)", "score", "#.4g", unit_power=1),
    ),
)
TASKS = {task.name: task for task in (CLASSIFIER, PREDICTOR, FORECASTER)}
MODEL_NAMES = tuple(CLASSIFIER.models)

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


Tell = Callable[[dict | None], object]  # called with None after each batch and with each epoch's row of the history


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


def new_loader(dataset: BatchDataset, batches: Sampler | Sequence[np.ndarray]) -> DataLoader:
    """Batches of `dataset` in the order of `batches`; it fetches them whole, so nothing is left to collate."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=lambda batch: batch)


def new_optimizer(model: nn.Module, training: Training) -> optim.Optimizer:
    """Adam (Kingma & Ba 2015) with the settings of `training`."""
    return optim.Adam(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


def train_step(
    model: nn.Module, task: Task, optimizer: optim.Optimizer, batch: tuple[Tensor, Tensor], training: Training
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """One update; returns losses and scores of each micro-batch (b,) and the gradient's norm before clipping ().

    The batch is worked through in `accumulate_steps` micro-batches. Each adds its share of the batch's mean
    loss to the gradient, so the update is that of the whole batch.
    """
    inputs, targets = batch
    optimizer.zero_grad(set_to_none=True)
    results = []
    for x, y in zip(inputs.chunk(training.accumulate_steps), targets.chunk(training.accumulate_steps)):
        output = model(x)
        loss = task.loss(output, y)  # (b,), each of which counts one B-th
        loss.backward(torch.full_like(loss, 1 / len(inputs)))
        results.append((loss.detach(), task.score(output.detach(), y)))
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], training.clip_norm)
    optimizer.step()
    return results, norm


def train_epoch(
    model: nn.Module, task: Task, optimizer: optim.Optimizer, loader: DataLoader, training: Training, tell: Tell
) -> tuple[float, float, float]:
    """One pass over the training data; returns mean loss, mean score and mean gradient norm before clipping.

    Results stay on the device until the epoch ends: one transfer an epoch, not three a step.
    """
    model.train()
    results, norms = [], []
    for batch in loader:
        micro_batches, norm = train_step(model, task, optimizer, batch, training)
        results += micro_batches
        norms.append(norm)
        tell(None)
    losses, scores = map(torch.cat, zip(*results))
    loss, score, norm = torch.stack([losses.mean(), scores.mean(), torch.stack(norms).mean()]).tolist()
    return loss, score, norm


def evaluate(model: nn.Module, task: Task, dataset: BatchDataset, batch_size: int = 512) -> dict[str, np.ndarray]:
    """Loss, score and answer of the model on each example of `dataset`, in its order: three arrays (N,).

    Batches hold examples of similar length, so that little time goes into padding.
    """
    parts, order = [], dataset.lengths.argsort(stable=True)
    with evaluating(model):
        for rows in order.split(batch_size):
            inputs, target = dataset.__getitems__(rows)
            output = model(inputs)
            parts.append((task.loss(output, target), task.score(output, target), task.answer(output)))
    places = order.argsort()
    return {name: torch.cat(part).cpu()[places].numpy() for name, part in zip(("loss", "score", "answer"), zip(*parts))}


def fit(
    model: nn.Module, task: Task, data: TaskData, training: Training, seed: int, tell: Tell = lambda row: None
) -> list[dict]:
    """Train until the validation loss stops falling; leaves the best epoch's weights in `model`.

    Model and data must be on the same device.
    Returns the history, a row per epoch: `epoch`, `learning_rate`, `gradient_norm` (mean, before clipping),
    `seconds`, and under `train` and `validation` the loss and the task's metrics. Training metrics are running
    means over the epoch, with dropout on. Raises TrainingDiverged when a loss is not finite.
    """
    torch.manual_seed(torch_seed(seed, "dropout"))
    optimizer = new_optimizer(model, training)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=training.lr_factor, patience=training.lr_patience)
    batches = LengthBuckets(data.train.lengths, training.batch_size, random_generator(seed, "batches"))
    loader = new_loader(data.train, batches)
    stopper, history, best_weights = EarlyStopping(training.patience), [], {}
    for epoch in range(1, training.epochs + 1):
        start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
        loss, score, norm = train_epoch(model, task, optimizer, loader, training, tell)
        validation = evaluate(model, task, data.validation)
        row = {
            "epoch": epoch,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": time.perf_counter() - start,
            "train": task.measure(loss, score, data.unit),
            "validation": task.measure(validation["loss"], validation["score"], data.unit),
        }
        val_loss = row["validation"]["loss"]
        if not math.isfinite(loss + val_loss):
            raise TrainingDiverged(
                f"{type(model).__name__} ({task.name}), seed {seed}: the loss is not finite in epoch {epoch}; try a "
                f"learning rate below {rate:g} or a clip norm below {training.clip_norm:g}"
            )
        history.append(row)
        tell(row)
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

RECORD_FORMAT = 3  # of records and checkpoints
MATCHED = "-matched"  # marks a model whose recurrent parameters match the LSTM's
HOST = platform.node().replace(".", "-")
Job = tuple[str, str, int]  # one run: task, model, seed


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, whatever happens: temporary name, flush, rename."""
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
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


def remove_leftovers(output_dir: Path) -> None:
    """Delete the temporary files of processes of this machine that were killed while they wrote."""
    for path in [*output_dir.glob(".*.tmp"), *output_dir.glob("*/.*.tmp")]:
        ours = re.fullmatch(rf"\..+\.{re.escape(HOST)}\.([0-9]+)\.tmp", path.name)
        if ours and (int(ours[1]) == os.getpid() or not is_running(int(ours[1]))):
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is such a process; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Reporter:
    """Tells how far a run has come: the number of batches a few times a second, and every epoch's row."""

    def __init__(self, tell: Callable[[int, dict | None], object]) -> None:
        self.tell, self.batches, self.last = tell, 0, 0.0

    def __call__(self, row: dict | None) -> None:
        self.batches += row is None  # after each batch; after each epoch comes its row
        if row or time.monotonic() - self.last > 0.2:
            self.last = time.monotonic()
            self.tell(self.batches, row)


class Progress:
    """What the user sees: a bar for everything, with the time left, above one for each run that is being trained.

    `expected` holds the seconds and the number of batches of each run if it goes through all its epochs. Where
    there is neither a terminal nor a notebook, there is a line per epoch instead. Runs that failed are named at the
    end, also when that comes early.
    """

    def __init__(self, expected: Mapping[Job, tuple[float, int]], at_once: int) -> None:
        notebook = any(parent.__module__ == "tqdm.notebook" for parent in tqdm.__mro__)
        self.expected, self.done, self.failures = expected, {}, {}  # done: seconds' worth of each run
        bar = partial(tqdm, disable=not (notebook or sys.stderr.isatty()), leave=False, dynamic_ncols=True)
        everything = "{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
        one_run = "{desc} {percentage:3.0f}%{postfix} |{bar}|"
        total = sum(seconds for seconds, _ in expected.values())
        self.overall = bar(total=total, desc="all runs", bar_format=everything, position=0)
        self.idle = [bar(total=1, bar_format=one_run, position=place) for place in range(at_once, 0, -1)]
        self.bars = {}  # of the runs that are being trained

    def close(self) -> None:
        """Take the bars away and name the runs that failed."""
        for bar in (*self.idle, *self.bars.values(), self.overall):
            bar.close()
        for job, failure in self.failures.items():
            print("failed: {} {} seed {}: {}".format(*job, failure), file=sys.stderr)

    def update(self, job: Job, batches: int, row: Mapping | None) -> None:
        """Show that a run has come to `batches` batches, and the row of an epoch that it has ended."""
        seconds, total = self.expected[job]
        self.done[job] = seconds * batches / total
        if self.overall.disable:
            if row:
                print(epoch_line(job, row), file=sys.stderr, flush=True)
            return
        if job not in self.bars:
            self.bars[job] = self.idle.pop()
            self.bars[job].set_description_str("{} {} seed {}".format(*job), refresh=False)
            self.bars[job].set_postfix_str("", refresh=False)
        bar = self.bars[job]
        if row:
            bar.set_postfix_str(f"epoch {row['epoch']}, validation loss {row['validation']['loss']:.4f}", refresh=False)
        bar.n, bar.total = batches, total
        bar.refresh()
        self.refresh()

    def finish(self, job: Job, failure: str) -> None:
        """Count a run as done, however early it stopped; `failure` says what went wrong, if anything did."""
        self.done[job] = self.expected[job][0]
        if failure:
            self.failures[job] = failure
        if job in self.bars:
            self.idle.append(self.bars.pop(job))
        self.refresh()

    def refresh(self) -> None:
        """Move the bar for everything."""
        self.overall.n = sum(self.done.values())
        self.overall.refresh()


def epoch_line(job: Job, row: Mapping) -> str:
    """An epoch's row of the history, for a log."""
    names = dict.fromkeys(["loss", TASKS[job[0]].metrics[0].name])
    values = ", ".join(f"{name} {row['train'][name]:.4g}/{row['validation'][name]:.4g}" for name in names)
    epoch = "{} {} seed {}  epoch {:2d}".format(*job, row["epoch"])
    return f"{epoch}  train/val {values}  rate {row['learning_rate']:.2g}  {row['seconds']:.1f} s"


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


def settings(config: object) -> dict:
    """A configuration as its record holds it; of a user's file the name and the content, not the place."""
    values = json.loads(json.dumps(asdict(config)))  # tuples are lists in a record
    if values["own"]:
        values["own"]["path"] = Path(values["own"]["path"]).name
    return values


@lru_cache(maxsize=1)
def cached_data(task_name: str, config: object, seed: int) -> TaskData:
    """A seed's data, kept for the next model of the same seed."""
    return TASKS[task_name].build_data(config, seed)


def train_run(
    job: Job,
    tell: Callable[[int, dict | None], object],
    config: Config,
    device: torch.device,
    output_dir: Path,
    costs: Mapping[str, Mapping[str, Mapping]],
    evidence: Callable[[Task, nn.Module, nn.Module, TaskData], dict],
) -> None:
    """Train and test one model on one seed's data; leaves its checkpoint and its record in `output_dir`.

    The test split is opened when the best validation weights are back: nothing is chosen by it. `costs` (by task
    and model) and what `evidence` finds out about the trained and the initial model go into the record, so that
    the report needs no model. Raises TrainingDiverged.
    """
    task, model_name, seed = TASKS[job[0]], *job[1:]
    own_config = getattr(config, task.name)
    data = cached_data(task.name, own_config, seed).to(device)
    model, arguments = build_model(task, model_name, data.arguments, seed)
    history = fit(model.to(device), task, data, own_config.training, seed, Reporter(tell))
    examples = evaluate(model, task, data.test)
    initial = build_model(task, model_name, data.arguments, seed)[0].to(device)
    record = {
        "format": RECORD_FORMAT,
        "task": task.name,
        "model": model_name,
        "seed": seed,
        "question": data.question,
        "configuration": settings(own_config),
        "environment": environment(device),
        "parameters": count_parameters(model),
        "layers": describe(model, data.train.inputs[:2]),
        "input_shape": list(data.train.inputs.shape[1:]),
        "history": history,
        "test": task.measure(examples["loss"], examples["score"], data.unit),
        "references": [
            {
                "name": r.name,
                "kind": r.kind,
                "remark": r.remark,
                "examples": as_lists({"loss": r.loss, "score": r.score}),
            }
            | task.measure(r.loss, r.score, data.unit)
            for r in data.references
        ],
        "facts": dict(data.facts),
        "unit": data.unit,
        "offset": data.offset,
        "examples": as_lists(examples | data.notes),
        "cost": dict(costs[task.name][model_name]),
        "evidence": evidence(task, model, initial, data),
    }
    name = run_name(*job)
    path = output_dir / "runs" / f"{name}.json"
    path.unlink(missing_ok=True)  # one of another configuration must not stand beside this model
    save_checkpoint(output_dir / "models" / f"{name}.pt", model, arguments, record, data)
    write_whole(path, json.dumps(record | {"checksum": checksum(record)}))


def as_lists(examples: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Values per example as a record holds them."""
    return {name: np.round(values.astype(float), 6).tolist() for name, values in examples.items()}


def checksum(record: Mapping) -> str:
    """A digest by which a damaged record is told from a whole one."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
    torch.save(checkpoint, content := io.BytesIO())
    write_whole(path, content.getvalue())


def load_checkpoint(path: str | Path) -> Trained:
    """The model saved at `path`, on the CPU and ready to `predict`; raises InputError.

    No code in the file is run: torch reads tensors and plain values only, and what it read must be of the form
    that `save_checkpoint` gives it before a model is made of it.
    """
    if not os.path.isfile(path):  # noqa: PTH113 (Path's raises if a name is too long)
        raise InputError(f"{path}: no such file; trained models are in the folder 'models' of an output directory")
    try:
        return trained_from(torch.load(path, map_location="cpu", weights_only=True))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a model that this script can use ({describe_failure(error)[:120]})") from error
    except Exception as error:  # a foreign or damaged file can make torch stumble over anything
        raise InputError(f"{path}: not a model that this script can use (damaged, or something else)") from error


def trained_from(checkpoint: Mapping) -> Trained:
    """The model in a checkpoint's content; raises an error of any kind if that is not what it must be."""
    found, name = checkpoint["format"], checkpoint["model"]
    require(
        found <= RECORD_FORMAT, f"its format {found} is newer than this script's, {RECORD_FORMAT}; get a newer script"
    )
    require(found == RECORD_FORMAT, f"its format {found} is older than this script's, {RECORD_FORMAT}; train it again")
    require(checkpoint["task"] in TASKS, f"it is for a task {checkpoint['task']!r}")
    require(base_name(name) in MODEL_NAMES, f"it is a model {name!r}")
    task, weights, arguments = TASKS[checkpoint["task"]], checkpoint["weights"], checkpoint["arguments"]
    require(arguments["n_layers"] <= 100, "more than 100 layers")
    with torch.device("meta"):  # takes no memory, so that sizes which the weights do not have do no harm
        model = task.models[base_name(name)](**arguments)
    expected = {name: (weight.shape, weight.dtype) for name, weight in model.state_dict().items()}
    require(expected == {name: (w.shape, w.dtype) for name, w in weights.items()}, "its weights do not fit its model")
    require(all(weight.isfinite().all() for weight in weights.values()), "its weights are not finite")
    model.load_state_dict(weights, assign=True)
    return task.in_use(model, checkpoint["decoding"], checkpoint["metrics"])


# --- many runs ------------------------------------------------------------------------


def run_here(jobs: Sequence[Job], train_one: Callable, progress: Progress) -> None:
    """Train one run after the other in this process."""
    for job in jobs:
        progress.finish(job, judged(attempt(job, train_one, partial(progress.update, job))))
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def attempt(job: Job, train_one: Callable, tell: Callable) -> Exception | None:
    """Train a run; returns what went wrong."""
    try:
        train_one(job, tell)
    except Exception as error:
        return error
    return None


def judged(error: Exception | None) -> str:
    """What went wrong in a run, if its loss diverged or it ran out of memory; any other error is raised."""
    if error and not isinstance(error, (RuntimeError, MemoryError)):
        raise error
    return describe_failure(error) if error else ""


def describe_failure(error: BaseException) -> str:
    """An error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


KEEP_MEMORY = {  # for glibc, at the start of a process: freed memory is kept; a tenth of an LSTM's step was page faults
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}


def work(connection: Connection, train_one: Callable, device: torch.device) -> None:
    """The life of a worker process: train the runs that come through `connection`, tell what becomes of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    prepare_device(device)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        for job in iter(connection.recv, None):
            connection.send((None, attempt(job, train_one, lambda *news: connection.send(news))))
            gc.collect()


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block; processes that are started in it never hear of Ctrl-C."""
    came, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # only there can a signal be listened to
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, _frame: came.append(number))
    if posix := hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # else the first process starts it, and that takes the mask away
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children inherit it
    try:
        yield
    finally:
        if posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def run_in_workers(
    jobs: Sequence[Job], train_one: Callable, progress: Progress, device: torch.device, workers: int
) -> None:
    """Train `workers` runs at a time, each in a process of its own.

    The processes are kept for the next runs. One that dies fails the run that it had, and is replaced. All have
    ended when this returns or raises.
    """
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    spawn, waiting, crew = multiprocessing.get_context("spawn"), deque(jobs), {}
    try:
        while waiting or crew:
            while waiting and len(crew) < workers:
                with signals_held():
                    connection, theirs = spawn.Pipe()
                    process = spawn.Process(target=work, args=(theirs, train_one, device), daemon=True)
                    process.start()
                    theirs.close()
                    crew[connection] = process, hand_out(waiting, connection)
            for connection in wait_for_any(list(crew)):
                process, job = crew[connection]
                try:
                    batches, news = connection.recv()
                except (EOFError, OSError):  # it has ended, as told to or not
                    process.join()
                    del crew[connection]
                    if job:
                        progress.finish(
                            job, f"its process ended with status {process.exitcode}; killed, or out of memory?"
                        )
                    continue
                if batches is None:
                    progress.finish(job, judged(news))
                    crew[connection] = process, hand_out(waiting, connection)
                else:
                    progress.update(job, batches, news)
    finally:
        for process, _ in crew.values():
            process.kill()
        for process, _ in crew.values():
            process.join()


def hand_out(waiting: deque[Job], connection: Connection) -> Job | None:
    """Give a worker the next run, or None, which ends it."""
    job = waiting.popleft() if waiting else None
    with suppress(ConnectionError):  # a worker that has just died is noticed when it is listened to
        connection.send(job)
    return job


def read_record(path: Path) -> dict:
    """A run's record; raises an error of some kind if the file does not hold a whole one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    stated = record.pop("checksum")
    require(record["format"] == RECORD_FORMAT and stated == checksum(record), "not a whole record")
    require(path.stem == run_name(record["task"], record["model"], record["seed"]), "the record of another run")
    require(record["task"] in TASKS and base_name(record["model"]) in MODEL_NAMES, "of no task or model there is")
    return record


def read_records(output_dir: Path, config: Config) -> list[dict]:
    """The records in `output_dir` of runs with this configuration, by task, model and seed."""
    records = []
    for path in (output_dir / "runs").glob("*.json"):
        try:
            record = read_record(path)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            print(f"{path} is not the whole record of a run of this version; it is left out", file=sys.stderr)
            continue
        if record["configuration"] == settings(getattr(config, record["task"])):
            records.append(record)
    order = {name: i for i, name in enumerate([*TASKS, *MODEL_NAMES])}
    return sorted(
        records, key=lambda r: (order[r["task"]], r["model"].endswith(MATCHED), order[base_name(r["model"])], r["seed"])
    )


# ======================================================================================
# 8. Evidence
# ======================================================================================

COST_COLUMNS = ("ms_per_step", "samples_per_second", "activation_bytes", "kernel")
CSV_METRICS = ("accuracy", "loss", "mse", "mae")
ONE_SEED = " on one seed"  # ends a verdict that says nothing of other seeds


def of_task(records: Sequence[Mapping], task: Task) -> list[Mapping]:
    """The records of one task."""
    return [r for r in records if r["task"] == task.name]


def tasks_in(records: Sequence[Mapping]) -> list[Task]:
    """The tasks that have records, in their order."""
    return [task for task in TASKS.values() if of_task(records, task)]


def by_model(records: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """The records of each model, in their order."""
    groups = {}
    for record in records:
        groups.setdefault(record["model"], []).append(record)
    return groups


def one_per_model(records: Sequence[Mapping]) -> list[Mapping]:
    """A record of each model of each task, for what does not depend on the seed."""
    return list({(r["task"], r["model"]): r for r in records}.values())


# --- statistics over seeds ------------------------------------------------------------


def compare_models(records: Sequence[Mapping]) -> pd.DataFrame:
    """Paired differences on the seeds that both have, with their 95 % interval and a verdict in words.

    Of each two models of a task, and, in the metric that the models are judged by, of each with the best baseline.
    """
    rows = []
    for task in tasks_in(records):
        own = of_task(records, task)
        models, baseline = list(by_model(own).values()), best_baseline(own, task)
        contests = [(*two, task.metrics) for two in combinations(models, 2)]
        contests += [(runs, baseline, task.metrics[:1]) for runs in models]
        for first, second, metrics in contests:
            by_seed = {r["seed"]: r for r in second}
            pairs = [(r, by_seed[r["seed"]]) for r in first if r["seed"] in by_seed]
            rows += [compare_pair(pairs, task, metric) for metric in metrics if pairs and metric.name in CSV_METRICS]
    columns = ["task", "metric", "a", "b", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def best_baseline(records: Sequence[Mapping], task: Task) -> list[Mapping]:
    """The runs, as `as_runs` makes them, of the baseline that does best on average."""
    metric, references = task.metrics[0], records[0]["references"]
    baselines = [as_runs(records, r["name"]) for r in references if r["kind"] == "baseline"]
    sign = 1 if metric.higher_is_better else -1
    return max(baselines, key=lambda runs: sign * np.mean([run[metric.name] for run in runs]))


def as_runs(records: Sequence[Mapping], name: str) -> list[Mapping]:
    """What a baseline or a ceiling scores, a record per seed, as if it were a model's."""
    by_seed = {}
    for record in records:
        reference = next(r for r in record["references"] if r["name"] == name)
        examples = record["examples"] | reference["examples"]
        by_seed[record["seed"]] = {**record, **reference, "model": name, "examples": examples}
    return list(by_seed.values())


def compare_pair(pairs: Sequence[tuple[Mapping, Mapping]], task: Task, metric: Metric) -> tuple:
    """One row of `compare_models` from two models' records, paired by seed."""
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
    verdict += ONE_SEED * (len(pairs) == 1)
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
    task: Task, models: Sequence[str], config: object, data: TaskData, device: torch.device, steps: int, rounds: int
) -> dict[str, dict]:
    """What a training step of each model costs, in the script's own loop and in the barest one possible.

    The models and the two loops take turns on the same `steps` batches, `rounds` times, after a step to warm up,
    and the loop that begins changes every round; the medians count. The overhead is what the script's loop takes
    beyond the bare one next to it, as a share. The activations are those of the longest examples.
    """
    data = data.to(device)
    lengths, size = data.train.lengths, min(config.training.batch_size, len(data.train))
    batches = typical_batches(LengthBuckets(lengths, size, random_generator(0, "costs")), steps)
    loader, ready = new_loader(data.train, batches), [data.train.__getitems__(rows) for rows in batches]
    longest = data.train.__getitems__(lengths.topk(size).indices)
    contenders, costs = {}, {}
    for name in models:
        model = build_model(task, name, data.arguments, 0)[0].to(device)
        optimizer = new_optimizer(model, config.training)
        bare_loop = partial(bare_epoch, model, task, optimizer, ready)
        own_loop = partial(train_epoch, model, task, optimizer, loader, config.training, lambda row: None)
        contenders[name] = model, {bare_loop: [], own_loop: []}
        bare_epoch(model, task, optimizer, ready[-1:])
    for turn in range(rounds):
        for _, loops in contenders.values():
            for loop, seconds in list(loops.items())[:: (-1) ** turn]:
                start = time.perf_counter()
                loop()
                seconds.append(time.perf_counter() - start)
    for name, (model, loops) in contenders.items():
        times = np.array(list(loops.values())) / steps  # (2, rounds): bare and own
        bare, own = np.median(times, axis=1)
        costs[name] = {
            "ms_per_step": round(1000 * own, 2),
            "samples_per_second": round(size / own),
            "bare_ms_per_step": round(1000 * bare, 2),
            "bare_samples_per_second": round(size / bare),
            "overhead": round(float(np.median(times[1] / times[0])) - 1, 4),
            "activation_bytes": activation_bytes(model, task, longest),
            "kernel": kernel_name(model, ready[0][0]),
        }
    return costs


def bare_epoch(
    model: nn.Module, task: Task, optimizer: optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """The least that training is: forward, backward and step on batches that are ready."""
    for inputs, targets in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model(inputs), targets).mean()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device


def typical_batches(batches: LengthBuckets, count: int) -> list[np.ndarray]:
    """`count` full batches, from the shortest to the longest examples; some twice if there are fewer."""
    full = [rows for rows in batches if len(rows) == batches.batch_size] or list(batches)
    full.sort(key=lambda rows: batches.lengths[rows].max())
    return [full[int((i + 0.5) / count * len(full))] for i in range(count)]


def activation_bytes(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes that the forward pass on `batch` keeps for the backward pass, the weights themselves left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        task.loss(model(batch[0]), batch[1]).mean()
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


def gradient_by_step(model: nn.Module, task: Task, data: TaskData, n: int = 64) -> list[float]:
    """Size of the loss's gradient with respect to the embedded input, by steps back from the last word.

    Mean over the `n` longest test reviews of the Euclidean norm; as many steps as the shortest of them has.
    """
    rows = data.test.lengths.topk(min(n, len(data.test))).indices
    inputs, targets = data.test.__getitems__(rows)
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


def free_running(model: nn.Module, task: Task, data: TaskData, horizon: int = 120, stride: int = 10) -> dict:
    """Forecasts of `horizon` steps in which each prediction is fed back, from every `stride`-th test window.

    Returns the first of them and its truth, standardised, and the mean squared error by horizon, in the
    units of the series squared.
    """
    horizon = min(horizon, max(len(data.test) // 2, 1))
    windows = data.test.inputs[: len(data.test) - horizon + 1 : stride]  # (O, T, 1)
    truth = data.test.targets[:, 0].unfold(0, horizon, stride)  # (O, horizon)
    forecasts = roll_forward(model, windows, horizon)  # (O, horizon)
    errors = ((forecasts - truth) ** 2).mean(dim=0) * data.unit**2
    return {"forecast": forecasts[0].tolist(), "truth": truth[0].tolist(), "mse": errors.tolist()}


EVIDENCE = {  # task: name of a measurement -> the measurement, and the model it is made on
    CLASSIFIER.name: {"gradient": (gradient_by_step, "trained"), "initial_gradient": (gradient_by_step, "initial")},
    PREDICTOR.name: {},
    FORECASTER.name: {"free_running": (free_running, "trained")},
}


def measure_evidence(task: Task, trained: nn.Module, initial: nn.Module, data: TaskData) -> dict:
    """All measurements of the task's models beside their scores."""
    models = {"trained": trained, "initial": initial}
    return {what: measure(models[which], task, data) for what, (measure, which) in EVIDENCE[task.name].items()}


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
MARKS = {"baseline": ("D", GREY), "ceiling": ("|", "black")}  # a model's is a circle of its colour
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
    for task in tasks_in(records):
        own = of_task(records, task)
        scores = [r["test"] | {"name": r["model"], "kind": "model", "seed": r["seed"]} for r in own]
        scores += [reference | {"seed": r["seed"]} for r in own for reference in r["references"]]
        for score in scores:
            head = {"task": task.name, "name": score["name"], "kind": score["kind"], "seed": score["seed"]}
            rows += [head | {"metric": m.name, "value": score[m.name]} for m in task.metrics]
    table = pd.DataFrame(rows).drop_duplicates(["task", "name", "metric", "seed"])  # all models hold the references
    groups = table.groupby(["task", "name", "kind", "metric"], sort=False)["value"]
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def plus_minus(mean: float, std: float, form: str) -> str:
    """'76.1 % ± 1.2': a mean with its standard deviation, if there is one."""
    number = format(mean, form).replace("%", " %").rstrip(".")  # of 1234. at four digits
    std = 0.0 if std < 1e-12 * abs(mean) else std  # the rounding errors of equal values
    return number if math.isnan(std) else f"{number} ± {format(std, form.replace('4g', '2g')).rstrip('%.')}"


def performance_table(records: Sequence[Mapping], task: Task) -> pd.DataFrame:
    """One task's results as a person reads them: models, baselines and ceiling, mean ± deviation over seeds."""
    runs, scores = runs_table(of_task(records, task)).groupby("model"), scores_table(of_task(records, task))
    first = scores[scores["metric"] == task.metrics[0].name].set_index("name")
    ceiling = first[first["kind"] == "ceiling"]["mean"]
    baselines = first[first["kind"] == "baseline"]["mean"]
    rows = []
    for name, cells in scores.groupby("name", sort=False):
        cells = cells.set_index("metric")
        row = {"": name, "kind": cells["kind"].iloc[0]}
        row |= {m.name: plus_minus(cells.loc[m.name, "mean"], cells.loc[m.name, "std"], m.form) for m in task.metrics}
        if name in runs.groups:
            run, row["gap closed"] = runs.get_group(name), gap_closed(first.loc[name, "mean"], baselines, ceiling)
            row |= {"best epoch": f"{run['best_epoch'].mean():.1f}", "seconds": f"{run['seconds'].mean():.1f}"}
        rows.append(row)
    if ceiling.empty:
        rows.append({"": "best possible", "kind": "ceiling"} | {m.name: "unknown" for m in task.metrics})
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
            **{name: record["cost"][name] for name in COST_COLUMNS},
        }
        for record in one_per_model(records)
    )


def accuracy_by(records: Sequence[Mapping], note: str, score: str = "score") -> pd.Series:
    """Mean of `score` for each value of a note on the test examples: within a seed, then over the seeds."""
    by_seed = {r["seed"]: pd.DataFrame(r["examples"]).groupby(note)[score].mean() for r in records}
    return pd.DataFrame(by_seed).mean(axis=1).sort_index()


def findings(records: Sequence[Mapping], task: Task, comparisons: pd.DataFrame) -> list[str]:
    """What one task's results say, in sentences: verdicts on pairs, hard cases, who learns fastest."""
    metric, own = task.metrics[0], of_task(records, task)
    verdicts = comparisons[(comparisons["task"] == task.name) & (comparisons["metric"] == metric.name)]
    sentences = [f"{verdict}." for verdict in verdicts["verdict"]]
    if verdicts["verdict"].str.endswith(ONE_SEED).any():
        sentences.append("One seed supports no ranking: its intervals are over test examples only.")
    for reference in own[0]["references"]:
        if reference["remark"] and reference["name"] in set(verdicts["b"]):
            sentences.append(f"On {reference['name']}: {reference['remark']}.")
    scores = scores_table(own)
    scores = scores[scores["metric"] == metric.name].set_index("name")
    what, note, least = task.hard_cases
    if note in own[0]["examples"]:  # generated data only: of a user's nobody knows
        marked = [{**r, "examples": r["examples"] | {"hard": np.array(r["examples"][note]) >= least}} for r in own]
        shares = {name: accuracy_by(runs, "hard").get(True, math.nan) for name, runs in by_model(marked).items()}
        sentences.append(f"Accuracy on {what}: {listed(shares, '.1%')}.")
    models, ceiling = (scores[scores["kind"] == kind]["mean"] for kind in ("model", "ceiling"))
    if len(ceiling) and not metric.higher_is_better:
        sentences.append(
            f"{metric.name.upper()} over that of the {ceiling.index[0]}: {listed(models / ceiling.iloc[0], '.2f')}."
        )
    epochs = runs_table(own).groupby("model", sort=False)["best_epoch"].mean()
    sentences.append(f"Best epoch, mean over seeds: {listed(epochs, '.1f')}.")
    return sentences


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
    seeds = {name: ", ".join(str(r["seed"]) for r in runs) for name, runs in by_model(own).items()}
    all_the_same = len(set(seeds.values())) == 1
    seeds = seeds[own[0]["model"]] if all_the_same else "; ".join(f"{seeds[name]} ({name})" for name in seeds)
    facts = [
        f"{name} {value:,}" if value == int(value) else f"{name} {value:.3g}" for name, value in own[0]["facts"].items()
    ]
    source = own[0]["configuration"]["own"]
    origin = f"{source['path']} (SHA-256 {source['digest'][:12]}...)" if source else "the generated data"
    sentences = "\n".join(f"- {sentence}" for sentence in findings(records, task, comparisons))
    return (
        f"## {task.title}\n\n{own[0]['question']}\n\n{markdown(performance_table(records, task))}\n\n"
        f"Test split, mean ± standard deviation over the seeds {seeds}.\n\n{sentences}\n\n"
        f"Of {origin}, seed {own[0]['seed']}: {', '.join(facts)}.\n"
    )


def summary_text(records: Sequence[Mapping], comparisons: pd.DataFrame) -> str:
    """The tables as a page of Markdown, with what the data were and where it ran."""
    environments = [record["environment"] for record in records]
    values = {name: sorted({str(each[name]) for each in environments}) for name in environments[0]}
    parts = [
        "# RNN, LSTM and GRU: results\n",
        "The same training for a vanilla RNN, an LSTM and a GRU. Each seed draws its own data; of a user's file it "
        "draws the splits of the reviews, while a text or a series is always cut at the same places. A ceiling is the "
        "best that is possible on generated data; gap closed is how much of the way from the best baseline to it a "
        "model has come, negative if it does worse than that baseline. Brackets hold 95 % intervals of the paired "
        "difference of two models, or of a model and the best baseline, from a hierarchical bootstrap over seeds and "
        "test examples; of three seeds they are rough, and rather too narrow. Seconds are those of a run's training, "
        "with other runs beside it.\n",
        *(task_text(records, task, comparisons) for task in tasks_in(records)),
        f"## Parameters\n\n{markdown(parameters_table(records))}\n",
        f"## Cost of a training step\n\n{markdown(costs_table(records))}\n\nMedian time of a step, the models taking "
        "turns on the same batches if one command trained them; activations: what the forward pass on a batch of the "
        "longest examples keeps for the backward pass. The kernel is the implementation of the recurrent layer that "
        "ran: times compare kernels as much as cells.\n",
        "## Environment\n\n" + "\n".join(f"- {name}: {', '.join(value)}" for name, value in values.items()) + "\n",
    ]
    return "\n".join(parts)


# --- figures --------------------------------------------------------------------------


def training_history_figure(records: Sequence[Mapping], task: Task) -> Figure:
    """Loss and metric by epoch: a column per model, a line per seed."""
    models, metrics = by_model(of_task(records, task)), task.metrics[:2]
    figure = Figure(figsize=(max(3.2 * len(models) + 0.8, 7.2), 5.4), layout="constrained")
    grid = figure.subplots(len(metrics), len(models), sharex=True, sharey="row", squeeze=False)
    for column, (name, runs) in zip(grid.T, models.items()):
        column[0].set_title(name, color=colour(name), fontweight="bold")
        column[-1].set_xlabel("epoch")
        for record in runs:
            epochs, kept = [row["epoch"] for row in record["history"]], best_epoch(record)
            for axes, metric in zip(column, metrics):
                for split, dashes in (("train", ":"), ("validation", "-")):
                    values = [row[split][metric.name] for row in record["history"]]
                    axes.plot(epochs, values, f".{dashes}", color=colour(name), linewidth=1.2, markersize=2, alpha=0.8)
                axes.plot(kept["epoch"], kept["validation"][metric.name], "o", color=colour(name), markersize=5)
    for axes, metric in zip(grid[:, 0], metrics):
        axes.set_ylabel(metric.label)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    lines = [
        Line2D([], [], color=GREY, linestyle=":", label="training (running mean over the epoch)"),
        Line2D([], [], color=GREY, label="validation"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="epoch whose weights were kept"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    figure.suptitle(f"{task.title}: training, a line per seed")
    return figure


def forecasts_figure(records: Sequence[Mapping], task: Task) -> Figure:
    """Forecasts against the truth, one step ahead and free-running, and the latter's error by horizon."""
    own = of_task(records, task)
    first = [runs[0] for runs in by_model(own).values()]
    figure = Figure(figsize=(11, 1.9 * len(first) + 3.4), layout="constrained")
    grid = figure.add_gridspec(len(first) + 1, 2, height_ratios=[*[1] * len(first), 1.3])
    for row, record in enumerate(first):
        left = figure.add_subplot(grid[row, 0])
        right = figure.add_subplot(grid[row, 1], sharey=left)
        examples, free = record["examples"], record["evidence"]["free_running"]
        draw_forecast(left, examples["truth"][:120], examples["answer"][:120], record)
        draw_forecast(right, free["truth"], free["forecast"], record)
        name, shade = f"{record['model']}, seed {record['seed']}", colour(record["model"])
        left.set_title(f"{name}, one step ahead: MSE {record['test']['mse']:.4g}", color=shade)
        right.set_title(f"{name}, free-running: each forecast is fed back", color=shade)
        left.set_ylabel("value (series units)")
    left.set_xlabel("test example, in order of time")
    right.set_xlabel("steps ahead of the last observed value")
    free_running_errors(figure.add_subplot(grid[-1, :]), own)
    observed = Line2D([], [], color=GREY, marker="o", markersize=2.5, linewidth=0, label="observed value")
    forecast = Line2D([], [], color="black", label="forecast (in the model's colour)")
    figure.legend(handles=[observed, forecast], loc="outside lower center", ncols=2)
    figure.suptitle(f"{task.title}: forecasts against the truth")
    return figure


def draw_forecast(axes: Axes, truth: Sequence[float], forecast: Sequence[float], record: Mapping) -> None:
    """Observed values as points and a forecast as a line, both brought from standardised to series units."""
    steps = np.arange(1, len(truth) + 1)
    observed, forecast = (np.array(values) * record["unit"] + record["offset"] for values in (truth, forecast))
    axes.plot(steps, observed, color=GREY, marker="o", markersize=2.5, linewidth=0)
    axes.plot(steps, forecast, color=colour(record["model"]))


def free_running_errors(axes: Axes, records: Sequence[Mapping]) -> None:
    """Mean squared error of free-running forecasts by horizon, each model, mean over seeds."""
    for name, runs in by_model(records).items():
        errors = np.mean([r["evidence"]["free_running"]["mse"] for r in runs], axis=0)
        axes.plot(np.arange(1, len(errors) + 1), errors, color=colour(name), label=name)
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


def draw_layer(axes: Axes, x: int, layer: Mapping, edge: tuple[float, ...]) -> None:
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
            marker, shade = MARKS.get(line.kind) or ("o", colour(line.name))
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
        cost_bars(row[3], steps["activation_bytes"] / 2**20, "activations (MiB, longest batch)")
    figure.suptitle("Test split, mean ± standard deviation over seeds (diamonds: baselines, bar: ceiling), and costs")
    return figure


def cost_bars(axes: Axes, values: pd.Series, label: str, notes: pd.Series | None = None) -> None:
    """A bar per model, from the top, with its value and a note behind it."""
    values = values.iloc[::-1]
    bars = axes.barh(values.index, values, color=[colour(name) for name in values.index])
    texts = [f"{value:.3g}" + (f" {notes[name]}" if notes is not None else "") for name, value in values.items()]
    axes.bar_label(bars, texts, padding=3)
    axes.set(xlabel=label, xlim=(0, max((1.35 if notes is None else 2.0) * values.max(), 0.1)))
    axes.set_ylim(-0.75, len(values) - 0.25)  # a bar alone is no wider than among others
    axes.grid(axis="y", visible=False)


def long_range_panels(records: Sequence[Mapping]) -> list[tuple[Callable, list[Mapping]]]:
    """The panels for which there are records, with these; two of them need what only a generator knows."""
    classifier, predictor = of_task(records, CLASSIFIER), of_task(records, PREDICTOR)
    panels = [
        (gradient_panel, classifier),
        (distance_panel, [r for r in predictor if "cue_distance" in r["examples"]]),
        (ending_panel, [r for r in classifier if "verdict_contradicts" in r["examples"]]),
    ]
    return [(draw, own) for draw, own in panels if own]


def long_range_figure(records: Sequence[Mapping]) -> Figure:
    """Why memory matters: gradient by time step, next-word accuracy by distance, reviews with a false ending."""
    panels = long_range_panels(records)
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, (draw, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, own)
    lines = [Line2D([], [], color=colour(name), label=name, linewidth=3) for name in by_model(records)]
    if distance_panel in dict(panels):
        lines.append(Line2D([], [], color=GREY, marker="D", linestyle="--", label="trigram"))
        lines.append(Line2D([], [], color="black", linestyle=":", label="best guess from the grammar's full state"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines) if len(panels) > 1 else 1)
    figure.suptitle("Long-range memory, mean over seeds")
    return figure


def gradient_panel(axes: Axes, records: Sequence[Mapping]) -> None:
    """Size of the gradient that reaches each word, before and after training."""
    for name, runs in by_model(records).items():
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
    lines = [(runs, "score", "o-", colour(name)) for name, runs in by_model(records).items()]
    lines += [(as_runs(records, "trigram"), "score", "D--", GREY), (records, "best_score", ":", "black")]
    for runs, score, style, shade in lines:
        accuracy = accuracy_by(runs, "cue_distance", score).drop(0, errors="ignore")  # 0: a word without a cue
        axes.plot(100 * accuracy, style, color=shade, markersize=4)
    axes.set(title="Next word, by distance of its cue", xlabel="distance of the cue (words back)", ylim=(0, 100))
    axes.set_ylabel("accuracy (%)")


def ending_panel(axes: Axes, records: Sequence[Mapping]) -> None:
    """Accuracy on reviews whose closing verdict agrees with their label, and on those where it does not."""
    models = by_model(records)
    for i, (name, runs) in enumerate(models.items()):
        accuracy = 100 * accuracy_by(runs, "verdict_contradicts").reindex([0, 1])
        middle = np.arange(2) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
        axes.bar_label(axes.bar(middle, accuracy, 0.75 / len(models), color=colour(name)), fmt="%.0f")
    axes.axhline(50, color=GREY, linestyle="--", linewidth=1)
    axes.set(title="Reviews, by what their last word says", ylim=(0, 105), xticks=[0, 1])
    axes.set_xticklabels(["ending agrees\nwith the label", "ending contradicts\nthe label"])
    axes.set_ylabel("accuracy (%); dashed: guessing")
    axes.grid(axis="x", visible=False)


def write_report(records: Sequence[Mapping], comparisons: pd.DataFrame, output_dir: Path) -> list[str]:
    """All tables, then all figures, from the records alone; returns what could not be drawn, and why."""
    scores = scores_table(records)
    tables = {
        "runs": runs_table(records),
        "summary": scores[scores["metric"].isin(CSV_METRICS)],
        "comparisons": comparisons[comparisons["b"].map(base_name).isin(MODEL_NAMES)],
        "costs": costs_table(records),
    }
    for name, table in tables.items():
        write_whole(output_dir / f"pytorch_rnn_{name}.csv", table.to_csv(index=False))
    write_whole(output_dir / "pytorch_rnn_summary.md", summary_text(records, comparisons))
    figures = {
        f"{task.name}_training_history": partial(training_history_figure, records, task) for task in tasks_in(records)
    }
    if of_task(records, FORECASTER):
        figures["time_series_predictions"] = partial(forecasts_figure, records, FORECASTER)
    if long_range_panels(records):
        figures["long_range"] = partial(long_range_figure, records)
    figures["parameter_counts"] = partial(parameters_figure, records)
    figures["architectures"] = partial(architectures_figure, records)
    figures["performance_summary"] = partial(performance_figure, records)
    failures = []
    for name, draw in figures.items():
        try:
            with rc_context(STYLE):
                draw().savefig(content := io.BytesIO(), format="png")
        except Exception as error:  # a figure must not cost the others
            failures.append(f"pytorch_rnn_{name}.png could not be drawn: {describe_failure(error)}")
        else:
            write_whole(output_dir / f"pytorch_rnn_{name}.png", content.getvalue())
    return failures


# ======================================================================================
# 10. Command line
# ======================================================================================


EXAMPLES = """examples:
  python pytorch_rnn_models.py --quick
      everything on tiny data, in half a minute: is all in order here?
  python pytorch_rnn_models.py --tasks classifier --reviews my_reviews.csv
      the comparison on your own labelled texts (--corpus and --series do the same for the other tasks)
  python pytorch_rnn_models.py --predict outputs/models/classifier_GRU_seed42.pt "A warm and clever film."
      use a model that was trained
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing the usage and ending the interpreter."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--\S+)", message)
        raise InputError(message + did_you_mean(unknown[1], self._option_string_actions) if unknown else message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the one of `known` that looks like `word`, if one does."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """An argument type: one of these words."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}{did_you_mean(text, known)}")
        return text

    return parse


def integer(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def non_negative(text: str) -> float:
    """An argument type: a finite number of 0 or more."""
    value = as_number(text)
    if value is None or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


OWN_DATA = {"classifier": "reviews", "predictor": "corpus", "forecaster": "series"}  # task: its option
PREDICTION = {"length": 20, "temperature": 1.0, "seed": 42}  # options of --predict with their defaults


def new_parser() -> Parser:
    """All options, in groups."""
    parser = Parser(
        prog="pytorch_rnn_models.py",
        description="Trains RNN, LSTM and GRU on three tasks and writes tables and figures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--tasks", nargs="+", type=one_of(TASKS), metavar="TASK", help=f"any of {', '.join(TASKS)}; default: all")
    add("--models", nargs="+", type=one_of(MODEL_NAMES), metavar="MODEL", help="any of RNN, LSTM, GRU; default: all")
    add("--seeds", nargs="+", type=integer(0), metavar="N", help="default: 42 43 44; with --quick: 42")
    add("--quick", action="store_true", help="the whole pipeline on tiny data, two epochs, in under 30 s")
    add("--epochs", type=integer(1), metavar="N", help="cap on epochs; default: 18 or 30, by task")
    add(
        "--match",
        type=one_of(("hidden", "params")),
        default="hidden",
        metavar="WHAT",
        help="hidden: equal hidden size (default); params: RNN and GRU with the LSTM's number of recurrent parameters",
    )
    add = parser.add_argument_group("your own data, in place of the generated (.gz works too)").add_argument
    add("--reviews", metavar="FILE.csv", help="for the classifier: columns text and label, two different labels")
    add("--corpus", metavar="FILE.txt", help="for the predictor: plain text, UTF-8")
    add("--series", metavar="FILE.csv", help="for the forecaster: a column of numbers, in order of time")
    add("--series-column", metavar="NAME", help="which column; default: the only numeric one")
    add = parser.add_argument_group("how and where").add_argument
    devices = ("auto", "cpu", "cuda", "mps")
    add(
        "--device",
        type=one_of(devices),
        default="auto",
        metavar="NAME",
        help="auto (default: CUDA where there is one, else CPU), cpu, cuda or mps",
    )
    add(
        "--workers",
        type=integer(1),
        metavar="N",
        help="runs trained at the same time, one thread each; default: as many as cores; on a GPU and with --quick: 1",
    )
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="default: outputs; with --quick outputs/quick; with your own data outputs/own_ and the file's name",
    )
    add("--resume", action="store_true", help="skip the runs that are finished in DIR")
    add = parser.add_argument_group("instead of training").add_argument
    add("--report", action="store_true", help="tables and figures again, from the records in DIR")
    add("--benchmark", action="store_true", help="what a training step costs, beside a loop with nothing but the step")
    add(
        "--predict",
        nargs=2,
        metavar=("CHECKPOINT", "INPUT"),
        help="use a trained model on a text, a file, or - for standard input",
    )
    add("--length", type=integer(1), metavar="N", help="words or values to continue by; default: 20")
    add("--temperature", type=non_negative, metavar="X", help="of the words: 0 takes the likeliest; default: 1")
    add("--seed", type=integer(0), metavar="N", help="of the words that --predict draws; default: 42")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises InputError when they cannot be followed."""
    options = new_parser().parse_args(argv)
    for name, default in PREDICTION.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not options.predict:
            raise InputError(f"--{name} goes with --predict" + "; for training there is --seeds" * (name == "seed"))
    modes = [f"--{name}" for name in ("report", "benchmark", "predict") if getattr(options, name)]
    if len(modes) > 1:
        raise InputError(f"{' and '.join(modes)} cannot go together")
    options.seeds = list(dict.fromkeys(options.seeds or (DEFAULT_SEEDS[:1] if options.quick else DEFAULT_SEEDS)))
    options.tasks = [name for name in TASKS if name in (options.tasks or TASKS)]
    options.models = [name for name in MODEL_NAMES if name in (options.models or MODEL_NAMES)]
    options.own = {task: name for task, flag in OWN_DATA.items() if (name := getattr(options, flag))}
    for task in options.own:
        if task not in options.tasks:
            raise InputError(f"--{OWN_DATA[task]} is for the task {task}, which --tasks leaves out")
    if options.series_column and not (options.series or options.predict):
        raise InputError("--series-column goes with --series or --predict")
    names = ["own", *(re.sub(r"(\.csv|\.txt)?(\.gz)?$", "", Path(name).name) for name in options.own.values())]
    default = "quick" if options.quick else "_".join(names) if options.own else ""
    options.output_dir = options.output_dir or Path("outputs", default)
    return options


def configuration(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for; raises InputError."""
    config = QUICK if options.quick else Config()
    config = config.with_epochs(options.epochs) if options.epochs else config
    for task, path in options.own.items():
        column = getattr(options, f"{OWN_DATA[task]}_column", None) or ""
        config = replace(config, **{task: replace(getattr(config, task), own=own_file(path, column))})
    return config


def choose_device(name: str) -> torch.device:
    """The device called `name`, made deterministic; raises InputError if it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        here = ", ".join(device for device, there in available.items() if there)
        raise InputError(f"--device {name}: there is none here; choose from {here}, or auto")
    device = torch.device(name)
    prepare_device(device)
    return device


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The processor cores that this process may use; a container may grant less than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, quota_file.read_text().split())  # microseconds of all cores; or "max"
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, quota // period))


def check_writable(directory: Path) -> None:
    """Raise OSError, before any training, if files cannot be written to `directory`."""
    try:
        for folder in (directory, directory / "runs", directory / "models"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--output-dir {directory}: cannot be written ({error.strerror}); choose another") from error


def print_summary(records: Sequence[Mapping], comparisons: pd.DataFrame, output_dir: Path) -> None:
    """The tables and where the files are, on the terminal."""
    for task in tasks_in(records):
        print(f"\n{task.title} (test split)\n")
        print(performance_table(records, task).to_string(index=False))
        print("", *findings(records, task, comparisons), sep="\n")
    print("\nParameters\n")
    print(parameters_table(records).to_string(index=False))
    print(f"\nTables, figures, records and models are in {output_dir.resolve()}")


def unfinished(jobs: Sequence[Job], output_dir: Path, config: Config) -> list[Job]:
    """Those of the runs that have no record of this configuration; a record that does not count is named."""
    finished = {(r["task"], r["model"], r["seed"]) for r in read_records(output_dir, config)}
    rest = [job for job in jobs if job not in finished]
    for job in rest:
        path = output_dir / "runs" / f"{run_name(*job)}.json"
        if path.exists():
            print(f"{path} is damaged or of another configuration; it is trained again", file=sys.stderr)
    print(f"resuming: {len(jobs) - len(rest)} of {len(jobs)} runs are finished", file=sys.stderr)
    return rest


def all_costs(
    jobs: Sequence[Job], config: Config, device: torch.device, steps: int = 2, rounds: int = 2
) -> tuple[dict[str, dict[str, dict]], dict[Job, tuple[float, int]]]:
    """What a step of each model costs, by task and model, and seconds and batches of each run with all its epochs."""
    costs, expected = {}, {}
    for task_name in dict.fromkeys(task for task, _, _ in jobs):
        own_config, own = getattr(config, task_name), [job for job in jobs if job[0] == task_name]
        data = cached_data(task_name, own_config, own[0][2])
        models = list(dict.fromkeys(model for _, model, _ in own))
        costs[task_name] = measure_costs(TASKS[task_name], models, own_config, data, device, steps, rounds)
        batches = math.ceil(len(data.train) / own_config.training.batch_size) * own_config.training.epochs
        expected |= {job: (batches * costs[task_name][job[1]]["ms_per_step"] / 1000, batches) for job in own}
    return costs, expected


def model_names(options: argparse.Namespace) -> list[str]:
    """The models asked for, by the names that their sizes give them."""
    return [name + MATCHED * (options.match == "params" and name != "LSTM") for name in options.models]


def train(options: argparse.Namespace, config: Config, device: torch.device) -> int:
    """Every run that the options ask for; returns how many failed."""
    names = model_names(options)
    jobs = [(task, name, seed) for task in options.tasks for seed in options.seeds for name in names]
    if options.resume:
        jobs = unfinished(jobs, options.output_dir, config)
    workers = min(options.workers or (1 if options.quick or device.type != "cpu" else usable_cores()), len(jobs))
    if not jobs:
        return 0
    for task in options.own:  # what cannot be used is to be said before anything else
        seeds = [seed for name, _, seed in jobs if name == task]
        cached_data(task, getattr(config, task), (seeds or options.seeds)[0])
    check_writable(options.output_dir)
    remove_leftovers(options.output_dir)
    print(
        f"{len(jobs)} runs: {', '.join(options.tasks)} x {', '.join(names)} x seeds "
        f"{', '.join(map(str, options.seeds))}, on {device}, {workers} at a time with a thread each",
        file=sys.stderr,
    )
    costs, expected = all_costs(jobs, config, device)
    hours, minutes = divmod(math.ceil(sum(seconds for seconds, _ in expected.values()) / workers / 60), 60)
    estimate = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    print(f"about {estimate} if all epochs are used; training stops early where that helps", file=sys.stderr)
    order = [*options.tasks, *options.seeds]
    jobs.sort(key=lambda job: (order.index(job[0]), order.index(job[2]), -expected[job][0]))  # a seed's longest first
    train_one = partial(
        train_run, config=config, device=device, output_dir=options.output_dir, costs=costs, evidence=measure_evidence
    )
    with closing(Progress(expected, workers)) as progress:
        if workers == 1:
            run_here(jobs, train_one, progress)
        else:
            cached_data.cache_clear()  # from here on the workers hold the data
            run_in_workers(jobs, train_one, progress, device, workers)
        return len(progress.failures)


def report(config: Config, output_dir: Path) -> tuple[int, int]:
    """Tables and figures from the records in `output_dir`; returns the number of runs and of figures that failed."""
    records = read_records(output_dir, config)
    if not records:
        return 0, 0
    comparisons = compare_models(records)
    failures = write_report(records, comparisons, output_dir)
    print_summary(records, comparisons, output_dir)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return len(records), len(failures)


def benchmark(options: argparse.Namespace, config: Config, device: torch.device) -> None:
    """Measure what a step costs, print it and write it to a file."""
    check_writable(options.output_dir)
    jobs = [(task, name, options.seeds[0]) for task in options.tasks for name in model_names(options)]
    print("measuring; this takes about a minute on an idle machine", file=sys.stderr)
    costs, _ = all_costs(jobs, config, device) if options.quick else all_costs(jobs, config, device, 5, 30)
    rows = [{"task": task, "model": name} | cost for task, by_name in costs.items() for name, cost in by_name.items()]
    table = pd.DataFrame(rows).drop(columns="activation_bytes")
    write_whole(options.output_dir / "pytorch_rnn_benchmark.csv", table.to_csv(index=False))
    print(table.assign(overhead=table["overhead"].map("{:+.1%}".format)).to_string(index=False))


def predict(options: argparse.Namespace) -> None:
    """Print what a trained model makes of the input; raises InputError."""
    path, source = options.predict
    trained = load_checkpoint(path)
    if source == "-":
        text = decode(sys.stdin.buffer.read(), "standard input")
    elif os.path.isfile(source):  # noqa: PTH113 (Path's raises if a text is too long for a name)
        text = decode(read_bytes(source), source)
    elif re.fullmatch(r"\S+\.(txt|csv|gz)", source):
        raise InputError(f"{source}: no such file")
    else:
        text = source
    print(trained.answer(text, options))


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status; raises InputError if they cannot be followed."""
    device = choose_device(options.device)
    if options.predict:
        predict(options)
        return 0
    config, failed, status = configuration(options), 0, 0
    if options.benchmark:
        benchmark(options, config, device)
        return 0
    if not options.report:
        try:
            failed = train(options, config, device)
        except KeyboardInterrupt as stopped:
            status = stopped_status(stopped)
            print("interrupted; reporting on the runs that are finished (once more to stop)", file=sys.stderr)
        remove_leftovers(options.output_dir)
    finished, undrawn = report(config, options.output_dir)
    if not finished and options.report:
        raise InputError(
            f"--report: no records in {options.output_dir / 'runs'} of the configuration asked for; "
            "train first, and give the same --quick, --epochs and files"
        )
    if not finished:
        print("no run was finished", file=sys.stderr)
    return status or (1 if failed or undrawn else 0)


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): as Ctrl-C, but for the exit status."""


def raise_terminated(*_signal: object) -> None:
    """What SIGTERM does while `main` runs."""
    raise Terminated


def stopped_status(stopped: KeyboardInterrupt) -> int:
    """The exit status after Ctrl-C or SIGTERM: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's own); returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a file that cannot hold "±" gets "\\xb1"
        sys.stdout.reconfigure(errors="backslashreplace")
    listens = threading.current_thread() is threading.main_thread()  # only there can a signal be listened to
    before = signal.signal(signal.SIGTERM, raise_terminated) if listens else None
    try:
        return run(parse_args(argv))
    except SystemExit:  # --help
        return 0
    except InputError as error:
        print(f"pytorch_rnn_models.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, OSError) as error:
        print(f"pytorch_rnn_models.py: {describe_failure(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("pytorch_rnn_models.py: interrupted; finished runs are kept", file=sys.stderr)
        return stopped_status(stopped)
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
