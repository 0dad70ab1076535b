"""How a run is made again, in words: the call or the command that makes anew what of it is damaged or missing."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pifa_compile.errors import RecipeError
from pifa_compile.recipes import Calibrated, FirstCall, Recipe, recipe_from_json
from pifa_compile.store import Run, Store
from pifa_compile.store.objects import CURE


def how_to_make(store: Store, run: Run) -> str:
    """What to do about lost factors of a run: its command where it was made of a folder or by a Hugging Face id, else
    its call; both take the weights, and the text, that the run was made of."""
    try:
        recipe = recipe_from_json(run.header.recipe)
    except (RecipeError, TypeError):  # of another version, or of another program
        return CURE
    if isinstance(recipe, FirstCall):
        cure = "compile with options={'damaged': 'recompute'} and call with the inputs of that first call, or remove it"
        return f"run {run.run_id!r} was made by a first call: {cure} with Store.delete_run, and call again"
    made = _command(store, run, recipe) if _is_place(run.header.model) else _call(store, run, recipe)
    return f"make it again with {made}, which computes nothing but what is damaged or missing"


def _call(store: Store, run: Run, recipe: Recipe) -> str:
    words = [f"density={recipe.density!r}", *(f"{key}={value!r}" for key, value in _changed(recipe).items())]
    text = ", text=TEXT, tokenizer=TOKENIZER" if _reads_text(run, recipe) else ""
    made = f"pifa_compile.{type(recipe).__name__}({', '.join(words)})"
    return f"pifa_compile.compress(MODEL, {made}{text}, store={str(store.root)!r})"


def _command(store: Store, run: Run, recipe: Recipe) -> str:
    words = ["pifa", "compress", run.header.model, "--method", recipe.method, "--density", repr(recipe.density)]
    dtypes = {str(record.details["dtype"]) for record in run.layers if "dtype" in record.details}
    words += ["--dtype", *dtypes] if len(dtypes) == 1 else []
    for key, value in _changed(recipe).items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    words += ["--text", "TEXT"] if _reads_text(run, recipe) else []
    return f"`{shlex.join([*words, '--store', str(store.root)])}`"


def _changed(recipe: Recipe) -> dict[str, Any]:
    """The fields, but for the density, that are not at their default."""
    found = {}
    for field in fields(recipe):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name != "density" and getattr(recipe, field.name) != default:
            found[field.name] = getattr(recipe, field.name)
    return found


def _reads_text(run: Run, recipe: Recipe) -> bool:
    return isinstance(recipe, Calibrated) and (run.header.calibration or {}).get("source") != "self"


def _is_place(model: str) -> bool:
    return "/" in model or Path(model).is_dir()
