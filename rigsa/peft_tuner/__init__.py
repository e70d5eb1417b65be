"""RIGSA as a method of PEFT: ``get_peft_model(model, RigsaConfig(...))``. docs/peft.md has examples that run.

Importing this registers the method. `import rigsa` has it imported as soon as PEFT is, and not before. The layers are
`rigsa_kernels.GatedSparseLinear`, one for each adapter of a linear layer (`adapter_linear`); `layer` is what PEFT puts
in the place of the linear layer, and `model` what it puts around the model.
"""

from rigsa.registration import check_version, register

check_version()

from rigsa.peft_tuner.config import RigsaConfig  # noqa: E402
from rigsa.peft_tuner.model import RigsaModel  # noqa: E402
from rigsa.peft_tuner.sources import watch_configurations  # noqa: E402

register(RigsaConfig, RigsaModel)
watch_configurations()

__all__ = ["RigsaConfig", "RigsaModel"]
