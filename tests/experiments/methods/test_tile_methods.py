"""``--tile`` in runs: tickets of whole tiles are chosen, kept from level to level, resumed, matched and planned."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from test_methods import DENSITY, command, config_of, experiment, gradients_of_plain_weights, last_level

from rigsa import masks as ranking
from rigsa.errors import RigsaError
from rigsa.experiments.adapter import base_fingerprint, load_masks, save_masks
from rigsa.experiments.methods.registry import METHODS
from rigsa.masks import erk_counts
from rigsa.run import main
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.tiles import grid_of, tile_size, tile_sums

IN_TILES = [name for name, method in METHODS.items() if method.reads("tile")]


def masks(method, model, run, level):  # type: ignore[no-untyped-def]
    return load_masks(experiment(method, model, run).model, run / f"level_{level}" / "mask.safetensors")


def test_the_methods_that_take_tiles():
    """A method with a density that is not among them is refused by name (test_config.py)."""
    assert {name for name, method in METHODS.items() if method.reads("density")} - set(IN_TILES) == {"spiel"}


@pytest.mark.parametrize(("method", "tile"), [("random-mask", "columns"), ("sift", "rows"), ("diff-pruning", "4x8")])
def test_a_run_trains_whole_tiles(method, tile, small_model_folder, tmp_path):
    config = config_of(method, small_model_folder, tile=tile, density=0.2)
    assert main(command(config, tmp_path / "run")) == 0
    for name, pattern in masks(method, small_model_folder, tmp_path / "run", 1).items():
        assert pattern.tile == tile_size(tile, pattern.shape), name
        assert len(pattern.tiles) == round(0.2 * math.prod(grid_of(pattern.shape, tile)))
    metrics = json.loads((last_level(tmp_path / "run") / "metrics.json").read_text())
    assert metrics["pruning"]["kept"] == metrics["free"]


@pytest.mark.parametrize(("method", "tile"), [("smt", "4"), ("smt", "5x3"), ("spruft", "rows"), ("spruft", "columns")])
def test_masks_from_gradients_take_the_tiles_of_the_largest_norm(method, tile, small_model_folder, tmp_path):
    """Tile by tile, from gradients of the plain weights, in float64; a tile at an edge counts what it has."""
    prepared = experiment(method, small_model_folder, tmp_path, tile=tile, density=0.2)
    gradients = gradients_of_plain_weights(prepared, 2)
    patterns, record = prepared.config.method.choose(prepared)
    assert record["kept"] == sum(pattern.nnz for pattern in patterns.values())
    for name, pattern in patterns.items():
        mean, weight = torch.stack(gradients[name]).mean(0), prepared.model.get_submodule(name).weight.double()
        score, (rows, columns) = mean if method == "smt" else weight * mean, tile_size(tile, pattern.shape)
        norms = torch.stack([part.norm() for band in score.split(rows, 0) for part in band.split(columns, 1)])
        best = norms.topk(round(0.2 * len(norms))).indices.sort().values
        assert pattern.tiles.tolist() == best.tolist(), name


def test_fault_tiles_ranked_by_their_sum(monkeypatch, small_model_folder, tmp_path):
    monkeypatch.setattr(ranking, "norms_of_tiles", tile_sums)
    with pytest.raises(AssertionError):
        test_masks_from_gradients_take_the_tiles_of_the_largest_norm("smt", "4", small_model_folder, tmp_path)


@pytest.mark.parametrize("method", ["smt", "spruft"])
def test_a_mask_of_tiles_needs_their_size(method, small_model_folder, tmp_path, capsys):
    assert main([method, "--model", str(small_model_folder), "--tile", "", "--out", str(tmp_path / "run")]) == 1
    assert f"--tile: expected the size of a tile for {method}, got " in capsys.readouterr().err


def test_erk_shares_out_tiles(small_model_folder, tmp_path):
    """As many of all tiles as the density says, more of them in layers whose grid is narrow."""
    prepared = experiment("erk", small_model_folder, tmp_path, tile="4", density=0.2)
    patterns, record = prepared.config.method.choose(prepared)
    grids = {name: grid_of(pattern.shape, "4") for name, pattern in patterns.items()}
    assert {name: len(pattern.tiles) for name, pattern in patterns.items()} == erk_counts(grids, 0.2)
    assert sum(len(pattern.tiles) for pattern in patterns.values()) == round(0.2 * sum(map(math.prod, grids.values())))
    assert record["kept"] == sum(pattern.nnz for pattern in patterns.values())
    with pytest.raises(RigsaError, match="--tile: 64 prunes nothing, as no layer has more than 1 of such tiles"):
        experiment("erk", small_model_folder, tmp_path, tile="64", density=0.99)


def test_imp_prunes_tiles_to_tiles_and_a_control_matches_them(small_model_folder, tmp_path, capsys):
    config = config_of("imp", small_model_folder, tile="4", prunings=2, max_steps=2)
    run = tmp_path / "imp"
    assert main(command(config, run)) == 0
    assert "2 tickets, in tiles of 4; 2 steps" in capsys.readouterr().out
    first, second = (masks("imp", small_model_folder, run, level) for level in (1, 2))
    for name, pattern in second.items():
        assert pattern.tile == first[name].tile == (4, 4)
        assert not (pattern.to_mask() & ~first[name].to_mask()).any()
    finished = {path.relative_to(run): path.read_bytes() for path in run.rglob("*.safetensors")}
    shutil.rmtree(run / "level_2")  # as if it had been interrupted there
    assert main(command(config, run)) == 0
    assert finished == {path.relative_to(run): path.read_bytes() for path in run.rglob("*.safetensors")}
    control = config_of("random-mask", small_model_folder, tile="4", density=0.0, match=str(run), max_steps=2)
    assert main(command(control, tmp_path / "control")) == 0
    for name, pattern in masks("random-mask", small_model_folder, tmp_path / "control", 2).items():
        assert (pattern.tile, pattern.nnz) == ((4, 4), second[name].nnz)


@pytest.mark.parametrize("tile", ["0", "4x", "x4", "diagonal", "4x4x4", "-3"])
def test_what_is_no_tile_is_one_error(tile, small_model_folder, tmp_path, capsys):
    asked = command(config_of("sift", small_model_folder), tmp_path / "run")
    assert main([*asked, f"--tile={tile}"]) == 1
    error = capsys.readouterr().err
    assert "--tile: expected a number from 1, ROWSxCOLUMNS, rows or columns" in error
    assert not (tmp_path / "run").exists()


def test_tiles_too_large_for_the_density_are_named(small_model_folder, tmp_path, capsys):
    asked = command(config_of("sift", small_model_folder, tile="32"), tmp_path / "run")
    assert main(asked) == 1
    assert f"--density: {DENSITY} leaves" in (error := capsys.readouterr().err)
    assert "1 tiles" in error


def test_tiles_too_large_to_prune_any_are_refused(small_model_folder, tmp_path, capsys):
    config = config_of("imp", small_model_folder, tile="64", density=0.0, keep_fraction=0.8, prunings=1)
    assert main(command(config, tmp_path / "run")) == 1
    assert "--tile: 64 prunes nothing, as no layer has more than " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mask_file_says_its_tiles(small_model_folder, tmp_path):
    model = experiment("sift", small_model_folder, tmp_path).model
    patterns = {
        name: SparsePattern.from_tiles(torch.tensor([1, 2], dtype=torch.int32), layer.pattern.shape, 4)
        for name, layer in gated_linears(model).items()
    }
    path = tmp_path / "mask.safetensors"
    save_masks(patterns, path, base_fingerprint(model))
    assert all(pattern.equals(patterns[name]) for name, pattern in load_masks(model, path).items())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"4x4", b"3x5"))
    assert path.read_bytes() != data
    with pytest.raises(Exception, match=r"damaged: mask: expected whole tiles of 3 x 5"):
        load_masks(model, path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_knows_what_columns_keep(device, small_model_folder, tmp_path, capsys):
    """Columns keep less of x than entries do, and no tile needs the bit mask."""
    peaks = {}
    for tile in ("", "rows", "columns", "4"):
        out = tmp_path / f"{device}{tile}.json"
        arguments = ["--method", "random-mask", "--density", "0.1", "--tile", tile, "--device", device]
        shape = ["--preset", "smoke", "--model", str(small_model_folder), "--batch-size", "8"]
        shape += ["--micro-batch-size", "8"]
        assert main(["plan", *arguments, *shape, "--json", str(out)]) == 0, capsys.readouterr().err
        peaks[tile] = json.loads(out.read_text())["levels"][0]["bytes"]
    assert peaks["columns"]["activations"] < 0.95 * peaks[""]["activations"]
    assert peaks["rows"]["activations"] == pytest.approx(peaks[""]["activations"], rel=0.02)
    if device == "cuda":
        assert all(peaks[tile]["adapter"] < peaks[""]["adapter"] for tile in ("rows", "columns", "4"))
