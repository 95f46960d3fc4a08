import pytest


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="small sizes and few rounds: only shows that it runs")


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")
