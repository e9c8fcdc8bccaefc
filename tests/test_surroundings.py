"""Where people really run it: notebooks, pipes, unpacked data, several at once, odd settings."""

import gzip
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    ARCHIVES,
    OFFLINE,
    ROOT,
    SMALL,
    TINY,
    files,
    finish,
    judge,
    load,
    options,
    picture_dir,
    posix,
    printed_rows,
    random_images,
    run_dir,
    with_ctrl_c,
)

import train
import utils
from model import LeNet


@pytest.fixture
def line(tmp_path, glyphs_dir):
    return [*TINY, *options(tmp_path, glyphs_dir)]


# --- Standard output that is no terminal ----------------------------------------------------------


@posix
def test_closed_standard_output(line, tmp_path):
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, ROOT / "train.py", *line]
    result = subprocess.run(shell, stderr=subprocess.PIPE, text=True, env=os.environ | OFFLINE)
    assert (result.returncode, result.stderr) == (0, "")
    assert load(tmp_path, "best.pt")


@posix
@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_reader_that_leaves_early(launch, line, glyphs_run, tmp_path, script):
    line = line if script == "train.py" else line[3:]
    shutil.copytree(glyphs_run / "checkpoints", tmp_path / "checkpoints")
    process = launch(ROOT / script, *line)
    process.stdout.close()
    assert process.wait(120) == 128 + signal.SIGPIPE
    assert "Error" not in process.stderr.read()
    utils.load_checkpoint(run_dir(tmp_path) / "last.pt")


@posix
def test_ctrl_c_that_ends_the_reader_first(launch, tmp_path, glyphs_dir):
    """As in python train.py 2>&1 | tee log."""
    line = ["--dataset=Glyphs", "--limit=1500", "--epochs=50", *options(tmp_path, glyphs_dir)]
    process = launch(ROOT / "train.py", *line, prepare=with_ctrl_c())
    assert any(printed_rows(text) for text in process.stdout)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert (picture_dir(tmp_path) / "metrics.png").exists()


def test_handlers_of_a_notebook_are_as_before(run_script, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="0"):
        utils.run_script(lambda: 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_script_runs_in_a_thread_with_a_stdout_of_another_kind(monkeypatch, capsys):
    class Stream:
        """As in a notebook: it has no reconfigure."""

        def write(self, text):
            return len(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Stream())
    statuses = []

    def run():
        with pytest.raises(SystemExit) as caught:
            utils.run_script(lambda: print("hello") or 0)
        statuses.append(caught.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert statuses == [0]


def test_notebook(tmp_path, few_glyphs):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    words = " ".join(["--dataset=Glyphs", "--epochs=2", *options(tmp_path, few_glyphs)])
    code = "from IPython.display import Image\nimport torch, utils, model\n"
    code += f"path = {str(run_dir(tmp_path) / 'best.pt')!r}\n"
    code += "network = model.LeNet()\n"
    code += "utils.restore(path, utils.load_checkpoint(path), network)\n"
    code += "print(network(torch.zeros(1, 1, 32, 32)).shape)"
    cells = [
        f"%run {ROOT / 'train.py'} {words}",
        f"%run {ROOT / 'train.py'} {words} --resume",
        f"%run {ROOT / 'test.py'} {words.split(' ', 2)[2]}",
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT}}).execute()
    texts = []
    for cell in notebook.cells:
        assert {output.output_type for output in cell.outputs} == {"stream"}, cell.outputs
        texts.append("".join(output.text for output in cell.outputs))
    assert len(printed_rows(texts[0])) == 2
    assert "already complete" in texts[1]
    assert "Test accuracy on Glyphs" in texts[2]
    assert "torch.Size([1, 10])" in texts[3]


# --- Settings of the user -------------------------------------------------------------------------


def test_settings_of_the_user_before_torch_and_matplotlib_are_imported():
    """A backend that this Python lacks does not matter; how long threads spin is the user's."""
    code = "import os, utils; print(os.environ['MPLBACKEND'], os.environ['GOMP_SPINCOUNT'])"
    environment = os.environ | {"MPLBACKEND": "nonsense", "GOMP_SPINCOUNT": "7"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **how)
    assert (result.stdout, result.stderr) == ("nonsense 7\n", "")
    del environment["GOMP_SPINCOUNT"]
    text = (ROOT / "utils.py").read_text(encoding="utf-8")
    head = text[text.index("import os\n") : text.index("import matplotlib\n")]
    result = subprocess.run(
        [sys.executable, "-c", f"{head}\n{code.partition(', utils')[0]}"], **how
    )
    assert result.returncode == 0
    code = f"{head}\nprint(os.environ['GOMP_SPINCOUNT'])"
    assert subprocess.run([sys.executable, "-c", code], **how).stdout == "3000\n"


def test_pictures_do_not_depend_on_the_users_style(run_script, small_run, tmp_path, glyphs_dir):
    line = [*SMALL, *options(tmp_path, glyphs_dir)]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "text.usetex": True}):
        status, out, _ = run_script(train.main, *line)
        assert matplotlib.rcParams["font.size"] == 30
    assert (status, "Best epoch: " in out) == (0, True)
    pictures = [picture_dir(folder) / "metrics.png" for folder in (tmp_path, small_run)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_picture_that_fails_after_the_training_is_a_warning(tmp_path, start, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such font")

    monkeypatch.setattr(utils, "plot_metrics", fail)
    assert start(tmp_path, *TINY) == 0
    out, err = capsys.readouterr()
    assert "metrics.png: no such font\n" in err.splitlines(keepends=True)[0][-30:]
    assert "Next: " in out


def test_scripts_import_what_sets_the_threads_before_torch():
    for script in ("train.py", "test.py"):
        text = (ROOT / script).read_text(encoding="utf-8")
        assert text.index("import utils") < text.index("import torch\n")


def test_home_that_is_not_known_is_an_error(refused, monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", unknown)
    for option in ("--data-dir", "--output-dir"):
        assert "Could not determine home directory" in refused(train.main, option, "~/runs")


def test_help_says_how_to_choose_a_gpu(capsys):
    with pytest.raises(SystemExit):
        judge.main(["--help"])
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().out


def test_table_stays_a_table_whatever_the_numbers(tmp_path, start, capsys):
    start(tmp_path, *TINY, "--weight-decay=1e4", "--epochs=2")
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "learning rate" in line)
    rows = [line for line in lines if printed_rows(line)]
    assert [len(row.removesuffix("  best so far")) for row in rows] == [len(header)] * 2
    assert [len(row.split()) >= 7 for row in rows] == [True] * 2


# --- Data -----------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(real_data, tmp_path):
    """MNIST's test split as people have it: one file without .gz, one packed anew."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        content = gzip.decompress((real_data / "MNIST" / "raw" / name).read_bytes())
        if "images" in name:
            (raw / name.removesuffix(".gz")).write_bytes(content)
        else:
            (raw / name).write_bytes(gzip.compress(content, 1))
    return raw


def test_unpacked_and_repacked_files_are_read(unpacked, real_data, tmp_path):
    before = files(unpacked)
    data, expected = (utils.load_images("MNIST", each, "test") for each in (tmp_path, real_data))
    assert all(map(torch.equal, data, expected))
    assert files(unpacked) == before


def test_unpacked_file_of_another_set_is_refused(unpacked, real_data, tmp_path, monkeypatch):
    name = "t10k-images-idx3-ubyte"
    other = (real_data / "FashionMNIST" / "raw" / f"{name}.gz").read_bytes()
    (unpacked / name).write_bytes(gzip.decompress(other))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [])
    with pytest.raises(utils.Unavailable, match=rf"{name}.gz is missing and cannot be fetched"):
        utils.load_images("MNIST", tmp_path, "test")


def test_missing_files_are_named_with_their_place_and_no_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [])
    (tmp_path / ARCHIVES[0]).touch()  # in the wrong folder
    before = set(tmp_path.rglob("*"))
    with pytest.raises(utils.Unavailable, match=r"put the 4 .gz files into .*MNIST.raw$"):
        utils.load_images("MNIST", tmp_path, "test")
    assert set(tmp_path.rglob("*")) == before


def test_unreadable_cache_is_called_so(few_glyphs, tmp_path, monkeypatch, capsys):
    shutil.copytree(few_glyphs / "Glyphs", tmp_path / "Glyphs")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    utils.load_images("Glyphs", tmp_path, "test")
    assert "Permission denied: making it anew" in capsys.readouterr().err


@posix
def test_several_first_runs_at_once_on_a_slow_server(real_data, tmp_path, launch):
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = (real_data / "MNIST" / "raw" / self.path.rpartition("/")[2]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for start in range(0, len(content), len(content) // 8 + 1):
                self.wfile.write(content[start : start + len(content) // 8 + 1])
                time.sleep(0.02)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); url = sys.argv.pop(1)\n"
        code += "from torchvision import datasets; datasets.MNIST.mirrors = [url]\n"
        code += "import train, utils; utils.run_script(train.main)\n"
        (tmp_path / "run.py").write_text(code)
        url = f"http://127.0.0.1:{server.server_port}/"
        environment = {"no_proxy": "127.0.0.1", "http_proxy": ""}
        line = [ROOT, url, "--dataset=MNIST", "--limit=100", "--epochs=1"]
        line += [f"--data-dir={tmp_path / 'data'}", "--device=cpu"]
        running = [
            launch(
                tmp_path / "run.py", *line, f"--output-dir={tmp_path / str(i)}", more=environment
            )
            for i in range(4)
        ]
        for process in running:
            status, out, err = finish(process)
            assert status == 0, err
            assert "MNIST: 100 images to train on" in out
            assert "Warning" not in err
        server.shutdown()
    assert not list((tmp_path / "data").rglob("*.tmp"))


# --- One's own code -------------------------------------------------------------------------------


def test_logits_are_plain_tensors():
    weights = torch.ones(3, 10, requires_grad=True)
    (utils.predict(LeNet(), random_images(3), 0.3, 0.3) * weights).sum().backward()
    assert weights.grad.shape == (3, 10)


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 28, 28), torch.zeros(2, 32, 32, dtype=torch.uint8), random_images(2)[0]],
    ids=["floats", "padded", "a single image"],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match="images are to be uint8, N x 28 x 28"):
        utils.predict(LeNet(), images, 0.3, 0.3)


@pytest.mark.parametrize("split", ["validation", "val", ""])
def test_splits_are_train_and_test_alone(tmp_path, split):
    with pytest.raises(ValueError, match="the splits are train and test"):
        utils.load_images("Glyphs", tmp_path, split)
    assert np.array_equal(list(tmp_path.iterdir()), [])
