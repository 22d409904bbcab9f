"""Data that the package makes itself, so that everything runs without a network."""

from datamodules.tasks.addition import AdditionCorpus, AdditionInstructions, AdditionPrompts, AdditionTask
from datamodules.tasks.characters import character_tokenizer
from datamodules.tasks.problems import split_of, write_sums

__all__ = [
    "AdditionCorpus",
    "AdditionInstructions",
    "AdditionPrompts",
    "AdditionTask",
    "character_tokenizer",
    "split_of",
    "write_sums",
]
