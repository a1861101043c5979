"""Every option with a number names itself, the value and the law that the value breaks."""

import argparse

import pytest

from lalora_app.cli import main
from lalora_app.cli.argument_types import at_least_one, to_delta, to_limit, to_positive, to_seeds

NO_NUMBERS = ["many", "", " ", "nan", "1;2", "½", "0x10", "1" * 5000]
NO_INTEGERS = [*NO_NUMBERS, "2.5", "1e3", "inf", "-inf"]
BAD = {
    "delta": [*NO_NUMBERS, "0", "1", "2", "-0.5", "inf"],
    "limit": [*NO_NUMBERS[:-1], "0", "-1", "-inf"],
    "limits": [*NO_NUMBERS[:-1], "1,,2", "1,0", "3,nan", "1,"],
    "count": [*NO_INTEGERS, "0", "-1"],
    "counts": [*NO_INTEGERS, "0", "1,0", "2,,4", "4,"],
    "positive": [*NO_NUMBERS, "0", "-1", "inf", "-inf"],
    "engine": ["ray", "Local", "", " "],
    "seeds": [*NO_INTEGERS, "-1", "1,-2", "1,,2"],
    "ranges": [*NO_INTEGERS, "-1", "5..2", "..", "1..", "0..x", "-2..2", "1...3"],
}
KINDS = {
    "--nodes": "count",
    "--clients-per-gpu": "count",
    "--workers": "count",
    "--engine": "engine",
    "--days": "count",
    "--delta": "delta",
    "--confidence": "delta",
    "--epsilon": "limit",
    "--max-epsilon": "limit",
    "--max-epsilon-alone": "limit",
    "--epsilons": "limits",
    "--examples": "count",
    "--max-examples": "count",
    "--min-steps": "count",
    "--local-steps": "counts",
    "--max-seconds": "positive",
    "--examples-per-second": "positive",
}
ANY_TEXT = {"--run-config", "--name", "--methods", "--app", "--run", "--mechanism", "--path"}
ANY_TEXT |= {"--reference", "--dataset", "--host", "--data-path", "--node-config", "--write"}
ANY_TEXT |= {"--second-task", "--picture"}


def leaves(parser, words=()):
    """Yield the words and the parser of every command without subcommands."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in below:
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name))
    if not below:
        yield words, parser


def options():
    """Yield (words of the command, required arguments, option) for each option with a value."""
    for words, parser in leaves(main._parser()):
        needed = [a for a in parser._actions if a.required and a.nargs != 0]
        given = [
            text
            for a in needed
            for text in ((a.option_strings[-1], "x") if a.option_strings else ("x",))
        ]
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:
                yield words, given, max(action.option_strings, key=len)


def kind_of(words, option):
    if option == "--seeds":
        return "ranges" if words == ("audit",) else "seeds"
    return KINDS[option]


NUMBERS = [found for found in options() if found[2] not in ANY_TEXT]
CASES = [(*found, value) for found in NUMBERS for value in BAD[kind_of(found[0], found[2])]]


def test_every_option_of_the_parser_is_looked_at():
    assert {option for _, _, option in NUMBERS} == {*KINDS, "--seeds"}
    assert len(NUMBERS) > 12


@pytest.mark.parametrize(
    ("words", "given", "option", "value"), CASES, ids=lambda part: str(part)[:20]
)
def test_a_bad_value_is_told_with_its_option_and_its_law(
    words, given, option, value, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("LALORA_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        main.main([*words, *given, f"{option}={value}"])
    assert refused.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert option in last
    assert " must be " in last
    named = [part for part in [value, *value.replace("..", ",").split(",")] if repr(part) in last]
    assert named


GOOD = [
    (to_delta, "1e-5", 1e-5),
    (to_limit, "inf", float("inf")),
    (to_limit, "1" * 400, float("inf")),
    (at_least_one, "1", 1),
    (to_positive, "0.5", 0.5),
]


@pytest.mark.parametrize(("kind", "text", "value"), GOOD)
def test_good_values_pass(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("3,1", [3, 1]), ("0..3", [0, 1, 2, 3]), ("4..4", [4])]
)
def test_seeds_are_a_list_or_a_range(text, seeds):
    assert list(to_seeds(text)) == seeds
