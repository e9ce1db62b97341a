"""The scripts without their downloads: finding Python and ComfyUI, whose environment it is, what may be moved."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("scripts/test", "scripts/quickstart", "scripts/_environment.sh", ".ci/run")
BASH = shutil.which("bash")
UNTOUCHABLE = {"torch", "torchaudio", "torchvision", "numpy", "transformers"}

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def shell(command, root=ROOT, **environment):
    """Runs shell text with the functions of _environment.sh; ``root`` is the checkout it believes to be in."""
    text = f'set -uo pipefail\nROOT="{root}"\n. "{ROOT}/scripts/_environment.sh"\n{command}'
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "COMFYUI_PATH")}
    done = subprocess.run(
        [BASH, "-c", text], env={**kept, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)
    return path


def tools(folder, *names):
    """A folder with some of the system's programs alone, for a PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("bash", "dirname", "basename", "rm", "mkdir", "df", "awk", "cat", "uname", "grep", "tail", *names):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def comfyui(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "sd.py").touch()
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('# of a build\n__version__ = "0.1.2"\n')
    (folder / "requirements.txt").write_text("torch\ntorchsde\ntorchvision\n torchaudio>=2\nnumpy>=1.25\n# text\n")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run([BASH, "-n", str(ROOT / script)], check=True)
    if not script.endswith(".sh"):
        assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", ["scripts/test", "scripts/quickstart"])
def test_help_from_any_folder(script, tmp_path):
    done = subprocess.run([str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {script}")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_argument_of_quickstart_is_usage():
    assert (
        subprocess.run([str(ROOT / "scripts/quickstart"), "--fast"], capture_output=True, check=False).returncode == 2
    )


# --- Python ------------------------------------------------------------------------------------------------------


def test_a_python_that_serves_is_found():
    code, out, err = shell("find_python")
    assert code == 0, err
    found = subprocess.run([out, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    assert found.stdout.strip() in [f"(3, {minor})" for minor in range(10, 14)]


def test_no_python_or_an_old_one_is_a_sentence(tmp_path):
    path = tools(tmp_path / "bin")
    code, out, err = shell("find_python", PATH=str(path))
    assert (code, out) == (1, "")
    assert "Python 3.10 to 3.13 is needed and there is none here" in err
    program(path / "python3", '[ "$1" = --version ] && echo "Python 3.8.2" && exit; exit 1')
    code, _, err = shell("find_python", PATH=str(path))
    assert code == 1
    assert "there is Python 3.8.2 here" in err
    assert "PYTHON" in err


def test_an_old_python_before_a_good_one_is_passed_over(tmp_path):
    path = tools(tmp_path / "bin")
    program(path / "python3.12", "exit 127")  # as a version manager's stub without that version
    (path / "python3").symlink_to(sys.executable)
    code, out, err = shell("find_python", PATH=str(path))
    assert (code, out) == (0, str(path / "python3")), err


def test_a_wrong_choice_of_python_is_a_sentence():
    code, _, err = shell("find_python", PYTHON="/nowhere/python")
    assert code == 1
    assert "PYTHON=/nowhere/python is not Python 3.10 to 3.13" in err


# --- disk, network, environment ----------------------------------------------------------------------------------


def test_too_little_disk_is_a_sentence(tmp_path):
    assert shell(f'check_disk "{tmp_path}" 0')[0] == 0
    code, _, err = shell(f'check_disk "{tmp_path}" 9999999')
    assert code == 1
    assert re.search(r"has \d+ GB free, the environment needs 9999999 GB", err)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk became full"),
        ("NewConnectionError('<...>: Failed to establish a new connection')", "network did not let pip fetch torch"),
        ("ERROR: No matching distribution found for torch==2.11.0", "No matching distribution found"),
    ],
)
def test_why_pip_failed_is_a_sentence(tmp_path, log, words):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "install.log").write_text(log)
    code, _, err = shell("explain_pip torch", tmp_path)
    assert code == 1
    assert words in err
    assert len(err.splitlines()) == 1


def test_someone_else_s_environment_is_left_alone(tmp_path):
    mine = tmp_path / ".venv" / "pyvenv.cfg"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, err = shell("make_environment", tmp_path)
    assert code == 1
    assert "was not made by these scripts" in err
    assert mine.read_text() == "mine"


def test_an_active_environment_is_not_used(tmp_path):
    code, _, err = shell("make_environment", tmp_path, PYTHON=sys.executable, VIRTUAL_ENV="/elsewhere")
    assert code == 0, err
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    prefix = "import sys; print(sys.prefix)"
    code, out, _ = shell(f"\"$VENV/bin/python\" -c '{prefix}'", tmp_path)
    assert Path(out).samefile(tmp_path / ".venv")
    made = (tmp_path / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    assert shell("make_environment", tmp_path)[0] == 0  # again: as it is
    assert (tmp_path / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made
    (tmp_path / ".venv" / "bin" / "python").unlink()  # the Python it was made with is gone
    quick = program(
        tmp_path / "quick" / "python",
        f"""[ "$1" = -m ] && exec "{sys.executable}" -m venv --without-pip "$3"\nexec "{sys.executable}" "$@" """,
    )
    code, _, err = shell("make_environment", tmp_path, PYTHON=str(quick))
    assert code == 0, err
    assert "Making an environment" in err
    assert (tmp_path / ".venv" / "bin" / "python").exists()


def test_a_python_without_venv_is_a_sentence(tmp_path):
    stub = program(tmp_path / "bin" / "python", f'[ "$1" = -m ] && exit 1\nexec "{sys.executable}" "$@"')
    code, _, err = shell("make_environment", tmp_path / "repo", PYTHON=str(stub))
    assert code == 1
    assert "python3-venv" in err
    assert not (tmp_path / "repo" / ".venv").exists()


FAKE_PYTHON = r"""#!BASH
case "$*" in
"-m venv"*)
    folder="${*: -1}"
    rm -rf "$folder"
    mkdir -p "$folder/lib/python3.11/site-packages" "$folder/bin"
    cp "$0" "$folder/bin/python" ;;
*freeze*) printf 'torch==2.11.0+cpu\ntorchsde==0.2.6\n' ;;
*"pip install"*)
    echo "$0 $*" >>"ROOT/calls.txt"
    case "$*" in *index-url*) exit "${CPU_INDEX_CODE:-0}" ;; *hosts*) exit "${HOST_CODE:-0}" ;; esac ;;
*pytest*) echo "$COMFYUI_PATH $0 $*" >>"ROOT/tests.txt"; eval "${PYTEST:-echo 1 passed in 1.00s}" ;;
*ruff*) exit "${RUFF_CODE:-0}" ;;
esac
"""


def fake_environment(root):
    """A .venv whose Python notes what pip is asked for, in calls.txt, and pytest, in tests.txt."""
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / ".venv" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (root / ".venv" / ".made-by-nava-nodes").touch()
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON.replace("BASH", BASH).replace("ROOT", str(root)))
    python.chmod(0o755)


def noted(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("index_answers", [True, False])
def test_what_is_installed_on_a_machine_without_a_gpu(tmp_path, index_answers):
    fake_environment(tmp_path)
    path = tools(tmp_path / "bin", "cksum")
    code = "0" if index_answers else "1"
    done, _, err = shell("install_all test standalone,test", tmp_path, PATH=str(path), CPU_INDEX_CODE=code)
    assert done == 0, err
    calls = noted(tmp_path / "calls.txt")
    torch = [call for call in calls if "torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0" in call]
    assert ["--index-url" in call for call in torch] == ([True] if index_answers else [True, False])
    assert f"-e {tmp_path}[standalone,test]" in calls[-1]
    assert "constraints.txt" in calls[-1]
    assert (tmp_path / ".venv" / "constraints.txt").read_text() == "torch==2.11.0+cpu\n"

    def again():
        shell("install_all test standalone,test", tmp_path, PATH=str(path), CPU_INDEX_CODE=code)
        return len(noted(tmp_path / "calls.txt"))

    assert again() == len(calls)  # nothing new: nothing is asked for
    with (tmp_path / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert again() > len(calls)


def test_each_comfyui_gets_an_environment_of_its_own_requirements(tmp_path):
    fake_environment(tmp_path)
    old, new = comfyui(tmp_path / "ComfyUI"), comfyui(tmp_path / "ComfyUI-next")
    for each in (old, new):
        code, out, err = shell(f'install_comfyui "{each}"', tmp_path)
        assert code == 0, err
        home = tmp_path / ".venv" / "hosts" / each.name
        assert out == str(home / "bin" / "python")
        assert f"Installing the requirements of ComfyUI 0.1.2 at {each}" in err
        assert noted(tmp_path / "calls.txt")[-1].startswith(f"{out} -m pip install")
        assert f"-c {tmp_path / '.venv' / 'constraints.txt'}" in noted(tmp_path / "calls.txt")[-1]
        assert noted(home / "requirements.txt") == ["torchsde", "numpy>=1.25", "# text"]
    assert len(noted(tmp_path / "calls.txt")) == 2
    assert shell(f'install_comfyui "{new}"', tmp_path)[2] == ""  # again: as it is
    assert len(noted(tmp_path / "calls.txt")) == 2
    (new / "requirements.txt").write_text("torchsde>2\n")
    shell(f'install_comfyui "{old}"; install_comfyui "{new}"', tmp_path)
    assert len(noted(tmp_path / "calls.txt")) == 3
    code, out, err = shell(f'rm -rf "$VENV/hosts"; install_comfyui "{old}"', tmp_path, HOST_CODE="1")
    assert (code, out) == (1, "")
    assert "Installing ComfyUI's requirements failed" in err
    assert shell(f'install_comfyui "{old}"', tmp_path)[0] == 0  # a failed one is not taken for whole


def test_a_comfyui_s_environment_sees_the_packages_of_the_other(tmp_path):
    packages = f"lib/python3.{sys.version_info.minor}/site-packages"
    for home in (tmp_path / ".venv", tmp_path / "host"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (tmp_path / ".venv" / packages / "shared_package.py").write_text("place = 'base'")
    (tmp_path / ".venv" / packages / "own_package.py").write_text("place = 'base'")
    (tmp_path / "host" / packages / "own_package.py").write_text("place = 'host'")
    assert shell(f'see_packages "{tmp_path / "host"}"', tmp_path)[0] == 0
    code = "import own_package, shared_package; print(own_package.place, shared_package.place)"
    python = tmp_path / "host" / "bin" / "python"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.split() == ["host", "base"]


def test_with_a_gpu_torch_is_pypi_s(tmp_path):
    fake_environment(tmp_path)
    path = tools(tmp_path / "bin", "cksum")
    program(path / "nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
    assert shell("install_all quickstart standalone", tmp_path, PATH=str(path))[0] == 0
    calls = (tmp_path / "calls.txt").read_text()
    assert "torch==2.11.0" in calls
    assert "--index-url" not in calls


# --- ComfyUI -----------------------------------------------------------------------------------------------------


def find_by_python(root, environment):
    """What the host tests find by themselves, from a checkout at ``root``."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/host'); import comfy_host; "
        f"comfy_host.ROOT = pathlib.Path({str(root)!r}); print(comfy_host.find_comfyui() or '')"
    )
    kept = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("case", ["variable", "above", "home", "none", "nowhere", "wrong"])
def test_comfyui_is_found_where_it_may_be(tmp_path, case):
    home, above, chosen = tmp_path / "home", tmp_path / "studio", tmp_path / "chosen"
    root = tmp_path / "checkout"
    environment = {"HOME": str(home)}
    expected = ""
    if case != "nowhere":
        expected = comfyui(home / "comfy" / "ComfyUI")
    if case in ("above", "none", "variable"):
        expected = comfyui(above)
        root = above / "custom_nodes" / "nava-nodes"
    if case == "variable":
        expected = comfyui(chosen)
        environment["COMFYUI_PATH"] = str(chosen)
    if case in ("none", "wrong"):
        environment["COMFYUI_PATH"] = "none" if case == "none" else str(tmp_path)
        expected = ""
    root.mkdir(parents=True)
    code, out, _ = shell("find_comfyuis | sed -n 1p", root, **environment)
    assert code == 0
    assert out == str(expected)
    assert find_by_python(root, environment) == str(expected)


def test_every_comfyui_is_found_once(tmp_path):
    home = tmp_path / "home"
    expected = [comfyui(home / "comfy" / name) for name in ("ComfyUI", "ComfyUI-0.1", "ComfyUI-0.2 with a space")]
    (home / "comfy" / "ComfyUI-same").symlink_to(expected[1])
    (home / "comfy" / "ComfyUI-empty").mkdir()
    assert shell("find_comfyuis", HOME=str(home))[1].splitlines() == [str(each) for each in expected]
    root = expected[2] / "custom_nodes" / "nava-nodes"
    root.mkdir(parents=True)
    found = shell("find_comfyuis", root, HOME=str(home))[1].splitlines()
    assert found == [str(expected[2]), str(expected[0]), str(expected[1])]
    assert shell("find_comfyuis", HOME=str(tmp_path)) == (0, "", "")


# --- scripts/test ------------------------------------------------------------------------------------------------


def run_scripts_test(root, *arguments, **environment):
    """scripts/test of a checkout at ``root`` with a fake .venv: (exit code, standard output, what pytest was asked)."""
    (root / "scripts").mkdir(exist_ok=True)
    for name in ("test", "_environment.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    if not (root / ".venv").exists():
        fake_environment(root)
    (root / "tests.txt").unlink(missing_ok=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "COMFYUI_PATH")}
    done = subprocess.run(
        [root / "scripts" / "test", *arguments],
        env={**kept, "HOME": str(root / "home"), **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    calls = [line.replace(str(root), "").split(" -m pytest --color=no ") for line in noted(root / "tests.txt")]
    return done.returncode, done.stdout, sorted(calls, key=lambda call: (call[0] != NONE, call))  # all begin at once


NONE, BASE = "none /.venv/bin/python", "/.venv/hosts/{0}/bin/python"


@pytest.fixture
def two_comfyuis(tmp_path):
    """A checkout's folder, with two ComfyUIs in its home; what pytest is started with for each."""
    names = ("ComfyUI", "ComfyUI-next")
    for name in names:
        comfyui(tmp_path / "home" / "comfy" / name)
    return tmp_path, [f"/home/comfy/{name} {BASE.format(name)}" for name in names]


def test_all_tests_run_on_every_comfyui(two_comfyuis):
    root, (old, new) = two_comfyuis
    code, out, calls = run_scripts_test(root)
    assert code == 0
    assert calls == [[NONE, "tests/core"], *([each, "tests/host tests/browser"] for each in (old, new))]
    assert out.splitlines()[-6:] == [
        "",
        "without ComfyUI: 1 passed in 1.00s",
        f"ComfyUI 0.1.2 at {root}/home/comfy/ComfyUI: 1 passed in 1.00s",
        f"ComfyUI 0.1.2 at {root}/home/comfy/ComfyUI-next: 1 passed in 1.00s",
        "all passed",
        "3 passed in 3.00s",
    ]


def test_arguments_choose_what_is_run(two_comfyuis):
    root, hosts = two_comfyuis

    def asked(*arguments):
        return run_scripts_test(root, *arguments)[2]

    assert asked("tests/core", "-k", "unipc") == [[NONE, "-k unipc tests/core"]]
    assert asked("./tests/core/test_a.py::test_b", f"{root}/tests/host/test_c.py", "-x") == [
        [NONE, "-x tests/core/test_a.py::test_b"],
        *([each, "-x tests/host/test_c.py"] for each in hosts),
    ]
    assert asked("tests/browser") == [[each, "tests/browser"] for each in hosts]
    assert [call[1] for call in asked("tests", "-q")] == ["-q tests/core", *["-q tests/host tests/browser"] * 2]
    assert asked("-m", "a and b")[0] == [NONE, "-m a and b tests/core"]


def test_a_failure_on_one_comfyui_is_told_at_the_end(two_comfyuis):
    root, _ = two_comfyuis
    outcome = """case "$0" in
    *ComfyUI-next*)
        echo 'FAILED tests/host/test_a.py::test_b - Wrong'
        echo '1 failed, 2 passed, 1 warning in 2.50s (0:00:02)'
        exit 1 ;;
    *) echo '3 passed, 1 skipped in 1.00s' ;;
    esac"""
    code, out, _ = run_scripts_test(root, PYTEST=outcome)
    last = out.splitlines()[-6:]
    name = f"ComfyUI 0.1.2 at {root}/home/comfy/ComfyUI-next"
    assert code == 1
    assert last[0] == f"FAILED tests/host/test_a.py::test_b - Wrong  [{name}]"
    assert last[3] == f"{name}: 1 failed, 2 passed, 1 warning in 2.50s (0:00:02)"
    assert last[4:] == [f"failed: {name}", "1 failed, 8 passed, 2 skipped, 1 warning in 4.50s"]


MEET = """touch "$HOME/$$.here"
for _ in $(seq 100); do
    [ "$(ls "$HOME"/*.here | wc -l)" -lt 3 ] || break
    sleep 0.1
done
ls "$HOME"/*.here | wc -l | sed 's/$/ passed in 1.00s/'"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: one after the other")
def test_all_have_their_turn_at_the_same_time(two_comfyuis):
    root, _ = two_comfyuis
    code, out, _ = run_scripts_test(root, PYTEST=MEET)
    assert code == 0
    assert out.splitlines()[-1].startswith("9 passed")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: one after the other")
def test_an_interruption_ends_all_that_runs(two_comfyuis):
    root, _ = two_comfyuis
    run_scripts_test(root, "tests/core")  # makes the environment
    wait = """echo $$ >>"$HOME/pids"; exec sleep 60"""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "COMFYUI_PATH")}
    process = subprocess.Popen(
        [root / "scripts" / "test"], env={**kept, "HOME": str(root / "home"), "PYTEST": wait},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    pids = root / "home" / "pids"
    until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_exit_codes(two_comfyuis):
    root, _ = two_comfyuis
    nothing = "echo 'no tests ran in 0.01s'; exit 5"
    assert run_scripts_test(root, PYTEST=nothing)[0] == 5
    assert run_scripts_test(root, PYTEST=f'case "$0" in *next*) {nothing} ;; esac; echo 1 passed in 1s')[0] == 0
    code, out, _ = run_scripts_test(root, RUFF_CODE="1")
    assert code == 1
    assert "failed: ruff check; ruff format" in out
    assert run_scripts_test(root, PYTEST="exit 3")[0] == 3


def test_a_comfyui_that_cannot_be_set_up_does_not_stop_the_others(two_comfyuis):
    root, _ = two_comfyuis
    code, out, calls = run_scripts_test(root, HOST_CODE="1")
    assert code == 1
    assert [call[1] for call in calls] == ["tests/core"]
    assert out.count("not run, its requirements could not be installed") == 2


def test_without_comfyui_it_is_said_that_host_tests_were_not_run(two_comfyuis):
    root, _ = two_comfyuis
    code, out, calls = run_scripts_test(root, COMFYUI_PATH="none")
    assert code == 0
    assert [call[0] for call in calls] == [NONE, NONE]  # what of them needs no ComfyUI
    assert "host tests not run: no ComfyUI found" in out
    code, out, calls = run_scripts_test(root, "tests/core", COMFYUI_PATH="none")
    assert [call[1] for call in calls] == ["tests/core"]
    code, out, calls = run_scripts_test(root, COMFYUI_PATH=str(root / "home" / "comfy" / "ComfyUI-next"))
    assert len(calls) == 2


def quickstart_functions(command, root):
    """Runs shell text with quickstart's functions, its last part left out."""
    text = (ROOT / "scripts" / "quickstart").read_text().split('case "${1:-}" in')[0]
    functions = text[text.index("OUT=") :]
    return shell(f"{functions}\n{command}", root)


def test_the_pack_is_linked_once_and_nothing_is_replaced(tmp_path):
    root, comfy = tmp_path / "check out", comfyui(tmp_path / "ComfyUI")
    root.mkdir()
    link = comfy / "custom_nodes" / "nava-nodes"
    for said in ("Linked the pack into ComfyUI", "The pack is in ComfyUI"):
        code, _, err = quickstart_functions(f'link_pack "{comfy}"', root)
        assert code == 0
        assert said in err
        assert link.resolve() == root
    link.unlink()
    link.mkdir()
    assert "another copy of the pack" in quickstart_functions(f'link_pack "{comfy}"', root)[2]
    assert list(link.iterdir()) == []
    link.rmdir()
    inside = comfy / "custom_nodes" / "my-clone"
    inside.mkdir()
    assert "The pack is in ComfyUI" in quickstart_functions(f'link_pack "{comfy}"', inside)[2]
    assert not link.exists()


def test_the_workflow_gets_small_models(tmp_path):
    spec = importlib.util.spec_from_file_location("run_workflow", ROOT / "scripts" / "run_workflow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph = {
        "1": {"class_type": "NavaLoadBackbone", "inputs": {"file": "NAVA.safetensors", "weight_dtype": "auto"}},
        "2": {"class_type": "NavaEmptyLatent", "inputs": {"seconds": 6.0, "preset": "landscape 1280x704"}},
        "3": {"class_type": "NavaSampler", "inputs": {"model": ["1", 0], "steps": 50}},
        "4": {"class_type": "SaveVideo", "inputs": {"filename_prefix": "a.safetensors"}},
    }
    small = module.small_graph(json.loads(json.dumps(graph)), {"backbone": "NAVA_tiny.safetensors"})
    assert small["1"]["inputs"] == {"file": "NAVA_tiny.safetensors", "weight_dtype": "auto"}
    assert small["2"]["inputs"] == {"seconds": 1.0, "preset": "custom"}
    assert small["3"]["inputs"] == {"model": ["1", 0], "steps": 8}
    assert small["4"] == graph["4"]


# --- packaging ---------------------------------------------------------------------------------------------------


def requirement_name(line):
    return re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0].lower().replace("_", "-")


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_requirements_cannot_move_a_user_s_torch():
    from importlib import metadata

    open_names, closure = [requirement_name(line) for line in requirements()], set()
    while open_names:
        name = open_names.pop()
        if name in closure:
            continue
        closure.add(name)
        needs = [need for need in metadata.requires(name) or () if "extra ==" not in need and "extra==" not in need]
        open_names += [requirement_name(need) for need in needs]
    assert {"av", "ftfy", "safetensors", "sentencepiece"} <= closure
    assert not closure & UNTOUCHABLE
    for line in requirements():
        assert not re.search(r"==|<|~=|@|--", line), f"{line} could take a newer version away"


def test_requirements_are_the_package_s_own():
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)[1]
    assert sorted(re.findall(r'"([^"]+)"', declared)) == sorted(requirements())
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif(not os.environ.get("NAVA_TEST_FRESH_CLONE"), reason="downloads 5 GB: set NAVA_TEST_FRESH_CLONE=1")
def test_both_commands_from_a_fresh_clone_with_an_empty_home(tmp_path):
    clone, home = tmp_path / "a fresh clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "HOME": str(home), "COMFYUI_PATH": "none"}
    for _ in range(2):  # the second run is quick and ends the same
        made = subprocess.run(
            [clone / "scripts" / "quickstart"], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr
        assert str(clone / "demo" / "clip.mp4") in made.stdout
    tested = subprocess.run(
        [clone / "scripts" / "test", "tests/core/test_geometry.py"],
        cwd=home, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "all passed" in tested.stdout
