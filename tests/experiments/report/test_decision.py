"""Which method a comparison says to take."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import edit, make, write_run

from rigsa.errors import RigsaError
from rigsa.experiments.report.decision import decision_table
from rigsa.experiments.report.runs import read_report

TEXTS = {"data": "chats.jsonl", "format": "messages", "source_tasks": ""}
COUNTS = {"tokens": 300, "examples": 100, "perplexity": 2.0}


def write_texts(
    folder: Path, method: str, seed: int, loss: float, right: float | None = None, rank: int = 8, **options: Any
) -> None:
    """A run on texts that ended with this loss and, if it has a score, so many right answers in per cent."""
    score = "none" if right is None else "exact"
    config = make(method, **TEXTS, seed=seed, score=score, **({"rank": rank} if method == "lora" else {}), **options)
    run = write_run(folder / f"{method}-{rank}-{seed}", config, levels=(0,))
    for place in ("base", "level_0"):
        trained = place == "level_0"
        held = {"accuracy": 50.0, "loss": loss if trained else 10.0, **COUNTS}
        share = right if trained else 0.0
        answered = {} if right is None else {"exact": {"accuracy": share, "stderr": 5.0, "examples": 100}}
        edit(run / place / "metrics.json", test={"held-out": held} | answered, validation=held)


def decided(folder: Path) -> tuple[list[list[str]], str]:
    table, sentence = decision_table(read_report([folder]))
    return table.rows, sentence


def test_over_seeds_the_t_test_decides_and_fewer_numbers_are_taken_among_equals(tmp_path):
    for seed in range(4):
        write_texts(tmp_path, "full", seed, 1.0 + 0.1 * seed)
        write_texts(tmp_path, "lora", seed, 1.01 + 0.1 * seed + 0.05 * (-1) ** seed)
        write_texts(tmp_path, "shira", seed, 2.0 + 0.1 * seed + 0.01 * (-1) ** seed)
    rows, sentence = decided(tmp_path)
    assert [(row[0], row[-1]) for row in rows] == [("full", "best"), ("lora", "alike"), ("shira", "worse")]
    assert sentence.startswith("Take lora: it cannot be told from full, the best (test loss 1.150 ± ")


def test_one_seed_of_a_loss_decides_nothing_about_the_others(tmp_path):
    write_texts(tmp_path, "lora", 0, 1.0)
    write_texts(tmp_path, "full", 0, 1.5)
    rows, sentence = decided(tmp_path)
    assert [row[-1] for row in rows] == ["best", "not known"]
    assert sentence.startswith("Take lora: test loss 1.000 nats, the best. Whether full is truly worse is not known")


@pytest.mark.parametrize(("other", "judged"), [(66.0, "alike"), (54.0, "worse")])
def test_one_seed_of_a_score_goes_by_its_standard_error(other, judged, tmp_path):
    write_texts(tmp_path, "lora", 0, 1.0, right=other)
    write_texts(tmp_path, "full", 0, 9.0, right=70.0)
    rows, sentence = decided(tmp_path)
    assert [(row[0], row[-1]) for row in rows] == [("full", "best"), ("lora", judged)]
    assert sentence.startswith(f"Take {'lora' if judged == 'alike' else 'full'}: ")


def test_among_equal_scores_the_lower_loss_is_first(tmp_path):
    write_texts(tmp_path, "full", 0, 2.0, right=40.0)
    write_texts(tmp_path, "lora", 0, 1.0, right=40.0)
    rows, sentence = decided(tmp_path)
    assert [(row[0], row[-1]) for row in rows] == [("lora", "best"), ("full", "alike")]
    assert sentence.endswith(", the best. full cannot be told from it, with no fewer trained numbers.")


@pytest.mark.parametrize(("loss", "right"), [(1.0, 0.0), (10.5, None)])
def test_what_is_no_better_than_the_untrained_model_is_not_taken(loss, right, tmp_path):
    write_texts(tmp_path, "lora", 0, loss, right=right)
    write_texts(tmp_path, "full", 0, 11.0, right=right)
    sentence = decided(tmp_path)[1]
    assert sentence.startswith("Take none yet: the best, lora (")
    assert sentence.endswith("), is no better than the untrained model; train longer.")


def test_only_runs_that_scored_answers_agree_in_their_length(tmp_path):
    write_texts(tmp_path / "loss", "lora", 0, 1.0, answer_tokens=8)
    write_texts(tmp_path / "loss", "full", 0, 2.0, answer_tokens=9)
    assert [row[0] for row in decided(tmp_path / "loss")[0]] == ["lora", "full"]
    write_texts(tmp_path / "score", "lora", 0, 1.0, right=2.0, answer_tokens=8)
    write_texts(tmp_path / "score", "full", 0, 2.0, right=2.0, answer_tokens=9)
    with pytest.raises(RigsaError, match=r"--answer-tokens is [89] and [89]"):
        decided(tmp_path / "score")


def test_a_run_that_diverged_is_not_the_best(tmp_path):
    write_texts(tmp_path, "lora", 0, float("nan"))
    write_texts(tmp_path, "full", 0, 3.0)
    assert decided(tmp_path)[0][0][0] == "full"
    assert json.loads((tmp_path / "lora-8-0" / "level_0" / "metrics.json").read_text())["level"] == 0
