"""The scripts as users run them: the first commands, notebooks, bad input, signals and pipes."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

import conftest
import train
import utils
from conftest import OFFLINE, ROOT, SMALL_RUN, evaluate, files, posix
from images import compare

TINY_RUN = ["--dataset=Glyphs", "--limit=100", "--epochs=1"]
PICTURES = [f"{ROOT / 'images' / name}" for name in ("lenet5.png", "metrics.png")]


def fail(error, *args, **kwargs):
    raise error


def copy_repository(directory, data_dir):
    """Copy it to a path with a space and umlauts; Glyphs is its only dataset."""
    copy = directory / "größere Übung"
    shutil.copytree(data_dir, copy / "data")
    for pattern in ("*.py", ".gitignore", "images/*.*", "images/page/*", "checkpoints/*.pt"):
        for path in ROOT.glob(pattern):
            (copy / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, copy / path.relative_to(ROOT))
    return copy


@pytest.fixture(scope="module")
def first_commands(tmp_path_factory, data_dir):
    """Start the first commands on an odd machine; return their process and the repository."""
    if os.name == "nt" or not shutil.which("git"):
        pytest.skip("needs POSIX and git")
    directory = tmp_path_factory.mktemp("first")
    copy = copy_repository(directory, data_dir)
    (directory / "elsewhere").mkdir()
    code = "import atexit, os\natexit.register(lambda: print(os.environ['MPLBACKEND']))\n"
    (directory / "sitecustomize.py").write_text(code)  # Python imports it at the start
    # Without a network, a home directory and UTF-8, and with an unknown matplotlib backend.
    odd = {"PATH": os.environ["PATH"], "HOME": "/dev/null", "PYTHONPATH": str(directory)}
    odd |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"}
    odd |= {"OMP_NUM_THREADS": "1", **OFFLINE}
    train, test = [shlex.join([sys.executable, f"{copy}/{name}.py"]) for name in ("train", "test")]
    command = "git init -q && git add . && cd ../elsewhere && "
    command += f"{train} --limit=2000 --epochs=1 && {test}"
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, shell=True, env=odd, cwd=copy, stdout=log, stderr=log)
    yield process, copy
    process.wait(300)


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_threads_spin_briefly_unless_the_user_decides_otherwise(tmp_path, script):
    code = "import os\nprint(os.environ['GOMP_SPINCOUNT'])\nraise SystemExit\n"
    (tmp_path / "torch.py").write_text(code)  # instead of torch, which reads it when imported
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env["PYTHONPATH"] = str(tmp_path)
    for setting, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command = [sys.executable, ROOT / script]
        assert subprocess.check_output(command, env=env | setting, text=True).strip() == expected


def test_sigterm_prints_a_command_that_continues_the_run(
    run_script, no_plots, options, finished_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *args: signal.raise_signal(signal.SIGTERM))
        status, _, err = run_script(train.main, *SMALL_RUN, *options("the output"))
    assert (status, signal.getsignal(signal.SIGTERM)) == (130, before)
    hint = re.fullmatch(r"\nStopped\. Epoch 1 is saved\. To continue: (.* --resume .*)\n", err)
    python, script, *argv = shlex.split(hint[1])
    assert [shutil.which(python), script] == [sys.executable, str(ROOT / "train.py")]
    train.main(argv)
    conftest.assert_same_run(tmp_path / "the output", finished_run)


def test_notebook_runs_edited_files(data_dir, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel").v4
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    checkout = copy_repository(tmp_path, data_dir)
    (checkout / "mine.py").touch()
    run = f"%run train.py {' '.join(TINY_RUN)} --name"
    edit = "path.write_text(code.replace('= nn.Sigmoid', '= nn.{}'))"
    cells = [
        f"import sys, torch, mine, pathlib\npath = pathlib.Path('model.py')\n{run} sigmoid",
        f"code = path.read_text()\n{edit.format('ReLU')}\n{run} relu",
        f"{edit.format('NoSuchLayer')}\n{run} fails",
        f"path.write_text('')\n{run} empty",
        f"{edit.format('Tanh')}\n{run} tanh",
        "import utils, model",
        "print(all(sys.modules[m.__name__] is m for m in (torch, mine, utils, model)))",
    ]
    notebook = nbformat.new_notebook(cells=[nbformat.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": checkout}}
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    errors = [output.ename for output in outputs if output.output_type == "error"]
    assert errors == ["AttributeError", "ImportError"]
    assert outputs[-1].text == "True\n"
    runs = [conftest.checkpoint(checkout, name=name) for name in ("sigmoid", "relu", "tanh")]
    layers = ("Sigmoid", "ReLU", "Tanh")
    assert compare.differences(runs) == [f"self.sig = nn.{layer}()" for layer in layers]
    assert not torch.equal(runs[0]["logits"], runs[1]["logits"])


def test_help_states_all_defaults(run_script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line is wrapped
    shared = ["auto", "its dataset", str(ROOT / "data"), str(ROOT), "auto"]
    own = "default|20|256|0.05|0.015|1 for digits, 0 for clothes|0.0|0|all".split("|")
    for main, rest in ((train.main, own), (evaluate.main, ["0"])):
        _, out, _ = run_script(main, "--help")
        assert re.findall(r"\(default.*?: (.*?)\)", out) == shared + rest


RANGES = "--epochs=0 --batch-size=0 --lr=0 --lr=nan --lr=1e999 --weight-decay=-1 --seed=-1"
RANGES += " --limit=0 --shift=29 --label-smoothing=1.5"
BAD_OPTIONS = {  # FLAG and VALUE are those of the option
    r"argument FLAG: must be from \S+ to \d+, not VALUE \(see python train.py --help\)\n": RANGES,
    "argument FLAG: invalid choice: 'VALUE'": "--dataset=mnist --recipe=best --device=tpu",
    "argument FLAG: invalid int value: 'VALUE'": "--epochs=2.5",
    "unrecognized arguments: FLAG=VALUE": "--epoch=3 --image=a.png",
    "FLAG: 'VALUE' cannot be a run name": "--name= --name=../a --name=a/b --name=.a --name=-x",
    "argument FLAG: 'VALUE' cannot be a run name; use": "--name=page --name=LONG",
}
not_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="needs a user")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CPU")
BAD_INPUT = [  # {} is a directory with a checkpoint of Glyphs, a text file and a locked directory
    pytest.param(train.main, "--output-dir={}/locked", "Permission denied; choose", marks=not_root),
    pytest.param(train.main, "--device=auto", r"cuda does .* use --device cpu\n", marks=no_cuda),
    (evaluate.main, "--checkpoint", "argument --checkpoint: expected one argument"),
    (train.main, "--data-dir={}/text --dataset=MNIST", "MNIST is missing and cannot be downloaded"),
    (train.main, "--output-dir={}/text", "Not a directory; choose another --output-dir"),
    (train.main, "--output-dir={}/LONG", "File name too long; choose another --output-dir"),
    (evaluate.main, "--checkpoint={}/best.pt --dataset=MNIST", "trained on Glyphs, not on MNIST"),
    (evaluate.main, "--checkpoint={}/none.pt", "cannot read {}/none.pt: No such file or directory"),
    (evaluate.main, "--checkpoint={}", "cannot read {}: Is a directory"),
    (evaluate.main, "--checkpoint={}/text", "{}/text is damaged, or was not written by this"),
    (evaluate.main, "--checkpoint=~/none.pt", "cannot read {}/none.pt: No such file or directory"),
    (evaluate.main, "--output-dir=~/none", "there is no run on Glyphs in {}/none/checkpoints"),
]
for pattern, words in BAD_OPTIONS.items():
    for word in words.split():
        flag, _, value = word.partition("=")
        message = pattern.replace("FLAG", flag).replace("VALUE", re.escape(value))
        BAD_INPUT.append((train.main, word, message))


@posix
@pytest.mark.parametrize(("main", "option", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(
    error_of, no_plots, options, finished_run, tmp_path, monkeypatch, main, option, message
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "locked").mkdir(mode=0o500)
    shutil.copy(finished_run / "checkpoints" / "Glyphs" / "best.pt", tmp_path)
    (tmp_path / "text").write_text("text")
    before = files(tmp_path)
    option = option.replace("{}", str(tmp_path)).replace("LONG", "x" * 300)
    message = message.replace("{}", re.escape(str(tmp_path))).replace("LONG", "x" * 300)
    run = TINY_RUN if main is train.main else ["--dataset=Glyphs"]
    err = error_of(main, *run, *options(tmp_path / "output"), *option.split())
    assert re.search(message, err)
    assert files(tmp_path) == before


def test_next_command_accepts_pictures(run_script, no_plots, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [f"--data-dir={data_dir}", f"--output-dir={tmp_path / 'my output'}", "--device=cpu"]
    _, out, _ = run_script(train.main, *TINY_RUN, "--name=a b", *paths)
    words = shlex.split(re.search(r"^Next: +(.*)$", out, re.MULTILINE)[1])
    assert words[1:6] == [str(ROOT / "test.py"), "--name", "a b", "--output-dir", "my output"]
    assert words[6:] == ["--data-dir", str(data_dir), "--device", "cpu"]
    argv = [*words[2:], "--image", PICTURES[0], "--image", PICTURES[1]]
    _, out, _ = run_script(evaluate.main, *argv)
    assert re.match("Weights: my output.checkpoints.a b.best.pt", out)
    assert re.findall(r"^(.*): \d", out, re.MULTILINE) == PICTURES


def test_only_programming_errors_have_a_traceback(run_script, error_of, monkeypatch):
    errors = [ZeroDivisionError(), KeyboardInterrupt(), OSError(28, "No space left on device")]
    monkeypatch.setattr(utils, "choose_device", lambda name: fail(errors.pop()))
    assert "No space left on device" in error_of(train.main)
    assert run_script(train.main) == (130, "", "\nStopped.\n")
    with pytest.raises(ZeroDivisionError):
        run_script(train.main)


def test_script_runs_in_a_thread_and_with_the_stream_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # it has no reconfigure either
    monkeypatch.setattr(sys, "exit", lambda status: print("status", status))
    thread = threading.Thread(target=utils.run_script, args=(lambda: print("hello"),))
    thread.start()
    thread.join()
    assert sys.stdout.getvalue() == "hello\nstatus 0\n"


def change_output(how):
    if how == "closed":
        os.close(1)
        sys.stdout = None
        return
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    if how == "Ctrl-C without reader":
        utils.batches = partial(fail, KeyboardInterrupt())


UNREAD = [
    ("closed", "train.py", 0, ""),
    ("without reader", "train.py", 141, ""),
    ("without reader", "test.py", 141, ""),
    ("Ctrl-C without reader", "train.py", 130, "\nStopped. No epoch has been saved yet.\n"),
]


@posix
@pytest.mark.parametrize(("how", "script", "status", "err"), UNREAD)
def test_unread_output(start_process, options, tmp_path, how, script, status, err):
    argv = TINY_RUN if script == "train.py" else ["--dataset=MNIST", "--image", PICTURES[0]]
    prepare = partial(change_output, how)
    process, log = start_process(script, *argv, *options(tmp_path), prepare=prepare)
    process.join(300)
    assert (process.exitcode, log.read_text()) == (status, err)
    assert err or len(files(tmp_path / "checkpoints")) == (2 if script == "train.py" else 0)


def test_simultaneous_runs_with_different_names(start_process, options, finished_run, tmp_path):
    started = []
    for name in "ab":
        argv = [*SMALL_RUN, f"--name={name}", *options(tmp_path / "output")]
        started.append(start_process("train.py", *argv))
    for process, log in started:
        process.join(300)
        assert process.exitcode == 0, log.read_text()
    for name in "ab":
        for file in ("best.pt", "last.pt"):
            run = conftest.checkpoint(tmp_path / "output", file, name) | {"name": "Glyphs"}
            expected = conftest.checkpoint(finished_run, file)
            assert conftest.comparable(run) == conftest.comparable(expected)
    assert len(files(tmp_path / "output")) == 2 * 4  # with metrics.csv and metrics.png


def test_first_commands_work_on_an_odd_machine(first_commands):
    process, copy = first_commands
    status, out = process.wait(300), (copy.parent / "log").read_text()
    assert (status, out.count("\nnonsense\n")) == (0, 2), out
    assert "TRAINING ON GLYPHS INSTEAD" in out
    assert "Glyphs: 1,002 images to train on, 998 for validation" in out
    assert "gr\\xf6\\xdfere \\xdcbung/checkpoints/Glyphs/best.pt, epoch 1" in out
    assert "Test accuracy on Glyphs: " in out
    changed = ["git", "ls-files", "--modified", "--others", "--exclude-standard"]
    assert subprocess.check_output(changed, cwd=copy) == b""
    assert not list((copy.parent / "elsewhere").iterdir())
