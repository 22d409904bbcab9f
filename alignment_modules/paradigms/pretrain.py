"""Pretraining: next-token prediction on packed documents."""

from alignment_modules.paradigms.sft import SFTModule


class PretrainModule(SFTModule):
    """Pretraining of a language model, from scratch or continued.

    The objective is `SFTModule`'s with every token supervised; documents packed into one row do not see each other.
    Takes the same keywords. A fresh model comes from `policy=PolicyConfig(config={"model_type": "llama", ...})`.
    """

    paradigm = "pretrain"
