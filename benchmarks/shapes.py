"""What is asked at each level: SmolLM2's real layers, token counts, densities, and how long a race may last.

*smoke* checks in minutes that everything runs, *core* is what the documentation shows, *full* is for a quiet machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.providers import TICKET
from rigsa.experiments.hardware import usual_dtype
from rigsa.experiments.model import SMOLLM2

LEVELS = ("smoke", "core", "full")
TOKENS = {"smoke": (32,), "core": (1, 32, 860, 4096), "full": (1, 32, 860, 4096)}
DENSITIES = {"smoke": (1.0, TICKET), "core": (1.0, 0.54, 0.2, TICKET, 0.01), "full": (1.0, 0.54, 0.2, TICKET, 0.01)}
USUAL = usual_dtype("auto")
"""Dtype of the models where only one is asked for."""
DTYPES = {"smoke": (USUAL,), "core": (USUAL,), "full": ("bfloat16", "float32")}


def block_shapes(size: str) -> list[tuple[int, int]]:
    """``(out_features, in_features)`` of the seven linear layers of one block of SmolLM2."""
    sizes = SMOLLM2[size]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]


def linear_shapes(size: str) -> list[tuple[int, int]]:
    """The distinct ones, smallest first."""
    return sorted(set(block_shapes(size)))


LINEARS = {
    "smoke": [(576, 576)],
    "core": [(1536, 576)],
    "full": [shape for size in SMOLLM2 for shape in linear_shapes(size)],
}


@dataclass(frozen=True)
class Batch:
    """A training step or a generation: SmolLM2 of this size with so many blocks, and what it is given."""

    size: str
    layers: int
    prompts: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.size}-{self.layers}x{self.prompts}x{self.tokens}-{self.dtype}"


STEPS = {
    "smoke": [Batch("135M", 2, 2, 89, USUAL)],
    "core": [Batch("135M", 30, 16, 89, USUAL)],
    "full": [Batch("135M", 30, 16, 89, dtype) for dtype in DTYPES["full"]] + [Batch("1.7B", 24, 1, 860, "bfloat16")],
}
GENERATIONS = {
    "smoke": [Batch("135M", 2, 1, 89, USUAL)],
    "core": [Batch("135M", 30, 1, 89, USUAL)],
    "full": [Batch("135M", 30, 1, 89, "bfloat16"), Batch("1.7B", 24, 1, 860, "bfloat16")],
}
NEW_TOKENS = {"smoke": 4, "core": 32, "full": 128}

MODELS_AT_ONCE = 3
"""Whole adapted models held beside the floor: of SmolLM2-135M at level core, 4 to 7 GB of tensors a heat."""

OPTIMIZED = {"smoke": [(576, 576)], "core": [(1536, 576), (2048, 2048)], "full": LINEARS["full"]}
SELECTED = {"smoke": [2**18], "core": [2**22], "full": [2**22, 2**26]}
"""Entries of one matrix."""

SCALE = {
    "tokens": {
        "smoke": (32, 128),
        "core": (128, 256, 512, 1024, 2048, 4096),
        "full": tuple(2**n for n in range(5, 15)),
    },
    "width": {"smoke": (128, 256), "core": (256, 512, 1024, 2048), "full": (256, 512, 1024, 2048, 4096, 8192)},
    "density": {
        "smoke": (0.01, 0.1),
        "core": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        "full": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    },
    "layers": {"smoke": (1, 2), "core": (2, 4, 8, 16), "full": (2, 4, 8, 16, 30)},
    "entries": {"smoke": (2**14, 2**16), "core": (2**16, 2**18, 2**20, 2**22), "full": (2**20, 2**22, 2**24, 2**26)},
}
"""Where each axis of cost is sampled."""


@dataclass(frozen=True)
class Blocks:
    """So many blocks of SmolLM2 of this size."""

    size: str
    count: int

    def __str__(self) -> str:
        return f"{self.size}-{self.count}"


PRUNED = {
    "smoke": [Blocks("135M", 1)],
    "core": [Blocks("135M", 30)],
    "full": [Blocks("135M", 30), Blocks("360M", 32), Blocks("1.7B", 24)],
}
"""Whole models, by size and blocks: 106 million, 315 million and 1.6 billion entries."""

BUDGET = {"smoke": 0.2, "core": 0.7, "full": 3.0}
"""Seconds that the rounds of one race may take, while there are enough of them."""

ROUNDS = {"smoke": (5, 20), "core": (5, 200), "full": (9, 500)}
"""Fewest and most rounds."""
