"""What several tests of the demo share."""

import pytest
from transformers import Idefics3Processor

from batchvlm.demo.model import build_processor


@pytest.fixture(scope="session")
def processor() -> Idefics3Processor:
    return build_processor()
