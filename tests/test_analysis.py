"""analysis.ipynb, run top to bottom on the results files that nights really leave behind.

Most cases run its code cells in this process and look at the tables, the printed text and the figure;
two go through Jupyter itself, as a person or a script does.
"""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Annotation

NOTEBOOK = Path(__file__).parents[1] / "analysis.ipynb"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


def row(commit, val_bpb, status="keep", description="an idea", memory_gb=44.0):
    return f"{commit}\t{val_bpb:.6f}\t{memory_gb:.1f}\t{status}\t{description}"


def lines(*rows, end="\n"):
    return end.join([HEADER, *rows]) + end


def night(experiments, seed=0, noise=0.0006):
    """A plausible results.tsv: three baseline runs, then ideas of which a few are kept and a few crash."""
    rng = random.Random(seed)
    level, best = 0.9979, 0.9972
    rows = [row("ba5e11e", level + shift, description="baseline") for shift in (-noise, 0, noise)]
    for i in range(1, experiments):
        idea = rng.choice(
            [
                "depth 9, width 640",
                "RoPE base 200k",
                "Muon lr 0.05",
                "no soft cap",
                "short window T/8 in all layers",
                "a far longer story about value embeddings",
            ]
        )
        if rng.random() < 0.06:
            rows.append(row(f"{i:07x}", 0, "crash", idea, 0))
            continue
        effect = rng.choice([0, 1, 2, 4, 6, -1, -3]) * noise if rng.random() < 0.97 else 1.5
        score = level + effect + rng.gauss(0, noise)
        if score < best - noise:
            level, best = level + effect, score
        rows.append(row(f"{i:07x}", score, "keep" if score == best else "discard", idea))
    return lines(*rows[: 1 if experiments == 1 else None])


@pytest.fixture
def analyse(tmp_path, monkeypatch, capsys):
    """analyse(text) or analyse({name: text}) runs all cells on these files: (variables, printed text)."""

    def run(files):
        for name, text in ({"results.tsv": files} if isinstance(files, str) else files).items():
            (tmp_path / name).write_bytes(text.encode())
        monkeypatch.chdir(tmp_path)
        variables = {}
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), variables)
        return variables, capsys.readouterr().out

    yield run
    plt.close("all")


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


def annotations(figure):
    return [child for ax in figure.axes for child in ax.get_children() if isinstance(child, Annotation)]


def test_committed_notebook_is_clean():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) <= 15


# ---------------------------------------------------------------------------
# Files that are missing, empty or damaged
# ---------------------------------------------------------------------------


def test_no_file_says_what_to_do(analyse, tmp_path):
    _, printed = analyse({})
    assert f"No results*.tsv in {tmp_path}" in printed
    assert "program.md" in printed and "run all cells again" in printed
    assert "nothing to draw" in printed
    assert not (tmp_path / "progress.png").exists()


def test_header_only(analyse, tmp_path):
    _, printed = analyse(lines())
    assert "results.tsv: 0 runs" in printed and "malformed" not in printed
    assert "No results*.tsv" not in printed
    assert "nothing to draw" in printed and "No baseline yet" in printed
    assert not (tmp_path / "progress.png").exists()


def test_one_row(analyse, tmp_path):
    variables, printed = analyse(lines(row("ba5e11e", 0.9979, description="baseline")))
    assert "noise is unknown" in printed and "two more seeds" in printed
    assert "baseline 0.997900 (1 runs) -> best 0.997900" in printed
    assert "Nothing that was kept is better than the baseline." in printed and "No gain yet." in printed
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert [note.get_text() for note in annotations(variables["fig"])] == ["#1 baseline"]
    assert "another seed of it, ± 2 sd" not in legend(variables["fig"])


def test_no_keeps(analyse):
    variables, printed = analyse(lines(row("aaaaaaa", 0.99, "discard"), row("bbbbbbb", 0.98, "discard")))
    assert "No baseline yet: nothing was kept." in printed
    assert "no baseline yet" in variables["fig"].axes[0].get_title(loc="left")
    assert variables["outcomes"].loc["results.tsv", "keep rate"] == 0
    assert legend(variables["fig"]) == {"discarded"}


def test_nothing_but_crashes(analyse):
    variables, printed = analyse(lines(row("aaaaaaa", 0, "crash"), row("bbbbbbb", 0, "crash")))
    assert list(variables["outcomes"].loc["results.tsv", ["experiments", "keep", "crash"]]) == [2, 0, 2]
    assert legend(variables["fig"]) == {"crashed"}
    assert "No baseline yet" in printed


def test_malformed_lines_are_counted_and_shown(analyse):
    good = row("ba5e11e", 0.9979, description="baseline")
    bad = [
        "just words",
        row("aaaaaaa", 0.5, "kept"),
        row("bbbbbbb", 0.0, "keep"),
        row("", 0.97),
        "ccccccc\tnan\t44.0\tkeep\tx",
        "ddddddd\t0.9x\t44.0\tkeep\tx",
        "eeeeeee\t0.97\tmuch\tkeep\tx",
        "fffffff\tinf\t44.0\tkeep\tx",
    ]
    variables, printed = analyse(lines(good, *bad, "", good))
    assert f"{len(bad)} malformed" in printed
    for number, line in enumerate(bad, start=3):  # line 1 is the header, line 2 the good one
        assert f"results.tsv, line {number}: " in printed and repr(line) in printed
    for reason in (
        "1 of 5 fields",
        "'kept' is none of",
        "val_bpb 0.0 with status keep",
        "no commit",
        "val_bpb nan",
        "val_bpb inf",
        "val_bpb '0.9x' is no number",
        "memory_gb 'much' is no",
    ):
        assert reason in printed
    assert variables["experiments"]["runs"].tolist() == [2]


def test_torn_last_line(analyse):
    whole = lines(row("ba5e11e", 0.9979), row("aaaaaaa", 0.9900))
    for cut in ("bbbbbbb", "bbbbbbb\t0.98", "bbbbbbb\t0.980000\t44.0\tke", "bbbbbbb\t0.980000\t44.0\tkeep"):
        variables, printed = analyse(whole + cut)
        assert "1 malformed" in printed and repr(cut) in printed
        assert variables["kept"]["score"].min() == 0.99
    variables, printed = analyse(whole + row("bbbbbbb", 0.98))  # only the line's end is missing
    assert "malformed" not in printed and variables["kept"]["score"].min() == 0.98


def test_windows_line_ends_and_byte_order_mark(analyse):
    rows = row("ba5e11e", 0.9979, description="baseline"), row("aaaaaaa", 0.99, description="an idea")
    variables, printed = analyse("\ufeff" + lines(*rows, "", "torn", end="\r\n"))
    assert "1 malformed" in printed and "line 5: 1 of 5 fields: 'torn'" in printed and "2 runs" in printed
    assert variables["experiments"]["description"].tolist() == ["baseline", "an idea"]


def test_quotes_tabs_and_dollars_in_a_description(analyse):
    odd = ["\"unbalanced, and 'quoted'", "tabs\ttoo\tmany", "costs $x_$ <b>&amp;", "x" * 300]
    rows = [row(f"{i}aaaaaa", 0.99 - i / 1000, description=text) for i, text in enumerate(odd)]
    variables, printed = analyse(lines(*rows))
    assert "1 with tabs in the description" in printed and "malformed" not in printed
    assert variables["experiments"]["description"].tolist() == [odd[0], "tabs too many", odd[2], odd[3]]
    texts = [note.get_text() for note in annotations(variables["fig"])]
    assert "#3 " + odd[2] in texts
    assert max(map(len, texts)) <= 40


def test_letters_that_are_no_utf8(analyse, tmp_path):
    latin = b"aaaaaaa\t0.98\t1\tkeep\tcaf\xe9\n"
    (tmp_path / "results.tsv").write_bytes(lines(row("ba5e11e", 0.99)).encode() + latin)
    variables, _ = analyse({})
    assert variables["experiments"]["description"].tolist() == ["an idea", "caf\ufffd"]


# ---------------------------------------------------------------------------
# Baseline, best, noise
# ---------------------------------------------------------------------------


def test_crashes_never_win_and_never_are_the_baseline(analyse):
    variables, printed = analyse(
        lines(
            row("aaaaaaa", 0, "crash", "out of memory"),
            row("bbbbbbb", 0.97, "discard", "not from the branch"),
            row("ba5e11e", 0.9979, description="baseline"),
            row("ccccccc", 0, "crash"),
            row("ddddddd", 0.9900),
        )
    )
    assert "baseline 0.997900 (1 runs) -> best 0.990000 (1 runs, #5 ddddddd" in printed
    outcomes = variables["outcomes"].loc["results.tsv"]
    assert list(outcomes[["experiments", "keep", "discard", "crash"]]) == [5, 2, 1, 2]
    assert outcomes["keep rate"] == 1 / 4  # one of four ideas: the baseline is none
    title = variables["fig"].axes[0].get_title(loc="left")
    assert "baseline 0.9979 → best 0.9900 (0.79% lower), 1 of 4 ideas kept" in title


def test_a_crashed_seed_does_not_spoil_its_commit(analyse):
    variables, _ = analyse(lines(row("ba5e11e", 0, "crash"), row("ba5e11e", 0.998), row("ba5e11e", 0.996)))
    assert variables["kept"].iloc[0][["score", "runs"]].tolist() == [pytest.approx(0.997), 2]


def test_baseline_is_the_first_row_kept(analyse):
    # aaaaaaa crashed before the baseline and was kept after it.
    rows = row("aaaaaaa", 0, "crash"), row("ba5e11e", 0.998), row("aaaaaaa", 0.99)
    variables, printed = analyse(lines(*rows))
    assert variables["kept"]["commit"].tolist() == ["ba5e11e", "aaaaaaa"]
    assert "baseline 0.998000 (1 runs) -> best 0.990000" in printed


def test_repeats_are_averaged_and_give_the_noise(analyse):
    # By hand: variance 1 (2 degrees) of the baseline's 1, 2, 3 and 2 (1 degree) of bbbbbbb's 0, 2: 4/3.
    variables, printed = analyse(
        lines(
            *(row("ba5e11e", 0.990 + i / 1000, description="baseline") for i in (1, 2, 3)),
            row("aaaaaaa", 0.9915, description="small"),
            row("bbbbbbb", 0.950, description="large"),
            row("ccccccc", 0.995, "discard"),
            row("bbbbbbb", 0.952, description="large again"),
        )
    )
    assert variables["noise"]["results.tsv"] == pytest.approx((4 / 3) ** 0.5 * 1e-3)
    assert variables["outcomes"].loc["results.tsv", "from repeats"] == 3
    kept = variables["kept"].set_index("commit")
    assert len(variables["experiments"]) == 4
    assert kept["score"].tolist() == [pytest.approx(0.992), pytest.approx(0.9915), pytest.approx(0.951)]
    assert kept["gain"].tolist()[1:] == [pytest.approx(0.0005), pytest.approx(0.0405)]
    assert kept["verdict"].tolist() == ["baseline", "within noise", ""]
    assert kept["share"].tolist()[1:] == [pytest.approx(0.0005 / 0.041), pytest.approx(0.0405 / 0.041)]
    assert "2 gains, 1 of them within noise" in printed
    # The best was chosen for its first run, 0.950: only the second is a fair one.
    assert "on seeds it was not chosen by: 0.952000 (1 runs), gain 0.040000 ± 0.001333" in printed
    assert "another seed of it, ± 2 sd" in legend(variables["fig"])


@pytest.mark.parametrize(
    "gain, verdict", [(0.0034, "within noise"), (0.0035, ""), (-0.0034, "within noise"), (-0.0035, "worse")]
)
def test_within_noise_is_two_standard_errors(analyse, gain, verdict):
    # Noise 0.001414, two runs against one: 2 * 0.001414 * sqrt(1/2 + 1) = 0.00346.
    rows = row("ba5e11e", 0.998), row("ba5e11e", 0.996), row("aaaaaaa", 0.997 - gain)
    assert analyse(lines(*rows))[0]["kept"]["verdict"].tolist() == ["baseline", verdict]


def test_best_that_ran_once_is_called_lucky(analyse):
    _, printed = analyse(lines(row("ba5e11e", 0.998), row("ba5e11e", 0.996), row("aaaaaaa", 0.95)))
    assert "The best ran once and is partly luck" in printed and "three fresh seeds" in printed


def test_identical_repeats_are_questioned(analyse):
    _, printed = analyse(lines(row("ba5e11e", 0.998), row("ba5e11e", 0.998), row("aaaaaaa", 0.99)))
    assert "identical to the last digit" in printed


def test_kept_for_simplicity_is_neither_best_nor_a_hit(analyse):
    variables, printed = analyse(lines(row("ba5e11e", 0.998), row("aaaaaaa", 0.990), row("bbbbbbb", 0.991)))
    assert variables["kept"]["best"].tolist() == [0.998, 0.99, 0.99]
    assert variables["kept"]["gain"].tolist()[2] == pytest.approx(-0.001)
    assert variables["kept"]["share"].tolist()[1:] == [1, 0]
    assert "best 0.990000 (1 runs, #2 aaaaaaa" in printed
    assert "The branch ends elsewhere: #3 bbbbbbb" in printed
    assert "1 gains" in printed


def test_only_the_ten_largest_gains_are_hits(analyse):
    steps = [row(f"{i:07x}", 0.99 - i * i / 10_000) for i in range(1, 15)]
    _, printed = analyse(lines(row("ba5e11e", 0.99), *steps))
    hits = printed.split("14 gains")[1].split("-> best")[0]
    assert [f"{i:07x}" in hits for i in range(1, 15)] == [False] * 4 + [True] * 10
    assert hits.index("000000e") < hits.index("0000005")


def test_three_files_are_told_apart(analyse):
    base = row("ba5e11e", 0.998), row("ba5e11e", 0.996)
    variables, printed = analyse(
        {
            "results.tsv": lines(*base, row("aaaaaaa", 0.99)),
            "results-gpu1.tsv": lines(*base, row("aaaaaaa", 0.98), row("bbbbbbb", 0.97), "torn"),
            "results_b.tsv": lines(row("ba5e11e", 1.5), row("aaaaaaa", 0, "crash")),
            "other.tsv": lines(row("ba5e11e", 0.1)),
        }
    )
    assert variables["outcomes"]["experiments"].to_dict() == {
        "results-gpu1.tsv": 3,
        "results.tsv": 2,
        "results_b.tsv": 2,
    }
    assert set(variables["noise"].index) == {"results.tsv", "results-gpu1.tsv"}
    assert "results_b.tsv: nothing was run twice" in printed
    assert "results-gpu1.tsv, line 6: 1 of 5 fields" in printed
    assert "results.tsv: baseline 0.997000 (2 runs) -> best 0.990000" in printed
    assert "results-gpu1.tsv: baseline 0.997000 (2 runs) -> best 0.970000" in printed
    titles = [ax.get_title(loc="left") for ax in variables["fig"].axes]
    assert [title.split(":")[0] for title in titles] == ["results-gpu1.tsv", "results.tsv", "results_b.tsv"]
    assert_legible(variables["fig"])


# ---------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------


def assert_legible(figure):
    """No text of the figure touches another or leaves the page, and no label hides a point."""
    figure.draw_without_rendering()
    renderer, texts = figure.canvas.get_renderer(), list(figure.legends[0].get_texts())
    for ax in figure.axes:
        texts += [ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):  # ticks beyond the axis's ends exist, but are not drawn
            first, last = axis.get_view_interval()
            texts += [tick.label1 for tick in axis.get_major_ticks() if first <= tick.get_loc() <= last]
    notes = annotations(figure)
    # An Annotation's own extent includes its leader, so ask for that of its text.
    boxes = [
        (text.get_text(), matplotlib.text.Text.get_window_extent(text, renderer))
        for text in (*texts, *notes)
        if text.get_text() and text.get_visible()
    ]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} overlaps {other!r}"
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{text!r} leaves the page"
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f"{text!r} leaves the page"
    for note in notes:
        box = matplotlib.text.Text.get_window_extent(note, renderer)
        assert note.get_fontsize() >= 8
        for points in (line for line in note.axes.lines if line.get_marker() != "None"):
            for x, y in note.axes.transData.transform(points.get_xydata()):
                assert not box.padded(2).contains(x, y), f"{note.get_text()!r} covers a point"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("experiments", [1, 5, 25, 120])
def test_labels_never_overlap(analyse, experiments, seed):
    variables, _ = analyse(night(experiments, seed))
    assert len(variables["experiments"]) == experiments
    assert_legible(variables["fig"])
    labels = {note.get_text().split()[0] for note in annotations(variables["fig"])}
    kept = variables["kept"]
    assert "#1" in labels and f"#{kept.loc[kept['score'].idxmin(), 'number']}" in labels
    assert len(labels) >= 0.6 * min(len(kept), 12)


def test_120_keeps_still_leave_the_labels_legible(analyse):
    rng = random.Random(0)
    scores = [2.31]
    while len(scores) < 120:
        scores.append(scores[-1] - rng.expovariate(500))
    rows = [row(f"{i:07x}", score, description="words " * 20) for i, score in enumerate(scores)]
    variables, _ = analyse(lines(*rows))
    assert_legible(variables["fig"])
    assert 8 <= len(annotations(variables["fig"])) <= 40


def test_the_legibility_check_can_fail(analyse):
    variables, _ = analyse(night(25))
    note = annotations(variables["fig"])[0]
    where = {"xytext": note.xyann, "textcoords": "offset points", "ha": note.get_ha(), "va": note.get_va()}
    copy = note.axes.annotate("a second label there", note.xy, **where)
    with pytest.raises(AssertionError, match="overlaps"):
        assert_legible(variables["fig"])
    copy.remove()
    assert_legible(variables["fig"])
    note.xyann = (0, 0)
    with pytest.raises(AssertionError, match="covers a point"):
        assert_legible(variables["fig"])
    note.xyann = (9999, 0)
    with pytest.raises(AssertionError, match="leaves the page"):
        assert_legible(variables["fig"])


def test_one_bad_run_does_not_blow_up_the_picture(analyse):
    rows = [row("ba5e11e", 0.998), row("aaaaaaa", 0.990), row("bbbbbbb", 0.995, "discard")]
    wild = [row("ccccccc", 7.1, "discard"), row("ddddddd", 0.2, "discard"), row("eeeeeee", 0, "crash")]
    variables, _ = analyse(lines(*rows, *wild))
    ax = variables["fig"].axes[0]
    low, high = ax.get_ylim()
    assert 0.98 < low < 0.99 and 0.998 < high < 1.01
    assert {"outside the picture", "crashed"} <= legend(variables["fig"])
    marks = {line.get_marker(): line.get_xydata().tolist() for line in ax.lines}
    assert [x for x, _ in marks["^"]] == [4] and [x for x, _ in marks["v"]] == [5]
    assert marks["x"] == [[6, pytest.approx(high)]]  # a crash has no score: it sits on the edge


def test_points_line_and_band_are_where_the_numbers_are(analyse):
    baseline = row("ba5e11e", 0.998), row("ba5e11e", 0.996)
    variables, _ = analyse(lines(*baseline, row("aaaaaaa", 0.994, "discard"), row("bbbbbbb", 0.990)))
    ax = variables["fig"].axes[0]
    kept, best, discarded = (
        next(line for line in ax.lines if line.get_label() == label)
        for label in ("kept", "best kept so far", "discarded")
    )
    assert kept.get_xydata().tolist() == [[1, pytest.approx(0.997)], [3, 0.99]]
    assert discarded.get_xydata().tolist() == [[2, 0.994]]
    assert best.get_xydata().tolist() == [[1, pytest.approx(0.997)], [3, 0.99], [3.5, 0.99]]
    band = ax.collections[0].get_paths()[0].get_extents()
    sd = 0.002 / 2**0.5
    assert (band.y0, band.y1) == (pytest.approx(0.99 - 2 * sd), pytest.approx(0.997 + 2 * sd))


def test_colours_differ_for_every_eye(analyse):
    # Blue and vermilion differ for all colour vision, and every kind has its own shape besides.
    variables, _ = analyse(night(120))
    lines_ = {line.get_label(): line for line in variables["fig"].axes[0].lines}
    assert (lines_["kept"].get_color(), lines_["crashed"].get_color()) == ("#0072B2", "#D55E00")
    shapes = {(line.get_marker(), line.get_markerfacecolor() == "none") for line in lines_.values()}
    assert len(shapes) == len(lines_)


def test_120_rows_add_up(analyse):
    variables, _ = analyse(night(118))  # 120 rows, three of them the baseline's
    outcomes, kept = variables["outcomes"].loc["results.tsv"], variables["kept"]
    assert len(variables["runs"]) == 120
    assert outcomes["keep"] + outcomes["discard"] + outcomes["crash"] == outcomes["experiments"] == 118
    assert outcomes["crash"] > 0 and outcomes["keep"] > 3
    assert kept["share"].sum() == pytest.approx(1)
    assert kept["gain"].clip(lower=0).sum() == pytest.approx(kept["score"].iloc[0] - kept["score"].min())


# ---------------------------------------------------------------------------
# Through Jupyter
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("files", [{}, {"results.tsv": night(25)}], ids=["no file", "a night"])
def test_runs_in_jupyter(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    shutil.copy(NOTEBOOK, tmp_path)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--execute", "analysis.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "analysis.html").read_text()
    assert "Traceback" not in page and "Warning" not in page
    assert (f"No results*.tsv in {tmp_path}" in page) == (not files)
    assert ("jp-RenderedImage" in page.split("</head>")[1]) == bool(files)  # the head has styles of that name
    assert (tmp_path / "progress.png").exists() == bool(files)
    assert ("<th>keep rate</th>" in page) == bool(files)


def test_a_real_evening(analyse):
    """25 experiments of 60 seconds that an agent ran by program.md at laptop scale, on one core of a busy machine."""
    variables, printed = analyse((NOTEBOOK.parent / "tests" / "evening.tsv").read_text(encoding="utf-8"))
    rows = [line.split("\t") for line in (NOTEBOOK.parent / "tests" / "evening.tsv").read_text().splitlines()[1:]]
    checks = {}
    for commit, score, _, _, description in rows:
        if description.startswith("check"):
            checks.setdefault(commit, []).append(float(score))
    assert [len(scores) for scores in checks.values()] == [3, 3, 3]  # baseline, the branch half-way, the branch
    outcomes = variables["outcomes"].loc["results.tsv"]
    assert outcomes["experiments"] == len({row[0] for row in rows}) == 26  # the baseline and 25 ideas
    assert outcomes["crash"] == 1 and "malformed" not in printed
    baseline = [float(score) for commit, score, *_ in rows if commit == rows[0][0]]
    assert len(baseline) == 6 and f"baseline {sum(baseline) / 6:.6f} (6 runs)" in printed
