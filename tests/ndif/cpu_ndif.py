"""What stands between the NDIF server and a machine without a GPU: loading, clean-up, and one keyword.

Everything else is the server's own: its API, queue, controller, and how it unpacks and runs what it is sent.
"""

import gc
import importlib
from typing import Any

import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable


def _forgiving(method: Any) -> classmethod:
    """A class method that nnsight 0.8.1 has, without the `trust_remote_code=` that ndif 0.1.2 gives it."""

    def call(cls: type, *args: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return method.__func__(cls, *args, **options)

    return classmethod(call)


def forgive() -> None:
    """In this process, whatever Ray makes it run."""
    for name in ("describe_checkpoint", "max_tp_size"):
        setattr(Remotable, name, _forgiving(vars(Remotable)[name]))


class OnCpu:
    """Loads onto the CPU, and leaves CUDA alone afterwards."""

    def load_from_disk(self) -> HuggingFaceModel:
        self.gpu_mem_bytes_by_id: dict[int, int] = {}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self) -> None:
        if getattr(self, "execution_sandbox", None) is not None:
            self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class Trusting(OnCpu, BaseModelDeployment):
    """Runs what it is sent in the process of the model."""


@ray.remote(num_cpus=1, max_restarts=-1)
class Careful(OnCpu, SandboxModelDeployment):
    """Runs what it is sent in a process without the weights, as NDIF does for most keys."""

    def execute(self, request: Any) -> Any:
        return self.run_in_runner(request, None)


@ray.remote(num_cpus=0, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_ControllerActor):
    """The server's own, in a process where the above holds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        importlib.import_module("cpu_ndif").forgive()  # Ray sends the class without its module
        _ControllerActor.__init__(self, *args, **options)
