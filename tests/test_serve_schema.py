"""schemathesis over what `/openapi.json` says: no request gets an answer that is not described."""

import contextlib

import pytest
from test_serve import HI, Running, tokenizer  # noqa: F401  (a fixture)

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
hypothesis = pytest.importorskip("hypothesis")

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


def explore(running, examples, change, headers=None, **validation):
    """Random requests to every endpoint, valid and not."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    counts = {}
    for operation in schema.get_all_operations():
        for mode in modes:
            cases = operation.ok().as_strategy(generation_mode=mode)

            @hypothesis.settings(max_examples=examples, **SETTINGS)
            @hypothesis.given(cases)
            def ask(case):
                change(case)
                answer = case.call(headers=headers)
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
                case.validate_response(answer, headers=headers, **validation)

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong
                ask()
    return counts


@pytest.mark.deep
def test_requests_are_answered_as_described(tokenizer):  # noqa: F811
    """As they come, so that most ask for a model that there is not."""
    with Running({}, tokenizer) as running:
        counts = explore(running, 40, lambda case: None)
        assert counts.get(404) and counts.get(400) and 500 not in counts


@pytest.mark.deep
def test_requests_that_reach_the_model_are_answered_as_described(tokenizer):  # noqa: F811
    """With the model's name: what is valid may be too long, or wrong in another way than a schema
    says, so 400 is fine; nothing else is but 200."""
    from schemathesis.checks import load_all_checks
    from schemathesis.specs.openapi import checks

    load_all_checks()

    def named(case):
        if isinstance(case.body, dict) and case.operation.method == "post":
            case.body["model"] = "tiny"
            case.body.pop("max_completion_tokens", None)
            if "input" not in case.body:
                case.body["max_tokens"] = 3
            if isinstance(case.body.get("messages"), list):
                case.body["messages"] = HI

    with Running({}, tokenizer) as running:
        left_out = [checks.positive_data_acceptance, checks.negative_data_rejection]
        counts = explore(running, 60, named, excluded_checks=left_out)
        assert counts.get(200, 0) > 30 and 500 not in counts
