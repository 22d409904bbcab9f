"""What options of a mixture and of its sources may be."""

import pytest

from datamodules import AlignmentDataModule, MixtureDataModule, MixtureSource, PromptDataModule, SFTDataModule
from datamodules.streams.options import StreamOptions

SUMS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(10)]


def part(**options):
    return MixtureSource(SFTDataModule(train=SUMS), **options)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({}, {}, r"sources=\{\} must be data modules by name"),
        ({"a": 3}, {}, "source 'a' is a int; it must be a data module"),
        ({"a": AlignmentDataModule(train=SUMS)}, {}, "source 'a' is a AlignmentDataModule; it must be a data module"),
        ({"a/b": part()}, {}, "the name 'a/b' must be of letters"),
        (
            {"a": part(), "b": PromptDataModule(train=SUMS)},
            {},
            "'a' and 'b' are of two classes, SFTDataModule and Prompt",
        ),
        ({"a": part(weight=1), "b": part()}, {}, "source 'a' has a weight and source 'b' has none"),
        ({"a": part(weight=1), "b": part(epochs=1)}, {}, "source 'a' has a weight and source 'b' has epochs"),
        ({"a": part(weight=1)}, {"temperature": 2.0}, "temperature=2.0 and weight=1 of source 'a'"),
        ({"a": part(epochs=2)}, {"temperature": 2.0}, "temperature=2.0 and epochs=2 of source 'a'"),
        ({"a": part(rewards=["x"])}, {}, r"source 'a': rewards=\['x'\] has no effect, as SFTDataModule"),
        ({"a": SFTDataModule(train=SUMS, batch_size=4)}, {}, "source 'a': batch_size=4 has no effect"),
        ({"a": SFTDataModule(train=SUMS, shuffle=False)}, {}, "source 'a': shuffle=False has no effect"),
        ({"a": SFTDataModule(train=SUMS, num_workers=1)}, {}, "source 'a': num_workers=1 has no effect"),
        ({"a": SFTDataModule(train=SUMS, added_tokens=["x"])}, {}, "source 'a': added_tokens="),
        (
            {"a": MixtureSource(SFTDataModule(validation=SUMS), weight=1)},
            {},
            "source 'a': weight=1 has no effect, as train",
        ),
        (
            {"a": SFTDataModule(train="x.jsonl", stream=StreamOptions())},
            {},
            "source 'a': its training rows are a stream",
        ),
        ({"a": MixtureDataModule(sources={"b": part()})}, {}, "a mixture cannot be a source"),
        ({"a": part()}, {"temperature": 0.5}, "temperature=0.5 must be a finite number of 1 or more"),
    ],
)
def test_options_that_do_not_fit_together(sources, options, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataModule(sources=sources, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "weight=0 must be a finite number > 0"),
        ({"epochs": float("nan")}, "epochs=nan must be"),
        ({"loss_weight": -1}, "loss_weight=-1 must be"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be"),
        ({"rewards": []}, r"rewards=\[\] judges nothing"),
        ({"rewards": "exact_match"}, "rewards='exact_match' must be a list of text"),
        ({"weight": 1, "epochs": 1}, "weight=1 and epochs=1 of one source"),
    ],
)
def test_options_of_a_source(options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)
