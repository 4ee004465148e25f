"""Python imports this by itself in the tests' jobs, which have this folder in PYTHONPATH.

MVD_TEST_BRAKE=FILE: as long as the file exists, an attempt waits after two updates, until it is told to stop; so a test
can count on a stage's not being over. MVD_TEST_FAULT=FILE: as long as the file exists, no stage starts.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from types import ModuleType

BRAKE, FAULT = os.environ.get("MVD_TEST_BRAKE"), os.environ.get("MVD_TEST_FAULT")


def brake(module: ModuleType) -> None:
    take_step = module.take_step
    done = 0

    def braked(*arguments):
        nonlocal done
        while done >= 2 and os.path.exists(BRAKE) and not module.stop_requested():
            time.sleep(0.1)
        done += 1
        return take_step(*arguments)

    module.take_step = braked


class Fault(importlib.abc.MetaPathFinder):
    """Fails before anything slow is imported."""

    def find_spec(self, name, path, target=None):
        if name == "mvd.run" and os.path.exists(FAULT):
            raise RuntimeError("the fault that a test asked for")


class Brake(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes the training loop once it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "mvd.train.loop":
            return None
        self.spec = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)

    def exec_module(self, module):
        module.__file__ = self.spec.origin
        self.spec.loader.exec_module(module)
        brake(module)


if BRAKE:
    sys.meta_path.insert(0, Brake())
if FAULT:
    sys.meta_path.insert(0, Fault())
