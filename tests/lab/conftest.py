"""The quick version of a study, measured without writing files; training on one device."""

import jax
import pytest

from memformer.lab import STUDIES


@pytest.fixture
def measure_quickly():
    """(name of a study that simulates, settings that are smaller still) -> its result; its figure is drawn too."""

    def measure(name, **smaller):
        study = STUDIES[name]
        result = study.measure({}, {**study.settings, **study.quick.settings, **smaller})
        assert study.draw(result).axes
        return result

    return measure


@pytest.fixture(scope="session")
def one_device():
    """A context in which JAX has one device: a tiny run is slower, and compiles longer, on eight."""

    class OneDevice:
        def __enter__(self):
            self.patch, device = pytest.MonkeyPatch(), jax.devices()[:1]
            self.patch.setattr(jax, "devices", lambda *_: device)

        def __exit__(self, *_):
            self.patch.undo()

    return OneDevice
