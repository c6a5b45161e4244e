"""The section `deepspeed` passes settings through and refuses what the project decides."""

from __future__ import annotations

import pytest

from pipeline.config.deepspeed_keys import forbidden_keys


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping", ["given 1.0", "optimizer.gradient_clip_val"]),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", ["given 3", "train.zero_stage"]),
        ({"communication_data_type": "bf16"}, "communication_data_type", ['"bf16"', "averaged in float32"]),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
            ["given true", "rounded"],
        ),
        ({"zero_optimization": 3}, "zero_optimization", ["given 3", "mapping"]),
    ],
)
def test_a_setting_that_the_project_decides_is_refused_with_its_owner(given, path, words):
    (found,) = forbidden_keys(given)
    assert found.path == path
    for word in words:
        assert word in found.message


def test_each_forbidden_setting_is_reported_even_beside_a_bad_zero_optimization():
    assert {found.path for found in forbidden_keys({"fp16": {}, "amp": {}, "zero_optimization": 3})} == {
        "fp16",
        "amp",
        "zero_optimization",
    }


def test_other_settings_pass():
    assert list(forbidden_keys({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1}})) == []
