"""Shared by the controls that are matched to the ticket of another run: which one it is, and its numbers."""

from __future__ import annotations

from pathlib import Path

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Method
from rigsa.experiments.methods.imp import ticket_densities
from rigsa.experiments.records import AMOUNT, TEXT, Fields, read_record
from rigsa.experiments.run_folder import CONFIG_FILE, METRICS_FILE, finished_levels, level_folder

OPTIONS = ("match", "match_level")


class Matched(Method):
    """One level, which has the number of the ticket in ``config.match`` that it is matched to."""

    def levels(self, config: Config) -> tuple[int, ...]:
        return ()

    def has_ticket(self, config: Config) -> bool:
        return True

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        level = config.match_level or config.prunings
        return {level: ticket_densities(config, same_sign_share, level)[level]}

    def known_densities(self, config: Config) -> dict[int, float] | None:
        level = matched_level(config)
        metrics = read_record(matched_folder(config) / METRICS_FILE, Fields({"density": AMOUNT}, {}))
        return {level: metrics["density"]}


def matched_folder(config: Config) -> Path:
    """Of the level whose ticket it is. Raises RigsaError as `matched_level`."""
    return level_folder(Path(config.match), matched_level(config))


def matched_level(config: Config) -> int:
    """The level of the imp run ``config.match`` that ``config.match_level`` names, or the last finished one.

    Raises:
        RigsaError: there is no such run, it is one of another method, or that ticket is not finished yet.
    """
    run = Path(config.match)
    if not (run / CONFIG_FILE).exists():
        density = ", or give --density" if config.method.reads("density") else ""
        raise RigsaError(
            f"--match {run}: no run folder there, so there is no ticket to match. Run `python -m rigsa.run imp` first "
            f"(same preset and seed), or name a run with --match{density}."
        )
    method = read_record(run / CONFIG_FILE, Fields({"method": TEXT}, {}))["method"]
    if method != config.method.matches:
        raise RigsaError(f"--match {run}: expected the folder of an {config.method.matches} run, got one of {method}")
    tickets = [level for level in finished_levels(run) if level > 0]
    if not tickets:
        raise RigsaError(f"--match {run}: that run has no finished ticket yet; run the same imp command again first")
    if config.match_level and config.match_level not in tickets:
        finished = ", ".join(map(str, tickets))
        raise RigsaError(f"--match-level: expected a finished ticket of {run} ({finished}), got {config.match_level}")
    return config.match_level or tickets[-1]
