import pytest
import torch

# Every test is too small to gain from threads, and one thread makes results repeatable.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
