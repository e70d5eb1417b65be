"""Every loader on damaged files: it loads what was saved, or raises the one error, and takes no more memory than usual.

``pytest tests/experiments/test_fuzz.py --fuzz 10000`` tries that many for each loader, new ones each time.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from torch import nn

from rigsa import RigsaConfig, export_adapter, import_adapter
from rigsa.errors import RigsaError
from rigsa.experiments import records
from rigsa.experiments.adapter import (
    base_fingerprint,
    level_patterns,
    load_adapter,
    load_masks,
    masks_hash,
    save_adapter,
    save_masks,
)
from rigsa.experiments.chat import read_image
from rigsa.experiments.checkpoints import latest_checkpoint, mark_checkpoint
from rigsa.experiments.config_file import load, save
from rigsa.experiments.presets import quickstart
from rigsa.experiments.report.runs import Run
from rigsa.experiments.tasks.formats import read_examples
from rigsa.experiments.tasks.rows import read_rows
from rigsa.experiments.tasks.source_tasks import TASKS, _read_rows
from rigsa.experiments.tasks.textual_mnist import load_splits
from rigsa.experiments.train import read_log
from rigsa.files import first_damage, mark_done
from rigsa_kernels import SparsePattern, gated_linears, replace_linears
from tests.experiments.report.test_report import make, write, write_run
from tests.experiments.tasks.test_textual_mnist import idx_bytes

IN_CI = 800
"""Damaged files for each loader."""
MOST_MEMORY = 300_000
"""kB that all of them may add: images of `chat.MOST_PIXELS` are not made here."""

WORDS = [b"{", b"}", b"[", b"]", b'"', b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 30, b"\\ud800", b"\xff", b"\0"]
"""What means something to JSON, or to whoever reads text."""
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "end", "double"]),
        st.floats(0, 1),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(WORDS)),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    changed = bytearray(data)
    for kind, place, value in edits:
        at = int(place * len(changed))
        if kind == "set":
            changed[at : at + len(value)] = value
        elif kind == "cut":
            del changed[at : at + len(value)]
        elif kind == "insert":
            changed[at:at] = value
        elif kind == "end":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 64]
    return bytes(changed)


Load = Callable[[], Any]
"""Loads what lies in the folder. What it returns is compared with what it returned before the damage."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 5, bias=False)).requires_grad_(False)
    return replace_linears(plain, seed=0, values_dtype=torch.float32, alpha_init=0.5)


def adapter_of(folder: Path, model: nn.Module) -> tuple[Path, Load]:
    path = folder / "adapter.safetensors"
    save_adapter(model, path)

    def load_it() -> Any:
        load_adapter(model, path)
        return [layer.rigsa_values.tolist() for layer in gated_linears(model).values()]

    return path, load_it


def of_peft(name: str, method: str) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    """A file of PEFT's names no hash, so other numbers may be read from it; what is read fits the model."""

    def made(folder: Path, model: nn.Module) -> tuple[Path, Load]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 5, bias=False))
        adapted = replace_linears(base, density=0.2, alpha_init=0.5)
        if method == "supertuning":
            export_adapter(adapted, folder, "supertuning")
        else:
            peft = pytest.importorskip("peft", minversion="0.21")
            config = RigsaConfig(target_modules=["0", "1"], density=0.2, alpha_init=0.5)
            peft.get_peft_model(nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 5, bias=False)), config).save_pretrained(
                folder
            )

        def load_it() -> Any:
            bare = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 5, bias=False))
            import_adapter(bare, folder)
            return list(gated_linears(bare))

        return folder / name, load_it

    return made


def masks_of(folder: Path, model: nn.Module) -> tuple[Path, Load]:
    path = folder / "mask.safetensors"
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(layer.pattern.shape, generator=generator) < 0.5
             for name, layer in gated_linears(model).items()}  # fmt: skip
    patterns = {name: SparsePattern.from_mask(mask) for name, mask in masks.items()}
    save_masks(patterns, path, base_fingerprint(model))
    return path, lambda: [pattern.to_mask().tolist() for pattern in load_masks(model, path).values()]


def tile_masks_of(folder: Path, model: nn.Module) -> tuple[Path, Load]:
    path, tiles = folder / "mask.safetensors", torch.tensor([0, 2], dtype=torch.int32)
    patterns = {
        name: SparsePattern.from_tiles(tiles, layer.pattern.shape, "2x3")
        for name, layer in gated_linears(model).items()
    }
    save_masks(patterns, path, base_fingerprint(model))
    return path, lambda: [pattern.to_mask().tolist() for pattern in load_masks(model, path).values()]


def level_of(folder: Path, model: nn.Module) -> tuple[Path, Load]:
    path, _ = masks_of(folder, model)
    patterns = load_masks(model, path)
    densities = {name: pattern.density for name, pattern in patterns.items()}
    write(folder / "metrics.json", {"layer_density": densities})
    write(folder / "pruning.json", {"kept": 1, "mask": masks_hash(patterns)})
    return path, lambda: [pattern.to_mask().tolist() for pattern in level_patterns(folder).values()]


def checkpoint_of(folder: Path, _: nn.Module, name: str = "optimizer.pt") -> tuple[Path, Load]:
    """Each time anew: one that is damaged is deleted."""
    path = folder / "checkpoint-2" / name

    def load_it() -> Any:
        data = path.read_bytes() if path.exists() else None
        for file in ("optimizer.pt", "scheduler.pt"):
            write(folder / "checkpoint-2" / file, {"state": file})
        mark_checkpoint(folder, 2)
        if data is not None:
            path.write_bytes(data)
        with contextlib.redirect_stderr(io.StringIO()):
            latest = latest_checkpoint(folder)
        if latest is None:
            raise RigsaError("damaged")
        return [(latest / file).read_text() for file in ("optimizer.pt", "scheduler.pt")]

    with contextlib.suppress(RigsaError):
        load_it()
    return path, load_it


def marker_of(folder: Path, _: nn.Module) -> tuple[Path, Load]:
    write(folder / "metrics.json", {})
    mark_done(folder, ["metrics.json"])

    def load_it() -> Any:
        if found := first_damage(folder):
            raise RigsaError(found)

    return folder / "done", load_it


def config_of(folder: Path, _: nn.Module) -> tuple[Path, Load]:
    save(quickstart("imp"), folder)
    return folder / "config.json", lambda: load(folder).record().keys()


def run_of(name: str) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    """A file of a run folder that a report reads."""

    def make_it(folder: Path, _: nn.Module) -> tuple[Path, Load]:
        write_run(folder, make("imp"))

        def load_it() -> Any:
            run = Run.read(folder)
            found = [records.problem(metrics, records.metrics_of(run.config)) for metrics in run.levels]
            return [wrong for wrong in found if wrong]

        return folder / name, load_it

    return make_it


def log_of(folder: Path, _: nn.Module) -> tuple[Path, Load]:
    line = {"step": 1, "epoch": 0.5, "loss": 1.5, "learning_rate": 0.1, "grad_norm": 3.0}
    (folder / "log.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in range(3)))
    return folder / "log.jsonl", lambda: {key for line in read_log(folder) for key in line} >= line.keys()


def record_of(name: str, value: Any, schema: records.Schema) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    def make_it(folder: Path, _: nn.Module) -> tuple[Path, Load]:
        write(folder / name, value)
        return folder / name, lambda: records.problem(records.read_record(folder / name, schema), schema)

    return make_it


def digits_of(suffix: str) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    def make_it(folder: Path, _: nn.Module) -> tuple[Path, Load]:
        pixels, labels = np.arange(20 * 3 * 4).reshape(20, 3, 4) % 256, np.arange(20) % 10
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = idx_bytes(values)
            path = folder / f"t10k-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if suffix else data)

        def load_it() -> Any:
            parts = vars(load_splits(str(folder))).values()
            return all(part.levels.max() <= 9 and 0 <= part.labels.min() <= part.labels.max() <= 9 for part in parts)

        return folder / f"t10k-images-idx3-ubyte{suffix}", load_it

    return make_it


def picture_of(kind: str) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    def make_it(folder: Path, _: nn.Module) -> tuple[Path, Load]:
        Image.effect_noise((9, 7), 50).save(folder / "image", kind)

        def load_it() -> Any:
            levels = read_image(folder / "image", 8, 8)[0]
            return levels.shape == (8, 8) and levels.max() <= 9

        return folder / "image", load_it

    return make_it


def rows_of(folder: Path, _: nn.Module) -> tuple[Path, Load]:
    path = folder / TASKS["piqa"].files["validation"]
    path.parent.mkdir()
    row = {"goal": "The digit", "sol1": "is", "sol2": "7", "label": 1}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    return path, lambda: {len(row) for row in _read_rows("piqa", folder, "validation")}


def texts_of(kind: str) -> Callable[[Path, nn.Module], tuple[Path, Load]]:
    """A data file of the user's own. What damage leaves of it may be other texts, but examples they are."""

    def make_it(folder: Path, _: nn.Module) -> tuple[Path, Load]:
        lines = [{"prompt": f"a {number}", "completion": "b"} for number in range(12)]
        path = folder / f"data.{kind}"
        if kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(lines), path)
        elif kind == "csv":
            path.write_text("prompt,completion\n" + "".join(f"a {number},b\n" for number in range(12)))
        else:
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)

        def load_it() -> Any:
            examples = read_examples(read_rows(path), "prompt-completion")
            return all([turn["role"] for turn in one.turns] == ["user", "assistant"] for one in examples)

        return path, load_it

    return make_it


PRUNED = {"kept": 3, "mask": "ab", "same_sign_share": 0.5, "free": 6, "eligible": 4}
SPOKEN = [{"prompt": "a", "prompt_ids": [1, 2], "reply_ids": [3]}] * 2
SETTLED = {"ended_at": None, "steps_saved": 0, "distances": {"4": None, "8": 0.1}}
LOADERS: dict[str, Callable[..., tuple[Path, Load]]] = {
    "adapter": adapter_of,
    "adapter_config.json of Super-Tuning": of_peft("adapter_config.json", "supertuning"),
    "adapter_model.safetensors of Super-Tuning": of_peft("adapter_model.safetensors", "supertuning"),
    "adapter_config.json of RIGSA": of_peft("adapter_config.json", "rigsa"),
    "adapter_model.safetensors of RIGSA": of_peft("adapter_model.safetensors", "rigsa"),
    "masks": masks_of,
    "masks of tiles": tile_masks_of,
    "masks of a finished level": level_of,
    "checkpoint": checkpoint_of,
    "marker of a checkpoint": lambda folder, model: checkpoint_of(folder, model, "done"),
    "marker": marker_of,
    "config.json": config_of,
    "metrics.json": run_of("level_1/metrics.json"),
    "base/metrics.json": run_of("base/metrics.json"),
    "resources.json": run_of("level_0/resources.json"),
    "log.jsonl": log_of,
    "pruning.json": record_of("pruning.json", PRUNED, records.PRUNING),
    "replies.json": record_of("replies.json", SPOKEN, records.REPLIES),
    "early_bird.json": record_of("early_bird.json", SETTLED, records.EARLY_BIRD),
    "failed.json": record_of("failed.json", {"exit_code": 1, "message": "no space"}, records.FAILURE),
    "IDX": digits_of(""),
    "IDX, gzipped": digits_of(".gz"),
    "PNG": picture_of("PNG"),
    "JPEG": picture_of("JPEG"),
    "GIF": picture_of("GIF"),
    "BMP": picture_of("BMP"),
    "rows of a source task": rows_of,
    **{f"texts, .{kind}": texts_of(kind) for kind in ("jsonl", "jsonl.gz", "csv", "parquet")},
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_is_an_error_or_what_was_saved(name, model, tmp_path, request):
    path, load_it = LOADERS[name](tmp_path, model)
    whole, data = load_it(), path.read_bytes()
    more = request.config.getoption("--fuzz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=more or IN_CI, derandomize=not more, database=None, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def check(edits: list[tuple[str, float, bytes]]) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(data, edits))
        with contextlib.suppress(RigsaError):
            assert load_it() == whole

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
