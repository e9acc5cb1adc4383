"""What the tests of planning and of scheduling share."""

import pytest


@pytest.fixture
def counted():
    """A class of text that counts its copies."""

    class Counted(str):
        copies = 0

        def __deepcopy__(self, memo):
            Counted.copies += 1
            return self

    return Counted
