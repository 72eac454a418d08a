"""The raw figures of several.sh: one JSON object a line.  What each has is told at the top of several.sh.

    several.py add RAW KEY=VALUE...                objects from standard input, with these keys as well
    several.py operations RAW FOLDER KEY=VALUE...  what real_size.sh left in FOLDER (LOGS): operations, weights, rounds
    several.py shapes RAW LIMIT                    whose plain operations are still to be measured, for bench_several
    several.py ratios RAW                          sets rows beside plain operations and the wire; chooses from the sweeps
    several.py table RAW                           the table, for people
    several.py check RAW                           which expected rows are missing, by what the first row says was run

Needs nothing but Python 3.7."""
import glob
import json
import math
import os
import re
import sys

WIRE_GBPS = 370  # what NVLink gives one GPU of this generation
EXPECTED = 0.90  # of a plain operation's bandwidth
FASTER = 1.02  # than what agents use, or that stays chosen
GROUPING = ("group_ops", "group_bytes", "op_bytes", "in_flight", "chunk_bytes", "streams", "batched")


def read(raw):
    with open(raw) as f:
        return [json.loads(line) for line in f]


def write(raw, rows, mode="a"):
    with open(raw, mode) as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def load(path):
    with open(path) as f:
        return json.load(f)


# ---- what was run ----

def works(folder):
    """Of each operation and round: bytes of the one that got most, and the longest seconds of all agents."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "agent-*.log"))):
        for line in open(path, errors="replace"):
            m = re.search(r"event=work work=(WEIGHTS|FILL|GROUP) op=(\d+) round=(\d+) us=(\d+) bytes=(\d+)", line)
            if not m:
                continue
            key = (int(m[2]), m[1], int(m[3]))
            bytes_, seconds, total = found.get(key, (0, 0, 0))
            found[key] = (max(bytes_, int(m[5])), max(seconds, int(m[4]) / 1e6), total + int(m[5]))
    return found


def operations(raw, folder, keys):
    rows, moved, last = [], works(folder), 0
    for path in sorted(glob.glob(os.path.join(folder, "step-*.json")), key=lambda p: int(re.search(r"(\d+)\.json", p)[1])):
        step, op = load(path), load(path.replace("step-", "op-"))
        if op["op"] == last:  # there was nothing to do: what eepctl shows is the operation before
            op = {"op": 0, "kind": "rebalance", "outcome": "done", "bytes_done": 0, "hold_ns_max": 0, "phases": []}
        last = op["op"] or last
        plan = path.replace("step-", "plan-")
        bounds = load(plan).get("summary", {}) if os.path.exists(plan) else {}
        verify = path.replace("step-", "verify-")
        phases = {p["phase"]: p["ns"] / 1e9 for p in op["phases"]}
        expert, dense = bounds.get("expert_bytes", 0), bounds.get("dense_bytes", 0)  # dense: to each joiner
        joiners = max(0, step.get("to", 0) - step["from"])
        row = dict(keys, name="operation", index=step["index"], kind=op["kind"], ranks_from=step["from"], ranks=step["to"],
                   leave=step.get("leave", ""), limit_mib_s=step.get("limit_mib_s"), outcome=op["outcome"],
                   seconds=step["took_ms"] / 1e3, bytes=op["bytes_done"], pause_seconds=op["hold_ns_max"] / 1e9,
                   commit_seconds=sum(phases.get(p, 0) for p in ("PROMISE", "DECIDE", "GO")), phases=phases,
                   peak_mib=[int(m) for m in step["peak_mib"].split()])
        if bounds:
            row.update(bytes_needed=bounds["bound_fill"] * expert + joiners * dense, bytes_hard=bounds["bound_hard"] * expert,
                       expert_bytes=expert, dense_bytes=dense)
            row.update({k: v for k, v in bounds.items() if k.startswith("balance")})
        if os.path.exists(verify):
            row.update(verified_slots=load(verify)["slots"], bad_slots=load(verify)["bad"], verify_seconds=step["verify_ms"] / 1e3)
        rows.append(row)
        for (number, work, round_), (bytes_, seconds, total) in sorted(moved.items()):
            if number != op["op"] or (work != "GROUP" and bytes_ == 0):
                continue
            up = step["to"] > step["from"]
            rows.append(dict(keys, name=work.lower(), index=step["index"], round=round_, kind=op["kind"],
                             ranks=max(step["from"], step["to"]), senders=step["from"] if up else step["from"] - step["to"],
                             bytes=bytes_, bytes_all=total, seconds=seconds, expert_bytes=expert,
                             dense_bytes=dense if work == "WEIGHTS" and up else 0))
            if bytes_:
                rows[-1]["gbps"] = bytes_ / 1e9 / seconds
    write(raw, rows)


def moves(rows):
    """Rows of real rounds that plain operations stand beside."""
    return [r for r in rows if r["name"] in ("weights", "fill") and r["senders"] > 0 and r["expert_bytes"]]


def slots(row):
    return max(1, round((row["bytes"] - row["dense_bytes"]) / row["expert_bytes"]))


def shapes(raw, limit):
    rows, wanted = read(raw), {}
    for r in moves(rows):
        n, dense = slots(r), max([m["dense_bytes"] for m in moves(rows) if m["part"] == r["part"]])
        shape = (r["ranks"], r["senders"], r["expert_bytes"] // 24 * 24, dense, len(str(n)), int(str(n)[0]))
        wanted[shape] = max(n, wanted.get(shape, 0))
    most = sorted(wanted.items(), key=lambda w: -w[1] * w[0][2])[:limit]
    for (ranks, senders, slot, dense, _, _), n in most:
        print(ranks, senders, n, slot, dense or 1 << 20)


# ---- beside what is plain ----

def nearest(rows, name, transport, row, bytes_):
    """The plain measurement of this shape whose bytes are nearest."""
    same = [r for r in rows if r["name"] == name and r["transport"] == transport and r["part"] == "plain" and
            (r["ranks"], r["senders"]) == (row["ranks"], row["senders"])]
    return min(same, key=lambda r: abs(math.log(r["bytes"] / bytes_)), default=None)


def plain_seconds(rows, transport, row):
    """How long the plain operations need for a row's bytes."""
    seconds, dense = 0, row["dense_bytes"]
    for name, bytes_ in (("plain.dense", dense), ("plain.round", row["bytes"] - dense)):
        beside = nearest(rows, name, transport, row, bytes_) if bytes_ > 0 else None
        if bytes_ > 0 and not beside:
            return None
        seconds += bytes_ / 1e9 / beside["plain_gbps"] if beside else 0
    return seconds


def ratios(raw):
    rows = read(raw)
    for r in moves(rows):
        for transport, key in (("nccl", "ratio_group"), ("cuda_peer", "ratio_copies")):
            seconds = plain_seconds(rows, transport, r)
            if seconds:
                r[key] = seconds / r["seconds"]
    for r in rows:
        if r["name"].startswith(("plain.", "sweep.")):
            r["ratio_copies" if r["transport"] == "cuda_peer" else "ratio_group"] = r["ratio_plain"]
            other = [o for o in rows if o["name"] == r["name"] and o["part"] == r["part"] == "plain" and o["transport"] == "nccl" and
                     (o["ranks"], o["senders"], o["bytes"]) == (r["ranks"], r["senders"], r["bytes"])]
            if r["transport"] == "cuda_peer" and other:
                r["ratio_group"] = r["gbps"] / other[0]["plain_gbps"]
        if "gbps" in r:
            r["ratio_wire"] = r["gbps"] / WIRE_GBPS
    rows = [r for r in rows if r["name"] != "chosen"]
    write(raw, rows + list(chosen(rows)), "w")


def chosen(rows):
    """The best of each sweep, beside what agents use."""
    for name in ("sweep.round", "sweep.dense"):
        for transport in ("cuda_peer", "nccl"):
            swept = [r for r in rows if r["name"] == name and r["transport"] == transport]
            if swept:
                best, shipped = max(swept, key=lambda r: r["gbps"]), next(r for r in swept if r["default"])
                if best["gbps"] < FASTER * shipped["gbps"]:
                    best = shipped
                yield dict({k: best[k] for k in GROUPING if k in best}, name="chosen", of=name, transport=transport,
                           default=best["default"], gbps=best["gbps"], ratio_plain=best["ratio_plain"],
                           default_gbps=shipped["gbps"], default_ratio_plain=shipped["ratio_plain"],
                           ratio_default=best["gbps"] / shipped["gbps"], ratio_wire=best["gbps"] / WIRE_GBPS)
    by_channels = [r for r in rows if r.get("part") == "channels" and r["name"] == "plain.round" and r["transport"] == "nccl"]
    own = next((r for r in by_channels if r["channels"] is None), None)
    if own and len(by_channels) > 1:
        best = max((r for r in by_channels if r != own), key=lambda r: r["gbps"])
        yield dict(name="chosen", of="channels", transport="nccl", channels=best["channels"],
                   default=best["gbps"] < FASTER * own["gbps"], gbps=best["gbps"], ratio_plain=best["ratio_plain"],
                   default_gbps=own["gbps"], default_ratio_plain=own["ratio_plain"], ratio_default=best["gbps"] / own["gbps"],
                   ratio_wire=best["gbps"] / WIRE_GBPS)


# ---- for people ----

def cell(x):
    if x is None or x == "":
        return "-"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, list):
        return str(max(x)) if x else "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def ms(row, key):
    return row[key] * 1e3 if row.get(key) is not None else None


def percent(row, key):
    return f"{100 * row[key]:.1f}" if row.get(key) is not None else None


def gb(row, key):
    return row[key] / 1e9 if row.get(key) is not None else None


def section(title, head, lines):
    if not lines:
        return
    lines = [head] + [[cell(x) for x in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print(f"\n## {title}")
    for line in lines:
        print("  ".join(f"{x:<{w}}" if i == 0 else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths))).rstrip())


def step_name(r):
    return f"{r['part']} {r['index']}: " + (r["kind"] if r.get("limit_mib_s") is not None else f"{r['ranks_from']} -> {r['ranks']}")


def grouping(r):
    return ", ".join(f"{k} {r[k] if not k.endswith('bytes') else str(r[k] >> 20) + 'Mi'}" for k in GROUPING if k in r)


def table(raw):
    rows = read(raw)

    def of(*names):
        return [r for r in rows if r["name"] in names]

    section("operations; GB moved (needed: the bounds); balance before, after, at best; peak: MiB of the fullest GPU",
            "operation transport ms GB needed hard balance after best peak pause_ms commit_ms slots bad".split(),
            [[step_name(r), r["transport"], ms(r, "seconds"), gb(r, "bytes"), gb(r, "bytes_needed"), gb(r, "bytes_hard"),
              r.get("balance_before"), r.get("balance_after"), r.get("balance_ceiling"), r["peak_mib"], ms(r, "pause_seconds"),
              ms(r, "commit_seconds"), r.get("verified_slots"), r.get("bad_slots")] for r in of("operation")])
    section(f"weights and rounds of these operations, GB/s into the rank that gets most; % of plain operations of the same bytes "
            f"in this run, and of {WIRE_GBPS} GB/s", "work transport senders ranks GB ms GB/s %group %copies %wire".split(),
            [[f"{r['part']} {r['index']}: {r['name']} {r['round']}", r["transport"], r["senders"], r["ranks"], gb(r, "bytes"),
              ms(r, "seconds"), r["gbps"], percent(r, "ratio_group"), percent(r, "ratio_copies"), percent(r, "ratio_wire")]
             for r in of("weights", "fill")])
    section(f"the transports alone; plain: group of ncclSend and ncclRecv, ncclBroadcast, or copies; at least {EXPECTED:.0%} are "
            "expected", "what transport channels senders ranks GB GB/s plain_GB/s %group %copies %wire".split(),
            [[r["name"][6:], r["transport"], r["channels"], r["senders"], r["ranks"], gb(r, "bytes"), r["gbps"], r["plain_gbps"],
              percent(r, "ratio_group"), percent(r, "ratio_copies"), percent(r, "ratio_wire")] for r in of("plain.round", "plain.dense")])
    section("groupings", "what transport grouping GB/s %plain %wire".split(),
            [[r["name"][6:], r["transport"], grouping(r) + (" (as agents)" if r["default"] else ""), r["gbps"],
              percent(r, "ratio_plain"), percent(r, "ratio_wire")] for r in of("sweep.round", "sweep.dense")])
    section("chosen: the best of each sweep; as they are: nothing is 2 % faster than what agents use", "sweep transport chosen GB/s as_agents %of_them %plain %wire".split(),
            [[r["of"], r["transport"], ("as they are: " if r["default"] else "") + (f"{r['channels']} channels" if "channels" in r else grouping(r)), r["gbps"], r["default_gbps"],
              percent(r, "ratio_default"), percent(r, "ratio_plain"), percent(r, "ratio_wire")] for r in of("chosen")])
    section("communicators, ms", "transport ranks made+warm made warm exchange again left closed".split(),
            [[r["transport"], r["ranks"], ms(r, "made_and_warmed_seconds"), ms(r, "made_seconds"), ms(r, "warmed_seconds"),
              ms(r, "exchanged_seconds"), ms(r, "again_seconds"), ms(r, "left_seconds" if "left_seconds" in r else "ended_seconds"),
              ms(r, "closed_seconds")] for r in of("comm")])
    section("steps of matrix products", "beside by gpu steps median_ms p99_ms GB".split(),
            [[r["beside"], r["by"], r["gpu"], r["steps"], r["median_ms"], r["p99_ms"], r["gb"]] for r in of("steps")])
    below = [r for r in of("plain.round", "plain.dense") if r["ratio_plain"] < EXPECTED]
    print(f"\n{len(below)} of {len(of('plain.round', 'plain.dense'))} measurements below {EXPECTED:.0%} of their plain operation")


# ---- what must be there ----

def expected(run):
    """(what, how many at least, a test of a row): by the parts that were run."""
    parts = run["parts"].split()
    both = ("cuda_peer", "nccl")

    def row(name, keys=(), **same):
        return lambda r: r["name"] == name and all(r.get(k) == v for k, v in same.items()) and \
            all(r.get(k) not in (None, [], "") for k in keys)
    for part in ("scale", "shared", "deepseek"):
        steps = [int(s.split(":")[0]) for s in run.get(f"steps_{part}", "").split()]
        for by in run.get(f"by_{part}", "").split() if part in parts else ():
            for i, n in enumerate(steps):
                yield f"{part}, step {i} to {n} ranks by {by}", 1, row(
                    "operation", ("seconds", "bytes", "pause_seconds", "commit_seconds", "verified_slots", "peak_mib"),
                    part=part, transport=by, index=i, ranks=n, outcome="done", bad_slots=0)
                if i > 0:
                    yield f"{part}, bounds and balance of step {i} by {by}", 1, row(
                        "operation", ("bytes_needed", "bytes_hard", "balance_after"), part=part, transport=by, index=i)
                    yield f"{part}, group of step {i} by {by}", 1, row("group", ("seconds",), part=part, transport=by, index=i)
                if i > 0 and n > steps[i - 1]:
                    beside = ("ratio_group", "ratio_copies") if "plain" in parts else ()
                    for work in ("weights", "fill"):
                        yield f"{part}, {work} of step {i} by {by}{', beside plain operations' if beside else ''}", 1, row(
                            work, ("gbps", "ratio_wire") + beside, part=part, transport=by, index=i)
    for by in both:
        for what in ("round", "dense"):
            ratio = ("gbps", "plain_gbps", "ratio_plain", "ratio_wire")
            if "plain" in parts:
                yield f"plain {what} beside {by}", 1, row(f"plain.{what}", ratio + ("ratio_group", "ratio_copies"), part="plain", transport=by)
            if "sweep" in parts:
                yield f"sweep of groupings of {what} by {by}", 5, row(f"sweep.{what}", ratio, transport=by, default=False)
                yield f"grouping of {what} by {by} as agents have it", 1, row(f"sweep.{what}", ratio, transport=by, default=True)
                yield f"grouping of {what} by {by} that is chosen", 1, row("chosen", ("gbps", "default_gbps"), of=f"sweep.{what}", transport=by)
    if "sweep" in parts:
        yield "as many channels as NCCL takes itself", 1, row("plain.round", ("gbps", "ratio_plain"), part="channels", transport="nccl", channels=None)
    for n in run["channels"].split() if "sweep" in parts else ():
        yield f"{n} channels", 1, row("plain.round", ("gbps", "ratio_plain"), part="channels", transport="nccl", channels=int(n))
    if "sweep" in parts:
        yield "channels that are chosen", 1, row("chosen", ("channels", "gbps", "default_gbps"), of="channels")
    for n in run["comm"].split() if "comm" in parts else ():
        for by in both:
            yield f"communicator of {n} ranks by {by}", 1, row(
                "comm", ("made_and_warmed_seconds", "again_seconds", "left_seconds", "closed_seconds"), transport=by, ranks=int(n))
        yield f"plain communicator of {n} ranks", 1, row(
            "comm", ("made_seconds", "warmed_seconds", "ended_seconds"), transport="plain nccl", ranks=int(n))
    for by in run["beside"].split() if "beside" in parts else ():
        for gpu in range(run["gpus"]):
            yield f"steps of GPU {gpu} alone ({by})", 1, row("steps", ("median_ms", "p99_ms"), beside="alone", by=by, gpu=gpu)
        yield f"steps beside {by}", 1, lambda r, by=by: r["name"] == "steps" and r["by"] == by and r["beside"] != "alone" and r["steps"] > 0
        if by == "throttle":
            yield "rebalances with a throttle, and without", 2, row("operation", ("limit_mib_s", "seconds", "bytes"), part="beside", by=by)


def check(raw):
    rows = read(raw)
    run = next(r for r in rows if r["name"] == "run")
    wanted = list(expected(run))
    missing = [f"{what}: {have} of {least}" for what, least, fits in wanted
               for have in [sum(1 for r in rows if fits(r))] if have < least]
    for text in missing:
        print(f"missing: {text}")
    print(f"{len(wanted) - len(missing)} of {len(wanted)} expected rows are there" + ("" if missing else ": passed"))
    return 1 if missing else 0


def main(command, raw, *more):
    keys = {k: value(v) for k, _, v in (word.partition("=") for word in more if "=" in word)}
    if command == "add":
        write(raw, [dict(json.loads(line), **keys) for line in sys.stdin if line.startswith("{")])
    elif command == "operations":
        operations(raw, more[0], keys)
    elif command == "shapes":
        shapes(raw, int(more[0]))
    elif command in ("ratios", "table", "check"):
        return {"ratios": ratios, "table": table, "check": check}[command](raw) or 0
    else:
        sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
