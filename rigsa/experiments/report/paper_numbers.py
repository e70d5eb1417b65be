"""What the paper reports (RIGSA, arXiv 2511.01794) for SmolLM2-1.7B-Instruct on MNIST, each with its place there.

Accuracies in per cent. Nothing else in this package holds a result.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "HuggingFaceTB/SmolLM2-1.7B-Instruct"


@dataclass(frozen=True)
class Number:
    value: float
    source: str


NUMBERS: dict[tuple[str, str], Number] = {
    ("untrained", "0-shot"): Number(9.16, "Table 1"),
    ("untrained", "5-shot"): Number(10.04, "Table 1"),
    ("untrained, 4 bits", "0-shot"): Number(9.80, "Table 1"),
    ("untrained, 4 bits", "5-shot"): Number(10.41, "Table 1"),
    ("untrained", "piqa"): Number(75.4, "Table 2"),
    ("untrained", "hellaswag"): Number(51.7, "Table 2"),
    ("untrained", "gsm8k"): Number(43.7, "Table 2"),
    ("untrained, 4 bits", "piqa"): Number(75.2, "Table 2"),
    ("untrained, 4 bits", "hellaswag"): Number(50.8, "Table 2"),
    ("untrained, 4 bits", "gsm8k"): Number(19.9, "Table 2"),
    ("imp, level 0", "0-shot"): Number(99.05, "Figure 2"),
    ("imp, level 4", "0-shot"): Number(98.37, "Figure 2"),
    ("imp, level 0", "gsm8k"): Number(40.7, "Figure 2"),
    ("imp, level 3", "gsm8k"): Number(45.1, "Figure 2"),
    ("qlora, rank 16", "0-shot"): Number(99.46, "Figure 3"),
    ("qlora, rank 16", "gsm8k"): Number(14.18, "Figure 3"),
    ("qlora, rank 1", "gsm8k"): Number(11.07, "Figure 3"),
}
"""(What was measured, measure) to the number. Levels are 0, dense, to 4, the last ticket (3.46 %)."""

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "imp": {
        "learning_rate": 2e-3, "batch_size": 16, "epochs": 1, "warmup_steps": 1000, "weight_decay": 1.0,
        "keep_fraction": 0.8, "alpha_init": 1e-6, "prunings": 4, "quantize": "none",
    },
    "qlora": {
        "learning_rate": 2e-4, "batch_size": 16, "epochs": 4, "warmup_steps": 1000, "weight_decay": 0.1,
        "rank": "1, 4, 8, 16", "lora_alpha": 32.0, "lora_dropout": 0.0, "quantize": "nf4",
    },
}  # fmt: skip
"""Section 4.4 and Table 4: method to field of `rigsa.experiments.config.Config` to value."""
