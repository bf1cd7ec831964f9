"""The command as a process of its own: closed files, full disks, pipes, Ctrl-C, terminals."""

import os
import signal
import subprocess
import sys

import pytest

from mobilellm_fast.version import __version__

BROKEN = "the input is not valid UTF-8: invalid start byte"
LAUNCHER = """
import signal, sys, types
from fake_engine import FakeEngine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
engine = FakeEngine(script={script!r}, context=100_000)
engine_module = types.SimpleNamespace(Engine=types.SimpleNamespace(load=lambda *a, **k: engine))
sys.modules["mobilellm_fast.engine"] = engine_module
from mobilellm_fast.cli import main
sys.exit(main({argv!r}))
"""


def environment(**extra):
    """Return the environment of a process that buffers its output and imports what we can."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **extra}


def launch(argv, script=b"word " * 2000, env=None, **options):
    code = LAUNCHER.format(script=script, argv=argv)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env or environment(), stderr=subprocess.PIPE, **options
    )


class TestProcess:
    def test_a_closed_pipe_ends_quietly(self):
        argv = ["generate", "x", "--max-new-tokens", "10000"]
        with launch(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout.read(5) == b"word "
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0

    def test_a_full_disk_is_one_line(self):
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        with open("/dev/full", "wb") as full, launch(["generate", "x"], stdout=full) as process:
            assert process.stderr.read() == b"error: No space left on device\n"
        assert process.returncode == 1

    @pytest.mark.parametrize(
        ("argv", "closed", "message"),
        [
            (["generate", "x"], 1, "standard output must be open to write, got a closed one"),
            (["generate", "-"], 0, "standard input must be open to read, got a closed one"),
            (["chat"], 0, "standard input must be open to read, got a closed one"),
            (["score", "-"], 0, "standard input must be open to read, got a closed one"),
            (["generate", "a\udcff"], None, f"{BROKEN} at byte 1"),
            (["generate", "a", "--stop", "a\udcff"], None, f"{BROKEN} at byte 1"),
        ],
    )
    def test_closed_files_and_broken_arguments_are_one_line(self, argv, closed, message):
        def close():
            if closed is not None:
                os.close(closed)

        with launch(argv, preexec_fn=close) as process:
            assert process.stderr.read().decode() == f"error: {message}\n"
        assert process.returncode == 1

    def test_a_closed_standard_error_keeps_errors_out_of_the_output(self):
        code = LAUNCHER.format(script=b"", argv=["generate", "x", "--temperature", "-1"])
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(),
            stdout=subprocess.PIPE,
            preexec_fn=lambda: os.close(2),
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, b"")

    def test_messages_that_are_not_utf8_are_one_line_in_any_locale(self):
        env = environment(LC_ALL="C")
        pipe = subprocess.PIPE
        with launch(["chat"], b"yes", env=env, stdin=pipe, stdout=pipe) as process:
            _, err = process.communicate(b"a\xff\n", timeout=60)
        assert err == f"error: {BROKEN} at byte 1\n".encode()
        assert process.returncode == 1

    def test_messages_are_utf8_in_any_locale(self):
        # without these two Python takes UTF-8 in the locale C by itself
        env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        pipe = subprocess.PIPE
        with launch(["chat"], b"yes", env=env, stdin=pipe, stdout=pipe) as process:
            out, err = process.communicate("é 日本\n".encode(), timeout=60)
        assert (process.returncode, out, err) == (0, b"yes\n", b"")

    def test_ctrl_c_ends_generate_with_130(self):
        argv = ["generate", "x", "--max-new-tokens", "10000"]
        with launch(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout.read(5) == b"word "
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == b""
        assert out.endswith(b"\n")

    def test_ctrl_c_in_chat_stops_only_the_answer(self):
        argv = ["chat", "--max-new-tokens", "10000"]
        with launch(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdin.write(b"Hello\n")
            process.stdin.flush()
            assert process.stdout.read(5) == b"word "
            process.send_signal(signal.SIGINT)
            # the answer has ended once its line has; the program still takes a command
            while process.stdout.read(1) != b"\n":
                pass
            out, err = process.communicate(b"/exit\n", timeout=60)
        assert (process.returncode, out, err) == (0, b"", b"")

    def test_chat_at_a_terminal(self):
        pty = pytest.importorskip("pty")
        ours, theirs = pty.openpty()
        argv = ["chat", "--max-new-tokens", "10000"]
        with launch(argv, stdin=theirs, stdout=theirs) as process, open(ours, "r+b", 0) as person:
            os.close(theirs)

            def wait_for(text):
                seen = b""
                while text not in seen:
                    seen += person.read(1)

            wait_for(b"> ")
            person.write(b"Hello\n")
            wait_for(b"word word")
            process.send_signal(signal.SIGINT)  # in the answer: the end of its line, and the prompt
            wait_for(b"> ")
            person.write(b"\x04")  # Ctrl-D
            assert process.stderr.read() == b""
            assert process.wait(timeout=60) == 0

    def test_a_terminal_without_the_character_shows_another(self):
        env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        argv = ["generate", "x"]
        with launch(argv, "é!".encode(), env=env, stdout=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, b"?!\n", b"")

    def test_python_dash_m(self):
        result = subprocess.run(
            [sys.executable, "-m", "mobilellm_fast", "--version"],
            env=environment(),
            capture_output=True,
            timeout=60,
        )
        assert result.stdout == f"mobilellm-fast {__version__}\n".encode()

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys; from mobilellm_fast import cli; cli._parser().format_help();"
            "heavy = {'torch', 'rich', 'jinja2', 'tokenizers', 'mobilellm_fast.engine'};"
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
        assert done.stdout == b"[]\n"
