"""A plugin of pytest: a failing test is reported when it fails, not after the last one, which time may not allow."""

LAST_CHARACTERS = 2500


class Failures:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"--- {report.nodeid} ({report.when})")
            terminal.write_line(report.longreprtext[-LAST_CHARACTERS:])


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # with pytest-xdist, in the process that collects the reports
        config.pluginmanager.register(Failures(config))
