"""Published layouts, built small, are read and saved as transformers reads them."""

import pytest
from layouts import CHECKS, LAYOUTS, open_case


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_read_and_saved_as_transformers_reads_it(name, tmp_path):
    case = open_case(name, tmp_path)
    found = {column: check(case) for column, check in CHECKS.items()}
    assert found == dict.fromkeys(CHECKS, "equal")
