"""Write the tables of benchmarks/README.md and data/recorded/README.md from results and records.

No number there is typed by hand.

python benchmarks/report.py            rewrite what stands between the markers
python benchmarks/report.py --check    exit code 1 if that would change anything
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RECORDED = HERE.parent / "data" / "recorded"


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are set to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])


def times(ratio: dict[str, float]) -> str:
    """``2.31× (2.20–2.45)``."""
    return f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})"


def where(found: dict[str, Any], n: int) -> str:
    """Hardware, versions, date and repeats, in one sentence."""
    machine = found["machine"]
    packages = ", ".join(f"{p} {machine['packages'][p]}" for p in ("torch", "numpy"))
    return (
        f"Measured on {machine['date']}: {machine['cpu']['cores']} cores of "
        f"{machine['cpu']['name']} ({machine['os']}), Python {machine['python']}, {packages}; "
        f"{n} repeats; {disturbed(found)}. Ratios: median (lowest–highest) over the repeats."
    )


def disturbed(found: dict[str, Any]) -> str:
    """How many turns were thrown away, and how many count although others were at work."""
    if not found["settings"]["patience_s"]:
        return "nobody looked whether other programs disturbed"
    contenders = [c for case in found.get("cases", [found]) for c in case["contenders"]]
    away, kept = (
        sum(c[what] for c in contenders) for what in ("turns_discarded", "turns_disturbed")
    )
    turns = sum(len(c["seconds"]) for c in contenders)
    return f"of {turns} turns {kept} were disturbed by other programs, {away} more thrown away"


def pool(found: dict[str, Any]) -> str:
    """Steps a second of each contender, and how much faster ours is, without and with start-up."""
    settings, agreement = found["settings"], found["agreement"]
    body = []
    for contender in found["contenders"]:
        name = contender["name"]
        faster = [times(r[name]) if name in r else "" for r in found["ratios"].values()]
        body.append([name, f"{contender['per_second']:,.0f}", *faster])
    table = rows(["", "steps / s", *(f"ours, {how}" for how in found["ratios"])], body)
    start = statistics.median(found["starting"]["seconds"])
    recipe = settings["recipe"]
    return "\n\n".join(
        [
            table,
            f"{settings['runs']} runs of {recipe['steps']:,} steps, `{recipe['net']}` on "
            f"{recipe['data']}, batch {recipe['batch']}. Starting the worker processes costs "
            f"{start:.1f} s, once per session. With the same noise, the losses of the plain loop "
            f"and of ours differ by at most {agreement['largest_loss_difference']:.0e} nats in the "
            f"first {agreement['steps']} steps.",
            where(found, settings["repeats"]),
        ]
    )


def barrier(found: dict[str, Any]) -> str:
    """Seconds for a curve, ours and theirs, case by case."""
    body = []
    for case in found["cases"]:
        per_curve = [case["points"] / c["per_second"] for c in case["contenders"]]
        images = " + ".join(f"{n:,}" for n in case["images"].values())
        body.append(
            [
                f"`{case['net']}` on {case['data']} ({images} images)",
                *(f"{s:.2f}" for s in per_curve),
                *(times(r) for r in case["ratios"].values()),
                f"{case['largest_difference']:.0e}",
            ]
        )
    header = ["", "ours, s", "DataLoader, s", "slices, s", "against DataLoader", "against slices"]
    settings = found["settings"]
    return "\n\n".join(
        [
            rows([*header, "largest difference"], body),
            f"{settings['points']} points, loss and error on train and test, {settings['batch']} "
            "images a batch for the opponents; ours takes its default, which is 128 where a "
            "network convolves on a CPU.",
            where(found, settings["repeats"]),
        ]
    )


def matching(found: dict[str, Any]) -> str:
    """Of each width and contender: CPU seconds, how much faster ours is, the objective reached."""
    names = {
        "companion": "companion",
        "rebasin": f"rebasin {found['settings']['peer']}",
        "plain loop": "plain loop on SciPy",
    }
    body = []
    for case in found["cases"]:
        for name, row in case["contenders"].items():
            ratio = "" if name == "companion" else f"{case['ratios'][name]:.2f}×"
            values = sorted(set(row["objective"]))
            span = f"{values[0]:,.1f}" + (f"–{values[-1]:,.1f}" if len(values) > 1 else "")
            seconds = statistics.median(row["seconds"])
            own = [f"3 × {case['width']}", names[name], f"{seconds:.2f}", ratio, span]
            body.append([*own, f"{len(row['seconds'])}"])
    machine = found["machine"]
    packages = ", ".join(f"{p} {machine['packages'][p]}" for p in ("torch", "numpy"))
    header = ["perceptron on digits", "", "CPU s", "ours is faster", "objective", "turns"]
    return (
        f"{rows(header, body)}\n\n"
        f"{found['settings']['threads']} thread; CPU seconds of the process, median of the turns; "
        f"objective: lowest–highest. Measured on {machine['date']}: {machine['cpu']['name']} "
        f"({machine['os']}), Python {machine['python']}, {packages}; load average "
        f"{machine['load_average']} before, so other programs ran beside."
    )


def rebasin(found: dict[str, Any]) -> str:
    """Seconds and memory to align two networks, ours and theirs; then whether it worked."""
    settings, speed, truth, failures = found["settings"], [], [], []
    both = ("companion", "rebasin")
    for case in found["cases"]:
        seconds = {c["name"]: statistics.median(c["seconds"]) for c in case["contenders"]}
        parts = [statistics.median(case["parts"][p]) for p in ("derivation", "matching")]
        ratio, memory, at = case["ratios"].get("rebasin"), case["memory"], case["found"]
        name = f"{case['net']}, {case['planted']}"
        speed.append(
            [
                name,
                f"{seconds['companion']:.2f}",
                *(f"{s:.2f}" for s in parts),
                f"{seconds['rebasin']:.2f}" if "rebasin" in seconds else "–",
                times(ratio) if ratio else "–",
                *(f"{memory[n]:.1f}×" if memory.get(n) else "–" for n in both),
            ]
        )
        truth.append(
            [
                name,
                f"{case['permutations_planted']}",
                f"{case['distance_before']:.2f}",
                f"{case['distance_of_noise']:.2f}",
                *(f"{at[n]['distance']:.2f}" if n in at else "–" for n in both),
                *(f"{at[n]['permutations']}" if n in at else "–" for n in both),
                *(f"{at[n]['output_difference']:.0e}" if n in at else "–" for n in both),
            ]
        )
        failures += [f"{case['net']}: {n} says {why}" for n, why in case["failed"].items()]
    peer = f"rebasin {settings['peer']}" if settings["peer"] else "no peer was there"
    header = ["", "ours, s", "of it derivation", "matching", "rebasin, s", "ours is faster"]
    header += ["our memory", "rebasin's"]
    distances = ["", "planted", "distance of A and B", "of the noise", "left by ours", "by rebasin"]
    distances += ["permutations of ours", "of rebasin", "outputs change, ours", "rebasin"]
    return "\n\n".join(
        [
            rows(header, speed),
            rows(distances, truth),
            f"{peer}; {settings['threads']} thread(s) for each; one image of {settings['pixels']}x"
            f"{settings['pixels']}. Memory: the peak of a fresh process as a multiple of the two "
            "networks. Outputs: largest change, as a share of the largest output.",
            *failures,
            where(found, settings["repeats"]),
        ]
    )


def layers(found: dict[str, Any]) -> str:
    """Seconds for the barriers of all single layers, ours and theirs, case by case."""
    body = []
    for case in found["cases"]:
        seconds = [case["points"] / c["per_second"] for c in case["contenders"]]
        images = " + ".join(f"{n:,}" for n in case["images"].values())
        body.append(
            [
                f"`{case['net']}` on {case['data']} ({images} images)",
                str(case["layers"]),
                *(f"{s:.2f}" for s in seconds),
                *(times(case["ratios"][name]) for name in case["half"]),
                times(case["half"]["fresh model, DataLoader"]),
                f"{case['largest_difference']:.0e}",
            ]
        )
    header = ["", "layers", "ours, s", "½ alone, s", "DataLoader, s", "slices, s"]
    header += ["against DataLoader", "against slices", "½ alone against DataLoader"]
    header += ["largest difference"]
    settings = found["settings"]
    threads = settings["threads"]
    return "\n\n".join(
        [
            rows(header, body),
            "Every layer, both networks as the default, three points each, and the whole network; "
            f"loss and error on train and test. {threads} thread{'s' * (threads > 1)}, "
            f"{settings['batch']} images a batch for the opponents. Differences above 1 are "
            "relative. ½ alone gives the same barriers: Definition 2 needs no other point.",
            where(found, settings["repeats"]),
        ]
    )


def features(found: dict[str, Any]) -> str:
    """Seconds for the features of a pair, streamed and stored; then the memory of a large one."""
    body = []
    for case in found["cases"]:
        seconds = [statistics.median(c["seconds"]) for c in case["contenders"]]
        body.append(
            [
                f"`{case['net']}` on {case['data']} ({case['images']:,} images)",
                *(f"{s:.2f}" for s in seconds),
                *(times(r) for r in case["ratios"].values()),
                f"{case['largest_difference']:.0e}",
            ]
        )
    header = ["", "ours, s", "stored, s", "stored for each alpha, s", "stored, float32, s"]
    header += ["against stored", "against each alpha", "against float32", "largest difference"]
    memory = [
        [
            f"`{case['net']}` on {case['data']} ({case['images']:,} images)",
            f"{case['networks']}",
            f"{case['layers']}",
            f"{case['peak_bytes'] / 1e9:.2f} GB",
            f"{case['numbers_per_image']:,}",
            f"{case['stored_bytes'] / 1e9:.1f} GB",
            f"{case['seconds']:,.0f}",
        ]
        for case in found["memory"]
    ]
    columns = ["", "networks", "layers", "our peak", "numbers an image", "stored", "ours, s"]
    settings = found["settings"]
    threads = settings["threads"]
    parts = [rows(header, body)] if body else []
    parts += [rows(columns, memory)] if memory else []
    return "\n\n".join(
        [
            *parts,
            f"{len(settings['alphas'])} networks between A and B. {threads} thread"
            f"{'s' * (threads > 1)}, {settings['batch']} images a batch for all in the first "
            "table. Differences are those of the float64 opponents; above 1 they are relative.",
            where(found, settings["repeats"]),
        ]
    )


def engine(results: Sequence[dict[str, Any]]) -> str:
    """Every card's table: steps a second of each engine, and what a run of the recipe costs."""
    if not results:
        return (
            "**Not yet measured on a GPU.** There is no `benchmarks/results/engine-*.json`, so "
            "this section has no GPU number: what follows is reasoned, and checked on a CPU as far "
            "as a CPU can. `python3 benchmarks/on_gpu.py` measures it."
        )
    return "\n\n".join(one_card(found) for found in results)


def against(seconds: float, target: float | None) -> str:
    """Whether a target was met; nothing where there is none."""
    if target is None:
        return ""
    return f", target {target:g} s {'met' if seconds <= target else 'missed'}"


def one_card(found: dict[str, Any]) -> str:
    """One card: choice, table, checks, and where it was measured."""
    body, failed = [], []
    order = {net: number for number, net in enumerate(found["floor"])}
    good = [row for row in found["rows"] if "error" not in row and "seconds_per_copy" in row]
    for row in sorted(good, key=lambda r: (order.get(r["net"], 99), r["seconds_per_copy"])):
        name = row["engine"]
        name += "" if row.get("deterministic", True) else ", not deterministic"
        rate, floor = row.get("steps_per_second_each"), row.get("times_the_floor")
        body.append(
            [
                row["net"],
                name,
                f"{row['replicas']}",
                f"{rate:,.0f}" if rate else "–",
                f"{row['seconds_per_copy']:,.2f}",
                f"{floor:,.1f}×" if floor else "–",
                f"{row['gigabytes']:.1f}" if "gigabytes" in row else "–",
                f"{row['ready_s']:.1f}" if "ready_s" in row else "–",
            ]
        )
    for row in found["rows"]:
        if "error" in row:
            what = row["error"].splitlines()[0][:160]
            failed.append(f"- {row['net']}, `{row['engine']}`, M = {row['replicas']}: {what}")
    chosen = [
        f"{net}: `{best['engine']}` with M = {best['replicas']}, {best['seconds_per_copy']:.2f} s "
        "a copy" + against(best["seconds_per_copy"], best["target_s"])
        for net, best in found["choice"].items()
    ]
    checks = []
    for name, check in found["checks"].items():
        said = check.get("error") or ", ".join(
            f"{what.replace('_', ' ')} " + ("not finite" if gap is None else f"{gap:.0e}")
            for what, gap in check.items()
        )
        checks.append(f"- {name}: {said}")
    header = ["network", "engine", "M", "steps / s each", "s a copy", "× floor", "GB", "ready, s"]
    left = [f"{net} `{name}` M = {m}" for net, name, m in found["left_out"]]
    versions = found["machine"]["packages"]
    parts = [
        f"**{found['device']}.** Fastest: {'; '.join(chosen)}." if chosen else "",
        rows(header, body),
        "Largest differences of weights, of the same training done twice over:\n\n"
        + "\n".join(checks)
        if checks
        else "",
        "Failed:\n\n" + "\n".join(failed) if failed else "",
        f"Left out for lack of time: {', '.join(left)}." if left else "",
        f"Measured on {found['machine']['date']} by `engine.py`: {found['device']}, Python "
        f"{found['machine']['python']}, torch {versions['torch']}. A copy is the whole recipe, "
        "shared among the M that train at once; the floor is below.",
    ]
    return "\n\n".join(part for part in parts if part)


# ---- recorded files


def literal(value: Any) -> str:
    """A parameter's value as ``-p`` reads it back: bare text where YAML leaves it as it is."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def command(document: dict[str, Any]) -> str:
    """The command that made a record, from what the record says of itself."""
    words = ["companion", "record", document["chapter"], "--profile", document["profile"]]
    for name, value in document["overrides"].items():
        words += ["-p", f"{name}={literal(value)}"]
    return shlex.join([*words, "--name", document["name"]])


def recorded(documents: Sequence[dict[str, Any]]) -> str:
    """One row a file: the command that makes it, what it is, how long it took and where."""
    body = []
    for one in documents:
        minutes, pieces = one["seconds"] / 60, one["pieces"]
        took = f"{one['seconds']:.0f} s" if minutes < 1.5 else f"{minutes:.1f} minutes"
        took += f" in {pieces} pieces" if pieces > 1 else ""
        # A pipe would end the cell.
        line = command(one).replace("|", "\\|")
        what = f"{one['scale']}; {one['date']}".replace("|", "\\|")
        file = f"{one['chapter']}/{one['name']}.json"
        body.append([f"`{file}`", f"`{line}`", what, f"{took}, {one['hardware']}"])
    table = "\n".join(
        f"| {' | '.join(line)} |"
        for line in [["file", "command", "what", "measured"], ["---"] * 4, *body]
    )
    gpus = sorted({one["hardware"] for one in documents if not one["hardware"].startswith("CPU")})
    last = f"From a GPU: {', '.join(gpus)}." if gpus else "**None is from a GPU yet.**"
    return f"{table}\n\n{last}"


def scaling(found: dict[str, Any]) -> str:
    """Of each number of jobs: microseconds a job, milliseconds in all, the largest folder."""
    each = {
        "writing the plan": "plan",
        "finding a plan that has the same jobs": "attach",
        "a worker takes a job, and notes it": "work",
        "seeing that it is done": "see",
        "an entry of the run store, written (mean of 1,000 at most)": "store",
        "… asked for by its key": "missing",
        "… listed": "list",
    }
    cases = found["cases"]
    header = ["made-up jobs", *(f"{case['jobs']:,}" for case in cases)]
    body = [
        [f"{name}, µs a job", *(f"{1e6 * case[key] / case['jobs']:,.0f}" for case in cases)]
        for name, key in each.items()
    ]
    once = {"looking again when nothing is new": "see again", "finding an entry": "find"}
    body += [[f"{n}, ms", *(f"{1e3 * case[k]:,.1f}" for case in cases)] for n, k in once.items()]
    largest = {"queue": "files of a plan", "run store": "files of the store"}
    body += [
        [f"entries of the largest folder of the {n}", *(f"{case[k]:,}" for case in cases)]
        for n, k in largest.items()
    ]
    machine = found["machine"]
    return (
        f"{rows(header, body)}\n\n"
        f"Time of one core, one worker, on a local disk. Measured on {machine['date']}: "
        f"{machine['cpu']['name']} ({machine['os']}), Python {machine['python']}; "
        "other programs ran beside."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "pool": pool,
    "barrier": barrier,
    "matching": matching,
    "rebasin": rebasin,
    "layers": layers,
    "features": features,
    "scaling": scaling,
}


def families(found: dict[str, Any]) -> str:
    """Of each family: permutations, ways to order the units, what is held, seconds."""
    body = []
    for name, row in found["rows"].items():
        held = "; ".join(f"{n} axes: {why}" for why, n in row.get("held", {}).items())
        if "why" in row:
            body.append([name, "no", "", "", row["why"], f"{row['seconds']:.1f}"])
            continue
        counts = [
            f"{row['groups']} ({row['inner']})",
            f"10^{row['log10']}",
            f"{row['tolerance']:.0e}",
        ]
        body.append([name, *counts, held or "nothing", f"{row['seconds']:.1f}"])
    header = [
        "network",
        "groups (inside others)",
        "orders",
        "proven to",
        "held in place",
        "seconds",
    ]
    table = [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body]]
    machine = found["machine"]
    packages = ", ".join(f"{p} {v}" for p, v in machine["packages"].items() if p in PACKAGES)
    return "\n".join([*table, "", f"Derived on {machine['date']} with {packages}."])


PACKAGES = ("torch", "torchvision", "transformers", "timm")


def between(text: str, name: str, body: str, where: str) -> str:
    """The text with what stands between a table's markers replaced."""
    pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{where}: the markers of {name} are missing or doubled")
    return text


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def render(text: str, results: Path) -> str:
    """The README with everything between its markers made anew."""
    for name, table in TABLES.items():
        text = between(text, name, table(load(results / f"{name}.json")), "README.md")
    cards = [load(path) for path in sorted(results.glob("engine-*.json"))]
    return between(text, "engine", engine(cards), "README.md")


def render_families(text: str, results: Path) -> str:
    """The page of the families, its table made anew."""
    return between(text, "families", families(load(results / "families.json")), "families.md")


def render_recorded(text: str, folder: Path) -> str:
    """The records' README, its table made anew from the files beside it."""
    documents = [load(path) for path in sorted(folder.glob("*/*.json"))]
    return between(text, "recorded", recorded(documents), "data/recorded/README.md")


def main(arguments: list[str] | None = None) -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="the records' folder")
    parser.add_argument("--families", type=Path, default=HERE.parent / "families.md")
    options = parser.parse_args(arguments)
    made = {
        options.readme: (render, options.results, "benchmarks/README.md"),
        options.recorded / "README.md": (
            render_recorded,
            options.recorded,
            "data/recorded/README.md",
        ),
        options.families: (render_families, HERE / "results", "families.md"),
    }
    for path, (make, folder, name) in made.items():
        old = path.read_text(encoding="utf-8")
        new = make(old, folder)
        if options.check and new != old:
            sys.exit(f"{name} is not what its results say: run benchmarks/report.py")
        if new != old:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
