"""The sentences of docs/explanation/memory.md that depend on what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Facts = dict[str, Any]
Ways = dict[tuple[str, str], Facts]  # by "map" or "read", and "cold" or "warm"


def proof_of_cold(ways: Ways) -> str:
    most = max(ways[by, "cold"]["cached_before"] for by in ("map", "read"))
    return f"Before the cold runs {amount(most)} of the file were in the page cache."


def how_many_read(found: Facts) -> str:
    read = found["processes"]["read"]
    if not read:
        return "By reading not even one had room here beside the page cache."
    some = f"By reading, {read[-1]['n']} processes have {amount(read[-1]['pss'])} of Pss together"
    return f"{some}, and no more would have fitted." if read[-1]["n"] < len(found["processes"]["map"]) else f"{some}."


def how_capped(caps: Facts) -> str:
    if caps["how"] is None:
        return f"Not measured here: no cap can be set ({caps['why']})."
    return (
        f"Capped by {caps['how']}. The cap is that part of the file, and on top the {amount(caps['private'])} of "
        "private memory that Python and the runtime take. It counts the pages of the file that the process brings in; "
        "the file was cold before each run, so that all are its own. Ten tokens, of which those after the first count."
    )


def what_was_touched(found: Facts, cold: Facts) -> str:
    size, embedding = found["model"]["size"], found["model"]["embedding"]
    text = (
        f"After one token {amount(cold['mapped'])} of the file's {amount(size)} are in the process's page table. "
        f"What is missing is the header, which is read and not mapped, and the table of embeddings "
        f"({amount(embedding)}), of which a token needs one row. Every other weight is multiplied for every token: "
        "nothing is sparse."
    )
    tight = tightest(found, "map")
    if tight is None:
        return text
    return (
        f"{text} Under the cap of {tight['percent']} % the process shows {amount(rss(tight))} of RSS and writes the "
        f"same tokens, because {share(tight['device_read'], size)} of the file is read anew for each."
    )


def of_alignment(rows: Sequence[Facts]) -> str:
    warm = [row for row in rows if row["state"] == "warm"]
    told = []
    for when, seconds_of in (("until the first token", _until_first), ("for later tokens", _later)):
        runs = [[seconds_of(run) for run in row["runs"]] for row in warm]
        medians = [statistics.median(of_one) for of_one in runs]
        between, within = max(medians) / min(medians), max(max(of_one) / min(of_one) for of_one in runs)
        more = "more" if between > within else "no more"
        told.append(f"{when} {times(between)}, {more} than the {times(within)} by which runs of one file differ")
    return (
        f"From a warm cache the slowest of the three takes, against the fastest, {'; '.join(told)}. The largest "
        f"alignment adds {share(warm[-1]['size'] - warm[0]['size'], warm[0]['size'])} to the file."
    )


def _until_first(run: Sequence[float]) -> float:
    return run[0] + run[1]


def _later(run: Sequence[float]) -> float:
    return statistics.mean(run[2:])


def of_start(ways: Ways) -> str:
    read, mapped = ways["read", "warm"]["load_seconds"], ways["map", "warm"]["load_seconds"]
    warm, cold = (both(ways["read", state]) / both(ways["map", state]) for state in ("warm", "cold"))
    word = "True of loading" if read >= 10 * mapped else "Not true here even of loading"
    return (
        f"{word} from a warm page cache, where mapping takes {seconds(mapped)} and reading {seconds(read)} "
        f"({read / mapped:.0f} times as long); but what one waits for is the first token, and reading takes "
        f"{times(warm)} as long until then with a warm cache, and {times(cold)} with a cold one, where the disk sets "
        "the pace."
    )


def of_large_models(found: Facts) -> str:
    points, size = found["caps"]["points"], found["model"]["size"]
    if not points:
        return "Not measured here, since no cap could be set."
    mapped, read = (
        [point for point in points if point["by"] == by and point["outcome"] == "ran"] for by in ("map", "read")
    )
    least = (
        f"reading ran with {read[-1]['percent']} % of the file and was killed below" if read else "reading never ran"
    )
    if not mapped:
        return f"Not true here: mapping ran under no cap, and {least}."
    best, tight = max(point["rate"] for point in mapped), mapped[-1]
    return (
        f"True that they run, not that they run well: {least}, while mapping still ran with {tight['percent']} %, but "
        f"wrote {tight['rate']:.2f} tokens per second there instead of {best:.2f}, because "
        f"{share(tight['device_read'], size)} of the file came from the disk anew for every token."
    )


def of_sharing(found: Facts) -> str:
    first, *_, last = found["processes"]["map"]
    size = found["shared"]["size"]
    bound = 1.05 * size + last["n"] * first["private"]
    word = "True" if last["pss"] <= bound else "Not true here"
    return (
        f"{word}: {last['n']} processes on a file of {amount(size)} have {amount(last['pss'])} of Pss together, "
        f"{amount(last['private'])} of it private (1.05 times the file, and {last['n']} times the private memory of "
        f"one process, would be {amount(bound)}); the {amount(last['rss'])} that their RSS adds up to exist nowhere."
    )


def of_sparseness(found: Facts, cold: Facts) -> str:
    tight = tightest(found, "map")
    text = (
        f"No: all weights are needed for every token ({share(cold['mapped'], found['model']['size'])} of the file is "
        "touched by the first, and the rest is embeddings of other tokens); a monitor that shows less tells how many "
        "of the file's pages happen to be in the process's page table, which is what memory is left for them, or "
        "leaves them out"
    )
    if tight is None:
        return f"{text}."
    return (
        f"{text}: with memory for {tight['percent']} % of the model ours shows {amount(rss(tight))} of RSS, or "
        f"{amount(tight['rss_anon'])} where private memory is all that counts, and pays with "
        f"{amount(tight['device_read'])} from the disk and {tight['major_faults']:.0f} major faults for each token "
        "(5.8 GB were 29 % of that file; which of the two that monitor showed is not known)."
    )


def tightest(found: Facts, by: str) -> Facts | None:
    """The run under the tightest cap that ended well."""
    return next((p for p in reversed(found["caps"]["points"]) if p["by"] == by and p["outcome"] == "ran"), None)


def rss(point: Facts) -> int:
    return int(point["rss_anon"] + point["rss_file"])


def both(way: Facts) -> float:
    """Seconds until the first token."""
    return float(way["load_seconds"] + way["first_seconds"])


def amount(nbytes: float) -> str:
    return "0 bytes" if not nbytes else f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def seconds(n: float) -> str:
    return f"{n:.3f} s" if n < 1 else f"{n:.2f} s"


def share(n: float, of: float) -> str:
    return f"{100 * n / of:.1f} %"


def times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"
