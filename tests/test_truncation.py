import logging

import pytest
import tiny

from diffusers_disback.data import truncation as module
from diffusers_disback.data.truncation import told_once, truncation
from diffusers_disback.evaluation import Evaluation
from diffusers_disback.families import family_of


LONG = "a red circle on a navy background and a blue star beside it and so on and on"  # the tiny tokenizer reads 16


@pytest.mark.parametrize("kind", tiny.TEXT)
def test_prompts_that_are_cut_off_are_counted_and_no_batch_tells(kind, caplog, capfd, monkeypatch):
    family = family_of(tiny.PIPELINES[kind]())
    for name in module._TOLD:
        monkeypatch.setattr(logging.getLogger(name.split(".")[0]), "propagate", True)
    prompts = [*tiny.PROMPTS, LONG, LONG + " again"]
    assert truncation(family.tokenizers, prompts) == (
        "2 of 5 prompts are longer than the text encoder's 16 tokens: the rest is cut off."
    )
    assert truncation(family.tokenizers, [LONG], "validation prompts").startswith(
        "1 of 1 validation prompts is longer"
    )
    assert truncation(family.tokenizers, tiny.PROMPTS) is None and truncation(family.tokenizers, []) is None
    family.encode(prompts)
    evaluation = Evaluation(prompts)
    evaluation.sample(family, family.sampler(), num_inference_steps=1)
    evaluation.encode(family)
    assert (
        not [record for record in caplog.records if record.levelno >= logging.WARNING] and not capfd.readouterr().err
    )
    family.pipeline.encode_prompt(prompts, "cpu", 1, False) if kind == "stable_diffusion" else None
    assert bool(caplog.records) == (kind == "stable_diffusion"), "outside it is told as ever"


def test_other_warnings_are_not_hidden(caplog, monkeypatch):
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with told_once(), told_once():
        logger.warning("Token indices sequence length is longer than %d", 5)
        logger.warning("something else")
    assert {record.getMessage() for record in caplog.records} == {"something else"} and not logger.filters


def test_of_many_prompts_some_from_all_over_are_looked_at(monkeypatch):
    monkeypatch.setattr(module, "LOOKED_AT", 10)
    tokenizers = family_of(tiny.pipeline()).tokenizers
    assert truncation(tokenizers, ["a"] * 50 + [LONG] * 50).startswith(
        "5 of 10 prompts that were looked at are longer"
    )
