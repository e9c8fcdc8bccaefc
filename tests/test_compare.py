"""The comparison of runs, listed and drawn by images/compare.py."""

import importlib
import itertools
import re

import pytest
from conftest import ROOT, files, load
from matplotlib.colors import same_color
from matplotlib.text import Text
from torch import nn

import utils
from model import LeNet, layer_table, trace


@pytest.fixture(scope="module")
def compare():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "images")
        yield importlib.import_module("compare")


@pytest.fixture
def keep(small_run, tmp_path):
    """Keep a run like `small_run`, but for what is named, in the test's folder."""

    def keep(name, val_accuracy=(), layers=None, **changes):
        run = load(small_run, "last.pt") | {"name": name}
        run["dataset"] = changes.pop("dataset", "Glyphs")
        run["options"] |= changes
        run["layers"] = layers or run["layers"]
        for row, accuracy in zip(run["history"], val_accuracy):
            row["val_accuracy"] = accuracy
        if changes.get("full"):
            run["history"] = [
                {key: row[key] for key in utils.HISTORY[:4]} for row in run["history"]
            ]
        utils.save(run, tmp_path / "checkpoints" / name / "last.pt")
        return run

    return keep


@pytest.fixture
def listed(compare, tmp_path, capsys, figures):
    """Compare runs; return the words of the table by run, what follows it, and the figure."""

    def listed(*names):
        figures.clear()
        picture = tmp_path / "compare.png"
        line = [f"--output-dir={tmp_path}", f"--picture={picture}", *names]
        assert compare.main(line) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert re.split("  +", head) == [
            *("run", "data set", "epochs"),
            *("best validation accuracy", "what differs"),
        ]
        rest = [lines.pop()] if lines[-1].startswith("Picture: ") else []
        assert rest == [f"Picture: {picture}"] * len(figures)
        places = [line.index("Glyphs") for line in lines if "Glyphs" in line]
        assert {*places} <= {head.index("data set")}  # the columns are aligned
        return {re.split("  +", line)[0]: re.split("  +", line)[1:] for line in lines}, figures

    return listed


def layers_with(**modules):
    model = LeNet()
    for name, module in modules.items():
        setattr(model, name, module)
    return layer_table(trace(model))


def curves(ax):
    """Return by the name of the run what an axes shows: the line, and the label at its end."""
    names = [text.get_text() for text in ax.texts]
    return dict(zip(names, zip(ax.lines, ax.texts), strict=True))


# --- What is listed -------------------------------------------------------------------------------


def test_options_and_layers_that_differ_are_listed_and_no_others(keep, listed):
    keep("plain", [0.5, 0.8125, 0.7, 0.6])
    keep("quick", [0.5, 0.6, 0.7, 0.75], lr=0.1, batch_size=50)
    keep("relu", layers=layers_with(sig=nn.ReLU()))
    keep("wide", layers=layers_with(c3=nn.Conv2d(6, 20, 5), c5=nn.Conv2d(20, 120, 5)))
    rows, _ = listed()
    same, sigmoid = "batch-size 100; lr 0.05; ", "C1 C3 C5 F6: sigmoid"
    maps, relus = "C3: 16 5x5 kernels, stride 1", "C1 C3 C5 F6: relu"
    assert [words[-1] for words in rows.values()] == [
        f"{same}{sigmoid}; {maps}",
        f"batch-size 50; lr 0.1; {sigmoid}; {maps}",
        f"{same}{relus}; {maps}",
        f"{same}{sigmoid}; C3: 20 5x5 kernels, stride 1",
    ]
    assert list(rows) == ["plain", "quick", "relu", "wide"]  # without names, all in their order
    assert rows["plain"][:3] == ["Glyphs", "4 of 4", "81.25%"]  # of the best epoch
    assert rows["quick"][:3] == ["Glyphs", "4 of 4", "75.00%"]

    rows, _ = listed("relu", "plain")  # those two alone, in that order
    assert list(rows) == ["relu", "plain"]
    assert [words[-1] for words in rows.values()] == ["C1 C3 C5 F6: relu", "C1 C3 C5 F6: sigmoid"]


def test_layers_that_only_one_has_are_listed_with_it(keep, listed):
    deep = nn.Sequential(nn.Linear(120, 120), nn.Tanh(), nn.Linear(120, 84))
    keep("deep", layers=layers_with(f6=deep))
    keep("plain")
    rows, _ = listed()
    assert rows["deep"][-1] == "F6: 120 -> 120; F6: tanh; F7: linear; F7: 120 -> 84; F7: sigmoid"
    assert rows["plain"][-1] == "F6: 120 -> 84; F6: sigmoid"


@pytest.mark.filterwarnings("error")  # of an axis without a height
def test_runs_that_have_all_in_common_differ_in_nothing(keep, listed):
    for name in ("one", "other"):
        keep(name, [0.5] * 4)
    rows, _ = listed()
    assert rows == {name: ["Glyphs", "4 of 4", "50.00%"] for name in ("one", "other")}


def test_copied_folder_is_a_run_of_its_own_name(keep, listed, tmp_path):
    keep("one")
    (tmp_path / "checkpoints" / "one").rename(tmp_path / "checkpoints" / "renamed")
    rows, figures = listed()
    assert list(rows) == ["renamed"] == list(curves(figures["compare.png"].axes[0]))


# --- What is drawn --------------------------------------------------------------------------------


def test_curves_are_the_validation_loss_and_accuracy_of_each_run(keep, listed):
    runs = {name: keep(name, [0.3, 0.6, 0.7, last]) for name, last in (("a", 0.8), ("b", 0.9))}
    _, figures = listed()
    for ax, key, scale in zip(
        figures["compare.png"].axes, ("val_loss", "val_accuracy"), (1, 100), strict=True
    ):
        assert key[4:] in ax.get_ylabel().lower()
        assert ax.get_xlabel() == "Epoch"
        assert ax.get_title() == "LeNet-5 on Glyphs"
        shown = curves(ax)
        assert list(shown) == ["a", "b"]
        values = []
        for name, (line, label) in shown.items():
            values.append([scale * row[key] for row in runs[name]["history"]])
            assert line.get_xdata().tolist() == [1, 2, 3, 4]
            assert line.get_ydata() == pytest.approx(values[-1])
            assert label.xy == pytest.approx((4, values[-1][-1]))
            assert same_color(label.get_color(), line.get_color())
        assert not same_color(*(line.get_color() for line, _ in shown.values()))
        low, high = ax.get_ylim()
        later = [value for each in values for value in each[1:]]  # the first quarter is far away
        assert low < min(later) < max(later) < high
        if key == "val_accuracy":
            assert low > 30


def test_runs_on_other_data_or_another_limit_are_in_rows_of_their_own(keep, listed):
    """What they were validated on differs, so their numbers cannot be compared."""
    keep("a")
    keep("b", limit=None)
    keep("c", dataset="MNIST")
    keep("d")
    rows, figures = listed()
    axes = figures["compare.png"].axes
    assert [list(curves(ax)) for ax in axes] == [["a", "d"]] * 2 + [["b"]] * 2 + [["c"]] * 2
    assert [ax.get_title()[11:] for ax in axes] == ["Glyphs"] * 4 + ["MNIST"] * 2
    tops = [ax.get_position().y1 for ax in axes]
    assert tops[0] == pytest.approx(tops[1]) != pytest.approx(tops[2])
    assert [words[0] for words in rows.values()] == ["Glyphs", "Glyphs", "MNIST", "Glyphs"]


def test_full_runs_are_listed_but_not_drawn(keep, listed):
    keep("full", full=True)
    rows, figures = listed()
    assert rows == {"full": ["Glyphs", "4 of 4", "- (--full)"]}
    assert not figures
    keep("plain")
    rows, figures = listed()
    assert rows["full"][2:] == ["- (--full)", "full True"]
    assert rows["plain"][3] == "full False"
    assert [list(curves(ax)) for ax in figures["compare.png"].axes] == [["plain"]] * 2


@pytest.mark.parametrize("count", [2, 12])
def test_labels_of_curves_that_end_alike_do_not_overlap(keep, listed, count):
    for i in range(count):
        keep(f"run-{i:02}", [0.5, 0.7, 0.8, 0.9 + 0.0001 * i])
    figure = listed()[1]["compare.png"]
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without its line
        boxes.sort(key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))
        right = max(ax.transData.transform(line.get_xydata())[:, 0].max() for line in ax.lines)
        assert min(box.x0 for box in boxes) > right  # beside the curves, in the picture
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 + 1
        assert min(box.y0 for box in boxes) >= -1
    heights = [text.xyann[1] for text in figure.axes[1].texts]
    assert heights == sorted(heights)  # as the curves end
    middle = 100 * (0.9 + 0.0001 * (count - 1) / 2)
    assert sum(heights) / count == pytest.approx(middle)  # moved up and down alike


@pytest.mark.parametrize("places", [[1, 5, 3], [2, 2], [4, 0, 4.5], [7], [3, 3.1, 3.2, 0]], ids=str)
def test_labels_keep_their_order_and_their_mean_when_they_are_moved_apart(compare, places):
    moved = compare.spread(places, 1)
    assert sum(moved) == pytest.approx(sum(places))
    order = sorted(range(len(places)), key=lambda i: places[i])
    for before, after in itertools.pairwise(order):
        assert moved[after] - moved[before] >= 1 - 1e-9
    if places == [1, 5, 3]:  # they are far enough from each other
        assert moved == places


def test_run_of_one_epoch_and_one_that_was_stopped_can_be_drawn(keep, listed, tmp_path):
    run = keep("stopped")
    for name, epochs in (("stopped", 2), ("short", 1)):
        cut = run | {"name": name, "epoch": epochs, "history": run["history"][:epochs]}
        utils.save(cut, tmp_path / "checkpoints" / name / "last.pt")
    keep("long", epochs=9)
    rows, figures = listed("short", "stopped", "long")
    assert (rows["short"][1], rows["stopped"][1]) == ("1 of 4", "2 of 4")
    assert rows["long"][1] == "4 of 9"
    rows, figures = listed("short", "stopped")
    ends = [curves(ax)["short"][0].get_xdata().tolist() for ax in figures["compare.png"].axes]
    assert ends == [[1], [1]]
    for ax in figures["compare.png"].axes:  # beside the longer curve
        assert min(label.xyann[0] for _, label in curves(ax).values()) > 2
    rows, _ = listed("short")
    assert list(rows) == ["short"]


def test_picture_is_beside_the_script_unless_it_is_named(compare, keep, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    keep("one")
    assert compare.main([f"--output-dir={tmp_path}"]) == 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# --- What cannot be compared ----------------------------------------------------------------------


def test_no_run_and_an_unknown_one_are_errors_of_one_line(compare, keep, refused, tmp_path):
    folder = f"--output-dir={tmp_path}"
    error = refused(compare.main, folder)
    assert f"there is no run in {tmp_path / 'checkpoints'}: start one with train.py" in error
    keep("one")
    before = files(tmp_path)
    for names in (["another"], ["one", "another"]):
        error = refused(compare.main, folder, *names)
        assert f"{tmp_path / 'checkpoints' / 'another' / 'last.pt'}: it does not exist" in error
    assert files(tmp_path) == before
