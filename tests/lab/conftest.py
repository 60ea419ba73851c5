"""The quick version of a study, measured without writing files."""

import pytest

from memformer.lab import STUDIES


@pytest.fixture
def measure_quickly():
    """(name of a study that simulates) -> its result; its figure is drawn too."""

    def measure(name):
        study = STUDIES[name]
        result = study.measure({}, {**study.settings, **study.quick.settings})
        assert study.draw(result).axes
        return result

    return measure
