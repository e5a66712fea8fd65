"""A report in sentences, for the terminal and for the page alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmformer.bench.profile import Profile
    from dmformer.bench.report import BenchReport, Change, Result
    from dmformer.bench.statistics import Ratio

_MODES = {"compute": "the network alone", "end-to-end": "from image file to classes", "throughput": "throughput"}


def digits(value: float | None) -> str:
    """Return a figure with three significant digits; a dash where it is not known."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Return a time in seconds up to two minutes, then in minutes."""
    return f"{digits(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def summary(report: BenchReport) -> list[str]:
    """Return what a reader wants to know beside the table."""
    gpu = [_gpu(row) for row in report.results if row.device_latency_ms is not None]
    profiles = [where_time_goes(row, row.profile) for row in report.results if row.profile is not None]
    machine = report.environment
    quota = machine.get("cpu_quota_cores")
    held = "" if quota is None else f", a CPU quota of {digits(quota)} cores"
    return [
        *verdicts(report),
        *(line for line in (noise(report), limits(report)) if line is not None),
        *gpu,
        *profiles,
        *comparison(report),
        f"{machine['cpu']}, {machine['cores']} cores{held}, {machine['os']}",
    ]


def remarks(report: BenchReport) -> list[str]:
    """Return what was not measured, or not as it should be."""
    rows = [f"{row.title}: {reason}" for row in report.results for reason in (row.reason, row.profile_reason) if reason]
    beyond = [
        f"{row.title}: more than the limit; the machine was disturbed while its limits were measured"
        for row in report.results
        if row.share_of_limit is not None and row.share_of_limit > 1
    ]
    return [*(f"not timed: {reason}" for reason in report.skipped), *report.notes, *rows, *beyond]


def verdicts(report: BenchReport) -> list[str]:
    """For each batch, mode and number of streams: the quickest row, by how much, and how far it is from the limit."""
    quickest: dict[int, list[str]] = {}
    for standing in report.standings:
        row = report.results[standing.row]
        quickest.setdefault(standing.quickest, []).append(f"{row.runtime} {row.precision} {_against(standing)}")
    standing_rows = {place for standing in report.standings for place in (standing.row, standing.quickest)}
    alone = [place for place, row in enumerate(report.results) if row.timed and place not in standing_rows]
    lines = []
    for place in sorted({*quickest, *alone}):
        row = report.results[place]
        batch = "" if row.batch == 1 else f", batch {row.batch}"
        streams = f", {row.streams} streams" if row.mode == "throughput" else ""
        limit = "" if row.share_of_limit is None else f", {row.share_of_limit:.0%} of what this machine's limits admit"
        others = "; ".join(quickest.get(place, []))
        figure = f"takes {digits(row.call_ms)} ms"
        if row.mode == "throughput":
            figure = f"answers {digits(row.throughput_ips)} images/s"
        first = f"{_MODES[row.mode].capitalize()}{batch}{streams}: {row.runtime} {row.precision} {figure}{limit}"
        lines.append(f"{first}; {others}." if others else f"{first}.")
    return lines


def _against(ratio: Ratio) -> str:
    if ratio.verdict == "tie":
        return f"ties with it ({ratio.ratio:.2f})"
    sure = "" if ratio.verdict != "unknown" else ", noise unknown"
    return f"takes {ratio.ratio:.2f} times as long ({ratio.low:.2f} to {ratio.high:.2f}{sure})"


def limits(report: BenchReport) -> str | None:
    """Return what the machine attains, where that was measured."""
    machine = report.limits
    if machine is None:
        return None
    peaks = "".join(f", {peak.gops:.0f} Gop/s at {peak.precision} in {peak.runtime}" for peak in machine.peaks)
    return (
        f"this machine with {machine.threads} threads, in the same rounds: {machine.gflops:.0f} GFLOP/s in a large "
        f"sgemm, {machine.gbytes_per_s:.1f} GB/s in a large copy{peaks}"
    )


def noise(report: BenchReport) -> str | None:
    """Return how far a configuration is from itself, where that was measured."""
    if report.noise_floor is None:
        return None
    title = report.results[report.twin].title
    return f"noise floor {report.noise_floor:.1%}: {title} against itself in this run; smaller differences are ties"


def where_time_goes(row: Result, profile: Profile) -> str:
    """Return where the time of an inference goes."""
    if not profile.total_ms:
        return f"{row.title}, {profile.kernels} kernels, all below what the profiler can tell"
    stages = ", ".join(
        f"{stage} {part.ms / profile.total_ms:.0%} ({_largest(part.parts, profile.total_ms)})"
        for stage, part in sorted(profile.modules.items(), key=lambda item: -item[1].ms)
    )
    return (
        f"{row.title}, {profile.kernels} kernels, {digits(profile.total_ms)} ms in the profiler: {stages}; "
        f"operators: {_largest(profile.operators, profile.total_ms, 4)}; "
        f"lost to layout changes {profile.layout_ms / profile.total_ms:.0%}, "
        f"to elementwise work that is not fused {profile.elementwise_ms / profile.total_ms:.0%}"
    )


def _largest(times: dict[str, float], total: float, count: int = 3) -> str:
    return ", ".join(f"{name} {ms / total:.0%}" for name, ms in list(times.items())[:count])


def change(report: BenchReport, changed: Change) -> str:
    """Return one row now and before."""
    same = "the same artifact" if changed.same_artifact else "another artifact"
    verdict = {"tie": "a tie", "unknown": "noise unknown"}.get(changed.verdict, changed.verdict)
    return (
        f"{report.results[changed.row].title}: {digits(changed.now_ms)} ms, before {digits(changed.before_ms)} ms, "
        f"{changed.ratio - 1:+.1%} ({changed.low - 1:+.1%} to {changed.high - 1:+.1%}): {verdict}; {same}"
    )


def comparison(report: BenchReport) -> list[str]:
    """Return this run against an earlier one, where it was compared with one."""
    compared = report.comparison
    if compared is None:
        return []
    ratio = compared.machine_ratio
    machine = "" if ratio is None else f"; the machine's sgemm attains {ratio:.2f} times as much"
    return [
        f"against {compared.baseline}{machine}",
        *(change(report, each) for each in compared.changes),
        *(f"{title}: in the earlier run only" for title in compared.missing),
    ]


def _gpu(row: Result) -> str:
    """The time on a GPU alone, and the GPU's state after it."""
    alone = row.device_latency_ms
    assert alone is not None
    state = ", ".join(
        f"{name} {value}" for name, value in (row.gpu[-1] if row.gpu else {}).items() if value is not None
    )
    after = f"; after it: {state}" if state else ""
    return (
        f"{row.title}, on the GPU alone (events, no transfers): p50 {digits(alone.p50)} ms, "
        f"p90 {digits(alone.p90)} ms{after}"
    )
