"""Data for alignment: sources, row formats, chat masks, packing and resumable loaders as LightningDataModules."""

from datamodules.base import AlignmentDataModule
from datamodules.cache.options import CacheOptions
from datamodules.curricula import ByColumn, ByLength, BySuccess
from datamodules.mixture import MixtureDataModule
from datamodules.mixture_sources import MixtureSource
from datamodules.preference import PreferenceDataModule
from datamodules.pretrain import PretrainDataModule
from datamodules.prompts import PromptDataModule
from datamodules.sft import SFTDataModule
from datamodules.streams.options import StreamOptions
from datamodules.unpaired import UnpairedDataModule

__all__ = [
    "AlignmentDataModule",
    "ByColumn",
    "ByLength",
    "BySuccess",
    "CacheOptions",
    "MixtureDataModule",
    "MixtureSource",
    "PreferenceDataModule",
    "PretrainDataModule",
    "PromptDataModule",
    "SFTDataModule",
    "StreamOptions",
    "UnpairedDataModule",
]
