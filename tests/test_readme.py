"""What the README tells a newcomer to type."""

import re
from pathlib import Path

import pytest

from rigsa.run import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python -m rigsa\.run ([^`\n]+)", README.replace("\\\n", ""))


def test_ci_runs_the_very_test_command():
    blocks = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(blocks) == 2
    assert blocks[1].endswith("&& pytest")
    assert f"\n{blocks[1]}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known_to_the_parser(command):
    build_parser().parse_args(command.replace("RUN...", "runs/a").split())


def test_options_it_names_exist():
    commands = build_parser()._subparsers._group_actions[0].choices
    helps = " ".join(commands[name].format_help() for name in ("imp", "random-mask", "merge"))
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - {"--no-deps"}:
        assert option in helps, option
