"""The op table from Python, as the self-test has it."""

from glmlora.optable import *  # noqa: F403
