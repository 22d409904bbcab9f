"""Data for alignment: sources, row formats, chat masks, packing and resumable loaders as LightningDataModules."""

from .base import AlignmentDataModule
from .preference import PreferenceDataModule
from .pretrain import PretrainDataModule
from .prompts import PromptDataModule
from .sft import SFTDataModule

__all__ = [
    "AlignmentDataModule",
    "PreferenceDataModule",
    "PretrainDataModule",
    "PromptDataModule",
    "SFTDataModule",
]
