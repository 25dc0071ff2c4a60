"""analysis.ipynb, run top to bottom on the tables that nights really leave: in this process, and through Jupyter."""

import itertools
import json
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
CHECK = "keep check, seed 100"
NIGHT, WAVES = ((ROOT / "tests" / f"{name}.tsv").read_text(encoding="utf-8") for name in ("night", "waves"))


def table(text):
    """'ba5e11e 0.998; aaaaaaa 0.99 discard some words' -> a results.tsv. What is left out is 'keep an idea'."""
    rows = [part.split(None, 3) for part in re.split("[;\n]", text) if part.strip()]
    rows = [[*cells, *["keep", "an idea"][len(cells) - 2 :]] for cells in rows]
    return HEADER + "".join(f"{row[0]}\t{float(row[1]):.6f}\t44.0\t{row[2]}\t{row[3]}\n" for row in rows)


@pytest.fixture
def analyse(tmp_path, monkeypatch, capsys):
    """analyse(table) or analyse({name: table}) runs all cells on these files: (variables, printed text)."""

    def run(files):
        for name, text in (files if isinstance(files, dict) else {"results.tsv": files}).items():
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
    assert (f"No results*.tsv in {tmp_path}" in printed) == (not files)
    assert "malformed" not in printed and "nothing to draw" in printed and not (tmp_path / "progress.png").exists()


def test_one_row(analyse):
    variables, printed = analyse(table("ba5e11e 0.9979 keep baseline"))
    for words in ("noise is unknown", "no run has a bar", "0 gains", "better than the baseline", "nothing to merge"):
        assert words in printed
    assert [note.get_text() for note in annotations(variables["fig"])] == ["#1 baseline"]


def test_columns_are_found_by_their_names(analyse):
    """Another project's night: other columns in another order, other words for the status, lines as on Windows."""
    lines = [
        "# a comment",
        "commit\tkind\tval_bpb\tstatus\tgain\tdescription",
        'aaaaaaa\tlr\t0.99\tbaseline\tg1\t"unbalanced\twith\ttabs',
        "bbbbbbb\tlr\t0.98\tKEEP\tg2\tcosts $x_$ <b>&amp;",
        "ccccccc\tarch\t0.97\tmaybe\tg3\tcaf\xe9",  # not UTF-8
        "ccccccc\tarch\t0.975\ttentative\tg4\tthe same commit",
        "ddddddd\tarch\t0.000000\tdiscard\tg5\tended by hand",
        "eeeeeee\tarch\t-\tcrash\tg6\tout of memory",
        "fffffff\tarch\t0.985\tdiscard",
    ]
    variables, printed = analyse("\r\n".join(lines).encode("latin-1"))
    assert "1 malformed, counted nowhere below:\n  line 1: no status: '# a comment'\n" in printed
    assert "results.tsv: 7 runs\n  1 with more tabs than the header" in printed
    outcomes = {"experiments": 7, "keep": 2, "discard": 2, "crash": 1, "maybe": 1, "tentative": 1, "keep rate": 1 / 6}
    assert variables["outcomes"].iloc[0].to_dict().items() >= outcomes.items()
    shown = [line.split() for line in printed.splitlines()]
    assert ["3", "maybe", "ccccccc", "0.970000", "arch", "g3", "caf\ufffd"] in shown  # neither kept nor discarded
    points, notes = marks(variables["fig"]), [note.get_text() for note in annotations(variables["fig"])]
    assert notes == ['#1 "unbalanced with tabs', "#2 costs $x_$ <b>&amp;"]
    assert points["other status"] == [[3, 0.97], [4, 0.975]] and points["discarded"] == [[7, 0.985]]
    assert [x for x, _ in points["no number"]] == [5, 6]


def test_three_columns_are_enough_and_fewer_are_said(analyse):
    variables, printed = analyse("\ufeffstatus\tcommit\tval_bpb\nkeep\taaaaaaa\t0.99\nkeep\tbbbbbbb\t0.98")
    assert "best 0.980000 (1 runs, #2 bbbbbbb" in printed and "malformed" not in printed
    assert [note.get_text() for note in annotations(variables["fig"])] == ["#1 aaaaaaa", "#2 bbbbbbb"]
    _, printed = analyse("commit\tloss\tstatus\naaaaaaa\t0.99\tkeep\n")
    assert "results.tsv: not read" in printed and HEADER in printed and "results.tsv: 0 runs" in printed
    # Numbers alone: what is lower than all before counts as kept
    variables, printed = analyse("val_bpb\n1.0\n0.9\n0.95\n0\n0.8\nx\n")
    assert "has no status" in printed and "results.tsv: 5 runs\n  1 malformed" in printed
    assert variables["experiments"]["status"].tolist() == ["keep", "keep", "discard", "crash", "keep"]


def test_tables_of_other_projects_are_read_as_they_are_meant(analyse):
    words = "keep KEPT accepted best discarded reverted Rejected failed crashed unsure".split()
    lines = [f"{1 - i / 100}\t{word}\tidea {i}" for i, word in enumerate(words)]
    for header, commit in (("", ""), ("commit\t", "-\t"), ("commit\t", "0123abc\t")):
        table = [f"{header}val_bpb\tstatus\tdescription", *(commit + line for line in lines)]
        variables, printed = analyse("\n".join(table))
        assert "malformed" not in printed and "nothing was run twice" in printed
        outcomes = {"experiments": 10, "keep": 4, "discard": 3, "crash": 2, "unsure": 1}
        assert variables["outcomes"].iloc[0].to_dict().items() >= outcomes.items()
        assert "-> best 0.970000 (1 runs, #4" in printed and ("git merge" in printed) == bool(header)
    repeats = "baseline; wave 1: baseline, seed 1; check, seed 100; x; x; check2".split("; ")
    table = [f"{'0123abc' if i < 3 else 'fffffff'}\t0.9{i}\tkeep\t{text}" for i, text in enumerate(repeats)]
    variables, _ = analyse("\n".join(["commit\tval_bpb\tstatus\tdescription", *table]))
    assert variables["experiments"][["rows", "seeds"]].to_numpy().tolist() == [[2, 1], [2, 0], [1, 0]]


def test_a_branch_that_was_checked_is_what_the_page_is_about(analyse):
    """A lucky number before it, or the one that it was kept for, is not."""
    checks = "bbbbbbb 0.992 keep check, seed 100; bbbbbbb 0.9915 keep check, seed 101"
    _, printed = analyse(table(f"{TWO} aaaaaaa 0.99; bbbbbbb 0.9865; {checks}"))
    assert "-> best 0.991750 (2 runs, #3 bbbbbbb: an idea)\n  gain 0.005250" in printed
    assert "three fresh seeds" not in printed and "done on 2 fresh seeds" in printed
    # Baseline and branch are compared in the check's hour, the ideas in the night's.
    both = f"{TWO} aaaaaaa 0.99; bbbbbbb 0.9865; {checks}; ba5e11e 0.999 {CHECK}; ba5e11e 1.001 {CHECK}"
    variables, printed = analyse(table(both))
    assert "baseline 1.000000 (2 runs) -> best 0.991750 (2 runs" in printed and "gain 0.008250" in printed
    assert "baseline 1.0000 → best 0.9918" in variables["fig"].axes[0].get_title(loc="left")
    assert variables["kept"]["score"].tolist() == pytest.approx([0.997, 0.99, 0.9865])
    # Of two checks the last counts, also in the picture. A run without a number is no idea
    later = f"ccccccc 0.98; ccccccc 1.08 {CHECK}; ccccccc 0 crash check, seed 101; ba5e11e 1.1 {CHECK}"
    variables, printed = analyse(table(f"{both}; {later}"))
    assert "baseline 1.100000 (1 runs) -> best 1.080000 (1 runs, #4 ccccccc" in printed
    assert marks(variables["fig"])["on fresh seeds"] == [[1, 1.1], [3, 0.99175], [4, 1.08]]


def test_malformed_lines_are_counted_and_shown(analyse):
    bad = {
        "just words": "no status",
        "bbbbbbb\t0.000000\t44.0\tkeep\tx": "kept without a number above 0",
        "\t0.97\t44.0\tkeep\tx": "no commit",
        "ddddddd\t0.9x\t44.0\tbest\tx": "val_bpb is no number",
        "fffffff\tinf\t44.0\tkeep\tx": "kept without a number above 0",
        "ggggggg\t0.9": "no status",  # a torn line
    }
    _, printed = analyse(table(TWO) + "\n" + "\n".join(bad))
    assert f"results.tsv: 2 runs\n  {len(bad)} malformed" in printed
    for number, (line, reason) in enumerate(bad.items(), start=5):  # the header, two good lines and an empty one
        assert f"line {number}: {reason}: {line!r}" in printed


def test_crashes_and_discards_never_win_and_never_are_the_baseline(analyse):
    variables, printed = analyse(table("a 0 crash; b 0.97 discard"))
    assert "No baseline yet: nothing was kept." in printed and "no run has a bar" in printed
    assert variables["outcomes"].iloc[0, :5].tolist() == [2, 0, 1, 1, 0]
    variables, printed = analyse(table("a 0 crash; b 0.97 discard; ba5e11e 0.9979; c 0.5 crash; a 0.99"))
    assert "baseline 0.997900 (1 runs) -> best 0.990000 (1 runs, #5 a:" in printed
    assert variables["outcomes"].iloc[0, :5].tolist() == [5, 2, 1, 2, 1 / 4]
    assert [x for x, _ in marks(variables["fig"])["no number"]] == [1, 4]
    assert variables["fig"].axes[0].get_title(loc="left").endswith("(0.79% lower), 1 of 4 ideas kept")


def test_repeats_are_averaged_and_give_the_noise(analyse):
    # By hand: variance 1 (2 degrees) of the baseline's 1, 2, 3 and 2 (1 degree) of bbbbbbb's 0, 2: 4/3.
    text = "ba5e11e 0.991; ba5e11e 0.992; ba5e11e 0.993; aaaaaaa 0.9915; bbbbbbb 0.95; ccccccc 1 discard; bbbbbbb 0.952"
    variables, printed = analyse(table(text))
    assert variables["outcomes"].iloc[0, -2:].tolist() == pytest.approx([(4 / 3) ** 0.5 * 1e-3, 3])
    kept = variables["kept"]
    assert kept["score"].tolist() == pytest.approx([0.992, 0.9915, 0.952])  # 0.95 was kept because it was low
    assert kept["gain"].tolist()[1:] == pytest.approx([0.0005, 0.0395])
    assert kept["verdict"].tolist() == ["baseline", "within noise", ""]
    assert kept["share"].tolist()[1:] == pytest.approx([0.0005 / 0.04, 0.0395 / 0.04])
    assert "2 gains, 1 of them within noise" in printed
    assert "best 0.952000 (1 runs, #3 bbbbbbb" in printed and "gain 0.040000" in printed
    assert "on seeds that it was not chosen by: ± 0.001333" in printed
    assert "identical to the last digit" in analyse(table("ba5e11e 0.998; ba5e11e 0.998; aaaaaaa 0.99"))[1]
    # The check's runs are of another hour, when the machine was slower: variance 2 (1 degree) of their own.
    variables, _ = analyse(table(f"{text}; ba5e11e 0.983 {CHECK}; ba5e11e 0.985 {CHECK}"))
    assert variables["outcomes"].iloc[0, -2:].tolist() == pytest.approx([1.5**0.5 * 1e-3, 4])


def test_within_noise_is_two_standard_errors(analyse):
    # Noise 0.001414: two runs against one 2 * 0.001414 * sqrt(1/2 + 1) = 0.00346, one against one 0.004.
    variables, printed = analyse(table(f"{TWO} a 0.99355; b 0.98954; c 0.99353; d 0.99355"))
    kept, hits = variables["kept"], printed.split("2 gains, 1 of them within noise\n")[1].split("-> best")[0]
    assert kept["verdict"].tolist() == ["baseline", "within noise", "", "within noise", "worse"]
    # What was kept for its simplicity is neither the best nor a hit.
    assert kept["best"].tolist()[2:] == [0.98954] * 3 and kept["share"].tolist()[3:] == [0, 0]
    assert ["3", "b", "0.004010", "54%", "an", "idea"] in [line.split() for line in hits.splitlines()]
    assert "0.99353" not in hits and "The branch ends elsewhere: #5 d" in printed


def test_three_files_are_told_apart(analyse):
    texts = {"s": f"{TWO} aaaaaaa 0.99", "s-gpu1": f"{TWO} aaaaaaa 0.98; bbbbbbb 0.97", "s_b": "ba5e11e 1.5; a 0 crash"}
    variables, printed = analyse({f"result{name}.tsv": table(text) for name, text in texts.items()} | {"a.tsv": "torn"})
    assert variables["outcomes"]["experiments"].tolist() == [3, 2, 2]
    assert "s_b.tsv: nothing was run twice" in printed and "s-gpu1.tsv: baseline 0.997000 (2 runs) -> best" in printed
    assert_legible(variables["fig"])


def assert_legible(figure):
    """No label touches another one, leaves the page or hides a point."""
    figure.draw_without_rendering()
    notes = annotations(figure)
    boxes = [Text.get_window_extent(note) for note in notes]  # an Annotation's own has its leader too
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for note, box in zip(notes, boxes):
        assert (figure.bbox.min <= box.min).all() and (box.max <= figure.bbox.max).all(), note
        lines = [line.get_xydata() for line in note.axes.lines if line.get_marker() != "None"]
        points = note.axes.transData.transform(np.concatenate(lines))
        assert not any(box.padded(2).contains(x, y) for x, y in points), note


STAIRS = table("\n".join(f"{i:07x} {2.31 - i / 500} keep {'words ' * 20}" for i in range(120)))


# 6 rows, 32, 109, waves, and nothing but gains; a torn row is passed over
@pytest.mark.parametrize("text", [NIGHT[:500], NIGHT[:3000], NIGHT, WAVES, STAIRS], ids=range(5))
def test_labels_never_overlap(analyse, text):
    variables, _ = analyse(text)
    kept, lines = variables["kept"], variables["fig"].axes[0].lines
    assert_legible(variables["fig"])
    labels = [note.get_text() for note in annotations(variables["fig"])]
    assert {"#1", f"#{kept.loc[kept['score'].idxmin(), 'number']}"} <= {label.split()[0] for label in labels}
    assert len(labels) >= 0.6 * min(len(kept), 12) and max(map(len, labels)) <= 41
    # Every kind has its own shape besides its colour.
    assert len({(line.get_marker(), line.get_markerfacecolor() == "none") for line in lines}) == len(lines)


def test_one_bad_run_does_not_blow_up_the_picture(analyse):
    variables, _ = analyse(table("a 0.998; b 0.99; c 0.995 discard; d 7.1 discard; e 0.2 discard; f 0 crash"))
    lines, (low, high) = variables["fig"].axes[0].lines, variables["fig"].axes[0].get_ylim()
    assert 0.98 < low < 0.99 and 0.998 < high < 1.01
    assert {line.get_marker(): [*line.get_xdata()] for line in lines}.items() >= {"^": [4], "v": [5]}.items()
    assert marks(variables["fig"])["no number"] == [[6, pytest.approx(high)]]  # a crash sits on the edge


def test_points_lines_and_band_are_where_the_numbers_are(analyse):
    # By hand: the baseline's mean is 0.997, its sd 0.001, M = 0.0015, and after one discard M * 49/50 = 0.00147.
    variables, _ = analyse(table(f"{TWO} ba5e11e 0.997; aaaaaaa 0.996 discard; bbbbbbb 0.99; bbbbbbb 0.993 {CHECK}"))
    points, mean = marks(variables["fig"]), pytest.approx(0.997)
    assert points["kept"] == [[1, mean], [3, 0.99]]  # the number that it was kept for, not the mean
    assert points["discarded"] == [[2, 0.996]] and points["best so far"] == [[1, mean], [3, 0.99], [3.5, 0.99]]
    assert points["on fresh seeds"] == [[3, 0.993]]
    drawn = {part.get_label(): part for part in variables["fig"].axes[0].collections}
    ends = np.array(drawn["bar to beat"].get_segments())
    assert ends.ravel().tolist() == pytest.approx([1.5, 0.9955, 2.5, 0.9955, 2.5, 0.99553, 3.5, 0.99553])
    band, sd = drawn["another seed, ± 2 sd"].get_paths()[0].get_extents(), variables["noise"]["results.tsv"]
    assert (band.y0, band.y1) == pytest.approx((0.99 - 2 * sd, 0.997 + 2 * sd))


def test_decisions_that_differ_are_counted_named_and_marked(analyse):
    # By hand: the baseline's mean is 0.993, its sd 0.002, M = 0.003. After a discard the bar is 0.993 - M * 49/50.
    text = "ba5e11e 0.991; ba5e11e 0.993; ba5e11e 0.995; aaaaaaa 0.985 discard well; bbbbbbb 0.991 keep checkpoints"
    text += "; ccccccc 0 crash; ddddddd 0.9939 keep simpler: fine; eeeeeee 0.994001 keep simpler: not fine; f 0.98 odd"
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
        a000001 0.9970 discard wave 2: below the bar, not the best
        a000002 0.9960 keep wave 2: the best
        a000003 0 crash wave 2: crash
        a000004 1.0005 discard wave 2: simpler: below its bar, not the best
        b000001 0.9955 keep wave 3: not below the bar"""
    variables, printed = analyse(table(text))
    M = 1.5 * 0.001  # the baselines' mean is 1, their sd 0.001
    assert variables["runs"]["bar"].dropna().tolist() == pytest.approx([1 - M, 1 - M, 1 - M, 1 + M, 0.996 - M])
    ax = variables["fig"].axes[0]
    assert ax.get_xlabel() == "wave" and [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "3"]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(1.5, 4)]  # wave 2
    assert "1 of 4 decisions differ" in printed and "results.tsv: 3 waves" in printed
    assert variables["waves"].loc[2, ["keep", "discard", "crash", "best"]].tolist() == [1, 2, 1, "0.996000"]


def commit(folder, text, name="train.py"):
    """Makes a file's next commit in a repository in this folder; returns its short name."""
    (folder / name).write_text(text)
    author = "-c user.name=a -c user.email=a -c commit.gpgsign=false"
    script = f"git init -q; git add {name}; git {author} commit -qm x; git rev-parse --short=7 HEAD"
    return subprocess.check_output(["bash", "-ec", script], cwd=folder, text=True).strip()


def test_beside_its_repository_the_diffs_are_shown(analyse, tmp_path, monkeypatch):
    base, first, second = (commit(tmp_path, text) for text in ("1\n2\n3\n", "1\n2\n3\n4\n5\n", "1\n5\n"))
    text = f"{base} 0.997; {first} 0.99; {second} 0.98"
    variables, printed = analyse(table(text + "; fffffff 0.9; --output=made 0.9; HEAD 0.9"))
    assert variables["kept"]["diff"].tolist() == ["", "1 file, +2 −0", "1 file, +0 −3", "", "", ""]
    assert "git merge HEAD\n" in printed and not (tmp_path / "made").exists()
    variables, printed = analyse(table(text))
    whole = f"git diff {base} {second} -- train.py"
    assert f"{whole}   (1 file, +1 −2)\n" in printed and f"git merge {second}\n" in printed
    for command in (*variables["kept"]["see it"][1:], whole):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "\n@@ " in done.stdout
    third = commit(tmp_path, "a harness of its own", "prepare.py")
    assert "changes more than train.py: prepare.py" in analyse(table(f"{text}; {third} 0.5"))[1]
    monkeypatch.setenv("PATH", "")  # without git nothing but the diffs is missing
    _, printed = analyse(table(text))
    assert f"git merge {second}" in printed and "see it" not in printed


def test_runs_in_jupyter(tmp_path):
    (tmp_path / "results.tsv").write_text(NIGHT[:3000])
    for path in (NOTEBOOK, ROOT / "prepare.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--execute", "analysis.ipynb"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240)
    page = (tmp_path / "analysis.html").read_text()
    assert "Traceback" not in page and "Warning" not in page and "<th>keep rate</th>" in page
    assert "jp-RenderedImage" in page.split("</head>")[1]  # the head has styles of that name


@pytest.mark.parametrize(("name", "text", "vetoed"), [("night", NIGHT, []), ("waves", WAVES, ["c78c9d6"])])
def test_a_real_night(analyse, tmp_path, name, text, vetoed):
    """What agents ran by program.md at laptop scale: a hundred ideas one by one, and waves of four through Slurm.

    What was vetoed took more memory than the human allows."""
    variables, printed = analyse(text)
    assert f"results.tsv: {text.count(chr(10)) - 1} runs\n" in printed and "malformed" not in printed
    assert variables["kept"]["seeds"].iloc[[0, -1]].tolist() == [3, 3] and "fresh seeds, see above" in printed
    # Every decision follows from the rule, also where a discarded point lies far below the best score.
    experiments = variables["experiments"]
    assert experiments["commit"][experiments["differs"]].tolist() == vetoed
    assert experiments["bar"].isna().sum() == 1  # the baseline's
    drawn, committed = (plt.imread(path) for path in (tmp_path / "progress.png", ROOT / "tests" / f"{name}.png"))
    assert drawn.shape == committed.shape and np.abs(drawn - committed).mean() < 0.005  # else copy it from there
    if name == "night":  # the committed notebook shows it
        outputs = [output for cell in json.loads(NOTEBOOK.read_text())["cells"] for output in cell.get("outputs", ())]
        streams = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
        assert len(streams) == 6 and all(stream in printed for stream in streams)
