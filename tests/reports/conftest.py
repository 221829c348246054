import pytest
from networks import samples, trained


@pytest.fixture(scope="session")
def model():
    """A trained small network, in training mode, as trainers leave it."""
    return trained()


@pytest.fixture
def data():
    return samples(24)
