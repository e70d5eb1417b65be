"""Masks of whole tiles from gradients before training: SMT's squares and SPruFT's rows.

`smt` ranks tiles by the norm of the mean gradient in them (He et al., "SMT: Fine-Tuning Large Language Models with
Sparse Matrices", ICLR 2025). It is `sift` with ``--tile``, under the name and with the settings that it is known for.
The authors take tiles of 256 x 256 and the gradients of 100 steps of full fine-tuning, rank the tiles of all layers
together and offer four scores, the norm among them. Here gradients are taken at the pretrained weights, a tile has 64
rows and columns, because a small model has few larger ones, and tiles are ranked within their layer, because every
layer keeps some. ``--tile 256 --ranking global`` and more ``--mask-examples`` come closer.

`spruft` trains the rows, that is the output neurons, that matter most by the measure of structured pruning (Li &
Bhaskara, "An Efficient Row-Based Sparse Fine-Tuning", 2025). The measure is the first-order one of Molchanov et al.,
"Importance Estimation for Neural Network Pruning" (CVPR 2019): the sum over the row of ``(w g)^2``, for a weight w and
its mean gradient g. Row-based tuning by the size of the weights alone is ``super --tile rows``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rigsa.experiments.config import Config, Look, require
from rigsa.experiments.methods.gradient_masks import GRADIENT_OPTIONS, GradientMask
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY
from rigsa.scores import SCORES


@dataclass(frozen=True, eq=False, kw_only=True)
class TileMask(GradientMask):
    """A mask that is made of tiles by definition."""

    def check(self, config: Config) -> None:
        super().check(config)
        require(config, "tile", f"the size of a tile for {self.name}", bool(config.tile))


SMT = TileMask(
    name="smt",
    help="train the square tiles with the largest gradient (SMT, He et al. 2025)",
    options=GRADIENT_OPTIONS,
    look=Look("blue", (4, 0, 0), (0, (3, 3, 1, 3))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY, "tile": "64"},
    score=SCORES["sift"],
)
SPRUFT = TileMask(
    name="spruft",
    help="train the rows that matter most to the loss, by weight times gradient (SPruFT, Li & Bhaskara 2025)",
    options=GRADIENT_OPTIONS,
    look=Look("black", (6, 0, 30), (0, (1, 2, 5, 2))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY, "tile": "rows"},
    score=SCORES["taylor"],
)
