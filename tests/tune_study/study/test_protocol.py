from tune_study.config import assign, field_names, parse_trial
from tune_study.study import protocol

VALUES = {"model": "m", "dataset": "digits"}


def test_the_protocol_is_every_field_but_the_axes():
    axes = {"model", "dataset", "lora.r", "lora.lora_alpha", "seed"}
    axes |= {name for name in field_names() if name.startswith("quantization.")}
    assert set(protocol.fields()) == set(field_names()) - axes
    assert {"lora.target_modules", "data.image_size", "training.compute_dtype"} < {
        *protocol.fields()
    }
    base = parse_trial(VALUES)
    for name, value in (("seed", 7), ("lora.r", 2), ("quantization.skip_layers", ["x"])):
        assert protocol.difference([base], [parse_trial(assign(VALUES, name, value))]) == []
    changed = parse_trial({**VALUES, "data": {"image_size": 96}, "lora": {"lora_dropout": 0.5}})
    assert protocol.difference([base], [base, changed]) == [
        "lora.lora_dropout was 0.1 and is 0.5",
        "data.image_size was None and is 96",
    ]
    # A field that the study's grid varies is an axis, and may have further values.
    rates = [parse_trial(assign(VALUES, "training.learning_rate", rate)) for rate in (0.1, 0.2)]
    assert protocol.difference(rates, [rates[1]]) == []
    third = parse_trial(assign(VALUES, "training.learning_rate", 0.3))
    assert protocol.difference(rates, [third]) == []
    assert protocol.difference(rates[:1], [third]) == ["training.learning_rate was 0.1 and is 0.3"]
    assert protocol.difference([], [third]) == []
    other = parse_trial({**VALUES, "training": {"learning_rate": 0.2, "weight_decay": 1}})
    assert protocol.difference(rates, [other]) == ["training.weight_decay was 0.01 and is 1.0"]
