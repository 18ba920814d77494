"""What book/runs.md tells to write is what the program takes."""

import re
from pathlib import Path

import pytest
import yaml

from sigma_lite import cli
from sigma_lite.reading import overlay
from sigma_lite.runfile import STARTS, load_run
from sigma_lite.train.callbacks import names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "runs.md").read_text("utf-8")
YAML = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [
    line.split("  #")[0] for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()
]


@pytest.mark.parametrize("block", YAML, ids=range(len(YAML)))
def test_a_block_of_yaml_is_a_config(block):
    given, toy = yaml.safe_load(block), yaml.safe_load((ROOT / "scaled_configs" / "toy.yaml").read_text("utf-8"))
    if "mixture" in given.get("data", {}):
        del toy["data"]["corpus"]["source"]
    assert load_run([], overlay(toy, given)) != load_run([], toy), "it changes nothing"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_exists(command):
    program, name, *_ = command.split()
    assert program == "sigma-lite" and name in cli.COMMANDS


def test_words_for_a_start_are_those_of_the_settings():
    assert set(re.findall(r"`--(\w+)", PAGE)) == {*STARTS}


def test_the_table_of_names_stands_where_the_page_says():
    assert "train/loss" in names.__doc__ and "sigma_lite/train/callbacks/names.py" in PAGE
