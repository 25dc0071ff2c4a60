"""analysis.ipynb, run top to bottom on the tables that nights really leave: in this process, and through Jupyter."""

import itertools
import json
import os
import random
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Annotation, Text

NOTEBOOK = ROOT / "analysis.ipynb"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
TWO = "ba5e11e 0.998; ba5e11e 0.996; "  # two runs of a baseline


def row(commit, val_bpb, status="keep", description="an idea"):
    return f"{commit}\t{val_bpb:.6f}\t44.0\t{status}\t{description}\n"


def table(text):
    """'ba5e11e 0.998; aaaaaaa 0.99 discard some words' -> a results.tsv. What is left out is 'keep an idea'."""
    cells = [part.split(None, 3) for part in re.split("[;\n]", text) if part.strip()]
    return HEADER + "".join(row(commit, float(score), *more) for commit, score, *more in cells)


def night(experiments, seed=0, noise=0.0006, wave=0):
    """A plausible night: three baseline runs, then ideas, a few of them kept, a few crashed; if asked for, in waves."""
    rng = random.Random(seed)
    level, best = 0.9979, 0.9972
    ideas = [
        "depth 9, width 640",
        "RoPE base 200k",
        "no soft cap",
        "short window in all layers",
        "a far longer tale " * 3,
    ]
    rows = [("ba5e11e", level + shift, "keep", "wave 1: " * bool(wave) + "baseline") for shift in (-noise, 0, noise)]
    for i in range(1, experiments):
        idea = (f"wave {2 + (i - 1) // wave}: " if wave else "") + rng.choice(ideas)
        effect = rng.choice([0, 1, 2, 4, 6, -1, -3]) * noise if rng.random() < 0.97 else 1.5
        score, status = level + effect + rng.gauss(0, noise), "crash" if rng.random() < 0.06 else "discard"
        if status != "crash" and score < best - noise:
            level, best, status = level + effect, score, "keep"
        rows.append((f"{i:07x}", score * (status != "crash"), status, idea))
    return HEADER + "".join(row(*facts) for facts in rows[: 1 if experiments == 1 else None])


@pytest.fixture
def analyse(tmp_path, monkeypatch, capsys):
    """analyse(text) or analyse({name: text}) runs all cells on these files: (variables, printed text)."""

    def run(files):
        for name, text in ({"results.tsv": files} if isinstance(files, str) else files).items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.chdir(tmp_path)
        variables = {}
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), variables)
        return variables, capsys.readouterr().out

    yield run
    plt.close("all")


def annotations(figure):
    return [child for ax in figure.axes for child in ax.get_children() if isinstance(child, Annotation)]


def marks(figure):
    """Where the first night's points and lines are, by their name in the legend."""
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


@pytest.mark.parametrize("files", [{}, HEADER], ids=["no file", "header only"])
def test_nothing_to_draw(analyse, tmp_path, files):
    _, printed = analyse(files)
    for words in (f"No results*.tsv in {tmp_path}", "program.md", "run all cells again"):
        assert (words in printed) == (not files)
    assert "malformed" not in printed and "nothing to draw" in printed and "No baseline yet" in printed
    assert not (tmp_path / "progress.png").exists()


def test_one_row(analyse, tmp_path):
    variables, printed = analyse(table("ba5e11e 0.9979 keep baseline"))
    assert "noise is unknown" in printed and "two more seeds" in printed
    assert "baseline 0.997900 (1 runs) -> best 0.997900" in printed
    assert "Nothing that was kept is better than the baseline." in printed and "0 gains" in printed
    assert "no run has a bar" in printed and "nothing to merge" in printed
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert [note.get_text() for note in annotations(variables["fig"])] == ["#1 baseline"]
    assert set(marks(variables["fig"])) == {"kept", "best so far"}


@pytest.mark.parametrize("status, mark", [("discard", "discarded"), ("crash", "no number")])
def test_nothing_kept(analyse, status, mark):
    variables, printed = analyse(table(f"aaaaaaa 0.99 {status}; bbbbbbb 0.98 {status}"))
    assert "No baseline yet: nothing was kept." in printed and "no run has a bar" in printed
    assert "no baseline yet" in variables["fig"].axes[0].get_title(loc="left")
    assert list(variables["outcomes"].loc["results.tsv", ["experiments", "keep", status, "keep rate"]]) == [2, 0, 2, 0]
    assert set(marks(variables["fig"])) == {mark}


def test_columns_are_found_by_their_names(analyse):
    """Another project's night: other columns in another order, other words for the status, Windows' line ends."""
    lines = [
        "# a comment",
        "commit\tkind\tval_bpb\tstatus\tgain\tdescription",
        "aaaaaaa\tlr\t0.99\tbaseline\tg1\tas it was",
        "bbbbbbb\tlr\t0.98\tKEEP\tg2\tan idea #2",
        "ccccccc\tarch\t0.97\tbest\tg3\tlow",
        "ccccccc\tarch\t0.975\ttentative\tg4\tthe same commit",
        "ddddddd\tarch\t0.000000\tdiscard\tg5\tended by hand",
        "eeeeeee\tarch\t-\tcrash\tg6\tcaf\xe9",
        "fffffff\tarch\t0.985\tdiscard",
    ]
    variables, printed = analyse({"results.tsv": "\r\n".join(lines).encode("latin-1")})
    assert "results.tsv: 7 runs\n  1 malformed, counted nowhere below:\n  line 1: no status: '# a comment'\n" in printed
    counts = {"experiments": 7, "keep": 2, "discard": 2, "crash": 1, "best": 1, "tentative": 1, "keep rate": 1 / 6}
    assert variables["outcomes"].loc["results.tsv", list(counts)].to_dict() == counts
    shown = [line.split() for line in printed.splitlines()]
    assert ["2", "bbbbbbb", "0.980000", "0.010000", "0.010000", "1", "lr", "g2"] in [row[:8] for row in shown]
    assert ["3", "best", "ccccccc", "0.970000", "arch", "g3", "low"] in shown  # neither kept nor discarded
    assert "best 0.980000 (1 runs, #2 bbbbbbb: an idea #2" in printed and "no run has a bar" in printed
    points = marks(variables["fig"])
    assert points["other status"] == [[3, 0.97], [4, 0.975]] and points["discarded"] == [[7, 0.985]]
    assert [x for x, _ in points["no number"]] == [5, 6]
    assert variables["experiments"]["description"].iloc[-2] == "caf\ufffd"


def test_three_columns_are_enough_and_fewer_are_said(analyse):
    variables, printed = analyse(
        {"results.tsv": "\ufeffstatus\tcommit\tval_bpb\nkeep\taaaaaaa\t0.99\nkeep\tbbbbbbb\t0.98\n"}
    )
    assert "best 0.980000 (1 runs, #2 bbbbbbb" in printed and "malformed" not in printed
    assert [note.get_text() for note in annotations(variables["fig"])] == ["#1 aaaaaaa", "#2 bbbbbbb"]
    for text in ("commit\tloss\tstatus\naaaaaaa\t0.99\tkeep\n", row("aaaaaaa", 0.99)):
        _, printed = analyse(text)
        assert "results.tsv: not read" in printed and HEADER in printed and "results.tsv: 0 runs" in printed


def test_malformed_lines_are_counted_and_shown(analyse):
    bad = {
        "just words\n": "no status",
        row("bbbbbbb", 0.0, "keep"): "kept without a number above 0",
        row("", 0.97): "no commit",
        "ccccccc\tnan\t44.0\tkeep\tx\n": "val_bpb is no number",
        "ddddddd\t0.9x\t44.0\tbest\tx\n": "val_bpb is no number",
        "fffffff\tinf\t44.0\tkeep\tx\n": "kept without a number above 0",
        "ggggggg\t0.9": "no status",  # a torn line
    }
    variables, printed = analyse(HEADER + row("ba5e11e", 0.998) + "\n" + row("ba5e11e", 0.996) + "".join(bad))
    assert f"{len(bad)} malformed" in printed
    for number, (line, reason) in enumerate(bad.items(), start=5):  # the header, a good line, an empty and a good one
        assert f"line {number}: {reason}: {line.rstrip(chr(10))!r}" in printed
    assert variables["experiments"]["runs"].tolist() == [2]


def test_quotes_tabs_and_dollars_in_a_description(analyse):
    odd = ["\"unbalanced, and 'quoted'", "tabs\ttoo\tmany", "costs $x_$ <b>&amp;", "x" * 300]
    rows = [row(f"{i}aaaaaa", 0.99 - i / 1000, description=text) for i, text in enumerate(odd)]
    variables, printed = analyse(HEADER + "".join(rows))
    assert "1 with more tabs than the header" in printed and "malformed" not in printed
    assert variables["experiments"]["description"].tolist() == [odd[0], "tabs too many", odd[2], odd[3]]
    texts = [note.get_text() for note in annotations(variables["fig"])]
    assert "#3 " + odd[2] in texts and max(map(len, texts)) <= 40


def test_crashes_never_win_and_never_are_the_baseline(analyse):
    text = "aaaaaaa 0 crash; bbbbbbb 0.97 discard; ba5e11e 0.9979; ccccccc 0.5 crash; aaaaaaa 0.99"
    variables, printed = analyse(table(text))
    assert "baseline 0.997900 (1 runs) -> best 0.990000 (1 runs, #5 aaaaaaa" in printed
    # one of four ideas: the baseline is none
    outcomes = variables["outcomes"].loc["results.tsv", ["experiments", "keep", "discard", "crash", "keep rate"]]
    assert outcomes.tolist() == [5, 2, 1, 2, 1 / 4]
    title = variables["fig"].axes[0].get_title(loc="left")
    assert "baseline 0.9979 → best 0.9900 (0.79% lower), 1 of 4 ideas kept" in title


def test_repeats_are_averaged_and_give_the_noise(analyse):
    # By hand: variance 1 (2 degrees) of the baseline's 1, 2, 3 and 2 (1 degree) of bbbbbbb's 0, 2: 4/3.
    text = "ba5e11e 0.991; ba5e11e 0.992; ba5e11e 0.993; aaaaaaa 0.9915; bbbbbbb 0.95; ccccccc 1 discard; bbbbbbb 0.952"
    variables, printed = analyse(table(text))
    noise, kept = variables["outcomes"].loc["results.tsv", ["noise (sd)", "from repeats"]], variables["kept"]
    assert noise.tolist() == pytest.approx([(4 / 3) ** 0.5 * 1e-3, 3])
    assert kept["score"].tolist() == pytest.approx([0.992, 0.9915, 0.951])
    assert kept["gain"].tolist()[1:] == pytest.approx([0.0005, 0.0405])
    assert kept["verdict"].tolist() == ["baseline", "within noise", ""]
    assert kept["share"].tolist()[1:] == pytest.approx([0.0005 / 0.041, 0.0405 / 0.041])
    assert "2 gains, 1 of them within noise" in printed
    # The best was chosen for its first run, 0.950: only the second is a fair one.
    assert "on seeds it was not chosen by: 0.952000 (1 runs), gain 0.040000 ± 0.001333" in printed
    assert "identical to the last digit" in analyse(table("ba5e11e 0.998; ba5e11e 0.998; aaaaaaa 0.99"))[1]


@pytest.mark.parametrize("gain, verdict", zip([3.4, 3.5, -3.4, -3.5], ["within noise", "", "within noise", "worse"]))
def test_within_noise_is_two_standard_errors(analyse, gain, verdict):
    # Noise 0.001414, two runs against one: 2 * 0.001414 * sqrt(1/2 + 1) = 0.00346.
    variables, printed = analyse(table(f"{TWO} aaaaaaa {0.997 - gain / 1000}"))
    assert variables["kept"]["verdict"].tolist() == ["baseline", verdict]
    assert ("The best ran once and is partly luck" in printed) == (gain > 0)


def test_kept_for_simplicity_is_neither_best_nor_a_hit(analyse):
    variables, printed = analyse(table("ba5e11e 0.998; aaaaaaa 0.990; bbbbbbb 0.991"))
    kept = variables["kept"]
    assert kept["best"].tolist() == [0.998, 0.99, 0.99] and kept["share"].tolist()[1:] == [1, 0]
    assert kept["gain"].tolist()[1:] == pytest.approx([0.008, -0.001])
    for words in ("best 0.990000 (1 runs, #2 aaaaaaa", "1 gains", "The branch ends elsewhere: #3 bbbbbbb"):
        assert words in printed


def test_only_the_ten_largest_gains_are_hits(analyse):
    steps = [f"{i:07x} {0.99 - i * i / 10_000}" for i in range(1, 15)]
    _, printed = analyse(table("; ".join(["ba5e11e 0.99", *steps])))
    hits = printed.split("14 gains")[1].split("-> best")[0]
    assert [f"{i:07x}" in hits for i in range(1, 15)] == [False] * 4 + [True] * 10
    assert hits.index("000000e") < hits.index("0000005")


def test_three_files_are_told_apart(analyse):
    texts = {"s": f"{TWO} aaaaaaa 0.99", "s-gpu1": f"{TWO} aaaaaaa 0.98; bbbbbbb 0.97", "s_b": "ba5e11e 1.5; a 0 crash"}
    files = {f"result{name}.tsv": table(text) for name, text in texts.items()}
    variables, printed = analyse({**files, "results-gpu1.tsv": files["results-gpu1.tsv"] + "torn", "other.tsv": "torn"})
    experiments = variables["outcomes"]["experiments"].to_dict()
    assert experiments == {"results-gpu1.tsv": 3, "results.tsv": 2, "results_b.tsv": 2}
    assert "results_b.tsv: nothing was run twice" in printed
    assert "results-gpu1.tsv: 4 runs\n  1 malformed, counted nowhere below:\n  line 6: no status: 'torn'" in printed
    assert "results.tsv: baseline 0.997000 (2 runs) -> best 0.990000" in printed
    assert "results-gpu1.tsv: baseline 0.997000 (2 runs) -> best 0.970000" in printed
    titles = [ax.get_title(loc="left").split(":")[0] for ax in variables["fig"].axes]
    assert titles == ["results-gpu1.tsv", "results.tsv", "results_b.tsv"]
    assert_legible(variables["fig"])


def assert_legible(figure):
    """No text of the figure touches another or leaves the page, and no label hides a point."""
    figure.draw_without_rendering()
    renderer, texts, notes = figure.canvas.get_renderer(), list(figure.legends[0].get_texts()), annotations(figure)
    for ax in figure.axes:
        texts += [ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):  # ticks beyond the axis's ends exist, but are not drawn
            first, last = axis.get_view_interval()
            texts += [tick.label1 for tick in axis.get_major_ticks() if first <= tick.get_loc() <= last]
    shown = [text for text in (*texts, *notes) if text.get_text() and text.get_visible()]
    # An Annotation's own extent includes its leader, so ask for that of its text.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} overlaps {other!r}"
    for text, box in boxes:
        assert (figure.bbox.min <= box.min).all() and (box.max <= figure.bbox.max).all(), f"{text!r} leaves the page"
    for note in notes:
        box = Text.get_window_extent(note, renderer)
        assert note.get_fontsize() >= 8
        for points in (line for line in note.axes.lines if line.get_marker() != "None"):
            for x, y in note.axes.transData.transform(points.get_xydata()):
                assert not box.padded(2).contains(x, y), f"{note.get_text()!r} covers a point"


@pytest.mark.parametrize("experiments, seed, wave", [(1, 0, 0), (5, 0, 0), (25, 1, 0), (120, 0, 0), (120, 0, 8)])
def test_labels_never_overlap(analyse, experiments, seed, wave):
    variables, _ = analyse(night(experiments, seed, wave=wave))
    outcomes, kept = variables["outcomes"].loc["results.tsv"], variables["kept"]
    assert outcomes["keep"] + outcomes["discard"] + outcomes["crash"] == outcomes["experiments"] == experiments
    assert kept["gain"].clip(lower=0).sum() == pytest.approx(kept["score"].iloc[0] - kept["score"].min())
    assert_legible(variables["fig"])
    labels = {note.get_text().split()[0] for note in annotations(variables["fig"])}
    assert "#1" in labels and f"#{kept.loc[kept['score'].idxmin(), 'number']}" in labels
    assert len(labels) >= 0.6 * min(len(kept), 12)
    looks = {(line.get_marker(), line.get_markerfacecolor() == "none") for line in variables["fig"].axes[0].lines}
    assert len(looks) == len(variables["fig"].axes[0].lines)  # every kind has its own shape besides its colour


def test_120_keeps_still_leave_the_labels_legible(analyse):
    rng = random.Random(0)
    scores = itertools.accumulate((rng.expovariate(500) for _ in range(119)), lambda a, b: a - b, initial=2.31)
    variables, _ = analyse(table("\n".join(f"{i:07x} {score} keep {'words ' * 20}" for i, score in enumerate(scores))))
    assert_legible(variables["fig"])
    assert 8 <= len(annotations(variables["fig"])) <= 40


def test_one_bad_run_does_not_blow_up_the_picture(analyse):
    figure = analyse(table("a 0.998; b 0.99; c 0.995 discard; d 7.1 discard; e 0.2 discard; f 0 crash"))[0]["fig"]
    low, high = figure.axes[0].get_ylim()
    assert 0.98 < low < 0.99 and 0.998 < high < 1.01
    points = {line.get_marker(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert [x for x, _ in points["^"]] == [4] and [x for x, _ in points["v"]] == [5]
    assert marks(figure)["no number"] == [[6, pytest.approx(high)]]  # a crash has no score: it sits on the edge


def test_points_lines_and_band_are_where_the_numbers_are(analyse):
    # By hand: the baseline's mean is 0.997, its sd 0.001, M = 0.0015, and after one discard M * 49/50 = 0.00147.
    text = f"{TWO} ba5e11e 0.997; aaaaaaa 0.996 discard; bbbbbbb 0.99; bbbbbbb 0.993 keep another seed"
    variables, printed = analyse(table(text))
    points, mean = marks(variables["fig"]), pytest.approx(0.997)
    assert points["kept"] == [[1, mean], [3, 0.99]]  # the number that it was kept for, not the mean
    assert points["discarded"] == [[2, 0.996]]
    assert points["best so far"] == [[1, mean], [3, 0.9915], [3.5, 0.9915]]
    drawn = {part.get_label(): part for part in variables["fig"].axes[0].collections}
    ends = np.array(drawn["bar to beat"].get_segments())
    assert ends.ravel().tolist() == pytest.approx([1.5, 0.9955, 2.5, 0.9955, 2.5, 0.99553, 3.5, 0.99553])
    band, sd = drawn["another seed, ± 2 sd"].get_paths()[0].get_extents(), variables["noise"]["results.tsv"]
    assert (band.y0, band.y1) == pytest.approx((0.9915 - 2 * sd, 0.997 + 2 * sd))
    assert "0 of 2 decisions differ" in printed


def test_decisions_that_differ_are_counted_named_and_marked(analyse):
    # By hand: the baseline's mean is 0.993, its sd 0.002, M = 0.003. After a discard the bar is 0.993 - M * 49/50.
    text = "ba5e11e 0.991; ba5e11e 0.993; ba5e11e 0.995; aaaaaaa 0.985 discard well; bbbbbbb 0.991 keep checkpoints"
    text += "; ccccccc 0 crash; ddddddd 0.9939 keep simpler: fine; eeeeeee 0.994001 keep simpler: not fine"
    variables, printed = analyse(table(text))
    assert "3 of 4 decisions differ from the rule" in printed
    assert "  #2 aaaaaaa: 0.985000, bar 0.990000, discard: well" in printed
    assert "  #3 bbbbbbb: 0.991000, bar 0.990060, keep: checkpoints" in printed
    assert "  #6 eeeeeee: 0.994001, bar 0.994000, keep: simpler: not fine" in printed
    assert marks(variables["fig"])["differs from the rule"] == [[2, 0.985], [3, 0.991], [6, 0.994001]]
    assert "#2 well" in [note.get_text() for note in annotations(variables["fig"])]


def test_a_night_of_waves(analyse):
    text = """ba5e11e 0.999 keep wave 1: baseline, seed 0
        ba5e11e 1.000 keep wave 1: baseline, seed 1
        ba5e11e 1.001 keep wave 1: baseline, seed 2
        ba5e11e 0 crash wave 1: baseline, seed 3
        a000001 0.9970 discard wave 2: below the bar, not the best
        a000002 0.9960 keep wave 2: the best
        a000003 0 crash wave 2: crash
        a000004 1.0005 discard wave 2: simpler: below its bar, not the best
        b000001 0.9955 keep wave 3: not below the bar
        b000002 0.9960 discard wave 3: simpler: below its bar
        c000001 0.9900 keep wave 4: the best
        c000002 0.9901 keep wave 4: the second
        ba5e11e 1.0000 keep another seed"""
    variables, printed = analyse(table(text))
    M = 1.5 * 0.001  # the baselines' mean is 1, their sd 0.001
    bars = [1 - M, 1 - M, 1 - M, 1 + M, 0.996 - M, 0.996 + M, 0.9955 - M, 0.9955 - M]
    assert variables["runs"]["bar"].tolist() == pytest.approx([np.nan] * 4 + bars + [np.nan], nan_ok=True)
    assert variables["experiments"].query("differs")["commit"].tolist() == ["b000001", "b000002", "c000002"]
    ax = variables["fig"].axes[0]
    assert ax.get_xlabel() == "wave" and [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "3", "4"]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(1.5, 4), (7.5, 2)]  # waves 2 and 4
    assert "3 of 7 decisions differ" in printed and "results.tsv: 4 waves" in printed
    assert variables["waves"].loc[2, ["keep", "discard", "crash", "best"]].tolist() == [1, 2, 1, "0.996000"]


@pytest.fixture
def commit(tmp_path, monkeypatch):
    """commit(text) makes train.py's next commit in a repository beside the table; returns its short name."""
    for part in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.setenv(f"GIT_{part}", "a@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def make(text, name="train.py"):
        (tmp_path / name).write_text(text)
        script = f"git init -q; git add {name}; git commit -qm x; git rev-parse --short=7 HEAD"
        return subprocess.check_output(["bash", "-ec", script], cwd=tmp_path, text=True).strip()

    return make


def test_beside_its_repository_the_diffs_are_shown(analyse, commit, tmp_path):
    base, first, second = map(commit, ("1\n2\n3\n", "1\n2\n3\n4\n5\n", "1\n5\n"))
    text = f"{base} 0.997; {first} 0.99; {second} 0.98"
    variables, printed = analyse(table(text + "; fffffff 0.9; --output=made 0.9; HEAD 0.9"))
    assert variables["kept"]["diff"].tolist() == ["", "1 file, +2 −0", "1 file, +0 −3", "", "", ""]
    assert "git merge HEAD\n" in printed and not (tmp_path / "made").exists()
    variables, printed = analyse(table(text))
    assert f"git diff {base} {second} -- train.py   (1 file, +1 −2)\n" in printed
    assert "still to do" in printed and f"git merge {second}\n" in printed and "Mind that" not in printed
    for command in (*variables["kept"]["see it"][1:], f"git diff {base} {second} -- train.py"):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "\n@@ " in done.stdout
    third = commit("a harness of its own", "prepare.py")
    _, printed = analyse(table(f"{text}; {third} 0.5; {third} 0.5 keep another seed"))
    for words in ("(2 files, +2 −2)", "changes more than train.py: prepare.py", "done on 1 fresh seeds"):
        assert words in printed


def test_without_git_nothing_but_the_diffs_is_missing(analyse, commit, monkeypatch):
    rows = [f"{commit(str(i))} {0.99 - i / 1000}" for i in range(3)]
    monkeypatch.setenv("PATH", "")
    printed = analyse(table("; ".join(rows)))[1]
    assert "git merge" in printed and "see it" not in printed and "git show" not in printed


def test_runs_in_jupyter(tmp_path):
    (tmp_path / "results.tsv").write_text(night(25))
    for path in (NOTEBOOK, ROOT / "prepare.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--execute", "analysis.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "analysis.html").read_text()
    assert "Traceback" not in page and "Warning" not in page and "<th>keep rate</th>" in page
    assert "jp-RenderedImage" in page.split("</head>")[1]  # the head has styles of that name
    assert (tmp_path / "progress.png").exists()


@pytest.mark.parametrize("name, picture", [("evening", "night"), ("waves", "waves")])
def test_a_real_evening(analyse, tmp_path, name, picture):
    """Evenings that an agent ran by program.md at laptop scale: one run at a time, and waves of four through Slurm."""
    text = (ROOT / "tests" / f"{name}.tsv").read_text(encoding="utf-8")
    variables, printed = analyse(text)
    assert f"results.tsv: {text.count(chr(10)) - 1} runs\n" in printed and "malformed" not in printed
    experiments, rows = variables["experiments"], [line.split("\t") for line in text.splitlines()[1:]]
    baseline = [float(score) for commit, score, *_ in rows if commit == rows[0][0]]
    assert len(baseline) >= 6 and variables["kept"]["score"].iloc[0] == pytest.approx(np.mean(baseline))
    assert experiments["wave"].notna().all() == (name == "waves") and "fresh seeds, see above" in printed
    # Every decision follows from the rule, also where a discarded point lies far below the best score.
    assert experiments["bar"].count() == len(experiments) - 1 and not experiments["differs"].any()
    drawn, committed = (plt.imread(path) for path in (tmp_path / "progress.png", ROOT / "tests" / f"{picture}.png"))
    hint = f"run the notebook on tests/{name}.tsv and copy its progress.png to tests/{picture}.png"
    assert drawn.shape == committed.shape and np.abs(drawn - committed).mean() < 0.005, hint


def test_the_committed_notebook_shows_the_evening(analyse):
    printed = analyse((ROOT / "tests" / "evening.tsv").read_text(encoding="utf-8"))[1]
    outputs = [output for cell in json.loads(NOTEBOOK.read_text())["cells"] for output in cell.get("outputs", ())]
    streams = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    assert len(streams) == 6 and all(stream in printed for stream in streams)
