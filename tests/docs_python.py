"""Runs a snippet in Python: `docs_python.py snippet.py --max_train_steps 2`. Flags change the settings of its `DisBackConfig`."""

import runpy
import sys

import diffusers_disback
from diffusers_disback.commands.command_line import read_flags


if __name__ == "__main__":
    snippet, *flags = sys.argv[1:]
    if flags:
        config = diffusers_disback.DisBackConfig
        changes = read_flags(config, flags)
        diffusers_disback.DisBackConfig = lambda **settings: config(**{**settings, **changes})
    runpy.run_path(snippet, run_name="__main__")
