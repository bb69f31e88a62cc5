import pytest
import torch

# Every test is too small to gain from threads, and one thread makes results repeatable.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLKR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
