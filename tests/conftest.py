import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Every test is too small to gain from threads, and one thread makes results repeatable.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_addoption(parser):
    parser.addoption(
        "--noise", action="store_true", help="rounding noise of a few eps in every matrix product"
    )
    parser.addoption("--no-mkldnn", action="store_true", help="compute without oneDNN")


class NoisyProducts(TorchDispatchMode):
    """Multiplies matrix products by ``1 + 4 eps z``, z standard normal: another CPU's rounding.

    Half-precision products are summed in fp32 and rounded once, so that they get half an eps.
    """

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot")

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.PRODUCTS or not product.is_floating_point():
            return product
        self.generator.manual_seed(0)  # equal products get equal noise, as on any one CPU
        noise = torch.randn(product.shape, generator=self.generator, dtype=torch.float64)
        eps = torch.finfo(product.dtype).eps
        factor = 1 + (4 if eps < 1e-6 else 0.5) * eps * noise
        product.copy_((product.double() * factor).to(product.dtype))
        return product


@pytest.fixture(autouse=True)
def _rounding(request):
    """Rounds as other CPUs would, where ``--noise`` or ``--no-mkldnn`` ask for it."""
    mkldnn = torch.backends.mkldnn.enabled
    if request.config.getoption("--no-mkldnn"):
        torch.backends.mkldnn.set_flags(False)
    try:
        if request.config.getoption("--noise"):
            with NoisyProducts():
                yield
        else:
            yield
    finally:
        torch.backends.mkldnn.set_flags(mkldnn)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLKR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Name of a small CLIP with random weights."""
    from helpers import write_clip

    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """Folder of images whose color tells their class."""
    from helpers import write_images

    return write_images(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def run(tmp_path_factory, small, colors):
    """A finished run folder."""
    from helpers import small_run

    output = tmp_path_factory.mktemp("runs") / "run"
    small_run(output, small, colors)
    return output
