"""How much the fuzzer tried."""

from fuzz.values import CASES


def pytest_terminal_summary(terminalreporter) -> None:
    for kind, cases in CASES.items():
        terminalreporter.write_line(f"{kind}: {cases} cases")
