"""What fine-tuning forgets: the source tasks of RIGSA (section 4.3), measured by lm-eval (Gao et al. 2024).

Tasks, prompts, metrics and the model's wrapper are lm-eval's own, so the scores of a model are those of
``lm_eval run --apply_chat_template --tasks piqa,hellaswag,gsm8k`` with the same batch size and dtype, and, if the
tokenizer puts a token before what its chat template writes, ``--model_args add_bos_token=False``. The model is
measured as it stands, adapter unmerged, and every model of a run through the same chat template, system prompt and
examples.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import importlib.util
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Measuring
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.special_tokens import special_tokens

TASK_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""Textual MNIST for ``lm_eval run --include_path``."""
SHORTEST_LEAK = 20
"""Characters of a text that no two documents share by chance."""
EXAMPLES_SEED = 1234
"""The seed that draws the examples: lm-eval's default and not the run's, so that every run answers the same prompts."""


@dataclass(frozen=True)
class Column:
    """What a column of a local file must hold."""

    expected: str
    fits: Callable[[Any], bool]


TEXT = Column("text", lambda value: isinstance(value, str))
FOUR_TEXTS = Column(
    "a list of 4 texts",
    lambda value: isinstance(value, list) and len(value) == 4 and all(isinstance(text, str) for text in value),
)
ZERO_OR_ONE = Column("0 or 1", lambda value: type(value) is int and value in (0, 1))
ZERO_TO_THREE = Column("text, '0' to '3'", lambda value: isinstance(value, str) and value in {"0", "1", "2", "3"})


@dataclass(frozen=True)
class SourceTask:
    """A task of lm-eval, by name.

    `metrics` are lm-eval's keys, ``metric,filter``, the headline first. `files` maps a split to its place below
    --data-dir, and `columns` are those that lm-eval's definition reads.
    """

    shots: int
    metrics: tuple[str, ...]
    files: dict[str, str]
    columns: dict[str, Column]


TASKS = {
    "piqa": SourceTask(
        shots=0,
        metrics=("acc,none", "acc_norm,none"),
        files={"validation": "piqa/validation.jsonl"},
        columns={"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ZERO_OR_ONE},
    ),
    "hellaswag": SourceTask(
        shots=0,
        metrics=("acc,none", "acc_norm,none"),
        files={"validation": "hellaswag/validation.jsonl"},
        columns={
            "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": FOUR_TEXTS, "label": ZERO_TO_THREE,
        },
    ),
    # Strict: the answer after "####", as in the examples. The flexible filter takes the last number of the reply,
    # whatever it is, and so rewards by chance a model that has come to answer everything with a digit.
    "gsm8k": SourceTask(
        shots=5,
        metrics=("exact_match,strict-match", "exact_match,flexible-extract"),
        files={"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"},
        columns={"question": TEXT, "answer": TEXT},
    ),
}  # fmt: skip


def named(name: str) -> SourceTask:
    """What is known of a task, or of any other task of lm-eval that measures a mean, what its definition says.

    Raises:
        RigsaError: lm-eval has no such task, or it is a group of several.
    """
    if name in TASKS:
        return TASKS[name]
    task = _defined(name)
    filters = [one.name for one in task._filters] or ["none"]
    metrics = [f"{metric},{filters[0]}" for metric, kind in task.aggregation().items() if _is_mean(kind)]
    if not metrics:
        raise RigsaError(f"--source-tasks {name}: none of its metrics is a mean, so there is no standard error")
    return SourceTask(shots=int(task.config.num_fewshot or 0), metrics=tuple(metrics), files={}, columns={})


def _is_mean(aggregation: Any) -> bool:
    return getattr(aggregation, "__name__", aggregation) == "mean"


@functools.cache
def _manager() -> Any:
    """lm-eval's index of all of its tasks, and of Textual MNIST, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASK_FOLDER))


def _defined(name: str) -> Any:
    """A task by lm-eval's own definition, with its data."""
    manager = _manager()
    if name not in manager.all_tasks or name not in manager.all_subtasks:
        raise RigsaError(
            f"--source-tasks or --score: expected some of {', '.join(TASKS)}, or another task of lm-eval (no group), "
            f"comma-separated, got {name!r}"
        )
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise RigsaError(
            f"--source-tasks {name}: its data are neither cached nor to be had from the hub ({type(error).__name__})"
        ) from error


def scored_tasks(config: Measuring) -> list[str]:
    """The tasks of lm-eval that a run measures: its source tasks, and the one that scores it."""
    asked = config.score.removeprefix("lm-eval:") if config.score.startswith("lm-eval:") else ""
    return [*config.tasks, *([asked] if asked and asked not in config.tasks else [])]


def check(config: Measuring) -> None:
    """Refuse, before anything is trained, source tasks that could not be measured after it.

    Loads the data, from --data-dir or from the hub (which caches them).

    Raises:
        RigsaError: lm-eval is not installed, a task is unknown, its data are missing or not what it needs, or the limit
            leaves no standard error.
    """
    if not scored_tasks(config):
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise RigsaError(
            "--source-tasks: needs lm-eval; pip install 'lm-eval>=0.4.13', or --source-tasks '' to measure none"
        )
    if config.limit == 1:
        raise RigsaError("--limit: expected 0 (all) or at least 2, for a standard error, got 1")
    if config.data_dir and not Path(config.data_dir).is_dir():
        raise RigsaError(f"--data-dir {config.data_dir}: not a folder; '' takes the data from the hub")
    for name in scored_tasks(config):
        if name not in TASKS and config.data_dir:
            raise RigsaError(
                f"--data-dir: files are read for {', '.join(TASKS)} only; expected '' (the hub's data) for {name}"
            )
        with _quiet():
            named(name)
            _load_task(name, config.data_dir)


def check_content(config: Measuring, tokenizer: Any, asked: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse documents that hold a special token of `tokenizer`, where it would end a turn of the chat, and those that
    the model is trained on.

    Args:
        config: of the run.
        tokenizer: of the model.
        asked: what training examples ask, to their places. Texts shorter than `SHORTEST_LEAK` may be equal by chance.

    Raises:
        RigsaError: as `check`, or there is such a document (task and number are named).
    """
    special = special_tokens(tokenizer)
    for name in scored_tasks(config):
        with _quiet():
            task = _load_task(name, config.data_dir)
            shown = list(task.fewshot_docs()) if named(name).shots else []
        for number, document in enumerate(task.eval_docs, 1):
            leaked = next((text for text in _texts(document) if len(text) >= SHORTEST_LEAK and text in asked), None)
            if leaked is not None:
                raise RigsaError(
                    f"--data: {asked[leaked]}: asks what document {number} of {name} asks, which is measured, too; "
                    "expected training examples of other documents"
                )
        for documents in (task.eval_docs, shown):
            for number, document in enumerate(documents, 1):
                if found := next((match for text in _texts(document) if (match := special.search(text))), None):
                    raise RigsaError(
                        f"--source-tasks {name}: document {number} holds {found[0]!r}, which is a special token of the "
                        "model; expected text without it"
                    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str,
    limit: int,
    batch_size: int,
    system_prompt: str,
    label: str,
) -> dict[str, Any]:
    """Scores and standard errors in percent, by task.

    ``{"piqa": {"metric": "acc", "score": 67.2, "stderr": 1.1, "documents": 1838, "shots": 0,
    "others": {"acc_norm": {"score": 67.9, "stderr": 1.1}}}, ...}``

    Leaves model, tokenizer and the process's random states as they were.

    Args:
        model: with or without an adapter, on its device.
        tokenizer: with a chat template.
        tasks: names among `TASKS`, passed by `check`.
        data_dir: a folder with the data; '' for the hub's.
        limit: only the first so many documents of each task; 0 for all.
        batch_size: prompts a pass.
        system_prompt: of the chat, as in `rigsa.experiments.tasks.textual_mnist.Prompts`: ``default`` leaves it to the
            template, and '' is an empty one, which lm-eval's own --system_instruction cannot give.
        label: of the progress bar.
    """
    from lm_eval import evaluate  # all metrics here are means: it has their standard errors without a bootstrap

    scores = {}
    for name in tasks:
        with tqdm(desc=f"{label}: {name}", unit="prompt", leave=False) as bar, _unchanged(model), _quiet():
            results = evaluate(
                _language_model(model, tokenizer, batch_size, system_prompt, bar),
                {"tasks": {name: _load_task(name, data_dir)}},
                limit=limit or None,
                log_samples=False,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
        scores[name] = _summary(name, results)
    return scores


def score(model: PreTrainedModel, conversation: Conversation, config: Config, label: str) -> dict[str, Any]:
    """The score of a run's own task where that is one of lm-eval: ``{"accuracy", "stderr", "examples"}``."""
    name = config.score.removeprefix("lm-eval:")
    (found,) = measure(
        model, conversation.tokenizer, [name], data_dir=config.data_dir, limit=config.limit,
        batch_size=config.eval_batch_size, system_prompt=config.system_prompt, label=label,
    ).values()  # fmt: skip
    return {"accuracy": found["score"], "stderr": found["stderr"], "examples": found["documents"]}


def _summary(name: str, results: Any) -> dict[str, Any]:
    headline, *others = named(name).metrics
    return {
        "metric": headline.removesuffix(",none"),
        **_score(results["results"][name], headline),
        "documents": results["n-samples"][name]["effective"],
        "shots": named(name).shots,
        "others": {key.removesuffix(",none"): _score(results["results"][name], key) for key in others},
    }


def _score(results: dict[str, float], key: str) -> dict[str, float]:
    metric, kind = key.split(",")
    return {"score": 100 * float(results[key]), "stderr": 100 * float(results[f"{metric}_stderr,{kind}"])}


def _language_model(model: PreTrainedModel, tokenizer: Any, batch_size: int, system_prompt: str, bar: tqdm) -> Any:
    """lm-eval's wrapper of `model`, on a tokenizer of its own (it sets a padding token), with our progress bar."""
    from lm_eval.models.huggingface import HFLM

    system = [] if system_prompt == "default" else [{"role": "system", "content": system_prompt}]

    class LanguageModel(HFLM):
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return super().apply_chat_template([*system, *chat_history], add_generation_prompt)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            bar.reset(len(requests))
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            bar.reset(len(requests))
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            logits = super()._model_call(inps, *args, **options)
            bar.update(len(inps))
            return logits

        def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            replies = super()._model_generate(context, *args, **options)
            bar.update(len(context))
            return replies

    return LanguageModel(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        add_bos_token=False,  # the chat template alone says what a prompt begins with, as in all of a run's prompts
    )


def _load_task(name: str, data_dir: str) -> Any:
    """lm-eval's task with its data, ready for its `evaluate`.

    Raises:
        RigsaError: the data are missing or do not fit.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if name not in TASKS:
        task = _defined(name)
        task.set_fewshot_seed(EXAMPLES_SEED)
        return task
    # Only the task's own folder: lm-eval would else read the definitions of all its thousands of tasks.
    manager = TaskManager(include_defaults=False, include_path=Path(lm_eval.tasks.__file__).parent / name)
    changes: dict[str, Any] = {"num_fewshot": TASKS[name].shots}
    if data_dir:
        splits = _read_splits(name, Path(data_dir))
        changes["custom_dataset"] = lambda **_: splits
        if "train" not in splits:
            changes["training_split"] = None  # lm-eval would look there for examples, even for none
    try:
        # A task with changes is spelled as a group of one.
        task = manager.load({"group": "source", "task": [{"task": name, **changes}]})["tasks"][name]
    except Exception as error:  # the hub's client raises a dozen unrelated types
        if data_dir:
            raise
        raise RigsaError(
            f"--source-tasks {name}: its data are neither cached nor to be had from the hub ({type(error).__name__}). "
            f"Use --data-dir with a folder that holds {' and '.join(TASKS[name].files.values())}, or leave {name} out."
        ) from error
    task.set_fewshot_seed(EXAMPLES_SEED)
    return task


def _read_splits(name: str, folder: Path) -> dict[str, Any]:
    """`datasets.Dataset` by split, held in memory: a cache could serve an older state of a file."""
    from datasets import Dataset

    return {split: Dataset.from_list(_read_rows(name, folder, split)) for split in TASKS[name].files}


def _read_rows(name: str, folder: Path, split: str) -> list[dict[str, Any]]:
    """The columns that the task reads. Raises RigsaError where the file is missing, damaged, or has others."""
    task = TASKS[name]
    plain = folder / task.files[split]
    path = next((path for path in (plain, Path(f"{plain}.gz")) if path.exists()), None)
    if path is None:
        raise RigsaError(f"--data-dir {folder}: {name} needs {task.files[split]}, with or without .gz")
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                rows.append(_parse_row(line, f"{path}, row {number}", task.columns))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise RigsaError(f"--data-dir: cannot read {path}: {error}") from error
    needed = task.shots if split == "train" else 2  # for a standard error
    if len(rows) < needed:
        raise RigsaError(f"--data-dir: {path} has {len(rows)} rows; expected at least {needed}")
    return rows


def _parse_row(line: str, place: str, columns: dict[str, Column]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RigsaError(f"--data-dir: {place}: not JSON ({error})") from error
    missing = [column for column in columns if not isinstance(row, dict) or column not in row]
    if missing:
        raise RigsaError(f"--data-dir: {place}: no column {missing[0]}; expected {', '.join(columns)}")
    for name, column in columns.items():
        if not column.fits(row[name]):
            raise RigsaError(f"--data-dir: {place}, column {name}: expected {column.expected}, got {row[name]!r}")
    return {name: row[name] for name in columns}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep out what lm-eval and datasets write besides their results: log, warnings, progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give back the training mode of every module, and the random states of Python, NumPy and PyTorch."""
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode
