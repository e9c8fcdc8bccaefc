"""The scripts as a user runs them: exit status, the two streams, a machine without a network."""

import pickle

from conftest import ROOT

import train


def test_first_commands_on_a_machine_without_a_network(run_script, tmp_path):
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("data", "checkpoint", "image")]
    trained = run_script("train.py", "--limit=2000", "--epochs=1", "--batch-size=50", *folders)
    assert trained.returncode == 0, trained.stderr
    assert "TRAINING ON GLYPHS INSTEAD" in trained.stderr
    assert "Traceback" not in trained.stderr
    assert "Glyphs: 2,000 images to train on" in trained.stdout
    assert {p.name for p in (tmp_path / "checkpoint" / "Glyphs").iterdir()} == {
        "best.pt",
        "last.pt",
    }
    tested = run_script("test.py", *folders)
    assert tested.returncode == 0, tested.stderr
    assert not tested.stderr
    assert "Test accuracy on Glyphs:" in tested.stdout
    pictures = {"metrics.png", "metrics.csv", "predict.png", "confusion.png", "mistakes.png"}
    assert {p.name for p in (tmp_path / "image" / "Glyphs").iterdir()} == pictures


def expect_refusal(result, *words):
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert "error:" in result.stderr
    for word in words:
        assert word in result.stderr


def test_named_data_set_without_a_network_is_an_error(run_script, tmp_path):
    options = [f"--{name}-dir={tmp_path / name}" for name in ("data", "checkpoint", "image")]
    result = run_script("train.py", "--dataset=FashionMNIST", *options)
    expect_refusal(result, "train-images-idx3-ubyte.gz is missing", "github.com")
    assert not (tmp_path / "checkpoint").exists()


def test_hostile_checkpoint_is_one_line_and_status_2(run_script, tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(print))
    result = run_script("test.py", "--checkpoint", "weights.pt")
    expect_refusal(result, "test.py: error: weights.pt is damaged")


def test_help_states_the_defaults(run_script):
    folders = (ROOT / name for name in ("data", "checkpoints", "images"))
    defaults = ("auto", "default", 128, 0, *folders)
    text = "".join(run_script("train.py", "--help").stdout.split())
    for default in defaults:
        assert f"(default:{default})".replace(" ", "") in text
    assert "None" not in text
    for name, recipe in train.RECIPES.items():
        for value in (recipe.epochs, recipe.lr, recipe.weight_decay):
            assert f"{name}:{value}" in text
