"""Folders that other tools can read: a trained policy with its tokenizer in Hugging Face format."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from alignment_modules.policies.adapter_start import has_start, save_as_lora
from alignment_modules.policies.adapters import check_mergeable, has_adapter, merged_state
from alignment_modules.policies.forward import classifies, language_model
from alignment_modules.policies.model_card import CardFacts, base_path, write_model_card
from alignment_modules.policies.placing import assemble
from alignment_modules.policies.weights import without_bar

MARKER = "alignment_modules.json"  # says that a folder is an export, and so may be replaced by the next one


def export_policy(
    policy: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    lora: Literal["merge", "adapter"] = "merge",
    stop_token_ids: Sequence[int] = (),
) -> Path:
    """Writes the policy to a folder that other tools read.

    A reward model's folder is one that `AutoModelForSequenceClassification` reads, and that gives the same numbers for
    the same tokens: its padding id is one that ends no text, or none, so that the last token before it is the text's
    last. Its note says by which ids texts end.

    It holds safetensors, the configuration, the generation configuration, the tokenizer with its chat template and a
    model card, `README.md`, which says more once `write_model_card` knows more.
    Everything goes to a temporary folder beside the target, is flushed to disk and takes the target's name at the end,
    so that a reader never sees half an export and a failure leaves the former one as it was. The live model is not
    changed. Files that somebody added to the former export are carried over.

    Of a sharded policy all processes call this: the first one puts it together, tensor by tensor, and writes it.

    Args:
        policy: A transformers model, a model with LoRA adapters, or a plain module, which gives `model.safetensors`
            and a note.
        directory: The folder; its parents are made. An existing one is replaced if it is empty or an export.
        tokenizer: A transformers tokenizer to put beside the model. Its end-of-sequence and padding ids go to the
            generation configuration.
        lora: For a policy with adapters, "merge" writes a full model, "adapter" the adapters alone beside the base's
            name.
        stop_token_ids: More ids at which generation is to stop, such as a chat template's end of turn.

    Returns:
        The folder.

    Raises:
        ValueError: `directory` holds something that is not an export, the adapters cannot be merged, or there are none
            to write, or their base is not on disk.
        OSError: It cannot be written; a former export is untouched.
    """
    policy = getattr(policy, "_orig_mod", policy)  # torch.compile's wrapper
    target = Path(directory).expanduser().resolve()
    check_export(policy, target, lora=lora, tokenizer=tokenizer)
    found = assemble(policy)
    if found is None:
        return target
    policy = found
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with without_bar():  # the Trainer's own may still be there
            note = _write(policy, temporary, lora)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
            inner = language_model(policy)
            if inner is not None and classifies(inner):
                note["stop_token_ids"] = _set_classifier_ids(temporary, tokenizer, stop_token_ids)
            else:
                _set_token_ids(temporary, tokenizer, stop_token_ids)
        write_model_card(temporary, CardFacts(base=base_path(policy)))
        note["files"] = sorted(
            file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file()
        )
        _write_json(temporary / MARKER, note)
        readable = temporary.stat().st_mode & 0o666  # as the umask says; safetensors leaves files to their owner alone
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(readable)
            _flush(file)
        _replace(temporary, target)
    except (OSError, SafetensorError) as error:
        kept = "the export there is untouched" if target.exists() else "nothing was left there"
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot write the export {str(target)!r}: {reason}; {kept}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_export(
    policy: nn.Module, directory: str | os.PathLike[str], *, lora: str = "merge", tokenizer: Any = None
) -> None:
    """Refuses what `export_policy` would refuse, so that nobody trains for hours to hear of it.

    Args:
        policy: As in `export_policy`, and so are the others.
        directory: The folder.
        lora: "merge" or "adapter".
        tokenizer: A tokenizer, or None.

    Raises:
        ValueError: As `export_policy`.
    """
    target = Path(directory).expanduser().resolve()
    if lora not in ("merge", "adapter"):
        raise ValueError(f"lora={lora!r}: allowed are 'merge' (a full model) and 'adapter' (the adapters alone).")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(
            f"tokenizer of type {type(tokenizer).__name__} cannot be saved; a transformers tokenizer (load_tokenizer) "
            "is needed."
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory={str(target)!r} is a file.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise ValueError(
            f"directory={str(target)!r} is not empty and not an export ({MARKER} is missing), so it is not replaced. "
            "Choose another one."
        )
    adapters = getattr(policy, "peft_config", None)
    if lora == "merge":
        if adapters and not has_adapter(policy):
            raise ValueError("lora='merge': adapters of this kind cannot be merged; use lora='adapter'.")
        if adapters:
            check_mergeable(policy)
        return
    if not adapters or not hasattr(policy, "get_base_model"):
        raise ValueError(f"lora='adapter': the policy {type(policy).__name__} has no adapters; use lora='merge'.")
    if not _base_path(policy):
        raise ValueError(
            "lora='adapter': the base model under these adapters is not on disk (it was built from a config, had an "
            "adapter merged into it on loading, or got tokens by policy.added_tokens), so nobody could load them. Use "
            "lora='merge', or export the base first (`export_policy`) and train from that folder."
        )
    if Path(_base_path(policy)).resolve() == target:
        raise ValueError(
            f"directory={str(target)!r} is the base model of these adapters, which cannot be used without it. Choose "
            "another one (with the command line another trainer.default_root_dir), or lora='merge'."
        )


def _base_path(policy: Any) -> str:
    path = policy.peft_config[policy.active_adapter].base_model_name_or_path or ""
    return os.path.abspath(os.path.expanduser(path)) if os.path.isdir(os.path.expanduser(path)) else path


def _write(policy: Any, folder: Path, lora: str) -> dict[str, Any]:
    note: dict[str, Any] = {"format": "model", "class": f"{type(policy).__module__}.{type(policy).__qualname__}"}
    if lora == "adapter":
        note["format"] = "adapter"
        policy.save_pretrained(str(folder), selected_adapters=[policy.active_adapter], save_embedding_layers=False)
        for file in (folder / policy.active_adapter).glob("*"):  # peft puts all but "default" in a folder of its own
            file.rename(folder / file.name)
        shutil.rmtree(folder / policy.active_adapter, ignore_errors=True)
        if has_start(policy):
            save_as_lora(policy, folder)
        options = policy.peft_config[policy.active_adapter]
        names = {name: getattr(options, name, None) for name in ("target_modules", "exclude_modules")}
        # the order of a set is another in each process
        changes = {name: sorted(found) for name, found in names.items() if isinstance(found, set)}
        _edit_json(folder / "adapter_config.json", changes | {"base_model_name_or_path": _base_path(policy)})
    elif has_adapter(policy):
        note["format"] = "merged"
        base, state = merged_state(policy)
        untied = _was_untied(base, state)
        base.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
        if untied:
            _edit_json(folder / "config.json", {"tie_word_embeddings": False})
    elif hasattr(policy, "save_pretrained"):
        policy.save_pretrained(str(folder))
    else:
        from safetensors.torch import save_model

        note["format"] = "module"
        note["note"] = (
            "Weights of a plain torch module. Build the module and call safetensors.torch.load_model(module, "
            "'model.safetensors')."
        )
        save_model(policy, str(folder / "model.safetensors"))
    return note


def _was_untied(base: Any, state: dict[str, Tensor]) -> bool:
    """Whether an adapter on the embedding or the head made two weights out of one."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return False
    ends = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    weights = {state[f"{name}.weight"].data_ptr() for name in names if f"{name}.weight" in state}
    return len(weights) > 1


def _set_token_ids(folder: Path, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
    """Makes generation stop where this tokenizer ends a text, and where the policy was trained to stop.

    Further end ids of the model stay where they are special tokens of the tokenizer (a chat model often has two);
    others are left over from another vocabulary. The padding id goes to the generation configuration alone: in
    config.json it would make the embedding treat that row as untrainable, and it is often the end id.
    """
    generation, config = folder / "generation_config.json", folder / "config.json"
    if not generation.is_file():
        return
    former = json.loads(generation.read_text(encoding="utf-8"))
    special = set(tokenizer.all_special_ids)
    special |= {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if getattr(token, "special", False)
    }
    ends = former.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    ends = [i for i in ends if i in special and i not in others]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    ends += [i for i in stop_token_ids if i not in ends]
    ids: dict[str, Any] = {
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) if ends else None,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if config.is_file() and "text_config" not in json.loads(config.read_text(encoding="utf-8")):
        _edit_json(config, ids)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = former.get("pad_token_id") if former.get("pad_token_id") in special else None
    _edit_json(generation, {**ids, "pad_token_id": pad, "_from_model_config": None})


def _set_classifier_ids(folder: Path, tokenizer: Any, stop_token_ids: Sequence[int]) -> list[int]:
    """Makes others find the last token of a text where it was in training; returns the ids that end one.

    transformers looks for the last token that is not the padding id, so one that also ends texts would hide the end.
    Positions are counted from the row's start, whatever stands there, so padding belongs behind the text.
    """
    ends = sorted({*stop_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id not in ends else None
    if (folder / "config.json").is_file():
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": pad}
        _edit_json(folder / "config.json", ids)
    if (folder / "tokenizer_config.json").is_file():
        _edit_json(folder / "tokenizer_config.json", {"padding_side": "right"})
    return ends


def note_stages(folder: str | os.PathLike[str], stages: Sequence[str]) -> None:
    """Adds to an export's note by which stages of training its policy came about.

    Args:
        folder: The export.
        stages: Their names, the first first.

    Raises:
        OSError: It cannot be written.
    """
    _add_to_note(folder, "stages", list(stages))


def stages_of(folder: str | os.PathLike[str] | None) -> list[str]:
    """By which stages of training an exported policy came about; none where its folder does not tell."""
    stages = read_note(folder).get("stages") if folder else None
    return [str(stage) for stage in stages] if isinstance(stages, list) else []


def note_metrics(folder: str | os.PathLike[str], metrics: Mapping[str, float]) -> None:
    """Adds to an export's note what was logged last of its policy.

    Args:
        folder: The export.
        metrics: Numbers by name.

    Raises:
        OSError: It cannot be written.
    """
    # JSON has no number for nan and infinity
    _add_to_note(folder, "metrics", {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()})


def metrics_of(folder: str | os.PathLike[str]) -> dict[str, float]:
    """What was logged last of an exported policy; empty where its folder does not tell."""
    metrics = read_note(folder).get("metrics")
    return {name: float(value) for name, value in metrics.items()} if isinstance(metrics, dict) else {}


def _add_to_note(folder: str | os.PathLike[str], key: str, value: Any) -> None:
    temporary = Path(folder) / f".{MARKER}.{os.getpid()}.tmp"
    _write_json(temporary, {**read_note(folder), key: value})
    temporary.replace(Path(folder) / MARKER)


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an export says of itself: `format`, `stages`, `metrics`, of a reward model `stop_token_ids`.

    Empty where a folder is none.
    """
    try:
        found = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    """Sets keys of a JSON object; None removes one."""
    values = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    _write_json(file, {key: value for key, value in values.items() if value is not None or key not in changes})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return _flush(target.parent)
    if (target / MARKER).is_file():
        former = set(json.loads((target / MARKER).read_text(encoding="utf-8"))["files"]) | {MARKER}
        for file in [file for file in target.rglob("*") if file.is_file()]:
            name = file.relative_to(target)
            if name.as_posix() not in former and not (temporary / name).exists():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, temporary / name)
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return None


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only what may be written
    except PermissionError:
        if folder:  # which Windows does not open
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
