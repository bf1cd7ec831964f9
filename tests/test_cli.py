"""The command line over a fake engine: output, exit codes, errors."""

import csv
import dataclasses
import io
import json
import re
import sys
import types

import pytest
from fake_engine import FakeEngine

from mobilellm_fast import cli
from mobilellm_fast.errors import CheckpointError
from mobilellm_fast.generate import Options, score
from mobilellm_fast.version import __version__

SCRIPT = "Grüße 🙂\nbye".encode()


class Loader:
    """Stands in for the Engine class; remembers what was loaded."""

    def __init__(self, engine):
        self.engine = engine
        self.calls = []

    def load(self, source=None, **options):
        self.calls.append((source, options))
        if isinstance(self.engine, Exception):
            raise self.engine
        return self.engine


@pytest.fixture
def install(monkeypatch):
    """Make `Engine.load` return a given engine, and `_C` answer `info` and `bench`."""

    def install(engine):
        loader = Loader(engine)
        extension = types.SimpleNamespace(
            supported_isas=lambda: ["avx2", "scalar"], read_bandwidth=lambda threads: threads * 1e9
        )
        monkeypatch.setitem(
            sys.modules, "mobilellm_fast.engine", types.SimpleNamespace(Engine=loader)
        )
        monkeypatch.setitem(sys.modules, "mobilellm_fast._C", extension)
        return loader

    return install


@pytest.fixture
def stdin(monkeypatch):
    def stdin(text):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return stdin


class TestGenerate:
    def test_prints_the_answer_and_ends_the_line(self, install, capsys):
        install(FakeEngine(script=SCRIPT))
        assert cli.main(["generate", "Say hello"]) == 0
        out, err = capsys.readouterr()
        assert out == "Grüße 🙂\nbye\n"
        assert err == ""

    def test_adds_no_second_newline(self, install, capsys):
        install(FakeEngine(script=b"line\n"))
        assert cli.main(["generate", "x"]) == 0
        assert capsys.readouterr().out == "line\n"

    def test_options_reach_the_model(self, install, capsys):
        loader = install(FakeEngine(script=SCRIPT))
        model = ["--model", "some/model", "--revision", "r1", "--format", "int8"]
        model += ["--threads", "3", "--isa", "avx2", "--kv-format", "int8"]
        generation = ["--max-new-tokens", "50", "--temperature", "0.5", "--top-k", "9"]
        generation += ["--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.1"]
        generation += ["--seed", "3", "--stop", "🙂", "--stop", "never"]
        assert cli.main(["generate", "x", *model, *generation]) == 0
        expected = {"format": "int8", "threads": 3, "revision": "r1", "isa": "avx2"}
        expected["kv_format"] = "int8"
        assert loader.calls == [("some/model", expected)]
        assert capsys.readouterr().out == "Grüße \n"

    def test_n_is_as_in_bench_and_the_runner(self, install, capsys):
        install(FakeEngine(script=b"abcdef"))
        assert cli.main(["generate", "x", "-n", "3"]) == 0
        assert capsys.readouterr().out == "abc\n"

    def test_every_option_of_the_api_is_offered(self):
        names = {field.name for field in dataclasses.fields(Options)}
        assert names == {*cli.GENERATION_OPTIONS, "stop"}

    def test_verbose_prints_timings_to_stderr(self, install, capsys):
        install(FakeEngine(script=SCRIPT))
        assert cli.main(["generate", "abc", "--verbose"]) == 0
        out, err = capsys.readouterr()
        assert out == "Grüße 🙂\nbye\n"
        assert "prefill: 4 tokens in " in err
        assert f"decode: {len(SCRIPT)} tokens in " in err
        assert "finish reason: stop" in err

    @pytest.mark.parametrize("text", ["piped é", "piped é\n", "\ufeffpiped é\r\n"])
    def test_dash_reads_stdin_without_the_last_newline(self, install, stdin, capsys, text):
        loader = install(FakeEngine(script=b"ok"))
        stdin(text)
        assert cli.main(["generate", "-"]) == 0
        assert bytes(loader.engine.prompts[0][1:]) == "piped é".encode()

    def test_ctrl_c_keeps_what_was_said_and_returns_130(self, install, capsys):
        install(FakeEngine(script=b"abcdef", interrupt_at=3))
        assert cli.main(["generate", "x"]) == 130
        out, err = capsys.readouterr()
        assert (out, err) == ("abc\n", "")


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["generate", ""], "prompt must not be empty"),
            (["generate", "x" * 600], "context of 512 tokens"),
            (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1"),
            (["generate", "x", "--temperature", "-1"], "temperature must be"),
            (["generate", "x", "--temperature", "nan"], "temperature must be"),
            (["generate", "x", "--top-p", "1.5"], "top_p must be"),
            (["generate", "x", "--stop", ""], "stop must be"),
            (["score", "/no/such/file"], "/no/such/file: No such file"),
            (["score", "/"], "/: Is a directory"),
            (["score", "-"], "[score] text must not be empty"),
            (["bench", "-r", "0"], "repetitions must be"),
            (["bench", "-p", "0"], "prompt_tokens must be"),
            (["bench", "-p", "-n"], "must be given"),
            (["bench", "--batch", "0"], "batch must be an integer >= 1, got 0"),
            (["bench", "--batch", "65"], "batch must be at most 64, got 65"),
            (["bench", "-p", "600"], "within the context, 512, got 600"),
        ],
    )
    def test_one_line_and_exit_code_1(self, install, stdin, capsys, argv, message):
        install(FakeEngine())
        stdin("")
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
        assert out == ""

    def test_loading_errors_are_one_line_even_if_their_text_is_not(self, install, capsys):
        for error, line in (
            (CheckpointError("bad\nfile"), "bad file"),
            (PermissionError(13, "Permission denied", "/c"), "/c: Permission denied"),
            (OSError("no route"), "no route"),
            (MemoryError(), "MemoryError"),
        ):
            install(error)
            assert cli.main(["generate", "x"]) == 1
            assert capsys.readouterr().err == f"error: {line}\n"

    def test_bad_options_are_found_before_a_model_is_loaded(self, install):
        loader = install(FakeEngine())
        assert cli.main(["generate", "x", "--top-k", "0"]) == 1
        assert cli.main(["chat", "--min-p", "2"]) == 1
        assert cli.main(["bench", "-r", "0"]) == 1
        assert cli.main(["score", "/no/such/file"]) == 1
        assert loader.calls == []

    def test_a_file_that_is_not_utf8(self, install, tmp_path, capsys):
        install(FakeEngine())
        (tmp_path / "f").write_bytes(b"abc\xff")
        assert cli.main(["score", str(tmp_path / "f")]) == 1
        assert capsys.readouterr().err == (
            f"error: {tmp_path}/f: not valid UTF-8 (invalid start byte at byte 3)\n"
        )

    def test_input_that_is_not_utf8(self, install, stdin, capsys):
        install(FakeEngine())
        stdin(b"abc\xff")
        assert cli.main(["generate", "-"]) == 1
        assert capsys.readouterr().err == (
            "error: the input is not valid UTF-8: invalid start byte at byte 3\n"
        )

    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["sing"],
            ["generate"],
            ["generate", "x", "--top-k", "many"],
            ["bench", "-o", "x"],
            ["pack", "x", "--threads", "1"],
        ],
    )
    def test_wrong_usage_is_exit_code_2(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "usage: mobilellm-fast" in capsys.readouterr().err

    def test_an_unknown_option_gets_the_usage_of_its_command(self, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["generate", "x", "--max-tokens", "4"])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("usage: mobilellm-fast generate ")
        assert "--max-new-tokens" in err
        assert err.endswith("fast generate: error: unrecognized arguments: --max-tokens 4\n")


class TestHelp:
    @pytest.mark.parametrize("command", [None, "generate", "chat", "score", "info", "bench"])
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"] if command else ["--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "usage: mobilellm-fast" in out
        assert command or "examples:" in out

    def test_version(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert capsys.readouterr().out == f"mobilellm-fast {__version__}\n"


class TestChat:
    def test_each_line_of_a_pipe_is_a_message_and_the_history_is_kept(self, install, stdin, capsys):
        loader = install(FakeEngine(script=b"Hi!"))
        stdin("Hello\n\n  How are you?  \n")
        assert cli.main(["chat", "--system", "Be brief."]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == ("Hi!\nHi!\n", "")
        decode = loader.engine.tokenizer.decode
        assert [decode(p, skip_special_tokens=False) for p in loader.engine.prompts] == [
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
            "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
        ]

    def test_a_pipe_may_begin_with_a_byte_order_mark(self, install, stdin):
        loader = install(FakeEngine(script=b"Hi!"))
        stdin("\ufeffHello\r\n")
        assert cli.main(["chat"]) == 0
        (prompt,) = loader.engine.prompts
        text = loader.engine.tokenizer.decode(prompt, skip_special_tokens=False)
        assert "<|im_start|>user\nHello<|im_end|>" in text

    def test_exit_and_clear(self, install, stdin, capsys):
        loader = install(FakeEngine(script=b"Hi!"))
        stdin("one\n/clear\ntwo\n/exit\nthree\n")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().out == "Hi!\nHi!\n"
        last = loader.engine.tokenizer.decode(loader.engine.prompts[-1])
        assert "two" in last
        assert "one" not in last

    def test_help_is_not_for_the_model(self, install, stdin, capsys):
        loader = install(FakeEngine(script=b"Hi!"))
        stdin("/help\n")
        assert cli.main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert (out, loader.engine.prompts) == ("", [])
        assert err.startswith("Ctrl-C stops an answer")
        assert "/exit" in err

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, install, stdin, capsys):
        loader = install(FakeEngine(script=b"abcdef", interrupt_at=3))
        stdin("one\ntwo\n")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().out == "abc\nabc\n"
        assert "assistant\nabc" in loader.engine.tokenizer.decode(loader.engine.prompts[-1])

    def test_a_model_that_cannot_chat_says_so_before_the_first_question(
        self, install, stdin, capsys
    ):
        no_system = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
        for template, error in ((None, "no chat template"), (no_system, "no system role")):
            loader = install(FakeEngine(template=template))
            stdin("")
            assert cli.main(["chat", "--system", "Be brief."]) == 1
            assert error in capsys.readouterr().err
            assert loader.engine.calls == []

    def test_a_full_context_ends_a_pipe_with_an_error(self, install, stdin, capsys):
        install(FakeEngine(script=b"Hi!", context=40))
        stdin("Hello\n" * 5)
        assert cli.main(["chat"]) == 1
        out, err = capsys.readouterr()
        assert out == "Hi!\n"
        assert "messages must be shorter than the context of 40 tokens" in err


class TestInteractiveChat:
    @pytest.fixture
    def person(self, install, monkeypatch):
        """Someone at a terminal who types lines, or presses Ctrl-C (KeyboardInterrupt)."""

        def person(engine, *inputs):
            loader = install(engine)
            lines = iter(inputs)

            def typed(prompt=""):
                line = next(lines, EOFError)
                if isinstance(line, str):
                    return line
                raise line

            monkeypatch.setattr("builtins.input", typed)
            monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
            return loader

        return person

    def test_ctrl_c_at_the_prompt_stays(self, person, capsys):
        person(FakeEngine(script=b"Hi!"), KeyboardInterrupt, "Hello", KeyboardInterrupt)
        assert cli.main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert out == "Hi!\n"
        assert err.count("Ctrl-D or /exit leaves") == 2

    def test_a_full_context_keeps_the_program(self, person, capsys):
        loader = person(FakeEngine(script=b"Hi!", context=40), "Hello", "Hello", "/clear", "again")
        assert cli.main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert out == "Hi!\nHi!\n"
        assert err.startswith("error: ")
        assert "/clear starts a new conversation" in err
        assert "again" in loader.engine.tokenizer.decode(loader.engine.prompts[-1])


class TestScore:
    def test_prints_tokens_nll_and_perplexity(self, install, tmp_path, capsys):
        install(FakeEngine())
        file = tmp_path / "text.txt"
        file.write_bytes(b"Zeile\r\n")
        expected = score(FakeEngine(), "Zeile\r\n")
        assert cli.main(["score", str(file)]) == 0
        assert capsys.readouterr().out == (
            f"tokens: 8\nnll: {expected.nll:.6f}\nperplexity: {expected.perplexity:.4f}\n"
        )

    def test_a_long_text_needs_a_window(self, install, stdin, capsys):
        install(FakeEngine(context=64))
        stdin("long " * 100)
        assert cli.main(["score", "-"]) == 1
        assert "context of 64 tokens unless a window is given" in capsys.readouterr().err
        stdin("long " * 100)
        assert cli.main(["score", "-", "--window", "64"]) == 0
        assert capsys.readouterr().out.startswith("tokens: 501\n")


class TestInfoAndBench:
    def test_info(self, install, capsys):
        install(FakeEngine())
        assert cli.main(["info"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "model: fake" in lines
        assert "tokenizer: bytes" in lines
        assert "format: fp32, 32.00 bits per weight" in lines
        assert "instruction set: scalar (here: avx2, scalar)" in lines
        assert "threads: 2" in lines

    def test_timings_tell_what_was_guessed_and_reused(self, install, stdin, capsys):
        install(FakeEngine(script=b"Hi!"))
        stdin("one\ntwo\n")
        assert cli.main(["chat", "--verbose", "--prompt-lookup", "2"]) == 0
        err = capsys.readouterr().err
        assert err.count(" reused") == 1
        argv = ["generate", "abcabc", "--verbose", "--prompt-lookup", "2"]
        install(FakeEngine(script=b"abcabcabc"))
        assert cli.main([*argv, "--prompt-lookup-ngram", "2"]) == 0
        assert re.search(r"prompt lookup: \d+ of \d+ guesses came", capsys.readouterr().err)

    def test_bench_json(self, install, capsys):
        loader = install(FakeEngine())
        assert cli.main(["bench", "-p", "8", "16", "-n", "4", "-r", "2", "-o", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["test"] for row in rows] == ["pp8", "pp16", "tg4"]
        # one repetition to warm up, two that count
        assert loader.engine.calls == [8] * 3 + [16] * 3 + [1] * 12
        decode = rows[-1]
        assert decode["read_share"] == pytest.approx(4000 * decode["tokens_per_s"] / 2e9)
        assert rows[0]["read_share"] is None
        assert rows[0]["kv_format"] == "fp32"
        assert all(row["tokens_per_s"] > 0 for row in rows)

    def test_bench_of_a_batch(self, install, capsys):
        loader = install(FakeEngine())
        argv = ["bench", "-p", "8", "-n", "4", "-r", "1", "--batch", "3", "-o", "json"]
        assert cli.main(argv) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["test"] for row in rows] == ["pp8x3", "tg4x3"]
        assert loader.engine.batches == [3] * 2 + [3] * 8
        share = 4000 * rows[1]["tokens_per_s"] / 3 / 2e9  # a step reads the weights once for all
        assert rows[1]["read_share"] == pytest.approx(share)

    def test_bench_csv(self, install, capsys):
        install(FakeEngine())
        assert cli.main(["bench", "-p", "8", "-n", "4", "-r", "1", "-o", "csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["test"] for row in rows] == ["pp8", "tg4"]
        assert float(rows[0]["tokens_per_s_std"]) == 0

    @pytest.mark.parametrize("output", [["-o", "md"], []])
    def test_bench_markdown_is_the_default_off_a_terminal(self, install, capsys, output):
        install(FakeEngine())
        assert cli.main(["bench", "-p", "8", "-n", "-r", "1", *output]) == 0
        header, rule, row = capsys.readouterr().out.splitlines()
        assert header.startswith("| model | size | params |")
        assert set(rule) == set("| -")
        assert header.count("|") == rule.count("|") == row.count("|")
        assert "| pp8 |" in row

    @pytest.mark.parametrize("argv", [["info"], ["bench", "-p", "8", "-n", "4", "-r", "1"]])
    def test_a_terminal_gets_a_table(self, install, capsys, monkeypatch, argv):
        install(FakeEngine())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "│" in out
        assert "fake" in out
