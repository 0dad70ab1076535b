"""The compression cache on disk, version 1: what was computed once is not computed again.

    store.json                            format and version
    objects/ab/ab12....safetensors        the factors of one layer, named by the sha256 of the file's bytes
    runs/<run_id>.json                    a finished run, with its own checksum
    runs/<run_id>.partial.jsonl           the journal of a run under way: a header line, then a line per finished layer
    evaluations/<run_id>/<key>.json       what a run was measured at on one text
    locks/<run_id>.lock, .holder          one writer per run, and which process that is

Everything appears under its final name whole or not at all, everything is verified when it is read, and nothing is
pickled. Readers take no lock and create nothing, so a store can be read from a read-only place.
"""

from pifa_compile.store.cache import Store, default_root
from pifa_compile.store.evaluations import Evaluation
from pifa_compile.store.objects import FACTOR_FORMATS
from pifa_compile.store.records import LayerRecord, Member, Run, RunHeader, Totals, timestamp
from pifa_compile.store.writer import RunWriter

__all__ = [
    "FACTOR_FORMATS",
    "Evaluation",
    "LayerRecord",
    "Member",
    "Run",
    "RunHeader",
    "RunWriter",
    "Store",
    "Totals",
    "default_root",
    "timestamp",
]
