"""What a run says it was made on."""

from importlib.metadata import PackageNotFoundError

import rigsa_kernels
from rigsa.experiments import hardware


def test_versions_where_nothing_was_installed(monkeypatch):
    """A checkout on PYTHONPATH has no metadata, and a package may be absent."""

    def version(name):
        if name == "torch":
            return "2.13.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(hardware, "version", version)
    own = f"rigsa {rigsa_kernels.__version__}"
    assert hardware.versions("torch", "triton") == f"torch 2.13.0, triton not installed, {own}"
