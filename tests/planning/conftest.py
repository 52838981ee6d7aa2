from tests.training.conftest import job  # noqa: F401
