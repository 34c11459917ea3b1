import signal

from tests.helpers.program import SMALL, Terminal, call, start

LONG = ("--ignore-eos", "--temperature", "1", "--max-tokens", "3000")


def chat(model, stdin, *arguments):
    return call("chat", model, *SMALL, "--temperature", "0", "--max-tokens", "6", *arguments, stdin=stdin)


def test_each_line_is_a_turn_and_follow_ups_are_cached(tiny_model):
    result = chat(tiny_model, "Hello there, model\n\nAnd again\n/stats\n", "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    numbers = next(line for line in result.stderr.splitlines() if "prompt tokens" in line)
    assert "(0 cached)" not in numbers
    assert "context: " in result.stderr


def test_commands(tiny_model):
    once = chat(tiny_model, "Hi\n/stats\n", "--ignore-eos").stderr
    script = "/system Be brief.\nHi\n/clear\n/system\nHi\n/stats\n/help\n/exit\nnever read\n"
    result = chat(tiny_model, script, "--ignore-eos")
    assert result.exit_code == 0
    context = next(line for line in once.splitlines() if line.startswith("context"))
    assert context in result.stderr
    assert "/regen" in result.stderr
    assert result.stderr.count("cut after 6 tokens") == 2
    bad = chat(tiny_model, "/dance\nHi\n")
    assert bad.exit_code == 2
    assert "/help lists" in bad.stderr


def test_regen_replaces_the_answer(tiny_model):
    def context(script):
        lines = chat(tiny_model, script + "/stats\n", "--ignore-eos").stderr.splitlines()
        return next(line for line in lines if line.startswith("context"))

    assert context("Hi\n") == context("Hi\n/regen\n")
    assert context("Hi\n") != context("Hi\nHi\n")
    assert chat(tiny_model, "/regen\n").exit_code == 2


def test_several_lines_between_quotes(tiny_model):
    def tokens(script):
        result = chat(tiny_model, script + "/stats\n")
        return next(line.partition(" prompt")[0] for line in result.stderr.splitlines() if "prompt tokens" in line)

    assert int(tokens('"""one\ntwo"""\n')) == int(tokens("one two\n"))
    assert int(tokens('"""\n/exit\n"""\n')) == int(tokens("hello\n"))
    assert "no closing" in chat(tiny_model, '"""one\ntwo\n').stderr


def test_a_full_context_is_said(tiny_model):
    result = chat(tiny_model, "Hello\n" + "more " * 20 + "\n", "--max-model-len", "64", "--ignore-eos")
    assert result.exit_code == 2
    assert "context holds 64" in result.stderr
    assert "/clear" in result.stderr
    for limit in ((), ("--max-tokens", "1000")):
        full = call("chat", tiny_model, *SMALL, "--max-model-len", "64", "--ignore-eos", *limit, stdin="Hello\n")
        assert full.exit_code == 0
        assert "the context of 64 tokens is full" in full.stderr


def test_on_a_terminal_ctrl_c_stops_the_answer(tiny_model):
    with Terminal("chat", tiny_model, *SMALL, *LONG) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r?\n.{200}")
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped\).*>>> ")
        terminal.type("/stats\n")
        assert "finished: abort" in terminal.wait_for("context: .*>>> ")
        terminal.type("again\n")
        terminal.wait_for("again\r?\n.{200}")
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped\).*>>> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("no command.*>>> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press("\x03", "Ctrl-C again.*>>> ")
        assert terminal.end("\x03") == 130


def test_ctrl_d_leaves(tiny_model):
    with Terminal("chat", tiny_model, *SMALL) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_sigint_stops_the_answer_to_a_piped_line(tiny_model):
    process = start("chat", tiny_model, *SMALL, *LONG)
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(b"/stats\n", timeout=60)
    assert process.returncode == 0, errors
    assert b"(stopped)" in errors
    assert b"finished: abort" in errors
    assert output.endswith(b"\n")
