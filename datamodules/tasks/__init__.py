"""Tasks that make their own data, tokenizer and environment, so that everything runs without a network."""

from datamodules.tasks.addition import AdditionCorpus, AdditionInstructions, AdditionPrompts, AdditionTask
from datamodules.tasks.characters import character_tokenizer
from datamodules.tasks.hidden_number import HiddenNumber, question_tokenizer, read_questions
from datamodules.tasks.hidden_rows import (
    HiddenNumberEpisodes,
    HiddenNumberNotes,
    HiddenNumberPrompts,
    HiddenNumberTask,
)
from datamodules.tasks.problems import split_of, write_sums
from datamodules.tasks.reasoning_gym import ReasoningGymPrompts

__all__ = [
    "AdditionCorpus",
    "AdditionInstructions",
    "AdditionPrompts",
    "AdditionTask",
    "HiddenNumber",
    "HiddenNumberEpisodes",
    "HiddenNumberNotes",
    "HiddenNumberPrompts",
    "HiddenNumberTask",
    "ReasoningGymPrompts",
    "character_tokenizer",
    "question_tokenizer",
    "read_questions",
    "split_of",
    "write_sums",
]
