"""From a checkpoint or a GGUF to an aligned GGUF, quantized or not, in one file or several: plan, fill, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from . import recognise
from .checkpoint import Note
from .draft import Drafts, check_destination
from .dtypes import BF16, F16, F32, DType
from .errors import UnsupportedError, UsageError, in_file
from .fill import Care, Losses, default_threads, fill, working_memory
from .formats.gguf_write import DEFAULT_ALIGNMENT
from .layout import Layout
from .mixtures import NAMES as RECIPES
from .plan import Plan, plan_gguf, split
from .quantization import Change, QuantizeOptions, plan_quantized, read_plan, the_recipe
from .recipes import Recipe
from .recognise import META, format_of, inspect
from .rewriting import faults, mendable, plan_rewritten, recorded_tensors, require_recorded

DTYPES: dict[str, DType | None] = {"auto": None, "f32": F32, "f16": F16, "bf16": BF16}
PLAIN = QuantizeOptions()

if TYPE_CHECKING:
    from .formats.meta import MetaOptions  # imported where such a checkpoint is read

OnProgress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What `convert` or `quantize` did, or with dry_run would do.

    layout: the written file's. memory: bytes of buffers at most. losses: by tensor, only where a cast lost something.
    verified: what `verify` checked. mended: what was wrong with a GGUF source and no longer is.
    seconds: of work. recipe: the rules that were followed, if any. changes: what they made of each tensor.
    """

    layout: Layout
    threads: int
    memory: int
    written: bool
    seconds: float
    losses: Mapping[str, Losses] = field(default_factory=dict)
    verified: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    recipe: Recipe | None = None
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
    alignment: int | None = None,
    split_size: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    options: MetaOptions | None = None,
    name: str | None = None,
    settings: Mapping[str, str] | None = None,
    verify: bool = False,
    quantizing: QuantizeOptions = PLAIN,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Converts the Meta checkpoint in folder `source` to the GGUF file `destination`, or lays a GGUF out anew.

    A GGUF source, a file or any file of a set, keeps its tensors' bytes and its keys; what is wrong with its offsets
    and padding is mended where the file proves where its data lie. Only alignment, split_size, name and settings are
    for it. Tensors that llamatools wrote are held against the digests it stored.

    dtype: of the matrices; "auto" keeps each one's own; or a recipe, as of `quantize`, with `quantizing`, which gives
    the same file in one pass. alignment: of every tensor in bytes, a power of two from 32 to 2 MiB; by
    default 32, or what a GGUF source states. split_size: bytes that a file may have; a larger one becomes a set of
    files, in which no tensor is cut.
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
    if split_size is not None and split_size < 1:
        raise UsageError(f"{split_size} bytes hold nothing", where="--split-size")
    format = format_of(source)
    rules = None
    changes: tuple[Change, ...] = ()
    origin = None
    if format == "GGUF":
        _require_plain(str(dtype), options, verify)
        origin = mendable(inspect(source))
        with in_file(source):
            plan = plan_rewritten(origin, destination, alignment=alignment, name=name, settings=settings)
        files = [file.path for file in origin.files]
    elif format == META:
        checkpoint = recognise.open(source, options)
        with in_file(source):
            plan = plan_gguf(
                checkpoint,
                destination,
                dtype=None if is_recipe else DTYPES[str(dtype)],
                alignment=DEFAULT_ALIGNMENT if alignment is None else alignment,
                name=name,
                settings=settings,
            )
        if is_recipe:
            rules = the_recipe(plan.layout, dtype, quantizing)
            with in_file(source):
                plan, changes = plan_quantized(plan, destination, rules, quantizing)
        files = [*(file.path for file in checkpoint.files), *_files_of(dtype, quantizing)]
    else:
        raise UnsupportedError(
            f"this is {format}, and only Meta checkpoints and GGUF files are converted",
            todo="Name a GGUF file, or the folder that holds params.json and consolidated.00.pth",
            file=source,
        )
    if split_size is not None:
        plan = split(plan, split_size)
    work = _Work(plan, changes, _checked(threads), files, force, origin)
    if not dry_run:
        work.check_destination()
    verified = _verified(source) if verify else ()
    care = Care(sources=origin is None, numbers=is_recipe, roundings=is_recipe and quantizing.measure)
    done = work.planned() if dry_run else work.done(care, on_progress)
    mended = () if origin is None else faults(origin)
    return replace(done, verified=verified, mended=mended, recipe=rules, seconds=time.perf_counter() - started)


def _verified(folder: Path) -> tuple[str, ...]:
    from .formats.meta import verify_source

    return tuple(verify_source(folder))


def _require_plain(dtype: str, options: MetaOptions | None, verify: bool) -> None:
    """Refuses what makes sense for a Meta checkpoint only. Raises UsageError."""
    if dtype != "auto":
        raise UsageError(
            "a GGUF file is laid out anew with the dtypes that it has",
            where="--dtype",
            todo="`llamatools quantize SOURCE DEST RECIPE` changes them",
        )
    given = {"--verify-source": verify, **(_given(options) if options else {})}
    for option, is_given in given.items():
        if is_given:
            what = "this is for a Meta checkpoint; a GGUF file keeps what it says"
            raise UsageError(what, where=option, todo="--set KEY=VALUE changes a key")


def _given(options: MetaOptions) -> dict[str, bool]:
    """Which of the command line's options about a checkpoint were given."""
    overrides = options.overrides
    return {
        "--tokenizer": options.tokenizer is not None,
        "--pad-vocab": options.pad_vocab,
        "--context": overrides.context is not None,
        "--rope-theta": overrides.rope_theta is not None,
        "--rope-factor": overrides.rope_factor is not None,
        "--norm-eps": overrides.norm_eps is not None,
        "--instruct": options.instruct,
        "--chat-template": options.chat_template is not None,
    }


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
    verify: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Writes the GGUF file `source` anew as `destination`, each tensor in the dtype that `recipe` gives it.

    recipe: a name such as "q4_k_m", or a recipe file's path. options: what else to ask for. alignment: of every tensor
    in bytes; the source's by default. threads, dry_run, force: as of `convert`, as is what it raises.
    verify: hold all weights against the digests that llamatools stored in `source`, which takes as long as SHA-256 of
    them; tensors that are copied are held against theirs in any case.
    """
    started = time.perf_counter()
    source, destination = Path(source), Path(destination)
    layout = _gguf(source)
    rules = the_recipe(layout, recipe, options)
    with in_file(source):
        plan, changes = plan_quantized(read_plan(layout), destination, rules, options, alignment)
    n_recorded = len(recorded_tensors(layout))
    if verify and not n_recorded:
        raise UsageError("no digests of its weights are stored in it", where="--verify-source", file=source)
    files = [*(file.path for file in layout.files), *_files_of(recipe, options)]
    work = _Work(plan, changes, _checked(threads), files, force, layout)
    if not dry_run:
        work.check_destination()
    care = Care(sources=verify, numbers=True, roundings=options.measure)
    done = work.planned() if dry_run else work.done(care, on_progress)
    verified = (f"{n_recorded} of {len(layout.tensors)} tensors: SHA-256 as stored",) if verify and not dry_run else ()
    return replace(done, verified=verified, recipe=rules, seconds=time.perf_counter() - started)


def recipe_of(
    source: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    *,
    options: QuantizeOptions = PLAIN,
    checkpoint_options: MetaOptions | None = None,
    settings: Mapping[str, str] | None = None,
) -> Recipe:
    """The rules by which `quantize` would choose for this GGUF file, or `convert` for this Meta checkpoint.

    options: as of `quantize`. checkpoint_options, settings: as `options` and `settings` of `convert`.
    Raises what these raise.
    """
    source = Path(source)
    if format_of(source) != META:
        return the_recipe(_gguf(source), recipe, options)
    checkpoint = recognise.open(source, checkpoint_options)
    with in_file(source):
        layout = plan_gguf(checkpoint, Path(), settings=settings).layout
    return the_recipe(layout, recipe, options)


def _files_of(recipe: str | os.PathLike[str], options: QuantizeOptions) -> list[Path]:
    """The files that quantizing reads besides the model."""
    return [Path(path) for path in (recipe, options.imatrix) if path is not None and os.path.isfile(path)]


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
    """A plan about to be carried out.

    sources: files that must not be written over. origin: a GGUF source, which may hold digests of its tensors.
    """

    plan: Plan
    changes: tuple[Change, ...]
    threads: int
    sources: Sequence[Path]
    force: bool
    origin: Layout | None = None

    def check_destination(self) -> None:
        for file in self.plan.layout.files:
            check_destination(file.path, self.sources, force=self.force)

    def planned(self) -> Conversion:
        layout = self.plan.layout
        return Conversion(
            layout, self.threads, working_memory(layout.tensors, self.threads), False, 0.0, changes=self.changes
        )

    def done(self, care: Care, on_progress: OnProgress) -> Conversion:
        layout = self.plan.layout
        with Drafts(((file.path, file.size) for file in layout.files), force=self.force) as drafts:
            progress = _Total(sum(tensor.nbytes for tensor in layout.tensors), on_progress)
            filled = fill(drafts, layout.tensors, threads=self.threads, progress=progress, care=care)
            if self.origin is not None:
                require_recorded(self.origin, layout, filled)
            for n, header in enumerate(self.plan.headers(filled.digests, filled.source_digests)):
                drafts[n].write(header[4:], 4)
                drafts[n].write(header[:4], 0)  # the magic last: until now no reader takes the file for a model
            drafts.publish()
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
