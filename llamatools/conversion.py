"""From a checkpoint to an aligned GGUF file, quantized or not: plan, fill, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, Thread

from .checkpoint import Note
from .draft import Draft, check_destination
from .dtypes import BF16, F16, F32, DType
from .dtypes.kernels import load_numba
from .errors import UnsupportedError, UsageError, in_file
from .fill import Care, Losses, default_threads, fill, working_memory
from .formats.gguf_write import DEFAULT_ALIGNMENT
from .formats.meta import DEFAULTS, MetaOptions, open_meta, verify_source
from .layout import Layout
from .mixtures import NAMES as RECIPES
from .plan import Plan, plan_gguf
from .quantization import Change, QuantizeOptions, plan_quantized, read_plan, the_recipe
from .recipes import Recipe
from .recognise import META, format_of, inspect

DTYPES: dict[str, DType | None] = {"auto": None, "f32": F32, "f16": F16, "bf16": BF16}
PLAIN = QuantizeOptions()

OnProgress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What `convert` or `quantize` did, or with dry_run would do.

    layout: the written file's. memory: bytes of buffers at most. losses: by tensor, only where a cast lost something.
    verified: what --verify-source checked. seconds: of work. changes: of each tensor, where a recipe was followed.
    """

    layout: Layout
    threads: int
    memory: int
    written: bool
    seconds: float
    losses: Mapping[str, Losses] = field(default_factory=dict)
    verified: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the files did not say."""
        return self.layout.notes


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | os.PathLike[str] = "auto",
    alignment: int = DEFAULT_ALIGNMENT,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    options: MetaOptions = DEFAULTS,
    name: str | None = None,
    settings: Mapping[str, str] | None = None,
    verify: bool = False,
    quantizing: QuantizeOptions = PLAIN,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Converts the Meta checkpoint in folder `source` to the GGUF file `destination`.

    dtype: of the matrices; "auto" keeps each one's own; or a recipe, as of `quantize`, with `quantizing`, which gives
    the same file in one pass. alignment: of every tensor in bytes, a power of two from 32 to 2 MiB.
    threads: as many as there are processors by default; the bytes do not depend on it. dry_run: plan only.
    force: replace an existing file. options: what to state about the checkpoint. name: general.name.
    settings: metadata keys to set, as text. verify: read the source whole first and compare its checksums.

    Raises FormatError for bad input, UsageError for a request that cannot be met, UnsupportedError for other models,
    SpaceError for a full disk. Whatever happens, no incomplete file is left.
    """
    started = time.perf_counter()
    source, destination = Path(source), Path(destination)
    is_recipe = str(dtype) not in DTYPES
    if is_recipe and str(dtype).lower() not in RECIPES and not os.path.exists(dtype):
        known = ", ".join((*DTYPES, *RECIPES))
        raise UsageError(f"unknown dtype {str(dtype)!r}", where="--dtype", todo=f"One of {known}, or a recipe file")
    if not is_recipe and quantizing != PLAIN:
        raise UsageError(f"{dtype} is no recipe, which the other options need", where="--dtype")
    format = format_of(source)
    if format != META:
        raise UnsupportedError(
            f"this is {format}, and only Meta checkpoints are converted",
            todo="Name the folder that holds params.json and consolidated.00.pth",
            file=source,
        )
    checkpoint = open_meta(source, options)
    changes: tuple[Change, ...] = ()
    with in_file(source):
        wanted = None if is_recipe else DTYPES[str(dtype)]
        plan = plan_gguf(checkpoint, destination, dtype=wanted, alignment=alignment, name=name, settings=settings)
    if is_recipe:
        rules = the_recipe(plan.layout, dtype, quantizing)
        with in_file(source):
            plan, changes = plan_quantized(plan, destination, rules, quantizing)
    work = _Work(plan, changes, _checked(threads), [file.path for file in checkpoint.files], force)
    if not dry_run:
        work.check_destination()
    verified = tuple(verify_source(source)) if verify else ()
    care = Care(numbers=is_recipe, roundings=is_recipe and quantizing.measure)
    done = work.planned() if dry_run else work.done(care, on_progress)
    return replace(done, verified=verified, seconds=time.perf_counter() - started)


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    *,
    options: QuantizeOptions = PLAIN,
    alignment: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Writes the GGUF file `source` anew as `destination`, each tensor in the dtype that `recipe` gives it.

    recipe: a name such as "q4_k_m", or a recipe file's path. options: what else to ask for. alignment: of every tensor
    in bytes; the source's by default. threads, dry_run, force: as of `convert`, as is what it raises.
    """
    started = time.perf_counter()
    source, destination = Path(source), Path(destination)
    layout = _gguf(source)
    rules = the_recipe(layout, recipe, options)
    with in_file(source):
        plan, changes = plan_quantized(read_plan(layout), destination, rules, options, alignment)
    work = _Work(plan, changes, _checked(threads), [file.path for file in layout.files], force)
    if not dry_run:
        work.check_destination()
    care = Care(sources=False, numbers=True, roundings=options.measure)
    done = work.planned() if dry_run else work.done(care, on_progress)
    return replace(done, seconds=time.perf_counter() - started)


def recipe_of(
    source: str | os.PathLike[str], recipe: str | os.PathLike[str], *, options: QuantizeOptions = PLAIN
) -> Recipe:
    """The rules by which `quantize` would choose for this GGUF file. Raises what it raises."""
    return the_recipe(_gguf(Path(source)), recipe, options)


def _gguf(source: Path) -> Layout:
    layout = inspect(source).sound()
    if not layout.format.startswith("GGUF"):
        raise UnsupportedError(
            f"no GGUF file, but {layout.format}",
            todo="Convert it first, or quantize a Meta checkpoint in one pass: llamatools convert --dtype RECIPE",
            file=source,
        )
    return layout


def _checked(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do the work", where="--threads")
    return threads or default_threads()


@dataclass(frozen=True)
class _Work:
    """A plan about to be carried out. sources: files that must not be written over."""

    plan: Plan
    changes: tuple[Change, ...]
    threads: int
    sources: Iterable[Path]
    force: bool

    @property
    def destination(self) -> Path:
        return self.plan.layout.files[0].path

    def check_destination(self) -> None:
        check_destination(self.destination, self.sources, force=self.force)

    def planned(self) -> Conversion:
        layout = self.plan.layout
        return Conversion(
            layout, self.threads, working_memory(layout.tensors, self.threads), False, 0.0, changes=self.changes
        )

    def done(self, care: Care, on_progress: OnProgress) -> Conversion:
        layout = self.plan.layout
        if any(not change.is_copy and change.after.is_quantized for change in self.changes):
            Thread(target=load_numba).start()  # while Draft waits for the disk to reserve space
        with Draft(self.destination, layout.size, force=self.force) as draft:
            progress = _Total(sum(tensor.nbytes for tensor in layout.tensors), on_progress)
            filled = fill(draft, layout.tensors, threads=self.threads, progress=progress, care=care)
            header = self.plan.header(filled.digests, filled.source_digests)
            draft.write(header[4:], 4)
            draft.write(header[:4], 0)  # the magic last: until now no reader takes the file for a model
            draft.publish()
        changes = tuple(replace(change, rounding=filled.roundings.get(change.name)) for change in self.changes)
        return replace(self.planned(), written=True, losses=filled.losses, changes=changes)


class _Total:
    """Adds up what the threads did, for whoever watches."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._done, self._total, self._on_progress, self._lock = 0, total, on_progress, Lock()

    def __call__(self, n: int) -> None:
        with self._lock:
            self._done += n
            self._on_progress(self._done, self._total)
