"""Rows that streams are made of."""

from torch.utils.data import IterableDataset

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule, UnpairedDataModule

ROWS = {
    PretrainDataModule: [{"text": "0123456789"[: 2 + n % 8] + str(n)} for n in range(37)],
    SFTDataModule: [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(37)],
    PreferenceDataModule: [{"prompt": f"{n}=", "chosen": str(n), "rejected": f"{n}{n}"} for n in range(37)],
    UnpairedDataModule: [{"prompt": f"{n}=", "completion": str(n), "label": n % 3 > 0} for n in range(37)],
    PromptDataModule: [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(37)],
}


class Numbers(IterableDataset):
    """Rows of numbers, for each pass from the first on."""

    def __init__(self, rows=37, fails_at=None):
        self.rows, self.fails_at = rows, fails_at

    def __iter__(self):
        for number in range(self.rows):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            yield {"prompt": f"{number}+1=", "completion": str(number + 1)}
