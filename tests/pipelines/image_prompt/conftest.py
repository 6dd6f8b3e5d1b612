import pytest
from support import wan
from support.image_models import CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model():
    return wan.transformer()
