"""Methods without a mask of ours: full fine-tuning, and adapters of PEFT. One level, number 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rigsa.experiments.config import Config, Gates, Look, LowRank, Method, fields_of
from rigsa.experiments.methods.ticket import FROM_ZERO

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class Baseline(Method):
    """Trains what `Experiment.attach` attached."""

    def levels(self, config: Config) -> tuple[int, ...]:
        return (0,)

    def summary(self, config: Config) -> str:
        return f"one, rank {config.rank}" if self.peft else "one, dense"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        return {} if self.peft else {0: 1.0}

    def run(self, experiment: Experiment) -> None:
        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(0):
            experiment.run_level(0)


OWN_DTYPE = "adapters of PEFT have parameters of their own dtype; use DDP"
"""Why PEFT's adapters are not sharded."""
_TABLE_4 = {"rank": 16, "learning_rate": 2e-4, "weight_decay": 0.1, "epochs": 4, "values_dtype": "float32"}

FULL = Baseline(
    name="full",
    help="full fine-tuning of the same linear layers, as a dense difference that starts at zero",
    options=fields_of(Gates),
    look=Look("black", "p", (0, (10, 3))),
    usual=FROM_ZERO,
    quantizations=("none",),
)
LORA = Baseline(
    name="lora",
    help="low-rank adapters of PEFT on the same layers (Hu et al. 2022)",
    options=fields_of(LowRank),
    look=Look("orange", "<", (0, (4, 4))),
    usual=_TABLE_4,
    quickstart={"learning_rate": 1e-3},
    gated=False,
    peft="lora",
    quantizations=("none",),
    whole_because=OWN_DTYPE,
)
QLORA = Baseline(
    name="qlora",
    help="the same on a base in 4 bits (Dettmers et al. 2023; RIGSA's Table 4)",
    options=fields_of(LowRank),
    look=Look("purple", ">", (0, (6, 2, 2, 2))),
    usual={**_TABLE_4, "quantize": "nf4"},
    quickstart={"learning_rate": 1e-3},
    gated=False,
    peft="lora",
    quantizations=("nf4",),
    whole_because=OWN_DTYPE,
)
SHIRA = Baseline(
    name="shira",
    help="PEFT's own sparse adapter with a random mask (SHiRA, Bhardwaj et al. 2024)",
    options=("rank",),
    look=Look("sky", "d", (0, (2, 1, 2, 4))),
    usual=_TABLE_4,
    quickstart={"learning_rate": 2e-3},
    gated=False,
    peft="shira",
    quantizations=("none",),
    planned=False,  # PEFT draws its mask with operations that need data
    whole_because=OWN_DTYPE,
)
