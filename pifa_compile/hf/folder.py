"""A prepared model as a folder that transformers loads: weights, config, tokenizer, a card, and code to import us."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pifa_compile.errors import InputError
from pifa_compile.hf.card import model_card
from pifa_compile.hf.config import PifaConfig
from pifa_compile.hf.layers import describe
from pifa_compile.hf.quantizer import attach, config_of
from pifa_compile.hf.remote import MODULE, TEXT, auto_map
from pifa_compile.store import Run

#: What lies beside a model's weights and goes with it: tokenizers, processors, poolings of sentences, licences.
COMPANIONS = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*processor*.json",
    "modules.json",
    "*sentence*.json",
    "[0-9]_*/*",
    "LICENSE*",
    "NOTICE*",
)


def export(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    run: Run | None = None,
    tuned: Mapping[str, Any] | None = None,
    imported: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a prepared transformers model, as ``apply_`` and ``load`` make them, to a new folder; returns its path.

    source          directory or Hugging Face id of the dense model, for its tokenizer and for the card
    run             the run that the factors come from, for the card: recipe, ranks, errors
    tuned           what ``tune`` gave, as JSON, where the factors were trained: ``report.to_json()``; it goes behind
                    what the model's config says of earlier tunings
    imported        where pairs of another method come from: ``report.origin()`` of ``import_pairs``
    max_shard_size  as in ``save_pretrained``

    ``from_pretrained`` loads the folder where pifa_compile is imported. From then on the model's own
    ``save_pretrained`` writes the same weights and config. Raises InputError for a model without factored layers, for
    a folder that has something in it, and for what is no report of a tuning or an import: nothing could load it.
    """
    from transformers import PreTrainedModel

    out = new_folder(folder)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no model of transformers; save its state_dict() instead")
    forms = describe(model)
    if not forms:
        raise InputError("the model has no factored layers; make them first: pifa_compile.apply_(model)")
    known = getattr(model.config, "quantization_config", None)
    if run is not None:
        like = PifaConfig({}, run=run.run_id, recipe=run.header.recipe)
    else:
        like = known if isinstance(known, PifaConfig) else PifaConfig({})
    config = config_of(forms, like=like)
    told = [] if tuned is None or config.tuned[-1:] == [dict(tuned)] else [tuned]  # exported twice, it was done once
    origin = config.imported if imported is None else imported
    config = PifaConfig(config.layers, run=config.run, recipe=config.recipe, tuned=[*config.tuned, *told],
                        imported=origin)  # fmt: skip
    companions = _companions(source)  # before anything is written: a name may be wrong
    attach(model, config)
    card = model_card(model, forms, source, run, config.recipe, config.tuned, config.imported)
    model.config.auto_map = auto_map(model)
    with whole_or_nothing(out) as new:
        try:
            # The names that this release has, not those of older checkpoints: layers are found by them.
            model.save_pretrained(new, max_shard_size=max_shard_size, save_original_format=False)
        finally:
            del model.config.auto_map
        (new / f"{MODULE}.py").write_text(TEXT, encoding="utf-8")
        for path, name in companions:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new / name)
        (new / "README.md").write_text(card, encoding="utf-8")
    return out


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, which takes its place at the end and is removed where that is not reached."""
    place = out.resolve()  # an empty folder that a link leads to is filled where it is
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    new.mkdir()
    try:
        yield new
        new.replace(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The place, if nothing is there yet; raises InputError if something is."""
    out = Path(folder).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and is not an empty folder; name a new one")
    return out


def _companions(source: str | os.PathLike[str] | None) -> list[tuple[Path, Path]]:
    """Files to copy, with their places in the new folder."""
    if source is None:
        return []
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _snapshot(str(source))
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return [(path, path.relative_to(folder)) for path in sorted(found)]


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(COMPANIONS)))
    except Exception as error:  # the hub raises many kinds, all of which mean: not there
        first = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the tokenizer and other files of {name}: {first}") from error
