"""Write README's performance section and draw docs/performance.png from a record.

    python -m benchmarks.report [benchmarks/records/DEVICE.json]

Needs matplotlib. No figure of the section is typed by hand.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- performance: written by benchmarks/report.py -->", "<!-- end of performance -->"


def section(record, path):
    """The README's section as Markdown."""
    passed = record["tests"]["passed"]
    lines = [
        BEGIN,
        "## Performance",
        "",
        f"Milliseconds on one {record['device']} (copy bandwidth {record['copy_terabytes_per_second']} TB/s), of calls with",
        "z, D, delta_bias and softplus, length-contiguous / channel-contiguous. Right of them the original implementation",
        "(state-spaces/mamba 2.3.2), always on one NVIDIA H100 80GB HBM3, and the limit of the card: memory, exponentials or",
        "issue, whichever is most.",
        "",
        "| u (batch, dim, length), states | forward | original | limit | backward | original |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        limit = max(row[f"forward_{name}_ms"] for name in ("memory", "exponentials", "issue"))
        lines.append(
            f"| {row['row']} | {_ms(row['forward_length_ms'])} / {_ms(row['forward_channel_ms'])} "
            f"| {_ms(row['peer_forward_ms'])} | {limit:.2g} "
            f"| {_ms(row['backward_length_ms'])} / {_ms(row['backward_channel_ms'])} | {_ms(row['peer_backward_ms'])} |"
        )
    host = ", ".join(f"{us:.0f} µs ({name})" for name, us in record["host_microseconds"].items())
    first = record["first_call_seconds"]
    lines += [
        "",
        f"A warm call costs the host {host}; the first call of all {first['compiling']:.2g} s, that of a later",
        f"process {first['from_cache']:.2g} s. Forward keeps {record['bytes_kept_an_element']:.1f} bytes an element.",
        f"{passed} GPU tests passed in the same run, whose record is [{path.name}]({path.relative_to(ROOT)}).",
        "",
        "![Times against limits, length and batch](docs/performance.png)",
        "",
        "Models and their operations, likewise:",
        "",
        "| | here | original | original / here |",
        "|---|---|---|---|",
        *(f"| {r['row']} | {_ms(r['ms'])} | {_ms(r['peer_ms'])} | {r['peer_ms'] / r['ms']:.2f} |" for r in record["models"]),
        END,
    ]
    return "\n".join(lines)


def _ms(number):
    """Three digits."""
    return f"{number:#.3g}".rstrip(".")


def replace_section(text, new):
    """README with its performance section replaced, or put before "Where things are" where there is none."""
    if BEGIN in text:
        return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]
    at = text.index("## Where things are")
    return text[:at] + new + "\n\n" + text[at:]


def draw(record, path):
    """Time per row against peer and limit; time against length and against batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rows, lengths, batches) = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", width_ratios=(2, 1, 1))
    places = range(len(record["rows"]))
    for direction, shift, color in (("forward", -0.2, "C0"), ("backward", 0.2, "C1")):
        ours = [row[f"{direction}_length_ms"] for row in record["rows"]]
        peers = [row[f"peer_{direction}_ms"] for row in record["rows"]]
        rows.barh([i + shift for i in places], ours, 0.36, color=color, label=f"{direction}")
        rows.plot(peers, [i + shift for i in places], "k|", markersize=9, label="original" if direction == "forward" else None)
    limits = [max(row[f"forward_{name}_ms"] for name in ("memory", "exponentials", "issue")) for row in record["rows"]]
    rows.plot(limits, [i - 0.2 for i in places], "w|", markersize=9)
    rows.set_yticks(places, [row["row"].replace("bfloat16", "bf16").replace("float32", "fp32") for row in record["rows"]])
    rows.invert_yaxis()
    rows.set_xscale("log")
    rows.set_xlabel("ms (white: limit of forward)")
    rows.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    for axes, name, title in ((lengths, "length", "batch 1, dim 1536"), (batches, "batch", "dim 1536, length 512")):
        points = record["sweeps"][name]
        for direction, color in (("forward", "C0"), ("backward", "C1")):
            axes.plot([int(x) for x in points], [ms[direction] for ms in points.values()], "o-", color=color, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("ms")
        axes.set_title(title, fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?", help="default: the newest of benchmarks/records")
    options = parser.parse_args()
    newest = sorted((ROOT / "benchmarks" / "records").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not options.record and not newest:
        parser.error("there is no record in benchmarks/records; `make gpu` makes one")
    path = (options.record or newest[-1]).resolve()
    record = json.loads(path.read_text())
    readme = ROOT / "README.md"
    readme.write_text(replace_section(readme.read_text(), section(record, path)))
    draw(record, ROOT / "docs" / "performance.png")
    print(f"README.md and docs/performance.png now show {path.name}")


if __name__ == "__main__":
    main()
