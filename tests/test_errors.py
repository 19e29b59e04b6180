from cifarnet.errors import causes


def test_causes_that_form_a_circle_end():
    """TensorBoard's writer raises the error of its thread again, also while this error is handled."""
    first, second = OSError("full"), ValueError("closed")
    first.__context__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    assert list(causes(None)) == []
